import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nonstationary_mbml import base_config
from nonstationary_mbml import checkpointing

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


def test_tree_of_another_form_is_a_damaged_checkpoint(tmp_path):
  checkpoints = _saved(tmp_path, 1)
  with pytest.raises(checkpointing.DamagedError):
    checkpoints.restore(1, _abstract({'w': jnp.ones(3)}))


def test_remains_of_a_killed_save_are_no_checkpoint(tmp_path):
  _saved(tmp_path, 1)
  (tmp_path / '2.orbax-checkpoint-tmp').mkdir()
  reading = checkpointing.Checkpoints(tmp_path)
  assert reading.steps() == (1,)
  reading.restore(1, _abstract())
  assert (tmp_path / '2.orbax-checkpoint-tmp').exists()
  _saved(tmp_path, 2)
  assert not (tmp_path / '2.orbax-checkpoint-tmp').exists()


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
    ({'num_saves': 1, 'first_save': 3}, (3,)),
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
