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
again watches those that are left (<output_dir>/<name>/jobs.json knows them),
and submits what is neither finished nor queued. --executor=local takes the same
way with jobs on this machine, to try it out.

Writes into <output_dir>/<name>/: points/, the folders of all runs; logs/; and
after every point results.csv (all networks so far) and summary.csv (means over
seeds). On a CPU every run has one device, whatever the machine, so that the
same command gives the same numbers.
"""

import ast
from collections.abc import Callable
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
from nonstationary_mbml.experiments.sweeps import executors
from nonstationary_mbml.experiments.sweeps import presets
from nonstationary_mbml.experiments.sweeps import sweep_folder
from nonstationary_mbml.runtime import preemption as interrupting
from nonstationary_mbml.runtime import progress
from nonstationary_mbml.runtime import run_folder

_POLL_SECONDS = 0.2
# How often steps are counted, and a line is printed where there is no terminal.
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
    stopped_by: The signal that stopped the sweep, if one did.
    cannot_save: Reason why a run or the results could not be written, if so.
  """

  finished: list[str]
  failed: dict[str, str]
  left: list[str]
  stopped_by: str | None = None
  cannot_save: str | None = None


def run_sweep(
  points: Sequence[config_lib.SweepPoint],
  folder: pathlib.Path,
  jobs: int | None = 1,
  num_sequences: int = 10_240,
  is_chosen: Callable[[str], bool] = lambda name: True,
  cpu_devices: int = 1,
  flags_of_runs: Sequence[str] = (),
  use_tqdm: bool = False,
  executor: str = 'here',
  cluster: Mapping[str, Any] | None = None,
) -> Outcome:
  """Runs all points of a sweep that are not finished.

  Args:
    points: Points of the sweep.
    folder: Folder of the sweep, new or to go on with.
    jobs: Runs at a time; here, on Linux, each has its share of the cores. None
      is one, or on SLURM as many as it gives.
    num_sequences: Number of fresh sequences for every table.
    is_chosen: Predicate on the name of a point: whether to run it now.
    cpu_devices: Devices of each run, on a CPU.
    flags_of_runs: Further flags of local_launch.py.
    use_tqdm: Show progress over the whole sweep.
    executor: One of `sweep_jobs.EXECUTORS`: where the runs are.
    cluster: Parameters of submitit, for jobs on a cluster.

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
  if cluster and executor == 'here':
    raise ValueError('--cluster is for --executor=slurm and --executor=local')
  of_sweep = sweep_folder.SweepFolder(folder)
  failed = {}
  chosen = [point for point in points if is_chosen(point.config.name)]
  for point in chosen:
    try:
      constants.check(point.config)
    except ValueError as error:
      failed[point.config.name] = f'its config is not valid: {error}'
  with of_sweep.open(points, num_sequences, cpu_devices) as lock:
    for point in chosen:
      try:
        of_sweep.write_config(point.config)
      except OSError as error:
        if run_folder.is_full(error):
          raise
        failed[point.config.name] = f'its config cannot be written: {error}'
    flags_of_runs = [
      f'--num_sequences={num_sequences}',
      f'--cpu_devices={cpu_devices}',
      *flags_of_runs,
    ]
    if executor != 'slurm':
      names = [point.config.name for point in chosen]
      executors.check_not_queued(
        of_sweep, [name for name in names if not of_sweep.is_finished(name)]
      )
    if executor == 'here':
      launcher = executors.Here(
        of_sweep, jobs or 1, flags_of_runs, lock.fileno()
      )
    else:
      launcher = executors.Cluster(
        of_sweep, executor, jobs, cluster or {}, flags_of_runs
      )
    # Only now: while it waits for the lock, signals stop it as any program.
    with interrupting.catch() as interrupts:
      runner = _Runner(
        of_sweep,
        [point for point in chosen if point.config.name not in failed],
        launcher,
        interrupts,
        use_tqdm,
      )
      runner.run()
  failed |= runner.failed
  names = [point.config.name for point in points]
  finished = [name for name in names if of_sweep.is_finished(name)]
  done = {*finished, *failed}
  return Outcome(
    finished,
    failed,
    [name for name in names if name not in done],
    interrupts.received.name if interrupts.received else None,
    runner.cannot_save,
  )


class _Runner:
  """Starts runs, watches them, and reports their progress."""

  def __init__(
    self,
    folder: sweep_folder.SweepFolder,
    points: Sequence[config_lib.SweepPoint],
    launcher: executors.Launcher,
    interrupts: interrupting.Interrupts,
    use_tqdm: bool,
  ):
    self._folder = folder
    self._launcher = launcher
    self._interrupts = interrupts
    self._use_tqdm = use_tqdm
    self._steps = {
      p.config.name: p.config.schedule.training_steps for p in points
    }
    names = [name for name in self._steps if not folder.is_finished(name)]
    self._running = launcher.resume(names)
    running = {job.name for job in self._running}
    # Runs that were interrupted come first.
    self._waiting = sorted(
      (name for name in names if name not in running),
      key=lambda name: not folder.has_begun(name),
    )
    self.failed: dict[str, str] = {}
    self.cannot_save: str | None = None
    self._is_full = False

  def run(self) -> None:
    """Runs what is not finished, or as much as a signal or disk allows."""
    done = self._steps_done()
    with progress.bar(
      sum(self._steps.values()), 'sweep', 'step', self._use_tqdm, done
    ) as bar:
      counted = reported = polled = time.monotonic()
      poll_seconds = self._launcher.poll_seconds
      count_seconds = max(_COUNT_SECONDS, poll_seconds)
      has_ended = False
      try:
        while self._waiting or self._running:
          if self._interrupts.received or self._is_full:
            break
          room = self._launcher.limit - len(self._running)
          if self._waiting and room > 0:
            self._start(room)
          now = time.monotonic()
          if has_ended or now - counted > count_seconds:
            counted = now
            steps = self._steps_done()
            bar.update(steps - done)
            done = steps
          if has_ended or now - reported > _REPORT_SECONDS:
            reported = now
            bar.report(self._report())
          # No longer sleep: a signal may come.
          time.sleep(_POLL_SECONDS)
          has_ended = False
          if time.monotonic() - polled >= poll_seconds:
            polled = time.monotonic()
            has_ended = self._collect()
      finally:
        self._launcher.stop(self._running)
        self._write_results()

  def _start(self, room: int) -> None:
    """Starts waiting points, but for those that another process still runs."""
    ready = (n for n in self._waiting if not self._folder.is_running(n))
    starting = list(itertools.islice(ready, room))
    if starting:
      self._waiting = [n for n in self._waiting if n not in starting]
      self._running += self._launcher.start(starting)

  def _collect(self) -> bool:
    """Notes which runs have ended; whether one has."""
    ended = [(job, job.ended()) for job in self._running]
    ended = [(job, how) for job, how in ended if how is not None]
    for job, how in ended:
      self._running.remove(job)
      if self._folder.is_finished(job.name):
        continue
      # For a run that was not even started, the reason says it.
      if how == executors.CANNOT_SAVE or run_folder.is_full(how):
        self._is_full = True
        self.cannot_save = (
          f'{job.name} could not be written: '
          f'{self._folder.last_lines(job.name, 1)}'
        )
      else:
        self.failed[job.name] = (
          f'{how}; the end of {self._folder.log_path(job.name)}:\n'
          f'{self._folder.last_lines(job.name, _LOG_LINES)}'
        )
    if ended:
      self._write_results()
    return bool(ended)

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
      'running': ' '.join(job.name for job in self._running) or '-',
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
  settings = list(
    dict.fromkeys(
      column
      for row in rows
      for column in list(row)[: list(row).index('num_seeds')]
    )
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
  cli.define_flags(values)
  cli.define_choice(values, 'sweep', 'small', presets.SWEEPS, 'Which sweep')
  cli.define_integer(
    'jobs',
    None,
    'Runs at a time, each on its share of cores or GPUs; if unset, as many as '
    'there are cores, or GPUs, or one on a TPU. On SLURM, most jobs of an '
    'array at a time; if unset, as many as it gives.',
    lower_bound=1,
    flag_values=values,
  )
  cli.define_choice(
    values,
    'executor',
    'here',
    base_config.Registry(
      'executor', {name: name for name in executors.EXECUTORS}
    ),
    'Where points run: here, as jobs of SLURM, or as jobs on this machine that '
    'are handled as those of SLURM are; both need submitit',
  )
  flags.DEFINE_multi_string(
    'cluster',
    [],
    'name=value of any parameter of a job that submitit knows, such as '
    'timeout_min, mem_gb, cpus_per_task, gpus_per_node, slurm_partition, '
    'slurm_account; may be given several times.',
    flag_values=values,
  )
  flags.DEFINE_multi_string(
    'only',
    [],
    "Run only points of such names, as in '*,lin,*'; may be given several "
    'times.',
    flag_values=values,
  )
  flags.DEFINE_multi_string(
    'set',
    [],
    'path=value of any field of the config, for all points; may be given '
    'several times.',
    flag_values=values,
  )
  flags.DEFINE_string(
    'output_dir', 'runs/sweeps', 'Folder of all sweeps.', flag_values=values
  )
  flags.DEFINE_string(
    'name',
    None,
    'Folder of this sweep; if unset, that of its preset.',
    flag_values=values,
  )
  cli.define_integer(
    'num_sequences',
    10_240,
    'Fresh sequences for the table of every point.',
    lower_bound=2,
    flag_values=values,
  )
  cli.define_integer(
    'cpu_devices',
    1,
    'Devices that each run splits its CPU into; another number changes '
    'rounding, and so the results a little.',
    lower_bound=1,
    flag_values=values,
  )
  flags.DEFINE_bool(
    'list',
    False,
    'Print the points and where they stand, and run nothing.',
    flag_values=values,
  )


def points_from_flags(
  values: flags.FlagValues,
) -> tuple[list[config_lib.SweepPoint], Callable[[str], bool]]:
  """Returns the points of the sweep, and which of them are chosen.

  Raises:
    ValueError: If a setting is wrong, or no point has such a name.
  """
  sweep = presets.SWEEPS.lookup('--sweep', values.sweep)()
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
            '--only, or write a sweep of your own '
            '(experiments/sweeps/presets.py)'
          )
    config = config_lib.with_overrides(point.config, overrides)
    points.append(point._replace(config=config))
  patterns = values.only
  names = [point.config.name for point in points]
  for pattern in patterns:
    if not fnmatch.filter(names, pattern):
      raise ValueError(
        f'--only {pattern!r} is the name of no point; names are as '
        f'{names[0]}{base_config.did_you_mean(pattern, names)}'
      )
  return (
    points,
    lambda name: (
      not patterns
      or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    ),
  )


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
  points: Sequence[config_lib.SweepPoint],
  folder: pathlib.Path,
  is_chosen: Callable[[str], bool],
) -> None:
  of_sweep = sweep_folder.SweepFolder(folder)
  for point in points:
    name = point.config.name
    if is_chosen(name):
      steps = point.config.schedule.training_steps
      state = 'waiting'
      if of_sweep.is_finished(name):
        state = 'finished'
      elif of_sweep.has_begun(name):
        state = f'step {of_sweep.last_step(name)} of {steps}'
      print(f'{name}: {state}')


def main(argv: list[str]) -> None:
  """Runs the sweep and prints its outcome."""
  values = flags.FLAGS
  if len(argv) > 1:
    sys.exit(f'error: unexpected arguments: {" ".join(argv[1:])}')
  name = values.name or values.sweep.lower()
  folder = pathlib.Path(values.output_dir) / name
  try:
    base_config.check_name('--name', name)
    points, is_chosen = points_from_flags(values)
    if values.list:
      sweep_folder.SweepFolder(folder).check_same_sweep(
        points, values.num_sequences, values.cpu_devices
      )
      _print_points(points, folder, is_chosen)
      return
    executor = values.executor.lower()
    jobs = values.jobs
    if jobs is None and executor != 'slurm':
      jobs = default_jobs()
    with cli.saving(folder):
      outcome = run_sweep(
        points,
        folder,
        jobs,
        values.num_sequences,
        is_chosen,
        values.cpu_devices,
        () if values.compilation_cache else ('--nocompilation_cache',),
        use_tqdm=True,
        executor=executor,
        cluster=parse_parameters(values.cluster),
      )
  except KeyboardInterrupt:
    print('stopped; the same command goes on', file=sys.stderr)
    sys.exit(cli.EXIT_STOPPED)
  except ValueError as error:
    cli.end_with(error)
  print(format_outcome(folder, outcome))
  cli.flush()
  if outcome.cannot_save is not None:
    sys.exit(cli.EXIT_CANNOT_SAVE)
  if outcome.stopped_by is not None and outcome.left:
    print(
      f'stopped by {outcome.stopped_by}; '
      + ('the jobs go on' if executor == 'slurm' else 'all runs are saved')
      + ', and the same command goes on',
      file=sys.stderr,
    )
    sys.exit(cli.EXIT_STOPPED)
  if outcome.failed:
    sys.exit(1)


if __name__ == '__main__':
  define_flags()
  cli.run(main)
