"""Training on log loss: from a config to a trained network.

  build_components   config -> source, network, evaluator and devices
  make_update        one step
  make_run_steps     many steps, in one compiled call
  _Training          what happens between two calls: logs, checkpoints, signals

Keys and states are those of `train_state`. Data generation, loss, gradient and
update never visit the host.

Inside there are always M members, one network for each seed in
`model_init_seed`, which trains as it would alone (but for dropout masks, which
differ with the number of devices that share a batch). The devices, of one
process or of many (`multihost`), are a grid (`sharding`): each row trains some
of the members, and the devices of a row share their batches: each draws and
predicts its part, and gradients meet in a mean. Where there are as many rows as
devices, nothing has to meet.

With a folder, a run can be killed at any time and goes on by itself when it is
started again: what a step does depends on the state and the config alone, so
that it ends with the same bits.

Axes: M members, B batch, T time, K alphabet size.
"""

from collections.abc import Callable
from collections.abc import Sequence
import contextlib
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
from nonstationary_mbml import losses
from nonstationary_mbml import optimizers
from nonstationary_mbml import predictor_factories
from nonstationary_mbml import predictors
from nonstationary_mbml import train_state
from nonstationary_mbml.models import backend
from nonstationary_mbml.runtime import checkpointing
from nonstationary_mbml.runtime import multihost
from nonstationary_mbml.runtime import preemption
from nonstationary_mbml.runtime import progress
from nonstationary_mbml.runtime import run_folder
from nonstationary_mbml.runtime import sharding
from nonstationary_mbml.runtime import statistics
from nonstationary_mbml.runtime import trained_run

# Called at every log in the first process, with the step, the entry of the log
# and the parameters: of all members, with a leading axis, if `model_init_seed`
# is a tuple. It may keep them.
Callback = Callable[[int, dict[str, float], predictors.Params], None]

TrainState = train_state.TrainState
StepMetrics = train_state.StepMetrics
# One step of a member, whose `model_init_seed` is the second argument.
Update = Callable[[TrainState, jax.Array], tuple[TrainState, StepMetrics]]

# Target for the longest call: a signal waits until a call has ended.
_MAX_CALL_SECONDS = 1.0


class NonFiniteError(ArithmeticError):
  """A loss, gradient or parameter that is infinite or not a number."""


class StoppedError(Exception):
  """Training was asked to stop, and saved its state first."""


class Components(NamedTuple):
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


def build_components(
  config: base_config.ExperimentConfig,
  build_data_generator: base_constants.DataGeneratorBuilder,
  build_evaluator: base_constants.EvaluatorBuilder,
) -> Components:
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
  train_state.make_optimizer(config)  # Its errors name its fields only.
  devices = jax.devices()
  sharding.check(config.train, len(devices))
  generator = build_data_generator(config.data)
  for seq_length in train_state.sequence_lengths(config.train):
    losses.check_target(config.train.target, generator, seq_length)
    # Traced but not compiled, to find out whether the source can be that long.
    jax.eval_shape(
      lambda length=seq_length: generator.sample(jax.random.key(0), 1, length)
    )
  predictor = predictor_factories.build_predictor(
    config.model, generator.alphabet_size
  )
  if not config.train.reset_predictor_init_state and not predictor.has_state:
    raise ValueError(
      'train.reset_predictor_init_state is False, but model.model_type '
      f'{config.model.model_type!r} has no state to carry over'
    )
  with predictor_factories.naming_arguments():
    train_state.abstract_state(config, predictor, generator.alphabet_size)
  evaluator = build_evaluator(predictor, config.eval)
  if evaluator.alphabet_size != generator.alphabet_size:
    raise ValueError(
      f'eval.data has an alphabet of {evaluator.alphabet_size} symbols, but '
      f'data, to train on, of {generator.alphabet_size}'
    )
  return Components(generator, predictor, evaluator, devices)


