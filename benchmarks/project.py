"""The project's side: training and evaluation as `make run` does them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import networks
import plain_jax
import timing

from nonstationary_mbml import base_config
from nonstationary_mbml import predictor_factories
from nonstationary_mbml import predictors
from nonstationary_mbml import train
from nonstationary_mbml import train_state
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments import evaluator as evaluator_lib
from nonstationary_mbml.runtime import devices as devices_lib
from nonstationary_mbml.runtime import multihost


def make_config(job: timing.Job) -> config_lib.ExperimentConfig:
  """Returns the config of a job, complete."""
  config = config_lib.ExperimentConfig(
    model=base_config.ModelConfig(
      model_type=job.model_type, architecture_kwargs=job.kwargs
    ),
    train=base_config.TrainConfig(
      seq_length=job.seq_length,
      batch_size=job.batch_size,
      optimizer=job.optimizer,
      learning_rate=job.learning_rate,
      clip_grad_norm=job.clip_grad_norm,
    ),
    eval=config_lib.EvalConfig(
      batch_size=min(512, job.num_sequences or 512),
      optimal_predictors=('ptw', 'lad'),
    ),
  )
  if job.seeds > 1:
    config.train.model_init_seed = tuple(range(job.seeds))
  return config_lib.post_process_config(config)


def project_step(
  config: config_lib.ExperimentConfig,
  num_devices: int,
  steps: int,
  predictor: predictors.Predictor | None = None,
) -> tuple[Callable[[], jax.Array], int]:
  """Returns a function of `steps` steps of the project's loop, and its memory.

  All that the benchmarks know of train.py is here.

  Args:
    config: Complete config.
    num_devices: Number of devices to train on.
    steps: Training steps per call.
    predictor: Predictor to train in place of the config's.

  Returns:
    A function that trains on and returns the loss, and the bytes of temporary
    memory that it was compiled to take, on all devices.
  """
  devices = jax.devices()[:num_devices]
  generator = constants.build_data_generator(config.data)
  if predictor is None:
    predictor = predictor_factories.build_predictor(
      config.model, generator.alphabet_size
    )
  update = train.make_update(config, generator, predictor, num_devices)
  state = train_state.init_state(
    config, predictor, generator.alphabet_size, devices
  )
  zeros = train_state.zero_sums(state)
  run_steps = train.make_run_steps(config, update, devices)
  run_steps = run_steps.lower(state, zeros, steps).compile()

  def run() -> jax.Array:
    nonlocal state
    state, sums, _ = run_steps(state, zeros, steps)
    # The state, too: two calls in flight can deadlock.
    return jax.block_until_ready((state, sums))[1].loss / steps

  return run, num_devices * run_steps.memory_analysis().temp_size_in_bytes


def training(job: timing.Job) -> timing.Work:
  """The work of training, for a child process."""
  num_devices = _start(job)
  predictor = None
  if job.network != 'project':
    network = plain_jax.make_network(
      job.model_type,
      networks.ALPHABET_SIZE,
      job.kwargs,
      keep_states=job.network == 'keep_states',
    )
    predictor = predictors.InContextPredictor(network)
  config = make_config(job)
  if job.whole_batches:
    config.train.microbatch_size = job.batch_size // num_devices
  config.train.compute_dtype = job.compute_dtype
  train_on, temp_bytes = project_step(config, num_devices, job.steps, predictor)

  def run() -> list[jax.Array]:
    return [train_on() for _ in range(job.runs)]

  return _work(run, temp_bytes, num_devices)


def evaluation(job: timing.Job) -> timing.Work:
  """The work of an evaluation beside PTW and LAD, for a child process."""
  _start(job)
  config = make_config(job)
  predictor = predictor_factories.build_predictor(
    config.model, networks.ALPHABET_SIZE
  )
  evaluator = evaluator_lib.build_evaluator(predictor, config.eval)
  rng = jax.random.key(0)
  symbols = jnp.zeros((1, job.seq_length, networks.ALPHABET_SIZE))
  params = predictor.init_params(rng, symbols, None)
  temp_bytes = None
  if job.num_processes == 1:
    step = jax.jit(lambda params, rng: evaluator.step(params, None, rng))
    memory = step.lower(params, rng).compile().memory_analysis()
    temp_bytes = memory.temp_size_in_bytes

  def run() -> None:
    # The regrets come back as arrays of the host.
    evaluator.evaluate(params, rng, job.num_sequences)

  return _work(run, temp_bytes, jax.device_count())


def _start(job: timing.Job) -> int:
  """Starts JAX and returns the number of devices to train on."""
  num_devices = job.num_devices or 1
  if job.all_cores and not job.num_devices:
    num_devices = devices_lib.num_cpu_devices(job.batch_size)
  # No cache: a program of an older version must not be timed.
  devices_lib.start(num_devices, use_compilation_cache=False)
  if job.num_processes > 1:
    multihost.start(job.coordinator, job.num_processes, job.process_id)
    return jax.device_count()
  if jax.default_backend() == 'cpu':
    return num_devices
  return min(job.num_devices or 1, jax.device_count())


def _work(
  run: Callable[[], Any], temp_bytes: int, num_devices: int
) -> timing.Work:
  return timing.Work(
    run,
    temp_bytes,
    num_devices,
    jax.devices()[0].device_kind,
    plain_jax.peak_device_bytes,
  )
