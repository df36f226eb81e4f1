"""Settings that must be made before JAX starts, and counts of compilations.

On a CPU a process is split into as many devices as it has cores, since XLA runs
the small operations of a loop over time on one core each. Compiled programs are
kept in a folder of the user's, so that a second start compiles nothing.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import logging
import os
import pathlib

import jax
from jax import monitoring

# More shares of a small batch would cost more than they gain, the more so where
# not all visible cores are ours.
_MAX_CPU_DEVICES = 8
_COMPILED = '/jax/core/compile/backend_compile_duration'
_LOADED = '/jax/compilation_cache/cache_hits'


def num_cpu_devices(batch_size: int | None = None) -> int:
  """Returns the most devices, up to cores and a limit, that divide a batch."""
  if hasattr(os, 'sched_getaffinity'):  # Cores of this process, on Linux.
    cores = len(os.sched_getaffinity(0))
  else:
    cores = os.cpu_count() or 1
  limit = min(cores, _MAX_CPU_DEVICES)
  if batch_size is None:
    return limit
  return max(n for n in range(1, limit + 1) if batch_size % n == 0)


def cache_folder() -> pathlib.Path | None:
  """Where a user's compiled programs are kept (XDG base directories).

  None for a user without a home.
  """
  base = os.environ.get('XDG_CACHE_HOME')
  if not base:
    try:
      base = pathlib.Path.home() / '.cache'
    except RuntimeError:
      return None
  return pathlib.Path(base) / 'nonstationary_mbml' / 'jax'


def start(cpu_devices: int = 1, use_compilation_cache: bool = True) -> None:
  """Sets JAX up; to be called before anything is computed.

  Args:
    cpu_devices: Devices that the CPU is split into.
    use_compilation_cache: Keep compiled programs for later processes, in
      `cache_folder` or where `JAX_COMPILATION_CACHE_DIR` says.

  Raises:
    ValueError: If JAX has started with another number of devices.
  """
  # No messages about backends that are not there.
  logging.getLogger('jax._src.xla_bridge').setLevel(logging.WARNING)
  try:
    jax.config.update('jax_num_cpu_devices', cpu_devices)
  except RuntimeError as error:
    raise ValueError(
      f'cpu_devices {cpu_devices} comes too late: JAX has started. Until it is '
      'set up, a file, constructor or factory of your own may use NumPy only'
    ) from error
  folder = jax.config.jax_compilation_cache_dir or cache_folder()
  if folder is None:
    use_compilation_cache = False
  jax.config.update('jax_enable_compilation_cache', use_compilation_cache)
  if use_compilation_cache:
    jax.config.update('jax_compilation_cache_dir', str(folder))
    # Cache small programs, too: there are many of them.
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


def backend_problem() -> str | None:
  """Starts JAX; returns why it does not start, None if it does."""
  try:
    jax.devices()
  except (AssertionError, RuntimeError) as error:
    # Without a plug-in, JAX raises an AssertionError without a message.
    reason = str(error).split('\n')[0] or 'there is no plug-in for it'
    return (
      f'JAX does not start on the platform {jax.config.jax_platforms}: '
      f'{reason}. JAX_PLATFORMS=cpu is always there; README.md says what to '
      'install for others'
    )
  return None


def is_out_of_memory(error: Exception) -> bool:
  """Whether an error is that the host or a device has no memory left."""
  return isinstance(error, MemoryError) or (
    isinstance(error, jax.errors.JaxRuntimeError)
    and 'RESOURCE_EXHAUSTED' in str(error)
  )


@dataclasses.dataclass
class Compilations:
  """Programs compiled or loaded since the count began.

  Attributes:
    programs: Programs that were asked for, compiled or loaded.
    loaded: Those of them that came from the cache on disk.
    seconds: Seconds spent on both.
  """

  programs: int = 0
  loaded: int = 0
  seconds: float = 0.0

  @property
  def compiled(self) -> int:
    """Programs that were compiled."""
    return self.programs - self.loaded


@contextlib.contextmanager
def count_compilations() -> Iterator[Compilations]:
  """Counts, inside a `with`, the programs that JAX compiles or loads."""
  counts = Compilations()

  def on_duration(event: str, seconds: float, **kwargs: object) -> None:
    if event == _COMPILED:
      counts.programs += 1
      counts.seconds += seconds

  def on_event(event: str, **kwargs: object) -> None:
    if event == _LOADED:
      counts.loaded += 1

  monitoring.register_event_duration_secs_listener(on_duration)
  monitoring.register_event_listener(on_event)
  try:
    yield counts
  finally:
    monitoring.unregister_event_duration_listener(on_duration)
    monitoring.unregister_event_listener(on_event)
