import json

import jax
import numpy as np
import pytest

from nonstationary_mbml import base_config
from nonstationary_mbml import train_state
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments import saved_runs
from nonstationary_mbml.experiments.analysis import trained_networks
from nonstationary_mbml.experiments.sweeps import sweep_folder
from nonstationary_mbml.runtime import atomic_files
from nonstationary_mbml.tests import oracles
from nonstationary_mbml.tests.experiments.analysis import committed_models


def _finish(folder, sweep, regrets):
  """A sweep whose runs have logged and tabled such regrets."""
  points = sweep.points()
  of_sweep = sweep_folder.SweepFolder(folder)
  with of_sweep.open(points, 16):
    pass
  for point, (logged, tabled) in zip(points, regrets, strict=True):
    path = of_sweep.run_path(point.config.name)
    path.mkdir()
    config = config_lib.post_process_config(point.config)
    atomic_files.write_json(path / 'config.json', base_config.to_dict(config))
    lines = [{'step': 1, 'cumulative_regret': 0.0}]
    lines += [{'step': 2, 'cumulative_regret': logged}]
    (path / 'metrics.jsonl').write_text(
      ''.join(json.dumps(line) + '\n' for line in lines)
    )
    row = {'predictor': 'lstm', 'cumulative_regret': tabled}
    atomic_files.write_json(path / 'table.json', {'table': [row]})


def _sweep(path, values):
  return config_lib.ExperimentSweep(
    general_sweep={
      'data': {'lin': {'trajectory_generator': 'lin'}},
      'model': {'lstm': {'model_type': 'lstm'}},
      path: values,
    }
  )


def test_learning_rate_is_chosen_by_the_last_log_and_not_by_the_table(tmp_path):
  sweep = _sweep('train.learning_rate', (0.1, 0.2, 0.3))
  _finish(tmp_path, sweep, [(2.0, 1.0), (1.0, 3.0), (3.0, 2.0)])
  (network,) = trained_networks.networks(tmp_path)
  assert network.config.train.learning_rate == 0.2
  assert (network.source, network.architecture) == ('lin', 'lstm')
  assert network.table[0]['cumulative_regret'] == 3.0


def test_seeds_as_points_of_their_own_are_refused(tmp_path):
  # Else the best of the seeds would stand for all.
  _finish(tmp_path, _sweep('seed', (0, 1)), [(1.0, 1.0), (2.0, 2.0)])
  with pytest.raises(ValueError, match='swept over seed; .* has all seeds in'):
    trained_networks.networks(tmp_path)


def test_sources_of_several_priors_have_no_common_kt():
  sources = {
    str(prior): config_lib.DataConfig(parameter_distribution_params=prior)
    for prior in ((0.5, 0.5), (1.0, 1.0))
  }
  with pytest.raises(ValueError, match='has one, and a Dirichlet'):
    trained_networks.exact_predictors(sources, 8)


def test_prior_that_is_one_number_is_that_of_its_tuple():
  sources = {
    str(prior): config_lib.DataConfig(parameter_distribution_params=prior)
    for prior in ((0.5, 0.5), 0.5)
  }
  exact = trained_networks.exact_predictors(sources, 8)
  assert exact['0.5'] == exact['(0.5, 0.5)']


def test_divergence_is_that_of_the_definition():
  rng = np.random.default_rng(0)
  p, q = rng.dirichlet(np.ones(3), (2, 4, 6))
  divergence = trained_networks.divergence(np.log(p), np.log(q))
  assert divergence.shape == (4, 5)
  np.testing.assert_allclose(
    divergence[1, 2], np.sum(p[1, 2] * np.log(p[1, 2] / q[1, 2]))
  )
  assert np.all(trained_networks.divergence(np.log(p), np.log(p)) == 0)


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


def test_features_of_a_transformer_are_all_that_its_predictions_need():
  network = committed_models.network('transformer_sin_cos_ptw')
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
  network = committed_models.network('lstm_ptw')
  run = trained_networks.untrained_run(saved_runs.load_run(network.folder))
  keys = train_state.step_keys(network.config.seed, network.seeds[1], 0)
  batch = np.zeros((1, 2, 2), np.float32)
  params = run.predictor.init_params(keys.predictor, batch, None)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    run.member(1),
    params,
  )
