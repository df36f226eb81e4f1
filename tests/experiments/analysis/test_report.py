"""The committed tables are whole, and the figures show what was measured."""

import collections
import pathlib
import re
import shutil
import subprocess
import sys

from absl import flags
import numpy as np
import pytest

from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import plotting
from nonstationary_mbml.experiments.analysis import report
from nonstationary_mbml.experiments.analysis import studies
from nonstationary_mbml.experiments.analysis import study_figures
from nonstationary_mbml.experiments.analysis import study_tables
from nonstationary_mbml.experiments.analysis import trained_networks
from nonstationary_mbml.experiments.sweeps import presets
from nonstationary_mbml.experiments.sweeps import sweep_folder
from nonstationary_mbml.runtime import atomic_files

SCRIPT = pathlib.Path(report.__file__)
SMALL = SCRIPT.parents[2] / 'results' / 'small'
CELLS = {
  (point.settings['data'], point.settings['model'])
  for point in presets.small().points()
}
SEEDS = [0, 1, 2]
WITH_A_CLOCK = (
  'rnn',
  'lstm',
  'stack_rnn',
  'stack_lstm',
  'transformer_sin_cos',
)
LENGTHS = {'lin', 'regular_shift', 'random_shift', 'ptw_depth_8'}


def _rows(table):
  return atomic_files.read_csv(SMALL / f'{table}.csv')


def _seeds(rows, *columns):
  """The seeds of every case."""
  seeds = collections.defaultdict(list)
  for row in rows:
    if row['seed'] is not None:
      seeds[tuple(row[column] for column in columns)].append(row['seed'])
  return dict(seeds)


def test_committed_sweep_has_all_points_and_all_seeds():
  runs = {(row['source'], row['predictor']): row for row in _rows('runs')}
  assert set(runs) == CELLS
  assert {row['steps'] for row in runs.values()} == {5_000}
  seeds = _seeds(_rows('on_distribution'), 'source', 'predictor')
  assert seeds == dict.fromkeys(CELLS, SEEDS)


def test_committed_tables_have_all_networks():
  sources = {source for source, _ in CELLS}
  off = _seeds(
    _rows('off_distribution'), 'trained_on', 'predictor', 'tested_on'
  )
  assert off == {(*cell, source): SEEDS for cell in CELLS for source in sources}
  length = _seeds(
    _rows('length_generalization'), 'trained_on', 'predictor', 'last_position'
  )
  assert length == {
    (*cell, end): SEEDS
    for cell in CELLS
    if cell[0] in LENGTHS
    for end in range(16, 257, 16)
  }
  probe = _seeds(
    _rows('linear_probe'), 'source', 'predictor', 'is_trained', 'target'
  )
  assert probe == {
    (*cell, is_trained, target): SEEDS
    for cell in CELLS
    for is_trained in (0, 1)
    for target in study_figures.TARGETS
  }
  for table, column in (
    ('learning', 'step'),
    ('post_switch_regret', 'symbols_since'),
  ):
    first = min(row[column] for row in _rows(table))
    rows = [row for row in _rows(table) if row[column] == first]
    source = 'source' if table == 'learning' else 'tested_on'
    assert _seeds(rows, source, 'predictor') == dict.fromkeys(CELLS, SEEDS)


@pytest.mark.parametrize('name', ['small', 'small_constant'])
def test_committed_tables_are_of_the_preset_as_it_is(name, tmp_path):
  folder = sweep_folder.SweepFolder(tmp_path)
  with folder.open(presets.SWEEPS[name]().points(), 10_240):
    pass
  commands = atomic_files.read_json(SMALL.parent / name / report.COMMANDS)
  assert commands['sweep'] == folder.digest()


