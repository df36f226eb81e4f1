"""Where the points of a sweep run: here, or as jobs of SLURM.

A point is one run of local_launch.py, from its config in the folder of the
sweep. `LocalLauncher` starts a process of this machine for each;
`SlurmLauncher` submits a job array with submitit, whose jobs run a point each,
inside themselves. SLURM warns a job before its time is up or its node is taken;
then the run saves, and the job is queued again, to go on from there.

The lock of a run's folder keeps a point from being run twice at a time, however
many launchers and jobs there are.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import functools
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from typing import Any
from typing import BinaryIO
from typing import NamedTuple
from typing import NoReturn
from typing import Protocol

from nonstationary_mbml import base_config
from nonstationary_mbml.experiments import cli
from nonstationary_mbml.experiments.sweeps import sweep_folder
from nonstationary_mbml.runtime import atomic_files

EXECUTORS = ('here', 'slurm')
# Note of the jobs that were submitted, by which a later launcher watches them.
JOBS = 'jobs.json'
# Folder of submitit: pickles, and the output of the jobs themselves.
SUBMITIT = 'submitit'
_SCRIPT = pathlib.Path(__file__).parent.parent / 'local_launch.py'
# Polling interval for processes, and for a cluster, whose file system and
# scheduler are shared.
_POLL_SECONDS = 0.2
_SLURM_POLL_SECONDS = 5.0
# States of SLURM from which a job does not come back, and others after which
# submitit polls again.
_END_STATES = frozenset(
  'BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY '
  'TIMEOUT'.split()
)
_LIVE_STATES = frozenset(
  'COMPLETING PENDING PREEMPTED READY REQUEUED RUNNING UNKNOWN'.split()
)
# Default time limit of a job, since most clusters ask for one. A run that meets
# it is queued again and goes on, up to the maximum below.
_TIMEOUT_MINUTES = 24 * 60
_MAX_TIMEOUTS = 1000
# How long before its end a job is warned, and the shortest time limit as a
# multiple of that: most of a job is to be training.
_WARNING_SECONDS = 120
_MIN_WARNINGS = 5
# A scheduler that sends SIGTERM soon ends the job as well.
_GRACE_SECONDS = 60.0
# The files of a job that has ended may be on their way over a network file
# system, and SLURM may bring back a job that it has preempted.
_LATE_SECONDS = 90.0
_PREEMPTED_SECONDS = 600.0
# Defaults of the environment: huge pages, as `make run` has them, and what one
# run may take of a GPU's memory.
_ENVIRONMENT = {
  'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1',
  'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.900',
}


class Launcher(Protocol):
  """Runs points, which it knows by name.

  Attributes:
    limit: Maximum number of runs at a time.
    poll_seconds: Seconds from one call of `ended` to the next.
  """

  limit: int
  poll_seconds: float

  def resume(self, names: Sequence[str]) -> list[str]:
    """Returns those points that jobs of an earlier launcher still run."""
    ...

  def start(self, names: Sequence[str]) -> None:
    """Starts the runs of some points, `limit` at most.

    Raises:
      OSError: If that is not possible.
      ValueError: If the cluster does not take them.
    """
    ...

  def ended(self) -> dict[str, str]:
    """Returns the runs that have ended since the last call, and why."""
    ...

  def stop(self) -> None:
    """Lets runs save and end, and waits for them, unless SLURM has them."""
    ...


def run_arguments(
  folder: sweep_folder.SweepFolder, name: str, flags_of_runs: Sequence[str]
) -> list[str]:
  """Returns script and flags that run a point."""
  return [
    str(_SCRIPT),
    f'--config={folder.config_path(name)}',
    f'--output_dir={folder.run_path(name).parent}',
    *flags_of_runs,
  ]


def exit_status(code: int) -> str:
  """Returns the description of the end of a run with an exit status."""
  return f'killed by signal {-code}' if code < 0 else f'exit status {code}'


# Ends of a run: there is no space on the disk; another process has its lock.
CANNOT_SAVE = exit_status(cli.EXIT_CANNOT_SAVE)
LOCKED = 'another process is training it'


def gpus() -> tuple[str, ...]:
  """Returns the NVIDIA GPUs that runs may use, without starting JAX."""
  visible = os.environ.get('CUDA_VISIBLE_DEVICES')
  if visible is not None:
    return tuple(index for index in visible.split(',') if index.strip())
  if shutil.which('nvidia-smi') is None:
    return ()
  listed = subprocess.run(
    ['nvidia-smi', '--query-gpu=index', '--format=csv,noheader'],
    capture_output=True,
    text=True,
    check=False,
  )
  return tuple(listed.stdout.split()) if listed.returncode == 0 else ()


def environment(slot: int, limit: int) -> dict[str, str]:
  """Returns the environment of a run here; what the user has set stays.

  Several runs at a time have a GPU each, or share them evenly; a single one has
  all of them.

  Args:
    slot: Index of the run below `limit`; no two runs at a time share one.
    limit: Runs at a time.
  """
  choice = gpus() if limit > 1 else ()
  runs_of_gpu = -(-limit // max(1, len(choice)))
  settings = {
    **_ENVIRONMENT,
    'XLA_PYTHON_CLIENT_MEM_FRACTION': f'{0.9 / runs_of_gpu:.3f}',
    **os.environ,
  }
  if choice:
    settings['CUDA_VISIBLE_DEVICES'] = choice[slot % len(choice)]
  return settings


class _Run(NamedTuple):
  """A run in a child process."""

  slot: int
  process: subprocess.Popen


class LocalLauncher:
  """Runs points as child processes, which end with this one."""

  poll_seconds = _POLL_SECONDS

  def __init__(
    self,
    folder: sweep_folder.SweepFolder,
    limit: int,
    flags_of_runs: Sequence[str],
    lock: int,
  ):
    """Initializes the launcher.

    Args:
      folder: Folder of the sweep.
      limit: Runs at a time. Each has its share of the GPUs, and on Linux of the
        cores.
      flags_of_runs: Flags of local_launch.py, for every run.
      lock: File descriptor; as long as a run is alive, it holds the sweep.
    """
    self.limit = limit
    self._folder = folder
    self._flags = [*flags_of_runs, '--stop_with_stdin']
    self._lock = lock
    self._runs: dict[str, _Run] = {}
    self._not_started: dict[str, str] = {}

  def resume(self, names: Sequence[str]) -> list[str]:
    return []  # They end with their launcher.

  def start(self, names: Sequence[str]) -> None:
    for name in names:
      try:
        log = self._folder.open_log(name)
      except OSError as error:
        self._not_started[name] = f'it was not started: {error}'
        continue
      with log:
        self._start(name, log)

  def _start(self, name: str, log: BinaryIO) -> None:
    taken = {run.slot for run in self._runs.values()}
    slot = min(set(range(self.limit)) - taken)
    process = subprocess.Popen(
      [sys.executable, *run_arguments(self._folder, name, self._flags)],
      stdin=subprocess.PIPE,
      stdout=log,
      stderr=subprocess.STDOUT,
      env=environment(slot, self.limit),
      pass_fds=() if os.name == 'nt' else (self._lock,),
      # Ctrl-C reaches the launcher only; it stops the runs by SIGTERM.
      start_new_session=True,
    )
    self._runs[name] = _Run(slot, process)
    if self.limit > 1 and hasattr(os, 'sched_setaffinity'):
      cores = sorted(os.sched_getaffinity(0))
      if len(cores) >= self.limit:
        # The run may have ended already, or this may not be allowed.
        with contextlib.suppress(OSError):
          os.sched_setaffinity(process.pid, cores[slot :: self.limit])

  def ended(self) -> dict[str, str]:
    reasons, self._not_started = self._not_started, {}
    for name, run in list(self._runs.items()):
      code = run.process.poll()
      if code is not None:
        del self._runs[name]
        run.process.stdin.close()
        reasons[name] = _reason(self._folder, name, code)
    return reasons

  def stop(self) -> None:
    for run in self._runs.values():
      run.process.terminate()
    for run in self._runs.values():
      run.process.wait()
      run.process.stdin.close()


def _reason(folder: sweep_folder.SweepFolder, name: str, code: int) -> str:
  """Why a run has ended with an exit status; its own lock ends with it."""
  return LOCKED if code and folder.is_running(name) else exit_status(code)


class PointJob:
  """A job of SLURM, which runs a point.

  submitit pickles it, calls it in the job, and calls `checkpoint` in its signal
  handler when the job is to end. While it trains, the run has handlers of its
  own, which let it save; only then the job hands the signal on to submitit.
  """

  _is_requeued = False

  def __init__(self, folder: str, name: str, flags_of_runs: Sequence[str]):
    """Initializes the job.

    Args:
      folder: Folder of the sweep; absolute, and there on all nodes.
      name: Name of the point.
      flags_of_runs: Flags of local_launch.py, for every run.
    """
    # Jobs that wait in SLURM were pickled with these names.
    self._folder = folder
    self._name = name
    self._flags = tuple(flags_of_runs)

  def __call__(self) -> None:
    """Runs the point to its end.

    Raises:
      RuntimeError: If it fails.
    """
    name = self._name
    folder = sweep_folder.SweepFolder(self._folder)
    if folder.is_finished(name):
      return
    with folder.open_log(name) as log, _printing_to(log):
      code = self._run(run_arguments(folder, name, self._flags))
    if code == cli.EXIT_STOPPED:
      self._requeue(folder.last_end(name))
    elif code:
      raise RuntimeError(_reason(folder, name, code))
    elif not folder.is_finished(name):
      raise RuntimeError('it has left no table')

  def _run(self, arguments: Sequence[str]) -> int:
    """Runs local_launch.py; returns its exit status."""
    try:
      _run_inside(arguments)
    except SystemExit as end:
      if self._is_requeued:  # A signal came before training, or after.
        raise
      if not isinstance(end.code, str):
        return end.code or 0
      print(end.code, file=sys.stderr)
    except Exception:
      traceback.print_exc()
    return 1

  def _requeue(self, end: str | None) -> None:
    """Has the job queued again, once its run has saved and ended."""
    import submitit

    if end == 'stopped by SIGTERM':
      # A job that is cancelled, or whose node is taken, ends while it waits;
      # whether it comes back is for SLURM to say.
      time.sleep(_GRACE_SECONDS)
    number = getattr(signal, f'SIG{submitit.JobEnvironment.USR_SIG}')
    signal.raise_signal(number)

  def checkpoint(self) -> Any:
    """Returns what submitit is to queue again."""
    import submitit

    self._is_requeued = True
    return submitit.helpers.DelayedSubmission(
      PointJob(self._folder, self._name, self._flags)
    )


def _run_inside(arguments: Sequence[str]) -> NoReturn:
  """Runs local_launch.py inside this process, until it exits."""
  # Not by a launcher, whose start it would slow down.
  from nonstationary_mbml.experiments import local_launch

  sys.argv = list(arguments)
  local_launch.define_flags()
  cli.run(local_launch.main)


@contextlib.contextmanager
def _printing_to(log: BinaryIO) -> Iterator[None]:
  """Inside a `with`, stdout and stderr are a file, those of XLA as well."""
  numbers = (1, 2)
  before = [os.dup(number) for number in numbers]
  try:
    for number in numbers:
      os.dup2(log.fileno(), number)
    yield
  finally:
    for stream in (sys.stdout, sys.stderr):
      with contextlib.suppress(OSError):  # A full disk.
        stream.flush()
    for number, kept in zip(numbers, before, strict=True):
      os.dup2(kept, number)
      os.close(kept)


class _SlurmJob:
  """A job of submitit, and when it was first seen to have ended."""

  def __init__(self, job: Any):
    self.job = job
    self._ended_at: float | None = None

  def state(self) -> str:
    """SLURM state without the 'by UID' suffix."""
    return self.job.state.split(' ')[0].rstrip('+')

  def is_over(self) -> bool:
    """Whether the job will not come back, as far as is known."""
    if self.job.paths.result_pickle.exists():
      return True
    state = self.state()
    if state not in _END_STATES | _LIVE_STATES:
      # submitit takes a job that is suspended, say, for one that has ended, and
      # would not ask again.
      self.job.watcher.clear()
    return state in _END_STATES

  def ended(self, is_finished: Callable[[], bool]) -> str | None:
    """Returns why it has ended; None while it, or its files, may come.

    Args:
      is_finished: Function that says whether its point has its table.
    """
    is_preempted = self.state() == 'PREEMPTED'
    if not is_preempted and not self.is_over():
      self._ended_at = None
      return None
    self._ended_at = self._ended_at or time.monotonic()
    patience = _PREEMPTED_SECONDS if is_preempted else _LATE_SECONDS
    is_late = time.monotonic() > self._ended_at + patience
    path = self.job.paths.folder
    with contextlib.suppress(OSError):
      path.chmod(path.stat().st_mode)  # Makes a network file system look again.
    if not self.job.paths.result_pickle.exists():
      return f'the job has ended: {self.job.state}' if is_late else None
    error = self.job.exception()
    if error is not None:
      return _last_error(str(error))
    return exit_status(0) if is_finished() or is_late else None


def _last_error(text: str) -> str:
  """The error at the end of the traceback that submitit brings back."""
  lines = [line for line in text.splitlines() if re.match(r'[\w.]+: ', line)]
  return lines[-1].removeprefix('RuntimeError: ') if lines else text[:200]


class SlurmLauncher:
  """Runs points as jobs of SLURM, which go on without their launcher."""

  limit = sys.maxsize  # SLURM itself keeps to the limit of an array.
  poll_seconds = _SLURM_POLL_SECONDS

  def __init__(
    self,
    folder: sweep_folder.SweepFolder,
    max_jobs: int | None,
    parameters: Mapping[str, Any],
    flags_of_runs: Sequence[str],
  ):
    """Initializes the launcher.

    Args:
      folder: Folder of the sweep; all nodes share it.
      max_jobs: Maximum number of jobs of an array at a time; None leaves it to
        SLURM.
      parameters: Parameters of submitit's executor, such as `timeout_min`,
        `slurm_partition`, `gpus_per_node`, `cpus_per_task`, `mem_gb`.
      flags_of_runs: Flags of local_launch.py, for every run.

    Raises:
      ValueError: If submitit or SLURM is not there, or does not take a
        parameter.
    """
    self._folder = folder
    self._flags = list(flags_of_runs)
    self._path = folder.path.absolute()
    self._jobs: dict[str, _SlurmJob] = {}
    self._executor = _make_executor(
      self._path / SUBMITIT,
      {
        'name': folder.path.name,
        'timeout_min': _TIMEOUT_MINUTES,
        # submitit's default is 256.
        'slurm_array_parallelism': max_jobs or sys.maxsize,
        'slurm_signal_delay_s': _WARNING_SECONDS,
        **{k: value for k, value in parameters.items() if value is not None},
      },
    )

  def resume(self, names: Sequence[str]) -> list[str]:
    submitit = _import_submitit()
    ids = {
      name: job_id for name, job_id in self._ids().items() if name in names
    }
    # All of them before the first is asked for: it is one call of SLURM.
    jobs = {
      name: _SlurmJob(submitit.SlurmJob(self._path / SUBMITIT, job_id))
      for name, job_id in ids.items()
    }
    for name, job in jobs.items():
      if not job.is_over() and job.state() == 'UNKNOWN':
        print(
          f'SLURM does not know job {ids[name]} of {name} (yet); if it is '
          f'gone, take its line out of {self._folder.path / JOBS}',
          file=sys.stderr,
        )
    self._jobs = {name: job for name, job in jobs.items() if not job.is_over()}
    return list(self._jobs)

  def start(self, names: Sequence[str]) -> None:
    try:
      with self._executor.batch():  # They are one array.
        jobs = [
          self._executor.submit(PointJob(str(self._path), name, self._flags))
          for name in names
        ]
    except RuntimeError as error:
      raise ValueError(
        f'the jobs were not submitted: {_one_line(error)}'
      ) from error
    for name, job in zip(names, jobs, strict=True):
      self._jobs[name] = _SlurmJob(job)
    self._note(
      {**self._ids(), **{name: self._jobs[name].job.job_id for name in names}}
    )

  def ended(self) -> dict[str, str]:
    reasons = {}
    for name, job in list(self._jobs.items()):
      reason = job.ended(functools.partial(self._folder.is_finished, name))
      if reason is not None:
        reasons[name] = reason
        del self._jobs[name]
    if reasons:
      ids = self._ids()
      self._note({name: ids[name] for name in ids if name not in reasons})
    return reasons

  def stop(self) -> None:
    pass

  def _ids(self) -> dict[str, str]:
    """The newest job of every point."""
    path = self._folder.path / JOBS
    if not path.exists():
      return {}
    ids = atomic_files.read_json(path)
    base_config.check_mapping(str(path), ids)
    return dict(ids)

  def _note(self, ids: Mapping[str, str]) -> None:
    atomic_files.write_json(self._folder.path / JOBS, ids)


def _make_executor(folder: pathlib.Path, parameters: Mapping[str, Any]) -> Any:
  """Returns the executor of submitit; raises ValueError if it cannot be."""
  submitit = _import_submitit()
  if shutil.which('srun') is None:
    raise ValueError(
      '--executor=slurm: there is no srun here; start the sweep where jobs of '
      'SLURM are submitted'
    )
  for name, value in parameters.items():
    generic = name.removeprefix('slurm_')
    if generic in ('nodes', 'tasks_per_node', 'ntasks_per_node'):
      if value != 1:
        raise ValueError(
          f'--cluster {name}={value}: a point is one process; '
          'local_launch.py --distributed trains one network with several'
        )
    elif generic == 'time':
      raise ValueError(f'--cluster {name}: say timeout_min')
  executor = submitit.AutoExecutor(
    folder, cluster='slurm', slurm_max_num_timeout=_MAX_TIMEOUTS
  )
  setup = [f'export {k}="${{{k}:-{v}}}"' for k, v in _ENVIRONMENT.items()]
  setup_of_user = parameters.get('slurm_setup', [])
  try:
    executor.update_parameters(
      **{**parameters, 'slurm_setup': setup + setup_of_user}
    )
    minutes = executor.parameters['time']
    warning_seconds = executor.parameters['signal_delay_s']
    least = -(-_MIN_WARNINGS * warning_seconds // 60)
  except (AssertionError, NameError, TypeError, ValueError) as error:
    raise ValueError(f'--cluster: {_one_line(error)}') from error
  if minutes < least:
    raise ValueError(
      f'--cluster timeout_min={minutes}: it must be at least {least}, '
      f'{_MIN_WARNINGS} times the {warning_seconds} s that a job has to save '
      '(slurm_signal_delay_s)'
    )
  return executor


def _one_line(error: Exception) -> str:
  return ' '.join(str(error).split())


def _import_submitit() -> Any:
  try:
    import submitit
  except ImportError as error:
    raise ValueError(
      'jobs of a cluster need submitit: pip install submitit'
    ) from error
  return submitit
