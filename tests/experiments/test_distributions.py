import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special
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
# Parameters of products of two, where ones are not valid.
PAIRS = {
  'categorical': (0.25, 0.75),
  'lomax': (3.0, 3.0, 1.0, 1.0),
  'uniform': (0.0, 0.0, 1.0, 2.0),
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


def _sample(distribution, seed, parameters, shape=(NUM_SAMPLES,)):
  """Samples, drawn by one program."""
  draw = jax.jit(
    lambda parameters: distribution.sample(
      jax.random.key(seed), parameters, shape
    )
  )
  return np.asarray(draw(np.asarray(parameters, np.float32)))


def _ks_p_value(samples, cdf):
  return stats.kstest(np.asarray(samples, float), cdf).pvalue


@pytest.mark.parametrize('name', UNIVARIATE)
def test_densities_and_moments_are_scipys(x64, name):
  parameters, truth = UNIVARIATE[name]
  distribution = distributions.DISTRIBUTIONS[name]()
  x = np.concatenate([truth.ppf([0.01, 0.3, 0.5, 0.9, 0.999]), [-7.0, 30.0]])

  @jax.jit
  def functions(x, parameters):
    return {
      'pdf': distribution.density(x, parameters),
      'logpdf': distribution.log_density(x, parameters),
      'cdf': distribution.cdf(x, parameters)[:, 0],
      'sf': distribution.survival(x, parameters)[:, 0],
    }, {
      'mean': distribution.mean(parameters)[0],
      'std': distribution.std(parameters)[0],
      'entropy': distribution.entropy(parameters),
    }

  of_x, moments = functions(x[:, None], np.array(parameters))
  for function, values in of_x.items():
    np.testing.assert_allclose(
      values, getattr(truth, function)(x), rtol=1e-8, err_msg=function
    )
  for function, value in moments.items():
    rtol = 1e-6 if function == 'entropy' else 1e-7
    np.testing.assert_allclose(
      value, getattr(truth, function)(), rtol=rtol, err_msg=function
    )


@pytest.mark.parametrize('name', UNIVARIATE)
def test_samples_follow_the_cdf(name):
  parameters, truth = UNIVARIATE[name]
  samples = _sample(distributions.DISTRIBUTIONS[name](), 0, parameters)
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
  parameters, other = np.array(parameters), np.array(other)
  kl, log_density = jax.jit(distribution.kl), jax.jit(distribution.log_density)
  # Mean of the log ratio over quantiles: the midpoint rule on the cdf.
  x = truth.ppf((np.arange(200_000) + 0.5) / 200_000)[:, None]
  ratio = np.asarray(log_density(x, parameters)) - log_density(x, other)
  np.testing.assert_allclose(kl(parameters, other), np.mean(ratio), rtol=1e-3)
  np.testing.assert_allclose(kl(parameters, parameters), 0, atol=1e-12)


def test_kl_of_uniform_outside_the_other_is_infinite():
  kl = distributions.Uniform().kl(jnp.array([0.0, 2.0]), jnp.array([0.0, 1.0]))
  assert kl == jnp.inf


@pytest.mark.parametrize('alpha', ALPHAS.values(), ids=ALPHAS)
def test_dirichlet_densities_and_moments_are_scipys(x64, alpha):
  truth = stats.dirichlet(alpha)
  distribution = distributions.Dirichlet(len(alpha))
  x = truth.rvs(5, random_state=0)
  parameters = jnp.array(alpha)

  @jax.jit
  def functions(x, parameters):
    return (
      distribution.density(x, parameters),
      distribution.log_density(x, parameters),
      distribution.mean(parameters),
      distribution.std(parameters),
      distribution.entropy(parameters),
    )

  expected = (
    [truth.pdf(row) for row in x],
    [truth.logpdf(row) for row in x],
    truth.mean(),
    np.sqrt(truth.var()),
    truth.entropy(),
  )
  for values, exact in zip(functions(x, parameters), expected, strict=True):
    np.testing.assert_allclose(values, exact, atol=1e-12)


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
  samples = np.asarray(samples)
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
  samples = _sample(distributions.Gamma(), 10, [alpha, 1.0])
  samples = samples[:, 0].astype(float)
  if alpha > 1e6:  # Standardised: float32 has no more digits of a sample.
    spread = np.maximum(np.std(samples), 1e-30)
    assert 0.9 < spread / np.sqrt(alpha) < 1.5
  else:
    assert _ks_p_value(samples, stats.gamma(alpha).cdf) > FALSE_ALARM_RATE


def test_dirichlet_with_tiny_concentration_has_no_nan():
  samples = _sample(distributions.Dirichlet(3), 2, [1e-3] * 3, (2000,))
  assert not np.any(np.isnan(samples))
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
  p = np.array([[0.1, 0.2, 0.7], [0.0, 1.0, 0.0]])
  samples = _sample(distributions.Categorical(3), 3, p)
  assert samples.shape == (NUM_SAMPLES, 2, 3)
  np.testing.assert_array_equal(samples.sum(axis=-1), 1)
  counts = samples.sum(axis=0)
  assert counts[1].tolist() == [0, NUM_SAMPLES, 0]
  expected = NUM_SAMPLES * p[0]
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
  rates = _sample(distributions.Gamma(), 5, [3.5, 2.0])
  samples = _sample(distributions.Exponential(), 6, rates, ())
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
def test_shapes_and_dtypes_follow_the_parameters(x64, name):
  distribution = distributions.DISTRIBUTIONS[name](2)
  for dtype in (jnp.float32, jnp.float64):
    parameters = jnp.broadcast_to(
      jnp.array(PAIRS.get(name, (1.0,) * distribution.parameter_size), dtype),
      (3, distribution.parameter_size),
    )
    distribution.check_parameters('parameters', parameters)

    @jax.jit
    def functions(parameters):
      samples = distribution.sample(jax.random.key(9), parameters, (5, 4))
      return (
        samples,
        distribution.density(samples, parameters),
        distribution.mean(parameters),
        distribution.std(parameters),
        distribution.entropy(parameters),
      )

    outputs = functions(parameters)
    shapes = [(5, 4, 3, 2), (5, 4, 3), (3, 2), (3, 2), (3,)]
    assert [output.shape for output in outputs] == shapes
    assert {output.dtype for output in outputs} == {np.dtype(dtype)}


def test_a_distribution_of_ones_own_gives_four_functions():
  class Coin(distributions.Distribution):
    feature_size = parameter_size = 1

    def sample(self, rng, parameters, sample_shape=()):
      uniform = jax.random.uniform(rng, sample_shape + parameters.shape)
      return (uniform < parameters).astype(parameters.dtype)

    def log_density(self, features, parameters):
      return jnp.log(jnp.where(features == 1, parameters, 1 - parameters))

    def check_parameters(self, field, parameters, closed=False):
      pass

    def support(self, parameters):
      return np.zeros(1), np.ones(1)

  probability = Coin().density(jnp.zeros(1), jnp.array([0.25]))
  np.testing.assert_allclose(probability, [0.75])


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
    # What float32 cannot hold.
    ('beta', (1e-39, 1.0), 'alpha of beta .* as float32, which holds 1.17549'),
    (
      'beta',
      (1e-30, 1e8),
      'float32 loses 1e-30 beside a sum of 1e.08',
    ),
    ('beta', (2e38, 2e38), 'add up to 4e.38; for float32 their sum must be'),
    ('constant', (1e39,), 'value of constant must be finite'),
    ('dirichlet', (1e-39, 1e-39), 'float32 loses 1e-39 beside a sum of 2e-39'),
    ('dirichlet', (1e-30, 1e8), 'float32 loses 1e-30 beside a sum of 1e.08'),
    ('dirichlet', (2e38, 2e38), 'add up to 4e.38; for float32 .* 3.169e.29'),
    ('dirichlet', (1e308, 1e308), 'add up to inf'),
    ('dirichlet', ((1.0, 2.0), (1e-22, 1.0)), 'float32 loses 1e-22'),
    ('exponential', (1e39,), 'rate of exponential must be finite'),
    ('gamma', (1.0, 1e-39), 'rate of gamma must be finite and above 0'),
    ('gaussian', (0.0, 1e-39), 'precision of gaussian'),
    ('gaussian', (1e39, 1.0), 'mean of gaussian must be finite'),
    ('lomax', (1.0, 1e39), 'scale of lomax'),
    ('uniform', (1.0, 1.0 + 1e-9), 'low of uniform must be below'),
    ('uniform', (-3e38, 3e38), 'their difference as float32, which'),
  ],
)
def test_invalid_parameters_are_named(name, parameters, message):
  with pytest.raises(ValueError, match=message):
    distributions.DISTRIBUTIONS[name]().check_parameters('params', parameters)


