"""The run-length mixture that keeps the heaviest starts, in O(T N) time.

Of the posterior w_t(s) that the current segment began after s symbols (see
run_length_predictors.py), N starts are kept. Whenever one more begins, the
lightest of the others makes way for it, and the rest is normalised again. With
N > T it is the whole mixture.

How much that loses: let P be the probability of all symbols under the whole
mixture, and Q under the pruned one. Of the start s that is dropped at time t,
let a be its age, c the counts of its a symbols and w its weight. With it goes
w F(s), where F(s) is the probability of all later symbols, given that the
current segment began at s. F(t) is that of the start which takes its place.
With S of the hazard h as in hazards.py,

  F(s) <= C R F(t)     C = sup_p prod_k p_k^c_k / KT(c)
                       R = sup_n S(a + n) / [S(a) S(n)]

C compares KT's posterior after c, as a density, with the prior: no later
symbols are more than C times as probable under it. R does so for the rest of
the segment, if h never grows with the length: the old segment goes on for n
symbols at most R times as likely as a new one, and is no likelier to end then.
So nothing of P is missing if the start at t, of weight v, counts 1 + e times,
with e = w C R / v. A start that is dropped passes its own e on, w [1 + e(s)]
for w, and one that begins has the mean of those it came from. P is then at most
the sum of the starts kept, each counted 1 + e times:

  log P - log Q <= log sum_s w_T(s) [1 + e_T(s)]

`RunLengthPredictor.nats_lost` returns the right side. It holds for every
sequence, not on average, and is mostly far above what is lost: it allows for
the worst future of what was dropped. If h grows somewhere, there is no such
bound. With i the limit of h for long segments, R = (1 - i)^a / S(a).
"""

import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nonstationary_mbml import predictors
from nonstationary_mbml.experiments import hazards as hazards_lib
from nonstationary_mbml.experiments import scaled as scaled_lib

# log2 of a weight below this is that of a scaled 0.
_ZERO = scaled_lib.ZERO_EXPONENT / 2
# Rounding of hazards that are constant, relative.
_TOLERANCE = 1e-9
# From here on, Stirling's series has all digits of a float32.
_STIRLING = 16.0


class PrunedRunLengthState(NamedTuple):
  """The posterior over the N heaviest starts of the current segment.

  Attributes:
    time: t, symbols seen so far, int32, the same for all sequences.
    starts: Symbols before each start, int32 `[B, N]`; -1 is a free place.
    mantissas: Mantissas of r_t(s), `[B, N]`, as in RunLengthState.
    exponents: Their powers of two, int32 `[B, N]`.
    counts: Counts of the symbols since each start, int32 `[B, N, K]`.
    log_excess: log(1 + e), how often each start counts in the bound, `[B, N]`.
  """

  time: jax.Array
  starts: jax.Array
  mantissas: jax.Array
  exponents: jax.Array
  counts: jax.Array
  log_excess: jax.Array


def empty_state(
  batch_size: int, num_starts: int, alphabet_size: int
) -> PrunedRunLengthState:
  """Returns the state before any symbol, with one start."""
  # Made in NumPy, which compiles nothing.
  shape = (batch_size, num_starts)
  starts = np.full(shape, -1, np.int32)
  starts[:, 0] = 0
  mantissas = np.ones(shape, jnp.result_type(float))
  exponents = np.full(shape, scaled_lib.ZERO_EXPONENT, np.int32)
  exponents[:, 0] = 0
  counts = np.zeros((*shape, alphabet_size), np.int32)
  log_excess = np.zeros_like(mantissas)
  arrays = jax.device_put((starts, mantissas, exponents, counts, log_excess))
  # The time stays in NumPy, and so concrete inside jit.
  return PrunedRunLengthState(np.int32(0), *arrays)


def never_grows(hazard: hazards_lib.Hazard, num: int) -> bool:
  """Returns whether h(1) >= h(2) >= ... for as many lengths."""
  log_pmf, log_survival = hazard.log_probs(num)
  is_possible = log_survival > -np.inf
  hazards = np.exp(log_pmf[is_possible] - log_survival[is_possible])
  return bool(np.all(hazards[1:] <= hazards[:-1] * (1 + _TOLERANCE)))


def log_limit(hazard: hazards_lib.Hazard) -> float:
  """Returns log(1 - i), for a lower bound i on the hazards of all lengths."""
  if isinstance(hazard, hazards_lib.HazardTable):
    return float(np.log1p(-hazard.values[-1])) if hazard.values[-1] < 1 else 0.0
  return 0.0


@jax.jit
def nats_lost(
  state: PrunedRunLengthState, survival: scaled_lib.Scaled
) -> jax.Array:
  """Returns log sum_s w(s) [1 + e(s)], `[B]`, by the table of S."""
  log_weights = jnp.log(weights(state, survival))
  bound = jax.nn.logsumexp(log_weights + state.log_excess, axis=1)
  # Where nothing was dropped, not what the sum rounds to.
  return jnp.where((state.log_excess > 0).any(axis=1), bound, 0)


