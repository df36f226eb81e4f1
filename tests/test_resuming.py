"""Runs that are stopped anywhere end as if they had not been."""

import inspect
import json
import re
import shutil
import signal

import jax
import numpy as np
import pytest

from nonstationary_mbml import base_config
from nonstationary_mbml import train
from nonstationary_mbml import train_state
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments import evaluator as evaluator_lib
from nonstationary_mbml.experiments import saved_runs
from nonstationary_mbml.runtime import checkpointing
from nonstationary_mbml.runtime import run_folder
from nonstationary_mbml.runtime import sharding
from nonstationary_mbml.runtime import trained_run


def _config(**train_kwargs):
  return config_lib.post_process_config(
    config_lib.ExperimentConfig(
      train=base_config.TrainConfig(
        **{'seq_length': 8, 'batch_size': 4, **train_kwargs}
      ),
      model=base_config.ModelConfig(
        model_type='lstm', architecture_kwargs={'hidden_size': 3}
      ),
      schedule=base_config.ScheduleConfig(
        training_steps=14, num_saves=3, ckpt_frequency=8
      ),
      logger=base_config.LoggerConfig(log_frequency=3),
      eval=config_lib.EvalConfig(batch_size=4, optimal_predictors=('kt',)),
    )
  )


class _Evaluator:
  """Measures nothing, and calls a function at every log."""

  alphabet_size = 2

  def __init__(self, at_log):
    self.at_log = at_log

  def step(self, predictor_params, predictor_state, rng):
    self.at_log()
    return {'key': jax.random.uniform(rng)}


def _train(config, folder, at_log=lambda: None):
  return train.train(
    config,
    constants.build_data_generator,
    lambda predictor, config: _Evaluator(at_log),
    folder=folder,
  )


@pytest.fixture(scope='module', autouse=True)
def _shared_programs():
  """Compiles the steps of equal configs once, not for every run of them."""
  with pytest.MonkeyPatch.context() as patch:
    for name in ('make_update', 'make_run_steps'):
      patch.setattr(train, name, _once(getattr(train, name)))
    yield


def _once(make):
  """Calls a function once for equal arguments."""
  made = {}

  def make_once(*args):
    key = tuple(
      arg if inspect.isfunction(arg) else _without_address(arg) for arg in args
    )
    if key not in made:
      made[key] = make(*args)
    return made[key]

  return make_once


def _without_address(arg):
  # Generator and predictor follow from the config.
  return re.sub(' at 0x[0-9a-f]+', '', repr(arg))


@pytest.fixture(scope='module')
def whole():
  """The run of `_config()` that nobody stopped, without a folder."""
  return _train(_config(), None)


class _KilledError(Exception):
  pass


def _at(log, function):
  """Calls a function at the n-th log, n = 1, 2, ..."""
  logs = iter(range(1, 100))
  return lambda: function() if next(logs) == log else None


def _kill():
  raise _KilledError


def _build(config):
  return train.build_components(
    config, constants.build_data_generator, evaluator_lib.build_evaluator
  )


def _assert_same(first, second):
  assert first.history == second.history
  assert first.member_histories == second.member_histories
  params = lambda run: (run.all_params, run.all_ema_params)
  jax.tree.map(np.testing.assert_array_equal, params(first), params(second))


