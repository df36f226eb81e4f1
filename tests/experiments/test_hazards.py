import jax
import numpy as np
import pytest
from scipy import stats

from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments import distributions
from nonstationary_mbml.experiments import hazards
from nonstationary_mbml.experiments import live_and_die_predictors

# X of the length max(1, round X), and the same in scipy.stats.
LAWS = {
  'uniform': ((1.0, 39.0), stats.uniform(1, 38)),
  'exponential': ((0.2,), stats.expon(scale=5)),
  'gamma': ((3.0, 0.5), stats.gamma(3, scale=2)),
  'gaussian': ((2.0, 0.25), stats.norm(2, 2)),
  # Peaked: both tails are far below what 1 - cdf can hold.
  'peaked_gaussian': ((100.0, 0.25), stats.norm(100, 2)),
  'lomax': ((1.5, 4.0), stats.lomax(1.5, scale=4)),
}


def _probs(hazard, num):
  """f(1..num), S(0..num - 1) and h(1..num)."""
  pmf, survival = np.exp(hazards.as_hazard(hazard).log_probs(num))
  return pmf, survival, pmf / np.where(survival > 0, survival, 1)


@pytest.mark.parametrize(
  'hazard',
  [
    0.3,
    (0.0, 0.0, 0.2, 0.7),
    live_and_die_predictors.hazard,
    hazards.KnownPeriod(5),
    hazards.LengthDistribution((0.5, 0.0, 0.25, 0.25)),
    hazards.RoundedLengths(distributions.Uniform(), (1.0, 39.0)),
  ],
)
def test_a_segment_ends_or_goes_on(hazard):
  pmf, survival, _ = _probs(hazard, 30)
  np.testing.assert_allclose(survival[0], 1)
  np.testing.assert_allclose(survival[:-1] - pmf[:-1], survival[1:], atol=1e-14)


def test_worked_examples_of_the_module():
  pmf, survival, hazard = _probs(hazards.KnownPeriod(3), 4)
  np.testing.assert_array_equal(hazard, [0, 0, 1, 0])
  np.testing.assert_array_equal(survival, [1, 1, 1, 0])
  np.testing.assert_array_equal(pmf, [0, 0, 1, 0])
  pmf, survival, hazard = _probs(live_and_die_predictors.hazard, 3)
  np.testing.assert_allclose(hazard[:2], [1 / 2, 1 / 4])
  np.testing.assert_allclose(survival, [1, 1 / 2, 3 / 8])
  np.testing.assert_allclose(pmf[:2], [1 / 2, 1 / 8])


def test_table_goes_on_with_its_last_value():
  _, _, hazard = _probs((0.5, 0.1), 6)
  np.testing.assert_allclose(hazard, [0.5, 0.1, 0.1, 0.1, 0.1, 0.1])


def test_hazards_of_a_pmf_are_its_ratios():
  _, _, hazard = _probs(hazards.LengthDistribution((0.2, 0.0, 0.3, 0.5)), 4)
  np.testing.assert_allclose(hazard, [0.2, 0, 0.3 / 0.8, 1])


def test_small_tails_of_a_pmf_keep_their_digits():
  _, _, hazard = _probs(
    hazards.LengthDistribution((1 - 1e-20, 4e-21, 6e-21)), 3
  )
  np.testing.assert_allclose(hazard[1:], [0.4, 1])


@pytest.mark.parametrize('name', LAWS)
def test_rounded_lengths_are_those_of_scipy(name):
  parameters, law = LAWS[name]
  distribution = distributions.DISTRIBUTIONS[name.removeprefix('peaked_')]()
  hazard = hazards.RoundedLengths(distribution, parameters)
  # Far into the tails, where 1 - cdf or 1 - survival have lost all digits.
  pmf, survival, _ = _probs(hazard, 300)
  halves = np.arange(1, 301) + 0.5
  truth = np.concatenate([[1.0], law.sf(halves[:-1])])
  np.testing.assert_allclose(survival, truth, rtol=1e-9)
  # From the side where it is small.
  below, above = np.diff(law.cdf(halves)), -np.diff(law.sf(halves))
  exact = np.where(law.cdf(halves[1:]) < 0.5, below, above)
  np.testing.assert_allclose(pmf[1:], exact, rtol=1e-6)
  np.testing.assert_allclose(pmf[0], law.cdf(1.5), rtol=1e-9)


