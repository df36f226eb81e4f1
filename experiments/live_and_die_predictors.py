"""Live-and-Die weighting with KT base models, for any alphabet.

Willems, Coding for a binary independent piecewise-identically-distributed
source, IEEE Trans. Inf. Theory 42(6), 1996: the linear-complexity weighting,
in which a segment ends after its a-th symbol with probability h(a) = 1/(2a).
LAD is the exact Bayes mixture over all 2^(T-1) partitions of T symbols under
this prior, and so the Bayes predictor of the `lin` source.

With w_t(s) the posterior that the current segment began after s symbols, and
kt(. | x_{s..t-1}) the KT estimate from the symbols of that segment:

  p(x_t)       = sum_s w_t(s) kt(x_t | x_{s..t-1})
  w_{t+1}(s)   = w_t(s) kt(x_t | x_{s..t-1}) (1 - h(t - s + 1)) / p(x_t)
  w_{t+1}(t+1) = sum_s w_t(s) kt(x_t | x_{s..t-1}) h(t - s + 1) / p(x_t)

  symbols 0 0:  w_0 = 1,  w_1 = 1/2 1/2,  w_2 = 9/20 4/20 7/20

The weights need no logarithms: h is bounded away from 0 and 1 for any finite T
and the posterior is renormalised at every symbol.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nonstationary_mbml import base_config
from nonstationary_mbml import predictors

# Room for starts of segments grows by doubling, from this many symbols.
_LEAST_ROOM = 32


def hazard(run_length: jax.Array) -> jax.Array:
  """Returns h(a) = 1/(2a), the chance that a segment ends at length a >= 1."""
  return 1 / (2 * run_length)


class LADState(NamedTuple):
  """The posterior over the start of the current segment.

  There is room for S > t starts, so that arrays change their shape only when it
  is used up and doubles; entries beyond t are 0.

  Attributes:
    time: t, symbols seen so far, int32, the same for all sequences.
    weights: w_t(s) for s = 0, ..., t, and zeros, `[B, S]`.
    counts: Of the symbols since s, int32 `[B, S, K]`.
  """

  time: jax.Array
  weights: jax.Array
  counts: jax.Array


class LADPredictor(predictors.OptimalPredictor):
  """The exact Bayes predictor of the `lin` source: O(T^2) time, O(T) memory.

  Its state grows with time; where the time is not concrete (inside `jit`), room
  is made for all symbols of every chunk. With a `max_length` the state has room
  for so many symbols from the start, and can be carried through a `lax.scan`.
  """

  def __init__(
    self,
    concentration: float | Sequence[float] = 0.5,
    alphabet_size: int | None = None,
    max_length: int | None = None,
  ):
    """Initializes the predictor.

    Args:
      concentration: Of the Dirichlet prior of a segment; 1/2 is KT.
      alphabet_size: K, as in OptimalPredictor.
      max_length: Symbols that there is room for; None is as many as come.

    Raises:
      ValueError: If an argument is out of range.
    """
    super().__init__(concentration, alphabet_size)
    if max_length is not None:
      base_config.check_int('max_length', max_length, 1)
    self.max_length = max_length

  def empty_state(self, batch_size: int, alphabet_size: int) -> LADState:
    size = 1 + (self.max_length or 0)
    return LADState(
      # NumPy, so that it stays concrete inside jit.
      time=np.int32(0),
      weights=jnp.zeros((batch_size, size)).at[:, 0].set(1),
      counts=jnp.zeros((batch_size, size, alphabet_size), jnp.int32),
    )

  def update(self, symbols: jax.Array, state: LADState) -> LADState:
    return self.unroll({}, None, symbols[:, None], state)[1]

  def output_from_state(self, state: LADState) -> jax.Array:
    prior = self.prior(state.counts.shape[-1], state.weights.dtype)
    kts = predictors.kt_probs(state.counts, prior)
    return jnp.log((state.weights[..., None] * kts).sum(axis=1))

  def unroll(
    self,
    params: predictors.Params,
    rng: jax.Array | None,
    batch: jax.Array,
    init_state: LADState | None = None,
  ) -> tuple[jax.Array, LADState]:
    state = self._start(batch, init_state)
    dtype, state_dtype = predictors.dtype_of(batch), state.weights.dtype
    prior = self.prior(batch.shape[-1], dtype)
    time, weights, counts = state
    weights = weights.astype(dtype)
    seq_length = batch.shape[1]
    # The loop over time runs in pieces, each on arrays of at most twice its
    # past; `room` is that of the state, which may be used up already.
    room = weights.shape[1] - 1
    is_concrete = not isinstance(time, jax.core.Tracer)
    used = int(time) if is_concrete else room
    if self.max_length is not None:
      used = self._check_room(room, int(time) if is_concrete else 0, seq_length)
    probs = []
    begin = 0
    while begin < seq_length:
      if used == room:
        room = max(_LEAST_ROOM, 2 * room) if is_concrete else room + seq_length
      end = min(begin + room - used, seq_length)
      piece, weights, counts = _advance(
        batch[:, begin:end].astype(dtype),
        _pad(weights, room + 1),
        _pad(counts, room + 1),
        time,
        prior,
      )
      probs.append(piece)
      used += end - begin
      time = time + np.int32(end - begin)
      begin = end
    # probs[t] is about symbol t, given those before it.
    last = self.output_from_state(LADState(time, weights, counts))
    log_probs = jnp.log(jnp.concatenate(probs, axis=1)[:, 1:])
    return (
      jnp.concatenate([log_probs, last[:, None]], axis=1),
      LADState(time, weights.astype(state_dtype), counts),
    )

  def _check_room(self, room: int, time: int, seq_length: int) -> int:
    """Returns the time, unless `max_length` is too short for what follows."""
    if room != self.max_length:
      raise ValueError(
        f'init_state has room for {room} symbols, but max_length is '
        f'{self.max_length}'
      )
    if time + seq_length > self.max_length:
      raise ValueError(
        f'max_length {self.max_length} is less than the {time + seq_length} '
        'symbols'
      )
    return time


def _pad(array: jax.Array, length: int) -> jax.Array:
  """Zeros up to the given length of axis 1."""
  padding = [(0, 0)] * array.ndim
  padding[1] = (0, length - array.shape[1])
  return jnp.pad(array, padding)


@jax.jit
def _advance(
  symbols: jax.Array,
  weights: jax.Array,
  counts: jax.Array,
  time: jax.Array,
  prior: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Takes in the symbols of a batch, for which there is room.

  Args:
    symbols: `[B, T, K]`, one-hot.
    weights: w(s) before them, `[B, S]`, S > time + T.
    counts: Of the symbols since s, `[B, S, K]`.
    time: Symbols seen before.
    prior: Dirichlet concentration `[K]`.

  Returns:
    Probabilities `[B, T, K]` of every symbol given those before it, and the
    weights and counts after the last.
  """
  advance = jax.vmap(_advance_one, in_axes=(0, 0, 0, None, None))
  return advance(symbols, weights, counts, time, prior)


