"""Two CPU devices, quick compilation, a cache of it, and float64 on request."""

import os
import pathlib

# The tests compile much and compute little: machine code need not be fast, and
# without fusion emitters a program compiles in 0.6 of the time. XLA reads this
# once, so it comes before JAX.
os.environ['XLA_FLAGS'] = ' '.join(
  [
    os.environ.get('XLA_FLAGS', ''),
    '--xla_backend_optimization_level=0',
    '--xla_llvm_disable_expensive_passes=true',
    '--xla_cpu_use_fusion_emitters=false',
  ]
).strip()

import jax
import pytest

_CACHE = pathlib.Path(__file__).parent.parent / '.cache' / 'jax'

# Two devices, so that training over several is tested wherever training is.
jax.config.update('jax_num_cpu_devices', 2)
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_compilation_cache_dir', str(_CACHE))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)


@pytest.fixture
def x64():
  """Makes float64 the default inside a test."""
  with jax.enable_x64(True):
    yield
