import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nonstationary_mbml import predictors
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments import ptw_predictors
from nonstationary_mbml.tests import oracles


def _unroll(predictor, batch, state=None):
  return predictor.unroll({}, None, jnp.asarray(batch), state)


def _stream(predictor, batch):
  """One symbol after the other."""
  batch = jnp.asarray(batch)
  state = predictor.empty_state(batch.shape[0], batch.shape[-1])
  return predictors.ScanPredictor.unroll(predictor, {}, None, batch, state)


def _random_batch(seed, batch_size, seq_length, alphabet_size=2):
  rng = np.random.default_rng(seed)
  symbols = rng.integers(alphabet_size, size=(batch_size, seq_length))
  return oracles.one_hot(symbols, alphabet_size)


@pytest.mark.parametrize('form', [_unroll, _stream])
@pytest.mark.parametrize('depth', [3, 4])
def test_equals_enumeration_for_all_binary_sequences(x64, depth, form):
  sequences = oracles.all_sequences(2, 8)
  batch = oracles.one_hot(sequences, 2)
  truth = oracles.mixture_predictions(
    sequences, oracles.ptw_partitions(depth), (0.5, 0.5)
  )
  predictions, _ = form(ptw_predictors.PTWPredictor(depth), batch)
  np.testing.assert_allclose(predictions[:, :-1], truth[:, 1:], atol=1e-12)


@pytest.mark.parametrize('seq_length', [1, 3, 6])
def test_equals_enumeration_when_length_is_no_power_of_two(x64, seq_length):
  sequences = oracles.all_sequences(2, seq_length)
  longer = np.hstack([sequences, np.zeros_like(sequences[:, :1])])
  truth = oracles.mixture_predictions(
    longer, oracles.ptw_partitions(3), (0.5, 0.5)
  )
  predictions, _ = _unroll(
    ptw_predictors.PTWPredictor(3), oracles.one_hot(sequences, 2)
  )
  np.testing.assert_allclose(predictions, truth[:, 1:], atol=1e-12)


@pytest.mark.parametrize('form', [_unroll, _stream])
@pytest.mark.parametrize('prior', [(0.5, 0.5, 0.5), (2.0, 0.3, 1.0)])
def test_equals_enumeration_for_three_symbols_and_any_prior(x64, prior, form):
  sequences = oracles.all_sequences(3, 5)
  truth = oracles.mixture_predictions(
    sequences, oracles.ptw_partitions(3), prior
  )
  predictions, _ = form(
    ptw_predictors.PTWPredictor(3, concentration=prior),
    oracles.one_hot(sequences, 3),
  )
  np.testing.assert_allclose(predictions[:, :-1], truth[:, 1:], atol=1e-12)


@pytest.mark.parametrize(('depth', 'seq_length'), [(3, 7), (4, 5), (3, 1)])
def test_posteriors_equal_enumeration(x64, depth, seq_length):
  sequences = oracles.all_sequences(2, seq_length)[::3]
  switches, run_lengths = oracles.mixture_posteriors(
    sequences, oracles.ptw_partitions(depth), (0.5, 0.5)
  )
  predictor = ptw_predictors.PTWPredictor(depth)
  batch = jnp.asarray(oracles.one_hot(sequences, 2))
  _, state = _unroll(predictor, batch)
  np.testing.assert_allclose(
    predictor.switch_posterior(batch), switches, atol=1e-12
  )
  np.testing.assert_allclose(
    predictor.unroll_run_lengths(batch), run_lengths, atol=1e-12
  )
  np.testing.assert_allclose(
    predictor.run_length_posterior(state), run_lengths[:, -1], atol=1e-12
  )


def test_posteriors_of_three_symbols_equal_enumeration(x64):
  prior = (2.0, 0.3, 1.0)
  sequences = oracles.all_sequences(3, 4)[::2]
  switches, run_lengths = oracles.mixture_posteriors(
    sequences, oracles.ptw_partitions(3), prior
  )
  predictor = ptw_predictors.PTWPredictor(3, concentration=prior)
  batch = jnp.asarray(oracles.one_hot(sequences, 3))
  np.testing.assert_allclose(
    predictor.switch_posterior(batch), switches, atol=1e-12
  )
  np.testing.assert_allclose(
    predictor.unroll_run_lengths(batch), run_lengths, atol=1e-12
  )


