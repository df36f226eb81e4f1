"""Training on log loss: TrainState, one update, and the loop.

The key of step n = 1, 2, ... is fold_in(fold_in(key(seed), model_init_seed),
n); step 0 is the initialisation. So a step does not depend on how often the run
logs. All steps between two logs are one compiled call: data generation, loss,
gradient and update never visit the host. With several devices, of one process
or of many (`multihost`), the whole call runs inside one `jax.shard_map`: each
draws and predicts its share of the batch, and gradients meet in a mean.

With several seeds as `model_init_seed` an ensemble is trained: one member for
each, as it would be trained alone (but for dropout masks, which differ with the
number of devices that share a batch). The devices are a grid (`sharding`): each
row trains some of the members, and the devices of a row share their batches.
Where there are as many rows as devices, nothing has to meet. The members of a
device are under one `vmap`; on a CPU they run one after another.

With a folder, a run can be killed at any time and goes on by itself when it is
started again: what a step does depends on the state and the config alone, so
that it ends with the same bits.

Axes: M members of an ensemble, B batch, T time, K alphabet size.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import dataclasses
import math
import pathlib
import signal
import sys
import time
from typing import Any
from typing import NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax

from nonstationary_mbml import base_config
from nonstationary_mbml import base_constants
from nonstationary_mbml import predictor_factories
from nonstationary_mbml import predictors
from nonstationary_mbml.models import backend
from nonstationary_mbml.runtime import checkpointing
from nonstationary_mbml.runtime import multihost
from nonstationary_mbml.runtime import preemption as interrupting
from nonstationary_mbml.runtime import progress
from nonstationary_mbml.runtime import run_folder
from nonstationary_mbml.runtime import sharding

_REPLICATED = jax.sharding.PartitionSpec()
# For a network that reads whole sequences, on a CPU: at T = 256, twice and half
# as many symbols were no quicker.
_SYMBOLS_PER_MICROBATCH = 2048
# Target for the longest call: a signal waits until a call has ended.
_MAX_CALL_SECONDS = 1.0


class TrainState(NamedTuple):
  """All that a step changes.

  In an ensemble the arrays of all but `step` have a leading axis of M members.

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


@dataclasses.dataclass(frozen=True)
class TrainResult:
  """Result of a training run.

  Attributes:
    predictor: The predictor that was trained.
    params: Its trained parameters; those of an ensemble have a leading axis of
      M members.
    history: One dict per log: `step`; `loss` (nats per symbol) and `grad_norm`
      (before clipping), means since the last log; `param_norm`; and the
      evaluator's metrics. For an ensemble, means over its members, and under
      `seeds_stderr/<name>` their standard errors.
    evaluator: The evaluator that was used.
    member_histories: Histories of the members of an ensemble, as they would be
      alone, dropout masks aside; () without an ensemble.
  """

  predictor: predictors.Predictor
  params: predictors.Params
  history: list[dict[str, float]]
  evaluator: base_constants.Evaluator
  member_histories: tuple[list[dict[str, float]], ...] = ()


class StepSums(NamedTuple):
  """Metrics of training steps, summed over the steps; `[M]` for an ensemble.

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
  sums: StepSums


class NonFiniteError(ArithmeticError):
  """A loss, gradient or parameter that is infinite or not a number."""


class StoppedError(Exception):
  """Training was asked to stop, and saved its state first."""


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


def log_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Returns the summed code length of the targets, in nats.

    -sum log softmax(logits)[target]

  Args:
    logits: `[B, T, K]`.
    targets: One-hot `[B, T, K]`; a row of zeros counts nothing.
  """
  log_probs = jax.nn.log_softmax(logits, axis=-1)
  # A symbol that did not come may have probability 0.
  return -jnp.sum(targets * jnp.where(targets == 0, 0, log_probs))


