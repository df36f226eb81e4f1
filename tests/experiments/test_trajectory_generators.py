import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from nonstationary_mbml import predictors
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments import distributions
from nonstationary_mbml.experiments import live_and_die_predictors
from nonstationary_mbml.experiments import mixture_predictors
from nonstationary_mbml.experiments import ptw_predictors
from nonstationary_mbml.experiments import run_length_predictors
from nonstationary_mbml.experiments import trajectory_generators
from nonstationary_mbml.runtime import devices
from nonstationary_mbml.tests import oracles

SOURCES = {
  'static': {},
  'regular_shift': {'shift_period': 5},
  'random_shift': {
    'shift_distribution': 'gamma',
    'shift_parameters': (2.0, 0.4),
  },
  'ptw': {},
  'lin': {},
  'recurring': {'pool_size': 3, 'switch_probability': 0.2},
  'drift': {'switch_probability': 0.2, 'step_scale': 0.0},
  'mixture': {
    'sources': (
      {'trajectory_generator': 'Static', 'weight': 0.25},
      {
        'trajectory_generator': 'regular_shift',
        'trajectory_generator_kwargs': {'shift_period': 5},
        'weight': 0.75,
      },
    )
  },
}
# Frequencies are tested at this probability of failing under the right law, for
# all times of a source together.
FALSE_ALARM_RATE = 1e-4


def _make(name, alpha=(0.5, 0.5), **kwargs):
  alphabet_size = len(alpha)
  return trajectory_generators.TRAJECTORY_GENERATORS[name](
    distributions.Categorical(alphabet_size),
    distributions.Dirichlet(alphabet_size),
    alpha,
    **(kwargs or SOURCES.get(name, {})),
  )


def _assert_frequencies(switches, probabilities):
  """Every time's switches are Bernoulli of the given probability."""
  switches = np.asarray(switches)
  num_sequences, seq_length = switches.shape
  spread = np.sqrt(num_sequences * probabilities * (1 - probabilities))
  deviation = np.abs(switches.sum(axis=0) - num_sequences * probabilities)
  bound = stats.norm.isf(FALSE_ALARM_RATE / 2 / seq_length)
  # Half a count for the normal approximation.
  assert np.all(deviation <= bound * spread + 0.5)


@pytest.mark.parametrize(
  ('depth', 'seq_length'), [(None, 16), (6, 16), (4, 13)]
)
def test_ptw_switches_have_their_prior_probability(depth, seq_length):
  generator = _make('ptw', depth=depth)
  switches = generator.switch_points(jax.random.key(0), 20_000, seq_length)
  truth = [
    oracles.ptw_switch_probability(depth or 4, time)
    for time in range(1, seq_length)
  ]
  _assert_frequencies(switches, np.array([0.0, *truth]))


def test_ptw_partitions_have_their_prior_probability():
  switches = np.asarray(
    _make('ptw').switch_points(jax.random.key(1), 50_000, 8)
  )
  counts = {partition: 0 for partition in oracles.ptw_partitions(3)}
  for row in switches:
    edges = [0, *np.flatnonzero(row), 8]
    counts[tuple(np.diff(edges).tolist())] += 1
  expected = 50_000 * np.array(list(oracles.ptw_partitions(3).values()))
  test = stats.chisquare(list(counts.values()), expected)
  assert test.pvalue > FALSE_ALARM_RATE


def test_lin_switches_have_their_prior_probability():
  switches = _make('lin').switch_points(jax.random.key(2), 20_000, 24)
  _assert_frequencies(switches, oracles.lin_switch_probabilities(24))


def test_lin_partitions_have_their_prior_probability():
  switches = np.asarray(
    _make('lin').switch_points(jax.random.key(3), 50_000, 5)
  )
  counts = {
    partition: 0
    for partition in oracles.hazard_partitions(5, oracles.lin_hazard)
  }
  for row in switches:
    edges = [0, *np.flatnonzero(row), 5]
    counts[tuple(np.diff(edges).tolist())] += 1
  expected = 50_000 * np.array(
    list(oracles.hazard_partitions(5, oracles.lin_hazard).values())
  )
  test = stats.chisquare(list(counts.values()), expected)
  assert test.pvalue > FALSE_ALARM_RATE


