import pathlib

import jax
import numpy as np
import pytest

from nonstationary_mbml import train
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments import live_and_die_predictors
from nonstationary_mbml.experiments import saved_runs
from nonstationary_mbml.experiments.analysis import studies
from nonstationary_mbml.experiments.analysis import study_tables
from nonstationary_mbml.experiments.analysis import trained_networks
from nonstationary_mbml.runtime import atomic_files
from nonstationary_mbml.tests import oracles


def test_symbols_since_a_switch_count_from_one():
  switches = np.array([[0, 0, 1, 0, 0, 1, 0], [0, 1, 1, 0, 0, 0, 0]], bool)
  assert studies.symbols_since_switch(switches).tolist() == [
    [0, 0, 1, 2, 3, 1, 2],
    [0, 1, 1, 2, 3, 4, 5],
  ]


def test_regret_after_a_switch_is_the_mean_over_its_symbols():
  since = np.array([[1, 2, 3], [0, 1, 2], [0, 0, 1]])
  regret = np.array([[1.0, 2, 3], [9, 3, 4], [9, 9, 5]])
  rows = studies._after_switch_rows('a', 'b', 'a', 0, regret, since, (1, 2, 7))
  means = {row['symbols_since']: row['regret_per_symbol'] for row in rows}
  assert means == {1: 3.0, 2: 3.0}
  # One symbol of each sequence: the spread of a mean of three.
  assert rows[0]['regret_per_symbol_stderr'] == pytest.approx(np.sqrt(8) / 3)


def test_bins_of_positions_hold_every_predicted_symbol_once():
  rng = np.random.default_rng(0)
  parameters = rng.dirichlet(np.ones(2), (5, 16))
  log_probs = np.log(rng.dirichlet(np.ones(2), (5, 16)))
  sequences = trained_networks.Sequences(None, parameters, None, {})
  edges = (4, 8, 12, 16)
  rows = studies._length_rows('a', 'b', 0, log_probs, sequences, edges)
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


def test_divergence_is_that_of_the_definition():
  rng = np.random.default_rng(0)
  p, q = rng.dirichlet(np.ones(3), (2, 4, 6))
  divergence = trained_networks.divergence(np.log(p), np.log(q))
  assert divergence.shape == (4, 5)
  np.testing.assert_allclose(
    divergence[1, 2], np.sum(p[1, 2] * np.log(p[1, 2] / q[1, 2]))
  )
  assert np.all(trained_networks.divergence(np.log(p), np.log(p)) == 0)


def test_linear_read_out_finds_a_linear_map_and_nothing_else():
  rng = np.random.default_rng(0)
  states = rng.normal(size=(60, 8, 5))
  states[..., 4] = 1  # What does not vary.
  targets = {
    'linear': states @ [1.0, -2, 0, 0.5, 0] + 3,
    'noise': rng.normal(size=(60, 8)),
  }
  predicted = studies.linear_read_out(states, targets)
  np.testing.assert_allclose(
    predicted['linear'], targets['linear'][30:], atol=1e-4
  )
  assert studies.explained(targets['noise'][30:], predicted['noise']) < 0.1


def test_clock_in_the_state_explains_variance_but_none_given_time():
  rng = np.random.default_rng(0)
  times = np.tile(np.arange(6.0), (400, 1))
  clock = times[..., None]
  noise = rng.normal(size=times.shape)
  targets = {'both': times + noise, 'time': times}
  shares = studies.read_out_shares(clock, targets)
  # The variance of times is 35 / 12, that of the noise 1.
  assert shares['both']['r2'] == pytest.approx(35 / 47, abs=0.05)
  assert shares['both']['r2_given_time'] == pytest.approx(0, abs=0.02)
  assert shares['time']['r2'] == pytest.approx(1)
  assert shares['time']['r2_given_time'] is None
  # With the noise in the state, too, all is explained.
  states = np.stack([times, noise], axis=-1)
  shares = studies.read_out_shares(states, targets)
  assert shares['both']['r2_given_time'] == pytest.approx(1)


