import copy
import json
import os
import pathlib
import subprocess
import sys

from absl import flags
import pytest

from nonstationary_mbml import base_config
from nonstationary_mbml import predictor_factories
from nonstationary_mbml import predictors
from nonstationary_mbml import train
from nonstationary_mbml import train_state
from nonstationary_mbml.experiments import cli
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments import evaluate
from nonstationary_mbml.experiments import local_launch
from nonstationary_mbml.models import basic
from nonstationary_mbml.tests.runtime import test_tensorboard

SCRIPT = pathlib.Path(local_launch.__file__)


def _launch(tmp_path, *args, env=None):
  cache = SCRIPT.parent.parent / '.cache' / 'jax'
  return subprocess.run(
    [sys.executable, SCRIPT, '--output_dir=runs', *args],
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
  result = _launch(
    tmp_path, *SHORT, '--name=short', '--cpu_devices=2', '--tensorboard'
  )
  assert result.returncode == 0, result.stderr
  folder = tmp_path / 'runs' / 'short'
  assert sorted(path.name for path in folder.iterdir()) == [
    '.lock',
    'checkpoints',
    'config.json',
    'environment.json',
    'figure.png',
    'metrics.jsonl',
    'snapshots',
    'table.json',
    'tensorboard',
  ]
  config = base_config.from_dict(
    config_lib.ExperimentConfig,
    json.loads((folder / 'config.json').read_text()),
  )
  assert config.schedule.training_steps == 20
  table = json.loads((folder / 'table.json').read_text())
  assert [row['predictor'] for row in table['table']] == [
    'LSTM',
    'PTW',
    'LAD',
    'KT',
  ]
  assert table['exact_predictor'] == 'ptw'
  (entry,) = (folder / 'metrics.jsonl').read_text().splitlines()
  entry = json.loads(entry)
  assert entry.pop('step') == 20
  assert test_tensorboard.scalars(folder / 'tensorboard') == pytest.approx(
    {(name, 20): value for name, value in entry.items()}
  )
  assert (folder / 'figure.png').read_bytes().startswith(b'\x89PNG')
  # Without a terminal, a line per log and nothing else.
  (line,) = result.stderr.splitlines()
  assert line.startswith('training: step 20/20  loss=')
  assert 'PTW' in result.stdout and 'optimum' in result.stdout

  again = _launch(tmp_path, *SHORT, '--name=short', '--seed=1')
  assert again.returncode != 0
  assert 'seed: 0 -> 1' in again.stderr and '--overwrite' in again.stderr
  assert (folder / 'table.json').exists()

  evaluated = subprocess.run(
    [sys.executable, SCRIPT.parent / 'evaluate.py', folder]
    + ['--num_sequences=600', '--cpu_devices=2'],
    capture_output=True,
    text=True,
    check=False,
  )
  assert evaluated.returncode == 0, evaluated.stderr
  # On the same sequences: the table of the launch script again.
  assert result.stdout.splitlines()[3:8] == evaluated.stdout.splitlines()[2:7]
  (path,) = (folder / 'evaluations').iterdir()
  assert path.name == 'ptw_T8_step_20.json'
  (of_step,) = json.loads(path.read_text())['steps']
  assert of_step['table'] == table['table']


@pytest.mark.slow
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
    ('--stepps=3', 'steps'),
    ('--output_dir=/dev/null/runs', 'cannot write to /dev/null/runs'),
    ('--cpu_devices=3', 'batch_size 128 does not divide over the 3 devices'),
    ('--process_id=0', '--distributed: --process_id needs it'),
  ],
)
def test_wrong_flags_are_one_line_errors(tmp_path, flag, message):
  result = _launch(tmp_path, flag)
  assert result.returncode != 0
  assert message in result.stderr
  assert 'Traceback' not in result.stderr
  assert 'training' not in result.stderr.replace('training steps', '')


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--source=ptww', "mean 'ptw'"),
    ('--model_type=lstn', "mean 'lstm'"),
    ('--steps=-1', '--steps=-1'),
    ('--seq_length=1', '--seq_length=1'),
    ('--batch_size=0', '--batch_size=0'),
    ('--num_seeds=0', '--num_seeds=0'),
    ('--num_processes=0', '--num_processes=0'),
    ('--num_sequences=3000000000', 'range .*2147483647'),
    ('--num_seeds=3000000000', 'range .*65536'),
    ('--seed=4294967296', 'range .*4294967294'),
    ('--steps=1e-1', '--steps=1e-1'),
    ('--alphabet_size=1', '--alphabet_size=1'),
    ('--alphabet_size=1e6', 'range .*65536'),
  ],
)
def test_wrong_values_of_flags_are_flag_errors(flag, message):
  values = flags.FlagValues()
  local_launch.define_flags(values)
  with pytest.raises(flags.Error, match=message):
    values(['local_launch.py', flag])


@pytest.mark.slow
def test_second_start_compiles_nothing(tmp_path):
  cache = tmp_path / 'cache'
  env = {'XDG_CACHE_HOME': str(cache)}
  args = (*SHORT, '--overwrite', '--num_seeds=2', '--num_sequences=100')
  first = _launch(tmp_path, *args, env=env)
  assert first.returncode == 0, first.stderr
  assert 'LSTM, 2 seeds' in first.stdout
  kept = sorted(path.name for path in cache.rglob('*-cache'))
  assert kept
  second = _launch(tmp_path, *args, env=env)
  assert 'Compiled 0 programs and loaded' in second.stdout
  assert sorted(path.name for path in cache.rglob('*-cache')) == kept
  # What came of it is the same, too.
  assert second.stdout.splitlines()[3:8] == first.stdout.splitlines()[3:8]


