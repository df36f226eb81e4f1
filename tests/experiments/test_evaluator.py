import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from nonstationary_mbml import predictor_factories
from nonstationary_mbml import predictors
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments import evaluator as evaluator_lib
from nonstationary_mbml.experiments import ptw_predictors


def _evaluator(predictor, source='ptw', **kwargs):
  data = config_lib.DataConfig(
    trajectory_generator=source,
    trajectory_generator_kwargs=kwargs.pop('source_kwargs', {}),
    parameter_distribution_params=kwargs.pop('prior', (0.5, 0.5)),
  )
  config = config_lib.ExperimentConfig(
    data=data,
    eval=config_lib.EvalConfig(
      **{'batch_size': 16, 'seq_length': 12, **kwargs}
    ),
  )
  return evaluator_lib.build_evaluator(
    predictor, config_lib.post_process_config(config).eval
  )


@functools.cache
def _lstm():
  predictor = predictor_factories.PREDICTOR_FACTORIES['lstm'](
    2, {'hidden_size': 5}
  )
  params = jax.jit(predictor.init_params)(
    jax.random.key(0), np.zeros((1, 4, 2), np.float32), None
  )
  return predictor, params


@functools.cache
def _lstm_evaluator():
  """One for several tests, which share its programs."""
  return _evaluator(_lstm()[0])


@functools.partial(jax.jit, static_argnums=0)
def _regrets(predictor, params, batch, parameters):
  """Cumulative regret of each sequence."""
  logits, _ = predictor.unroll(params, None, batch)
  return evaluator_lib.instantaneous_regret(logits, parameters).sum(axis=1)


def test_regret_is_the_kl_divergence(x64):
  rng = np.random.default_rng(0)
  truth = rng.dirichlet([1.0, 1.0, 1.0], size=(4, 6))
  logits = rng.normal(size=(4, 6, 3))
  regret = evaluator_lib.instantaneous_regret(
    jnp.asarray(logits), jnp.asarray(truth)
  )
  expected = special.rel_entr(
    truth[:, 1:], special.softmax(logits[:, :-1], axis=-1)
  ).sum(axis=-1)
  np.testing.assert_allclose(regret, expected, atol=1e-12)


def test_regret_of_a_sure_symbol_is_its_code_length():
  truth = jnp.array([[[0.5, 0.5], [0.0, 1.0], [1.0, 0.0]]])
  logits = jnp.log(jnp.array([[[0.25, 0.75], [0.25, 0.75], [0.5, 0.5]]]))
  np.testing.assert_allclose(
    evaluator_lib.instantaneous_regret(logits, truth),
    [[-np.log(0.75), -np.log(0.25)]],
    rtol=1e-6,
  )


def test_regret_against_an_unknown_truth_is_unknown():
  truth = jnp.array([[[0.5, 0.5], [jnp.nan, jnp.nan], [1.0, 0.0]]])
  regret = evaluator_lib.instantaneous_regret(jnp.zeros((1, 3, 2)), truth)
  np.testing.assert_allclose(regret, [[np.nan, np.log(2)]], rtol=1e-6)


def test_gradients_of_regret_are_finite_where_a_symbol_is_impossible():
  truth = jnp.array([[[0.5, 0.5], [0.0, 1.0]]])
  logits = jnp.array([[[-jnp.inf, 0.0], [0.0, 0.0]]])
  regret = lambda *args: evaluator_lib.instantaneous_regret(*args).sum()
  gradients = jax.jit(jax.grad(regret, (0, 1)))(logits, truth)
  np.testing.assert_array_equal(gradients[0], 0)
  np.testing.assert_array_equal(gradients[1], [[[0, 0], [0, 1]]])


def test_regret_of_the_truth_is_zero():
  truth = np.random.default_rng(0).dirichlet([1.0] * 3, (2, 5))
  truth = truth.astype(np.float32)
  logits = np.log(np.roll(truth, -1, axis=1))
  np.testing.assert_allclose(
    evaluator_lib.instantaneous_regret(logits, truth), 0, atol=1e-6
  )


