import jax
import numpy as np
import pytest

from nonstationary_mbml import base_config
from nonstationary_mbml import predictors
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments import evaluator as evaluator_lib
from nonstationary_mbml.experiments import saved_runs
from nonstationary_mbml.experiments.analysis import regret_curves
from nonstationary_mbml.runtime import trained_run


def _run(optimal_predictors=('ptw',), **kwargs):
  """A run whose network is KT, with PTW beside it."""
  config = config_lib.ExperimentConfig(
    eval=config_lib.EvalConfig(
      batch_size=4, seq_length=6, optimal_predictors=optimal_predictors
    ),
    **kwargs,
  )
  network = predictors.OptimalCategoricalPredictor()
  return trained_run.Run(
    config=config, predictor=network, all_params={}, step=0
  )


@pytest.fixture
def evaluators(monkeypatch):
  """The evaluators that were made, in order; each is compiled once."""
  made = []
  evaluator_of = saved_runs.evaluator_of
  monkeypatch.setattr(
    saved_runs,
    'evaluator_of',
    lambda *args, **kwargs: (
      made.append(evaluator_of(*args, **kwargs)) or made[-1]
    ),
  )
  return made


def test_curves_over_time_are_those_of_the_seed_with_the_network_first(
  evaluators,
):
  curves = regret_curves.over_time(_run(), num_sequences=5, seed=3)
  assert list(curves) == ['LSTM', 'PTW']
  (evaluator,) = evaluators
  expected = evaluator.regrets_over_time({}, jax.random.key(3), 5)
  np.testing.assert_array_equal(curves['LSTM'], expected['network'])
  np.testing.assert_array_equal(curves['PTW'], expected['ptw'])


def test_curves_by_length_are_those_of_an_evaluation_at_every_length(
  evaluators,
):
  curves = regret_curves.by_length(_run(), (6, 3), num_sequences=5, seed=3)
  assert list(curves['LSTM']) == [3, 6]
  for evaluator in evaluators:
    expected = evaluator.evaluate({}, jax.random.key(3), 5)
    np.testing.assert_array_equal(
      curves['LSTM'][evaluator.seq_length], expected['network']
    )


def test_lengths_are_around_that_of_training(monkeypatch):
  evaluated = []

  def evaluator_of(run, seq_length):
    evaluated.append(seq_length)
    raise StopIteration

  monkeypatch.setattr(saved_runs, 'evaluator_of', evaluator_of)
  with pytest.raises(StopIteration):
    regret_curves.by_length(_run())
  assert evaluated == [8]


def test_length_without_a_prediction_is_refused():
  with pytest.raises(ValueError, match='lengths is 1; it must be an int >= 2'):
    regret_curves.by_length(_run(), (1, 4))


def test_curves_by_source_are_beside_the_exact_predictors_of_each():
  run = _run(('exact', 'ptw', 'kt'))
  source = config_lib.DataConfig(
    trajectory_generator='regular_shift',
    trajectory_generator_kwargs={'shift_period': 2},
  )
  curves = regret_curves.by_source(
    run, {'every second': source}, num_sequences=5, seed=3
  )
  assert list(curves) == ['every second']
  assert list(curves['every second']) == [
    'LSTM',
    'known period',
    'PTW',
    'KT',
  ]
  # The network is KT itself.
  np.testing.assert_array_equal(
    curves['every second']['LSTM'], curves['every second']['KT']
  )


def test_default_sources_are_all_with_the_symbols_of_the_own_which_is_first():
  own = config_lib.DataConfig(
    iid_distribution_kwargs={'feature_size': 3},
    parameter_distribution_params=(1.0, 2.0, 3.0),
    trajectory_generator='regular_shift',
    trajectory_generator_kwargs={'shift_period': 7},
  )
  sources = regret_curves.default_sources(_run(data=own))
  assert next(iter(sources)) == 'regular_shift'
  assert sources['regular_shift'] == own
  assert sources.keys() == constants.TRAJECTORY_GENERATORS.keys() - {
    'iid_ptw_cat'
  }
  for name, source in sources.items():
    generator = constants.build_data_generator(source)
    assert isinstance(generator, constants.TRAJECTORY_GENERATORS[name])
    assert generator.parameter_distribution_params == (1.0, 2.0, 3.0)


def test_labels_tell_ensembles_and_predictors_of_one_kind():
  run = _run(train=base_config.TrainConfig(model_init_seed=(0, 1)))
  evaluator = saved_runs.evaluator_of(run)
  evaluator.optimal_predictors = {
    name: constants.OPTIMAL_PREDICTORS[name]() for name in ('lad', 'lin', 'kt')
  }
  assert regret_curves.labels(run, evaluator) == {
    'network': 'LSTM, 1 of 2 seeds',
    'lad': 'lad',
    'lin': 'lin',
    'kt': 'KT',
  }


def test_sequence_of_a_run_has_the_predictors_of_its_source(monkeypatch):
  config = config_lib.post_process_config(config_lib.ExperimentConfig())
  network = predictors.OptimalCategoricalPredictor()
  run = trained_run.Run(config=config, predictor=network, all_params={}, step=0)
  names = ('network', 'ptw', 'lad', 'kt')
  drawn = evaluator_lib.DrawnSequence(
    np.eye(2),
    np.full((2, 2), 0.5),
    np.zeros(2, bool),
    {name: np.full((1, 2), index) for index, name in enumerate(names)},
    {name: np.full(1, index) for index, name in enumerate(names)},
  )
  keys = []

  def draw_sequence(evaluator, params, rng):
    keys.append(rng)
    return drawn

  monkeypatch.setattr(evaluator_lib, 'draw_sequence', draw_sequence)
  sequence = regret_curves.sequence(run, seed=3)
  # What is of no use on this source would only crowd the figure.
  assert sequence.regrets == {'LSTM': 0, 'PTW': 1, 'LAD': 2}
  for index, label in enumerate(('LSTM', 'PTW', 'LAD')):
    np.testing.assert_array_equal(sequence.probabilities[label], index)
  assert keys == [jax.random.key(3)]
