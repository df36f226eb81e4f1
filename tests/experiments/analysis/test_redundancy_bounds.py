import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from nonstationary_mbml import predictors
from nonstationary_mbml.experiments import live_and_die_predictors
from nonstationary_mbml.experiments import ptw_predictors
from nonstationary_mbml.experiments.analysis import redundancy_bounds
from nonstationary_mbml.tests import oracles

LN2 = math.log(2)
# Rounding; constant sequences of one symbol meet the KT bound.
TOLERANCE = 1e-9


def _ptw(depth):
  """The predictor, and its bound."""
  return (
    ptw_predictors.PTWPredictor(depth),
    lambda switch_points: redundancy_bounds.ptw(switch_points, depth),
  )


def _lad():
  return live_and_die_predictors.LADPredictor(), redundancy_bounds.lad


def _code_lengths(predictor, symbols, alphabet_size=2):
  """Log loss of the first t symbols, for t = 1, ..., T, `[N, T]`."""
  batch = oracles.one_hot(symbols, alphabet_size)
  state = predictor.initial_state({}, None, len(batch))
  first = predictor.output_from_state(state)
  predictions, _ = predictor.unroll({}, None, jnp.asarray(batch))
  log_probs = np.concatenate(
    [np.asarray(first)[:, None], np.asarray(predictions)[:, :-1]], axis=1
  )
  return np.cumsum(-(log_probs * batch).sum(axis=-1), axis=-1)


def _best_in_hindsight(symbols, switch_points, alphabet_size=2):
  """Log loss of the best parameters of each segment.

  Symbols `[..., T]` and switch points `[..., T]` are broadcast.
  """
  batch = oracles.one_hot(symbols, alphabet_size)  # [..., T, K]
  segments = np.cumsum(switch_points, axis=-1)
  members = oracles.one_hot(segments, segments.max() + 1)  # [..., T, S]
  counts = np.swapaxes(members, -1, -2) @ batch  # [..., S, K]
  totals = counts.sum(axis=-1)
  return special.xlogy(totals, totals).sum(axis=-1) - special.xlogy(
    counts, counts
  ).sum(axis=(-1, -2))


def _all_switch_points(seq_length):
  """The switch points of every partition, `[2^(T-1), T]`."""
  return np.array(
    [
      (False, *ends)
      for ends in itertools.product((False, True), repeat=seq_length - 1)
    ]
  )


def _switch_points(partition):
  """The switch points of segments of these lengths."""
  switch_points = np.zeros(sum(partition), bool)
  switch_points[np.cumsum(partition)[:-1]] = True
  return switch_points


def _sum_of_kts(partition, alphabet_size=2):
  return sum(redundancy_bounds.kt(np.array(partition), alphabet_size))


# KT.


@pytest.mark.parametrize('alphabet_size', [2, 3, 4, 5])
def test_kt_bounds_constant_sequences(x64, alphabet_size):
  code_lengths = _code_lengths(
    predictors.OptimalCategoricalPredictor(alphabet_size=alphabet_size),
    np.zeros((1, 500), int),
    alphabet_size,
  )
  bound = redundancy_bounds.kt(np.arange(1, 501), alphabet_size)
  assert np.all(code_lengths[0] <= bound + TOLERANCE)


def test_kt_bounds_every_binary_sequence(x64):
  symbols = oracles.all_sequences(2, 8)
  code_lengths = _code_lengths(
    predictors.OptimalCategoricalPredictor(), symbols
  )
  for length in range(1, 9):
    best = _best_in_hindsight(symbols[:, :length], np.zeros(length, bool))
    redundancy = code_lengths[:, length - 1] - best
    assert np.all(redundancy <= redundancy_bounds.kt(length) + TOLERANCE)