@pytest.mark.parametrize(
  ('depth', 'seq_length', 'alphabet_size'),
  [(6, 33, 2), (3, 8, 3), (9, 41, 256)],
)
def test_switch_posterior_of_integers_is_that_of_one_hot_symbols(
  depth, seq_length, alphabet_size
):
  batch = _random_batch(8, 2, seq_length, alphabet_size).astype(np.float32)
  predictor = ptw_predictors.PTWPredictor(depth, alphabet_size=alphabet_size)
  np.testing.assert_allclose(
    predictor.symbol_switch_posterior(batch.argmax(axis=-1)),
    predictor.switch_posterior(batch),
    atol=1e-6,
  )
  with pytest.raises(ValueError, match=r'at \(0, 0\) there is -1'):
    predictor.symbol_switch_posterior(np.full((1, 3), -1))


def test_switch_posterior_is_calibrated_on_its_own_source():
  """Expected and true number of switches agree to 4 standard errors.

  The false-alarm rate is 6e-5; the seed is fixed.
  """
  source = constants.build_data_generator(config_lib.DataConfig())
  batch, _ = source.sample(jax.random.key(0), 2000, 32)
  switches = np.asarray(source.switch_points(jax.random.key(0), 2000, 32))
  posterior = ptw_predictors.PTWPredictor(5).switch_posterior(batch)
  surplus = (switches - np.asarray(posterior)).sum(axis=1)
  assert abs(surplus.mean()) < 4 * surplus.std() / np.sqrt(2000)
  # And it tells switches from the rest: Brier score against the prior's.
  prior = switches.mean(axis=0)
  assert ((switches - posterior) ** 2).mean() < 0.8 * (
    (switches - prior) ** 2
  ).mean()


def test_run_lengths_inside_jit_are_those_outside(x64):
  predictor, batch = ptw_predictors.PTWPredictor(4), _random_batch(7, 2, 11)
  batch = jnp.asarray(batch)
  inside = jax.jit(predictor.unroll_run_lengths)(batch)
  np.testing.assert_allclose(
    inside, predictor.unroll_run_lengths(batch), atol=1e-14
  )
  _, state = predictor.unroll({}, None, batch)
  with pytest.raises(ValueError, match='the time of the state is traced'):
    jax.jit(predictor.run_length_posterior)(state)


def test_streaming_state_does_not_grow():
  predictor = ptw_predictors.PTWPredictor(30)
  batch = _random_batch(6, 1, 12).astype(np.float32)
  sizes = set()
  state = None
  for begin in range(0, 12, 4):
    _, state = _unroll(predictor, batch[:, begin : begin + 4], state)
    sizes.add(sum(np.size(leaf) for leaf in state))
  # Time, counts [d + 1, K], log-odds and what they lack [d].
  assert sizes == {1 + 31 * 2 + 2 * 30}


def test_prediction_before_any_symbol_is_prior_mean(x64):
  predictor = ptw_predictors.PTWPredictor(3, concentration=(1.0, 2.0, 5.0))
  state = predictor.initial_state({}, None, 2)
  np.testing.assert_allclose(
    np.exp(predictor.output_from_state(state)),
    np.tile([0.125, 0.25, 0.625], (2, 1)),
  )


def test_prediction_after_the_horizon_is_prior_mean(x64):
  predictor = ptw_predictors.PTWPredictor(3, concentration=(1.0, 3.0))
  predictions, _ = _unroll(predictor, np.tile([1.0, 0.0], (1, 8, 1)))
  np.testing.assert_allclose(np.exp(predictions[0, -1]), [0.25, 0.75])


def test_depth_zero_predicts_prior_mean(x64):
  predictions, _ = _unroll(
    ptw_predictors.PTWPredictor(0), np.array([[[1.0, 0.0]]])
  )
  np.testing.assert_allclose(np.exp(predictions), 0.5)