def loss_and_grads(
  predictor: predictors.Predictor,
  params: predictors.Params,
  rng: jax.Array | None,
  batch: jax.Array,
  init_state: predictors.State,
  chunk_length: int | None = None,
  microbatch_size: int | None = None,
) -> tuple[jax.Array, predictors.Params, predictors.State]:
  """Returns the mean log loss of a batch, its gradient and the final state.

  Symbols 2, ..., T of each sequence are predicted, and every one of them counts
  the same. With chunks, the state is carried from each to the next and the
  gradient is cut between them; memory does not grow with their number.
  Microbatches come one after another, and the gradient is their mean.

  Args:
    predictor: The predictor.
    params: Its parameters.
    rng: Key of dropout, or None.
    batch: One-hot symbols `[B, T, K]`, T >= 2.
    init_state: State before the first symbol.
    chunk_length: Symbols per chunk; None is the whole sequence.
    microbatch_size: Sequences per microbatch, a divisor of B; None is B.

  Raises:
    ValueError: If T < 2, or the microbatches do not divide the batch.
  """
  batch_size, seq_length, _ = batch.shape
  base_config.check_int('seq_length', seq_length, 2)
  if microbatch_size is None:
    microbatch_size = batch_size
  base_config.check_int('microbatch_size', microbatch_size, 1)
  if microbatch_size == batch_size:
    return _microbatch_loss_and_grads(
      predictor, params, rng, batch, init_state, chunk_length
    )
  num_microbatches, rest = divmod(batch_size, microbatch_size)
  if rest:
    raise ValueError(
      f'microbatch_size {microbatch_size} does not divide a batch of '
      f'{batch_size}'
    )

  def add_microbatch(sums, inputs):
    index, batch, init_state = inputs
    microbatch_rng = None if rng is None else jax.random.fold_in(rng, index)
    *new, state = _microbatch_loss_and_grads(
      predictor, params, microbatch_rng, batch, init_state, chunk_length
    )
    return jax.tree.map(jnp.add, sums, tuple(new)), state

  split = lambda x: x.reshape(num_microbatches, microbatch_size, *x.shape[1:])
  zeros = jnp.zeros((), batch.dtype), jax.tree.map(jnp.zeros_like, params)
  sums, states = jax.lax.scan(
    add_microbatch,
    zeros,
    (jnp.arange(num_microbatches), *jax.tree.map(split, (batch, init_state))),
  )
  loss, grads = jax.tree.map(lambda x: x / num_microbatches, sums)
  merge = lambda x: x.reshape(batch_size, *x.shape[2:])
  return loss, grads, jax.tree.map(merge, states)


def _microbatch_loss_and_grads(
  predictor: predictors.Predictor,
  params: predictors.Params,
  rng: jax.Array | None,
  batch: jax.Array,
  init_state: predictors.State,
  chunk_length: int | None,
) -> tuple[jax.Array, predictors.Params, predictors.State]:
  """`loss_and_grads` of a single microbatch."""
  batch_size, seq_length, _ = batch.shape
  num_targets = batch_size * (seq_length - 1)
  # The last prediction has no target.
  targets = jnp.pad(batch[:, 1:], ((0, 0), (0, 1), (0, 0)))
  if chunk_length is None:
    chunk_length = seq_length
  chunk_length = min(
    base_config.check_int('chunk_length', chunk_length, 1), seq_length
  )

  def chunk_loss(params, chunk_rng, state, inputs, targets):
    logits, state = predictor.unroll(params, chunk_rng, inputs, state)
    return log_loss(logits, targets) / num_targets, state

  def add_chunk(carry, begin, length):
    state, loss, grads = carry
    chunk_rng = None if rng is None else jax.random.fold_in(rng, begin)
    inputs, outputs = (
      jax.lax.dynamic_slice_in_dim(array, begin, length, axis=1)
      for array in (batch, targets)
    )
    (chunk, state), chunk_grads = jax.value_and_grad(chunk_loss, has_aux=True)(
      params, chunk_rng, state, inputs, outputs
    )
    return state, loss + chunk, jax.tree.map(jnp.add, grads, chunk_grads)

  carry = (
    init_state,
    jnp.zeros((), batch.dtype),
    jax.tree.map(jnp.zeros_like, params),
  )
  num_chunks, rest = divmod(seq_length, chunk_length)
  if num_chunks == 1:
    carry = add_chunk(carry, 0, chunk_length)
  else:
    carry, _ = jax.lax.scan(
      lambda carry, begin: (add_chunk(carry, begin, chunk_length), None),
      carry,
      jnp.arange(num_chunks) * chunk_length,
    )
  if rest:
    carry = add_chunk(carry, seq_length - rest, rest)
  state, loss, grads = carry
  return loss, grads, state


