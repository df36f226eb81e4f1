"""Figures of the tables that `studies` measures.

  rows = files.read_csv(pathlib.Path('results/small/length_generalization.csv'))
  draw_length_generalization(rows, training_length=32).savefig('length.png')

Every function takes the rows of a table, as they were measured or as
`atomic_files.read_csv` gives them, and nothing else is computed anew.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib import figure as figure_lib
import numpy as np
from scipy import stats

from nonstationary_mbml.experiments import plotting
from nonstationary_mbml.experiments.analysis import studies
from nonstationary_mbml.experiments.sweeps import sweep_folder

Row = Mapping[str, Any]

LABELS = {
  'rnn': 'RNN',
  'lstm': 'LSTM',
  'stack_rnn': 'Stack-RNN',
  'stack_lstm': 'Stack-LSTM',
  'transformer_none': 'Transformer, no encoding',
  'transformer_sin_cos': 'Transformer, SIN_COS',
  'transformer_alibi': 'Transformer, ALIBI',
  'transformer_relative': 'Transformer, RELATIVE',
  'sliding_window': 'Transformer in windows',
}
EXACT_LABELS = {
  'ptw': 'PTW',
  'lin': 'LAD',
  'regular_shift': 'known period',
  'random_shift': 'known length distribution',
  'static': 'KT',
}
TARGETS = {
  'run_length': 'expected run length',
  'recent_switch': 'probability of a recent switch',
}
# Shares of the exact predictor's regret within which a network is called near
# it, and not far from it.
_SHARES = (0.02, 0.15)
# The own predictor lies under the networks, which often coincide with it.
_EXACT_STYLES = (
  {'color': '0.72', 'linestyle': '-', 'linewidth': 5.0, 'zorder': 1},
  {'color': 'black', 'linestyle': '--', 'linewidth': 1.6},
  {'color': 'black', 'linestyle': ':', 'linewidth': 1.6},
)


def label(predictor: str) -> str:
  """Returns the label of a network's architecture in figures."""
  return LABELS.get(predictor, predictor)


def exact_label(source: str) -> str:
  """Returns the label of the Bayes predictor of a source in figures."""
  if source.startswith('ptw_depth_'):
    return f'PTW, depth {source.removeprefix("ptw_depth_")}'
  return EXACT_LABELS.get(source, f'Bayes for {source}')


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


def _half_width(rows: Sequence[Row]) -> float:
  """Half a 95% confidence interval of a mean over seeds, in standard errors.

  By Student's t: of three seeds it is 4.3.
  """
  return float(stats.t.ppf(0.975, len(rows) - 1)) if len(rows) > 1 else 0.0


def _unique(rows: Iterable[Row], column: str) -> list[Any]:
  return list(dict.fromkeys(row[column] for row in rows))


def _are_networks(rows: Iterable[Row]) -> list[Row]:
  return [row for row in rows if row['seed'] is not None]


def _styles(rows: Iterable[Row]) -> dict[str, dict[str, object]]:
  """Colour and dashes of every architecture, the same in all figures."""
  found = _unique(_are_networks(rows), 'predictor')
  names = [name for name in LABELS if name in found]
  names += [name for name in found if name not in LABELS]
  order = [*LABELS, *(name for name in names if name not in LABELS)]
  return {
    name: plotting.line_style(order.index(name)) | {'linewidth': 1.5}
    for name in names
  }


