"""Several processes train what one trains, and end when one of them does."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest

from nonstationary_mbml.experiments import cli
from nonstationary_mbml.experiments import evaluate
from nonstationary_mbml.experiments import local_launch
from nonstationary_mbml.runtime import multihost
from tests.runtime import two_processes

SCRIPT = pathlib.Path(local_launch.__file__)
ROOT = SCRIPT.parent.parent
ENVIRONMENT = {
  **os.environ,
  'PYTHONPATH': str(ROOT),
  'JAX_COMPILATION_CACHE_DIR': str(ROOT / '.cache' / 'jax'),
  'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1',
}
FLAGS = (
  '--output_dir=runs',
  '--name=run',
  '--seq_length=8',
  '--batch_size=8',
  '--num_sequences=600',
  '--steps=3000',
  '--set=schedule.ckpt_frequency=100',
  '--set=eval.batch_size=64',
)


def _free_port():
  with socket.create_server(('127.0.0.1', 0)) as server:
    return server.getsockname()[1]


def _start(folder, *args):
  folder.mkdir(exist_ok=True)
  return subprocess.Popen(
    [sys.executable, *map(str, args)],
    cwd=folder,
    env=ENVIRONMENT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def _start_all(folder, number, *flags, script=SCRIPT):
  """The processes of a run."""
  port = _free_port()
  return [
    _start(
      folder,
      script,
      *flags,
      '--distributed',
      f'--coordinator=127.0.0.1:{port}',
      f'--num_processes={number}',
      f'--process_id={process_id}',
    )
    for process_id in range(number)
  ]


def _finish(started):
  """Waits for processes that should end well; the output of the first."""
  outputs = [process.communicate(timeout=300) for process in started]
  for process, (_, stderr) in zip(started, outputs, strict=True):
    assert process.returncode == 0, stderr
  return outputs[0]


def _metrics(folder):
  path = folder / 'runs' / 'run' / 'metrics.jsonl'
  return path.read_text() if path.exists() else ''


def _wait_for_logs(folder, number, started):
  while _metrics(folder).count('\n') < number:
    time.sleep(0.01)
    assert all(process.poll() is None for process in started), [
      process.communicate() for process in started
    ]


def test_two_processes_train_and_evaluate_as_one(tmp_path):
  port = _free_port()
  script = two_processes.__file__
  started = [
    _start(tmp_path, script, port, process_id, tmp_path)
    for process_id in range(2)
  ]
  alone = tmp_path / 'alone'
  trained = two_processes.train_all(alone)
  expected = two_processes.params_and_logs(trained)
  regrets = two_processes.regrets(trained['network'])
  _finish(started)
  both = [
    json.loads((tmp_path / f'{process_id}.json').read_text())
    for process_id in range(2)
  ]
  # To the bit: two devices add the same two numbers, wherever they are.
  for process in both:
    assert process['trained'] == expected
    assert process['regrets'] == regrets
    assert process['agreement'] == {
      'in_two_parts': True,
      'first': [10, None, 'ä'],
      'agree': [1, 0, 7],
      'everywhere': 'ValueError: wrong in process 1',
      'fails_in_first': 'ZeroDivisionError: integer division or modulo by zero',
      'disk_is_full': 'OSError: [Errno 28] No space left on device',
      'no_plain_data': 'TypeError: Object of type set is not JSON serializable',
      'same': None,
      'other': 'ValueError: processes 0 and 1 differ in their x (x: 0 -> 1): '
      'start all with the same command',
      # They train on those of both.
      'devices': [0, 1],
      'large': 100_000,
      'unseen': f'ValueError: {tmp_path}/checkpoints has no step 2; it has 1',
      'unreadable': f'DamagedError: {tmp_path}/checkpoints/3 cannot be read'[
        :60
      ],
      'restored': [0.0, 1.0, 2.0],
    }
  called_by = [path.name for path in tmp_path.glob('called_by_*')]
  assert called_by == ['called_by_0']
  for name in two_processes.TRAININGS:
    logs = [path / name / 'metrics.jsonl' for path in (tmp_path, alone)]
    assert logs[0].read_bytes() == logs[1].read_bytes()
  # One process goes on with what two have saved.
  resumed = two_processes.train_all(tmp_path)
  assert two_processes.params_and_logs(resumed) == expected


@pytest.mark.parametrize(
  ('address', 'message'),
  [
    (('10.0.0.1:1', None, 0), 'num_processes is missing'),
    ((None, 2, None), 'coordinator and process_id is missing'),
    (('10.0.0.1:1', 2, 2), 'process_id is 2; it must be an int >= 0 and <= 1'),
    (('10.0.0.1:1', 0, 0), 'num_processes is 0'),
    (('10.0.0.1', 2, 0), "'10.0.0.1' is not host:port"),
    ((':12', 2, 0), "':12' is not host:port"),
    (('10.0.0.1:99999', 2, 0), 'is not host:port'),
  ],
)
def test_wrong_addresses_are_refused(address, message):
  with pytest.raises(ValueError, match=message):
    multihost.start(*address)


def test_port_in_use_is_said_before_jax_starts():
  with socket.create_server(('127.0.0.1', 0)) as server:
    address = f'127.0.0.1:{server.getsockname()[1]}'
    with pytest.raises(ValueError, match=f'cannot listen .* {address}.*in use'):
      multihost.start(address, 2, 0)


def test_one_process_agrees_with_itself():
  assert not multihost.is_multiprocess()
  assert multihost.is_primary()
  assert multihost.max_over_processes([3, 1]) == [3, 1]
  assert multihost.on_primary(lambda: 'x') == 'x'
  assert multihost.on_all(lambda: 'x') == 'x'
  multihost.check_same('x', {})
  multihost.exit_now(1)
  assert not multihost.is_peer_failure(ValueError('INTERNAL: of JAX'))


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """The folder of a run that nobody stopped: one process, two devices."""
  folder = tmp_path_factory.mktemp('whole')
  _finish([_start(folder, SCRIPT, *FLAGS, '--cpu_devices=2')])
  return folder


def _assert_same_results(folder, whole):
  first, second = (path / 'runs' / 'run' for path in (folder, whole))
  for name in ('metrics.jsonl', 'table.json', 'config.json'):
    assert (first / name).read_bytes() == (second / name).read_bytes()


def _kill_one(folder, victim, number=signal.SIGKILL):
  """Kills one of two processes that train; how the other one ends."""
  started = _start_all(folder, 2, *FLAGS)
  _wait_for_logs(folder, 5, started)
  started[victim].send_signal(number)
  began = time.monotonic()
  outputs = [process.communicate(timeout=60) for process in started]
  assert time.monotonic() - began < 60
  other = 1 - victim
  return started[other].returncode, outputs[other][1]


@pytest.mark.slow
@pytest.mark.parametrize('victim', [0, 1])
def test_killed_process_ends_the_other_and_one_goes_on(tmp_path, whole, victim):
  code, stderr = _kill_one(tmp_path, victim)
  # Whether it is we or JAX that notice first depends on what the other one does
  # just then, and without process 0 JAX has nobody left to ask.
  assert code in (cli.EXIT_STOPPED, -signal.SIGABRT), stderr
  assert re.search('another (process has ended|task died)', stderr), stderr
  _, stderr = _finish([_start(tmp_path, SCRIPT, *FLAGS, '--cpu_devices=2')])
  assert 'going on from step' in stderr
  _assert_same_results(tmp_path, whole)


@pytest.mark.slow
def test_signal_to_one_process_stops_both_and_both_go_on(tmp_path, whole):
  code, stderr = _kill_one(tmp_path, 1, signal.SIGTERM)
  assert code == cli.EXIT_STOPPED
  assert 'stopped by SIGTERM after step' in stderr
  _, stderr = _finish(_start_all(tmp_path, 2, *FLAGS))
  assert 'going on from step' in stderr
  _assert_same_results(tmp_path, whole)


@pytest.mark.slow
def test_four_processes_go_on_with_what_one_has_begun(tmp_path):
  """A grid of two members on two processes each."""
  flags = (
    *FLAGS,
    '--steps=200',
    '--num_seeds=2',
    '--set=train.num_seed_shards=2',
  )
  process = _start(tmp_path, SCRIPT, *flags, '--cpu_devices=4')
  _wait_for_logs(tmp_path, 1, [process])
  process.terminate()
  process.communicate()
  assert process.returncode == cli.EXIT_STOPPED
  _, stderr = _finish(_start_all(tmp_path, 4, *flags))
  assert 'going on from step' in stderr
  alone = tmp_path / 'alone'
  _finish([_start(alone, SCRIPT, *flags, '--cpu_devices=2')])
  lines = [_metrics(path).splitlines() for path in (tmp_path, alone)]
  for entry, expected in zip(*lines, strict=True):
    entry, expected = json.loads(entry), json.loads(expected)
    for own, reference in zip(
      entry['members'], expected['members'], strict=True
    ):
      assert own == pytest.approx(reference, abs=1e-5)


@pytest.mark.slow
def test_evaluation_by_two_processes_is_that_of_one(tmp_path, whole):
  run = whole / 'runs' / 'run'
  flags = (run, '--num_sequences=1000', '--batch_size=100')
  script = evaluate.__file__
  path = run / 'evaluations' / 'ptw_T8_step_3000.json'
  _finish([_start(tmp_path, script, *flags, '--cpu_devices=2')])
  expected = path.read_bytes()
  path.unlink()
  _finish(_start_all(tmp_path, 2, *flags, script=script))
  assert path.read_bytes() == expected


def _ends(started, timeout=60):
  """Exit status and last line of stderr of every process."""
  outputs = [process.communicate(timeout=timeout) for process in started]
  return [
    (process.returncode, stderr.strip().splitlines()[-1])
    for process, (_, stderr) in zip(started, outputs, strict=True)
  ]


@pytest.mark.slow
def test_process_that_does_not_come_is_not_waited_for_longer(tmp_path):
  for process_id in (0, 1):
    process = _start(
      tmp_path,
      SCRIPT,
      *FLAGS,
      '--distributed',
      f'--coordinator=127.0.0.1:{_free_port()}',
      '--num_processes=2',
      f'--process_id={process_id}',
      '--connect_timeout=3',
    )
    ((code, line),) = _ends([process], timeout=30)
    assert code == 1
    assert 'error: after 3 s this process has not met all of 2' in line


@pytest.mark.slow
@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (('--num_processes=3',), 'differ in num_processes (num_processes: 2 -> 3)'),
    (('--learning_rate=1',), 'differ in their flags (train.learning_rate: 0.0'),
    (('--output_dir=elsewhere',), 'all processes must share the folder'),
  ],
)
def test_processes_that_differ_are_told_so(tmp_path, flags, message):
  port = _free_port()
  address = ('--distributed', f'--coordinator=127.0.0.1:{port}')
  address = (*FLAGS, *address, '--num_processes=2')
  started = [
    _start(tmp_path, SCRIPT, *address, '--process_id=0'),
    _start(tmp_path, SCRIPT, *address, '--process_id=1', *flags),
  ]
  for code, line in _ends(started):
    assert code == 1
    assert message in line


@pytest.mark.slow
@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (('--batch_size=3',), 'batch_size 3 does not divide over the 2 devices'),
    (
      ('--num_seeds=3', '--set=train.num_seed_shards=3'),
      'num_seed_shards 3 does not divide the 2 devices',
    ),
  ],
)
def test_what_does_not_divide_is_refused_in_all(tmp_path, flags, message):
  for code, line in _ends(_start_all(tmp_path, 2, *FLAGS, *flags)):
    assert code == 1
    assert message in line
  assert not (tmp_path / 'runs').exists()


def test_processes_do_not_start_jax_to_find_out_that_they_are_alone():
  code = (
    'from nonstationary_mbml.runtime import multihost as m; '
    'assert m.is_primary() and not m.is_multiprocess(); '
    'from jax._src import xla_bridge; '
    'assert not xla_bridge.backends_are_initialized()'
  )
  subprocess.run([sys.executable, '-c', code], check=True, env=ENVIRONMENT)
  assert jax.process_count() == 1
