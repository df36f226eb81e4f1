import numpy as np
import pytest

from nonstationary_mbml.experiments import plotting
from nonstationary_mbml.tests import oracles


@pytest.mark.parametrize('alphabet_size', [2, 3, 6])
def test_figure_shows_what_it_is_given(alphabet_size):
  seq_length = 10
  rng = np.random.default_rng(0)
  symbols = oracles.one_hot(rng.integers(alphabet_size, size=10), alphabet_size)
  parameters = rng.dirichlet(np.ones(alphabet_size), size=seq_length)
  switches = np.arange(seq_length) == 4
  predictions = {'PTW': rng.dirichlet(np.ones(alphabet_size), size=9)}
  regrets = {'PTW': np.arange(9.0)}
  figure = plotting.plot_sequence(
    symbols, parameters, switches, predictions, regrets, 'Title'
  )
  *panels, bottom = figure.axes
  assert len(panels) == min(alphabet_size - 1, 3)
  for symbol, panel in enumerate(panels, start=1):
    lines = {line.get_label(): line for line in panel.get_lines()}
    np.testing.assert_array_equal(
      lines['true parameter'].get_ydata(), parameters[:, symbol]
    )
    # Predictions stand at the symbol they are about, from the second on.
    np.testing.assert_array_equal(lines['PTW'].get_xdata(), np.arange(2, 11))
    np.testing.assert_array_equal(
      lines['PTW'].get_ydata(), predictions['PTW'][:, symbol]
    )
    # The new segment begins with the fifth symbol.
    edges = [list(line.get_xdata()) for line in panel.get_lines()]
    assert [4.5, 4.5] in edges
  (cumulative,) = (
    line for line in bottom.get_lines() if line.get_label() == 'PTW'
  )
  np.testing.assert_array_equal(
    cumulative.get_ydata(), np.cumsum(np.arange(9.0))
  )
  assert 'nats' in bottom.get_ylabel()


def test_posteriors_stand_where_the_segments_would_start():
  rng = np.random.default_rng(0)
  symbols = oracles.one_hot(rng.integers(2, size=6), 2)
  switches = np.arange(6) == 2
  posterior = np.array([0.0, 0.1, 0.9, 0.2, 0.0, 0.3])
  run_lengths = rng.dirichlet(np.ones(7), size=6)
  figure = plotting.plot_switch_posteriors(
    symbols,
    np.full((6, 2), 0.5),
    switches,
    {'PTW': posterior, 'LAD': posterior[::-1]},
    run_lengths,
    'LAD',
  )
  _, ptw, lad, heat_map, bar = figure.axes
  for panel, values in ((ptw, posterior), (lad, posterior[::-1])):
    (bars,) = panel.collections
    tops = [segment[1] for segment in bars.get_segments()]
    np.testing.assert_allclose(tops, np.stack([np.arange(6) + 0.5, values], 1))
    # As the true switching point, just before the third symbol.
    (line,) = panel.get_lines()
    assert list(line.get_xdata()) == [2.5, 2.5]
  (mesh,) = heat_map.collections
  np.testing.assert_allclose(mesh.get_array(), np.clip(run_lengths.T, 1e-3, 1))
  # Cells are centred on the number of symbols seen, and on the run length.
  corners = mesh.get_coordinates()
  assert list(corners[0, 0]) == [0.5, -0.5]
  assert list(corners[-1, -1]) == [6.5, 6.5]
  (true_run_length,) = heat_map.get_lines()
  assert list(true_run_length.get_ydata()) == [1, 2, 1, 2, 3, 4]
  assert 'P(run length | past)' in bar.get_ylabel()


def test_bayes_table_has_a_panel_per_source_and_marks_the_own_predictor():
  cells = [
    {
      'source': source,
      'predictor': predictor,
      'is_own': source == predictor,
      'cumulative_regret': 2.0 + index,
      'stderr': 0.1,
      'bound': 20.0 if predictor == 'ptw' else None,
    }
    for source in ('ptw', 'kt', 'lin', 'static')
    for index, predictor in enumerate(('ptw', 'kt'))
  ]
  figure = plotting.plot_bayes_table(cells, {'ptw': 'PTW', 'kt': 'KT'})
  panels = [panel for panel in figure.axes if panel.get_visible()]
  assert [panel.get_title() for panel in panels] == [
    'ptw',
    'kt',
    'lin',
    'static',
  ]
  own = plotting.COLOURS[5]
  for panel, expected in zip(panels, (0, 1, None, None), strict=True):
    regrets = {
      int(line.get_ydata()[0]): line
      for line in panel.get_lines()
      if line.get_marker() == 'o'
    }
    assert [line.get_xdata()[0] for line in regrets.values()] == [2.0, 3.0]
    marked = [row for row, line in regrets.items() if line.get_color() == own]
    assert marked == ([] if expected is None else [expected])
    bounds = [line for line in panel.get_lines() if line.get_marker() == '|']
    assert [line.get_xdata()[0] for line in bounds] == [20.0]
