"""Distributions of symbols, of their parameters and of segment lengths.

A distribution is an object without parameters; every function takes them as an
array whose last axis holds all of them. Shapes, with F features of a sample
and P parameters:

  parameters                         batch_shape + (P,)
  sample(rng, parameters, shape)     shape + batch_shape + (F,)
  density, log_density(x, params)    batch_shape          x: batch_shape + (F,)
  mean, std(parameters)              batch_shape + (F,)
  cdf, survival(x, parameters)       batch_shape + (F,)   feature by feature
  entropy, kl(parameters, other)     batch_shape          in nats

A univariate distribution with `feature_size` F is a product of F independent
ones, its parameters listed kind by kind: Beta with F = 2 takes
(alpha_1, alpha_2, beta_1, beta_2). What has no closed form raises
NotImplementedError.

Outside of the support the density is 0, and so are its gradients; on the edge
it is the limit, and 0 times infinity is 0. Where a log density inside of it is
too low for the dtype, it has no gradients. In float32, entropy, kl and
log_density have a relative error below 1e-4 (absolute where they are below 1)
for parameters from 1e-3 to 1e7. The cdf and survival of Beta, Dirichlet and
Gamma are JAX's incomplete functions: in float32 to 1e-3, for parameters to 1e3.
"""

import abc
from collections.abc import Sequence
import itertools
import math
from typing import Any
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.scipy import special
import numpy as np

from nonstationary_mbml import base_config

# Largest deviation from 1 of probabilities that come from float32 sums.
_SUM_TOLERANCE = 1e-5


