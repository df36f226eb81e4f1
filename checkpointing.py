"""States of a run on disk: the newest few to go on from, and snapshots to keep.

Written by Orbax: in the background, and under another name until whole, so that
a run that is killed leaves whole checkpoints only. Each carries a checksum,
since a bit that a disk has lost need not make a file unreadable. Of several
processes (`processes`) each writes and reads its part, so that all must call
`save`, `restore` and `move`; the folder is one that they share. What was saved
by some processes can be restored by others.
"""

import pathlib
import shutil
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from nonstationary_mbml import base_config
from nonstationary_mbml import meshes
from nonstationary_mbml import processes

# What Orbax calls the only thing that it saves at a step.
_ITEM = 'default'


class DamagedError(ValueError):
  """A checkpoint that cannot be read."""


class Checkpoints:
  """The states in a folder, one for each step that was saved."""

  def __init__(
    self, folder: pathlib.Path, keep: int | None = None, read_only: bool = False
  ):
    """Initializes the checkpoints; makes nothing before the first is saved.

    Args:
      folder: Where they are.
      keep: How many to keep, the newest; None keeps all.
      read_only: If False, remains of saves that were cut off are removed.
    """
    self.folder = folder.absolute()
    self._keep = keep
    self._read_only = read_only
    self._manager = None

  def _open(self) -> ocp.CheckpointManager:
    if self._manager is None:
      processes.first(lambda: self.folder.mkdir(parents=True, exist_ok=True))
      # Not Orbax's option read_only, which warns of itself.
      options = ocp.CheckpointManagerOptions(
        max_to_keep=self._keep, cleanup_tmp_directories=not self._read_only
      )
      if processes.are_several():
        # Then processes wait for each other in the coordinator; collectives of
        # a thread in the background could meet those of training.
        options.multiprocessing_options = ocp.options.MultiprocessingOptions(
          active_processes=set(range(jax.process_count())),
          barrier_sync_key_prefix=self.folder.name,
        )
        options.create = False
      self._manager = ocp.CheckpointManager(self.folder, options=options)
    return self._manager

  def steps(self) -> tuple[int, ...]:
    """Returns the steps that were saved, from the first to the last."""
    if not self.folder.is_dir():
      return ()
    return tuple(sorted(ocp.utils.checkpoint_steps(self.folder)))

  def save(self, step: int, tree: Any) -> None:
    """Begins to save a pytree of arrays, which may change after the call.

    Waits for the one before.

    Args:
      step: After those in the folder; one that is there already is kept.
      tree: To save.
    """
    manager = self._open()
    manager.wait_until_finished()
    if processes.first(lambda: step in self.steps()):
      return
    copy, checksum = _copy_with_checksum(tree)
    # Nothing else may be in flight on several devices.
    saved = {'tree': copy, 'checksum': jax.block_until_ready(checksum)}
    manager.save(step, args=ocp.args.StandardSave(saved), force=True)

  def wait(self) -> None:
    """Waits until all is on disk."""
    if self._manager is not None:
      self._manager.wait_until_finished()

  def restore(self, step: int, abstract: Any) -> Any:
    """Returns what was saved at a step.

    Args:
      step: One of `steps`.
      abstract: The tree with `jax.ShapeDtypeStruct` for arrays, which say where
        the arrays shall be.

    Raises:
      ValueError: If there is no such step.
      DamagedError: If it cannot be read, or is not of that form.
    """
    everywhere = jax.tree.leaves(abstract)[0].sharding
    if isinstance(everywhere, jax.sharding.NamedSharding):
      everywhere = meshes.replicated(everywhere.mesh)
    wanted = {
      'tree': abstract,
      'checksum': jax.ShapeDtypeStruct((), jnp.uint32, sharding=everywhere),
    }
    # What one process cannot read, none of them takes for restored.
    saved = processes.everywhere(lambda: self._read(step, wanted))
    # Copied: on a CPU, arrays from Orbax may share memory that is not JAX's to
    # give away.
    tree, checksum = _copy_with_checksum(saved['tree'])

    def check() -> None:
      if int(checksum) != int(saved['checksum']):
        raise DamagedError(f'{self.folder / str(step)} has a wrong checksum')

    processes.everywhere(check)
    return tree

  def _read(self, step: int, wanted: Any) -> Any:
    """Reads what this process has of a step; waits for no other process."""
    deadline = time.monotonic() + processes.SHARED_SECONDS
    while step not in self.steps():
      if not processes.are_several() or time.monotonic() > deadline:
        raise ValueError(
          f'{self.folder} has no step {step}; it has '
          f'{", ".join(map(str, self.steps())) or "none"}'
        )
      time.sleep(0.1)
    try:
      if not processes.are_several():
        manager = self._open()
        return manager.restore(step, args=ocp.args.StandardRestore(wanted))
      # The manager would wait for the others, even for one that has failed.
      alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(),
        active_processes={jax.process_index()},
        barrier_sync_key_prefix=f'process_{jax.process_index()}',
      )
      reader = ocp.Checkpointer(
        ocp.StandardCheckpointHandler(multiprocessing_options=alone),
        multiprocessing_options=alone,
      )
      with reader:
        return reader.restore(
          self.folder / str(step) / _ITEM,
          args=ocp.args.StandardRestore(wanted),
        )
    except Exception as error:  # Whatever a broken file makes Orbax raise.
      reason = str(error).strip().split('\n')[0][:200]
      raise DamagedError(
        f'{self.folder / str(step)} cannot be read ({type(error).__name__}: '
        f'{reason})'
      ) from error

  def move(self, step: int, folder: pathlib.Path) -> pathlib.Path:
    """Moves what was saved at a step out of the way.

    Args:
      step: One of `steps`.
      folder: Where to; made if it is not there.

    Returns:
      Where it is now.
    """

    def move() -> pathlib.Path:
      target = free_path(folder / f'{self.folder.name}_{step}')
      folder.mkdir(parents=True, exist_ok=True)
      shutil.move(self.folder / str(step), target)
      return target

    target = processes.first(move)
    self._open().reload()
    return target

  def close(self) -> None:
    """Waits until all is on disk, and stops writing."""
    if self._manager is not None:
      self._manager.close()


