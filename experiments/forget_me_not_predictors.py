"""The Forget-me-not process with KT base models, for any alphabet.

Milan, Veness, Kirkpatrick, Bowling, Koop & Hassabis, The Forget-me-not Process,
NeurIPS 2016: PTW for sources that return to earlier regimes. The base model of
a segment is a uniform Bayes mixture of a fresh KT estimator and of all n <= M
models in memory, which are KT estimators that learnt from earlier segments. For
a block of the binary temporal partitions, given the memory at its start:

  xi(block | memory) = [KT(block) + sum_i KT_{c_i}(block)] / (1 + n)
  P(block | memory)  = 1/2 xi(block | memory)
                       + 1/2 P(left | memory) P(right | memory after left)

KT_c starts from the counts c. A block of one symbol has P = xi. The prediction
is mixed from the last level to the root, as PTW's, with xi_j for kt_j:

  w_ji(t)    ~ KT_{c_i} of the symbols of t's level-j block seen before t
  xi_j(s | t) = sum_i w_ji(t) kt_ji(s | t)
  L_j(t)     = sum over tau < t in the block of
               log p_{j+1}(x_tau) - log xi_j(x_tau)
  p_d        = xi_d
  p_j        = sigmoid(-L_j) xi_j + sigmoid(L_j) p_{j+1}

The memory after a block is that of its most probable partition. A block that is
rather one segment (L_j <= 0 at its end) leaves the memory that it found, in
which its most probable base model has learnt it: a fresh one takes a new place,
a remembered one adds the block to its counts. Any other block leaves what its
halves left. So every open block keeps the memory at its start, and what its
halves learnt is dropped when it turns out to be one segment: no regime stays
twice, half and whole.

  d = 2, M = 2, memory (counts of 0 and 1) after each symbol of
    0  {1 0}          a new model
    0  {2 0}          the block 0 0 is one segment: {1 0} {1 0} never happens
    1  {2 0} {0 1}    fits no model in memory
    1  {2 0} {0 2}    the block 0 0 1 1 is split

If the memory is full, a new model takes the place of that of the fewest
symbols. The least recently used one was tried in its stead: it cost more on the
`recurring` source wherever memory was short, and less on sources whose regimes
go for good.

From the paper are the mixture over partitions, the uniform mixture of a fresh
model and a memory in it, and a memory that follows the most probable segments.
The rule above, which says exactly when a model enters and what it replaces, is
our reading, as are ties, the bound M and who has to go.
"""

from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nonstationary_mbml import base_config
from nonstationary_mbml import predictors
from nonstationary_mbml.experiments import ptw_predictors

# Decisions (one segment or split, which model) within so many nats are ties, so
# that rounding decides none: short blocks have exact ties. In a tie, a block is
# one segment, and of the models it is the fresh one, then the first in memory.
_TIE = 1e-4


class ForgetMeNotState(NamedTuple):
  """Statistics of the open block of each level, and the memory at its start.

  Base models are in the order: the fresh one, the M places of the memory.

  Attributes:
    time: Symbols seen so far, int32, the same for all sequences.
    counts: Counts of the symbols in the open block, then of those that each
      model in memory had learnt at its start, int32 `[B, d + 1, 1 + M, K]`. A
      place without any is free.
    log_weights: Log posterior of the base models, given the open block; -inf at
      a free place, `[B, d + 1, 1 + M]`.
    log_odds: L_j of the open blocks in nats, `[B, d]`.
    log_odds_residual: Remainder of L_j below its rounding, as in PTWState,
      `[B, d]`.
  """

  time: jax.Array
  counts: jax.Array
  log_weights: jax.Array
  log_odds: jax.Array
  log_odds_residual: jax.Array


