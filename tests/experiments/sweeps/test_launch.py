"""Sweeps end as they should, whatever happens while they run.

A run takes seconds to start: where what it does is tested elsewhere, another
script stands in for it.
"""

import contextlib
import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

from absl import flags
import numpy as np
import pytest

from nonstationary_mbml.experiments import cli
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments.sweeps import executors
from nonstationary_mbml.experiments.sweeps import launch
from nonstationary_mbml.experiments.sweeps import presets
from nonstationary_mbml.experiments.sweeps import sweep_folder
from nonstationary_mbml.runtime import atomic_files

SCRIPT = pathlib.Path(launch.__file__)
CACHE = SCRIPT.parents[2] / '.cache' / 'jax'
FLAGS = (
  '--sweep=tiny',
  '--output_dir=sweeps',
  '--jobs=2',
  '--num_sequences=200',
  '--set=schedule.training_steps=200',
  '--set=schedule.ckpt_frequency=20',
)
# One more than run at a time.
POINTS = ('tiny,ptw,rnn', 'tiny,ptw,lstm', 'tiny,ptw,stack_rnn')


@pytest.fixture(autouse=True)
def _use_cache(monkeypatch):
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(CACHE))


def _start(folder):
  return subprocess.Popen(
    [sys.executable, SCRIPT, *FLAGS, '--only=tiny,ptw,*'],
    cwd=folder,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def _points(folder):
  return folder / 'sweeps' / 'tiny' / 'points'


def _wait_until(condition, process):
  while process.poll() is None and not condition():
    time.sleep(0.01)
  assert process.poll() is None, process.communicate()


def _starts(folder):
  """How every start of every point has ended."""
  return {
    path.parent.name: [
      start['end'] for start in json.loads(path.read_text())['starts']
    ]
    for path in _points(folder).glob('*/environment.json')
  }


def test_sweep_that_is_killed_twice_has_every_point_once(tmp_path):
  # Killed while the first points train. By its first log a run has checkpoints.
  process = _start(tmp_path)
  logs = lambda: [
    path
    for path in _points(tmp_path).glob('*/metrics.jsonl')
    if path.stat().st_size
  ]
  _wait_until(logs, process)
  process.send_signal(signal.SIGKILL)
  killed = [path.with_name('environment.json') for path in logs()]
  process.communicate()

  # Stopped once a point is finished.
  process = _start(tmp_path)
  _wait_until(
    lambda: any(_points(tmp_path).glob('*/table.json')),
    process,
  )
  finished = {
    path: path.stat().st_mtime_ns
    for path in _points(tmp_path).glob('*/table.json')
  }
  process.send_signal(signal.SIGTERM)
  _, stderr = process.communicate()
  assert process.returncode == cli.EXIT_STOPPED, stderr
  assert 'the same command goes on' in stderr
  assert 'killed' not in str([ends[-1] for ends in _starts(tmp_path).values()])

  process = _start(tmp_path)
  stdout, stderr = process.communicate()
  assert process.returncode == 0, stderr
  assert '3 points finished, 3 left, 0 failed' in stdout
  for path, modified in finished.items():
    assert path.stat().st_mtime_ns == modified

  # What was killed went on from where it was.
  assert killed
  for path in killed:
    _, second, *_ = json.loads(path.read_text())['starts']
    assert second['first_step'] > 0
  # All of them, with all seeds, and every step once.
  ends = _starts(tmp_path)
  assert sorted(ends) == sorted(POINTS)
  assert {of_point[-1] for of_point in ends.values()} == {'finished'}
  rows = atomic_files.read_csv(tmp_path / 'sweeps' / 'tiny' / 'results.csv')
  assert sorted((row['point'], row['seed']) for row in rows) == sorted(
    itertools.product(POINTS, (0, 1))
  )
  steps = [
    json.loads(line)['step']
    for path in _points(tmp_path).glob('*/metrics.jsonl')
    for line in path.read_text().splitlines()
  ]
  assert sorted(steps) == sorted(3 * [50, 100, 150, 200])
  summary = atomic_files.read_csv(tmp_path / 'sweeps' / 'tiny' / 'summary.csv')
  for row in summary:
    values = [
      r['regret']
      for r in rows
      if (r['data'], r['model']) == (row['data'], row['model'])
    ]
    assert row['num_seeds'] == 2
    assert row['regret'] == pytest.approx(np.mean(values))
    assert row['regret_stderr'] == pytest.approx(abs(values[0] - values[1]) / 2)


def _tiny_points(number, **overrides):
  points = presets.tiny().points()[:number]
  common = {
    'schedule.training_steps': 4,
    'schedule.num_saves': 0,
    'train.model_init_seed': 0,
  }
  return [
    point._replace(
      config=config_lib.with_overrides(point.config, common | overrides)
    )
    for point in points
  ]


def test_sweep_is_the_same_when_configs_get_new_fields(tmp_path):
  """Those have their defaults in what an older version has written."""
  folder = sweep_folder.SweepFolder(tmp_path)
  with folder.open(_tiny_points(2), 16):
    pass
  digest = folder.digest()
  manifest = atomic_files.read_json(tmp_path / sweep_folder.MANIFEST)
  for point in manifest['points']:
    assert point['config']['train'].pop('num_seed_shards') is None
  atomic_files.write_json(tmp_path / sweep_folder.MANIFEST, manifest)
  assert folder.digest() == digest
  manifest['points'][0]['config']['train']['num_seed_shards'] = 2
  atomic_files.write_json(tmp_path / sweep_folder.MANIFEST, manifest)
  assert folder.digest() != digest


def test_sweep_is_the_same_when_its_code_has_moved(tmp_path):
  folder = sweep_folder.SweepFolder(tmp_path)
  with folder.open(_tiny_points(2, imports=('/old/things.py',)), 16):
    pass
  digest = folder.digest()
  with folder.open(_tiny_points(2, imports=('/new/things.py',)), 16):
    pass
  assert folder.digest() == digest
  assert folder.points()[0].config.imports == ('/new/things.py',)


def _row(predictor, **values):
  return {
    'predictor': predictor,
    'cumulative_regret': 1.0,
    'stderr': 0.1,
    'above_optimum': 0.0,
    'above_optimum_stderr': 0.0,
    'is_optimum': False,
    **values,
  }


# Of a source without an exact predictor.
_TABLE = {'table': [_row('lstm'), _row('LAD', is_optimum=True, is_exact=False)]}


def _stand_in(monkeypatch, code, names=()):
  """Lets runs of all points, but for some, execute Python code instead."""
  run_arguments = executors.run_arguments

  def stand_in(folder, name, flags_of_runs):
    if name in names:
      return run_arguments(folder, name, flags_of_runs)
    return ['-c', code, folder.run_path(name)]

  monkeypatch.setattr(executors, 'run_arguments', stand_in)


_FINISH = f"""
import pathlib, sys
folder = pathlib.Path(sys.argv[1])
folder.mkdir(exist_ok=True)
(folder / 'table.json').write_text({json.dumps(_TABLE)!r})
"""


def test_points_that_fail_are_named_and_leave_the_others_alone(
  tmp_path, monkeypatch
):
  points = _tiny_points(5)
  broken, diverges, no_log, no_config, good = (p.config for p in points)
  broken.model.architecture_kwargs['hidden_size'] = -1
  diverges.train.learning_rate = 1e30
  folder = sweep_folder.SweepFolder(tmp_path)
  with folder.open(points, 16):
    pass
  folder.log_path(no_log.name).mkdir()
  folder.config_path(no_config.name).mkdir()
  (tmp_path / 'results.csv').mkdir()
  _stand_in(monkeypatch, _FINISH, names=[diverges.name])
  outcome = launch.run_sweep(points, tmp_path, 2, num_sequences=16)
  assert outcome.finished == [good.name] and outcome.left == []
  assert set(outcome.failed) == {
    config.name for config in (broken, diverges, no_log, no_config)
  }
  assert 'hidden_size is -1' in outcome.failed[broken.name]
  assert 'with train.learning_rate 1e+30' in outcome.failed[diverges.name]
  assert 'Is a directory' in outcome.failed[no_log.name]
  assert 'its config cannot be written' in outcome.failed[no_config.name]
  assert 'Is a directory' in outcome.cannot_save
  report = launch.format_outcome(tmp_path, outcome)
  assert '1 points finished, 0 left, 4 failed' in report
  # What failed comes last, with its log.
  *_, last = report.split('\n\n')
  assert last.startswith(f'FAILED {diverges.name}: exit status 1; ')
  assert f'{diverges.name}.txt' in last
  (tmp_path / 'results.csv').rmdir()
  again = launch.run_sweep(points, tmp_path, 1, 16, [good.name])
  assert again.cannot_save is None
  (row,) = atomic_files.read_csv(tmp_path / 'results.csv')
  assert row['point'] == good.name
  assert row['exact'] == 'LAD (best reference)'


def test_point_that_another_process_runs_is_waited_for(tmp_path, monkeypatch):
  """It is neither started again, nor failed."""
  points = _tiny_points(2)
  folder = sweep_folder.SweepFolder(tmp_path)
  elsewhere, fails_elsewhere = (point.config.name for point in points)
  with folder.open(points, 16):
    pass
  _stand_in(monkeypatch, _FINISH)
  started = []

  class Launcher(executors.LocalLauncher):
    def start(self, names):
      started.extend(names)
      super().start(names)

    def ended(self):
      # The runs elsewhere end, the first one with its table.
      if len(held) == 2:
        path = folder.run_path(elsewhere) / 'table.json'
        path.write_text(json.dumps(_TABLE))
        held.pop(elsewhere).close()
      elif held:
        held.pop(fails_elsewhere).close()
      return super().ended()

  monkeypatch.setattr(executors, 'LocalLauncher', Launcher)
  held = {}
  for name in (elsewhere, fails_elsewhere):
    path = folder.run_path(name)
    path.mkdir()
    held[name] = stack = contextlib.ExitStack()
    stack.enter_context(atomic_files.locked(path / '.lock', 0))
  outcome = launch.run_sweep(points, tmp_path, num_sequences=16)
  assert started == [fails_elsewhere]
  assert sorted(outcome.finished) == sorted([elsewhere, fails_elsewhere])
  assert outcome.failed == {}


def test_run_that_finds_its_point_taken_has_not_failed(tmp_path, monkeypatch):
  points = _tiny_points(1)
  folder = sweep_folder.SweepFolder(tmp_path)
  path = folder.run_path(points[0].config.name)
  _stand_in(monkeypatch, 'exit(1)')
  elsewhere, reasons = contextlib.ExitStack(), []

  class Launcher(executors.LocalLauncher):
    def start(self, names):
      path.mkdir()
      elsewhere.enter_context(atomic_files.locked(path / '.lock', 0))
      super().start(names)

    def ended(self):
      if reasons:
        (path / 'table.json').write_text(json.dumps(_TABLE))
        elsewhere.close()
      ended = super().ended()
      reasons.extend(ended.values())
      return ended

  monkeypatch.setattr(executors, 'LocalLauncher', Launcher)
  with elsewhere:
    outcome = launch.run_sweep(points, tmp_path, num_sequences=16)
  assert reasons == [executors.LOCKED]
  assert outcome.finished and not outcome.failed


def test_full_disk_stops_the_sweep(tmp_path, monkeypatch):
  points = _tiny_points(3)
  _stand_in(monkeypatch, f'exit({cli.EXIT_CANNOT_SAVE})')
  outcome = launch.run_sweep(points, tmp_path, num_sequences=16)
  assert outcome.failed == {} and len(outcome.left) == 3
  assert len(os.listdir(tmp_path / 'logs')) == 1  # No other was started.
  assert f'{points[0].config.name} could not be written' in outcome.cannot_save
  report = launch.format_outcome(tmp_path, outcome)
  assert 'What is finished is kept' in report


def test_names_that_lead_out_of_the_sweep_are_refused(tmp_path):
  folder = sweep_folder.SweepFolder(tmp_path / 'sweep')
  (point,) = _tiny_points(1)
  point.config.name = '../../elsewhere'
  with pytest.raises(ValueError, match='point is .*elsewhere.* not a path'):
    with folder.open([point], 16):
      pass
  assert not folder.path.exists()
  folder.path.mkdir()
  manifest = {'points': [{'settings': {}, 'config': {'name': '..'}}]}
  atomic_files.write_json(folder.path / 'sweep.json', manifest)
  with pytest.raises(ValueError, match="sweep.json: config.name is '..'"):
    folder.points()


def test_folder_of_another_sweep_is_refused(tmp_path):
  folder = sweep_folder.SweepFolder(tmp_path)
  points = presets.tiny().points()
  with folder.open(points[:3], 16):
    pass
  # More points of the same sweep are welcome.
  with folder.open(points, 16):
    pass
  assert len(folder.points()) == 6
  with pytest.raises(ValueError, match='num_sequences: 16 -> 17'):
    with folder.open(points, 17):
      pass
  with pytest.raises(ValueError, match='cpu_devices: 1 -> 2'):
    with folder.open(points, 16, cpu_devices=2):
      pass
  with pytest.raises(ValueError, match='tiny,ptw,rnn is not one of this sweep'):
    with folder.open(presets.small().points(), 16):
      pass
  with pytest.raises(ValueError, match='training_steps: 300 -> 4'):
    with folder.open(_tiny_points(6), 16):
      pass
  assert [point.config for point in folder.points()] == [
    point.config for point in points
  ]


def test_sweep_that_was_cut_off_as_it_began_goes_on(tmp_path):
  folder = sweep_folder.SweepFolder(tmp_path)
  (tmp_path / 'configs').mkdir()
  (tmp_path / 'configs' / '.tiny.json.abc').write_text('torn')
  with folder.open(presets.tiny().points(), 16):
    pass
  assert len(folder.points()) == 6


def test_sweep_from_before_a_field_was_there_goes_on(tmp_path):
  folder = sweep_folder.SweepFolder(tmp_path)
  points = presets.tiny().points()
  with folder.open(points, 16):
    pass
  manifest = atomic_files.read_json(tmp_path / 'sweep.json')
  for point in manifest['points']:
    del point['config']['train']['microbatch_size']
  atomic_files.write_json(tmp_path / 'sweep.json', manifest)
  with folder.open(points, 16):
    pass


def test_only_one_process_at_a_time_runs_a_sweep(tmp_path, monkeypatch):
  monkeypatch.setattr(sweep_folder, '_LOCK_SECONDS', 0.2)
  folder = sweep_folder.SweepFolder(tmp_path)
  points = presets.tiny().points()
  with folder.open(points, 16):
    with pytest.raises(ValueError, match='held by another process'):
      with folder.open(points, 16):
        pass


def _result(point, seed, regret, **settings):
  return {
    'point': point,
    **settings,
    'seed': seed,
    'steps': 4,
    'seconds': 1.0,
    'regret': regret,
    'regret_stderr': 0.1,
    'exact': 'PTW',
    'exact_regret': 2.0,
    'above_exact': regret - 2.0,
    'above_exact_stderr': 0.1,
  }


def test_summary_is_over_seeds_however_they_were_swept():
  rows = [
    _result('a,0', 0, 3.0, model='lstm', **{'train.model_init_seed': 0}),
    _result('a,1', 1, 5.0, model='lstm', **{'train.model_init_seed': 1}),
    _result('b', 0, 2.5, model='rnn', **{'train.learning_rate': 0.1}),
  ]
  lstm, rnn = sweep_folder.summarise(rows)
  assert (lstm['model'], lstm['num_seeds'], lstm['regret']) == ('lstm', 2, 4.0)
  assert lstm['above_exact_percent'] == 100.0
  assert lstm['above_exact_stderr'] == pytest.approx(1.0)
  assert rnn['above_exact_stderr'] is None
  # Settings that only some points have.
  head, first, second = launch.format_summary([lstm, rnn]).splitlines()
  assert head.split()[:3] == ['model', 'train.learning_rate', 'seeds']
  assert first.split()[:2] == ['lstm', '2']
  assert second.split()[:3] == ['rnn', '0.1', '1']


def test_table_that_is_damaged_is_of_a_point_that_is_not_finished(tmp_path):
  folder = sweep_folder.SweepFolder(tmp_path)
  with folder.open(presets.tiny().points(), 16):
    pass
  for text in ('{"table": [', '{}', '{"table": [{}]}'):
    path = folder.run_path('tiny,ptw,rnn') / 'table.json'
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    assert not folder.is_finished('tiny,ptw,rnn')
  assert folder.results() == []


def test_folder_of_a_run_is_no_folder_of_a_sweep(tmp_path):
  (tmp_path / 'config.json').write_text('{}')
  with pytest.raises(ValueError, match='holds something else, and no sweep'):
    launch.run_sweep(presets.tiny().points(), tmp_path)


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--sweep=smal', "mean 'small'"),
    ('--jobs=0', '--jobs=0'),
    ('--executor=local', "--executor 'local' is not one of here, slurm"),
    ('--only=*,lim,*', 'is the name of no point'),
    ('--set=train.lr=1', "'lr' is not one of"),
    ('--set=model.model_type=rnn', 'the sweep itself sets model'),
    ('--set=data.trajectory_generator=lin', 'the sweep itself sets data'),
    ('--set=name=mine', 'the sweep itself sets name'),
  ],
)
def test_wrong_flags_are_named(flag, message):
  values = flags.FlagValues()
  launch.define_flags(values)
  with pytest.raises((ValueError, flags.Error), match=re.escape(message)):
    values(['sweeps/launch.py', '--sweep=tiny', flag])
    launch.points_from_flags(values)


def _main(monkeypatch, folder, *arguments):
  """Runs the script inside this process."""
  values = flags.FlagValues()
  launch.define_flags(values)
  monkeypatch.setattr(launch.flags, 'FLAGS', values)
  monkeypatch.chdir(folder)
  launch.main(values(['sweeps/launch.py', *FLAGS, *arguments]))


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--output_dir=/dev/null/x', 'cannot write to /dev/null/x'),
    ('--name=..', "--name is '..'; it must be the name of one folder"),
  ],
)
def test_folder_that_cannot_be_is_a_one_line_error(
  tmp_path, monkeypatch, capsys, flag, message
):
  with pytest.raises(SystemExit) as end:
    _main(monkeypatch, tmp_path, flag)
  assert end.value.code == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert message in line
  assert not os.listdir(tmp_path)


def test_list_tells_where_points_stand_and_runs_nothing(
  tmp_path, monkeypatch, capsys
):
  _main(monkeypatch, tmp_path, '--list', '--only=*,lin,*')
  assert capsys.readouterr().out.splitlines() == [
    f'tiny,lin,{name}: waiting' for name in ('rnn', 'lstm', 'stack_rnn')
  ]
  assert not os.listdir(tmp_path)
