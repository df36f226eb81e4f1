import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from nonstationary_mbml.runtime import devices as devices_lib


def test_devices_are_at_most_the_cores_and_divide_the_batch(monkeypatch):
  monkeypatch.setattr(os, 'sched_getaffinity', lambda _: range(6))
  assert devices_lib.num_cpu_devices(12) == 6
  assert devices_lib.num_cpu_devices(128) == 4
  assert devices_lib.num_cpu_devices(7) == 1
  monkeypatch.setattr(os, 'sched_getaffinity', lambda _: range(64))
  assert devices_lib.num_cpu_devices(128) == 8


def test_devices_after_the_start_of_jax_are_refused():
  jax.local_devices()
  with pytest.raises(ValueError, match='cpu_devices 3 comes too late'):
    devices_lib.start(cpu_devices=3)


def test_programs_are_counted_inside_the_block_only():
  function = jax.jit(lambda x: x * 3)
  with devices_lib.count_compilations() as counts:
    function(jnp.zeros(7))
  first = counts.programs
  assert first >= 1
  with devices_lib.count_compilations() as again:
    function(jnp.zeros(7))
  assert again.programs <= first - 1
  assert counts.programs == first


_PROGRAM = """
from nonstationary_mbml.runtime import devices
devices.start(cpu_devices=2, use_compilation_cache={use})
import jax
with devices.count_compilations() as counts:
  jax.block_until_ready(jax.jit(lambda x: x + 1)(1.0))
print(len(jax.devices()), counts.compiled, counts.loaded)
"""


def _start(tmp_path, use):
  env = {**os.environ, 'XDG_CACHE_HOME': str(tmp_path)}
  env.pop('JAX_COMPILATION_CACHE_DIR', None)
  code = _PROGRAM.format(use=use)
  result = subprocess.run(
    [sys.executable, '-c', code],
    env=env,
    capture_output=True,
    text=True,
    check=True,
  )
  return tuple(map(int, result.stdout.split()))


def test_programs_are_kept_in_the_users_cache(tmp_path):
  devices, compiled, loaded = _start(tmp_path, True)
  assert devices == 2 and compiled >= 1 and loaded == 0
  assert any((tmp_path / 'nonstationary_mbml' / 'jax').iterdir())
  assert _start(tmp_path, True) == (2, 0, compiled)


def test_user_without_a_home_has_no_cache(monkeypatch):
  def no_home():
    raise RuntimeError('Could not determine home directory.')

  monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
  monkeypatch.setattr(devices_lib.pathlib.Path, 'home', no_home)
  assert devices_lib.cache_folder() is None


def test_cache_can_be_turned_off(tmp_path):
  assert _start(tmp_path, False)[2] == 0
  assert not (tmp_path / 'nonstationary_mbml').exists()


def test_make_run_asks_for_huge_pages_and_leaves_a_users_choice(tmp_path):
  root = pathlib.Path(devices_lib.__file__).parent.parent
  shutil.copy(root / 'Makefile', tmp_path)
  for name in ('requirements.txt', 'pyproject.toml'):
    (tmp_path / name).touch()
  python = tmp_path / '.venv' / 'bin' / 'python'
  python.parent.mkdir(parents=True)
  python.write_text('#!/bin/sh\necho "$GLIBC_TUNABLES"\n')
  python.chmod(0o755)
  (tmp_path / '.venv' / '.installed').touch()

  def tunables(**env):
    inherited = {k: v for k, v in os.environ.items() if k != 'GLIBC_TUNABLES'}
    result = subprocess.run(
      ['make', '-s', 'run'],
      cwd=tmp_path,
      env={**inherited, **env},
      capture_output=True,
      text=True,
      check=True,
    )
    return result.stdout.strip()

  assert tunables() == 'glibc.malloc.hugetlb=1'
  own = 'glibc.malloc.hugetlb=0'
  assert tunables(GLIBC_TUNABLES=own) == own
