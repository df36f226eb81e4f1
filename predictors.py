"""The Predictor interface, for networks and exact Bayes predictors alike.

A predictor reads one-hot symbols `[B, T, K]` and says at every time what it
expects next. Axes: B batch, T time, F features of a symbol (K of them for
one-hot symbols), K alphabet size.

  symbols      x_0  x_1  x_2  ...  x_{T-1}
  predictions  about x_1, x_2, x_3, ...,  x_T

The last prediction is about a symbol not seen yet. Predictions are logits;
those of Bayes predictors are normalised log-probabilities, in nats.
`symbol_log_probs` reads integers `[B, T]` instead, and says how probable each
symbol was before it came, x_0 included.
"""

import abc
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import functools
from typing import Any
from typing import NamedTuple
from typing import NoReturn

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from nonstationary_mbml import base_config

Params = Any
State = Any

# Numbers in the largest array of a chunk of integer symbols.
_CHUNK_SIZE = 2**20


class Predictor(abc.ABC):
  """Predicts the next symbol of sequences."""

  # Whether `initial_state` is more than None, to be carried from one chunk of a
  # sequence to the next.
  has_state: bool

  @abc.abstractmethod
  def init_params(
    self, rng: jax.Array, batch_init: jax.Array, state_init: State
  ) -> Params:
    """Returns initial parameters; {} if the predictor has none.

    Args:
      rng: Key of the parameters.
      batch_init: A batch `[B, T, F]`, for its shape and dtype.
      state_init: A state for the batch, or None.
    """

  @abc.abstractmethod
  def initial_state(
    self, params: Params, rng: jax.Array | None, batch_size: int
  ) -> State:
    """Returns the state before any symbol, a pytree; None if stateless."""

  @abc.abstractmethod
  def unroll(
    self,
    params: Params,
    rng: jax.Array | None,
    batch: jax.Array,
    init_state: State = None,
  ) -> tuple[jax.Array, State]:
    """Predicts every next symbol of a batch.

    For a predictor with a state, unrolling chunk after chunk with the state
    carried over equals one unroll of the whole.

    Args:
      params: Parameters from `init_params`, or trained ones.
      rng: Key of dropout. None is evaluation: deterministic, no dropout.
      batch: Symbols `[B, T, F]`.
      init_state: State to start from; None is the initial state.

    Returns:
      Predictions `[B, T, K]` (logits) and the state after the last symbol.

    Raises:
      ValueError: If the batch or the state has the wrong shape, or a state is
        given to a predictor that has none.
    """


class _Network(Predictor):
  """A predictor that is made of functions, which do not change."""

  def __copy__(self) -> '_Network':
    return self

  def __deepcopy__(self, memo: dict[int, Any]) -> '_Network':
    return self

  def __reduce__(self) -> NoReturn:
    raise TypeError(
      'a network cannot be pickled, since functions are part of it; save its '
      'parameters and its config, and build it again with '
      'predictor_factories.build_predictor'
    )


class InContextPredictor(_Network):
  """A Haiku model of whole sequences, without a state (Transformer, CNN).

  Each call is a context of its own: there is nothing to carry over.
  """

  has_state = False

  def __init__(self, model: Callable[[jax.Array], jax.Array]):
    """Initializes the predictor.

    Args:
      model: Maps `[B, T, F]` to logits `[B, T, K]`, causally; called inside
        `hk.transform`. Without a key in its Haiku context it must not use
        dropout.
    """
    self._transformed = hk.transform(model)
    self._features = hk.transform(_last_linear_inputs(model)).apply

  def init_params(
    self, rng: jax.Array, batch_init: jax.Array, state_init: State
  ) -> Params:
    self._check_stateless(state_init)
    check_batch(batch_init)
    return self._transformed.init(rng, _as_floating(batch_init))

  def initial_state(
    self, params: Params, rng: jax.Array | None, batch_size: int
  ) -> State:
    return None

  def unroll(
    self,
    params: Params,
    rng: jax.Array | None,
    batch: jax.Array,
    init_state: State = None,
  ) -> tuple[jax.Array, State]:
    self._check_stateless(init_state)
    check_batch(batch)
    batch = _as_floating(batch)
    with _explaining_params(self, params, batch):
      return self._transformed.apply(cast_like(params, batch), rng, batch), None

  def unroll_features(
    self, params: Params, rng: jax.Array | None, batch: jax.Array
  ) -> jax.Array:
    """Returns what the last linear layer reads, for analysis.

    Args:
      params: Parameters, as in `unroll`.
      rng: Key of dropout, as in `unroll`.
      batch: Symbols `[B, T, F]`.

    Returns:
      `[B, T, D]`: at t, all that the prediction of symbol t + 1 is made from.

    Raises:
      ValueError: If the model has no such layer, or reads something else than a
        vector for every symbol.
    """
    check_batch(batch)
    batch = _as_floating(batch)
    with _explaining_params(self, params, batch):
      features = self._features(cast_like(params, batch), rng, batch)
    # By position, and with a padded end, as models like it.
    num_sequences, seq_length, _ = batch.shape
    if features.size % (num_sequences * features.shape[-1]) == 0:
      features = features.reshape(num_sequences, -1, features.shape[-1])
      if features.shape[1] >= seq_length:
        return features[:, :seq_length]
    raise ValueError(
      f'the last linear layer reads {features.shape} for a batch of '
      f'{batch.shape}: not a vector for every symbol'
    )

  def _check_stateless(self, state: State) -> None:
    if state is not None:
      raise ValueError(
        'init_state must be None: a predictor without a state has nothing to '
        'carry over, every chunk is its own context'
      )


