"""The state of training: its keys, its beginning, and its form on disk.

The key of step n = 1, 2, ... is fold_in(fold_in(key(seed), model_init_seed),
n); step 0 is the initialisation. So a step does not depend on how often the run
logs. On disk, a run with an int as `model_init_seed` has no axis of members
(`saved_form`).

Axes: M members, B batch, T time, K alphabet size.
"""

from collections.abc import Sequence
import pathlib
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nonstationary_mbml import base_config
from nonstationary_mbml import optimizers
from nonstationary_mbml import predictors
from nonstationary_mbml.runtime import run_folder
from nonstationary_mbml.runtime import saved_params
from nonstationary_mbml.runtime import sharding
from nonstationary_mbml.runtime import trained_run


class TrainState(NamedTuple):
  """All that a step changes.

  All arrays but `step` have a leading axis of M members; those of the update of
  a single member have none.

  Attributes:
    step: Steps done so far, int32.
    params: Predictor parameters.
    opt_state: Optimiser state.
    predictor_state: Carried over to the next batch; None if each batch starts
      from the initial state.
  """

  step: jax.Array
  params: predictors.Params
  opt_state: optax.OptState
  predictor_state: predictors.State


_BY_MEMBER = jax.sharding.PartitionSpec(sharding.SEEDS)
# Axes of the arrays of a TrainState that are divided over the devices.
SPEC = TrainState(
  jax.sharding.PartitionSpec(),
  _BY_MEMBER,
  _BY_MEMBER,
  jax.sharding.PartitionSpec(sharding.SEEDS, sharding.BATCH),
)


class StepMetrics(NamedTuple):
  """Metrics of training steps `[M]`, or their sums over several steps.

  Attributes:
    loss: Mean log loss of the batch, nats per symbol.
    grad_norm: Global norm of the gradient, before clipping.
  """

  loss: Any
  grad_norm: Any


class RunState(NamedTuple):
  """All that a run needs to go on: what a checkpoint holds.

  Attributes:
    train: The state.
    sums: Sums over the steps since the last log.
  """

  train: TrainState
  sums: StepMetrics


class AveragedParams(NamedTuple):
  """What a snapshot of a run with `train.ema_decay` holds.

  Attributes:
    params: Predictor parameters.
    average: Their average over the steps.
  """

  params: predictors.Params
  average: predictors.Params


def snapshot(state: TrainState) -> predictors.Params | AveragedParams:
  """Returns what is kept of a state for good: parameters, and any average."""
  average = optimizers.average(state.opt_state)
  return (
    state.params if average is None else AveragedParams(state.params, average)
  )


def sequence_lengths(config: base_config.TrainConfig) -> tuple[int, ...]:
  """Returns the lengths that training steps can have, equally likely."""
  if config.seq_length_fixed:
    return (config.seq_length,)
  return tuple(2**k for k in range(1, config.seq_length.bit_length()))


class StepKeys(NamedTuple):
  """The keys of one step.

  Step 0 is the initialisation: `predictor` is the key of the parameters, and
  `evaluation` that of evaluations after training.

  Attributes:
    data: Key of the batch.
    state: Key of the predictor's initial state.
    predictor: Key of dropout.
    evaluation: Key of the evaluation after the step, if there is one.
  """

  data: jax.Array
  state: jax.Array
  predictor: jax.Array
  evaluation: jax.Array


def step_keys(
  seed: int, model_init_seed: int | jax.Array, step: int | jax.Array
) -> StepKeys:
  """Returns the keys of one step."""
  run = jax.random.fold_in(jax.random.key(seed), model_init_seed)
  return StepKeys(*jax.random.split(jax.random.fold_in(run, step), 4))


def init_state(
  config: base_config.ExperimentConfig,
  predictor: predictors.Predictor,
  alphabet_size: int,
  devices: Sequence[jax.Device],
  params: predictors.Params | None = None,
) -> TrainState:
  """Returns the state before the first step, laid out over the devices.

  Args:
    config: Config of the experiment.
    predictor: Predictor to train.
    alphabet_size: K.
    devices: Devices to train on.
    params: Parameters of all members to begin with; None draws them.
  """
  # Computed on one device: on several, XLA would have to split it first.
  state = jax.jit(
    lambda params: _init(config, predictor, alphabet_size, params)
  )(params)
  mesh = sharding.device_mesh(config.train, devices)
  return TrainState(
    *(
      sharding.place(field, jax.sharding.NamedSharding(mesh, spec))
      for field, spec in zip(state, SPEC, strict=True)
    )
  )