def _panels(
  number: int,
  height: float,
  columns: int = 3,
  width: float = 3.5,
  **kwargs: Any,
) -> tuple[figure_lib.Figure, list[matplotlib.axes.Axes]]:
  """A figure with panels of the given number and size, in rows."""
  columns = min(columns, number)
  num_rows = -(-number // columns)
  figure = figure_lib.Figure(
    figsize=(max(10.5, width * columns), 1.2 + height * num_rows),
    layout='constrained',
  )
  panels = figure.subplots(num_rows, columns, squeeze=False, **kwargs).ravel()
  for index, panel in enumerate(panels):
    panel.set_visible(index < number)
    if kwargs.get('sharex'):  # Also where the row below has no panel.
      panel.tick_params(labelbottom=index + columns >= number)
  return figure, list(panels[:number])


def _set_log_ticks(
  axis: matplotlib.axis.Axis, subs: Sequence[int] = (1, 2, 5)
) -> None:
  """Puts plain numbers at some multiples of the powers of ten."""
  low, high = axis.get_view_interval()
  subs = subs if high / low < 500 else (1,)
  axis.set_major_locator(matplotlib.ticker.LogLocator(subs=subs))
  axis.set_major_formatter(plotting.plain_number)
  axis.set_minor_formatter(matplotlib.ticker.NullFormatter())


def draw_on_distribution(rows: Sequence[Row]) -> figure_lib.Figure:
  """Draws the final regret above the exact predictor, on the own source.

  Args:
    rows: Rows of the table on_distribution.

  Returns:
    The figure: a panel for every source; a dot for every seed, and means with
    95% confidence intervals over seeds; the other exact predictors as diamonds.
  """
  sources = _unique(rows, 'source')
  networks = list(_styles(rows))
  # A predictor that is only ever the source's own has no distance to itself.
  references = _unique(
    [row for row in rows if row['seed'] is None and not row['is_exact']],
    'predictor',
  )
  names = networks + references
  with matplotlib.rc_context(plotting.STYLE):
    figure, panels = _panels(len(sources), 3.6, 3, 4.0, sharey=True)
    for panel, source in zip(panels, sources, strict=True):
      of_source = groups(
        [row for row in rows if row['source'] == source], 'predictor'
      )
      own = [r for r in rows if r['source'] == source and r.get('is_exact')]
      for (name,), of_name in of_source.items():
        if of_name[0].get('is_exact'):
          continue
        y = names.index(name)
        values = [row['above_exact'] for row in of_name]
        if of_name[0]['seed'] is None:
          panel.plot(values, [y], 'D', color='0.4', markersize=5)
          continue
        panel.plot(
          values,
          np.full(len(values), y),
          'o',
          color=plotting.COLOURS[4],
          markersize=4,
        )
        mean, stderr = over_seeds(of_name, 'above_exact')
        panel.errorbar(
          mean,
          y,
          xerr=_half_width(of_name) * np.nan_to_num(stderr),
          fmt='|',
          color=plotting.COLOURS[0],
          markersize=11,
          markeredgewidth=2,
          capsize=2.5,
        )
      title = source
      for exact in own:
        title += f': {exact["predictor"]} loses {exact["regret"]:.3f}'
        for share in _SHARES:
          panel.axvline(
            share * exact['regret'], color='0.6', linestyle=':', linewidth=1.3
          )
      panel.set_xscale('log')
      _set_log_ticks(panel.xaxis)
      panel.set_yticks(range(len(names)), [label(name) for name in names])
      panel.set_ylim(len(names) - 0.5, -0.5)
      panel.grid(axis='y', color='0.92', linewidth=0.8)
      panel.set_title(title, fontsize=10)
      panel.set_xlabel('regret above it (nats, log scale)')
    plotting.add_legend(
      figure,
      [
        _marker('o', plotting.COLOURS[4], 'network of one seed'),
        _marker('|', plotting.COLOURS[0], 'mean over seeds, 95% confidence'),
        _marker('D', '0.4', 'another exact predictor'),
        plotting.line_handle(
          ':',
          '0.6',
          ' and '.join(f'{share:.0%}' for share in _SHARES) + ' above',
        ),
      ],
    )
    figure.suptitle('What networks lose on the source they were trained on')
  return figure


def draw_learning(rows: Sequence[Row]) -> figure_lib.Figure:
  """Draws regret above the exact predictor against training step.

  Args:
    rows: Rows of the table learning.

  Returns:
    The figure: a panel for every source, means over seeds.
  """
  sources = _unique(rows, 'source')
  styles = _styles(rows)
  with matplotlib.rc_context(plotting.STYLE):
    figure, panels = _panels(len(sources), 3.0)
    for panel, source in zip(panels, sources, strict=True):
      for name, style in styles.items():
        of_name = [
          row
          for row in rows
          if row['source'] == source and row['predictor'] == name
        ]
        # Bands would hide each other.
        _draw_curve(panel, of_name, 'step', 'above_exact', style, band=False)
      panel.set_xscale('log')
      panel.set_yscale('log')
      _set_log_ticks(panel.xaxis, (1, 3))
      _set_log_ticks(panel.yaxis)
      panel.grid(color='0.92', linewidth=0.8)
      panel.set_title(source, fontsize=10)
      panel.set_xlabel('training step (log scale)')
      panel.set_ylabel('regret above the exact\npredictor (nats, log scale)')
    _add_legend(figure, styles, {}, band=False)
    figure.suptitle(
      'How networks come near the Bayes predictor of their source '
      '(means over seeds)'
    )
  return figure


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
  architectures = [studies.EXACT, *_styles(rows)]
  matrices = {}
  for name in architectures:
    matrices[name] = np.full((len(trained), len(tested)), np.nan)
    by_cell = groups(
      [row for row in rows if row['predictor'] == name],
      'trained_on',
      'tested_on',
    )
    for (trained_on, tested_on), of_cell in by_cell.items():
      if trained_on in trained:
        cell = trained.index(trained_on), tested.index(tested_on)
        matrices[name][cell], _ = over_seeds(of_cell, 'above_exact')
  # On a common scale; less than the least shown has its colour.
  high = max(np.nanmax(matrix) for matrix in matrices.values())
  norm = matplotlib.colors.LogNorm(0.01, max(high, 0.1), clip=True)
  with matplotlib.rc_context(plotting.STYLE):
    figure, panels = _panels(
      len(architectures), 2.7, 5, 2.7, sharex=True, sharey=True
    )
    for panel, (name, matrix) in zip(panels, matrices.items(), strict=True):
      shown = np.maximum(np.nan_to_num(matrix, nan=0.01), 0.01)
      image = panel.imshow(shown, norm=norm, cmap='Blues', aspect='auto')
      colours = image.to_rgba(shown)
      for (i, j), value in np.ndenumerate(matrix):
        panel.text(
          j,
          i,
          '–' if np.isnan(value) else f'{value:.2f}',
          ha='center',
          va='center',
          fontsize=8,
          color=plotting.readable_on(colours[i, j]),
        )
        if trained[i] == tested[j] and not np.isnan(value):
          panel.add_patch(plotting.frame((j - 0.48, i - 0.47), 0.96, 0.94))
      panel.set_title(
        'the exact predictors' if name == studies.EXACT else label(name),
        fontsize=10,
      )
      panel.set_xticks(
        range(len(tested)), tested, rotation=35, ha='right', fontsize=8
      )
      panel.set_yticks(range(len(trained)), trained, fontsize=8)
      panel.tick_params(length=0)
      panel.spines[:].set_visible(False)
    figure.supxlabel('tested on', fontsize=10)
    figure.supylabel('trained on, or the exact predictor of', fontsize=10)
    bar = figure.colorbar(image, ax=panels, pad=0.01, aspect=40)
    bar.set_label('regret above the exact predictor (nats, log scale)')
    plotting.set_plain_ticks(bar.ax.yaxis)
    figure.suptitle('What networks and exact predictors lose on other sources')
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
  by_cell = groups(rows, 'trained_on', 'tested_on')
  matrices = np.array(
    [
      [
        [
          1e3 * over_seeds(by_cell[trained_on, tested_on], f'kl/{name}')[0]
          for name in exact
        ]
        for tested_on in tested
      ]
      for trained_on in trained
    ]
  )
  norm = matplotlib.colors.LogNorm(max(matrices.min(), 0.1), matrices.max())
  with matplotlib.rc_context(plotting.STYLE):
    figure, panels = _panels(
      len(trained), 3.0, 3, 3.9, sharex=True, sharey=True
    )
    for panel, trained_on, matrix in zip(
      panels, trained, matrices, strict=True
    ):
      image = panel.imshow(matrix, norm=norm, cmap='Blues', aspect='auto')
      colours = image.to_rgba(matrix)
      for (i, j), value in np.ndenumerate(matrix):
        panel.text(
          j,
          i,
          f'{value:.1f}',
          ha='center',
          va='center',
          fontsize=8,
          color=plotting.readable_on(colours[i, j]),
        )
        if j == matrix[i].argmin():
          panel.add_patch(plotting.frame((j - 0.48, i - 0.47), 0.96, 0.94))
      panel.set_title(f'trained on {trained_on}', fontsize=10)
      panel.set_xticks(
        range(len(exact)),
        [exact_label(name) for name in exact],
        rotation=35,
        ha='right',
        fontsize=8,
      )
      panel.set_yticks(range(len(tested)), tested, fontsize=8)
      panel.tick_params(length=0)
      panel.spines[:].set_visible(False)
    figure.supylabel('tested on', fontsize=10)
    bar = figure.colorbar(image, ax=panels, pad=0.01, aspect=40)
    bar.set_label('KL(exact || network), 1/1000 nats per symbol, log scale')
    plotting.set_plain_ticks(bar.ax.yaxis)
    plotting.add_legend(
      figure, [plotting.frame((0, 0), 1, 1, label='the nearest of the row')]
    )
    figure.suptitle(
      f'{label(architecture)}: KL from every exact predictor to it'
    )
  return figure


def draw_length_generalization(
  rows: Sequence[Row], training_length: int | None = None
) -> figure_lib.Figure:
  """Draws regret per symbol over position, beyond the length of training.

  Args:
    rows: Rows of the table length_generalization.
    training_length: Is marked.

  Returns:
    The figure: a panel for every source; means over seeds with 95% confidence
    bands, the exact predictor under them.
  """
  rows = [
    {**row, 'position': (row['first_position'] + row['last_position']) / 2}
    for row in rows
  ]

  def draw(panel: matplotlib.axes.Axes, source: str) -> None:
    if training_length is not None:
      panel.axvline(training_length, color='0.6', linestyle=':', linewidth=1.3)
    panel.set_yscale('log')
    _set_log_ticks(panel.yaxis)
    panel.set_xlabel('position (symbols)')
    panel.set_ylabel('regret per symbol\n(nats, log scale)')

  return _draw_curves(
    rows,
    'trained_on',
    'position',
    draw,
    'What networks lose beyond the length of their training (dotted line)',
  )


def draw_post_switch_regret(rows: Sequence[Row]) -> figure_lib.Figure:
  """Draws regret per symbol against the time since a true switch.

  Args:
    rows: Rows of the table post_switch_regret.

  Returns:
    The figure: a panel for every source; networks that were trained on it,
    its own exact predictor, PTW and LAD.
  """

  def draw(panel: matplotlib.axes.Axes, source: str) -> None:
    panel.set_yscale('log')
    _set_log_ticks(panel.yaxis)
    panel.set_xlabel('symbols since a switch')
    panel.set_ylabel('regret of the symbol\n(nats, log scale)')

  kept = [
    row
    for row in rows
    if row['seed'] is not None
    or row['trained_on'] in (row['tested_on'], *studies.REFERENCES)
  ]
  return _draw_curves(
    kept,
    'tested_on',
    'symbols_since',
    draw,
    'What a switch costs, on the source of training',
  )


def _draw_curves(
  rows: Sequence[Row],
  by: str,
  x: str,
  finish: Callable[[matplotlib.axes.Axes, str], None],
  title: str,
) -> figure_lib.Figure:
  """Regret per symbol of networks and exact predictors, a panel per source."""
  sources = _unique(rows, by)
  styles = _styles(rows)
  exact = _unique([row for row in rows if row['seed'] is None], 'trained_on')
  others = [name for name in studies.REFERENCES if name in exact]
  with matplotlib.rc_context(plotting.STYLE):
    figure, panels = _panels(len(sources), 3.0, 2, 5.0)
    for panel, source in zip(panels, sources, strict=True):
      of_source = [row for row in rows if row[by] == source]
      for name, style in styles.items():
        _draw_curve(
          panel,
          [row for row in of_source if row['predictor'] == name],
          x,
          'regret_per_symbol',
          style,
        )
      for name in dict.fromkeys((source, *others)):
        style = _EXACT_STYLES[0]
        if name != source:
          style = _EXACT_STYLES[1 + others.index(name)]
        points = sorted(
          (row[x], row['regret_per_symbol'])
          for row in of_source
          if row['seed'] is None and row['trained_on'] == name
        )
        if points:
          panel.plot(*zip(*points, strict=True), **style)
      panel.grid(color='0.92', linewidth=0.8)
      panel.set_axisbelow(True)
      panel.set_title(source, fontsize=10)
      finish(panel, source)
    references = {"the source's exact predictor": _EXACT_STYLES[0]}
    if by == 'tested_on':
      references |= {
        exact_label(name): _EXACT_STYLES[1 + index]
        for index, name in enumerate(others)
      }
    _add_legend(figure, styles, references)
    figure.suptitle(title)
  return figure


def draw_linear_probe(rows: Sequence[Row]) -> figure_lib.Figure:
  """Draws how well the exact posterior can be read from a network's state.

  Args:
    rows: Rows of the table linear_probe.

  Returns:
    The figure: a panel for every target and source; the share of variance
    around the mean of every time, means over seeds, before and after training.
  """
  rows = [row for row in rows if row['r2_given_time'] is not None]
  if not rows:
    raise ValueError('no posterior has variance to explain')
  cells = _unique(
    [{**row, 'cell': (row['target'], row['source'])} for row in rows], 'cell'
  )
  cells.sort(key=lambda cell: list(TARGETS).index(cell[0]))
  sources = _unique(rows, 'source')
  names = list(_styles(rows))
  with matplotlib.rc_context(plotting.STYLE):
    figure, panels = _panels(
      len(cells), 3.0, len(sources), 2.8, sharey=True, sharex=True
    )
    for panel, (target, source) in zip(panels, cells, strict=True):
      of_cell = groups(
        [
          row
          for row in rows
          if row['target'] == target and row['source'] == source
        ],
        'predictor',
        'is_trained',
      )
      for (name, is_trained), of_name in of_cell.items():
        mean, stderr = over_seeds(of_name, 'r2_given_time')
        # Values below 0, worse than the mean of every time, are drawn at 0.
        panel.errorbar(
          max(mean, 0),
          names.index(name),
          xerr=_half_width(of_name) * np.nan_to_num(stderr),
          fmt='o',
          color=plotting.COLOURS[0] if is_trained else plotting.COLOURS[1],
          markerfacecolor=plotting.COLOURS[0] if is_trained else 'white',
          markersize=6,
          capsize=2.5,
        )
      panel.set_yticks(range(len(names)), [label(name) for name in names])
      panel.set_ylim(len(names) - 0.5, -0.5)
      panel.set_xlim(-0.04, 1.04)
      panel.grid(axis='y', color='0.92', linewidth=0.8)
      panel.set_title(f'{TARGETS.get(target, target)}\n{source}', fontsize=9)
    plotting.add_legend(
      figure,
      [
        _marker('o', plotting.COLOURS[0], 'after training'),
        matplotlib.lines.Line2D(
          [],
          [],
          linestyle='none',
          marker='o',
          color=plotting.COLOURS[1],
          markerfacecolor='white',
          label='before training',
        ),
      ],
    )
    figure.suptitle(
      'What the state of a network tells of the exact posterior: share of '
      'its variance\naround the mean of every time that a linear map explains'
    )
  return figure


def _draw_curve(
  panel: matplotlib.axes.Axes,
  rows: Sequence[Row],
  x: str,
  y: str,
  style: Mapping[str, object],
  band: bool = True,
) -> None:
  """Mean over seeds on a logarithmic axis, and a 95% confidence band."""
  points = [
    (key, *over_seeds(of_x, y), _half_width(of_x))
    for (key,), of_x in groups(rows, x).items()
  ]
  if not points:
    return
  xs, means, stderrs, widths = np.array(sorted(points)).T
  half = widths * np.nan_to_num(stderrs)
  # A value that is not positive has no logarithm: noise at the optimum.
  positive = means[means > 0]
  if not len(positive):
    return
  panel.plot(xs, np.where(means > 0, means, np.nan), **style)
  if band:
    panel.fill_between(
      xs,
      np.maximum(means - half, positive.min() / 3),
      means + half,
      color=style['color'],
      alpha=0.18,
      linewidth=0,
    )


def _add_legend(
  figure: figure_lib.Figure,
  styles: Mapping[str, Mapping[str, Any]],
  references: Mapping[str, Mapping[str, Any]],
  band: bool = True,
) -> None:
  handles = [
    matplotlib.lines.Line2D([], [], label=label(name), **style)
    for name, style in styles.items()
  ]
  handles += [
    matplotlib.lines.Line2D([], [], label=name, **style)
    for name, style in references.items()
  ]
  if band:
    handles.append(
      matplotlib.patches.Patch(
        color='0.5', alpha=0.35, linewidth=0, label='95% confidence over seeds'
      )
    )
  plotting.add_legend(figure, handles)


def _marker(marker: str, colour: str, name: str) -> matplotlib.lines.Line2D:
  is_bar = marker == '|'
  return plotting.marker_handle(
    marker,
    colour,
    name,
    markersize=9 if is_bar else 5,
    markeredgewidth=2 if is_bar else 1,
  )
