"""States of a run on disk: the newest few to go on from, and snapshots to keep.

Written by Orbax: in the background, and under another name until whole, so that
a run that is killed leaves whole checkpoints only. Each carries a checksum,
since a bit that a disk has lost need not make a file unreadable. Of several
processes (`multihost`) each writes and reads its part, so that all must call
`save`, `restore` and `move`; the folder is one that they share. What was saved
by some processes can be restored by others.

Checkpoints and snapshots have a folder, and a manager of Orbax, each. One
manager for both would have to keep whole states for good (with Adam, 2.5 times
the bytes of the parameters): a preservation policy chooses among steps,
whatever was saved at them, and snapshots would push out the checkpoints.
"""

from collections.abc import Iterable
from collections.abc import Sequence
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from nonstationary_mbml import base_config
from nonstationary_mbml.runtime import multihost
from nonstationary_mbml.runtime import sharding

# Orbax's name of the only item that it saves at a step.
_ITEM = 'default'


class DamagedError(ValueError):
  """A checkpoint that cannot be read."""


class FormError(ValueError):
  """A checkpoint of other arrays than those that are wanted."""


class Checkpoints:
  """The states in a folder, one for each step that was saved."""

  def __init__(self, folder: pathlib.Path, keep: int | None = None):
    """Initializes the checkpoints; changes nothing before one is saved.

    Then, remains of saves that were cut off are removed.

    Args:
      folder: Folder of the checkpoints.
      keep: Number of checkpoints to keep, the newest; None keeps all.
    """
    self.folder = folder.absolute()
    self._keep = keep
    self._manager = None

  def _open(self) -> ocp.CheckpointManager:
    if self._manager is None:
      multihost.on_primary(
        lambda: self.folder.mkdir(parents=True, exist_ok=True)
      )
      options = ocp.CheckpointManagerOptions(
        create=False,
        cleanup_tmp_directories=True,
        preservation_policy=ocp.checkpoint_managers.LatestN(self._keep),
        multiprocessing_options=_processes(
          range(jax.process_count()), self.folder.name
        ),
      )
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
      tree: Tree to save.
    """
    manager = self._open()
    manager.wait_until_finished()
    if multihost.on_primary(lambda: step in self.steps()):
      return
    copy, checksum = _copy_with_checksum(tree)
    # Nothing else may be in flight on several devices.
    saved = {'tree': copy, 'checksum': jax.block_until_ready(checksum)}
    manager.save(step, args=ocp.args.StandardSave(saved), force=True)

  def wait(self) -> None:
    """Waits until all is on disk."""
    if self._manager is not None:
      self._manager.wait_until_finished()

  def restore(self, step: int, abstract: Any, keep_dtypes: bool = False) -> Any:
    """Returns what was saved at a step.

    Args:
      step: One of `steps`.
      abstract: The tree with `jax.ShapeDtypeStruct` for arrays, which say where
        the arrays shall be.
      keep_dtypes: If True, arrays have the dtypes that were saved, whatever
        those of `abstract` are.

    Raises:
      ValueError: If there is no such step.
      FormError: If it has other arrays, or arrays of other shapes or dtypes.
      DamagedError: If it cannot be read.
    """
    replicated = jax.tree.leaves(abstract)[0].sharding
    if isinstance(replicated, jax.sharding.NamedSharding):
      replicated = sharding.replicated(replicated.mesh)
    wanted = {
      'tree': abstract,
      'checksum': jax.ShapeDtypeStruct((), jnp.uint32, sharding=replicated),
    }
    # A step that one process cannot read is restored in none of them.
    saved = multihost.on_all(lambda: self._read(step, wanted, keep_dtypes))
    # Copied: on a CPU, arrays from Orbax may share memory that is not JAX's to
    # give away.
    tree, checksum = _copy_with_checksum(saved['tree'])

    def check() -> None:
      if int(checksum) != int(saved['checksum']):
        raise DamagedError(f'{self.folder / str(step)} has a wrong checksum')

    multihost.on_all(check)
    return tree

  def _read(self, step: int, wanted: Any, keep_dtypes: bool) -> Any:
    """Reads what this process has of a step; waits for no other process."""
    if not multihost.becomes_true(lambda: step in self.steps()):
      raise ValueError(
        f'{self.folder} has no step {step}; it has '
        f'{", ".join(map(str, self.steps())) or "none"}'
      )
    path = self.folder / str(step)
    # Not by the manager, which takes all steps to be like the newest one, and
    # would wait for other processes, even for one that has failed.
    alone = _processes([jax.process_index()], f'process_{jax.process_index()}')
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
    try:
      with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
        # Checked first: Orbax's own messages are long.
        _read_all(path / _ITEM)
        saved = handler.metadata(path / _ITEM)
        wanted = _matched(path, wanted, saved, keep_dtypes)
        return reader.restore(
          path / _ITEM, args=ocp.args.StandardRestore(wanted)
        )
    except FormError:
      raise
    except Exception as error:  # Whatever a broken file makes Orbax raise.
      reason = str(error).strip().split('\n')[0][:200]
      raise DamagedError(
        f'{path} cannot be read ({type(error).__name__}: {reason})'
      ) from error

  def move(self, step: int, folder: pathlib.Path) -> pathlib.Path:
    """Moves what was saved at a step out of the way.

    Args:
      step: One of `steps`.
      folder: Folder to write to; made if it is not there.

    Returns:
      Where it is now.
    """

    def move() -> pathlib.Path:
      target = free_path(folder / f'{self.folder.name}_{step}')
      folder.mkdir(parents=True, exist_ok=True)
      shutil.move(self.folder / str(step), target)
      return str(target)

    target = pathlib.Path(multihost.on_primary(move))
    if self._manager is not None:
      self._manager.reload()
    return target

  def close(self) -> None:
    """Waits until all is on disk, and stops writing."""
    if self._manager is not None:
      self._manager.close()


def _processes(
  indices: Iterable[int], prefix: str
) -> ocp.options.MultiprocessingOptions:
  """Orbax's options for some processes, which wait for each other only.

  They meet in the coordinator: collectives of a background thread could be
  mixed up with those of training.
  """
  indices = set(indices)
  return ocp.options.MultiprocessingOptions(
    primary_host=min(indices),
    active_processes=indices,
    barrier_sync_key_prefix=prefix,
  )


def shown_problems(problems: Sequence[str]) -> str:
  """Returns the problem of the newest step, and the number of others."""
  first, *others = problems
  return f'{first}, and {len(others)} more' if others else first


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
  moves on. There are fewer of them if the run has fewer steps, and a single one
  is of the last step.
  """
  first, last = config.first_save, config.training_steps
  num = min(config.num_saves, last - first + 1)
  if num <= 1:
    return (last,) * max(num, 0)
  is_linear = config.saving_schedule_type == 'linear'
  spaced = np.linspace if is_linear else np.geomspace
  order = np.arange(num)
  steps = np.rint(spaced(first, last, num)).astype(int)
  # Each later than the one before, and early enough for those after it.
  steps = np.maximum.accumulate(steps - order) + order
  steps = np.minimum(steps, last - order[::-1])
  return tuple(int(step) for step in steps)


