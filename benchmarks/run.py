"""All benchmarks: a table, and results/benchmarks.json.

  python benchmarks/run.py
  python benchmarks/run.py --only='LSTM-128' --output=/tmp/lstm.json
  python benchmarks/run.py --markdown

Everything that is set beside something else is measured in the same run, in
turns, each side in a process of its own (timing.py):

  ours      as `make run` trains: the compiled loop, as many CPU devices as
            cores, memory in huge pages
  plain     plain_jax.py as a user would start it: one device, a Python loop of
            jitted steps, batches from the host
  pytorch   the same network in PyTorch, on all cores, where it is installed

Times are medians, with the least and the largest. On a GPU there are fewer
rows, and no sides that differ in CPU devices.
"""

import argparse
from collections.abc import Iterator
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
import time
from typing import Any

import networks
import suite
import timing

from nonstationary_mbml import base_config
from nonstationary_mbml.experiments import cli
from nonstationary_mbml.runtime import atomic_files

_ROOT = pathlib.Path(__file__).parent.parent
_OUTPUT = _ROOT / 'results' / 'benchmarks.json'
# Setting of the kernel for huge pages: madvise or always grants them.
_HUGE_PAGES = pathlib.Path('/sys/kernel/mm/transparent_hugepage/enabled')
_PACKAGES = ('jax', 'jaxlib', 'dm-haiku', 'optax', 'numpy', 'torch')
# Number of turns of groups that take seconds each.
_SLOW_REPEATS = 3

# Units of the columns that have targets; the others are bytes.
_UNITS = {'value': 'ms', 'share_of_peak': 'share', 'start_seconds': 's'}
# The target of a row of predictors_and_sources.py, if it is a number.
_GOAL = re.compile(r'([<>]=) ([0-9.e-]+)$')

Row = dict[str, Any]


def measure(group: suite.Group, repeats: int) -> tuple[list[Row], list[str]]:
  """Returns a row for every side, and notes on those left out.

  Args:
    group: Group of jobs whose sides take turns.
    repeats: Turns of each.
  """
  if group.is_slow:
    repeats = min(repeats, _SLOW_REPEATS)
  answers, failures = timing.take_turns(group.jobs, repeats)
  rows = []
  for side, answer in answers.items():
    job = group.jobs[side]
    steps = 1 if group.is_whole else job.steps
    times = timing.spread(answer['times'], scale=1e3 / steps)
    per_second = 1e3 / times['value']
    flops = _flops(job)
    flops = flops and flops / steps
    rows.append(
      {
        'part': group.part,
        'name': group.name,
        'side': side,
        'unit': 'ms',
        'steps_per_turn': job.steps,
        **times,
        'steps_per_second': per_second,
        'sequences_per_second': _num_sequences(job) / steps * per_second,
        'flops_per_step': flops,
        'temp_bytes': answer['temp_bytes'],
        'peak_bytes': answer['peak_bytes'],
        'devices': answer['devices'],
        'huge_pages': job.huge_pages,
        'first_loss': answer['first_loss'],
        'start_seconds': answer['start_seconds'],
      }
    )
  notes = [
    f'{group.part}: {group.name}, {side} left out: {why}'
    for side, why in failures.items()
  ]
  return rows, notes


def _num_sequences(job: timing.Job) -> int:
  """Number of sequences of a turn."""
  if job.kind == 'evaluation':
    return job.num_sequences
  return job.batch_size * job.steps * job.runs * job.seeds


def _flops(job: timing.Job) -> int | None:
  """Operations of a turn; None where it is more than training."""
  if job.kind == 'evaluation':
    return None
  num_steps = job.steps * job.runs * job.seeds
  return num_steps * networks.step_flops(
    job.model_type, job.kwargs, job.batch_size, job.seq_length
  )


def limits(sizes: suite.Sizes) -> dict[str, Any]:
  """Returns the peak throughput of matrix products and of memory."""
  jobs = {
    'matmul': timing.Job(kind='matmul', size=sizes.matmul_size),
    'copy': timing.Job(kind='copy', size=sizes.copy_size),
  }
  answers, failures = timing.take_turns(jobs, repeats=10)
  if failures:
    raise timing.ChildError('; '.join(failures.values()))
  seconds = {name: min(answer['times']) for name, answer in answers.items()}
  return {
    'device': answers['matmul']['device'],
    'matmul_size': sizes.matmul_size,
    'matmul_peak_gflops': 2 * sizes.matmul_size**3 / seconds['matmul'] / 1e9,
    # Read and written once, in float32.
    'bandwidth_gbytes': 2 * 4 * sizes.copy_size / seconds['copy'] / 1e9,
  }


