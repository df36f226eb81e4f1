"""Runs of the launch script that are killed end as if they had not been.

What is killed is a process; what is not is run in that of the tests, whose
programs are compiled and modules imported.
"""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

from absl import flags
import jax
import numpy as np
import pytest

from nonstationary_mbml.experiments import cli
from nonstationary_mbml.experiments import local_launch
from nonstationary_mbml.experiments import saved_runs
from nonstationary_mbml.runtime import checkpointing

SCRIPT = pathlib.Path(local_launch.__file__)
CKPT_FREQUENCY = 400
NUM_LOGS = 20
STEPS = 3000
FLAGS = (
  '--output_dir=runs',
  '--name=run',
  '--seq_length=8',
  '--batch_size=8',
  '--cpu_devices=2',
  '--num_sequences=600',
  f'--steps={STEPS}',
  f'--set=logger.log_frequency={STEPS // NUM_LOGS}',
  f'--set=schedule.ckpt_frequency={CKPT_FREQUENCY}',
  '--set=schedule.num_saves=5',
  '--set=eval.batch_size=64',
  '--set=eval.optimal_predictors=("kt",)',
)


def _start(folder):
  cache = SCRIPT.parent.parent / '.cache' / 'jax'
  folder.mkdir(exist_ok=True)
  return subprocess.Popen(
    [sys.executable, SCRIPT, *FLAGS],
    cwd=folder,
    env={**os.environ, 'JAX_COMPILATION_CACHE_DIR': str(cache)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def _finish(folder):
  """Runs in this process what nobody stops."""
  values = flags.FlagValues()
  local_launch.define_flags(values)
  values([str(SCRIPT), *FLAGS])
  config = local_launch.config_from_flags(values)
  local_launch.run(config, folder / 'runs' / 'run', values.num_sequences)


def _logged(folder):
  """How many lines the log has, a torn one left out."""
  path = folder / 'runs' / 'run' / 'metrics.jsonl'
  return path.read_text().count('\n') if path.exists() else 0


def _starts(folder):
  path = folder / 'runs' / 'run' / 'environment.json'
  return json.loads(path.read_text())['starts'] if path.exists() else []


def _kill(folder, number, when, delay):
  """Kills a run some time after a number of logs; whether it was running.

  Not before it trains: until then, nothing has changed.
  """
  num_starts = len(_starts(folder))
  process = _start(folder)
  while process.poll() is None and (
    len(_starts(folder)) == num_starts or _logged(folder) < when
  ):
    time.sleep(0.002)
  time.sleep(delay)
  was_running = process.poll() is None
  process.send_signal(number)
  _, stderr = process.communicate()
  return was_running, process.returncode, stderr


def _last_logged(folder):
  path = folder / 'runs' / 'run' / 'metrics.jsonl'
  whole = path.read_text().split('\n')[:-1]
  return json.loads(whole[-1])['step'] if whole else 0


def _assert_same_results(folder, reference):
  first, second = (path / 'runs' / 'run' for path in (folder, reference))
  for name in ('metrics.jsonl', 'table.json', 'config.json'):
    assert (first / name).read_bytes() == (second / name).read_bytes()
  steps = [
    {int(path.name) for path in (path / 'snapshots').iterdir()}
    for path in (first, second)
  ]
  assert steps[0] == steps[1] and len(steps[0]) == 5
  params = saved_runs.load_run(second).params
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    params,
  )
  for step in steps[0]:
    snapshots = [
      checkpointing.Checkpoints(path / 'snapshots').restore(step, abstract)
      for path in (first, second)
    ]
    jax.tree.map(np.testing.assert_array_equal, *snapshots)


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
  """The folder of a run that nobody stopped."""
  folder = tmp_path_factory.mktemp('reference')
  _finish(folder)
  return folder


def _check_killed_runs_end_the_same(folder, reference, seed, capsys):
  """Killed, then asked to stop, both at random moments, then left alone."""
  rng = random.Random(seed)
  moments = sorted(rng.uniform(0, 0.7 * NUM_LOGS) for _ in range(2))
  when = [max(1, int(moment)) for moment in moments]

  _kill(folder, signal.SIGKILL, when[0], rng.uniform(0, 0.3))
  logged = _last_logged(folder)
  was_running, code, stderr = _kill(
    folder, signal.SIGTERM, when[1], rng.uniform(0, 0.1)
  )
  starts = _starts(folder)
  assert logged - starts[1]['first_step'] <= CKPT_FREQUENCY
  if was_running and starts[1]['end'].startswith('stopped'):
    assert code == cli.EXIT_STOPPED
    assert f'is saved in {pathlib.Path("runs/run")}' in stderr
  capsys.readouterr()
  _finish(folder)
  stderr = capsys.readouterr().err
  starts = _starts(folder)
  assert starts[-1]['end'] == 'finished'
  assert starts[2]['first_step'] == starts[1]['last_step']
  assert f'going on from step {starts[2]["first_step"]}' in stderr
  assert not (folder / 'runs' / 'run' / 'set_aside').exists()
  _assert_same_results(folder, reference)


def test_killed_run_ends_the_same(tmp_path, reference, capsys):
  # After about 3 and 8 logs of 20.
  _check_killed_runs_end_the_same(tmp_path, reference, 51, capsys)
  # It was stopped by either signal, and not too late for that.
  assert [start['end'] for start in _starts(tmp_path)] == [
    'running, or killed',
    'stopped by SIGTERM',
    'finished',
  ]


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(1, 21))
def test_killed_runs_end_the_same_twenty_times(
  tmp_path, reference, seed, capsys
):
  _check_killed_runs_end_the_same(tmp_path, reference, seed, capsys)