@pytest.mark.parametrize(('depth', 'seq_length'), [(6, 1), (6, 64), (7, 33)])
def test_parallel_and_streaming_forms_are_equal(x64, depth, seq_length):
  batch = _random_batch(0, 3, seq_length, 3)
  predictor = ptw_predictors.PTWPredictor(depth, alphabet_size=3)
  whole, state = _unroll(predictor, batch)
  streamed, streamed_state = _stream(predictor, batch)
  np.testing.assert_allclose(whole, streamed, atol=1e-12)
  assert int(state.time) == int(streamed_state.time) == seq_length
  np.testing.assert_array_equal(state.counts, streamed_state.counts)
  np.testing.assert_allclose(
    state.log_odds, streamed_state.log_odds, atol=1e-12
  )


def test_streaming_continues_from_a_parallel_state(x64):
  batch = _random_batch(1, 2, 16)
  predictor = ptw_predictors.PTWPredictor(4)
  whole, _ = _unroll(predictor, batch)
  first, state = _unroll(predictor, batch[:, :5])
  second, _ = _unroll(predictor, batch[:, 5:], state)
  np.testing.assert_allclose(
    np.concatenate([first, second], axis=1), whole, atol=1e-12
  )


def test_counts_do_not_overflow_on_long_constant_sequences():
  batch = np.tile(np.float32([0, 1]), (1, 1024, 1))
  predictions, state = _unroll(ptw_predictors.PTWPredictor(11), batch)
  # After 1,023 ones, nearly all weight is on long segments.
  assert np.exp(predictions[0, -2, 0]) < 1e-3
  assert int(state.counts[0, 0, 1]) == 1024


def test_float32_code_length_of_a_long_sequence_is_that_of_float64():
  rng = np.random.default_rng(2)
  probabilities = np.repeat([0.02, 0.6, 0.98, 0.3], 2**10)
  symbols = (rng.random((1, 2**12)) < probabilities).astype(int)

  def code_length(dtype):
    batch = jnp.asarray(oracles.one_hot(symbols, 2, dtype))
    predictor = ptw_predictors.PTWPredictor(12)
    predictions, _ = jax.jit(lambda b: predictor.unroll({}, None, b))(batch)
    assert predictions.dtype == dtype
    return np.sum(
      np.asarray(predictions[:, :-1], float) * np.asarray(batch[:, 1:])
    )

  with jax.enable_x64(True):
    truth = code_length(np.float64)
  np.testing.assert_allclose(code_length(np.float32), truth, rtol=1e-6)


def test_chunks_do_not_run_past_the_horizon():
  batch = jnp.asarray(_random_batch(4, 1, 16).astype(np.float32))
  with pytest.raises(ValueError, match='depth 3 holds 8 symbols, not 16'):
    predictors.unroll_in_chunks(
      ptw_predictors.PTWPredictor(3), {}, None, batch, None, 4
    )


def test_both_forms_of_a_much_deeper_tree_are_equal(x64):
  predictor = ptw_predictors.PTWPredictor(30)
  batch = _random_batch(3, 1, 6)
  whole, _ = _unroll(predictor, batch)
  streamed, _ = _stream(predictor, batch)
  np.testing.assert_allclose(whole, streamed, atol=1e-12)


@pytest.mark.parametrize('continued', [False, True])
def test_sequence_beyond_the_horizon_is_an_error(continued):
  predictor = ptw_predictors.PTWPredictor(3)
  batch = _random_batch(4, 1, 9).astype(np.float32)
  with pytest.raises(ValueError, match=r'depth 3 holds 8 symbols.*depth=4'):
    if continued:
      _, state = _unroll(predictor, batch[:, :5])
      _unroll(predictor, batch[:, 5:], state)
    else:
      _unroll(predictor, batch)


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    ({'depth': -1}, 'depth is -1'),
    ({'depth': 31}, 'depth is 31'),
    ({'depth': 2.5}, 'depth is 2.5'),
    ({'depth': 3, 'concentration': 0.0}, 'concentration is 0.0'),
    ({'depth': 3, 'concentration': (1.0, -1.0)}, 'concentration is'),
    (
      {'depth': 3, 'concentration': (1.0, 1.0, 1.0), 'alphabet_size': 2},
      'concentration has 3 entries for 2',
    ),
  ],
)
def test_wrong_arguments_are_named(kwargs, message):
  with pytest.raises(ValueError, match=message):
    ptw_predictors.PTWPredictor(**kwargs)


