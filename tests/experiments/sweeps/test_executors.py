"""Sweeps here and as jobs of SLURM.

SLURM itself is not at hand; `slurm` has its commands, as far as they are used.
"""

import itertools
import json
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import time
import types

import pytest
import submitit

from nonstationary_mbml.experiments import cli
from nonstationary_mbml.experiments.sweeps import executors
from nonstationary_mbml.experiments.sweeps import launch
from nonstationary_mbml.experiments.sweeps import presets
from nonstationary_mbml.experiments.sweeps import sweep_folder
from nonstationary_mbml.runtime import atomic_files
from nonstationary_mbml.runtime import preemption
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
  assert '3 points finished, 3 left, 0 failed' in stdout
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


@pytest.mark.slow
def test_job_array_outlives_its_launcher_and_requeues_what_is_preempted(
  tmp_path,
):
  state = tmp_path / 'slurm'
  environment = slurm.install(state)
  flags = (
    '--executor=slurm',
    '--only=tiny,ptw,*',
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
  assert sorted(jobs.values()) == [f'100_{index}' for index in range(3)]

  # The scheduler takes the node of another point.
  process = _start(tmp_path, *flags, environment=environment)
  second = _wait_for_a_log(tmp_path, process, besides=[first])
  preempt = ['scancel', jobs[second], '--signal', 'USR2']
  subprocess.run(preempt, env=environment, check=True)
  _finish(process)
  ends = [start['end'] for start in _starts(tmp_path, second)]
  assert ends == ['stopped by SIGUSR2', 'finished']
  assert _starts(tmp_path, second)[1]['first_step'] > 0
  assert [start['end'] for start in _starts(tmp_path, first)] == ['finished']
  # Every point is there once, with all seeds and steps.
  rows = atomic_files.read_csv(tmp_path / 'sweeps' / 'tiny' / 'results.csv')
  assert sorted((row['point'], row['seed']) for row in rows) == sorted(
    itertools.product(jobs, (0, 1))
  )
  for path in _points(tmp_path).glob('*/metrics.jsonl'):
    steps = [json.loads(line)['step'] for line in path.open()]
    assert steps == list(range(50, 1001, 50))
  # One array of all points, two at a time; the second launcher only watched.
  (script,) = slurm.submitted(state)
  for line in ('--array=0-2%2', '--partition=gpu', '--time=30'):
    assert f'#SBATCH {line}\n' in script
  assert 'export GLIBC_TUNABLES=' in script
  # They have ended, and are forgotten.
  jobs = atomic_files.read_json(tmp_path / 'sweeps' / 'tiny' / executors.JOBS)
  assert jobs == {}


@pytest.mark.slow
def test_jobs_that_are_refused_or_fail_are_named(tmp_path):
  environment = slurm.install(tmp_path / 'slurm')
  flags = (
    '--executor=slurm',
    '--only=tiny,ptw,rnn',
    '--set=train.learning_rate=1e38',
    '--set=train.clip_grad_norm=none',
  )
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
  stdout, _ = process.communicate(timeout=300)
  assert process.returncode == 1
  assert 'FAILED tiny,ptw,rnn: exit status 1; the end of' in stdout
  assert 'with train.learning_rate 1e+38' in stdout
  # A point alone is no array.
  (script,) = slurm.submitted(tmp_path / 'slurm')
  assert '--array' not in script


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
  of_point = executors._SlurmJob(job)
  assert of_point.is_over() == has_ended
  assert of_point.ended(lambda: False) is None
  # What it has left behind may be on its way, but not for ever.
  monkeypatch.setattr(executors, '_LATE_SECONDS', -1)
  reason = f'the job has ended: {state}' if has_ended else None
  assert of_point.ended(lambda: False) == reason
  assert bool(asked_again) == (state in ('SUSPENDED', 'REQUEUE_HOLD'))


@pytest.fixture
def point(tmp_path):
  """A folder of a sweep with one point, and a job that runs it."""
  folder = sweep_folder.SweepFolder(tmp_path / 'sweep')
  points = presets.tiny().points()[:1]
  with folder.open(points, 16):
    pass
  name = points[0].config.name
  folder.run_path(name).mkdir()
  return folder, name, executors.PointJob(str(folder.path), name, ['--x'])


def _finish_point(folder, name):
  row = {'predictor': 'lstm', 'cumulative_regret': 1.0}
  atomic_files.write_json(
    folder.run_path(name) / sweep_folder.TABLE, {'table': [row]}
  )


def test_job_that_an_older_version_submitted_runs_its_point(point, monkeypatch):
  folder, name, _ = point
  older = object.__new__(executors.PointJob)  # As a pickle is read.
  vars(older).update(_folder=str(folder.path), _name=name, _flags=('--x',))

  def run(arguments):
    assert arguments[-1] == '--x'
    _finish_point(folder, name)
    sys.exit(0)

  monkeypatch.setattr(executors, '_run_inside', run)
  older()
  assert folder.is_finished(name)


def test_job_runs_its_point_inside_itself(point, monkeypatch):
  folder, name, job = point

  def run(arguments):
    assert f'--config={folder.config_path(name)}' in arguments
    assert arguments[-1] == '--x'
    os.write(1, b'printed by XLA\n')
    _finish_point(folder, name)
    sys.exit(0)

  monkeypatch.setattr(executors, '_run_inside', run)
  job()
  assert folder.last_lines(name, 1) == 'printed by XLA'
  # What is finished, by whatever process, is not run again.
  monkeypatch.setattr(executors, '_run_inside', None)
  job()


class RequeuedError(Exception):
  """Raised by the tests' handlers, in place of submitit's."""


@pytest.mark.parametrize('number', [signal.SIGUSR2, signal.SIGTERM])
def test_job_that_is_told_to_end_saves_and_is_queued_again(
  point, monkeypatch, number
):
  folder, name, job = point
  submitted, waits = [], []

  def train(arguments):
    with preemption.catch() as interrupts:
      signal.raise_signal(number)
      # The handler of submitit has to wait until the state is saved.
      assert not submitted
      start = {'end': f'stopped by {interrupts.received.name}'}
    atomic_files.write_json(
      folder.run_path(name) / 'environment.json', {'starts': [start]}
    )
    sys.exit(cli.EXIT_STOPPED)

  def on_signal(*args):
    submitted.append(job.checkpoint())
    raise RequeuedError

  monkeypatch.setattr(executors, '_run_inside', train)
  monkeypatch.setattr(executors.time, 'sleep', waits.append)
  before = signal.signal(signal.SIGUSR2, on_signal)
  try:
    with pytest.raises(RequeuedError):
      job()
  finally:
    signal.signal(signal.SIGUSR2, before)
  # A job that is cancelled is not queued again: it ends while it waits.
  assert waits == [60.0] * (number == signal.SIGTERM)
  (delayed,) = submitted
  again = pickle.loads(pickle.dumps(delayed.function))
  assert not again._is_requeued
  assert vars(again) | {'_is_requeued': True} == vars(job)


def test_job_that_is_told_to_end_before_it_trains_ends_at_once(
  point, monkeypatch
):
  _, _, job = point

  def start(arguments):
    # As submitit's handler does.
    job.checkpoint()
    sys.exit(-1)

  monkeypatch.setattr(executors, '_run_inside', start)
  with pytest.raises(SystemExit):
    job()


@pytest.mark.parametrize(
  ('code', 'reason'),
  [
    (1, 'exit status 1'),
    (cli.EXIT_CANNOT_SAVE, executors.CANNOT_SAVE),
    ('error: no such flag', 'exit status 1'),
    (0, 'it has left no table'),
  ],
)
def test_job_that_fails_says_why(point, monkeypatch, capsys, code, reason):
  _, _, job = point
  monkeypatch.setattr(executors, '_run_inside', lambda args: sys.exit(code))
  with pytest.raises(RuntimeError, match=f'^{reason}$'):
    job()
  # To stderr, as a process would that ends so.
  assert isinstance(code, int) or capsys.readouterr().err == f'{code}\n'


def test_job_whose_point_another_process_has_says_so(point, monkeypatch):
  folder, name, job = point
  monkeypatch.setattr(executors, '_run_inside', lambda args: sys.exit(1))
  with atomic_files.locked(folder.run_path(name) / '.lock', 0):
    with pytest.raises(RuntimeError, match=executors.LOCKED):
      job()


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
  monkeypatch.setattr(executors, 'run_arguments', lambda *args: ['-c', code])
  folder = sweep_folder.SweepFolder(tmp_path)
  points = presets.tiny().points()[:2]
  names = [point.config.name for point in points]
  with folder.open(points, 16) as lock:
    launcher = executors.LocalLauncher(folder, 2, (), lock.fileno())
    launcher.start(names)
    ended = {}
    while len(ended) < 2:
      ended |= launcher.ended()
      time.sleep(0.01)
  assert ended == dict.fromkeys(names, 'exit status 0')
  assert [folder.last_lines(name, 1) for name in names] == ['on 3', 'on 5']


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    ({'executor': 'slum'}, "executor 'slum' is not one of here, slurm"),
    ({'executor': 'local'}, "executor 'local' is not one of here, slurm"),
    ({'executor': 'slurm'}, 'there is no srun here'),
    ({'cluster': {'mem_gb': 3}}, '--cluster is for --executor=slurm'),
  ],
)
def test_wrong_executors_are_refused(tmp_path, monkeypatch, kwargs, message):
  monkeypatch.setenv('PATH', str(tmp_path))
  points = presets.tiny().points()[:1]
  with pytest.raises(ValueError, match=message):
    launch.run_sweep(points, tmp_path / 'sweep', **kwargs)


