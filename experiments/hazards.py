"""Segment-length distributions: how likely a segment ends at each length.

A segment of length L has the hazard h(a) = P(L = a | L >= a): the chance that
it ends after its a-th symbol. With the survival function S(n) = P(L > n) and
the probability mass function f:

  S(n) = (1 - h(1)) ... (1 - h(n))        f(a) = S(a - 1) h(a)

  period 3:   h = 0 0 1       S(0..3) = 1 1 1 0        f = 0 0 1
  LAD:        h = 1/2 1/4     S(0..2) = 1 1/2 3/8      f = 1/2 1/8

Everything here is NumPy in float64 and in logarithms, so that neither long
tails nor many small factors lose precision; predictors round once, at the end.
"""

import abc
from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import math
from typing import Any
from typing import ClassVar

import jax
import numpy as np

from nonstationary_mbml import base_config
from nonstationary_mbml.experiments import distributions

# Largest deviation from 1 of a probability mass function that comes from
# float32 sums.
_SUM_TOLERANCE = 1e-5
# Lengths at which a function is tried when it is given.
_NUM_TRIED = 256


class Hazard(abc.ABC):
  """A segment-length distribution.

  Attributes:
    label: Name of its exact predictor in tables and figures.
  """

  label: ClassVar[str] = 'run-length mixture'

  @abc.abstractmethod
  def log_probs(self, num: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns log f(1..num) and log S(0..num - 1), float64 `[num]` each."""


@dataclasses.dataclass(frozen=True)
class HazardFunction(Hazard):
  """h(a) as a function.

  Attributes:
    function: Maps an array of lengths a = 1, 2, ..., integers, to as many
      hazards; in NumPy for full precision.
  """

  function: Callable[[np.ndarray], Any]

  def __post_init__(self):
    self.log_probs(_NUM_TRIED)

  def log_probs(self, num: int) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.arange(1, num + 1)
    try:
      # Also where this is called inside jit.
      with jax.ensure_compile_time_eval():
        values = np.asarray(self.function(lengths), float)
    except Exception as error:
      raise ValueError(
        'hazard must map an array of lengths to as many hazards (np.vectorize '
        f'makes it do so), but it raised {error!r}'
      ) from error
    if values.shape not in ((), lengths.shape):
      raise ValueError(
        f'hazard returns shape {values.shape} for lengths of shape '
        f'{lengths.shape}'
      )
    return _from_hazards(np.broadcast_to(values, lengths.shape))


@dataclasses.dataclass(frozen=True)
class HazardTable(Hazard):
  """h(1), ..., h(n) as a table; longer segments have the last hazard.

  A table of one value is the constant hazard of Bayesian online change-point
  detection (Adams & MacKay, 2007). With a last value of 1, no segment is longer
  than the table.

  Attributes:
    values: h(1), ..., h(n).
  """

  values: tuple[float, ...]

  def __post_init__(self):
    # Lists and arrays, too: the distribution must be hashable.
    _replace(self, 'values', base_config.check_vector('hazard', self.values))
    if not self.values:
      raise ValueError('hazard is an empty table')
    _from_hazards(np.asarray(self.values, float))

  def log_probs(self, num: int) -> tuple[np.ndarray, np.ndarray]:
    table = np.asarray(self.values[:num], float)
    return _from_hazards(np.pad(table, (0, num - len(table)), mode='edge'))


@dataclasses.dataclass(frozen=True)
class KnownPeriod(Hazard):
  """Every segment has the same length: h(a) = [a = P].

  Attributes:
    period: P.
  """

  label = 'known period'

  period: int

  def __post_init__(self):
    _replace(self, 'period', base_config.check_int('period', self.period, 1))

  def log_probs(self, num: int) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.arange(num)
    return (
      np.where(lengths + 1 == self.period, 0.0, -np.inf),
      np.where(lengths < self.period, 0.0, -np.inf),
    )


@dataclasses.dataclass(frozen=True)
class LengthDistribution(Hazard):
  """I.i.d. segment lengths: h(a) = P(L = a) / P(L >= a).

  Attributes:
    pmf: P(L = 1), ..., P(L = n), up to the longest possible segment.
  """

  label = 'known length distribution'

  pmf: tuple[float, ...]

  def __post_init__(self):
    _replace(self, 'pmf', base_config.check_vector('pmf', self.pmf))
    total = math.fsum(self.pmf)
    if not all(p >= 0 for p in self.pmf) or not (
      abs(total - 1) <= _SUM_TOLERANCE
    ):
      raise ValueError(
        f'pmf must be probabilities that sum to 1; they sum to {total}, the '
        f'least is {min(self.pmf, default=None)}'
      )

  def log_probs(self, num: int) -> tuple[np.ndarray, np.ndarray]:
    pmf = np.asarray(self.pmf, float)
    # Summed from the far end, where the terms are small.
    tails = np.cumsum(pmf[::-1])[::-1]  # P(L >= 1), ..., P(L >= n)
    pmf, tails = pmf / tails[0], tails / tails[0]
    missing = max(0, num - len(pmf))
    with np.errstate(divide='ignore'):
      return (
        np.log(np.pad(pmf, (0, missing))[:num]),
        np.log(np.pad(tails, (0, missing))[:num]),
      )


@dataclasses.dataclass(frozen=True)
class RoundedLengths(Hazard):
  """Lengths max(1, round(X)), X from a univariate distribution.

  The distribution of the `random_shift` source: P(L > n) = P(X > n + 1/2) for
  n >= 1.

  Attributes:
    distribution: Distribution of X.
    parameters: Its parameters.
  """

  label = 'known length distribution'

  distribution: distributions.Distribution
  parameters: tuple[float, ...]

  def __post_init__(self):
    distribution, parameters = distributions.check_univariate(
      'distribution', self.distribution, 'parameters', self.parameters
    )
    _replace(self, 'distribution', distribution)
    _replace(self, 'parameters', parameters)

  def log_probs(self, num: int) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(self.distribution, distributions.Constant):
      # Halves round to even, as in the source.
      return KnownPeriod(max(1, round(self.parameters[0]))).log_probs(num)
    halves = np.arange(1, num + 1)[:, None] + 0.5
    parameters = np.asarray(self.parameters, float)
    # Also where this is called inside jit, in float32.
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
      cdf, survival = (
        np.asarray(function(halves, parameters), float)[:, 0]
        for function in (self.distribution.cdf, self.distribution.survival)
      )
    # Each tail from its own side, where it is small and so has all its digits.
    is_low = cdf < 0.5
    pmf = np.where(
      is_low,
      np.diff(cdf, prepend=0.0),
      -np.diff(survival, prepend=1.0),
    )
    with np.errstate(divide='ignore'):
      log_survival = np.where(is_low, np.log1p(-cdf), np.log(survival))
      return np.log(pmf), np.concatenate([[0.0], log_survival[:-1]])


def as_hazard(
  hazard: Hazard | Callable[[np.ndarray], Any] | Sequence[float] | float,
) -> Hazard:
  """Returns a segment-length distribution.

  Args:
    hazard: A segment-length distribution, a function of arrays of lengths, a
      table (longer segments have its last hazard) or a constant.

  Raises:
    ValueError: If it is none of these or outside [0, 1].
  """
  if isinstance(hazard, Hazard):
    return hazard
  if callable(hazard):
    return HazardFunction(hazard)
  if isinstance(hazard, jax.core.Tracer):
    raise ValueError('hazard is traced; build the predictor outside of jit')
  is_table = hasattr(hazard, '__len__') and getattr(hazard, 'ndim', 1)
  return HazardTable(hazard if is_table else (hazard,))


def _from_hazards(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The logs of f and S for hazards h(1), ..., h(n)."""
  outside = ~((values >= 0) & (values <= 1))  # Also what is not a number.
  if outside.any():
    length = int(np.argmax(outside)) + 1
    raise ValueError(
      f'hazard is {values[length - 1]} at length {length}; it must lie in '
      '[0, 1]'
    )
  with np.errstate(divide='ignore'):
    log_continues, log_ends = np.log1p(-values), np.log(values)
  log_survival = np.concatenate([[0.0], np.cumsum(log_continues[:-1])])
  return log_survival + log_ends, log_survival


def _replace(hazard: Hazard, field: str, value: Any) -> None:
  """Sets a field of a frozen dataclass, once checked."""
  object.__setattr__(hazard, field, value)