def test_what_float32_holds_is_valid_and_drawn_from():
  alphas = [(1e-3, 1e3), (1e-19, 1e-19), (1e29, 1e29), (1e-3, 1e7)]
  for distribution in (distributions.Dirichlet(), distributions.Beta()):
    distribution.check_parameters('params', alphas)
  distributions.Gamma().check_parameters('params', (1e-30, 1e30))
  distributions.Gaussian().check_parameters('params', (1e-40, 1e-30))
  distributions.Uniform().check_parameters('params', (0.0, 1e-30))
  samples = _sample(distributions.Dirichlet(), 0, alphas, (1000,))
  np.testing.assert_allclose(
    samples.mean(axis=0), [(0, 1), (0.5, 0.5), (0.5, 0.5), (0, 1)], atol=0.08
  )


def test_unknown_distribution_suggests_the_nearest():
  with pytest.raises(ValueError, match="did you mean 'dirichlet'"):
    distributions.DISTRIBUTIONS['dirichet']


# Float32, with parameters from 1e-3 to 1e7. The truth is the textbook formula
# in float64, which at 1e7 loses 1e-7 at most, at the float32 parameters.
RANGE = np.float32([1e-3, 0.02, 0.7, 5.0, 300.0, 1e4, 1e6, 1e7])
FAMILIES = {
  'beta': distributions.Beta(),
  'gamma': distributions.Gamma(),
  'dirichlet_3': distributions.Dirichlet(3),
  'dirichlet_26': distributions.Dirichlet(26),
}


