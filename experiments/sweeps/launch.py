r"""Runs a sweep: all points of a preset, as many at once as asked.

  python experiments/sweeps/launch.py --sweep=small
  python experiments/sweeps/launch.py --sweep=small --only='*,lin,*' --jobs=1
  python experiments/sweeps/launch.py --sweep=tiny --list
  python experiments/sweeps/launch.py --sweep=small --name=longer \
    --set schedule.training_steps=30000
  python experiments/sweeps/launch.py --sweep=paper --executor=slurm \
    --cluster slurm_partition=gpu --cluster gpus_per_node=1 --cluster mem_gb=16

Every point is a run of local_launch.py in a process of its own, so that one
that fails leaves the others alone; the seeds of a point are trained together.
The same command again goes on: what is finished is skipped, what was
interrupted resumes, and what has failed is tried once more. Ctrl-C and SIGTERM
let all runs save first, and exit with 75; a sweep that is killed takes its runs
with it.

With --executor=slurm every point is a job of a job array, submitted by submitit
(pip install submitit). A job whose time is up, or whose node is taken, saves
and is queued again. Ctrl-C stops watching and leaves the jobs; the same command
again watches those that are left (<output_dir>/<name>/jobs.json names them),
and submits what is neither finished nor queued.

Writes into <output_dir>/<name>/: points/, the folders of all runs; logs/; and
after every point results.csv (all networks so far) and summary.csv (means over
seeds). On a CPU every run has one device, whatever the machine, so that the
same command gives the same numbers.
"""

import ast
from collections.abc import Collection
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import fnmatch
import itertools
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

from absl import flags

from nonstationary_mbml import base_config
from nonstationary_mbml.experiments import cli
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments import user_modules
from nonstationary_mbml.experiments.sweeps import executors
from nonstationary_mbml.experiments.sweeps import presets
from nonstationary_mbml.experiments.sweeps import sweep_folder
from nonstationary_mbml.runtime import preemption
from nonstationary_mbml.runtime import progress
from nonstationary_mbml.runtime import run_folder

# How often a signal is looked for, steps are counted, and a line is printed
# where there is no terminal.
_SIGNAL_SECONDS = 0.2
_COUNT_SECONDS = 2.0
_REPORT_SECONDS = 60.0
_LOG_LINES = 5


@dataclasses.dataclass
class Outcome:
  """Result of running a sweep.

  Attributes:
    finished: Names of all points that have their table.
    failed: Errors of the other points that were tried, by name.
    left: Names of points that were not tried, or were stopped.
    stopped_by: Signal that stopped the sweep, if one did.
    cannot_save: Reason why a run or the results could not be written, if so.
  """

  finished: list[str]
  failed: dict[str, str]
  left: list[str]
  stopped_by: str | None = None
  cannot_save: str | None = None


def run_sweep(
  points: Sequence[config_lib.SweepPoint],
  path: pathlib.Path,
  jobs: int | None = 1,
  num_sequences: int = 10_240,
  only: Collection[str] | None = None,
  cpu_devices: int = 1,
  flags_of_runs: Sequence[str] = (),
  use_tqdm: bool = False,
  executor: str = 'here',
  cluster: Mapping[str, Any] | None = None,
) -> Outcome:
  """Runs all points of a sweep that are not finished.

  Args:
    points: Points of the sweep.
    path: Folder of the sweep, new or to go on with.
    jobs: Runs at a time; here, on Linux, each has its share of the cores. None
      is one, or on SLURM as many as it gives.
    num_sequences: Number of fresh sequences for every table.
    only: Names of the points to run now; None runs all.
    cpu_devices: Devices of each run, on a CPU.
    flags_of_runs: Further flags of local_launch.py.
    use_tqdm: Show progress over the whole sweep.
    executor: One of `executors.EXECUTORS`: where the runs are.
    cluster: Parameters of submitit, for jobs of SLURM.

  Returns:
    The outcome. A point that fails, or whose config is not valid, is in it by
    name and stops no other one; a disk that is full stops all.

  Raises:
    ValueError: If the folder holds another sweep, another process runs it, or
      there is no such executor.
    OSError: If the folder cannot be made.
  """
  if jobs is not None:
    base_config.check_int('jobs', jobs, 1)
  base_config.check_choice('executor', executor, executors.EXECUTORS)
  if cluster and executor != 'slurm':
    raise ValueError('--cluster is for --executor=slurm')
  folder = sweep_folder.SweepFolder(path)
  chosen = [p for p in points if only is None or p.config.name in only]
  flags_of_runs = [
    f'--num_sequences={num_sequences}',
    f'--cpu_devices={cpu_devices}',
    *flags_of_runs,
  ]
  with folder.open(points, num_sequences, cpu_devices) as lock:
    failed = _write_configs(folder, chosen)
    if executor == 'slurm':
      launcher = executors.SlurmLauncher(
        folder, jobs, cluster or {}, flags_of_runs
      )
    else:
      launcher = executors.LocalLauncher(
        folder, jobs or 1, flags_of_runs, lock.fileno()
      )
    # Only now: while it waits for the lock, signals stop it as any program.
    with preemption.catch() as interrupts:
      valid = [point for point in chosen if point.config.name not in failed]
      monitor = _SweepMonitor(folder, valid, launcher, interrupts)
      monitor.run(use_tqdm)
  failed |= monitor.failed
  names = [point.config.name for point in points]
  finished = [name for name in names if folder.is_finished(name)]
  return Outcome(
    finished,
    failed,
    [name for name in names if name not in {*finished, *failed}],
    interrupts.received.name if interrupts.received else None,
    monitor.cannot_save,
  )