def make_update(
  config: base_config.ExperimentConfig,
  generator: base_constants.DataGenerator,
  predictor: predictors.Predictor,
  num_devices: int = 1,
) -> Update:
  """Returns the function that does one step of one member.

  It is for the inside of a `shard_map` over the mesh of `device_mesh`. Where
  devices share a batch, it takes and returns the predictor state of a device's
  own sequences.

  Args:
    config: Config of the experiment.
    generator: Source of the batches.
    predictor: Predictor to train.
    num_devices: Number of devices.

  Returns:
    (state, the member's `model_init_seed`) -> (state, metrics of the step).
  """
  train_config = config.train
  optimizer = train_state.make_optimizer(config)
  lengths = train_state.sequence_lengths(train_config)
  num_rows = sharding.num_seed_shards(train_config, num_devices)
  row_length = num_devices // num_rows
  device_batch_size = train_config.batch_size // row_length
  compute_dtype = train_config.compute_dtype
  if compute_dtype == 'float32':
    compute_dtype = None  # As the source gives it.

  def update(
    state: TrainState, model_init_seed: jax.Array
  ) -> tuple[TrainState, StepMetrics]:
    step = state.step + 1
    keys = train_state.step_keys(config.seed, model_init_seed, step)
    data_keys = jax.random.split(keys.data, train_config.batch_size)
    if row_length > 1:
      device = jax.lax.axis_index(sharding.BATCH)
      data_keys = jax.lax.dynamic_slice_in_dim(
        data_keys, device * device_batch_size, device_batch_size
      )
      keys = keys._replace(
        state=jax.random.fold_in(keys.state, device),
        predictor=jax.random.fold_in(keys.predictor, device),
      )
    init_state = state.predictor_state
    if train_config.reset_predictor_init_state:
      init_state = predictor.initial_state(
        state.params, keys.state, device_batch_size
      )

    def at_length(seq_length: int) -> Callable[[], Any]:
      def loss_and_grads():
        batch, parameters = generator.sample_from_keys(data_keys, seq_length)
        return losses.loss_and_grads(
          predictor,
          state.params,
          keys.predictor,
          batch,
          init_state,
          train_config.gradient_chunk_length,
          losses.microbatch_size(
            train_config, predictor, device_batch_size, seq_length
          ),
          losses.target_probs(
            train_config.target, generator, batch, parameters
          ),
          compute_dtype,
        )

      return loss_and_grads

    index = _length_index(config.seed, step, len(lengths))
    loss, grads, predictor_state = jax.lax.switch(
      index, [at_length(seq_length) for seq_length in lengths]
    )
    if row_length > 1:
      # As one vector: the devices meet once, not once for every array.
      flat, unravel = jax.flatten_util.ravel_pytree((loss, grads))
      loss, grads = unravel(jax.lax.pmean(flat, sharding.BATCH))
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    if train_config.reset_predictor_init_state:
      predictor_state = None
    params = optax.apply_updates(state.params, updates)
    state = TrainState(step, params, opt_state, predictor_state)
    return state, StepMetrics(loss, optax.tree.norm(grads))

  return update


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


def make_run_steps(
  config: base_config.ExperimentConfig,
  update: Update,
  devices: Sequence[jax.Device],
) -> Callable[
  [TrainState, StepMetrics, int],
  tuple[TrainState, StepMetrics, jax.Array],
]:
  """Returns the compiled loop over steps.

    (state, sums, number of steps) -> (state, sums, numbers of steps done `[M]`)

  A step whose loss or gradient is not finite is the last one in the sums of its
  member, and is not counted; the member's state after it is of no use.

  It is compiled once, for any number of steps, and many steps in one call are
  bit for bit as many calls. The state is donated: it cannot be used after the
  call. On several devices, wait for a call to end before the next one:
  collectives of two calls in flight can deadlock the CPU backend.

  Args:
    config: Config of the experiment.
    update: Step function from `make_update`, for as many devices.
    devices: Devices to run on.
  """
  mesh = sharding.device_mesh(config.train, devices)
  num_rows = mesh.shape[sharding.SEEDS]

  def run_member(
    num_steps: jax.Array, step: jax.Array, member: tuple[Any, ...]
  ) -> tuple[Any, ...]:
    seed, sums, *state_fields = member

    # The number of steps is the same for all members: under `vmap`, a loop that
    # ends by each member's own losses would make all of its carry a member's
    # own, `step` as well, and compute every length at every step.
    def cond(carry):
      index, *_ = carry
      return index < num_steps

    def body(carry):
      index, num_done, is_finite, state, sums = carry
      state, new = update(state, seed)
      sums = jax.tree.map(
        lambda total, x: jnp.where(is_finite, total + x, total), sums, new
      )
      is_finite &= jnp.isfinite(new.loss) & jnp.isfinite(new.grad_norm)
      return index + 1, num_done + is_finite, is_finite, state, sums

    zero = jnp.int32(0)
    init = (
      zero,
      zero,
      jnp.bool(True),
      TrainState(step, *state_fields),
      sums,
    )
    _, num_done, _, state, sums = jax.lax.while_loop(cond, body, init)
    return num_done, sums, *state[1:]

  def run_steps(
    state: TrainState,
    sums: StepMetrics,
    num_steps: jax.Array,
  ) -> tuple[TrainState, StepMetrics, jax.Array]:
    seeds = train_state.seed_array(config.train)
    if num_rows > 1:
      row = jax.lax.axis_index(sharding.SEEDS)
      seeds = seeds.reshape(num_rows, -1)[row]
    num_done, sums, *state_fields = _map_members(
      lambda member: run_member(num_steps, state.step, member),
      (seeds, sums, *state[1:]),
    )
    if num_rows > 1:
      # Every process reads those of all members.
      num_done, sums = jax.lax.all_gather(
        (num_done, sums), sharding.SEEDS, tiled=True
      )
    return (
      TrainState(state.step + num_steps, *state_fields),
      sums,
      num_done,
    )

  replicated = jax.sharding.PartitionSpec()
  by_member = jax.sharding.PartitionSpec(sharding.SEEDS)
  run_steps = jax.shard_map(
    run_steps,
    mesh=mesh,
    in_specs=(train_state.SPEC, by_member, replicated),
    out_specs=(train_state.SPEC, replicated, replicated),
    # check_vma=False: outputs are replicated by construction (pmean,
    # all_gather).
    check_vma=False,
  )
  return jax.jit(run_steps, donate_argnums=0)


