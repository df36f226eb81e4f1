"""Speed-up by more devices and more processes, and the cost of a grid.

  python benchmarks/scaling.py
  python benchmarks/scaling.py --markdown
  python benchmarks/scaling.py --plan results/benchmarks.json
  python benchmarks/scaling.py --plan gpu.json --machines 8 40
  python benchmarks/scaling.py --reckon 10 40 --machines 1 8 20

The first measures: the same work on one device, on several CPU devices of one
process, and on as many processes with one each, in turns. It writes
results/scaling.json. --markdown prints that as a table.

--plan reckons, from the step times that benchmarks/run.py has written on some
machine, how long a grid of the paper's size would take on so many like it.
A machine trains one network at a time, on all of its devices.

--reckon does so for an accelerator that nobody has measured, from what its
products reach (TFLOP/s) and what a step over time costs a recurrent network,
forwards and backwards, however small it is (microseconds). One accelerator
trains all seeds of a source and an architecture together.
"""

import argparse
from collections.abc import Mapping
from collections.abc import Sequence
import os
import pathlib
import platform
import sys
import time
from typing import Any

import jax
import networks
import timing

from nonstationary_mbml import base_config
from nonstationary_mbml.experiments import cli
from nonstationary_mbml.runtime import atomic_files

_OUTPUT = pathlib.Path(__file__).parent.parent / 'results' / 'scaling.json'
_REPEATS = 7
_ONE = '1 device'
_SIDES = {
  _ONE: {'num_devices': 1},
  **{f'{n} devices': {'num_devices': n} for n in (2, 4, 8)},
  **{f'{n} processes': {'num_devices': 1, 'num_processes': n} for n in (2, 4)},
}
# The work of each side: the same, however many processes share it.
_WORK = {
  'LSTM-128, T=256, a batch of 128': {
    'hidden_size': 128,
    'steps': 5,
  },
  'LSTM-64, T=32, a batch of 128': {
    'hidden_size': 64,
    'seq_length': 32,
    'steps': 100,
  },
  '8 seeds of LSTM-64, T=32': {
    'hidden_size': 64,
    'seq_length': 32,
    'steps': 20,
    'seeds': 8,
  },
  'evaluation of LSTM-128 beside PTW and LAD, T=256': {
    'kind': 'evaluation',
    'hidden_size': 128,
    'num_sequences': 1024,
  },
}

# A grid of the size of the paper's: its four kinds of source and ten seeds; the
# number of steps and the networks are ours.
_SOURCES = 4
_SEEDS = 10
_STEPS = 500_000
_ARCHITECTURES = (
  'RNN-128, T=256',
  'LSTM-128, T=256',
  'Stack-RNN, T=256',
  'Transformer SIN_COS, T=256',
  'Transformer in windows, T=256',
)


def job(work: Mapping[str, Any], side: Mapping[str, Any]) -> timing.Job:
  """Returns the job of a side."""
  settings = {'kind': 'project', **work, **side}
  _, kwargs = networks.lstm(settings.pop('hidden_size'))
  return timing.Job(model_type='lstm', kwargs=kwargs, **settings)


def measure(only: str, repeats: int) -> list[dict[str, Any]]:
  """Returns a row for every side of every work whose name has `only` in it."""
  rows = []
  for name, work in _WORK.items():
    if only not in name:
      continue
    jobs = {side: job(work, settings) for side, settings in _SIDES.items()}
    answers, failures = timing.take_turns(jobs, repeats)
    for side, why in failures.items():
      print(f'{name}: {side} left out: {why}', file=sys.stderr)
    spreads = {
      side: timing.spread(answer['times'], scale=1e3 / jobs[side].steps)
      for side, answer in answers.items()
    }
    reference = spreads[_ONE]['value']
    for side, times in spreads.items():
      rows.append(
        {
          'work': name,
          'side': side,
          'unit': 'ms',
          **times,
          'times_as_fast': reference / times['value'],
          'first_loss': answers[side]['first_loss'],
          'start_seconds': answers[side]['start_seconds'],
        }
      )
      print(
        f'{name:<50} {side:<12} {times["value"]:9.2f} ms  '
        f'{rows[-1]["times_as_fast"]:5.2f} times as fast',
        flush=True,
      )
  return rows


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
  """Returns the rows of `measure` as a table: a line for every work."""
  sides = list(dict.fromkeys(row['side'] for row in rows))
  lines = [
    '| work | ' + ' | '.join(sides) + ' |',
    '|---' * (len(sides) + 1) + '|',
  ]
  for work in dict.fromkeys(row['work'] for row in rows):
    cells = {
      row['side']: f'{row["value"]:.4g} ms'
      if row['side'] == _ONE
      else f'{row["value"]:.4g} ms, {row["times_as_fast"]:.2f}'
      for row in rows
      if row['work'] == work
    }
    line = ' | '.join(cells.get(side, '') for side in sides)
    lines.append(f'| {work} | {line} |')
  return '\n'.join(lines)


