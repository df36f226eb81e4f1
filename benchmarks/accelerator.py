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
what was measured. A row that fails says why, and the next one follows; the
command then ends with 1.
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
import numpy as np
import run as suite_run
import sections
import timing

from nonstationary_mbml.experiments import cli
from nonstationary_mbml.runtime import devices

_ROOT = pathlib.Path(__file__).parent.parent
# Sections in their order, and how they share the time that is left.
_WEIGHTS = {
  'peak': 1,
  'agreement': 6,
  'steps': 10,
  'predictors': 3,
  'scripts': 4,
}
# Seconds that a row may go on for after the time of its section.
_GRACE_SECONDS = 20
_ERROR_CHARACTERS = 600

Row = sections.Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
  """What a child process is to do.

  Attributes:
    section: A key of `sections.TASKS`.
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
  tasks = sections.TASKS[order.section](
    sections.QUICK if order.quick else sections.Sizes()
  )
  index, number = order.shard
  chosen = [
    name for name in tasks if re.search(order.only, f'{order.section}: {name}')
  ][index::number]
  if not chosen:
    return
  problem = devices.backend_problem()
  if problem is not None:
    sys.exit(f'error: {problem}')
  kind = jax.devices()[0].device_kind
  print(json.dumps({'device': kind}), flush=True)
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
  def sizes(self) -> sections.Sizes:
    """Sizes of all measurements."""
    return sections.QUICK if self.quick else sections.Sizes()

  def names(self, section: str) -> list[str]:
    """Names of the rows of a section that are asked for."""
    if section == 'scripts':
      names = list(script_commands(pathlib.Path(), self.sizes))
    else:
      names = list(sections.TASKS[section](self.sizes))
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
        row = json.loads(line) if line.startswith('{') else {}
        if 'name' in row:  # Some libraries greet.
          yield row
        elif row and platform == setting.platform:
          report.set_fields(**row)
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
    for network in sections.MEASURED
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
  if not np.isfinite(difference):
    error = f'the largest difference is {difference}'
    return {'name': name, 'error': error, 'agrees': False}
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


def script_commands(
  folder: pathlib.Path, sizes: sections.Sizes
) -> dict[str, list[str]]:
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
  asked = [section for section in _WEIGHTS if setting.names(section)]
  for index, section in enumerate(asked):
    now = time.time()
    weights = [_WEIGHTS[later] for later in asked[index:]]
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
  wrong = [*failures(results), *results['notes']]
  parts.append('\n'.join(f'- {line}' for line in wrong))
  return '\n\n'.join(part for part in parts if part)


def failures(results: dict[str, Any]) -> list[str]:
  """Returns a line for every row that failed, or does not agree.

  Args:
    results: Results, as in the JSON file.
  """
  lines = []
  for row in results['rows']:
    problem = row.get('error')
    if problem is None and not row.get('agrees', True):
      problem = f'differs by {row["difference"]:.1e}'
    if problem is not None:
      problem = ' '.join(problem.split())
      lines.append(f'{row["section"]}: {row["name"]}: {problem}')
  return lines


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
  if results['notes'] or failures(results):
    sys.exit(1)


if __name__ == '__main__':
  with cli.printing():
    main()
