"""The folder of a run, which describes it fully.

  config.json        the config
  environment.json   for every start: versions, devices, steps, seconds
  metrics.jsonl      a line of JSON for every log
  checkpoints/       the newest few states, to go on from
  snapshots/         parameters at some steps, kept for good
  tensorboard/       the log for TensorBoard, if asked for
  set_aside/         what could not be read, moved out of the way

Nothing is overwritten that cannot be made again, and nothing that is damaged is
deleted. Of several processes (`multihost`) all call the methods, and the first
one writes, but for the states, of which each writes its part.
"""

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import datetime
import errno
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import socket
import subprocess
import sys
import time
from typing import Any

import jax

from nonstationary_mbml import base_config
from nonstationary_mbml import optimizers
from nonstationary_mbml.runtime import atomic_files
from nonstationary_mbml.runtime import checkpointing
from nonstationary_mbml.runtime import multihost

CONFIG = 'config.json'
ENVIRONMENT = 'environment.json'
METRICS = 'metrics.jsonl'
CHECKPOINTS = 'checkpoints'
SNAPSHOTS = 'snapshots'
SET_ASIDE = 'set_aside'
TENSORBOARD = 'tensorboard'
# Key of a log entry that holds the entries of an ensemble's members.
_MEMBERS = 'members'
_KEPT_CHECKPOINTS = 3
# Whoever finds them takes the run for finished.
_MADE_AT_THE_END = ('table.json', 'figure.png')
_PACKAGES = (
  'jax',
  'jaxlib',
  'dm-haiku',
  'optax',
  'orbax-checkpoint',
  'numpy',
  'scipy',
  'nonstationary_mbml',
)


class SaveError(OSError):
  """The folder of a run cannot be written to."""


def is_full(error: Exception | str) -> bool:
  """Whether an error says that a disk is full, or a quota used up."""
  return any(
    os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT)
  )


def read_config(
  folder: pathlib.Path, config_class: type[base_config.Config]
) -> Any:
  """Returns the config of a run; fields newer than it have their defaults.

  Raises:
    ValueError: If there is none, or it cannot be read.
  """
  return config_from_file(folder / CONFIG, config_class)


def config_from_file(
  path: pathlib.Path, config_class: type[base_config.Config]
) -> Any:
  """Returns the config that a JSON file holds.

  Raises:
    ValueError: If it cannot be read, or is not valid; names the file.
  """
  values = atomic_files.read_json(path)
  with base_config.naming(str(path)):
    base_config.check_mapping('its content', values)
    config = base_config.from_dict(config_class, values)
    config.validate()
  return config


def read_metrics(path: pathlib.Path) -> tuple[list[dict[str, Any]], str]:
  """Returns the entries of a metrics file, and what there is of a torn one.

  Args:
    path: May be missing: a run that has not logged has no entries.

  Raises:
    ValueError: If it cannot be read, or a line that is not the last one is not
      an entry.
  """
  try:
    lines = path.read_bytes().split(b'\n')
  except FileNotFoundError:
    return [], ''
  except OSError as error:
    raise ValueError(f'cannot read {path}: {error.strerror}') from error
  if not lines[-1]:  # After the last line feed.
    lines.pop()
  entries = []
  for number, line in enumerate(lines, 1):
    try:
      entry = json.loads(line)
      if not isinstance(entry, dict) or not isinstance(entry.get('step'), int):
        raise ValueError('it has no step')
    except ValueError as error:
      if number == len(lines):
        return entries, line.decode(errors='replace')
      raise ValueError(
        f'{path}: line {number} is not an entry of a log: {error}'
      ) from error
    entries.append(atomic_files.null_to_nan(entry))
  return entries, ''


def read_starts(folder: pathlib.Path) -> list[dict[str, Any]]:
  """Returns what environment.json says of every start of a run.

  Raises:
    ValueError: If it cannot be read, or says nothing of starts.
  """
  content = atomic_files.read_json(folder / ENVIRONMENT)
  starts = content.get('starts') if isinstance(content, dict) else None
  if not isinstance(starts, list) or not all(
    isinstance(start, dict) for start in starts
  ):
    raise ValueError(f'{folder / ENVIRONMENT} has no list of starts')
  return starts