def _map_members(function: Callable[[Any], Any], members: Any) -> Any:
  """Maps over the leading axis of all arrays."""
  if len(jax.tree.leaves(members)[0]) == 1:
    # The program of a single network, without a loop around it.
    only = jax.tree.map(lambda x: jnp.squeeze(x, 0), members)
    return jax.tree.map(lambda x: x[None], function(only))
  # One member's activations stay in the cache of a CPU; those of all do not,
  # and a batched product of small matrices is no quicker than one by one.
  if backend.is_cpu():
    return jax.lax.map(function, members)
  return jax.vmap(function)(members)


def _goes_on(folder: str | pathlib.Path | None) -> bool:
  """Whether a folder has a checkpoint, so that a run needs no beginning."""
  return folder is not None and multihost.on_primary(
    lambda: run_folder.RunFolder(folder).last_checkpoint is not None
  )


def train(
  config: base_config.ExperimentConfig,
  build_data_generator: base_constants.DataGeneratorBuilder,
  build_evaluator: base_constants.EvaluatorBuilder,
  use_tqdm: bool = False,
  folder: str | pathlib.Path | None = None,
  callbacks: Sequence[Callback] = (),
) -> trained_run.Run:
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
      a checkpoint of the same config, training goes on from it; also if the
      config has more steps now, where its schedule allows that. None keeps
      nothing.
    callbacks: Functions of step, entry and parameters, called at every log. An
      exception in one of them ends the run.

  Returns:
    The run after its last step.

  Raises:
    ValueError: If the config is not valid, before anything is compiled; or if
      the folder holds a run of another config, or one that cannot go on.
    NonFiniteError: If a loss or gradient is not finite.
    StoppedError: If a SIGTERM or Ctrl-C came, after the state was saved;
      only with a folder.
    run_folder.SaveError: If the folder cannot be written to.
  """
  components = build_components(config, build_data_generator, build_evaluator)
  return train_components(config, components, use_tqdm, folder, callbacks)


def train_components(
  config: base_config.ExperimentConfig,
  components: Components,
  use_tqdm: bool = False,
  folder: str | pathlib.Path | None = None,
  callbacks: Sequence[Callback] = (),
) -> trained_run.Run:
  """Trains what `build_components` has built of the config; see `train`."""
  multihost.check_same('the config', base_config.to_dict(config))
  # The run keeps it, as it is saved; others may edit theirs.
  config = base_config.copied(config)
  params = None
  if config.train.init_from is not None and not _goes_on(folder):
    params = train_state.initial_params(
      config, components.predictor, components.generator.alphabet_size
    )
  with contextlib.ExitStack() as stack:
    interrupts = stack.enter_context(preemption.catch(folder is not None))
    if folder is not None:
      folder = stack.enter_context(run_folder.RunFolder(folder).open(config))
    training = _Training(
      config, components, params, folder, interrupts, use_tqdm, callbacks
    )
    return training.run()


class _Training:
  """One run of the loop: calls of many steps, and what happens between them."""

  def __init__(
    self,
    config: base_config.ExperimentConfig,
    components: Components,
    params: predictors.Params | None,
    folder: run_folder.RunFolder | None,
    interrupts: preemption.Interrupts,
    use_tqdm: bool,
    callbacks: Sequence[Callback],
  ):
    generator, predictor, _, devices = components
    self._config = config
    self._components = components
    self._folder = folder
    self._interrupts = interrupts
    self._callbacks = callbacks
    self._use_tqdm = use_tqdm and multihost.is_primary()
    self._seeds = trained_run.member_seeds(config.train)
    is_ensemble = isinstance(config.train.model_init_seed, tuple)
    self._history = []
    self._member_histories = [[] for _ in self._seeds] if is_ensemble else []
    mesh = sharding.device_mesh(config.train, devices)
    # Every process reads those of all members.
    self._param_norms = jax.jit(
      jax.vmap(optax.tree.norm), out_shardings=sharding.replicated(mesh)
    )
    schedule = config.schedule
    self._log_steps = _multiples(
      config.logger.log_frequency, schedule.training_steps
    )
    self._checkpoint_steps = self._snapshot_steps = ()
    if folder is not None:
      # A kill loses two intervals: the one that goes on, and the one whose
      # checkpoint is on its way to the disk.
      self._checkpoint_steps = _multiples(
        max(1, schedule.ckpt_frequency // 2), schedule.training_steps
      )
      self._snapshot_steps = checkpointing.snapshot_steps(schedule)
    self._step = 0
    self._state = train_state.init_state(
      config, predictor, generator.alphabet_size, devices, params
    )
    self._sums = train_state.zero_sums(self._state)
    self._form = sharding.abstract(
      train_state.RunState(self._state, self._sums), sharding.replicated(mesh)
    )
    self._saved_form = train_state.saved_form(config.train, self._form)
    self._to_saved = sharding.reshaping(self._saved_form)

  def run(self) -> trained_run.Run:
    """Trains from where the folder stands to the last step."""
    config = self._config
    generator, predictor, evaluator, devices = self._components
    if self._folder is not None:
      self._restore()
    update = make_update(config, generator, predictor, len(devices))
    run_steps = make_run_steps(config, update, devices)
    total = config.schedule.training_steps
    stops = {*self._log_steps, *self._checkpoint_steps, *self._snapshot_steps}
    max_steps = 1
    with progress.bar(
      total, 'training', 'step', self._use_tqdm, self._step
    ) as bar:
      for stop in sorted(stops):
        while self._step < stop:
          num_steps = min(max_steps, stop - self._step)
          began = time.monotonic()
          self._state, self._sums, num_done = run_steps(
            self._state, self._sums, num_steps
          )
          self._sums, num_done = jax.device_get((self._sums, num_done))
          self._check_steps(num_steps, num_done)
          seconds = time.monotonic() - began
          self._step += num_steps
          bar.update(num_steps)
          if self._step == stop:
            self._log_and_save(bar)
          seconds, received = self._interrupts.over_processes(seconds)
          max_steps = _next_max_steps(max_steps, num_steps, seconds)
          self._stop_if(received)
    if self._folder is not None:
      self._folder.finish(self._step, 'finished')
      _, received = self._interrupts.over_processes(0.0)
      self._stop_if(received)
    params, average = self._collect_params()
    return trained_run.Run(
      config=config,
      predictor=predictor,
      all_params=params,
      all_ema_params=average,
      step=self._step,
      history=self._history,
      member_histories=tuple(self._member_histories),
      evaluator=evaluator,
      folder=None if self._folder is None else self._folder.path,
    )

  def _restore(self) -> None:
    """Goes on from the newest checkpoint, or saves the initial state."""
    step, saved, messages = self._folder.restore(
      self._saved_form,
      self._log_steps,
      self._config.schedule.ckpt_frequency,
      train_state.snapshot(self._saved_form.train),
    )
    for message in messages if multihost.is_primary() else ():
      print(message, file=sys.stderr, flush=True)
    if saved is None:
      self._save(is_snapshot=0 in self._snapshot_steps, is_checkpoint=True)
      return
    self._step = step
    self._state, sums = sharding.reshaping(self._form)(saved)
    self._sums = jax.device_get(sums)
    self._history, member_histories = run_folder.split_entries(
      self._folder.entries
    )
    if member_histories:
      self._member_histories = list(member_histories)

  def _log_and_save(self, bar: progress.Progress) -> None:
    """Logs and saves what is due after this step."""
    norms = jax.device_get(self._param_norms(self._state.params))
    if not np.all(np.isfinite(norms)):
      self._fail(self._step, f'the norm of the parameters is {norms.max()}')
    if self._step in self._log_steps:
      self._log(norms)
      bar.report(_summary(self._history[-1]))
      self._sums = train_state.zero_sums(self._state)
    self._save(
      self._step in self._snapshot_steps, self._step in self._checkpoint_steps
    )

  def _log(self, param_norms: np.ndarray) -> None:
    """Evaluates every member, and adds to the histories."""
    # Not from `_log_steps`: a shorter run has logged its last step, too.
    last = self._history[-1]['step'] if self._history else 0
    num_steps = self._step - last
    params, average = self._collect_params()
    entries = []
    for member, seed in enumerate(self._seeds):
      evaluated = self._evaluate(params, member, seed)
      if average is not None:
        averaged = self._evaluate(average, member, seed)
        evaluated |= {f'ema/{name}': x for name, x in averaged.items()}
      values = {
        'loss': self._sums.loss[member] / num_steps,
        'grad_norm': self._sums.grad_norm[member] / num_steps,
        'param_norm': param_norms[member],
        **evaluated,
      }
      floats = {name: float(value) for name, value in values.items()}
      entries.append({'step': self._step, **floats})
    entry, members = entries[0], ()
    if self._member_histories:
      entry, members = statistics.over_members(entries), entries
    self._history.append(entry)
    for history, own in zip(self._member_histories, members, strict=True):
      history.append(own)
    if self._folder is not None:
      self._folder.log(entry, members)
    if self._callbacks:
      multihost.on_primary(lambda: self._call_back(entry, params))

  def _call_back(
    self, entry: dict[str, float], params: predictors.Params
  ) -> None:
    # Copies: the next call of many steps takes the memory of the parameters.
    if self._member_histories:
      params = jax.tree.map(jnp.copy, params)
    else:
      params = trained_run.take(params, 0)
    for callback in self._callbacks:
      callback(self._step, dict(entry), params)

  def _evaluate(
    self, params: predictors.Params, member: int, seed: int
  ) -> dict[str, Any]:
    """Metrics of one member; other parameters see the same sequences."""
    keys = train_state.step_keys(self._config.seed, seed, self._step)
    return jax.device_get(
      self._components.evaluator.step(
        trained_run.take(params, member), None, keys.evaluation
      )
    )

  def _collect_params(
    self,
  ) -> tuple[predictors.Params, predictors.Params | None]:
    """Parameters of all members, and their averages if there are any."""
    average = optimizers.average(self._state.opt_state)
    return sharding.collect((self._state.params, average))

  def _save(
    self, is_snapshot: bool, is_checkpoint: bool, wait: bool = False
  ) -> None:
    """Begins to save the state, and what is to be kept of it for good."""
    if not (is_snapshot or is_checkpoint):
      return
    saved = self._to_saved(train_state.RunState(self._state, self._sums))
    if is_snapshot:
      self._folder.save_snapshot(self._step, train_state.snapshot(saved.train))
    if is_checkpoint:
      # Without waiting, a kill could lose two steps.
      wait |= self._config.schedule.ckpt_frequency == 1
      self._folder.save_checkpoint(self._step, saved, wait=wait)

  def _check_steps(self, num_steps: int, num_done: np.ndarray) -> None:
    """Raises NonFiniteError if a member stopped early."""
    first = int(num_done.argmin())
    if num_done[first] == num_steps:
      return
    member = f' of seed {self._seeds[first]}' if len(self._seeds) > 1 else ''
    values = {
      'loss': float(self._sums.loss[first]),
      'gradient norm': float(self._sums.grad_norm[first]),
    }
    problems = [
      f'{name}{member} is {value}'
      for name, value in values.items()
      if not math.isfinite(value)
    ]
    self._fail(self._step + int(num_done[first]) + 1, ', '.join(problems))

  def _fail(self, step: int, problem: str) -> None:
    """Ends a run that cannot go on."""
    kept = ''
    if self._folder is not None:
      self._folder.finish(step, f'{problem} at step {step}')
      last = self._folder.last_checkpoint
      kept = f'; the last good checkpoint is that of step {last}'
    raise NonFiniteError(
      f'step {step}: {problem}, with train.learning_rate '
      f'{self._config.train.learning_rate}{kept}'
    )

  def _stop_if(self, received: signal.Signals | None) -> None:
    """Raises StoppedError, with all saved, if somebody asked to stop."""
    if self._folder is None or received is None:
      return
    self._save(is_snapshot=False, is_checkpoint=True, wait=True)
    self._folder.finish(self._step, f'stopped by {received.name}')
    raise StoppedError(
      f'stopped by {received.name} after step {self._step} of '
      f'{self._config.schedule.training_steps}, which is saved in '
      f'{self._folder.path}; started again, it goes on from there'
    )


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


def _summary(entry: dict[str, float]) -> dict[str, str]:
  """Metrics of a log entry that the progress bar shows."""
  names = {'loss': 'loss', 'regret': 'cumulative_regret'}
  return {
    shown: f'{entry[name]:.3f}'
    for shown, name in names.items()
    if name in entry
  }