def test_random_shift_lengths_follow_the_rounded_law():
  generator = _make(
    'random_shift', shift_distribution='exponential', shift_parameters=(0.5,)
  )
  switches = generator.switch_points(jax.random.key(4), 20_000, 12)
  # P(max(1, round X) = a) of an exponential, then the renewal recursion.
  survival = stats.expon(scale=2).sf
  lengths = [1 - survival(1.5)] + [
    survival(a - 0.5) - survival(a + 0.5) for a in range(2, 12)
  ]
  starts = [1.0]
  for time in range(1, 12):
    starts.append(
      sum(starts[time - a] * lengths[a - 1] for a in range(1, time + 1))
    )
  _assert_frequencies(switches, np.array([0.0, *starts[1:]]))


@pytest.mark.parametrize('probability', [0.04, 0.7, 1.0])
def test_recurring_switches_have_their_probability_at_every_time(probability):
  generator = _make('recurring', pool_size=2, switch_probability=probability)
  switches = generator.switch_points(jax.random.key(19), 20_000, 24)
  _assert_frequencies(switches, np.array([0.0, *[probability] * 23]))


def test_recurring_switches_are_independent_of_those_before():
  generator = _make('recurring', pool_size=3, switch_probability=0.3)
  switches = np.asarray(generator.switch_points(jax.random.key(20), 40_000, 4))
  codes = switches[:, 1:] @ [4, 2, 1]
  number = np.array([bin(code).count('1') for code in range(8)])
  expected = len(codes) * 0.3**number * 0.7 ** (3 - number)
  test = stats.chisquare(np.bincount(codes, minlength=8), expected)
  assert test.pvalue > FALSE_ALARM_RATE


@pytest.mark.parametrize('pool_size', [2, 3, 5])
def test_recurring_parameters_are_those_of_the_pool(pool_size):
  # All of the pool appear: one of 5 is left out of some 400 segments with
  # probability 5 (3/4)^400 < 1e-49.
  generator = _make('recurring', pool_size=pool_size, switch_probability=0.5)
  _, parameters = generator.sample(jax.random.key(21), 8, 800)
  for row in np.asarray(parameters):
    assert len(np.unique(row, axis=0)) == pool_size


def test_recurring_pools_differ_between_sequences():
  _, parameters = _make('recurring').sample(jax.random.key(22), 16, 50)
  # 16 pools of 3, of which 50 symbols show at least two.
  assert len(np.unique(np.asarray(parameters).reshape(-1, 2), axis=0)) > 32


def test_recurring_regimes_are_uniform_over_the_others():
  # Regimes numbered in the order in which a sequence shows them: after a switch
  # each of the known others has probability 1 / (m - 1), the rest is a new one.
  expected = {(0,): 40_000.0}
  for _ in range(4):
    longer = {}
    for numbers, count in expected.items():
      known = max(numbers) + 1
      for number in range(min(known + 1, 4)):
        chance = (4 - known if number == known else 1) / 3
        if number != numbers[-1]:
          longer[*numbers, number] = count * chance
    expected = longer
  generator = _make('recurring', pool_size=4, switch_probability=1.0)
  _, parameters = generator.sample(jax.random.key(23), 40_000, 5)
  counts = dict.fromkeys(expected, 0)
  for row in np.asarray(parameters)[..., 0].tolist():
    numbers = {value: n for n, value in enumerate(dict.fromkeys(row))}
    counts[tuple(numbers[value] for value in row)] += 1
  test = stats.chisquare(list(counts.values()), list(expected.values()))
  assert test.pvalue > FALSE_ALARM_RATE


@pytest.mark.parametrize('probability', [0.0, 0.3, 1.0])
def test_drift_switches_have_their_probability_at_every_time(probability):
  generator = _make('drift', switch_probability=probability, step_scale=1.0)
  switches = generator.switch_points(jax.random.key(24), 20_000, 12)
  _assert_frequencies(switches, np.array([0.0, *[probability] * 11]))


def test_drift_begins_every_segment_with_a_draw_from_the_prior(x64):
  generator = _make('drift', (2.0, 3.0), switch_probability=0.3, step_scale=1.0)
  rng = jax.random.key(25)
  _, parameters = generator.sample(rng, 8_000, 6)
  starts = np.array(generator.switch_points(rng, 8_000, 6))
  starts[:, 0] = True
  for time in (0, 1, 5):
    draws = np.asarray(parameters)[starts[:, time], time, 0]
    test = stats.kstest(draws, stats.beta(2, 3).cdf)
    assert test.pvalue > FALSE_ALARM_RATE / 3


