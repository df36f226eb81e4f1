"""Several processes that train together: how they meet, agree and end.

All run the same program, each on its own devices (`jax.distributed`). What one
process alone may do, such as to write a log, the first one does, and all learn
what came of it. What one process alone notices, such as a signal, all learn at
the same point of the program. With a single process this costs nothing.

A process that dies takes the others with it: those that wait for it in a
computation get an error, and those that hear nothing of it for
`HEARTBEAT_SECONDS` are ended by JAX.
"""

import collections
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
from typing import Any
from typing import TypeVar

import jax
from jax.experimental import multihost_utils
import numpy as np

from nonstationary_mbml import base_config

_T = TypeVar('_T')

HEARTBEAT_SECONDS = 30
# Maximum attribute-cache delay of NFS, seconds.
SHARED_SECONDS = 20.0
# Seconds that a process that has ended waits for the others to end.
_SHUTDOWN_SECONDS = 30
# JAX's own timeout ends the process with a stack trace; ours comes before it.
_GRACE_SECONDS = 30
# How the message of an error from XLA's runtime begins; others, such as that
# of a device out of memory, have nothing to do with other processes.
_STATUS = (
  'ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION|INTERNAL|'
  'UNAVAILABLE|UNKNOWN'
)
# Every size of a message is compiled; smaller ones are padded to this.
_MIN_MESSAGE_BYTES = 1024