def test_networks_with_a_clock_are_within_half_a_percent_of_bayes():
  """On the four sources of the paper; some network on the fifth, too."""
  rows = _rows('on_distribution')
  exact = {row['source']: row['regret'] for row in rows if row['is_exact']}
  percents = {
    cell: 100
    * study_figures.over_seeds(of_network, 'above_exact')[0]
    / exact[cell[1]]
    for cell, of_network in study_figures.groups(
      [row for row in rows if row['seed'] is not None], 'predictor', 'source'
    ).items()
  }
  for (name, source), percent in percents.items():
    if name in WITH_A_CLOCK and source != 'ptw_depth_8':
      assert percent < 0.5
  assert min(percents[name, 'ptw_depth_8'] for name in WITH_A_CLOCK) < 0.6


def test_no_network_without_a_beginning_is_below_its_bound():
  """By more than three standard errors, and some are near it."""
  bounds = {row['source']: row for row in _rows('equal_beginnings')}
  cells = study_figures.groups(
    [
      row
      for row in _rows('on_distribution')
      if row['seed'] is not None
      and row['predictor']
      in ('transformer_none', 'transformer_alibi', 'transformer_relative')
    ],
    'predictor',
    'source',
  )
  excess = {}
  for cell, rows in cells.items():
    bound = bounds[cell[1]]
    mean, _ = study_figures.over_seeds(rows, 'above_exact')
    stderr = np.hypot(
      bound['above_exact_stderr'], rows[0]['above_exact_stderr']
    )
    excess[cell] = (mean - bound['above_exact']) / stderr
  assert min(excess.values()) > -3
  assert excess['transformer_relative', 'lin'] < 3


def test_networks_with_a_clock_predict_like_bayes_for_their_source():
  """All recurrent ones and SIN_COS, on whatever source they are tested."""
  cases = study_figures.groups(
    [row for row in _rows('off_distribution') if row['seed'] is not None],
    'predictor',
    'trained_on',
    'tested_on',
  )
  nearest = [
    study_tables.nearest_exact(rows)[0] == trained_on
    for (predictor, trained_on, _), rows in cases.items()
    if predictor in WITH_A_CLOCK
  ]
  assert len(nearest) == 125 and all(nearest)


def test_tables_and_figures_follow_from_the_committed_rows(tmp_path):
  for path in (*SMALL.glob('*.csv'), SMALL / report.COMMANDS):
    shutil.copy(path, tmp_path)
  written = report.draw(tmp_path)
  text = (tmp_path / report.TABLES).read_text()
  assert text == (SMALL / report.TABLES).read_text()
  for name in written:
    assert (SMALL / name).exists()
    if name.endswith('.png'):
      assert (tmp_path / name).read_bytes().startswith(b'\x89PNG')


def _curve(seed, regrets, predictor='lstm', trained_on='lin', tested_on='lin'):
  return [
    {
      'tested_on': tested_on,
      'predictor': predictor,
      'trained_on': trained_on,
      'seed': seed,
      'symbols_since': since,
      'regret_per_symbol': regret,
    }
    for since, regret in enumerate(regrets, start=1)
  ]


def test_curves_are_means_over_seeds_beside_exact_predictors():
  rows = [
    *_curve(None, [0.4, 0.2], 'exact', 'lin'),
    *_curve(None, [0.5, 0.3], 'exact', 'ptw'),
    *_curve(0, [0.5, 0.2]),
    *_curve(1, [0.7, 0.4]),
    *_curve(None, [0.9, 0.9], 'exact', 'static', tested_on='static'),
    *_curve(None, [0.8, 0.8], 'exact', 'lin', tested_on='static'),
    # Only in the way.
    *_curve(None, [0.9, 0.9], 'exact', 'static'),
  ]
  panel, static = study_figures.draw_post_switch_regret(rows).axes
  curves = [line.get_ydata().tolist() for line in panel.get_lines()]
  np.testing.assert_allclose(curves[-1], [0.6, 0.3])
  assert curves[:-1] == [[0.4, 0.2], [0.5, 0.3]]
  assert panel.get_yscale() == 'log'
  curves = [line.get_ydata().tolist() for line in static.get_lines()]
  assert curves == [[0.9, 0.9], [0.8, 0.8]]
  (band,) = panel.collections
  np.testing.assert_allclose(_edges(band, 1), [0.5, 0.7])
  np.testing.assert_allclose(_edges(band, 2), [0.2, 0.4])