@pytest.mark.parametrize(
  ('state_of', 'batch_size', 'message'),
  [
    ({'depth': 4}, 2, 'depth 4, not 3'),
    ({'depth': 3}, 1, 'for 1 sequences'),
    ({'depth': 3, 'alphabet_size': 3}, 2, 'counts 3 symbols'),
  ],
)
def test_foreign_states_are_refused(state_of, batch_size, message):
  state = ptw_predictors.PTWPredictor(**state_of).initial_state(
    {}, None, batch_size
  )
  batch = _random_batch(5, 2, 4).astype(np.float32)
  with pytest.raises(ValueError, match=message):
    _unroll(ptw_predictors.PTWPredictor(3), batch, state)


def _zeros(length, dtype):
  return np.tile(np.eye(2, dtype=dtype)[:1], (1, length, 1))


@pytest.mark.parametrize(
  'log_length', [14, pytest.param(23, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize('form', ['whole', 'stream'])
def test_float32_does_not_drift_over_long_constant_data(form, log_length):
  """What a symbol adds to L_j is far below the rounding of its logarithms."""
  length, chunk = 2**log_length, 2 ** min(log_length - 2, 18)

  def run(dtype):
    # Few levels compile quickly; the slow test has the deepest tree.
    predictor = ptw_predictors.PTWPredictor(30 if log_length > 20 else 15)
    if form == 'whole':
      predictions, state = _unroll(predictor, _zeros(length, dtype))
    else:
      _, state = _unroll(predictor, _zeros(1, dtype))
      _, state = _unroll(predictor, _zeros(chunk - 1, dtype), state)
      for _ in range(length // chunk - 1):
        predictions, state = _unroll(predictor, _zeros(chunk, dtype), state)
    return np.exp(np.asarray(predictions[:, -1], np.float64)), state.log_odds

  probs, log_odds = run(np.float32)
  with jax.enable_x64(True):
    exact, exact_log_odds = run(np.float64)
  np.testing.assert_allclose(probs, exact, rtol=1e-6)
  np.testing.assert_allclose(log_odds, exact_log_odds, rtol=1e-6)


@pytest.mark.parametrize(
  ('form', 'alphabet_size'), [(_unroll, 2), (_stream, 5)]
)
def test_float32_log_odds_equal_float64_on_switching_data(form, alphabet_size):
  rng = np.random.default_rng(3)
  symbols = np.concatenate(
    [rng.integers(alphabet_size, size=700), np.zeros(500, int), [1] * 333]
  )
  batch = oracles.one_hot(symbols[None], alphabet_size, np.float32)
  predictor = ptw_predictors.PTWPredictor(11, (0.3,) * alphabet_size)
  predictions, state = form(predictor, batch)
  with jax.enable_x64(True):
    exact, exact_state = form(predictor, batch.astype(np.float64))
  np.testing.assert_allclose(predictions, exact, atol=4e-6)
  np.testing.assert_allclose(
    state.log_odds, exact_state.log_odds, rtol=2e-6, atol=2e-6
  )


def test_gradient_is_that_of_the_prefix_of_a_longer_sequence(x64):
  """Whatever the length is padded with."""
  seq_length = 5
  batch = jnp.asarray(_random_batch(0, 2, 8))

  def code_length(batch):
    predictions, _ = ptw_predictors.PTWPredictor(3).unroll({}, None, batch)
    terms = predictions[:, : seq_length - 1] * batch[:, 1:seq_length]
    return -terms.sum()

  gradient, whole = (
    np.asarray(jax.jit(jax.grad(code_length))(symbols))
    for symbols in (batch[:, :seq_length], batch)
  )
  assert np.all(np.isfinite(whole)) and np.any(whole != 0)
  np.testing.assert_allclose(gradient, whole[:, :seq_length], atol=1e-12)
  np.testing.assert_array_equal(whole[:, seq_length:], 0)
