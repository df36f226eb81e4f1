import numpy as np
import pytest

from nonstationary_mbml.experiments import live_and_die_predictors
from nonstationary_mbml.experiments.analysis import linear_probe
from nonstationary_mbml.tests import oracles


def test_probe_finds_a_linear_map_and_nothing_else():
  rng = np.random.default_rng(0)
  states = rng.normal(size=(60, 8, 5))
  states[..., 4] = 1  # What does not vary.
  targets = {
    'linear': states @ [1.0, -2, 0, 0.5, 0] + 3,
    'noise': rng.normal(size=(60, 8)),
  }
  predicted = linear_probe.predict(states, targets)
  np.testing.assert_allclose(
    predicted['linear'], targets['linear'][30:], atol=1e-4
  )
  assert linear_probe.r2_score(targets['noise'][30:], predicted['noise']) < 0.1


def test_cells_that_are_hardly_ever_filled_do_no_harm():
  rng = np.random.default_rng(0)
  states = rng.normal(size=(60, 8, 5))
  states[..., 4] *= 1e-8
  states[40, 3, 4] = 1
  values = states @ [1.0, -2, 0, 0.5, 0] + rng.normal(size=(60, 8))
  predicted = linear_probe.predict(states, {'values': values})['values']
  score = linear_probe.r2_score(values[30:], predicted)
  assert score == pytest.approx(5.25 / 6.25, abs=0.05)


def test_clock_in_the_state_explains_variance_but_none_given_time():
  rng = np.random.default_rng(0)
  times = np.tile(np.arange(6.0), (400, 1))
  clock = times[..., None]
  noise = rng.normal(size=times.shape)
  targets = {'both': times + noise, 'time': times}
  scores = linear_probe.r2_scores(clock, targets)
  # The variance of times is 35 / 12, that of the noise 1.
  assert scores['both']['r2'] == pytest.approx(35 / 47, abs=0.05)
  assert scores['both']['r2_given_time'] == pytest.approx(0, abs=0.02)
  assert scores['time']['r2'] == pytest.approx(1)
  assert scores['time']['r2_given_time'] is None
  # With the noise in the state, too, all is explained.
  states = np.stack([times, noise], axis=-1)
  scores = linear_probe.r2_scores(states, targets)
  assert scores['both']['r2_given_time'] == pytest.approx(1)


def test_posteriors_are_those_of_every_partition(x64):
  """Of LAD, against the sum over all partitions of every prefix."""
  hazard = lambda length: 1 / (2 * length)
  symbols = np.array([[0, 0, 0, 1, 1, 1]])
  got = linear_probe.posteriors(
    live_and_die_predictors.LADPredictor(), oracles.one_hot(symbols, 2)
  )
  for seq_length in range(1, symbols.shape[1] + 1):
    # Switches before the symbols 2, ..., t + 1 or not: all of them.
    weights, run_lengths = [], []
    for code in range(2**seq_length):
      cuts = [t + 1 for t in range(seq_length) if code >> t & 1]
      weight, begin = 1.0, 0
      for end in (*cuts, None):
        last = seq_length if end is None else end
        for age in range(1, last - begin):
          weight *= 1 - hazard(age)
        if last > begin:
          weight *= hazard(last - begin) if end else 1 - hazard(last - begin)
        weight *= _kt(symbols[0, begin:last])
        begin = last
      weights.append(weight)
      run_lengths.append(seq_length - (cuts[-1] if cuts else 0))
    weights = np.array(weights) / np.sum(weights)
    run_lengths = np.array(run_lengths)
    time = seq_length - 1
    np.testing.assert_allclose(
      got['run_length'][0, time], weights @ run_lengths, rtol=1e-9
    )
    np.testing.assert_allclose(
      got['recent_switch'][0, time],
      weights[run_lengths <= linear_probe.RECENT].sum(),
      rtol=1e-9,
    )


def _kt(symbols):
  """Probability of a segment under the KT estimator."""
  counts, probability = np.zeros(2), 1.0
  for symbol in symbols:
    probability *= (counts[symbol] + 0.5) / (counts.sum() + 1)
    counts[symbol] += 1
  return probability
