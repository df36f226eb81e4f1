"""Regret of a predictor, beside that of the exact Bayes predictors.

A batch is shared out over all devices, those of other processes included. Many
sequences are read batch by batch, so that a device holds its share of one batch
at a time, however many there are.

The regret of a prediction q of a symbol drawn from p is KL(p || q) in nats: the
cross entropy against the true parameters minus their entropy. The first symbol
is left out, since networks do not predict it.

Axes: B batch, T time, K alphabet size.
"""

from collections.abc import Callable
from collections.abc import Mapping
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nonstationary_mbml import base_config
from nonstationary_mbml import base_constants
from nonstationary_mbml import predictors
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.models import backend
from nonstationary_mbml.runtime import multihost
from nonstationary_mbml.runtime import progress
from nonstationary_mbml.runtime import sharding
from nonstationary_mbml.runtime import statistics

# Name of the evaluated predictor among the regrets; the others have their own.
NETWORK = 'network'
# The same of a run's averaged parameters.
AVERAGED = 'averaged_network'
# Sequences among which that of a figure is chosen.
_DRAWN_BATCH = 64


def instantaneous_regret(
  predictions: jax.Array, parameters: jax.Array
) -> jax.Array:
  """Returns the regret of predicting symbols 2, ..., T.

    sum_k p_k (log p_k - log q_k),  with 0 log 0 = 0

  Args:
    predictions: Logits `[B, T, K]`; those at t are about symbol t + 1.
    parameters: True probabilities `[B, T, K]` of the symbols.

  Returns:
    `[B, T - 1]`, in nats.
  """
  log_probs = jax.nn.log_softmax(predictions[:, :-1], axis=-1)
  truth = parameters[:, 1:]
  # No comparison is true for a NaN, so that it stays NaN.
  is_zero = truth == 0
  log_ratios = jnp.log(jnp.where(is_zero, 1, truth)) - jnp.where(
    is_zero, 0, log_probs
  )
  return (truth * log_ratios).sum(axis=-1)