def test_drift_steps_are_normal_of_their_scale_at_every_time(x64):
  generator = _make(
    'drift', (2.0, 3.0, 4.0), switch_probability=0.2, step_scale=0.3
  )
  rng = jax.random.key(26)
  _, parameters = generator.sample(rng, 8_000, 9)
  switches = np.asarray(generator.switch_points(rng, 8_000, 9))
  # Of differences of logits, which normalising leaves alone: each is of two
  # independent steps.
  logits = np.log(np.asarray(parameters))
  steps = np.diff(logits[..., :2] - logits[..., 2:], axis=1) / 0.3
  values = []
  for time in (1, 4, 8):
    inside = steps[~switches[:, time], time - 1]
    for k in range(2):
      test = stats.kstest(inside[:, k], stats.norm(scale=np.sqrt(2)).cdf)
      assert test.pvalue > FALSE_ALARM_RATE / 6
    values.append(inside[:6_000])
  # One normal is shared by both differences.
  assert abs(np.corrcoef(values[0].T)[0, 1] - 0.5) < 0.05


def test_drift_steps_are_independent_of_each_other_and_of_where_they_start(x64):
  generator = _make('drift', (2.0, 2.0), switch_probability=0.0, step_scale=0.5)
  _, parameters = generator.sample(jax.random.key(27), 20_000, 4)
  logits = np.log(np.asarray(parameters))
  logits = logits[..., 0] - logits[..., 1]
  values = np.concatenate([logits[:, :1], np.diff(logits, axis=1)], axis=1)
  correlations = np.corrcoef(values.T)[np.triu_indices(4, 1)]
  bound = stats.norm.isf(FALSE_ALARM_RATE / 2 / len(correlations))
  assert np.all(np.abs(correlations) < bound / np.sqrt(20_000))


def test_drift_of_a_symmetric_prior_prefers_no_symbol_at_any_time():
  generator = _make('drift', switch_probability=0.05, step_scale=0.5)
  batch, _ = generator.sample(jax.random.key(28), 20_000, 24)
  _assert_frequencies(np.asarray(batch)[..., 0], np.full(24, 0.5))


def test_drift_without_steps_is_a_source_of_constant_hazard(x64):
  """In law: its segments have one draw from the prior each."""
  rng = jax.random.key(29)
  generator = _make('drift', switch_probability=0.2, step_scale=0.0)
  batch, parameters = generator.sample(rng, 4_000, 12)
  switches = np.asarray(generator.switch_points(rng, 4_000, 12))
  changes = np.diff(np.asarray(parameters)[..., 0], axis=1) != 0
  np.testing.assert_array_equal(changes, switches[:, 1:])
  # So no predictor has less regret than that of the hazard.
  regrets = {}
  for hazard in (0.1, 0.2, 0.3):
    log_probs, _ = run_length_predictors.RunLengthPredictor(hazard).unroll(
      {}, None, batch
    )
    truth = parameters[:, 1:]
    regrets[hazard] = np.asarray(-(truth * log_probs[:, :-1]).sum(axis=(1, 2)))
  for hazard in (0.1, 0.3):
    surplus = regrets[hazard] - regrets[0.2]
    assert surplus.mean() > 4 * surplus.std() / np.sqrt(len(surplus))


def test_sequences_of_a_mixture_are_of_the_sources_that_it_says():
  generator, rng = _make('mixture'), jax.random.key(30)
  index = np.asarray(generator.source_indices(rng, 400))
  switches = np.asarray(generator.switch_points(rng, 400, 12))
  _, parameters = generator.sample(rng, 400, 12)
  is_static = np.all(np.asarray(parameters) == parameters[:, :1], axis=(1, 2))
  np.testing.assert_array_equal(is_static, index == 0)
  assert not switches[index == 0].any()
  assert np.all(
    switches[index == 1] == (np.arange(12) % 5 == 0) * [0, *[1] * 11]
  )


def test_sources_of_a_mixture_are_drawn_by_their_weights():
  names = ('static', 'lin', 'ptw')
  weights = (0.2, 0.5, 0.3)
  generator = _make(
    'mixture',
    sources=[
      {'trajectory_generator': name, 'weight': weight}
      for name, weight in zip(names, weights, strict=True)
    ],
  )
  index = np.asarray(generator.source_indices(jax.random.key(31), 20_000))
  counts = np.bincount(index, minlength=3)
  test = stats.chisquare(counts, 20_000 * np.array(weights))
  assert test.pvalue > FALSE_ALARM_RATE


