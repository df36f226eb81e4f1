"""Which recipe of training comes nearest, for which network.

  python experiments/sweeps/launch.py --sweep=recipes
  python experiments/analysis/recipes.py
  python experiments/analysis/recipes.py --draw_only  # from results.csv alone

Copies the results of the sweep, a row for every network, into <output_dir>, and
writes table.md and figure.png from them. The numbers are regrets above the
exact predictor, in percent of its own.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import pathlib
from typing import Any

from absl import flags
import matplotlib
from matplotlib import figure as figure_lib

from nonstationary_mbml import base_config
from nonstationary_mbml.experiments import cli
from nonstationary_mbml.experiments import plotting
from nonstationary_mbml.experiments.analysis import study_figures
from nonstationary_mbml.experiments.analysis import study_tables
from nonstationary_mbml.experiments.sweeps import sweep_folder
from nonstationary_mbml.runtime import atomic_files

Row = Mapping[str, Any]

RESULTS = 'results.csv'
# Columns of the table: what a recipe is made of.
_RECIPE = {
  'optimiser': 'train.optimizer',
  'schedule': 'train.schedule',
  'target': 'train.target',
  'peak rate': 'train.learning_rate',
}
# The recipe that the others differ from in one thing.
_USUAL = ('muon', 'warmup_cosine', 'symbols', 0.01)
_SCHEDULES = {
  'constant': 'constant',
  'warmup_stable_decay': 'decay at the end',
  'warmup_cosine': 'cosine',
}
_TARGETS = ('symbols', 'parameters', 'bayes')
# End of the name of a network with a begin symbol.
_BEGIN = '_begin'
# Less is shown as this much: what is left is noise.
_LEAST_PERCENT = 0.005


def percent(rows: Sequence[Row]) -> tuple[float, float]:
  """Returns mean and standard error over seeds, in percent of exact regret."""
  return study_figures.over_seeds(
    [
      {'percent': 100 * row['above_exact'] / row['exact_regret']}
      for row in rows
    ],
    'percent',
  )


def to_markdown(rows: Sequence[Row]) -> str:
  """Returns a line for every recipe, and a column for every network."""

  def text(rows: Sequence[Row]) -> str:
    mean, stderr = percent(rows)
    return f'{mean:.2f} ± {stderr:.2f}'

  return study_tables.pivot(
    rows,
    {
      title: lambda row, column=column: str(row[column])
      for title, column in _RECIPE.items()
    },
    lambda row: study_figures.label(row['model']),
    text,
  )


def draw(rows: Sequence[Row]) -> figure_lib.Figure:
  """Draws what the peak rate, the schedule, the target and the beginning do.

  Args:
    rows: Results of the sweep `recipes`.

  Returns:
    The figure: means and standard errors over seeds.
  """
  title = 'Regret above PTW after training on ptw, T = 32, by recipe'
  with plotting.new_figure(13, 5.2, title) as figure:
    rates, recipes, encodings = figure.subplots(1, 3)
    near = _draw_rates(rates, rows)
    _draw_cases(
      recipes,
      [row for row in rows if row['model'] in near],
      {
        f'{shown}, {target}': _usual(schedule=schedule, target=target)
        for schedule, shown in _SCHEDULES.items()
        for target in _TARGETS
      },
      'schedule and target\n(Muon, peak 0.01, 5,000 steps)',
    )
    far = [row for row in rows if row['model'].removesuffix(_BEGIN) not in near]
    begins = lambda row: row['model'].endswith(_BEGIN)
    usual = _usual()
    _draw_cases(
      encodings,
      far,
      {
        'symbols': lambda row: usual(row) and not begins(row),
        'bayes': _usual(target='bayes'),
        'symbols,\nbegin symbol': lambda row: usual(row) and begins(row),
      },
      'target and begin symbol\n(Muon, peak 0.01, cosine, 5,000 steps)',
    )
    names = dict.fromkeys(_short_label(row['model']) for row in rows)
    plotting.add_legend(
      figure,
      [
        *(
          plotting.handle(name, **plotting.line_style(name))
          for name in sorted(names, key=plotting.rank)
        ),
        plotting.handle('Adam', color='0.4', linestyle=':'),
        plotting.handle(
          'mean ± standard error of 3 seeds', color='0.4', marker='o'
        ),
      ],
    )
  return figure


def _usual(**other: Any) -> Callable[[Row], bool]:
  """Whether a row has the usual recipe, but for some of its parts."""
  names = ('optimizer', 'schedule', 'target', 'rate')
  wanted = tuple({**dict(zip(names, _USUAL, strict=True)), **other}.values())
  return lambda row: wanted == tuple(row[path] for path in _RECIPE.values())


def _draw_rates(panel: matplotlib.axes.Axes, rows: Sequence[Row]) -> set[str]:
  """Percent over the peak rate; returns the networks that have several."""
  drawn = set()
  for (model, optimizer), of_line in study_figures.groups(
    rows, 'model', 'train.optimizer'
  ).items():
    points = {}
    for row in of_line:
      rate = row['train.learning_rate']
      if _usual(optimizer=optimizer, rate=rate)(row):
        points.setdefault(rate, []).append(row)
    if len(points) < 2:
      continue
    drawn.add(model)
    rates = sorted(points)
    looks = plotting.line_style(study_figures.label(model))
    if optimizer != _USUAL[0]:
      looks |= {'linestyle': ':', 'markerfacecolor': 'white'}
    means, stderrs = zip(*(percent(points[r]) for r in rates), strict=True)
    panel.errorbar(rates, means, yerr=stderrs, capsize=3, **looks)
  panel.set(
    xscale='log',
    yscale='log',
    xlabel='peak learning rate (log scale)\n(cosine, symbols, 5,000 steps)',
    ylabel="regret above PTW (% of PTW's, log scale)",
  )
  plotting.set_plain_ticks(panel.xaxis)
  plotting.set_plain_ticks(panel.yaxis)
  plotting.add_grid(panel)
  return drawn


def _draw_cases(
  panel: matplotlib.axes.Axes,
  rows: Sequence[Row],
  cases: Mapping[str, Callable[[Row], bool]],
  title: str,
) -> None:
  """A line for every case, and a marker on it for every network."""
  names = dict.fromkeys(_short_label(row['model']) for row in rows)
  names = sorted(names, key=plotting.rank)
  for y, is_of_case in enumerate(cases.values()):
    of_case = [row for row in rows if is_of_case(row)]
    by_model = study_figures.groups(of_case, 'model')
    for (model,), of_model in by_model.items():
      name = _short_label(model)
      looks = plotting.style(name)
      mean, stderr = percent(of_model)
      # Side by side, where they would hide each other.
      shift = 0.14 * (names.index(name) - (len(names) - 1) / 2)
      panel.errorbar(
        max(mean, _LEAST_PERCENT),
        y + shift,
        xerr=stderr,
        fmt=looks.marker,
        color=looks.colour,
        markersize=5,
        capsize=2,
      )
  panel.set_yticks(range(len(cases)), list(cases))
  panel.set_ylim(len(cases) - 0.5, -0.5)
  panel.set_title(title)
  panel.set(xscale='log', xlabel="regret above PTW (% of PTW's, log scale)")
  low, high = panel.get_xlim()
  panel.set_xlim(max(low, _LEAST_PERCENT / 1.5), high)
  plotting.set_plain_ticks(panel.xaxis)
  plotting.add_grid(panel)


def _short_label(model: str) -> str:
  """Label of a network, by its name, without the begin symbol."""
  return study_figures.label(model.removesuffix(_BEGIN))


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the flags; not at import, so that scripts do not meet in a test."""
  define = cli.FlagDefiner(values)
  define.string('sweep_dir', 'runs/sweeps/recipes', 'Folder of the sweep.')
  define.string('output_dir', 'results/recipes', 'Folder of table and figure.')
  define.boolean(
    'draw_only', False, f'Draw what the {RESULTS} of <output_dir> has.'
  )


def main(argv: list[str]) -> None:
  """Copies the results, and draws them."""
  cli.start(argv)
  values = flags.FLAGS
  folder = pathlib.Path(values.output_dir)
  path = folder / RESULTS
  try:
    if not values.draw_only:
      rows = sweep_folder.SweepFolder(values.sweep_dir).results()
      if not rows:
        raise ValueError(f'no point of {values.sweep_dir} is finished')
      with cli.saving(folder):
        atomic_files.write_csv(cli.make_folder(folder) / RESULTS, rows)
    # As they are read, numbers are numbers.
    rows = atomic_files.read_csv(path)
    with base_config.naming(str(path)):
      table = to_markdown(rows)
      png = atomic_files.to_png(draw(rows))
  except (ValueError, OSError) as error:
    cli.end_with(error)
  cli.say(table)
  with cli.saving(folder):
    atomic_files.write_whole(folder / 'table.md', table.encode())
    atomic_files.write_whole(folder / 'figure.png', png)
  print(f'Wrote table.md and figure.png to {folder}')


if __name__ == '__main__':
  define_flags()
  cli.run(main)
