"""Figures of sequences, and of their predictions.

  plot_regret_over_time({'LSTM': regrets, 'PTW': others})

Arrays come in, figures go out. What they show of a run is measured first, by
analysis/regret_curves.py:

  run = saved_runs.load_run('runs/lstm_ptw_seed0')
  plot_regret_over_time(regret_curves.over_time(run))

A predictor looks the same in every figure: its label decides (`STYLES`).
"""

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import math
import re
import textwrap
from typing import Any
from typing import NamedTuple
import zlib

import matplotlib
from matplotlib import figure as figure_lib
import numpy as np

from nonstationary_mbml import base_config

# Log entries of a run, as in `trained_run.Run`.
History = Sequence[Mapping[str, float]]

# Okabe & Ito's palette, safe for colour-blind readers.
COLOURS = (
  '#0072B2',
  '#E69F00',
  '#009E73',
  '#CC79A7',
  '#56B4E9',
  '#D55E00',
)


class Style(NamedTuple):
  """Looks of a predictor; `family` is the facet that it is drawn in."""

  family: str
  colour: str
  linestyle: Any
  marker: str = ''


RECURRENT, ATTENTION, OTHER = 'recurrent', 'attention', 'other networks'
_EXACT = 'exact'
SOURCES_OWN = "the source's exact predictor"
# Colours of Okabe & Ito, and of Tol's muted palette. Exact predictors are
# dashed; networks are solid and have markers.
STYLES = {
  'true parameter': Style('truth', '0.25', '-'),
  # A wide line, under the others, which often coincide with it.
  SOURCES_OWN: Style(_EXACT, '0.75', '-'),
  'PTW': Style(_EXACT, '#D55E00', '--'),
  'LAD': Style(_EXACT, '#AA3377', '-.'),
  'KT': Style(_EXACT, 'black', ':'),
  'Forget-Me-Not': Style(_EXACT, '#661100', (0, (4, 1, 1, 1, 1, 1))),
  'known period': Style(_EXACT, '0.45', '--'),
  'known length distribution': Style(_EXACT, '0.45', '-.'),
  'run-length mixture': Style(_EXACT, '0.45', ':'),
  'Vanilla RNN': Style(RECURRENT, '#009E73', '-', 'o'),
  'GRU': Style(RECURRENT, '#56B4E9', '-', 'v'),
  'LSTM': Style(RECURRENT, '#0072B2', '-', 's'),
  'Stack-RNN': Style(RECURRENT, '#E69F00', '-', '^'),
  'Stack-GRU': Style(RECURRENT, '#882255', '-', 'P'),
  'Stack-LSTM': Style(RECURRENT, '#CC79A7', '-', 'D'),
  'Transformer, no encoding': Style(ATTENTION, '#999933', '-', 'o'),
  'Transformer, SIN_COS': Style(ATTENTION, '#332288', '-', 's'),
  'Transformer, ALIBI': Style(ATTENTION, '#44AA99', '-', '^'),
  'Transformer, RELATIVE': Style(ATTENTION, '#CC6677', '-', 'D'),
  'Sliding-window Transformer': Style(ATTENTION, '#117733', '-', 'v'),
  'CNN': Style(OTHER, '#AA4499', '-', 'P'),
}
_DASHES = ('-', '--', '-.', (0, (1, 1)))
# Looks of labels that are not in the table: no style in it has these markers.
_FALLBACKS = (
  tuple(dict.fromkeys(s.colour for s in STYLES.values() if s.marker)),
  ('X', '*', 'p', 'h', '<', '>', 'd'),
  _DASHES,
)
# A label with this after it is of the same predictor.
_SEEDS = re.compile(r', (1 of )?\d+ seeds$')
# A label with this after it has the same looks, but for its line.
_VARIANT = re.compile(r', (begin symbol|weight decay)$')
# Distance of markers on a line, in diagonals of the panel, and how much later
# the first one is from one predictor to the next: lines that coincide show the
# markers of each other.
_MARKER_DISTANCE = 0.12
_MARKER_SHIFT = 0.03

# A dotted line at a position of interest.
_MARK = {'color': '0.35', 'linestyle': ':', 'linewidth': 1.2}
# More symbols than this are plotted only up to it.
_MAX_SYMBOLS = 3
# More positions than this are drawn together.
_MAX_POINTS = 1000
# A less probable run length has the colour of 0 in the heat map.
_LEAST_PROBABILITY = 1e-3
# Widths in letters of a legend: the figure, and a handle with its margins.
_LEGEND_WIDTH = 118
_HANDLE_WIDTH = 7
# Half a 95% confidence interval of a mean, in standard errors.
_HALF_WIDTH = 1.96
_ABOVE = 'cumulative_regret_above_optimal'
STYLE = {
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.titlesize': 10,
  'figure.dpi': 100,
  'figure.labelsize': 10,
  'figure.titlesize': 11,
  'font.size': 10,
  'legend.fontsize': 9,
  'legend.frameon': False,
}


def style(label: str) -> Style:
  """Returns the looks of a predictor.

  They depend on its label alone, so that they are the same in every figure.
  Those of a label that `STYLES` lacks are made from its letters.

  Args:
    label: Label of the predictor, with or without `, 3 seeds` after it.
  """
  label = _SEEDS.sub('', label)
  if label in STYLES:
    return STYLES[label]
  plain = _VARIANT.sub('', label)
  if plain in STYLES:
    return STYLES[plain]._replace(linestyle='--')
  rest = zlib.crc32(label.encode())
  chosen = []
  for choices in _FALLBACKS:
    rest, index = divmod(rest, len(choices))
    chosen.append(choices[index])
  colour, marker, linestyle = chosen
  return Style(OTHER, colour, linestyle, marker)