def test_source_of_a_sequence_is_not_drawn_with_the_key_of_its_parameters():
  source = {'trajectory_generator': 'static'}
  generator, rng = _make('mixture', sources=[source] * 2), jax.random.key(32)
  index = np.asarray(generator.source_indices(rng, 10_000))
  batch, parameters = generator.sample(rng, 10_000, 1)
  for chosen in (index == 0, index == 1):
    draws = np.asarray(parameters, float)[chosen, 0, 0]
    test = stats.kstest(draws, stats.beta(0.5, 0.5).cdf)
    assert test.pvalue > FALSE_ALARM_RATE / 2
    _assert_frequencies(np.asarray(batch)[chosen, :, 0], np.array([0.5]))


def test_mixture_in_a_mixture_is_sampled_alike():
  """Its switching points are those of its sequences."""
  inner = {
    'trajectory_generator': 'mixture',
    'trajectory_generator_kwargs': SOURCES['mixture'],
  }
  recurring = {
    'trajectory_generator': 'recurring',
    'trajectory_generator_kwargs': SOURCES['recurring'],
  }
  generator = _make('mixture', sources=[inner, recurring])
  rng = jax.random.key(33)
  _, parameters = generator.sample(rng, 64, 12)
  changes = np.any(np.diff(parameters, axis=1) != 0, axis=-1)
  switches = np.asarray(generator.switch_points(rng, 64, 12))
  np.testing.assert_array_equal(changes, switches[:, 1:])
  assert generator.bayes_predictor(12) is None
  assert generator.reference_predictors == ('forget_me_not',)


def test_only_a_tree_of_the_length_depends_on_the_length():
  depends = {name: _make(name).depends_on_length for name in ('ptw', *SOURCES)}
  assert [name for name in depends if depends[name]] == ['ptw']
  assert not _make('ptw', depth=9).depends_on_length
  source = {'trajectory_generator': 'ptw'}
  assert _make('mixture', sources=[source]).depends_on_length


@pytest.mark.parametrize('value', [0.0, 0.2, -3.0])
def test_segment_length_rounded_to_zero_becomes_one(value):
  generator = _make(
    'random_shift', shift_distribution='constant', shift_parameters=(value,)
  )
  switches = generator.switch_points(jax.random.key(5), 2, 6)
  np.testing.assert_array_equal(switches, [[False] + 5 * [True]] * 2)


def test_segment_length_beyond_any_integer_is_one_segment():
  generator = _make(
    'random_shift', shift_distribution='constant', shift_parameters=(1e30,)
  )
  assert not generator.switch_points(jax.random.key(6), 2, 6).any()


def test_lengths_whose_sum_is_no_int32_make_no_false_switches():
  seq_length = 2**16
  generator = _make(
    'random_shift',
    shift_distribution='constant',
    shift_parameters=(60_000.0,),
  )
  switches = generator.switch_points(jax.random.key(6), 1, seq_length)
  assert np.flatnonzero(switches[0]).tolist() == [60_000]


def test_regular_shift_switches_every_period():
  switches = _make('regular_shift').switch_points(jax.random.key(7), 2, 12)
  np.testing.assert_array_equal(np.flatnonzero(switches[1]), [5, 10])


def test_static_never_switches():
  assert not _make('static').switch_points(jax.random.key(8), 3, 50).any()


@pytest.mark.parametrize('name', SOURCES)
def test_parameters_change_exactly_at_the_switching_points(name):
  generator, rng = _make(name), jax.random.key(9)
  _, parameters = generator.sample(rng, 16, 16)
  changes = np.any(np.diff(parameters, axis=1) != 0, axis=-1)
  switches = np.asarray(generator.switch_points(rng, 16, 16))
  np.testing.assert_array_equal(changes, switches[:, 1:])
  assert not switches[:, 0].any()
  assert switches.any() == (name != 'static')


@pytest.mark.parametrize(
  'name', ['ptw', 'lin', 'random_shift', 'recurring', 'drift', 'mixture']
)
def test_every_sequence_has_its_own_switching_points(name):
  # A PTW sequence has no switch at all with probability 1/2, so 64 agree by
  # chance with probability 2^-64.
  switches = _make(name).switch_points(jax.random.key(10), 64, 64)
  assert len(np.unique(switches, axis=0)) > 1


@pytest.mark.parametrize('name', SOURCES)
def test_sequences_of_a_batch_are_independent(name):
  # Symbols at the same time of neighbours, of which half are expected to agree.
  batch, _ = _make(name).sample(jax.random.key(11), 20_000, 3)
  symbols = np.asarray(batch).argmax(axis=-1)
  agree = symbols[::2] == symbols[1::2]
  _assert_frequencies(agree, np.full(3, 0.5))


