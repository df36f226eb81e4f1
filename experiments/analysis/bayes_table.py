"""Regret of every exact predictor on every source.

  python experiments/analysis/bayes_table.py

Writes table.csv and table.png into <output_dir>, and prints the table. All
predictors read the same sequences, so that differences are paired. Each
predictor keeps the same prior everywhere: that of a known period knows the
wrong one, or a period where there is none, on every source but one.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import math
import sys
from typing import Any

from absl import flags
import jax
import numpy as np

from nonstationary_mbml import base_config
from nonstationary_mbml import predictors
from nonstationary_mbml.experiments import cli
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments import evaluator as evaluator_lib
from nonstationary_mbml.experiments import plotting
from nonstationary_mbml.experiments.analysis import redundancy_bounds
from nonstationary_mbml.experiments.analysis import study_tables
from nonstationary_mbml.runtime import atomic_files
from nonstationary_mbml.runtime import statistics

# The rows; constants.py has what they need besides their names.
SOURCES = ('ptw', 'lin', 'regular_shift', 'random_shift', 'static', 'recurring')
_MAX_ALPHABET_SIZE = 2**16
# The columns, with what each predictor needs besides what follows from T.
PREDICTORS = {
  'ptw': {},
  'lad': {},
  'regular_shift': constants.source_kwargs('regular_shift'),
  'random_shift': constants.source_kwargs('random_shift'),
  'kt': {},
  # The switches of the recurring source, but nothing of its memory.
  'run_length': {'hazard': 0.05},
  'forget_me_not': {},
}
LABELS = {
  'ptw': 'PTW',
  'lad': 'LAD',
  'regular_shift': 'period 20',
  'random_shift': 'lengths U(1, 39)',
  'kt': 'KT',
  'run_length': 'hazard 0.05',
  'forget_me_not': 'Forget-Me-Not',
}


@dataclasses.dataclass(frozen=True)
class Cell:
  """One predictor on one source; a line of the CSV file.

  Attributes:
    source: Name of the source, one of `SOURCES`.
    predictor: Name of the predictor, a key of `PREDICTORS`.
    is_exact: Whether it is the source's exact Bayes predictor.
    cumulative_regret: Sum over symbols 2, ..., T, mean over sequences, in nats.
    stderr: Standard error of that mean.
    above_exact: Mean paired difference to the source's exact predictor; None
      where there is none.
    above_exact_stderr: Standard error of that mean.
    bound: Upper bound on the regret (redundancy_bounds.py), on average over the
      partitions of these sequences, in nats; None if none is known.
    num_sequences: Number of sequences, N.
    seq_length: Length of the sequences, T.
    alphabet_size: Number of symbols, K; parameters are from a Dirichlet(1/2).
    seed: Seed of the sequences.
  """

  source: str
  predictor: str
  is_exact: bool
  cumulative_regret: float
  stderr: float
  above_exact: float | None
  above_exact_stderr: float | None
  bound: float | None
  num_sequences: int
  seq_length: int
  alphabet_size: int
  seed: int


def make_row(
  source: str,
  num_sequences: int,
  seq_length: int,
  batch_size: int,
  seed: int,
  alphabet_size: int = 2,
) -> list[Cell]:
  """Returns the cells of one source.

  Args:
    source: Name of the source, one of `SOURCES`.
    num_sequences: Number of sequences, N.
    seq_length: Length of the sequences, T.
    batch_size: Sequences at a time.
    seed: Seed of all sources.
    alphabet_size: Number of symbols, K.
  """
  config = (
    (
      config_lib.ExperimentConfig(
        data=config_lib.DataConfig(
          iid_distribution_kwargs={'feature_size': alphabet_size},
          parameter_distribution_params=(0.5,) * alphabet_size,
          trajectory_generator=source,
          trajectory_generator_kwargs=constants.source_kwargs(source),
        ),
        eval=config_lib.EvalConfig(
          batch_size=min(batch_size, num_sequences),
          seq_length=seq_length,
          optimal_predictors=tuple(PREDICTORS),
          optimal_predictors_kwargs=PREDICTORS,
        ),
      )
    )
    .resolved()
    .eval
  )
  # The evaluator wants a network: the cheapest predictor stands in for it.
  evaluator = evaluator_lib.build_evaluator(
    predictors.OptimalCategoricalPredictor(), config
  )
  base_config.check_seed('seed', seed)
  rng = jax.random.fold_in(jax.random.key(seed), SOURCES.index(source))
  regrets = evaluator.evaluate({}, rng, num_sequences)
  exact = constants.exact_predictor(
    evaluator.generator, evaluator.optimal_predictors, evaluator.seq_length
  )
  reference = _bounds(
    np.concatenate(
      [
        evaluator.generator.switch_points(key, config.batch_size, seq_length)
        for key in evaluator.batch_keys(rng, num_sequences)
      ]
    )[:num_sequences],
    evaluator.optimal_predictors['ptw'].depth,
    alphabet_size,
  )

  cells = []
  measured = lambda values: map(
    float, statistics.mean_and_stderr(values.astype(np.float64))
  )
  for name in PREDICTORS:
    mean, stderr = measured(regrets[name])
    above = above_stderr = None
    if exact is not None:
      above, above_stderr = measured(regrets[name] - regrets[exact])
    cells.append(
      Cell(
        source=source,
        predictor=name,
        is_exact=name == exact,
        cumulative_regret=mean,
        stderr=stderr,
        above_exact=above,
        above_exact_stderr=above_stderr,
        bound=reference.get(name),
        num_sequences=num_sequences,
        seq_length=seq_length,
        alphabet_size=alphabet_size,
        seed=seed,
      )
    )
  return cells


def not_above(cells: list[Cell]) -> list[Cell]:
  """Returns the cells within two standard errors of the exact predictor.

  The errors are those of the paired differences.
  """
  return [
    cell
    for cell in cells
    if cell.above_exact is not None
    and not cell.is_exact
    and not cell.above_exact > 2 * cell.above_exact_stderr
  ]


def to_csv(cells: list[Cell]) -> str:
  """Returns a line for every cell, under a header."""
  return atomic_files.to_csv(
    [
      {
        name: f'{value:.6f}' if isinstance(value, float) else value
        for name, value in vars(cell).items()
      }
      for cell in cells
    ]
  )


def to_markdown(cells: list[Cell]) -> str:
  """Returns means and standard errors, those of exact predictors in bold."""

  def text(cells: Sequence[Cell]) -> str:
    (cell,) = cells
    text = f'{cell.cumulative_regret:.2f} ± {cell.stderr:.2f}'
    return f'**{text}**' if cell.is_exact else text

  return study_tables.pivot(
    cells,
    {'source': lambda cell: f'`{cell.source}`'},
    lambda cell: LABELS[cell.predictor],
    text,
  )


def _bounds(
  switch_points: np.ndarray, depth: int, alphabet_size: int
) -> Mapping[str, float]:
  """Mean bounds over partitions `[N, T]`, by predictor."""
  means = {
    'ptw': redundancy_bounds.ptw(switch_points, depth, alphabet_size).mean(),
    'lad': redundancy_bounds.lad(switch_points, alphabet_size).mean(),
  }
  if not switch_points.any():
    means['kt'] = redundancy_bounds.kt(switch_points.shape[1], alphabet_size)
  return {name: float(value) for name, value in means.items()}


def define_flags() -> None:
  """Defines the flags; not at import, so that scripts do not meet in a test."""
  define = cli.FlagDefiner()
  define.integer(
    'num_sequences', 10_240, 'Fresh sequences of each source.', lower_bound=2
  )
  define.integer(
    'seq_length',
    256,
    'Symbols per sequence; the time grows with the square.',
    lower_bound=2,
    upper_bound=65_536,
  )
  define.integer(
    'alphabet_size',
    2,
    'Different symbols.',
    lower_bound=2,
    upper_bound=_MAX_ALPHABET_SIZE,
  )
  define.integer('batch_size', 512, 'Sequences at a time.', lower_bound=1)
  define.seed('Seed of all sequences.')
  define.string('output_dir', 'results/bayes_table', 'Folder of the table.')


def main(argv: list[str]) -> None:
  """Makes all rows and writes the table."""
  cli.start(argv)
  values = flags.FLAGS
  sizes = (
    min(values.batch_size, values.num_sequences),
    values.seq_length,
    values.alphabet_size,
  )
  if math.prod(sizes) > base_config.MAX_SIZE:
    sys.exit(
      'error: {} sequences of {} symbols out of {} are 2^31 numbers or more; '
      'make --batch_size smaller'.format(*sizes)
    )
  folder = cli.make_folder(values.output_dir)
  cells: list[Any] = []
  for source in SOURCES:
    cli.say(f'{source} ...')
    cells += make_row(
      source,
      values.num_sequences,
      values.seq_length,
      values.batch_size,
      values.seed,
      values.alphabet_size,
    )
  # Printed before it is written, which may fail.
  cli.say(
    '\nCumulative regret (nats), mean ± standard error of '
    f'{values.num_sequences} sequences of {values.seq_length} '
    'symbols; in bold the exact Bayes predictor of the source:\n\n'
    f'{to_markdown(cells)}'
  )
  for cell in not_above(cells):
    cli.say(
      f'{LABELS[cell.predictor]} is not clearly above the exact predictor of '
      f'{cell.source}: {cell.above_exact:+.4f} ± {cell.above_exact_stderr:.4f}'
    )
  figure = plotting.plot_bayes_table(
    [dataclasses.asdict(cell) for cell in cells], LABELS
  )
  with cli.saving(folder):
    atomic_files.write_whole(folder / 'table.csv', to_csv(cells).encode())
    atomic_files.write_whole(folder / 'table.png', atomic_files.to_png(figure))
  print(f'Wrote table.csv and table.png to {folder}')


if __name__ == '__main__':
  define_flags()
  cli.run(main)
