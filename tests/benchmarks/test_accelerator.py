"""The command for accelerators, on a CPU and at tiny sizes."""

import importlib.util
import json
import pathlib
import sys
import time

from absl import flags
import numpy as np
import pytest

from nonstationary_mbml import predictor_factories
from nonstationary_mbml.experiments import local_launch

_SCRIPT = pathlib.Path(__file__).parents[2] / 'benchmarks' / 'accelerator.py'


@pytest.fixture
def accelerator(benchmarks, monkeypatch):
  # By its path: a checkout may have the same name.
  spec = importlib.util.spec_from_file_location('_accelerator', _SCRIPT)
  module = importlib.util.module_from_spec(spec)
  monkeypatch.setitem(sys.modules, spec.name, module)
  spec.loader.exec_module(module)
  return module


def _quick(accelerator, only=''):
  return accelerator.Setting(platform='cpu', only=only, quick=True)


def _rows(output):
  return [json.loads(line) for line in output.splitlines()]


def test_sections_are_measured_in_processes_and_written(accelerator, tmp_path):
  path = tmp_path / 'results.json'
  setting = _quick(accelerator, '^peak: highest|^agreement: KT')
  accelerator.measure(setting, path, budget_s=100)
  results = json.loads(path.read_text())
  assert results['complete'] and results['notes'] == []
  peak, agreement = results['rows']
  assert peak['section'] == 'peak' and peak['value'] > 0
  assert agreement['agrees'] and agreement['difference'] == 0
  assert agreement['number'] == setting.sizes.compared_batch
  assert '| KT | 0.0e+00 | 1e-05 | yes |' in accelerator.markdown(results)


def test_row_of_steps_has_speed_and_its_share_of_the_peak(
  accelerator, monkeypatch
):
  row = accelerator.sections.steps_tasks(accelerator.sections.QUICK)[
    'LSTM-128, 2 seeds, highest'
  ]()
  assert row['sequences_per_second'] == pytest.approx(
    2 * 4 * row['steps_per_second']
  )
  assert np.isfinite(row['first_loss'])

  name = 'LSTM-128, 2 seeds, highest'
  report = accelerator.Report(None, {})
  report.add('peak', {'name': 'highest', 'value': 2.0, 'unit': 'TFLOP/s'})
  monkeypatch.setattr(
    accelerator, 'rows_of', lambda *args, **kwargs: [{'name': name, **row}]
  )
  setting = _quick(accelerator, name)
  accelerator.run_steps(setting, report, 'steps', time.time())
  assert report.results['rows'][1]['share_of_peak'] == pytest.approx(
    row['flops_per_second'] / 2e12
  )


def test_row_that_fails_says_why_and_the_next_one_follows(
  accelerator, monkeypatch, capsys
):
  def fail():
    raise RuntimeError('RESOURCE_EXHAUSTED')

  tasks = {'large': fail, 'small': lambda: {'value': 1.0}}
  monkeypatch.setitem(accelerator.sections.TASKS, 'steps', lambda sizes: tasks)
  accelerator.child(
    accelerator.Order(
      section='steps', only='', quick=True, deadline=time.time() + 100
    )
  )
  _, large, small = _rows(capsys.readouterr().out)
  assert large['error'] == 'RuntimeError: RESOURCE_EXHAUSTED'
  assert small['value'] == 1.0


def test_rows_are_left_out_once_the_time_is_over(accelerator, capsys):
  accelerator.child(
    accelerator.Order(
      section='agreement', only=': KT', quick=True, deadline=time.time() - 1
    )
  )
  _, row = _rows(capsys.readouterr().out)
  assert row['error'] == 'left out: no time was left'


def test_processes_share_the_rows(accelerator, capsys):
  found = []
  for shard in range(3):
    accelerator.child(
      accelerator.Order(
        section='predictors', only='', quick=True, deadline=0, shard=(shard, 3)
      )
    )
    found += _rows(capsys.readouterr().out)[1:]
  names = [row['name'] for row in found]
  assert sorted(names) == sorted(_quick(accelerator).names('predictors'))


def test_process_that_dies_leaves_a_note(accelerator):
  report = accelerator.Report(None, {})
  setting = _quick(accelerator)
  rows = accelerator.rows_of(
    setting, 'cpu', report, section='nothing', deadline=time.time()
  )
  assert list(rows) == []
  assert 'nothing on cpu ended with 1' in report.results['notes'][0]


@pytest.mark.parametrize(
  ('ours', 'agrees'),
  [([0.5, 0.25], True), ([0.5, 0.2522], False), ([0.5, np.nan], False)],
)
def test_agreement_is_that_of_all_numbers(accelerator, ours, agrees):
  sides = {
    side: {'values': values, 'tolerance': 1e-3, 'seconds': 1.0}
    for side, values in (('accelerator', ours), ('cpu', [0.5005, 0.25]))
  }
  assert accelerator.compared('LSTM', sides)['agrees'] is agrees


def test_side_that_is_missing_is_named(accelerator):
  sides = {'accelerator': {'values': [0.0], 'seconds': 1.0}}
  row = accelerator.compared('LSTM', sides)
  assert row['error'] == 'cpu: it did not get that far'


def test_failures_are_rows_with_errors_and_without_agreement(accelerator):
  rows = [
    {'section': 'agreement', 'name': 'RNN', 'difference': 0.1, 'agrees': False},
    {'section': 'agreement', 'name': 'GRU', 'difference': 0.0, 'agrees': True},
    {'section': 'steps', 'name': 'LSTM', 'error': 'no\nmemory'},
    {'section': 'steps', 'name': 'CNN', 'value': 1.0},
  ]
  assert accelerator.failures({'rows': rows}) == [
    'agreement: RNN: differs by 1.0e-01',
    'steps: LSTM: no memory',
  ]


def test_every_network_is_compared(accelerator):
  import project
  import sections

  jobs = sections.compared_networks(sections.Sizes())
  assert {job.model_type for job in jobs.values()} == set(
    predictor_factories.PREDICTOR_FACTORIES
  )
  for job in jobs.values():
    predictor_factories.build_predictor(project.make_config(job).model, 2)


def test_launch_script_takes_the_flags(accelerator, tmp_path):
  for sizes in (accelerator.sections.Sizes(), accelerator.sections.QUICK):
    for command in accelerator.script_commands(tmp_path, sizes).values():
      if command[0] == 'local_launch.py':
        values = flags.FlagValues()
        local_launch.define_flags(values)
        assert values(command) == [command[0]]
        local_launch.config_from_flags(values)
