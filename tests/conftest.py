"""Two CPU devices, a compilation cache, and float64 on request."""

import pathlib

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
