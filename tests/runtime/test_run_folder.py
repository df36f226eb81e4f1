import dataclasses
import functools
import json
import math
import pathlib
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nonstationary_mbml import base_config
from nonstationary_mbml.runtime import checkpointing
from nonstationary_mbml.runtime import multihost
from nonstationary_mbml.runtime import run_folder

CONFIG = base_config.ExperimentConfig(name='test')
LOG_STEPS = (2, 4, 6, 8)


def _tree(step):
  return {'w': jnp.full(3, float(step))}


def _abstract():
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return {'w': jax.ShapeDtypeStruct((3,), jnp.float32, sharding=device)}


def _restore(folder, log_steps=LOG_STEPS, config=CONFIG):
  """Where a run in the folder would go on from, and what it says."""
  with run_folder.RunFolder(folder).open(config) as run:
    step, tree, messages = run.restore(_abstract(), log_steps, max_lost=4)
    return step, tree, messages, run.entries


def _run_to(folder, last):
  """Leaves a run that was killed after a step, as `_train_to` does."""
  shutil.copytree(_trained_to(last).name, folder, dirs_exist_ok=True)


@functools.cache
def _trained_to(last):
  folder = tempfile.TemporaryDirectory()
  _train_to(pathlib.Path(folder.name), last)
  return folder


def _train_to(folder, last):
  """Logs and saves at every second step, and is killed after `last`."""
  with run_folder.RunFolder(folder).open(CONFIG) as run:
    run.restore(_abstract(), LOG_STEPS, max_lost=4)
    run.save_checkpoint(0, _tree(0))
    for step in range(2, last + 1, 2):
      run.log({'step': step, 'loss': 1 / step})
      run.save_checkpoint(step, _tree(step), wait=True)


def _damage(folder, step):
  manifest = folder / 'checkpoints' / str(step) / 'default' / 'manifest.ocdbt'
  manifest.write_bytes(manifest.read_bytes()[:20])


def test_new_folder_begins_at_step_0(tmp_path):
  step, tree, messages, entries = _restore(tmp_path / 'a' / 'new')
  assert (step, tree, messages, entries) == (0, None, [], [])


def test_run_goes_on_from_its_newest_checkpoint(tmp_path):
  _run_to(tmp_path, 6)
  step, tree, messages, entries = _restore(tmp_path)
  assert step == 6
  np.testing.assert_array_equal(tree['w'], 6.0)
  assert messages == [f'{tmp_path}: going on from step 6']
  assert entries == [{'step': n, 'loss': 1 / n} for n in (2, 4, 6)]
  assert not (tmp_path / 'set_aside').exists()


def _with_steps(num_steps, **train_kwargs):
  return dataclasses.replace(
    CONFIG,
    schedule=base_config.ScheduleConfig(training_steps=num_steps),
    train=base_config.TrainConfig(**train_kwargs),
  )


def test_run_may_have_more_steps_while_its_schedule_is_stable(tmp_path):
  kwargs = {'schedule': 'warmup_stable_decay'}
  _run_to(tmp_path, 6)
  path = tmp_path / 'config.json'
  short = _with_steps(7, **kwargs)
  path.write_text(json.dumps(base_config.to_dict(short)))
  # Of 7 steps, the last two decay.
  with pytest.raises(ValueError) as error:
    _restore(tmp_path, config=_with_steps(9, **kwargs))
  assert '\n' not in str(error.value)
  for part in (
    "cannot have more steps (train.schedule 'warmup_stable_decay' knows its ",
    'training_steps 9 instead of 7',
    'after step 5, but 6 are done',
    '--overwrite',
  ):
    assert part in str(error.value)
  longer = _with_steps(8, **kwargs)
  path.write_text(json.dumps(base_config.to_dict(longer)))
  longer.schedule.training_steps = 9
  step, *_ = _restore(tmp_path, config=longer)
  assert step == 6
  assert json.loads(path.read_text())['schedule']['training_steps'] == 9


@dataclasses.dataclass(kw_only=True)
class _WithDefault(base_config.ExperimentConfig):
  """A config whose seed follows from its name where it is 0."""

  def resolved(self):
    return dataclasses.replace(self, seed=self.seed or len(self.name))


