"""Partition Tree Weighting with KT base models, for any alphabet.

Veness, White, Bowling & Gyorgy, Partition Tree Weighting, DCC 2013. PTW_d is
the exact Bayes mixture over all binary temporal partitions of up to 2^d
symbols: a block is one segment or split in the middle, with probability 1/2
each, and so on down to single symbols.

Instead of block probabilities, which grow large in the log domain, this code
mixes predictions, from the last level (blocks of one symbol) to the root:

  kt_j(s | t)  KT from the symbols of t's level-j block seen before t
  L_j(t)     = sum over tau < t in the block of
               log p_{j+1}(x_tau) - log kt_j(x_tau)
  p_d        = kt_d
  p_j        = sigmoid(-L_j) kt_j + sigmoid(L_j) p_{j+1}

p_0 is the prediction. L_j is the log posterior odds that the block is split: so
with the L_j of all symbols seen, and the product over a block and all that
contain it,

  P(a segment starts in the middle of the block) = prod sigmoid(L_i), i <= j
  P(the current segment is the open level-j block)
                                  = sigmoid(-L_j) prod sigmoid(L_i), i < j

In a long block p_{j+1} and kt_j hardly differ, and the difference of their
logarithms would be rounding. So what the symbol that came adds to L_j is
log1p(d_j / kt_j), with d_j = p_{j+1} - kt_j from differences of counts: r times
the symbol and s times another came in the block before its open half, n and m
times in that half, with A the sum of the prior,

  kt_{j+1} - kt_j = [kt_{j+1} s - (1 - kt_{j+1}) r] / (n + m + r + s + A)
  d_j             = (p_{j+1} - kt_{j+1}) + (kt_{j+1} - kt_j)
  p_j - kt_j      = sigmoid(L_j) d_j

A whole sequence needs no p_j for its L_j. With G_j = log(1/2 + 1/2 exp L_j) the
log of how much more probable the block so far is by PTW than by KT, G_d = 0,

  L_j(t) = G_{j+1}(t) in the first half of the block, and in the second half
  L_j(t) = G_{j+1}(end of the first half) + G_{j+1}(t)
           + sum over tau < t in the second half of
             log kt_{j+1}(x_tau) - log kt_j(x_tau)
"""

from collections.abc import Sequence
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nonstationary_mbml import base_config
from nonstationary_mbml import predictors
from nonstationary_mbml.models import backend

# The time is an int32.
MAX_DEPTH = 30


def min_depth(seq_length: int) -> int:
  """Returns ceil(log2 T), the least depth that holds T symbols."""
  return (int(seq_length) - 1).bit_length()


def check_horizon(depth: int, seq_length: int) -> None:
  """Raises ValueError if T symbols are more than a tree of 2^depth holds."""
  depth = int(depth)
  if seq_length > 2**depth:
    raise ValueError(
      f'depth {depth} holds {2**depth} symbols, not {seq_length}; '
      f'depth={min_depth(seq_length)} does'
    )


class PTWState(NamedTuple):
  """The sufficient statistics of PTW: what its open blocks have seen.

  Attributes:
    time: Symbols seen so far, int32, the same for all sequences.
    counts: Counts of the symbols in the open block of each level, int32
      `[B, d + 1, K]`.
    log_odds: L_j of the open blocks in nats, `[B, d]`.
    log_odds_residual: Remainder of L_j below its rounding, `[B, d]`: a long
      stream adds terms that are too small for L_j alone.
  """

  time: jax.Array
  counts: jax.Array
  log_odds: jax.Array
  log_odds_residual: jax.Array


