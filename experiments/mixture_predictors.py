"""Bayes mixtures of exact predictors: what to do if nobody knows the source.

With the weight w_i of component i before any symbol, and P_i what it predicts,

  p(x_t)     = sum_i w_i(t) P_i(x_t | x_1, ..., x_{t-1})
  w_i(t + 1) = w_i(t) P_i(x_t | x_1, ..., x_{t-1}) / p(x_t)

so that w_i(t) is the posterior P(component i | x_1, ..., x_{t-1}), from its
evidence. The mixture is the exact Bayes predictor of a source that draws one of
several sources for every sequence. Its posterior over run lengths or switches
is the mean of those of the components, by their posteriors.

  symbols 0 0, KT and h = 1 (every symbol is a segment), each of weight 1/2:
  P(0 0) = 1/2 3/4 and 1/2 1/2, so that w = 1/2 1/2, then 3/5 2/5
"""

from collections.abc import Iterable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nonstationary_mbml import base_config
from nonstationary_mbml import predictors
from nonstationary_mbml.experiments import ptw_predictors

# Weights may be rounded by whoever writes them down.
_WEIGHTS_TOLERANCE = 1e-6


def check_weights(
  field: str, weights: Sequence[float] | None, number: int
) -> tuple[float, ...]:
  """Returns weights as floats; None stands for equal ones.

  Args:
    field: Name of the weights, for messages.
    weights: Prior probabilities, all positive.
    number: How many there must be.

  Raises:
    ValueError: If they are not `number` positive numbers that sum to 1.
  """
  if weights is None:
    return (1 / number,) * number
  weights = base_config.check_vector(field, weights)
  if len(weights) != number:
    raise ValueError(f'{field} has {len(weights)} entries for {number}')
  total = sum(weights)
  is_positive = all(weight > 0 for weight in weights)
  if not is_positive or not abs(total - 1) <= _WEIGHTS_TOLERANCE:
    raise ValueError(
      f'{field} is {weights!r}, with sum {total:.9g}; weights must be positive '
      'and sum to 1'
    )
  return weights


class MixtureState(NamedTuple):
  """The states of the components, and how well each has predicted.

  Attributes:
    components: States of the components.
    log_weights: Log posterior of the components in nats, `[B, N]`.
    log_weights_residual: Remainder of it below its rounding, `[B, N]`.
  """

  components: tuple[predictors.State, ...]
  log_weights: jax.Array
  log_weights_residual: jax.Array