@pytest.mark.parametrize('name', SOURCES)
def test_a_slice_of_the_keys_gives_that_slice_of_the_batch(name):
  generator, rng = _make(name), jax.random.key(12)
  batch, parameters = map(np.asarray, generator.sample(rng, 16, 16))
  keys = jax.random.split(rng, 16)
  some_batch, some_parameters = generator.sample_from_keys(keys[2:5], 16)
  np.testing.assert_array_equal(batch[2:5], some_batch)
  np.testing.assert_array_equal(parameters[2:5], some_parameters)


@pytest.mark.parametrize('name', SOURCES)
def test_sampling_is_pure_and_jits(name):
  generator = _make(name)
  sample = jax.jit(generator.sample, static_argnums=(1, 2))
  first = sample(jax.random.key(13), 16, 16)
  np.testing.assert_array_equal(
    first[0], generator.sample(jax.random.key(13), 16, 16)[0]
  )
  other, _ = sample(jax.random.key(14), 16, 16)
  assert np.any(np.asarray(first[0]) != np.asarray(other))
  assert first[0].shape == first[1].shape == (16, 16, 2)
  assert first[0].dtype == first[1].dtype == jnp.float32


@pytest.mark.parametrize('alpha', [(0.5, 0.5), (3.0, 1.0), (0.5, 2.0, 2.0)])
def test_parameters_follow_the_configured_dirichlet(alpha):
  _, parameters = _make('ptw', alpha).sample(jax.random.key(15), 20_000, 2)
  truth = stats.beta(alpha[0], sum(alpha[1:]))
  test = stats.kstest(np.asarray(parameters, float)[:, 1, 0], truth.cdf)
  assert test.pvalue > FALSE_ALARM_RATE


@pytest.mark.parametrize('alpha', [(0.5, 0.5), (1.0, 2.0, 3.0)])
def test_symbols_have_the_probabilities_of_their_parameters(alpha):
  batch, parameters = _make('lin', alpha).sample(jax.random.key(16), 5_000, 8)
  surplus = np.asarray(batch, float) - np.asarray(parameters)
  surplus = surplus.reshape(-1, len(alpha))
  # A martingale difference: standardised means are normal.
  z = surplus.mean(axis=0) / surplus.std(axis=0) * np.sqrt(len(surplus))
  assert np.all(np.abs(z) < stats.norm.isf(FALSE_ALARM_RATE / 2 / len(alpha)))


def test_symbols_are_not_drawn_with_the_key_of_their_parameters():
  # With one key for both, an arcsine parameter and its symbol would follow from
  # the same uniform number, and a symbol be sure given the parameter.
  batch, parameters = _make('static').sample(jax.random.key(17), 20_000, 1)
  p = np.asarray(parameters, float)[:, 0, 0]
  zeros = np.asarray(batch)[:, 0, 0]
  for low in np.arange(0, 1, 0.1):
    chosen = (low <= p) & (p < low + 0.1)
    expected, variance = p[chosen].sum(), (p * (1 - p))[chosen].sum()
    deviation = abs(zeros[chosen].sum() - expected) / np.sqrt(variance)
    assert deviation < stats.norm.isf(FALSE_ALARM_RATE / 2 / 10)


def test_symbols_parameters_and_switches_use_different_keys():
  # With one key for all, low uniforms would mean both a switch and a symbol 0.
  batch, _ = _make('lin').sample(jax.random.key(17), 20_000, 2)
  switches = _make('lin').switch_points(jax.random.key(17), 20_000, 2)
  zeros = np.asarray(batch)[:, 1, 0] * np.asarray(switches)[:, 1]
  _assert_frequencies(zeros[:, None], np.array([0.25]))


@pytest.mark.parametrize(
  ('iid', 'prior', 'parameters'),
  [
    (distributions.Exponential(), distributions.Gamma(), (2.0, 1.0)),
    (distributions.Gaussian(), distributions.Uniform(2), (1.0, 2.0, 2.0, 3.0)),
    (distributions.Beta(), distributions.Gamma(2), (1.0, 2.0, 1.0, 3.0)),
    (distributions.Uniform(), distributions.Constant(2), (0.0, 1.0)),
    (distributions.Categorical(3), distributions.Constant(3), (0.2, 0.3, 0.5)),
    (distributions.Lomax(2), distributions.Exponential(4), (1.0,) * 4),
  ],
)
def test_any_distributions_that_fit_make_a_source(iid, prior, parameters):
  generator = trajectory_generators.PTWGenerator(iid, prior, parameters)
  batch, sampled = generator.sample(jax.random.key(18), 3, 8)
  assert batch.shape == (3, 8, iid.feature_size)
  assert sampled.shape == (3, 8, iid.parameter_size)
  iid.check_parameters('sampled', sampled)
  assert np.all(np.isfinite(jax.jit(iid.log_density)(batch, sampled)))