def _wide_parameters(name):
  """Parameters of all sizes together, and all alike, float32 `[N, P]`."""
  if name in ('beta', 'gamma'):
    return np.stack(np.meshgrid(RANGE, RANGE), axis=-1).reshape(-1, 2)
  size = FAMILIES[name].feature_size
  mixed = np.random.default_rng(0).choice(RANGE, (60, size))
  one_large = np.full((8, size), 1e-3, np.float32)
  one_large[:, 0] = RANGE
  return np.concatenate(
    [np.repeat(RANGE[:, None], size, axis=1), mixed, one_large]
  )


def _log_beta(alpha):
  return special.gammaln(alpha).sum(-1) - special.gammaln(alpha.sum(-1))


def _entropy(name, parameters):
  parameters = parameters.astype(float)
  if name == 'gamma':
    shape, rate = parameters.T
    log_gamma, digamma = special.gammaln(shape), special.digamma(shape)
    return shape - np.log(rate) + log_gamma + (1 - shape) * digamma
  total = parameters.sum(axis=-1)
  return (
    _log_beta(parameters)
    + (total - parameters.shape[-1]) * special.digamma(total)
    - ((parameters - 1) * special.digamma(parameters)).sum(axis=-1)
  )


def _kl(name, parameters, other):
  parameters, other = parameters.astype(float), other.astype(float)
  if name == 'gamma':
    (shape, rate), (other_shape, other_rate) = parameters.T, other.T
    return (
      (shape - other_shape) * special.digamma(shape)
      - special.gammaln(shape)
      + special.gammaln(other_shape)
      + other_shape * np.log(rate / other_rate)
      + shape * (other_rate - rate) / rate
    )
  mean_log = special.digamma(parameters) - special.digamma(
    parameters.sum(axis=-1, keepdims=True)
  )
  return (
    _log_beta(other)
    - _log_beta(parameters)
    + ((parameters - other) * mean_log).sum(axis=-1)
  )