def microbatch_size(
  config: base_config.TrainConfig,
  predictor: predictors.Predictor,
  share: int,
  seq_length: int,
) -> int:
  """Returns the number of sequences in a microbatch.

  Args:
    config: Config of the training.
    predictor: Predictor to train.
    share: Number of sequences of a step on one device.
    seq_length: T.

  Returns:
    A divisor of the share.
  """
  if config.microbatch_size is not None:
    return config.microbatch_size
  if predictor.has_state or not backend.is_cpu():
    return share
  # The activations of so many symbols stay in the cache. Recurrent networks
  # have large products only with large batches.
  length = min(seq_length, config.gradient_chunk_length or seq_length)
  limit = max(1, _SYMBOLS_PER_MICROBATCH // length)
  return max(
    size for size in range(1, share + 1) if share % size == 0 and size <= limit
  )


def make_optimizer(
  config: base_config.TrainConfig,
) -> optax.GradientTransformation:
  """Returns Adam, after clipping by the global norm where configured."""
  adam = optax.adam(config.learning_rate)
  if config.clip_grad_norm is None:
    return adam
  return optax.chain(optax.clip_by_global_norm(config.clip_grad_norm), adam)


def make_update(
  config: base_config.ExperimentConfig,
  generator: base_constants.DataGenerator,
  predictor: predictors.Predictor,
  num_devices: int = 1,
) -> Callable[[TrainState, int | jax.Array], tuple[TrainState, StepSums]]:
  """Returns the function that does one step of one member.

  Args:
    config: Config of the experiment.
    generator: Source of the batches.
    predictor: Predictor to train.
    num_devices: Number of devices. Above 1, the function is for the inside of a
      `shard_map` over them, in the mesh of `device_mesh`. Where they share a
      batch, it takes and returns a device's share of the predictor state.

  Returns:
    (state, the member's `model_init_seed`) -> (state, what the step reports).
  """
  train_config = config.train
  optimizer = make_optimizer(train_config)
  lengths = sequence_lengths(train_config)
  num_shares = num_devices // num_seed_shards(train_config, num_devices)
  share = train_config.batch_size // num_shares

  def update(
    state: TrainState, model_init_seed: int | jax.Array
  ) -> tuple[TrainState, StepSums]:
    step = state.step + 1
    keys = step_keys(config.seed, model_init_seed, step)
    data_keys = jax.random.split(keys.data, train_config.batch_size)
    if num_shares > 1:
      device = jax.lax.axis_index(sharding.BATCH)
      data_keys = jax.lax.dynamic_slice_in_dim(data_keys, device * share, share)
      keys = keys._replace(
        state=jax.random.fold_in(keys.state, device),
        predictor=jax.random.fold_in(keys.predictor, device),
      )
    init_state = state.predictor_state
    if train_config.reset_predictor_init_state:
      init_state = predictor.initial_state(state.params, keys.state, share)

    def at_length(seq_length: int) -> Callable[[], Any]:
      def run():
        batch, _ = generator.sample_from_keys(data_keys, seq_length)
        return loss_and_grads(
          predictor,
          state.params,
          keys.predictor,
          batch,
          init_state,
          train_config.gradient_chunk_length,
          microbatch_size(train_config, predictor, share, seq_length),
        )

      return run

    index = _length_index(config.seed, step, len(lengths))
    loss, grads, predictor_state = jax.lax.switch(
      index, [at_length(seq_length) for seq_length in lengths]
    )
    if num_shares > 1:
      # As one vector: the devices meet once, not once for every array.
      flat, unravel = jax.flatten_util.ravel_pytree((loss, grads))
      loss, grads = unravel(jax.lax.pmean(flat, sharding.BATCH))
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    if train_config.reset_predictor_init_state:
      predictor_state = None
    params = optax.apply_updates(state.params, updates)
    state = TrainState(step, params, opt_state, predictor_state)
    return state, StepSums(loss, optax.tree.norm(grads))

  return update


def make_run_steps(
  config: base_config.ExperimentConfig,
  update: Callable[[TrainState, int | jax.Array], tuple[TrainState, StepSums]],
  devices: Sequence[jax.Device],
) -> Callable[
  [TrainState, StepSums, int], tuple[TrainState, StepSums, jax.Array]
]:
  """Returns the compiled loop over steps.

    (state, sums, number of steps) -> (state, sums, number of steps done)

  A step whose loss or gradient is not finite is the last one in the sums, and
  is not counted; the state after it is of no use. In an ensemble this holds of
  each member by itself; sums and counts are `[M]`.

  It is compiled once, for any number of steps, and many steps in one call are
  bit for bit as many calls. The state is donated: it cannot be used after the
  call. On several devices, wait for a call to end before the next one:
  collectives of two calls in flight can deadlock the CPU backend.

  Args:
    config: Config of the experiment.
    update: Step function from `make_update`, for as many devices.
    devices: Devices to run on.
  """
  num_rows = num_seed_shards(config.train, len(devices))

  def run_steps(
    state: TrainState, sums: StepSums, num_steps: jax.Array
  ) -> tuple[TrainState, StepSums, jax.Array]:
    def run_member(member: tuple[Any, ...]) -> tuple[Any, ...]:
      seed, sums, *parts = member

      # The number of steps is the same for all members: under `vmap`, a loop
      # that ends by each member's own losses would make all of its carry a
      # member's own, `step` as well, and compute every length at every step.
      def goes_on(carry):
        index, *_ = carry
        return index < num_steps

      def add_step(carry):
        index, num_done, is_finite, state, sums = carry
        state, new = update(state, seed)
        sums = jax.tree.map(
          lambda total, x: jnp.where(is_finite, total + x, total), sums, new
        )
        is_finite &= jnp.isfinite(new.loss) & jnp.isfinite(new.grad_norm)
        return index + 1, num_done + is_finite, is_finite, state, sums

      zero = jnp.int32(0)
      init = zero, zero, jnp.bool(True), TrainState(state.step, *parts), sums
      _, num_done, _, last, sums = jax.lax.while_loop(goes_on, add_step, init)
      return num_done, sums, *last[1:]

    seeds = config.train.model_init_seed
    if _is_ensemble(config.train):
      seeds = jnp.asarray(seeds, jnp.uint32)
      if num_rows > 1:
        row = jax.lax.axis_index(sharding.SEEDS)
        seeds = seeds.reshape(num_rows, -1)[row]
      done = _map_members(run_member, (seeds, sums, *state[1:]))
    else:
      done = run_member((seeds, sums, *state[1:]))
    num_done, sums, *parts = done
    if num_rows > 1:
      # Every process reads those of all members.
      num_done, sums = jax.lax.all_gather(
        (num_done, sums), sharding.SEEDS, tiled=True
      )
    return TrainState(state.step + num_steps, *parts), sums, num_done

  if len(devices) > 1:
    spec = _state_spec(config.train)
    sums_spec = spec.params
    run_steps = jax.shard_map(
      run_steps,
      mesh=device_mesh(config.train, devices),
      in_specs=(spec, sums_spec, _REPLICATED),
      out_specs=(spec, _REPLICATED, _REPLICATED),
      # check_vma=False: outputs are replicated by construction (pmean,
      # all_gather).
      check_vma=False,
    )
  return jax.jit(run_steps, donate_argnums=0)


def _map_members(function: Callable[[Any], Any], members: Any) -> Any:
  """Maps over the leading axis of all arrays."""
  # One member's activations stay in the cache of a CPU; those of all do not,
  # and a batched product of small matrices is no quicker than one by one.
  if backend.is_cpu():
    return jax.lax.map(function, members)
  return jax.vmap(function)(members)


def init_state(
  config: base_config.ExperimentConfig,
  predictor: predictors.Predictor,
  alphabet_size: int,
  devices: Sequence[jax.Device],
) -> TrainState:
  """Returns the state before the first step, laid out over the devices."""
  # Computed on one device: on several, XLA would have to split it first.
  state = jax.jit(lambda: _init(config, predictor, alphabet_size))()
  if len(devices) == 1:
    return state
  mesh = device_mesh(config.train, devices)
  return TrainState(
    *(
      sharding.place(part, jax.sharding.NamedSharding(mesh, spec))
      for part, spec in zip(state, _state_spec(config.train), strict=True)
    )
  )


def _init(
  config: base_config.ExperimentConfig,
  predictor: predictors.Predictor,
  alphabet_size: int,
) -> TrainState:
  train_config = config.train
  shape = (train_config.batch_size, min(sequence_lengths(train_config)))
  batch = jnp.zeros((*shape, alphabet_size))

  def init_member(seed: int | jax.Array) -> tuple[Any, ...]:
    keys = step_keys(config.seed, seed, 0)
    params = predictor.init_params(keys.predictor, batch, None)
    predictor_state = None
    if not train_config.reset_predictor_init_state:
      predictor_state = predictor.initial_state(params, keys.state, shape[0])
    opt_state = make_optimizer(train_config).init(params)
    return params, opt_state, predictor_state

  seeds = train_config.model_init_seed
  if _is_ensemble(train_config):
    parts = jax.vmap(init_member)(jnp.asarray(seeds, jnp.uint32))
  else:
    parts = init_member(seeds)
  return TrainState(jnp.int32(0), *parts)


def abstract_state(
  config: base_config.ExperimentConfig,
  predictor: predictors.Predictor,
  alphabet_size: int,
) -> RunState:
  """Returns the form of what a checkpoint holds, to be loaded on one device."""
  state = jax.eval_shape(lambda: _init(config, predictor, alphabet_size))
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
    RunState(state, zero_sums(config.train, state)),
  )