def check_address(
  coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
  """Raises ValueError unless the arguments of `start` fit together."""
  given = {
    'coordinator': coordinator,
    'num_processes': num_processes,
    'process_id': process_id,
  }
  missing = [name for name, value in given.items() if value is None]
  if len(missing) == len(given):
    return
  if missing:
    raise ValueError(
      f'{" and ".join(missing)} is missing: {", ".join(given)} go together'
    )
  base_config.check_int('num_processes', num_processes, 1)
  base_config.check_int('process_id', process_id, 0, num_processes - 1)
  host, _, port = coordinator.rpartition(':')
  if not host or not port.isdigit() or not 0 < int(port) < 2**16:
    raise ValueError(
      f'coordinator {coordinator!r} is not host:port, as in 10.0.0.1:1234'
    )


def start(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  timeout: float = 120.0,
) -> None:
  """Joins the other processes; to be called before anything is computed.

  Ends the process, with a message, if they do not all meet in time: JAX leaves
  no other way out.

  Args:
    coordinator: `host:port` that process 0 listens at. Without it, all follows
      from the environment: on a TPU pod, under SLURM and under Open MPI.
    num_processes: Number of processes.
    process_id: Index of this process: 0, 1, ...
    timeout: Seconds until all must have come.

  Raises:
    ValueError: If the arguments do not fit together or are not the same in all
      processes, if the port is in use, or if the environment says nothing.
  """
  check_address(coordinator, num_processes, process_id)
  if process_id == 0:
    _check_port(coordinator)
  if coordinator is None:
    shown = 'the other processes'
  else:
    shown = f'all of {num_processes} processes at {coordinator}'
    # JAX dies of some mistakes, such as another number in process 0.
    print(
      f'process {process_id} joins {num_processes} processes at {coordinator}',
      file=sys.stderr,
      flush=True,
    )

  def give_up() -> None:
    print(
      f'error: after {timeout:g} s this process has not met {shown}. Start '
      'each of them once, with the same command but for process_id (0, 1, ...),'
      ' and let coordinator be an address of process 0 that all can reach.',
      file=sys.stderr,
      flush=True,
    )
    os._exit(1)

  timer = threading.Timer(timeout, give_up)
  timer.daemon = True
  timer.start()
  # JAX's preemption service would handle SIGTERM in place of `preemption`.
  with contextlib.suppress(AttributeError):  # Not in every version of JAX.
    jax.config.update('jax_enable_preemption_service', False)
  try:
    jax.distributed.initialize(
      coordinator,
      num_processes,
      process_id,
      cluster_detection_method=None if coordinator is None else 'deactivate',
      initialization_timeout=int(timeout) + _GRACE_SECONDS,
      heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
      shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
    )
    # All processes meet here once more.
    devices = collections.Counter(d.process_index for d in jax.devices())
    if len(set(devices.values())) > 1:
      raise ValueError(
        'all processes must have as many devices; they have '
        f'{", ".join(str(number) for _, number in sorted(devices.items()))}'
      )
  except ValueError as error:
    if coordinator is not None or jax.distributed.is_initialized():
      raise
    raise ValueError(
      f'this is neither a TPU pod nor a job of SLURM or Open MPI ({error}): '
      'give coordinator, num_processes and process_id'
    ) from error
  finally:
    timer.cancel()
  if num_processes is not None:
    check_same('num_processes', {'num_processes': num_processes})


def _check_port(coordinator: str) -> None:
  """Raises ValueError if the coordinator cannot listen: JAX would crash."""
  port = int(coordinator.rpartition(':')[2])
  try:
    is_dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if is_dual else socket.AF_INET
    socket.create_server(
      ('', port), family=family, dualstack_ipv6=is_dual
    ).close()
  except OSError as error:
    raise ValueError(
      f'process 0 cannot listen at coordinator {coordinator}: {error.strerror}'
    ) from error


def is_multiprocess() -> bool:
  """Whether there are other processes; starts JAX only if there may be."""
  return jax.distributed.is_initialized() and jax.process_count() > 1


def is_primary() -> bool:
  """Whether this process writes what is written once."""
  return not is_multiprocess() or jax.process_index() == 0


def on_primary(function: Callable[[], _T]) -> _T:
  """Calls a function in the first process, and returns its result in all.

  Args:
    function: Function of plain data. It travels as JSON: where there are
      several processes, tuples are returned as lists.

  Raises:
    Exception: Exception of the function, in all processes; see `on_all`.
  """
  if not is_multiprocess():
    return function()
  text = on_all(lambda: json.dumps(function()) if is_primary() else '')
  return json.loads(_broadcast(text, source=0))


def on_all(function: Callable[[], _T]) -> _T:
  """Calls a function in every process; if one fails, all do.

  Args:
    function: Function that does not wait for other processes.

  Returns:
    Result of the function in this process.

  Raises:
    Exception: Exception of the first process in which the function failed; in
      the others, of its nearest base class that takes plain data.
  """
  if not is_multiprocess():
    return function()
  value = error = None
  try:
    value = function()
  except Exception as raised:
    error = raised
  failed = multihost_utils.process_allgather(np.array([error is not None]))
  if failed.any():
    source = int(failed.ravel().argmax())
    described = [[*map(repr, type(error).__mro__)], getattr(error, 'args', ())]
    text = _broadcast(json.dumps(described, default=str), source)
    raise error if jax.process_index() == source else _error_from_text(text)
  return value


def max_over_processes(values: Sequence[int]) -> list[int]:
  """Returns the largest of every process's values, one by one.

  Args:
    values: Values within int32, as many in every process.
  """
  if not is_multiprocess():
    return list(values)
  of_all = multihost_utils.process_allgather(np.array(values, np.int32))
  return of_all.max(axis=0).tolist()


def becomes_true(is_seen: Callable[[], bool]) -> bool:
  """Whether a process sees a change of a shared folder, now or soon.

  Args:
    is_seen: Whether it sees the change now.
  """
  deadline = time.monotonic() + SHARED_SECONDS
  while not is_seen():
    if not is_multiprocess() or time.monotonic() > deadline:
      return False
    time.sleep(0.1)
  return True


def check_same(what: str, values: Mapping[str, Any]) -> None:
  """Raises ValueError, in all processes, unless they have the same values.

  Args:
    what: Name of the values, for the message.
    values: Plain data.
  """
  if not is_multiprocess():
    return
  of_first = on_primary(lambda: values)
  values = json.loads(json.dumps(values))  # With lists for tuples, as those.

  def check() -> None:
    differences = base_config.differences(of_first, values)
    if differences:
      raise ValueError(
        f'processes 0 and {jax.process_index()} differ in {what} '
        f'({"; ".join(differences)}): start all with the same command'
      )

  on_all(check)


def is_peer_failure(error: Exception) -> bool:
  """Whether an error is that another process could not be reached.

  JAX raises such errors as several classes, ValueError among them.
  """
  return is_multiprocess() and re.match(_STATUS, str(error)) is not None


def exit_now(code: int) -> None:
  """Ends one of several processes at once; the others will end as well.

  With a single process, does nothing.
  """
  if is_multiprocess():
    for stream in (sys.stdout, sys.stderr):
      # The disk may be full, or the pipe closed.
      with contextlib.suppress(OSError, ValueError):
        stream.flush()
    os._exit(code)


def _error_from_text(text: str) -> Exception:
  """The error of another process, from its classes and arguments."""
  names, args = json.loads(text)
  kinds = [Exception]
  for kind in kinds:  # Grows on the way.
    kinds += kind.__subclasses__()
  known = {repr(kind): kind for kind in kinds}
  for name in names:
    # It may take other arguments than it has, or be unknown here.
    with contextlib.suppress(Exception):
      return known[name](*args)
  return RuntimeError(text)


def _broadcast(text: str, source: int) -> str:
  """Returns the text of the source process, in all processes."""
  is_source = jax.process_index() == source
  message = text.encode() if is_source else b''
  (size,) = max_over_processes([len(message)])
  # The size is a power of two, so that few programs are compiled.
  buffer = np.zeros(max(_MIN_MESSAGE_BYTES, 1 << size.bit_length()), np.uint8)
  buffer[: len(message)] = np.frombuffer(message, np.uint8)
  buffer = multihost_utils.broadcast_one_to_all(buffer, is_source)
  return np.asarray(buffer)[:size].tobytes().decode()