class MixturePredictor(predictors.OptimalPredictor):
  """The exact Bayes mixture of exact predictors.

  Time and memory are those of the components together. Components may have
  different priors, or be mixtures themselves.

  Attributes:
    components: Predictors that are mixed.
    weights: Prior probability of each.
    concentration: None; every component has its own prior.
  """

  label = 'Bayes mixture'
  state_class = MixtureState

  def __init__(
    self,
    components: Sequence[predictors.OptimalPredictor],
    weights: Sequence[float] | None = None,
  ):
    """Initializes the predictor.

    Args:
      components: Predictors to mix, N of them.
      weights: Prior probability of each; None is 1/N for all.

    Raises:
      ValueError: If a component is no exact predictor, alphabets differ, or the
        weights are not positive or do not sum to 1.
    """
    self.components = tuple(components)
    if not self.components:
      raise ValueError('components is empty; a mixture has at least one')
    for index, component in enumerate(self.components):
      if not isinstance(component, predictors.OptimalPredictor):
        raise ValueError(
          f'components[{index}] is {component!r}; it must be an '
          'OptimalPredictor'
        )
    sizes = [component._alphabet_size for component in self.components]
    known = {size for size in sizes if size is not None}
    if len(known) > 1:
      raise ValueError(
        f'components have alphabets of {sizes} symbols; all must have the same'
      )
    self.weights = check_weights('weights', weights, len(self.components))
    self.concentration = None
    self._alphabet_size = known.pop() if known else None

  def check_seq_length(self, seq_length: int) -> None:
    for component in self.components:
      component.check_seq_length(seq_length)

  def check_alphabet_size(self, alphabet_size: int, field: str) -> None:
    for component in self.components:
      component.check_alphabet_size(alphabet_size, field)

  def empty_state(self, batch_size: int, alphabet_size: int) -> MixtureState:
    # In NumPy, which compiles nothing.
    log_weights = np.log(self.weights).astype(jnp.result_type(float))
    log_weights = np.tile(log_weights, (batch_size, 1))
    return MixtureState(
      tuple(
        component.empty_state(batch_size, alphabet_size)
        for component in self.components
      ),
      *jax.device_put((log_weights, np.zeros_like(log_weights))),
    )

  def update(self, symbols: jax.Array, state: MixtureState) -> MixtureState:
    self._check_update(symbols, state)
    return self.unroll({}, None, symbols[:, None], state)[1]

  def output_from_state(self, state: MixtureState) -> jax.Array:
    self._check_state(state)
    log_probs = [
      component.output_from_state(of_component)
      for component, of_component in zip(
        self.components, state.components, strict=True
      )
    ]
    return _mix(jnp.stack(log_probs, axis=-2), state.log_weights)

  def unroll(
    self,
    params: predictors.Params,
    rng: jax.Array | None,
    batch: jax.Array,
    init_state: MixtureState | None = None,
  ) -> tuple[jax.Array, MixtureState]:
    predictions, _, state = self._unroll(batch, init_state)
    return predictions, state

  def component_posterior(self, state: MixtureState) -> jax.Array:
    """Returns P(component | the symbols seen), `[B, N]`."""
    self._check_state(state)
    return jax.nn.softmax(state.log_weights)

  def unroll_component_posteriors(
    self, batch: jax.Array, init_state: MixtureState | None = None
  ) -> jax.Array:
    """Returns `component_posterior` after every symbol, `[B, T, N]`.

    Args:
      batch: Symbols `[B, T, K]`.
      init_state: State to start from, as in `unroll`.
    """
    return jnp.exp(self._unroll(batch, init_state)[1])

  def run_length_posterior(self, state: MixtureState) -> jax.Array:
    """Returns P(the current segment has n symbols so far | the t seen).

    Args:
      state: State after t symbols, concrete.

    Returns:
      For n = 0, ..., t, `[B, t + 1]`: the mean over components.

    Raises:
      ValueError: If a component has no such posterior.
    """
    posteriors = (
      _run_length_posterior(*pair)
      for pair in zip(self.components, state.components, strict=True)
    )
    return _mean(self.component_posterior(state), posteriors)

  def unroll_run_lengths(
    self, batch: jax.Array, init_state: MixtureState | None = None
  ) -> jax.Array:
    """Returns `run_length_posterior` after every symbol, for analysis.

    Args:
      batch: Symbols `[B, T, K]`.
      init_state: State after t symbols, as in `unroll`, concrete.

    Returns:
      P(n symbols so far) `[B, T, t + T + 1]`, 0 for impossible run lengths.

    Raises:
      ValueError: If a component has no such posterior.
    """
    states = (
      init_state.components if init_state else (None,) * len(self.components)
    )
    posteriors = (
      _unroll_run_lengths(component, batch, state)
      for component, state in zip(self.components, states, strict=True)
    )
    weights = self.unroll_component_posteriors(batch, init_state)
    return _mean(weights, posteriors)

  def switch_posterior(self, batch: jax.Array) -> jax.Array:
    """Returns P(a new segment starts at t | the whole sequence).

    Args:
      batch: Whole sequences `[B, T, K]`.

    Returns:
      `[B, T]`, the mean over components; 0 at t = 0.

    Raises:
      ValueError: If a component has no such posterior.
    """
    _, state = self.unroll({}, None, batch)
    posteriors = (
      _switch_posterior(component, batch) for component in self.components
    )
    posterior = _mean(self.component_posterior(state), posteriors)
    return posterior.astype(predictors.dtype_of(batch))

  def _unroll(
    self, batch: jax.Array, init_state: MixtureState | None
  ) -> tuple[jax.Array, jax.Array, MixtureState]:
    """Predictions, log posterior after every symbol, and the last state."""
    state = self._start(batch, init_state)
    # In no narrower float, in which components would round their predictions.
    symbols = jnp.asarray(batch, predictors.compute_dtype(batch))
    log_probs, states = [], []
    for component, of_component in zip(
      self.components, state.components, strict=True
    ):
      after, last = component.unroll({}, None, symbols, of_component)
      first = component.output_from_state(of_component)
      log_probs.append((first.astype(symbols.dtype), after))
      states.append(last)
    predictions, log_weights, *last = _unroll(
      log_probs, symbols, state.log_weights, state.log_weights_residual
    )
    return (
      predictions.astype(predictors.dtype_of(batch)),
      log_weights,
      MixtureState(tuple(states), *last),
    )

  def _start(
    self, batch: jax.Array, init_state: MixtureState | None
  ) -> MixtureState:
    predictors.check_batch(batch)
    if init_state is None:
      return self.empty_state(batch.shape[0], batch.shape[-1])
    self._check_state(init_state)
    predictors.check_state_batch_size(init_state, batch)
    return init_state

  def _check_state(self, state: MixtureState) -> None:
    super()._check_state(state)
    if len(state.components) != len(self.components):
      raise ValueError(
        f'the state is of {len(state.components)} components, not '
        f'{len(self.components)}'
      )