@pytest.mark.parametrize('alphabet_size', [2, 3, 4, 5])
def test_kt_bounds_every_type_class(x64, alphabet_size):
  # The KT probability does not depend on the order of the symbols.
  symbols = np.array(
    list(itertools.combinations_with_replacement(range(alphabet_size), 12))
  )
  code_lengths = _code_lengths(
    predictors.OptimalCategoricalPredictor(alphabet_size=alphabet_size),
    symbols,
    alphabet_size,
  )
  best = _best_in_hindsight(symbols, np.zeros(12, bool), alphabet_size)
  bound = redundancy_bounds.kt(12, alphabet_size)
  assert np.all(code_lengths[:, -1] - best <= bound + TOLERANCE)


@pytest.mark.parametrize('alphabet_size', [2, 3, 5])
def test_kt_exceeds_the_loss_on_constant_sequences_by_its_constant(
  x64, alphabet_size
):
  code_lengths = _code_lengths(
    predictors.OptimalCategoricalPredictor(alphabet_size=alphabet_size),
    np.zeros((1, 500), int),
    alphabet_size,
  )
  gaps = (
    redundancy_bounds.kt(np.arange(1, 501), alphabet_size) - code_lengths[0]
  )
  most = (
    math.log(alphabet_size)
    - math.lgamma(1 / 2)
    + math.lgamma(alphabet_size / 2)
  )
  assert np.all(np.diff(gaps) > 0)
  np.testing.assert_allclose(gaps[-1], most, atol=0.01)


def test_kt_bound_is_zero_without_symbols():
  np.testing.assert_array_equal(
    redundancy_bounds.kt(np.array([0, 1])), [0, LN2]
  )


# PTW and LAD against the measured redundancy.


@pytest.mark.parametrize(
  ('predictor', 'bound'),
  [_ptw(3), _ptw(5), _lad()],
  ids=['ptw3', 'ptw5', 'lad'],
)
def test_bounds_every_binary_sequence_for_every_partition(
  x64, predictor, bound
):
  symbols = oracles.all_sequences(2, 8)
  switch_points = _all_switch_points(8)
  code_lengths = _code_lengths(predictor, symbols)[:, -1]
  best = _best_in_hindsight(symbols[:, None], switch_points)  # [256, 128]
  redundancy = code_lengths[:, None] - best
  assert np.all(redundancy <= bound(switch_points) + TOLERANCE)


@pytest.mark.parametrize(
  ('predictor', 'bound'), [_ptw(3), _lad()], ids=['ptw', 'lad']
)
def test_bounds_every_prefix_for_every_partition(x64, predictor, bound):
  """Blocks of PTW are seen in part only."""
  code_lengths = _code_lengths(predictor, oracles.all_sequences(2, 8))
  for length in range(1, 8):
    # The first sequence with each prefix.
    rows = np.arange(2**length) * 2 ** (8 - length)
    symbols = oracles.all_sequences(2, length)
    switch_points = _all_switch_points(length)
    best = _best_in_hindsight(symbols[:, None], switch_points)
    redundancy = code_lengths[rows, length - 1, None] - best
    assert np.all(redundancy <= bound(switch_points) + TOLERANCE)


@pytest.mark.parametrize(
  ('predictor', 'bound'), [_ptw(6), _lad()], ids=['ptw', 'lad']
)
def test_bounds_piecewise_sequences(x64, predictor, bound):
  rng = np.random.default_rng(0)
  hazards = np.array([0.01, 0.05, 0.2, 0.5]).repeat(16)[:, None]
  switch_points = rng.random((64, 64)) < hazards
  switch_points[:, 0] = False
  thetas = rng.beta(0.5, 0.5, size=(64, 64))
  segments = np.cumsum(switch_points, axis=-1)
  thetas = np.take_along_axis(thetas, segments, axis=-1)
  symbols = (rng.random((64, 64)) < thetas).astype(int)
  redundancy = _code_lengths(predictor, symbols)[:, -1] - _best_in_hindsight(
    symbols, switch_points
  )
  assert np.all(redundancy <= bound(switch_points) + TOLERANCE)