def test_step_returns_means_and_paired_standard_errors():
  predictor, params = _lstm()
  evaluator = _lstm_evaluator()
  rng = jax.random.key(1)
  metrics = evaluator.step(params, None, rng)

  batch, parameters = evaluator.generator.sample(rng, 16, 12)

  own, ptw = (
    np.asarray(_regrets(predictor, params, batch, parameters))
    for predictor, params in (
      (predictor, params),
      (ptw_predictors.PTWPredictor(4), {}),
    )
  )
  expected = {
    'mean_regret': own.mean() / 11,
    'cumulative_regret': own.mean(),
    'cumulative_regret_stderr': own.std(ddof=1) / 4,
    'optimal_cumulative_regret/ptw': ptw.mean(),
    'optimal_cumulative_regret_stderr/ptw': ptw.std(ddof=1) / 4,
    'cumulative_regret_above_optimal/ptw': (own - ptw).mean(),
    'cumulative_regret_above_optimal_stderr/ptw': (own - ptw).std(ddof=1) / 4,
  }
  for name, value in expected.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
  assert {name.split('/')[1] for name in metrics if '/' in name} == {
    'ptw',
    'lad',
    'kt',
  }


def test_predictor_is_evaluated_without_dropout():
  predictor = predictor_factories.PREDICTOR_FACTORIES['transformer'](
    2,
    {
      'embedding_dim': 8,
      'num_heads': 2,
      'num_layers': 1,
      'dropout_prob': 0.9,
    },
  )
  params = jax.jit(predictor.init_params)(
    jax.random.key(0), np.zeros((1, 4, 2), np.float32), None
  )
  evaluator = _evaluator(predictor, optimal_predictors=())
  batch, parameters = evaluator.generator.sample(jax.random.key(2), 16, 12)
  regrets = np.asarray(_regrets(predictor, params, batch, parameters))
  metrics = evaluator.step(params, None, jax.random.key(2))
  np.testing.assert_allclose(
    metrics['cumulative_regret'], regrets.mean(), rtol=1e-5
  )


@pytest.mark.parametrize('chunk_length', [5, 6])
def test_chunked_evaluation_equals_whole(chunk_length):
  predictor, params = _lstm()
  whole = _lstm_evaluator().step(params, None, jax.random.key(3))
  chunked = _evaluator(predictor, chunk_length=chunk_length).step(
    params, None, jax.random.key(3)
  )
  for name, value in whole.items():
    np.testing.assert_allclose(chunked[name], value, rtol=1e-4, err_msg=name)


def test_evaluation_starts_from_the_given_state():
  predictor, params = _lstm()
  evaluator = _lstm_evaluator()
  fresh = predictor.initial_state(params, None, 16)
  used = jax.tree.map(lambda leaf: np.asarray(leaf) + np.float32(3), fresh)
  rng = jax.random.key(4)
  regrets = [
    float(evaluator.step(params, state, rng)['cumulative_regret'])
    for state in (None, fresh, used)
  ]
  assert regrets[0] == pytest.approx(regrets[1])
  assert regrets[0] != pytest.approx(regrets[2])


def test_many_sequences_are_evaluated_batch_by_batch():
  predictor, params = _lstm()
  evaluator = _lstm_evaluator()
  regrets = evaluator.evaluate(params, jax.random.key(5), 40)
  assert {name: len(values) for name, values in regrets.items()} == {
    'network': 40,
    'ptw': 40,
    'lad': 40,
    'kt': 40,
  }
  assert len(np.unique(regrets['network'])) == 40
  metrics = evaluator.metrics(regrets)
  np.testing.assert_allclose(
    metrics['cumulative_regret_stderr'],
    regrets['network'].std(ddof=1) / np.sqrt(40),
    rtol=1e-5,
  )