def plan(rows: Sequence[Mapping[str, Any]], machines: Sequence[int]) -> str:
  """Returns the cost of a grid of the paper's size, as a table.

  Args:
    rows: Rows of the results of benchmarks/run.py, on one machine.
    machines: Numbers of such machines; one column for each.

  Raises:
    ValueError: If the rows lack a network of the grid.
  """
  steps = {
    row['name']: row
    for row in rows
    if row['part'] == 'training' and row['side'] == 'ours'
  }
  lines = [
    '| network | step | memory | one run | '
    + ' | '.join(_count(n, 'machine') for n in machines)
    + ' |',
    '|---' * (4 + len(machines)) + '|',
  ]
  runs = []
  for name in _ARCHITECTURES:
    if name not in steps:
      raise ValueError(f'there is no row of {name}, as ours in training')
    hours = steps[name]['value'] * 1e-3 * _STEPS / 3600
    of_network = _SOURCES * _SEEDS * [hours]
    runs += of_network
    columns = [_time(_makespan(of_network, n)) for n in machines]
    memory = steps[name]['peak_bytes'] / 2**30
    lines.append(
      f'| {name} | {steps[name]["value"]:.4g} ms | {memory:.1f} GiB | '
      f'{_time(hours)} | ' + ' | '.join(columns) + ' |'
    )
  columns = [_time(_makespan(runs, n)) for n in machines]
  lines.append(f'| all | | | | {" | ".join(columns)} |')
  return '\n'.join(lines)


def reckon(tflops: float, microseconds: float, machines: Sequence[int]) -> str:
  """Returns the estimated cost of such a grid on accelerators, as a table.

    step = max(seeds x operations / rate, T x time of a step over time)

  where only recurrent networks step over time. Machines take turns with the
  longest runs first.

  Args:
    tflops: Throughput of matrix products, 10^12 operations per second.
    microseconds: Time of one recurrent step, forwards and backwards.
    machines: Numbers of accelerators; one column for each.
  """
  lines = [
    f'| network | step of {_SEEDS} seeds | one run of them | '
    + ' | '.join(_count(n, 'accelerator') for n in machines)
    + ' |',
    '|---' * (3 + len(machines)) + '|',
  ]
  runs = []
  for name in _ARCHITECTURES:
    network, _, length = name.partition(', T=')
    model_type, kwargs = networks.networks(int(length), num_layers=5)[network]
    flops = networks.step_flops(model_type, kwargs, 128, int(length))
    seconds = _SEEDS * flops / (1e12 * tflops)
    if 'Transformer' not in name:
      seconds = max(seconds, 1e-6 * microseconds * int(length))
    hours = seconds * _STEPS / 3600
    runs += _SOURCES * [hours]
    columns = [_time(_makespan(_SOURCES * [hours], n)) for n in machines]
    lines.append(
      f'| {name} | {1e3 * seconds:.3g} ms | {_time(hours)} | '
      + ' | '.join(columns)
      + ' |'
    )
  columns = [_time(_makespan(runs, n)) for n in machines]
  lines.append(f'| all | | | {" | ".join(columns)} |')
  return '\n'.join(lines)


def _makespan(hours: Sequence[float], machines: int) -> float:
  """Time at which the last run ends, if the longest begin first."""
  ends = [0.0] * machines
  for run in sorted(hours, reverse=True):
    ends[ends.index(min(ends))] += run
  return max(ends)


def _count(number: int, thing: str) -> str:
  return f'{number} {thing}' + ('' if number == 1 else 's')


def _time(hours: float) -> str:
  return f'{hours:.1f} h' if hours < 48 else f'{hours / 24:.1f} days'


def main() -> None:
  """Measures, or prints what was measured, or plans."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--only', default='', help='Part of the names of works.')
  parser.add_argument('--repeats', type=int, default=_REPEATS)
  parser.add_argument('--output', type=pathlib.Path, default=_OUTPUT)
  parser.add_argument('--markdown', action='store_true')
  parser.add_argument(
    '--plan', type=pathlib.Path, help='Results of benchmarks/run.py.'
  )
  parser.add_argument(
    '--reckon', type=float, nargs=2, metavar=('TFLOPS', 'MICROSECONDS')
  )
  parser.add_argument('--machines', type=int, nargs='+', default=[1, 8, 40])
  arguments = parser.parse_args()
  try:
    for number in (arguments.repeats, *arguments.machines):
      base_config.check_int('--repeats or --machines', number, 1)
    if arguments.plan is not None:
      content = atomic_files.read_json(arguments.plan)
      print(plan(content['rows'], arguments.machines))
    elif arguments.reckon is not None:
      for number in arguments.reckon:
        base_config.check_float('--reckon', number, 1e-3)
      print(reckon(*arguments.reckon, arguments.machines))
    elif arguments.markdown:
      print(markdown(atomic_files.read_json(arguments.output)['rows']))
    else:
      start = time.perf_counter()
      rows = measure(arguments.only, arguments.repeats)
      content = {
        'command': 'python benchmarks/scaling.py',
        'cores': os.cpu_count(),
        'platform': platform.platform(),
        'jax': jax.__version__,
        'seconds': round(time.perf_counter() - start),
        'rows': rows,
      }
      atomic_files.write_json(arguments.output, content)
      print(f'Wrote {arguments.output}')
  except (OSError, ValueError) as error:
    cli.end_with(error)


if __name__ == '__main__':
  with cli.printing():
    main()
