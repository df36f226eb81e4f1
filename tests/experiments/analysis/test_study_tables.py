import pytest

from nonstationary_mbml.experiments.analysis import report
from nonstationary_mbml.experiments.analysis import studies
from nonstationary_mbml.experiments.analysis import study_tables


def test_pivot_has_a_cell_for_every_group_of_rows():
  rows = [
    {'who': 'b', 'where': 'x', 'value': 1},
    {'who': 'a', 'where': 'y', 'value': 2},
    {'who': 'b', 'where': 'x', 'value': 3},
  ]
  table = study_tables.pivot(
    rows,
    {'name': lambda row: row['who'], 'twice': lambda row: 2 * row['who']},
    lambda row: row['where'],
    lambda rows: '+'.join(str(row['value']) for row in rows),
  )
  assert table.splitlines() == [
    '| name | twice | x | y |',
    '| --- | --- | --- | --- |',
    '| b | bb | 1+3 |  |',
    '| a | aa |  | 2 |',
  ]


def test_tables_and_figures_are_of_studies():
  tables = {table for table, *_ in study_tables.TABLES}
  assert tables - {report.RUNS} <= set(studies.STUDIES)
  assert set(report._DRAW) <= set(studies.STUDIES)


def test_percent_is_of_the_exact_predictor_of_the_source():
  row = {'source': 'lin', 'predictor': 'lstm', 'is_exact': None}
  rows = [
    {**row, 'seed': 0, 'above_exact': 0.1},
    {**row, 'seed': 1, 'above_exact': 0.3},
    {**row, 'predictor': 'LAD', 'seed': None, 'regret': 4.0, 'is_exact': 1},
    {**row, 'predictor': 'KT', 'seed': None, 'regret': 9.0, 'is_exact': 0},
  ]
  *_, line = study_tables.percent_above(rows).splitlines()
  assert line == '| LSTM | 5.00 ± 2.50 |'


def test_nearest_exact_predictor_is_that_of_the_least_mean_divergence():
  rows = [
    {'seed': 0, 'kl/ptw': 1.0, 'kl/lin': 0.5},
    {'seed': 1, 'kl/ptw': 1.0, 'kl/lin': 2.0},
  ]
  assert study_tables.nearest_exact(rows) == ('ptw', 1.0)


@pytest.mark.parametrize(
  ('score', 'text'), [(0.5, '0.500 ± 0.250'), (None, 'no variance')]
)
def test_probe_of_a_constant_posterior_has_no_score(score, text):
  row = {'source': 'lin', 'predictor': 'lstm', 'target': 'run_length'}
  rows = [
    {**row, 'is_trained': 1, 'seed': seed, 'r2_given_time': value}
    for seed, value in ((0, score), (1, score and 0.5 + score))
  ]
  rows[0]['r2_given_time'] = score and score - 0.25
  rows[1]['r2_given_time'] = score and score + 0.25
  *_, line = study_tables.linear_probe(rows).splitlines()
  assert line == f'| expected run length | LSTM | after | {text} |'