def test_devices_share_a_batch_that_they_do_not_divide(monkeypatch):
  predictor, params = _lstm()
  of_two = _evaluator(predictor, batch_size=5)
  monkeypatch.setattr(jax, 'devices', jax.local_devices()[:1].copy)
  of_one = _evaluator(predictor, batch_size=5)
  arguments = params, jax.random.key(3), 12
  regrets = of_two.evaluate(*arguments)
  expected = of_one.evaluate(*arguments)
  assert regrets.keys() == expected.keys()
  for name, values in regrets.items():
    np.testing.assert_allclose(values, expected[name], atol=1e-5)
  state = predictor.initial_state(params, None, 5)
  # On one device for good.
  state = jax.device_put(state, jax.local_devices()[0])
  metrics = [
    evaluator.step(params, state, jax.random.key(4))
    for evaluator in (of_two, of_one)
  ]
  for name, value in metrics[0].items():
    np.testing.assert_allclose(value, metrics[1][name], atol=1e-5)


def test_exact_predictor_is_evaluated_from_a_given_state():
  """Whose time is that of all sequences."""
  predictor = ptw_predictors.PTWPredictor(5)
  evaluator = _evaluator(predictor)
  state = predictor.initial_state({}, None, 16)
  metrics = [
    evaluator.step({}, state_or_none, jax.random.key(0))
    for state_or_none in (state, None)
  ]
  for name, value in metrics[0].items():
    np.testing.assert_allclose(value, metrics[1][name], atol=1e-6)


def test_memory_does_not_grow_with_the_number_of_sequences(monkeypatch):
  predictor, params = _lstm()
  evaluator = _lstm_evaluator()
  held = []

  def held_at_most(num_sequences):
    evaluator.evaluate(params, jax.random.key(0), num_sequences)
    most = max(held)
    held.clear()
    return most

  class Bar:
    def update(self, number):
      held.append(sum(array.nbytes for array in jax.live_arrays()))

  monkeypatch.setattr(
    evaluator_lib.progress,
    'bar',
    lambda **kwargs: contextlib.nullcontext(Bar()),
  )
  few = held_at_most(32)
  # But for the keys of the batches.
  assert held_at_most(3200) - few < 200 * 16


def test_regrets_over_time_are_of_the_sequences_that_evaluate_sums_up():
  evaluator = _evaluator(
    predictors.OptimalCategoricalPredictor(), optimal_predictors=('ptw',)
  )
  rng = jax.random.key(5)
  regrets = evaluator.regrets_over_time({}, rng, 40)
  cumulative = evaluator.evaluate({}, rng, 40)
  assert regrets.keys() == cumulative.keys() == {'network', 'ptw'}
  for name, values in regrets.items():
    assert values.shape == (40, 11)
    np.testing.assert_allclose(
      values.sum(axis=1), cumulative[name], rtol=1e-5, err_msg=name
    )


def test_progress_is_quiet_without_a_terminal(capsys):
  evaluator = _evaluator(
    predictors.OptimalCategoricalPredictor(), optimal_predictors=()
  )
  evaluator.evaluate({}, jax.random.key(0), 16, use_tqdm=True)
  assert capsys.readouterr().err == ''


def test_drawn_sequence_switches_twice_and_has_its_predictions_and_regrets():
  evaluator = _evaluator(
    predictors.OptimalCategoricalPredictor(), optimal_predictors=('ptw',)
  )
  sequence = evaluator_lib.draw_sequence(evaluator, {}, jax.random.key(0))
  assert sequence.switches.sum() >= 2
  changes = np.any(np.diff(sequence.parameters, axis=0), axis=1)
  np.testing.assert_array_equal(
    np.flatnonzero(sequence.switches) - 1, np.flatnonzero(changes)
  )
  predictions = evaluator.predict({}, sequence.symbols[None])
  assert sequence.probabilities.keys() == predictions.keys()
  for name, logits in predictions.items():
    expected = special.softmax(logits[0, :-1], axis=-1)
    np.testing.assert_allclose(
      sequence.probabilities[name], expected, rtol=1e-5, err_msg=name
    )
    np.testing.assert_allclose(
      sequence.regrets[name],
      special.rel_entr(sequence.parameters[1:], expected).sum(axis=-1),
      atol=1e-5,
      err_msg=name,
    )


