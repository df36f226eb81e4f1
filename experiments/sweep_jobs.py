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
import shutil
import signal
import subprocess
import sys
import time
from typing import Any
from typing import Protocol

from nonstationary_mbml import base_config
from nonstationary_mbml import files
from nonstationary_mbml.experiments import command_line
from nonstationary_mbml.experiments import sweep_folder

EXECUTORS = ('here', 'local', 'slurm')
JOBS = 'jobs.json'
# Of submitit: pickles, and what the jobs themselves have printed.
SUBMITIT = 'submitit'
_SCRIPT = pathlib.Path(__file__).with_name('local_launch.py')
_POLL_SECONDS = 0.2
# Unless the user says more: most clusters want to know. A run goes on where it
# was, as often as it takes.
_TIMEOUT_MINUTES = 24 * 60
_MAX_TIMEOUTS = 1000
# A scheduler that has stopped a run soon stops its job as well.
_GRACE_SECONDS = 60.0


class Job(Protocol):
  """A run that was started.

  Attributes:
    name: Of its point.
  """

  name: str

  def ended(self) -> str | None:
    """Returns how it ended; None as long as it has not."""
    ...


class Launcher(Protocol):
  """Starts runs.

  Attributes:
    limit: Most runs at a time.
    outlives_us: Whether runs go on when the launcher stops.
  """

  limit: int
  outlives_us: bool

  def resume(self, names: Sequence[str]) -> list[Job]:
    """Returns the runs of points that an earlier launcher has left behind."""
    ...

  def start(self, names: Sequence[str]) -> list[Job]:
    """Starts the runs of some points, `limit` at most.

    Raises:
      OSError: If that is not possible.
    """
    ...

  def stop(self, jobs: Sequence[Job]) -> None:
    """Lets runs save and end, and waits for them, unless they outlive us."""
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
    slot: Of the run: less than `limit`, and of no other run at the time.
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


def exit_status(code: int) -> str:
  """Returns how the end of a run with an exit status is called."""
  return f'exit status {code}'


# How a run ends for which there is no place on the disk.
CANNOT_SAVE = exit_status(command_line.EXIT_CANNOT_SAVE)


