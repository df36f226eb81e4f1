"""Figures of sequences and of what predictors make of them."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib import figure as figure_lib
import numpy as np

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
# What is less probable has the colour of 0 in a heat map.
_LEAST_PROBABILITY = 1e-3
_STYLE = {
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
    title: Of the figure.

  Returns:
    The figure: for every symbol but the first (at most three of them) its
    probability over time, and under them the cumulative regret.
  """
  seq_length, alphabet_size = symbols.shape
  time = np.arange(1, seq_length + 1)
  shown = range(1, min(alphabet_size, _MAX_SYMBOLS + 1))
  with matplotlib.rc_context(_STYLE):
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
        **_line_style(index),
      )
    bottom.set_ylabel('cumulative\nregret (nats)')
    bottom.set_xlabel('time (symbols)')
    bottom.set_xlim(0, seq_length + 1)
    bottom.set_ylim(bottom=0)
    for panel in (*panels, bottom):
      for switch in time[switch_points]:
        # A segment starts with this symbol: the line runs just before it.
        panel.axvline(
          switch - 0.5, color='0.35', linestyle=':', linewidth=1.2, zorder=0
        )
    handles, labels = panels[0].get_legend_handles_labels()
    if np.any(switch_points):
      handles.append(
        matplotlib.lines.Line2D([], [], color='0.35', linestyle=':')
      )
      labels.append('switching point')
    figure.legend(
      handles, labels, loc='outside lower center', ncols=4, fontsize=9
    )
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
      time[1:], probabilities[:, symbol], label=name, **_line_style(index)
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


def _line_style(index: int) -> dict[str, object]:
  """Colour and dashes, so that lines also differ in black and white."""
  return {
    'color': COLOURS[index % len(COLOURS)],
    'linestyle': ('-', '--', '-.', (0, (1, 1)))[index % 4],
    'linewidth': 1.8,
  }


def plot_bayes_table(
  cells: Sequence[Mapping[str, Any]], labels: Mapping[str, str]
) -> figure_lib.Figure:
  """Draws the regret of exact predictors on several sources.

  Args:
    cells: Of `bayes_table`, one for each source and predictor: `source`,
      `predictor`, `is_own`, `cumulative_regret`, `stderr` and `bound`.
    labels: What predictors are called, from top to bottom.

  Returns:
    The figure: one panel per source, one line per predictor, all on one
    logarithmic axis; known bounds are ticks.
  """
  sources = list(dict.fromkeys(cell['source'] for cell in cells))
  rows = {name: row for row, name in enumerate(labels)}
  with matplotlib.rc_context(_STYLE):
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
        _marker('o', COLOURS[5], "the source's exact Bayes predictor"),
        _marker('o', COLOURS[0], 'other predictor'),
        _marker('|', '0.3', 'known bound'),
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
    run_length_label: Whose posterior the latter is.
    title: Of the figure.

  Returns:
    The figure: the symbols with their true probability, the smoothed
    posteriors, and the filtered run length as a heat map.
  """
  seq_length = len(symbols)
  time = np.arange(1, seq_length + 1)
  with matplotlib.rc_context(_STYLE):
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
    # What is never probable is left out.
    longest = np.flatnonzero((run_lengths > _LEAST_PROBABILITY).any(axis=0))[-1]
    bottom.set_ylim(0, max(longest, (time - starts).max()) + 1)
    bar = figure.colorbar(mesh, ax=bottom, pad=0.01, extend='min')
    bar.set_label(f'{run_length_label}:\nP(run length | past)')
    for panel in (top, *middle):
      for switch in time[switch_points]:
        panel.axvline(
          switch - 0.5, color='0.35', linestyle=':', linewidth=1.2, zorder=0
        )
    handles, names = top.get_legend_handles_labels()
    more, more_names = bottom.get_legend_handles_labels()
    switch = matplotlib.lines.Line2D([], [], color='0.35', linestyle=':')
    figure.legend(
      [*handles, switch, *more],
      [*names, 'true switching point', *more_names],
      loc='outside lower center',
      ncols=4,
      fontsize=9,
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


def _marker(marker: str, colour: str, label: str) -> matplotlib.lines.Line2D:
  return matplotlib.lines.Line2D(
    [], [], linestyle='none', marker=marker, color=colour, label=label
  )
