import os
import pkgutil
import subprocess
import sys

import pytest

_SCRIPT = """
from absl import flags
import jax.numpy as jnp
from nonstationary_mbml.experiments import command_line

def main(argv):
  command_line.start(argv)
  print('1.0 \\xb1 0.1', flush=True)
  jnp.zeros(2**42).block_until_ready()

command_line.define_flags()
command_line.run(main)
"""


def _run(**env):
  return subprocess.run(
    [sys.executable, '-c', _SCRIPT],
    env={**os.environ, **env},
    capture_output=True,
    text=True,
    check=False,
  )


def test_memory_that_is_not_there_is_a_line_that_says_what_helps():
  """And a stream that has no sign for some letter shows the others."""
  result = _run(JAX_PLATFORMS='cpu', PYTHONIOENCODING='ascii')
  assert result.stdout == '1.0 ? 0.1\n'
  assert result.returncode == 1
  (line,) = result.stderr.splitlines()
  assert line.startswith('error: out of memory (RESOURCE_EXHAUSTED')
  for setting in ('batch_size', 'microbatch_size', 'gradient_checkpointing'):
    assert setting in line


_HAS_CUDA = any(m.name.startswith('jax_cuda') for m in pkgutil.iter_modules())


@pytest.mark.parametrize(
  'platform',
  [
    pytest.param(
      'cuda', marks=pytest.mark.skipif(_HAS_CUDA, reason='is there')
    ),
    'cudda',
  ],
)
def test_platform_that_is_not_there_is_a_line(platform):
  result = _run(JAX_PLATFORMS=platform)
  assert result.returncode == 1
  (line,) = result.stderr.splitlines()
  assert line.startswith(
    f'error: JAX does not start on the platform {platform}'
  )
