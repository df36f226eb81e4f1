"""Figures of the tables that `studies` measures.

  rows = files.read_csv(pathlib.Path('results/small/length_generalization.csv'))
  draw_length_generalization(rows, training_length=32).savefig('length.png')

Every function takes the rows of a table, as they were measured or as
`atomic_files.read_csv` gives them, and nothing else is computed anew.
"""

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import textwrap
from typing import Any

import matplotlib
from matplotlib import figure as figure_lib
import numpy as np

from nonstationary_mbml import predictor_factories
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments import plotting
from nonstationary_mbml.experiments.analysis import studies
from nonstationary_mbml.experiments.sweeps import presets
from nonstationary_mbml.experiments.sweeps import sweep_folder

Row = Mapping[str, Any]

# Labels of the networks of the presets, by their names in a sweep.
LABELS = {
  point.settings['model']: predictor_factories.label(point.config.model)
  for sweep in (presets.small, presets.t256, presets.recipes)
  for point in sweep().points()
}
LABELS |= {
  f'{name}_decay': f'{LABELS[name]}, weight decay'
  for name in ('rnn', 'stack_rnn')
}
TARGETS = {
  'run_length': 'expected run length',
  'recent_switch': 'probability of a recent switch',
}
# Shares of the exact predictor's regret within which a network is called near
# it, and not far from it.
_SHARES = (0.01, 0.15)
_STDERR = 'mean ± standard error over seeds'
# Of a line above a narrow panel.
_TITLE_CHARACTERS = 24


def label(predictor: str) -> str:
  """Returns the label of a predictor in figures, by its name in a table."""
  return LABELS.get(predictor, predictor)


def exact_label(source: str) -> str:
  """Returns the label of the Bayes predictor of a source in figures."""
  if source.startswith('ptw_depth_'):
    return f'PTW, depth {source.removeprefix("ptw_depth_")}'
  if source not in constants.TRAJECTORY_GENERATORS:
    return f'Bayes for {source}'
  config = config_lib.DataConfig(
    trajectory_generator=source,
    trajectory_generator_kwargs=constants.source_kwargs(source),
  )
  exact = constants.build_data_generator(config).bayes_predictor(2)
  return 'no exact predictor' if exact is None else exact.label


def groups(
  rows: Iterable[Row], *columns: str
) -> dict[tuple[Any, ...], list[Row]]:
  """Returns rows by their values in some columns, in order of appearance."""
  by_key = {}
  for row in rows:
    by_key.setdefault(tuple(row[column] for column in columns), []).append(row)
  return by_key


def over_seeds(rows: Sequence[Row], column: str) -> tuple[float, float]:
  """Returns mean and standard error over seeds; NaN for that of one row."""
  mean, stderr = sweep_folder.mean_and_stderr([row[column] for row in rows])
  return mean, np.nan if stderr is None else stderr


def _unique(rows: Iterable[Row], column: str) -> list[Any]:
  return list(dict.fromkeys(row[column] for row in rows))


def _are_networks(rows: Iterable[Row]) -> list[Row]:
  return [row for row in rows if row['seed'] is not None]


def _architectures(rows: Iterable[Row]) -> list[str]:
  """The architectures of some rows, in the order of all figures."""
  return _in_order(_unique(_are_networks(rows), 'predictor'))


def _in_order(predictors: Sequence[str]) -> list[str]:
  return sorted(predictors, key=lambda name: plotting.rank(label(name)))


