"""Time to Bayes: how long a recipe trains until a network is near the optimum.

  python benchmarks/time_to_bayes.py
  python benchmarks/time_to_bayes.py --only='LSTM-64, ptw' --seeds=1
  python benchmarks/time_to_bayes.py --only_times
  python benchmarks/time_to_bayes.py --markdown

Near is measured as the regret above the source's exact Bayes predictor, in
percent of that predictor's own, on fresh sequences that both read: the same for
all seeds, recipes and steps. A recipe whose schedule knows its length is
trained anew for every number of steps; a constant rate is read on the way.

Seconds are steps times the time of one, which a training of its own measures: a
network on all cores, without compiling. `--only_times` measures just that
again, on a machine that has nothing else to do. The file is written after every
training.
"""

import argparse
from collections.abc import Iterator
import dataclasses
import json
import pathlib
import re
import time
from typing import Any

import jax
import numpy as np
import run as suite_run

from nonstationary_mbml import base_config
from nonstationary_mbml import train
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments import evaluator as evaluator_lib
from nonstationary_mbml.runtime import atomic_files
from nonstationary_mbml.runtime import devices
from nonstationary_mbml.runtime import statistics

_OUTPUT = pathlib.Path(__file__).parent.parent / 'results/time_to_bayes.json'
# Percent of the exact predictor's regret.
_NEAR = (5.0, 2.0, 1.0, 0.5, 0.3)
_CONSTANT = 'Adam, constant'
_TRANSFORMER = {
  'embedding_dim': 32,
  'num_layers': 2,
  'num_heads': 4,
  'dropout_prob': 0.0,
}

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
  """A network on a source.

  Attributes:
    network: Name of the network.
    model: Fields of its config.
    source: Source, a key of `TRAJECTORY_GENERATORS`.
    seq_length: T.
    learning_rates: Rate of every recipe, by its name.
    steps: Numbers of steps that are tried; a constant rate goes on to twice the
      last.
  """

  network: str
  model: dict[str, Any]
  source: str
  seq_length: int
  learning_rates: dict[str, float]
  steps: tuple[int, ...]

  @property
  def name(self) -> str:
    """Name, for `--only`."""
    return f'{self.network}, {self.source}, T={self.seq_length}'


RECIPES = {
  _CONSTANT: {'optimizer': 'adam', 'schedule': 'constant'},
  'Adam, cosine': {'optimizer': 'adam', 'schedule': 'warmup_cosine'},
  'Muon, cosine': {'optimizer': 'muon', 'schedule': 'warmup_cosine'},
  'Muon, cosine, target bayes': {
    'optimizer': 'muon',
    'schedule': 'warmup_cosine',
    'target': 'bayes',
  },
}


def cases() -> list[Case]:
  """Returns what is measured: short sequences, then long ones."""
  small = {
    'LSTM-64': ('lstm', {'hidden_size': 64}),
    'RNN-64': ('rnn', {'core': 'vanilla_rnn', 'hidden_size': 64}),
    'Transformer SIN_COS': ('transformer', _TRANSFORMER),
  }
  fields = lambda kind, kwargs: {
    'model_type': kind,
    'architecture_kwargs': kwargs,
  }
  rates = dict(zip(RECIPES, (2e-3, 1e-2, 1e-2, 1e-2), strict=True))
  short = [
    Case(name, fields(*model), source, 32, rates, (625, 1_250, 2_500, 5_000))
    for name, model in small.items()
    for source in ('ptw', 'lin')
  ]
  rates = dict(zip(RECIPES, (2e-3, 5e-3, 1e-2, 1e-2), strict=True))
  return short + [
    Case(
      'LSTM-128',
      fields('lstm', {'hidden_size': 128}),
      source,
      256,
      rates,
      (500, 1_000, 2_000),
    )
    for source in ('lin', 'random_shift', 'ptw')
  ]


def make_config(
  case: Case, recipe: str, steps: int, seeds: tuple[int, ...], log_every: int
) -> config_lib.ExperimentConfig:
  """Returns the config of a training.

  Args:
    case: Network and source.
    recipe: A key of RECIPES.
    steps: Training steps.
    seeds: Seeds, each of a network.
    log_every: Steps from log to log.
  """
  return config_lib.ExperimentConfig(
    name='time_to_bayes',
    data=config_lib.DataConfig(
      trajectory_generator=case.source,
      trajectory_generator_kwargs=constants.source_kwargs(case.source),
    ),
    model=base_config.ModelConfig(**case.model),
    train=base_config.TrainConfig(
      **RECIPES[recipe],
      learning_rate=case.learning_rates[recipe],
      seq_length=case.seq_length,
      model_init_seed=seeds,
    ),
    schedule=base_config.ScheduleConfig(training_steps=steps),
    logger=base_config.LoggerConfig(log_frequency=log_every),
    eval=config_lib.EvalConfig(optimal_predictors=('exact',), batch_size=512),
  )


def measure(
  case: Case, recipe: str, seeds: tuple[int, ...], num_sequences: int
) -> Iterator[Row]:
  """Yields a row for every number of steps, the fewest first.

  Args:
    case: Network and source.
    recipe: A key of RECIPES.
    seeds: Seeds, each of a network.
    num_sequences: Fresh sequences to measure on.
  """
  read_at = [(steps,) for steps in case.steps]
  if recipe == _CONSTANT:
    read_at = [(*case.steps, 2 * case.steps[-1])]
  one_step = step_seconds(case, recipe)
  for steps_of_run in read_at:
    excess = _train(case, recipe, steps_of_run, seeds, num_sequences)
    for steps, percents in excess.items():
      mean, stderr = statistics.mean_and_stderr(np.array(percents))
      yield {
        'case': case.name,
        'recipe': recipe,
        'steps': steps,
        'seconds': steps * one_step,
        'percent': float(mean),
        'percent_stderr': None if len(seeds) == 1 else float(stderr),
        'seeds': len(seeds),
      }