def test_components_are_built_once_and_before_a_run_is_deleted(
  monkeypatch, tmp_path
):
  values = flags.FlagValues()
  local_launch.define_flags(values)
  values(['', f'--output_dir={tmp_path}', '--overwrite'])
  done = []

  def stop(config, components, **kwargs):
    done.append(components)
    raise train.StoppedError('stopped')

  monkeypatch.setattr(flags, 'FLAGS', values)
  monkeypatch.setattr(cli, 'start', lambda *args: None)
  source = constants.build_data_generator(config_lib.DataConfig())
  built = train.Components(source, None, None, [])
  monkeypatch.setattr(
    train, 'build_components', lambda *args: done.append('built') or built
  )
  monkeypatch.setattr(
    train_state, 'initial_params', lambda *args: done.append('read')
  )
  monkeypatch.setattr(local_launch, 'clear', lambda path: done.append('clear'))
  monkeypatch.setattr(train, 'train_components', stop)
  with pytest.raises(SystemExit, match=str(cli.EXIT_STOPPED)):
    local_launch.main([''])
  assert done == ['built', 'read', 'clear', built]


def test_default_config_is_the_documented_run():
  config = local_launch.make_config()
  assert config.model.model_type == 'lstm'
  assert config.model.architecture_kwargs == {'hidden_size': 64}
  assert config.data.trajectory_generator == 'ptw'
  assert config.train.seq_length == 32
  assert config.train.optimizer == 'muon'
  assert config.train.schedule == 'warmup_cosine'
  assert config.train.learning_rate == 1e-2
  assert config.train.batch_size == 128
  assert config.schedule.training_steps == 5_000


@pytest.mark.parametrize('name', ['RECURRING', 'Regular_Shift', 'random_SHIFT'])
def test_source_has_its_arguments_in_any_case_of_letters(name):
  values = flags.FlagValues()
  local_launch.define_flags(values)
  values(['', f'--source={name}', '--model_type=GRU', '--steps=1e2'])
  config = local_launch.config_from_flags(values)
  assert config.schedule.training_steps == 100
  default = constants.TRAJECTORY_GENERATORS[name.lower()].default_kwargs
  assert default
  assert config.data.trajectory_generator_kwargs == default
  config = evaluate.make_config(config, source=name)
  assert config.eval.data.trajectory_generator_kwargs == default
  constants.check(config)


def test_alphabet_of_a_size_has_a_symmetric_prior(tmp_path):
  values = flags.FlagValues()
  local_launch.define_flags(values)
  values(['', '--alphabet_size=26', '--model_type=gru'])
  config = local_launch.config_from_flags(values)
  assert config.data.parameter_distribution_params == 0.5
  source = constants.build_data_generator(config.data)
  assert source.alphabet_size == 26
  assert source.parameter_distribution_params == (0.5,) * 26
  # On top of a saved config, it decides the prior as well.
  path = tmp_path / 'config.json'
  path.write_text(json.dumps(base_config.to_dict(config)))
  for given, params in (
    ((), (0.5,) * 26),
    (('--alphabet_size=3',), (0.5,) * 3),
  ):
    values = flags.FlagValues()
    local_launch.define_flags(values)
    values(['', f'--config={path}', *given])
    resolved = local_launch.config_from_flags(values).resolved()
    assert resolved.data.parameter_distribution_params == params
    assert resolved.eval.data == resolved.data
    kwargs = resolved.eval.optimal_predictors_kwargs['ptw']
    assert kwargs['concentration'] == params


def test_prior_that_is_one_number_is_the_run_of_its_tuple():
  config = local_launch.make_config()
  written_out = copy.deepcopy(config)
  written_out.data.parameter_distribution_params = (0.5, 0.5)
  assert written_out != config
  assert written_out.resolved() == config.resolved()
  written_out.data.parameter_distribution_params = (0.5, 0.25)
  assert written_out.resolved() != config.resolved()


def test_registered_network_is_a_model_type(monkeypatch):
  monkeypatch.setitem(
    predictor_factories.PREDICTOR_FACTORIES,
    'mine',
    lambda output_size, kwargs: predictors.InContextPredictor(
      basic.make_cnn(output_size, **kwargs)
    ),
  )
  values = flags.FlagValues()
  local_launch.define_flags(values)
  path = 'model.architecture_kwargs.kernel_size'
  values(['', '--model_type=Mine', f'--set={path}=4'])
  config = local_launch.config_from_flags(values)
  assert config.name == 'mine_ptw_seed0'
  assert config.model.architecture_kwargs == {'kernel_size': 4}


def test_made_config_can_still_be_changed():
  config = local_launch.make_config()
  config.data.trajectory_generator = 'lin'
  config.train.seq_length = 64
  config = config_lib.post_process_config(config)
  assert config.eval.data.trajectory_generator == 'lin'
  assert config.eval.seq_length == 64
  assert config.eval.optimal_predictors_kwargs['ptw']['depth'] == 6


def test_name_tells_an_ensemble_from_a_single_run():
  names = {local_launch.make_config(num_seeds=n).name for n in (1, 2, 8)}
  assert names == {
    'lstm_ptw_seed0',
    'lstm_ptw_seed0_2seeds',
    'lstm_ptw_seed0_8seeds',
  }


def test_overwritten_run_leaves_no_stale_results(tmp_path):
  names = ('config.json', 'metrics.jsonl', 'table.json', 'figure.png')
  for name in names:
    (tmp_path / name).write_text('')
  (tmp_path / 'checkpoints' / '5').mkdir(parents=True)
  (tmp_path / 'notes.txt').write_text('mine')
  local_launch.clear(tmp_path)
  assert sorted(path.name for path in tmp_path.iterdir()) == [
    '.lock',
    'notes.txt',
  ]
