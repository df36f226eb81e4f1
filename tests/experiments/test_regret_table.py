import numpy as np
import pytest

from nonstationary_mbml.experiments import regret_table


def test_ensembles_are_measured_over_their_members():
  regrets = {'network': np.array([[1.0, 3.0], [2.0, 6.0]]), 'kt': np.ones(2)}
  names = {'network': 'LSTM, 2 seeds', 'kt': 'KT'}
  network, kt = regret_table.results_table(regrets, names, 'kt')
  assert network['cumulative_regret'] == 3.0
  assert network['stderr_over'] == 'seeds' and kt['stderr_over'] == 'sequences'
  assert [row['stderr_over'] for row in network['seeds']] == 2 * ['sequences']
  # Means of the members are 2 and 4.
  assert network['stderr'] == pytest.approx(1.0)
  assert network['above_optimum'] == 2.0
  assert network['above_optimum_stderr'] == pytest.approx(1.0)
  # A member by itself is measured over sequences.
  first, second = network['seeds']
  assert (first['cumulative_regret'], second['cumulative_regret']) == (2, 4)
  assert first['stderr'] == pytest.approx(1.0)
  assert second['above_optimum_stderr'] == pytest.approx(2.0)


def test_table_measures_from_the_exact_predictor():
  ptw = np.array([2.0, 3.0, 4.0, 3.0])
  regrets = {'network': ptw + [0.0, 1.0, 0.0, 1.0], 'ptw': ptw, 'kt': ptw - 1}
  names = {'network': 'LSTM', 'ptw': 'PTW', 'kt': 'KT'}
  rows = regret_table.results_table(regrets, names, 'ptw')
  above = {row['predictor']: row['above_optimum'] for row in rows}
  assert above == {'LSTM': 0.5, 'PTW': 0.0, 'KT': -1.0}
  # Paired: the spread of the sequences themselves does not count.
  assert rows[2]['above_optimum_stderr'] == 0
  assert rows[0]['above_optimum_stderr'] == pytest.approx(np.sqrt(1 / 12))
  best = regret_table.results_table(regrets, names, None)
  assert [row['is_optimum'] for row in best] == [False, False, True]


def test_table_without_exact_predictors_has_the_network():
  (row,) = regret_table.results_table(
    {'network': np.arange(3.0)}, {'network': 'LSTM'}, None
  )
  assert row['cumulative_regret'] == 1.0


def test_averaged_network_is_no_reference():
  regrets = {
    'network': np.array([[1.0, 3.0], [2.0, 6.0]]),
    'averaged_network': np.array([[0.0, 1.0], [0.0, 1.0]]),
    'kt': np.ones(2),
  }
  names = {'network': 'RNN', 'averaged_network': 'RNN, averaged', 'kt': 'KT'}
  rows = regret_table.results_table(regrets, names, None)
  assert [row['is_optimum'] for row in rows] == [False, False, True]
  assert rows[1]['above_optimum'] == -0.5
  assert regret_table.reference_rows(rows) == [rows[2]]
  seeds = [row['seed'] for row in regret_table.network_rows(rows[1:2], (3, 7))]
  assert seeds == [3, 7]


def test_columns_are_aligned():
  row = {
    'stderr_over': 'seeds',
    'cumulative_regret': 1.0,
    'stderr': 0.1,
    'above_optimum': 0.5,
    'above_optimum_stderr': 0.2,
    'is_optimum': False,
  }
  lines = regret_table.format_table(
    [{'step': 5, **row}, {'step': 10_000_000, **row}], 'step'
  ).splitlines()
  assert lines[0].split() == [
    'step', 'cumulative', 'regret', '(nats)', 'above', 'the', 'optimum', '±',
    'over',
  ]  # fmt: skip
  assert len({len(line) for line in lines}) == 1
  assert lines[1].split() == ['5', '1.0000', '±', '0.1000', '+0.5000', '±',
                              '0.2000', 'seeds']  # fmt: skip


def test_table_without_an_exact_predictor_claims_no_optimum():
  regrets = {
    'network': np.array([1.0, 2.0]),
    'lad': np.array([2.0, 2.5]),
    'kt': np.array([3.0, 3.0]),
  }
  names = {'network': 'LSTM', 'lad': 'LAD', 'kt': 'KT'}
  rows = regret_table.results_table(regrets, names, None)
  text = regret_table.format_table(rows, is_exact=False)
  head, network, lad, _ = text.splitlines()
  assert not any(row['is_exact'] for row in rows)
  assert 'above the best reference' in head
  assert 'optimum' not in text
  # Better than the best reference.
  assert '-0.7500 ± 0.2500' in network and 'best reference' in lad
  assert 'negative' in regret_table.no_exact_predictor('own')
  exact = regret_table.format_table(
    regret_table.results_table(regrets, names, 'lad')
  )
  assert 'above the optimum' in exact and 'best reference' not in exact