def test_an_exact_predictor_can_be_evaluated():
  evaluator = _evaluator(ptw_predictors.PTWPredictor(4))
  metrics = evaluator.step({}, None, jax.random.key(6))
  assert float(metrics['cumulative_regret_above_optimal/ptw']) == 0


SOURCES = {
  'ptw': {},
  'lin': {},
  'static': {},
  'regular_shift': {'shift_period': 5},
  'random_shift': {
    'shift_distribution': 'gamma',
    'shift_parameters': (3.0, 0.4),
  },
  'mixture': {
    'sources': (
      {'trajectory_generator': 'ptw'},
      {'trajectory_generator': 'static'},
      {'trajectory_generator': 'lin'},
    )
  },
}


# The committed table of exact predictors has Dirichlet(1/2).
@pytest.mark.parametrize(
  ('source', 'prior'),
  [('ptw', (0.5, 0.5)), *((source, (3.0, 1.0)) for source in SOURCES)],
)
def test_exact_predictor_of_a_source_has_the_least_regret(source, prior):
  evaluator = _evaluator(
    predictors.OptimalCategoricalPredictor(),
    source,
    source_kwargs=SOURCES[source],
    prior=prior,
    batch_size=4096,
    seq_length=32,
  )
  regrets = evaluator.evaluate({}, jax.random.key(7), 4096)
  exact = constants.exact_predictor(
    evaluator.generator, evaluator.optimal_predictors, 32
  )
  for name in evaluator.optimal_predictors:
    if name != exact:
      surplus = regrets[name] - regrets[exact]
      # By more than five standard errors.
      stderr = surplus.std(ddof=1) / np.sqrt(len(surplus))
      assert surplus.mean() > 5 * stderr


@pytest.mark.parametrize(
  ('kwargs', 'expected'),
  [
    ({}, 'ptw'),
    ({'source': 'iid_ptw_cat'}, 'ptw'),
    ({'source': 'lin'}, 'lad'),
    ({'source': 'lin', 'optimal_predictors': ('lin',)}, 'lin'),
    ({'source': 'static'}, 'kt'),
    ({'source': 'static', 'prior': (1.0, 2.0)}, 'kt'),
    *(
      ({'source': name, 'source_kwargs': SOURCES[name]}, name)
      for name in ('regular_shift', 'random_shift')
    ),
    (
      {
        'source': 'regular_shift',
        'source_kwargs': {'shift_period': 3},
        'optimal_predictors': ('regular_shift',),
        'optimal_predictors_kwargs': {'regular_shift': {'shift_period': 4}},
      },
      None,
    ),
    (
      {
        'source': 'regular_shift',
        'source_kwargs': {'shift_period': 3},
        'optimal_predictors': ('exact', 'regular_shift'),
        'optimal_predictors_kwargs': {'regular_shift': {'shift_period': 4}},
      },
      'exact',
    ),
    (
      {
        'source': 'recurring',
        'source_kwargs': {'pool_size': 3, 'switch_probability': 0.1},
      },
      None,
    ),
    ({'source': 'mixture', 'source_kwargs': SOURCES['mixture']}, 'exact'),
    (
      {
        'source': 'drift',
        'source_kwargs': {'switch_probability': 0.1, 'step_scale': 0.1},
      },
      None,
    ),
    ({'optimal_predictors': ('kt', 'lad')}, None),
    ({'optimal_predictors_kwargs': {'ptw': {'depth': 9}}}, 'exact'),
    ({'optimal_predictors_kwargs': {'ptw': {'concentration': 1.0}}}, 'exact'),
    (
      {
        'optimal_predictors': ('ptw',),
        'optimal_predictors_kwargs': {'ptw': {'depth': 9}},
      },
      None,
    ),
    ({'source_kwargs': {'depth': 9}}, 'ptw'),
  ],
)
def test_exact_predictor_has_the_prior_of_the_source(kwargs, expected):
  data = config_lib.DataConfig(
    trajectory_generator=kwargs.pop('source', 'ptw'),
    trajectory_generator_kwargs=kwargs.pop('source_kwargs', {}),
    parameter_distribution_params=kwargs.pop('prior', (0.5, 0.5)),
  )
  config = config_lib.post_process_config(
    config_lib.ExperimentConfig(
      data=data, eval=config_lib.EvalConfig(seq_length=12, **kwargs)
    )
  )
  generator = constants.build_data_generator(data)
  optimal = constants.build_optimal_predictors(config.eval, generator)
  assert constants.exact_predictor(generator, optimal, 12) == expected