class ForgetMeNotPredictor(predictors.OptimalPredictor):
  """PTW with a memory of earlier segments: O(d M K) time a symbol, and memory.

  Not the exact Bayes predictor of any source: which models are in memory is
  decided, not averaged over. After 2^d symbols the tree is used up; the next
  prediction is that of the memory.
  """

  label = 'Forget-Me-Not'
  state_class = ForgetMeNotState
  holds_predictions = False

  def __init__(
    self,
    depth: int,
    memory_size: int = 8,
    concentration: float | Sequence[float] = 0.5,
    alphabet_size: int | None = None,
  ):
    """Initializes the predictor.

    Args:
      depth: d; up to 2^d symbols can be predicted.
      memory_size: M, models that are remembered; 0 is PTW.
      concentration: Dirichlet concentration of a segment's prior; 1/2 is KT.
      alphabet_size: K, as in OptimalPredictor.

    Raises:
      ValueError: If an argument is out of range.
    """
    super().__init__(concentration, alphabet_size)
    self.depth = base_config.check_int(
      'depth', depth, 0, ptw_predictors.MAX_DEPTH
    )
    self.memory_size = base_config.check_int('memory_size', memory_size, 0)

  def check_seq_length(self, seq_length: int) -> None:
    ptw_predictors.check_horizon(self.depth, seq_length)

  def empty_state(
    self, batch_size: int, alphabet_size: int
  ) -> ForgetMeNotState:
    models = (batch_size, self.depth + 1, 1 + self.memory_size)
    return ForgetMeNotState(
      # NumPy, so that it stays concrete inside jit.
      time=np.int32(0),
      counts=jnp.zeros((*models, alphabet_size), jnp.int32),
      log_weights=jnp.full(models, -jnp.inf).at[..., 0].set(0),
      log_odds=jnp.zeros((batch_size, self.depth)),
      log_odds_residual=jnp.zeros((batch_size, self.depth)),
    )

  def update(
    self, symbols: jax.Array, state: ForgetMeNotState
  ) -> ForgetMeNotState:
    self._check_update(symbols, state)
    self._check_time(state, 1)
    dtype = predictors.compute_dtype(symbols)
    updated = jax.vmap(
      _update_one, in_axes=(0, _BATCH_AXES, None), out_axes=_BATCH_AXES
    )(
      symbols.astype(dtype),
      _cast(state, dtype),
      self.prior(symbols.shape[-1], dtype),
    )
    return _cast(updated, state.log_odds.dtype)

  def output_from_state(self, state: ForgetMeNotState) -> jax.Array:
    self._check_state(state)
    prior = self.prior(state.counts.shape[-1], state.log_odds.dtype)
    output = jax.vmap(_output_one, in_axes=(_BATCH_AXES, None))
    return output(state, prior)

  def unroll(
    self,
    params: predictors.Params,
    rng: jax.Array | None,
    batch: jax.Array,
    init_state: ForgetMeNotState | None = None,
  ) -> tuple[jax.Array, ForgetMeNotState]:
    state = self._start(batch, init_state)
    self._check_time(state, batch.shape[1])
    dtype = predictors.compute_dtype(batch)
    predictions, final_state = _advance(
      batch.astype(dtype),
      _cast(state, dtype),
      self.prior(batch.shape[-1], dtype),
    )
    # Concrete where it was: the time inside of a compiled function is not.
    final_state = final_state._replace(
      time=state.time + np.int32(batch.shape[1])
    )
    predictions = predictions.astype(predictors.dtype_of(batch))
    return predictions, _cast(final_state, state.log_odds.dtype)

  def _symbol_log_probs(
    self, symbols: jax.Array, state: ForgetMeNotState
  ) -> tuple[jax.Array, ForgetMeNotState]:
    self._check_time(state, symbols.shape[1])
    prior = self.prior(state.counts.shape[-1], state.log_odds.dtype)
    log_probs, final_state = _advance_symbols(symbols, state, prior)
    # Concrete where it was.
    time = state.time + np.int32(symbols.shape[1])
    return log_probs, final_state._replace(time=time)

  def _check_state(self, state: ForgetMeNotState) -> None:
    super()._check_state(state)
    _, num_levels, num_models, _ = state.counts.shape
    if num_levels != self.depth + 1:
      raise ValueError(
        f'init_state is of a tree of depth {num_levels - 1}, not {self.depth}'
      )
    if num_models != self.memory_size + 1:
      raise ValueError(
        f'init_state has a memory of {num_models - 1} models, but memory_size '
        f'is {self.memory_size}'
      )

  def _check_time(self, state: ForgetMeNotState, num_symbols: int) -> None:
    """Raises ValueError if the symbols do not fit, where time is concrete."""
    ptw_predictors.check_horizon(self.depth, num_symbols)
    if not isinstance(state.time, jax.core.Tracer):
      ptw_predictors.check_horizon(self.depth, int(state.time) + num_symbols)


