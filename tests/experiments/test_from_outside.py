"""Things that a user's own modules register go everywhere by their names.

The file below has one class or function for each, and its line in the registry.
The folder is that of docs/extending.md.
"""

import json
import pathlib
import types

from absl import flags
import matplotlib.pyplot as plt
import numpy as np
import pytest

from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments import evaluate
from nonstationary_mbml.experiments import local_launch
from nonstationary_mbml.experiments import plotting
from nonstationary_mbml.experiments import saved_runs
from nonstationary_mbml.experiments.analysis import regret_curves
from nonstationary_mbml.experiments.analysis import report
from nonstationary_mbml.experiments.analysis import studies
from nonstationary_mbml.experiments.analysis import study_figures
from nonstationary_mbml.experiments.analysis import trained_networks
from nonstationary_mbml.experiments.sweeps import launch
from nonstationary_mbml.experiments.sweeps import sweep_folder
from nonstationary_mbml.runtime import atomic_files
from tests import registries
from tests.docs import test_python_blocks

FILE = """
import typing

import haiku as hk
import jax
import jax.numpy as jnp
from nonstationary_mbml import predictor_factories
from nonstationary_mbml import predictors
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments import run_length_predictors
from nonstationary_mbml.experiments import trajectory_generators
from nonstationary_mbml.experiments.sweeps import presets


class Geometric(trajectory_generators.TrajectoryGenerator):
  default_kwargs = {'switch_probability': 0.25}

  def __init__(self, *args, switch_probability, **kwargs):
    super().__init__(*args, **kwargs)
    self.switch_probability = switch_probability

  def _switch_points_one(self, rng, seq_length):
    switches = jax.random.bernoulli(rng, self.switch_probability, (seq_length,))
    return switches & (jnp.arange(seq_length) > 0)

  def _bayes_predictor(self, seq_length, concentration):
    return run_length_predictors.RunLengthPredictor(
      self.switch_probability, concentration
    )


def make_bag(output_size, architecture_kwargs):
  width = architecture_kwargs['width']

  def model(inputs):
    counts = jnp.cumsum(inputs, axis=1)
    return hk.nets.MLP([width, output_size])(counts)

  return predictors.InContextPredictor(model)


class LastState(typing.NamedTuple):
  counts: jax.Array


class LastPredictor(predictors.OptimalPredictor):
  label = 'last symbol'
  state_class = LastState

  def __init__(self, weight=1.0, **kwargs):
    super().__init__(**kwargs)
    self.weight = weight

  def empty_state(self, batch_size, alphabet_size):
    return LastState(jnp.zeros((batch_size, alphabet_size)))

  def update(self, symbols, state):
    return LastState(self.weight * symbols)

  def output_from_state(self, state):
    prior = self.prior(state.counts.shape[-1], state.counts.dtype)
    return jnp.log(predictors.kt_probs(state.counts, prior))


def two_sources():
  own = {
    'trajectory_generator': 'geometric',
    'trajectory_generator_kwargs': Geometric.default_kwargs,
  }
  return config_lib.ExperimentSweep(
    general_sweep={'data': {'ptw': {'trajectory_generator': 'ptw'}, 'own': own}}
  )


constants.TRAJECTORY_GENERATORS['geometric'] = Geometric
predictor_factories.PREDICTOR_FACTORIES['bag'] = make_bag
constants.OPTIMAL_PREDICTORS['last'] = LastPredictor
presets.SWEEPS['two_sources'] = two_sources
"""
NUM_SEQUENCES = 8
LABELS = ['bag', 'run-length mixture', 'KT', 'last symbol']


@pytest.fixture(scope='module')
def file(tmp_path_factory):
  """The file; what it registers is taken out again."""
  path = tmp_path_factory.mktemp('own') / 'things.py'
  path.write_text(FILE)
  with registries.restored():
    yield path


def _flags(script, *given):
  values = flags.FlagValues()
  script.define_flags(values)
  values([script.__name__, *given])
  return values


def _config(file, *items):
  return local_launch.config_from_flags(
    _flags(
      local_launch,
      # The flags that use a name may come before the one that registers it.
      '--source=geometric',
      '--model_type=bag',
      f'--import={file}',
      '--steps=2',
      '--seq_length=8',
      '--batch_size=4',
      '--set=model.architecture_kwargs.width=4',
      "--set=eval.optimal_predictors=('exact', 'kt', 'last')",
      '--set=eval.optimal_predictors_kwargs.last.weight=2.0',
      '--set=eval.batch_size=4',
      *(f'--set={item}' for item in items),
    )
  )


@pytest.fixture(scope='module')
def trained(file, tmp_path_factory):
  """A run of the launch script: its folder, and what its figure shows."""
  config = _config(file)
  folder = tmp_path_factory.mktemp('runs') / config.name
  figures = []
  sequence_figure = local_launch.sequence_figure

  def spy(*args):
    figures.append(sequence_figure(*args))
    return figures[0]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(local_launch, 'sequence_figure', spy)
    local_launch.run(config, folder, NUM_SEQUENCES)
  return types.SimpleNamespace(folder=folder, figure=figures[0])