@pytest.mark.parametrize(
  ('value', 'length'), [(-3.0, 1), (0.5, 1), (2.5, 2), (3.5, 4), (7.2, 7)]
)
def test_constant_length_rounds_as_the_source_does(value, length):
  hazard = hazards.RoundedLengths(distributions.Constant(), (value,))
  pmf, _, _ = _probs(hazard, 10)
  assert np.argmax(pmf) + 1 == length
  switches = _random_shift('constant', (value,)).switch_points(
    jax.random.key(0), 1, 10
  )
  assert np.argmax(switches[0]) == length


def _random_shift(name, parameters):
  return constants.build_data_generator(
    config_lib.DataConfig(
      trajectory_generator='random_shift',
      trajectory_generator_kwargs={
        'shift_distribution': name,
        'shift_parameters': parameters,
      },
    )
  )


@pytest.mark.parametrize('name', ['uniform', 'gaussian', 'lomax'])
def test_rounded_lengths_are_those_the_source_samples(name):
  """Chi-square test with a fixed seed; false-alarm rate 1e-4."""
  parameters, _ = LAWS[name]
  num, longest = 20_000, 12
  switches = _random_shift(name, parameters).switch_points(
    jax.random.key(0), num, longest + 1
  )
  observed = np.bincount(np.argmax(switches, axis=1), minlength=longest + 1)
  pmf, _, _ = _probs(
    hazards.RoundedLengths(distributions.DISTRIBUTIONS[name](), parameters),
    longest,
  )
  expected = num * np.array([1 - pmf.sum(), *pmf])  # At 0: longer than that.
  assert stats.chisquare(observed, expected).pvalue > 1e-4


@pytest.mark.parametrize('kind', [tuple, list, np.array])
def test_laws_take_any_sequence_of_numbers(kind):
  table = hazards.as_hazard(kind([0.5, 0.1]))
  pmf = hazards.LengthDistribution(kind([0.5, 0.5]))
  rounded = hazards.RoundedLengths(distributions.Uniform(), kind([1.0, 4.0]))
  # Laws are keys of a cache.
  assert len({table, pmf, rounded}) == 3
  assert table == hazards.HazardTable((0.5, 0.1))


def test_function_may_look_up_a_table():
  table = np.linspace(0.1, 0.9, 1000)
  _, _, hazard = _probs(lambda length: table[length], 5)
  np.testing.assert_allclose(hazard, table[1:6])


def test_rounded_lengths_are_exact_inside_jit():
  hazard = hazards.RoundedLengths(distributions.Gamma(), (3.0, 0.5))

  @jax.jit
  def inside():
    tables.append(hazard.log_probs(80))
    return 0

  tables = [hazard.log_probs(80)]
  inside()
  assert tables[1][0].dtype == np.float64
  np.testing.assert_array_equal(*tables)


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: hazards.as_hazard(1.5), 'hazard is 1.5 at length 1'),
    (lambda: hazards.as_hazard((0.1, -0.2)), 'hazard is -0.2 at length 2'),
    (lambda: hazards.as_hazard((0.1, np.nan)), 'hazard is nan at length 2'),
    (lambda: hazards.as_hazard(()), 'hazard is an empty table'),
    (lambda: hazards.as_hazard('constant'), "hazard is 'constant'; it must be"),
    (lambda: hazards.as_hazard(((0.1,), (0.2, 0.3))), 'hazard is .* must be'),
    (
      lambda: hazards.as_hazard(lambda a: 0.0 if a < 5 else 0.1),
      'hazard must map an array of lengths',
    ),
    (lambda: jax.jit(hazards.as_hazard)(0.1), 'hazard is traced'),
    (lambda: hazards.LengthDistribution('ab'), "pmf is 'ab'; it must be"),
    (lambda: hazards.as_hazard(lambda a: a / 8), 'hazard is 1.125 at length 9'),
    (lambda: hazards.as_hazard(lambda a: a[:3]), r'returns shape \(3,\)'),
    (lambda: hazards.KnownPeriod(0), 'period is 0'),
    (lambda: hazards.LengthDistribution((0.5, 0.4)), 'they sum to 0.9'),
    (lambda: hazards.LengthDistribution((1.5, -0.5)), 'the least is -0.5'),
    (lambda: hazards.LengthDistribution(()), 'they sum to 0'),
    (
      lambda: hazards.RoundedLengths(distributions.Uniform(), (3.0, 1.0)),
      'parameters',
    ),
    (
      lambda: hazards.RoundedLengths(distributions.Uniform(2), (1.0,) * 4),
      'has 2 features',
    ),
  ],
)
def test_wrong_laws_are_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()
