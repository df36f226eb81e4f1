"""The project on an accelerator: what agrees with a CPU, and how fast it is.

  python benchmarks/accelerator.py --output=results/accelerator.json
  python benchmarks/accelerator.py --only='steps: LSTM' --output=/tmp/lstm.json
  python benchmarks/accelerator.py --markdown results/accelerator.json

In eight minutes at most (`--budget_s`), in this order:

  peak        products of large matrices, and memory
  agreement   sources, exact predictors, and 50 training steps of every network,
              there and on the CPU of the same machine
  steps       training steps per second: sizes, seeds and precisions of products
  predictors  symbols per second of the exact predictors
  scripts     the launch and the evaluation script, from end to end

The platform of a process is settled when it starts, so all work is done by
child processes. The file is written after every row: what is cut short leaves
what was measured. A row that fails says why, and the next one follows.
"""

import argparse
from collections.abc import Callable
from collections.abc import Iterator
from concurrent import futures
import dataclasses
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import networks
import numpy as np
import plain_jax
import predictors_and_sources as exact
import project
import run as suite_run
import timing

from nonstationary_mbml import predictor_factories
from nonstationary_mbml import predictors
from nonstationary_mbml.experiments import cli
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments import evaluator as evaluator_lib
from nonstationary_mbml.experiments import forget_me_not_predictors
from nonstationary_mbml.experiments import live_and_die_predictors
from nonstationary_mbml.experiments import ptw_predictors
from nonstationary_mbml.experiments import run_length_predictors

_ROOT = pathlib.Path(__file__).parent.parent
# Sections in their order, and how they share the time that is left.
_WEIGHTS = {
  'peak': 1,
  'agreement': 6,
  'steps': 10,
  'predictors': 3,
  'scripts': 4,
}
_MEASURED = ('LSTM-128', 'Stack-RNN', 'Transformer SIN_COS')
# Seconds that a row may go on for after the time of its section.
_GRACE_SECONDS = 20
_ERROR_CHARACTERS = 600

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
    for name, job in _compared_networks(sizes).items()
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


def _compared_networks(sizes: Sizes) -> dict[str, timing.Job]:
  """A job of every network, of ensembles, and of what recomputes states."""
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
  for name in _MEASURED:
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
    for network in _MEASURED
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


