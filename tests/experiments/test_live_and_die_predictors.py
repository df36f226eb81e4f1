import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nonstationary_mbml import predictors
from nonstationary_mbml.experiments import live_and_die_predictors
from nonstationary_mbml.tests import oracles


def _unroll(batch, state=None, **kwargs):
  predictor = live_and_die_predictors.LADPredictor(**kwargs)
  return predictor.unroll({}, None, jnp.asarray(batch), state)


def test_equals_enumeration_for_all_binary_sequences(x64):
  sequences = oracles.all_sequences(2, 8)
  truth = oracles.mixture_predictions(
    sequences,
    oracles.hazard_partitions(8, oracles.lin_hazard),
    (0.5, 0.5),
  )
  predictions, _ = _unroll(oracles.one_hot(sequences, 2))
  np.testing.assert_allclose(predictions[:, :-1], truth[:, 1:], atol=1e-12)


@pytest.mark.parametrize('prior', [(0.5, 0.5, 0.5), (2.0, 0.3, 1.0)])
def test_equals_enumeration_for_three_symbols_and_any_prior(x64, prior):
  sequences = oracles.all_sequences(3, 5)
  truth = oracles.mixture_predictions(
    sequences, oracles.hazard_partitions(5, oracles.lin_hazard), prior
  )
  predictions, _ = _unroll(oracles.one_hot(sequences, 3), concentration=prior)
  np.testing.assert_allclose(predictions[:, :-1], truth[:, 1:], atol=1e-12)


def test_last_prediction_is_about_a_symbol_not_seen(x64):
  sequences = oracles.all_sequences(2, 4)
  longer = np.hstack([sequences, sequences[:, :1]])
  truth = oracles.mixture_predictions(
    longer, oracles.hazard_partitions(5, oracles.lin_hazard), (0.5, 0.5)
  )
  predictions, _ = _unroll(oracles.one_hot(sequences, 2))
  np.testing.assert_allclose(predictions, truth[:, 1:], atol=1e-12)


def test_prediction_before_any_symbol_is_prior_mean(x64):
  predictor = live_and_die_predictors.LADPredictor(concentration=(1.0, 3.0))
  state = predictor.initial_state({}, None, 1)
  np.testing.assert_allclose(
    np.exp(predictor.output_from_state(state)), [[0.25, 0.75]]
  )


@pytest.mark.parametrize(
  ('dtype', 'tolerance'), [(np.float64, 1e-10), (np.float32, 2e-5)]
)
def test_long_sparse_sequence_equals_log_domain(x64, dtype, tolerance):
  symbols = (np.random.default_rng(0).random(400) < 0.02).astype(int)
  truth = oracles.run_length_log_domain(symbols, (0.5, 0.5), oracles.lin_hazard)
  predictions, _ = _unroll(oracles.one_hot([symbols], 2, dtype))
  assert predictions.dtype == dtype
  np.testing.assert_allclose(predictions[0], truth, atol=tolerance)


# Chunks of other lengths are tried in test_run_length_predictors.py.
def test_chunks_equal_whole(x64):
  symbols = np.random.default_rng(1).integers(2, size=(3, 100))
  batch = oracles.one_hot(symbols, 2)
  whole, whole_state = _unroll(batch)
  chunks, state = [], None
  for begin in range(0, 100, 40):
    chunk, state = _unroll(batch[:, begin : begin + 40], state)
    chunks.append(chunk)
  np.testing.assert_allclose(np.concatenate(chunks, 1), whole, atol=1e-12)
  predictor = live_and_die_predictors.LADPredictor()
  np.testing.assert_allclose(
    predictor.run_length_posterior(state),
    predictor.run_length_posterior(whole_state),
    atol=1e-12,
  )
  np.testing.assert_array_equal(
    state.counts[:, :101], whole_state.counts[:, :101]
  )


def test_chunks_inside_jit_equal_whole(x64):
  batch = jnp.asarray(
    oracles.one_hot(np.random.default_rng(1).integers(2, size=(3, 12)), 2)
  )
  predictor = live_and_die_predictors.LADPredictor()
  whole, _ = _unroll(batch)
  chunks = jax.jit(
    lambda b: predictors.unroll_in_chunks(predictor, {}, None, b, None, 8)[0]
  )(batch)
  np.testing.assert_allclose(chunks, whole, atol=1e-12)


def test_state_of_fixed_length_can_be_scanned(x64):
  batch = jnp.asarray(
    oracles.one_hot(np.random.default_rng(1).integers(2, size=(3, 30)), 2)
  )
  predictor = live_and_die_predictors.LADPredictor(max_length=30)
  chunks = jnp.moveaxis(batch.reshape(3, 6, 5, 2), 1, 0)

  def step(state, chunk):
    predictions, state = predictor.unroll({}, None, chunk, state)
    return state, predictions

  _, predictions = jax.lax.scan(
    step, predictor.initial_state({}, None, 3), chunks
  )
  whole, _ = _unroll(batch)
  np.testing.assert_allclose(
    jnp.moveaxis(predictions, 0, 1).reshape(whole.shape), whole, atol=1e-12
  )


def test_sequence_beyond_the_fixed_length_is_an_error():
  batch = np.tile(np.float32([0, 1]), (1, 5, 1))
  with pytest.raises(ValueError, match='max_length 4 is less than the 5'):
    _unroll(batch, max_length=4)
  _, state = _unroll(batch[:, :3], max_length=4)
  with pytest.raises(ValueError, match='max_length 4 is less than the 5'):
    _unroll(batch[:, 3:], state, max_length=4)
  with pytest.raises(
    ValueError, match='capacity for 5 symbols, but max_length'
  ):
    _unroll(batch, _unroll(batch)[1], max_length=9)


def test_counts_do_not_overflow_on_long_constant_sequences():
  predictions, state = _unroll(np.tile(np.float32([0, 1]), (1, 600, 1)))
  assert np.exp(predictions[0, -1, 0]) < 5e-3
  assert int(state.counts[0, 0, 1]) == 600


def test_update_equals_unroll(x64):
  predictor = live_and_die_predictors.LADPredictor()
  batch = jnp.asarray(oracles.one_hot([[0, 1, 1]], 2))
  state = predictor.initial_state({}, None, 1)
  for time in range(3):
    state = predictor.update(batch[:, time], state)
  whole, _ = _unroll(batch)
  np.testing.assert_allclose(
    predictor.output_from_state(state), whole[:, -1], atol=1e-14
  )
