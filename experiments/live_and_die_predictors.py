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

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nonstationary_mbml import predictors

# The loop over time runs in pieces of doubling length, each on arrays as long
# as its own past; the first has this many symbols.
_FIRST_PIECE = 32


def hazard(run_length: jax.Array) -> jax.Array:
  """Returns h(a) = 1/(2a), the chance that a segment ends at length a >= 1."""
  return 1 / (2 * run_length)


class LADState(NamedTuple):
  """The posterior over the start of the current segment.

  The arrays grow by one entry with every symbol.

  Attributes:
    weights: w_t(s) for s = 0, ..., t, `[B, t + 1]`.
    counts: Of the symbols since s, int32 `[B, t + 1, K]`.
  """

  weights: jax.Array
  counts: jax.Array


class LADPredictor(predictors.OptimalPredictor):
  """The exact Bayes predictor of the `lin` source, O(T^2) time, O(T) memory.

  Its state grows with time, so that under `jit` every length it is continued
  from compiles once.
  """

  def empty_state(self, batch_size: int, alphabet_size: int) -> LADState:
    return LADState(
      weights=jnp.ones((batch_size, 1)),
      counts=jnp.zeros((batch_size, 1, alphabet_size), jnp.int32),
    )

  def update(self, symbols: jax.Array, state: LADState) -> LADState:
    return self.unroll({}, None, symbols[:, None], state)[1]

  def output_from_state(self, state: LADState) -> jax.Array:
    dtype = state.weights.dtype
    prior = self.prior(state.counts.shape[-1], dtype)
    totals = state.counts.sum(axis=-1, keepdims=True).astype(dtype)
    kts = (state.counts.astype(dtype) + prior) / (totals + prior.sum())
    return jnp.log((state.weights[..., None] * kts).sum(axis=1))

  def unroll(
    self,
    params: predictors.Params,
    rng: jax.Array | None,
    batch: jax.Array,
    init_state: LADState | None = None,
  ) -> tuple[jax.Array, LADState]:
    state = self._start(batch, init_state)
    dtype = predictors.dtype_of(batch)
    prior = self.prior(batch.shape[-1], dtype)

    def one(
      symbols: jax.Array, weights: jax.Array, counts: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
      return _unroll_one(symbols, weights.astype(dtype), counts, prior)

    probs, weights, counts = jax.vmap(one)(
      batch.astype(dtype), state.weights, state.counts
    )
    final_state = LADState(weights.astype(state.weights.dtype), counts)
    # probs[t] is about symbol t, given those before it.
    last = self.output_from_state(LADState(weights, counts))
    log_probs = jnp.log(probs[:, 1:])
    return jnp.concatenate([log_probs, last[:, None]], axis=1), final_state


def _unroll_one(
  symbols: jax.Array, weights: jax.Array, counts: jax.Array, prior: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """One sequence, or its continuation.

  Args:
    symbols: `[T, K]`, one-hot.
    weights: w(s) before them, `[S]`.
    counts: Of the symbols since s, `[S, K]`.
    prior: Dirichlet concentration `[K]`.

  Returns:
    Probabilities of every symbol `[T, K]` given those before it; weights
    `[S + T]` and counts `[S + T, K]` at the end.
  """
  seq_length = symbols.shape[0]
  seen = jnp.cumsum(symbols.astype(jnp.int32), axis=0)
  # Counts as differences: what was seen by t less what was seen by s, the
  # latter negative before this chunk. `[S + T, K]`
  before_start = jnp.concatenate([-counts, seen])
  dtype = symbols.dtype
  before_time = jnp.concatenate([jnp.zeros_like(seen[:1]), seen[:-1]])
  first = weights.shape[0] - 1  # The number of symbols before this chunk.

  probs = []
  begin = 0
  while begin < seq_length:
    end = min(begin + max(_FIRST_PIECE, first + begin), seq_length)
    num_starts = first + end + 1
    weights = jnp.pad(weights, (0, num_starts - weights.shape[0]))
    starts = jnp.arange(num_starts)
    before = before_start[:num_starts].T.astype(dtype)  # [K, S]
    ones = jnp.ones(num_starts, dtype)

    def step(
      weights: jax.Array,
      inputs: tuple[jax.Array, jax.Array, jax.Array],
      starts: jax.Array = starts,
      before: jax.Array = before,
      ones: jax.Array = ones,
    ) -> tuple[jax.Array, jax.Array]:
      time, symbol, now = inputs
      run_lengths = (time - starts).astype(dtype)  # Before this symbol.
      begun = run_lengths >= 0
      scale = jnp.where(begun, 1 / (run_lengths + prior.sum()), 0)
      hazards = jnp.where(begun, hazard(run_lengths + 1), 0)
      # w_t(s) kt(k | s), for all symbols k; sums as matrix products, which are
      # faster than reductions here.
      joint = (weights * scale) * ((now + prior)[:, None] - before)  # [K, S]
      probs = jnp.dot(joint, ones, precision=jax.lax.Precision.HIGHEST)
      posterior = jnp.dot(symbol, joint, precision=jax.lax.Precision.HIGHEST)
      posterior = posterior / (symbol * probs).sum()
      dying = posterior * hazards
      new = jnp.where(starts == time + 1, dying.sum(), posterior - dying)
      return new, probs

    weights, piece = jax.lax.scan(
      step,
      weights,
      (
        first + jnp.arange(begin, end),
        symbols[begin:end],
        before_time[begin:end].astype(dtype),
      ),
    )
    probs.append(piece)
    begin = end

  return jnp.concatenate(probs), weights, seen[-1] - before_start