class Here:
  """Runs points as child processes, which end with this one."""

  outlives_us = False

  def __init__(
    self,
    folder: sweep_folder.SweepFolder,
    limit: int,
    flags_of_runs: Sequence[str],
    lock: int,
  ):
    """Initializes the launcher.

    Args:
      folder: Of the sweep.
      limit: Runs at a time. Each has its share of the GPUs, and on Linux of the
        cores.
      flags_of_runs: Of local_launch.py.
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

  def _start(self, name: str) -> _Run:
    self._runs = [run for run in self._runs if run.process.poll() is None]
    taken = {run.slot for run in self._runs}
    slot = next(i for i in range(self.limit) if i not in taken)
    with self._folder.open_log(name) as log:
      process = subprocess.Popen(
        command(self._folder, name, self._flags),
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment(slot, self.limit),
        pass_fds=() if os.name == 'nt' else (self._lock,),
        # Ctrl-C is ours; runs are told by SIGTERM.
        start_new_session=True,
      )
    run = _Run(name, slot, process)
    self._runs.append(run)
    if self.limit > 1 and hasattr(os, 'sched_setaffinity'):
      cores = sorted(os.sched_getaffinity(0))
      if len(cores) >= self.limit:
        # It may have ended already, or that is not allowed.
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
  """What a job of the cluster does: it runs a point, in a child process.

  submitit pickles it, calls it in the job, and calls `checkpoint` in a signal
  handler before the job is to end.
  """

  def __init__(self, folder: str, name: str, flags_of_runs: Sequence[str]):
    """Initializes the job.

    Args:
      folder: Of the sweep; absolute, and there on all nodes.
      name: Of the point.
      flags_of_runs: Of local_launch.py.
    """
    self._folder = folder
    self._name = name
    self._flags = tuple(flags_of_runs)
    self._process = None

  def __call__(self) -> None:
    """Runs the point to its end.

    Raises:
      RuntimeError: If it fails.
    """
    folder = sweep_folder.SweepFolder(self._folder)
    while not folder.is_finished(self._name):
      with folder.open_log(self._name) as log:
        self._process = subprocess.Popen(
          command(folder, self._name, self._flags),
          stdin=subprocess.PIPE,
          stdout=log,
          stderr=subprocess.STDOUT,
          env=environment(),
          start_new_session=True,
        )
      # Not `wait`, whose lock `checkpoint` would find held.
      while (code := self._process.poll()) is None:
        time.sleep(_POLL_SECONDS)
      if code == command_line.EXIT_STOPPED:
        # Somebody has told the run, and not us. Either the node is about to be
        # taken, or the run can go on.
        time.sleep(_GRACE_SECONDS)
      elif code:
        how = f'killed by signal {-code}' if code < 0 else exit_status(code)
        raise RuntimeError(how)

  def checkpoint(self) -> Any:
    """Lets the run save; returns what submitit shall queue again."""
    import submitit

    process = self._process
    if process is not None:
      with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGTERM)
      # Leaves the exit status to whoever polls: this is a signal handler.
      with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    return submitit.helpers.DelayedSubmission(
      PointJob(self._folder, self._name, self._flags)
    )


class _ClusterJob:
  """A job of submitit."""

  def __init__(self, name: str, job: Any):
    self.name = name
    self._job = job

  def ended(self) -> str | None:
    if not self._job.done():
      return None
    error = self._job.exception()
    if error is None:
      return exit_status(0)
    # The last line of the traceback that submitit has brought back.
    lines = [line for line in str(error).splitlines() if line.strip(' -')]
    reasons = [line for line in lines if line.startswith('RuntimeError: ')]
    return reasons[-1].removeprefix('RuntimeError: ') if reasons else lines[0]

  def cancel(self) -> None:
    self._job.cancel(check=False)


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
      folder: Of the sweep; all nodes share it.
      executor: 'slurm', or 'local' for jobs on this machine.
      limit: Jobs at a time; None leaves that to the cluster.
      parameters: Of submitit's executor, such as `timeout_min`,
        `slurm_partition`, `gpus_per_node`, `cpus_per_task`, `mem_gb`.
      flags_of_runs: Of local_launch.py.

    Raises:
      ValueError: If submitit or SLURM is not there, or does not take a
        parameter.
    """
    try:
      import submitit
    except ImportError as error:
      raise ValueError(
        f'--executor={executor} needs submitit: pip install submitit'
      ) from error
    if executor == 'slurm' and shutil.which('srun') is None:
      raise ValueError(
        '--executor=slurm: there is no srun here; start the sweep where jobs '
        'of SLURM are submitted'
      )
    self._folder = folder
    self._flags = list(flags_of_runs)
    self._path = folder.path.absolute()
    # SLURM keeps to the limit itself.
    self.outlives_us = executor == 'slurm'
    self.limit = (limit or 1) if executor == 'local' else sys.maxsize
    self._job_class = {
      'local': submitit.LocalJob,
      'slurm': submitit.SlurmJob,
    }[executor]
    parameters = {
      'name': folder.path.name,
      'timeout_min': _TIMEOUT_MINUTES,
      **parameters,
    }
    if executor == 'slurm' and limit is not None:
      parameters['slurm_array_parallelism'] = limit
    self._executor = submitit.AutoExecutor(
      self._path / SUBMITIT / '%j',
      cluster=executor,
      **{f'{executor}_max_num_timeout': _MAX_TIMEOUTS},
    )
    try:
      self._executor.update_parameters(**parameters)
    except (NameError, TypeError, ValueError) as error:
      raise ValueError(f'--cluster: {error}') from error

  def resume(self, names: Sequence[str]) -> list[Job]:
    jobs = []
    for name, job_id in self._job_ids().items():
      if name in names:
        job = self._job_class(self._path / SUBMITIT / '%j', job_id)
        if not job.done(force_check=True):
          jobs.append(_ClusterJob(name, job))
    return jobs

  def start(self, names: Sequence[str]) -> list[Job]:
    points = [PointJob(str(self._path), name, self._flags) for name in names]
    # In a batch, they are one array.
    with self._executor.batch():
      jobs = [self._executor.submit(point) for point in points]
    ids = {name: job.job_id for name, job in zip(names, jobs, strict=True)}
    files.write_json(self._folder.path / JOBS, {**self._job_ids(), **ids})
    return [
      _ClusterJob(name, job) for name, job in zip(names, jobs, strict=True)
    ]

  def stop(self, jobs: Sequence[Job]) -> None:
    if self.outlives_us:
      return
    for job in jobs:
      job.cancel()
    # A run outlives its job, to save.
    while any(
      job.ended() is None or self._folder.is_running(job.name) for job in jobs
    ):
      time.sleep(_POLL_SECONDS)

  def _job_ids(self) -> dict[str, str]:
    """The newest job of every point."""
    try:
      ids = files.read_json(self._folder.path / JOBS)
      base_config.check_mapping(JOBS, ids)
      return dict(ids)
    except ValueError:
      return {}  # None was submitted yet.