class Parts(NamedTuple):
  """The objects that a config describes, built and checked.

  Attributes:
    generator: The source.
    predictor: The network.
    evaluator: Evaluator of the network.
    devices: Devices to train on: those of all processes.
  """

  generator: base_constants.DataGenerator
  predictor: predictors.Predictor
  evaluator: base_constants.Evaluator
  devices: list[jax.Device]


def build_parts(
  config: base_config.ExperimentConfig,
  build_data_generator: base_constants.DataGeneratorBuilder,
  build_evaluator: base_constants.EvaluatorBuilder,
) -> Parts:
  """Returns what training needs; compiles nothing.

  Args:
    config: Config of the experiment; also has a `data` field.
    build_data_generator: Builder of the source, as in `train`.
    build_evaluator: Builder of the evaluator, as in `train`.

  Raises:
    ValueError: If the config is not valid.
  """
  config.validate()
  config = config.resolved()
  devices = jax.devices()
  train_config = config.train
  num_rows = num_seed_shards(train_config, len(devices))
  num_shares, rest = divmod(len(devices), num_rows)
  if rest:
    raise ValueError(
      f'train.num_seed_shards {num_rows} does not divide the {len(devices)} '
      'devices'
    )
  if train_config.batch_size % num_shares:
    raise ValueError(
      f'train.batch_size {train_config.batch_size} does not divide over the '
      f'{num_shares} devices that share it'
    )
  share = train_config.batch_size // num_shares
  if share % (train_config.microbatch_size or share):
    raise ValueError(
      f'train.microbatch_size {train_config.microbatch_size} does not divide '
      f'the {share} sequences of a device'
    )
  generator = build_data_generator(config.data)
  for seq_length in sequence_lengths(train_config):
    # Traced but not compiled, to find out whether the source can be that long.
    jax.eval_shape(
      lambda length=seq_length: generator.sample(jax.random.key(0), 1, length)
    )
  predictor = predictor_factories.build_predictor(
    config.model, generator.alphabet_size
  )
  if not train_config.reset_predictor_init_state and not predictor.has_state:
    raise ValueError(
      'train.reset_predictor_init_state is False, but model.model_type '
      f'{config.model.model_type!r} has no state to carry over'
    )
  with predictor_factories.naming_arguments():
    jax.eval_shape(lambda: _init(config, predictor, generator.alphabet_size))
  evaluator = build_evaluator(predictor, config.eval)
  if evaluator.alphabet_size != generator.alphabet_size:
    raise ValueError(
      f'eval.data has an alphabet of {evaluator.alphabet_size} symbols, but '
      f'data, to train on, of {generator.alphabet_size}'
    )
  return Parts(generator, predictor, evaluator, devices)


