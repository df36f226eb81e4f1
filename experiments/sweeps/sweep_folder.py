"""The folder of a sweep: its points and their results.

  sweep.json    the points: names, settings, configs
  configs/      the config of every point, to start it from
  points/       the folder of every point's run, by name
  logs/         what every run has printed
  jobs.json, submitit/  on a cluster: the jobs of the points, and their files
  results.csv   a row for every network that is trained
  summary.csv   means and standard errors over the seeds of every setting

A point is finished once its run has a table.
"""

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import dataclasses
import datetime
import hashlib
import json
import pathlib
from typing import Any
from typing import BinaryIO
from typing import NamedTuple
from typing import TextIO

import numpy as np

from nonstationary_mbml import base_config
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import regret_table
from nonstationary_mbml.runtime import atomic_files
from nonstationary_mbml.runtime import run_folder
from nonstationary_mbml.runtime import statistics
from nonstationary_mbml.runtime import trained_run

MANIFEST = 'sweep.json'
RESULTS = 'results.csv'
SUMMARY = 'summary.csv'
TABLE = 'table.json'
# Settings that are seeds: they do not make groups of their own.
SEED_PATHS = ('seed', 'train.model_init_seed')
# Line of a log before the output of each start.
_START = '--- started at'
# Seconds that the runs of a killed sweep have to save and end.
_LOCK_SECONDS = 60.0


class Point(NamedTuple):
  """A point of a sweep.

  Attributes:
    name: Name of the point, and of the folder of its run.
    settings: Values that the sweep has set, by path; as in `SweepPoint`.
    config: Config of its run.
  """

  name: str
  settings: dict[str, Any]
  config: config_lib.ExperimentConfig