@jax.jit
def weights(
  state: PrunedRunLengthState, survival: scaled_lib.Scaled
) -> jax.Array:
  """Returns w_t(s) of the starts kept, `[B, N]`, by the table of S."""
  r = scaled_lib.Scaled(state.mantissas, state.exponents)
  ages = _ages(state.starts, state.time)
  values = scaled_lib.value(scaled_lib.times(r, _at(survival, ages)))
  return values / values.sum(axis=1, keepdims=True)


@jax.jit
def next_probs(
  state: PrunedRunLengthState, prior: jax.Array, survival: scaled_lib.Scaled
) -> jax.Array:
  """Returns the probabilities of the next symbol, `[B, K]`."""
  ages = _ages(state.starts, state.time).astype(prior.dtype)
  scaled = weights(state, survival) / (ages + prior.sum())
  counts = state.counts.swapaxes(1, 2).astype(prior.dtype) + prior[:, None]
  return scaled_lib.sum_products(counts, scaled)


@functools.partial(jax.jit, static_argnums=5)
def unroll(
  symbols: jax.Array,
  state: PrunedRunLengthState,
  prior: jax.Array,
  tables: tuple[scaled_lib.Scaled, scaled_lib.Scaled],
  limit: float,
  with_predictions: bool,
) -> tuple[jax.Array, PrunedRunLengthState]:
  """Takes in the symbols of a batch.

  Args:
    symbols: Integers `[B, T]`.
    state: State before them.
    prior: Dirichlet concentration `[K]`.
    tables: S and f, for as many lengths as symbols will have been seen.
    limit: log(1 - i) of the hazard.
    with_predictions: Whether to predict all symbols.

  Returns:
    Log-probabilities of all symbols after every symbol `[B, T, K]`, or else of
    every symbol that came `[B, T]`, and the state after all of them.
  """
  dtype = prior.dtype
  # What was seen before each start, so that a symbol changes no counts but
  # those of all: `[B, K, N]`, a row per symbol.
  total = jnp.zeros_like(state.counts[:, 0])
  before = -state.counts.swapaxes(1, 2)

  def step(
    carry: tuple[PrunedRunLengthState, jax.Array, jax.Array],
    symbol: jax.Array,
  ) -> tuple[Any, jax.Array]:
    state, total, before = carry
    state, total, before, log_prob = _learn(
      symbol, state, total, before, prior, tables, limit
    )
    if not with_predictions:
      return (state, total, before), log_prob
    counts = (total[..., None] - before).swapaxes(1, 2)
    probs = next_probs(state._replace(counts=counts), prior, tables[0])
    return (state, total, before), jnp.log(probs)

  # The counts are carried as differences.
  carried = state._replace(
    time=jnp.asarray(state.time),
    mantissas=state.mantissas.astype(dtype),
    counts=jnp.zeros((), jnp.int32),
    log_excess=state.log_excess.astype(dtype),
  )
  (final, total, before), outputs = jax.lax.scan(
    step, (carried, total, before), symbols.T
  )
  counts = (total[..., None] - before).swapaxes(1, 2)
  counts = jnp.where(final.starts[..., None] < 0, 0, counts)
  final = final._replace(
    counts=counts,
    mantissas=final.mantissas.astype(state.mantissas.dtype),
    log_excess=final.log_excess.astype(state.log_excess.dtype),
  )
  return jnp.moveaxis(outputs, 0, 1), final