@pytest.fixture(scope='module')
def run(trained):
  return saved_runs.load_run(trained.folder)


def _legend(figure):
  return [
    text.get_text() for legend in figure.legends for text in legend.get_texts()
  ]


def test_flags_name_things_of_the_file(file):
  config = _config(file)
  assert config.name == 'bag_geometric_seed0'
  assert config.imports == (str(file),)
  assert config.data.trajectory_generator_kwargs == {'switch_probability': 0.25}
  assert config.eval.optimal_predictors_kwargs == {'last': {'weight': 2.0}}


@pytest.mark.parametrize(
  ('item', 'message'),
  [
    ('data.trajectory_generator_kwargs.switch=1', "'switch_probability'"),
    ('model.architecture_kwargs={}', "architecture_kwargs: 'width' is missing"),
    ('eval.optimal_predictors_kwargs.last.wait=1', "mean 'weight'"),
  ],
)
def test_wrong_arguments_of_the_things_are_found_before_a_run(
  file, item, message
):
  with pytest.raises(ValueError, match=message):
    _config(file, item)


def test_table_measures_from_the_exact_predictor_of_the_source(trained):
  content = json.loads((trained.folder / 'table.json').read_text())
  assert [row['predictor'] for row in content['table']] == LABELS
  assert [row['is_exact'] for row in content['table']] == [0, 1, 0, 0]
  assert content['exact_predictor'] == 'exact'


def test_saved_run_is_loaded_and_evaluated_as_it_was(trained):
  config = evaluate.make_config(saved_runs.load_config(trained.folder))
  content = evaluate.evaluate(trained.folder, config, (None,), NUM_SEQUENCES)
  written = json.loads((trained.folder / 'table.json').read_text())['table']
  (by_step,) = content['steps']
  assert by_step['step'] == 2
  for row, before in zip(by_step['table'], written, strict=True):
    assert row['predictor'] == before['predictor']
    np.testing.assert_allclose(
      row['cumulative_regret'], before['cumulative_regret'], rtol=1e-5
    )


def test_figure_of_the_launch_script_shows_them(trained):
  legend = _legend(trained.figure)
  assert [label for label in legend if label in LABELS] == [
    'bag',
    'run-length mixture',
    'last symbol',
  ]


def test_figure_of_a_sequence_leaves_out_kt_unless_it_is_exact():
  names = dict.fromkeys(('network', 'kt', 'last'))
  assert list(constants.in_figures(names, None)) == ['network', 'last']
  assert list(constants.in_figures(names, 'kt')) == list(names)


def test_regrets_over_time_are_measured_and_drawn(run):
  regrets = regret_curves.over_time(run, NUM_SEQUENCES)
  assert list(regrets) == LABELS
  figure = plotting.plot_regret_over_time(regrets)
  assert set(LABELS) <= set(_legend(figure))
  plt.close('all')


def test_source_is_one_of_those_that_any_run_is_tested_on(run):
  assert next(iter(regret_curves.default_sources(run))) == 'geometric'
  run.config.data.trajectory_generator = 'ptw'
  run.config.data.trajectory_generator_kwargs = {}
  source = regret_curves.default_sources(run)['geometric']
  assert source.trajectory_generator_kwargs == {'switch_probability': 0.25}


def test_looks_of_labels_that_no_table_has_differ_and_come_last():
  own = [plotting.style(label) for label in ('bag', 'last symbol')]
  assert len(set(own)) == 2
  assert plotting.rank('bag') > plotting.rank('LSTM')
  assert study_figures.label('bag') == 'bag'
  assert study_figures.exact_label('geometric') == 'run-length mixture'


def test_sweep_of_the_file_has_its_runs_import_the_file(file, monkeypatch):
  monkeypatch.chdir(file.parent)
  points, _ = launch.points_from_flags(
    _flags(launch, '--sweep=two_sources', f'--import={file.name}')
  )
  for point in points:
    constants.check(point.config)
    assert point.config.imports == (str(file),)
  assert points[1].config.data.trajectory_generator == 'geometric'


def test_flags_name_things_that_the_run_to_start_from_imports(
  trained, tmp_path
):
  config = f'--config={trained.folder}'
  imports = saved_runs.load_config(trained.folder, imports=()).imports
  kept = local_launch.config_from_flags(
    _flags(local_launch, config, '--source=geometric', '--name=again')
  )
  assert kept.imports == imports
  for wrong in ('--source=geometrik', '--model_type=bags'):
    with pytest.raises(ValueError, match='is not one of .*; did you mean'):
      local_launch.config_from_flags(_flags(local_launch, config, wrong))
  other = tmp_path / 'other.py'
  other.touch()
  given = local_launch.config_from_flags(
    _flags(local_launch, config, f'--import={other}')
  )
  assert given.imports == (str(other),)