@pytest.mark.parametrize(
  'train_kwargs',
  [
    # Each member on a device of its own; stopped in the middle of warmup.
    {
      'model_init_seed': (0, 1),
      'reset_predictor_init_state': False,
      'schedule': 'warmup_linear',
      'warmup_steps': 12,
      'target': 'bayes',
      'ema_decay': 0.9,
    },
    # Shares of the batch on both devices.
    {
      'seq_length': 4,
      'reset_predictor_init_state': False,
      'seq_length_fixed': False,
    },
    pytest.param({}, marks=pytest.mark.slow),
    pytest.param({'model_init_seed': (0, 1, 2)}, marks=pytest.mark.slow),
  ],
  ids=['members on devices', 'carried state', 'one', 'ensemble'],
)
def test_stopped_run_ends_with_the_same_bits(tmp_path, train_kwargs):
  """On two devices: killed, then asked to stop, then left to finish."""
  config = _config(**train_kwargs)
  whole = _train(config, tmp_path / 'whole')
  assert [entry['step'] for entry in whole.history] == [3, 6, 9, 12, 14]
  folder = tmp_path / 'stopped'
  num_members = len(trained_run.member_seeds(config.train))
  with pytest.raises(_KilledError):
    _train(config, folder, _at(3 * num_members, _kill))
  stop = lambda: signal.raise_signal(signal.SIGTERM)
  with pytest.raises(train.StoppedError, match='SIGTERM after step'):
    _train(config, folder, _at(1, stop))
  resumed = _train(config, folder)
  _assert_same(resumed, whole)
  for name in ('whole', 'stopped'):
    folder = tmp_path / name
    assert checkpointing.Checkpoints(folder / 'snapshots').steps() == (1, 4, 14)
    assert 14 in checkpointing.Checkpoints(folder / 'checkpoints').steps()
  metrics = [
    (tmp_path / name / 'metrics.jsonl').read_bytes()
    for name in ('whole', 'stopped')
  ]
  assert metrics[0] == metrics[1]
  # On disk, an int seed has no axis of members.
  is_ensemble = 'model_init_seed' in train_kwargs
  expected = whole.all_params if is_ensemble else whole.params
  if whole.all_ema_params is not None:
    expected = train_state.AveragedParams(expected, whole.all_ema_params)
  snapshots = checkpointing.Checkpoints(tmp_path / 'whole' / 'snapshots')
  saved = snapshots.restore(14, sharding.abstract(expected, None))
  jax.tree.map(np.testing.assert_array_equal, saved, expected)
  # A finished run has nothing left to do.
  _assert_same(_train(config, tmp_path / 'whole', _kill), whole)


def test_folder_changes_nothing_about_training(tmp_path, whole):
  _assert_same(_train(_config(), tmp_path), whole)


def test_stop_between_two_logs_keeps_the_sums(tmp_path, whole):
  """The mean loss of a log is over the steps before and after the stop."""
  config = _config()
  begun = []

  def stop_after_the_next_call():
    begun.append(True)

  # The signal comes while a call runs: after step 4, since calls double.
  run_steps = train.make_run_steps

  def make_run_steps(*args):
    function = run_steps(*args)

    def run(state, sums, num_steps):
      if begun:
        signal.raise_signal(signal.SIGINT)
      return function(state, sums, min(num_steps, 1))

    return run

  patch = pytest.MonkeyPatch()
  with patch.context() as patched:
    patched.setattr(train, 'make_run_steps', make_run_steps)
    patched.setattr(train, '_next_max_steps', lambda *args: 1)
    with pytest.raises(train.StoppedError, match='SIGINT after step 4 of 14'):
      _train(config, tmp_path, _at(1, stop_after_the_next_call))
  _assert_same(_train(config, tmp_path), whole)


def test_many_steps_in_a_call_are_bit_for_bit_as_many_calls():
  config = _config()
  generator, predictor, _, devices = _build(config)
  update = train.make_update(config, generator, predictor, 2)
  run_steps = train.make_run_steps(config, update, devices)

  def run(*calls):
    state = train_state.init_state(config, predictor, 2, devices)
    sums = train_state.zero_sums(state)
    for num_steps in calls:
      state, sums, _ = run_steps(state, sums, num_steps)
    return jax.device_get((state, sums))

  jax.tree.map(np.testing.assert_array_equal, run(9), run(1, 5, 2, 1))


def _failing_update(broken_steps):
  """An update that does nothing, but for one broken step of some members.

  Args:
    broken_steps: Step and loss of a member's broken step, by its seed.
  """

  def update(state, seed):
    step = state.step + 1
    loss = 1.0
    for seed_that_fails, (failing_step, value) in broken_steps.items():
      fails = (seed == seed_that_fails) & (step == failing_step)
      loss = jax.numpy.where(fails, value, loss)
    return state._replace(step=step), train_state.StepMetrics(loss, loss + 1.0)

  return update


