import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from nonstationary_mbml import base_config
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import local_launch

SCRIPT = pathlib.Path(local_launch.__file__)


def _launch(tmp_path, *flags, env=None):
  cache = SCRIPT.parent.parent / '.cache' / 'jax'
  return subprocess.run(
    [sys.executable, SCRIPT, '--output_dir=runs', *flags],
    cwd=tmp_path,
    env={
      **{k: v for k, v in os.environ.items() if not k.startswith('JAX_COMP')},
      **(env or {'JAX_COMPILATION_CACHE_DIR': str(cache)}),
    },
    capture_output=True,
    text=True,
    check=False,
  )


SHORT = (
  '--steps=20',
  '--seq_length=8',
  '--batch_size=8',
  '--num_sequences=600',
)


def test_run_writes_config_metrics_and_figure(tmp_path):
  result = _launch(tmp_path, *SHORT, '--name=short')
  assert result.returncode == 0, result.stderr
  folder = tmp_path / 'runs' / 'short'
  assert sorted(path.name for path in folder.iterdir()) == [
    'config.json',
    'figure.png',
    'metrics.json',
  ]
  config = base_config.from_dict(
    config_lib.ExperimentConfig,
    json.loads((folder / 'config.json').read_text()),
  )
  assert config.schedule.training_steps == 20
  metrics = json.loads((folder / 'metrics.json').read_text())
  assert [row['predictor'] for row in metrics['table']] == [
    'lstm',
    'PTW',
    'LAD',
    'KT',
  ]
  assert metrics['exact_predictor'] == 'ptw'
  assert metrics['history'][-1]['step'] == 20
  assert (folder / 'figure.png').read_bytes().startswith(b'\x89PNG')
  # Progress and table are shown.
  assert 'loss=' in result.stderr and 'regret=' in result.stderr
  assert 'PTW' in result.stdout and 'optimum' in result.stdout

  again = _launch(tmp_path, *SHORT, '--name=short', '--seed=1')
  assert again.returncode != 0
  assert 'seed: 0 -> 1' in again.stderr and '--overwrite' in again.stderr
  assert (folder / 'metrics.json').exists()


def test_source_without_exact_predictor_is_measured_from_the_best(tmp_path):
  result = _launch(
    tmp_path,
    *SHORT,
    '--source=recurring',
    '--model_type=sliding_window_transformer',
    '--steps=0',
  )
  assert result.returncode == 0, result.stderr
  assert 'no exact predictor of its own' in result.stdout
  assert 'Forget-Me-Not' in result.stdout


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--source=ptww', "mean 'ptw'"),
    ('--model_type=lstn', "mean 'lstm'"),
    ('--steps=-1', '--steps=-1'),
    ('--seq_length=1', '--seq_length=1'),
    ('--batch_size=0', '--batch_size=0'),
    ('--stepps=3', 'steps'),
    ('--output_dir=/dev/null/runs', 'cannot write to /dev/null/runs'),
    ('--num_seeds=0', '--num_seeds=0'),
    ('--cpu_devices=3', 'batch_size 128 does not divide over 3 devices'),
  ],
)
def test_wrong_flags_are_one_line_errors(tmp_path, flag, message):
  result = _launch(tmp_path, flag)
  assert result.returncode != 0
  assert message in result.stderr
  assert 'Traceback' not in result.stderr
  assert 'training' not in result.stderr.replace('training steps', '')


def test_second_start_compiles_nothing(tmp_path):
  cache = tmp_path / 'cache'
  env = {'XDG_CACHE_HOME': str(cache)}
  flags = (*SHORT, '--overwrite', '--num_seeds=2', '--num_sequences=100')
  first = _launch(tmp_path, *flags, env=env)
  assert first.returncode == 0, first.stderr
  assert 'lstm, 2 seeds' in first.stdout
  kept = sorted(path.name for path in cache.rglob('*-cache'))
  assert kept
  second = _launch(tmp_path, *flags, env=env)
  assert 'Compiled 0 programs and loaded' in second.stdout
  assert sorted(path.name for path in cache.rglob('*-cache')) == kept
  # What came of it is the same, too.
  assert second.stdout.splitlines()[3:8] == first.stdout.splitlines()[3:8]