def _edges(band, x):
  """Lower and upper edge of a band."""
  (path,) = band.get_paths()
  ys = path.vertices[path.vertices[:, 0] == x, 1]
  return ys.min(), ys.max()


def test_families_of_networks_have_panels_beside_the_exact_predictors():
  rows = [
    *_curve(None, [0.4, 0.2], 'exact', 'lin'),
    *_curve(0, [0.5, 0.2], 'transformer_alibi'),
    *_curve(0, [0.5, 0.3], 'lstm'),
    *_curve(0, [0.5, 0.4], 'my_network'),
  ]
  figure = study_figures.draw_post_switch_regret(rows)
  shown = {
    panel.get_title(): [line.get_label() for line in panel.get_lines()]
    for panel in figure.axes
  }
  own = plotting.SOURCES_OWN
  assert shown == {
    'lin: recurrent': [own, 'LSTM'],
    'lin: attention': [own, 'Transformer, ALIBI'],
    'lin: other networks': [own, 'my_network'],
  }
  assert [text.get_text() for text in figure.legends[0].get_texts()] == [
    'LSTM',
    'Transformer, ALIBI',
    'my_network',
    own,
    'mean ± standard error over seeds',
  ]


@pytest.mark.parametrize(
  ('table', 'draw'),
  [
    ('on_distribution', study_figures.draw_on_distribution),
    ('linear_probe', study_figures.draw_linear_probe),
  ],
)
def test_no_dot_and_no_error_bar_is_cut(table, draw):
  num_bars = 0
  for panel in draw(_rows(table)).axes:
    low, high = panel.get_xlim()
    for line in panel.get_lines():
      if line.get_linestyle() != ':':
        assert low < np.min(line.get_xdata())
        assert np.max(line.get_xdata()) < high
    for bars in panel.collections:
      num_bars += 1
      for segment in bars.get_segments():
        assert low < segment[0, 0] <= segment[1, 0] < high
  assert num_bars >= 45


def test_names_of_the_sweep_are_labelled_as_their_networks_are():
  labels = list(study_figures.LABELS.values())
  assert len(set(labels)) == len(labels)
  assert all(plotting.rank(label) < len(plotting.STYLES) for label in labels)
  begun = study_figures.label('transformer_alibi_begin')
  assert begun == 'Transformer, ALIBI, begin symbol'
  looks = [
    plotting.style(label)
    for label in (begun, study_figures.label('transformer_alibi'))
  ]
  assert looks[0].colour == looks[1].colour
  assert looks[0].linestyle != looks[1].linestyle
  assert study_figures.label('stack_lstm') == 'Stack-LSTM'
  assert study_figures.label('rnn_decay') == 'Vanilla RNN, weight decay'
  assert [
    study_figures.exact_label(name)
    for name in ('ptw', 'lin', 'regular_shift', 'ptw_depth_8', 'recurring', 'x')
  ] == [
    'PTW',
    'LAD',
    'known period',
    'PTW, depth 8',
    'no exact predictor',
    'Bayes for x',
  ]


def test_matrix_shows_what_is_missing_and_frames_the_own_source():
  rows = [
    {
      'predictor': predictor,
      'trained_on': trained_on,
      'tested_on': tested_on,
      'seed': seed,
      'above_exact': above,
    }
    for predictor, trained_on, tested_on, seed, above in (
      ('exact', 'ptw', 'ptw', None, 0.0),
      ('exact', 'ptw', 'lin', None, 0.5),
      ('lstm', 'ptw', 'ptw', 0, 0.1),
      ('lstm', 'ptw', 'ptw', 1, 0.3),
    )
  ]
  exact, lstm, _ = study_figures.draw_off_distribution(rows).axes
  assert [text.get_text() for text in exact.texts] == ['0.00', '0.50']
  assert [text.get_text() for text in lstm.texts] == ['0.20', '–']
  assert len(lstm.patches) == 1