@pytest.mark.parametrize(
  ('predictor', 'bound'), [_ptw(6), _lad()], ids=['ptw', 'lad']
)
def test_bounds_alternating_constant_segments(x64, predictor, bound):
  periods = np.arange(1, 65)[:, None]
  segments = np.arange(64) // periods
  switch_points = np.diff(segments, prepend=0) > 0
  # Nothing is lost in hindsight.
  redundancy = _code_lengths(predictor, segments % 2)[:, -1]
  assert np.all(redundancy <= bound(switch_points) + TOLERANCE)


@pytest.mark.parametrize(
  ('predictor', 'bound'), [_ptw(3), _lad()], ids=['ptw', 'lad']
)
def test_bounds_expected_regret_against_the_true_parameters(
  x64, predictor, bound
):
  rng = np.random.default_rng(1)
  switch_points = _all_switch_points(8)
  thetas = np.take_along_axis(
    rng.beta(0.5, 0.5, size=(128, 8)),
    np.cumsum(switch_points, axis=-1),
    axis=-1,
  )
  symbols = oracles.all_sequences(2, 8)
  log_probs = (
    special.xlogy(symbols, thetas[:, None])
    + special.xlog1py(1 - symbols, -thetas[:, None])
  ).sum(axis=-1)  # [128, 256]
  losses = _code_lengths(predictor, symbols)[:, -1] + log_probs
  regrets = (np.exp(log_probs) * losses).sum(axis=-1)
  assert np.all(regrets <= bound(switch_points))


# PTW and LAD against the prior.


@pytest.mark.parametrize('alphabet_size', [2, 4])
def test_ptw_costs_the_prior_of_tree_partitions(alphabet_size):
  priors = oracles.ptw_partitions(3)
  bound = redundancy_bounds.ptw(
    np.array([_switch_points(p) for p in priors]), 3, alphabet_size
  )
  truth = [
    -math.log(prior) + _sum_of_kts(partition, alphabet_size)
    for partition, prior in priors.items()
  ]
  np.testing.assert_allclose(bound, truth)


def test_ptw_costs_the_cheapest_tree_partition_that_refines():
  priors = oracles.ptw_partitions(3)
  trees = np.array([_switch_points(p) for p in priors])
  costs = np.array([-math.log(v) + _sum_of_kts(p) for p, v in priors.items()])
  switch_points = _all_switch_points(8)
  refines = np.all(switch_points[:, None] <= trees, axis=-1)
  truth = np.where(refines, costs, np.inf).min(axis=-1)
  np.testing.assert_allclose(redundancy_bounds.ptw(switch_points, 3), truth)


@pytest.mark.parametrize('alphabet_size', [2, 4])
def test_lad_costs_the_prior_of_every_partition(alphabet_size):
  priors = oracles.hazard_partitions(8, oracles.lin_hazard)
  bound = redundancy_bounds.lad(
    np.array([_switch_points(p) for p in priors]), alphabet_size
  )
  truth = [
    -math.log(prior) + _sum_of_kts(partition, alphabet_size)
    for partition, prior in priors.items()
  ]
  np.testing.assert_allclose(bound, truth)


@pytest.mark.parametrize(
  ('depth', 'partition', 'bits', 'blocks'),
  [
    # The root is the last level.
    (0, (1,), 0, (1,)),
    # The root is whole.
    (3, (8,), 1, (8,)),
    (5, (8,), 1, (8,)),
    # Root, two halves.
    (2, (1, 3), 3, (1, 1, 2)),
    # Root, both halves, the right one's first half; its second is not seen.
    (3, (5, 1), 4, (4, 1, 1)),
    # Root, left half, both its halves; the root's second half is not seen.
    (3, (2, 2), 4, (2, 2)),
  ],
)
def test_ptw_is_that_worked_out_by_hand(depth, partition, bits, blocks):
  np.testing.assert_allclose(
    redundancy_bounds.ptw(_switch_points(partition), depth),
    bits * LN2 + _sum_of_kts(blocks),
  )


