import collections

from matplotlib import colors
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
      'is_exact': source == predictor,
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
  for panel, expected in zip(panels, (0, 1, None, None), strict=True):
    regrets = {
      int(line.get_ydata()[0]): line
      for line in panel.get_lines()
      if line.get_marker() == 'o'
    }
    assert [line.get_xdata()[0] for line in regrets.values()] == [2.0, 3.0]
    marked = [
      row
      for row, line in regrets.items()
      if line.get_markerfacecolor() == 'black'
    ]
    assert marked == ([] if expected is None else [expected])
    bounds = [line for line in panel.get_lines() if line.get_marker() == '|']
    assert [line.get_xdata()[0] for line in bounds] == [20.0]


def test_predictor_looks_the_same_in_every_figure_and_company():
  looks = collections.defaultdict(set)
  rng = np.random.default_rng(0)
  mean = lambda: rng.gamma(1.0, size=(3, 9))
  batch, parameters, switches = _source(2)
  names = ('LAD', 'my network', 'LSTM', 'another', 'PTW')
  for order in (names, names[::-1], names[2:]):
    for figure in (
      plotting.plot_regret_over_time({name: mean() for name in order}),
      plotting.plot_learning_curve(
        {name: _history([2.0, 1.0]) for name in order}
      ),
      plotting.plot_length_generalisation(
        {name: {4: np.ones(3), 8: np.ones(3)} for name in order}
      ),
      plotting.plot_sequence(
        batch[0],
        parameters[0],
        switches[0],
        {name: parameters[0, 1:] for name in order},
        {name: np.ones(9) for name in order},
      ),
    ):
      for panel in figure.axes:
        for line in panel.get_lines():
          if line.get_label() in names:
            looks[line.get_label()].add(
              (line.get_color(), line.get_linestyle(), line.get_marker())
            )
  assert {name: len(styles) for name, styles in looks.items()} == dict.fromkeys(
    names, 1
  )
  assert len(set.union(*looks.values())) == len(names)


def test_no_two_predictors_of_the_table_look_the_same():
  looks = [style._replace(family='') for style in plotting.STYLES.values()]
  assert len(set(looks)) == len(looks)
  # Nor does any other label look like one of them.
  others = {plotting.style(f'run {i}')._replace(family='') for i in range(500)}
  assert not others & set(looks)
  assert len(others) > 200


def test_ensembles_look_like_their_networks():
  for label in ('LSTM, 3 seeds', 'LSTM, 1 of 3 seeds'):
    assert plotting.style(label) == plotting.style('LSTM')
  assert plotting.style('LSTM, wide') != plotting.style('LSTM')


def test_symbols_of_two_are_called_0_and_1():
  batch, parameters, switches = _source(2)
  assert _legend(plotting.plot_source(batch, parameters, switches)) == [
    'true parameter',
    'symbol: 1 (top) or 0 (bottom)',
    'switching point',
  ]


def _lines(panel):
  return {line.get_label(): line for line in panel.get_lines()}


def _check_band(panel, index, x, mean, stderr):
  """The index-th band of a panel is the mean +- 1.96 standard errors."""
  (path,) = panel.collections[index].get_paths()
  for position, low, high in zip(
    x, mean - 1.96 * stderr, mean + 1.96 * stderr, strict=True
  ):
    edges = path.vertices[path.vertices[:, 0] == position, 1]
    np.testing.assert_allclose([edges.min(), edges.max()], [low, high])


def _stderr(values):
  return np.std(values, axis=0, ddof=1) / np.sqrt(len(values))


def _legend(figure):
  return [text.get_text() for text in figure.legends[0].get_texts()]


# Sequences.


def _source(alphabet_size, num_sequences=3, seq_length=10):
  rng = np.random.default_rng(0)
  symbols = rng.integers(alphabet_size, size=(num_sequences, seq_length))
  batch = oracles.one_hot(symbols, alphabet_size)
  parameters = rng.dirichlet(
    np.ones(alphabet_size), size=(num_sequences, seq_length)
  )
  switches = np.arange(seq_length) == np.arange(4, 4 + num_sequences)[:, None]
  return batch, parameters, switches


def test_source_is_drawn_one_sequence_under_another():
  batch, parameters, switches = _source(2)
  figure = plotting.plot_source(
    batch, parameters, switches, 'Title', num_sequences=2
  )
  assert figure.get_suptitle() == 'Title'
  assert len(figure.axes) == 2
  for index, panel in enumerate(figure.axes):
    np.testing.assert_array_equal(
      _lines(panel)['true parameter'].get_ydata(), parameters[index, :, 1]
    )
    edges = [list(line.get_xdata()) for line in panel.get_lines()]
    assert [4.5 + index, 4.5 + index] in edges
  assert 'time (symbols)' in figure.axes[-1].get_xlabel()


