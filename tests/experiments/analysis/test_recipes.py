import pathlib
import subprocess
import sys

import numpy as np
import pytest

from nonstationary_mbml.experiments.analysis import recipes
from nonstationary_mbml.experiments.sweeps import presets
from nonstationary_mbml.runtime import atomic_files

COMMITTED = pathlib.Path(__file__).parents[3] / 'results' / 'recipes'


def _rows(folder):
  """Results of the whole sweep, made up, as they are read from a file."""
  rows = [
    {
      'point': point.config.name,
      **point.settings,
      'seed': seed,
      'exact_regret': 4.0,
      # In percent: the number of the point, plus or minus a tenth.
      'above_exact': 0.04 * (1 + number + 0.1 * (seed - 1)),
    }
    for number, point in enumerate(presets.recipes().points())
    for seed in range(3)
  ]
  atomic_files.write_csv(folder / 'rows.csv', rows)
  return atomic_files.read_csv(folder / 'rows.csv')


def _number(rows, model, *recipe):
  """Percent of the point with a network and recipe."""
  points = list(dict.fromkeys(row['point'] for row in rows))
  return 1 + points.index(','.join(['recipes', model, *recipe]))


def test_table_has_a_line_for_every_recipe_and_a_column_for_every_network(
  tmp_path,
):
  rows = _rows(tmp_path)
  head, _, *lines = recipes.to_markdown(rows).splitlines()
  columns = [text.strip() for text in head.split('|')]
  number = _number(
    rows, 'lstm', 'adam', 'warmup_cosine', 'symbols', '0.02', '5000'
  )
  (line,) = (
    line
    for line in lines
    if line.startswith('| adam | warmup_cosine | symbols | 0.02 |')
  )
  cells = [text.strip() for text in line.split('|')]
  # The standard error of three numbers a tenth apart.
  assert cells[columns.index('LSTM')] == f'{number}.00 ± 0.06'
  assert cells[columns.index('Transformer, ALIBI')] == ''
  assert 'Transformer, RELATIVE, begin symbol' in columns


def test_figure_has_the_means_of_every_rate(tmp_path):
  rows = _rows(tmp_path)
  panel, *_ = recipes.draw(rows).axes
  # Solid for Muon, dotted for Adam, of four networks.
  lines = [line for line in panel.lines if len(line.get_xdata()) == 4]
  drawn = {
    tuple(
      np.round(np.asarray(line.get_ydata(), float), 6).tolist()
    ): line.get_linestyle()
    for line in lines
    if line.get_linestyle() in ('-', ':')
  }
  for model in ('rnn', 'lstm', 'stack_rnn'):
    for optimizer, linestyle, rates in (
      ('muon', '-', ('0.005', '0.01', '0.02', '0.04')),
      ('adam', ':', ('0.002', '0.005', '0.01', '0.02')),
    ):
      means = tuple(
        float(
          _number(
            rows, model, optimizer, 'warmup_cosine', 'symbols', rate, '5000'
          )
        )
        for rate in rates
      )
      assert drawn[means] == linestyle


def test_figure_has_every_case_of_the_other_panels(tmp_path):
  rows = _rows(tmp_path)
  _, schedules, encodings = recipes.draw(rows).axes
  means = lambda panel: {
    round(float(np.ravel(container.lines[0].get_xdata())[0]), 6)
    for container in panel.containers
  }
  number = lambda *names: float(_number(rows, *names))
  assert number('lstm', 'muon', 'constant', 'bayes', '0.01', '5000') in means(
    schedules
  )
  assert number(
    'transformer_sin_cos', 'muon', 'warmup_cosine', 'bayes', '0.01', '5000'
  ) in means(schedules)
  for model, target in (
    ('transformer_none', 'bayes'),
    ('transformer_alibi', 'symbols'),
    ('transformer_relative_begin', 'symbols'),
  ):
    assert number(
      model, 'muon', 'warmup_cosine', target, '0.01', '5000'
    ) in means(encodings)
  # Of three networks: as they are, to bayes, and with a begin symbol.
  assert len(encodings.containers) == 9


def _run(*args, cwd):
  return subprocess.run(
    [sys.executable, recipes.__file__, *args],
    cwd=cwd,
    capture_output=True,
    text=True,
    check=False,
  )


def test_folder_without_a_sweep_is_an_error_in_one_line(tmp_path):
  result = _run(f'--sweep_dir={tmp_path / "none"}', cwd=tmp_path)
  assert result.returncode == 1
  (line,) = result.stderr.splitlines()
  assert 'none is no folder of a sweep' in line
  assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not COMMITTED.exists(), reason='not made yet')
def test_committed_table_is_that_of_the_committed_results():
  rows = atomic_files.read_csv(COMMITTED / recipes.RESULTS)
  points = {row['point'] for row in rows}
  assert points == {point.config.name for point in presets.recipes().points()}
  assert (COMMITTED / 'table.md').read_text() == recipes.to_markdown(rows)