@pytest.mark.parametrize(('seed_before', 'seed_now'), [(0, 4), (4, 0)])
def test_default_that_is_written_out_is_the_same_config(
  tmp_path, seed_before, seed_now
):
  _run_to(tmp_path, 2)
  before = _WithDefault(name='test', seed=seed_before)
  values = base_config.to_dict(before)
  (tmp_path / 'config.json').write_text(json.dumps(values))
  folder = run_folder.RunFolder(tmp_path)
  folder.check(_WithDefault(name='test', seed=seed_now))
  with pytest.raises(ValueError, match='seed: 4 -> 5'):
    folder.check(_WithDefault(name='test', seed=5))


def test_run_whose_code_has_moved_is_the_same_and_notes_where_it_is(tmp_path):
  before, now = _with_steps(4), _with_steps(4)
  before.imports, now.imports = ('/old/things.py',), ('/new/things.py',)
  _run_to(tmp_path, 2)
  path = tmp_path / 'config.json'
  path.write_text(json.dumps(base_config.to_dict(before)))
  step, *_ = _restore(tmp_path, config=now)
  assert step == 2
  assert json.loads(path.read_text())['imports'] == ['/new/things.py']


@pytest.mark.parametrize(
  ('config', 'difference'),
  [
    (_with_steps(9_000), 'schedule.training_steps: 10000 -> 9000'),
    (
      _with_steps(11_000, learning_rate=0.1),
      'schedule.training_steps: 10000 -> 11000; train.learning_rate: 0.002 ->',
    ),
  ],
)
def test_fewer_steps_and_more_of_something_else_are_another_config(
  tmp_path, config, difference
):
  _run_to(tmp_path, 2)
  with pytest.raises(ValueError, match=f'another config .{difference}'):
    _restore(tmp_path, config=config)


def test_entries_after_the_checkpoint_are_made_again(tmp_path):
  _run_to(tmp_path, 4)
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 6, "loss": 0.5}\n')
  step, _, _, entries = _restore(tmp_path)
  assert step == 4
  assert [entry['step'] for entry in entries] == [2, 4]
  assert (tmp_path / 'metrics.jsonl').read_text().count('\n') == 2


def test_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path):
  _run_to(tmp_path, 6)
  _damage(tmp_path, 6)
  step, tree, messages, entries = _restore(tmp_path)
  assert step == 4
  np.testing.assert_array_equal(tree['w'], 4.0)
  assert [entry['step'] for entry in entries] == [2, 4]
  said = '\n'.join(messages)
  assert 'checkpoints/6 cannot be read' in said
  assert 'going on from step 4' in said
  # Nothing was deleted.
  assert (tmp_path / 'set_aside' / 'checkpoints_6').is_dir()
  kept = (tmp_path / 'set_aside' / 'metrics.jsonl').read_text()
  assert kept.count('\n') == 3


def test_hollow_checkpoints_are_set_aside_and_the_good_one_serves(tmp_path):
  _run_to(tmp_path, 6)
  shutil.rmtree(tmp_path / 'checkpoints' / '6' / 'default')
  (tmp_path / 'checkpoints' / '7').mkdir()
  step, tree, messages, _ = _restore(tmp_path)
  assert step == 4
  np.testing.assert_array_equal(tree['w'], 4.0)
  for step in (6, 7):
    assert f'checkpoints/{step} cannot be read' in '\n'.join(messages)
    assert (tmp_path / 'set_aside' / f'checkpoints_{step}').is_dir()


def test_damaged_snapshot_that_is_yet_to_come_is_made_again(tmp_path):
  with run_folder.RunFolder(tmp_path).open(CONFIG) as run:
    run.restore(_abstract(), LOG_STEPS, max_lost=4)
    for step in (2, 6, 8):
      run.save_snapshot(step, _tree(step))
    run.save_checkpoint(0, _tree(0), wait=True)
  shutil.rmtree(tmp_path / 'snapshots' / '8' / 'default')
  snapshots = checkpointing.Checkpoints(tmp_path / 'snapshots')
  with run_folder.RunFolder(tmp_path).open(CONFIG) as run:
    messages = run.restore(_abstract(), LOG_STEPS, 4, _abstract())[2]
    assert 'snapshots/8 cannot be read' in messages[0]
    assert snapshots.steps() == (2, 6)
    run.save_snapshot(8, _tree(8))
  np.testing.assert_array_equal(snapshots.restore(8, _abstract())['w'], 8.0)
  assert (tmp_path / 'set_aside' / 'snapshots_8').is_dir()


