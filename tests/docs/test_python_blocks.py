"""Every Python block of the documents runs, as a reader would run it.

A block that begins with `# name.py` is a file of the reader's own; commands
with `--import=name.py` are run as well, but small.
"""

import copy
import importlib
import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

from absl import flags
import matplotlib.pyplot as plt
import pytest

from nonstationary_mbml import train
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments import evaluator
from nonstationary_mbml.experiments import local_launch
from nonstationary_mbml.experiments.sweeps import launch
from nonstationary_mbml.experiments.sweeps import sweep_folder
from nonstationary_mbml.runtime import checkpointing
from tests import registries as registries_lib

ROOT = pathlib.Path(__file__).parent.parent.parent
DOCUMENTS = [
  path
  for path in (
    ROOT / 'README.md',
    ROOT / 'results' / 'README.md',
    *sorted((ROOT / 'docs').glob('*.md')),
  )
  # What coming_from_the_release.md computes has a test of its own.
  if '```python\n' in path.read_text()
  and path.name != 'coming_from_the_release.md'
]
# Trainings whose exact predictors no block reads.
_WITHOUT_TABLE = (
  'averages_ptw_seed0',
  'lstm_host_seed0',
  'mgu',
  'recipe',
  'signs',
  'three_symbols',
)
# Training steps of a block, and of the run that the documents load.
_FEW = 2
_STEP = 753


def blocks(document):
  """Language and code of each block, after the empty lines of the page."""
  text = document.read_text()
  for match in re.finditer(r'```(python|sh)\n(.*?)```', text, re.DOTALL):
    yield match[1], '\n' * text.count('\n', 0, match.start(2)) + match[2]


def write_file(folder, block):
  """Writes the file that a block is; returns its name, or None if it is none.

  A package has what was written before.
  """
  file = re.match(r'# ([\w/]+\.py)\n', block.lstrip())
  if file is None:
    return None
  path = folder / file[1]
  if path.parent != folder:
    path.parent.mkdir()
    for present in folder.glob('*.py'):
      shutil.copyfile(present, path.parent / present.name)
  path.write_text(block)
  return file[1]


def _commands(block):
  """Arguments of the commands that use a file of the reader's own."""
  for line in block.replace('\\\n', ' ').splitlines():
    if '--import' in line:
      yield shlex.split(line)[1:]


def _run_commands(block):
  """Runs these commands; of the launch script, the first one trains."""
  has_trained = False
  for path, *arguments in _commands(block):
    script = '.'.join(pathlib.PurePath(path).with_suffix('').parts)
    values = flags.FlagValues()
    importlib.import_module(f'nonstationary_mbml.{script}').define_flags(values)
    sizes = ('train.seq_length=8', 'train.batch_size=4', 'eval.batch_size=8')
    values([path, *arguments, *(f'--set={size}' for size in sizes)])
    if path.endswith('/sweeps/launch.py'):
      _run_first_point(values)
      continue
    config = local_launch.config_from_flags(values)
    if not has_trained:
      train.train(
        config, constants.build_data_generator, evaluator.build_evaluator
      )
    has_trained = True


def _run_first_point(values):
  points, _ = launch.points_from_flags(values)
  folder = sweep_folder.SweepFolder(
    pathlib.Path(values.output_dir) / values.sweep
  )
  with folder.open(points, num_sequences=8):
    config = points[0].config
    local_launch.run(config, folder.run_path(config.name), num_sequences=8)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """The run `lstm_ptw_seed0`, but small, as far as step 753."""
  config = local_launch.make_config(
    steps=_STEP, batch_size=4, name='lstm_ptw_seed0'
  )
  config.model.architecture_kwargs = {'hidden_size': 4}
  config.eval.batch_size = 64
  config.schedule.num_saves = 1
  config.logger.log_frequency = _STEP
  folder = tmp_path_factory.mktemp('runs') / config.name
  train.train(
    config_lib.post_process_config(config),
    constants.build_data_generator,
    evaluator.build_evaluator,
    folder=folder,
  )
  return folder


@pytest.fixture
def folder(run, tmp_path, monkeypatch):
  """A working directory with what the documents say is there."""
  shutil.copytree(run, tmp_path / 'runs' / run.name)
  shutil.copytree(
    ROOT / 'results' / 'models' / 'lstm_ptw',
    tmp_path / 'results' / 'models' / 'lstm_ptw',
  )
  monkeypatch.chdir(tmp_path)
  yield
  plt.close('all')


@pytest.fixture
def registries():
  """Takes out again what a block has registered."""
  with registries_lib.restored():
    yield


@pytest.fixture
def short_trainings(monkeypatch):
  """Cuts every training short; returns the list of their configs as given."""
  configs = []
  whole = train.train

  def short(config, *args, **kwargs):
    configs.append(config)
    config = copy.deepcopy(config)
    config.schedule.training_steps = _FEW
    config.train.warmup_steps = min(config.train.warmup_steps or 0, _FEW)
    config.train.batch_size = 4
    config.eval.batch_size = 8
    if config.name in _WITHOUT_TABLE:
      config.eval.optimal_predictors = ()
      config.eval.optimal_predictors_kwargs = {}
    return whole(config, *args, **kwargs)

  monkeypatch.setattr(train, 'train', short)
  return configs


@pytest.mark.parametrize(
  'document', DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)
def test_python_blocks_of_a_document_run_one_after_another(
  document, folder, registries, short_trainings
):
  names = {'__name__': 'block'}  # Not a script: none is started.
  for language, block in blocks(document):
    if language == 'sh':
      _run_commands(block)
    elif not write_file(pathlib.Path.cwd(), block):
      exec(compile(block, str(document), 'exec'), names)
  for config in short_trainings:
    constants.check(config)


# In a process of its own: in that of the tests, JAX has started.
_CHECK_CONFIGS = """
import json, sys
from absl import flags
import jax
from nonstationary_mbml.experiments import local_launch
for command in json.loads(sys.argv[1]):
  values = flags.FlagValues()
  local_launch.define_flags(values)
  values(command)
  local_launch.config_from_flags(values)
jax.config.update('jax_num_cpu_devices', 3)  # Fails if JAX has started.
"""


def test_files_of_the_readers_own_are_used_and_do_not_start_jax(tmp_path):
  files, commands = [], []
  for language, block in blocks(ROOT / 'docs' / 'extending.md'):
    if language == 'sh':
      commands += _commands(block)
    else:
      files.append(write_file(tmp_path, block))
  files = [file for file in files if file is not None]
  assert files[-2:] == ['two_by_two.py', 'my_package/__init__.py']
  given = {*files[:-2], 'my_package'}
  assert {f'--import={name}' for name in given} <= set(sum(commands, []))
  launches = [c for c in commands if c[0].endswith('local_launch.py')]
  subprocess.run(
    [sys.executable, '-c', _CHECK_CONFIGS, json.dumps(launches)],
    cwd=tmp_path,
    check=True,
  )


def test_run_that_the_documents_load_would_have_a_snapshot_of_that_step():
  config = local_launch.make_config()
  assert config.name == 'lstm_ptw_seed0'
  assert _STEP in checkpointing.snapshot_steps(config.schedule)