def step_seconds(case: Case, recipe: str) -> float:
  """Returns the seconds of a training step of one network: a median.

  Args:
    case: Network and source.
    recipe: A key of RECIPES.
  """
  log_every = max(10, 2_000 // case.seq_length)
  # The first interval compiles.
  config = make_config(case, recipe, 6 * log_every, (0,), log_every)
  ends = []
  train.train_components(
    config,
    _build(config),
    callbacks=[lambda *_: ends.append(time.perf_counter())],
  )
  return float(np.median(np.diff(ends))) / log_every


def _build(config: config_lib.ExperimentConfig) -> train.Components:
  return train.build_components(
    config, constants.build_data_generator, evaluator_lib.build_evaluator
  )


def _train(
  case: Case,
  recipe: str,
  read_at: tuple[int, ...],
  seeds: tuple[int, ...],
  num_sequences: int,
) -> dict[int, list[float]]:
  """Percent above the optimum at some steps of one training, per seed."""
  config = make_config(case, recipe, max(read_at), seeds, min(read_at))
  components = _build(config)
  evaluator = components.evaluator
  (exact,) = evaluator.optimal_predictors
  excess = {}

  def read(step: int, entry: dict[str, float], params: Any) -> None:
    del entry
    if step not in read_at:
      return
    excess[step] = []
    for member in range(len(seeds)):
      regrets = evaluator.evaluate(
        jax.tree.map(lambda x, m=member: x[m], params),
        jax.random.key(1),
        num_sequences,
      )
      own = regrets[exact].mean()
      above = regrets[evaluator_lib.NETWORK].mean() - own
      excess[step].append(100 * float(above / own))

  train.train_components(config, components, callbacks=[read])
  return excess


def markdown(rows: list[Row]) -> str:
  """Returns a table: how long every recipe takes to come so near.

  Args:
    rows: Rows of `measure`, of any cases and recipes.
  """
  columns = [f'{near:g}%' for near in _NEAR]
  lines = [
    f'| network, source | recipe | {" | ".join(columns)} | nearest |',
    '|---' * (3 + len(columns)) + '|',
  ]
  by_line = {}
  for row in rows:
    by_line.setdefault((row['case'], row['recipe']), []).append(row)
  for (case, recipe), of_line in by_line.items():
    cells = []
    for near in _NEAR:
      reached = [row for row in of_line if row['percent'] < near]
      cells.append(_duration(min(reached, key=_seconds)) if reached else '–')
    best = min(of_line, key=lambda row: row['percent'])
    spread = best['percent_stderr']
    shown = f'{best["percent"]:.2f}' + (f' ± {spread:.2f}' if spread else '')
    cells.append(f'{shown}% in {_duration(best)}')
    lines.append(f'| {case} | {recipe} | {" | ".join(cells)} |')
  return '\n'.join(lines)


def _place(row: Row) -> tuple[int, int, int]:
  """Place of a row in the file: by case, recipe and steps."""
  names = [case.name for case in cases()]
  recipes = list(RECIPES)
  return (
    names.index(row['case']),
    recipes.index(row['recipe']),
    row['steps'],
  )


def _seconds(row: Row) -> float:
  return row['seconds']


def _duration(row: Row) -> str:
  return f'{row["seconds"]:.3g} s ({row["steps"]:,} steps)'


def main() -> None:
  """Measures what is chosen, and prints and writes it."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--only',
    type=suite_run.pattern,
    default='',
    help='Pattern that `network, source, T=length: recipe` has to match.',
  )
  parser.add_argument('--seeds', type=int, default=3, help='Seeds of each.')
  parser.add_argument(
    '--num_sequences', type=int, default=10_240, help='Sequences to measure on.'
  )
  parser.add_argument(
    '--only_times',
    action='store_true',
    help='Measure only the time of a step again, for rows that are there.',
  )
  parser.add_argument('--output', type=pathlib.Path, default=_OUTPUT)
  parser.add_argument(
    '--markdown', action='store_true', help='Print the table of the file.'
  )
  args = parser.parse_args()
  results = {'rows': []}
  if args.output.exists():
    results = atomic_files.read_json(args.output)
  if not args.markdown:
    devices.start(devices.num_cpu_devices())
    results['machine'] = suite_run.machine()
    for case in cases():
      for recipe in RECIPES:
        if re.search(args.only, f'{case.name}: {recipe}'):
          _replace_rows(results, case, recipe, args)
  print(markdown(results['rows']))


def _replace_rows(
  results: dict[str, Any], case: Case, recipe: str, args: argparse.Namespace
) -> None:
  """Measures a case with a recipe; writes the file after every row."""
  is_old = lambda row: (row['case'], row['recipe']) == (case.name, recipe)
  old = [row for row in results['rows'] if is_old(row)]
  kept = [row for row in results['rows'] if not is_old(row)]
  if args.only_times:
    one_step = step_seconds(case, recipe) if old else 0
    rows = [{**row, 'seconds': row['steps'] * one_step} for row in old]
  else:
    seeds = tuple(range(args.seeds))
    rows = measure(case, recipe, seeds, args.num_sequences)
  new = []
  for row in rows:
    print(json.dumps(row), flush=True)
    new.append(row)
    results['rows'] = sorted(kept + new, key=_place)
    atomic_files.write_json(args.output, results)


if __name__ == '__main__':
  main()
