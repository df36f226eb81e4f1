"""Things that a file of the user's own registers go everywhere by their names.

The file below has one class or function for each, and its line in the registry.
"""

import json
import types

from absl import flags
import matplotlib.pyplot as plt
import numpy as np
import pytest

from nonstationary_mbml import predictor_factories
from nonstationary_mbml.experiments import cli
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments import evaluate
from nonstationary_mbml.experiments import local_launch
from nonstationary_mbml.experiments import plotting
from nonstationary_mbml.experiments import saved_runs
from nonstationary_mbml.experiments.analysis import regret_curves
from nonstationary_mbml.experiments.analysis import study_figures
from nonstationary_mbml.experiments.sweeps import launch
from nonstationary_mbml.experiments.sweeps import presets

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
_REGISTRIES = (
  constants.OPTIMAL_PREDICTORS,
  constants.TRAJECTORY_GENERATORS,
  predictor_factories.PREDICTOR_FACTORIES,
  presets.SWEEPS,
)
NUM_SEQUENCES = 8
LABELS = ['bag', 'run-length mixture', 'KT', 'last symbol']


@pytest.fixture(scope='module')
def file(tmp_path_factory):
  """The file; what it registers is taken out again."""
  path = tmp_path_factory.mktemp('own') / 'things.py'
  path.write_text(FILE)
  before = [dict(registry) for registry in _REGISTRIES]
  yield path
  for registry, entries in zip(_REGISTRIES, before, strict=True):
    registry.clear()
    registry.update(entries)


def _config(file, *items):
  values = flags.FlagValues()
  local_launch.define_flags(values)
  values(
    [
      'local_launch.py',
      # The flags that use a name may come before the one that registers it.
      '--source=geometric',
      '--model_type=bag',
      f'--register={file}',
      '--steps=2',
      '--seq_length=8',
      '--batch_size=4',
      '--set=model.architecture_kwargs.width=4',
      "--set=eval.optimal_predictors=('exact', 'kt', 'last')",
      '--set=eval.optimal_predictors_kwargs.last.weight=2.0',
      '--set=eval.batch_size=4',
      *(f'--set={item}' for item in items),
    ]
  )
  return local_launch.config_from_flags(values)


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


def test_sweep_of_the_file_hands_the_file_to_its_runs(
  file, monkeypatch, tmp_path
):
  monkeypatch.chdir(file.parent)
  values = flags.FlagValues()
  launch.define_flags(values)
  values(['launch.py', '--sweep=two_sources', f'--register={file.name}'])
  points, _ = launch.points_from_flags(values)
  for point in points:
    constants.check(point.config)
  assert points[1].config.data.trajectory_generator == 'geometric'
  monkeypatch.chdir(tmp_path)
  assert cli.flags_of_runs(values) == [f'--register={file}']
