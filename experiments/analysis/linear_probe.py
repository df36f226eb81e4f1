"""Linear probes: the exact posterior over switches, read from network states.

  targets = posteriors(exact_predictor, symbols)
  scores = r2_scores(states, targets)

Axes: N sequences, T time, K alphabet size, D numbers in a state.
"""

from collections.abc import Mapping

import numpy as np

from nonstationary_mbml import predictors

# Longest age of a segment, in symbols, that counts as recent.
RECENT = 4
# Penalty of the ridge regression, relative to the number of symbols.
_RIDGE = 1e-6
# Features that vary less, relative to the one that varies most, are not scaled
# to as much: a cell that a stack hardly ever fills may in other sequences be
# thousands of its standard deviations from its mean.
_LEAST_SPREAD = 1e-2
# Entries of the run-length posterior that are computed at a time.
_CHUNK_SIZE = 2**18


def posteriors(
  exact: predictors.OptimalPredictor, symbols: np.ndarray
) -> dict[str, np.ndarray]:
  """Returns the posterior of the current segment's length, `[N, T]` each.

    run_length     E[symbols of the current segment | the past]
    recent_switch  P(it has at most `RECENT` symbols so far | the past)

  Args:
    exact: Predictor with `unroll_run_lengths`.
    symbols: One-hot symbols `[N, T, K]`.
  """
  size = max(1, _CHUNK_SIZE // symbols.shape[1] ** 2)
  run_lengths, recent = [], []
  for begin in range(0, len(symbols), size):
    posterior = np.asarray(
      exact.unroll_run_lengths(symbols[begin : begin + size]), np.float64
    )
    run_lengths.append(posterior @ np.arange(posterior.shape[-1]))
    recent.append(posterior[..., : RECENT + 1].sum(axis=-1))
  return {
    'run_length': np.concatenate(run_lengths),
    'recent_switch': np.concatenate(recent),
  }


def r2_scores(
  states: np.ndarray, targets: Mapping[str, np.ndarray]
) -> dict[str, dict[str, float | None]]:
  """Returns how much of every target's variance a linear map explains.

  `r2` is the score of the map on the second half of the sequences. For
  `r2_given_time`, the mean at every time is taken from states and targets, so
  that a state that only counts symbols explains nothing.

  Args:
    states: States `[N, T, D]`; the first half of the sequences is for the fit.
    targets: Targets `[N, T]`, by name.
  """
  half = len(states) // 2

  def centred(values: np.ndarray) -> np.ndarray:
    return values - values[:half].mean(axis=0)

  centred_targets = {name: centred(values) for name, values in targets.items()}
  plain = predict(states, targets)
  given_time = predict(centred(states), centred_targets)
  return {
    name: {
      'r2': r2_score(values[half:], plain[name]),
      'r2_given_time': r2_score(centred_targets[name][half:], given_time[name]),
    }
    for name, values in targets.items()
  }


def predict(
  states: np.ndarray, targets: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """Returns targets of the second half of the sequences, from ridge regression.

  Args:
    states: States `[N, T, D]`; the first half of the sequences is for the fit.
    targets: Targets `[N, T]`, by name.
  """
  half = len(states) // 2
  flat = states.reshape(-1, states.shape[-1]).astype(np.float64)
  fit = slice(0, half * states.shape[1])
  mean, spread = flat[fit].mean(axis=0), flat[fit].std(axis=0)
  # Constant features explain nothing.
  scale = np.maximum(spread, _LEAST_SPREAD * spread.max())[spread > 0]
  flat = (flat - mean)[:, spread > 0] / scale
  inputs = flat[fit]
  gram = inputs.T @ inputs + _RIDGE * len(inputs) * np.eye(inputs.shape[1])
  predicted = {}
  for name, values in targets.items():
    goal = values[:half].ravel()
    weights = np.linalg.solve(gram, inputs.T @ (goal - goal.mean()))
    out = flat[half * states.shape[1] :] @ weights + goal.mean()
    predicted[name] = out.reshape(values[half:].shape)
  return predicted


def r2_score(values: np.ndarray, predicted: np.ndarray) -> float | None:
  """Returns the share of variance that predictions explain, 1 at most.

    1 - sum (v - predicted)^2 / sum (v - mean)^2

  None where the values have no variance beyond rounding.
  """
  variance = np.sum((values - values.mean()) ** 2)
  if variance <= 1e-9 * max(np.sum(values**2), len(values)):
    return None
  return float(1 - np.sum((values - predicted) ** 2) / variance)