def _init(
  config: base_config.ExperimentConfig,
  predictor: predictors.Predictor,
  alphabet_size: int,
  all_params: predictors.Params | None = None,
) -> TrainState:
  batch_size = config.train.batch_size
  length = min(sequence_lengths(config.train))
  batch = jnp.zeros((batch_size, length, alphabet_size))
  optimizer = make_optimizer(config)

  def init_member(
    seed: jax.Array, params: predictors.Params | None
  ) -> tuple[Any, ...]:
    keys = step_keys(config.seed, seed, 0)
    if params is None:
      params = predictor.init_params(keys.predictor, batch, None)
    predictor_state = None
    if not config.train.reset_predictor_init_state:
      predictor_state = predictor.initial_state(params, keys.state, batch_size)
    return params, optimizer.init(params), predictor_state

  seeds = seed_array(config.train)
  return TrainState(jnp.int32(0), *jax.vmap(init_member)(seeds, all_params))


def make_optimizer(
  config: base_config.ExperimentConfig,
) -> optax.GradientTransformation:
  """Returns the optimiser of a config, which knows the number of steps."""
  return optimizers.make_optimizer(config.train, config.schedule.training_steps)


def seed_array(config: base_config.TrainConfig) -> jax.Array:
  """Returns the seed of every member, uint32 `[M]`."""
  return jnp.asarray(trained_run.member_seeds(config), jnp.uint32)


def zero_sums(state: TrainState) -> StepMetrics:
  """Returns the sums of the metrics of no step."""
  leaf = jax.tree.leaves(state.params)[0]
  return StepMetrics(*(np.zeros(leaf.shape[:1], leaf.dtype) for _ in range(2)))


def abstract_state(
  config: base_config.ExperimentConfig,
  predictor: predictors.Predictor,
  alphabet_size: int,
) -> RunState:
  """Returns the form of the state of a run, to be loaded on one device."""
  state = jax.eval_shape(lambda: _init(config, predictor, alphabet_size))
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return sharding.abstract(RunState(state, zero_sums(state)), device)


def saved_form(config: base_config.TrainConfig, form: RunState) -> RunState:
  """Returns the form of a state on disk: an int seed has no axis of members.

  Args:
    config: Config of the training.
    form: Form of the state in memory, of `jax.ShapeDtypeStruct`.
  """
  if isinstance(config.model_init_seed, tuple):
    return form
  step, *state_fields = form.train
  state_fields, sums = jax.tree.map(
    sharding.without_first_axis, (state_fields, form.sums)
  )
  return RunState(TrainState(step, *state_fields), sums)


def load_params(
  folder: pathlib.Path,
  step: int | None,
  config: base_config.ExperimentConfig,
  predictor: predictors.Predictor,
  alphabet_size: int,
) -> tuple[int, predictors.Params, predictors.Params | None]:
  """Returns the step, parameters and any averages of a run that was saved.

  Args:
    folder: Folder of the run.
    step: Step to load; None is the newest that can be read.
    config: Config of the run.
    predictor: Its network.
    alphabet_size: K.

  Raises:
    ValueError: As `saved_params.load`.
  """
  form = abstract_state(config, predictor, alphabet_size)
  step, saved = saved_params.load(
    folder,
    step,
    saved_form(config.train, form),
    lambda state: snapshot(state.train),
  )
  saved = sharding.reshaping(snapshot(form.train))(saved)
  if isinstance(saved, AveragedParams):
    return step, *saved
  return step, saved, None


def initial_params(
  config: base_config.ExperimentConfig,
  predictor: predictors.Predictor,
  alphabet_size: int,
) -> predictors.Params | None:
  """Returns parameters of all members to begin with; None draws them.

  Args:
    config: Config of the experiment.
    predictor: Predictor to train.
    alphabet_size: K.

  Raises:
    ValueError: If `train.init_from` names no run, step or parameters that fit.
  """
  path = config.train.init_from
  if path is None:
    return None
  folder, at, step = path.rpartition('@')
  if not (at and step.isdecimal()):
    folder, step = path, None
  seeds = trained_run.member_seeds(config.train)
  with base_config.naming('train.init_from'):
    saved = run_folder.read_config(pathlib.Path(folder), type(config))
    num_saved = len(trained_run.member_seeds(saved.train))
    if num_saved not in (1, len(seeds)):
      raise ValueError(
        f'{folder} has {num_saved} networks; one is needed, or one for each of '
        f'the {len(seeds)} seeds of train.model_init_seed'
      )
    _, params, _ = load_params(
      pathlib.Path(folder),
      None if step is None else int(step),
      saved,
      predictor,
      alphabet_size,
    )
  return jax.tree.map(
    lambda x: jnp.broadcast_to(x, (len(seeds), *x.shape[1:])), params
  )
