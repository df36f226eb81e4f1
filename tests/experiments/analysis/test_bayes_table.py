import csv
import dataclasses
import io
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments import evaluator as evaluator_lib
from nonstationary_mbml.experiments import ptw_predictors
from nonstationary_mbml.experiments import run_length_predictors
from nonstationary_mbml.experiments.analysis import bayes_table
from nonstationary_mbml.experiments.analysis import redundancy_bounds

COMMITTED = (
  pathlib.Path(__file__).parents[3] / 'results' / 'bayes_table' / 'table.csv'
)
EXACT = {
  'ptw': 'ptw',
  'lin': 'lad',
  'regular_shift': 'regular_shift',
  'random_shift': 'random_shift',
  'static': 'kt',
}


@pytest.fixture(scope='module')
def row():
  """130 sequences of 40 symbols, in batches of 64."""
  return bayes_table.make_row('regular_shift', 130, 40, 64, seed=3)


def test_row_has_every_predictor_and_one_is_exact(row):
  assert [cell.predictor for cell in row] == list(bayes_table.PREDICTORS)
  assert [cell.predictor for cell in row if cell.is_exact] == ['regular_shift']
  assert {cell.num_sequences for cell in row} == {130}


def test_cells_are_of_the_same_sequences(row):
  """Regret, paired difference and bound, worked out once more."""
  source = constants.build_data_generator(
    config_lib.DataConfig(
      trajectory_generator='regular_shift',
      trajectory_generator_kwargs={'shift_period': 20},
    )
  )
  rng = jax.random.fold_in(jax.random.key(3), 2)
  sampled = [source.sample(key, 64, 40) for key in jax.random.split(rng, 3)]
  batch, parameters = (
    np.concatenate(arrays)[:130] for arrays in zip(*sampled, strict=True)
  )

  def regrets(predictor):
    logits, _ = predictor.unroll({}, None, batch)
    return np.asarray(
      evaluator_lib.instantaneous_regret(logits, parameters).sum(axis=1), float
    )

  exact = regrets(run_length_predictors.regular_shift_predictor(20))
  ptw = regrets(ptw_predictors.PTWPredictor(6))
  cell = row[list(bayes_table.PREDICTORS).index('ptw')]
  np.testing.assert_allclose(cell.cumulative_regret, ptw.mean(), rtol=1e-5)
  above = ptw - exact
  np.testing.assert_allclose(cell.above_exact, above.mean(), rtol=1e-4)
  np.testing.assert_allclose(
    cell.above_exact_stderr, above.std(ddof=1) / np.sqrt(130), rtol=1e-4
  )
  switches = np.arange(40) == 20
  np.testing.assert_allclose(cell.bound, redundancy_bounds.ptw(switches, 6))


def test_csv_gives_every_cell_back(row):
  lines = list(csv.DictReader(io.StringIO(bayes_table.to_csv(row))))
  assert len(lines) == len(row)
  for line, cell in zip(lines, row, strict=True):
    assert line['predictor'] == cell.predictor
    assert line['bound'] == ('' if cell.bound is None else f'{cell.bound:.6f}')
    assert float(line['cumulative_regret']) == pytest.approx(
      cell.cumulative_regret, abs=1e-6
    )


def test_markdown_has_the_exact_predictor_in_bold(row):
  *_, line = bayes_table.to_markdown(row).splitlines()
  texts = [text.strip() for text in line.split('|')[2:-1]]
  is_bold = [text.startswith('**') for text in texts]
  assert is_bold == [name == 'regular_shift' for name in bayes_table.PREDICTORS]


def test_predictor_not_above_the_exact_one_is_found(row):
  assert not bayes_table.not_above(row)
  close = dataclasses.replace(row[0], above_exact=0.1, above_exact_stderr=0.06)
  assert bayes_table.not_above([close, *row[1:]]) == [close]


def test_committed_table_has_its_least_regret_on_the_diagonal():
  """By five standard errors of the paired difference."""
  with COMMITTED.open() as file:
    lines = list(csv.DictReader(file))
  assert {line['source'] for line in lines} == {*EXACT, 'recurring'}
  for line in lines:
    assert int(line['num_sequences']) >= 10_000
    assert int(line['seq_length']) == 256
    is_exact = EXACT.get(line['source']) == line['predictor']
    assert line['is_exact'] == str(is_exact)
    if line['source'] in EXACT and not is_exact:
      assert float(line['above_exact']) > 5 * float(line['above_exact_stderr'])
    if line['bound']:
      assert float(line['cumulative_regret']) < float(line['bound'])


@pytest.mark.parametrize(
  ('size', 'message'),
  [
    ('3000000000', 'not an integer in the range [2, 65536]'),
    ('65536', 'make --batch_size smaller'),
  ],
)
def test_alphabet_that_no_memory_holds_is_an_error_in_one_line(
  tmp_path, size, message
):
  result = subprocess.run(
    [
      sys.executable,
      pathlib.Path(bayes_table.__file__),
      f'--alphabet_size={size}',
    ],
    cwd=tmp_path,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 1
  (line,) = result.stderr.splitlines()
  assert line.startswith('error: ') and message in line
  assert not list(tmp_path.iterdir())
