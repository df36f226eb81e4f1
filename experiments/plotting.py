"""Figures of sequences and of what predictors make of them."""

from collections.abc import Mapping

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