def set_shares(results: dict[str, Any], found: dict[str, Any]) -> None:
  """Keeps the best limits so far, and sets each row's share of the peak.

  The machine is not always at its best, so they are measured more than once.
  """
  about = results['machine']
  for name in ('matmul_peak_gflops', 'bandwidth_gbytes'):
    about[name] = max(about[name], found[name])
  for row in results['rows']:
    if row.get('flops_per_step'):
      flops_per_second = row['flops_per_step'] * row['steps_per_second']
      row['share_of_peak'] = (
        flops_per_second / 1e9 / about['matmul_peak_gflops']
      )


def machine() -> dict[str, Any]:
  """Returns versions and processor."""
  versions = {'python': platform.python_version()}
  for package in _PACKAGES:
    try:
      versions[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      versions[package] = None
  return {
    'versions': versions,
    'cpu': _cpu_model(),
    'cores': os.cpu_count(),
    'huge_pages': _HUGE_PAGES.read_text().strip()
    if _HUGE_PAGES.exists()
    else None,
  }


def _cpu_model() -> str:
  info = pathlib.Path('/proc/cpuinfo')
  names = re.findall(
    r'^model name\s*: (.*)$', info.read_text() if info.exists() else '', re.M
  )
  return names[0] if names else platform.processor()


def reached(rows: list[Row], sizes: suite.Sizes) -> list[Row]:
  """Returns the table of what is to be reached, as far as there are rows."""
  by_key = {(row['part'], row['name'], row.get('side')): row for row in rows}
  table = []
  for target in suite.targets(sizes):
    sides = [target.ours, *([target.against] if target.against else [])]
    keys = [(target.part, target.group, side) for side in sides]
    if any(key not in by_key for key in keys):
      continue
    ours, *others = [by_key[key][target.field] for key in keys]
    against = others[0] if others else None
    if target.at_least is not None:
      value = ours if against is None else against / ours
      wanted, is_reached = f'>= {target.at_least}', value >= target.at_least
    else:
      value = ours if against is None else ours / against
      wanted, is_reached = f'<= {target.at_most}', value <= target.at_most
    table.append(
      {
        'name': target.name,
        'unit': _UNITS.get(target.field, 'bytes'),
        'ours': ours,
        'against': against,
        'ratio': None if against is None else value,
        'target': wanted,
        'reached': is_reached,
      }
    )
  return table + [
    _goal_of_row(row) for row in rows if _GOAL.match(row.get('target', ''))
  ]


def _goal_of_row(row: Row) -> Row:
  """Returns the line of a row that has its own target."""
  sign, bound = _GOAL.match(row['target']).groups()
  value, is_ratio = row['value'], not row['unit']
  is_reached = value >= float(bound) if sign == '>=' else value <= float(bound)
  return {
    'name': f'{row["part"]}: {row["name"]}',
    'unit': row['unit'],
    'ours': None if is_ratio else value,
    'against': None,
    'ratio': value if is_ratio else None,
    'target': row['target'],
    'reached': is_reached,
  }


def markdown(results: dict[str, Any]) -> str:
  """Returns the table of targets.

  Args:
    results: Results, as in the JSON file.
  """
  lines = [
    '| what | ours | against | ratio | to reach | reached |',
    '|---|---|---|---|---|---|',
  ]
  for row in results['to_reach']:
    ours, against, ratio = row['ours'], row['against'], row['ratio']
    cells = (
      row['name'],
      '' if ours is None else _quantity(ours, row['unit']),
      '' if against is None else _quantity(against, row['unit']),
      '' if ratio is None else f'{ratio:.3g}',
      row['target'],
      'yes' if row['reached'] else 'no',
    )
    lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join(lines)


def training_markdown(results: dict[str, Any]) -> str:
  """Returns the table of training steps, ours beside the others.

  Args:
    results: Results, as in the JSON file.
  """
  lines = [
    '| network | step (ms) | sequences / s | share of peak | temporary memory '
    '| plain JAX | PyTorch |',
    '|---|---|---|---|---|---|---|',
  ]
  sides: dict[str, dict[str, Row]] = {}
  for row in results['rows']:
    if row['part'] == 'training':
      sides.setdefault(row['name'], {})[row['side']] = row
  for name, rows in sides.items():
    if 'ours' not in rows:
      continue  # Left out: the notes say why.
    ours = rows['ours']
    cells = [
      name,
      f'{ours["value"]:.4g} ({ours["min"]:.4g} to {ours["max"]:.4g})',
      f'{ours["sequences_per_second"]:.0f}',
      f'{ours["share_of_peak"]:.0%}',
      _quantity(ours['temp_bytes'], 'bytes'),
    ]
    for side in ('plain', 'pytorch'):
      other = rows.get(side)
      cells.append(
        f'{other["value"] / ours["value"]:.1f} times' if other else ''
      )
    lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join(lines)


def _quantity(value: float, unit: str) -> str:
  if unit == 'share':
    return f'{value:.0%}'
  if unit == 'bytes':
    return f'{value / 2**20:.0f} MiB'
  if unit == 'ms' and value >= 1e4:
    return f'{value / 1e3:.1f} s'
  return f'{value:.4g} {unit}'.strip()


def print_rows(rows: list[Row]) -> None:
  """Prints rows of training, each compared with ours if it is there."""
  ours = [row['value'] for row in rows if row['side'] == 'ours']
  for row in rows:
    ratio = f'x {row["value"] / ours[0]:.2f}' if ours else ''
    share, temporary = row.get('share_of_peak'), row['temp_bytes']
    print(
      f'  {row["side"]:<30} {row["value"]:>9.2f} ms'
      f' ({row["min"]:.2f}..{row["max"]:.2f})'
      f' {row["steps_per_second"]:>9.2f}/s'
      f' {row["sequences_per_second"]:>8.0f} seq/s'
      f' {row["peak_bytes"] / 2**20:>7.0f} MiB'
      f' temp {"-" if temporary is None else f"{temporary / 2**20:.0f}":>5} MiB'
      f' {"" if share is None else f"{share:.1%} of peak":>14}'
      f'  {ratio}',
      flush=True,
    )


def import_rows(repeats: int) -> list[Row]:
  """Returns how long imports take in new processes: JAX's alone, and ours."""
  code = (
    'import time; start = time.perf_counter(); import {}; '
    'print(time.perf_counter() - start)'
  )
  targets = {'jax': '', 'nonstationary_mbml.train': '<= 1'}
  times = {name: [] for name in targets}
  for _ in range(repeats + 1):
    for name in targets:
      command = [sys.executable, '-c', code.format(name)]
      times[name].append(float(subprocess.check_output(command, text=True)))
  return [
    {
      'part': 'start',
      'name': f'import of {name}',
      'unit': 's',
      # The first one reads files that nobody has read for a while.
      **timing.spread(times[name][1:]),
      'target': target,
    }
    for name, target in targets.items()
  ]


def exact_rows(only: str, is_quick: bool) -> Iterator[Row]:
  """Returns the rows of predictors_and_sources.py, as they come."""
  script = pathlib.Path(__file__).parent / 'predictors_and_sources.py'
  command = [sys.executable, str(script), '--json', f'--only={only}']
  if is_quick:
    command.append('--quick')
  with subprocess.Popen(
    command,
    env=timing.environment(huge_pages=False),
    stdout=subprocess.PIPE,
    text=True,
  ) as process:
    for line in process.stdout:
      yield json.loads(line)
  if process.returncode:
    raise timing.ChildError(f'{script.name} ended with {process.returncode}')


def continued(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
  """Returns old results, to be continued; new limits count if they are better.

  Args:
    old: Results, as in the JSON file.
    new: Results of the run that begins, without rows.

  Raises:
    ValueError: If they are of another machine, or of other versions or sizes.
  """
  same = ('quick', 'sizes')
  about = ('versions', 'cpu', 'cores')
  differences = base_config.differences(
    {name: old[name] for name in same}
    | {name: old['machine'][name] for name in about},
    {name: new[name] for name in same}
    | {name: new['machine'][name] for name in about},
  )
  if differences:
    raise ValueError(
      f'what is there was measured otherwise ({"; ".join(differences)}); '
      'choose another --output'
    )
  set_shares(old, new['machine'])
  return old


def add_rows(results: dict[str, Any], rows: list[Row]) -> None:
  """Adds rows, in place of those of the same name."""
  key = lambda row: (row.get('part'), row['name'], row.get('side'))
  merged = {key(row): row for row in results['rows']}
  merged |= {key(row): row for row in rows}
  results['rows'] = list(merged.values())


def write(path: pathlib.Path | None, results: dict[str, Any]) -> None:
  """Writes the results, unless there is no path."""
  if path is not None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = atomic_files.to_json(results, indent=1) + '\n'
    atomic_files.write_whole(path, content.encode())


def run(
  only: str, is_quick: bool, repeats: int, output: pathlib.Path | None
) -> None:
  """Runs the suite; writes what there is after every group.

  Args:
    only: A pattern that `part: name` of a group has to match.
    is_quick: At tiny sizes, to see that everything works.
    repeats: Turns of each side; 3 at most for what is slow.
    output: File to write to; None writes nothing.
  """
  start = time.perf_counter()
  sizes = suite.QUICK if is_quick else suite.Sizes()
  results = {
    'commands': [],
    'quick': is_quick,
    'machine': {**machine(), **limits(sizes)},
    # In the form in which it is read back.
    'sizes': json.loads(json.dumps(dataclasses.asdict(sizes))),
    'to_reach': [],
    'rows': [],
    'notes': [],
    'seconds': 0,
  }
  if only and output is not None and output.exists():
    results = continued(json.loads(output.read_text()), results)
  results['commands'].append(shlex.join(['python', *sys.argv]))
  about = results['machine']
  is_cpu = about['device'] == 'cpu'
  groups = suite.cpu_groups if is_cpu else suite.gpu_groups
  print(
    f'{about["cpu"]}, {about["cores"]} cores, {about["device"]}; matrix '
    f'products at {about["matmul_peak_gflops"]:.0f} GFLOP/s, memory at '
    f'{about["bandwidth_gbytes"]:.0f} GB/s'
  )
  for group in groups(sizes):
    if not re.search(only, f'{group.part}: {group.name}'):
      continue
    print(f'\n{group.part}: {group.name}', flush=True)
    rows, notes = measure(group, repeats)
    add_rows(results, rows)
    results['notes'] += notes
    set_shares(results, about)
    print_rows(rows)
    for note in notes:
      print(f'  {note}')
    results['to_reach'] = reached(results['rows'], sizes)
    write(output, results)
  set_shares(results, limits(sizes))
  if re.search(only, 'start: import'):
    print('\nstart: import')
    rows = import_rows(repeats)
    add_rows(results, rows)
    for row in rows:
      print(f'  {timing.format_row(row)}', flush=True)
  if is_cpu:
    print('\nexact predictors and sources, on one device')
    try:
      for row in exact_rows(only, is_quick):
        print(f'  {timing.format_row(row)}', flush=True)
        add_rows(results, [row])
        write(output, results)
    except timing.ChildError as error:
      results['notes'].append(str(error))
      print(f'  {error}')
  seconds = time.perf_counter() - start
  results['seconds'] += seconds
  results['to_reach'] = reached(results['rows'], sizes)
  # Printed before it is written, which may fail.
  print(f'\n{seconds / 60:.1f} minutes\n\n{markdown(results)}')
  write(output, results)


def pattern(text: str) -> str:
  """Returns a regular expression, or tells argparse why it is none."""
  try:
    re.compile(text)
  except re.error as error:
    raise argparse.ArgumentTypeError(f'{text!r}: {error}') from error
  return text


def main() -> None:
  """Reads the command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--output',
    type=pathlib.Path,
    help='results/benchmarks.json if unset; nothing is written if unset with '
    '--quick or --only. With --only, rows that are there are replaced, and the '
    'others kept.',
  )
  parser.add_argument(
    '--only',
    type=pattern,
    default='',
    help='Pattern (a regular expression) of what to run.',
  )
  parser.add_argument('--quick', action='store_true', help='At tiny sizes.')
  parser.add_argument(
    '--repeats', type=int, default=5, help='Repetitions of each timing.'
  )
  parser.add_argument(
    '--markdown',
    action='store_true',
    help='Print tables of what is there already; measure nothing.',
  )
  args = parser.parse_args()
  if args.repeats < 1:
    parser.error(f'--repeats is {args.repeats}; it must be at least 1')
  output = args.output
  if args.markdown:
    results = json.loads((output or _OUTPUT).read_text())
    print(f'{markdown(results)}\n\n{training_markdown(results)}')
    return
  if output is None and not (args.quick or args.only):
    output = _OUTPUT
  try:
    run(args.only, args.quick, args.repeats, output)
  except (OSError, ValueError) as error:
    cli.end_with(error)


if __name__ == '__main__':
  with cli.printing():
    main()