def test_posteriors_are_those_of_every_partition(x64):
  """Of LAD, against the sum over all partitions of every prefix."""
  hazard = lambda length: 1 / (2 * length)
  symbols = np.array([[0, 0, 0, 1, 1, 1]])
  got = studies.posteriors(
    live_and_die_predictors.LADPredictor(), oracles.one_hot(symbols, 2)
  )
  for seq_length in range(1, symbols.shape[1] + 1):
    # Switches before the symbols 2, ..., t + 1 or not: all of them.
    weights, run_lengths = [], []
    for code in range(2**seq_length):
      cuts = [t + 1 for t in range(seq_length) if code >> t & 1]
      weight, begin = 1.0, 0
      for end in (*cuts, None):
        last = seq_length if end is None else end
        for age in range(1, last - begin):
          weight *= 1 - hazard(age)
        if last > begin:
          weight *= hazard(last - begin) if end else 1 - hazard(last - begin)
        weight *= _kt(symbols[0, begin:last])
        begin = last
      weights.append(weight)
      run_lengths.append(seq_length - (cuts[-1] if cuts else 0))
    weights = np.array(weights) / np.sum(weights)
    run_lengths = np.array(run_lengths)
    time = seq_length - 1
    np.testing.assert_allclose(
      got['run_length'][0, time], weights @ run_lengths, rtol=1e-9
    )
    np.testing.assert_allclose(
      got['recent_switch'][0, time],
      weights[run_lengths <= studies.RECENT].sum(),
      rtol=1e-9,
    )


def _kt(symbols):
  """Probability of a segment under the KT estimator."""
  counts, probability = np.zeros(2), 1.0
  for symbol in symbols:
    probability *= (counts[symbol] + 0.5) / (counts.sum() + 1)
    counts[symbol] += 1
  return probability


def test_exact_predictors_are_optimal_on_their_own_source():
  sources = {
    name: config_lib.DataConfig(
      trajectory_generator=name,
      trajectory_generator_kwargs=constants.source_kwargs(name),
    )
    for name in ('lin', 'ptw')
  }
  exact = trained_networks.exact_predictors(sources, 16)
  assert list(exact) == ['lin', 'ptw', 'static']
  sequences = trained_networks.sample(
    sources['ptw'], exact, 16, 2500, jax.random.key(0)
  )
  assert list(sequences.log_probs) == list(exact)
  assert sequences.symbols.shape == (2500, 16, 2)
  regrets = {
    name: trained_networks.regret(log_probs, sequences.parameters).sum(axis=1)
    for name, log_probs in sequences.log_probs.items()
  }
  for name in ('lin', 'static'):
    above = regrets[name] - regrets['ptw']
    # False alarms: beyond five standard errors.
    assert above.mean() > 5 * above.std() / np.sqrt(len(above))


def test_nearest_exact_predictor_is_that_of_the_least_mean_divergence():
  rows = [
    {'seed': 0, 'kl/ptw': 1.0, 'kl/lin': 0.5},
    {'seed': 1, 'kl/ptw': 1.0, 'kl/lin': 2.0},
  ]
  assert study_tables.nearest_exact(rows) == ('ptw', 1.0)


MODELS = pathlib.Path(studies.__file__).parents[2] / 'results' / 'models'


def _network(name):
  """A committed model as a network of a sweep."""
  config = saved_runs.load_config(MODELS / name)
  table = atomic_files.read_json(MODELS / name / 'table.json')['table']
  return trained_networks.Network(
    config.data.trajectory_generator,
    config.model.model_type,
    MODELS / name,
    config,
    table,
    config.train.model_init_seed,
  )


def test_trained_model_loses_off_distribution_what_it_lost_in_its_sweep():
  """On its own source and fresh sequences; false alarms beyond 4 errors."""
  network = _network('lstm_ptw')
  rows = studies.off_distribution([network], 1024, seed=1)
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


def test_features_of_a_transformer_are_all_that_its_predictions_need():
  network = _network('transformer_sin_cos_ptw')
  run = saved_runs.load_run(network.folder)
  symbols = oracles.one_hot(
    np.random.default_rng(0).integers(2, size=(3, 7)), 2
  )
  states = trained_networks.read_states(network, symbols.astype(np.float32))
  assert states.shape == (3, 3, 7, 32)
  for member in range(3):
    head = run.member(member)['logits']
    np.testing.assert_allclose(
      jax.nn.log_softmax(states[member] @ head['w'] + head['b']),
      trained_networks.predict(network, symbols.astype(np.float32))[member],
      atol=1e-5,
    )


def test_untrained_networks_are_those_that_training_started_from():
  network = _network('lstm_ptw')
  run = trained_networks.untrained_run(saved_runs.load_run(network.folder))
  keys = train.step_keys(network.config.seed, network.seeds[1], 0)
  batch = np.zeros((1, 2, 2), np.float32)
  params = run.predictor.init_params(keys.predictor, batch, None)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    run.member(1),
    params,
  )


def test_every_question_and_source_has_sequences_of_its_own():
  config = config_lib.DataConfig(trajectory_generator='lin')
  drawn = [
    sequences.symbols
    for question in (0, 1)
    for _, sequences in studies._sampled(
      {'a': config, 'b': config}, {}, 16, 8, seed=0, question=question
    )
  ]
  for i, first in enumerate(drawn):
    for second in drawn[:i]:
      assert not np.array_equal(first, second)