@pytest.mark.parametrize(
  ('iid', 'prior', 'parameters', 'message'),
  [
    (
      distributions.Categorical(3),
      distributions.Dirichlet(2),
      (0.5, 0.5),
      'feature_size 2, but categorical with feature_size 3 takes 3',
    ),
    (
      distributions.Categorical(2),
      distributions.Gamma(2),
      (1.0,) * 4,
      'gamma does not draw probabilities',
    ),
    (
      distributions.Categorical(2),
      distributions.Constant(2),
      (0.5, 0.6),
      'sum to 1',
    ),
    (
      distributions.Exponential(),
      distributions.Gaussian(),
      (0.0, 1.0),
      'exponential cannot take',
    ),
    (
      distributions.Exponential(),
      distributions.Constant(),
      (0.0,),
      'exponential cannot take',
    ),
    (
      distributions.Beta(),
      distributions.Categorical(2),
      (0.5, 0.5),
      'categorical draws symbols',
    ),
    (
      distributions.Categorical(2),
      distributions.Dirichlet(2),
      ((0.5, 0.5),),
      'must be a sequence of numbers',
    ),
    (
      distributions.Uniform(),
      distributions.Uniform(2),
      (0.0, 1.0, 2.0, 3.0),
      'uniform cannot take',
    ),
    (
      distributions.Categorical(2),
      distributions.Dirichlet(2),
      (0.5, -1.0),
      'parameter_distribution_params',
    ),
  ],
)
def test_distributions_that_do_not_fit_are_refused(
  iid, prior, parameters, message
):
  with pytest.raises(ValueError, match=message):
    trajectory_generators.StaticGenerator(iid, prior, parameters)


@pytest.mark.parametrize(
  ('name', 'kwargs', 'message'),
  [
    ('regular_shift', {'shift_period': 0}, 'shift_period is 0'),
    (
      'random_shift',
      {'shift_distribution': 'gama', 'shift_parameters': (1.0, 1.0)},
      "did you mean 'gamma'",
    ),
    (
      'random_shift',
      {'shift_distribution': 'gamma', 'shift_parameters': (1.0,)},
      'shift_parameters',
    ),
    (
      'random_shift',
      {'shift_distribution': 'dirichlet', 'shift_parameters': (1.0, 1.0)},
      'a length is one number',
    ),
    ('ptw', {'depth': -1}, 'depth is -1'),
    (
      'recurring',
      {'pool_size': 1, 'switch_probability': 0.1},
      'pool_size is 1; it must be an int >= 2',
    ),
    (
      'recurring',
      {'pool_size': 2.5, 'switch_probability': 0.1},
      'pool_size is 2.5',
    ),
    (
      'recurring',
      {'pool_size': 2, 'switch_probability': 0.0},
      r'switch_probability is 0.0; it must be in \(0, 1\]',
    ),
    (
      'recurring',
      {'pool_size': 2, 'switch_probability': 1.01},
      'switch_probability is 1.01',
    ),
    (
      'recurring',
      {'pool_size': 2, 'switch_probability': 'often'},
      "switch_probability is 'often'",
    ),
    (
      'drift',
      {'switch_probability': -0.1, 'step_scale': 0.1},
      r'switch_probability is -0.1; it must be in \[0, 1\]',
    ),
    (
      'drift',
      {'switch_probability': 0.1, 'step_scale': -1},
      'step_scale is -1; it must be a number in',
    ),
    ('mixture', {'sources': ()}, 'sources is empty'),
    ('mixture', {'sources': 'ptw'}, "sources is 'ptw'; it must be a tuple"),
    (
      'mixture',
      {'sources': ('ptw',)},
      r"sources\[0\] is 'ptw'; it must be a d",
    ),
    (
      'mixture',
      {'sources': ({'trajectory_generator': 'ptv'},)},
      r"sources\[0\].trajectory_generator 'ptv' is not .* mean 'ptw'",
    ),
    (
      'mixture',
      {'sources': ({'trajectory_generator': 'random_shift'},)},
      r"sources\[0\].* of random_shift lacks 'shift_distribution'",
    ),
    (
      'mixture',
      {
        'sources': (
          {'trajectory_generator': 'lin'},
          {
            'trajectory_generator': 'ptw',
            'trajectory_generator_kwargs': {'depth': -1},
          },
        )
      },
      r'sources\[1\].trajectory_generator_kwargs: depth is -1',
    ),
    ('mixture', {'sources': ({'weight': 1.0},)}, 'lacks .trajectory_generator'),
    (
      'mixture',
      {'sources': ({'trajectory_generator': 'lin', 'wieght': 1.0},)},
      "has no 'wieght'; .*did you mean 'weight'",
    ),
    (
      'mixture',
      {
        'sources': (
          {'trajectory_generator': 'lin', 'weight': 0.5},
          {'trajectory_generator': 'ptw', 'weight': 0.6},
        )
      },
      'weight of sources is .* sum 1.1; .* sum to 1',
    ),
    (
      'mixture',
      {
        'sources': (
          {'trajectory_generator': 'lin', 'weight': 1.0},
          {'trajectory_generator': 'ptw'},
        )
      },
      '1 of 2 sources have a weight; give one to all or to none',
    ),
    (
      'recurring',
      {'pool_size': 2, 'switch_probability': float('nan')},
      'switch_probability is nan',
    ),
  ],
)
def test_wrong_arguments_are_named(name, kwargs, message):
  with pytest.raises(ValueError, match=message):
    _make(name, **kwargs)