def test_source_of_many_symbols_has_a_line_for_each_and_its_occurrences():
  batch, parameters, switches = _source(3)
  figure = plotting.plot_source(batch, parameters, switches)
  assert len(figure.axes) == 3
  lines = _lines(figure.axes[0])
  occurrences = [
    list(line.get_xdata())
    for line in figure.axes[0].get_lines()
    if line.get_marker() == 'o'
  ]
  for symbol in range(3):
    np.testing.assert_array_equal(
      lines[f'symbol {symbol}'].get_ydata(), parameters[0, :, symbol]
    )
    times = list(np.flatnonzero(batch[0, :, symbol]) + 1)
    assert times in occurrences


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'parameters': np.ones((9, 2))},
      r'parameters has shape \(9, 2\); it must be \[T, K\] = \(10, 2\)',
    ),
    (
      {'switch_points': np.zeros(9, bool)},
      r'switch_points has shape \(9,\); it must be \[T\] = \(10,\)',
    ),
    (
      {'predictions': {'PTW': np.ones((10, 2))}},
      r"predictions\['PTW'\] has shape \(10, 2\)",
    ),
    (
      {'regrets': {'PTW': np.ones(10)}},
      r"regrets\['PTW'\] has shape \(10,\)",
    ),
  ],
)
def test_arrays_of_a_sequence_must_fit_each_other(changes, message):
  batch, parameters, switches = _source(2)
  arrays = {
    'symbols': batch[0],
    'parameters': parameters[0],
    'switch_points': switches[0],
    'predictions': {},
    'regrets': {},
  }
  with pytest.raises(ValueError, match=message):
    plotting.plot_sequence(**(arrays | changes))


# Regret over time.


def test_regret_over_time_shows_means_their_sums_and_bands():
  rng = np.random.default_rng(0)
  regrets = {name: rng.gamma(1.0, size=(20, 9)) for name in ('LSTM', 'PTW')}
  bound = np.arange(9.0)
  figure = plotting.plot_regret_over_time(regrets, {'bound': bound}, 'Title')
  top, bottom = figure.axes
  time = np.arange(2, 11)  # The first symbol is not predicted.
  for index, (name, values) in enumerate(regrets.items()):
    for panel, shown in (
      (top, values),
      (bottom, np.cumsum(values, axis=1)),
    ):
      line = _lines(panel)[name]
      np.testing.assert_array_equal(line.get_xdata(), time)
      np.testing.assert_allclose(line.get_ydata(), shown.mean(axis=0))
      _check_band(panel, index, time, shown.mean(axis=0), _stderr(shown))
  np.testing.assert_array_equal(_lines(bottom)['bound'].get_ydata(), bound)
  assert 'nats' in top.get_ylabel() and 'nats' in bottom.get_ylabel()
  assert 'symbols' in bottom.get_xlabel()
  assert _legend(figure) == [
    'LSTM',
    'PTW',
    'bound',
    '95% confidence: mean ± 1.96 standard errors over sequences',
  ]


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    (({},), 'regrets is empty'),
    (
      ({'a': np.ones(9)},),
      r"regrets\['a'\] has shape \(9,\); it must be \[N, T - 1\]",
    ),
    (({'a': np.ones((1, 9))},), r"regrets\['a'\] has one sequence"),
    (({'a': np.ones((0, 9))},), r"regrets\['a'\] has shape \(0, 9\)"),
    (
      ({'a': np.ones((3, 9)), 'b': np.ones((4, 8))},),
      r"regrets\['b'\] has shape \(4, 8\); .* = \(4, 9\)",
    ),
    (
      ({'a': np.ones((3, 9))}, {'b': np.ones(8)}),
      r"bounds\['b'\] has shape \(8,\); it must be \[T - 1\] = \(9,\)",
    ),
  ],
)
def test_regret_over_time_refuses(args, message):
  with pytest.raises(ValueError, match=message):
    plotting.plot_regret_over_time(*args)


# Learning curves.

ABOVE = 'cumulative_regret_above_optimal'


def _history(means, **others):
  return [
    {
      'step': 100 * (index + 1),
      'loss': 0.5,
      f'{ABOVE}/ptw': mean,
      f'{ABOVE}/kt': mean - 5,
      f'{ABOVE}_stderr/ptw': 0.1,
      f'{ABOVE}_stderr/kt': 0.2,
      **others,
    }
    for index, mean in enumerate(means)
  ]


