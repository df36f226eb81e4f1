import numpy as np
import pytest

from nonstationary_mbml.runtime import statistics


def test_entry_of_an_ensemble_has_means_and_standard_errors():
  entry = statistics.over_members(
    [{'step': 3, 'loss': 1.0, 'b': 2.0}, {'step': 3, 'loss': 3.0, 'b': 2.0}]
  )
  assert entry == {
    'step': 3,
    'loss': 2.0,
    'b': 2.0,
    'seeds_stderr/loss': pytest.approx(1.0),
    'seeds_stderr/b': 0.0,
  }
  # As metrics.jsonl has them.
  assert list(entry)[:3] == ['step', 'loss', 'b']


def test_ensemble_of_one_has_no_spread():
  assert statistics.over_members([{'step': 3, 'loss': 1.0}]) == {
    'step': 3,
    'loss': 1.0,
  }
  mean, stderr = statistics.mean_and_stderr(np.array([2.0]))
  assert mean == 2.0 and np.isnan(stderr)