class RNNPredictor(_Network):
  """A recurrent Haiku network.

  The network is a module with `initial_state(batch_size)`, `__call__(batch,
  state) -> (logits, state)` and `unroll_states(batch, state)`, as
  `models.basic.make_rnn` builds.
  """

  has_state = True

  def __init__(self, make_network: Callable[[], hk.Module]):
    """Initializes the predictor.

    Args:
      make_network: Builds the network; called inside `hk.transform`.
    """

    def network():
      module = make_network()

      def init(batch: jax.Array) -> jax.Array:
        state = module.initial_state(batch.shape[0])
        return module(batch, cast_like(state, batch))

      return init, (module, module.initial_state, module.unroll_states)

    transformed = hk.multi_transform(network)
    self._init = transformed.init
    self._apply, self._initial_state, self._unroll_states = transformed.apply

  def init_params(
    self, rng: jax.Array, batch_init: jax.Array, state_init: State
  ) -> Params:
    check_batch(batch_init)
    return self._init(rng, _as_floating(batch_init))

  def initial_state(
    self, params: Params, rng: jax.Array | None, batch_size: int
  ) -> State:
    batch_size = base_config.check_int('batch_size', batch_size, 1)
    return self._initial_state(params, rng, batch_size)

  def unroll(
    self,
    params: Params,
    rng: jax.Array | None,
    batch: jax.Array,
    init_state: State = None,
  ) -> tuple[jax.Array, State]:
    return self._run(self._apply, params, rng, batch, init_state)

  def unroll_states(
    self,
    params: Params,
    rng: jax.Array | None,
    batch: jax.Array,
    init_state: State = None,
  ) -> State:
    """Returns the core's states after every symbol, for analysis.

    Args:
      params: Parameters, as in `unroll`.
      rng: Key of dropout, as in `unroll`.
      batch: Symbols `[B, T, F]`.
      init_state: State to start from, as in `unroll`.

    Returns:
      A pytree like the state, its arrays `[B, T, ...]`: T times the memory of
      `unroll`.
    """
    return self._run(self._unroll_states, params, rng, batch, init_state)

  def _run(
    self,
    apply: Callable[..., Any],
    params: Params,
    rng: jax.Array | None,
    batch: jax.Array,
    init_state: State,
  ) -> Any:
    """Applies the network, from a state and in the dtype of the batch."""
    check_batch(batch)
    batch = _as_floating(batch)
    with _explaining_params(self, params, batch):
      if init_state is None:
        rng, rng_state = _split(rng)
        init_state = self.initial_state(params, rng_state, batch.shape[0])
      check_state_batch_size(init_state, batch)
      return apply(
        cast_like(params, batch), rng, batch, cast_like(init_state, batch)
      )