class PTWPredictor(predictors.OptimalPredictor):
  """The exact Bayes predictor of the `ptw` source.

  A whole sequence takes d + 1 passes over all times at once, without a time
  loop. From a given state, symbols are taken one by one: `O(d K)` memory.
  After 2^d symbols the tree is used up; the next prediction is the prior mean.
  """

  label = 'PTW'
  state_class = PTWState
  holds_predictions = False

  def __init__(
    self,
    depth: int,
    concentration: float | Sequence[float] = 0.5,
    alphabet_size: int | None = None,
  ):
    """Initializes the predictor.

    Args:
      depth: d; up to 2^d symbols can be predicted.
      concentration: Dirichlet concentration of a segment's prior; 1/2 is KT.
      alphabet_size: K, as in OptimalPredictor.

    Raises:
      ValueError: If an argument is out of range.
    """
    super().__init__(concentration, alphabet_size)
    self.depth = base_config.check_int('depth', depth, 0, MAX_DEPTH)

  def check_seq_length(self, seq_length: int) -> None:
    check_horizon(self.depth, seq_length)

  def empty_state(self, batch_size: int, alphabet_size: int) -> PTWState:
    return PTWState(
      # NumPy, so that it stays concrete inside jit.
      time=np.int32(0),
      counts=jnp.zeros((batch_size, self.depth + 1, alphabet_size), jnp.int32),
      log_odds=jnp.zeros((batch_size, self.depth)),
      log_odds_residual=jnp.zeros((batch_size, self.depth)),
    )

  def update(self, symbols: jax.Array, state: PTWState) -> PTWState:
    self._check_update(symbols, state)
    self._check_time(state, 1)
    prior = self.prior(symbols.shape[-1], predictors.compute_dtype(symbols))
    new, _ = _step(state, symbols, prior)
    # Concrete where it was: the time inside of a compiled function is not.
    return new._replace(time=state.time + np.int32(1))

  def output_from_state(self, state: PTWState) -> jax.Array:
    self._check_state(state)
    prior = self.prior(state.counts.shape[-1], state.log_odds.dtype)
    return _next_log_probs(state, prior)

  def unroll(
    self,
    params: predictors.Params,
    rng: jax.Array | None,
    batch: jax.Array,
    init_state: PTWState | None = None,
  ) -> tuple[jax.Array, PTWState]:
    state = self._start(batch, init_state)
    self._check_time(state, batch.shape[1])
    if not isinstance(state.time, jax.core.Tracer) and int(state.time) == 0:
      return self._unroll_whole(batch, state.log_odds.dtype)
    prior = self.prior(batch.shape[-1], predictors.compute_dtype(batch))
    log_probs, final_state = _stream(batch, state, prior)
    # Concrete where it was.
    return log_probs.astype(predictors.dtype_of(batch)), final_state._replace(
      time=state.time + np.int32(batch.shape[1])
    )

  def segment_posterior(self, state: PTWState) -> jax.Array:
    """Returns P(the current segment is the open level-j block | symbols seen).

    A block whose end has been reached makes way for an empty one, which begins
    with the next symbol; `run_length_posterior` adds up blocks that begin
    together.

    Args:
      state: After t symbols.

    Returns:
      For j = 0, ..., d, `[B, d + 1]`.
    """
    self._check_state(state)
    ends = ((0, 0), (1, 1))
    log_split = jnp.pad(jax.nn.log_sigmoid(state.log_odds), ends)
    log_whole = jax.nn.log_sigmoid(-state.log_odds)
    return jnp.exp(
      jnp.cumsum(log_split[:, :-1], axis=1)
      + jnp.pad(log_whole, ((0, 0), (0, 1)))
    )

  def run_length_posterior(self, state: PTWState) -> jax.Array:
    """Returns P(the current segment has n symbols so far | the t seen).

    n = 0 is a new segment that begins with the next symbol.

    Args:
      state: After t symbols, concrete.

    Returns:
      For n = 0, ..., t, `[B, t + 1]`.
    """
    posterior = self.segment_posterior(state)[:, None]
    time = _concrete_time(state)
    return self._by_run_length(posterior, time).reshape(-1, time + 1)

  def unroll_run_lengths(
    self, batch: jax.Array, init_state: PTWState | None = None
  ) -> jax.Array:
    """Returns `run_length_posterior` after every symbol, for analysis.

    Args:
      batch: Symbols `[B, T, K]`.
      init_state: State after t symbols, as in `unroll`, concrete.

    Returns:
      P(n symbols so far) `[B, T, t + T + 1]`, 0 for impossible run lengths.
    """
    state = self._start(batch, init_state)
    self._check_time(state, batch.shape[1])
    time = _concrete_time(state) + batch.shape[1]
    posteriors, _ = _unroll_segments(self, batch, state)
    return self._by_run_length(posteriors, time)

  def switch_posterior(self, batch: jax.Array) -> jax.Array:
    """Returns P(a new segment starts at t | the whole sequence).

    Args:
      batch: Whole sequences `[B, T, K]`.

    Returns:
      `[B, T]`; 0 at t = 0, as in `switch_points` of a source.
    """
    self._check_time(self._start(batch, None), batch.shape[1])
    dtype = predictors.compute_dtype(batch)
    posterior = _switch_posterior(
      batch, self.prior(batch.shape[-1], dtype), self.depth
    )
    return posterior.astype(predictors.dtype_of(batch))

  def symbol_switch_posterior(self, symbols: jax.Array) -> jax.Array:
    """Returns `switch_posterior` of integers, in the memory of d numbers each.

    Args:
      symbols: Whole sequences of 0, ..., K - 1, `[B, T]`.

    Returns:
      `[B, T]`; 0 at t = 0.
    """
    predictors.check_symbols(symbols)
    state = self.initial_state({}, None, symbols.shape[0])
    alphabet_size = state.counts.shape[-1]
    predictors.check_symbols(symbols, alphabet_size)
    self._check_time(state, symbols.shape[1])
    prior = self.prior(alphabet_size, state.log_odds.dtype)
    return _switches_of_symbols(jnp.asarray(symbols, jnp.int32), state, prior)

  def _symbol_log_probs(
    self, symbols: jax.Array, state: PTWState
  ) -> tuple[jax.Array, PTWState]:
    self._check_time(state, symbols.shape[1])
    prior = self.prior(state.counts.shape[-1], state.log_odds.dtype)
    log_probs, final_state = _unroll_symbols(symbols, state, prior)
    # Concrete where it was.
    time = state.time + np.int32(symbols.shape[1])
    return log_probs, final_state._replace(time=time)

  def _by_run_length(self, posteriors: jax.Array, time: int) -> jax.Array:
    """Sums of posteriors `[B, T, d + 1]` of the last T times up to `time`."""
    batch_size, seq_length, _ = posteriors.shape
    times = np.arange(time - seq_length + 1, time + 1)[:, None]
    run_lengths = times % (1 << np.arange(self.depth, -1, -1))  # [T, d + 1]
    rows = np.arange(seq_length)[:, None]
    shape = (batch_size, seq_length, time + 1)
    if isinstance(posteriors, jax.core.Tracer):
      summed = jnp.zeros(shape, posteriors.dtype)
      return summed.at[:, rows, run_lengths].add(posteriors)
    # In NumPy, so that nothing is compiled anew at every symbol of a stream.
    summed = np.zeros(shape, posteriors.dtype)
    np.add.at(summed, (slice(None), rows, run_lengths), np.asarray(posteriors))
    return jax.device_put(summed)

  def _check_state(self, state: PTWState) -> None:
    super()._check_state(state)
    if state.counts.shape[1] != self.depth + 1:
      raise ValueError(
        f'init_state is of a tree of depth {state.counts.shape[1] - 1}, not '
        f'{self.depth}'
      )

  def _check_time(self, state: PTWState, num_symbols: int) -> None:
    """Raises ValueError if the symbols do not fit, where time is concrete."""
    check_horizon(self.depth, num_symbols)
    if not isinstance(state.time, jax.core.Tracer):
      check_horizon(self.depth, int(state.time) + num_symbols)

  def _unroll_whole(
    self, batch: jax.Array, state_dtype: Any
  ) -> tuple[jax.Array, PTWState]:
    """All predictions at once, from the first symbol."""
    prior = self.prior(batch.shape[-1], predictors.compute_dtype(batch))
    log_probs, counts, log_odds = _predict_whole(batch, prior, self.depth)
    log_odds = log_odds.astype(state_dtype)
    return log_probs.astype(predictors.dtype_of(batch)), PTWState(
      np.int32(batch.shape[1]), counts, log_odds, jnp.zeros_like(log_odds)
    )