@pytest.mark.parametrize(
  ('batch_size', 'seq_length', 'message'),
  [
    (0, 4, 'batch_size is 0'),
    (2, 0, 'seq_length is 0'),
    (2, 9, 'depth 3 holds 8 symbols'),
  ],
)
def test_wrong_sizes_are_named(batch_size, seq_length, message):
  with pytest.raises(ValueError, match=message):
    _make('ptw', depth=3).sample(jax.random.key(0), batch_size, seq_length)


def test_mixture_is_as_long_as_its_shortest_source():
  shallow = {
    'trajectory_generator': 'ptw',
    'trajectory_generator_kwargs': {'depth': 3},
  }
  mixture = _make('mixture', sources=[shallow, {'trajectory_generator': 'lin'}])
  mixture.check_seq_length(8)
  with pytest.raises(ValueError, match='depth 3 holds 8 symbols, not 9'):
    mixture.check_seq_length(9)


def test_only_categorical_parameters_drift():
  with pytest.raises(ValueError, match='iid_distribution is exponential; what'):
    trajectory_generators.DriftGenerator(
      distributions.Exponential(),
      distributions.Gamma(),
      (2.0, 1.0),
      switch_probability=0.1,
      step_scale=0.1,
    )


def test_other_name_of_the_ptw_source():
  registry = trajectory_generators.TRAJECTORY_GENERATORS
  assert registry['iid_ptw_cat'] is registry['ptw']


@pytest.mark.parametrize(
  ('name', 'kwargs', 'narrow'),
  [
    ('ptw', {}, {}),
    ('ptw', {'depth': 10}, {'depth': np.int8(10)}),
    ('regular_shift', {'shift_period': 3}, {'shift_period': np.int8(3)}),
  ],
)
def test_integers_of_numpy_are_sizes(name, kwargs, narrow):
  rng = jax.random.key(0)
  expected, _ = _make(name, **kwargs).sample(rng, 2, 100)
  source = _make(name, **narrow)
  for dtype in (np.int8, np.int64):
    batch, _ = source.sample(rng, dtype(2), dtype(100))
    np.testing.assert_array_equal(batch, expected)


@pytest.mark.parametrize('name', constants.TRAJECTORY_GENERATORS)
def test_equal_sources_share_their_programs(name):
  config = config_lib.DataConfig(
    trajectory_generator=name,
    trajectory_generator_kwargs=constants.source_kwargs(name),
  )
  source, equal = (constants.build_data_generator(config) for _ in range(2))
  assert source == equal and hash(source) == hash(equal)
  key = jax.random.key(0)
  source.sample(key, 4, 16), source.switch_points(key, 4, 16)
  with devices.count_compilations() as compilations:
    equal.sample(key, 4, 16), equal.switch_points(key, 4, 16)
  assert compilations.programs == 0
  config.parameter_distribution_params = (0.5, 2.0)
  assert constants.build_data_generator(config) != source


