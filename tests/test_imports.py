"""Imports point one way, and work from everywhere."""

import ast
import dataclasses
import pathlib
import re
import subprocess
import sys

import pytest

from nonstationary_mbml import base_config
from nonstationary_mbml.experiments import config as config_lib

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = 'nonstationary_mbml'
# Every module may import from the groups before its own, and inside its group
# from the modules before itself.
ORDER = (
  ('base_config',),
  (
    'models.backend',
    'models.recurrent',
    'models.basic',
    'models.stack_rnn',
    'models.positional_encodings',
    'models.attention',
    'models.transformer',
  ),
  ('predictors',),
  ('predictor_factories', 'base_constants', 'losses', 'optimizers'),
  (
    'runtime.devices',
    'runtime.sharding',
    'runtime.multihost',
    'runtime.statistics',
    'runtime.trained_run',
    'runtime.atomic_files',
    'runtime.preemption',
    'runtime.progress',
    'runtime.tensorboard',
    'runtime.checkpointing',
    'runtime.run_folder',
    'runtime.saved_params',
  ),
  ('train_state', 'train'),
  (
    'experiments.user_modules',
    'experiments.cli',
    'experiments.distributions',
    'experiments.hazards',
    'experiments.ptw_predictors',
    'experiments.scaled',
    'experiments.pruned_run_lengths',
    'experiments.run_length_predictors',
    'experiments.live_and_die_predictors',
    'experiments.forget_me_not_predictors',
    'experiments.mixture_predictors',
    'experiments.trajectory_generators',
    'experiments.constants',
    'experiments.config',
    'experiments.evaluator',
    'experiments.saved_runs',
    'experiments.plotting',
    'experiments.regret_table',
    'experiments.evaluate',
    'experiments.local_launch',
    'experiments.export_run',
    'experiments.symbol_files',
    'experiments.code_length',
  ),
  (
    'experiments.sweeps.presets',
    'experiments.sweeps.sweep_folder',
    'experiments.sweeps.executors',
    'experiments.sweeps.launch',
  ),
  (
    'experiments.analysis.regret_curves',
    'experiments.analysis.redundancy_bounds',
    'experiments.analysis.switch_posteriors',
    'experiments.analysis.trained_networks',
    'experiments.analysis.linear_probe',
    'experiments.analysis.studies',
    'experiments.analysis.study_figures',
    'experiments.analysis.study_tables',
    'experiments.analysis.bayes_table',
    'experiments.analysis.recipes',
    'experiments.analysis.source_posteriors',
    'experiments.analysis.report',
  ),
)
MODULES = [module for group in ORDER for module in group]


def _path(module):
  return ROOT / (module.replace('.', '/') + '.py')


def _imported(path):
  """Names of the project's modules that a file imports."""
  modules = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      modules |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'{path} has a relative import'
      modules |= {f'{node.module}.{alias.name}' for alias in node.names}
      modules.add(node.module)
  prefix = f'{PACKAGE}.'
  return {
    name.removeprefix(prefix) for name in modules if name.startswith(prefix)
  }


def _sources():
  paths = list(ROOT.glob('*.py'))
  for folder in ('models', 'runtime', 'experiments'):
    paths += (ROOT / folder).rglob('*.py')
  return [path for path in paths if path.name != '__init__.py']


def test_every_module_has_its_place_in_the_order():
  found = {
    '.'.join(path.relative_to(ROOT).with_suffix('').parts)
    for path in _sources()
  }
  assert found == set(MODULES)


@pytest.mark.parametrize('module', MODULES)
def test_module_imports_only_what_comes_before_it(module):
  packages = {
    'models',
    'runtime',
    'experiments',
    'experiments.sweeps',
    'experiments.analysis',
  }
  allowed = set(MODULES[: MODULES.index(module)]) | packages
  assert _imported(_path(module)) <= allowed


@pytest.mark.parametrize(
  'module', [m for m in MODULES if not m.startswith('experiments.')]
)
def test_top_level_and_runtime_import_nothing_from_experiments(module):
  assert not any('experiments' in name for name in _imported(_path(module)))


@pytest.mark.parametrize('module', MODULES)
def test_module_has_no_global_random_state_and_no_assert(module):
  tree = ast.parse(_path(module).read_text())
  assert not any(isinstance(node, ast.Assert) for node in ast.walk(tree))
  text = _path(module).read_text()
  assert not re.search(r'\b(np|numpy)\.random\b|^import random', text, re.M)


def test_package_imports_from_any_directory(tmp_path):
  code = f'from {PACKAGE}.experiments import ptw_predictors as p; print(p)'
  result = subprocess.run(
    [sys.executable, '-c', code],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=True,
  )
  assert str(ROOT / 'experiments' / 'ptw_predictors.py') in result.stdout


@pytest.mark.parametrize(
  'config_class',
  [
    base_config.TrainConfig,
    base_config.ModelConfig,
    base_config.ScheduleConfig,
    base_config.LoggerConfig,
    config_lib.EvalConfig,
    config_lib.DataConfig,
    config_lib.ExperimentConfig,
    config_lib.ExperimentSweep,
  ],
)
def test_every_config_field_is_read(config_class):
  """Somewhere outside of its own definition and validation."""
  attributes = set()
  for path in _sources():
    for function in ast.walk(ast.parse(path.read_text())):
      if isinstance(function, ast.FunctionDef) and function.name != 'validate':
        attributes |= {
          node.attr
          for node in ast.walk(function)
          if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
        }
  fields = {field.name for field in dataclasses.fields(config_class)}
  assert fields <= attributes


def test_figures_are_drawn_from_arrays_alone():
  assert _imported(_path('experiments.plotting')) == {'base_config'}