@pytest.fixture
def with_slurm(tmp_path, monkeypatch):
  monkeypatch.setenv('PATH', slurm.install(tmp_path / 'slurm')['PATH'])


@pytest.mark.parametrize(
  ('parameters', 'message'),
  [
    ({'timeout_mins': 30}, '--cluster: .*timeout_mins'),
    ({'nodes': 2}, '--cluster nodes=2: a point is one process'),
    ({'slurm_ntasks_per_node': 8}, 'slurm_ntasks_per_node=8: a point is one'),
    ({'slurm_time': '1-0'}, 'slurm_time: say timeout_min'),
    ({'mem_gb': '16G'}, '--cluster: .*mem_gb'),
    ({'slurm_setup': 'module load cuda'}, '--cluster: .*list'),
    ({'timeout_min': 9}, 'timeout_min=9: it must be at least 10, 5 times the'),
    ({'slurm_timeout_min': 9}, 'timeout_min=9: it must be at least 10'),
    (
      {'timeout_min': 30, 'slurm_signal_delay_s': 600},
      'timeout_min=30: it must be at least 50, 5 times the 600 s',
    ),
  ],
)
def test_wrong_parameters_of_jobs_are_refused(
  tmp_path, with_slurm, parameters, message
):
  folder = sweep_folder.SweepFolder(tmp_path)
  with pytest.raises(ValueError, match=message) as error:
    executors.SlurmLauncher(folder, 1, parameters, ())
  assert '\n' not in str(error.value)
  assert not slurm.submitted(tmp_path / 'slurm')


