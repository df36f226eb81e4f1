"""Positional encodings of the Transformer.

  NONE      no positions; causal attention still tells a prefix's length
  SIN_COS   sinusoids added to the embeddings (Vaswani et al., 2017, sec. 3.5)
  ALIBI     a bias linear in the distance (Press et al., 2022)
  RELATIVE  learned attention to sinusoids of the distance (Dai et al., 2019)

Positions count from the start of the sequence and distances from the query, so
a prefix is encoded as it is inside the whole. In SIN_COS and ALIBI the release
of 2023 does otherwise: docs/coming_from_the_release.md.
"""

import enum
import math
from typing import Any
from typing import NamedTuple
from typing import Protocol

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


# Fields that `positional_encodings_params` may hold for each encoding.
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


def distances(queries: range, keys: range) -> jax.Array:
  """Returns query - key, int32 `[queries, keys]`."""
  # Computed where it is used: as constants they would outgrow a program.
  query = jnp.arange(queries.start, queries.stop)
  return query[:, None] - jnp.arange(keys.start, keys.stop)


class Encoding(Protocol):
  """Positional encoding in attention; a pytree of its learned parameters.

  logits(q_t, k_s) = content_query(q_t)^T k_s / sqrt(D) + bias(q_t, t, s)
  """

  def content_query(self, query: jax.Array) -> jax.Array:
    """Returns the queries to multiply with the keys, `[heads, B, t, D]`."""

  def bias(
    self, query: jax.Array, queries: range, keys: range
  ) -> jax.Array | None:
    """Returns the term added to the logits, of meaning where key <= query.

    It is free up to a term of the query alone, which the softmax does not see.

    Args:
      query: `[heads, B, t, D]`.
      queries: Times of the queries.
      keys: Times of the keys, up to that of the last query.

    Returns:
      `[heads, B or 1, t or 1, s]`, or None for nothing.
    """


class Content(NamedTuple):
  """Content alone: NONE, and SIN_COS, whose positions are in the content."""

  def content_query(self, query: jax.Array) -> jax.Array:
    return query

  def bias(self, query: jax.Array, queries: range, keys: range) -> None:
    return None


class Alibi(NamedTuple):
  """A bias linear in the distance, -slope * (query - key).

  To the softmax that is -slope * (last query - key): a number for every key.
  """

  def content_query(self, query: jax.Array) -> jax.Array:
    return query

  def bias(self, query: jax.Array, queries: range, keys: range) -> jax.Array:
    # In bfloat16, distances of more than 256 would be rounded.
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    slopes = jnp.asarray(alibi_slopes(query.shape[0]), dtype)
    past = distances(queries[-1:], keys).astype(dtype)
    return -slopes[:, None, None, None] * past


class Relative(NamedTuple):
  """Content and distance, each with a query of its own.

  Dai et al., Transformer-XL, 2019, section 3.3, for one head, before scaling:

    A(i, j) = (q_i + u)^T k_j + (q_i + v)^T W R_{i-j}

  with R the sinusoids of the distance and W, u, v learned.

  Attributes:
    content_bias: u, `[heads, D]`.
    position_bias: v, `[heads, D]`.
    position_key: W R of the distances T, ..., 0, `[heads, D, T + 1]`.
  """

  content_bias: jax.Array
  position_bias: jax.Array
  position_key: jax.Array

  def content_query(self, query: jax.Array) -> jax.Array:
    return query + self.content_bias[:, None, None]

  def bias(self, query: jax.Array, queries: range, keys: range) -> jax.Array:
    num_heads, batch_size, num_queries, size = query.shape
    query = query + self.position_bias[:, None, None]
    query = query.reshape(num_heads, -1, size) / math.sqrt(size)
    # Times the keys of distances s, ..., 0.
    logits = query @ self.position_key[..., -len(keys) - 1 :]
    return _shift(logits.reshape(num_heads, batch_size, num_queries, -1))


class RelativePositions(hk.Module):
  """Learned parameters of RELATIVE."""

  def __init__(self, max_timescale: float = 1e4, name: str | None = None):
    """Initializes the module; `max_timescale` as in `sinusoids`."""
    super().__init__(name)
    self._max_timescale = max_timescale

  def __call__(
    self, seq_length: int, num_heads: int, size: int, dtype: Any
  ) -> Relative:
    """Returns the encoding of T positions for heads of the given size."""
    waves = sinusoids(
      np.arange(seq_length + 1)[::-1], num_heads * size, self._max_timescale
    )
    projected = hk.Linear(
      num_heads * size, with_bias=False, name='position_key'
    )(jnp.asarray(waves, dtype))
    init = hk.initializers.TruncatedNormal(stddev=0.02)
    shape = (num_heads, size)
    return Relative(
      hk.get_parameter('content_bias', shape, dtype, init),
      hk.get_parameter('position_bias', shape, dtype, init),
      projected.T.reshape(num_heads, size, seq_length + 1),
    )


@jax.custom_vjp
def _shift(logits: jax.Array) -> jax.Array:
  """Turns distances into keys: row i of t moves left by t - i.

  Column c of s + 1 is for distance s - c. The last query meets the last key at
  distance 0, so out[i, j] = logits[i, j + t - i]. As memory lies, that is all
  but the first t numbers (Dai et al., 2019, appendix B): no gather.
  """
  *batch, rows, columns = logits.shape
  flat = logits.reshape(*batch, -1)[..., rows:]
  return flat.reshape(*batch, rows, columns - 1)


def _shift_forward(logits: jax.Array) -> tuple[jax.Array, None]:
  return _shift(logits), None


def _shift_backward(_: None, grad: jax.Array) -> tuple[jax.Array]:
  *batch, rows, columns = grad.shape
  flat = grad.reshape(*batch, -1)
  # With constant zeros it would be a `pad`, which XLA for CPUs computes number
  # by number.
  flat = jnp.concatenate([0 * flat[..., :rows], flat], axis=-1)
  return (flat.reshape(*batch, rows, columns + 1),)


_shift.defvjp(_shift_forward, _shift_backward)