def _log_density(name, x, parameters):
  x, parameters = x.astype(float), parameters.astype(float)
  if name == 'gamma':
    shape, rate = parameters.T
    return (
      special.xlogy(shape - 1, x[:, 0])
      + shape * np.log(rate)
      - rate * x[:, 0]
      - special.gammaln(shape)
    )
  if name == 'beta':
    log_x, log_rest = np.log(x[:, 0]), np.log1p(-x[:, 0])
    logs = np.stack([log_x, log_rest], axis=-1)
  else:
    logs = np.log(x / x.sum(axis=-1, keepdims=True))
  return ((parameters - 1) * logs).sum(axis=-1) - _log_beta(parameters)


def _assert_close_to_1e_4(actual, truth):
  """Relative error; absolute where the truth is below 1."""
  errors = np.abs(np.asarray(actual, float) - truth)
  np.testing.assert_array_less(errors / np.maximum(np.abs(truth), 1), 1e-4)


@pytest.mark.parametrize('name', FAMILIES)
def test_float32_entropy_does_not_cancel(name):
  parameters = _wide_parameters(name)
  actual = jax.jit(FAMILIES[name].entropy)(parameters)
  _assert_close_to_1e_4(actual, _entropy(name, parameters))


@pytest.mark.parametrize('name', FAMILIES)
def test_float32_kl_does_not_cancel_and_is_not_negative(name):
  parameters = _wide_parameters(name)
  rng = np.random.default_rng(1)
  close = [
    parameters * np.exp(size * rng.standard_normal(parameters.shape))
    for size in (1e-6, 1e-4, 1e-2, 0.5)
  ]
  others = [parameters, parameters[::-1], rng.permuted(parameters), *close]
  kl = jax.jit(FAMILIES[name].kl)
  for other in others:
    other = np.clip(other.astype(np.float32), RANGE[0], RANGE[-1])
    actual = kl(parameters, other)
    _assert_close_to_1e_4(actual, _kl(name, parameters, other))
    assert np.min(actual) >= 0


@pytest.mark.parametrize('name', FAMILIES)
def test_float32_log_density_does_not_cancel(name):
  parameters = np.repeat(_wide_parameters(name), 4, axis=0)
  # At typical points, some standard deviations from the mean, and far away.
  rng = np.random.default_rng(2)
  if name == 'gamma':
    shape, rate = parameters.T.astype(float)
    x = rng.gamma(np.maximum(shape, 0.1))[:, None] / rate[:, None]
  else:
    x = rng.gamma(np.maximum(parameters, 0.1))
    x = x[:, :1] / x.sum(axis=-1, keepdims=True) if name == 'beta' else x
  x[::4] *= 1 + 1e-3 * rng.standard_normal(x[::4].shape)
  x[1::4] *= rng.uniform(0.5, 1, x[1::4].shape)
  if name.startswith('dirichlet'):
    x /= x.sum(axis=-1, keepdims=True)
  x = np.maximum(x.astype(np.float32), 1e-20)
  if name == 'beta':
    x = np.minimum(x, np.float32(1 - 1e-6))
  actual = jax.jit(FAMILIES[name].log_density)(x, parameters)
  _assert_close_to_1e_4(actual, _log_density(name, x, parameters))


