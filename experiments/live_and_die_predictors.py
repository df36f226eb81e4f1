"""Live-and-Die weighting with KT base models, for any alphabet.

Willems, Coding for a binary independent piecewise-identically-distributed
source, IEEE Trans. Inf. Theory 42(6), 1996: the linear-complexity weighting,
in which a segment ends after its a-th symbol with probability h(a) = 1/(2a).
LAD is the exact Bayes mixture over all 2^(T-1) partitions of T symbols under
this prior, and so the Bayes predictor of the `lin` source.
"""

from collections.abc import Sequence

import jax
import numpy as np

from nonstationary_mbml.experiments import hazards
from nonstationary_mbml.experiments import run_length_predictors


def hazard(run_length: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
  """Returns h(a) = 1/(2a), the chance that a segment ends at length a >= 1."""
  return 1 / (2 * run_length)


class LADPredictor(run_length_predictors.RunLengthPredictor):
  """The exact Bayes predictor of the `lin` source."""

  label = 'LAD'

  def __init__(
    self,
    concentration: float | Sequence[float] = 0.5,
    alphabet_size: int | None = None,
    max_length: int | None = None,
    max_run_lengths: int | None = None,
  ):
    """Initializes the predictor; arguments as in RunLengthPredictor."""
    super().__init__(
      hazards.HazardFunction(hazard),
      concentration,
      alphabet_size,
      max_length,
      max_run_lengths,
    )