def _learn(
  symbol: jax.Array,
  state: PrunedRunLengthState,
  total: jax.Array,
  before: jax.Array,
  prior: jax.Array,
  tables: tuple[scaled_lib.Scaled, scaled_lib.Scaled],
  limit: float,
) -> tuple[PrunedRunLengthState, jax.Array, jax.Array, jax.Array]:
  """Takes in one more symbol of each sequence.

  Args:
    symbol: `[B]`.
    state: State before it, but for its counts.
    total: Counts of all symbols since some time, `[B, K]`.
    before: What of it had been seen by each start, `[B, K, N]`.
    prior: Dirichlet concentration `[K]`.
    tables: S and f.
    limit: log(1 - i) of the hazard.

  Returns:
    State, `total` and `before` after it, and its log-probability `[B]`.
  """
  survival, pmf = tables
  dtype, rows = prior.dtype, jnp.arange(len(symbol))
  ages = _ages(state.starts, state.time)
  r = scaled_lib.Scaled(state.mantissas, state.exponents)

  # p(x) and the sum of all others, up to the same factor.
  own = total[rows, symbol][:, None] - before[rows, symbol]  # [B, N]
  own = jnp.where(state.starts < 0, 0, own)
  own_prior, rest_prior = predictors.prior_of_symbols(symbol, prior)
  others = (ages - own).astype(dtype) + rest_prior[:, None]
  own = own.astype(dtype) + own_prior[:, None]
  scale = 1 / (ages.astype(dtype) + prior.sum())
  w = scaled_lib.value(scaled_lib.times(r, _at(survival, ages)))
  prob = (w * scale * own).sum(axis=1)
  rest = (w * scale * others).sum(axis=1)

  mantissas = r.mantissa * (own * scale / prob[:, None])
  r = scaled_lib.normalise(r._replace(mantissa=mantissas))
  f = _at(pmf, ages)
  new = scaled_lib.dot(r, f)
  log_excess = _log_mean_excess(r, f, new, state.log_excess)

  # The lightest makes way; a free place is lighter than any other.
  log2_weights = _log2(scaled_lib.times(r, _at(survival, ages + 1)))
  place = jnp.argmin(log2_weights, axis=1)
  total = total.at[rows, symbol].add(1)
  counts = total - before[rows, :, place]
  dropped = _log_dropped(
    log2_weights[rows, place] - _log2(new),
    counts.astype(dtype),
    prior,
    _log2(_at(survival, ages + 1))[rows, place],
    limit,
  )
  dropped = jnp.where(
    log2_weights[rows, place] < _ZERO,
    -jnp.inf,
    dropped + state.log_excess[rows, place],
  )
  after = PrunedRunLengthState(
    time=state.time + 1,
    starts=state.starts.at[rows, place].set(state.time + 1),
    mantissas=r.mantissa.at[rows, place].set(new.mantissa),
    exponents=r.exponent.at[rows, place].set(new.exponent),
    counts=state.counts,
    log_excess=state.log_excess.at[rows, place].set(
      jnp.logaddexp(log_excess, dropped)
    ),
  )
  before = before.at[rows, :, place].set(total)
  return after, total, before, predictors.log_share(prob, rest)


def _log_mean_excess(
  r: scaled_lib.Scaled,
  f: scaled_lib.Scaled,
  new: scaled_lib.Scaled,
  log_excess: jax.Array,
) -> jax.Array:
  """log(1 + e) of the start that begins: the mean over those it came from."""
  log2_shares = _log2(scaled_lib.times(r, f)) - _log2(new)[:, None]
  mean = jax.nn.logsumexp(jnp.log(2.0) * log2_shares + log_excess, axis=1)
  # Rounding is no loss.
  has_excess = (log_excess > 0).any(axis=1) & (_log2(new) > _ZERO)
  return jnp.where(has_excess, jnp.maximum(mean, 0), 0)


def _log_dropped(
  log2_ratio: jax.Array,
  counts: jax.Array,
  prior: jax.Array,
  log2_survival: jax.Array,
  limit: float,
) -> jax.Array:
  """log(w C R / v) of starts that are dropped.

  Args:
    log2_ratio: log2(w / v), `[B]`.
    counts: Counts of the symbols since them, `[B, K]`.
    prior: Dirichlet concentration `[K]`.
    log2_survival: log2 S(a), `[B]`.
    limit: log(1 - i) of the hazard.
  """
  age = counts.sum(axis=-1)
  regret = _log_gamma_excess(age, prior.sum())
  regret -= _log_gamma_excess(counts, prior).sum(axis=-1)
  log_ratio = limit * age - jnp.log(2.0) * log2_survival
  return (
    jnp.log(2.0) * log2_ratio
    + jnp.maximum(regret, 0)
    + jnp.maximum(log_ratio, 0)
  )


def _log_gamma_excess(count: jax.Array, prior: jax.Array) -> jax.Array:
  """log[Gamma(n + a) / Gamma(a)] - n log n + n, without large terms."""
  few = jnp.minimum(count, _STIRLING)
  direct = jax.lax.lgamma(few + prior) - jax.scipy.special.xlogy(few, few) + few
  many = jnp.maximum(count, _STIRLING)
  total = many + prior
  series = (
    many * jnp.log1p(prior / many)
    + (prior - 0.5) * jnp.log(total)
    - prior
    + 0.5 * np.log(2 * np.pi)
    + 1 / (12 * total)
  )
  value = jnp.where(count <= _STIRLING, direct, series)
  return value - jax.lax.lgamma(prior)


def _ages(starts: jax.Array, time: jax.Array) -> jax.Array:
  """Symbols since each start; 0 for a free place."""
  return jnp.where(starts < 0, 0, time - starts)


def _at(table: scaled_lib.Scaled, lengths: jax.Array) -> scaled_lib.Scaled:
  """The entries of a table, as in run_length_predictors.py, for n >= 0."""
  zero = table.mantissa.shape[0] // 2 - 1  # Where n = 0 is.
  return scaled_lib.Scaled(*(array[zero - lengths] for array in table))


def _log2(number: scaled_lib.Scaled) -> jax.Array:
  """log2 of a scaled number; far below 0 for 0."""
  mantissa = number.mantissa
  tiny = jnp.finfo(mantissa.dtype).tiny
  log2 = jnp.log2(jnp.maximum(mantissa, tiny))
  return number.exponent.astype(mantissa.dtype) + log2