def test_steps_of_a_member_stop_at_its_first_that_is_not_finite():
  config = _config(model_init_seed=(3, 7, 11))
  generator, predictor, _, devices = _build(config)
  devices = devices[:1]
  state = train_state.init_state(config, predictor, 2, devices)
  sums = train_state.zero_sums(state)
  run_steps = train.make_run_steps(
    config, _failing_update({7: (5, np.nan), 11: (8, np.inf)}), devices
  )
  _, sums, num_done = run_steps(state, sums, 10)
  assert list(num_done) == [10, 4, 7]
  np.testing.assert_array_equal(sums.loss, [10.0, np.nan, np.inf])


def test_diverging_run_says_where_and_keeps_the_last_good_state(tmp_path):
  config = _config()
  with pytest.raises(train.StoppedError):
    stop = lambda: signal.raise_signal(signal.SIGTERM)
    _train(config, tmp_path, _at(2, stop))
  patch = pytest.MonkeyPatch()
  with patch.context() as patched:
    patched.setattr(
      train, 'make_update', lambda *args: _failing_update({0: (11, np.nan)})
    )
    with pytest.raises(
      train.NonFiniteError,
      match='step 11: loss is nan, gradient norm is nan, with '
      'train.learning_rate 0.002; the last good checkpoint is that of step 8',
    ):
      _train(config, tmp_path)
  # Mended, it goes on from there.
  resumed = _train(config, tmp_path)
  assert [entry['step'] for entry in resumed.history] == [3, 6, 9, 12, 14]
  starts = json.loads((tmp_path / 'environment.json').read_text())['starts']
  assert starts[1]['end'].endswith('at step 11')
  assert starts[2]['first_step'] == 8


def test_parameters_that_are_not_finite_are_never_saved(tmp_path):
  config = _config(learning_rate=3e38, clip_grad_norm=None)
  with pytest.raises(train.NonFiniteError, match='step 1: the norm of'):
    _train(config, tmp_path)
  assert checkpointing.Checkpoints(tmp_path / 'checkpoints').steps() == (0,)


def test_norms_are_logged():
  config = _config(clip_grad_norm=1e-3)
  result = _train(config, None)
  norm = np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(result.params)))
  assert result.history[-1]['param_norm'] == pytest.approx(norm, rel=1e-5)
  # Before clipping.
  assert result.history[-1]['grad_norm'] > 1e-2


def test_other_config_is_refused_before_anything_is_computed(tmp_path):
  _train(_config(), tmp_path)
  with pytest.raises(ValueError, match='train.learning_rate: 0.002 -> 0.1'):
    _train(_config(learning_rate=0.1), tmp_path)


def test_finished_run_with_more_steps_goes_on_as_if_it_had_had_them(tmp_path):
  config = _config(schedule='constant', warmup_steps=2)
  _train(config, tmp_path)
  (tmp_path / 'table.json').touch()
  config.schedule.training_steps = 18
  longer = _train(config, tmp_path)
  assert not (tmp_path / 'table.json').exists()
  whole = _train(config, None)
  jax.tree.map(np.testing.assert_array_equal, longer.params, whole.params)
  # The log of the step that was the last one stays; the next is of the rest.
  steps = [entry['step'] for entry in longer.history]
  assert steps == [3, 6, 9, 12, 14, 15, 18]
  *_, of_two, of_one, last = (entry['loss'] for entry in longer.history)
  assert (2 * of_two + of_one) / 3 == pytest.approx(whole.history[4]['loss'])
  assert last == whole.history[5]['loss']
  # Snapshots of steps that have passed are neither made nor lost.
  snapshots = checkpointing.Checkpoints(tmp_path / 'snapshots')
  assert snapshots.steps() == (1, 4, 14, 18)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """The folder of a run, and its parameters by step."""
  folder = tmp_path_factory.mktemp('saved')
  _train(_config(), folder)
  return folder, {n: saved_runs.load_run(folder, n).params for n in (4, 14)}


