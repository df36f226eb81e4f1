"""The same networks and training in PyTorch, where it is installed.

Axes: B batch, T time, K alphabet size, D embedding.
"""

from collections.abc import Callable
import math
from typing import Any

import host_batches
import networks
import numpy as np
import timing
import torch
from torch import nn


class LSTM(nn.Module):
  """LSTM -> ReLU -> linear."""

  def __init__(self, output_size: int, hidden_size: int):
    """Initializes the network."""
    super().__init__()
    self.core = nn.LSTM(output_size, hidden_size, batch_first=True)
    self.head = nn.Linear(hidden_size, output_size)

  def forward(self, inputs: torch.Tensor) -> torch.Tensor:
    """Returns logits `[B, T, K]`."""
    return self.head(torch.relu(self.core(inputs)[0]))


class Transformer(nn.Module):
  """PyTorch's own encoder: post-norm, ReLU, causal, sinusoids added.

  By default it also drops attention weights and hidden units of the MLPs.
  """

  def __init__(
    self,
    output_size: int,
    seq_length: int,
    embedding_dim: int,
    num_layers: int,
    num_heads: int,
    dropout_prob: float,
    drops_inside: bool,
  ):
    """Initializes the network."""
    super().__init__()
    self.scale = math.sqrt(embedding_dim)
    self.embed = nn.Linear(output_size, embedding_dim, bias=False)
    nn.init.trunc_normal_(self.embed.weight, std=0.02)
    self.dropout = nn.Dropout(dropout_prob)
    layer = nn.TransformerEncoderLayer(
      embedding_dim,
      num_heads,
      dim_feedforward=4 * embedding_dim,
      dropout=dropout_prob,
      batch_first=True,
    )
    if not drops_inside:
      layer.self_attn.dropout = 0.0
      layer.dropout.p = 0.0
    self.encoder = nn.TransformerEncoder(layer, num_layers)
    self.head = nn.Linear(embedding_dim, output_size)
    mask = nn.Transformer.generate_square_subsequent_mask(seq_length)
    self.register_buffer('mask', mask)
    positions = torch.arange(seq_length)[:, None]
    frequencies = 1e4 ** (-torch.arange(0, embedding_dim, 2) / embedding_dim)
    angles = positions * frequencies
    waves = torch.stack([angles.sin(), angles.cos()], dim=-1)
    self.register_buffer('waves', waves.reshape(seq_length, embedding_dim))

  def forward(self, inputs: torch.Tensor) -> torch.Tensor:
    """Returns logits `[B, T, K]`."""
    hidden = self.dropout(self.embed(inputs) * self.scale + self.waves)
    return self.head(self.encoder(hidden, mask=self.mask, is_causal=True))


def make_step(
  model_type: str,
  output_size: int,
  seq_length: int,
  kwargs: dict[str, Any],
  learning_rate: float,
  clip_grad_norm: float,
  drops_inside: bool = False,
) -> Callable[[np.ndarray], torch.Tensor]:
  """Returns the training step, from a batch `[B, T, K]` to its loss.

  Args:
    model_type: `lstm` or `transformer`.
    output_size: K.
    seq_length: T.
    kwargs: Architecture, as the project takes it.
    learning_rate: Learning rate of Adam.
    clip_grad_norm: Largest global norm of a gradient.
    drops_inside: Dropout where PyTorch has it by default, but we have not.
  """
  if model_type == 'lstm':
    network = LSTM(output_size, **kwargs)
  else:
    # Sinusoids are the only positions PyTorch's users have at hand.
    kwargs = {k: v for k, v in kwargs.items() if k != 'positional_encodings'}
    network = Transformer(
      output_size, seq_length, drops_inside=drops_inside, **kwargs
    )
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  # As JAX does by default.
  torch.backends.cuda.matmul.allow_tf32 = True
  network.to(device)
  optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)

  def step(batch: np.ndarray) -> torch.Tensor:
    batch = torch.from_numpy(batch).to(device)
    optimizer.zero_grad()
    logits = network(batch)[:, :-1].flatten(0, 1)
    targets = batch[:, 1:].argmax(dim=-1).flatten()
    loss = nn.functional.cross_entropy(logits, targets)
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), clip_grad_norm)
    optimizer.step()
    return loss.detach()

  return step


def training(job: timing.Job) -> timing.Work:
  """The work of training, for a child process."""
  rng = np.random.default_rng(0)
  shape = (job.batch_size, job.seq_length, networks.ALPHABET_SIZE)
  step = make_step(
    job.model_type,
    networks.ALPHABET_SIZE,
    job.seq_length,
    job.kwargs,
    job.learning_rate,
    job.clip_grad_norm,
    drops_inside=job.network == 'pytorch_defaults',
  )

  def run() -> list[torch.Tensor]:
    losses = [
      step(host_batches.sample_ptw(rng, *shape)) for _ in range(job.steps)
    ]
    return [loss.cpu() for loss in losses]

  return timing.Work(run, peak_device_bytes=peak_device_bytes)


def peak_device_bytes() -> int | None:
  """Returns the most memory in use so far on a GPU; None without one."""
  if not torch.cuda.is_available():
    return None
  return torch.cuda.max_memory_allocated()