def _write_configs(
  folder: sweep_folder.SweepFolder, points: Sequence[config_lib.SweepPoint]
) -> dict[str, str]:
  """Writes the configs of points; returns why it cannot, by name.

  Raises:
    OSError: If the disk is full.
  """
  failed = {}
  for point in points:
    name = point.config.name
    try:
      user_modules.import_all(point.config.imports)
      constants.check(point.config)
      folder.write_config(point.config)
    except ValueError as error:
      failed[name] = f'its config is not valid: {error}'
    except OSError as error:
      if run_folder.is_full(error):
        raise
      failed[name] = f'its config cannot be written: {error}'
  return failed


class _Timer:
  """Tells when a number of seconds is over, again and again."""

  def __init__(self, seconds: float):
    self._seconds = seconds
    self._last = time.monotonic()

  def is_due(self) -> bool:
    now = time.monotonic()
    if now - self._last < self._seconds:
      return False
    self._last = now
    return True


class _SweepMonitor:
  """Has a launcher run points, and reports their progress.

  Attributes:
    failed: Errors of points, by name.
    cannot_save: Reason why a run or the results could not be written, if so.
  """

  def __init__(
    self,
    folder: sweep_folder.SweepFolder,
    points: Sequence[config_lib.SweepPoint],
    launcher: executors.Launcher,
    interrupts: preemption.Interrupts,
  ):
    self._folder = folder
    self._launcher = launcher
    self._interrupts = interrupts
    self._steps = {
      p.config.name: p.config.schedule.training_steps for p in points
    }
    names = [name for name in self._steps if not folder.is_finished(name)]
    self._running = launcher.resume(names)
    # Runs that were interrupted come first.
    self._waiting = sorted(
      (name for name in names if name not in self._running),
      key=lambda name: not folder.has_begun(name),
    )
    self.failed: dict[str, str] = {}
    self.cannot_save: str | None = None
    self._is_full = False

  def run(self, use_tqdm: bool) -> None:
    """Runs what is not finished, or as much as a signal or disk allows."""
    total, done = sum(self._steps.values()), self._steps_done()
    poll = _Timer(self._launcher.poll_seconds)
    count = _Timer(max(_COUNT_SECONDS, self._launcher.poll_seconds))
    report = _Timer(_REPORT_SECONDS)
    try:
      with progress.bar(total, 'sweep', 'step', use_tqdm, done) as bar:
        self._start()
        while self._has_work():
          time.sleep(_SIGNAL_SECONDS)
          has_ended = poll.is_due() and self._poll()
          if count.is_due() or has_ended:
            before, done = done, self._steps_done()
            bar.update(done - before)
          if report.is_due() or has_ended:
            bar.report(self._report())
    finally:
      self._launcher.stop()
      self._write_results()

  def _has_work(self) -> bool:
    is_stopped = self._interrupts.received is not None or self._is_full
    return bool(self._waiting or self._running) and not is_stopped

  def _poll(self) -> bool:
    """Notes which runs have ended, and starts others; whether one has ended."""
    reasons = self._launcher.ended()
    for name, reason in reasons.items():
      self._running.remove(name)
      self._note_end(name, reason)
    if reasons:
      self._write_results()
    self._start()
    return bool(reasons)

  def _start(self) -> None:
    """Starts waiting points, but for those that another process runs."""
    if not self._has_work():
      return
    capacity = self._launcher.limit - len(self._running)
    starting = []
    for name in list(self._waiting):
      if len(starting) == capacity:
        break
      if self._folder.is_running(name):
        continue
      self._waiting.remove(name)
      if not self._folder.is_finished(name):
        starting.append(name)
    if starting:
      self._launcher.start(starting)
      self._running += starting

  def _note_end(self, name: str, reason: str) -> None:
    if self._folder.is_finished(name):
      return
    if reason == executors.LOCKED:
      # It may fail there, and is tried here when that has ended.
      self._waiting.append(name)
    # For a run that was not even started, the reason says it.
    elif reason == executors.CANNOT_SAVE or run_folder.is_full(reason):
      self._is_full = True
      self.cannot_save = (
        f'{name} could not be written: {self._folder.last_lines(name, 1)}'
      )
    else:
      self.failed[name] = (
        f'{reason}; the end of {self._folder.log_path(name)}:\n'
        f'{self._folder.last_lines(name, _LOG_LINES)}'
      )

  def _write_results(self) -> None:
    try:
      self._folder.write_results()
    except OSError as error:
      self._is_full = self._is_full or run_folder.is_full(error)
      self.cannot_save = self.cannot_save or (
        f'cannot write to {self._folder.path}: {error.strerror or error}'
      )

  def _steps_done(self) -> int:
    """Steps that all points have done."""
    return sum(
      total
      if self._folder.is_finished(name)
      else min(total, self._folder.last_step(name))
      for name, total in self._steps.items()
    )

  def _report(self) -> Mapping[str, str]:
    finished = sum(self._folder.is_finished(name) for name in self._steps)
    return {
      'finished': f'{finished}/{len(self._steps)}',
      'running': ' '.join(self._running) or '-',
      'failed': str(len(self.failed)),
    }


