"""Where the points of a sweep run: here, or as jobs of a cluster.

Either way a point is one run of local_launch.py, in a process of its own, from
its config in the folder of the sweep. A launcher starts such runs and tells
when they have ended; what came of a point is in its folder.

On a cluster (submitit, which writes the job array of SLURM) a job is told
before its time is up or its node is taken. Then it lets the run save, and asks
to be queued again, to go on from there.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import Any
from typing import Protocol

from nonstationary_mbml import base_config
from nonstationary_mbml.experiments import cli
from nonstationary_mbml.experiments.sweeps import sweep_folder
from nonstationary_mbml.runtime import atomic_files

EXECUTORS = ('here', 'local', 'slurm')
JOBS = 'jobs.json'
# Folder of submitit: pickles, and the output of the jobs themselves.
SUBMITIT = 'submitit'
# States of SLURM from which a job does not come back.
_END_STATES = (
  'BOOT_FAIL',
  'CANCELLED',
  'COMPLETED',
  'DEADLINE',
  'FAILED',
  'NODE_FAIL',
  'OUT_OF_MEMORY',
  'TIMEOUT',
)
# Other states after which submitit polls again.
_LIVE_STATES = (
  'COMPLETING',
  'PENDING',
  'PREEMPTED',
  'READY',
  'REQUEUED',
  'RUNNING',
  'UNKNOWN',
)
_SCRIPT = pathlib.Path(__file__).parent.parent / 'local_launch.py'
_POLL_SECONDS = 0.2
# Polling interval on a cluster, whose file system and scheduler are shared.
_CLUSTER_POLL_SECONDS = 5.0
# Default time limit of a job, since most clusters ask for one. On SLURM a run
# that meets it is queued again and goes on, up to the maximum below.
_TIMEOUT_MINUTES = 24 * 60
_MAX_TIMEOUTS = 1000
# A scheduler that has stopped a run soon stops its job as well.
_GRACE_SECONDS = 60.0
# Signal that tells a run to stop, however often it comes.
_STOP = getattr(signal, 'SIGUSR1', signal.SIGTERM)
# Before it trains and after, a run dies of the signals that ask it to stop.
_STOPPED_BY = {signal.SIGTERM, _STOP, getattr(signal, 'SIGUSR2', _STOP)}
# The files of a job that has ended may be on their way over a network file
# system, and SLURM may bring back a job that it has preempted.
_LATE_SECONDS = 90.0
_PREEMPTED_SECONDS = 600.0
# How long before its end a job is told, and how long a run then has to save.
_SIGNAL_DELAY_SECONDS = 120
_SAVE_SECONDS = 90.0


class Job(Protocol):
  """A run that was started.

  Attributes:
    name: Name of its point.
  """

  name: str

  def ended(self) -> str | None:
    """Returns how it ended; None as long as it has not."""
    ...


class Launcher(Protocol):
  """Starts runs.

  Attributes:
    limit: Most runs at a time.
    poll_seconds: Seconds from one check for their end to the next.
  """

  limit: int
  poll_seconds: float

  def resume(self, names: Sequence[str]) -> list[Job]:
    """Returns the runs of points that an earlier launcher has left behind."""
    ...

  def start(self, names: Sequence[str]) -> list[Job]:
    """Starts the runs of some points, `limit` at most.

    Raises:
      OSError: If that is not possible.
      ValueError: If the cluster does not take them.
    """
    ...

  def stop(self, jobs: Sequence[Job]) -> None:
    """Lets runs save and end, and waits for them, unless SLURM has them."""
    ...


def command(
  folder: sweep_folder.SweepFolder, name: str, flags_of_runs: Sequence[str]
) -> list[str]:
  """Returns the command that runs a point until its standard input ends."""
  return [
    sys.executable,
    str(_SCRIPT),
    f'--config={folder.config_path(name)}',
    f'--output_dir={folder.run_path(name).parent}',
    '--stop_with_stdin',
    *flags_of_runs,
  ]


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


def environment(slot: int = 0, limit: int = 1) -> dict[str, str]:
  """Returns the environment of a run; what the user has set stays.

  Several runs at a time have a GPU each, or share them evenly; a single one has
  all of them.

  Args:
    slot: Index of the run below `limit`; no two runs at a time share one.
    limit: Runs at a time.
  """
  settings = {
    # Huge pages, as `make run` has them.
    'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1',
    **os.environ,
  }
  choice = gpus() if limit > 1 else ()
  if choice:
    settings['CUDA_VISIBLE_DEVICES'] = choice[slot % len(choice)]
  runs_of_gpu = -(-limit // max(1, len(choice)))
  settings.setdefault(
    'XLA_PYTHON_CLIENT_MEM_FRACTION', f'{0.9 / runs_of_gpu:.3f}'
  )
  return settings


class _Run:
  """A run in a child process."""

  def __init__(self, name: str, slot: int, process: subprocess.Popen):
    self.name = name
    self.slot = slot
    self.process = process

  def ended(self) -> str | None:
    code = self.process.poll()
    if code is None:
      return None
    self.process.stdin.close()
    return f'killed by signal {-code}' if code < 0 else exit_status(code)


class _NotStarted:
  """A run whose log cannot be opened."""

  def __init__(self, name: str, error: OSError):
    self.name = name
    self._how = f'it was not started: {error}'

  def ended(self) -> str:
    return self._how


def exit_status(code: int) -> str:
  """Returns the description of the end of a run with an exit status."""
  return f'exit status {code}'


# End of a run for which there is no space on the disk.
CANNOT_SAVE = exit_status(cli.EXIT_CANNOT_SAVE)


class Here:
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
    self._flags = flags_of_runs
    self._lock = lock
    self._runs: list[_Run] = []

  def resume(self, names: Sequence[str]) -> list[Job]:
    return []  # They end with their launcher.

  def start(self, names: Sequence[str]) -> list[Job]:
    return [self._start(name) for name in names]

  def _start(self, name: str) -> Job:
    self._runs = [run for run in self._runs if run.process.poll() is None]
    taken = {run.slot for run in self._runs}
    slot = next(i for i in range(self.limit) if i not in taken)
    try:
      log = self._folder.open_log(name)
    except OSError as error:
      return _NotStarted(name, error)
    with log:
      process = subprocess.Popen(
        command(self._folder, name, self._flags),
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment(slot, self.limit),
        pass_fds=() if os.name == 'nt' else (self._lock,),
        # Ctrl-C reaches the launcher only; it stops the runs by SIGTERM.
        start_new_session=True,
      )
    run = _Run(name, slot, process)
    self._runs.append(run)
    if self.limit > 1 and hasattr(os, 'sched_setaffinity'):
      cores = sorted(os.sched_getaffinity(0))
      if len(cores) >= self.limit:
        # The run may have ended already, or this may not be allowed.
        with contextlib.suppress(OSError):
          os.sched_setaffinity(process.pid, cores[slot :: self.limit])
    return run

  def stop(self, jobs: Sequence[Job]) -> None:
    for run in self._runs:
      run.process.terminate()
    for run in self._runs:
      run.process.wait()
      run.process.stdin.close()


class PointJob:
  """A job of the cluster: it runs a point, in a child process.

  submitit pickles it, calls it in the job, and calls `checkpoint` in a signal
  handler before the job is to end.
  """

  def __init__(
    self,
    folder: str,
    name: str,
    flags_of_runs: Sequence[str],
    launcher: int | None = None,
    settings: Mapping[str, str] | None = None,
  ):
    """Initializes the job.

    Args:
      folder: Folder of the sweep; absolute, and there on all nodes.
      name: Name of the point.
      flags_of_runs: Flags of local_launch.py, for every run.
      launcher: Process with which the job ends, on the same machine.
      settings: Environment variables of the run, besides those of the job.
    """
    self._folder = folder
    self._name = name
    self._flags = tuple(flags_of_runs)
    self._launcher = launcher
    self._settings = dict(settings or {})
    self._process = None

  def __call__(self) -> None:
    """Runs the point to its end.

    Raises:
      RuntimeError: If it fails.
    """
    # submitit ignores SIGTERM, but some clusters send nothing else before they
    # take a node.
    before = signal.signal(signal.SIGTERM, lambda *args: self._terminate())
    try:
      self._run()
    finally:
      signal.signal(signal.SIGTERM, before)

  def _run(self) -> None:
    folder = sweep_folder.SweepFolder(self._folder)
    while not folder.is_finished(self._name):
      self._check_launcher()
      with folder.open_log(self._name) as log:
        self._process = subprocess.Popen(
          command(folder, self._name, self._flags),
          stdin=subprocess.PIPE,
          stdout=log,
          stderr=subprocess.STDOUT,
          env={**environment(), **self._settings},
          start_new_session=True,
        )
      # Not `wait`, whose lock `checkpoint` would find held.
      while (code := self._process.poll()) is None:
        if self._launcher is not None and not _is_alive(self._launcher):
          self._terminate()
        time.sleep(_POLL_SECONDS)
      if code == cli.EXIT_STOPPED or -code in _STOPPED_BY:
        self._check_launcher()
        # The run was told to stop, but not by this job. Either the node will be
        # taken soon, or the run can go on.
        time.sleep(_GRACE_SECONDS)
      elif code < 0:
        raise RuntimeError(f'killed by signal {-code}')
      elif code:
        raise RuntimeError(exit_status(code))
      elif not folder.is_finished(self._name):
        raise RuntimeError('it has left no table')

  def checkpoint(self) -> Any:
    """Lets the run save; returns what submitit shall queue again."""
    import submitit

    self._terminate()
    deadline = time.monotonic() + _SAVE_SECONDS
    while not self._has_ended():
      if time.monotonic() > deadline:
        # The run will go on from its last checkpoint.
        self._process.kill()
        break
      time.sleep(_POLL_SECONDS)
    return submitit.helpers.DelayedSubmission(
      PointJob(
        self._folder, self._name, self._flags, self._launcher, self._settings
      )
    )

  def _check_launcher(self) -> None:
    if self._launcher is not None and not _is_alive(self._launcher):
      raise RuntimeError('its launcher has ended')

  def _terminate(self) -> None:
    if self._process is not None:
      with contextlib.suppress(ProcessLookupError):
        os.kill(self._process.pid, _STOP)

  def _has_ended(self) -> bool:
    if self._process is None:
      return True
    try:
      # A signal handler must leave the exit status to `poll`.
      options = os.WEXITED | os.WNOWAIT | os.WNOHANG
      return os.waitid(os.P_PID, self._process.pid, options) is not None
    except ChildProcessError:
      return True


def _is_alive(process_id: int) -> bool:
  try:
    os.kill(process_id, 0)
  except ProcessLookupError:
    return False
  return True


class _ClusterJob:
  """A job of submitit, of which each outcome is asked for once."""

  def __init__(
    self,
    name: str,
    job: Any,
    folder: sweep_folder.SweepFolder,
    is_local: bool = False,
  ):
    self.name = name
    self._job = job
    self._folder = folder
    self._is_local = is_local
    self._done_at: float | None = None
    self._how: str | None = None

  @property
  def job_id(self) -> str:
    return self._job.job_id

  def is_done(self) -> bool:
    """Whether the job will not come back, as far as is known."""
    if self._job.paths.result_pickle.exists():
      return True
    if self._is_local:
      return self._job.done()
    state = self._state()
    if state not in (*_END_STATES, *_LIVE_STATES):
      # submitit takes a job that is suspended, say, for one that has ended, and
      # would not ask again.
      self._job.watcher.clear()
    return state in _END_STATES

  def _state(self) -> str:
    """SLURM state without the 'by UID' suffix."""
    return self._job.state.split(' ')[0].rstrip('+')

  def ended(self) -> str | None:
    if self._how is not None:
      return self._how
    is_preempted = not self._is_local and self._state() == 'PREEMPTED'
    if not is_preempted and not self.is_done():
      self._done_at = None
      return None
    self._done_at = self._done_at or time.monotonic()
    self._how = self._outcome(
      _PREEMPTED_SECONDS if is_preempted else _LATE_SECONDS
    )
    if self._how is not None and not self._is_local:
      _forget(self._folder, self.name)
    return self._how

  def _outcome(self, patience: float) -> str | None:
    """How it ended; None while its files may still be on the way."""
    is_late = time.monotonic() > self._done_at + patience
    path = self._job.paths.folder
    with contextlib.suppress(OSError):
      path.chmod(path.stat().st_mode)  # Makes a network file system look again.
    if self._job.paths.result_pickle.exists():
      error = self._job.exception()
      if error is not None:
        return _last_error(str(error))
      if self._folder.is_finished(self.name) or is_late:
        return exit_status(0)
      return None
    return f'the job has ended: {self._job.state}' if is_late else None

  def cancel(self) -> None:
    self._job.cancel(check=False)


def _last_error(text: str) -> str:
  """The error at the end of the traceback that submitit brings back."""
  lines = [line for line in text.splitlines() if re.match(r'[\w.]+: ', line)]
  return lines[-1].removeprefix('RuntimeError: ') if lines else text[:200]


class Cluster:
  """Runs points as jobs of submitit."""

  def __init__(
    self,
    folder: sweep_folder.SweepFolder,
    executor: str,
    limit: int | None,
    parameters: Mapping[str, Any],
    flags_of_runs: Sequence[str],
  ):
    """Initializes the launcher.

    Args:
      folder: Folder of the sweep; all nodes share it.
      executor: 'slurm', or 'local' for jobs on this machine.
      limit: Jobs at a time; None leaves that to the cluster.
      parameters: Parameters of submitit's executor, such as `timeout_min`,
        `slurm_partition`, `gpus_per_node`, `cpus_per_task`, `mem_gb`.
      flags_of_runs: Flags of local_launch.py, for every run.

    Raises:
      ValueError: If submitit or SLURM is not there, or does not take a
        parameter.
    """
    submitit = _import_submitit()
    if executor == 'slurm' and shutil.which('srun') is None:
      raise ValueError(
        '--executor=slurm: there is no srun here; start the sweep where jobs '
        'of SLURM are submitted'
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
    self._folder = folder
    self._flags = list(flags_of_runs)
    self._path = folder.path.absolute()
    self._is_local = executor == 'local'
    self._slots: dict[int, _ClusterJob] = {}
    # SLURM keeps to the limit itself.
    self.limit = (limit or 1) if self._is_local else sys.maxsize
    self.poll_seconds = (
      _POLL_SECONDS if self._is_local else _CLUSTER_POLL_SECONDS
    )
    defaults = {'name': folder.path.name, 'timeout_min': _TIMEOUT_MINUTES}
    if not self._is_local:
      # As many as there are points, or `limit`; submitit's default is 256.
      defaults['slurm_array_parallelism'] = limit or sys.maxsize
      defaults['slurm_signal_delay_s'] = _SIGNAL_DELAY_SECONDS
    self._executor = submitit.AutoExecutor(
      self._path / SUBMITIT,
      cluster=executor,
      **{f'{executor}_max_num_timeout': _MAX_TIMEOUTS},
    )
    try:
      self._executor.update_parameters(**{**defaults, **parameters})
    except (AssertionError, NameError, TypeError, ValueError) as error:
      raise ValueError(f'--cluster: {error}') from error

  def resume(self, names: Sequence[str]) -> list[Job]:
    if self._is_local:
      return []  # They end with their launcher.
    return queued(self._folder, names)

  def start(self, names: Sequence[str]) -> list[Job]:
    slots = self._free_slots(len(names)) if self._is_local else []
    points = [
      PointJob(
        str(self._path),
        name,
        self._flags,
        *((os.getpid(), self._settings(slots[i])) if slots else ()),
      )
      for i, name in enumerate(names)
    ]
    try:
      # In a batch, they are one array.
      with self._executor.batch():
        jobs = [self._executor.submit(point) for point in points]
    except RuntimeError as error:
      reason = ' '.join(str(error).split())
      raise ValueError(f'the jobs were not submitted: {reason}') from error
    jobs = [
      _ClusterJob(name, job, self._folder, self._is_local)
      for name, job in zip(names, jobs, strict=True)
    ]
    if self._is_local:
      self._slots |= dict(zip(slots, jobs, strict=True))
    else:
      ids = {job.name: job.job_id for job in jobs}
      atomic_files.write_json(
        self._folder.path / JOBS, {**_ids(self._folder), **ids}
      )
    return jobs

  def _free_slots(self, number: int) -> list[int]:
    taken = {slot for slot, job in self._slots.items() if not job.is_done()}
    return [slot for slot in range(self.limit) if slot not in taken][:number]

  def _settings(self, slot: int) -> dict[str, str]:
    """Environment variables by which a local run gets its GPUs."""
    settings = environment(slot, self.limit)
    if self.limit == 1:
      settings['CUDA_VISIBLE_DEVICES'] = ','.join(gpus())
    names = ('CUDA_VISIBLE_DEVICES', 'XLA_PYTHON_CLIENT_MEM_FRACTION')
    return {name: settings[name] for name in names if name in settings}

  def stop(self, jobs: Sequence[Job]) -> None:
    if not self._is_local:
      return
    for job in jobs:
      job.cancel()
    # A run outlives its job, to save.
    while any(
      not job.is_done() or self._folder.is_running(job.name) for job in jobs
    ):
      time.sleep(_POLL_SECONDS)


def queued(
  folder: sweep_folder.SweepFolder, names: Sequence[str]
) -> list[_ClusterJob]:
  """Returns the jobs of SLURM that still run or wait, of some points.

  Raises:
    ValueError: If there may be some, but submitit is not there to ask.
  """
  ids = {n: job_id for n, job_id in _ids(folder).items() if n in names}
  if not ids:
    return []
  submitit = _import_submitit()
  path = folder.path.absolute() / SUBMITIT
  jobs = {name: submitit.SlurmJob(path, job_id) for name, job_id in ids.items()}
  # One call of SLURM for all jobs.
  submitit.SlurmJob.watcher.update()
  found = [_ClusterJob(name, job, folder) for name, job in jobs.items()]
  for job in found:
    if jobs[job.name].state == 'UNKNOWN' and not job.is_done():
      print(
        f'SLURM does not know job {job.job_id} of {job.name} (yet); if it is '
        f'gone, take its line out of {folder.path / JOBS}',
        file=sys.stderr,
      )
  return [job for job in found if not job.is_done()]


def check_not_queued(
  folder: sweep_folder.SweepFolder, names: Sequence[str]
) -> None:
  """Raises ValueError if SLURM still has jobs of some points."""
  jobs = queued(folder, names)
  if jobs:
    array = sorted({job.job_id.split('_')[0] for job in jobs})
    raise ValueError(
      f'SLURM has jobs of {len(jobs)} points of {folder.path}: go on with '
      f'--executor=slurm, or cancel them first (scancel {" ".join(array)})'
    )


def _ids(folder: sweep_folder.SweepFolder) -> dict[str, str]:
  """The newest job of every point on SLURM."""
  path = folder.path / JOBS
  if not path.exists():
    return {}
  ids = atomic_files.read_json(path)
  base_config.check_mapping(str(path), ids)
  return dict(ids)


def _forget(folder: sweep_folder.SweepFolder, name: str) -> None:
  """Removes a job that has ended from the list of jobs."""
  ids = _ids(folder)
  if ids.pop(name, None) is not None:
    atomic_files.write_json(folder.path / JOBS, ids)


def _import_submitit() -> Any:
  try:
    import submitit
  except ImportError as error:
    raise ValueError(
      'jobs of a cluster need submitit: pip install submitit'
    ) from error
  return submitit
