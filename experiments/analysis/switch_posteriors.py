"""Draws where PTW and LAD think that one sequence switched, and how far back.

  python experiments/analysis/switch_posteriors.py
  python experiments/analysis/switch_posteriors.py --source=lin --seed=3

Writes figure.png into <output_dir>.
"""

from absl import flags
import jax
from matplotlib import figure as figure_lib
import numpy as np

from nonstationary_mbml import base_config
from nonstationary_mbml.experiments import cli
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments import live_and_die_predictors
from nonstationary_mbml.experiments import plotting
from nonstationary_mbml.experiments import ptw_predictors
from nonstationary_mbml.runtime import atomic_files

# Sequences among which that of the figure is chosen.
_NUM_CANDIDATES = 64


def make_figure(source: str, seq_length: int, seed: int) -> figure_lib.Figure:
  """Draws one sequence with its posteriors.

  It is the first sequence of a small batch with three to six switching points,
  or else the first one.

  Args:
    source: Name of the source, a key of `TRAJECTORY_GENERATORS`.
    seq_length: Length of the sequence, T.
    seed: Seed of the sequence.
  """
  generator = constants.build_data_generator(
    config_lib.DataConfig(
      trajectory_generator=source,
      trajectory_generator_kwargs=constants.source_kwargs(source),
    )
  )
  size = (_NUM_CANDIDATES, seq_length)
  rng = jax.random.key(base_config.check_seed('seed', seed))
  batch, parameters = generator.sample(rng, *size)
  switches = np.asarray(generator.switch_points(rng, *size))
  number = switches.sum(axis=1)
  chosen = int(np.argmax((number >= 3) & (number <= 6)))
  batch = batch[chosen, None]
  ptw = ptw_predictors.PTWPredictor(ptw_predictors.min_depth(seq_length))
  lad = live_and_die_predictors.LADPredictor()
  return plotting.plot_switch_posteriors(
    np.asarray(batch[0]),
    np.asarray(parameters[chosen]),
    switches[chosen],
    {
      'PTW': np.asarray(ptw.switch_posterior(batch)[0]),
      'LAD': np.asarray(lad.switch_posterior(batch)[0]),
    },
    np.asarray(lad.unroll_run_lengths(batch)[0]),
    'LAD',
    title=f'One sequence of the {source.lower()} source: when did it switch?',
  )


def define_flags() -> None:
  """Defines the flags; not at import, so that scripts do not meet in a test."""
  define = cli.FlagDefiner()
  define.choice(
    'source',
    'ptw',
    constants.TRAJECTORY_GENERATORS,
    'Source of the sequence',
  )
  define.integer(
    'seq_length',
    256,
    'Length of the sequence.',
    lower_bound=2,
    upper_bound=4096,
  )
  define.seed('Seed of the sequence.')
  define.string(
    'output_dir', 'results/switch_posteriors', 'Folder of the figure.'
  )


def main(argv: list[str]) -> None:
  """Draws and writes the figure."""
  cli.start(argv)
  folder = cli.make_folder(flags.FLAGS.output_dir)
  figure = make_figure(
    flags.FLAGS.source, flags.FLAGS.seq_length, flags.FLAGS.seed
  )
  with cli.saving(folder):
    atomic_files.write_whole(folder / 'figure.png', atomic_files.to_png(figure))
  print(f'Wrote figure.png to {folder}')


if __name__ == '__main__':
  define_flags()
  cli.run(main)