def _mix(log_probs: jax.Array, log_weights: jax.Array) -> jax.Array:
  """The log of sum_i w_i p_i `[..., K]`, by log p `[..., N, K]` and log w."""
  log_weights = jax.nn.log_softmax(log_weights)
  return jax.nn.logsumexp(log_probs + log_weights[..., None], axis=-2)


@jax.jit
def _unroll(
  log_probs: Sequence[tuple[jax.Array, jax.Array]],
  symbols: jax.Array,
  log_weights: jax.Array,
  residual: jax.Array,
) -> tuple[jax.Array, ...]:
  """Mixes the predictions of components.

  Args:
    log_probs: Predictions of the first symbol `[B, K]`, and those after every
      symbol `[B, T, K]`, by component.
    symbols: One-hot symbols `[B, T, K]`.
    log_weights: Log posterior before the first symbol, `[B, N]`.
    residual: Its remainder, `[B, N]`.

  Returns:
    Predictions after every symbol `[B, T, K]`, the log posterior with them
    `[B, T, N]`, and that after the last one with its remainder.
  """
  after = jnp.stack([after for _, after in log_probs], axis=2)  # [B, T, N, K]
  first = jnp.stack([first for first, _ in log_probs], axis=1)
  before = jnp.concatenate([first[:, None], after[:, :-1]], axis=1)
  is_drawn = symbols[:, :, None] != 0
  # No 0 log 0 of symbols that did not come.
  drawn = jnp.where(is_drawn, before, 0).sum(axis=-1)  # [B, T, N]
  state_dtype, dtype = log_weights.dtype, symbols.dtype

  def step(
    carry: tuple[jax.Array, jax.Array], drawn: jax.Array
  ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    log_weights, residual = carry
    log_prob = _mix(drawn[..., None], log_weights)
    log_weights, residual = ptw_predictors.compensated_sum(
      log_weights, residual, drawn - log_prob
    )
    # A component that has excluded what came is out for good.
    residual = jnp.where(jnp.isfinite(log_weights), residual, 0)
    return (log_weights, residual), jax.nn.log_softmax(log_weights)

  last, posteriors = jax.lax.scan(
    step,
    (log_weights.astype(dtype), residual.astype(dtype)),
    drawn.swapaxes(0, 1),
  )
  posteriors = posteriors.swapaxes(0, 1)
  return (
    _mix(after, posteriors),
    posteriors,
    *(array.astype(state_dtype) for array in last),
  )


def _mean(weights: jax.Array, posteriors: Iterable[jax.Array]) -> jax.Array:
  """The mean of N posteriors `[..., X]`, by weights `[..., N]`."""
  return sum(
    weights[..., index, None] * jnp.asarray(posterior, weights.dtype)
    for index, posterior in enumerate(posteriors)
  )


def _require(component: predictors.OptimalPredictor, method: str) -> Any:
  """A method of a component; raises ValueError if it has none."""
  if not hasattr(component, method):
    raise ValueError(
      f'{component.label} is a component of the mixture, and has no {method}'
    )
  return getattr(component, method)


# KT has a single segment, which all symbols are in.


def _kt_time(state: predictors.KTState) -> int:
  """Symbols seen so far, the same for all sequences."""
  if isinstance(state.counts, jax.core.Tracer):
    raise ValueError(
      'the counts of KT are traced, and the number of run lengths follows from '
      'them'
    )
  return int(np.asarray(state.counts)[0].sum())


def _run_length_posterior(
  component: predictors.OptimalPredictor, state: predictors.State
) -> jax.Array | np.ndarray:
  if isinstance(component, predictors.OptimalCategoricalPredictor):
    time = _kt_time(state)
    return np.eye(1, time + 1, time)
  return _require(component, 'run_length_posterior')(state)


def _unroll_run_lengths(
  component: predictors.OptimalPredictor,
  batch: jax.Array,
  state: predictors.State,
) -> jax.Array | np.ndarray:
  if isinstance(component, predictors.OptimalCategoricalPredictor):
    time = _kt_time(state) if state is not None else 0
    seq_length = batch.shape[1]
    return np.eye(seq_length, time + seq_length + 1, time + 1)
  return _require(component, 'unroll_run_lengths')(batch, state)


def _switch_posterior(
  component: predictors.OptimalPredictor, batch: jax.Array
) -> jax.Array | np.ndarray:
  if isinstance(component, predictors.OptimalCategoricalPredictor):
    return np.zeros(batch.shape[1])
  return _require(component, 'switch_posterior')(batch)