def test_no_predictor_is_exact_without_a_dirichlet():
  data = config_lib.DataConfig(
    parameter_distribution='constant', parameter_distribution_params=(0.5, 0.5)
  )
  config = config_lib.post_process_config(
    config_lib.ExperimentConfig(data=data)
  )
  generator = constants.build_data_generator(data)
  optimal = constants.build_optimal_predictors(config.eval, generator)
  assert constants.exact_predictor(generator, optimal, 32) is None


class _Uniform(predictors.Predictor):
  """A predictor from outside: a depth that is no tree's, and no prior."""

  has_state = False

  def __init__(self, depth=2):
    self.depth = depth

  def init_params(self, rng, batch_init, state_init):
    return {}

  def initial_state(self, params, rng, batch_size):
    return None

  def unroll(self, params, rng, batch, init_state=None):
    return jnp.zeros_like(batch), None


class _OwnPTW(ptw_predictors.PTWPredictor):
  """One from outside that takes the prior, through its base."""

  def __init__(self, margin=1, **kwargs):
    super().__init__(depth=4 + margin, **kwargs)


def test_predictors_of_ones_own_are_given_what_they_take(monkeypatch):
  registry = constants.OPTIMAL_PREDICTORS
  monkeypatch.setitem(registry, 'uniform', _Uniform)
  monkeypatch.setitem(registry, 'own_ptw', _OwnPTW)
  names = ('uniform', 'own_ptw', 'ptw')
  data = config_lib.DataConfig(parameter_distribution_params=(2.0, 1.0))
  config = config_lib.post_process_config(
    config_lib.ExperimentConfig(
      data=data, eval=config_lib.EvalConfig(optimal_predictors=names)
    )
  )
  constants.check(config)
  generator = constants.build_data_generator(data)
  optimal = constants.build_optimal_predictors(config.eval, generator)
  assert optimal['own_ptw'].concentration == (2.0, 1.0)
  assert constants.exact_predictor(generator, optimal, 32) == 'ptw'
  evaluator = _evaluator(
    predictors.OptimalCategoricalPredictor(),
    prior=(2.0, 1.0),
    optimal_predictors=names,
    batch_size=64,
  )
  regrets = evaluator.evaluate({}, jax.random.key(0), 64)
  assert regrets['uniform'].mean() > regrets['ptw'].mean()


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    ({'concentration': 3.0}, r"\[uniform\] has no 'concentration'; .* depth"),
    ({'alphabet_size': 3}, r"\[uniform\] has no 'alphabet_size'"),
  ],
)
def test_what_a_predictor_of_ones_own_is_given_but_does_not_take_is_named(
  monkeypatch, kwargs, message
):
  monkeypatch.setitem(constants.OPTIMAL_PREDICTORS, 'uniform', _Uniform)
  config = config_lib.post_process_config(
    config_lib.ExperimentConfig(
      eval=config_lib.EvalConfig(
        optimal_predictors=('uniform',),
        optimal_predictors_kwargs={'uniform': kwargs},
      )
    )
  )
  with pytest.raises(ValueError, match=message):
    constants.check(config)