class SweepFolder:
  """The folder of a sweep."""

  def __init__(self, path: str | pathlib.Path):
    """Initializes the folder; touches nothing yet."""
    self.path = pathlib.Path(path)

  def run_path(self, name: str) -> pathlib.Path:
    """Returns the folder of a point's run."""
    return self.path / 'points' / name

  def config_path(self, name: str) -> pathlib.Path:
    """Returns the file with the config of a point."""
    return self.path / 'configs' / f'{name}.json'

  def log_path(self, name: str) -> pathlib.Path:
    """Returns the file with what a point's run has printed."""
    return self.path / 'logs' / f'{name}.txt'

  def open_log(self, name: str) -> BinaryIO:
    """Opens the log of a point, with a line that tells its starts apart.

    Raises:
      OSError: If it cannot be opened.
    """
    log = self.log_path(name).open('ab')
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
    # A full disk is for the run to notice, which saves what it can.
    with contextlib.suppress(OSError):
      log.write(f'{_START} {now}\n'.encode())
      log.flush()
    return log

  def last_lines(self, name: str, number: int) -> str:
    """Returns the end of what a point's newest run has printed."""
    try:
      text = self.log_path(name).read_text(errors='replace')
    except OSError:
      text = ''
    newest = text.split(_START)[-1]
    # The rest of the line of the start is its time.
    lines = newest.strip().splitlines()[1:]
    return '\n'.join(lines[-number:]) or 'it has printed nothing'

  def points(self) -> list[Point]:
    """Returns the points of the sweep that the folder holds.

    Raises:
      ValueError: If it holds none, or one that cannot be read.
    """
    path = self.path / MANIFEST
    if not path.exists():
      raise ValueError(
        f'{self.path} is no folder of a sweep: it has no {MANIFEST}'
      )
    manifest = atomic_files.read_json(path)
    with base_config.naming(str(path)):
      try:
        for values in manifest['points']:
          base_config.check_name('config.name', values['config']['name'])
        return [
          Point(
            values['config']['name'],
            base_config.plain(values['settings']),
            base_config.from_dict(
              config_lib.ExperimentConfig, values['config']
            ),
          )
          for values in manifest['points']
        ]
      except (KeyError, TypeError) as error:
        raise ValueError(f'it is not of a sweep: {error!r}') from error

  def digest(self) -> str:
    """Returns a hash of the configs, which differs from that of other sweeps.

    Fields that have their defaults are left out, so that a sweep stays the same
    when the code gets new ones.
    """
    configs = [_not_default(point.config) for point in self.points()]
    for config in configs:
      config.pop('imports', None)  # Where code is, not what is trained.
    text = json.dumps(configs, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()

  @contextlib.contextmanager
  def open(
    self,
    points: Sequence[config_lib.SweepPoint],
    num_sequences: int,
    cpu_devices: int = 1,
  ) -> Iterator[TextIO]:
    """Holds the folder for a sweep, inside a `with`.

    A folder that holds some points of the same sweep may get more of them.

    Args:
      points: Points of the sweep.
      num_sequences: Number of sequences for the tables of all its runs.
      cpu_devices: CPU devices of every run; another number rounds differently.

    Yields:
      The file whose lock is held, for child processes to hold it as well.

    Raises:
      ValueError: If the folder holds another sweep, or another process runs it.
      OSError: If it cannot be written to.
    """
    for point in points:
      base_config.check_name('the name of a point', point.config.name)
    self.path.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
      # The runs of a killed sweep still hold it for a while.
      lock = atomic_files.locked(self.path / '.lock', _LOCK_SECONDS)
      try:
        lock = stack.enter_context(lock)
      except BlockingIOError as error:
        raise ValueError(
          f'{self.path} is held by another process that runs the sweep'
        ) from error
      manifest = {
        'num_sequences': num_sequences,
        'cpu_devices': cpu_devices,
        'points': [
          {
            'settings': point.settings,
            'config': base_config.to_dict(point.config),
          }
          for point in points
        ],
      }
      self.check_same_sweep(points, num_sequences, cpu_devices)
      # Before all else: what is here is a sweep.
      atomic_files.write_json(self.path / MANIFEST, manifest)
      for name in ('configs', 'points', 'logs'):
        (self.path / name).mkdir(exist_ok=True)
      yield lock

  def write_config(self, config: config_lib.ExperimentConfig) -> None:
    """Writes the config of a point, to start it from.

    Raises:
      OSError: If that is not possible.
    """
    atomic_files.write_json(
      self.config_path(config.name), base_config.to_dict(config)
    )

  def check_same_sweep(
    self,
    points: Sequence[config_lib.SweepPoint],
    num_sequences: int,
    cpu_devices: int = 1,
  ) -> None:
    """Raises ValueError unless all that the folder holds is of a sweep.

    Args:
      points: Points of the sweep; the folder may lack some of them.
      num_sequences: Number of sequences for the tables of its runs.
      cpu_devices: CPU devices of every run.
    """
    path = self.path / MANIFEST
    if not path.exists():
      others = ('points', run_folder.CONFIG, run_folder.CHECKPOINTS)
      if any((self.path / name).exists() for name in others):
        raise ValueError(
          f'{self.path} holds something else, and no sweep; choose another '
          'folder (--name, --output_dir)'
        )
      return
    wanted = {
      point.config.name: base_config.to_dict(point.config) for point in points
    }
    # Read as configs: fields that are newer than the folder have defaults.
    present = self.points()
    manifest = atomic_files.read_json(path)
    differences = base_config.differences(
      {
        'num_sequences': manifest.get('num_sequences'),
        'cpu_devices': manifest.get('cpu_devices', 1),
      },
      {'num_sequences': num_sequences, 'cpu_devices': cpu_devices},
    )
    for point in present:
      if point.name not in wanted:
        differences.append(f'its point {point.name} is not one of this sweep')
      else:
        # They say where code is, not what is trained.
        point.config.imports = wanted[point.name]['imports']
        differences += base_config.differences(
          base_config.to_dict(point.config), wanted[point.name], point.name
        )
    if differences:
      more = f', and {len(differences) - 3} more' if differences[3:] else ''
      raise ValueError(
        f'{self.path} holds another sweep ({"; ".join(differences[:3])}'
        f'{more}); choose another folder (--name, --output_dir)'
      )

  def is_finished(self, name: str) -> bool:
    """Whether a point has its table."""
    try:
      self.table(name)
      return True
    except ValueError:
      return False

  def table(self, name: str) -> list[dict[str, Any]]:
    """Returns the table of a point's run.

    Raises:
      ValueError: If it is not there, or no table.
    """
    path = self.run_path(name) / TABLE
    try:
      table = atomic_files.null_to_nan(atomic_files.read_json(path)['table'])
      if table and all('cumulative_regret' in row for row in table):
        return table
    except (KeyError, TypeError):
      pass
    raise ValueError(f'{path} is no table')

  def has_begun(self, name: str) -> bool:
    """Whether a point has a state to go on from."""
    return (self.run_path(name) / run_folder.CHECKPOINTS).is_dir()

  def is_running(self, name: str) -> bool:
    """Whether a process is training a point, as far as locks tell."""
    return run_folder.is_training(self.run_path(name))

  def last_step(self, name: str) -> int:
    """Returns the newest step that a point has logged."""
    try:
      entries, _ = run_folder.read_metrics(
        self.run_path(name) / run_folder.METRICS
      )
    except ValueError:
      return 0
    return entries[-1]['step'] if entries else 0

  def finished(self) -> list[Point]:
    """Returns the points that are finished, as `points` does."""
    return [point for point in self.points() if self.is_finished(point.name)]

  def results(self) -> list[dict[str, Any]]:
    """Returns a row for every network of the finished points.

    Its settings by path, `point`, `seed`, `steps`, `seconds` of training, and
    in nats, on fresh sequences of the evaluation's source: `regret` and its
    standard error over sequences, the exact predictor (`exact`) and its
    regret, and the mean paired difference to it.
    """
    rows = []
    for point in self.finished():
      table = self.table(point.name)
      others = regret_table.reference_rows(table)
      # The differences are from the exact predictor; where there is none, from
      # the best of the others.
      exact = next((row for row in others if row['is_optimum']), table[0])
      seeds = trained_run.member_seeds(point.config.train)
      for by_seed in regret_table.network_rows(table, seeds):
        rows.append(
          {
            'point': point.name,
            **point.settings,
            'seed': _seed(point.config, by_seed['seed']),
            'steps': point.config.schedule.training_steps,
            'seconds': self.seconds(point.name),
            'regret': by_seed['cumulative_regret'],
            'regret_stderr': by_seed['stderr'],
            'exact': _reference(exact) if others else None,
            'exact_regret': exact['cumulative_regret'],
            'above_exact': by_seed['above_optimum'],
            'above_exact_stderr': by_seed['above_optimum_stderr'],
          }
        )
    return rows

  def last_end(self, name: str) -> str | None:
    """Returns the noted end of a point's newest start; None without one."""
    try:
      return run_folder.read_starts(self.run_path(name))[-1]['end']
    except (ValueError, KeyError, IndexError):
      return None

  def seconds(self, name: str) -> float:
    """Returns the seconds that a point has trained, over all its starts."""
    try:
      starts = run_folder.read_starts(self.run_path(name))
      return sum(start['seconds'] for start in starts)
    except (ValueError, KeyError, TypeError):
      return float('nan')

  def write_results(self) -> list[dict[str, Any]]:
    """Writes results.csv and summary.csv; returns the rows of the latter.

    Raises:
      OSError: If they cannot be written.
    """
    rows = self.results()
    summary = summarise(rows)
    atomic_files.write_csv(self.path / RESULTS, rows)
    atomic_files.write_csv(self.path / SUMMARY, summary)
    return summary


def _reference(row: Mapping[str, Any]) -> str:
  """Label of the row that the others are measured from."""
  # Older tables do not say, and name the exact predictor of their source.
  is_exact = row.get('is_exact', True)
  return (
    row['predictor'] if is_exact else f'{row["predictor"]} (best reference)'
  )


def _not_default(config: base_config.Config) -> dict[str, Any]:
  """The fields that are not as the class has them."""
  default, values = type(config)(), {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if value != getattr(default, field.name):
      is_config = isinstance(value, base_config.Config)
      values[field.name] = _not_default(value) if is_config else value
  return values


def _seed(config: config_lib.ExperimentConfig, member: int) -> int | str:
  """Seed that tells a network from those of the same settings."""
  return member if config.seed == 0 else f'{config.seed}/{member}'


# Columns of a result that are no settings.
_MEASURED = (
  'point',
  'seed',
  'steps',
  'seconds',
  'regret',
  'regret_stderr',
  'exact',
  'exact_regret',
  'above_exact',
  'above_exact_stderr',
)


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Returns means and standard errors over the seeds of every setting.

  Args:
    rows: Rows from `SweepFolder.results`.

  Returns:
    A row for every combination of settings. `above_exact_percent` is that of
    the exact predictor's regret; a standard error is None for a single seed.
  """
  groups = {}
  for row in rows:
    key = tuple(
      (name, str(value))
      for name, value in row.items()
      if name not in (*_MEASURED, *SEED_PATHS)
    )
    groups.setdefault(key, []).append(row)
  summary = []
  for key, group in groups.items():
    regret, regret_stderr = mean_and_stderr([row['regret'] for row in group])
    above, above_stderr = mean_and_stderr([row['above_exact'] for row in group])
    percent, percent_stderr = mean_and_stderr(
      [100 * row['above_exact'] / row['exact_regret'] for row in group]
    )
    summary.append(
      {
        **dict(key),
        'num_seeds': len(group),
        'regret': regret,
        'regret_stderr': regret_stderr,
        'exact': group[0]['exact'],
        # Equal for all, unless points of other seeds read other sequences.
        'exact_regret': float(np.mean([row['exact_regret'] for row in group])),
        'above_exact': above,
        'above_exact_stderr': above_stderr,
        'above_exact_percent': percent,
        'above_exact_percent_stderr': percent_stderr,
      }
    )
  return summary


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float | None]:
  """Returns mean and standard error over seeds; of one seed, None for it."""
  mean, stderr = statistics.mean_and_stderr(np.asarray(values, np.float64))
  return float(mean), float(stderr) if len(values) > 1 else None