@pytest.mark.parametrize(
  ('name', 'function', 'arguments', 'truth'),
  [
    ('beta', 'entropy', [[1e6, 1e6]], -6.5285397),
    ('dirichlet_3', 'entropy', [[1e6] * 3], -13.7241648),
    ('gamma', 'entropy', [[1e6, 1.0]], 8.3266939),
    ('beta', 'kl', [[1e4, 1e4], [10100.0, 1e4]], 0.2487758),
    ('dirichlet_3', 'log_density', [[1 / 3] * 3, [1e6] * 3], 14.7241649),
  ],
)
def test_float32_of_large_parameters_outside_of_jit(
  name, function, arguments, truth
):
  actual = getattr(FAMILIES[name], function)(*map(jnp.array, arguments))
  np.testing.assert_allclose(actual, truth, rtol=1e-6)


@pytest.mark.parametrize('dtype', [jnp.float16, jnp.bfloat16])
def test_samples_of_a_dirichlet_in_narrow_floats_have_a_density(dtype):
  dirichlet, parameters = distributions.Dirichlet(5), np.full(5, 2, dtype)
  sample = jax.jit(lambda p: dirichlet.sample(jax.random.key(0), p, (200,)))
  samples = sample(parameters)
  densities = jax.jit(dirichlet.log_density)(samples, parameters)
  assert densities.dtype == dtype
  assert np.all(np.isfinite(np.asarray(densities, np.float32)))


def test_gradients_of_entropy_and_kl_are_the_textbooks():
  """In float32, for parameters from 1e-2 to 1e4."""
  alpha, other = (
    np.float32(10.0) ** np.random.default_rng(seed).uniform(-2, 4, (200, 3))
    for seed in (0, 1)
  )
  alpha, other = alpha.astype(np.float32), other.astype(np.float32)
  dirichlet = distributions.Dirichlet(3)
  entropy = jax.jit(jax.grad(lambda a: dirichlet.entropy(a).sum()))(alpha)
  kl = jax.jit(jax.grad(lambda b: dirichlet.kl(alpha, b).sum()))(other)
  a, b = alpha.astype(float), other.astype(float)
  total = a.sum(axis=1, keepdims=True)
  trigamma = lambda x: special.polygamma(1, x)
  _assert_close_to_1e_4(
    entropy, (total - 3) * trigamma(total) - (a - 1) * trigamma(a)
  )
  digamma = special.digamma
  _assert_close_to_1e_4(
    kl,
    digamma(b)
    - digamma(b.sum(axis=1, keepdims=True))
    - digamma(a)
    + digamma(total),
  )


@pytest.mark.parametrize('name', ['gamma', 'dirichlet_3'])
def test_gradients_of_wide_parameters_are_finite(name):
  family, parameters = FAMILIES[name], _wide_parameters(name)
  x = np.full((1, family.feature_size), 1 / family.feature_size, np.float32)

  @jax.grad
  def gradient(pair):
    return (
      family.entropy(pair[0]).sum()
      + family.kl(*pair).sum()
      + family.log_density(x, pair[0]).sum()
    )

  others = np.array([parameters, parameters[::-1]])
  same = np.array([parameters, parameters])
  gradients = jax.jit(jax.vmap(gradient))(np.stack([others, same]))
  assert np.all(np.isfinite(gradients))


def test_gradients_of_log_densities_are_the_textbooks():
  parameters, x = _wide_parameters('gamma'), np.float32(0.7)
  shape, rate = parameters.T.astype(float)
  gradients = jax.jit(
    jax.grad(lambda p: distributions.Gamma().log_density(x, p).sum())
  )(parameters)
  truth = [
    np.log(float(x) * rate) - special.digamma(shape),
    shape / rate - float(x),
  ]
  _assert_close_to_1e_4(gradients, np.stack(truth, axis=-1))

  alpha, probs = _wide_parameters('dirichlet_3'), np.float32([0.1, 0.2, 0.7])
  gradients = jax.jit(
    jax.grad(lambda a: distributions.Dirichlet(3).log_density(probs, a).sum())
  )(alpha)
  total = alpha.astype(float).sum(axis=-1, keepdims=True)
  truth = np.log(probs.astype(float) / probs.sum(dtype=float))
  truth = truth + special.digamma(total) - special.digamma(alpha.astype(float))
  _assert_close_to_1e_4(gradients, truth)