def rank(label: str) -> int:
  """Returns the place of a label in `STYLES`; what it lacks comes last."""
  label = _VARIANT.sub('', _SEEDS.sub('', label))
  return list(STYLES).index(label) if label in STYLES else len(STYLES)


def line_style(label: str) -> dict[str, Any]:
  """Returns the looks of a predictor's line, for `Axes.plot`."""
  _, colour, linestyle, marker = style(label)
  kwargs = {
    'color': colour,
    'linestyle': linestyle,
    'linewidth': 1.6,
    'marker': marker,
    'markersize': 4.5,
  }
  if label == SOURCES_OWN:
    kwargs |= {'linewidth': 5.0, 'zorder': 1}
  return kwargs


def draw_line(
  panel: matplotlib.axes.Axes,
  x: np.ndarray,
  y: np.ndarray,
  label: str,
  band: tuple[np.ndarray, np.ndarray] | None = None,
) -> None:
  """Draws the line of a predictor.

  Args:
    panel: Panel to draw in.
    x: Positions `[P]`.
    y: Values `[P]`.
    label: Label of the predictor.
    band: Lower and upper edge of a band around the line, `[P]` each.
  """
  first = _MARKER_SHIFT * (rank(label) % 4)
  panel.plot(
    x,
    y,
    label=label,
    markevery=(first, _MARKER_DISTANCE) if len(x) > 1 else None,
    **line_style(label),
  )
  if band is not None:
    panel.fill_between(
      x, *band, color=style(label).colour, alpha=0.2, linewidth=0
    )


@contextlib.contextmanager
def new_figure(
  width: float, height: float, title: str
) -> Iterator[figure_lib.Figure]:
  """Makes a figure of the given size in inches, to be drawn in a `with`."""
  with matplotlib.rc_context(STYLE):
    figure = figure_lib.Figure(figsize=(width, height), layout='constrained')
    yield figure
    figure.suptitle(title)


def add_grid(panel: matplotlib.axes.Axes, axis: str = 'both') -> None:
  """Adds a light grid under everything."""
  panel.grid(axis=axis, color='0.9', linewidth=0.8)
  panel.set_axisbelow(True)


def plot_sequence(
  symbols: np.ndarray,
  parameters: np.ndarray,
  switch_points: np.ndarray,
  predictions: Mapping[str, np.ndarray],
  regrets: Mapping[str, np.ndarray],
  title: str = '',
) -> figure_lib.Figure:
  """Draws one sequence, its predictions, and what they cost.

  Args:
    symbols: One-hot `[T, K]`.
    parameters: True probabilities `[T, K]`.
    switch_points: bool `[T]`, True where a new segment starts.
    predictions: Probabilities `[T - 1, K]` of symbols 2, ..., T, by predictor.
    regrets: Their regret `[T - 1]` in nats, by predictor.
    title: Title of the figure.

  Returns:
    The figure: for every symbol but the first (at most three of them) its
    probability over time, and under them the cumulative regret.

  Raises:
    ValueError: If arrays do not fit each other.
  """
  symbols = _array('symbols', symbols, '[T, K]')
  shape = symbols.shape
  parameters = _array('parameters', parameters, '[T, K]', shape)
  switch_points = _switches(switch_points, shape[:1])
  after = (shape[0] - 1, shape[1])
  predictions = _arrays('predictions', predictions, '[T - 1, K]', after)
  regrets = _arrays('regrets', regrets, '[T - 1]', after[:1])
  time = np.arange(1, shape[0] + 1)
  shown = range(1, min(shape[1], _MAX_SYMBOLS + 1))
  with new_figure(9, 3.0 + 2.4 * len(shown), title) as figure:
    *panels, bottom = figure.subplots(
      len(shown) + 1,
      1,
      sharex=True,
      height_ratios=[1.5] * len(shown) + [1],
      squeeze=False,
    )[:, 0]
    for panel, symbol in zip(panels, shown, strict=True):
      _draw_probabilities(panel, time, symbol, symbols, parameters, predictions)
    for name, regret in regrets.items():
      draw_line(bottom, time[1:], np.cumsum(regret), name)
    bottom.set_ylabel('cumulative\nregret (nats)')
    bottom.set_ylim(bottom=0)
    _finish_sequences(
      figure, [*panels, bottom], [switch_points] * (1 + len(panels))
    )
  return figure


def plot_source(
  batch: np.ndarray,
  parameters: np.ndarray,
  switch_points: np.ndarray,
  title: str = '',
  num_sequences: int = 4,
) -> figure_lib.Figure:
  """Draws the first few sequences of a source, one under another.

  Args:
    batch: One-hot symbols `[B, T, K]`.
    parameters: True probabilities `[B, T, K]`.
    switch_points: bool `[B, T]`, True where a new segment starts.
    title: Title of the figure.
    num_sequences: The most that are drawn.

  Returns:
    The figure: for every sequence its symbols and, over time, the true
    probability of symbol 1; with more than two symbols, those of the first six.

  Raises:
    ValueError: If arrays do not fit each other.
  """
  base_config.check_int('num_sequences', num_sequences, 1)
  batch = _array('batch', batch, '[B, T, K]')
  parameters = _array('parameters', parameters, '[B, T, K]', batch.shape)
  switch_points = _switches(switch_points, batch.shape[:2])
  seq_length, alphabet_size = batch.shape[1:]
  num_sequences = min(num_sequences, len(batch))
  height = 1.5 if alphabet_size == 2 else 2.0
  time = np.arange(1, seq_length + 1)
  handles = []
  with new_figure(9, 1.3 + height * num_sequences, title) as figure:
    panels = figure.subplots(num_sequences, 1, sharex=True, squeeze=False)[:, 0]
    for index, panel in enumerate(panels):
      if alphabet_size == 2:
        _draw_probabilities(panel, time, 1, batch[index], parameters[index], {})
      else:
        _draw_all_probabilities(panel, time, batch[index], parameters[index])
    if alphabet_size > 2:
      handles = [
        handle('its true probability', color='0.25', linestyle='-'),
        handle('its occurrences', color='0.25', marker='o', markersize=3.5),
      ]
    _finish_sequences(figure, panels, switch_points, handles)
  return figure