BAYES = {
  'static': predictors.OptimalCategoricalPredictor((0.5, 2.0)),
  'regular_shift': run_length_predictors.regular_shift_predictor(
    20, (0.5, 2.0)
  ),
  'random_shift': run_length_predictors.random_shift_predictor(
    'uniform', (1.0, 39.0), (0.5, 2.0)
  ),
  'ptw': ptw_predictors.PTWPredictor(6, (0.5, 2.0)),
  'iid_ptw_cat': ptw_predictors.PTWPredictor(6, (0.5, 2.0)),
  'lin': live_and_die_predictors.LADPredictor((0.5, 2.0)),
  'recurring': None,
  'drift': None,
  'mixture': mixture_predictors.MixturePredictor(
    (
      ptw_predictors.PTWPredictor(6, (0.5, 2.0)),
      live_and_die_predictors.LADPredictor((0.5, 2.0)),
      predictors.OptimalCategoricalPredictor((0.5, 2.0)),
      run_length_predictors.random_shift_predictor(
        'uniform', (1.0, 39.0), (0.5, 2.0)
      ),
    ),
    (0.25, 0.25, 0.25, 0.25),
  ),
}


@pytest.mark.parametrize(('name', 'expected'), BAYES.items(), ids=BAYES)
def test_source_knows_its_exact_predictor(name, expected):
  config = config_lib.DataConfig(
    trajectory_generator=name,
    trajectory_generator_kwargs=constants.source_kwargs(name),
    parameter_distribution_params=(0.5, 2.0),
  )
  source = constants.build_data_generator(config)
  assert source.bayes_predictor(33) == expected
  config.parameter_distribution = 'constant'
  config.parameter_distribution_params = (0.5, 0.5)
  assert constants.build_data_generator(config).bayes_predictor(33) is None


class _Halves(trajectory_generators.StaticGenerator):
  """A source from outside: one switch, in the middle."""

  def _switch_points_one(self, rng, seq_length):
    return jnp.arange(seq_length) == seq_length // 2


class _KnownHalves(_Halves):
  """The same, with its exact predictor."""

  def _bayes_predictor(self, seq_length, concentration):
    hazard = np.arange(1, seq_length) == seq_length // 2
    return run_length_predictors.RunLengthPredictor(hazard, concentration)


def test_source_from_outside_inherits_no_predictor_of_other_switches():
  prior = distributions.Categorical(2), distributions.Dirichlet(2), (0.5, 0.5)
  assert _Halves(*prior).bayes_predictor(8) is None
  known = _KnownHalves(*prior)
  batch, _ = known.sample(jax.random.key(0), 3, 8)
  posterior = known.bayes_predictor(8).switch_posterior(batch)
  np.testing.assert_allclose(
    posterior, known.switch_points(jax.random.key(0), 3, 8), atol=1e-6
  )


class _Alternating(_KnownHalves):
  """A source from outside whose parameters move inside a segment."""

  def parameters_over_time(self, rng, switches):
    starts = super().parameters_over_time(rng, switches)
    is_odd = jnp.arange(len(switches)) % 2 == 1
    return jnp.where(is_odd[:, None], starts[:, ::-1], starts)


class _FormerName(_KnownHalves):
  def _parameters_one(self, rng, switches):
    return jnp.tile(jnp.where(switches, 0.25, 0.75)[:, None], (1, 2))


def test_source_from_outside_moves_its_parameters_between_switches():
  prior = distributions.Categorical(2), distributions.Dirichlet(2), (0.5, 0.5)
  rng = jax.random.key(1)
  _, parameters = _Alternating(*prior).sample(rng, 3, 8)
  _, constant = _KnownHalves(*prior).sample(rng, 3, 8)
  np.testing.assert_array_equal(parameters[:, ::2], constant[:, ::2])
  np.testing.assert_array_equal(parameters[:, 1::2], constant[:, 1::2, ::-1])
  # Its switches have a predictor, which knows nothing of how it moves.
  assert _Alternating(*prior).bayes_predictor(8) is None


def test_hook_of_the_parameters_is_still_found_by_its_former_name():
  prior = distributions.Categorical(2), distributions.Dirichlet(2), (0.5, 0.5)
  source = _FormerName(*prior)
  _, parameters = source.sample(jax.random.key(2), 1, 8)
  expected = [0.75] * 4 + [0.25] + [0.75] * 3
  np.testing.assert_array_equal(parameters[0, :, 0], expected)
  assert source.bayes_predictor(8) is None