# The functions below take one sequence: a state without the batch axis.
_BATCH_AXES = ForgetMeNotState(None, 0, 0, 0, 0)


@jax.jit
def _advance(
  batch: jax.Array, state: ForgetMeNotState, prior: jax.Array
) -> tuple[jax.Array, ForgetMeNotState]:
  """`_advance_one` of every sequence of a batch `[B, T, K]`."""
  return jax.vmap(
    _advance_one, in_axes=(0, _BATCH_AXES, None), out_axes=(0, _BATCH_AXES)
  )(batch, state, prior)


def _advance_one(
  symbols: jax.Array, state: ForgetMeNotState, prior: jax.Array
) -> tuple[jax.Array, ForgetMeNotState]:
  """Predictions `[T, K]` after each of `[T, K]` symbols, and the last state."""

  def step(
    state: ForgetMeNotState, symbol: jax.Array
  ) -> tuple[ForgetMeNotState, jax.Array]:
    levels = _levels(state, prior)
    learnt = _learn(symbol, state, *_log_probs(symbol, *levels))
    return learnt, jnp.log(levels[-1][0])

  # log_probs[t] is about symbol t, given those before it.
  state, log_probs = jax.lax.scan(step, state, symbols)
  last = _output_one(state, prior)
  return jnp.concatenate([log_probs[1:], last[None]]), state


@jax.jit
def _advance_symbols(
  symbols: jax.Array, state: ForgetMeNotState, prior: jax.Array
) -> tuple[jax.Array, ForgetMeNotState]:
  """Log-probabilities of symbols `[B, T]`, and the state after them.

  For the symbol that comes, an alphabet of two says as much as all K: itself,
  and any other one. So a step sums counts, and mixes nothing of K.
  """
  totals = predictors.prior_of_symbols(jnp.arange(len(prior)), prior)

  def step(
    state: ForgetMeNotState, symbol: jax.Array
  ) -> tuple[ForgetMeNotState, jax.Array]:
    own = state.counts[..., symbol]
    counts = jnp.stack([own, state.counts.sum(axis=-1) - own], axis=-1)
    pair = jnp.stack([total[symbol] for total in totals])
    levels = _levels(state._replace(counts=counts), pair)
    # In the alphabet of two it is the first.
    log_probs = _log_probs(jnp.eye(2, dtype=prior.dtype)[0], *levels)
    is_symbol = jnp.arange(len(prior)) == symbol
    return _learn(is_symbol, state, *log_probs), log_probs[-1][0]

  def one(
    symbols: jax.Array, state: ForgetMeNotState
  ) -> tuple[jax.Array, ForgetMeNotState]:
    state, log_probs = jax.lax.scan(step, state, symbols)
    return log_probs, state

  return jax.vmap(one, in_axes=(0, _BATCH_AXES), out_axes=(0, _BATCH_AXES))(
    symbols, state
  )


def _update_one(
  symbol: jax.Array, state: ForgetMeNotState, prior: jax.Array
) -> ForgetMeNotState:
  log_probs = _log_probs(symbol, *_levels(state, prior))
  return _learn(symbol, state, *log_probs)


def _output_one(state: ForgetMeNotState, prior: jax.Array) -> jax.Array:
  return jnp.log(_levels(state, prior)[-1][0])