def split_entries(
  entries: Iterable[Mapping[str, Any]],
) -> tuple[list[dict[str, float]], tuple[list[dict[str, float]], ...]]:
  """Returns history and member histories, as in `trained_run.Run`."""
  history = [
    {name: value for name, value in entry.items() if name != _MEMBERS}
    for entry in entries
  ]
  members = [entry[_MEMBERS] for entry in entries if _MEMBERS in entry]
  return history, tuple(list(own) for own in zip(*members, strict=True))


def is_training(folder: pathlib.Path) -> bool:
  """Whether some process holds the folder of a run, as far as locks tell."""
  try:
    with RunFolder(folder)._locked(wait_seconds=0):
      return False
  except ValueError:
    return True
  except OSError:
    return False


class RunFolder:
  """The folder of a run that is training; only one process can have it."""

  def __init__(self, path: str | pathlib.Path):
    """Initializes the folder; touches nothing yet."""
    self.path = pathlib.Path(path)
    self._entries = []
    self._metrics = None
    self._checkpoints = checkpointing.Checkpoints(
      self.path / CHECKPOINTS, _KEPT_CHECKPOINTS
    )
    self._snapshots = checkpointing.Checkpoints(self.path / SNAPSHOTS)

  def check(self, config: base_config.ExperimentConfig) -> bool:
    """Returns whether the folder holds a run that is to have more steps now.

    A folder without checkpoint and log has nothing to lose.

    Raises:
      ValueError: If it holds a run with another config, or one that cannot have
        more steps. The message names every field that differs.
    """
    return multihost.on_primary(lambda: self._check(config))

  def _check(self, config: base_config.ExperimentConfig) -> bool:
    with self._saving():
      holds_run = (self.path / METRICS).exists() or any(
        (self.path / name).is_dir() for name in (CHECKPOINTS, SNAPSHOTS)
      )
    if not holds_run:
      return False
    present = read_config(self.path, type(config))
    # They say where code is, not what the run is.
    present.imports = config.imports
    # As they resolve: a default may be written out in one of them.
    with base_config.naming(str(self.path / CONFIG)):
      present = present.resolved()
    config = config.resolved()
    differences = base_config.differences(
      base_config.to_dict(present), base_config.to_dict(config)
    )
    if not differences:
      return False
    problem = f'holds a run with another config ({"; ".join(differences)})'
    steps = present.schedule.training_steps, config.schedule.training_steps
    present.schedule.training_steps = max(steps)
    if present == config:
      try:
        optimizers.check_more_steps(
          config.train, *steps, self.last_checkpoint or 0
        )
        return True
      except ValueError as error:
        problem = f'holds a run that cannot have more steps ({error})'
    raise ValueError(
      f'{self.path} {problem}; choose another name or folder '
      '(--name, --output_dir), or begin anew (--overwrite)'
    )

  def clear(self) -> None:
    """Deletes a run, to begin it anew.

    Raises:
      SaveError: If it cannot be deleted.
      ValueError: If another process is training it.
    """
    multihost.on_primary(self._clear)

  def _clear(self) -> None:
    if not self.path.is_dir():
      return
    with self._saving(), self._locked():
      for name in (CHECKPOINTS, SNAPSHOTS, TENSORBOARD, SET_ASIDE):
        if (self.path / name).is_dir():
          shutil.rmtree(self.path / name)
      for name in (METRICS, ENVIRONMENT, CONFIG):
        (self.path / name).unlink(missing_ok=True)

  @contextlib.contextmanager
  def _saving(self, kind: type[Exception] = OSError) -> Iterator[None]:
    """Raises errors of a kind, inside a `with`, as SaveError."""
    try:
      yield
    except kind as error:
      if multihost.is_peer_failure(error):
        raise
      last = None
      with contextlib.suppress(OSError):  # Perhaps nothing can be read, either.
        last = self.last_checkpoint
      raise save_error(self.path, error, last) from error

  @contextlib.contextmanager
  def open(self, config: base_config.ExperimentConfig) -> Iterator['RunFolder']:
    """Holds the folder for training, inside a `with`.

    Args:
      config: Config of the run; that of the run that is there, if there is one,
        or the same with more steps.

    Raises:
      ValueError: If it holds a run with another config, or if another process
        is training it.
      SaveError: If it cannot be written to.
    """
    has_more_steps = self.check(config)
    with contextlib.ExitStack() as stack:

      def hold() -> None:
        with self._saving():
          self.path.mkdir(parents=True, exist_ok=True)
          stack.enter_context(self._locked())
          for name in _MADE_AT_THE_END if has_more_steps else ():
            (self.path / name).unlink(missing_ok=True)
          atomic_files.write_json(
            self.path / CONFIG, base_config.to_dict(config)
          )

      multihost.on_primary(hold)
      multihost.on_all(lambda: self._check_shared(config))
      try:
        yield self
      except BaseException:
        # With several processes, closing would wait for one that has died.
        if not multihost.is_multiprocess():
          self._close()
        raise
      self._close()

  def _close(self) -> None:
    # Any error here was reported before: by `finish`, or by the error that ends
    # the run.
    for opened in (self._metrics, self._checkpoints, self._snapshots):
      with contextlib.suppress(Exception):
        opened.close()

  def _check_shared(self, config: base_config.ExperimentConfig) -> None:
    """Raises ValueError if this process does not see what the first wrote."""
    if not multihost.becomes_true(lambda: self._holds(config)):
      raise ValueError(
        f'process {jax.process_index()} on {socket.gethostname()} does not '
        f'see the {self.path} of process 0: all processes must share the '
        'folder (--output_dir)'
      )

  def _holds(self, config: base_config.ExperimentConfig) -> bool:
    try:
      return read_config(self.path, type(config)) == config
    except ValueError:
      return False

  @contextlib.contextmanager
  def _locked(self, wait_seconds: float = 1.0) -> Iterator[None]:
    """Holds the lock of the folder, which ends with the process.

    Waits a little: another process may just be checking whether it is held.
    """
    with contextlib.ExitStack() as stack:
      try:
        stack.enter_context(
          atomic_files.locked(self.path / '.lock', wait_seconds)
        )
      except BlockingIOError as error:
        raise ValueError(
          f'{self.path} is being trained by another process'
        ) from error
      yield

  def restore(
    self,
    abstract: Any,
    log_steps: Sequence[int],
    max_lost: int,
    abstract_params: Any = None,
  ) -> tuple[int, Any, list[str]]:
    """Returns where the run stands, and opens its metrics to go on.

    It stands at the newest checkpoint that can be read and to which the
    log is whole. What is newer is moved to set_aside/, and so are newer
    snapshots that cannot be read, to be made again.

    Args:
      abstract: Form of the state to restore, as for `Checkpoints.restore`.
      log_steps: Steps that have an entry in the log.
      max_lost: Most steps that a run can have done without a checkpoint.
      abstract_params: Form of a snapshot; None looks at none of them.

    Returns:
      The step, what was saved then (0 and None if the run has not begun), and
      what a user should know.

    Raises:
      ValueError: If there is nothing to go on from; nothing was changed.
      SaveError: If the folder cannot be written to.
    """
    entries, torn, checkpoints, snapshots = multihost.on_primary(
      lambda: (
        *read_metrics(self.path / METRICS),
        self._checkpoints.steps(),
        self._snapshots.steps(),
      )
    )
    logged = {entry['step'] for entry in entries}
    step, tree, passed_over = self._newest(
      checkpoints, abstract, sorted({*log_steps} - logged)
    )
    if tree is None and (passed_over or max(logged, default=0) > max_lost):
      problems = checkpointing.shown_problems(
        list(passed_over.values())
        or [f'{self.path / METRICS} goes to step {max(logged)}']
      )
      raise ValueError(
        f'{self.path} has no checkpoint to go on from ({problems}); nothing '
        'was changed: mend it, choose another name or folder '
        '(--name, --output_dir), or begin anew (--overwrite)'
      )
    unreadable = {}
    if abstract_params is not None:
      for newer in (n for n in snapshots if n > step):
        _, problem = _try_restore(self._snapshots, newer, abstract_params)
        if problem is not None:
          unreadable[newer] = problem
    messages = []
    if torn:
      messages.append(
        f'{self.path / METRICS}: the last line is torn, and left out: '
        f'{torn[:60]!r}'
      )
    with self._saving():
      for states, problems in (
        (self._checkpoints, passed_over),
        (self._snapshots, unreadable),
      ):
        for damaged, problem in problems.items():
          target = states.move(damaged, self.path / SET_ASIDE)
          messages.append(f'{problem}; moved it to {target}')
    kept = [entry for entry in entries if entry['step'] <= step]
    is_cut = bool(torn or (passed_over and len(kept) < len(entries)))
    messages += multihost.on_primary(lambda: self._begin(step, kept, is_cut))
    self._entries = kept
    return step, tree, messages

  def _newest(
    self, steps: Sequence[int], abstract: Any, not_logged: Sequence[int]
  ) -> tuple[int, Any, dict[int, str]]:
    """The newest checkpoint to go on from, and why later ones are none.

    Args:
      steps: Steps of the checkpoints, in order.
      abstract: Form of the state.
      not_logged: Steps whose entry the log lacks, in order.

    Returns:
      The step, what was saved then (0 and None if there is none), and the
      problem of every later step.
    """
    problems = {}
    for step in reversed(steps):
      if not_logged and not_logged[0] <= step:
        problems[step] = (
          f'{self.path / METRICS} has no entry of step {not_logged[0]}, which '
          f'comes before the checkpoint of step {step}'
        )
        continue
      tree, problem = _try_restore(self._checkpoints, step, abstract)
      if problem is None:
        return step, tree, problems
      problems[step] = problem
    return 0, None, problems

  def _begin(
    self, step: int, kept: Sequence[Mapping[str, Any]], is_cut: bool
  ) -> list[str]:
    """Opens the log, and notes a start in environment.json.

    Args:
      step: Where the run stands.
      kept: Entries to go on with.
      is_cut: Whether the log has more of which a copy is kept.

    Returns:
      Messages for the user.
    """
    path = self.path / METRICS
    messages = []
    with self._saving():
      if is_cut:
        (self.path / SET_ASIDE).mkdir(exist_ok=True)
        target = checkpointing.free_path(self.path / SET_ASIDE / METRICS)
        shutil.copyfile(path, target)
        messages.append(f'kept a copy of {path} in {target}')
      if kept or path.exists():
        atomic_files.write_whole(path, _format_entries(kept))
      self._metrics = path.open('ab')
    if step:
      messages.append(f'{self.path}: going on from step {step}')
    try:
      self._starts = read_starts(self.path)
    except ValueError:
      self._starts = []  # Not there yet, or not ours.
    self._clock = time.monotonic()
    self._starts.append({**describe_environment(), 'first_step': step})
    self._note(step)
    return messages

  @property
  def entries(self) -> list[dict[str, Any]]:
    """The log so far."""
    return self._entries

  def log(
    self, entry: dict[str, float], members: Sequence[dict[str, float]] = ()
  ) -> None:
    """Writes a line of the log; it is on disk when the call returns.

    Args:
      entry: Metrics, with their `step`.
      members: Entries of an ensemble's members.

    Raises:
      SaveError: If it cannot be written.
    """
    line = dict(entry)
    if members:
      line[_MEMBERS] = list(members)
    self._check_there()
    if multihost.is_primary():
      with self._saving():
        self._metrics.write(_format_entries([line]))
        self._metrics.flush()
        os.fsync(self._metrics.fileno())
    self._entries.append(line)

  def _check_there(self) -> None:
    """Raises SaveError if somebody has deleted the run or moved it away.

    Its log could still be written to, and Orbax makes folders anew.
    """
    if not multihost.is_primary():
      return
    is_there = all((self.path / name).exists() for name in (CONFIG, METRICS))
    if not is_there or os.fstat(self._metrics.fileno()).st_nlink == 0:
      raise SaveError(
        f'{self.path} was deleted, moved or emptied while it was trained'
      )

  @property
  def last_checkpoint(self) -> int | None:
    """Step of the newest checkpoint that is whole; None if there is none."""
    return max(self._checkpoints.steps(), default=None)

  def save_checkpoint(self, step: int, tree: Any, wait: bool = False) -> None:
    """Begins to save a state, once the one before is on disk.

    Args:
      step: Step of the state.
      tree: The state.
      wait: Whether to return only when it is on disk.

    Raises:
      SaveError: If it, or the one before, cannot be written.
    """
    self._save(self._checkpoints, step, tree, wait)
    self._note(step)

  def save_snapshot(self, step: int, params: Any) -> None:
    """Begins to save parameters for good.

    Raises:
      SaveError: If they, or those before, cannot be written.
    """
    self._save(self._snapshots, step, params)

  def _save(
    self,
    states: checkpointing.Checkpoints,
    step: int,
    tree: Any,
    wait: bool = False,
  ) -> None:
    self._check_there()
    with self._saving(Exception):  # Orbax raises several for a full disk.
      states.save(step, tree)
      if wait:
        self._wait()

  def _wait(self) -> None:
    self._checkpoints.wait()
    self._snapshots.wait()

  def finish(self, step: int, status: str) -> None:
    """Notes how training ended, once all is on disk.

    Raises:
      SaveError: If something cannot be written.
    """
    with self._saving(Exception):  # As above.
      self._wait()
    self._note(step, status)

  def _note(self, step: int, status: str = 'running, or killed') -> None:
    """Notes how far a start has come."""
    self._check_there()
    if not multihost.is_primary():
      return
    self._starts[-1] |= {
      'last_step': step,
      'seconds': round(time.monotonic() - self._clock, 3),
      'end': status,
    }
    with self._saving():
      atomic_files.write_json(self.path / ENVIRONMENT, {'starts': self._starts})