def _draw_probabilities(
  panel: matplotlib.axes.Axes,
  time: np.ndarray,
  symbol: int,
  symbols: np.ndarray,
  parameters: np.ndarray,
  predictions: Mapping[str, np.ndarray],
) -> None:
  """One symbol: where it occurs, its true probability and the predicted."""
  panel.step(
    time,
    parameters[:, symbol],
    where='mid',
    color=style('true parameter').colour,
    linewidth=2.5,
    alpha=0.75,
    label='true parameter',
  )
  for name, probabilities in predictions.items():
    draw_line(panel, time[1:], probabilities[:, symbol], name)
  # Dots above for the symbol itself, below for any other. All panels share the
  # legend.
  which = (
    'symbol: 1 (top) or 0 (bottom)'
    if symbols.shape[1] == 2
    else "the panel's symbol (top) or another (bottom)"
  )
  _draw_occurrences(
    panel,
    time,
    np.where(symbols[:, symbol] > 0, 1.08, -0.08),
    '0.25',
    label=which,
  )
  panel.set_ylim(-0.14, 1.14)
  panel.set_yticks((0, 0.5, 1))
  panel.set_ylabel(f'probability\nof symbol {symbol}')


def _draw_all_probabilities(
  panel: matplotlib.axes.Axes,
  time: np.ndarray,
  symbols: np.ndarray,
  parameters: np.ndarray,
) -> None:
  """The true probabilities of all symbols, and above them which occurs."""
  shown = min(symbols.shape[1], len(COLOURS))
  for symbol in range(shown):
    panel.step(
      time,
      parameters[:, symbol],
      where='mid',
      label=f'symbol {symbol}',
      color=COLOURS[symbol],
      linestyle=_DASHES[symbol % len(_DASHES)],
      linewidth=1.8,
    )
    occurs = time[symbols[:, symbol] > 0]
    _draw_occurrences(
      panel, occurs, np.full(len(occurs), 1.1 + 0.1 * symbol), COLOURS[symbol]
    )
  panel.set_ylim(-0.05, 1.1 + 0.1 * shown)
  panel.set_yticks((0, 0.5, 1))
  panel.set_ylabel('probability\nof a symbol')


def _draw_occurrences(
  panel: matplotlib.axes.Axes,
  time: np.ndarray,
  height: np.ndarray,
  colour: str,
  **kwargs: Any,
) -> None:
  """A dot for every symbol; smaller where there are many."""
  panel.plot(
    time,
    height,
    linestyle='none',
    marker='o',
    markersize=3.5 if len(time) <= 64 else 2,
    color=colour,
    **kwargs,
  )


def _finish_sequences(
  figure: figure_lib.Figure,
  panels: Sequence[matplotlib.axes.Axes],
  switch_points: Sequence[np.ndarray],
  handles: Sequence[matplotlib.artist.Artist] = (),
  switch_label: str = 'switching point',
) -> None:
  """Switching points, time axis and legend of panels over time."""
  for panel, switches in zip(panels, switch_points, strict=False):
    # A segment starts with this symbol: the line runs just before it.
    for switch in np.flatnonzero(switches) + 0.5:
      mark(panel, switch)
  panels[-1].set_xlabel('time (symbols)')
  panels[-1].set_xlim(0, len(switch_points[0]) + 1)
  handles = [*panels[0].get_legend_handles_labels()[0], *handles]
  if np.any(switch_points[: len(panels)]):
    handles.append(handle(switch_label, **_MARK))
  add_legend(figure, handles)


def handle(label: str, **looks: Any) -> matplotlib.lines.Line2D:
  """Returns a line or a marker for a legend."""
  return matplotlib.lines.Line2D(
    [], [], label=label, **{'linestyle': 'none', 'markersize': 6, **looks}
  )


def mark(
  panel: matplotlib.axes.Axes, x: float, label: str | None = None
) -> None:
  """Draws a dotted line under everything, at a position of interest."""
  panel.axvline(x, zorder=0, label=label, **_MARK)


def predictor_handles(labels: Iterable[str]) -> list[matplotlib.lines.Line2D]:
  """Returns the lines of predictors for a legend."""
  return [handle(label, **line_style(label)) for label in labels]


def band_handle(label: str) -> matplotlib.patches.Patch:
  """Returns the band around a line for a legend."""
  return matplotlib.patches.Patch(
    color='0.5', alpha=0.35, linewidth=0, label=label
  )


