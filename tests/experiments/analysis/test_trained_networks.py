import json

import pytest

from nonstationary_mbml import base_config
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments.analysis import trained_networks
from nonstationary_mbml.experiments.sweeps import sweep_folder
from nonstationary_mbml.runtime import atomic_files


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