def test_parameters_of_jobs_that_are_not_given_have_defaults(
  tmp_path, with_slurm
):
  launcher = executors.SlurmLauncher(
    sweep_folder.SweepFolder(tmp_path / 'tiny'),
    None,
    {'timeout_min': None, 'slurm_setup': ['module load cuda']},
    (),
  )
  parameters = launcher._executor.parameters
  assert parameters['job_name'] == 'tiny'
  assert parameters['time'] == 24 * 60
  assert parameters['signal_delay_s'] == 120
  assert parameters['array_parallelism'] == sys.maxsize
  assert parameters['setup'][-1] == 'module load cuda'


def test_jobs_that_slurm_still_has_are_watched_and_then_forgotten(
  tmp_path, with_slurm, monkeypatch, capsys
):
  monkeypatch.setattr(executors, '_LATE_SECONDS', -1)
  folder = sweep_folder.SweepFolder(tmp_path)
  states = {'a': 'RUNNING', 'b': 'CANCELLED by 7', 'c': 'PENDING'}
  note = {}
  for index, (name, state) in enumerate(states.items()):
    note[name] = f'7_{index}'
    (tmp_path / 'slurm' / f'7_{index}.state').write_text(state)
  note['d'] = '8'  # SLURM has not heard of it.
  atomic_files.write_json(tmp_path / executors.JOBS, note)
  (tmp_path / executors.SUBMITIT).mkdir()
  launcher = executors.SlurmLauncher(folder, None, {}, ())
  assert launcher.resume(['a', 'b', 'd', 'e']) == ['a', 'd']
  assert 'SLURM does not know job 8 of d (yet)' in capsys.readouterr().err
  assert launcher.ended() == {}
  (tmp_path / 'slurm' / '7_0.state').write_text('OUT_OF_MEMORY')
  submitit.SlurmJob.watcher.clear()
  assert launcher.ended() == {'a': 'the job has ended: OUT_OF_MEMORY'}
  assert launcher.ended() == {}
  left = atomic_files.read_json(tmp_path / executors.JOBS)
  assert sorted(left) == ['b', 'c', 'd']


def test_without_submitit_it_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'submitit', None)
  folder = sweep_folder.SweepFolder(tmp_path)
  with pytest.raises(ValueError, match='pip install submitit'):
    executors.SlurmLauncher(folder, 1, {}, ())


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