def train(
  config: base_config.ExperimentConfig,
  build_data_generator: base_constants.DataGeneratorBuilder,
  build_evaluator: base_constants.EvaluatorBuilder,
  use_tqdm: bool = False,
  folder: str | pathlib.Path | None = None,
) -> TrainResult:
  """Trains a predictor as configured, on all devices of all processes.

  If there are several processes, all call it, with the same arguments.

  Args:
    config: Config of the experiment; also has a `data` field.
    build_data_generator: Function that makes the source from `config.data`.
    build_evaluator: Function that makes the evaluator, run at every log, from
      the predictor and `config.eval`.
    use_tqdm: Show step, loss and regret: a progress bar on a terminal, else a
      line for every log.
    folder: Folder of the run; `run_folder` says what is kept there. If it holds
      a checkpoint of the same config, training goes on from it. None keeps
      nothing.

  Returns:
    The trained parameters and the log history.

  Raises:
    ValueError: If the config is not valid, before anything is compiled; or if
      the folder holds a run of another config, or one that cannot go on.
    NonFiniteError: If a loss or gradient is not finite.
    StoppedError: If a SIGTERM or Ctrl-C came, after the state was saved;
      only with a folder.
    run_folder.SaveError: If the folder cannot be written to.
  """
  parts = build_parts(config, build_data_generator, build_evaluator)
  multihost.check_same('the config', base_config.to_dict(config))
  run = None if folder is None else run_folder.RunFolder(folder)
  with contextlib.ExitStack() as stack:
    interrupts = stack.enter_context(interrupting.catch(run is not None))
    if run is not None:
      stack.enter_context(run.open(config))
    return _Training(config, parts, run, interrupts, use_tqdm).run()