def plot_regret_over_time(
  regrets: Mapping[str, np.ndarray],
  bounds: Mapping[str, np.ndarray] | None = None,
  title: str = '',
) -> figure_lib.Figure:
  """Draws what predictors lose at every time, and in all until then.

  Args:
    regrets: Regret of symbols 2, ..., T in nats, `[N, T - 1]`, by predictor, as
      from `regret_curves.over_time`.
    bounds: Known upper bounds of the cumulative regret `[T - 1]`, by name.
    title: Title of the figure.

  Returns:
    The figure: instantaneous regret, and under it cumulative regret; means over
    sequences with 95% confidence bands, mean +- 1.96 standard errors.

  Raises:
    ValueError: If there is nothing to draw, or arrays do not fit each other.
  """
  _check_not_empty('regrets', regrets)
  regrets = {
    name: _sample(f'regrets[{name!r}]', values, '[N, T - 1]')
    for name, values in regrets.items()
  }
  num_symbols = next(iter(regrets.values())).shape[1]
  for name, values in regrets.items():
    shape = (len(values), num_symbols)
    _check_shape(f'regrets[{name!r}]', values, '[N, T - 1]', shape)
  bounds = _arrays('bounds', bounds or {}, '[T - 1]', (num_symbols,))
  time = np.arange(2, num_symbols + 2)
  with new_figure(9, 6, title) as figure:
    top, bottom = figure.subplots(2, 1, sharex=True)
    for name, values in regrets.items():
      cumulative = np.cumsum(values, axis=1)
      _draw_mean(top, time, *_mean_and_stderr(values), name)
      _draw_mean(bottom, time, *_mean_and_stderr(cumulative), name)
    for index, (name, bound) in enumerate(bounds.items()):
      bottom.plot(
        time,
        bound,
        color='0.3',
        linestyle=_DASHES[-1 - index % len(_DASHES)],
        linewidth=1.4,
        label=name,
      )
    top.set_ylabel('regret of a symbol\n(nats)')
    bottom.set_ylabel('cumulative regret\n(nats)')
    bottom.set_xlabel('time (symbols)')
    bottom.set_xlim(1, num_symbols + 2)
    for panel in (top, bottom):
      panel.set_ylim(bottom=0)
      add_grid(panel, 'y')
    _add_legend_of_means(figure, bottom, 'sequences')
  return figure


def plot_learning_curve(
  histories: Mapping[str, History],
  optimal_predictor: str | None = None,
  title: str = '',
  labels: Mapping[str, str] | None = None,
) -> figure_lib.Figure:
  """Draws how runs come near the optimum while they train.

  Args:
    histories: History of every run, as in `trained_run.Run`, by name.
    optimal_predictor: Name in the histories of the exact predictor from which
      regret is measured; None is the best of those in a history, in the mean
      over its steps, which is the source's own where there is one.
    title: Title of the figure.
    labels: Labels of exact predictors, by name in the histories.

  Returns:
    The figure: cumulative regret above the optimum against training step, with
    95% confidence bands: mean +- 1.96 standard errors, over the sequences of an
    evaluation, and for an ensemble over its members. Both axes are logarithmic;
    where a band reaches 0, the vertical one is linear near 0.

  Raises:
    ValueError: If there is nothing to draw, or a history lacks the predictor.
  """
  _check_not_empty('histories', histories)
  curves = {
    name: _learning_curve(f'histories[{name!r}]', history, optimal_predictor)
    for name, history in histories.items()
  }
  with new_figure(9, 4.5, title) as figure:
    panel = figure.subplots()
    for name, curve in curves.items():
      _draw_mean(panel, curve.steps, curve.mean, curve.stderr, name)
    panel.set_xscale('log')
    set_plain_ticks(panel.xaxis)
    scale = _set_nearly_log(panel, list(curves.values()))
    labels = labels or {}
    optima = {
      labels.get(curve.optimum, curve.optimum) for curve in curves.values()
    }
    optimum = optima.pop() if len(optima) == 1 else 'the best exact predictor'
    panel.set_xlabel('training step (log scale)')
    panel.set_ylabel(f'cumulative regret above\n{optimum} (nats, {scale})')
    add_grid(panel)
    spreads = dict.fromkeys(curve.spread for curve in curves.values())
    _add_legend_of_means(figure, panel, ' or '.join(spreads))
  return figure


def plot_length_generalisation(
  regrets: Mapping[str, Mapping[int, np.ndarray]],
  training_length: int | None = None,
  title: str = '',
) -> figure_lib.Figure:
  """Draws what predictors lose per symbol of shorter and longer sequences.

  Args:
    regrets: Cumulative regret `[N]` in nats of sequences of every length, by
      predictor and length, as from `regret_curves.by_length`.
    training_length: Length that is marked; None marks none.
    title: Title of the figure.

  Returns:
    The figure: regret per predicted symbol against sequence length, mean over
    sequences with 95% confidence bands, mean +- 1.96 standard errors.

  Raises:
    ValueError: If there is nothing to draw, or arrays do not fit each other.
  """
  _check_not_empty('regrets', regrets)
  curves = {}
  for name, by_length in regrets.items():
    _check_not_empty(f'regrets[{name!r}]', by_length)
    points = []
    for length in sorted(by_length):
      field = f'regrets[{name!r}][{length!r}]'
      base_config.check_int(f'length of {field}', length, 2)
      values = _sample(field, by_length[length], '[N]')
      points.append((length, *_mean_and_stderr(values / (length - 1))))
    curves[name] = np.array(points).T
  ticks = sorted({length for values in regrets.values() for length in values})
  with new_figure(9, 4.5, title) as figure:
    panel = figure.subplots()
    for name, curve in curves.items():
      _draw_mean(panel, *curve, name)
    if training_length is not None:
      mark(panel, training_length, 'training length')
    panel.set_xscale('log', base=2)
    panel.set_xticks(ticks, [f'{length:,}' for length in ticks])
    panel.minorticks_off()
    panel.set_ylim(bottom=0)
    panel.set_xlabel('sequence length (symbols, log scale)')
    panel.set_ylabel('regret per symbol (nats)')
    add_grid(panel)
    _add_legend_of_means(figure, panel, 'sequences')
  return figure


