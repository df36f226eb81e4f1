"""Positional encodings of the Transformer.

  NONE      no positions; causal attention still tells a prefix's length
  SIN_COS   sinusoids added to the embeddings (Vaswani et al., 2017, sec. 3.5)
  ALIBI     a bias linear in the distance (Press et al., 2022)
  RELATIVE  learned attention to sinusoids of the distance (Dai et al., 2019)

Positions count from the start of the sequence and distances from the query, so
a prefix is encoded as it is inside the whole.
"""

import enum
import math
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from nonstationary_mbml import base_config


class PositionalEncodings(enum.Enum):
  """The encodings by name."""

  NONE = 'NONE'
  SIN_COS = 'SIN_COS'
  ALIBI = 'ALIBI'
  RELATIVE = 'RELATIVE'

  @classmethod
  def parse(cls, value: 'str | PositionalEncodings') -> 'PositionalEncodings':
    """Returns the encoding of a name in any case of letters.

    Raises:
      ValueError: If there is none.
    """
    if isinstance(value, cls):
      return value
    name = value.upper() if isinstance(value, str) else value
    choices = [encoding.name for encoding in cls]
    base_config.check_choice('positional_encodings', name, choices)
    return cls[name]


# What `positional_encodings_params` may hold for each encoding.
PARAMS: dict[PositionalEncodings, tuple[str, ...]] = {
  PositionalEncodings.NONE: (),
  PositionalEncodings.SIN_COS: ('max_timescale',),
  PositionalEncodings.ALIBI: (),
  PositionalEncodings.RELATIVE: ('max_timescale',),
}


def sinusoids(
  positions: np.ndarray, size: int, max_timescale: float = 1e4
) -> np.ndarray:
  """Returns sinusoids of the positions, float64 `[T, size]`.

    e(p, 2i) = sin(p / m^(2i / size)),  e(p, 2i + 1) = cos(p / m^(2i / size))

  Vaswani et al., 2017, section 3.5, with m the `max_timescale`. An odd size
  drops the last cosine.
  """
  frequencies = max_timescale ** (-np.arange(0, size, 2) / size)
  angles = np.asarray(positions)[:, None] * frequencies
  waves = np.stack([np.sin(angles), np.cos(angles)], axis=-1)
  return waves.reshape(len(angles), -1)[:, :size]


def alibi_slopes(num_heads: int) -> np.ndarray:
  """Returns the slope of every head, `[heads]`.

  Press et al., 2022, section 3: 2^(-8 h / n) for h = 1, ..., n when n is a
  power of two; else those of the next smaller power, then every other one of
  the next larger.
  """
  power = 1 << int(math.log2(num_heads))
  slopes = 2.0 ** (-8 * np.arange(1, power + 1) / power)
  extra = 2.0 ** (-8 * np.arange(1, 2 * power, 2) / (2 * power))
  return np.concatenate([slopes, extra[: num_heads - power]])


def distances(seq_length: int) -> jax.Array:
  """Returns query - key, int32 `[T, T]`."""
  time = jnp.arange(seq_length)
  return time[:, None] - time


def alibi_bias(num_heads: int, seq_length: int, dtype: Any) -> jax.Array:
  """Returns -slope * (query - key) where key <= query, `[heads, T, T]`."""
  slopes = jnp.asarray(alibi_slopes(num_heads), dtype)
  past = jnp.maximum(distances(seq_length), 0).astype(dtype)
  return -slopes[:, None, None] * past


class RelativePositions(hk.Module):
  """Attention logits with relative positions, before scaling.

  Dai et al., Transformer-XL, 2019, section 3.3, for one head:

    A(i, j) = (q_i + u)^T k_j + (q_i + v)^T W R_{i-j}

  with R the sinusoids of the distance and W, u, v learned.
  """

  def __init__(self, max_timescale: float = 1e4, name: str | None = None):
    """Initializes the module; `max_timescale` as in `sinusoids`."""
    super().__init__(name)
    self._max_timescale = max_timescale

  def __call__(self, query: jax.Array, key: jax.Array) -> jax.Array:
    """Returns attention logits, of meaning where key <= query.

    Args:
      query: `[B, T, heads, D]`.
      key: `[B, T, heads, D]`.

    Returns:
      `[B, heads, T, T]`, query by key.
    """
    _, seq_length, num_heads, size = query.shape
    # R_{T-1}, ..., R_0: column c is distance T - 1 - c.
    waves = sinusoids(
      np.arange(seq_length)[::-1], num_heads * size, self._max_timescale
    )
    projected = hk.Linear(
      num_heads * size, with_bias=False, name='position_key'
    )(jnp.asarray(waves, query.dtype))
    projected = projected.reshape(seq_length, num_heads, size)
    init = hk.initializers.TruncatedNormal(stddev=0.02)
    shape = (num_heads, size)
    content_bias = hk.get_parameter('content_bias', shape, query.dtype, init)
    position_bias = hk.get_parameter('position_bias', shape, query.dtype, init)
    content = jnp.einsum('bthd,bshd->bhts', query + content_bias, key)
    positions = jnp.einsum('bthd,shd->bhts', query + position_bias, projected)
    return content + _shift(positions)


def _shift(logits: jax.Array) -> jax.Array:
  """Turns distances into keys: row t moves left by T - 1 - t.

  `logits[..., t, c]` is for distance T - 1 - c, and key s is at distance t - s,
  so out[t, s] = logits[t, s + T - 1 - t]. One column of padding and a reshape
  do it without a gather (Dai et al., 2019, appendix B).
  """
  *batch, rows, columns = logits.shape
  padded = jnp.pad(logits, [(0, 0)] * (len(batch) + 1) + [(1, 0)])
  padded = padded.reshape(*batch, columns + 1, rows)
  return padded[..., 1:, :].reshape(logits.shape)