def test_tables_of_two_sweeps_are_not_mixed(tmp_path):
  report.measure([], [], tmp_path, studies.Options(), 'command', 'one')
  with pytest.raises(ValueError, match='tables of another sweep'):
    report.measure([], [], tmp_path, studies.Options(), 'command', 'another')


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    (
      '--study=linear_prob',
      "--study 'linear_prob' is not one of .*; did you mean 'linear_probe'",
    ),
    ('--sweep_dir=none', 'none is no folder of a sweep'),
    ('--sweep_dir=sweep', '0 of 6 points of sweep are finished'),
  ],
)
def test_wrong_flags_are_one_line_errors(
  tmp_path, monkeypatch, capsys, flag, message
):
  monkeypatch.chdir(tmp_path)
  with sweep_folder.SweepFolder('sweep').open(presets.tiny().points(), 16):
    pass
  values = flags.FlagValues()
  report.define_flags(values)
  values(['report.py', '--output_dir=out', flag])
  monkeypatch.setattr(flags, 'FLAGS', values)
  with pytest.raises(SystemExit) as end:
    report.main(['report.py'])
  assert end.value.code == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert re.search(message, line)


@pytest.mark.slow
def test_folder_without_tables_is_a_one_line_error(tmp_path):
  result = subprocess.run(
    [sys.executable, SCRIPT, '--output_dir=out', '--draw_only'],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 1
  (line,) = result.stderr.splitlines()
  assert 'out has no tables to draw' in line


@pytest.mark.parametrize(
  ('name', 'content'),
  [
    ('commands.json', '{}'),
    ('commands.json', '[1, 2]'),
    ('commands.json', '{"sweep": "a", "commands": null}'),
    ('runs.csv', 'junk\n\nmore,junk\n'),
    ('on_distribution.csv', ''),
    ('on_distribution.csv', 'a,b\n1,2,3\n'),
    # From before its columns were renamed.
    ('on_distribution.csv', 'source,predictor,seed,is_own\nlin,KT,,1\n'),
    ('length_generalization.csv', 'a,b\n1,2\n'),
    ('linear_probe.csv', 'target\nx\n'),
  ],
)
def test_junk_in_a_folder_of_tables_is_named_in_a_line(tmp_path, name, content):
  (tmp_path / name).write_text(content)
  message = f'{name} is not what it should'
  with pytest.raises(ValueError, match=message) as error:
    report.draw(tmp_path)
  assert '\n' not in str(error.value)


def test_run_whose_starts_are_not_known_is_named_in_a_line(tmp_path):
  config = config_lib.ExperimentConfig()
  network = trained_networks.Network('ptw', 'lstm', tmp_path, config, [], (0,))
  for content in ('{"starts": null}', '{"starts": []}', '{"starts": [{}]}'):
    (tmp_path / 'environment.json').write_text(content)
    with pytest.raises(ValueError, match='environment.json (has no|is not)'):
      report.describe_runs([network])


def test_table_that_cannot_be_written_is_printed(tmp_path, monkeypatch, capsys):
  row = {'source': 'ptw', 'seed': 0, 'regret': 0.25}
  monkeypatch.setattr(report, 'describe_runs', lambda networks: [row])
  (tmp_path / 'runs.csv').mkdir()
  with pytest.raises(OSError, match=f'cannot write to {tmp_path}'):
    report.measure([], [], tmp_path, studies.Options(), 'python report.py')
  assert 'source,seed,regret\nptw,0,0.25\n' in capsys.readouterr().out