class ScanPredictor(base_config.EqualByValue, Predictor):
  """A predictor without parameters, defined by what one symbol does.

  A subclass gives `initial_state`, `update` and `output_from_state`. `unroll`
  is a `lax.scan`, for which the state has to keep its shapes; a subclass with
  another state gives its own. Two predictors with equal attributes are equal,
  and share their compiled programs.
  """

  has_state = True
  # Whether `_symbol_log_probs` holds predictions `[B, T, K]`.
  holds_predictions = True

  @abc.abstractmethod
  def update(self, symbols: jax.Array, state: State) -> State:
    """Returns the state after one more symbol of each sequence, `[B, F]`."""

  @abc.abstractmethod
  def output_from_state(self, state: State) -> jax.Array:
    """Returns the prediction `[B, K]` of the next symbol."""

  def init_params(
    self, rng: jax.Array, batch_init: jax.Array, state_init: State
  ) -> Params:
    return {}

  def unroll(
    self,
    params: Params,
    rng: jax.Array | None,
    batch: jax.Array,
    init_state: State = None,
  ) -> tuple[jax.Array, State]:
    check_batch(batch)
    if init_state is None:
      init_state = self.initial_state(params, rng, batch.shape[0])
    check_state_batch_size(init_state, batch)

    return _scan(self, batch, init_state)

  def _symbol_log_probs(
    self, symbols: jax.Array, state: State
  ) -> tuple[jax.Array, State]:
    """The log-probability of every symbol of `[B, T]`, and the last state.

    They are checked. A subclass that needs no `[B, T, K]` gives its own, and
    says so by `holds_predictions`.
    """
    first = self.output_from_state(state)
    batch = jax.nn.one_hot(symbols, first.shape[-1])
    predictions, state = self.unroll({}, None, batch, state)
    predictions = jnp.concatenate([first[:, None], predictions[:, :-1]], axis=1)
    return _of_symbols(predictions, symbols), state


class OptimalPredictor(ScanPredictor):
  """An exact Bayes predictor of segments with a Dirichlet prior.

  Attributes:
    concentration: Concentration of the Dirichlet prior: one number for a
      symmetric one, else a tuple of K.
    label: Name in tables and figures.
    state_class: Class of its states.
  """

  label: str
  state_class: type

  def __init__(
    self,
    concentration: float | Sequence[float] = 0.5,
    alphabet_size: int | None = None,
  ):
    """Initializes the predictor.

    Args:
      concentration: Concentration of the Dirichlet prior; 1/2 is that of KT.
      alphabet_size: K. By default that of the batch, of `concentration`, or, in
        `initial_state` with a symmetric prior, 2.

    Raises:
      ValueError: If the concentration is not positive, does not have K
        entries, or is lost in float32.
    """
    if alphabet_size is not None:
      alphabet_size = base_config.check_int('alphabet_size', alphabet_size, 2)
    self.concentration = base_config.check_dirichlet(
      'concentration', concentration, alphabet_size
    )
    if isinstance(self.concentration, tuple):
      alphabet_size = len(self.concentration)
    self._alphabet_size = alphabet_size

  @abc.abstractmethod
  def empty_state(self, batch_size: int, alphabet_size: int) -> State:
    """Returns the state before any symbol, for an alphabet of K."""

  def initial_state(
    self, params: Params, rng: jax.Array | None, batch_size: int
  ) -> State:
    batch_size = base_config.check_int('batch_size', batch_size, 1)
    return self.empty_state(batch_size, self._alphabet_size or 2)

  def check_seq_length(self, seq_length: int) -> None:
    """Raises ValueError if a sequence cannot be that long."""
    base_config.check_int('seq_length', seq_length, 1)

  def check_alphabet_size(self, alphabet_size: int, field: str) -> None:
    """Raises ValueError if `field` cannot have so many symbols."""
    if alphabet_size != (self._alphabet_size or alphabet_size):
      raise ValueError(
        f'{field} has {alphabet_size} symbols, but alphabet_size is '
        f'{self._alphabet_size}'
      )
    # A symmetric prior of few symbols may fit where one of many does not.
    base_config.check_dirichlet(
      'concentration', self.concentration, alphabet_size
    )

  def prior(self, alphabet_size: int, dtype: Any) -> jax.Array:
    """Returns the concentration of every symbol, `[K]`."""
    # By NumPy, which compiles nothing.
    prior = np.asarray(self.concentration, dtype)
    return jax.device_put(np.broadcast_to(prior, (alphabet_size,)))

  def _start(self, batch: jax.Array, init_state: State) -> State:
    """Checks a batch and returns the state to start from."""
    check_batch(batch)
    check_one_hot(batch)
    alphabet_size = batch.shape[-1]
    self.check_alphabet_size(alphabet_size, 'the batch')
    if init_state is None:
      return self.empty_state(batch.shape[0], alphabet_size)
    self._check_state(init_state)
    check_state_batch_size(init_state, batch)
    if init_state.counts.shape[-1] != alphabet_size:
      raise ValueError(
        f'init_state counts {init_state.counts.shape[-1]} symbols, the batch '
        f'has {alphabet_size}; build the predictor with '
        f'alphabet_size={alphabet_size}'
      )
    return init_state

  def _check_update(self, symbols: jax.Array, state: State) -> None:
    """Raises ValueError unless one more symbol of each sequence fits."""
    check_one_hot(symbols)
    self._check_state(state)
    check_state_batch_size(state, symbols)

  def _check_state(self, state: State) -> None:
    """Raises ValueError if a state is of another kind of predictor."""
    if not isinstance(state, self.state_class):
      raise ValueError(
        f'the state is a {type(state).__name__}; {type(self).__name__} takes a '
        f'{self.state_class.__name__}'
      )


