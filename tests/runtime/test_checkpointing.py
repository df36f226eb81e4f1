import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nonstationary_mbml import base_config
from nonstationary_mbml.runtime import checkpointing

_TREE = {
  'params': {'linear': {'w': jnp.arange(6.0).reshape(2, 3), 'b': jnp.ones(3)}},
  'opt_state': optax.adam(0.1).init({'w': jnp.ones(2)}),
  'state': None,
  'step': jnp.int32(7),
}


def _abstract(tree=_TREE):
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree
  )


def _saved(folder, *steps, keep=None):
  checkpoints = checkpointing.Checkpoints(folder, keep)
  for step in steps:
    checkpoints.save(step, _TREE | {'step': jnp.int32(step)})
  checkpoints.wait()
  return checkpoints


def _data_file(folder, step):
  """The file of a checkpoint that holds most of its numbers."""
  files = (folder / str(step)).rglob('ocdbt.process_0/d/*')
  return max(files, key=lambda path: path.stat().st_size)


def test_what_was_saved_is_restored(tmp_path):
  checkpoints = _saved(tmp_path / 'new', 7)
  restored = checkpoints.restore(7, _abstract())
  assert jax.tree.structure(restored) == jax.tree.structure(_TREE)
  jax.tree.map(np.testing.assert_array_equal, restored, _TREE)


def test_the_newest_are_kept(tmp_path):
  checkpoints = _saved(tmp_path, 1, 2, 3, 4, keep=2)
  assert checkpoints.steps() == (3, 4)


def test_what_is_saved_can_be_donated_at_once(tmp_path):
  checkpoints = checkpointing.Checkpoints(tmp_path)
  array = jnp.full(100_000, 3.0)
  checkpoints.save(1, {'w': array})
  # Overwrites the memory of the array, while it is being written.
  jax.block_until_ready(jax.jit(lambda x: 2 * x, donate_argnums=0)(array))
  checkpoints.wait()
  restored = checkpoints.restore(1, _abstract({'w': jnp.zeros(100_000)}))
  np.testing.assert_array_equal(restored['w'], 3.0)


def test_a_step_that_is_there_is_not_written_again(tmp_path):
  checkpoints = _saved(tmp_path, 1)
  checkpoints.save(1, {'other': jnp.ones(2)})
  checkpoints.wait()
  checkpoints.restore(1, _abstract())


def test_missing_step_is_named_beside_those_that_are_there(tmp_path):
  checkpoints = _saved(tmp_path, 3, 5)
  with pytest.raises(ValueError, match='has no step 4; it has 3, 5'):
    checkpoints.restore(4, _abstract())


@pytest.mark.parametrize('damage', ['emptied', 'truncated', 'flipped'])
def test_damaged_file_is_a_damaged_checkpoint(tmp_path, damage):
  checkpoints = checkpointing.Checkpoints(tmp_path)
  # Large enough for a file of its own; and random numbers are not compressed,
  # so that a bit on the disk is a bit of a number.
  tree = {'w': jax.random.normal(jax.random.key(0), (4000,))}
  checkpoints.save(1, tree)
  checkpoints.wait()
  path = _data_file(tmp_path, 1)
  content = bytearray(path.read_bytes())
  half = len(content) // 2
  if damage == 'flipped':
    content[half] ^= 16
  path.write_bytes(content[: {'emptied': 0, 'truncated': half}.get(damage)])
  with pytest.raises(checkpointing.DamagedError, match=str(tmp_path / '1')):
    checkpoints.restore(1, _abstract(tree))


def _fit(checkpoints, abstract, **kwargs):
  """The message of what does not fit at step 1."""
  with pytest.raises(checkpointing.FormError) as error:
    checkpoints.restore(1, abstract, **kwargs)
  return str(error.value)


def test_other_arrays_are_named_and_nothing_is_called_damaged(tmp_path, capfd):
  checkpoints = _saved(tmp_path, 1)
  said = f'{tmp_path}/1 has '
  assert _fit(checkpoints, _abstract({'w': jnp.ones(3)})) == (
    said + 'an array opt_state.0.count, where none is expected'
  )
  abstract = _abstract(_TREE | {'new': jnp.ones(3)})
  assert _fit(checkpoints, abstract) == (
    said + 'no array new, where one is expected'
  )
  linear = {'w': jnp.ones((2, 4)), 'b': jnp.ones(3)}
  abstract = _abstract(_TREE | {'params': {'linear': linear}})
  assert _fit(checkpoints, abstract) == (
    said + 'params.linear.w of shape (2, 3), where (2, 4) is expected'
  )
  # Nor does Orbax say more of it.
  assert capfd.readouterr().err == ''


