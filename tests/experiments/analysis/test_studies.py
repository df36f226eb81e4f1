import types

import numpy as np
import pytest

from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments.analysis import studies
from nonstationary_mbml.experiments.analysis import trained_networks
from nonstationary_mbml.tests.experiments.analysis import committed_models


def test_symbols_since_a_switch_count_from_one():
  switches = np.array([[0, 0, 1, 0, 0, 1, 0], [0, 1, 1, 0, 0, 0, 0]], bool)
  assert studies.symbols_since_switch(switches).tolist() == [
    [0, 0, 1, 2, 3, 1, 2],
    [0, 1, 1, 2, 3, 4, 5],
  ]


def test_regret_after_a_switch_is_the_mean_over_its_symbols():
  evaluation = types.SimpleNamespace(
    predictor='lstm',
    trained_on='lin',
    tested_on='lin',
    seed=0,
    regret=np.array([[1.0, 2, 3], [9, 3, 4], [9, 9, 5]]),
    sequences=types.SimpleNamespace(switches=np.eye(3, 4, 1, dtype=bool)),
  )
  rows = studies._age_rows(evaluation, (1, 2, 7))
  means = {row['symbols_since']: row['regret_per_symbol'] for row in rows}
  assert means == {1: 3.0, 2: 3.0}
  # One symbol of each sequence: the spread of a mean of three.
  assert rows[0]['regret_per_symbol_stderr'] == pytest.approx(np.sqrt(8) / 3)


