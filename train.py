"""Training on log loss: TrainState, one update, and the loop.

The key of step n = 1, 2, ... is fold_in(fold_in(key(seed), model_init_seed),
n); step 0 is the initialisation. So a step does not depend on how often the run
logs. All steps between two logs are one compiled call: data generation, loss,
gradient and update never visit the host. With several devices the whole call
runs inside one `jax.shard_map`: each draws and predicts its share of the batch,
and gradients meet in a mean.

With several seeds as `model_init_seed` an ensemble is trained: one member for
each, as it would be trained alone (but for dropout masks, which differ with the
number of devices that share a batch). Where the devices divide the members,
each device trains some of them, and nothing has to meet. The members of a
device are under one `vmap`; on a CPU they run one after another.

Axes: M members of an ensemble, B batch, T time, K alphabet size.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
from typing import Any
from typing import NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from nonstationary_mbml import base_config
from nonstationary_mbml import base_constants
from nonstationary_mbml import predictor_factories
from nonstationary_mbml import predictors

_AXIS = 'devices'
_REPLICATED = jax.sharding.PartitionSpec()
# Of a network that reads whole sequences, on a CPU: at T = 256, twice and half
# as many were no quicker.
_SYMBOLS_PER_MICROBATCH = 2048


class TrainState(NamedTuple):
  """All that a step changes.

  In an ensemble the arrays of all but `step` have a leading axis of M members.

  Attributes:
    step: Steps done so far, int32.
    params: Of the predictor.
    opt_state: Of the optimiser.
    predictor_state: Carried over to the next batch; None if each batch starts
      from the initial state.
  """

  step: jax.Array
  params: predictors.Params
  opt_state: optax.OptState
  predictor_state: predictors.State


@dataclasses.dataclass(frozen=True)
class TrainResult:
  """What training leaves.

  Attributes:
    predictor: The predictor that was trained.
    params: Its trained parameters; those of an ensemble have a leading axis of
      M members.
    history: One dict per log: `step`, `loss` (mean since the last log, nats per
      symbol) and the evaluator's metrics. For an ensemble, means over its
      members, and under `seeds_stderr/<name>` their standard errors.
    evaluator: The evaluator that was used.
    member_histories: For every member of an ensemble, the history that it would
      have alone, dropout masks aside; () without an ensemble.
  """

  predictor: predictors.Predictor
  params: predictors.Params
  history: list[dict[str, float]]
  evaluator: base_constants.Evaluator
  member_histories: tuple[list[dict[str, float]], ...] = ()


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
    data: Of the batch.
    state: Of the predictor's initial state.
    predictor: Of dropout.
    evaluation: Of the evaluation after the step, if there is one.
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
  return -jnp.sum(targets * jax.nn.log_softmax(logits, axis=-1))


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
    predictor: Whose loss it is.
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
  microbatch_size = microbatch_size or batch_size
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
  # Nothing is asked of the last prediction.
  targets = jnp.pad(batch[:, 1:], ((0, 0), (0, 1), (0, 0)))
  chunk_length = min(chunk_length or seq_length, seq_length)

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
  """Returns how many sequences' gradient is computed at a time.

  Args:
    config: Of the training.
    predictor: To train.
    share: Sequences of a step, on one device.
    seq_length: T.

  Returns:
    A divisor of the share.
  """
  if config.microbatch_size is not None:
    return config.microbatch_size
  if predictor.has_state or jax.default_backend() != 'cpu':
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
) -> Callable[[TrainState, int | jax.Array], tuple[TrainState, jax.Array]]:
  """Returns the function that does one step of one member.

  Args:
    config: Of the experiment.
    generator: Of the batches.
    predictor: To train.
    num_devices: If above 1, the function is for the inside of a `shard_map`
      over that many. Where they split the batch, it takes and returns a
      device's share of the predictor state.

  Returns:
    (state, the member's `model_init_seed`) -> (state, loss).
  """
  train_config = config.train
  optimizer = make_optimizer(train_config)
  lengths = sequence_lengths(train_config)
  splits_batch = num_devices > 1 and not _splits_members(
    train_config, num_devices
  )
  share = train_config.batch_size // (num_devices if splits_batch else 1)

  def update(
    state: TrainState, model_init_seed: int | jax.Array
  ) -> tuple[TrainState, jax.Array]:
    step = state.step + 1
    keys = step_keys(config.seed, model_init_seed, step)
    data_keys = jax.random.split(keys.data, train_config.batch_size)
    if splits_batch:
      device = jax.lax.axis_index(_AXIS)
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
    if splits_batch:
      # As one vector: the devices meet once, not once for every array.
      flat, unravel = jax.flatten_util.ravel_pytree((loss, grads))
      loss, grads = unravel(jax.lax.pmean(flat, _AXIS))
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    if train_config.reset_predictor_init_state:
      predictor_state = None
    params = optax.apply_updates(state.params, updates)
    return TrainState(step, params, opt_state, predictor_state), loss

  return update


def make_run_steps(
  config: base_config.ExperimentConfig,
  update: Callable[[TrainState, int | jax.Array], tuple[TrainState, jax.Array]],
  devices: Sequence[jax.Device],
) -> Callable[[TrainState, int], tuple[TrainState, jax.Array]]:
  """Returns the compiled loop: (state, number of steps) -> (state, mean loss).

  It is compiled once, for any number of steps. The state is donated: it cannot
  be used after the call. On several devices, wait for a call to end before the
  next one: collectives of two calls in flight can deadlock the CPU backend.

  Args:
    config: Of the experiment.
    update: From `make_update`, for as many devices.
    devices: To run on.

  Returns:
    The function. The mean loss over the steps is `[M]` for an ensemble.
  """
  splits_members = _splits_members(config.train, len(devices))

  def run_steps(
    state: TrainState, num_steps: jax.Array
  ) -> tuple[TrainState, jax.Array]:
    def run_member(member: tuple[Any, ...]) -> tuple[Any, ...]:
      seed, *parts = member

      def add_step(_, carry):
        state, total = carry
        state, loss = update(state, seed)
        return state, total + loss

      init = TrainState(state.step, *parts)
      loss = jax.eval_shape(lambda: update(init, seed)[1])
      last, total = jax.lax.fori_loop(
        0, num_steps, add_step, (init, jnp.zeros_like(loss))
      )
      return *last[1:], total / num_steps

    seeds = config.train.model_init_seed
    if _is_ensemble(config.train):
      seeds = jnp.asarray(seeds, jnp.uint32)
      if splits_members:
        device = jax.lax.axis_index(_AXIS)
        seeds = seeds.reshape(len(devices), -1)[device]
      *parts, losses = _map_members(run_member, (seeds, *state[1:]))
    else:
      *parts, losses = run_member((seeds, *state[1:]))
    return TrainState(state.step + num_steps, *parts), losses

  if len(devices) > 1:
    spec = _state_spec(config.train, len(devices))
    loss_spec = _REPLICATED
    if splits_members:
      loss_spec = jax.sharding.PartitionSpec(_AXIS)
    run_steps = jax.shard_map(
      run_steps,
      mesh=_mesh(devices),
      in_specs=(spec, _REPLICATED),
      out_specs=(spec, loss_spec),
      # Replication is ours to keep: all that is replicated follows from means
      # over the devices.
      check_vma=False,
    )
  return jax.jit(run_steps, donate_argnums=0)


def _map_members(function: Callable[[Any], Any], members: Any) -> Any:
  """Maps over the leading axis of all arrays."""
  # One member's activations stay in the cache of a CPU; those of all do not,
  # and a batched product of small matrices is no quicker than one by one.
  if jax.default_backend() == 'cpu':
    return jax.lax.map(function, members)
  return jax.vmap(function)(members)


def init_state(
  config: base_config.ExperimentConfig,
  predictor: predictors.Predictor,
  alphabet_size: int,
  devices: Sequence[jax.Device],
) -> TrainState:
  """Returns the state before the first step, laid out over the devices."""
  init = lambda: _init(config, predictor, alphabet_size)
  if len(devices) == 1:
    return jax.jit(init)()
  mesh = _mesh(devices)
  spec = _state_spec(config.train, len(devices))
  # Computed on one device: on several, XLA would have to split it first.
  return TrainState(
    *(
      jax.device_put(part, jax.sharding.NamedSharding(mesh, part_spec))
      for part, part_spec in zip(jax.jit(init)(), spec, strict=True)
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


class Parts(NamedTuple):
  """What a config describes, built and checked.

  Attributes:
    generator: The source.
    predictor: The network.
    evaluator: Of the network.
    devices: To train on.
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
    config: Of the experiment; also has a `data` field.
    build_data_generator: As in `train`.
    build_evaluator: As in `train`.

  Raises:
    ValueError: If the config is not valid.
  """
  config.validate()
  devices = jax.local_devices()
  train_config = config.train
  num_shares = len(devices)
  if _splits_members(train_config, len(devices)):
    num_shares = 1
  if train_config.batch_size % num_shares:
    raise ValueError(
      f'train.batch_size {train_config.batch_size} does not divide over '
      f'{len(devices)} devices'
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
      lambda rng, length=seq_length: generator.sample(rng, 1, length),
      jax.random.key(0),
    )
  predictor = predictor_factories.build_predictor(
    config.model, generator.alphabet_size
  )
  if not train_config.reset_predictor_init_state and not predictor.has_state:
    raise ValueError(
      'train.reset_predictor_init_state is False, but model.model_type '
      f'{config.model.model_type!r} has no state to carry over'
    )
  jax.eval_shape(
    lambda: _init(config, predictor, generator.alphabet_size),
  )
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
) -> TrainResult:
  """Trains a predictor as configured, on all devices of the process.

  Args:
    config: Of the experiment; also has a `data` field.
    build_data_generator: Makes the source from `config.data`.
    build_evaluator: Makes the evaluator, run at every log, from the predictor
      and `config.eval`.
    use_tqdm: Show a progress bar with step, loss and regret.

  Returns:
    The trained parameters and the log history.

  Raises:
    ValueError: If the config is not valid, before anything is compiled.
  """
  generator, predictor, evaluator, devices = build_parts(
    config, build_data_generator, build_evaluator
  )
  state = init_state(config, predictor, generator.alphabet_size, devices)
  run_steps = make_run_steps(
    config,
    make_update(config, generator, predictor, len(devices)),
    devices,
  )
  # Of every member; the only one if there is no ensemble.
  seeds = member_seeds(config.train)
  histories = [[] for _ in seeds]
  history = []
  total = config.schedule.training_steps
  progress = tqdm.tqdm(
    total=total, desc='training', unit='step', disable=not use_tqdm
  )
  with progress:
    done = 0
    while done < total:
      num_steps = min(config.logger.log_frequency, total - done)
      state, losses = run_steps(state, num_steps)
      losses = np.atleast_1d(jax.device_get(losses))
      done += num_steps
      params = jax.device_put(state.params, devices[0])
      for member, seed in enumerate(seeds):
        metrics = evaluator.step(
          member_params(config.train, params, member),
          None,
          step_keys(config.seed, seed, done).evaluation,
        )
        metrics = jax.device_get({'loss': losses[member], **metrics})
        histories[member].append(
          {
            'step': done,
            **{name: float(value) for name, value in metrics.items()},
          }
        )
      entries = [own[-1] for own in histories]
      history.append(
        _over_seeds(entries) if _is_ensemble(config.train) else entries[0]
      )
      progress.set_postfix(_summary(history[-1]), refresh=False)
      progress.update(num_steps)
  return TrainResult(
    predictor,
    jax.device_put(state.params, devices[0]),
    history,
    evaluator,
    tuple(histories) if _is_ensemble(config.train) else (),
  )


def member_seeds(config: base_config.TrainConfig) -> tuple[int, ...]:
  """Returns the seed of every member; the only one if there is no ensemble."""
  seeds = config.model_init_seed
  return seeds if isinstance(seeds, tuple) else (seeds,)


def member_params(
  config: base_config.TrainConfig, params: predictors.Params, member: int
) -> predictors.Params:
  """Returns the parameters of one member of an ensemble.

  Args:
    config: Of the training. Without an ensemble there is one member, 0.
    params: As in `TrainResult`.
    member: Its index.
  """
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


def _mesh(devices: Sequence[jax.Device]) -> jax.sharding.Mesh:
  return jax.sharding.Mesh(np.asarray(devices), (_AXIS,))


def _splits_members(config: base_config.TrainConfig, num_devices: int) -> bool:
  """Whether every device trains members of its own, each on whole batches."""
  if num_devices == 1 or not _is_ensemble(config):
    return False
  return len(config.model_init_seed) % num_devices == 0


def _state_spec(
  config: base_config.TrainConfig, num_devices: int
) -> TrainState:
  """Where the parts of a TrainState lie over several devices."""
  split = jax.sharding.PartitionSpec(_AXIS)
  if _splits_members(config, num_devices):
    return TrainState(_REPLICATED, split, split, split)
  if _is_ensemble(config):
    split = jax.sharding.PartitionSpec(None, _AXIS)
  return TrainState(_REPLICATED, _REPLICATED, _REPLICATED, split)


def _summary(entry: dict[str, float]) -> dict[str, str]:
  """What the progress bar shows of a log entry."""
  names = {'loss': 'loss', 'regret': 'cumulative_regret'}
  return {
    shown: f'{entry[name]:.3f}'
    for shown, name in names.items()
    if name in entry
  }