def test_dtype_is_that_which_was_saved_whatever_the_default_is(tmp_path):
  narrow = _saved(tmp_path / 'narrow', 1)
  with jax.enable_x64(True):
    tree = {'w': jnp.array([1 / 3, 2.0])}
    wide = checkpointing.Checkpoints(tmp_path / 'wide')
    wide.save(1, tree)
    wide.wait()
    abstract = _abstract(tree)
    assert abstract['w'].dtype == jnp.float64
    restored = wide.restore(1, abstract)['w']
    np.testing.assert_array_equal(restored, np.array([1 / 3, 2.0]))

    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
        x.shape,
        jnp.float64 if x.dtype == jnp.float32 else x.dtype,
        sharding=x.sharding,
      ),
      _abstract(),
    )
    restored = narrow.restore(1, abstract, keep_dtypes=True)
    saved = _TREE | {'step': 1}
    jax.tree.map(np.testing.assert_array_equal, restored, saved)
    assert restored['params']['linear']['w'].dtype == jnp.float32
    assert 'in float32, where float64 is expected' in _fit(narrow, abstract)
  abstract = _abstract({'w': jnp.ones(2)})
  assert 'in float64, where float32 is expected' in _fit(wide, abstract)
  assert _fit(wide, abstract, keep_dtypes=True) == (
    f'{tmp_path}/wide/1 has w in float64, which needs jax_enable_x64'
  )


def test_damaged_steps_leave_the_others_readable(tmp_path, capfd):
  _saved(tmp_path, *range(1, 7)).close()
  for path in (tmp_path / '2').rglob('d/*'):
    path.write_bytes(path.read_bytes()[:40])
  path = tmp_path / '3' / 'default' / '_METADATA'
  path.write_bytes(path.read_bytes()[:100])
  (tmp_path / '4' / '_CHECKPOINT_METADATA').unlink()
  shutil.rmtree(tmp_path / '5' / 'default')
  for step in (6, 7):
    shutil.rmtree(tmp_path / str(step), ignore_errors=True)
    (tmp_path / str(step)).mkdir()
  checkpoints = checkpointing.Checkpoints(tmp_path)
  assert checkpoints.steps() == tuple(range(1, 8))
  for step in (7, 6, 5, 3, 2):
    with pytest.raises(checkpointing.DamagedError, match=f'{step} cannot be'):
      checkpoints.restore(step, _abstract())
  for step in (1, 4):
    assert checkpoints.restore(step, _abstract())['step'] == step
  assert 'Traceback' not in capfd.readouterr().err
  # Nor are they in the way of the next one.
  checkpoints.save(8, _TREE)
  checkpoints.wait()
  assert checkpoints.restore(8, _abstract())['step'] == 7


def test_remains_of_a_killed_save_are_no_checkpoint(tmp_path):
  _saved(tmp_path, 1)
  # Not of the step that is saved next, which would be in its way.
  (tmp_path / '3.orbax-checkpoint-tmp').mkdir()
  reading = checkpointing.Checkpoints(tmp_path)
  assert reading.steps() == (1,)
  reading.restore(1, _abstract())
  assert (tmp_path / '3.orbax-checkpoint-tmp').exists()
  _saved(tmp_path, 2)
  assert not (tmp_path / '3.orbax-checkpoint-tmp').exists()


def test_moved_checkpoints_never_meet(tmp_path):
  checkpoints = _saved(tmp_path / 'checkpoints', 1)
  aside = tmp_path / 'aside'
  assert checkpoints.move(1, aside).name == 'checkpoints_1'
  assert checkpoints.steps() == ()
  checkpoints.save(1, _TREE)
  checkpoints.wait()
  assert checkpoints.move(1, aside).name == 'checkpoints_1_2'


@pytest.mark.parametrize(
  ('schedule', 'steps'),
  [
    ({'saving_schedule_type': 'linear', 'first_save': 0}, (0, 25, 50, 75, 100)),
    (
      {'saving_schedule_type': 'linear', 'first_save': 20},
      (20, 40, 60, 80, 100),
    ),
    ({'saving_schedule_type': 'log'}, (1, 3, 10, 32, 100)),
    ({'first_save': 100}, (100,)),
    # A single one is of the trained network.
    ({'num_saves': 1, 'first_save': 3}, (100,)),
    ({'num_saves': 1, 'saving_schedule_type': 'linear'}, (100,)),
    ({'num_saves': 0}, ()),
    ({'training_steps': 3}, (1, 2, 3)),
    ({'training_steps': 0}, ()),
    # Rounded, they would be 1, 2, 2, 3, 4, 6.
    ({'training_steps': 6, 'num_saves': 6}, (1, 2, 3, 4, 5, 6)),
  ],
)
def test_snapshots_are_spaced_as_configured(schedule, steps):
  defaults = {'training_steps': 100, 'num_saves': 5, 'first_save': 1}
  config = base_config.ScheduleConfig(**(defaults | schedule))
  assert checkpointing.snapshot_steps(config) == steps


@pytest.mark.parametrize('kind', base_config.SAVING_SCHEDULES)
def test_snapshots_are_as_many_as_asked_for_and_end_with_the_run(kind):
  for num in range(2, 41):
    config = base_config.ScheduleConfig(
      training_steps=40, num_saves=num, saving_schedule_type=kind
    )
    steps = checkpointing.snapshot_steps(config)
    assert len(set(steps)) == num
    assert steps == tuple(sorted(steps))
    assert steps[0] == 1 and steps[-1] == 40
