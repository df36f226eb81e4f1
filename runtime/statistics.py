"""Metrics of several sequences or networks: means and standard errors."""

from collections.abc import Mapping
from collections.abc import Sequence

import jax
import numpy as np


def mean_and_stderr(
  values: jax.Array | np.ndarray,
) -> tuple[jax.Array | np.ndarray, jax.Array | np.ndarray | float]:
  """Returns the mean of independent values, and its standard error.

  Args:
    values: `[N]`, for example of sequences or of seeds.

  Returns:
    Both in the dtype of the values. A single value has no spread to measure:
    its error is NaN.
  """
  spread = values.std(ddof=1) if len(values) > 1 else np.nan
  return values.mean(), spread / np.sqrt(len(values))


def over_members(entries: Sequence[Mapping[str, float]]) -> dict[str, float]:
  """Returns the log entry of an ensemble.

  Args:
    entries: Entries of its M members at the same `step`.

  Returns:
    The step, the mean of every metric, and for M > 1 its standard error as
    `seeds_stderr/<name>`.
  """
  entry, stderrs = {'step': entries[0]['step']}, {}
  for name in (name for name in entries[0] if name != 'step'):
    values = np.array([member[name] for member in entries])
    mean, stderr = mean_and_stderr(values)
    entry[name] = float(mean)
    stderrs[f'seeds_stderr/{name}'] = float(stderr)
  # With a single member there is no spread to measure.
  return entry | stderrs if len(entries) > 1 else entry
