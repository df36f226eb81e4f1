"""Figures of sequences, and of their predictions.

  plot_regret_over_time({'LSTM': regrets, 'PTW': others})

Arrays come in, figures go out. What they show of a run is measured first, by
analysis/regret_curves.py:

  run = saved_runs.load_run('runs/lstm_ptw_seed0')
  plot_regret_over_time(regret_curves.over_time(run))
"""

from collections.abc import Mapping
from collections.abc import Sequence
import math
import textwrap
from typing import Any
from typing import NamedTuple

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
# More symbols than this are plotted only up to it.
_MAX_SYMBOLS = 3
# A less probable run length has the colour of 0 in the heat map.
_LEAST_PROBABILITY = 1e-3
_DASHES = ('-', '--', '-.', (0, (1, 1)))
# Widths in letters of a legend: the figure, and a handle with its margins.
_LEGEND_WIDTH = 118
_HANDLE_WIDTH = 7
# Half a 95% confidence interval of a mean, in standard errors.
_HALF_WIDTH = 1.96
_ABOVE = 'cumulative_regret_above_optimal'
STYLE = {
  'axes.spines.top': False,
  'axes.spines.right': False,
  'font.size': 10,
  'figure.dpi': 100,
  'legend.frameon': False,
  'savefig.dpi': 150,
}


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
  predictions = {
    name: _array(f'predictions[{name!r}]', values, '[T - 1, K]', after)
    for name, values in predictions.items()
  }
  regrets = {
    name: _array(f'regrets[{name!r}]', values, '[T - 1]', after[:1])
    for name, values in regrets.items()
  }
  seq_length, alphabet_size = symbols.shape
  time = np.arange(1, seq_length + 1)
  shown = range(1, min(alphabet_size, _MAX_SYMBOLS + 1))
  with matplotlib.rc_context(STYLE):
    figure = figure_lib.Figure(
      figsize=(9, 3.0 + 2.4 * len(shown)), layout='constrained'
    )
    *panels, bottom = figure.subplots(
      len(shown) + 1,
      1,
      sharex=True,
      height_ratios=[1.5] * len(shown) + [1],
      squeeze=False,
    )[:, 0]
    for panel, symbol in zip(panels, shown, strict=True):
      _draw_probabilities(panel, time, symbol, symbols, parameters, predictions)
    for index, (name, regret) in enumerate(regrets.items()):
      bottom.plot(
        time[1:],
        np.cumsum(regret),
        label=name,
        **line_style(index),
      )
    bottom.set_ylabel('cumulative\nregret (nats)')
    bottom.set_xlabel('time (symbols)')
    bottom.set_xlim(0, seq_length + 1)
    bottom.set_ylim(bottom=0)
    for panel in (*panels, bottom):
      _draw_switches(panel, switch_points)
    handles, _ = panels[0].get_legend_handles_labels()
    if np.any(switch_points):
      handles.append(_switch_marker('switching point'))
    add_legend(figure, handles)
    figure.suptitle(title, fontsize=11)
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
  with matplotlib.rc_context(STYLE):
    figure = figure_lib.Figure(
      figsize=(9, 1.3 + height * num_sequences), layout='constrained'
    )
    panels = figure.subplots(num_sequences, 1, sharex=True, squeeze=False)[:, 0]
    for index, panel in enumerate(panels):
      if alphabet_size == 2:
        _draw_probabilities(panel, time, 1, batch[index], parameters[index], {})
        panel.set_ylabel('probability\nof symbol 1')
      else:
        _draw_all_probabilities(panel, time, batch[index], parameters[index])
      _draw_switches(panel, switch_points[index])
    panels[-1].set_xlabel('time (symbols)')
    panels[-1].set_xlim(0, seq_length + 1)
    handles, _ = panels[0].get_legend_handles_labels()
    if alphabet_size > 2:
      handles += [
        line_handle('-', '0.25', 'its true probability'),
        marker_handle('o', '0.25', 'its occurrences'),
      ]
    if np.any(switch_points[:num_sequences]):
      handles.append(_switch_marker('switching point'))
    add_legend(figure, handles)
    figure.suptitle(title, fontsize=11)
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
    color='black',
    linewidth=2.5,
    alpha=0.75,
    label='true parameter',
  )
  for index, (name, probabilities) in enumerate(predictions.items()):
    panel.plot(
      time[1:], probabilities[:, symbol], label=name, **line_style(index)
    )
  # Dots above for the symbol itself, below for any other. All panels share the
  # legend.
  which = 'symbol 1' if symbols.shape[1] == 2 else "the panel's symbol"
  occurs = symbols[:, symbol] > 0
  panel.plot(
    time,
    np.where(occurs, 1.08, -0.08),
    linestyle='none',
    marker='o',
    markersize=3.5,
    color='0.25',
    label=f'{which} (top) or another (bottom)',
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
      **line_style(symbol),
    )
    occurs = time[symbols[:, symbol] > 0]
    panel.plot(
      occurs,
      np.full(len(occurs), 1.1 + 0.1 * symbol),
      linestyle='none',
      marker='o',
      markersize=3.5,
      color=line_style(symbol)['color'],
    )
  panel.set_ylim(-0.05, 1.1 + 0.1 * shown)
  panel.set_yticks((0, 0.5, 1))
  panel.set_ylabel('probability\nof a symbol')


