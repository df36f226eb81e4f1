"""Work in child processes that take turns.

The number of CPU devices and the allocator of a process are settled when it
starts, so each side of a comparison is a process of its own. One works at a
time, the others sleep; they take turns, so that a machine that drifts hits all
of them alike.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
import dataclasses
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any
from typing import NamedTuple

_WORKER = pathlib.Path(__file__).parent / 'worker.py'
# As `make run` sets it: memory in huge pages.
HUGE_PAGES = {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'}
# Variables that a user may have set, but a benchmark must not inherit.
_NOT_INHERITED = (
  'GLIBC_TUNABLES',
  'JAX_COMPILATION_CACHE_DIR',
  'JAX_NUM_CPU_DEVICES',
  'LD_PRELOAD',
  'OMP_NUM_THREADS',
  'XLA_FLAGS',
)


class ChildError(Exception):
  """A child process ended before it answered."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """The work of a child process at every turn.

  Attributes:
    kind: A key of `worker.KINDS`.
    model_type: Type of the network, by the project's name.
    kwargs: Architecture of the network.
    batch_size: B.
    seq_length: T.
    steps: Training steps.
    runs: Number of runs of `steps` steps each, one after another.
    seeds: Networks trained at once.
    network: `project`, or `plain` or `keep_states` for that of plain_jax.py; in
      PyTorch, `pytorch_defaults` has dropout in more places than ours.
    whole_batches: Each device's share of a batch at once, else in microbatches
      as the project chooses.
    compute_dtype: Dtype of loss and gradient, for `project`.
    num_sequences: Sequences of an evaluation.
    size: Rows and columns of a matrix, or length of a vector.
    all_cores: As many CPU devices as `make run` takes, else one.
    num_devices: Devices of each process; if not 0, `all_cores` is ignored.
    num_processes: Processes that do the work together.
    process_id: Index of the child.
    coordinator: Address at which the processes meet.
    huge_pages: Memory as `make run` takes it, else as it comes.
    optimizer: Optimiser, for `project`; elsewhere it is Adam.
    learning_rate: Its learning rate.
    clip_grad_norm: Largest global norm of a gradient.
  """

  kind: str
  model_type: str = 'lstm'
  kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
  batch_size: int = 128
  seq_length: int = 256
  steps: int = 1
  runs: int = 1
  seeds: int = 1
  network: str = 'project'
  whole_batches: bool = False
  compute_dtype: str = 'float32'
  num_sequences: int = 0
  size: int = 0
  all_cores: bool = False
  num_devices: int = 0
  num_processes: int = 1
  process_id: int = 0
  coordinator: str = ''
  huge_pages: bool = False
  optimizer: str = 'adam'
  learning_rate: float = 2e-3
  clip_grad_norm: float = 1.0


class Work(NamedTuple):
  """A job that is ready to run, inside the child.

  Attributes:
    run: Function that does it once, and waits; returns losses or None.
    temp_bytes: Temporary memory that the compiler takes, on all devices; None
      if unknown.
    num_devices: Number of devices that it runs on.
    device: Kind of the devices; None if unknown.
    peak_device_bytes: Function that reads the most memory that was in use on a
      GPU; None on a CPU.
  """

  run: Callable[[], Any]
  temp_bytes: int | None = None
  num_devices: int = 1
  device: str | None = None
  peak_device_bytes: Callable[[], int | None] = lambda: None


class Child:
  """A process that does a job whenever it is asked to."""

  def __init__(self, job: Job):
    """Starts it."""
    self._stderr = tempfile.TemporaryFile('w+')
    self._process = subprocess.Popen(
      [sys.executable, str(_WORKER), json.dumps(dataclasses.asdict(job))],
      env=environment(job.huge_pages),
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._stderr,
      text=True,
    )

  def ask(self) -> None:
    """Asks it to take a turn."""
    try:
      self._process.stdin.write('\n')
      self._process.stdin.flush()
    except BrokenPipeError:
      pass  # It says why on stderr.

  def answer(self) -> dict[str, Any]:
    """Returns its answer after a turn, a dict with `seconds`.

    Raises:
      ChildError: If it says nothing.
    """
    answer = self._process.stdout.readline()
    while answer and not answer.startswith('{'):  # Gloo greets its peers.
      answer = self._process.stdout.readline()
    if not answer:
      self._process.wait()
      self._stderr.seek(0)
      lines = self._stderr.read().strip().splitlines()
      raise ChildError(
        lines[-1] if lines else f'exit status {self._process.returncode}'
      )
    return json.loads(answer)

  def end(self) -> None:
    """Lets the process end."""
    try:
      self._process.stdin.close()
    except BrokenPipeError:
      pass

  def close(self) -> None:
    """Ends the process, and waits for that."""
    self.end()
    self._process.stdout.close()
    self._process.wait()
    self._stderr.close()


class Team:
  """The processes of a job: one, or several that do it together."""

  def __init__(self, job: Job):
    """Starts it, waits for its first turn, and keeps that as `first`.

    Raises:
      ChildError: If it does not get that far.
    """
    if job.num_processes > 1:
      with socket.create_server(('127.0.0.1', 0)) as server:
        host, port = server.getsockname()
      job = dataclasses.replace(job, coordinator=f'{host}:{port}')
    start = time.perf_counter()
    self._children = [
      Child(dataclasses.replace(job, process_id=process_id))
      for process_id in range(job.num_processes)
    ]
    try:
      self.first = self.turn()
    except BaseException:
      self.close()
      raise
    self.first['start_seconds'] = time.perf_counter() - start

  def turn(self) -> dict[str, Any]:
    """Returns the answer of the first one, as `Child.answer`."""
    for child in self._children:
      child.ask()
    return [child.answer() for child in self._children][0]

  def close(self) -> None:
    """Ends all processes, and waits for that."""
    # They end together.
    for child in self._children:
      child.end()
    for child in self._children:
      child.close()


def environment(huge_pages: bool) -> dict[str, str]:
  """Returns the environment of a child."""
  inherited = {k: v for k, v in os.environ.items() if k not in _NOT_INHERITED}
  # Several processes may share a GPU, so none takes all of its memory.
  inherited['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'
  return {**inherited, **(HUGE_PAGES if huge_pages else {})}


def take_turns(
  jobs: Mapping[str, Job], repeats: int
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
  """Does jobs in turns, after a first turn of each that is not counted.

  Args:
    jobs: Jobs by name.
    repeats: Turns of each.

  Returns:
    For every job its last answer, with `times` (seconds of every turn),
    `first_loss` and `start_seconds` (with the first turn); and, for those that
    failed, why.
  """
  teams, failures, answers = {}, {}, {}
  try:
    for name, job in jobs.items():
      try:
        teams[name] = Team(job)
      except ChildError as error:
        failures[name] = str(error)
    times = {name: [] for name in teams}
    for _ in range(repeats):
      for name, team in list(teams.items()):
        try:
          answers[name] = team.turn()
        except ChildError as error:
          failures[name] = str(error)
          teams.pop(name).close()
          answers.pop(name, None)
          continue
        times[name].append(answers[name]['seconds'])
    for name, answer in answers.items():
      first = teams[name].first
      answer['times'] = times[name]
      answer['first_loss'] = first['loss']
      answer['start_seconds'] = first['start_seconds']
  finally:
    for team in teams.values():
      team.close()
  return answers, failures


def spread(times: Iterable[float], scale: float = 1.0) -> dict[str, Any]:
  """Returns median, least, largest and number of the times, for a row."""
  scaled = [scale * seconds for seconds in times]
  return {
    'value': statistics.median(scaled),
    'min': min(scaled),
    'max': max(scaled),
    'repeats': len(scaled),
  }


def format_row(row: Mapping[str, Any]) -> str:
  """Returns a row with a `value` and perhaps a `target` as a line of text."""
  name = f'{row["part"]}: {row["name"]}'
  value = (
    f'{row["value"]:.2f}' if row['value'] > 0.01 else f'{row["value"]:.1e}'
  )
  memory = row.get('temp_bytes')
  return (
    f'{name:<67} {value:>10} {row["unit"]:<6} {row.get("target", "")}'
    + ('' if memory is None else f'  temp {memory / 2**20:.1f} MiB')
  ).rstrip()