def _concrete_time(state: PTWState) -> int:
  if isinstance(state.time, jax.core.Tracer):
    raise ValueError(
      'the time of the state is traced, and the number of run lengths follows '
      'from it; segment_posterior needs no concrete time'
    )
  return int(state.time)


# The functions of whole sequences have the batch as their last axis: loops over
# it are long, however short a block is. T' is T padded to a power of two.


@functools.partial(jax.jit, static_argnums=2)
def _predict_whole(
  batch: jax.Array, prior: jax.Array, depth: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """PTW of whole sequences, level by level, all times at once.

  With c_j the posterior of one level-j segment, and f_j the counts of the first
  half of the block if the symbol is in the second one, else 0,

    p_0 = sum_j c_j kt_j = sum_j h_j f_j + h_d a
    h_j = sum_{i <= j} c_i / (symbols before it in its level-i block + A)

  since the symbols of f_j are in all blocks of level j and above.

  Args:
    batch: Symbols `[B, T, K]`.
    prior: Dirichlet concentration `[K]`.
    depth: d.

  Returns:
    Log-probabilities after each symbol `[B, T, K]`, and the statistics of the
    blocks open at the end: counts `[B, d + 1, K]` and log-odds `[B, d]`.
  """
  batch_size, seq_length, alphabet_size = batch.shape
  dtype = prior.dtype
  log_odds, first_halves = _whole_levels(batch, prior, depth)
  shape = log_odds.shape[1:]
  # For the symbol after each.
  times = np.arange(1, shape[0] + 1, dtype=np.int32)

  def add_level(
    carry: tuple[jax.Array, jax.Array], level: tuple[jax.Array, jax.Array]
  ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    all_split, share = carry
    bits, log_odds = level
    position = (times & ((1 << bits) - 1))[:, None]
    log_odds = jnp.where(position == 0, 0, log_odds)
    whole = all_split * jax.nn.sigmoid(-log_odds)
    share = share + whole / (position.astype(dtype) + prior.sum())
    in_second = position >> (bits - 1) == 1
    all_split = all_split * jax.nn.sigmoid(log_odds)
    return (all_split, share), jnp.where(in_second, share, 0)

  # Unrolled, XLA does not get done compiling an evaluation for a GPU, where it
  # computes anew what is used more than once, as each level is by the next one.
  (all_split, share), shares = jax.lax.scan(
    add_level,
    (jnp.ones(shape, dtype), jnp.zeros(shape, dtype)),
    (np.arange(depth, 0, -1, dtype=np.int32), log_odds),
  )
  share = share + all_split / prior.sum()

  def predict(symbol: tuple[jax.Array, list[jax.Array]]) -> jax.Array:
    prior, first_halves = symbol
    prob = share * prior
    for bits, counts in enumerate(first_halves):
      block = np.minimum(times >> (bits + 1), len(counts) - 1)
      prob += shares[depth - 1 - bits] * counts[block].astype(dtype)
    return jnp.log(prob)

  symbols = (prior, first_halves)
  # One after another, so that a CPU does not transpose term by term.
  log_probs = (
    jax.lax.map(predict, symbols)
    if backend.is_cpu()
    else jax.vmap(predict)(symbols)
  )  # [K, T', B]
  counts = [jnp.zeros((alphabet_size, batch_size), jnp.int32)]
  for bits, halves in enumerate(first_halves):
    in_second = seq_length >> bits & 1
    block = halves[:, seq_length >> (bits + 1)] if in_second else 0
    counts.append(counts[-1] + block)
  counts += counts[-1:] * (depth + 1 - len(counts))
  is_open = seq_length % (1 << np.arange(depth, 0, -1)) != 0
  open_log_odds = jnp.where(is_open[:, None], log_odds[:, seq_length - 1], 0)
  return (
    log_probs[:, :seq_length].transpose(2, 1, 0),
    jnp.stack(counts[::-1]).transpose(2, 0, 1),
    open_log_odds.T,
  )


def _whole_levels(
  batch: jax.Array, prior: jax.Array, depth: int
) -> tuple[jax.Array, list[jax.Array]]:
  """What `_predict_whole` computes from the last level to the root.

  Args:
    batch: Symbols `[B, T, K]`.
    prior: Dirichlet concentration `[K]`.
    depth: d.

  Returns:
    L_j of t's block with the symbol at t, `[d, T', B]`; and the counts of the
    first halves of all blocks, `[K, T' / 2^n, B]` for n = 1, 2, ..., from the
    last level to the one whose first half is all of T'.
  """
  batch_size, seq_length, alphabet_size = batch.shape
  padded_length = 1 << min_depth(seq_length)
  symbols = jnp.argmax(batch, axis=-1).astype(jnp.int32).T
  # Any symbol will do: nobody sees what comes after the end.
  symbols = jnp.pad(symbols, ((0, padded_length - seq_length), (0, 0)))
  drawn_prior = predictors.prior_of_symbols(symbols, prior)
  alphabet = jnp.arange(alphabet_size, dtype=jnp.int32)[:, None, None]
  counts = (symbols == alphabet).astype(jnp.int32)  # Of each block.
  # Times that the symbol came before in its block, and G_j with it.
  drawn, evidence = jnp.zeros_like(symbols), jnp.zeros_like(drawn_prior[0])
  log_odds, first_halves = [], []
  for half in (1 << bits for bits in range(depth)):
    if half <= padded_length:
      first_halves.append(counts[:, ::2])
    if half < padded_length:
      evidence, drawn, drawn_own, drawn_rest, drawn_symbols = (
        array.reshape(-1, 2, half, batch_size)
        for array in (evidence, drawn, *drawn_prior, symbols)
      )
      is_drawn = drawn_symbols[:, 1] == alphabet[..., None]
      added = jnp.where(is_drawn, first_halves[-1][:, :, None], 0).sum(
        axis=0, dtype=jnp.int32
      )
      position = np.arange(half, dtype=np.int32)[:, None]
      inner, outer = drawn[:, 1], drawn[:, 1] + added
      inner_kt, kt, change = _kt_and_change(
        (inner, position - inner),
        (outer, position + half - outer),
        (drawn_own[:, 1], drawn_rest[:, 1]),
      )
      gains = _running_sums(_gain(change, kt, inner_kt))
      both = evidence[:, 0, -1:] + evidence[:, 1] + gains
      evidence = jnp.stack([evidence[:, 0], both], axis=1)
      evidence = evidence.reshape(symbols.shape)
      drawn = jnp.stack([drawn[:, 0], outer], axis=1).reshape(symbols.shape)
      # Two slices that are added would be added again at every level above.
      counts = counts.reshape(alphabet_size, -1, 2, batch_size).sum(
        axis=2, dtype=jnp.int32
      )
    # In a first half, L_j is G_{j+1}.
    log_odds.append(evidence)
    less = 0.5 * jnp.expm1(-jnp.abs(evidence))
    evidence = jnp.maximum(evidence, 0) + jnp.log1p(less)
  if not depth:
    return jnp.zeros((0, *symbols.shape), prior.dtype), first_halves
  return jnp.stack(log_odds[::-1]), first_halves


def _running_sums(terms: jax.Array) -> jax.Array:
  """Sums of `[N, T, B]` up to each of T, a power of two, in little rounding."""
  num, length, _ = terms.shape
  size = min(length, 32)
  parts = terms.reshape(-1, size, terms.shape[2])
  # Broadcast, since a product of one matrix and all parts would transpose them.
  triangle = jnp.broadcast_to(
    np.tril(np.ones((size, size), terms.dtype)), (len(parts), size, size)
  )
  sums = jnp.matmul(triangle, parts, precision=jax.lax.Precision.HIGHEST)
  if size < length:
    totals = sums[:, -1].reshape(num, -1, terms.shape[2])
    before = _running_sums(totals) - totals
    sums += before.reshape(-1, 1, terms.shape[2])
  return sums.reshape(terms.shape)


@functools.partial(jax.jit, static_argnums=2)
def _switch_posterior(
  batch: jax.Array, prior: jax.Array, depth: int
) -> jax.Array:
  """P(a segment starts at t | all symbols) for a batch, `[B, T]`."""
  log_odds, _ = _whole_levels(batch, prior, depth)
  return _switches(log_odds[:, : batch.shape[1]]).T


def _switches(log_odds: jax.Array) -> jax.Array:
  """P(a segment starts at t | all T symbols), `[T, ...]`.

  Args:
    log_odds: L_j of t's block with the symbol at t, `[d, T, ...]`.
  """
  depth, length, *shape = log_odds.shape
  times = np.arange(length, dtype=np.int32)
  bits = np.arange(depth, 0, -1, dtype=np.int32)

  def add_level(
    carry: tuple[jax.Array, jax.Array], level: tuple[jax.Array, jax.Array]
  ) -> tuple[tuple[jax.Array, jax.Array], None]:
    all_split, posterior = carry
    log_odds, bits = level
    last = jnp.minimum(((times >> bits) + 1) << bits, length) - 1
    all_split = all_split * jax.nn.sigmoid(log_odds[last])
    is_middle = times & ((1 << bits) - 1) == 1 << (bits - 1)
    is_middle = jnp.expand_dims(is_middle, range(1, all_split.ndim))
    return (all_split, jnp.where(is_middle, all_split, posterior)), None

  ones = jnp.ones((length, *shape), log_odds.dtype)
  start = (ones, jnp.zeros_like(ones))
  return jax.lax.scan(add_level, start, (log_odds, bits))[0][1]


@functools.partial(jax.jit, static_argnums=0)
def _unroll_segments(
  predictor: PTWPredictor, batch: jax.Array, state: PTWState
) -> tuple[jax.Array, PTWState]:
  """`segment_posterior` after every symbol, `[B, T, d + 1]`."""

  def step(state: PTWState, symbols: jax.Array) -> tuple[PTWState, jax.Array]:
    state = predictor.update(symbols, state)
    return state, predictor.segment_posterior(state)

  state, posteriors = jax.lax.scan(step, state, batch.swapaxes(0, 1))
  return posteriors.swapaxes(0, 1), state


# One sequence: a state without the batch axis.
_BATCH_AXES = PTWState(None, 0, 0, 0)


@jax.jit
def _unroll_symbols(
  symbols: jax.Array, state: PTWState, prior: jax.Array
) -> tuple[jax.Array, PTWState]:
  """Log-probabilities of symbols `[B, T]`, and the state after them."""
  return jax.vmap(
    lambda *args: _unroll_symbols_one(*args)[:2],
    in_axes=(0, _BATCH_AXES, None),
    out_axes=(0, _BATCH_AXES),
  )(symbols, state, prior)


@jax.jit
def _switches_of_symbols(
  symbols: jax.Array, state: PTWState, prior: jax.Array
) -> jax.Array:
  """P(a segment starts at t | all symbols) for integers `[B, T]`."""
  return jax.vmap(
    lambda *args: _switches(_unroll_symbols_one(*args)[2]),
    in_axes=(0, _BATCH_AXES, None),
  )(symbols, state, prior)


def _unroll_symbols_one(
  symbols: jax.Array, state: PTWState, prior: jax.Array
) -> tuple[jax.Array, PTWState, jax.Array]:
  """PTW of the symbols that came, all times at once, from any state.

  A level needs the count of the symbol that comes in its block, not of all. It
  is the count in the symbol's own half and, if there is an occurrence in the
  half before, the count up to that one.

  Args:
    symbols: Integers `[T]`.
    state: State before them.
    prior: Dirichlet concentration `[K]`.

  Returns:
    log p_0 of every symbol given those before it `[T]`, the state after them,
    and L_j of t's block with the symbol at t `[d, T]`.
  """
  dtype, length = prior.dtype, len(symbols)
  last, newest = _last_occurrences(symbols, len(prior))
  times = state.time + jnp.arange(length, dtype=jnp.int32)
  end = state.time + length
  own_prior, rest_prior = predictors.prior_of_symbols(symbols, prior)

  def add_level(carry: Any, level: Any) -> tuple[Any, Any]:
    inner, before, mixture, rest, excess = carry
    bits, seen, old_log_odds, old_residual = level
    block = times >> bits
    in_block = (before >= 0) & ((state.time + before) >> bits == block)
    # The count of the occurrences since the beginning of these symbols.
    own = inner[2] + jnp.where(in_block, inner[2][before] + 1, 0)
    before = jnp.where(in_block, before[before], before)
    is_first = block == state.time >> bits  # Open before these symbols.
    drawn = own + jnp.where(is_first, seen[symbols], 0)
    position = times & ((1 << bits) - 1)
    outer = (drawn, position - drawn)
    _, kt, change = _kt_and_change(inner[:2], outer, (own_prior, rest_prior))
    difference = excess + change
    gains = _gain(difference, kt, mixture)
    sums = _sums_in_blocks(gains, position == 0)
    carried = jnp.where(is_first, old_log_odds, 0)
    log_odds = sums - gains + carried
    split, whole = jax.nn.sigmoid(log_odds), jax.nn.sigmoid(-log_odds)
    kt_rest = (outer[1].astype(dtype) + rest_prior) / (
      position.astype(dtype) + (own_prior + rest_prior)
    )
    is_open = end & ((1 << bits) - 1) != 0
    new_log_odds, residual = compensated_sum(
      carried[-1], jnp.where(is_first[-1], old_residual, 0), sums[-1]
    )
    has_newest = (newest >= 0) & (block[newest] == block[-1])
    counts = jnp.where(has_newest, own[newest] + 1, 0)
    counts = counts + jnp.where(is_first[-1], seen, 0)
    carry = (
      (*outer, own),
      before,
      whole * kt + split * mixture,
      whole * kt_rest + split * rest,
      split * difference,
    )
    final = (
      jnp.where(is_open, counts, 0),
      jnp.where(is_open, new_log_odds, 0),
      jnp.where(is_open, residual, 0),
      sums + carried,
    )
    return carry, final

  depth = len(state.log_odds)
  nothing = jnp.zeros_like(symbols)
  total = own_prior + rest_prior
  start = (
    (nothing, nothing, nothing),
    last,
    own_prior / total,
    rest_prior / total,
    jnp.zeros_like(total),
  )
  levels = (
    np.arange(depth, 0, -1, dtype=np.int32),
    state.counts[:-1],
    state.log_odds.astype(dtype),
    state.log_odds_residual.astype(dtype),
  )
  carry, (counts, log_odds, residual, block_log_odds) = jax.lax.scan(
    add_level, start, levels, reverse=True
  )
  _, _, mixture, rest, _ = carry
  # The last level is never open.
  counts = jnp.pad(counts, ((0, 1), (0, 0)))
  final = PTWState(end, counts, log_odds, residual)
  final = jax.tree.map(lambda new, old: new.astype(old.dtype), final, state)
  return predictors.log_share(mixture, rest), final, block_log_odds


def _last_occurrences(
  symbols: jax.Array, alphabet_size: int
) -> tuple[jax.Array, jax.Array]:
  """Indices of the occurrence before each symbol `[T]`, and of the last `[K]`.

  -1 where there is none.
  """
  order = predictors.times_by_symbol(symbols, alphabet_size)
  by_symbol, alphabet = symbols[order], jnp.arange(alphabet_size)
  is_again = jnp.append(False, by_symbol[1:] == by_symbol[:-1])
  before = jnp.where(is_again, jnp.roll(order, 1), -1)
  ends = jnp.searchsorted(by_symbol, alphabet, side='right')
  newest = order[ends - 1]
  return (
    jnp.zeros_like(symbols).at[order].set(before),
    jnp.where(symbols[newest] == alphabet, newest, -1),
  )


def _sums_in_blocks(terms: jax.Array, is_start: jax.Array) -> jax.Array:
  """Running sums `[T]` that begin anew where a block does."""

  def add(
    left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]
  ) -> tuple[jax.Array, jax.Array]:
    total = jnp.where(right[1], right[0], left[0] + right[0])
    return total, left[1] | right[1]

  return jax.lax.associative_scan(add, (terms, is_start))[0]


@jax.jit
def _next_log_probs(state: PTWState, prior: jax.Array) -> jax.Array:
  """Returns log p_0 of the next symbol, `[B, K]`."""
  split, whole = _split_and_whole(state, prior.dtype)
  kts = predictors.kt_probs(state.counts, prior)
  mixtures = _mix_levels(split, whole[..., None] * kts[:, :-1], kts[:, -1])
  return jnp.log(mixtures[:, 0])


def _split_and_whole(
  state: PTWState, dtype: Any
) -> tuple[jax.Array, jax.Array]:
  """sigmoid(L_j) and sigmoid(-L_j), `[B, d]` each."""
  log_odds = state.log_odds.astype(dtype)
  return jax.nn.sigmoid(log_odds), jax.nn.sigmoid(-log_odds)


def _mix_levels(
  split: jax.Array, added: jax.Array, innermost: jax.Array
) -> jax.Array:
  """Solves v_j = split_j v_{j+1} + added_j in log2(d) rounds.

  Args:
    split: `[B, d]`.
    added: `[B, d, N]`.
    innermost: v_d, `[B, N]`.

  Returns:
    v_0, ..., v_d, `[B, d + 1, N]`.
  """

  def compose(
    inner: tuple[jax.Array, jax.Array], outer: tuple[jax.Array, jax.Array]
  ) -> tuple[jax.Array, jax.Array]:
    return outer[0] * inner[0], outer[0] * inner[1] + outer[1]

  split = jnp.pad(split, ((0, 0), (0, 1)))[..., None]
  added = jnp.concatenate([added, innermost[:, None]], axis=1)
  return jax.lax.associative_scan(
    compose, (split, added), reverse=True, axis=1
  )[1]


@jax.jit
def _stream(
  batch: jax.Array, state: PTWState, prior: jax.Array
) -> tuple[jax.Array, PTWState]:
  """Predictions after each symbol of `[B, T, K]`, and the last state."""

  def step(state: PTWState, symbols: jax.Array) -> tuple[PTWState, jax.Array]:
    return _step(state, symbols, prior)

  # log_probs[t] is about symbol t, given those before it.
  state, log_probs = jax.lax.scan(step, state, batch.swapaxes(0, 1))
  log_probs = log_probs.swapaxes(0, 1)
  last = _next_log_probs(state, prior)
  return jnp.concatenate([log_probs[:, 1:], last[:, None]], axis=1), state


@jax.jit
def _step(
  state: PTWState, symbols: jax.Array, prior: jax.Array
) -> tuple[PTWState, jax.Array]:
  """The state after one more symbol, and its log-probabilities `[B, K]`.

  Args:
    state: State before the symbol.
    symbols: One-hot, `[B, K]`.
    prior: Dirichlet concentration `[K]`.
  """
  dtype, depth = prior.dtype, state.log_odds.shape[1]
  drawn_prior = _drawn_prior(symbols.astype(dtype), prior)
  symbols = symbols.astype(jnp.int32)
  # Counts of the symbol that came, and of all others, per level: [B, d + 1].
  drawn = (symbols[:, None] * state.counts).sum(axis=-1)
  others = state.counts.sum(axis=-1) - drawn
  _, drawn_kts, changes = _kt_and_change(
    (drawn[:, 1:], others[:, 1:]),
    (drawn[:, :-1], others[:, :-1]),
    tuple(part[:, None] for part in drawn_prior),
  )
  kts = predictors.kt_probs(state.counts, prior)
  split, whole = _split_and_whole(state, dtype)
  # p_j of all symbols, and p_j - kt_j of the one that comes, [B, d + 1, K + 1].
  levels = _mix_levels(
    split,
    jnp.concatenate(
      [whole[..., None] * kts[:, :-1], (split * changes)[..., None]], axis=-1
    ),
    jnp.pad(kts[:, -1], ((0, 0), (0, 1))),
  )
  mixtures, excesses = levels[..., :-1], levels[..., -1]
  log_odds, residual = compensated_sum(
    state.log_odds.astype(dtype),
    state.log_odds_residual,
    _gain(
      excesses[:, 1:] + changes,
      drawn_kts,
      (symbols[:, None] * mixtures[:, 1:]).sum(axis=-1),
    ),
  )
  counts = state.counts + symbols[:, None]
  # A block that has just ended makes way for an empty one.
  time = state.time + 1
  is_open = time % (1 << np.arange(depth, -1, -1)) != 0  # [d + 1]
  new = PTWState(
    time=time,
    counts=jnp.where(is_open[:, None], counts, 0),
    log_odds=jnp.where(is_open[:-1], log_odds, 0),
    log_odds_residual=jnp.where(is_open[:-1], residual, 0),
  )
  new = jax.tree.map(lambda new, old: new.astype(old.dtype), new, state)
  return new, jnp.log(mixtures[:, 0])


def _drawn_prior(
  symbols: jax.Array, prior: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The concentrations of symbols `[..., K]`, and of all others, `[...]`."""
  return (symbols * prior).sum(axis=-1), ((1 - symbols) * prior).sum(axis=-1)


def _kt_and_change(
  inner: tuple[jax.Array, jax.Array],
  outer: tuple[jax.Array, jax.Array],
  prior: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """KT of the symbol that comes: kt_{j+1}, kt_j, and their difference, `[...]`.

  Args:
    inner: Times that the symbol, and that another one came before in the
      level-(j+1) block, int32 `[...]`.
    outer: The same for the level-j block.
    prior: Prior counts from `_drawn_prior`.
  """
  own, rest = prior
  dtype = own.dtype
  inner_total = sum(inner).astype(dtype) + (own + rest)
  inner_kt = (inner[0].astype(dtype) + own) / inner_total
  inner_complement = (inner[1].astype(dtype) + rest) / inner_total
  total = sum(outer).astype(dtype) + (own + rest)
  kt = (outer[0].astype(dtype) + own) / total
  # Before the inner block, r and s, as shares of what there is.
  drawn, others = (
    (out - inn).astype(dtype) / total
    for out, inn in zip(outer, inner, strict=True)
  )
  change = inner_kt * others - inner_complement * drawn
  return inner_kt, kt, change


def _gain(
  difference: jax.Array, kt: jax.Array, mixture: jax.Array
) -> jax.Array:
  """The increment of L_j by the symbol that came.

  Args:
    difference: d_j = p_{j+1} - kt_j of the symbol.
    kt: kt_j of the symbol.
    mixture: p_{j+1} of the symbol.
  """
  # The logarithm of a number above 1, which has its digits either way.
  is_less = difference < 0
  ratio = jnp.abs(difference) / jnp.where(is_less, mixture, kt)
  return jnp.where(is_less, -1, 1) * jnp.log1p(ratio)


def compensated_sum(
  total: jax.Array, residual: jax.Array, term: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Adds a term to a sum that is kept in two parts (Kahan, 1965).

  Args:
    total: Sum so far.
    residual: Its remainder below the rounding.
    term: Term to add.

  Returns:
    The new sum and its remainder.
  """
  term = term + residual
  new = total + term
  return new, term - (new - total)