def _try_restore(
  states: checkpointing.Checkpoints, step: int, abstract: Any
) -> tuple[Any, str | None]:
  """What was saved at a step; or None, and why it cannot be restored."""
  try:
    return states.restore(step, abstract), None
  except ValueError as error:
    if multihost.is_peer_failure(error):
      raise
    return None, str(error)


def describe_environment() -> dict[str, Any]:
  """Returns what a run depends on besides its config, as plain data."""
  return {
    'time': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    'command': sys.argv,
    'host': socket.gethostname(),
    'python': platform.python_version(),
    'platform': platform.platform(),
    'packages': {name: _version(name) for name in _PACKAGES},
    'commit': _commit(),
    'backend': jax.default_backend(),
    'devices': [device.device_kind for device in jax.devices()],
    'processes': jax.process_count(),
  }


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def _commit() -> str | None:
  """The commit of this code, if it is in a git repository."""
  folder = pathlib.Path(__file__).parent

  def git(*args: str) -> str:
    return subprocess.run(
      ['git', '-C', str(folder), *args],
      capture_output=True,
      text=True,
      timeout=10,
      check=True,
    ).stdout.strip()

  try:
    changed = git('status', '--porcelain', '--untracked-files=no')
    return git('rev-parse', 'HEAD') + (' with changes' if changed else '')
  except (OSError, subprocess.SubprocessError):
    return None


def _format_entries(entries: Iterable[Mapping[str, Any]]) -> bytes:
  return ''.join(
    atomic_files.to_json(entry) + '\n' for entry in entries
  ).encode()


def save_error(
  path: pathlib.Path, error: Exception, last_checkpoint: int | None = None
) -> SaveError:
  """Returns what to raise when a folder cannot be written to.

  Args:
    path: Folder.
    error: Error of the write.
    last_checkpoint: Step of the last good one, if there is one.
  """
  reason = getattr(error, 'strerror', None)
  if not reason:
    # A message of Orbax ends with that of the system.
    reason = str(error).split('\n')[0].rsplit(': ', 1)[-1][:200]
  kept = ''
  if last_checkpoint is not None:
    kept = f'; the last good checkpoint is that of step {last_checkpoint}'
  return SaveError(f'cannot write to {path}: {reason}{kept}')
