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