class KTState(NamedTuple):
  """Attributes: counts: Symbols seen so far, int32 `[B, K]`."""

  counts: jax.Array


class OptimalCategoricalPredictor(OptimalPredictor):
  """The Bayes predictor of one segment; KT for Dirichlet(1/2).

    p(s) = (n_s + a_s) / (n + sum_k a_k)

  Source: Krichevsky & Trofimov, The performance of universal encoding, 1981.
  """

  label = 'KT'
  state_class = KTState
  holds_predictions = False

  def empty_state(self, batch_size: int, alphabet_size: int) -> KTState:
    return KTState(jnp.zeros((batch_size, alphabet_size), jnp.int32))

  def update(self, symbols: jax.Array, state: KTState) -> KTState:
    self._check_update(symbols, state)
    _check_count(state.counts, 1)
    return KTState(state.counts + symbols.astype(jnp.int32))

  def output_from_state(self, state: KTState) -> jax.Array:
    self._check_state(state)
    return self._log_probs(state.counts, jnp.result_type(float))

  def unroll(
    self,
    params: Params,
    rng: jax.Array | None,
    batch: jax.Array,
    init_state: KTState | None = None,
  ) -> tuple[jax.Array, KTState]:
    state = self._start(batch, init_state)
    _check_count(state.counts, batch.shape[1])
    seen = jnp.cumsum(batch.astype(jnp.int32), axis=1)
    counts = state.counts[:, None] + seen  # [B, T, K]
    log_probs = self._log_probs(counts, compute_dtype(batch))
    return log_probs.astype(dtype_of(batch)), KTState(counts[:, -1])

  def _symbol_log_probs(
    self, symbols: jax.Array, state: KTState
  ) -> tuple[jax.Array, KTState]:
    _check_count(state.counts, symbols.shape[1])
    prior = self.prior(state.counts.shape[-1], jnp.result_type(float))
    return _kt_of_symbols(symbols, state, prior)

  def _log_probs(self, counts: jax.Array, dtype: Any) -> jax.Array:
    return jnp.log(kt_probs(counts, self.prior(counts.shape[-1], dtype)))


@functools.partial(jax.jit, static_argnums=0)
def _scan(
  predictor: ScanPredictor, batch: jax.Array, init_state: State
) -> tuple[jax.Array, State]:
  """Unrolls `predictor`; compiled once for equal ones and a shape."""

  def step(state: State, symbols: jax.Array) -> tuple[State, jax.Array]:
    state = predictor.update(symbols, state)
    return state, predictor.output_from_state(state)

  final_state, outputs = jax.lax.scan(step, init_state, batch.swapaxes(0, 1))
  return outputs.swapaxes(0, 1).astype(dtype_of(batch)), final_state


@jax.jit
def _kt_of_symbols(
  symbols: jax.Array, state: KTState, prior: jax.Array
) -> tuple[jax.Array, KTState]:
  """Log-probabilities of symbols `[B, T]`, and the state after them."""

  def one(symbols: jax.Array, seen: jax.Array) -> tuple[jax.Array, jax.Array]:
    alphabet_size, length = len(seen), len(symbols)
    times = times_by_symbol(symbols, alphabet_size)
    by_symbol = symbols[times]
    begins = jnp.searchsorted(by_symbol, jnp.arange(alphabet_size + 1))
    ranks = jnp.arange(length, dtype=jnp.int32) - begins[by_symbol]
    own = seen[symbols] + jnp.zeros_like(symbols).at[times].set(ranks)
    others = seen.sum() + jnp.arange(length) - own
    own_prior, rest_prior = prior_of_symbols(symbols, prior)
    log_probs = log_share(
      own.astype(prior.dtype) + own_prior,
      others.astype(prior.dtype) + rest_prior,
    )
    return log_probs, seen + jnp.diff(begins).astype(jnp.int32)

  log_probs, counts = jax.vmap(one)(symbols, state.counts)
  return log_probs, KTState(counts)