@pytest.mark.parametrize(
  ('partition', 'prior'),
  [((1,), 1), ((3,), 1 / 2 * 3 / 4), ((1, 3), 1 / 2 * 3 / 8)],
)
def test_lad_is_that_worked_out_by_hand(partition, prior):
  np.testing.assert_allclose(
    redundancy_bounds.lad(_switch_points(partition)),
    -math.log(prior) + _sum_of_kts(partition),
  )


@pytest.mark.parametrize(
  'bound',
  [lambda s: redundancy_bounds.ptw(s, 4), redundancy_bounds.lad],
  ids=['ptw', 'lad'],
)
def test_leading_axes_are_sequences_of_their_own(bound):
  switch_points = np.random.default_rng(2).random((2, 3, 11)) < 0.3
  switch_points[..., 0] = False
  np.testing.assert_array_equal(
    bound(switch_points), [[bound(s) for s in rows] for rows in switch_points]
  )


# The worst cases.


@pytest.mark.parametrize('alphabet_size', [2, 4, 20])
@pytest.mark.parametrize('extra_depth', [0, 2])
def test_ptw_worst_case_dominates_every_partition(extra_depth, alphabet_size):
  for length in range(1, 12):
    depth = ptw_predictors.min_depth(length) + extra_depth
    switch_points = _all_switch_points(length)
    worst = redundancy_bounds.ptw_worst_case(
      length, switch_points.sum(axis=-1), depth, alphabet_size
    )
    bound = redundancy_bounds.ptw(switch_points, depth, alphabet_size)
    assert np.all(worst >= bound - TOLERANCE)


@pytest.mark.parametrize('alphabet_size', [2, 4, 20])
def test_lad_worst_case_dominates_every_partition(alphabet_size):
  for length in range(1, 12):
    switch_points = _all_switch_points(length)
    worst = redundancy_bounds.lad_worst_case(
      length, switch_points.sum(axis=-1), alphabet_size
    )
    bound = redundancy_bounds.lad(switch_points, alphabet_size)
    assert np.all(worst >= bound - TOLERANCE)


def test_ptw_worst_case_dominates_one_switch_in_a_long_sequence():
  switch_points = np.eye(700, dtype=bool)[1:]
  worst = redundancy_bounds.ptw_worst_case(700, 1, 10)
  assert np.all(worst >= redundancy_bounds.ptw(switch_points, 10))


def test_lad_worst_case_dominates_one_switch_in_a_long_sequence():
  switch_points = np.eye(700, dtype=bool)[1:]
  worst = redundancy_bounds.lad_worst_case(700, 1)
  assert np.all(worst >= redundancy_bounds.lad(switch_points))


@pytest.mark.parametrize('num_switches', [0, 15])
def test_ptw_worst_case_is_met_by_no_switch_and_by_all(num_switches):
  switch_points = np.full(16, num_switches > 0)
  switch_points[0] = False
  np.testing.assert_allclose(
    redundancy_bounds.ptw_worst_case(16, num_switches, 4),
    redundancy_bounds.ptw(switch_points, 4),
  )


def test_ptw_worst_case_is_no_more_than_the_bound_for_separate_paths():
  """2 c d + 1 nodes and c d + 1 blocks."""
  switches = np.arange(16)
  num_blocks = np.minimum(8 * switches + 1, 256)
  kts = num_blocks * (np.log(256 / num_blocks) / 2 + LN2)
  worst = redundancy_bounds.ptw_worst_case(256, switches, 8)
  assert np.all(worst <= LN2 * (16 * switches + 1) + kts + TOLERANCE)


def test_lad_worst_case_of_few_switches_is_a_bit_a_segment_from_the_worst():
  switch_points = _all_switch_points(11)
  switches = switch_points.sum(axis=-1)
  bound = redundancy_bounds.lad(switch_points)
  worst = [bound[switches == c].max() for c in range(6)]
  gaps = redundancy_bounds.lad_worst_case(11, np.arange(6)) - worst
  assert np.all(gaps <= LN2 * np.arange(1, 7))