def _read_all(path: pathlib.Path) -> None:
  """Reads all bytes that were saved; raises an exception if one is missing.

  Orbax reads them a second time: of a file that is cut short, its threads would
  print tracebacks before it raises.
  """
  base = {'driver': 'file', 'path': f'{path}/'}
  store = tensorstore.KvStore.open({'driver': 'ocdbt', 'base': base}).result()
  for read in [store.read(key) for key in store.list().result()]:
    read.result()


def _matched(
  path: pathlib.Path, wanted: Any, saved: Any, keep_dtypes: bool
) -> Any:
  """The wanted tree, in the dtypes in which it is read.

  Args:
    path: Folder of the step, for messages.
    wanted: Form of the tree, as for `Checkpoints.restore`.
    saved: Orbax's metadata of what was saved.
    keep_dtypes: As for `Checkpoints.restore`.

  Raises:
    FormError: If what was saved is not what is wanted.
  """
  saved, leaves = map(ocp.tree.to_flat_dict, (saved, wanted))
  for keys in sorted(saved.keys() ^ leaves.keys()):
    there, expected = ('an', 'none') if keys in saved else ('no', 'one')
    raise FormError(
      f'{path} has {there} array {_shown(keys)}, where {expected} is expected'
    )
  read = {}
  for keys, leaf in leaves.items():
    shape, dtype = saved[keys].shape, jnp.dtype(saved[keys].dtype)
    if tuple(shape) != leaf.shape:
      raise FormError(
        f'{path} has {_shown(keys)} of shape {tuple(shape)}, where '
        f'{leaf.shape} is expected'
      )
    if not keep_dtypes and dtype != leaf.dtype:
      is_wide = 8 in (dtype.itemsize, leaf.dtype.itemsize)
      raise FormError(
        f'{path} has {_shown(keys)} in {dtype}, where {leaf.dtype} is expected'
        + (': jax_enable_x64 must be as it was' if is_wide else '')
      )
    # Orbax would cast it, and JAX could not compute with it.
    if dtype != jax.dtypes.canonicalize_dtype(dtype):
      raise FormError(
        f'{path} has {_shown(keys)} in {dtype}, which needs jax_enable_x64'
      )
    read[keys] = jax.ShapeDtypeStruct(shape, dtype, sharding=leaf.sharding)
  return ocp.tree.from_flat_dict(read, wanted)


def _shown(keys: tuple[str, ...]) -> str:
  """Name of an array; all but the checksum are under one key."""
  return '.'.join(keys[1:] or keys)


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
