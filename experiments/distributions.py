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
"""

import abc
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


class Distribution(abc.ABC):
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
  def logits_to_params(self, logits: jax.Array) -> jax.Array:
    """Returns valid parameters for any real vectors `[..., P]`."""

  @abc.abstractmethod
  def check_parameters(
    self, field: str, parameters: Any, closed: bool = False
  ) -> None:
    """Raises ValueError unless concrete parameters are valid.

    Args:
      field: Name for the message.
      parameters: `[..., P]`.
      closed: Also allow the limits of the allowed range.
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
    log_densities = self.log_density_(features, *self._split(parameters))
    low, high = self._limits(*self._split(parameters))
    inside = (low <= features) & (features <= high)
    return jnp.where(inside, log_densities, -jnp.inf).sum(axis=-1)

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

  def logits_to_params(self, logits: jax.Array) -> jax.Array:
    parts = [
      part if math.isinf(least) else jnp.exp(part)
      for part, least in zip(
        self._split(logits), self.parameter_kinds.values(), strict=True
      )
    ]
    return jnp.concatenate(parts, axis=-1)

  def check_parameters(
    self, field: str, parameters: Any, closed: bool = False
  ) -> None:
    values = self._concrete(field, parameters)
    kinds = np.split(values, len(self.parameter_kinds), axis=-1)
    for (kind, least), value in zip(
      self.parameter_kinds.items(), kinds, strict=True
    ):
      inside = (value > least) & np.isfinite(value)
      if not np.all(inside | (closed & (value >= least))):
        raise ValueError(
          f'{field} {parameters!r}: the {kind} of {self.name} must be finite '
          f'and above {least}'
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
    pair = jnp.stack(jnp.broadcast_arrays(alpha, beta), axis=-1)
    return _sample_dirichlet(rng, pair, shape + (2,))[..., 0]

  def log_density_(
    self, x: jax.Array, alpha: jax.Array, beta: jax.Array
  ) -> jax.Array:
    return (
      special.xlogy(alpha - 1, x)
      + special.xlog1py(beta - 1, -x)
      - special.betaln(alpha, beta)
    )

  def mean_(self, alpha: jax.Array, beta: jax.Array) -> jax.Array:
    return alpha / (alpha + beta)

  def std_(self, alpha: jax.Array, beta: jax.Array) -> jax.Array:
    total = alpha + beta
    return jnp.sqrt(alpha * beta / (total + 1)) / total

  def cdf_(self, x: jax.Array, alpha: jax.Array, beta: jax.Array) -> jax.Array:
    return special.betainc(alpha, beta, x)

  def survival_(
    self, x: jax.Array, alpha: jax.Array, beta: jax.Array
  ) -> jax.Array:
    return special.betainc(beta, alpha, 1 - x)

  def entropy_(self, alpha: jax.Array, beta: jax.Array) -> jax.Array:
    return (
      special.betaln(alpha, beta)
      - (alpha - 1) * special.digamma(alpha)
      - (beta - 1) * special.digamma(beta)
      + (alpha + beta - 2) * special.digamma(alpha + beta)
    )

  def kl_(
    self,
    alpha: jax.Array,
    beta: jax.Array,
    other_alpha: jax.Array,
    other_beta: jax.Array,
  ) -> jax.Array:
    total = special.digamma(alpha + beta)
    return (
      special.betaln(other_alpha, other_beta)
      - special.betaln(alpha, beta)
      + (alpha - other_alpha) * (special.digamma(alpha) - total)
      + (beta - other_beta) * (special.digamma(beta) - total)
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
    return (
      special.xlogy(alpha - 1, x)
      - rate * x
      + alpha * jnp.log(rate)
      - special.gammaln(alpha)
    )

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
    return (
      alpha
      - jnp.log(rate)
      + special.gammaln(alpha)
      + (1 - alpha) * special.digamma(alpha)
    )

  def kl_(
    self,
    alpha: jax.Array,
    rate: jax.Array,
    other_alpha: jax.Array,
    other_rate: jax.Array,
  ) -> jax.Array:
    return (
      (alpha - other_alpha) * special.digamma(alpha)
      - special.gammaln(alpha)
      + special.gammaln(other_alpha)
      + other_alpha * (jnp.log(rate) - jnp.log(other_rate))
      + alpha * (other_rate - rate) / rate
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
    return jnp.log(rate) - jnp.log(other_rate) + other_rate / rate - 1


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

  def logits_to_params(self, logits: jax.Array) -> jax.Array:
    low, width = self._split(logits)
    return jnp.concatenate([low, low + jnp.exp(width)], axis=-1)

  def check_parameters(
    self, field: str, parameters: Any, closed: bool = False
  ) -> None:
    low, high = np.split(self._concrete(field, parameters), 2, axis=-1)
    finite = closed or np.all(np.isfinite([low, high]))
    if not finite or not np.all(low <= high if closed else low < high):
      raise ValueError(
        f'{field} {parameters!r}: the low of uniform must be below its high, '
        'both finite'
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
    return jnp.where(x == value, 0.0, -jnp.inf)

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
    return jnp.where(value == other_value, 0.0, jnp.inf)

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
    ratio = other_precision / precision
    distance = other_precision * (mean - other_mean) ** 2
    return 0.5 * (ratio - 1 - jnp.log(ratio) + distance)


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
    return jnp.where(alpha > 1, scale / (alpha - 1), jnp.inf)

  def std_(self, alpha: jax.Array, scale: jax.Array) -> jax.Array:
    finite = scale / (alpha - 1) * jnp.sqrt(alpha / (alpha - 2))
    infinite = jnp.where(alpha > 1, jnp.inf, jnp.nan)
    return jnp.where(alpha > 2, finite, infinite)

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
    return special.xlogy(features, parameters).sum(axis=-1)

  def mean(self, parameters: jax.Array) -> jax.Array:
    return parameters

  def std(self, parameters: jax.Array) -> jax.Array:
    return jnp.sqrt(parameters * (1 - parameters))

  def entropy(self, parameters: jax.Array) -> jax.Array:
    return -special.xlogy(parameters, parameters).sum(axis=-1)

  def kl(self, parameters: jax.Array, other: jax.Array) -> jax.Array:
    return special.rel_entr(parameters, other).sum(axis=-1)

  def logits_to_params(self, logits: jax.Array) -> jax.Array:
    return jax.nn.softmax(logits, axis=-1)

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
    return special.xlogy(parameters - 1, features).sum(axis=-1) - _log_beta(
      parameters
    )

  def mean(self, parameters: jax.Array) -> jax.Array:
    return parameters / parameters.sum(axis=-1, keepdims=True)

  def std(self, parameters: jax.Array) -> jax.Array:
    mean = self.mean(parameters)
    total = parameters.sum(axis=-1, keepdims=True)
    return jnp.sqrt(mean * (1 - mean) / (total + 1))

  def cdf(self, features: jax.Array, parameters: jax.Array) -> jax.Array:
    # Every single feature is Beta(alpha_k, sum of the others).
    rest = parameters.sum(axis=-1, keepdims=True) - parameters
    return special.betainc(parameters, rest, jnp.clip(features, 0, 1))

  def entropy(self, parameters: jax.Array) -> jax.Array:
    total = parameters.sum(axis=-1)
    return (
      _log_beta(parameters)
      + (total - self.feature_size) * special.digamma(total)
      - ((parameters - 1) * special.digamma(parameters)).sum(axis=-1)
    )

  def kl(self, parameters: jax.Array, other: jax.Array) -> jax.Array:
    mean_log = special.digamma(parameters) - special.digamma(
      parameters.sum(axis=-1, keepdims=True)
    )
    return (
      _log_beta(other)
      - _log_beta(parameters)
      + ((parameters - other) * mean_log).sum(axis=-1)
    )

  def logits_to_params(self, logits: jax.Array) -> jax.Array:
    return jnp.exp(logits)

  def check_parameters(
    self, field: str, parameters: Any, closed: bool = False
  ) -> None:
    values = self._concrete(field, parameters)
    positive = values >= 0 if closed else values > 0
    if not np.all(positive & np.isfinite(values)):
      raise ValueError(f'{field} {parameters!r} must be positive and finite')


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
    distribution: By name or as an object.
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


def _log_beta(alpha: jax.Array) -> jax.Array:
  """Log of the multivariate Beta function over the last axis."""
  return special.gammaln(alpha).sum(axis=-1) - special.gammaln(
    alpha.sum(axis=-1)
  )


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
    # n^2 / 2 + d (1 - v + log v), so written that large alphas do not cancel.
    threshold = 0.5 * normal**2 + d * (3 * (log_root - x) - 3 * x**2 - x**3)
    exponential = jax.random.exponential(rng_accept, shape, dtype)
    # What is not a number is not tried again.
    new = ~accepted & ~(-exponential >= threshold)
    return rng, jnp.where(new, 3 * log_root, log_v), accepted | new

  _, log_v, _ = jax.lax.while_loop(
    lambda carry: ~jnp.all(carry[2]),
    propose,
    (rng, jnp.zeros(shape, dtype), jnp.zeros(shape, bool)),
  )
  exponential = jax.random.exponential(rng_scale, shape, dtype)
  return jnp.log(d) + log_v - exponential / alpha