def _begun(init_from, folder=None, **train_kwargs):
  """A run of no steps."""
  config = _config(init_from=str(init_from), **train_kwargs)
  config.schedule.training_steps = 0
  config.schedule.first_save = 1
  return _train(config, folder)


def _assert_equal(first, second):
  jax.tree.map(np.testing.assert_array_equal, first, second)


def test_run_begins_with_the_parameters_of_another(tmp_path, saved):
  """Also when the other is gone by the time that it goes on."""
  folder, params = saved
  _assert_equal(_begun(folder).params, params[14])
  ensemble = _begun(folder, model_init_seed=(3, 7))
  for member in (0, 1):
    _assert_equal(ensemble.member(member), params[14])
  moved = shutil.copytree(folder, tmp_path / 'moved')
  for _ in range(2):
    _assert_equal(_begun(f'{moved}@4', tmp_path / 'run').params, params[4])
    shutil.rmtree(moved, ignore_errors=True)


def test_parameters_of_another_run_come_with_a_fresh_optimiser(saved):
  _, params = saved
  config = _config()
  predictor = _build(config).predictor
  one = jax.tree.map(lambda x: x[None], params[4])
  begun, drawn = (
    train_state.init_state(config, predictor, 2, jax.local_devices()[:1], given)
    for given in (one, None)
  )
  _assert_equal(begun.params, one)
  _assert_equal(begun.opt_state, drawn.opt_state)


@pytest.mark.parametrize(
  ('hidden_size', 'suffix', 'message'),
  [
    (4, '', 'w of shape .*, where .* is expected'),
    (3, '@5', 'nothing of step 5, only of 1, 4, 8, 12, 14'),
    (3, '/nowhere', 'cannot read .*nowhere/config.json'),
  ],
)
def test_parameters_that_do_not_fit_are_named_before_anything_compiles(
  saved, monkeypatch, hidden_size, suffix, message
):
  def no_initialisation(*args):
    raise AssertionError('went on to initialise the network')

  monkeypatch.setattr(train_state, 'init_state', no_initialisation)
  config = _config(init_from=f'{saved[0]}{suffix}')
  config.model.architecture_kwargs['hidden_size'] = hidden_size
  with pytest.raises(ValueError, match=f'^train.init_from: .*{message}'):
    _train(config, None)


def test_networks_of_another_number_are_no_beginning(tmp_path):
  config = _config(model_init_seed=(0, 1, 2))
  path = tmp_path / 'config.json'
  path.write_text(json.dumps(base_config.to_dict(config)))
  with pytest.raises(ValueError, match='has 3 networks; one .* the 2 seeds'):
    _begun(tmp_path, model_init_seed=(0, 1))


def test_kill_loses_at_most_the_checkpoint_frequency(tmp_path):
  """Whenever a step is done, one not much older is on disk."""
  config = _config()
  # Without a step to spare: begun one step late, a checkpoint would be too old.
  config.schedule.ckpt_frequency = 2
  config.logger.log_frequency = 1
  lost = []
  steps = iter(range(1, 100))

  def measure():
    on_disk = checkpointing.Checkpoints(tmp_path / 'checkpoints').steps()
    lost.append(next(steps) - max(on_disk, default=0))

  _train(config, tmp_path, measure)
  assert len(lost) == 14
  assert max(lost) <= 2


def test_unwritable_disk_ends_the_run_with_the_checkpoint_before(
  tmp_path, monkeypatch, whole
):
  config = _config()
  save = checkpointing.Checkpoints.save

  def fail(self, step, tree):
    if step == 8:
      self.wait()
      raise OSError(28, 'No space left on device')
    save(self, step, tree)

  with monkeypatch.context() as patched:
    patched.setattr(checkpointing.Checkpoints, 'save', fail)
    with pytest.raises(run_folder.SaveError, match='No space left.*step 4'):
      _train(config, tmp_path)
  _assert_same(_train(config, tmp_path), whole)
