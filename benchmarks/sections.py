"""What accelerator.py measures: the rows of each section.

A row is a dict of plain data. Where JAX computes, and how the rows of two
platforms are set beside each other, is for accelerator.py.
"""

from collections.abc import Callable
import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import networks
import numpy as np
import plain_jax
import predictors_and_sources as exact
import project
import timing

from nonstationary_mbml import predictor_factories
from nonstationary_mbml import predictors
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments import evaluator as evaluator_lib
from nonstationary_mbml.experiments import forget_me_not_predictors
from nonstationary_mbml.experiments import live_and_die_predictors
from nonstationary_mbml.experiments import ptw_predictors
from nonstationary_mbml.experiments import run_length_predictors

# Networks whose steps are timed.
MEASURED = ('LSTM-128', 'Stack-RNN', 'Transformer SIN_COS')

Row = dict[str, Any]
# A row's name, and the function that measures what is in it.
Tasks = dict[str, Callable[[], Row]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """Sizes of all measurements.

  Attributes:
    batch_size: B of the timed steps and predictors.
    seq_length: T of them.
    num_layers: Number of layers of the Transformers.
    seeds: Networks that are trained at once.
    precisions: Precisions of matrix products, by JAX's names. On a GPU the
      default is TF32, as are those that JAX calls tensorfloat32 and bfloat16.
    steps: Training steps per call, less for several seeds.
    seconds: Least time that a row is measured for.
    matmul_size: Rows and columns of a matrix.
    copy_size: Numbers that are read and written.
    long_ptw: T of a long sequence for PTW.
    long_lad: T of a long sequence for LAD.
    stream: T of a sequence that comes in chunks, symbol by symbol.
    compared_steps: Training steps that are compared with those of a CPU.
    compared_batch: B of what is compared.
    compared_length: T of what is compared.
    compared_layers: Number of layers of the Transformers that are compared.
    launch_flags: Flags of the launch script.
    num_sequences: Sequences of its tables.
  """

  batch_size: int = 128
  seq_length: int = 256
  num_layers: int = 5
  seeds: tuple[int, ...] = (1, 4, 16)
  precisions: tuple[str, ...] = ('highest', 'default', 'BF16_BF16_F32')
  steps: int = 10
  seconds: float = 1.5
  matmul_size: int = 8192
  copy_size: int = 2**28
  long_ptw: int = 2**20
  long_lad: int = 2**16
  stream: int = 2**16
  compared_steps: int = 50
  compared_batch: int = 32
  compared_length: int = 64
  compared_layers: int = 2
  launch_flags: tuple[str, ...] = ('--steps=200',)
  num_sequences: int = 10_240


QUICK = Sizes(
  batch_size=4,
  seq_length=16,
  num_layers=1,
  seeds=(1, 2),
  precisions=('highest',),
  steps=2,
  seconds=0.0,
  matmul_size=128,
  copy_size=2**16,
  long_ptw=2**8,
  long_lad=2**6,
  stream=2**8,
  compared_steps=2,
  compared_batch=2,
  compared_length=8,
  compared_layers=1,
  launch_flags=(
    '--steps=2',
    '--batch_size=4',
    '--seq_length=8',
    '--set=eval.batch_size=8',
  ),
  num_sequences=8,
)


def peak_tasks(sizes: Sizes) -> Tasks:
  """Products of square matrices in every precision, and a copy."""

  def product(precision: str) -> Row:
    with jax.default_matmul_precision(precision):
      run = plain_jax.matmul(
        timing.Job(kind='matmul', size=sizes.matmul_size)
      ).run
      seconds = min(_seconds_of(run, sizes))
    return _quantity(2 * sizes.matmul_size**3 / seconds / 1e12, 'TFLOP/s')

  def memory() -> Row:
    run = plain_jax.copy(timing.Job(kind='copy', size=sizes.copy_size)).run
    # Read and written once, in float32.
    moved = 2 * 4 * sizes.copy_size
    return _quantity(moved / min(_seconds_of(run, sizes)) / 1e9, 'GB/s')

  return {
    **{
      precision: lambda precision=precision: product(precision)
      for precision in sizes.precisions
    },
    'memory': memory,
  }


def agreement_tasks(sizes: Sizes) -> Tasks:
  """What is to be the same everywhere: `values`, a list of numbers each.

  Sources and exact predictors are computed as users do, with products in the
  default precision; networks in the highest one.
  """
  batch_size, length = sizes.compared_batch, sizes.compared_length
  tasks = {
    name: lambda job=job: _losses(job, sizes.compared_steps)
    for name, job in compared_networks(sizes).items()
  }
  job = timing.Job(
    kind='evaluation',
    kwargs={'hidden_size': 16},
    seq_length=length,
    num_sequences=batch_size,
  )
  tasks['evaluation'] = lambda: _regrets(job)
  depth = ptw_predictors.min_depth(length)
  # No segment of less than 20 symbols.
  hazards = np.where(np.arange(1, length + 1) < 20, 0, 0.05)
  optimal = {
    'KT': predictors.OptimalCategoricalPredictor(),
    'PTW': ptw_predictors.PTWPredictor(depth),
    'LAD': live_and_die_predictors.LADPredictor(),
    'Forget-Me-Not': forget_me_not_predictors.ForgetMeNotPredictor(depth),
    'minimum length 20': run_length_predictors.RunLengthPredictor(hazards),
  }
  tasks |= {
    name: lambda predictor=predictor: _code_lengths(
      predictor, batch_size, length
    )
    for name, predictor in optimal.items()
  }
  long = sizes.long_ptw
  tasks[f'PTW, T={long}'] = lambda: _code_lengths(
    ptw_predictors.PTWPredictor(ptw_predictors.min_depth(long)), 1, long
  )
  return tasks | {
    f'source {name}': lambda name=name: _sampled(name, batch_size, length)
    for name in sorted(constants.TRAJECTORY_GENERATORS)
  }


def compared_networks(sizes: Sizes) -> dict[str, timing.Job]:
  """Returns a job of every network, and of ensembles and recomputed states."""
  length = sizes.compared_length
  named = networks.networks(length, sizes.compared_layers)
  hidden = {'hidden_size': 64}
  named |= {
    'GRU-64': ('gru', hidden),
    'LSTM-64 between MLPs': (
      'lstm',
      {**hidden, 'before_mlp_layers': (32,), 'after_mlp_layers': (32,)},
    ),
    'Stack-LSTM, 2 stacks': (
      'stack_rnn',
      {**hidden, 'stack_cell_size': 8, 'n_stacks': 2, 'inner_core': 'lstm'},
    ),
    'CNN': ('cnn', {'hidden_layers_sizes': (64, 64, 64), 'kernel_size': 4}),
  }
  for name in ('LSTM-128', 'Transformer SIN_COS'):
    model_type, kwargs = named[name]
    named[f'{name}, gradient checkpointing'] = (
      model_type,
      {**kwargs, 'gradient_checkpointing': True},
    )
  jobs = {
    name: timing.Job(
      kind='project',
      model_type=model_type,
      kwargs=kwargs,
      batch_size=sizes.compared_batch,
      seq_length=length,
    )
    for name, (model_type, kwargs) in named.items()
  }
  for name in MEASURED:
    jobs[f'3 seeds of {name}'] = dataclasses.replace(jobs[name], seeds=3)
  return jobs


def _sampled(name: str, batch_size: int, seq_length: int) -> Row:
  generator = constants.build_data_generator(
    config_lib.DataConfig(
      trajectory_generator=name,
      trajectory_generator_kwargs=constants.source_kwargs(name),
    )
  )
  batch, parameters = jax.jit(
    lambda rng: generator.sample(rng, batch_size, seq_length)
  )(jax.random.key(0))
  return _values(
    [batch[..., -1].mean(axis=1), parameters[..., -1].mean(axis=1)]
  )


def _code_lengths(
  predictor: predictors.Predictor, batch_size: int, seq_length: int
) -> Row:
  """Nats per symbol of every sequence."""
  batch = jnp.asarray(exact.binary_batch(batch_size, seq_length))
  log_probs = np.asarray(exact.jit_unroll(predictor)(batch))
  own = (log_probs[:, :-1] * np.asarray(batch[:, 1:])).sum(axis=-1)
  return _values(-own.mean(axis=1, dtype=np.float64), tolerance=1e-5)


def _losses(job: timing.Job, num_steps: int) -> Row:
  """Loss of every step, nats per symbol."""
  config = project.make_config(job)
  # Dropout masks differ between microbatches and whole batches.
  config.train.microbatch_size = job.batch_size
  with jax.default_matmul_precision('highest'):
    run, _ = project.project_step(config, num_devices=1, steps=1)
    return _values([run().mean() for _ in range(num_steps)])


def _regrets(job: timing.Job) -> Row:
  """Regrets of an untrained network, PTW and LAD."""
  config = project.make_config(job)
  predictor = predictor_factories.build_predictor(
    config.model, networks.ALPHABET_SIZE
  )
  evaluator = evaluator_lib.build_evaluator(predictor, config.eval)
  symbols = jnp.zeros((1, job.seq_length, networks.ALPHABET_SIZE))
  with jax.default_matmul_precision('highest'):
    params = predictor.init_params(jax.random.key(0), symbols, None)
    regrets = evaluator.evaluate(params, jax.random.key(1), job.num_sequences)
  return _values([regrets[name] for name in sorted(regrets)])


def _values(arrays: Any, tolerance: float = 1e-3) -> Row:
  values = np.asarray(arrays, np.float64).ravel().tolist()
  return {'values': values, 'tolerance': tolerance}


def steps_tasks(sizes: Sizes) -> Tasks:
  """Training steps: what users run first, then more seeds and less precision.

  The peak memory of a row is that of the process, and so that of the largest
  number of seeds so far.
  """
  named = networks.networks(sizes.seq_length, sizes.num_layers)
  return {
    f'{network}, {seeds} seeds, {precision}': (
      lambda network=network, seeds=seeds, precision=precision: _steps(
        network, *named[network], seeds, precision, sizes
      )
    )
    for network in MEASURED
    for precision in sizes.precisions
    for seeds in sizes.seeds
  }


def _steps(
  network: str,
  model_type: str,
  kwargs: networks.Kwargs,
  seeds: int,
  precision: str,
  sizes: Sizes,
) -> Row:
  job = timing.Job(
    kind='project',
    model_type=model_type,
    kwargs=kwargs,
    batch_size=sizes.batch_size,
    seq_length=sizes.seq_length,
    seeds=seeds,
  )
  steps = max(2, sizes.steps // seeds)
  with jax.default_matmul_precision(precision):
    began = time.perf_counter()
    run, temp_bytes = project.project_step(
      project.make_config(job), num_devices=1, steps=steps
    )
    loss = float(run().mean())
    first_seconds = time.perf_counter() - began
    times = [seconds / steps for seconds in _seconds_of(run, sizes)]
  row = {**timing.spread(times, 1e3), 'unit': 'ms'}
  per_second = 1e3 / row['value']
  flops = networks.step_flops(
    model_type, kwargs, sizes.batch_size, sizes.seq_length
  )
  return row | {
    'network': network,
    'seeds': seeds,
    'precision': precision,
    'steps_per_second': per_second,
    'sequences_per_second': seeds * sizes.batch_size * per_second,
    'flops_per_second': seeds * flops * per_second,
    'first_call_seconds': first_seconds,
    'temp_bytes': temp_bytes,
    'peak_bytes': plain_jax.peak_device_bytes(),
    'first_loss': loss,
  }


def predictors_tasks(sizes: Sizes) -> Tasks:
  """Exact predictors on batches and on long sequences."""
  usual = (sizes.batch_size, sizes.seq_length)
  depth = ptw_predictors.min_depth(sizes.seq_length)
  long_depth = ptw_predictors.min_depth(sizes.long_ptw)
  lad = live_and_die_predictors.LADPredictor()
  # As an axis of `vmap`, a `lax.cond` inside of it becomes a `select`.
  both_branches = lambda batch: jax.vmap(
    lambda batch: lad.unroll({}, None, batch)[0]
  )(batch[None])[0]
  measured = {
    'KT': (predictors.OptimalCategoricalPredictor(), *usual),
    'PTW': (ptw_predictors.PTWPredictor(depth), *usual),
    'LAD': (lad, *usual),
    'LAD, no branches': (both_branches, *usual),
    'Forget-Me-Not': (
      forget_me_not_predictors.ForgetMeNotPredictor(depth),
      *usual,
    ),
    'PTW ': (ptw_predictors.PTWPredictor(long_depth), 1, sizes.long_ptw),
    'LAD ': (lad, 1, sizes.long_lad // 4),
    'LAD  ': (lad, 1, sizes.long_lad),
  }
  tasks = {
    f'{name.strip()}, B={batch_size}, T={length}': (
      lambda predictor=predictor, size=(batch_size, length): _unrolls(
        predictor, *size, sizes
      )
    )
    for name, (predictor, batch_size, length) in measured.items()
  }
  return tasks | {f'PTW, a stream of {sizes.stream}': lambda: _stream(sizes)}


def _unrolls(
  predictor: Any, batch_size: int, seq_length: int, sizes: Sizes
) -> Row:
  batch = jnp.asarray(exact.binary_batch(batch_size, seq_length))
  if isinstance(predictor, predictors.Predictor):
    unroll = exact.jit_unroll(predictor)
  else:
    unroll = jax.jit(predictor)
  began = time.perf_counter()
  compiled = unroll.lower(batch).compile()
  run = lambda: jax.block_until_ready(compiled(batch))
  run()
  first_seconds = time.perf_counter() - began
  row = timing.spread(_seconds_of(run, sizes), 1e3)
  return {
    'unit': 'ms',
    **row,
    'symbols_per_second': batch_size * seq_length / row['value'] * 1e3,
    'first_call_seconds': first_seconds,
    'temp_bytes': compiled.memory_analysis().temp_size_in_bytes,
  }


def _stream(sizes: Sizes) -> Row:
  row = next(exact.time_stream(exact.Sizes(long=sizes.stream)))
  seconds = row['value']
  return _quantity(1e3 * seconds, 'ms') | {
    'symbols_per_second': sizes.stream / seconds
  }


def _quantity(value: float, unit: str) -> Row:
  return {'value': value, 'unit': unit}


def _seconds_of(run: Callable[[], Any], sizes: Sizes) -> list[float]:
  """Seconds of each of three calls or more, after one that is not counted."""
  run()
  times, began = [], time.perf_counter()
  while len(times) < 3 or time.perf_counter() - began < sizes.seconds:
    start = time.perf_counter()
    run()
    times.append(time.perf_counter() - start)
  return times


# Functions of Sizes that return the tasks of a section.
TASKS = {
  'peak': peak_tasks,
  'agreement': agreement_tasks,
  'steps': steps_tasks,
  'predictors': predictors_tasks,
}