def test_damaged_snapshot_that_is_not_made_again_stays_where_it_is(tmp_path):
  with run_folder.RunFolder(tmp_path).open(CONFIG) as run:
    run.restore(_abstract(), LOG_STEPS, max_lost=4)
    for step in (2, 4):
      run.save_snapshot(step, _tree(step))
      run.log({'step': step, 'loss': 0.5})
    run.save_checkpoint(4, _tree(4), wait=True)
  for step in (2, 4):
    shutil.rmtree(tmp_path / 'snapshots' / str(step) / 'default')
  with run_folder.RunFolder(tmp_path).open(CONFIG) as run:
    messages = run.restore(_abstract(), LOG_STEPS, 4, _abstract())[2]
  assert messages == [f'{tmp_path}: going on from step 4']
  assert not (tmp_path / 'set_aside').exists()


def test_process_that_dies_is_no_damage_of_what_is_restored(
  tmp_path, monkeypatch
):
  _run_to(tmp_path, 4)
  before = sorted(tmp_path.rglob('*'))

  restore = checkpointing.Checkpoints.restore

  def fail(self, step, abstract):
    if step == 4:
      raise ValueError('UNAVAILABLE: connection reset')
    return restore(self, step, abstract)

  monkeypatch.setattr(checkpointing.Checkpoints, 'restore', fail)
  # As with several processes.
  monkeypatch.setattr(multihost, 'is_peer_failure', lambda error: True)
  with pytest.raises(ValueError, match='^UNAVAILABLE'):
    _restore(tmp_path)
  assert sorted(tmp_path.rglob('*')) == before


def test_run_of_another_dtype_is_refused_and_nothing_is_changed(tmp_path):
  _run_to(tmp_path, 4)
  before = sorted(tmp_path.rglob('*'))
  wide = {'w': jax.ShapeDtypeStruct((3,), np.dtype('float64'))}
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  wide['w'] = wide['w'].update(sharding=device)
  with run_folder.RunFolder(tmp_path).open(CONFIG) as run:
    with pytest.raises(ValueError) as error:
      run.restore(wide, LOG_STEPS, max_lost=4)
  message = str(error.value)
  assert 'checkpoints/4 has w in float32, where float64 is exp' in message
  assert 'jax_enable_x64' in message and 'nothing was changed' in message
  assert '\n' not in message
  assert sorted(tmp_path.rglob('*')) == before


def test_without_a_readable_checkpoint_nothing_is_changed(tmp_path):
  _run_to(tmp_path, 6)
  for step in (2, 4, 6):
    _damage(tmp_path, step)
  before = sorted(tmp_path.rglob('*'))
  metrics = (tmp_path / 'metrics.jsonl').read_bytes()
  with pytest.raises(ValueError, match='no checkpoint to go on from'):
    _restore(tmp_path)
  assert sorted(tmp_path.rglob('*')) == before
  assert (tmp_path / 'metrics.jsonl').read_bytes() == metrics


def test_log_without_its_checkpoints_is_not_begun_anew(tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps(base_config.to_dict(CONFIG)))
  content = '{"step": 2}\n{"step": 4}\n{"step": 6}\n'
  (tmp_path / 'metrics.jsonl').write_text(content)
  with pytest.raises(ValueError, match='goes to step 6'):
    _restore(tmp_path)
  assert (tmp_path / 'metrics.jsonl').read_text() == content


def test_run_killed_before_its_first_checkpoint_begins_anew(tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps(base_config.to_dict(CONFIG)))
  (tmp_path / 'metrics.jsonl').write_text('{"step": 2}\n')
  step, _, _, entries = _restore(tmp_path)
  assert step == 0 and entries == []