@pytest.mark.parametrize(
  ('distribution', 'parameters'),
  [
    (distributions.Categorical(3), [0.1, 0.3, 0.6]),
    (distributions.Exponential(), [2000.0]),
    (distributions.Gaussian(), [0.5, 2000.0]),
  ],
  ids=['categorical', 'exponential', 'gaussian'],
)
def test_float32_kl_of_close_pairs_is_not_negative(distribution, parameters):
  noise = np.random.default_rng(3).standard_normal((1000, len(parameters)))
  others = parameters * (1 + 1e-4 * noise)
  if len(parameters) == 3:
    others /= others.sum(axis=-1, keepdims=True)
  kl = jax.jit(distribution.kl)(
    np.array(parameters, np.float32), others.astype(np.float32)
  )
  assert np.all(np.asarray(kl) >= 0)


def test_float32_kl_of_close_exponentials_keeps_its_digits():
  other = np.float32(1.001)
  kl = distributions.Exponential().kl(jnp.array([1.0]), jnp.array([other]))
  excess = float(other) - 1
  np.testing.assert_allclose(kl, excess - np.log1p(excess), rtol=1e-5)
  kl = distributions.Gaussian().kl(
    jnp.array([0.0, 1.0]), jnp.array([0.0, other])
  )
  np.testing.assert_allclose(kl, (excess - np.log1p(excess)) / 2, rtol=1e-5)


def test_float32_std_beside_a_dominating_concentration():
  alpha = np.float32([1e7, 1e-3])
  truth = stats.beta(*alpha.astype(float)).std()
  for distribution in (distributions.Dirichlet(2), distributions.Beta()):
    std = distribution.std(jnp.array(alpha))
    np.testing.assert_allclose(std, truth, rtol=1e-5)
  std = distributions.Beta().std(jnp.array([1e25, 1e25]))
  np.testing.assert_allclose(std, np.sqrt(1 / 8e25), rtol=1e-5)


def test_gradients_at_probability_zero_are_those_of_the_others():
  categorical = distributions.Categorical(3)
  symbol = jnp.array([1.0, 0.0, 0.0])
  p, q = jnp.array([0.5, 0.5, 0.0]), jnp.array([0.25, 0.75, 0.0])
  gradient = jax.jit(jax.grad(categorical.log_density, argnums=1))(symbol, p)
  np.testing.assert_array_equal(gradient, [2, 0, 0])
  gradient = jax.jit(jax.grad(categorical.entropy))(p)
  np.testing.assert_allclose(gradient, [np.log(2) - 1] * 2 + [0], rtol=1e-6)
  gradients = jax.jit(jax.grad(categorical.kl, argnums=(0, 1)))(p, q)
  np.testing.assert_allclose(
    gradients,
    [[1 + np.log(2), 1 + np.log(2 / 3), 0], [-2, -2 / 3, 0]],
    rtol=1e-6,
  )
  # A symbol of probability 0 that was drawn.
  assert categorical.log_density(symbol[::-1], p) == -jnp.inf


@pytest.mark.parametrize('name', [*UNIVARIATE, 'constant'])
def test_gradients_outside_the_support_are_zero(name):
  parameters = jnp.array(UNIVARIATE[name][0] if name in UNIVARIATE else (3.0,))
  distribution = distributions.DISTRIBUTIONS[name]()
  # A Gaussian has density everywhere but at infinity.
  x = jnp.array([[-np.inf if name == 'gaussian' else -2.0], [np.inf]])
  values, gradients = jax.jit(
    jax.vmap(
      jax.value_and_grad(distribution.log_density, argnums=(0, 1)), (0, None)
    )
  )(x, parameters)
  np.testing.assert_array_equal(values, -np.inf)
  assert not any(np.any(gradient) for gradient in gradients)


def test_gradients_of_moments_that_do_not_exist_are_zero():
  lomax = distributions.Lomax()
  for function, shape in ((lomax.mean, 1.0), (lomax.std, 1.5), (lomax.std, 2)):
    gradient = jax.jit(jax.grad(lambda p, f=function: f(p)[0]))(
      np.float32([shape, 1.0])
    )
    np.testing.assert_array_equal(gradient, [0, 0])


