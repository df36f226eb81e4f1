import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nonstationary_mbml import predictors
from nonstationary_mbml.experiments import hazards
from nonstationary_mbml.experiments import live_and_die_predictors
from nonstationary_mbml.experiments import pruned_run_lengths
from nonstationary_mbml.experiments import run_length_predictors
from nonstationary_mbml.tests import oracles

_LAD = live_and_die_predictors.LADPredictor
_Predictor = run_length_predictors.RunLengthPredictor
_PERIOD = functools.partial(_Predictor, hazards.KnownPeriod(7))
_TABLE = functools.partial(_Predictor, (0.0, 0.0, 0.5, 0.1))


def _symbols(seed, seq_length, alphabet_size=2, batch_size=2):
  rng = np.random.default_rng(seed)
  symbols = rng.integers(alphabet_size, size=(batch_size, seq_length))
  symbols[0, seq_length // 2 :] = 1
  return symbols


def _log_probs(predictor, symbols, state=None, chunk_length=None):
  return predictors.symbol_log_probs(
    predictor, {}, symbols, state, chunk_length
  )


@pytest.mark.parametrize(
  'make',
  [_LAD, functools.partial(_Predictor, 0.1), _TABLE, _PERIOD],
  ids=['lad', 'constant', 'table', 'period'],
)
def test_with_room_for_all_starts_it_is_the_whole_mixture(make):
  symbols = _symbols(0, 60, 3)
  pruned = make(alphabet_size=3, max_run_lengths=64)
  whole = make(alphabet_size=3)
  truth, whole_state = _log_probs(whole, symbols)
  log_probs, state = _log_probs(pruned, symbols)
  np.testing.assert_allclose(log_probs, truth, atol=2e-6)
  np.testing.assert_array_equal(pruned.nats_lost(state), 0)
  np.testing.assert_allclose(
    pruned.run_length_posterior(state),
    whole.run_length_posterior(whole_state),
    atol=1e-6,
  )
  batch = oracles.one_hot(symbols, 3, np.float32)
  np.testing.assert_allclose(
    pruned.unroll({}, None, batch)[0],
    whole.unroll({}, None, batch)[0],
    atol=2e-6,
  )


def _loop(symbols, num_starts, hazard):
  """Log-probabilities and the bound, in float64, one symbol after another."""
  weights, counts, excess = np.ones(1), np.zeros((1, 2)), np.zeros(1)
  log_probs = []
  survival = np.cumprod([1, *(1 - hazard(np.arange(1, len(symbols) + 1)))])
  for symbol in symbols:
    sizes = counts.sum(axis=1).astype(int)
    joint = weights * (counts[:, symbol] + 0.5) / (sizes + 1)
    log_probs.append(np.log(joint.sum() / weights.sum()))
    joint /= joint.sum()
    ended = joint * hazard(sizes + 1)
    new, new_excess = ended.sum(), (ended * excess).sum() / ended.sum()
    weights = joint * (1 - hazard(sizes + 1))
    counts[:, symbol] += 1
    if len(weights) == num_starts:
      least = weights.argmin()
      own = counts[least]
      size = own.sum()
      likelihood = np.prod((own / size) ** own)
      evidence = oracles.kt_probability(
        (0,) * int(own[0]) + (1,) * int(own[1]), (0.5, 0.5)
      )
      factor = likelihood / evidence / survival[int(size)]
      new_excess += weights[least] * (1 + excess[least]) * factor / new
      weights = np.delete(weights, least)
      counts = np.delete(counts, least, axis=0)
      excess = np.delete(excess, least)
    weights = np.append(weights, new)
    counts = np.vstack([counts, np.zeros(2)])
    excess = np.append(excess, new_excess)
  bound = np.log((weights * (1 + excess)).sum() / weights.sum())
  return np.array(log_probs), bound


def test_it_drops_the_lightest_and_counts_what_that_may_cost():
  symbols = _symbols(1, 150)
  predictor = _LAD(max_run_lengths=12)
  log_probs, state = _log_probs(predictor, symbols)
  bounds = predictor.nats_lost(state)
  for row, bound, sequence in zip(log_probs, bounds, symbols, strict=True):
    truth, wanted = _loop(sequence, 12, live_and_die_predictors.hazard)
    np.testing.assert_allclose(row, truth, atol=1e-5)
    np.testing.assert_allclose(bound, wanted, rtol=1e-3)


@pytest.mark.parametrize('hazard', [live_and_die_predictors.hazard, 0.01])
def test_loss_of_8192_symbols_is_below_its_bound(hazard):
  rng = np.random.default_rng(2)
  means = np.repeat(rng.beta(0.5, 0.5, (1, 8)), 1024, axis=1)
  symbols = np.concatenate(
    [
      rng.random((1, 8192)) < means,
      rng.random((1, 8192)) < 0.5,
      rng.random((1, 8192)) < 0.01,
    ]
  ).astype(int)
  whole = np.asarray(_log_probs(_Predictor(hazard), symbols)[0], np.float64)
  predictor = _Predictor(hazard, max_run_lengths=64)
  log_probs, state = _log_probs(predictor, symbols)
  lost = (whole - np.asarray(log_probs, np.float64)).sum(axis=1)
  bound = np.asarray(predictor.nats_lost(state))
  assert np.all(lost <= bound)
  # What is bounded is there, and the bound is of use.
  assert np.abs(lost).max() > 0.01
  assert bound[1] < -0.3 * whole[1].sum()


def test_a_hazard_that_grows_has_no_bound_once_weight_was_dropped():
  predictor = _TABLE(max_run_lengths=4)
  _, state = _log_probs(predictor, _symbols(3, 40))
  assert np.all(np.isinf(predictor.nats_lost(state)))
  # A known period drops starts without weight.
  predictor = _PERIOD(max_run_lengths=2)
  _, state = _log_probs(predictor, _symbols(3, 40))
  np.testing.assert_array_equal(predictor.nats_lost(state), 0)


@pytest.mark.parametrize(
  ('hazard', 'never_grows'),
  [
    (live_and_die_predictors.hazard, True),
    (0.3, True),
    (0.0, True),
    ((0.5, 0.2), True),
    ((0.2, 0.5), False),
  ],
)
def test_hazards_that_grow_are_told(hazard, never_grows):
  hazard = hazards.as_hazard(hazard)
  assert pruned_run_lengths.never_grows(hazard, 50) == never_grows


@pytest.mark.parametrize('chunk_length', [1, 13])
def test_chunks_and_streams_are_those_of_the_whole(chunk_length):
  predictor, symbols = _LAD(max_run_lengths=8, max_length=64), _symbols(4, 60)
  whole, state = _log_probs(predictor, symbols)
  chunks, final = _log_probs(predictor, symbols, None, chunk_length)
  np.testing.assert_allclose(chunks, whole, atol=1e-6)
  np.testing.assert_array_equal(final.starts, state.starts)
  np.testing.assert_array_equal(final.counts, state.counts)
  np.testing.assert_allclose(
    predictor.nats_lost(final), predictor.nats_lost(state), rtol=1e-4
  )
  state = predictor.initial_state({}, None, 2)
  batch = oracles.one_hot(symbols, 2, np.float32)

  @jax.jit
  def unroll(state):
    return predictor.unroll({}, None, jnp.asarray(batch), state)[0]

  np.testing.assert_allclose(
    np.take_along_axis(unroll(state)[:, :-1], symbols[:, 1:, None], 2)[..., 0],
    whole[:, 1:],
    atol=2e-6,
  )


def test_no_array_grows_with_time_and_alphabet():
  predictor = _LAD(alphabet_size=64, max_run_lengths=16)
  jaxpr = jax.make_jaxpr(lambda symbols: _log_probs(predictor, symbols))(
    np.zeros((1, 4096), np.int32)
  )
  # The tables of the hazard are twice as long as the sequence.
  assert oracles.largest_array(jaxpr.jaxpr) <= 2 * (4096 + 1)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: _LAD(max_run_lengths=1), 'max_run_lengths is 1'),
    (
      lambda: _LAD(max_run_lengths=4).switch_posterior(np.eye(2)[None]),
      'max_run_lengths is 4; switch_posterior needs None',
    ),
    (
      lambda: _LAD(max_run_lengths=4).unroll_run_lengths(np.eye(2)[None]),
      'max_run_lengths is 4; unroll_run_lengths needs None',
    ),
    (
      lambda: _LAD().nats_lost(_LAD().initial_state({}, None, 1)),
      'max_run_lengths is None; nats_lost needs a number',
    ),
    (
      lambda: _log_probs(
        _LAD(max_run_lengths=4), [[0]], _LAD().initial_state({}, None, 1)
      ),
      'the state is a RunLengthState; LADPredictor takes a Pruned',
    ),
    (
      lambda: _log_probs(
        _LAD(max_run_lengths=4, max_length=5), np.zeros((1, 6), int)
      ),
      'max_length 5 is less than the 6 symbols',
    ),
    (
      lambda: (
        jax.jit(lambda s: _LAD(max_run_lengths=4).unroll({}, None, s))(
          jnp.eye(2)[None]
        )
        and jax.jit(lambda s: _LAD(max_run_lengths=4).output_from_state(s))(
          _LAD(max_run_lengths=4).initial_state({}, None, 1)
        )
      ),
      'max_length is None, but with max_run_lengths it must be given',
    ),
  ],
)
def test_wrong_use_is_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()