def test_learning_curve_is_above_the_best_exact_predictor_with_bands():
  means = np.array([3.0, 1.0, 0.5])
  figure = plotting.plot_learning_curve(
    {'LSTM': _history(means)}, labels={'ptw': 'PTW'}
  )
  (panel,) = figure.axes
  line = _lines(panel)['LSTM']
  np.testing.assert_array_equal(line.get_xdata(), [100, 200, 300])
  np.testing.assert_array_equal(line.get_ydata(), means)
  _check_band(panel, 0, [100, 200, 300], means, np.full(3, 0.1))
  assert panel.get_xscale() == panel.get_yscale() == 'log'
  assert panel.get_ylabel() == (
    'cumulative regret above\nPTW (nats, log scale)'
  )
  assert 'training step' in panel.get_xlabel()


def test_learning_curve_above_a_chosen_predictor_is_linear_near_zero():
  means = np.array([8.0, 6.0, 5.0])
  figure = plotting.plot_learning_curve({'LSTM': _history(means)}, 'kt')
  (panel,) = figure.axes
  np.testing.assert_array_equal(_lines(panel)['LSTM'].get_ydata(), means - 5)
  assert panel.get_yscale() == 'symlog'
  # The half-width of the last band, 0.392, up to the next power of ten.
  assert 'kt (nats, log scale beyond ±1)' in panel.get_ylabel()


def test_learning_curve_of_a_single_log_is_seen():
  figure = plotting.plot_learning_curve({'LSTM': _history([3.0])})
  line = _lines(figure.axes[0])['LSTM']
  assert line.get_marker() == plotting.style('LSTM').marker
  assert line.get_markevery() is None


def test_learning_curve_of_an_ensemble_has_the_spread_over_its_seeds():
  means = np.array([3.0, 2.0])
  seeds = {f'seeds_stderr/{ABOVE}/ptw': 0.3}
  figure = plotting.plot_learning_curve({'LSTMs': _history(means, **seeds)})
  _check_band(figure.axes[0], 0, [100, 200], means, np.full(2, 0.3))
  assert _legend(figure)[-1].endswith('standard errors over seeds')


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    (({},), 'histories is empty'),
    (({'a': []},), r"histories\['a'\] is empty"),
    (
      ({'a': [{'step': 1, 'loss': 0.5}]},),
      rf"histories\['a'\] must have step and {ABOVE}/<name> in all entries; "
      'it has loss, step',
    ),
    (
      ({'a': [*_history([1.0]), {'step': 200}]},),
      r"histories\['a'\] must have .* it has step",
    ),
    (
      ({'a': _history([1.0])}, 'ptww'),
      r"optimal_predictor of histories\['a'\] 'ptww' is not one of kt, ptw; "
      "did you mean 'ptw'",
    ),
  ],
)
def test_learning_curve_refuses(args, message):
  with pytest.raises(ValueError, match=message):
    plotting.plot_learning_curve(*args)


# Other lengths than that of training.


def test_length_generalisation_shows_regret_per_predicted_symbol():
  rng = np.random.default_rng(0)
  lengths = (4, 8, 16)
  regrets = {
    name: {length: rng.gamma(1.0, size=20) for length in lengths}
    for name in ('LSTM', 'PTW')
  }
  figure = plotting.plot_length_generalisation(regrets, training_length=8)
  (panel,) = figure.axes
  for index, (name, by_length) in enumerate(regrets.items()):
    per_symbol = np.stack(
      [by_length[length] / (length - 1) for length in lengths], axis=1
    )
    line = _lines(panel)[name]
    np.testing.assert_array_equal(line.get_xdata(), lengths)
    np.testing.assert_allclose(line.get_ydata(), per_symbol.mean(axis=0))
    _check_band(
      panel, index, lengths, per_symbol.mean(axis=0), _stderr(per_symbol)
    )
  assert list(_lines(panel)['training length'].get_xdata()) == [8, 8]
  assert [text.get_text() for text in panel.get_xticklabels()] == [
    '4',
    '8',
    '16',
  ]
  assert 'nats' in panel.get_ylabel() and 'symbols' in panel.get_xlabel()


@pytest.mark.parametrize(
  ('regrets', 'message'),
  [
    ({}, 'regrets is empty'),
    ({'a': {}}, r"regrets\['a'\] is empty"),
    (
      {'a': {4: np.ones((3, 3))}},
      r"regrets\['a'\]\[4\] has shape \(3, 3\); it must be \[N\]",
    ),
    ({'a': {4: np.ones(1)}}, r"regrets\['a'\]\[4\] has one sequence"),
    (
      {'a': {1: np.ones(3)}},
      r"length of regrets\['a'\]\[1\] is 1; it must be an int >= 2",
    ),
  ],
)
def test_length_generalisation_refuses(regrets, message):
  with pytest.raises(ValueError, match=message):
    plotting.plot_length_generalisation(regrets)