@pytest.mark.parametrize(
  'worst_case',
  [
    lambda t, c: redundancy_bounds.ptw_worst_case(t, c, 4),
    redundancy_bounds.lad_worst_case,
  ],
  ids=['ptw', 'lad'],
)
def test_worst_case_of_a_curve_is_that_of_each_time(worst_case):
  times = np.arange(1, 17)
  switches = times // 4
  np.testing.assert_allclose(
    worst_case(times, switches),
    [worst_case(t, c) for t, c in zip(times, switches, strict=True)],
  )


# Errors.


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (
      lambda: redundancy_bounds.kt(-1),
      'seq_length is -1; it must be an int >= 0',
    ),
    (
      lambda: redundancy_bounds.kt([2, -3]),
      'seq_length is -3; it must be an int >= 0',
    ),
    (
      lambda: redundancy_bounds.kt(2.5),
      'seq_length is 2.5; it must be an int >= 0',
    ),
    (
      lambda: redundancy_bounds.kt(3, 1),
      'alphabet_size is 1; it must be an int >= 2',
    ),
    (
      lambda: redundancy_bounds.ptw(np.zeros(9, bool), 3),
      'depth 3 holds 8 symbols, not 9; depth=4 does',
    ),
    (
      lambda: redundancy_bounds.ptw(np.zeros(8, bool), 3.0),
      'depth is 3.0; it must be',
    ),
    (
      lambda: redundancy_bounds.ptw(np.zeros(8, bool), 31),
      'depth is 31; it must be',
    ),
    (
      lambda: redundancy_bounds.ptw(np.zeros(8, bool), 3, 1),
      'alphabet_size is 1',
    ),
    (lambda: redundancy_bounds.lad(np.zeros(8, bool), 1), 'alphabet_size is 1'),
    (
      lambda: redundancy_bounds.ptw_worst_case(9, 1, 3),
      'depth 3 holds 8 symbols, not 9; depth=4 does',
    ),
    (
      lambda: redundancy_bounds.ptw_worst_case(8, 1, -1),
      'depth is -1; it must be',
    ),
    (
      lambda: redundancy_bounds.ptw_worst_case(8, 1, 3, 1),
      'alphabet_size is 1',
    ),
    (lambda: redundancy_bounds.lad_worst_case(8, 1, 1), 'alphabet_size is 1'),
  ],
)
def test_wrong_arguments_are_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()


@pytest.mark.parametrize(
  'bound',
  [lambda s: redundancy_bounds.ptw(s, 3), redundancy_bounds.lad],
  ids=['ptw', 'lad'],
)
@pytest.mark.parametrize(
  ('switch_points', 'message'),
  [
    (np.zeros(8, int), r'dtype int64 and .* must be bool \[..., T\]'),
    (np.zeros((2, 0), bool), r'shape \(2, 0\); it must be bool'),
    (np.bool_(False), r'shape \(\); it must be bool'),
    (np.eye(8, dtype=bool), 'switch_points is True at time 0'),
  ],
)
def test_wrong_switch_points_are_named(bound, switch_points, message):
  with pytest.raises(ValueError, match=message):
    bound(switch_points)


@pytest.mark.parametrize(
  'worst_case',
  [
    lambda t, c: redundancy_bounds.ptw_worst_case(t, c, 3),
    redundancy_bounds.lad_worst_case,
  ],
  ids=['ptw', 'lad'],
)
@pytest.mark.parametrize(
  ('seq_length', 'num_switches', 'message'),
  [
    (0, 0, 'seq_length is 0; it must be an int >= 1'),
    (8, -1, 'num_switches is -1; it must be an int >= 0'),
    (8, 1.5, 'num_switches is 1.5; it must be an int >= 0'),
    (8, 8, 'num_switches is 8; 8 symbols have at most 7'),
    ([8, 5], [7, 5], 'num_switches is 5; 5 symbols have at most 4'),
  ],
)
def test_impossible_numbers_of_switches_are_named(
  worst_case, seq_length, num_switches, message
):
  with pytest.raises(ValueError, match=message):
    worst_case(seq_length, num_switches)
