"""Sweeps as jobs of a cluster: submitit's local executor, and SLURM in small.

SLURM itself is not at hand; `slurm` has its commands, as far as they are used.
"""

import collections
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import pytest

from nonstationary_mbml.experiments import cli
from nonstationary_mbml.experiments.sweeps import executors
from nonstationary_mbml.experiments.sweeps import launch
from nonstationary_mbml.experiments.sweeps import presets
from nonstationary_mbml.experiments.sweeps import sweep_folder
from nonstationary_mbml.runtime import atomic_files
from tests.experiments.sweeps import slurm

SCRIPT = pathlib.Path(launch.__file__)
FLAGS = (
  '--sweep=tiny',
  '--output_dir=sweeps',
  '--num_sequences=200',
  '--jobs=2',
  '--set=schedule.training_steps=200',
  '--set=schedule.ckpt_frequency=20',
)


def _start(folder, *flags, environment=None):
  cache = SCRIPT.parents[2] / '.cache' / 'jax'
  return subprocess.Popen(
    [sys.executable, SCRIPT, *FLAGS, *flags],
    cwd=folder,
    env={
      **(environment or os.environ),
      'JAX_COMPILATION_CACHE_DIR': str(cache),
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def _finish(process):
  stdout, stderr = process.communicate(timeout=300)
  assert process.returncode == 0, stderr + stdout
  assert '6 points finished, 0 left, 0 failed' in stdout
  return stdout


def _points(folder):
  return folder / 'sweeps' / 'tiny' / 'points'


def _wait_for_a_log(folder, process, besides=()):
  """The name of a point that has begun to log."""
  while process.poll() is None:
    for path in _points(folder).glob('*/metrics.jsonl'):
      num_logs = path.read_text().count('\n')
      if 0 < num_logs < 3 and path.parent.name not in besides:
        return path.parent.name
    time.sleep(0.01)
  raise AssertionError(process.communicate())


def _starts(folder, name):
  path = _points(folder) / name / 'environment.json'
  return json.loads(path.read_text())['starts']


def _assert_whole(folder, training_steps=200):
  """Every point is there once, with all seeds."""
  rows = atomic_files.read_csv(folder / 'sweeps' / 'tiny' / 'results.csv')
  seeds = collections.defaultdict(list)
  for row in rows:
    seeds[row['data'], row['model']].append(row['seed'])
  assert len(seeds) == 6
  assert all(of_point == [0, 1] for of_point in seeds.values())
  for path in _points(folder).glob('*/metrics.jsonl'):
    steps = [json.loads(line)['step'] for line in path.open()]
    assert steps == list(range(50, training_steps + 1, 50))


@pytest.mark.slow
def test_sweep_completes_through_the_local_executor(tmp_path):
  process = _start(tmp_path, '--executor=local')
  first = _wait_for_a_log(tmp_path, process)
  process.terminate()
  _, stderr = process.communicate(timeout=120)
  assert process.returncode == cli.EXIT_STOPPED, stderr
  assert 'all runs are saved' in stderr
  # Nobody trains any more.
  folder = sweep_folder.SweepFolder(tmp_path / 'sweeps' / 'tiny')
  assert not folder.is_running(first)
  assert _starts(tmp_path, first)[0]['end'] == 'stopped by SIGTERM'
  _finish(_start(tmp_path, '--executor=local'))
  assert _starts(tmp_path, first)[1]['first_step'] > 0
  _assert_whole(tmp_path)


@pytest.mark.slow
def test_local_jobs_end_with_their_launcher_and_save(tmp_path):
  process = _start(
    tmp_path, '--executor=local', '--set=schedule.training_steps=20000'
  )
  first = _wait_for_a_log(tmp_path, process)
  process.kill()
  # Not yet `communicate`: the jobs hold its pipes.
  process.wait()
  folder = sweep_folder.SweepFolder(tmp_path / 'sweeps' / 'tiny')
  while folder.is_running(first):
    time.sleep(0.1)
  assert _starts(tmp_path, first)[0]['end'] == 'stopped by SIGUSR1'
  process.communicate(timeout=60)


@pytest.mark.slow
def test_job_array_outlives_its_launcher_and_requeues_what_is_preempted(
  tmp_path,
):
  state = tmp_path / 'slurm'
  environment = slurm.install(state)
  flags = (
    '--executor=slurm',
    '--cluster=timeout_min=30',
    '--cluster=slurm_partition=gpu',
    # Long enough to be preempted in the middle.
    '--set=schedule.training_steps=1000',
  )
  process = _start(tmp_path, *flags, environment=environment)
  first = _wait_for_a_log(tmp_path, process)
  process.send_signal(signal.SIGINT)
  _, stderr = process.communicate(timeout=60)
  assert process.returncode == cli.EXIT_STOPPED, stderr
  assert 'the jobs go on' in stderr
  jobs = atomic_files.read_json(tmp_path / 'sweeps' / 'tiny' / executors.JOBS)
  assert sorted(jobs.values()) == [f'100_{index}' for index in range(6)]

  # Without the flag, the same points would run twice.
  here = _start(tmp_path, flags[-1], environment=environment)
  _, stderr = here.communicate(timeout=60)
  assert 'SLURM has jobs of' in stderr and 'scancel 100' in stderr

  # The scheduler takes the node of another point.
  process = _start(tmp_path, *flags, environment=environment)
  second = _wait_for_a_log(tmp_path, process, besides=[first])
  preempt = ['scancel', jobs[second], '--signal', 'USR2']
  subprocess.run(preempt, env=environment, check=True)
  _finish(process)
  ends = [start['end'] for start in _starts(tmp_path, second)]
  assert ends == ['stopped by SIGUSR1', 'finished']
  assert _starts(tmp_path, second)[1]['first_step'] > 0
  assert [start['end'] for start in _starts(tmp_path, first)] == ['finished']
  _assert_whole(tmp_path, 1000)
  # One array of all points, two at a time; the second launcher only watched.
  (script,) = slurm.submitted(state)
  for line in ('--array=0-5%2', '--partition=gpu', '--time=30'):
    assert f'#SBATCH {line}\n' in script
  # Nothing is left to do, and nothing is submitted.
  _finish(_start(tmp_path, *flags, environment=environment))
  assert len(slurm.submitted(state)) == 1


@pytest.mark.slow
def test_point_that_fails_in_its_job_is_named_with_its_log(tmp_path):
  state = tmp_path / 'slurm'
  environment = slurm.install(state)
  flags = (
    '--executor=slurm',
    '--only=tiny,ptw,rnn',
    '--only=tiny,lin,rnn',
    '--set=train.learning_rate=1e38',
    '--set=train.clip_grad_norm=none',
  )
  process = _start(tmp_path, *flags, environment=environment)
  stdout, _ = process.communicate(timeout=300)
  assert process.returncode == 1
  for name in ('tiny,ptw,rnn', 'tiny,lin,rnn'):
    assert f'FAILED {name}: exit status 1; the end of' in stdout
  assert 'with train.learning_rate 1e+38' in stdout


@pytest.mark.slow
def test_refused_jobs_are_one_line_and_a_point_alone_is_a_job(tmp_path):
  environment = slurm.install(tmp_path / 'slurm')
  flags = ('--executor=slurm', '--only=tiny,ptw,rnn')
  process = _start(
    tmp_path,
    *flags,
    '--cluster=slurm_partition=nowhere',
    environment=environment,
  )
  _, stderr = process.communicate(timeout=60)
  assert process.returncode == 1
  assert 'error: the jobs were not submitted: ' in stderr.splitlines()[-1]
  assert 'invalid partition specified: nowhere' in stderr.splitlines()[-1]
  process = _start(tmp_path, *flags, environment=environment)
  stdout, stderr = process.communicate(timeout=300)
  assert process.returncode == 0, stderr
  assert '1 points finished' in stdout
  (script,) = slurm.submitted(tmp_path / 'slurm')
  assert '--array' not in script
  # It has ended, and is forgotten.
  assert not atomic_files.read_json(
    tmp_path / 'sweeps' / 'tiny' / executors.JOBS
  )


@pytest.mark.parametrize(
  ('state', 'has_ended'),
  [
    ('RUNNING', False),
    ('SUSPENDED', False),
    ('UNKNOWN', False),
    ('REQUEUE_HOLD', False),
    ('CANCELLED by 1000', True),
    ('TIMEOUT', True),
    ('OUT_OF_MEMORY', True),
  ],
)
def test_job_has_ended_when_slurm_will_not_bring_it_back(
  tmp_path, monkeypatch, state, has_ended
):
  asked_again = []
  job = types.SimpleNamespace(
    paths=types.SimpleNamespace(
      result_pickle=tmp_path / 'result.pkl', folder=tmp_path
    ),
    state=state,
    watcher=types.SimpleNamespace(clear=lambda: asked_again.append(state)),
  )
  folder = sweep_folder.SweepFolder(tmp_path)
  of_point = executors._ClusterJob('point', job, folder)
  assert of_point.is_done() == has_ended
  assert of_point.ended() is None
  # What it has left behind may be on its way, but not for ever.
  monkeypatch.setattr(executors, '_LATE_SECONDS', -1)
  how = f'the job has ended: {state}' if has_ended else None
  assert of_point.ended() == how
  assert bool(asked_again) == (state in ('SUSPENDED', 'REQUEUE_HOLD'))


def _sweep_folder(path):
  folder = sweep_folder.SweepFolder(path)
  points = presets.SWEEPS['tiny']().points()[:1]
  return folder, points


def test_job_that_is_told_to_end_lets_its_run_save(tmp_path, monkeypatch):
  """What submitit calls, in a signal handler, while the job waits."""
  script = tmp_path / 'run.py'
  script.write_text("""
import pathlib, signal, sys, time
def save(*args):
  pathlib.Path('saved').touch()
  sys.exit(75)
signal.signal(signal.SIGUSR1, save)
pathlib.Path('running').touch()
time.sleep(60)
""")
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(
    executors, 'command', lambda *args: [sys.executable, str(script)]
  )
  folder, points = _sweep_folder(tmp_path / 'sweep')
  name = points[0].config.name
  job = executors.PointJob(str(folder.path), name, ['--x'])
  told = []

  class RequeuedError(Exception):
    pass

  def on_signal(*args):
    told.append(job.checkpoint())
    assert (tmp_path / 'saved').exists()
    raise RequeuedError

  before = signal.signal(signal.SIGUSR2, on_signal)
  code = f"""
import os, pathlib, time
while not pathlib.Path('running').exists():
  time.sleep(0.01)
os.kill({os.getpid()}, {int(signal.SIGUSR2)})
"""
  with folder.open(points, 200):
    killer = subprocess.Popen([sys.executable, '-c', code])
    try:
      with pytest.raises(RequeuedError):
        job()
    finally:
      signal.signal(signal.SIGUSR2, before)
      killer.wait()
  (again,) = told
  assert vars(again.function) == {**vars(job), '_process': None}


@pytest.mark.parametrize(
  ('visible', 'limit', 'devices', 'fraction'),
  [
    ('0,1', 2, ['0', '1'], '0.900'),
    ('2,5', 4, ['2', '5', '2', '5'], '0.450'),
    # All of them for one run.
    ('0,1', 1, ['0,1'], '0.900'),
    ('', 2, ['', ''], '0.450'),
  ],
)
def test_runs_share_the_gpus(monkeypatch, visible, limit, devices, fraction):
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
  monkeypatch.delenv('XLA_PYTHON_CLIENT_MEM_FRACTION', raising=False)
  of_runs = [executors.environment(slot, limit) for slot in range(limit)]
  assert [run['CUDA_VISIBLE_DEVICES'] for run in of_runs] == devices
  assert of_runs[0]['XLA_PYTHON_CLIENT_MEM_FRACTION'] == fraction
  assert of_runs[0]['GLIBC_TUNABLES']


def test_runs_at_the_same_time_are_given_other_gpus(tmp_path, monkeypatch):
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '3,5')
  code = "import os; print('on', os.environ['CUDA_VISIBLE_DEVICES'])"
  monkeypatch.setattr(
    executors, 'command', lambda *args: [sys.executable, '-c', code]
  )
  folder = sweep_folder.SweepFolder(tmp_path)
  points = presets.SWEEPS['tiny']().points()[:2]
  names = [point.config.name for point in points]
  with folder.open(points, 16) as lock:
    launcher = executors.Here(folder, 2, (), lock.fileno())
    for run in launcher.start(names):
      assert run.process.wait() == 0
      run.process.stdin.close()
  assert [folder.last_lines(name, 1) for name in names] == ['on 3', 'on 5']


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    ({'executor': 'slum'}, "executor 'slum' is not one of here, local, slurm"),
    ({'executor': 'slurm'}, 'there is no srun here'),
    (
      {'executor': 'local', 'cluster': {'timeout_mins': 3}},
      '--cluster: .*timeout_mins',
    ),
    ({'cluster': {'mem_gb': 3}}, '--cluster is for --executor=slurm'),
    (
      {'executor': 'local', 'cluster': {'nodes': 2}},
      '--cluster nodes=2: a point is one process',
    ),
    (
      {'executor': 'local', 'cluster': {'slurm_ntasks_per_node': 8}},
      'slurm_ntasks_per_node=8: a point is one process',
    ),
    (
      {'executor': 'local', 'cluster': {'slurm_time': '1-0'}},
      'slurm_time: say timeout_min',
    ),
    (
      {'executor': 'local', 'cluster': {'mem_gb': '16G'}},
      '--cluster: .*mem_gb',
    ),
  ],
)
def test_wrong_executors_are_refused(tmp_path, monkeypatch, kwargs, message):
  monkeypatch.setenv('PATH', str(tmp_path))
  _, points = _sweep_folder(tmp_path)
  with pytest.raises(ValueError, match=message):
    launch.run_sweep(points, tmp_path / 'sweep', **kwargs)


def test_without_submitit_it_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'submitit', None)
  folder, _ = _sweep_folder(tmp_path)
  with pytest.raises(ValueError, match='pip install submitit'):
    executors.Cluster(folder, 'local', 1, {}, ())


def test_parameters_of_jobs_are_numbers_or_names():
  assert launch.parse_parameters(
    ['mem_gb=1.5', 'slurm_partition=gpu', 'gpus=2', 'slurm_comment=a=b']
  ) == {
    'mem_gb': 1.5,
    'slurm_partition': 'gpu',
    'gpus': 2,
    'slurm_comment': 'a=b',
  }
  with pytest.raises(ValueError, match="'mem_gb' is not name=value"):
    launch.parse_parameters(['mem_gb'])