def free_path(path: pathlib.Path) -> pathlib.Path:
  """Returns the path, with a number after its name if it is taken."""
  taken, number = path, 1
  while taken.exists():
    number += 1
    taken = path.with_name(f'{path.stem}_{number}{path.suffix}')
  return taken


def snapshot_steps(config: base_config.ScheduleConfig) -> tuple[int, ...]:
  """Returns the steps of which a snapshot is kept.

    linear   first_save + i (training_steps - first_save) / (num_saves - 1)
    log      first_save (training_steps / first_save)^(i / (num_saves - 1))

  for i = 0, ..., num_saves - 1, rounded; where two would meet, the later one
  moves on. There are fewer of them if the run has fewer steps.
  """
  first, last = config.first_save, config.training_steps
  num = min(config.num_saves, last - first + 1)
  if num <= 0:
    return ()
  spaced = (
    np.linspace if config.saving_schedule_type == 'linear' else (np.geomspace)
  )
  order = np.arange(num)
  steps = np.rint(spaced(first, last, num)).astype(int)
  # Each later than the one before, and with room for those after it.
  steps = np.maximum.accumulate(steps - order) + order
  steps = np.minimum(steps, last - order[::-1])
  return tuple(int(step) for step in steps)


@jax.jit
def _copy_with_checksum(tree: Any) -> tuple[Any, jax.Array]:
  """A copy in memory of its own, and the sum of all its bits as uint32."""

  def words(array: jax.Array) -> jax.Array:
    if array.dtype == bool:
      return jnp.sum(array, dtype=jnp.uint32)
    width = min(array.dtype.itemsize, 4)
    bits = jax.lax.bitcast_convert_type(array, f'uint{8 * width}')
    return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)

  total = sum((words(x) for x in jax.tree.leaves(tree)), jnp.uint32(0))
  return jax.tree.map(jnp.copy, tree), total