def test_least_regret_without_counting_is_that_of_the_best_constant():
  """Against a search over what is predicted while all symbols are 0."""
  symbols = np.array([[0, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
  # KT of n zeros; the rest counts nothing.
  zeros = np.arange(1, 5) + 0.5
  log_probs = np.log(np.stack([zeros, np.full(4, 0.5)], axis=-1))
  log_probs -= np.log(np.exp(log_probs).sum(axis=-1, keepdims=True))
  sequences = trained_networks.Sequences(
    np.eye(2)[symbols], None, None, {'static': np.tile(log_probs, (4, 1, 1))}
  )
  lost = studies._uncounted(sequences, 'static')
  # The last prediction is of a symbol that is not there.
  times = ([0, 1], [0, 1, 2], [0], [0, 1, 2])

  def divergence(time, q):
    p = np.exp(log_probs[time])
    return np.sum(p * (log_probs[time] - np.log([q, 1 - q])))

  candidates = np.linspace(0.5, 0.99, 4_901)
  totals = [
    sum(divergence(time, q) for of_one in times for time in of_one)
    for q in candidates
  ]
  best = candidates[np.argmin(totals)]
  np.testing.assert_allclose(
    lost,
    [sum(divergence(time, best) for time in of_one) for of_one in times],
    atol=1e-4,
  )
  assert lost.sum() <= min(totals)


def test_bins_of_positions_hold_every_predicted_symbol_once():
  rng = np.random.default_rng(0)
  parameters = rng.dirichlet(np.ones(2), (5, 16))
  log_probs = np.log(rng.dirichlet(np.ones(2), (5, 16)))
  sequences = trained_networks.Sequences(None, parameters, None, {})
  evaluation = studies.Evaluation('a', 'b', 'b', 0, log_probs, sequences)
  rows = studies._position_rows(evaluation, (4, 8, 12, 16))
  assert [(r['first_position'], r['last_position']) for r in rows] == [
    (2, 4),
    (5, 8),
    (9, 12),
    (13, 16),
  ]
  regret = np.sum(
    parameters[:, 1:] * (np.log(parameters[:, 1:]) - log_probs[:, :-1]), axis=-1
  )
  total = sum(
    row['regret_per_symbol']
    * (row['last_position'] - row['first_position'] + 1)
    for row in rows
  )
  assert total == pytest.approx(regret.sum(axis=1).mean(), rel=1e-5)
  assert studies.length_of_training(rows) == 2


def _random_sequences(rng, **log_probs):
  symbols = np.eye(2)[rng.integers(2, size=(3, 5))]
  parameters = rng.dirichlet(np.ones(2), (3, 5))
  return trained_networks.Sequences(symbols, parameters, None, log_probs)


def test_grid_has_every_predictor_on_every_source(monkeypatch):
  rng = np.random.default_rng(0)
  exact = np.log(rng.dirichlet(np.ones(2), (3, 5)))
  sources = {
    'lin': _random_sequences(rng),
    'ptw': _random_sequences(rng, ptw=exact),
  }
  networks = [
    trained_networks.Network('ptw', name, None, None, [], (7, 8))
    for name in ('lstm', 'rnn')
  ]

  def predict(network, symbols):
    """Predictions from which network, seed and symbols can be told."""
    scale = {'lstm': 1, 'rnn': 2}[network.architecture]
    weights = scale * np.array(network.seeds)[:, None, None, None]
    return np.log((1 + weights * symbols) / (2 + weights))

  monkeypatch.setattr(trained_networks, 'predict', predict)
  first, *others = studies.evaluate_grid(networks, sources)
  assert (first.predictor, first.trained_on) == ('exact', 'ptw')
  assert (first.tested_on, first.seed) == ('ptw', None)
  np.testing.assert_array_equal(first.regret, first.exact_regret)
  cases = [
    (network, seed, name)
    for network in networks
    for seed in (7, 8)
    for name in sources
  ]
  for evaluation, (network, seed, name) in zip(others, cases, strict=True):
    assert evaluation.predictor == network.architecture
    assert evaluation.trained_on == 'ptw'
    assert (evaluation.seed, evaluation.tested_on) == (seed, name)
    log_probs = predict(network, sources[name].symbols)[seed - 7]
    np.testing.assert_array_equal(evaluation.log_probs, log_probs)
    p = sources[name].parameters[:, 1:]
    np.testing.assert_allclose(
      evaluation.regret,
      np.sum(p * (np.log(p) - log_probs[:, :-1]), axis=-1),
      atol=1e-6,
    )
    assert (evaluation.exact_regret is None) == (name == 'lin')


def test_trained_model_loses_off_distribution_what_it_lost_in_its_sweep():
  """On its own source and fresh sequences; false alarms beyond 4 errors."""
  network = committed_models.network('lstm_ptw')
  rows = studies.off_distribution([network], studies.Options(1024, seed=1))
  by_seed = {row['seed']: row for row in rows if row['predictor'] == 'lstm'}
  for committed in network.table[0]['seeds']:
    row = by_seed[committed['seed']]
    error = np.hypot(
      row['above_exact_stderr'], committed['above_optimum_stderr']
    )
    assert abs(row['above_exact'] - committed['above_optimum']) < 4 * error
  exact = {row['trained_on']: row for row in rows if row['seed'] is None}
  assert exact['ptw']['above_exact'] == 0 == exact['ptw']['kl/ptw']
  assert exact['static']['above_exact'] > 1
  for row in by_seed.values():
    assert 0 < row['kl/ptw'] < row['kl/static']


def _sample(stream, references):
  networks = [
    trained_networks.Network(
      name,
      'lstm',
      None,
      config_lib.ExperimentConfig(
        data=config_lib.DataConfig(trajectory_generator='lin')
      ),
      [],
      (0,),
    )
    for name in ('a', 'b')
  ]
  return dict(
    studies._sample(networks, 16, studies.Options(8), stream, references)
  )


def test_every_study_and_source_has_sequences_of_its_own():
  drawn = [
    sequences.symbols
    for stream in (0, 1)
    for sequences in _sample(stream, None).values()
  ]
  for i, first in enumerate(drawn):
    for second in drawn[:i]:
      assert not np.array_equal(first, second)


@pytest.mark.parametrize(
  ('references', 'of_a', 'of_b'),
  [
    (None, [], []),
    ((), ['a'], ['b']),
    (('b', 'static'), ['a', 'b', 'static'], ['b', 'static']),
  ],
)
def test_sequences_are_read_by_references_and_the_own_predictor(
  references, of_a, of_b
):
  sampled = _sample(0, references)
  assert {name: list(s.log_probs) for name, s in sampled.items()} == {
    'a': of_a,
    'b': of_b,
  }


@pytest.mark.parametrize(
  ('row', 'is_exact'),
  [({'is_exact': False}, 0), ({'is_exact': True}, 1), ({}, 1)],
)
def test_exact_predictor_is_told_from_a_best_reference(row, is_exact):
  measured = dict.fromkeys(
    ('cumulative_regret', 'stderr', 'above_optimum', 'above_optimum_stderr'),
    1.0,
  )
  # What a table is measured from may be exact, or only the best there is.
  exact = {'predictor': 'KT', 'is_optimum': True, **row, **measured}
  network = trained_networks.Network(
    'lin', 'lstm', None, None, [measured, exact], (5,)
  )
  lstm, kt = studies.on_distribution([network], studies.Options())
  assert (lstm['seed'], kt['seed']) == (5, None)
  assert 'is_exact' not in lstm and kt['is_exact'] == is_exact