def plot_matrix(
  regrets: Mapping[str, Mapping[str, float | np.ndarray]],
  marked: Mapping[str, str] | None = None,
  mark_label: str | None = None,
  unit: str = 'cumulative regret (nats)',
  log_scale: bool = True,
  title: str = '',
) -> figure_lib.Figure:
  """Draws predictors on sources, one number for each.

  Args:
    regrets: Regrets by source (row) and predictor (column): a number, or values
      `[N]` of sequences whose mean and standard error are shown, as from
      `regret_curves.by_source`. A source need not have all predictors.
    marked: The predictor with a frame in every row, by source; None frames the
      least.
    mark_label: Meaning of a frame, for the legend.
    unit: Unit of the numbers, with the name of their quantity.
    log_scale: Whether colours are logarithmic.
    title: Title of the figure.

  Returns:
    The figure: a heat map with the numbers in its cells.

  Raises:
    ValueError: If there is nothing to draw, a marked cell is not there, or a
      number has no logarithm.
  """
  _check_not_empty('regrets', regrets)
  for source, row in regrets.items():
    _check_not_empty(f'regrets[{source!r}]', row)
  columns = list(
    dict.fromkeys(name for row in regrets.values() for name in row)
  )
  means = np.full((len(regrets), len(columns)), np.nan)
  stderrs = np.full_like(means, np.nan)
  for i, (source, row) in enumerate(regrets.items()):
    for name, value in row.items():
      field = f'regrets[{source!r}][{name!r}]'
      j = columns.index(name)
      if np.ndim(value) == 0:
        means[i, j] = float(value)
      else:
        means[i, j], stderrs[i, j] = _mean_and_stderr(
          _sample(field, value, '[N]')
        )
      if log_scale and not means[i, j] > 0:
        raise ValueError(
          f'{field} is {means[i, j]:g}; log_scale=True takes positive numbers'
        )
  if marked is None:
    framed = enumerate(np.where(np.isnan(means), np.inf, means).argmin(axis=1))
    mark_label = mark_label or 'least of the row'
  else:
    framed = []
    for source, name in marked.items():
      base_config.check_choice('source of marked', source, regrets)
      base_config.check_choice(f'marked[{source!r}]', name, regrets[source])
      framed.append((list(regrets).index(source), columns.index(name)))
    mark_label = mark_label or "the source's exact Bayes predictor"
  scale = (
    matplotlib.colors.LogNorm if log_scale else matplotlib.colors.Normalize
  )
  with new_figure(9, max(3.6, 1.9 + 0.55 * len(regrets)), title) as figure:
    panel = figure.subplots()
    image = draw_heat_map(
      panel,
      means,
      [list(map(_number, *row)) for row in zip(means, stderrs, strict=True)],
      framed,
      scale(np.nanmin(means), np.nanmax(means)),
      fontsize=9,
    )
    width = max(8, 80 // len(columns))
    panel.set_xticks(
      range(len(columns)),
      [textwrap.fill(x, width, break_long_words=False) for x in columns],
      fontsize=9,
    )
    panel.set_yticks(range(len(regrets)), list(regrets))
    panel.set_xlabel('predictor')
    panel.set_ylabel('source')
    add_colour_bar(
      figure, image, panel, f'{unit}{", log scale" if log_scale else ""}'
    )
    add_legend(figure, [frame((0, 0), 1, 1, label=mark_label)])
  return figure


def draw_heat_map(
  panel: matplotlib.axes.Axes,
  values: np.ndarray,
  texts: Sequence[Sequence[str]],
  framed: Iterable[tuple[int, int]],
  norm: matplotlib.colors.Normalize,
  fontsize: float = 8,
) -> matplotlib.image.AxesImage:
  """Draws a matrix with a text in every cell.

  Args:
    panel: Panel to draw in.
    values: Numbers that are coloured; NaN where a cell is missing.
    texts: Texts of the cells, row by row.
    framed: Row and column of the cells that have a frame.
    norm: Scale of the colours.
    fontsize: Size of the texts.
  """
  panel.set_facecolor('0.93')  # Shows where a cell is missing.
  image = panel.imshow(values, norm=norm, cmap='Blues', aspect='auto')
  colours = np.where(np.isnan(values)[..., None], 1, image.to_rgba(values))
  framed = set(framed)
  for (i, j), value in np.ndenumerate(values):
    is_framed = (i, j) in framed
    panel.text(
      j,
      i,
      '–' if np.isnan(value) else texts[i][j],
      ha='center',
      va='center',
      fontsize=fontsize,
      fontweight='bold' if is_framed else 'normal',
      color=readable_on(colours[i, j]),
    )
    if is_framed:
      panel.add_patch(frame((j - 0.47, i - 0.45), 0.94, 0.9))
  panel.tick_params(length=0)
  panel.spines[:].set_visible(False)
  return image


class _LearningCurve(NamedTuple):
  """Curve of one run; `spread` names what its standard errors are over."""

  steps: np.ndarray
  mean: np.ndarray
  stderr: np.ndarray
  optimum: str
  spread: str


def _learning_curve(
  field: str, history: History, optimal_predictor: str | None
) -> _LearningCurve:
  """Regret above an exact predictor, or the best of them."""
  _check_not_empty(field, history)
  keys = [key for key in history[0] if all(key in entry for entry in history)]
  prefix = f'{_ABOVE}/'
  names = [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]
  if not names or 'step' not in keys:
    raise ValueError(
      f'{field} must have step and {prefix}<name> in all entries; it has '
      f'{", ".join(sorted(keys)) or "nothing"}'
    )
  values = {
    key: np.array([entry[key] for entry in history], np.float64) for key in keys
  }
  optimum = optimal_predictor
  if optimum is None:
    # On the same sequences, the least regret is the farthest below.
    optimum = max(names, key=lambda name: values[prefix + name].mean())
  base_config.check_choice(f'optimal_predictor of {field}', optimum, names)
  mean = values[prefix + optimum]
  stderr = values.get(f'seeds_stderr/{prefix}{optimum}')
  spread = 'sequences' if stderr is None else 'seeds'
  if stderr is None:
    stderr = values.get(
      f'{_ABOVE}_stderr/{optimum}', np.full_like(mean, np.nan)
    )
  return _LearningCurve(values['step'], mean, stderr, optimum, spread)


def add_colour_bar(
  figure: figure_lib.Figure,
  image: matplotlib.cm.ScalarMappable,
  panels: matplotlib.axes.Axes | Sequence[matplotlib.axes.Axes],
  unit: str,
  **kwargs: Any,
) -> None:
  """Adds the scale of a heat map, beside its panel or panels."""
  bar = figure.colorbar(image, ax=panels, pad=0.01, **kwargs)
  bar.set_label(unit)
  if isinstance(image.norm, matplotlib.colors.LogNorm):
    set_plain_ticks(bar.ax.yaxis)


def _set_nearly_log(
  panel: matplotlib.axes.Axes, curves: Sequence[_LearningCurve]
) -> str:
  """Makes the vertical axis logarithmic, but linear where noise reaches 0.

  Returns what the axis is to be called.
  """
  lowest = min(
    np.min(curve.mean - _HALF_WIDTH * np.nan_to_num(curve.stderr))
    for curve in curves
  )
  if lowest > 0:
    panel.set_yscale('log')
    set_plain_ticks(panel.yaxis)
    return 'log scale'
  # Linear within the width of the last bands, which is noise around 0.
  widths = [_HALF_WIDTH * curve.stderr[-1] for curve in curves]
  largest = max(np.max(np.abs(curve.mean)) for curve in curves)
  threshold = np.nanmax([*widths, 1e-3 * largest])
  threshold = 10.0 ** math.ceil(math.log10(threshold)) if threshold > 0 else 1
  panel.set_yscale('symlog', linthresh=threshold)
  panel.yaxis.set_major_formatter(plain_number)
  panel.axhline(0, color='0.35', linewidth=1, zorder=0)
  return f'log scale beyond ±{threshold:g}'


def set_plain_ticks(axis: matplotlib.axis.Axis) -> None:
  """Puts plain numbers at the ticks of a logarithmic axis."""
  low, high = axis.get_view_interval()
  if high / low < 10:
    axis.set_major_locator(matplotlib.ticker.AutoLocator())
  else:
    # Labels take more room on a horizontal axis.
    most = 1e2 if axis.axis_name == 'x' else 1e3
    subs = (1, 2, 5) if high / low < most else (1,)
    axis.set_major_locator(matplotlib.ticker.LogLocator(subs=subs))
  axis.set_major_formatter(plain_number)
  axis.set_minor_formatter(matplotlib.ticker.NullFormatter())


def plain_number(value: float, _: int) -> str:
  """Formats a tick: no powers of ten, and a proper minus sign."""
  text = f'{value:,.0f}' if abs(value) >= 1000 else f'{value:g}'
  return text.replace('-', '\N{MINUS SIGN}')


def _draw_mean(
  panel: matplotlib.axes.Axes,
  x: np.ndarray,
  mean: np.ndarray,
  stderr: np.ndarray,
  label: str,
) -> None:
  """A line with its 95% confidence band."""
  half = _HALF_WIDTH * stderr
  draw_line(panel, x, mean, label, (mean - half, mean + half))


def _add_legend_of_means(
  figure: figure_lib.Figure, panel: matplotlib.axes.Axes, spread: str
) -> None:
  """Adds a legend of the lines and of the confidence bands."""
  handles, _ = panel.get_legend_handles_labels()
  band = band_handle(
    f'95% confidence: mean ± {_HALF_WIDTH} standard errors over {spread}'
  )
  add_legend(figure, [*handles, band])


def add_legend(
  figure: figure_lib.Figure, handles: Sequence[matplotlib.artist.Artist]
) -> None:
  """Adds a legend below the panels, in as few rows as fit the width."""
  widths = [_HANDLE_WIDTH + len(artist.get_label()) for artist in handles]
  for num_rows in range(-(-len(handles) // 4), len(handles) + 1):
    # Columns are filled one after another.
    begins = range(0, len(handles), num_rows)
    columns = [widths[begin : begin + num_rows] for begin in begins]
    if sum(map(max, columns)) <= _LEGEND_WIDTH:
      break
  figure.legend(
    handles=list(handles),
    loc='outside lower center',
    ncols=len(columns),
  )


def _mean_and_stderr(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Mean and standard error over the N sequences of `[N, ...]`."""
  return values.mean(axis=0), values.std(axis=0, ddof=1) / np.sqrt(len(values))


def _number(mean: float, stderr: float) -> str:
  """`1.234 ± 0.012`: to two digits of the error; three digits without one."""
  has_stderr = np.isfinite(stderr) and stderr > 0
  least, digits = (stderr, 2) if has_stderr else (abs(mean), 3)
  decimals = digits - 1 - math.floor(math.log10(least)) if least > 0 else 0
  decimals = min(max(decimals, 0), 4)
  text = f'{mean:.{decimals}f}'
  return f'{text}\n± {stderr:.{decimals}f}' if has_stderr else text


def readable_on(colour: Sequence[float]) -> str:
  """Black or white, whichever has more contrast by WCAG 2."""
  luminance = np.dot((0.2126, 0.7152, 0.0722), np.power(colour[:3], 2.2))
  # Contrast is (lighter + 0.05) / (darker + 0.05).
  return 'black' if (luminance + 0.05) ** 2 > 0.05 * 1.05 else 'white'


def frame(
  corner: tuple[float, float], width: float, height: float, **kwargs: Any
) -> matplotlib.patches.Rectangle:
  """Returns the frame that marks a cell of a heat map."""
  return matplotlib.patches.Rectangle(
    corner,
    width,
    height,
    fill=False,
    edgecolor=COLOURS[5],
    linewidth=2.2,
    **kwargs,
  )


def _check_not_empty(field: str, values: Sequence[Any] | Mapping) -> None:
  if not len(values):
    raise ValueError(f'{field} is empty; there is nothing to draw')


def _array(
  field: str, values: Any, axes: str, shape: tuple[int, ...] | None = None
) -> np.ndarray:
  """Numbers in float64, or ValueError; `axes` is what messages call them."""
  values = np.asarray(values, np.float64)
  _check_shape(field, values, axes, shape or values.shape)
  return values


def _arrays(
  field: str, arrays: Mapping[str, Any], axes: str, shape: tuple[int, ...]
) -> dict[str, np.ndarray]:
  return {
    name: _array(f'{field}[{name!r}]', values, axes, shape)
    for name, values in arrays.items()
  }


def _check_shape(
  field: str, values: np.ndarray, axes: str, shape: tuple[int, ...]
) -> None:
  if values.ndim != axes.count(',') + 1 or 0 in values.shape:
    raise ValueError(f'{field} has shape {values.shape}; it must be {axes}')
  if values.shape != shape:
    raise ValueError(
      f'{field} has shape {values.shape}; it must be {axes} = {shape}'
    )


def _sample(field: str, values: Any, axes: str) -> np.ndarray:
  """As `_array`, of at least two sequences."""
  values = _array(field, values, axes)
  if len(values) < 2:
    raise ValueError(
      f'{field} has one sequence; a standard error takes two or more'
    )
  return values


def _switches(switch_points: Any, shape: tuple[int, ...]) -> np.ndarray:
  axes = '[B, T]' if len(shape) == 2 else '[T]'
  return _array('switch_points', switch_points, axes, shape) > 0


def plot_bayes_table(
  cells: Sequence[Mapping[str, Any]], labels: Mapping[str, str]
) -> figure_lib.Figure:
  """Draws the regret of exact predictors on several sources.

  Args:
    cells: Cells of `bayes_table`, one for each source and predictor: `source`,
      `predictor`, `is_exact`, `cumulative_regret`, `stderr` and `bound`.
    labels: Labels of the predictors, from top to bottom.

  Returns:
    The figure: one panel per source, one line per predictor, all on one
    logarithmic axis; known bounds are ticks.
  """
  sources = list(dict.fromkeys(cell['source'] for cell in cells))
  rows = {name: row for row, name in enumerate(labels)}
  num_rows = -(-len(sources) // 3)
  own = {'marker': 'o', 'markersize': 7, 'color': 'black'}
  other = {'marker': 'o', 'markersize': 5, 'color': '0.4', 'mfc': 'white'}
  bound = {'marker': '|', 'markersize': 12, 'color': '0.4', 'mew': 2}
  title = 'Every exact predictor on every source: mean ± standard error'
  with new_figure(9, 1.5 + 2.3 * num_rows, title) as figure:
    panels = figure.subplots(
      num_rows, 3, sharex=True, sharey=True, squeeze=False
    ).ravel()
    for panel in panels[len(sources) :]:
      panel.set_visible(False)
    for panel, source in zip(panels, sources, strict=False):
      for cell in cells:
        if cell['source'] == source:
          row = rows[cell['predictor']]
          if cell['bound'] is not None:
            panel.plot(cell['bound'], row, **bound)
          panel.errorbar(
            cell['cumulative_regret'],
            row,
            xerr=cell['stderr'],
            **(own if cell['is_exact'] else other),
          )
      panel.set_title(source)
      panel.set_xscale('log')
      add_grid(panel)
    panels[0].set_yticks(list(rows.values()), list(labels.values()))
    panels[0].invert_yaxis()
    set_plain_ticks(panels[0].xaxis)
    for panel in panels[-3:]:
      panel.set_xlabel('cumulative regret\n(nats, log scale)')
    add_legend(
      figure,
      [
        handle("the source's exact Bayes predictor", **own),
        handle('another exact predictor', **other),
        handle('known upper bound', **bound),
      ],
    )
  return figure


def plot_switch_posteriors(
  symbols: np.ndarray,
  parameters: np.ndarray,
  switch_points: np.ndarray,
  posteriors: Mapping[str, np.ndarray],
  run_lengths: np.ndarray,
  run_length_label: str,
  title: str = '',
) -> figure_lib.Figure:
  """Draws where exact predictors think that a sequence switched.

  Args:
    symbols: One-hot `[T, K]`.
    parameters: True probabilities `[T, K]`.
    switch_points: bool `[T]`, True where a new segment starts.
    posteriors: P(a segment starts at t | all symbols) `[T]`, by predictor.
    run_lengths: P(n symbols of the current segment so far | those seen) after
      every symbol, `[T, T + 1]`.
    run_length_label: Label of the predictor that `run_lengths` is from.
    title: Title of the figure.

  Returns:
    The figure: the symbols with their true probability, the smoothed
    posteriors, and the filtered run length as a heat map.
  """
  seq_length = len(symbols)
  time = np.arange(1, seq_length + 1)
  with new_figure(9, 7, title) as figure:
    top, *middle, bottom = figure.subplots(
      2 + len(posteriors),
      1,
      sharex=True,
      height_ratios=[1.1] + [0.8] * len(posteriors) + [2],
    )
    _draw_probabilities(top, time, 1, symbols, parameters, {})
    for panel, (name, posterior) in zip(
      middle, posteriors.items(), strict=True
    ):
      # A segment starts just before its first symbol, as the dotted lines.
      panel.vlines(
        time - 0.5, 0, posterior, color=style(name).colour, linewidth=1.6
      )
      panel.set_ylim(0, 1.05)
      panel.set_yticks((0, 0.5, 1))
      panel.set_ylabel(f'{name}:\nP(switch | all)')
    # Cells are centred on (symbols seen, run length); n = 0 is a new segment.
    mesh = bottom.pcolormesh(
      np.arange(seq_length + 1) + 0.5,
      np.arange(run_lengths.shape[1] + 1) - 0.5,
      np.clip(run_lengths.T, _LEAST_PROBABILITY, 1),
      norm=matplotlib.colors.LogNorm(_LEAST_PROBABILITY, 1),
      cmap='Blues',
      rasterized=True,
    )
    starts = np.maximum.accumulate(np.where(switch_points, time - 1, 0))
    bottom.step(
      time,
      time - starts,
      where='mid',
      color=COLOURS[1],
      linewidth=1.6,
      label='true run length',
    )
    bottom.set_ylabel('symbols in the\ncurrent segment')
    # Run lengths that are never probable are left out.
    longest = np.flatnonzero((run_lengths > _LEAST_PROBABILITY).any(axis=0))[-1]
    bottom.set_ylim(0, max(longest, (time - starts).max()) + 1)
    unit = f'{run_length_label}:\nP(run length | past)'
    add_colour_bar(figure, mesh, bottom, unit, extend='min')
    more, _ = bottom.get_legend_handles_labels()
    _finish_sequences(
      figure,
      (top, *middle, bottom),
      [switch_points] * (1 + len(middle)),
      more,
      'true switching point',
    )
  return figure


def plot_code_lengths(
  positions: np.ndarray,
  bits: Mapping[str, np.ndarray],
  switches: Mapping[str, np.ndarray] | None = None,
  title: str = '',
) -> figure_lib.Figure:
  """Draws how many bits predictors need for a file, and where it switched.

  Args:
    positions: Positions 1, ..., T, `[P]`, the last one at the end.
    bits: Code length of the symbols up to them in bits, `[P]`, by predictor.
    switches: P(a segment starts at t | the whole file), `[T]`, by predictor.
    title: Title of the figure.

  Returns:
    The figure: code length so far above that of the predictor which is best at
    the end, and under it the probability of a switch, in long files the largest
    one around each position.

  Raises:
    ValueError: If there is nothing to draw, or arrays do not fit each other.
  """
  _check_not_empty('bits', bits)
  positions = _array('positions', positions, '[P]')
  bits = _arrays('bits', bits, '[P]', positions.shape)
  length = int(positions[-1])
  switches = _arrays('switches', switches or {}, '[T]', (length,))
  best = min(bits, key=lambda name: bits[name][-1])
  num_panels = 1 + len(switches)
  with new_figure(9, 2.6 + 1.4 * num_panels, title) as figure:
    top, *panels = figure.subplots(
      num_panels,
      1,
      sharex=True,
      height_ratios=[2.2] + [1] * len(switches),
      squeeze=False,
    )[:, 0]
    for name, values in bits.items():
      draw_line(top, positions, values - bits[best], name)
    top.set_ylabel(f'code length so far,\nabove {best} (bits)')
    add_grid(top)
    size = -(-length // _MAX_POINTS)
    for panel, (name, posterior) in zip(panels, switches.items(), strict=True):
      padded = np.pad(posterior, (0, -length % size))
      height = padded.reshape(-1, size).max(axis=1)
      middles = np.arange(len(height)) * size + (size + 1) / 2
      panel.vlines(middles, 0, height, color=style(name).colour, linewidth=1)
      around = f'\nlargest of {size:,}' if size > 1 else ''
      panel.set_ylabel(f'P(switch),\n{name}{around}')
      panel.set_ylim(0, 1)
      add_grid(panel)
    [top, *panels][-1].set_xlabel('position (symbols)')
    top.xaxis.set_major_formatter(plain_number)
    top.yaxis.set_major_formatter(plain_number)
    add_legend(figure, predictor_handles(bits))
  return figure
