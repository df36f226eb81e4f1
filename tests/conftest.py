"""Two CPU devices, quick compilation, a cache of it, and float64 on request."""

import ctypes
import gc
import os
import pathlib
import resource

# The tests compile much and compute little: machine code need not be fast. The
# emitters of fusions take half of the time of compiling, and a program in one
# piece compiles in less than its pieces do together. XLA reads this once, so it
# comes before JAX.
os.environ['XLA_FLAGS'] = ' '.join(
  [
    os.environ.get('XLA_FLAGS', ''),
    '--xla_backend_optimization_level=0',
    '--xla_cpu_parallel_codegen_split_count=1',
    '--xla_cpu_use_fusion_emitters=false',
    '--xla_llvm_disable_expensive_passes=true',
  ]
).strip()

import jax
import pytest

_CACHE = pathlib.Path(__file__).parent.parent / '.cache' / 'jax'
# Bytes that a worker may hold before it drops its programs.
_MEMORY = 2**30

# Two devices, so that training over several is tested wherever training is.
jax.config.update('jax_num_cpu_devices', 2)
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_compilation_cache_dir', str(_CACHE))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)


def _resident_bytes():
  """Memory that the process holds; 0 where the system does not tell."""
  try:
    statm = pathlib.Path('/proc/self/statm').read_text()
  except OSError:
    return 0
  return int(statm.split()[1]) * resource.getpagesize()


@pytest.fixture(autouse=True)
def memory():
  """Drops all programs after a test, where they have become many.

  Each takes more than a megabyte. Tests share some, hence not always.
  """
  yield
  if _resident_bytes() < _MEMORY:
    return
  jax.clear_caches()
  gc.collect()
  try:
    # The allocator of glibc would keep it.
    ctypes.CDLL('libc.so.6').malloc_trim(0)
  except (AttributeError, OSError):  # Another C library.
    pass


@pytest.fixture
def x64():
  """Makes float64 the default inside a test."""
  with jax.enable_x64(True):
    yield