# Sources by predictors.


def _cells(panel):
  return {
    (round(text.get_position()[1]), round(text.get_position()[0])): text
    for text in panel.texts
  }


def _frames(panel):
  """Row and column of the framed cells."""
  return [
    (round(frame.get_y() + 0.45), round(frame.get_x() + 0.47))
    for frame in panel.patches
  ]


def test_matrix_prints_numbers_and_frames_the_least_of_each_row():
  values = 9.0 + np.arange(10.0)
  figure = plotting.plot_matrix(
    {
      'ptw': {'PTW': 1.2345, 'LAD': values},
      'lin': {'LAD': 150.0, 'KT': 0.012},
    },
    unit='regret (nats)',
  )
  panel, bar = figure.axes
  (image,) = panel.get_images()
  np.testing.assert_allclose(
    image.get_array().filled(np.nan),
    [[1.2345, 13.5, np.nan], [np.nan, 150.0, 0.012]],
  )
  assert isinstance(image.norm, colors.LogNorm)
  texts = {cell: text.get_text() for cell, text in _cells(panel).items()}
  assert texts == {
    (0, 0): '1.23',
    # 0.957 is the standard error.
    (0, 1): '13.50\n± 0.96',
    (0, 2): '–',
    (1, 0): '–',
    (1, 1): '150',
    (1, 2): '0.0120',
  }
  assert _frames(panel) == [(0, 0), (1, 2)]
  assert _legend(figure) == ['least of the row']
  assert bar.get_ylabel() == 'regret (nats), log scale'
  assert [text.get_text() for text in panel.get_yticklabels()] == ['ptw', 'lin']
  assert [text.get_text() for text in panel.get_xticklabels()] == [
    'PTW',
    'LAD',
    'KT',
  ]


def test_matrix_frames_what_it_is_told():
  figure = plotting.plot_matrix(
    {'a': {'x': 0.0, 'y': -1.0}, 'b': {'x': 3.0, 'y': 4.0}},
    marked={'a': 'x'},
    mark_label='its own',
    log_scale=False,
  )
  panel, bar = figure.axes
  assert _frames(panel) == [(0, 0)]
  assert _legend(figure) == ['its own']
  assert 'log' not in bar.get_ylabel()


def test_numbers_stand_out_from_their_cells():
  values = dict(zip('abcdefghijk', np.geomspace(1, 100, 11), strict=True))
  panel = plotting.plot_matrix({'ptw': values}).axes[0]
  (image,) = panel.get_images()
  luminance = lambda colour: np.dot(
    (0.2126, 0.7152, 0.0722), np.power(colors.to_rgb(colour), 2.2)
  )
  for (_, column), text in _cells(panel).items():
    value = list(values.values())[column]
    shades = sorted(
      map(luminance, (text.get_color(), image.cmap(image.norm(value))[:3]))
    )
    # WCAG 2, level AA.
    assert (shades[1] + 0.05) / (shades[0] + 0.05) > 4.5


@pytest.mark.parametrize(
  ('regrets', 'kwargs', 'message'),
  [
    ({}, {}, 'regrets is empty'),
    ({'ptw': {}}, {}, r"regrets\['ptw'\] is empty"),
    (
      {'ptw': {'KT': np.ones((2, 2))}},
      {},
      r"regrets\['ptw'\]\['KT'\] has shape \(2, 2\)",
    ),
    (
      {'ptw': {'KT': 0.0}},
      {},
      r"regrets\['ptw'\]\['KT'\] is 0; log_scale=True takes positive",
    ),
    (
      {'ptw': {'KT': 1.0}},
      {'marked': {'ptv': 'KT'}},
      "source of marked 'ptv' is not one of ptw",
    ),
    (
      {'ptw': {'KT': 1.0}},
      {'marked': {'ptw': 'PTW'}},
      r"marked\['ptw'\] 'PTW' is not one of KT",
    ),
  ],
)
def test_matrix_refuses(regrets, kwargs, message):
  with pytest.raises(ValueError, match=message):
    plotting.plot_matrix(regrets, **kwargs)


def test_long_names_do_not_make_a_legend_wider_than_the_figure():
  regrets = {f'a run with a long name {i}': np.ones((3, 4)) for i in range(5)}
  figure = plotting.plot_regret_over_time(regrets)
  figure.draw_without_rendering()
  box = figure.legends[0].get_window_extent()
  assert box.x0 > 0 and box.x1 < figure.bbox.x1