def test_ensembles_are_measured_over_their_members():
  regrets = {'network': np.array([[1.0, 3.0], [2.0, 6.0]]), 'kt': np.ones(2)}
  names = {'network': 'lstm, 2 seeds', 'kt': 'KT'}
  network, _ = local_launch.results_table(regrets, names, 'kt')
  assert network['cumulative_regret'] == 3.0
  # Means of the members are 2 and 4.
  assert network['stderr'] == pytest.approx(1.0)
  assert network['above_optimum'] == 2.0
  assert network['above_optimum_stderr'] == pytest.approx(1.0)


def test_default_config_is_the_documented_run():
  config = local_launch.make_config()
  assert config.model.model_type == 'lstm'
  assert config.model.architecture_kwargs == {'hidden_size': 64}
  assert config.data.trajectory_generator == 'ptw'
  assert config.train.seq_length == 32
  assert config.train.learning_rate == 2e-3
  assert config.train.batch_size == 128
  assert config.schedule.training_steps == 10_000


def test_table_measures_from_the_exact_predictor():
  ptw = np.array([2.0, 3.0, 4.0, 3.0])
  regrets = {'network': ptw + [0.0, 1.0, 0.0, 1.0], 'ptw': ptw, 'kt': ptw - 1}
  names = {'network': 'lstm', 'ptw': 'PTW', 'kt': 'KT'}
  rows = local_launch.results_table(regrets, names, 'ptw')
  above = {row['predictor']: row['above_optimum'] for row in rows}
  assert above == {'lstm': 0.5, 'PTW': 0.0, 'KT': -1.0}
  # Paired: the spread of the sequences themselves does not count.
  assert rows[2]['above_optimum_stderr'] == 0
  assert rows[0]['above_optimum_stderr'] == pytest.approx(np.sqrt(1 / 12))
  best = local_launch.results_table(regrets, names, None)
  assert [row['is_optimum'] for row in best] == [False, False, True]


def test_table_without_exact_predictors_has_the_network():
  (row,) = local_launch.results_table(
    {'network': np.arange(3.0)}, {'network': 'lstm'}, None
  )
  assert row['cumulative_regret'] == 1.0


def test_made_config_can_still_be_changed():
  config = local_launch.make_config()
  config.data.trajectory_generator = 'lin'
  config.train.seq_length = 64
  config = config_lib.post_process_config(config)
  assert config.eval.data.trajectory_generator == 'lin'
  assert config.eval.seq_length == 64
  assert config.eval.optimal_predictors_kwargs['ptw']['depth'] == 6


def test_run_of_an_older_config_has_the_defaults_of_newer_fields(tmp_path):
  config = local_launch.make_config()
  local_launch.open_folder(tmp_path, config, overwrite=False)
  (tmp_path / 'metrics.json').write_text('{}')
  path = tmp_path / 'config.json'
  values = json.loads(path.read_text())
  del values['train']['microbatch_size']
  path.write_text(json.dumps(values))
  local_launch.open_folder(tmp_path, config, overwrite=False)


def test_name_tells_an_ensemble_from_a_single_run():
  names = {local_launch.make_config(num_seeds=n).name for n in (1, 2, 8)}
  assert names == {
    'lstm_ptw_seed0',
    'lstm_ptw_seed0_2seeds',
    'lstm_ptw_seed0_8seeds',
  }


def test_overwritten_run_leaves_no_stale_results(tmp_path):
  first, second = (local_launch.make_config(seed=seed) for seed in (0, 1))
  local_launch.open_folder(tmp_path, first, overwrite=False)
  (tmp_path / 'metrics.json').write_text('{}')
  with pytest.raises(ValueError, match='seed: 0 -> 1'):
    local_launch.open_folder(tmp_path, second, overwrite=False)
  local_launch.open_folder(tmp_path, second, overwrite=True)
  assert [path.name for path in tmp_path.iterdir()] == ['config.json']
