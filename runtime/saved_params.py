"""Parameters of a run that was saved, from a snapshot or a checkpoint."""

from collections.abc import Callable
import pathlib
from typing import Any
import warnings

from nonstationary_mbml.runtime import checkpointing
from nonstationary_mbml.runtime import multihost
from nonstationary_mbml.runtime import run_folder


def open_folder(
  folder: pathlib.Path,
) -> tuple[checkpointing.Checkpoints, checkpointing.Checkpoints]:
  """Returns checkpoints and snapshots of a run; raises ValueError without."""
  if not folder.is_dir():
    raise ValueError(f'{folder} is no folder of a run')
  return tuple(
    checkpointing.Checkpoints(folder / name)
    for name in (run_folder.CHECKPOINTS, run_folder.SNAPSHOTS)
  )


def load(
  folder: pathlib.Path,
  step: int | None,
  form: Any,
  snapshot: Callable[[Any], Any],
) -> tuple[int, Any]:
  """Returns a step, and what a snapshot of it holds.

  What cannot be read is left out with a warning. Of several processes all call
  it, and all get the same step.

  Args:
    folder: Folder of the run.
    step: Step to load; None is the newest that can be read.
    form: Form of a checkpoint, as for `Checkpoints.restore`; the arrays have
      the dtypes that were saved.
    snapshot: Function of a checkpoint, or of its form, that gives what a
      snapshot of it holds.

  Raises:
    ValueError: If there is no such run or step.
    FormError: If all are of other arrays than those of the form.
    DamagedError: If nothing can be read.
  """
  checkpoints, snapshots = open_folder(folder)
  # Several processes may each see another state of the folder.
  of_snapshots, of_checkpoints = multihost.on_primary(
    lambda: (snapshots.steps(), checkpoints.steps())
  )
  steps = sorted({*of_snapshots, *of_checkpoints})
  if step is not None and step not in steps:
    raise ValueError(
      f'{folder} has kept nothing of step {step}, only of '
      f'{", ".join(map(str, steps)) or "none"}'
    )

  def read(kept: checkpointing.Checkpoints, step: int) -> Any:
    if kept is snapshots:
      return kept.restore(step, snapshot(form), keep_dtypes=True)
    return snapshot(kept.restore(step, form, keep_dtypes=True))

  problems = []
  for candidate in reversed(steps if step is None else (step,)):
    for kept, kept_steps in (
      (snapshots, of_snapshots),
      (checkpoints, of_checkpoints),
    ):
      if candidate not in kept_steps:
        continue
      try:
        saved = read(kept, candidate)
      except ValueError as error:
        if multihost.is_peer_failure(error):
          raise
        problems.append(error)
        continue
      for problem in problems:
        warnings.warn(str(problem), stacklevel=4)
      return candidate, saved
  if not problems:
    raise ValueError(f'{folder} has no parameters to load: no step was saved')
  # The steps are of another network, or damaged: as the newest step is.
  shown = checkpointing.shown_problems([str(problem) for problem in problems])
  if step is None:
    shown = f'{folder} has no parameters to load: {shown}'
  raise type(problems[0])(shown)