class Distribution(base_config.EqualByValue, abc.ABC):
  """A family of distributions over feature vectors.

  Attributes:
    feature_size: F, the length of one sample.
    parameter_size: P, the number of parameters.
  """

  feature_size: int
  parameter_size: int

  @abc.abstractmethod
  def sample(
    self,
    rng: jax.Array,
    parameters: jax.Array,
    sample_shape: tuple[int, ...] = (),
  ) -> jax.Array:
    """Returns independent samples, sample_shape + batch_shape + (F,)."""

  @abc.abstractmethod
  def log_density(
    self, features: jax.Array, parameters: jax.Array
  ) -> jax.Array:
    """Returns the log density (or log probability) of the features."""

  def density(self, features: jax.Array, parameters: jax.Array) -> jax.Array:
    """Returns the density, or the probability, of the features."""
    return jnp.exp(self.log_density(features, parameters))

  def mean(self, parameters: jax.Array) -> jax.Array:
    """Returns the mean of every feature."""
    raise self._no_closed_form('mean')

  def std(self, parameters: jax.Array) -> jax.Array:
    """Returns the standard deviation of every feature."""
    raise self._no_closed_form('std')

  def cdf(self, features: jax.Array, parameters: jax.Array) -> jax.Array:
    """Returns P(X <= x) for every feature on its own."""
    raise self._no_closed_form('cdf')

  def survival(self, features: jax.Array, parameters: jax.Array) -> jax.Array:
    """Returns P(X > x) for every feature on its own, exact in the tail."""
    raise self._no_closed_form('survival function')

  def entropy(self, parameters: jax.Array) -> jax.Array:
    """Returns the (differential) entropy, in nats."""
    raise self._no_closed_form('entropy')

  def kl(self, parameters: jax.Array, other: jax.Array) -> jax.Array:
    """Returns KL(parameters || other), in nats."""
    raise self._no_closed_form('kl')

  @abc.abstractmethod
  def check_parameters(
    self, field: str, parameters: Any, closed: bool = False
  ) -> None:
    """Raises ValueError unless concrete parameters are valid.

    Args:
      field: Name for the message.
      parameters: `[..., P]`.
      closed: Whether to allow the limits of the allowed range, too.
    """

  @abc.abstractmethod
  def support(self, parameters: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns the least and greatest value `[F]` of every feature."""

  def check_fits(
    self, field: str, prior: 'Distribution', parameters: Any
  ) -> None:
    """Raises ValueError unless `prior` always draws valid parameters.

    Args:
      field: Name of the prior, for the message.
      prior: Distribution over this one's parameters.
      parameters: The prior's own, `[P]`.
    """
    self._check_size(field, prior)
    if isinstance(prior, Categorical):
      raise ValueError(f'{field} categorical draws symbols, not parameters')
    for corner in itertools.product(
      prior.support(parameters), repeat=self._kinds()
    ):
      kinds = [
        np.split(part, self._kinds())[kind] for kind, part in enumerate(corner)
      ]
      self.check_parameters(
        f'{field} does not fit: it can draw parameters that {self.name} '
        'cannot take;',
        np.concatenate(kinds),
        # The limits of a continuous prior have probability 0.
        closed=not isinstance(prior, Constant),
      )

  @property
  def name(self) -> str:
    """The name in `DISTRIBUTIONS`."""
    return type(self).__name__.lower()

  def _kinds(self) -> int:
    """Number of kinds of parameters, each `feature_size` long."""
    return self.parameter_size // self.feature_size

  def _check_size(self, field: str, prior: 'Distribution') -> None:
    if prior.feature_size != self.parameter_size:
      raise ValueError(
        f'{field} has feature_size {prior.feature_size}, but {self.name} with '
        f'feature_size {self.feature_size} takes {self.parameter_size} '
        'parameters'
      )

  def _no_closed_form(self, what: str) -> NotImplementedError:
    return NotImplementedError(f'{self.name} has no closed-form {what}')

  def _concrete(self, field: str, parameters: Any) -> np.ndarray:
    try:
      values = np.asarray(parameters, dtype=float)
    except (TypeError, ValueError) as error:
      raise ValueError(f'{field} {parameters!r} are not numbers') from error
    if values.shape[-1:] != (self.parameter_size,):
      raise ValueError(
        f'{field} {parameters!r} must be {self.parameter_size} numbers for '
        f'{self.name} with feature_size {self.feature_size}'
      )
    if np.any(np.isnan(values)):
      raise ValueError(f'{field} {parameters!r} have a NaN')
    return values


class _Univariate(Distribution):
  """Product of `feature_size` independent real-valued distributions.

  A subclass gives the functions of one feature with a trailing underscore;
  parameters come as separate arrays, one per kind.
  """

  # Name and least value of each kind of parameter; all but -inf exclusive.
  parameter_kinds: ClassVar[dict[str, float]]
  # Least and greatest value of a feature.
  limits: ClassVar[tuple[float, float]] = (0.0, math.inf)

  def __init__(self, feature_size: int = 1):
    self.feature_size = base_config.check_int('feature_size', feature_size, 1)
    self.parameter_size = self.feature_size * len(self.parameter_kinds)

  def sample(
    self,
    rng: jax.Array,
    parameters: jax.Array,
    sample_shape: tuple[int, ...] = (),
  ) -> jax.Array:
    parameters = self._split(parameters)
    shape = sample_shape + parameters[0].shape
    return self.sample_(rng, *parameters, shape)

  def log_density(
    self, features: jax.Array, parameters: jax.Array
  ) -> jax.Array:
    low, high = self._limits(*self._split(parameters))
    outside = (features < low) | (features > high) | jnp.isinf(features)
    # Where there is no density, a point that has one: gradients are then 0.
    inside = jnp.where(outside, jnp.clip(0.5, low, high), features)
    log_densities = self.log_density_(inside, *self._split(parameters))
    return _log_product(jnp.where(outside, -jnp.inf, log_densities))

  def mean(self, parameters: jax.Array) -> jax.Array:
    return self.mean_(*self._split(parameters))

  def std(self, parameters: jax.Array) -> jax.Array:
    return self.std_(*self._split(parameters))

  def cdf(self, features: jax.Array, parameters: jax.Array) -> jax.Array:
    low, high = self._limits(*self._split(parameters))
    values = self.cdf_(jnp.clip(features, low, high), *self._split(parameters))
    return jnp.where(features < low, 0.0, values)

  def survival(self, features: jax.Array, parameters: jax.Array) -> jax.Array:
    low, high = self._limits(*self._split(parameters))
    values = self.survival_(
      jnp.clip(features, low, high), *self._split(parameters)
    )
    return jnp.where(features < low, 1.0, values)

  def entropy(self, parameters: jax.Array) -> jax.Array:
    return self.entropy_(*self._split(parameters)).sum(axis=-1)

  def kl(self, parameters: jax.Array, other: jax.Array) -> jax.Array:
    kls = self.kl_(*self._split(parameters), *self._split(other))
    return kls.sum(axis=-1)

  def check_parameters(
    self, field: str, parameters: Any, closed: bool = False
  ) -> None:
    values = self._concrete(field, parameters)
    kinds = np.split(values, len(self.parameter_kinds), axis=-1)
    for (kind, least), value in zip(
      self.parameter_kinds.items(), kinds, strict=True
    ):
      inside = base_config.fits_float32(value, positive=least == 0)
      if not np.all(inside | (closed & (value >= least))):
        raise ValueError(
          f'{field} {parameters!r}: the {kind} of {self.name} must be finite '
          f'and above {least}, {base_config.FLOAT32_LIMITS}'
        )

  def support(self, parameters: Any) -> tuple[np.ndarray, np.ndarray]:
    low, high = self._limits(
      *np.split(np.asarray(parameters, float), len(self.parameter_kinds))
    )
    ones = np.ones(self.feature_size)
    return low * ones, high * ones

  def _split(self, parameters: jax.Array) -> list[jax.Array]:
    return jnp.split(parameters, len(self.parameter_kinds), axis=-1)

  def _limits(self, *parameters: jax.Array) -> tuple[Any, Any]:
    del parameters
    return self.limits

  def kl_(self, *parameters: jax.Array) -> jax.Array:
    raise self._no_closed_form('kl')


class Beta(_Univariate):
  """Beta(alpha, beta): x^(alpha - 1) (1 - x)^(beta - 1) / B(alpha, beta)."""

  parameter_kinds = {'alpha': 0.0, 'beta': 0.0}
  limits = (0.0, 1.0)

  def sample_(
    self,
    rng: jax.Array,
    alpha: jax.Array,
    beta: jax.Array,
    shape: tuple[int, ...],
  ) -> jax.Array:
    # As a Dirichlet of two: log-gammas do not underflow for small alpha.
    return _sample_dirichlet(rng, _pair(alpha, beta), shape + (2,))[..., 0]

  def log_density_(
    self, x: jax.Array, alpha: jax.Array, beta: jax.Array
  ) -> jax.Array:
    rest = 1 - x
    lost = (1 - rest) - x
    # x (alpha + beta) - alpha
    gap = _difference_of_products(x, beta, rest, alpha) - lost * alpha
    return _dirichlet_log_density(
      _pair(x, rest),
      _pair(gap, -gap),
      _pair(alpha, beta),
    )

  def mean_(self, alpha: jax.Array, beta: jax.Array) -> jax.Array:
    return alpha / (alpha + beta)

  def std_(self, alpha: jax.Array, beta: jax.Array) -> jax.Array:
    total = alpha + beta
    return jnp.sqrt((alpha / total) * (beta / total) / (total + 1))

  def cdf_(self, x: jax.Array, alpha: jax.Array, beta: jax.Array) -> jax.Array:
    return special.betainc(alpha, beta, x)

  def survival_(
    self, x: jax.Array, alpha: jax.Array, beta: jax.Array
  ) -> jax.Array:
    return special.betainc(beta, alpha, 1 - x)

  def entropy_(self, alpha: jax.Array, beta: jax.Array) -> jax.Array:
    return _dirichlet_entropy(_pair(alpha, beta))

  def kl_(
    self,
    alpha: jax.Array,
    beta: jax.Array,
    other_alpha: jax.Array,
    other_beta: jax.Array,
  ) -> jax.Array:
    return _dirichlet_kl(_pair(alpha, beta), _pair(other_alpha, other_beta))

  def check_parameters(
    self, field: str, parameters: Any, closed: bool = False
  ) -> None:
    super().check_parameters(field, parameters, closed)
    if not closed:
      alpha, beta = np.split(self._concrete(field, parameters), 2, axis=-1)
      base_config.check_concentrations(
        field, parameters, np.minimum(alpha, beta), alpha + beta
      )


class Gamma(_Univariate):
  """Gamma(shape a, rate b): b^a x^(a - 1) exp(-b x) / Gamma(a)."""

  parameter_kinds = {'shape': 0.0, 'rate': 0.0}

  def sample_(
    self,
    rng: jax.Array,
    alpha: jax.Array,
    rate: jax.Array,
    shape: tuple[int, ...],
  ) -> jax.Array:
    return jnp.exp(_sample_log_gamma(rng, alpha, shape)) / rate

  def log_density_(
    self, x: jax.Array, alpha: jax.Array, rate: jax.Array
  ) -> jax.Array:
    # (1/2) log(a / 2 pi) - r(a) - log x - a d(b x / a)
    gap = _difference_of_products(rate, x, alpha, jnp.ones_like(alpha))
    positive = jnp.where(x == 0, 1, x)
    log_density = (
      _log_root(alpha)
      - jnp.log(positive)
      - _deviance(gap, alpha, jnp.log(positive * rate / alpha))
    )
    return jnp.where(x == 0, _limit_at_zero(alpha, log_density), log_density)

  def mean_(self, alpha: jax.Array, rate: jax.Array) -> jax.Array:
    return alpha / rate

  def std_(self, alpha: jax.Array, rate: jax.Array) -> jax.Array:
    return jnp.sqrt(alpha) / rate

  def cdf_(self, x: jax.Array, alpha: jax.Array, rate: jax.Array) -> jax.Array:
    return special.gammainc(alpha, rate * x)

  def survival_(
    self, x: jax.Array, alpha: jax.Array, rate: jax.Array
  ) -> jax.Array:
    return special.gammaincc(alpha, rate * x)

  def entropy_(self, alpha: jax.Array, rate: jax.Array) -> jax.Array:
    return _gamma_entropy(alpha) - jnp.log(rate)

  def kl_(
    self,
    alpha: jax.Array,
    rate: jax.Array,
    other_alpha: jax.Array,
    other_rate: jax.Array,
  ) -> jax.Array:
    # a' d(a b' / (b a')) + (1/2) d(a' / a) + r(a') - r(a) - r'(a) (a' - a)
    gap = _difference_of_products(alpha, other_rate, rate, other_alpha)
    log_ratio = jnp.log(alpha / other_alpha) - jnp.log(rate / other_rate)
    return (
      _deviance(gap / rate, other_alpha, log_ratio)
      + 0.5 * _ratio_deviance(other_alpha, alpha)
      + jnp.maximum(_stirling_divergence(alpha, other_alpha), 0)
    )


class Exponential(_Univariate):
  """Exponential(rate): rate exp(-rate x)."""

  parameter_kinds = {'rate': 0.0}

  def sample_(
    self, rng: jax.Array, rate: jax.Array, shape: tuple[int, ...]
  ) -> jax.Array:
    return jax.random.exponential(rng, shape, rate.dtype) / rate

  def log_density_(self, x: jax.Array, rate: jax.Array) -> jax.Array:
    return jnp.log(rate) - rate * x

  def mean_(self, rate: jax.Array) -> jax.Array:
    return 1 / rate

  def std_(self, rate: jax.Array) -> jax.Array:
    return 1 / rate

  def cdf_(self, x: jax.Array, rate: jax.Array) -> jax.Array:
    return -jnp.expm1(-rate * x)

  def survival_(self, x: jax.Array, rate: jax.Array) -> jax.Array:
    return jnp.exp(-rate * x)

  def entropy_(self, rate: jax.Array) -> jax.Array:
    return 1 - jnp.log(rate)

  def kl_(self, rate: jax.Array, other_rate: jax.Array) -> jax.Array:
    return _ratio_deviance(other_rate, rate)


class Uniform(_Univariate):
  """Uniform(low, high) on [low, high]."""

  parameter_kinds = {'low': -math.inf, 'high': -math.inf}

  def sample_(
    self,
    rng: jax.Array,
    low: jax.Array,
    high: jax.Array,
    shape: tuple[int, ...],
  ) -> jax.Array:
    return low + (high - low) * jax.random.uniform(rng, shape, low.dtype)

  def log_density_(
    self, x: jax.Array, low: jax.Array, high: jax.Array
  ) -> jax.Array:
    return jnp.broadcast_to(-jnp.log(high - low), jnp.shape(x))

  def mean_(self, low: jax.Array, high: jax.Array) -> jax.Array:
    return (low + high) / 2

  def std_(self, low: jax.Array, high: jax.Array) -> jax.Array:
    return (high - low) / math.sqrt(12)

  def cdf_(self, x: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    return (x - low) / (high - low)

  def survival_(
    self, x: jax.Array, low: jax.Array, high: jax.Array
  ) -> jax.Array:
    return (high - x) / (high - low)

  def entropy_(self, low: jax.Array, high: jax.Array) -> jax.Array:
    return jnp.log(high - low)

  def kl_(
    self,
    low: jax.Array,
    high: jax.Array,
    other_low: jax.Array,
    other_high: jax.Array,
  ) -> jax.Array:
    inside = (other_low <= low) & (high <= other_high)
    ratio = jnp.log((other_high - other_low) / (high - low))
    return jnp.where(inside, ratio, jnp.inf)

  def check_parameters(
    self, field: str, parameters: Any, closed: bool = False
  ) -> None:
    low, high = np.split(self._concrete(field, parameters), 2, axis=-1)
    if closed:
      valid = low <= high
    else:
      # The limits in float32.
      with np.errstate(over='ignore', invalid='ignore'):
        width = high.astype(np.float32) - low.astype(np.float32)
      valid = base_config.fits_float32(width)
    if not np.all(valid):
      raise ValueError(
        f'{field} {parameters!r}: the low of uniform must be below its high, '
        f'both finite, and their difference {base_config.FLOAT32_LIMITS}'
      )

  def _limits(self, low: jax.Array, high: jax.Array) -> tuple[Any, Any]:
    return low, high


class Constant(_Univariate):
  """All mass on one value; density and entropy count points."""

  parameter_kinds = {'value': -math.inf}

  def sample_(
    self, rng: jax.Array, value: jax.Array, shape: tuple[int, ...]
  ) -> jax.Array:
    del rng
    return jnp.broadcast_to(value, shape)

  def log_density_(self, x: jax.Array, value: jax.Array) -> jax.Array:
    return jnp.where(x == value, jnp.zeros_like(value), -jnp.inf)

  def mean_(self, value: jax.Array) -> jax.Array:
    return value

  def std_(self, value: jax.Array) -> jax.Array:
    return jnp.zeros_like(value)

  def cdf_(self, x: jax.Array, value: jax.Array) -> jax.Array:
    return jnp.ones_like(x + value)

  def survival_(self, x: jax.Array, value: jax.Array) -> jax.Array:
    return jnp.zeros_like(x + value)

  def entropy_(self, value: jax.Array) -> jax.Array:
    return jnp.zeros_like(value)

  def kl_(self, value: jax.Array, other_value: jax.Array) -> jax.Array:
    return jnp.where(value == other_value, jnp.zeros_like(value), jnp.inf)

  def _limits(self, value: jax.Array) -> tuple[Any, Any]:
    return value, value


class Gaussian(_Univariate):
  """Gaussian(mean, precision), precision the inverse of the variance."""

  parameter_kinds = {'mean': -math.inf, 'precision': 0.0}
  limits = (-math.inf, math.inf)

  def sample_(
    self,
    rng: jax.Array,
    mean: jax.Array,
    precision: jax.Array,
    shape: tuple[int, ...],
  ) -> jax.Array:
    noise = jax.random.normal(rng, shape, mean.dtype)
    return mean + noise / jnp.sqrt(precision)

  def log_density_(
    self, x: jax.Array, mean: jax.Array, precision: jax.Array
  ) -> jax.Array:
    log_normaliser = 0.5 * (jnp.log(precision) - math.log(2 * math.pi))
    return log_normaliser - 0.5 * precision * (x - mean) ** 2

  def mean_(self, mean: jax.Array, precision: jax.Array) -> jax.Array:
    del precision
    return mean

  def std_(self, mean: jax.Array, precision: jax.Array) -> jax.Array:
    del mean
    return 1 / jnp.sqrt(precision)

  def cdf_(
    self, x: jax.Array, mean: jax.Array, precision: jax.Array
  ) -> jax.Array:
    return special.ndtr((x - mean) * jnp.sqrt(precision))

  def survival_(
    self, x: jax.Array, mean: jax.Array, precision: jax.Array
  ) -> jax.Array:
    return special.ndtr((mean - x) * jnp.sqrt(precision))

  def entropy_(self, mean: jax.Array, precision: jax.Array) -> jax.Array:
    del mean
    return 0.5 * (1 + math.log(2 * math.pi) - jnp.log(precision))

  def kl_(
    self,
    mean: jax.Array,
    precision: jax.Array,
    other_mean: jax.Array,
    other_precision: jax.Array,
  ) -> jax.Array:
    distance = other_precision * (mean - other_mean) ** 2
    return 0.5 * (_ratio_deviance(other_precision, precision) + distance)


class Lomax(_Univariate):
  """Lomax(shape a, scale s): (a / s) (1 + x / s)^-(a + 1).

  The predictive distribution of an exponential whose rate has a
  Gamma(a, rate=s) prior. The mean is infinite for a <= 1, the standard
  deviation for a <= 2 (NaN where the mean is infinite).
  """

  parameter_kinds = {'shape': 0.0, 'scale': 0.0}

  def sample_(
    self,
    rng: jax.Array,
    alpha: jax.Array,
    scale: jax.Array,
    shape: tuple[int, ...],
  ) -> jax.Array:
    exponential = jax.random.exponential(rng, shape, alpha.dtype)
    return scale * jnp.expm1(exponential / alpha)

  def log_density_(
    self, x: jax.Array, alpha: jax.Array, scale: jax.Array
  ) -> jax.Array:
    log_tail = (alpha + 1) * jnp.log1p(x / scale)
    return jnp.log(alpha) - jnp.log(scale) - log_tail

  def mean_(self, alpha: jax.Array, scale: jax.Array) -> jax.Array:
    exists = alpha > 1
    excess = jnp.where(exists, alpha - 1, 1)
    return jnp.where(exists, scale / excess, jnp.inf)

  def std_(self, alpha: jax.Array, scale: jax.Array) -> jax.Array:
    exists = alpha > 2
    safe = jnp.where(exists, alpha, 3)
    finite = scale / (safe - 1) * jnp.sqrt(safe / (safe - 2))
    infinite = jnp.where(alpha > 1, jnp.inf, jnp.nan)
    return jnp.where(exists, finite, infinite)

  def cdf_(self, x: jax.Array, alpha: jax.Array, scale: jax.Array) -> jax.Array:
    return -jnp.expm1(-alpha * jnp.log1p(x / scale))

  def survival_(
    self, x: jax.Array, alpha: jax.Array, scale: jax.Array
  ) -> jax.Array:
    return jnp.exp(-alpha * jnp.log1p(x / scale))

  def entropy_(self, alpha: jax.Array, scale: jax.Array) -> jax.Array:
    return 1 + 1 / alpha + jnp.log(scale) - jnp.log(alpha)


class _Simplex(Distribution):
  """Distributions with one parameter per feature."""

  def __init__(self, feature_size: int = 2):
    self.feature_size = base_config.check_int('feature_size', feature_size, 2)
    self.parameter_size = self.feature_size

  def support(self, parameters: Any) -> tuple[np.ndarray, np.ndarray]:
    del parameters
    return np.zeros(self.feature_size), np.ones(self.feature_size)


class Categorical(_Simplex):
  """One-hot symbols of an alphabet of K; the parameters are probabilities."""

  def sample(
    self,
    rng: jax.Array,
    parameters: jax.Array,
    sample_shape: tuple[int, ...] = (),
  ) -> jax.Array:
    # Inverse cdf, which takes one uniform number per symbol. The last edge is
    # left out, so rounding in the sum of all cannot lose a sample.
    shape = sample_shape + parameters.shape[:-1]
    uniform = jax.random.uniform(rng, shape, parameters.dtype)
    edges = jnp.cumsum(parameters[..., :-1], axis=-1)
    symbols = jnp.sum(uniform[..., None] >= edges, axis=-1)
    return jax.nn.one_hot(symbols, self.feature_size, dtype=parameters.dtype)

  def log_density(
    self, features: jax.Array, parameters: jax.Array
  ) -> jax.Array:
    is_one_hot = jnp.all((features == 0) | (features == 1), axis=-1) & (
      features.sum(axis=-1) == 1
    )
    log_probs = _xlogy(features, parameters).sum(axis=-1)
    return jnp.where(is_one_hot, log_probs, -jnp.inf)

  def mean(self, parameters: jax.Array) -> jax.Array:
    return parameters

  def std(self, parameters: jax.Array) -> jax.Array:
    return jnp.sqrt(parameters * (1 - parameters))

  def entropy(self, parameters: jax.Array) -> jax.Array:
    return -_xlogy(parameters, parameters).sum(axis=-1)

  def kl(self, parameters: jax.Array, other: jax.Array) -> jax.Array:
    terms = _xlogy(parameters, parameters) - _xlogy(parameters, other)
    kl = terms.sum(axis=-1)
    return jnp.where(kl < 0, 0, kl)  # By rounding.

  def check_parameters(
    self, field: str, parameters: Any, closed: bool = False
  ) -> None:
    values = self._concrete(field, parameters)
    sums = values.sum(axis=-1)
    if np.any(values < 0) or np.any(np.abs(sums - 1) > _SUM_TOLERANCE):
      raise ValueError(
        f'{field} {parameters!r} must be probabilities that sum to 1'
      )

  def check_fits(
    self, field: str, prior: Distribution, parameters: Any
  ) -> None:
    self._check_size(field, prior)
    if isinstance(prior, Constant):
      self.check_parameters(field, parameters)
    elif not isinstance(prior, Dirichlet):
      raise ValueError(
        f'{field} {prior.name} does not draw probabilities; a categorical '
        'takes dirichlet or constant'
      )


class Dirichlet(_Simplex):
  """Dirichlet(alpha_1, ..., alpha_K) over probability vectors."""

  def sample(
    self,
    rng: jax.Array,
    parameters: jax.Array,
    sample_shape: tuple[int, ...] = (),
  ) -> jax.Array:
    return _sample_dirichlet(rng, parameters, sample_shape + parameters.shape)

  def log_density(
    self, features: jax.Array, parameters: jax.Array
  ) -> jax.Array:
    sums = features.sum(axis=-1, keepdims=True)
    # Narrow floats and large K round the sum by more.
    rounding = self.feature_size * float(jnp.finfo(sums.dtype).eps)
    outside = jnp.any(features < 0, axis=-1) | (
      jnp.abs(sums[..., 0] - 1) > max(_SUM_TOLERANCE, rounding)
    )
    probs = jnp.where(outside[..., None], 1 / self.feature_size, features)
    sums = jnp.where(outside[..., None], 1, sums)
    # Divided by their sum: a rounding of it would count A times.
    gap = _difference_of_products(
      probs, parameters.sum(axis=-1, keepdims=True), parameters, sums
    )
    log_density = _dirichlet_log_density(probs / sums, gap / sums, parameters)
    return jnp.where(outside, -jnp.inf, log_density)

  def mean(self, parameters: jax.Array) -> jax.Array:
    return parameters / parameters.sum(axis=-1, keepdims=True)

  def std(self, parameters: jax.Array) -> jax.Array:
    total = parameters.sum(axis=-1, keepdims=True)
    rest = _sum_of_others(parameters)
    return jnp.sqrt((parameters / total) * (rest / total) / (total + 1))

  def cdf(self, features: jax.Array, parameters: jax.Array) -> jax.Array:
    # Every single feature is Beta(alpha_k, sum of the others).
    rest = _sum_of_others(parameters)
    return special.betainc(parameters, rest, jnp.clip(features, 0, 1))

  def entropy(self, parameters: jax.Array) -> jax.Array:
    return _dirichlet_entropy(parameters)

  def kl(self, parameters: jax.Array, other: jax.Array) -> jax.Array:
    return _dirichlet_kl(parameters, other)

  def check_parameters(
    self, field: str, parameters: Any, closed: bool = False
  ) -> None:
    values = self._concrete(field, parameters)
    positive = values >= 0 if closed else values > 0
    if not np.all(positive & np.isfinite(values)):
      raise ValueError(f'{field} {parameters!r} must be positive and finite')
    if not closed:
      with np.errstate(over='ignore'):
        total = values.sum(axis=-1)
      base_config.check_concentrations(
        field, parameters, values.min(axis=-1), total
      )


DISTRIBUTIONS = base_config.Registry(
  'distribution',
  {
    'beta': Beta,
    'categorical': Categorical,
    'constant': Constant,
    'dirichlet': Dirichlet,
    'exponential': Exponential,
    'gamma': Gamma,
    'gaussian': Gaussian,
    'lomax': Lomax,
    'uniform': Uniform,
  },
)


def check_univariate(
  field: str,
  distribution: str | Distribution,
  parameters_field: str,
  parameters: Any,
) -> tuple[Distribution, tuple[float, ...]]:
  """Checks a distribution of one number and its parameters.

  Args:
    field: Name of the distribution, for the message.
    distribution: Distribution by name or as an object.
    parameters_field: Name of its parameters, for the message.
    parameters: A sequence of them.

  Returns:
    The distribution and its parameters as floats.

  Raises:
    ValueError: If the distribution is unknown or not univariate, or does not
      take these parameters.
  """
  if not isinstance(distribution, Distribution):
    distribution = DISTRIBUTIONS.lookup(field, distribution)()
  if distribution.feature_size != 1:
    raise ValueError(
      f'{field} {distribution.name} has {distribution.feature_size} features; '
      'a length is one number'
    )
  parameters = base_config.check_vector(parameters_field, parameters)
  distribution.check_parameters(parameters_field, parameters)
  return distribution, parameters


def _pair(first: jax.Array, second: jax.Array) -> jax.Array:
  return jnp.stack(jnp.broadcast_arrays(first, second), axis=-1)


def _sum_of_others(x: jax.Array) -> jax.Array:
  """For every entry of the last axis the sum of the others, `[..., K]`."""
  itself = np.eye(x.shape[-1], dtype=bool)
  return jnp.where(itself, 0, x[..., None, :]).sum(axis=-1)


def _xlogy(x: jax.Array, y: jax.Array) -> jax.Array:
  """The product x log y, with 0 log 0 = 0 and gradients 0 there."""
  return x * jnp.log(jnp.where((x == 0) & (y == 0), 1, y))


def _log_product(log_factors: jax.Array) -> jax.Array:
  """Log of a product over the last axis, in which 0 times infinity is 0."""
  is_zero = jnp.any(log_factors == -jnp.inf, axis=-1)
  return jnp.where(is_zero, -jnp.inf, log_factors.sum(axis=-1))


def _limit_at_zero(alpha: jax.Array, otherwise: jax.Array) -> jax.Array:
  """The limit of (alpha - 1) log x for x -> 0; `otherwise` if alpha is 1."""
  infinite = jnp.where(alpha > 1, -jnp.inf, jnp.inf)
  return jnp.where(alpha == 1, otherwise, infinite)


# The sums below are written so that in float32 nothing large cancels, for
# parameters from 1e-3 to 1e7, and that no term of a divergence is negative.
# They are those of Loader, Fast and accurate computation of binomial
# probabilities, 2000:
#
#   log Gamma(x) = (x - 1/2) log x - x + (1/2) log 2 pi + r(x)
#   d(x) = x - 1 - log x
#
# They are jitted: outside of jit, so many operations would each be compiled.


@jax.jit
def _deviance(
  gap: jax.Array, scale: jax.Array, log_ratio: jax.Array
) -> jax.Array:
  """The divergence y d(x / y), given x - y, y and log(x / y).

  Near x = y, where terms cancel, with z = (x - y) / (x + y),

    log(x / y) = 2 atanh z,    y d(x / y) = (x - y) z - 2 y (atanh z - z).
  """
  z = gap / (2 * scale + gap)
  is_near = jnp.abs(z) < 1 / 2
  z = jnp.where(is_near, z, 0)
  near = z * (gap - 2 * scale * _atanh_series(z))
  return jnp.where(is_near, near, gap - scale * log_ratio)


def _ratio_deviance(x: jax.Array, y: jax.Array) -> jax.Array:
  """Returns d(x / y)."""
  return _deviance((x - y) / y, jnp.ones_like(y), jnp.log(x) - jnp.log(y))


def _atanh_series(z: jax.Array) -> jax.Array:
  """atanh(z) / z - 1 = z^2 / 3 + z^4 / 5 + ... for |z| <= 1/2."""
  # Every term adds two bits.
  num_terms = jnp.finfo(z.dtype).nmant // 2 + 1
  coefficients = [1 / (2 * i + 3) for i in range(num_terms)]
  return z**2 * _polynomial(coefficients, z**2)


@jax.jit
def _stirling_error(x: jax.Array) -> jax.Array:
  """r(x) = log Gamma(x) - ((x - 1/2) log x - x + (1/2) log 2 pi).

  Stirling's series gives r(x + 10), and positive steps lead back to r(x):

    r(x) - r(x + 1) = (x + 1/2) log(1 + 1/x) - 1 = atanh(z) / z - 1,
    z = 1 / (2 x + 1).
  """
  steps = x[..., None] + jnp.arange(10, dtype=x.dtype)
  is_small = steps < 0.5
  small = jnp.where(is_small, steps, 1)
  steps = jnp.where(
    is_small,
    (small + 0.5) * jnp.log1p(1 / small) - 1,
    _atanh_series(1 / (2 * jnp.where(is_small, 1, steps) + 1)),
  )
  inverse = 1 / (x + 10)
  series = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360)
  return inverse * _polynomial(series, inverse**2) + steps.sum(axis=-1)


@jax.jit
def _stirling_slope(x: jax.Array) -> jax.Array:
  """r'(x) = digamma(x) - log x + 1 / (2 x)."""
  x = 1.0 * x  # Integers have no tangents.
  return jax.jvp(_stirling_error, (x,), (jnp.ones_like(x),))[1]


def _stirling_divergence(x: jax.Array, y: jax.Array) -> jax.Array:
  """r(y) - r(x) - r'(x) (y - x), not negative since r is convex."""
  gap = _stirling_error(y) - _stirling_error(x)
  return gap - _stirling_slope(x) * (y - x)


def _polynomial(coefficients: Sequence[float], x: jax.Array) -> jax.Array:
  """c_0 + c_1 x + c_2 x^2 + ..."""
  value = jnp.zeros_like(x)
  for coefficient in reversed(coefficients):
    value = value * x + coefficient
  return value


@jax.jit
def _difference_of_products(
  a: jax.Array, b: jax.Array, c: jax.Array, d: jax.Array
) -> jax.Array:
  """Returns a b - c d with all its digits, also where the two are close.

  Halves of the digits have exact products (Dekker, A floating-point technique
  for extending the available precision, 1971).
  """
  (a, a_low), (b, b_low), (c, c_low), (d, d_low) = map(_halves, (a, b, c, d))
  return (
    (a * b - c * d)
    + (a * b_low - c * d_low)
    + (a_low * b - c_low * d)
    + (a_low * b_low - c_low * d_low)
  )


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The leading half of the digits, and the rest."""
  x = 1.0 * x  # Integers have no digits to halve.
  info = jnp.finfo(x.dtype)
  high = jax.lax.reduce_precision(x, info.nexp, (info.nmant - 1) // 2)
  high = jax.lax.stop_gradient(high)
  return high, x - high


def _log_root(alpha: jax.Array) -> jax.Array:
  """(1/2) log(alpha / (2 pi)) - r(alpha)."""
  return 0.5 * jnp.log(alpha / (2 * math.pi)) - _stirling_error(alpha)


@jax.jit
def _gamma_entropy(alpha: jax.Array) -> jax.Array:
  """Entropy of Gamma(a, 1), with r from above.

  (1/2) log(2 pi e a) + r(a) - 1 / (2 a) + (1 - a) r'(a)
  """
  return (
    0.5 * (jnp.log(alpha) + 1 + math.log(2 * math.pi))
    + _stirling_error(alpha)
    - 0.5 / alpha
    + (1 - alpha) * _stirling_slope(alpha)
  )


@jax.jit
def _dirichlet_entropy(alpha: jax.Array) -> jax.Array:
  """Entropy of K gammas, less that of their sum and of its scale.

  Independent gammas are a Dirichlet times their sum, a Gamma(A):

    sum_k H(Gamma(a_k)) = H(Dirichlet(a)) + H(Gamma(A)) + (K - 1) digamma(A).
  """
  total = alpha.sum(axis=-1)
  scale = (alpha.shape[-1] - 1) * special.digamma(total)
  return _gamma_entropy(alpha).sum(axis=-1) - _gamma_entropy(total) - scale


@jax.jit
def _dirichlet_log_density(
  probs: jax.Array, gap: jax.Array, alpha: jax.Array
) -> jax.Array:
  """Log density at p, with the means m_k = a_k / A.

    sum_k [(1/2) log(a_k / 2 pi) - r(a_k) - log p_k - a_k d(p_k / m_k)]
      - (1/2) log(A / 2 pi) + r(A)

  Args:
    probs: p, `[..., K]`.
    gap: A p_k - a_k, since rounding would lose it.
    alpha: a, `[..., K]`.
  """
  total = alpha.sum(axis=-1, keepdims=True)
  positive = jnp.where(probs == 0, 1, probs)
  log_factors = (
    _log_root(alpha)
    - jnp.log(positive)
    - _deviance(gap, alpha, jnp.log(positive / (alpha / total)))
  )
  log_factors = jnp.where(
    probs == 0, _limit_at_zero(alpha, log_factors), log_factors
  )
  return _log_product(log_factors) - _log_root(total)[..., 0]


@jax.jit
def _dirichlet_kl(alpha: jax.Array, other: jax.Array) -> jax.Array:
  """KL(Dirichlet(a) || Dirichlet(b)), a sum of what is not negative.

  With w = a / A, v = b / B, and D(x, y) = r(y) - r(x) - r'(x) (y - x),

    sum_k b_k d(w_k / v_k)
      + (1/2) sum_k [(1 - w_k) d(b_k / a_k) + w_k d(v_k / w_k)]
      + sum_k D(a_k, b_k) - D(A, B).
  """
  total = alpha.sum(axis=-1, keepdims=True)
  other_total = other.sum(axis=-1, keepdims=True)
  gap = _difference_of_products(alpha, other_total, total, other) / total
  means, other_means = alpha / total, other / other_total
  log_ratio = jnp.log(means) - jnp.log(other_means)
  divergence = _deviance(gap, other, log_ratio)
  inverse = _deviance(-gap / other_total, means, -log_ratio)
  rest = _sum_of_others(alpha) / total
  concentrations = rest * _ratio_deviance(other, alpha)
  remainders = _stirling_divergence(alpha, other).sum(axis=-1)
  remainders -= _stirling_divergence(total, other_total)[..., 0]
  main = (divergence + 0.5 * (concentrations + inverse)).sum(axis=-1)
  return main + jnp.maximum(remainders, 0)


def _sample_dirichlet(
  rng: jax.Array, alpha: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
  """Dirichlet samples of the given shape, exactly; cheap where all are 1/2."""
  is_jeffreys = not isinstance(alpha, jax.core.Tracer) and np.all(
    np.asarray(alpha) == 0.5
  )
  if is_jeffreys and shape[-1] == 2:
    # z_1^2 / (z_1^2 + z_2^2) of two normals is sin^2 of a uniform angle.
    angle = (math.pi / 2) * jax.random.uniform(rng, shape[:-1], alpha.dtype)
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1) ** 2
  if is_jeffreys:
    squares = jax.random.normal(rng, shape, alpha.dtype) ** 2
    return squares / squares.sum(axis=-1, keepdims=True)
  # Normalised in the log domain: gammas of a small alpha underflow.
  return jax.nn.softmax(_sample_log_gamma(rng, alpha, shape), axis=-1)


def _sample_log_gamma(
  rng: jax.Array, alpha: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
  """Logs of Gamma(alpha, 1) samples (Marsaglia & Tsang, 2000, section 4).

  A Gamma(alpha + 1) is drawn by rejection and scaled by U^(1 / alpha), in logs.
  All elements try together until the last is accepted (at least 0.95 are each
  time), several times faster than jax.random.loggamma, whose loop is per
  element.
  """
  dtype = alpha.dtype
  d = alpha + 1 - 1 / 3
  c = 1 / jnp.sqrt(9 * d)
  rng, rng_scale = jax.random.split(rng)

  def propose(carry):
    rng, log_v, accepted = carry
    rng, rng_normal, rng_accept = jax.random.split(rng, 3)
    normal = jax.random.normal(rng_normal, shape, dtype)
    x = jnp.maximum(c * normal, -1)  # v = (1 + x)^3
    log_root = jnp.log1p(x)
    # n^2 / 2 + d (1 - v + log v), written so that nothing cancels.
    threshold = 0.5 * normal**2 + d * (3 * (log_root - x) - 3 * x**2 - x**3)
    exponential = jax.random.exponential(rng_accept, shape, dtype)
    # Written so that a NaN is accepted, and not tried again.
    new = ~accepted & ~(-exponential >= threshold)
    return rng, jnp.where(new, 3 * log_root, log_v), accepted | new

  _, log_v, _ = jax.lax.while_loop(
    lambda carry: ~jnp.all(carry[2]),
    propose,
    (rng, jnp.zeros(shape, dtype), jnp.zeros(shape, bool)),
  )
  exponential = jax.random.exponential(rng_scale, shape, dtype)
  return jnp.log(d) + log_v - exponential / alpha