@pytest.mark.parametrize('torn', ['{"step": 6, "lo', '{"step"'])
def test_torn_last_line_is_said_and_made_again(tmp_path, torn):
  _run_to(tmp_path, 6)
  path = tmp_path / 'metrics.jsonl'
  whole = path.read_text().splitlines(keepends=True)
  path.write_text(''.join(whole[:2]) + torn)
  # The checkpoint of step 6 lacks its entry.
  step, _, messages, entries = _restore(tmp_path)
  assert step == 4
  assert [entry['step'] for entry in entries] == [2, 4]
  assert 'the last line is torn' in messages[0] and torn in messages[0]
  assert path.read_text() == ''.join(whole[:2])
  # Nothing was deleted.
  assert (tmp_path / 'set_aside' / 'metrics.jsonl').read_text().endswith(torn)
  assert (tmp_path / 'set_aside' / 'checkpoints_6').is_dir()


def test_torn_line_after_the_checkpoint_costs_nothing(tmp_path):
  _run_to(tmp_path, 4)
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 6, "lo')
  assert _restore(tmp_path)[0] == 4


def test_broken_line_in_the_middle_is_an_error_that_names_it(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 2}\nnonsense\n{"step": 6}\n')
  with pytest.raises(ValueError, match='metrics.jsonl: line 2 is not an entry'):
    run_folder.read_metrics(path)


def test_last_line_without_its_line_feed_is_an_entry(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 2}\n{"step": 4}')
  assert run_folder.read_metrics(path) == ([{'step': 2}, {'step': 4}], '')


def test_log_is_json_even_of_what_is_not_finite(tmp_path):
  members = [{'step': 2, 'stderr': math.inf}, {'step': 2, 'stderr': 0.5}]
  with run_folder.RunFolder(tmp_path).open(CONFIG) as run:
    run.restore(_abstract(), LOG_STEPS, max_lost=4)
    run.log({'step': 2, 'stderr': math.nan}, members)
    run.save_checkpoint(2, _tree(2), wait=True)
  path = tmp_path / 'metrics.jsonl'

  def refuse(constant):
    raise ValueError(f'{constant} is not JSON')

  line = json.loads(path.read_text(), parse_constant=refuse)
  assert line['stderr'] is None and line['members'][1]['stderr'] == 0.5
  # As it is now, and as it was before.
  for text in (path.read_text(), '{"step": 2, "stderr": NaN}\n'):
    path.write_text(text)
    (entry,) = _restore(tmp_path)[3]
    assert math.isnan(entry['stderr'])


def test_members_of_an_ensemble_come_back(tmp_path):
  members = [{'step': 2, 'loss': 0.5}, {'step': 2, 'loss': 0.7}]
  with run_folder.RunFolder(tmp_path).open(CONFIG) as run:
    run.restore(_abstract(), LOG_STEPS, max_lost=4)
    run.log({'step': 2, 'loss': 0.6}, members)
  entries, _ = run_folder.read_metrics(tmp_path / 'metrics.jsonl')
  history, histories = run_folder.split_entries(entries)
  assert history == [{'step': 2, 'loss': 0.6}]
  assert histories == ([members[0]], [members[1]])


def test_other_config_is_an_error_that_lists_the_fields(tmp_path):
  _run_to(tmp_path, 2)
  other = base_config.ExperimentConfig(name='test', seed=1)
  other.train.learning_rate = 0.5
  before = (tmp_path / 'config.json').read_bytes()
  with pytest.raises(ValueError) as error:
    _restore(tmp_path, config=other)
  assert 'seed: 0 -> 1' in str(error.value)
  assert 'train.learning_rate: 0.002 -> 0.5' in str(error.value)
  assert (tmp_path / 'config.json').read_bytes() == before


def test_older_config_has_the_defaults_of_newer_fields(tmp_path):
  _run_to(tmp_path, 2)
  values = json.loads((tmp_path / 'config.json').read_text())
  del values['train']['microbatch_size']
  del values['schedule']['num_saves']
  (tmp_path / 'config.json').write_text(json.dumps(values))
  assert _restore(tmp_path)[0] == 2


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ('{"trian": {}}', "has no 'trian'.*mean 'train'"),
    ('{"train": {"momentum": 1}}', "has no 'momentum'"),
    ('{"seed": -1}', 'config.json: seed is -1'),
    ('{"seed": 0', 'config.json is not JSON'),
    ('[]', 'must be a dict'),
    (None, 'cannot read .*config.json: No such file'),
  ],
)
def test_unreadable_config_is_named_and_nothing_is_lost(
  tmp_path, content, message
):
  _run_to(tmp_path, 2)
  path = tmp_path / 'config.json'
  path.unlink()
  if content is not None:
    path.write_text(content)
  with pytest.raises(ValueError, match=message):
    _restore(tmp_path)
  assert path.exists() == (content is not None)
  assert (tmp_path / 'checkpoints' / '2').is_dir()