def _advance_one(
  symbols: jax.Array,
  weights: jax.Array,
  counts: jax.Array,
  time: jax.Array,
  prior: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """One sequence of `_advance`, without the batch axis."""
  dtype = symbols.dtype
  seq_length = symbols.shape[0]
  starts = jnp.arange(weights.shape[0])
  ones = jnp.ones(weights.shape[0], dtype)
  # Counts as differences: what was seen by t less what was seen by s; the
  # latter is negative where s lies before these symbols.
  seen = jnp.cumsum(symbols.astype(jnp.int32), axis=0)
  seen_by_start = jax.lax.dynamic_update_slice_in_dim(
    -counts, seen, time + 1, axis=0
  )
  seen_by_time = (seen - symbols.astype(jnp.int32)).astype(dtype)
  before = seen_by_start.T.astype(dtype)  # [K, S]

  def step(
    weights: jax.Array, inputs: tuple[jax.Array, jax.Array, jax.Array]
  ) -> tuple[jax.Array, jax.Array]:
    now, symbol, seen_now = inputs
    run_lengths = (now - starts).astype(dtype)  # Before this symbol.
    begun = run_lengths >= 0
    scale = jnp.where(begun, 1 / (run_lengths + prior.sum()), 0)
    hazards = jnp.where(begun, hazard(run_lengths + 1), 0)
    # w_t(s) kt(k | s) for all symbols k. Sums as matrix products, which are
    # faster than reductions here.
    joint = (weights * scale) * ((seen_now + prior)[:, None] - before)  # [K, S]
    probs = jnp.dot(joint, ones, precision=jax.lax.Precision.HIGHEST)
    posterior = jnp.dot(symbol, joint, precision=jax.lax.Precision.HIGHEST)
    posterior = posterior / (symbol * probs).sum()
    dying = posterior * hazards
    weights = jnp.where(starts == now + 1, dying.sum(), posterior - dying)
    return weights, probs

  weights, probs = jax.lax.scan(
    step, weights, (time + jnp.arange(seq_length), symbols, seen_by_time)
  )
  begun = starts <= time + seq_length
  counts = jnp.where(begun[:, None], seen[-1] - seen_by_start, 0)
  return probs, weights, counts