class MetaLearningEvaluator:
  """Evaluates a predictor and exact Bayes predictors on the same sequences.

  If there are several processes, all call `step`, `evaluate` and
  `regrets_over_time`, with the same arguments.
  """

  def __init__(
    self,
    predictor: predictors.Predictor,
    generator: base_constants.DataGenerator,
    optimal_predictors: Mapping[str, predictors.Predictor],
    batch_size: int,
    seq_length: int,
    chunk_length: int | None = None,
  ):
    """Initializes the evaluator.

    Args:
      predictor: Predictor to evaluate.
      generator: Source of the sequences.
      optimal_predictors: Exact predictors to compare with, by name.
      batch_size: B.
      seq_length: T.
      chunk_length: Symbols that `predictor` reads at a time; see
        `predictors.unroll_in_chunks`.

    Raises:
      ValueError: If a size is too small, the source is not categorical, or a
        source or exact predictor cannot be that long.
    """
    batch_size = base_config.check_int('batch_size', batch_size, 1)
    seq_length = base_config.check_int('seq_length', seq_length, 2)
    if chunk_length is not None:
      chunk_length = base_config.check_int('chunk_length', chunk_length, 1)
    for name in (NETWORK, AVERAGED):
      if name in optimal_predictors:
        raise ValueError(f'optimal_predictors has the reserved name {name!r}')
    self.alphabet_size = generator.alphabet_size
    self.predictor = predictor
    self.optimal_predictors = dict(optimal_predictors)
    self.generator = generator
    self.batch_size = batch_size
    self.seq_length = seq_length
    self.chunk_length = chunk_length
    # Traced but not compiled, so that wrong lengths are found out here.
    batch, _ = jax.eval_shape(
      lambda: generator.sample(jax.random.key(0), batch_size, seq_length)
    )
    for optimal in self.optimal_predictors.values():
      jax.eval_shape(lambda batch, p=optimal: p.unroll({}, None, batch), batch)
    # Compiled once, for `step` and `evaluate` alike.
    self._mesh = sharding.make(jax.devices())
    self._regrets = self._shard_over_devices(self._sequence_regrets)
    self._regrets_over_time = self._shard_over_devices(self._symbol_regrets)
    self._metrics = jax.jit(self.metrics)

  def step(
    self,
    predictor_params: predictors.Params,
    predictor_state: predictors.State,
    rng: jax.Array,
  ) -> dict[str, jax.Array]:
    """Returns metrics over one batch of fresh sequences, in nats.

    Args:
      predictor_params: Parameters of the predictor.
      predictor_state: State to start from; None is its initial state.
      rng: Key of the batch.

    Returns:
      `mean_regret` (per symbol) and `cumulative_regret` (per sequence); for
      every exact predictor `optimal_cumulative_regret/<name>` and
      `cumulative_regret_above_optimal/<name>`. For each of these but the first
      its standard error over sequences, with `_stderr` before the slash.
    """
    params, state = self._place((predictor_params, predictor_state))
    return self._metrics(self._regrets(params, state, rng))

  def predict(
    self,
    predictor_params: predictors.Params,
    batch: jax.Array,
    predictor_state: predictors.State = None,
  ) -> dict[str, jax.Array]:
    """Returns the predictions of all predictors on a batch.

    Args:
      predictor_params: Parameters of the predictor.
      batch: Symbols `[B, T, K]`.
      predictor_state: State to start from; None is its initial state.

    Returns:
      Predictions `[B, T, K]` by name, the predictor's own under `NETWORK`.
    """
    own, _ = predictors.unroll_in_chunks(
      self.predictor,
      predictor_params,
      None,
      batch,
      predictor_state,
      self.chunk_length,
    )
    predictions = {NETWORK: own}
    for name, optimal in self.optimal_predictors.items():
      predictions[name], _ = optimal.unroll({}, None, batch, None)
    return predictions

  def evaluate(
    self,
    predictor_params: predictors.Params,
    rng: jax.Array,
    num_sequences: int,
    use_tqdm: bool = False,
  ) -> dict[str, np.ndarray]:
    """Returns cumulative regrets on many fresh sequences, batch by batch.

    Args:
      predictor_params: Parameters of the predictor.
      rng: Key of all batches.
      num_sequences: N.
      use_tqdm: Show a progress bar.

    Returns:
      Cumulative regret of every sequence `[N]` by name, the predictor's own
      under `NETWORK`; `metrics` sums them up.
    """
    return self._collect(
      self._regrets, predictor_params, rng, num_sequences, use_tqdm
    )

  def regrets_over_time(
    self,
    predictor_params: predictors.Params,
    rng: jax.Array,
    num_sequences: int,
    use_tqdm: bool = False,
  ) -> dict[str, np.ndarray]:
    """Returns the regret of every symbol of many fresh sequences.

    They are the sequences that `evaluate` sums up for the same key.

    Args:
      predictor_params: Parameters of the predictor.
      rng: Key of all batches.
      num_sequences: N.
      use_tqdm: Show a progress bar.

    Returns:
      Regret of symbols 2, ..., T of every sequence `[N, T - 1]` by name, the
      predictor's own under `NETWORK`.
    """
    return self._collect(
      self._regrets_over_time, predictor_params, rng, num_sequences, use_tqdm
    )

  def batch_keys(self, rng: jax.Array, num_sequences: int) -> jax.Array:
    """Returns the key of every batch of `evaluate`."""
    return jax.random.split(rng, -(-num_sequences // self.batch_size))

  def metrics(
    self, regrets: Mapping[str, jax.Array | np.ndarray]
  ) -> dict[str, jax.Array]:
    """Returns means and standard errors of regrets, as `step` names them.

    Args:
      regrets: Cumulative regret of every sequence `[N]`, by name.
    """
    own = regrets[NETWORK]
    metrics = {'mean_regret': own.mean() / (self.seq_length - 1)}
    metrics |= _named('cumulative_regret', '', own)
    for name in self.optimal_predictors:
      metrics |= _named('optimal_cumulative_regret', f'/{name}', regrets[name])
      # Paired: both read the same sequences.
      metrics |= _named(
        'cumulative_regret_above_optimal', f'/{name}', own - regrets[name]
      )
    return metrics

  def _collect(
    self,
    batch_regrets: Callable[..., dict[str, jax.Array]],
    predictor_params: predictors.Params,
    rng: jax.Array,
    num_sequences: int,
    use_tqdm: bool,
  ) -> dict[str, np.ndarray]:
    """Regrets of the first N sequences `[N, ...]`, batch by batch."""
    num_sequences = base_config.check_int('num_sequences', num_sequences, 1)
    keys = self.batch_keys(rng, num_sequences)
    params = self._place(predictor_params)
    batches = []
    with progress.bar(
      total=len(keys),
      desc='evaluation',
      unit='batch',
      enabled=use_tqdm and multihost.is_primary(),
    ) as bar:
      for key in keys:
        # One at a time: collectives of two can deadlock a CPU.
        batches.append(jax.device_get(batch_regrets(params, None, key)))
        bar.update(1)
    return {
      name: np.concatenate([batch[name] for batch in batches])[:num_sequences]
      for name in batches[0]
    }

  def _place(self, tree: Any) -> Any:
    """Arrays on all devices."""
    return sharding.place(tree, sharding.replicated(self._mesh))

  def _shard_over_devices(
    self, regrets_of: Callable[..., dict[str, jax.Array]]
  ) -> Callable[..., dict[str, jax.Array]]:
    """Compiles a function of a device's share of a batch, for all devices.

    Args:
      regrets_of: (params, state, keys of the sequences) -> regrets by name.

    Returns:
      (params, state, key of the batch) -> regrets by name, on every device.
    """
    size, mesh = self.batch_size, self._mesh
    replicated = jax.sharding.PartitionSpec()
    split = jax.sharding.PartitionSpec(mesh.axis_names)
    # Some sequences are repeated if devices would have unequal numbers.
    indices = np.arange(size + -size % mesh.size) % size

    def regrets_of_batch(
      params: predictors.Params, state: predictors.State, rng: jax.Array
    ) -> dict[str, jax.Array]:
      # Exact predictors know the time, which all sequences have in common.
      specs = jax.tree.map(
        lambda array: split if jnp.ndim(array) else replicated, state
      )
      state = jax.tree.map(
        lambda array: array[indices] if jnp.ndim(array) else array, state
      )
      regrets = jax.shard_map(
        regrets_of,
        mesh=mesh,
        in_specs=(replicated, specs, split),
        out_specs=split,
        check_vma=False,  # Nothing is reduced over devices.
      )(params, state, jax.random.split(rng, size)[indices])
      return jax.tree.map(lambda array: array[:size], regrets)

    return jax.jit(regrets_of_batch, out_shardings=sharding.replicated(mesh))

  def _sequence_regrets(
    self,
    predictor_params: predictors.Params,
    predictor_state: predictors.State,
    keys: jax.Array,
  ) -> dict[str, jax.Array]:
    """Cumulative regret of every sequence `[B]`, by name."""
    regrets = self._symbol_regrets(predictor_params, predictor_state, keys)
    return {name: regret.sum(axis=-1) for name, regret in regrets.items()}

  def _symbol_regrets(
    self,
    predictor_params: predictors.Params,
    predictor_state: predictors.State,
    keys: jax.Array,
  ) -> dict[str, jax.Array]:
    """Regret of every symbol but the first `[B, T - 1]`, by name."""
    batch, parameters = self.generator.sample_from_keys(keys, self.seq_length)
    predictions = self.predict(predictor_params, batch, predictor_state)
    return {
      name: instantaneous_regret(logits, parameters)
      for name, logits in predictions.items()
    }


class DrawnSequence(NamedTuple):
  """A sequence, with the predictions of all predictors.

  Attributes:
    symbols: `[T, K]`.
    parameters: True probabilities `[T, K]`.
    switches: bool `[T]`, True where a new segment starts.
    probabilities: Predictions of symbols 2, ..., T, `[T - 1, K]`, by predictor.
    regrets: Regrets of these predictions in nats, `[T - 1]`, by predictor.
  """

  symbols: np.ndarray
  parameters: np.ndarray
  switches: np.ndarray
  probabilities: dict[str, np.ndarray]
  regrets: dict[str, np.ndarray]


def draw_sequence(
  evaluator: MetaLearningEvaluator, params: predictors.Params, rng: jax.Array
) -> DrawnSequence:
  """Returns a sequence for a figure.

  It is the first sequence of a small batch with two switching points or more,
  or else the first one.

  Args:
    evaluator: Evaluator with the source and the predictors.
    params: Parameters of its predictor.
    rng: Key of the batch.
  """
  size = (_DRAWN_BATCH, evaluator.seq_length)

  # It runs once: quick code would take longer to compile than it saves.
  options = {'xla_backend_optimization_level': 0} if backend.is_cpu() else None

  @functools.partial(jax.jit, compiler_options=options)
  def draw(params: predictors.Params, rng: jax.Array) -> DrawnSequence:
    batch, parameters = evaluator.generator.sample(rng, *size)
    switches = evaluator.generator.switch_points(rng, *size)
    chosen = jnp.argmax(jnp.sum(switches, axis=1) >= 2)
    batch, parameters = batch[chosen, None], parameters[chosen, None]
    predictions = evaluator.predict(params, batch)
    return DrawnSequence(
      batch[0],
      parameters[0],
      switches[chosen],
      {
        name: jax.nn.softmax(logits[0, :-1])
        for name, logits in predictions.items()
      },
      {
        name: instantaneous_regret(logits, parameters)[0]
        for name, logits in predictions.items()
      },
    )

  return jax.device_get(draw(params, rng))


def build_evaluator(
  predictor: predictors.Predictor, config: config_lib.EvalConfig
) -> MetaLearningEvaluator:
  """Returns the evaluator that a config describes.

  Args:
    predictor: Predictor to evaluate.
    config: Config of the evaluation, with data and length, as
      `ExperimentConfig.resolved` fills them in.

  Raises:
    ValueError: If the config is not complete or not valid.
  """
  config.validate()
  for field in ('data', 'seq_length'):
    if getattr(config, field) is None:
      raise ValueError(
        f'eval.{field} is None; config.resolved() fills it from training'
      )
  generator = constants.build_data_generator(config.data)
  return MetaLearningEvaluator(
    predictor,
    generator,
    constants.build_optimal_predictors(config, generator),
    config.batch_size,
    config.seq_length,
    config.chunk_length,
  )


def _named(
  name: str, suffix: str, values: jax.Array | np.ndarray
) -> dict[str, jax.Array]:
  """Mean and standard error as metrics."""
  mean, stderr = statistics.mean_and_stderr(values)
  return {f'{name}{suffix}': mean, f'{name}_stderr{suffix}': stderr}