def _panels(
  figure: figure_lib.Figure, number: int, columns: int, **kwargs: Any
) -> list[matplotlib.axes.Axes]:
  """The given number of panels, in rows."""
  panels = figure.subplots(
    -(-number // columns), columns, squeeze=False, **kwargs
  ).ravel()
  for index, panel in enumerate(panels):
    panel.set_visible(index < number)
    if number % columns:  # Also where the row below has no panel.
      panel.tick_params(labelbottom=True)
  return list(panels[:number])


def _draw_seeds(
  panel: matplotlib.axes.Axes,
  y: int,
  rows: Sequence[Row],
  column: str,
  is_filled: bool = True,
) -> None:
  """Dots of all seeds, and over them their mean and its standard error."""
  name = label(rows[0]['predictor'])
  looks = plotting.style(name)
  values = [row[column] for row in rows]
  panel.plot(
    values,
    np.full(len(values), y),
    looks.marker,
    color=looks.colour,
    markersize=3.5,
    alpha=0.45,
    markeredgewidth=0,
  )
  mean, stderr = over_seeds(rows, column)
  panel.errorbar(
    mean,
    y,
    xerr=np.nan_to_num(stderr),
    fmt=looks.marker,
    color=looks.colour,
    markerfacecolor=looks.colour if is_filled else 'white',
    markersize=5.5,
    capsize=3,
  )


def _finish_rows(panel: matplotlib.axes.Axes, names: Sequence[str]) -> None:
  """Names of the predictors at the rows of a panel, from top to bottom."""
  panel.set_yticks(range(len(names)), [label(name) for name in names])
  panel.set_ylim(len(names) - 0.5, -0.5)
  plotting.add_grid(panel, 'y')


def draw_on_distribution(rows: Sequence[Row]) -> figure_lib.Figure:
  """Draws the final regret above the exact predictor, on the own source.

  Args:
    rows: Rows of the table on_distribution.

  Returns:
    The figure: a panel for every source; a dot for every seed, and means with
    standard errors over seeds; the other exact predictors as diamonds.
  """
  sources = _unique(rows, 'source')
  # A predictor that is only ever the source's own has no distance to itself.
  names = _architectures(rows) + _in_order(
    _unique(
      [row for row in rows if row['seed'] is None and not row['is_exact']],
      'predictor',
    )
  )
  by_source = groups(rows, 'source')
  columns = min(3, len(sources))
  title = 'What networks lose on the source they were trained on'
  with plotting.new_figure(
    max(7.0, 4.0 * columns), 1.2 + 3.6 * -(-len(sources) // columns), title
  ) as figure:
    panels = _panels(figure, len(sources), columns, sharey=True)
    for panel, source in zip(panels, sources, strict=True):
      for (name, is_exact), of_name in groups(
        [{'is_exact': None, **row} for row in by_source[source,]],
        'predictor',
        'is_exact',
      ).items():
        if is_exact:
          regret = of_name[0]['regret']
          panel.set_title(
            f'{source}\nregret of {label(name)}: {regret:.3f} nats'
          )
          for share in _SHARES:
            plotting.mark(panel, share * regret)
        elif of_name[0]['seed'] is None:
          colour = plotting.style(label(name)).colour
          panel.plot(
            of_name[0]['above_exact'],
            names.index(name),
            'D',
            color=colour,
            markersize=5,
          )
        else:
          _draw_seeds(panel, names.index(name), of_name, 'above_exact')
      panel.set_xscale('log')
      plotting.set_plain_ticks(panel.xaxis)
      _finish_rows(panel, names)
      panel.set_xlabel('regret above the exact predictor\n(nats, log scale)')
    shares = ' and '.join(f'{share:.0%}' for share in _SHARES)
    plotting.add_legend(
      figure,
      [
        plotting.handle('one seed', marker='o', color='0.4', markersize=3.5),
        plotting.handle(_STDERR, marker='o', color='0.4', linestyle='-'),
        plotting.handle('another exact predictor', marker='D', color='0.4'),
        plotting.handle(
          f"{shares} of the exact predictor's regret",
          color='0.35',
          linestyle=':',
        ),
      ],
    )
  return figure


def draw_learning(rows: Sequence[Row]) -> figure_lib.Figure:
  """Draws regret above the exact predictor against training step.

  Args:
    rows: Rows of the table learning.

  Returns:
    The figure: panels for every source and family of networks, means over
    seeds.
  """
  return _draw_curves(
    rows,
    'source',
    ('step', 'training step (log scale)'),
    ('above_exact', 'regret above the exact predictor (nats, log scale)'),
    'How networks come near the Bayes predictor of their source (means over '
    'seeds)',
    band=False,  # They would hide each other.
  )


def draw_off_distribution(rows: Sequence[Row]) -> figure_lib.Figure:
  """Draws trained-on x tested-on matrices of regret above the exact predictor.

  Args:
    rows: Rows of the table off_distribution.

  Returns:
    The figure: a heat map for the exact predictors, and one for every
    architecture, means over seeds.
  """
  trained = _unique(_are_networks(rows), 'trained_on')
  tested = _unique(rows, 'tested_on')
  matrices = {
    name: _matrix(
      [row for row in rows if row['predictor'] == name],
      trained,
      tested,
      'above_exact',
    )
    for name in (studies.EXACT, *_architectures(rows))
  }
  high = max(np.nanmax(matrix) for matrix in matrices.values())
  own = [(i, tested.index(x)) for i, x in enumerate(trained) if x in tested]
  # On a common scale; less than the least shown has its colour.
  norm = matplotlib.colors.LogNorm(0.01, max(high, 0.1), clip=True)
  columns = min(5, len(matrices))
  title = 'What networks and exact predictors lose on other sources'
  with plotting.new_figure(
    2.7 * columns, 1.2 + 2.7 * -(-len(matrices) // columns), title
  ) as figure:
    panels = _panels(figure, len(matrices), columns, sharex=True, sharey=True)
    for panel, (name, matrix) in zip(panels, matrices.items(), strict=True):
      image = plotting.draw_heat_map(
        panel,
        np.maximum(matrix, 0.01),
        [[f'{value:z.2f}' for value in row] for row in matrix],
        [cell for cell in own if not np.isnan(matrix[cell])],
        norm,
      )
      of = 'the exact predictors' if name == studies.EXACT else label(name)
      panel.set_title(textwrap.fill(of, _TITLE_CHARACTERS))
      _name_cells(panel, trained, tested)
    figure.supxlabel('tested on')
    figure.supylabel('trained on, or the exact predictor of')
    plotting.add_colour_bar(
      figure,
      image,
      panels,
      'regret above the exact predictor\n(nats, log scale)',
      aspect=40,
    )
  return figure


def draw_resemblance(
  rows: Sequence[Row], architecture: str
) -> figure_lib.Figure:
  """Draws which exact predictor the networks are nearest to, on every source.

  Args:
    rows: Rows of the table off_distribution.
    architecture: Architecture of the networks.

  Returns:
    The figure: a heat map for every source of training; rows are sources to
    test on, columns exact predictors, numbers KL(exact || network), means over
    seeds. The nearest is framed.
  """
  rows = [row for row in rows if row['predictor'] == architecture]
  trained, tested = _unique(rows, 'trained_on'), _unique(rows, 'tested_on')
  exact = [
    column.removeprefix('kl/') for column in rows[0] if column[:3] == 'kl/'
  ]
  # [trained on, tested on, exact predictor]
  matrices = 1e3 * np.stack(
    [_matrix(rows, trained, tested, f'kl/{name}') for name in exact], axis=-1
  )
  norm = matplotlib.colors.LogNorm(max(matrices.min(), 0.1), matrices.max())
  columns = min(3, len(trained))
  title = f'{label(architecture)}: KL from every exact predictor to it'
  with plotting.new_figure(
    max(7.0, 3.9 * columns), 1.5 + 3.0 * -(-len(trained) // columns), title
  ) as figure:
    panels = _panels(figure, len(trained), columns, sharex=True, sharey=True)
    for panel, trained_on, matrix in zip(
      panels, trained, matrices, strict=True
    ):
      image = plotting.draw_heat_map(
        panel,
        matrix,
        [[f'{value:.1f}' for value in row] for row in matrix],
        enumerate(matrix.argmin(axis=1)),
        norm,
      )
      panel.set_title(f'trained on {trained_on}')
      _name_cells(panel, tested, [exact_label(name) for name in exact])
    figure.supylabel('tested on')
    plotting.add_colour_bar(
      figure,
      image,
      panels,
      'KL(exact || network)\n(1/1000 nats per symbol, log scale)',
      aspect=40,
    )
    plotting.add_legend(
      figure, [plotting.frame((0, 0), 1, 1, label='the nearest of the row')]
    )
  return figure


def _matrix(
  rows: Sequence[Row],
  trained: Sequence[str],
  tested: Sequence[str],
  column: str,
) -> np.ndarray:
  """Means over seeds, by source of training and of testing; NaN if missing."""
  by_cell = groups(rows, 'trained_on', 'tested_on')
  return np.array(
    [
      [
        over_seeds(by_cell[cell], column)[0] if cell in by_cell else np.nan
        for cell in ((trained_on, tested_on) for tested_on in tested)
      ]
      for trained_on in trained
    ]
  )


def _name_cells(
  panel: matplotlib.axes.Axes, rows: Sequence[str], columns: Sequence[str]
) -> None:
  panel.set_xticks(
    range(len(columns)), columns, rotation=35, ha='right', fontsize=8
  )
  panel.set_yticks(range(len(rows)), rows, fontsize=8)


def draw_length_generalization(
  rows: Sequence[Row], training_length: int | None = None
) -> figure_lib.Figure:
  """Draws regret per symbol over position, beyond the length of training.

  Args:
    rows: Rows of the table length_generalization.
    training_length: Length that is marked; None marks none.

  Returns:
    The figure: panels for every source and family of networks; means over seeds
    with standard errors, the exact predictor under them.
  """
  return _draw_curves(
    [
      {**row, 'position': (row['first_position'] + row['last_position']) / 2}
      for row in rows
    ],
    'trained_on',
    ('position', 'position (symbols)'),
    ('regret_per_symbol', 'regret per symbol (nats, log scale)'),
    'What networks lose beyond the length of their training (dotted line)',
    marked=training_length,
  )


def draw_post_switch_regret(rows: Sequence[Row]) -> figure_lib.Figure:
  """Draws regret per symbol against the time since a true switch.

  Args:
    rows: Rows of the table post_switch_regret.

  Returns:
    The figure: panels for every source and family of networks that were trained
    on it, with its own exact predictor, PTW and LAD.
  """
  return _draw_curves(
    rows,
    'tested_on',
    ('symbols_since', 'symbols since a switch'),
    ('regret_per_symbol', 'regret of the symbol (nats, log scale)'),
    'What a switch costs, on the source of training',
  )


def _draw_curves(
  rows: Sequence[Row],
  by: str,
  x: tuple[str, str],
  y: tuple[str, str],
  title: str,
  band: bool = True,
  marked: float | None = None,
) -> figure_lib.Figure:
  """Draws curves of networks, and of exact predictors where rows have them.

  Args:
    rows: Rows of a table.
    by: Column of the sources, which have a row of panels each.
    x: Column of the horizontal axis, and its label.
    y: Column of the vertical axis, which is logarithmic, and its label.
    title: Title of the figure.
    band: Whether networks have a band of standard errors.
    marked: Position that is marked.

  Returns:
    The figure: a panel for every source and family of networks.
  """
  sources = _unique(rows, by)
  names = _architectures(rows)
  families = dict.fromkeys(plotting.style(label(name)).family for name in names)
  shown = {}
  with plotting.new_figure(10.5, 1.5 + 2.2 * len(sources), title) as figure:
    panels = figure.subplots(
      len(sources), len(families), sharey='row', squeeze=False
    )
    for (i, j), panel in np.ndenumerate(panels):
      source, family = sources[i], list(families)[j]
      of_source = [row for row in rows if row[by] == source]
      for name in dict.fromkeys((source, *studies.REFERENCES)):
        of_exact = [
          row
          for row in of_source
          if row['seed'] is None and row['trained_on'] == name
        ]
        if of_exact:
          exact = plotting.SOURCES_OWN if name == source else exact_label(name)
          shown[exact] = None
          _draw_curve(panel, of_exact, x[0], y[0], exact, False)
      for name in names:
        if plotting.style(label(name)).family == family:
          of_name = [row for row in of_source if row['predictor'] == name]
          _draw_curve(panel, of_name, x[0], y[0], label(name), band)
      if marked is not None:
        plotting.mark(panel, marked)
      if x[0] == 'step':
        panel.set_xscale('log')
        plotting.set_plain_ticks(panel.xaxis)
      plotting.add_grid(panel)
      panel.set_title(f'{source}: {family}')
    for panel in panels[:, 0]:  # When all of the row are drawn.
      panel.set_yscale('log')
      plotting.set_plain_ticks(panel.yaxis)
    for panel in panels[-1]:
      panel.set_xlabel(x[1])
    figure.supylabel(y[1])
    handles = plotting.predictor_handles(
      [*map(label, names), *sorted(shown, key=plotting.rank)]
    )
    if band:
      handles.append(plotting.band_handle(_STDERR))
    plotting.add_legend(figure, handles)
  return figure


def _draw_curve(
  panel: matplotlib.axes.Axes,
  rows: Sequence[Row],
  x: str,
  y: str,
  name: str,
  band: bool,
) -> None:
  """Mean over seeds on a logarithmic axis, and a band of standard errors."""
  points = sorted(
    (key, *over_seeds(of_x, y)) for (key,), of_x in groups(rows, x).items()
  )
  # A value that is not positive has no logarithm: noise at the optimum.
  positive = [mean for _, mean, _ in points if mean > 0]
  if not positive:
    return
  xs, means, stderrs = np.array(points).T
  stderrs = np.nan_to_num(stderrs)
  low = np.maximum(means - stderrs, min(positive) / 3)
  means = np.where(means > 0, means, np.nan)
  plotting.draw_line(
    panel, xs, means, name, (low, means + stderrs) if band else None
  )


def draw_linear_probe(rows: Sequence[Row]) -> figure_lib.Figure:
  """Draws how well the exact posterior can be read from a network's state.

  Args:
    rows: Rows of the table linear_probe.

  Returns:
    The figure: a panel for every target and source; the share of variance
    around the mean of every time, before and after training: a dot for every
    seed, and means with standard errors over seeds.
  """
  rows = [row for row in rows if row['r2_given_time'] is not None]
  if not rows:
    raise ValueError('no posterior has variance to explain')
  sources, names = _unique(rows, 'source'), _architectures(rows)
  targets = [name for name in TARGETS if name in _unique(rows, 'target')]
  by_cell = groups(rows, 'target', 'source', 'predictor', 'is_trained')
  title = (
    'What the state of a network tells of the exact posterior: share of its '
    'variance\naround the mean of every time that a linear map explains'
  )
  with plotting.new_figure(
    max(7.0, 2.8 * len(sources)), 1.5 + 3.0 * len(targets), title
  ) as figure:
    panels = figure.subplots(
      len(targets), len(sources), sharex='col', sharey=True, squeeze=False
    )
    for (i, j), panel in np.ndenumerate(panels):
      for (target, source, name, is_trained), of_cell in by_cell.items():
        if (target, source) == (targets[i], sources[j]):
          _draw_seeds(
            panel, names.index(name), of_cell, 'r2_given_time', is_trained
          )
      _finish_rows(panel, names)
      panel.update_datalim([(0, 0), (1, 0)])
      panel.autoscale_view()
      target = textwrap.fill(TARGETS[targets[i]], _TITLE_CHARACTERS)
      panel.set_title(f'{target}\n{sources[j]}', fontsize=9)
      if i == len(panels) - 1:
        panel.set_xlabel('share explained')
    looks = {'marker': 'o', 'color': '0.4'}
    plotting.add_legend(
      figure,
      [
        plotting.handle(f'after training, {_STDERR}', **looks),
        plotting.handle('before training', markerfacecolor='white', **looks),
        plotting.handle('one seed', markersize=3.5, **looks),
      ],
    )
  return figure
