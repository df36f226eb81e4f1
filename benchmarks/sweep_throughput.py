"""Points of a sweep per hour: a run for every core, or one on all of them.

  python benchmarks/sweep_throughput.py
  python benchmarks/sweep_throughput.py --steps=5000
  python benchmarks/sweep_throughput.py --markdown

Runs the same points of the sweep `small`, three seeds each, with
experiments/sweeps/launch.py in both ways: from the start of the launcher to the
last table, with compiling (each way has a cache of its own, empty at first) and
with evaluation. Which comes first alternates.
"""

import argparse
import datetime
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import run as suite_run

from nonstationary_mbml import base_config
from nonstationary_mbml.experiments import cli
from nonstationary_mbml.runtime import atomic_files
from nonstationary_mbml.runtime import devices

_ROOT = pathlib.Path(__file__).parent.parent
_OUTPUT = _ROOT / 'results/sweep_throughput.json'
_LAUNCH = _ROOT / 'experiments/sweeps/launch.py'
_SOURCES = ('ptw', 'lin', 'regular_shift', 'random_shift')
_ARCHITECTURES = ('lstm', 'transformer_sin_cos')
_EACH = 'a run for every core'
_ALL = 'one run on all cores'


def launch(
  architecture: str, way: str, steps: int, sources: tuple[str, ...] = _SOURCES
) -> float:
  """Returns the seconds that a sweep of some points takes.

  Args:
    architecture: Network of the points, a value of `model` in `small`.
    way: How the cores are shared.
    steps: Training steps of every point.
    sources: Sources of the points, a point each.

  Raises:
    ValueError: If the sweep fails.
  """
  cores = devices.num_cpu_devices()
  runs, devices_of_run = (cores, 1) if way == _EACH else (1, cores)
  with tempfile.TemporaryDirectory() as folder:
    command = [
      sys.executable,
      str(_LAUNCH),
      '--sweep=small',
      f'--set=schedule.training_steps={steps}',
      *(f'--only=small,{source},{architecture}' for source in sources),
      f'--jobs={runs}',
      f'--cpu_devices={devices_of_run}',
      f'--output_dir={folder}',
    ]
    cache = {'JAX_COMPILATION_CACHE_DIR': f'{folder}/cache'}
    began = time.perf_counter()
    ended = subprocess.run(
      command,
      env=os.environ | cache,
      capture_output=True,
      text=True,
      check=False,
    )
    seconds = time.perf_counter() - began
  if ended.returncode:
    raise ValueError(f'the sweep failed: {ended.stdout[-500:]}{ended.stderr}')
  return seconds


def measure(steps: int) -> list[dict[str, Any]]:
  """Returns a row for every architecture and way.

  Args:
    steps: Training steps of every point.
  """
  rows = []
  for i, architecture in enumerate(_ARCHITECTURES):
    for way in (_EACH, _ALL)[:: -1 if i % 2 else 1]:
      seconds = launch(architecture, way, steps)
      rows.append(
        {
          'architecture': architecture,
          'way': way,
          'points': len(_SOURCES),
          'seconds': seconds,
          'points_per_hour': 3600 * len(_SOURCES) / seconds,
        }
      )
      print(f'{architecture}, {way}: {seconds:.0f} s', flush=True)
  return rows


def markdown(rows: list[dict[str, Any]]) -> str:
  """Returns the rows of `measure` as a table: a line for every architecture."""
  lines = [
    f'| points per hour | {_EACH} | {_ALL} | ratio |',
    '|---|---|---|---|',
  ]
  for architecture in dict.fromkeys(row['architecture'] for row in rows):
    rates = {
      row['way']: row['points_per_hour']
      for row in rows
      if row['architecture'] == architecture
    }
    lines.append(
      f'| {architecture} | {rates[_EACH]:.0f} | {rates[_ALL]:.0f} | '
      f'{rates[_EACH] / rates[_ALL]:.2f} |'
    )
  return '\n'.join(lines)


def main() -> None:
  """Measures, or prints what was measured."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--steps', type=int, default=1_000, help='Of every point.'
  )
  parser.add_argument('--output', type=pathlib.Path, default=_OUTPUT)
  parser.add_argument(
    '--markdown', action='store_true', help='Print the table of the file.'
  )
  args = parser.parse_args()
  try:
    base_config.check_int('--steps', args.steps, 1)
    if not args.markdown:
      content = {
        'command': 'python benchmarks/sweep_throughput.py '
        f'--steps={args.steps}',
        'date': datetime.date.today().isoformat(),
        'machine': suite_run.machine(),
        'rows': measure(args.steps),
      }
      atomic_files.write_json(args.output, content)
    print(markdown(atomic_files.read_json(args.output)['rows']))
  except (OSError, ValueError) as error:
    cli.end_with(error)


if __name__ == '__main__':
  with cli.printing():
    main()
