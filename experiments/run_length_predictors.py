"""Exact Bayes mixture over partitions, for any segment-length distribution.

Segments have i.i.d. lengths with a hazard h(a), the chance that a segment ends
after its a-th symbol, and each is predicted by a Bayes estimator kt with a
Dirichlet prior. Special cases: LAD (Willems, 1996), h(a) = 1/(2a); Bayesian
online change-point detection (Adams & MacKay, 2007), h(a) constant; a known
period P, h(a) = [a = P]; KT, h(a) = 0.

With w_t(s) the posterior that the current segment began after s symbols:

  p(x_t)       = sum_s w_t(s) kt(x_t | x_{s..t-1})
  w_{t+1}(s)   = w_t(s) kt(x_t | x_{s..t-1}) (1 - h(t - s + 1)) / p(x_t)
  w_{t+1}(t+1) = sum_s w_t(s) kt(x_t | x_{s..t-1}) h(t - s + 1) / p(x_t)

  symbols 0 0, LAD:  w_0 = 1,  w_1 = 1/2 1/2,  w_2 = 9/20 4/20 7/20

The code carries r_t(s), the weight of a start before it is known how long the
segment is. With S and f as in hazards.py:

  w_t(s)       = r_t(s) S(t - s)
  r_{t+1}(s)   = r_t(s) kt(x_t | x_{s..t-1}) / p(x_t)
  r_{t+1}(t+1) = sum_s r_{t+1}(s) f(t + 1 - s)

so that the hazards, which can be 0 or 1, are in no recursion, and a start that
is out of the question now can come back. To that end, r, S and f are scaled
numbers, as in scaled.py.

Smoothed, with u_t(s) = P(the segment of symbol t began after s | all symbols):

  d_t(s)       = r_{t+1}(s) f(t + 1 - s) / r_{t+1}(t+1)
  u_t(s)       = u_{t+1}(s) + d_t(s) u_{t+1}(t+1)        u_T = w_T

backwards, r_t from r_{t+1} by division. d_t is the posterior of a start given
that its segment ends at t; P(a segment starts at t | all) = u_t(t). This is the
forward-backward algorithm on probabilities, which cannot overflow, in O(T)
memory.
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools
import itertools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nonstationary_mbml import base_config
from nonstationary_mbml import predictors
from nonstationary_mbml.experiments import distributions
from nonstationary_mbml.experiments import hazards as hazards_lib
from nonstationary_mbml.experiments import pruned_run_lengths
from nonstationary_mbml.experiments import scaled as scaled_lib

# The capacity of a state that goes on grows from this many symbols, a
# power of two: 64, 96, 128, 192, ... More steps would do less work, and compile
# more.
_MIN_CAPACITY = 64
# A whole sequence is read in so many chunks. Each has capacity only for the
# starts that there can be by its end: 5/8 of the work of a single chunk.
_NUM_CHUNKS = 4


class RunLengthState(NamedTuple):
  """The posterior over the start of the current segment.

  It has a capacity of S > t starts, so that arrays change their shape only when
  that is used up and grows; entries beyond t are zeros. `run_length_posterior`
  of the predictor turns it into probabilities. It is of one hazard and one
  prior: another RunLengthPredictor cannot go on from it.

  Attributes:
    time: t, symbols seen so far, int32, the same for all sequences.
    mantissas: Mantissas of r_t(s) for s = 0, ..., t, `[B, S]`.
    exponents: Their powers of two, int32 `[B, S]`.
    counts: Counts of the symbols since s, int32 `[B, S, K]`.
  """

  time: jax.Array
  mantissas: jax.Array
  exponents: jax.Array
  counts: jax.Array


class RunLengthPredictor(predictors.OptimalPredictor):
  """The exact Bayes predictor of a source with i.i.d. segment lengths.

  It takes O(T^2) time and O(T) memory, and a whole sequence one compiled
  program. Its state grows with time, in steps if it goes on; where the time is
  not concrete (inside `jit`), its capacity grows by the length of every chunk.
  With a `max_length` that is its capacity from the start, and it can be carried
  through a `lax.scan`; it must not go on for longer, which is an error wherever
  the time is concrete.

  With `max_run_lengths` N it keeps the N heaviest starts instead, in O(T N)
  time and O(N) memory (pruned_run_lengths.py). `nats_lost` bounds what that
  costs. Where the time is not concrete it needs a `max_length` then.

  Attributes:
    hazard: Segment-length distribution.
  """

  def __init__(
    self,
    hazard: hazards_lib.Hazard
    | Callable[[np.ndarray], Any]
    | Sequence[float]
    | float,
    concentration: float | Sequence[float] = 0.5,
    alphabet_size: int | None = None,
    max_length: int | None = None,
    max_run_lengths: int | None = None,
  ):
    """Initializes the predictor.

    Args:
      hazard: h(a) as a function of arrays of lengths, a table (longer segments
        have its last hazard), a constant, or a distribution from hazards.py.
      concentration: Dirichlet concentration of a segment's prior; 1/2 is KT.
      alphabet_size: K, as in OptimalPredictor.
      max_length: Capacity of the state, in symbols; None lets it grow.
      max_run_lengths: N, starts that are kept; None keeps all.

    Raises:
      ValueError: If a hazard is outside [0, 1], or an argument out of range.
    """
    super().__init__(concentration, alphabet_size)
    if max_length is not None:
      max_length = base_config.check_int('max_length', max_length, 1)
    if max_run_lengths is not None:
      max_run_lengths = base_config.check_int(
        'max_run_lengths', max_run_lengths, 2
      )
    self.hazard = hazards_lib.as_hazard(hazard)
    self.max_length = max_length
    self.max_run_lengths = max_run_lengths

  @property
  def label(self) -> str:
    """Name in tables and figures, by what is known of the lengths."""
    return self.hazard.label

  @property
  def state_class(self) -> type:
    """Class of its states."""
    if self.max_run_lengths is None:
      return RunLengthState
    return pruned_run_lengths.PrunedRunLengthState

  @property
  def holds_predictions(self) -> bool:
    """Whether the predictions of all symbols are held for some."""
    return self.max_run_lengths is None

  def check_seq_length(self, seq_length: int) -> None:
    super().check_seq_length(seq_length)
    if self.max_length is not None and seq_length > self.max_length:
      raise ValueError(
        f'max_length {self.max_length} is less than the {seq_length} symbols'
      )

  def empty_state(
    self, batch_size: int, alphabet_size: int
  ) -> RunLengthState | pruned_run_lengths.PrunedRunLengthState:
    if self.max_run_lengths is not None:
      return pruned_run_lengths.empty_state(
        batch_size, self.max_run_lengths, alphabet_size
      )
    size = 1 + (self.max_length or 0)
    # Made in NumPy, which compiles nothing.
    mantissas = np.zeros((batch_size, size), jnp.result_type(float))
    mantissas[:, 0] = 1
    exponents = np.full((batch_size, size), scaled_lib.ZERO_EXPONENT, np.int32)
    exponents[:, 0] = 0
    counts = np.zeros((batch_size, size, alphabet_size), np.int32)
    arrays = jax.device_put((mantissas, exponents, counts))
    # The time stays in NumPy, and so concrete inside jit.
    return RunLengthState(np.int32(0), *arrays)

  def update(self, symbols: jax.Array, state: RunLengthState) -> RunLengthState:
    return self.unroll({}, None, symbols[:, None], state)[1]

  def output_from_state(self, state: RunLengthState) -> jax.Array:
    self._check_state(state)
    dtype = state.mantissas.dtype
    prior = self.prior(state.counts.shape[-1], dtype)
    survival, _ = self._tables_of(state)
    if self.max_run_lengths is not None:
      return jnp.log(pruned_run_lengths.next_probs(state, prior, survival))
    return jnp.log(_next_probs(state, prior, survival))

  def unroll(
    self,
    params: predictors.Params,
    rng: jax.Array | None,
    batch: jax.Array,
    init_state: RunLengthState | None = None,
  ) -> tuple[jax.Array, RunLengthState]:
    if self.max_run_lengths is not None:
      return self._unroll_pruned(batch, init_state)
    log_probs, state, _ = self._unroll(batch, init_state)
    return log_probs, state

  def _symbol_log_probs(
    self, symbols: jax.Array, state: Any
  ) -> tuple[jax.Array, Any]:
    if self.max_run_lengths is None:
      return super()._symbol_log_probs(symbols, state)
    return self._advance_pruned(symbols, state, state.mantissas.dtype, False)

  def nats_lost(
    self, state: pruned_run_lengths.PrunedRunLengthState
  ) -> jax.Array:
    """Returns a bound on the nats that pruning has lost so far.

    The code length of the symbols is that of the whole mixture and at most so
    much; pruned_run_lengths.py derives it. It is infinite if weight was dropped
    and the hazard is not known to never grow with the length.

    Args:
      state: State of a predictor with `max_run_lengths`, concrete.

    Returns:
      `[B]`; 0 where nothing was dropped.
    """
    self._check_pruned('nats_lost', True)
    self._check_state(state)
    capacity = self._capacity(state)
    bound = pruned_run_lengths.nats_lost(state, self._tables_of(state)[0])
    if pruned_run_lengths.never_grows(self.hazard, capacity + 1):
      return bound
    return jnp.where(bound > 0, jnp.inf, 0)

  def run_length_posterior(self, state: RunLengthState) -> jax.Array:
    """Returns P(the current segment has n symbols so far | the t seen).

    n = 0 is a new segment that begins with the next symbol.

    Args:
      state: After t symbols.

    Returns:
      For n = 0, ..., t, `[B, t + 1]`; where the time is not concrete, `[B, S]`
      with zeros beyond t.
    """
    self._check_state(state)
    if self.max_run_lengths is not None:
      return self._pruned_posterior(state)
    posterior = _by_run_length(self._weights(state), state.time)
    return _up_to_time(posterior, state.time)

  def unroll_run_lengths(
    self, batch: jax.Array, init_state: RunLengthState | None = None
  ) -> jax.Array:
    """Returns `run_length_posterior` after every symbol, for analysis.

    Args:
      batch: Symbols `[B, T, K]`.
      init_state: State after t symbols, as in `unroll`.

    Returns:
      P(n symbols so far) `[B, T, t + T + 1]`: T times the memory of `unroll`.
      Impossible run lengths are 0.
    """
    self._check_pruned('unroll_run_lengths', False)
    _, state, weights = self._unroll(batch, init_state, with_weights=True)
    # Those after a symbol are those before the next one.
    weights = jnp.concatenate(
      [weights[:, 1:], self._weights(state)[:, None]], axis=1
    )
    seq_length = batch.shape[1]
    times = state.time - seq_length + 1 + jnp.arange(seq_length)
    posteriors = jax.vmap(_by_run_length, in_axes=(1, 0), out_axes=1)(
      weights, times
    )
    return _up_to_time(posteriors, state.time)

  def switch_posterior(self, batch: jax.Array) -> jax.Array:
    """Returns P(a new segment starts at t | the whole sequence).

    Args:
      batch: Whole sequences `[B, T, K]`.

    Returns:
      `[B, T]`; 0 at t = 0, as in `switch_points` of a source.
    """
    self._check_pruned('switch_posterior', False)
    state = self._start(batch, None)
    seq_length, dtype = batch.shape[1], predictors.compute_dtype(batch)
    self._capacity_after(state, seq_length)
    posterior = _switch_posterior(
      jnp.asarray(batch, dtype),
      state,
      self.prior(batch.shape[-1], dtype),
      _tables(self.hazard, seq_length, np.dtype(dtype)),
    )
    return posterior.astype(predictors.dtype_of(batch))

  def _unroll(
    self,
    batch: jax.Array,
    init_state: RunLengthState | None,
    with_weights: bool = False,
  ) -> tuple[jax.Array, RunLengthState, jax.Array | None]:
    """Predictions, final state and, if asked for, w_t(s) before each symbol."""
    state = self._start(batch, init_state)
    seq_length, dtype = batch.shape[1], predictors.compute_dtype(batch)
    capacity = self._capacity_after(state, seq_length)
    is_begin = not isinstance(state.time, jax.core.Tracer) and state.time == 0
    log_probs, final_state, weights = _unroll(
      jnp.asarray(batch, dtype),
      state,
      self.prior(batch.shape[-1], dtype),
      _tables(self.hazard, capacity, np.dtype(dtype)),
      _chunks(seq_length) if is_begin else ((0, seq_length, capacity),),
      with_weights,
    )
    # Concrete where it was: the time inside of a compiled function is not.
    final_state = final_state._replace(
      time=state.time + np.int32(seq_length),
      mantissas=final_state.mantissas.astype(state.mantissas.dtype),
    )
    return log_probs.astype(predictors.dtype_of(batch)), final_state, weights

  def _weights(self, state: RunLengthState) -> jax.Array:
    """w_t(s), `[B, S]`."""
    return _start_weights(state, self._tables_of(state)[0])

  def _tables_of(
    self, state: Any
  ) -> tuple[scaled_lib.Scaled, scaled_lib.Scaled]:
    """S and f for all lengths that the segments of a state can have."""
    dtype = np.dtype(state.mantissas.dtype)
    return _tables(self.hazard, self._capacity(state), dtype)

  def _unroll_pruned(
    self,
    batch: jax.Array,
    init_state: pruned_run_lengths.PrunedRunLengthState | None,
  ) -> tuple[jax.Array, pruned_run_lengths.PrunedRunLengthState]:
    """`unroll` with the heaviest starts."""
    state = self._start(batch, init_state)
    symbols = jnp.argmax(jnp.asarray(batch), axis=-1).astype(jnp.int32)
    log_probs, state = self._advance_pruned(
      symbols, state, predictors.compute_dtype(batch), True
    )
    return log_probs.astype(predictors.dtype_of(batch)), state

  def _advance_pruned(
    self,
    symbols: jax.Array,
    state: pruned_run_lengths.PrunedRunLengthState,
    dtype: Any,
    with_predictions: bool,
  ) -> tuple[jax.Array, pruned_run_lengths.PrunedRunLengthState]:
    """Takes in symbols `[B, T]`, as `pruned_run_lengths.unroll`."""
    seq_length = symbols.shape[1]
    if not isinstance(state.time, jax.core.Tracer):
      self.check_seq_length(int(state.time) + seq_length)
    outputs, final_state = pruned_run_lengths.unroll(
      symbols,
      state,
      self.prior(state.counts.shape[-1], dtype),
      _tables(
        self.hazard, self._pruned_capacity(state, seq_length), np.dtype(dtype)
      ),
      pruned_run_lengths.log_limit(self.hazard),
      with_predictions,
    )
    # Concrete where it was.
    time = state.time + np.int32(seq_length)
    return outputs, final_state._replace(time=time)

  def _pruned_capacity(self, state: Any, seq_length: int = 0) -> int:
    """The longest segment there can be after so many more symbols."""
    if self.max_length is not None:
      return self.max_length
    if isinstance(state.time, jax.core.Tracer):
      raise ValueError(
        'max_length is None, but with max_run_lengths it must be given where '
        'the time of the state is traced'
      )
    return _capacity_for(max(1, int(state.time) + seq_length))

  def _pruned_posterior(
    self, state: pruned_run_lengths.PrunedRunLengthState
  ) -> jax.Array:
    """`run_length_posterior` by the heaviest starts."""
    weights = pruned_run_lengths.weights(state, self._tables_of(state)[0])
    time = int(state.time)
    posterior = np.zeros((len(weights), time + 1), weights.dtype)
    rows = np.arange(len(weights))[:, None]
    # A free place has weight 0.
    ages = np.where(np.asarray(state.starts) < 0, 0, time - state.starts)
    np.add.at(posterior, (rows, ages), np.asarray(weights))
    return jax.device_put(posterior)

  def _check_pruned(self, method: str, is_pruned: bool) -> None:
    """Raises ValueError if a method does not go with `max_run_lengths`."""
    if (self.max_run_lengths is not None) != is_pruned:
      raise ValueError(
        f'max_run_lengths is {self.max_run_lengths}; {method} needs '
        f'{"a number" if is_pruned else "None, since it reads all starts"}'
      )

  def _capacity(self, state: Any) -> int:
    """The capacity of a state, in symbols."""
    if self.max_run_lengths is not None:
      return self._pruned_capacity(state)
    capacity = state.mantissas.shape[1] - 1
    is_concrete = not isinstance(state.time, jax.core.Tracer)
    if is_concrete and int(state.time) > capacity:
      raise ValueError(
        f'the state has capacity for {capacity} symbols, but its time is '
        f'{int(state.time)}'
      )
    return capacity

  def _capacity_after(self, state: RunLengthState, seq_length: int) -> int:
    """The capacity that a state needs to take in T more symbols."""
    capacity = state.mantissas.shape[1] - 1
    is_concrete = not isinstance(state.time, jax.core.Tracer)
    time = int(state.time) if is_concrete else None
    if self.max_length is None:
      if time is None:
        return capacity + seq_length
      if time + seq_length <= capacity:
        return capacity
      return _capacity_for(time + seq_length) if time else seq_length
    if capacity != self.max_length:
      raise ValueError(
        f'init_state has capacity for {capacity} symbols, but max_length is '
        f'{self.max_length}'
      )
    if (time or 0) + seq_length > self.max_length:
      raise ValueError(
        f'max_length {self.max_length} is less than the '
        f'{(time or 0) + seq_length} symbols'
      )
    return capacity


def regular_shift_predictor(
  shift_period: int,
  concentration: float | Sequence[float] = 0.5,
  alphabet_size: int | None = None,
) -> RunLengthPredictor:
  """Returns the exact Bayes predictor of the `regular_shift` source.

  Args:
    shift_period: Length of all segments.
    concentration: As in RunLengthPredictor.
    alphabet_size: As in RunLengthPredictor.

  Raises:
    ValueError: If an argument is out of range.
  """
  shift_period = base_config.check_int('shift_period', shift_period, 1)
  return RunLengthPredictor(
    hazards_lib.KnownPeriod(shift_period), concentration, alphabet_size
  )


def random_shift_predictor(
  shift_distribution: str | distributions.Distribution,
  shift_parameters: Sequence[float],
  concentration: float | Sequence[float] = 0.5,
  alphabet_size: int | None = None,
) -> RunLengthPredictor:
  """Returns the exact Bayes predictor of the `random_shift` source.

  Args:
    shift_distribution: Distribution of X in the length max(1, round X), by name
      or as an object of one feature.
    shift_parameters: Its parameters.
    concentration: As in RunLengthPredictor.
    alphabet_size: As in RunLengthPredictor.

  Raises:
    ValueError: If an argument is out of range.
  """
  hazard = hazards_lib.RoundedLengths(
    *distributions.check_univariate(
      'shift_distribution',
      shift_distribution,
      'shift_parameters',
      shift_parameters,
    )
  )
  return RunLengthPredictor(hazard, concentration, alphabet_size)


def length_distribution_predictor(
  pmf: Sequence[float],
  concentration: float | Sequence[float] = 0.5,
  alphabet_size: int | None = None,
) -> RunLengthPredictor:
  """Returns the exact Bayes predictor for i.i.d. segment lengths.

  Args:
    pmf: P(L = 1), ..., P(L = n), up to the longest possible segment.
    concentration: As in RunLengthPredictor.
    alphabet_size: As in RunLengthPredictor.

  Raises:
    ValueError: If the pmf does not sum to 1, or an argument is out of range.
  """
  return RunLengthPredictor(
    hazards_lib.LengthDistribution(pmf), concentration, alphabet_size
  )


def _chunks(seq_length: int) -> tuple[tuple[int, int, int], ...]:
  """Begin and end of the chunks of a sequence, and the capacity of each."""
  num = _NUM_CHUNKS if seq_length >= _MIN_CAPACITY else 1
  ends = [-(-seq_length * i // num) for i in range(num + 1)]
  return tuple((begin, end, end) for begin, end in itertools.pairwise(ends))


def _capacity_for(num: int) -> int:
  """The least of 2^k and 3 * 2^(k - 1) that is `num` or more."""
  power = 1 << (num - 1).bit_length()
  return max(_MIN_CAPACITY, 3 * power // 4 if num <= 3 * power // 4 else power)


@functools.lru_cache(maxsize=128)
def _tables(
  hazard: hazards_lib.Hazard, capacity: int, dtype: np.dtype
) -> tuple[scaled_lib.Scaled, scaled_lib.Scaled]:
  """S(n) and f(n + 1) for n = capacity, ..., 0, and zeros for as many n < 0."""
  log_pmf, log_survival = hazard.log_probs(capacity + 1)

  def scaled(logs: np.ndarray) -> scaled_lib.Scaled:
    logs = np.pad(logs[::-1], (0, len(logs)), constant_values=-np.inf)
    powers = np.maximum(logs / np.log(2), scaled_lib.ZERO_EXPONENT)
    exponents = np.floor(powers)
    mantissas = np.exp2(powers - exponents).astype(dtype)
    return scaled_lib.Scaled(mantissas, exponents.astype(np.int32))

  return scaled(log_survival), scaled(log_pmf)


def _by_start(
  table: scaled_lib.Scaled, time: jax.Array, num: int
) -> scaled_lib.Scaled:
  """The entries n = time - s of a table, for s = 0, ..., num - 1."""
  zero = table.mantissa.shape[0] // 2 - 1  # Where n = 0 is.
  return scaled_lib.Scaled(
    *(jax.lax.dynamic_slice_in_dim(array, zero - time, num) for array in table)
  )


@jax.jit
def _start_weights(
  state: RunLengthState, survival: scaled_lib.Scaled
) -> jax.Array:
  """w_t(s), `[B, S]`, by the table of S."""
  survival = _by_start(survival, state.time, state.mantissas.shape[1])
  return scaled_lib.value(
    scaled_lib.times(
      scaled_lib.Scaled(state.mantissas, state.exponents), survival
    )
  )


@jax.jit
def _by_run_length(weights: jax.Array, time: jax.Array) -> jax.Array:
  """w(t - n) for n = 0, ..., t, and zeros, `[B, S]`."""
  return jnp.roll(weights[:, ::-1], time + 1, axis=1)


def _up_to_time(posterior: jax.Array, time: jax.Array) -> jax.Array:
  """Cuts the last axis, where the time is concrete, to n = 0, ..., t."""
  if isinstance(time, jax.core.Tracer):
    return posterior
  end = int(time) + 1
  if isinstance(posterior, jax.core.Tracer):
    return posterior[..., :end]
  # In NumPy, so that nothing is compiled anew at every symbol of a stream.
  return jax.device_put(np.asarray(posterior)[..., :end])


def _with_capacity(
  state: RunLengthState, capacity: int, dtype: Any
) -> RunLengthState:
  """A state of another capacity, to compute in a dtype."""
  return RunLengthState(
    jnp.asarray(state.time),
    _resize(state.mantissas.astype(dtype), capacity + 1, 0),
    _resize(state.exponents, capacity + 1, scaled_lib.ZERO_EXPONENT),
    _resize(state.counts, capacity + 1, 0),
  )


def _resize(
  array: jax.Array, length: int, value: float, axis: int = 1
) -> jax.Array:
  """Cuts an axis to a length, or pads it."""
  array = jax.lax.slice_in_dim(
    array, 0, min(length, array.shape[axis]), axis=axis
  )
  padding = [(0, 0)] * array.ndim
  padding[axis] = (0, length - array.shape[axis])
  return jnp.pad(array, padding, constant_values=value)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _unroll(
  symbols: jax.Array,
  state: RunLengthState,
  prior: jax.Array,
  tables: tuple[scaled_lib.Scaled, scaled_lib.Scaled],
  chunks: tuple[tuple[int, int, int], ...],
  with_weights: bool,
) -> tuple[jax.Array, RunLengthState, jax.Array | None]:
  """Takes in the symbols of a batch.

  Args:
    symbols: `[B, T, K]`, one-hot.
    state: State before them.
    prior: Dirichlet concentration `[K]`.
    tables: S and f, for the capacity that the state has in the end.
    chunks: Begin, end and capacity of the chunks in which they are read.
    with_weights: Whether to return w.

  Returns:
    Log-probabilities `[B, T, K]` after every symbol, the state after all of
    them, and w_t(s) before every symbol `[B, T, S]` or None.
  """
  probs, weights = [], []
  for begin, end, capacity in chunks:
    state, chunk_probs, chunk_weights = _forward(
      symbols[:, begin:end],
      _with_capacity(state, capacity, symbols.dtype),
      prior,
      tables,
      with_weights,
    )
    probs.append(chunk_probs)
    weights.append(chunk_weights)
  capacity = tables[0].mantissa.shape[0] // 2 - 1
  state = _with_capacity(state, capacity, symbols.dtype)
  # probs[t] is about symbol t, given those before it.
  probs.append(_next_probs(state, prior, tables[0])[:, None])
  if with_weights:
    weights = [_resize(chunk, capacity + 1, 0, axis=2) for chunk in weights]
  return (
    jnp.log(jnp.concatenate(probs, axis=1)[:, 1:]),
    state,
    jnp.concatenate(weights, axis=1) if with_weights else None,
  )


@jax.jit
def _switch_posterior(
  symbols: jax.Array,
  state: RunLengthState,
  prior: jax.Array,
  tables: tuple[scaled_lib.Scaled, scaled_lib.Scaled],
) -> jax.Array:
  """P(a new segment starts at t | the whole sequence), `[B, T]`.

  Args:
    symbols: `[B, T, K]`, one-hot.
    state: State before them.
    prior: Dirichlet concentration `[K]`.
    tables: S and f.
  """
  chunks = _chunks(symbols.shape[1])
  probs = []
  for begin, end, capacity in chunks:
    chunk = symbols[:, begin:end]
    state, chunk_probs, _ = _forward(
      chunk,
      _with_capacity(state, capacity, symbols.dtype),
      prior,
      tables,
      False,
    )
    probs.append((chunk * chunk_probs).sum(axis=-1))  # p(x_t)
  r = scaled_lib.Scaled(state.mantissas, state.exponents)  # r_T
  weights = _start_weights(state, tables[0])  # u_T
  posteriors = []
  for (_, end, capacity), chunk_probs in zip(
    reversed(chunks), reversed(probs), strict=True
  ):
    r, weights, posterior = _backward(
      symbols[:, :end],
      chunk_probs,
      scaled_lib.Scaled(*(array[:, : capacity + 1] for array in r)),
      weights[:, : capacity + 1],
      prior,
      tables[1],
    )
    posteriors.append(posterior)
  posterior = jnp.concatenate(posteriors[::-1], axis=1)  # t = 1, ..., T
  return jnp.pad(posterior[:, :-1], ((0, 0), (1, 0)))


@jax.jit
def _next_probs(
  state: RunLengthState, prior: jax.Array, survival: scaled_lib.Scaled
) -> jax.Array:
  """Probabilities `[B, K]` of the next symbol, by the table of S."""
  starts = jnp.arange(state.mantissas.shape[1])
  return _mix(
    state.counts.swapaxes(1, 2).astype(prior.dtype) + prior[:, None],
    _kt_scale(state.time, starts, prior),
    scaled_lib.Scaled(state.mantissas, state.exponents),
    _by_start(survival, state.time, len(starts)),
  )


def _mix(
  counts: jax.Array,
  scale: jax.Array,
  r: scaled_lib.Scaled,
  survival: scaled_lib.Scaled,
) -> jax.Array:
  """sum_s r(s) S(s) counts(s) scale(s), `[B, K]`.

  Args:
    counts: `[B, K, S]`, with the prior.
    scale: `[S]`; kt(k | s) = counts * scale.
    r: `[B, S]`.
    survival: `[S]`.
  """
  survival = survival._replace(mantissa=survival.mantissa * scale)
  return scaled_lib.sum_products(
    counts, scaled_lib.value(scaled_lib.times(r, survival))
  )


def _forward(
  symbols: jax.Array,
  state: RunLengthState,
  prior: jax.Array,
  tables: tuple[scaled_lib.Scaled, scaled_lib.Scaled],
  with_weights: bool,
) -> tuple[RunLengthState, jax.Array, jax.Array | None]:
  """Takes in the symbols of a batch, for which the state has capacity.

  Args:
    symbols: `[B, T, K]`, one-hot.
    state: State before them.
    prior: Dirichlet concentration `[K]`.
    tables: S and f.
    with_weights: Whether to return w.

  Returns:
    The state after them, the probabilities `[B, T, K]` of every symbol given
    those before it, and w_t(s) before every symbol `[B, T, S]` or None.
  """
  dtype = symbols.dtype
  seq_length = symbols.shape[1]
  starts = jnp.arange(state.mantissas.shape[1])
  # Counts as differences: what was seen by t less what was seen by s; the
  # latter is negative where s lies before these symbols.
  seen = jnp.cumsum(symbols.astype(jnp.int32), axis=1)
  seen_by_start = jax.lax.dynamic_update_slice_in_dim(
    -state.counts, seen, state.time + 1, axis=1
  )
  before = seen_by_start.swapaxes(1, 2).astype(dtype)  # [B, K, S]

  def step(
    r: scaled_lib.Scaled, inputs: tuple[jax.Array, jax.Array, jax.Array]
  ) -> tuple[scaled_lib.Scaled, tuple[jax.Array, jax.Array | None]]:
    time, symbol, seen_by_time = inputs
    survival = _by_start(tables[0], time, len(starts))
    # Whole numbers first: a small prior would be lost in a large count.
    counts = seen_by_time[..., None] - before + prior[:, None]  # [B, K, S]
    scale = _kt_scale(time, starts, prior)
    probs = _mix(counts, scale, r, survival)
    # kt(x_t | s) / p(x_t)
    symbol = symbol / (symbol * probs).sum(axis=1, keepdims=True)
    own = scaled_lib.einsum('bk,bks->bs', symbol, counts) * scale
    weights = (
      scaled_lib.value(scaled_lib.times(r, survival)) if with_weights else None
    )
    r = scaled_lib.normalise(r._replace(mantissa=r.mantissa * own))
    new = scaled_lib.dot(r, _by_start(tables[1], time, len(starts)))
    is_new = starts == time + 1
    r = scaled_lib.Scaled(
      *(jnp.where(is_new, n[:, None], o) for n, o in zip(new, r, strict=True))
    )
    return r, (probs, weights)

  times = state.time + jnp.arange(seq_length)
  r, outputs = jax.lax.scan(
    step,
    scaled_lib.Scaled(state.mantissas, state.exponents),
    (times, *_time_major(symbols, (seen - symbols).astype(dtype))),
  )
  begun = starts <= state.time + seq_length
  counts = jnp.where(begun[:, None], seen[:, -1:] - seen_by_start, 0)
  probs, weights = jax.tree.map(lambda array: array.swapaxes(0, 1), outputs)
  time = state.time + seq_length
  return RunLengthState(time, *r, counts), probs, weights


def _backward(
  symbols: jax.Array,
  probs: jax.Array,
  r: scaled_lib.Scaled,
  weights: jax.Array,
  prior: jax.Array,
  pmf: scaled_lib.Scaled,
) -> tuple[scaled_lib.Scaled, jax.Array, jax.Array]:
  """Goes back over the last symbols of a batch.

  Args:
    symbols: Symbols up to the last of them, `[B, t + N, K]`.
    probs: p(x) of the last N, `[B, N]`.
    r: After them, `[B, S]`.
    weights: u after them, `[B, S]`.
    prior: Dirichlet concentration `[K]`.
    pmf: The table of f.

  Returns:
    r and u before them, and P(a segment starts after each of them) `[B, N]`.
  """
  starts = jnp.arange(weights.shape[1])
  seen = jnp.cumsum(symbols, axis=1) - symbols
  before = jnp.pad(
    jnp.cumsum(symbols, axis=1), ((0, 0), (1, len(starts)), (0, 0))
  )
  before = before[:, : len(starts)].swapaxes(1, 2)  # [B, K, S]

  def step(
    carry: tuple[scaled_lib.Scaled, jax.Array],
    inputs: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
  ) -> tuple[tuple[scaled_lib.Scaled, jax.Array], jax.Array]:
    r, weights = carry
    time, symbol, seen_by_time, prob = inputs
    new_weight, *new = (
      jax.lax.dynamic_index_in_dim(array, time + 1, axis=1)
      for array in (weights, *r)
    )
    ended = scaled_lib.times(r, _by_start(pmf, time, len(starts)))
    ended = scaled_lib.value(
      scaled_lib.Scaled(ended.mantissa / new[0], ended.exponent - new[1])
    )
    # It is 1 already, but for what rounding has added up to in r.
    total = scaled_lib.sum_products(ended, jnp.ones_like(ended))[:, None]
    weights += ended * (new_weight / jnp.where(total > 0, total, 1))
    counts = seen_by_time[..., None] - before + prior[:, None]
    own = scaled_lib.einsum('bk,bks->bs', symbol, counts)
    own = own * _kt_scale(time, starts, prior)
    r = scaled_lib.normalise(
      r._replace(mantissa=r.mantissa * (prob[:, None] / own))
    )
    return (r, weights), new_weight[:, 0]

  num = probs.shape[1]
  begin = symbols.shape[1] - num
  (r, weights), posterior = jax.lax.scan(
    step,
    (r, weights),
    (
      begin + jnp.arange(num),
      *_time_major(symbols[:, begin:], seen[:, begin:], probs),
    ),
    reverse=True,
  )
  return r, weights, posterior.swapaxes(0, 1)


def _kt_scale(
  time: jax.Array, starts: jax.Array, prior: jax.Array
) -> jax.Array:
  """1 / (n + sum of the prior) for n = time - s >= 0, `[S]`."""
  run_lengths = jnp.maximum(time - starts, 0).astype(prior.dtype)
  return 1 / (run_lengths + prior.sum())


def _time_major(*arrays: jax.Array) -> tuple[jax.Array, ...]:
  return tuple(array.swapaxes(0, 1) for array in arrays)