# Not that of `scripts`, whose children are the scripts.
TASKS = {
  'peak': peak_tasks,
  'agreement': agreement_tasks,
  'steps': steps_tasks,
  'predictors': predictors_tasks,
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
  """What a child process is to do.

  Attributes:
    section: A key of TASKS.
    only: Pattern that `section: name` of a row has to match.
    quick: Whether all is tiny.
    deadline: Time (of the clock) after which no row is begun.
    shard: Index of the child among those that share the rows, and their number.
    cores: Cores to compute on; none is all of them.
  """

  section: str
  only: str
  quick: bool
  deadline: float
  shard: tuple[int, int] = (0, 1)
  cores: tuple[int, ...] = ()


def child(order: Order) -> None:
  """Prints a row of JSON for every task."""
  if order.cores:
    os.sched_setaffinity(0, order.cores)
  tasks = TASKS[order.section](QUICK if order.quick else Sizes())
  index, number = order.shard
  chosen = [
    name for name in tasks if re.search(order.only, f'{order.section}: {name}')
  ][index::number]
  if not chosen:
    return
  device = jax.devices()[0]
  print(json.dumps({'device': device.device_kind}), flush=True)
  for name in chosen:
    began = time.time()
    if began > order.deadline:
      row = {'error': 'left out: no time was left'}
    else:
      row = guarded(tasks[name])
    row = {'name': name, **row, 'seconds': time.time() - began}
    print(json.dumps(row), flush=True)
    jax.clear_caches()


def guarded(task: Callable[[], Row]) -> Row:
  """Returns the row of a task, or why there is none."""
  try:
    return task()
  except Exception as error:
    traceback.print_exc()
    return {
      'error': f'{type(error).__name__}: {error}'.strip()[:_ERROR_CHARACTERS]
    }


class Report:
  """The results so far, on disk after every row."""

  def __init__(self, path: pathlib.Path | None, about: dict[str, Any]):
    """Writes the first version."""
    self._path = path
    self._lock = threading.Lock()
    self.results = {**about, 'complete': False, 'notes': [], 'rows': []}
    self._write()

  def add(self, section: str, row: Row) -> None:
    """Adds a row, and says so."""
    with self._lock:
      self.results['rows'].append({'section': section, **row})
      self._write()
    shown = row.get('error') or ', '.join(
      f'{key} {value:.4g}'
      for key, value in row.items()
      if isinstance(value, float)
    )
    _say(f'{section}: {row["name"]}: {shown}')

  def note(self, text: str) -> None:
    """Adds a note."""
    with self._lock:
      self.results['notes'].append(text)
      self._write()
    _say(text)

  def set_fields(self, **fields: Any) -> None:
    """Sets fields of the results."""
    with self._lock:
      self.results |= fields
      self._write()

  def _write(self) -> None:
    suite_run.write(self._path, self.results)


def _say(text: str) -> None:
  print(f'{time.strftime("%H:%M:%S")} {text}', file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
  """What is measured, and where.

  Attributes:
    platform: Platform of JAX.
    only: Pattern that `section: name` of a row has to match.
    quick: Whether all is tiny.
  """

  platform: str
  only: str
  quick: bool

  @property
  def sizes(self) -> Sizes:
    """Sizes of all measurements."""
    return QUICK if self.quick else Sizes()

  def names(self, section: str) -> list[str]:
    """Names of the rows of a section that are asked for."""
    if section == 'scripts':
      names = list(script_commands(pathlib.Path(), self.sizes))
    else:
      names = list(TASKS[section](self.sizes))
    return [
      name for name in names if re.search(self.only, f'{section}: {name}')
    ]


def rows_of(
  setting: Setting, platform: str, report: Report, **fields: Any
) -> Iterator[Row]:
  """Yields the rows of a child process, as they come; notes how it ended.

  Args:
    setting: What is measured.
    platform: Platform of the child.
    report: Where notes go.
    **fields: Fields of its Order.
  """
  order = Order(**{'only': setting.only, 'quick': setting.quick, **fields})
  with subprocess.Popen(
    [
      sys.executable,
      __file__,
      '--child',
      json.dumps(dataclasses.asdict(order)),
    ],
    env={**timing.environment(huge_pages=False), 'JAX_PLATFORMS': platform},
    stdout=subprocess.PIPE,
    text=True,
  ) as process:
    seconds = max(0.0, order.deadline - time.time()) + _GRACE_SECONDS
    killer = threading.Timer(seconds, process.kill)
    killer.start()
    try:
      for line in process.stdout:
        if line.startswith('{'):  # Some libraries greet.
          yield json.loads(line)
    finally:
      killer.cancel()
  if process.returncode:
    report.note(
      f'{order.section} on {platform} ended with {process.returncode}'
      + (', at its time limit' if time.time() > order.deadline else '')
    )


def run_simple(
  setting: Setting, report: Report, section: str, deadline: float
) -> None:
  """Measures a section in one process."""
  for row in rows_of(
    setting, setting.platform, report, section=section, deadline=deadline
  ):
    if 'device' in row:
      report.set_fields(**row)
    else:
      report.add(section, row)


def run_steps(
  setting: Setting, report: Report, section: str, deadline: float
) -> None:
  """Measures training steps, each network in a process of its own."""
  peaks = {
    row['name']: row['value'] * 1e12
    for row in report.results['rows']
    if row['section'] == 'peak' and row.get('unit') == 'TFLOP/s'
  }
  names = setting.names(section)
  asked = [
    network
    for network in _MEASURED
    if any(name.startswith(network) for name in names)
  ]
  for index, network in enumerate(asked):
    now = time.time()
    for row in rows_of(
      setting,
      setting.platform,
      report,
      section=section,
      deadline=now + (deadline - now) / (len(asked) - index),
      # Those of the network that were asked for.
      only='|'.join(
        f'^{section}: {re.escape(name)}$'
        for name in names
        if name.startswith(network)
      ),
    ):
      if 'device' in row:
        continue
      if row.get('precision') in peaks:
        row['share_of_peak'] = row['flops_per_second'] / peaks[row['precision']]
      report.add(section, row)


def run_agreement(
  setting: Setting, report: Report, section: str, deadline: float
) -> None:
  """Computes the same on the accelerator and on some cores of the CPU."""
  cores = sorted(os.sched_getaffinity(0))
  # Most of the time is compiling. Processes can share a GPU, but not a TPU.
  num_cpu = 3 if len(cores) >= 8 else 1
  num_ours = 1 if setting.platform == 'tpu' else num_cpu
  share = len(cores) // (2 * num_cpu)
  found: dict[str, dict[str, Row]] = {}
  lock = threading.Lock()

  def collect(side: str, platform: str, **fields: Any) -> None:
    for row in rows_of(
      setting, platform, report, section=section, deadline=deadline, **fields
    ):
      if 'device' in row:
        continue
      with lock:
        sides = found.setdefault(row['name'], {})
        sides[side] = row
        is_whole = len(sides) == 2
      if is_whole:
        report.add(section, compared(row['name'], sides))

  with futures.ThreadPoolExecutor(num_ours + num_cpu) as pool:
    jobs = [
      pool.submit(
        collect, 'accelerator', setting.platform, shard=(shard, num_ours)
      )
      for shard in range(num_ours)
    ]
    jobs += [
      pool.submit(
        collect,
        'cpu',
        'cpu',
        shard=(shard, num_cpu),
        cores=tuple(cores[shard * share : (shard + 1) * share]),
      )
      for shard in range(num_cpu)
    ]
    for job in jobs:
      job.result()
  for name in setting.names(section):
    sides = found.get(name, {})
    if len(sides) < 2:
      report.add(section, compared(name, sides))


def compared(name: str, sides: dict[str, Row]) -> Row:
  """Returns how far two sides differ.

  Args:
    name: Name of the row.
    sides: Rows with `values` and `tolerance`, by `accelerator` and `cpu`.
  """
  for side in ('accelerator', 'cpu'):
    if 'values' not in sides.get(side, {}):
      reason = sides.get(side, {}).get('error', 'it did not get that far')
      return {'name': name, 'error': f'{side}: {reason}', 'agrees': False}
  ours, cpu = (
    np.asarray(sides[side]['values']) for side in ('accelerator', 'cpu')
  )
  difference = float(np.max(np.abs(ours - cpu)))
  tolerance = sides['cpu']['tolerance']
  return {
    'name': name,
    'difference': difference,
    'tolerance': tolerance,
    'last': [float(ours[-1]), float(cpu[-1])],
    'number': len(ours),
    'agrees': difference <= tolerance,
    'seconds': sides['accelerator']['seconds'],
    'cpu_seconds': sides['cpu']['seconds'],
  }


def script_commands(folder: pathlib.Path, sizes: Sizes) -> dict[str, list[str]]:
  """Returns the script and the arguments of each command, by its name."""
  lstm = folder / 'lstm'
  launch = [
    'local_launch.py',
    *sizes.launch_flags,
    f'--output_dir={folder}',
    f'--num_sequences={sizes.num_sequences}',
  ]
  return {
    'launch of an LSTM': [*launch, '--name=lstm'],
    'the same again': [*launch, '--name=lstm'],
    'evaluation at another length': [
      'evaluate.py',
      str(lstm),
      '--seq_length=64',
      f'--num_sequences={sizes.num_sequences}',
    ],
    'launch of 4 Transformers': [
      *launch,
      '--model_type=transformer',
      '--num_seeds=4',
      '--source=lin',
      '--name=transformers',
    ],
  }


def run_scripts(
  setting: Setting, report: Report, section: str, deadline: float
) -> None:
  """Runs the scripts as a user would, with an empty cache of programs."""
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    commands = script_commands(folder, setting.sizes)
    for title in setting.names(section):
      row = {'name': title}
      if time.time() > deadline:
        report.add(section, row | {'error': 'left out: no time was left'})
        continue
      script, *arguments = commands[title]
      row |= guarded(
        lambda script=script, arguments=arguments: _script(
          setting, folder, [f'experiments/{script}', *arguments], deadline
        )
      )
      report.add(section, row)


def _script(
  setting: Setting,
  folder: pathlib.Path,
  command: list[str],
  deadline: float,
) -> Row:
  began = time.time()
  done = subprocess.run(
    [sys.executable, str(_ROOT / command[0]), *command[1:]],
    env={
      **timing.environment(huge_pages=False),
      'JAX_PLATFORMS': setting.platform,
      'XDG_CACHE_HOME': str(folder / 'cache'),
    },
    cwd=folder,
    capture_output=True,
    text=True,
    timeout=max(0.0, deadline - began) + _GRACE_SECONDS,
  )
  row = {
    'command': shlex.join(command).replace(str(folder), 'runs'),
    'exit_code': done.returncode,
    'seconds': time.time() - began,
    'output': done.stdout[-3000:].replace(str(folder), 'runs').splitlines(),
  }
  if done.returncode:
    row['error'] = done.stderr[-_ERROR_CHARACTERS:]
  return row


_RUN = {
  'peak': run_simple,
  'agreement': run_agreement,
  'steps': run_steps,
  'predictors': run_simple,
  'scripts': run_scripts,
}


def measure(
  setting: Setting, output: pathlib.Path | None, budget_s: float
) -> dict[str, Any]:
  """Measures section after section, and returns all results.

  Args:
    setting: What is measured, and where.
    output: File to write to; None writes nothing.
    budget_s: Seconds after which nothing is begun.
  """
  # This process computes nothing: the accelerator is for its children.
  jax.config.update('jax_platforms', 'cpu')
  began = time.time()
  about = {
    'command': shlex.join(['python', *sys.argv]),
    'platform': setting.platform,
    'quick': setting.quick,
    'machine': {**suite_run.machine(), 'gpu': _nvidia_smi()},
    'sizes': dataclasses.asdict(setting.sizes),
  }
  report = Report(output, about)
  sections = [section for section in _WEIGHTS if setting.names(section)]
  for index, section in enumerate(sections):
    now = time.time()
    weights = [_WEIGHTS[later] for later in sections[index:]]
    left = began + budget_s - now
    _say(f'{section}: {left * weights[0] / sum(weights):.0f} s')
    try:
      _RUN[section](
        setting, report, section, now + left * weights[0] / sum(weights)
      )
    except Exception as error:
      traceback.print_exc()
      report.note(f'{section}: {type(error).__name__}: {error}')
    report.set_fields(seconds=time.time() - began)
  report.set_fields(complete=True)
  return report.results


def _nvidia_smi() -> str | None:
  """Name, driver and memory of the GPU."""
  try:
    return subprocess.run(
      [
        'nvidia-smi',
        '--query-gpu=name,driver_version,memory.total,power.limit',
        '--format=csv,noheader',
      ],
      capture_output=True,
      text=True,
      timeout=20,
      check=True,
    ).stdout.strip()
  except (OSError, subprocess.SubprocessError):
    return None


def markdown(results: dict[str, Any]) -> str:
  """Returns the tables of results.

  Args:
    results: Results, as in the JSON file.
  """
  rows = {section: [] for section in _WEIGHTS}
  for row in results['rows']:
    rows[row['section']].append(row)
  versions = results['machine']['versions']
  about = results['machine']['gpu'] or results.get('device', 'unknown device')
  parts = [
    f'{about}; jax {versions["jax"]}, Python {versions["python"]}; '
    f'{results["machine"]["cores"]} CPU cores'
  ]
  for section, columns in _TABLES.items():
    if rows[section]:
      parts.append(_table(columns, rows[section]))
  failed = [
    f'- {row["section"]}: {row["name"]}: {" ".join(row["error"].split())}'
    for row in results['rows']
    if 'error' in row
  ]
  parts.append('\n'.join([*failed, *(f'- {n}' for n in results['notes'])]))
  return '\n\n'.join(part for part in parts if part)


def _table(columns: dict[str, Callable[[Row], str]], rows: list[Row]) -> str:
  """A table of those rows that did not fail."""
  lines = [f'| {" | ".join(columns)} |', '|---' * len(columns) + '|']
  for row in rows:
    if 'error' not in row:
      cells = (cell(row) for cell in columns.values())
      lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join(lines)


def _mebibytes(row: Row, field: str) -> str:
  value = row.get(field)
  return '' if value is None else f'{value / 2**20:,.0f} MiB'


_TABLES: dict[str, dict[str, Callable[[Row], str]]] = {
  'peak': {
    'products of matrices, and memory': lambda row: row['name'],
    'at best': lambda row: f'{row["value"]:.4g} {row["unit"]}',
  },
  'agreement': {
    'on the accelerator and on the CPU': lambda row: row['name'],
    'largest difference': lambda row: f'{row["difference"]:.1e}',
    'allowed': lambda row: f'{row["tolerance"]:g}',
    'agrees': lambda row: 'yes' if row['agrees'] else 'no',
  },
  'steps': {
    'network': lambda row: row['network'],
    'seeds': lambda row: str(row['seeds']),
    'products': lambda row: row['precision'],
    'step (ms)': lambda row: (
      f'{row["value"]:.4g} ({row["min"]:.4g} to {row["max"]:.4g})'
    ),
    'steps / s': lambda row: f'{row["steps_per_second"]:.4g}',
    'sequences / s': lambda row: f'{row["sequences_per_second"]:,.0f}',
    'share of peak': lambda row: (
      f'{row["share_of_peak"]:.1%}' if 'share_of_peak' in row else ''
    ),
    'temporary memory': lambda row: _mebibytes(row, 'temp_bytes'),
    'peak memory': lambda row: _mebibytes(row, 'peak_bytes'),
    'first call': lambda row: f'{row["first_call_seconds"]:.0f} s',
  },
  'predictors': {
    'exact predictor': lambda row: row['name'],
    'time (ms)': lambda row: f'{row["value"]:.4g}',
    'symbols / s': lambda row: f'{row["symbols_per_second"]:.3g}',
    'temporary memory': lambda row: _mebibytes(row, 'temp_bytes'),
  },
  'scripts': {
    'script': lambda row: row['name'],
    'exit code': lambda row: str(row['exit_code']),
    'time': lambda row: f'{row["seconds"]:.0f} s',
  },
}


def main() -> None:
  """Reads the command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--output', type=pathlib.Path, help='File of the results, JSON.'
  )
  parser.add_argument(
    '--only',
    type=suite_run.pattern,
    default='',
    help='Pattern (a regular expression) that `section: name` has to match.',
  )
  parser.add_argument(
    '--platform',
    default='cuda',
    choices=('cuda', 'rocm', 'tpu', 'cpu'),
    help='Platform of JAX.',
  )
  parser.add_argument(
    '--budget_s',
    type=float,
    default=440,
    help='Seconds after which nothing is begun.',
  )
  parser.add_argument('--quick', action='store_true', help='At tiny sizes.')
  parser.add_argument(
    '--markdown',
    type=pathlib.Path,
    metavar='FILE',
    help='Print tables of results that are there; measure nothing.',
  )
  parser.add_argument('--child', type=json.loads, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.child is not None:
    child(Order(**args.child))
    return
  try:
    if args.markdown is not None:
      print(markdown(json.loads(args.markdown.read_text())))
      return
    setting = Setting(platform=args.platform, only=args.only, quick=args.quick)
    results = measure(setting, args.output, args.budget_s)
  except (OSError, ValueError) as error:
    cli.end_with(error)
  print(json.dumps(results) if args.output is None else markdown(results))


if __name__ == '__main__':
  with cli.printing():
    main()