def test_dirichlet_off_and_on_the_edge_of_the_simplex():
  cases = [
    # Off the simplex, in sum and in sign.
    ([0.5, 0.5, 0.5], [2.0, 2.0, 2.0], -np.inf),
    ([0.5, 0.5, 0.01], [2.0, 2.0, 2.0], -np.inf),
    ([0.7, 0.5, -0.2], [2.0, 2.0, 2.0], -np.inf),
    ([1.0, 0.5, -0.5], [0.5, 1.0, 1.0], -np.inf),
    # On its boundary; 0 times infinity is 0.
    ([0.0, 0.0, 1.0], [0.5, 2.0, 2.0], -np.inf),
    ([0.0, 0.5, 0.5], [0.5, 2.0, 2.0], np.inf),
    ([0.0, 0.0, 1.0], [1.0, 1.0, 1.0], np.log(2)),
    ([0.0, 0.25, 0.75], [1.0, 2.0, 2.0], np.log(24 * 3 / 16)),
    # What is not a number stays so.
    ([np.nan, 0.5, 0.5], [2.0, 2.0, 2.0], np.nan),
  ]
  x, alpha, truth = map(np.float32, zip(*cases, strict=True))
  values, gradients = jax.jit(
    jax.vmap(jax.value_and_grad(distributions.Dirichlet(3).log_density, (0, 1)))
  )(x, alpha)
  np.testing.assert_allclose(values, truth, rtol=1e-6)
  gradients = np.array(gradients)[:, :-1]
  assert np.all(np.isfinite(gradients))
  assert not np.any(gradients[:, :4])


def test_float32_points_of_the_simplex_are_on_it():
  probs = np.random.default_rng(0).dirichlet([0.7] * 26, 1000)
  log_density = jax.jit(distributions.Dirichlet(26).log_density)(
    probs.astype(np.float32), np.full(26, 0.7, np.float32)
  )
  truth = _log_density('dirichlet_26', probs, np.full(26, 0.7))
  np.testing.assert_allclose(log_density, truth, rtol=1e-5)


@pytest.mark.parametrize(
  ('name', 'x', 'parameters', 'log_density'),
  [
    ('beta', [0.0], [0.5, 2.0], np.inf),
    ('beta', [0.0], [1.0, 2.0], np.log(2)),
    ('beta', [0.0], [2.0, 2.0], -np.inf),
    ('beta', [1.0], [2.0, 0.5], np.inf),
    ('beta', [1.0], [2.0, 1.0], np.log(2)),
    ('beta', [1.0], [2.0, 2.0], -np.inf),
    ('beta', [0.0, 0.0], [0.5, 2.0, 2.0, 2.0], -np.inf),
    ('beta', [0.0, 2.0], [0.5, 2.0, 2.0, 2.0], -np.inf),
    ('gamma', [0.0], [0.5, 3.0], np.inf),
    ('gamma', [0.0], [1.0, 3.0], np.log(3)),
    ('gamma', [0.0], [2.0, 3.0], -np.inf),
    ('exponential', [0.0], [3.0], np.log(3)),
  ],
)
def test_log_density_at_the_edge_of_the_support_is_the_limit(
  name, x, parameters, log_density
):
  distribution = distributions.DISTRIBUTIONS[name](len(x))
  actual = distribution.log_density(jnp.array(x), jnp.array(parameters))
  np.testing.assert_allclose(actual, log_density, rtol=1e-6)


def test_categorical_gives_probability_to_one_hot_symbols_only():
  features = np.float32([[1, 1, 0], [0.5, 0.5, 0], [0, 0, 0]])
  log_density = jax.jit(distributions.Categorical(3).log_density)(
    features, np.float32([0.5, 0.3, 0.2])
  )
  np.testing.assert_array_equal(log_density, -np.inf)