POINTS = [
  f'two_by_two,{source},{network}'
  for source in ('ptw', 'geometric')
  for network in ('lstm', 'averages')
]
NOTEBOOK = (
  """
from nonstationary_mbml.experiments import plotting
from nonstationary_mbml.experiments import saved_runs
from nonstationary_mbml.experiments.analysis import regret_curves
""",
  """
run = saved_runs.load_run(folder)
regrets = regret_curves.over_time(run, 8)
""",
  """
figure = plotting.plot_regret_over_time(regrets)
figure.savefig('regret.png')
""",
)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A folder outside of the repository with the package of the documents."""
  folder = tmp_path_factory.mktemp('outside')
  document = test_python_blocks.ROOT / 'docs' / 'extending.md'
  for language, block in test_python_blocks.blocks(document):
    if language == 'python':
      test_python_blocks.write_file(folder, block)
  # Nothing but the package.
  for path in folder.glob('*.py'):
    path.unlink()
  return folder


@pytest.fixture(scope='module')
def sweep(folder):
  """Its sweep, run by a process that knows the package from the flag alone.

  One point is run as the launch script does it, the others, for their time,
  in this process.
  """
  with pytest.MonkeyPatch.context() as patch, registries.restored():
    patch.chdir(folder)
    cache = test_python_blocks.ROOT / '.cache' / 'jax'
    patch.setenv('JAX_COMPILATION_CACHE_DIR', str(cache))
    values = _flags(
      launch,
      '--import=my_package',
      '--sweep=two_by_two',
      '--set=train.model_init_seed=0',
      '--set=train.seq_length=8',
      '--set=train.batch_size=4',
      '--set=schedule.training_steps=2',
      '--set=schedule.num_saves=1',
      '--set=eval.batch_size=8',
      '--set=eval.optimal_predictors=exact,',
    )
    points, _ = launch.points_from_flags(values)
    path = pathlib.Path('runs', 'sweeps', 'two_by_two')
    sweep = sweep_folder.SweepFolder(path)
    outcome = launch.run_sweep(points, path, num_sequences=8, only=[POINTS[-1]])
    assert outcome.finished == [POINTS[-1]], outcome
    for point in points[:-1]:
      name = point.config.name
      local_launch.run(point.config, sweep.run_path(name), num_sequences=8)
    sweep.write_results()
    # Others see nothing of what this process knows.
    sweep.path = folder / path
  return sweep


@pytest.fixture
def afresh(folder, monkeypatch):
  """A process in the folder that has not imported the package."""
  monkeypatch.chdir(folder)
  with registries.restored():
    yield
  plt.close('all')


def test_sweep_of_a_folder_has_its_four_points(sweep):
  assert [point.name for point in sweep.finished()] == POINTS
  exact = {row['data']: row['exact'] for row in sweep.results()}
  assert exact == {'ptw': 'PTW', 'geometric': 'run-length mixture'}
  for point in sweep.points():
    assert point.config.imports == ('my_package',)
    assert point.config.train.optimizer == 'sign_momentum'


def test_report_imports_the_folder_and_measures_all_points(
  sweep, afresh, tmp_path, capsys
):
  networks = trained_networks.networks(sweep.path)
  assert 'importing my_package, which ' in capsys.readouterr().err
  report.measure(
    networks,
    ['on_distribution', 'off_distribution'],
    tmp_path,
    studies.Options(num_sequences=8, seed=0),
    command='',
  )
  report.draw(tmp_path)
  rows = atomic_files.read_csv(tmp_path / 'off_distribution.csv')
  cells = {(row['trained_on'], row['predictor']) for row in rows}
  assert {tuple(name.split(',')[1:]) for name in POINTS} <= cells
  assert ('geometric', 'exact') in cells
  assert {path.name for path in tmp_path.glob('*.png')} == {
    'on_distribution.png',
    'off_distribution.png',
    'resemblance_lstm.png',
  }


def test_notebook_loads_a_run_and_draws_it(sweep, afresh, capsys):
  names = {'folder': sweep.run_path('two_by_two,geometric,averages')}
  for cell in NOTEBOOK:
    exec(cell, names)
  assert 'importing my_package, which ' in capsys.readouterr().err
  assert list(names['regrets'])[:2] == ['averages', 'run-length mixture']
  assert pathlib.Path('regret.png').exists()


def test_evaluation_on_a_source_of_the_folder(sweep, afresh):
  """Of a run that was trained on another one, and imports it."""
  run_path = sweep.run_path('two_by_two,ptw,lstm')
  config = evaluate.make_config(saved_runs.load_config(run_path), 'geometric')
  content = evaluate.evaluate(run_path, config, (None,), 8)
  labels = [row['predictor'] for row in content['steps'][0]['table']]
  assert 'run-length mixture' in labels
  with pytest.raises(
    ValueError, match="trajectory_generator 'geometrik' is no"
  ):
    evaluate.make_config(config, 'geometrik')


def test_folder_that_is_not_there_is_named_with_its_run(
  sweep, afresh, monkeypatch, tmp_path
):
  monkeypatch.chdir(tmp_path)
  path = sweep.run_path(POINTS[0])
  with pytest.raises(ValueError, match=f'^{path}.*: my_package cannot be'):
    saved_runs.load_run(path)
  config = saved_runs.load_config(path, imports=())
  assert config.imports == ('my_package',)
