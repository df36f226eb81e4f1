"""Batches of the PTW source made by NumPy on the host, as in many scripts."""

import numpy as np


def sample_ptw(
  rng: np.random.Generator,
  batch_size: int,
  seq_length: int,
  alphabet_size: int = 2,
) -> np.ndarray:
  """Returns one-hot symbols `[B, T, K]`, float32, with a Dirichlet(1/2) prior.

  Every node of the binary tree over time splits with probability 1/2 if its
  parent did, and a new segment starts in the middle of each that does.
  """
  depth = max(1, (seq_length - 1).bit_length())
  starts = np.zeros((batch_size, 2**depth), bool)
  splits = np.ones((batch_size, 1), bool)
  for level in range(depth):
    splits &= rng.random(splits.shape) < 0.5
    block = 2 ** (depth - level)
    starts[:, block // 2 :: block] = splits
    splits = np.repeat(splits, 2, axis=1)
  starts[:, 0] = True
  # The segments of all sequences, numbered through.
  segments = np.cumsum(starts[:, :seq_length]).reshape(batch_size, seq_length)
  parameters = rng.dirichlet((0.5,) * alphabet_size, segments[-1, -1])
  upper = parameters.cumsum(axis=-1)[segments - 1, :-1]  # [B, T, K - 1]
  symbols = (rng.random((batch_size, seq_length, 1)) > upper).sum(axis=-1)
  return np.eye(alphabet_size, dtype=np.float32)[symbols]