class _Training:
  """One run of the loop: steps, and what is logged and saved between them."""

  def __init__(
    self,
    config: base_config.ExperimentConfig,
    parts: Parts,
    run: run_folder.RunFolder | None,
    interrupts: interrupting.Interrupts,
    use_tqdm: bool,
  ):
    self._config = config
    self._parts = parts
    self._run = run
    self._interrupts = interrupts
    self._use_tqdm = use_tqdm and multihost.is_primary()
    self._seeds = member_seeds(config.train)
    schedule = config.schedule
    self._log_steps = _multiples(
      config.logger.log_frequency, schedule.training_steps
    )
    self._checkpoint_steps = self._snapshot_steps = ()
    if run is not None:
      # A kill loses two intervals: the one that goes on, and the one whose
      # checkpoint is on its way to the disk.
      self._checkpoint_steps = _multiples(
        max(1, schedule.ckpt_frequency // 2), schedule.training_steps
      )
      self._snapshot_steps = checkpointing.snapshot_steps(schedule)
    self._param_norms = _make_param_norms(config.train, parts.devices)
    # Histories of every member; the only one if there is no ensemble.
    self._histories = [[] for _ in self._seeds]
    self._history = []

  def run(self) -> TrainResult:
    """Trains from where the folder stands to the last step."""
    config, devices = self._config, self._parts.devices
    _, predictor, evaluator, _ = self._parts
    step, state, sums = self._start()
    run_steps = make_run_steps(
      config,
      make_update(config, self._parts.generator, predictor, len(devices)),
      devices,
    )
    stops = sorted(
      {*self._log_steps, *self._checkpoint_steps, *self._snapshot_steps}
    )
    total = config.schedule.training_steps
    max_steps = 1
    with progress.bar(total, 'training', 'step', self._use_tqdm, step) as bar:
      for stop in stops:
        while step < stop:
          num_steps = min(max_steps, stop - step)
          began = time.monotonic()
          state, sums, num_done = run_steps(state, sums, num_steps)
          sums, num_done = jax.device_get((sums, num_done))
          self._check_steps(step, num_steps, num_done, sums)
          seconds = time.monotonic() - began
          step += num_steps
          bar.update(num_steps)
          if step == stop:
            sums = self._stop(step, state, sums, bar)
          seconds, received = self._agree(seconds)
          max_steps = _next_max_steps(max_steps, num_steps, seconds)
          self._check_interrupts(received, step, state, sums)
    if self._run is not None:
      self._run.finish(step, 'finished')
      _, received = self._agree(0.0)
      self._check_interrupts(received, step, state, sums)
    is_ensemble = _is_ensemble(config.train)
    return TrainResult(
      predictor,
      sharding.collect(state.params),
      self._history,
      evaluator,
      tuple(self._histories) if is_ensemble else (),
    )

  def _start(self) -> tuple[int, TrainState, StepSums]:
    """The state before the first step, or that of the newest checkpoint."""
    config, parts = self._config, self._parts
    state = init_state(
      config, parts.predictor, parts.generator.alphabet_size, parts.devices
    )
    sums = zero_sums(config.train, state)
    if self._run is None:
      return 0, state, sums
    everywhere = state.step.sharding
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=getattr(x, 'sharding', everywhere)
      ),
      RunState(state, sums),
    )
    step, saved, messages = self._run.restore(
      abstract,
      self._log_steps,
      config.schedule.ckpt_frequency,
      abstract.train.params,
    )
    for message in messages if multihost.is_primary() else ():
      print(message, file=sys.stderr, flush=True)
    self._history, histories = run_folder.split_entries(self._run.entries)
    if not _is_ensemble(config.train):
      histories = [self._history]
    self._histories = [list(own) for own in histories] or self._histories
    if saved is not None:
      return step, saved.train, jax.device_get(saved.sums)
    if 0 in self._snapshot_steps:
      self._run.save_snapshot(0, state.params)
    self._run.save_checkpoint(0, RunState(state, sums))
    return 0, state, sums

  def _stop(
    self,
    step: int,
    state: TrainState,
    sums: StepSums,
    bar: progress.Progress,
  ) -> StepSums:
    """Logs and saves what is due; returns the sums to go on with."""
    norms = np.atleast_1d(jax.device_get(self._param_norms(state.params)))
    if not np.all(np.isfinite(norms)):
      self._fail(step, f'the norm of the parameters is {norms.max()}')
    if step in self._log_steps:
      self._log(step, state, sums, norms)
      bar.report(_summary(self._history[-1]))
      sums = zero_sums(self._config.train, state)
    if step in self._snapshot_steps:
      self._run.save_snapshot(step, state.params)
    if step in self._checkpoint_steps:
      self._run.save_checkpoint(
        step,
        RunState(state, sums),
        # Without waiting, a kill could lose two steps.
        wait=self._config.schedule.ckpt_frequency == 1,
      )
    return sums

  def _log(
    self, step: int, state: TrainState, sums: StepSums, norms: np.ndarray
  ) -> None:
    """Evaluates every member, and adds to the histories."""
    config = self._config
    index = self._log_steps.index(step)
    num_steps = step - (self._log_steps[index - 1] if index else 0)
    means = jax.tree.map(lambda x: np.atleast_1d(x) / num_steps, sums)
    params = sharding.collect(state.params)
    entries = []
    for member, seed in enumerate(self._seeds):
      metrics = self._parts.evaluator.step(
        member_params(config.train, params, member),
        None,
        step_keys(config.seed, seed, step).evaluation,
      )
      metrics = {
        'loss': means.loss[member],
        'grad_norm': means.grad_norm[member],
        'param_norm': norms[member],
        **jax.device_get(metrics),
      }
      floats = {name: float(value) for name, value in metrics.items()}
      entries.append({'step': step, **floats})
    for own, entry in zip(self._histories, entries, strict=True):
      own.append(entry)
    is_ensemble = _is_ensemble(config.train)
    entry = _over_seeds(entries) if is_ensemble else entries[0]
    self._history.append(entry)
    if self._run is not None:
      self._run.log(entry, entries if is_ensemble else ())

  def _check_steps(
    self, step: int, num_steps: int, num_done: np.ndarray, sums: StepSums
  ) -> None:
    """Raises NonFiniteError if a member stopped early."""
    num_done = np.atleast_1d(num_done)
    first = int(num_done.argmin())
    if num_done[first] < num_steps:
      member = f' of seed {self._seeds[first]}' if len(self._seeds) > 1 else ''
      values = {
        name: float(np.atleast_1d(value)[first])
        for name, value in sums._asdict().items()
      }
      bad = [
        f'{shown}{member} is {values[name]}'
        for name, shown in (('loss', 'loss'), ('grad_norm', 'gradient norm'))
        if not np.isfinite(values[name])
      ]
      self._fail(step + int(num_done[first]) + 1, ', '.join(bad))

  def _fail(self, step: int, problem: str) -> None:
    """Ends a run that cannot go on."""
    kept = ''
    if self._run is not None:
      self._run.finish(step, f'{problem} at step {step}')
      last = self._run.last_checkpoint
      kept = f'; the last good checkpoint is that of step {last}'
    raise NonFiniteError(
      f'step {step}: {problem}, with train.learning_rate '
      f'{self._config.train.learning_rate}{kept}'
    )

  def _agree(self, seconds: float) -> tuple[float, signal.Signals | None]:
    """The longest time of a call, and a signal that some process received.

    Every process is told the same, so that all do as many steps in a call and
    stop after the same one.
    """
    received = self._interrupts.received or 0
    milliseconds, number = multihost.max_over_processes(
      [int(1000 * seconds), received]
    )
    return milliseconds / 1000, signal.Signals(number) if number else None

  def _check_interrupts(
    self,
    received: signal.Signals | None,
    step: int,
    state: TrainState,
    sums: StepSums,
  ) -> None:
    """Raises StoppedError, with all saved, if somebody asked to stop."""
    if self._run is None or received is None:
      return
    self._run.save_checkpoint(step, RunState(state, sums), wait=True)
    self._run.finish(step, f'stopped by {received.name}')
    raise StoppedError(
      f'stopped by {received.name} after step {step} of '
      f'{self._config.schedule.training_steps}, which is saved in '
      f'{self._run.path}; started again, it goes on from there'
    )