def _levels(
  state: ForgetMeNotState, prior: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Probabilities of the next symbol at every level.

  Args:
    state: State of one sequence.
    prior: Dirichlet concentration `[K]`.

  Returns:
    kt_ji `[d + 1, 1 + M, K]`, xi_j `[d + 1, K]` and p_j `[d + 1, K]`.
  """
  in_block, remembered = state.counts[:, :1], state.counts[:, 1:]
  counts = jnp.concatenate([in_block, in_block + remembered], axis=1)
  kts = predictors.kt_probs(counts, prior)
  # Normalised again: rounding errors add up in a long block.
  weights = jax.nn.softmax(state.log_weights, axis=-1)
  segments = (weights[..., None] * kts).sum(axis=1)
  split = jax.nn.sigmoid(state.log_odds)
  whole = jax.nn.sigmoid(-state.log_odds)
  mixtures = [segments[-1]]
  for level in reversed(range(len(state.log_odds))):
    mixtures.append(
      whole[level] * segments[level] + split[level] * mixtures[-1]
    )
  return kts, segments, jnp.stack(mixtures[::-1])


def _learn(
  symbol: jax.Array,
  state: ForgetMeNotState,
  log_kts: jax.Array,
  log_segments: jax.Array,
  log_mixtures: jax.Array,
) -> ForgetMeNotState:
  """The state after one more symbol.

  Args:
    symbol: `[K]`, one-hot.
    state: The state before it.
    log_kts: log kt_ji of the symbol, from `_log_probs` like the rest.
    log_segments: log xi_j.
    log_mixtures: log p_j.
  """
  log_weights = state.log_weights + (log_kts - log_segments[:, None])
  log_odds, residual = ptw_predictors.compensated_sum(
    state.log_odds,
    state.log_odds_residual,
    log_mixtures[1:] - log_segments[:-1],
  )
  counts = state.counts.at[:, 0].add(symbol.astype(jnp.int32))

  time = state.time + 1
  depth = len(log_odds)
  ended = time % (1 << np.arange(depth, -1, -1)) == 0  # [d + 1]
  # The most probable partition ends with the longest block that has just ended
  # and is one segment; those of one symbol always are.
  is_segment = jnp.append(log_odds <= _TIE, True)
  level = jnp.argmax(ended & is_segment)
  memory = _remember(counts[level], log_weights[level])
  # Every block that has just ended makes way for one with this memory.
  is_model = jnp.append(True, memory.any(axis=-1))
  num_models = is_model.sum().astype(log_weights.dtype)
  return ForgetMeNotState(
    time=time,
    counts=jnp.where(
      ended[:, None, None],
      jnp.pad(memory, ((1, 0), (0, 0))),
      counts,
    ),
    log_weights=jnp.where(
      ended[:, None],
      jnp.where(is_model, -jnp.log(num_models), -jnp.inf),
      log_weights,
    ),
    log_odds=jnp.where(ended[:-1], 0, log_odds),
    log_odds_residual=jnp.where(ended[:-1], 0, residual),
  )


def _log_probs(symbol: jax.Array, *probs: jax.Array) -> tuple[jax.Array, ...]:
  """Log-probabilities of a symbol `[K]` from each of those of `_levels`."""
  return tuple(_log_prob(symbol, prob) for prob in probs)


def _log_prob(symbol: jax.Array, probs: jax.Array) -> jax.Array:
  """Log-probability `[...]` of a symbol `[K]`, from probabilities `[..., K]`.

  That of a likely symbol is small, and rounding of its probability would be
  much of it: it comes from the probability of all others.
  """
  prob = (symbol * probs).sum(axis=-1)
  rest = ((1 - symbol) * probs).sum(axis=-1)
  is_likely = rest < prob
  return jnp.where(
    is_likely,
    jnp.log1p(-jnp.where(is_likely, rest, 0)),
    jnp.log(prob),
  )


def _remember(counts: jax.Array, log_weights: jax.Array) -> jax.Array:
  """The memory in which the most probable base model has learnt a block.

  Args:
    counts: Counts of the block, then of the models in memory, `[1 + M, K]`.
    log_weights: Log posterior of the base models, given the block, `[1 + M]`.

  Returns:
    The models in memory, `[M, K]`.
  """
  block, memory = counts[0], counts[1:]
  if not len(memory):
    return memory
  best = jnp.argmax(log_weights >= log_weights.max() - _TIE)
  is_new = best == 0
  # The first place with the fewest symbols; a free place has none.
  place = jnp.where(is_new, jnp.argmin(memory.sum(axis=-1)), best - 1)
  learnt = block + jnp.where(is_new, 0, memory[place])
  return jnp.where((jnp.arange(len(memory)) == place)[:, None], learnt, memory)


def _cast(state: ForgetMeNotState, dtype: Any) -> ForgetMeNotState:
  """A state with its floating-point arrays in another dtype."""
  return state._replace(
    log_weights=state.log_weights.astype(dtype),
    log_odds=state.log_odds.astype(dtype),
    log_odds_residual=state.log_odds_residual.astype(dtype),
  )