def default_jobs() -> int:
  """Returns the number of GPUs that JAX finds (1 on a TPU), else of cores."""
  # In another process: JAX takes the memory of a GPU when it starts.
  backend = subprocess.run(
    [sys.executable, '-c', 'import jax; print(jax.default_backend())'],
    capture_output=True,
    text=True,
    check=False,
  ).stdout.strip()
  if backend not in ('cpu', ''):
    return max(1, len(executors.gpus()))
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def format_summary(rows: Sequence[Mapping[str, Any]]) -> str:
  """Returns the rows of summary.csv as aligned text.

  Points may have different settings: those that one lacks are blank.
  """
  if not rows:
    return 'No point is finished.'
  settings = dict.fromkeys(
    column
    for row in rows
    for column in itertools.takewhile('num_seeds'.__ne__, row)
  )
  lines = [(*settings, 'seeds', 'regret', 'exact', 'above it (nats)', '')]
  for row in rows:
    above = f'{row["above_exact"]:+.4f}'
    if row['above_exact_stderr'] is not None:
      above += f' ± {row["above_exact_stderr"]:.4f}'
    lines.append(
      (
        *(str(row.get(path, '')) for path in settings),
        str(row['num_seeds']),
        f'{row["regret"]:.4f}',
        f'{row["exact"]} {row["exact_regret"]:.4f}',
        above,
        f'{row["above_exact_percent"]:+.2f}%',
      )
    )
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return '\n'.join(
    '  '.join(
      f'{text:<{width}}' for text, width in zip(line, widths, strict=True)
    ).rstrip()
    for line in lines
  )