def test_cleared_folder_begins_anew_and_keeps_what_is_not_the_runs(tmp_path):
  _run_to(tmp_path, 2)
  (tmp_path / 'notes.txt').write_text('mine')
  (tmp_path / run_folder.TENSORBOARD).mkdir()
  run_folder.RunFolder(tmp_path).clear()
  assert not (tmp_path / run_folder.TENSORBOARD).exists()
  other = base_config.ExperimentConfig(name='other')
  assert _restore(tmp_path, config=other)[0] == 0
  assert (tmp_path / 'notes.txt').read_text() == 'mine'


def test_two_processes_cannot_train_in_one_folder(tmp_path):
  with run_folder.RunFolder(tmp_path).open(CONFIG):
    with pytest.raises(ValueError, match='trained by another process'):
      with run_folder.RunFolder(tmp_path).open(CONFIG):
        pass
    with pytest.raises(ValueError, match='trained by another process'):
      run_folder.RunFolder(tmp_path).clear()
  assert _restore(tmp_path)[0] == 0


def test_environment_has_every_start(tmp_path):
  _run_to(tmp_path, 2)
  with run_folder.RunFolder(tmp_path).open(CONFIG) as run:
    run.restore(_abstract(), LOG_STEPS, max_lost=4)
    run.finish(8, 'finished')
  starts = json.loads((tmp_path / 'environment.json').read_text())['starts']
  assert [start['first_step'] for start in starts] == [0, 2]
  assert [start['end'] for start in starts] == [
    'running, or killed',
    'finished',
  ]
  assert starts[1]['packages']['jax'] == jax.__version__
  assert len(starts[1]['devices']) == len(jax.local_devices())
  assert starts[1]['seconds'] >= 0


@pytest.mark.parametrize('content', ['{"starts": null}', '[]', '{"starts": 3}'])
def test_environment_of_another_form_is_begun_anew(tmp_path, content):
  (tmp_path / 'environment.json').write_text(content)
  with pytest.raises(ValueError, match='environment.json has no list of'):
    run_folder.read_starts(tmp_path)
  _train_to(tmp_path, 2)
  (start,) = run_folder.read_starts(tmp_path)
  assert start['last_step'] == 2


def _log(run):
  run.log({'step': 4, 'loss': 0.5})


@pytest.mark.parametrize(
  ('act', 'how'),
  [
    (_log, 'deleted'),
    (_log, 'moved'),
    (_log, 'made anew'),
    (lambda run: run.save_checkpoint(4, _tree(4)), 'deleted'),
    (lambda run: run.save_snapshot(4, _tree(4)), 'deleted'),
    (lambda run: run.finish(4, 'finished'), 'deleted'),
  ],
)
def test_run_that_is_deleted_while_it_trains_is_an_error(tmp_path, act, how):
  folder = tmp_path / 'run'
  _run_to(folder, 2)
  with run_folder.RunFolder(folder).open(CONFIG) as run:
    run.restore(_abstract(), LOG_STEPS, max_lost=4)
    folder.rename(tmp_path / 'elsewhere')
    if how != 'moved':
      shutil.rmtree(tmp_path / 'elsewhere')
    if how == 'made anew':
      _run_to(folder, 2)
    with pytest.raises(run_folder.SaveError, match=f'{folder} was deleted'):
      act(run)
  assert folder.exists() == (how == 'made anew')


def test_folder_that_cannot_be_made_is_named(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(run_folder.SaveError, match='cannot write to .*file/run'):
    _restore(tmp_path / 'file' / 'run')


def test_full_disk_says_which_checkpoint_is_good(tmp_path, monkeypatch):
  _run_to(tmp_path, 4)
  with run_folder.RunFolder(tmp_path).open(CONFIG) as run:
    run.restore(_abstract(), LOG_STEPS, max_lost=4)

    def fail(*args):
      raise OSError(28, 'No space left on device')

    monkeypatch.setattr('os.fsync', fail)
    with pytest.raises(
      run_folder.SaveError, match='No space left on device.*that of step 4'
    ):
      run.log({'step': 6, 'loss': 0.1})