def _make_param_norms(
  config: base_config.TrainConfig, devices: Sequence[jax.Device]
) -> Callable[[predictors.Params], jax.Array]:
  """Global norm of the parameters, `[M]` for an ensemble."""
  norm = optax.tree.norm
  if _is_ensemble(config):
    norm = jax.vmap(norm)
  if len(devices) == 1:
    return jax.jit(norm)
  # Every process reads those of all members.
  mesh = device_mesh(config, devices)
  return jax.jit(norm, out_shardings=sharding.replicated(mesh))


def zero_sums(config: base_config.TrainConfig, state: TrainState) -> StepSums:
  """Returns the sums over no step."""
  shape = (len(config.model_init_seed),) if _is_ensemble(config) else ()
  dtype = jax.tree.leaves(state.params)[0].dtype
  return StepSums(np.zeros(shape, dtype), np.zeros(shape, dtype))


def _multiples(every: int, last: int) -> tuple[int, ...]:
  """The multiples of `every` up to the last step, and that step."""
  return (*range(every, last, every), last) if last else ()


def _next_max_steps(max_steps: int, num_steps: int, seconds: float) -> int:
  """Number of steps of the next call, so that none keeps a signal waiting."""
  if seconds > _MAX_CALL_SECONDS:
    return max(1, num_steps // 2)
  if num_steps == max_steps and seconds < _MAX_CALL_SECONDS / 2:
    return 2 * max_steps
  return max_steps


def member_seeds(config: base_config.TrainConfig) -> tuple[int, ...]:
  """Returns the seed of every member; the only one if there is no ensemble."""
  seeds = config.model_init_seed
  return seeds if isinstance(seeds, tuple) else (seeds,)


def member_params(
  config: base_config.TrainConfig, params: predictors.Params, member: int
) -> predictors.Params:
  """Returns the parameters of one member of an ensemble.

  Args:
    config: Config of the training. Without an ensemble there is one member, 0.
    params: Parameters, as in `TrainResult`.
    member: Index of the member.

  Raises:
    ValueError: If there is no such member.
  """
  last = len(member_seeds(config)) - 1
  member = base_config.check_int('member', member, 0, last)
  return _take(params, member) if _is_ensemble(config) else params


@jax.jit
def _take(tree: Any, index: jax.Array) -> Any:
  return jax.tree.map(lambda array: array[index], tree)


def _is_ensemble(config: base_config.TrainConfig) -> bool:
  return isinstance(config.model_init_seed, tuple)


def _over_seeds(entries: Sequence[Mapping[str, float]]) -> dict[str, float]:
  """Means and standard errors over the members' log entries."""
  names = [name for name in entries[0] if name != 'step']
  values = {
    name: np.array([entry[name] for entry in entries]) for name in names
  }
  over_seeds = {'step': entries[0]['step']}
  for name in names:
    over_seeds[name] = float(values[name].mean())
  # With a single member there is no spread to measure.
  for name in names if len(entries) > 1 else ():
    stderr = values[name].std(ddof=1) / np.sqrt(len(entries))
    over_seeds[f'seeds_stderr/{name}'] = float(stderr)
  return over_seeds


def _length_index(
  seed: int, step: jax.Array, num_lengths: int
) -> jax.Array | int:
  """Which length a step has; depends on the seed and the step alone."""
  if num_lengths == 1:
    return 0
  stream = jax.random.fold_in(
    jax.random.key(seed), base_config.SEQ_LENGTH_STREAM
  )
  rng = jax.random.fold_in(stream, step)
  return jax.random.randint(rng, (), 0, num_lengths)


def num_seed_shards(config: base_config.TrainConfig, num_devices: int) -> int:
  """Returns over how many rows of devices the members are shared out."""
  if not _is_ensemble(config):
    return 1
  if config.num_seed_shards is not None:
    return config.num_seed_shards
  return math.gcd(len(config.model_init_seed), num_devices)


def device_mesh(
  config: base_config.TrainConfig, devices: Sequence[jax.Device]
) -> jax.sharding.Mesh:
  """Returns the devices as a grid, on which a config is trained."""
  return sharding.make(devices, num_seed_shards(config, len(devices)))


def _state_spec(config: base_config.TrainConfig) -> TrainState:
  """Where the parts of a TrainState lie in the mesh."""
  if _is_ensemble(config):
    by_member = jax.sharding.PartitionSpec(sharding.SEEDS)
    by_sequence = jax.sharding.PartitionSpec(sharding.SEEDS, sharding.BATCH)
  else:
    by_member = _REPLICATED
    by_sequence = jax.sharding.PartitionSpec(sharding.BATCH)
  return TrainState(_REPLICATED, by_member, by_member, by_sequence)


def _summary(entry: dict[str, float]) -> dict[str, str]:
  """Metrics of a log entry that the progress bar shows."""
  names = {'loss': 'loss', 'regret': 'cumulative_regret'}
  return {
    shown: f'{entry[name]:.3f}'
    for shown, name in names.items()
    if name in entry
  }
