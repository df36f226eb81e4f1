import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from nonstationary_mbml.experiments import distributions

# Every univariate distribution: parameters, and the same one in scipy.stats.
UNIVARIATE = {
  'beta': ((0.7, 2.5), stats.beta(0.7, 2.5)),
  'exponential': ((1.7,), stats.expon(scale=1 / 1.7)),
  'gamma': ((2.3, 0.8), stats.gamma(2.3, scale=1 / 0.8)),
  'gaussian': ((-1.2, 4.0), stats.norm(-1.2, 0.5)),
  'lomax': ((3.5, 2.0), stats.lomax(3.5, scale=2.0)),
  'uniform': ((-1.0, 2.5), stats.uniform(-1.0, 3.5)),
}
ALPHAS = {
  'jeffreys_2': (0.5, 0.5),
  'jeffreys_3': (0.5, 0.5, 0.5),
  'asymmetric': (0.3, 2.0, 1.1),
}
# Two-sided Kolmogorov-Smirnov tests with fixed seeds. Under the right law each
# fails with this probability.
FALSE_ALARM_RATE = 1e-4
NUM_SAMPLES = 20_000


def _ks_p_value(samples, cdf):
  return stats.kstest(np.asarray(samples, float), cdf).pvalue


@pytest.mark.parametrize('name', UNIVARIATE)
def test_densities_and_moments_are_scipys(x64, name):
  parameters, truth = UNIVARIATE[name]
  distribution = distributions.DISTRIBUTIONS[name]()
  parameters = jnp.array(parameters)
  x = np.concatenate([truth.ppf([0.01, 0.3, 0.5, 0.9, 0.999]), [-7.0, 30.0]])
  features = jnp.asarray(x)[:, None]
  np.testing.assert_allclose(
    distribution.density(features, parameters), truth.pdf(x), rtol=1e-8
  )
  np.testing.assert_allclose(
    distribution.log_density(features, parameters), truth.logpdf(x), rtol=1e-8
  )
  np.testing.assert_allclose(
    distribution.cdf(features, parameters)[:, 0], truth.cdf(x), rtol=1e-8
  )
  np.testing.assert_allclose(
    distribution.survival(features, parameters)[:, 0],
    truth.sf(x),
    rtol=1e-8,
  )
  np.testing.assert_allclose(distribution.mean(parameters), [truth.mean()])
  np.testing.assert_allclose(distribution.std(parameters), [truth.std()])
  np.testing.assert_allclose(
    distribution.entropy(parameters), truth.entropy(), rtol=1e-6
  )


@pytest.mark.parametrize('name', UNIVARIATE)
def test_samples_follow_the_cdf(name):
  parameters, truth = UNIVARIATE[name]
  samples = distributions.DISTRIBUTIONS[name]().sample(
    jax.random.key(0), jnp.array(parameters), (NUM_SAMPLES,)
  )
  assert samples.shape == (NUM_SAMPLES, 1)
  assert _ks_p_value(samples[:, 0], truth.cdf) > FALSE_ALARM_RATE


@pytest.mark.parametrize(
  ('name', 'other'),
  [
    ('beta', (1.5, 0.9)),
    ('exponential', (0.4,)),
    ('gamma', (1.1, 2.0)),
    ('gaussian', (0.3, 0.7)),
    ('uniform', (-2.0, 3.0)),
  ],
)
def test_kl_is_the_integral(x64, name, other):
  parameters, truth = UNIVARIATE[name]
  distribution = distributions.DISTRIBUTIONS[name]()
  parameters, other = jnp.array(parameters), jnp.array(other)
  # Mean of the log ratio over quantiles: the midpoint rule on the cdf.
  x = truth.ppf((np.arange(200_000) + 0.5) / 200_000)[:, None]
  ratio = distribution.log_density(x, parameters) - distribution.log_density(
    x, other
  )
  np.testing.assert_allclose(
    distribution.kl(parameters, other), ratio.mean(), rtol=1e-3
  )
  np.testing.assert_allclose(
    distribution.kl(parameters, parameters), 0, atol=1e-12
  )


def test_kl_of_uniform_outside_the_other_is_infinite():
  kl = distributions.Uniform().kl(jnp.array([0.0, 2.0]), jnp.array([0.0, 1.0]))
  assert kl == jnp.inf


@pytest.mark.parametrize('alpha', ALPHAS.values(), ids=ALPHAS)
def test_dirichlet_densities_and_moments_are_scipys(x64, alpha):
  truth = stats.dirichlet(alpha)
  distribution = distributions.Dirichlet(len(alpha))
  x = truth.rvs(5, random_state=0)
  parameters = jnp.array(alpha)
  np.testing.assert_allclose(
    distribution.density(x, parameters), [truth.pdf(row) for row in x]
  )
  np.testing.assert_allclose(
    distribution.log_density(x, parameters),
    [truth.logpdf(row) for row in x],
    atol=1e-12,
  )
  np.testing.assert_allclose(distribution.mean(parameters), truth.mean())
  np.testing.assert_allclose(distribution.std(parameters), np.sqrt(truth.var()))
  np.testing.assert_allclose(distribution.entropy(parameters), truth.entropy())