def times_by_symbol(symbols: jax.Array, alphabet_size: int) -> jax.Array:
  """Returns the times of all symbols `[T]`, sorted by symbol, then by time."""
  length = len(symbols)
  if alphabet_size * length > base_config.MAX_SIZE:
    return jnp.argsort(symbols, stable=True).astype(jnp.int32)
  # One array of distinct numbers is sorted several times as fast as a pair.
  times = jnp.arange(length, dtype=jnp.int32)
  return jnp.sort(symbols * length + times, stable=False) % length


def prior_of_symbols(
  symbols: jax.Array, prior: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the concentrations of symbols `[...]`, and of all others."""
  # No difference of the sum, which would cancel, and no array of K times K.
  zero = jnp.zeros(1, prior.dtype)
  before = jnp.concatenate([zero, jnp.cumsum(prior[:-1])])
  after = jnp.concatenate([jnp.cumsum(prior[:0:-1])[::-1], zero])
  return prior[symbols], (before + after)[symbols]


def log_share(own: jax.Array, others: jax.Array) -> jax.Array:
  """Returns log(own / (own + others)), with all digits where it is near 0."""
  is_likely = others < own
  share = jnp.where(is_likely, others, own) / (own + others)
  return jnp.where(is_likely, jnp.log1p(-share), jnp.log(share))


def kt_probs(counts: jax.Array, prior: jax.Array) -> jax.Array:
  """Returns (n_s + a_s) / (n + sum_k a_k) for every symbol s.

  Args:
    counts: n_s, `[..., K]`.
    prior: a_s, `[K]`; computation is in its dtype.
  """
  weights = counts.astype(prior.dtype) + prior
  return weights / weights.sum(axis=-1, keepdims=True)


def _check_count(counts: jax.Array, num_symbols: int) -> None:
  """Raises ValueError if concrete counts `[B, K]` would leave int32."""
  if isinstance(counts, jax.core.Tracer):
    return
  most = int(np.asarray(counts).sum(axis=-1, dtype=np.int64).max(initial=0))
  if most + num_symbols > base_config.MAX_SIZE:
    raise ValueError(
      f'{most + num_symbols} symbols are more than can be counted: '
      f'{base_config.MAX_SIZE}'
    )


def dtype_of(batch: jax.Array | np.ndarray) -> Any:
  """Returns the dtype of predictions: the batch's, as JAX holds it.

  For integers it is the default float.
  """
  dtype = jnp.result_type(batch)
  if jnp.issubdtype(dtype, jnp.floating):
    return dtype
  return jnp.result_type(float)


def compute_dtype(batch: jax.Array | np.ndarray) -> Any:
  """Returns the dtype in which exact predictors compute.

  At least float32: narrower floats do not hold the counts.
  """
  return jnp.promote_types(dtype_of(batch), jnp.float32)


def check_batch(batch: jax.Array) -> None:
  """Raises ValueError unless the batch is `[B, T, F]` with T >= 1."""
  if jnp.ndim(batch) != 3 or 0 in jnp.shape(batch):
    raise ValueError(
      f'batch has shape {jnp.shape(batch)}; it must be [B, T, F], none of them '
      '0'
    )


def check_one_hot(batch: jax.Array) -> None:
  """Raises ValueError if symbols `[..., K]` are concrete and not one-hot."""
  if isinstance(batch, jax.core.Tracer):
    return
  symbols = np.asarray(batch)
  # One-hot: exactly one entry is 1, and all others are 0.
  is_one = symbols == 1
  wrong = (is_one.sum(axis=-1) != 1) | (is_one != (symbols != 0)).any(axis=-1)
  if wrong.any():
    where = tuple(int(index) for index in np.argwhere(wrong)[0])
    raise ValueError(
      f'symbols must be one-hot; at {where} of shape {symbols.shape} there is '
      f'{symbols[where].tolist()}'
    )


def check_state_batch_size(state: State, batch: jax.Array) -> None:
  """Raises ValueError if a state is not for the sequences of the batch."""
  for leaf in jax.tree.leaves(state):
    if jnp.ndim(leaf) and jnp.shape(leaf)[0] != batch.shape[0]:
      raise ValueError(
        f'init_state is for {jnp.shape(leaf)[0]} sequences, the batch has '
        f'{batch.shape[0]}'
      )


def unroll_in_chunks(
  predictor: Predictor,
  params: Params,
  rng: jax.Array | None,
  batch: jax.Array,
  init_state: State = None,
  chunk_length: int | None = None,
) -> tuple[jax.Array, State]:
  """Predicts a batch chunk after chunk, in the memory of one chunk.

  A state is carried from each chunk to the next, so the result is that of one
  unroll. Without a state every chunk is a context of its own.

  Args:
    predictor: The predictor.
    params: Its parameters.
    rng: Key of dropout, as in `Predictor.unroll`.
    batch: Symbols `[B, T, F]`.
    init_state: State to start from; None is the initial state.
    chunk_length: Symbols per chunk; None is the whole batch.

  Returns:
    As `Predictor.unroll`.
  """
  seq_length = batch.shape[1]
  if chunk_length is not None:
    chunk_length = base_config.check_int('chunk_length', chunk_length, 1)
  if chunk_length is None or chunk_length >= seq_length:
    return predictor.unroll(params, rng, batch, init_state)
  # Traced, not computed: it raises `unroll`'s errors about the whole batch.
  jax.eval_shape(lambda: predictor.unroll(params, rng, batch, init_state))

  def unroll(
    state: State, begin: jax.Array | int, length: int
  ) -> tuple[State, jax.Array]:
    chunk = jax.lax.dynamic_slice_in_dim(batch, begin, length, axis=1)
    chunk_rng = None if rng is None else jax.random.fold_in(rng, begin)
    predictions, state = predictor.unroll(params, chunk_rng, chunk, state)
    return state, predictions

  num_chunks, rest = divmod(seq_length, chunk_length)
  # The first chunk by itself: `init_state` may be None, and the state grow.
  state, first = unroll(init_state, 0, chunk_length)
  predictions = [first]
  begins = np.arange(1, num_chunks) * chunk_length
  after = jax.eval_shape(lambda state: unroll(state, 0, chunk_length)[0], state)
  if jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state):
    state, chunks = jax.lax.scan(
      lambda state, begin: unroll(state, begin, chunk_length), state, begins
    )  # [chunks, B, length, K]
    chunks = jnp.moveaxis(chunks, 0, 1)
    predictions.append(chunks.reshape(len(batch), -1, first.shape[-1]))
  else:
    for begin in begins:
      state, chunk = unroll(state, begin, chunk_length)
      predictions.append(chunk)
  if rest:
    state, last = unroll(state, seq_length - rest, rest)
    predictions.append(last)
  return jnp.concatenate(predictions, axis=1), state


class SymbolState(NamedTuple):
  """Where a network is in a stream of symbols, for `symbol_log_probs`.

  Attributes:
    state: State of the network; None if it has none.
    next_log_probs: Log-probabilities of the next symbol, `[B, K]`.
  """

  state: State
  next_log_probs: jax.Array


def symbol_log_probs(
  predictor: Predictor,
  params: Params,
  symbols: jax.Array | np.ndarray,
  state: State = None,
  chunk_length: int | None = None,
) -> tuple[jax.Array, State]:
  """Returns how probable every symbol was before it came.

  The sum over time is minus the code length of the sequence, in nats. A network
  has no prediction before the first symbol; that is a uniform one.

    symbols    0           0           1                K = 2, KT
    log_probs  log(1/2)    log(3/4)    log(1/6)

  KT, PTW, Forget-Me-Not and pruned run-length mixtures never hold `[B, T, K]`,
  others that of one chunk. Chunk after chunk, or with the state carried on from
  call to call, it is the same as at once, but for networks without a state:
  they begin anew in every chunk, whose first symbol is predicted from the last
  one.

  Args:
    predictor: Exact predictor or network. An exact one has K symbols by its
      `alphabet_size`, its concentration, or else 2.
    params: Its parameters; {} for an exact one.
    symbols: Integers 0, ..., K - 1, `[B, T]`.
    state: State to go on from, as returned here; None is the beginning.
      Exact predictors take that of `unroll` as well.
    chunk_length: Symbols at a time; by default as many as take little memory,
      or the whole sequence where there is no state.

  Returns:
    Log-probabilities `[B, T]` in nats, and the state after the last symbol: of
    a network a `SymbolState`, of an exact predictor its own.

  Raises:
    ValueError: If a symbol is no integer or out of range, which the message
      says with its position; or the state or the length does not fit.
  """
  if not hasattr(symbols, 'dtype'):
    symbols = np.asarray(symbols)
  check_symbols(symbols)
  batch_size, seq_length = symbols.shape
  if chunk_length is not None:
    chunk_length = base_config.check_int('chunk_length', chunk_length, 1)
  is_exact = isinstance(predictor, ScanPredictor)
  if is_exact:
    state, alphabet_size = _exact_state(predictor, params, state, symbols)
  else:
    alphabet_size = _output_size(predictor)
    state = _network_state(predictor, state, batch_size, alphabet_size)
  check_symbols(symbols, alphabet_size)
  if chunk_length is None:
    chunk_length = seq_length
    if predictor.has_state:
      holds = not is_exact or predictor.holds_predictions
      size = batch_size * (alphabet_size if holds else 1)
      chunk_length = max(1, _CHUNK_SIZE // size)
  log_probs = []
  for begin in range(0, seq_length, chunk_length):
    chunk = jnp.asarray(symbols[:, begin : begin + chunk_length], jnp.int32)
    if is_exact:
      chunk, state = predictor._symbol_log_probs(chunk, state)
    else:
      chunk, state = _network_log_probs(predictor, params, chunk, state)
    log_probs.append(chunk)
  return jnp.concatenate(log_probs, axis=1), state


def check_symbols(
  symbols: jax.Array | np.ndarray, alphabet_size: int | None = None
) -> None:
  """Raises ValueError unless symbols are integers `[B, T]` below K.

  Args:
    symbols: Symbols; only concrete ones are looked at.
    alphabet_size: K; None checks shape and dtype alone.
  """
  shape, dtype = np.shape(symbols), jnp.result_type(symbols)
  if len(shape) != 2 or 0 in shape:
    raise ValueError(
      f'symbols has shape {shape}; it must be [B, T], none of them 0'
    )
  if not jnp.issubdtype(dtype, jnp.integer):
    raise ValueError(f'symbols must be integers, not {dtype}')
  if alphabet_size is None or isinstance(symbols, jax.core.Tracer):
    return
  array = np.asarray(symbols)
  if 0 <= array.min() and array.max() < alphabet_size:
    return
  where = np.argwhere((array < 0) | (array >= alphabet_size))[0].tolist()
  raise ValueError(
    f'symbols must be 0, ..., {alphabet_size - 1} for an alphabet of '
    f'{alphabet_size}; at {tuple(where)} there is {array[tuple(where)]}'
  )


def _exact_state(
  predictor: ScanPredictor, params: Params, state: State, symbols: jax.Array
) -> tuple[State, int]:
  """The state to begin with, checked, and its alphabet."""
  batch_size, seq_length = np.shape(symbols)
  if state is None:
    state = predictor.initial_state(params, None, batch_size)
  # The state stays concrete: its time may be needed.
  output = jax.eval_shape(lambda: predictor.output_from_state(state))
  alphabet_size = output.shape[-1]
  check_state_batch_size(state, symbols)
  if isinstance(predictor, OptimalPredictor):
    predictor.check_alphabet_size(alphabet_size, 'the state')
    time = getattr(state, 'time', 0)
    if not isinstance(time, jax.core.Tracer):
      predictor.check_seq_length(int(time) + seq_length)
  return state, alphabet_size


def _output_size(network: Predictor) -> int:
  """The alphabet of a network, which its output tells for any input."""
  batch = jnp.zeros((1, 1, 2))

  def output() -> jax.Array:
    params = network.init_params(jax.random.key(0), batch, None)
    return network.unroll(params, None, batch)[0]

  return jax.eval_shape(output).shape[-1]


def _network_state(
  network: Predictor,
  state: SymbolState | None,
  batch_size: int,
  alphabet_size: int,
) -> SymbolState:
  """The state to begin with, checked."""
  shape = (batch_size, alphabet_size)
  if state is None:
    return SymbolState(None, jnp.full(shape, -np.log(alphabet_size)))
  if not isinstance(state, SymbolState):
    raise ValueError(
      f'state is a {type(state).__name__}; that of a network must come from '
      'symbol_log_probs, since it has the next prediction'
    )
  check_state_batch_size(state, np.empty(shape))
  return state


@functools.partial(jax.jit, static_argnums=0)
def _network_log_probs(
  network: Predictor, params: Params, symbols: jax.Array, state: SymbolState
) -> tuple[jax.Array, SymbolState]:
  """Log-probabilities of a chunk `[B, T]`, and the state after it."""
  first = state.next_log_probs[:, None]
  batch = jax.nn.one_hot(symbols, first.shape[-1], dtype=first.dtype)
  init_state = state.state if network.has_state else None
  logits, final_state = network.unroll(params, None, batch, init_state)
  predictions = jax.nn.log_softmax(logits)
  before = jnp.concatenate([first, predictions[:, :-1]], axis=1)
  state = SymbolState(final_state, predictions[:, -1])
  return _of_symbols(before, symbols), state


def _of_symbols(predictions: jax.Array, symbols: jax.Array) -> jax.Array:
  """The entries of `[B, T, K]` for symbols `[B, T]`."""
  return jnp.take_along_axis(predictions, symbols[..., None], axis=-1)[..., 0]


def _last_linear_inputs(
  model: Callable[[jax.Array], jax.Array],
) -> Callable[[jax.Array], jax.Array]:
  """Returns a model whose output is what the last `hk.Linear` of one reads."""

  def features(batch: jax.Array) -> jax.Array:
    read = []

    def keep(
      method: Callable[..., Any],
      args: tuple[Any, ...],
      kwargs: dict[str, Any],
      context: hk.MethodContext,
    ) -> Any:
      if isinstance(context.module, hk.Linear) and args:
        read.append(args[0])
      return method(*args, **kwargs)

    with hk.intercept_methods(keep):
      model(batch)
    if not read:
      raise ValueError('the model has no linear layer')
    return read[-1]

  return features


def _split(rng: jax.Array | None) -> tuple[jax.Array | None, ...]:
  return (None, None) if rng is None else tuple(jax.random.split(rng))


def _as_floating(batch: jax.Array) -> jax.Array:
  """A batch as an array of floating-point numbers, for a network."""
  batch = jnp.asarray(batch)
  return batch.astype(dtype_of(batch))


def cast_like(tree: Any, batch: jax.Array) -> Any:
  """Returns a tree with its floating-point arrays in the dtype of a batch."""
  dtype = dtype_of(batch)
  return jax.tree.map(
    lambda leaf: (
      leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
    ),
    tree,
  )


@contextlib.contextmanager
def _explaining_params(
  predictor: Predictor, params: Params, batch: jax.Array
) -> Iterator[None]:
  """Inside a `with`, explains errors from parameters of the wrong shapes.

  Haiku and JAX tell of a product of two matrices deep inside the network. The
  right shapes are traced only after an error: nothing is slower without one.
  """
  try:
    yield
  except (TypeError, ValueError) as error:
    wanted = jax.eval_shape(
      lambda: predictor.init_params(jax.random.key(0), batch, None)
    )
    problem = _params_problem(params, wanted)
    if problem is None:
      raise
    raise ValueError(problem) from error


def _params_problem(params: Params, wanted: Params) -> str | None:
  """Returns why parameters do not fit a network; None if they do."""
  given, wanted = (
    {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in leaves}
    for leaves in map(jax.tree.leaves_with_path, (params, wanted))
  )
  if given == wanted:
    return None
  if given.keys() != wanted.keys():
    names = sorted(given.keys() ^ wanted.keys())
    return f'params do not fit this network: {names[0]} is in one of them only'
  leading_axes = {shape[:1] for shape in given.values()}
  if len(leading_axes) == 1 and all(
    shape[1:] == wanted[name] for name, shape in given.items()
  ):
    return (
      f'params are those of the {leading_axes.pop()[0]} members of an '
      'ensemble; take those of one, such as run.member(0)'
    )
  name = next(name for name in given if given[name] != wanted[name])
  return (
    f'params do not fit this network on a batch of these features: {name} has '
    f'shape {given[name]}; {wanted[name]} is needed'
  )