def format_outcome(folder: pathlib.Path, outcome: Outcome) -> str:
  """Returns the report of a sweep: finished points first, failures last."""
  rows = sweep_folder.summarise(sweep_folder.SweepFolder(folder).results())
  blocks = [format_summary(rows)]
  blocks.append(
    f'{len(outcome.finished)} points finished, {len(outcome.left)} left, '
    f'{len(outcome.failed)} failed; results are in '
    f'{folder / sweep_folder.RESULTS}.'
  )
  if outcome.cannot_save is not None:
    blocks.append(
      f'{outcome.cannot_save}\nWhat is finished is kept, and the same command '
      'goes on.'
    )
  for name, problem in outcome.failed.items():
    blocks.append(f'FAILED {name}: {problem}')
  return '\n\n'.join(blocks)


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the flags; not at import, so that scripts do not meet in a test."""
  define = cli.FlagDefiner(values)
  define.choice('sweep', 'small', presets.SWEEPS, 'Which sweep')
  define.integer(
    'jobs',
    None,
    'Runs at a time, each on its share of cores or GPUs; if unset, as many as '
    'there are cores, or GPUs, or one on a TPU. On SLURM, most jobs of an '
    'array at a time; if unset, as many as it gives.',
    lower_bound=1,
  )
  define.choice(
    'executor',
    'here',
    base_config.Registry(
      'executor', {name: name for name in executors.EXECUTORS}
    ),
    'Where points run: here, or as jobs of SLURM, which need submitit',
  )
  define.strings(
    'cluster',
    'name=value of any parameter of a job that submitit knows, such as '
    'timeout_min, mem_gb, cpus_per_task, gpus_per_node, slurm_partition, '
    'slurm_account; may be given several times.',
  )
  define.strings(
    'only',
    "Run only points of such names, as in '*,lin,*'; may be given several "
    'times.',
  )
  define.strings(
    'set',
    'path=value of any field of the config, for all points; may be given '
    'several times.',
  )
  define.string('output_dir', 'runs/sweeps', 'Folder of all sweeps.')
  define.string(
    'name', None, 'Folder of this sweep; if unset, that of its preset.'
  )
  define.integer(
    'num_sequences',
    10_240,
    'Fresh sequences for the table of every point.',
    lower_bound=2,
  )
  define.integer(
    'cpu_devices',
    1,
    'Devices that each run splits its CPU into; another number changes '
    'rounding, and so the results a little.',
    lower_bound=1,
  )
  define.boolean(
    'list',
    False,
    'Print the points and where they stand, and run nothing.',
  )


def points_from_flags(
  values: flags.FlagValues,
) -> tuple[list[config_lib.SweepPoint], set[str]]:
  """Returns the points of the sweep, and the names of those to run.

  Raises:
    ValueError: If a setting is wrong, or no point has such a name.
  """
  sweep = presets.SWEEPS.lookup('--sweep', values.sweep)()
  imports = cli.imports(values)
  points = []
  for point in sweep.points():
    overrides = config_lib.parse_overrides(point.config, values['set'].value)
    for path in overrides:
      for swept in (*point.settings, 'name'):
        if f'{path}.'.startswith(f'{swept}.') or f'{swept}.'.startswith(
          f'{path}.'
        ):
          raise ValueError(
            f'--set {path}: the sweep itself sets {swept}; choose points with '
            '--only, or write a sweep of your own (docs/extending.md)'
          )
    config = config_lib.with_overrides(point.config, overrides)
    if imports is not None:
      config.imports = imports
    points.append(point._replace(config=config))
  names = [point.config.name for point in points]
  chosen = set()
  for pattern in values.only or ['*']:
    matches = fnmatch.filter(names, pattern)
    if not matches:
      raise ValueError(
        f'--only {pattern!r} is the name of no point; names are as '
        f'{names[0]}{base_config.did_you_mean(pattern, names)}'
      )
    chosen.update(matches)
  return points, chosen


def parse_parameters(items: Sequence[str]) -> dict[str, Any]:
  """Returns the parameters of jobs that `name=value` items set.

  Raises:
    ValueError: If an item is not of that form.
  """
  parameters = {}
  for item in items:
    name, equals, text = item.partition('=')
    if not name or not equals:
      raise ValueError(f'--cluster {item!r} is not name=value')
    try:
      parameters[name] = ast.literal_eval(text)
    except (SyntaxError, ValueError):
      parameters[name] = text  # Most are names.
  return parameters


def _print_points(
  folder: sweep_folder.SweepFolder,
  points: Sequence[config_lib.SweepPoint],
) -> None:
  for point in points:
    name = point.config.name
    state = 'waiting'
    if folder.is_finished(name):
      state = 'finished'
    elif folder.has_begun(name):
      steps = point.config.schedule.training_steps
      state = f'step {folder.last_step(name)} of {steps}'
    print(f'{name}: {state}')


def main(argv: list[str]) -> None:
  """Runs the sweep and prints its outcome."""
  values = flags.FLAGS
  if len(argv) > 1:
    sys.exit(f'error: unexpected arguments: {" ".join(argv[1:])}')
  name = values.name or values.sweep.lower()
  path = pathlib.Path(values.output_dir) / name
  executor = values.executor.lower()
  try:
    base_config.check_name('--name', name)
    points, chosen = points_from_flags(values)
    if values.list:
      folder = sweep_folder.SweepFolder(path)
      folder.check_same_sweep(points, values.num_sequences, values.cpu_devices)
      _print_points(folder, [p for p in points if p.config.name in chosen])
      return
    jobs = values.jobs
    if jobs is None and executor == 'here':
      jobs = default_jobs()
    with cli.saving(path):
      outcome = run_sweep(
        points,
        path,
        jobs,
        values.num_sequences,
        chosen,
        values.cpu_devices,
        cli.flags_of_runs(values),
        use_tqdm=True,
        executor=executor,
        cluster=parse_parameters(values.cluster),
      )
  except KeyboardInterrupt:
    print('stopped; the same command goes on', file=sys.stderr)
    sys.exit(cli.EXIT_STOPPED)
  except ValueError as error:
    cli.end_with(error)
  print(format_outcome(path, outcome))
  cli.flush()
  if outcome.cannot_save is not None:
    sys.exit(cli.EXIT_CANNOT_SAVE)
  if outcome.stopped_by is not None and outcome.left:
    runs = 'the jobs go on' if executor == 'slurm' else 'all runs are saved'
    print(
      f'stopped by {outcome.stopped_by}; {runs}, and the same command goes on',
      file=sys.stderr,
    )
    sys.exit(cli.EXIT_STOPPED)
  if outcome.failed:
    sys.exit(1)


if __name__ == '__main__':
  define_flags()
  cli.run(main)
