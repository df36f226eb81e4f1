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


@pytest.mark.parametrize('name', ['ptw', 'lin', 'random_shift', 'recurring'])
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
