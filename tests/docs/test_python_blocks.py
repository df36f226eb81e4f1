"""Every Python block of the documents runs, as a reader would run it."""

import copy
import pathlib
import re
import shutil

import matplotlib.pyplot as plt
import pytest

from nonstationary_mbml import predictor_factories
from nonstationary_mbml import train
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments import evaluator
from nonstationary_mbml.experiments import local_launch
from nonstationary_mbml.runtime import checkpointing

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
_REGISTRIES = (
  constants.OPTIMAL_PREDICTORS,
  constants.TRAJECTORY_GENERATORS,
  predictor_factories.CORES,
  predictor_factories.PREDICTOR_FACTORIES,
)
# Trainings whose exact predictors no block reads.
_WITHOUT_TABLE = ('mgu', 'averages', 'three_symbols')
# Training steps of a block, and of the run that the documents load.
_FEW = 2
_STEP = 464


def _blocks(document):
  """Code of each block, with as many empty lines before it as in the page."""
  text = document.read_text()
  for match in re.finditer(r'```python\n(.*?)```', text, re.DOTALL):
    yield '\n' * text.count('\n', 0, match.start(1)) + match[1]


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """The run `lstm_ptw_seed0`, but small, as far as step 464."""
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
  before = [dict(registry) for registry in _REGISTRIES]
  yield
  for registry, entries in zip(_REGISTRIES, before, strict=True):
    registry.clear()
    registry.update(entries)


@pytest.fixture
def short_trainings(monkeypatch):
  """Cuts every training short; returns the list of their configs as given."""
  configs = []
  whole = train.train

  def short(config, *args, **kwargs):
    configs.append(config)
    config = copy.deepcopy(config)
    config.schedule.training_steps = _FEW
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
  for block in _blocks(document):
    exec(compile(block, str(document), 'exec'), names)
  for config in short_trainings:
    constants.check(config)


def test_run_that_the_documents_load_would_have_a_snapshot_of_that_step():
  config = local_launch.make_config()
  assert config.name == 'lstm_ptw_seed0'
  assert _STEP in checkpointing.snapshot_steps(config.schedule)