@pytest.mark.parametrize('traced', [False, True])
@pytest.mark.parametrize('alpha', ALPHAS.values(), ids=ALPHAS)
def test_dirichlet_samples_follow_the_cdfs_of_all_features(alpha, traced):
  distribution = distributions.Dirichlet(len(alpha))
  parameters = jnp.array(alpha)

  def sample(parameters):
    return distribution.sample(
      jax.random.key(1), parameters, (NUM_SAMPLES // 2, 2)
    )

  # Traced parameters take the general way, also where all are 1/2.
  samples = jax.jit(sample)(parameters) if traced else sample(parameters)
  assert samples.shape == (NUM_SAMPLES // 2, 2, len(alpha))
  np.testing.assert_allclose(samples.sum(axis=-1), 1, atol=1e-6)
  flat = samples.reshape(NUM_SAMPLES, -1)
  for feature, concentration in enumerate(alpha):
    truth = stats.beta(concentration, sum(alpha) - concentration)
    assert _ks_p_value(flat[:, feature], truth.cdf) > FALSE_ALARM_RATE
  # Features of one sample belong together.
  np.testing.assert_allclose(
    np.corrcoef(flat, rowvar=False)[0, 1],
    _dirichlet_correlation(alpha),
    atol=0.05,
  )


def _dirichlet_correlation(alpha):
  total = sum(alpha)
  first, second = alpha[:2]
  return -np.sqrt(first * second / ((total - first) * (total - second)))


@pytest.mark.parametrize('alpha', [0.1, 1e4, 1e7, 1e10])
def test_gamma_samples_of_extreme_shapes_follow_the_cdf(alpha):
  samples = distributions.Gamma().sample(
    jax.random.key(10), jnp.array([alpha, 1.0]), (NUM_SAMPLES,)
  )
  samples = np.asarray(samples[:, 0], float)
  if alpha > 1e6:  # Standardised: float32 has no more digits of a sample.
    spread = np.maximum(np.std(samples), 1e-30)
    assert 0.9 < spread / np.sqrt(alpha) < 1.5
  else:
    assert _ks_p_value(samples, stats.gamma(alpha).cdf) > FALSE_ALARM_RATE


def test_dirichlet_with_tiny_concentration_has_no_nan():
  samples = distributions.Dirichlet(3).sample(
    jax.random.key(2), jnp.full(3, 1e-3), (2000,)
  )
  assert not jnp.any(jnp.isnan(samples))
  np.testing.assert_allclose(samples.mean(axis=0), 1 / 3, atol=0.05)


def test_dirichlet_kl_of_two_features_is_that_of_beta(x64):
  parameters, other = jnp.array([0.7, 2.5]), jnp.array([1.5, 0.9])
  np.testing.assert_allclose(
    distributions.Dirichlet(2).kl(parameters, other),
    distributions.Beta().kl(parameters, other),
  )


def test_categorical_functions_are_scipys(x64):
  p, q = np.array([0.2, 0.0, 0.8]), np.array([0.3, 0.3, 0.4])
  distribution = distributions.Categorical(3)
  np.testing.assert_allclose(
    distribution.density(np.eye(3), jnp.array(p)), p, atol=1e-15
  )
  np.testing.assert_allclose(
    distribution.log_density(np.eye(3), jnp.array(q)), np.log(q)
  )
  np.testing.assert_allclose(distribution.mean(jnp.array(p)), p)
  np.testing.assert_allclose(
    distribution.std(jnp.array(p)), np.sqrt(p * (1 - p))
  )
  np.testing.assert_allclose(
    distribution.entropy(jnp.array(p)), stats.entropy(p)
  )
  np.testing.assert_allclose(
    distribution.kl(jnp.array(p), jnp.array(q)), stats.entropy(p, q)
  )
  assert distribution.kl(jnp.array(q), jnp.array(p)) == jnp.inf


def test_categorical_samples_have_the_probabilities():
  p = jnp.array([[0.1, 0.2, 0.7], [0.0, 1.0, 0.0]])
  samples = distributions.Categorical(3).sample(
    jax.random.key(3), p, (NUM_SAMPLES,)
  )
  assert samples.shape == (NUM_SAMPLES, 2, 3)
  np.testing.assert_array_equal(samples.sum(axis=-1), 1)
  counts = np.asarray(samples.sum(axis=0))
  assert counts[1].tolist() == [0, NUM_SAMPLES, 0]
  expected = NUM_SAMPLES * np.asarray(p[0], float)
  expected *= counts[0].sum() / expected.sum()
  assert stats.chisquare(counts[0], expected).pvalue > FALSE_ALARM_RATE


def test_constant_has_one_value():
  distribution = distributions.Constant(2)
  value = jnp.array([3.0, -1.0])
  samples = distribution.sample(jax.random.key(4), value, (5,))
  np.testing.assert_array_equal(samples, np.tile(value, (5, 1)))
  np.testing.assert_array_equal(distribution.mean(value), value)
  np.testing.assert_array_equal(distribution.std(value), 0)
  np.testing.assert_array_equal(distribution.entropy(value), 0)
  np.testing.assert_array_equal(distribution.density(value, value), 1)
  np.testing.assert_array_equal(distribution.density(value + 1, value), 0)
  np.testing.assert_array_equal(
    distribution.cdf(value + jnp.array([-1, 1]), value), [0, 1]
  )
  assert distribution.kl(value, value) == 0
  assert distribution.kl(value, value + 1) == jnp.inf


def test_lomax_moments_beyond_existence():
  distribution = distributions.Lomax()
  assert distribution.mean(jnp.array([0.8, 1.0]))[0] == jnp.inf
  assert distribution.std(jnp.array([1.5, 1.0]))[0] == jnp.inf
  assert jnp.isnan(distribution.std(jnp.array([0.8, 1.0]))[0])


def test_lomax_is_an_exponential_with_gamma_rate():
  rates = distributions.Gamma().sample(
    jax.random.key(5), jnp.array([3.5, 2.0]), (NUM_SAMPLES,)
  )
  samples = distributions.Exponential().sample(jax.random.key(6), rates)
  _, truth = UNIVARIATE['lomax']
  assert _ks_p_value(samples[:, 0], truth.cdf) > FALSE_ALARM_RATE


def test_features_are_independent_with_parameters_listed_by_kind():
  distribution = distributions.Gaussian(2)
  parameters = jnp.array([1.0, -1.0, 4.0, 0.25])  # Means, then precisions.
  np.testing.assert_allclose(distribution.mean(parameters), [1.0, -1.0])
  np.testing.assert_allclose(distribution.std(parameters), [0.5, 2.0])
  x = jnp.array([0.7, 0.1])
  np.testing.assert_allclose(
    distribution.log_density(x, parameters),
    stats.norm(1, 0.5).logpdf(0.7) + stats.norm(-1, 2).logpdf(0.1),
    rtol=1e-5,
  )
  np.testing.assert_allclose(
    distribution.entropy(parameters),
    stats.norm(1, 0.5).entropy() + stats.norm(-1, 2).entropy(),
    rtol=1e-6,
  )
  samples = distribution.sample(jax.random.key(7), parameters, (NUM_SAMPLES,))
  assert abs(np.corrcoef(samples, rowvar=False)[0, 1]) < 0.03


@pytest.mark.parametrize('name', sorted(distributions.DISTRIBUTIONS))
def test_logits_become_valid_parameters(name):
  distribution = distributions.DISTRIBUTIONS[name](2)
  logits = jax.random.normal(
    jax.random.key(8), (4, distribution.parameter_size)
  )
  parameters = distribution.logits_to_params(3 * logits)
  assert parameters.shape == logits.shape
  distribution.check_parameters('parameters', parameters)


@pytest.mark.parametrize('name', sorted(distributions.DISTRIBUTIONS))
def test_shapes_and_dtypes_follow_the_parameters(x64, name):
  distribution = distributions.DISTRIBUTIONS[name](2)
  for dtype in (jnp.float32, jnp.float64):
    logits = jnp.zeros((3, distribution.parameter_size), dtype)
    parameters = distribution.logits_to_params(logits)
    samples = distribution.sample(jax.random.key(9), parameters, (5, 4))
    assert samples.shape == (5, 4, 3, 2)
    assert samples.dtype == dtype
    assert distribution.density(samples, parameters).shape == (5, 4, 3)
    assert distribution.mean(parameters).shape == (3, 2)
    assert distribution.std(parameters).shape == (3, 2)
    assert distribution.entropy(parameters).shape == (3,)


def test_what_has_no_closed_form_says_so():
  with pytest.raises(NotImplementedError, match='lomax has no closed-form kl'):
    distributions.Lomax().kl(jnp.ones(2), jnp.ones(2))


@pytest.mark.parametrize(
  ('name', 'parameters', 'message'),
  [
    ('beta', (0.0, 1.0), 'alpha of beta must be finite and above 0'),
    ('gamma', (1.0, -1.0), 'rate of gamma'),
    ('gamma', (float('inf'), 1.0), 'shape of gamma must be finite'),
    ('gaussian', (0.0, 0.0), 'precision of gaussian'),
    ('uniform', (1.0, 1.0), 'low of uniform must be below'),
    ('categorical', (0.7, 0.7), 'sum to 1'),
    ('dirichlet', (0.5, 0.0), 'positive'),
    ('dirichlet', (0.5, 0.5, 0.5), 'must be 2 numbers'),
    ('exponential', (float('nan'),), 'NaN'),
    ('exponential', ('fast',), 'not numbers'),
  ],
)
def test_invalid_parameters_are_named(name, parameters, message):
  with pytest.raises(ValueError, match=message):
    distributions.DISTRIBUTIONS[name]().check_parameters('params', parameters)


def test_unknown_distribution_suggests_the_nearest():
  with pytest.raises(ValueError, match="did you mean 'dirichlet'"):
    distributions.DISTRIBUTIONS['dirichet']