def _draw_switches(
  panel: matplotlib.axes.Axes, switch_points: np.ndarray
) -> None:
  # A segment starts with this symbol: the line runs just before it.
  for switch in np.flatnonzero(switch_points) + 0.5:
    panel.axvline(switch, color='0.35', linestyle=':', linewidth=1.2, zorder=0)


def _switch_marker(label: str) -> matplotlib.lines.Line2D:
  return line_handle(':', '0.35', label)


def line_handle(
  linestyle: Any, colour: str, label: str
) -> matplotlib.lines.Line2D:
  """Returns a line for a legend."""
  return matplotlib.lines.Line2D(
    [], [], linestyle=linestyle, color=colour, label=label
  )


def line_style(index: int) -> dict[str, object]:
  """Colour and dashes, so that lines also differ in black and white."""
  return {
    'color': COLOURS[index % len(COLOURS)],
    'linestyle': _DASHES[index % len(_DASHES)],
    'linewidth': 1.8,
  }


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
    _check_shape(
      f'regrets[{name!r}]',
      values,
      '[N, T - 1]',
      (len(values), num_symbols),
    )
  bounds = {
    name: _array(f'bounds[{name!r}]', values, '[T - 1]', (num_symbols,))
    for name, values in (bounds or {}).items()
  }
  time = np.arange(2, num_symbols + 2)
  with matplotlib.rc_context(STYLE):
    figure = figure_lib.Figure(figsize=(9, 6), layout='constrained')
    top, bottom = figure.subplots(2, 1, sharex=True)
    for index, (name, values) in enumerate(regrets.items()):
      cumulative = np.cumsum(values, axis=1)
      _draw_mean(top, time, *_mean_and_stderr(values), name, index)
      _draw_mean(bottom, time, *_mean_and_stderr(cumulative), name, index)
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
      panel.grid(axis='y', color='0.9', linewidth=0.8)
    _add_legend_of_means(figure, bottom, 'sequences')
    figure.suptitle(title, fontsize=11)
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
  with matplotlib.rc_context(STYLE):
    figure = figure_lib.Figure(figsize=(9, 4.5), layout='constrained')
    panel = figure.subplots()
    for index, (name, curve) in enumerate(curves.items()):
      # A line of one point would not be seen.
      marker = 'o' if len(curve.steps) == 1 else None
      _draw_mean(
        panel, curve.steps, curve.mean, curve.stderr, name, index, marker=marker
      )
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
    panel.grid(color='0.9', linewidth=0.8)
    spreads = dict.fromkeys(curve.spread for curve in curves.values())
    _add_legend_of_means(figure, panel, ' or '.join(spreads))
    figure.suptitle(title, fontsize=11)
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
  with matplotlib.rc_context(STYLE):
    figure = figure_lib.Figure(figsize=(9, 4.5), layout='constrained')
    panel = figure.subplots()
    for index, (name, curve) in enumerate(curves.items()):
      _draw_mean(panel, *curve, name, index, marker='o', markersize=4)
    if training_length is not None:
      panel.axvline(
        training_length,
        color='0.35',
        linestyle=':',
        linewidth=1.4,
        zorder=0,
        label='training length',
      )
    panel.set_xscale('log', base=2)
    panel.set_xticks(ticks, [f'{length:,}' for length in ticks])
    panel.minorticks_off()
    panel.set_ylim(bottom=0)
    panel.set_xlabel('sequence length (symbols, log scale)')
    panel.set_ylabel('regret per symbol (nats)')
    panel.grid(color='0.9', linewidth=0.8)
    _add_legend_of_means(figure, panel, 'sequences')
    figure.suptitle(title, fontsize=11)
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
    frames = np.where(np.isnan(means), np.inf, means).argmin(axis=1)
    mark_label = mark_label or 'least of the row'
  else:
    frames = np.full(len(means), -1)
    for source, name in marked.items():
      base_config.check_choice('source of marked', source, regrets)
      base_config.check_choice(f'marked[{source!r}]', name, regrets[source])
      frames[list(regrets).index(source)] = columns.index(name)
    mark_label = mark_label or "the source's exact Bayes predictor"
  with matplotlib.rc_context(STYLE):
    figure = figure_lib.Figure(
      figsize=(9, max(3.6, 1.9 + 0.55 * len(regrets))), layout='constrained'
    )
    panel = figure.subplots()
    low, high = np.nanmin(means), np.nanmax(means)
    norm = (
      matplotlib.colors.LogNorm(low, high)
      if log_scale
      else matplotlib.colors.Normalize(low, high)
    )
    panel.set_facecolor('0.93')  # Shows where a cell is missing.
    image = panel.imshow(means, norm=norm, cmap='Blues', aspect='auto')
    cell_colours = np.where(np.isnan(means)[..., None], 1, image.to_rgba(means))
    for (i, j), mean in np.ndenumerate(means):
      is_marked = frames[i] == j
      panel.text(
        j,
        i,
        _number(mean, stderrs[i, j]) if np.isfinite(mean) else '–',
        ha='center',
        va='center',
        fontsize=9,
        fontweight='bold' if is_marked else 'normal',
        color=readable_on(cell_colours[i, j]),
      )
      if is_marked:
        panel.add_patch(frame((j - 0.47, i - 0.45), 0.94, 0.9))
    panel.set_xticks(
      range(len(columns)),
      [textwrap.fill(name, max(8, 80 // len(columns))) for name in columns],
      fontsize=9,
    )
    panel.set_yticks(range(len(regrets)), list(regrets))
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    panel.set_xlabel('predictor')
    panel.set_ylabel('source')
    bar = figure.colorbar(image, ax=panel, pad=0.02)
    bar.set_label(f'{unit}{", log scale" if log_scale else ""}')
    if log_scale:
      set_plain_ticks(bar.ax.yaxis)
    add_legend(figure, [frame((0, 0), 1, 1, label=mark_label)])
    figure.suptitle(title, fontsize=11)
  return figure


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
    subs = (1, 2, 5) if high / low < 1e3 else (1,)
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
  index: int,
  **kwargs: Any,
) -> None:
  """A line with its 95% confidence band."""
  style = line_style(index)
  panel.plot(x, mean, label=label, **style, **kwargs)
  half = _HALF_WIDTH * stderr
  panel.fill_between(
    x,
    mean - half,
    mean + half,
    color=style['color'],
    alpha=0.25,
    linewidth=0,
  )


def _add_legend_of_means(
  figure: figure_lib.Figure, panel: matplotlib.axes.Axes, spread: str
) -> None:
  """Adds a legend of the lines and of the confidence bands."""
  handles, _ = panel.get_legend_handles_labels()
  band = matplotlib.patches.Patch(
    color='0.5',
    alpha=0.35,
    linewidth=0,
    label=f'95% confidence: mean ± {_HALF_WIDTH} standard errors over {spread}',
  )
  add_legend(figure, [*handles, band])


def add_legend(
  figure: figure_lib.Figure, handles: Sequence[matplotlib.artist.Artist]
) -> None:
  """Adds a legend below the panels, in as few rows as fit the width."""
  widths = [_HANDLE_WIDTH + len(handle.get_label()) for handle in handles]
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
    fontsize=9,
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
      `predictor`, `is_own`, `cumulative_regret`, `stderr` and `bound`.
    labels: Labels of the predictors, from top to bottom.

  Returns:
    The figure: one panel per source, one line per predictor, all on one
    logarithmic axis; known bounds are ticks.
  """
  sources = list(dict.fromkeys(cell['source'] for cell in cells))
  rows = {name: row for row, name in enumerate(labels)}
  with matplotlib.rc_context(STYLE):
    figure = figure_lib.Figure(
      figsize=(9, 1.2 + 2.3 * -(-len(sources) // 3)), layout='constrained'
    )
    panels = figure.subplots(
      -(-len(sources) // 3), 3, sharex=True, sharey=True, squeeze=False
    ).ravel()
    for panel, source in zip(panels, sources, strict=False):
      for cell in cells:
        if cell['source'] == source:
          _draw_cell(panel, rows[cell['predictor']], cell)
      panel.set_title(source, fontsize=10)
      panel.set_xscale('log')
      panel.grid(axis='x', which='both', color='0.9', linewidth=0.8)
      panel.set_axisbelow(True)
    for panel in panels[len(sources) :]:
      panel.set_visible(False)
    panel = panels[0]
    panel.set_xticks((3, 10, 30, 100))
    panel.minorticks_off()
    panel.set_yticks(list(rows.values()), list(labels.values()))
    panel.invert_yaxis()
    panel.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter('%g'))
    figure.supxlabel(
      'cumulative regret (nats, log scale), mean ± standard error', fontsize=10
    )
    figure.legend(
      handles=[
        marker_handle('o', COLOURS[5], "the source's exact Bayes predictor"),
        marker_handle('o', COLOURS[0], 'other predictor'),
        marker_handle('|', '0.3', 'known bound'),
      ],
      loc='outside upper center',
      ncols=3,
      fontsize=9,
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
  with matplotlib.rc_context(STYLE):
    figure = figure_lib.Figure(figsize=(9, 7), layout='constrained')
    top, *middle, bottom = figure.subplots(
      2 + len(posteriors),
      1,
      sharex=True,
      height_ratios=[1.1] + [0.8] * len(posteriors) + [2],
    )
    _draw_probabilities(top, time, 1, symbols, parameters, {})
    for index, (panel, (name, posterior)) in enumerate(
      zip(middle, posteriors.items(), strict=True)
    ):
      # A segment starts just before its first symbol, as the dotted lines.
      panel.vlines(
        time - 0.5, 0, posterior, color=COLOURS[index], linewidth=1.6
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
      color=COLOURS[5],
      linewidth=1.4,
      label='true run length',
    )
    bottom.set_ylabel('symbols in the\ncurrent segment')
    bottom.set_xlabel('time (symbols)')
    bottom.set_xlim(0, seq_length + 1)
    # Run lengths that are never probable are left out.
    longest = np.flatnonzero((run_lengths > _LEAST_PROBABILITY).any(axis=0))[-1]
    bottom.set_ylim(0, max(longest, (time - starts).max()) + 1)
    bar = figure.colorbar(mesh, ax=bottom, pad=0.01, extend='min')
    bar.set_label(f'{run_length_label}:\nP(run length | past)')
    for panel in (top, *middle):
      _draw_switches(panel, switch_points)
    handles, _ = top.get_legend_handles_labels()
    more, _ = bottom.get_legend_handles_labels()
    add_legend(
      figure, [*handles, _switch_marker('true switching point'), *more]
    )
    figure.suptitle(title, fontsize=11)
  return figure


def _draw_cell(
  panel: matplotlib.axes.Axes, row: int, cell: Mapping[str, Any]
) -> None:
  """One predictor on one source."""
  panel.errorbar(
    cell['cumulative_regret'],
    row,
    xerr=cell['stderr'],
    marker='o',
    markersize=7 if cell['is_own'] else 5,
    color=COLOURS[5] if cell['is_own'] else COLOURS[0],
  )
  if cell['bound'] is not None:
    panel.plot(cell['bound'], row, marker='|', markersize=12, color='0.3')


def marker_handle(
  marker: str, colour: str, label: str, **style: Any
) -> matplotlib.lines.Line2D:
  """Returns a marker for a legend."""
  return matplotlib.lines.Line2D(
    [],
    [],
    linestyle='none',
    marker=marker,
    color=colour,
    label=label,
    **style,
  )
