import copy
import pickle
import warnings

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nonstationary_mbml import predictors
from nonstationary_mbml.experiments import forget_me_not_predictors
from nonstationary_mbml.experiments import live_and_die_predictors
from nonstationary_mbml.experiments import ptw_predictors
from nonstationary_mbml.experiments import run_length_predictors
from nonstationary_mbml.models import basic
from nonstationary_mbml.models import recurrent
from nonstationary_mbml.models import stack_rnn
from nonstationary_mbml.models import transformer
from nonstationary_mbml.runtime import devices
from nonstationary_mbml.tests import oracles

BAYES = {
  'kt': predictors.OptimalCategoricalPredictor(),
  'ptw': ptw_predictors.PTWPredictor(6),
  'lad': live_and_die_predictors.LADPredictor(),
  'fmn': forget_me_not_predictors.ForgetMeNotPredictor(6, memory_size=2),
}


def _random_batch(batch_size, seq_length, alphabet_size=2, seed=0):
  rng = np.random.default_rng(seed)
  symbols = rng.integers(alphabet_size, size=(batch_size, seq_length))
  # In NumPy, so that a slice of it compiles nothing.
  return oracles.one_hot(symbols, alphabet_size, jnp.result_type(float))


@pytest.mark.parametrize('prior', [(0.5, 0.5), (3.0, 0.2), (0.5, 0.5, 2.0)])
def test_kt_equals_the_dirichlet_multinomial(x64, prior):
  seq_length = {2: 8, 3: 5}[len(prior)]
  sequences = oracles.all_sequences(len(prior), seq_length)
  truth = oracles.mixture_predictions(sequences, {(seq_length,): 1.0}, prior)
  predictions, _ = predictors.OptimalCategoricalPredictor(prior).unroll(
    {}, None, jnp.asarray(oracles.one_hot(sequences, len(prior)))
  )
  np.testing.assert_allclose(predictions[:, :-1], truth[:, 1:], atol=1e-12)


def test_kt_refuses_more_symbols_than_it_can_count():
  kt = predictors.OptimalCategoricalPredictor()
  counts = jnp.array([[5, 5], [2**31 - 4, 1]], jnp.int32)
  state = predictors.KTState(counts)
  symbols = jnp.eye(2)
  _, last = kt.unroll({}, None, symbols[:, None], state)
  assert int(last.counts.sum(axis=1).max()) == 2**31 - 2
  with pytest.raises(ValueError, match='2147483648 symbols are more than can'):
    kt.unroll({}, None, jnp.tile(symbols[:, None], (1, 3, 1)), state)
  with pytest.raises(ValueError, match='2147483648 symbols are more than can'):
    kt.update(symbols, predictors.KTState(counts + jnp.array([[0, 0], [0, 2]])))


@pytest.mark.parametrize('name', BAYES)
def test_bayes_computes_narrow_floats_in_float32(name):
  batch = np.concatenate(
    [_random_batch(2, 20), np.tile(np.eye(2)[:1], (2, 44, 1))], axis=1
  )
  predictor = BAYES[name]
  narrow, _ = predictor.unroll({}, None, batch.astype(jnp.float16))
  assert narrow.dtype == jnp.float16
  np.testing.assert_array_equal(
    narrow,
    predictor.unroll({}, None, batch.astype(jnp.float32))[0].astype(
      jnp.float16
    ),
  )


@pytest.mark.parametrize(
  ('predictor', 'seq_length'),
  # The largest float16 is 65,504; whole numbers end at 2,048.
  [(BAYES['kt'], 66_000), (ptw_predictors.PTWPredictor(12), 4096)],
  ids=['kt', 'ptw'],
)
def test_narrow_floats_count_beyond_their_largest_number(predictor, seq_length):
  batch = np.tile(np.eye(2, dtype=np.float16)[:1], (1, seq_length, 1))
  narrow, _ = predictor.unroll({}, None, batch)
  wide, _ = predictor.unroll({}, None, batch.astype(np.float32))
  assert np.all(np.isfinite(narrow))
  np.testing.assert_array_equal(narrow, wide.astype(jnp.float16))


@pytest.mark.parametrize('name', BAYES)
def test_float64_arrays_of_numpy_are_read_without_warnings(name):
  """As JAX holds them: in float32."""
  batch = np.eye(2)[np.random.default_rng(0).integers(2, size=(2, 12))]
  predictor = BAYES[name]
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    predictions, state = predictor.unroll({}, None, batch)
    predictions_after, _ = predictor.unroll({}, None, batch, state)
    predictor.update(batch[:, 0], state)
    if hasattr(predictor, 'switch_posterior'):
      predictor.switch_posterior(batch)
  assert predictions.dtype == predictions_after.dtype == jnp.float32


def test_kt_counts_do_not_overflow():
  predictions, _ = BAYES['kt'].unroll(
    {}, None, np.tile(np.float32([1, 0]), (1, 70_000, 1))
  )
  np.testing.assert_allclose(
    np.exp(predictions[0, -1, 1]), 0.5 / 70_001, rtol=1e-5
  )


@pytest.mark.parametrize('name', BAYES)
def test_bayes_predictions_are_normalised(x64, name):
  predictions, _ = BAYES[name].unroll({}, None, _random_batch(3, 20))
  np.testing.assert_allclose(np.exp(predictions).sum(axis=-1), 1, rtol=1e-12)


@pytest.mark.parametrize('concentration', [1e-39, 1e39, (1e-30, 1e8)])
def test_concentrations_that_float32_loses_are_an_error(concentration):
  for predictor, *args in (
    (predictors.OptimalCategoricalPredictor,),
    (ptw_predictors.PTWPredictor, 6),
    (live_and_die_predictors.LADPredictor,),
    (forget_me_not_predictors.ForgetMeNotPredictor, 6),
  ):
    with pytest.raises(ValueError, match='concentration .*float32'):
      predictor(*args, concentration=concentration)


def test_symmetric_concentration_may_be_too_large_for_a_large_alphabet():
  predictor = predictors.OptimalCategoricalPredictor(1e28)
  predictor.unroll({}, None, _random_batch(1, 2))
  with pytest.raises(ValueError, match='1e.28 add up to 6.4e.29'):
    predictor.unroll({}, None, _random_batch(1, 2, 64))


def test_float32_holds_with_the_smallest_concentration():
  symbols = oracles.one_hot([np.arange(64) % 2, np.arange(64) // 32], 2)
  batch = jnp.asarray(symbols, jnp.float32)
  predictor = ptw_predictors.PTWPredictor(6, 1.4e-20)
  predictions, _ = predictor.unroll({}, None, batch)
  np.testing.assert_allclose(np.exp(predictions).sum(axis=-1), 1, rtol=1e-6)
  assert np.all(np.isfinite(predictions))


@pytest.mark.parametrize('name', BAYES)
def test_bayes_predictions_of_a_prefix_are_those_of_the_whole(x64, name):
  batch = _random_batch(3, 20, 3)
  whole = np.asarray(BAYES[name].unroll({}, None, batch)[0])
  for length in (1, 13):
    prefix, _ = BAYES[name].unroll({}, None, batch[:, :length])
    np.testing.assert_allclose(prefix, whole[:, :length], atol=1e-12)


@pytest.mark.parametrize('name', BAYES)
def test_bayes_predictions_do_not_depend_on_the_rest_of_the_batch(x64, name):
  batch = _random_batch(3, 20)
  whole = np.asarray(BAYES[name].unroll({}, None, batch)[0])
  alone, _ = BAYES[name].unroll({}, None, batch[2:])
  np.testing.assert_allclose(alone, whole[2:], atol=1e-12)


@pytest.mark.parametrize('name', BAYES)
@pytest.mark.parametrize('chunk_length', [1, 7, 8])
def test_bayes_chunks_equal_the_whole(x64, name, chunk_length):
  batch = _random_batch(3, 20)
  state = BAYES[name].initial_state({}, None, 3)
  whole, _ = BAYES[name].unroll({}, None, batch, state)
  chunks, _ = predictors.unroll_in_chunks(
    BAYES[name], {}, None, batch, state, chunk_length
  )
  np.testing.assert_allclose(chunks, whole, atol=1e-12)


def test_chunks_take_the_alphabet_of_the_batch(x64):
  batch = _random_batch(2, 9, 3)
  whole, _ = BAYES['kt'].unroll({}, None, batch)
  chunks, _ = predictors.unroll_in_chunks(BAYES['kt'], {}, None, batch, None, 4)
  np.testing.assert_allclose(chunks, whole, atol=1e-12)


@pytest.mark.parametrize('name', BAYES)
def test_bayes_computes_in_the_dtype_of_the_batch(x64, name):
  for dtype in (jnp.float32, jnp.float64):
    batch = _random_batch(1, 5).astype(dtype)
    predictions, state = BAYES[name].unroll({}, None, batch)
    assert predictions.dtype == dtype
    continued, _ = BAYES[name].unroll({}, None, batch, state)
    assert continued.dtype == dtype


@pytest.mark.parametrize('name', BAYES)
def test_bayes_state_can_be_jitted_and_scanned(x64, name):
  predictor, batch = BAYES[name], _random_batch(2, 12)
  batch = jnp.asarray(batch)
  whole, _ = predictor.unroll({}, None, batch)

  @jax.jit
  def continued(batch):
    first, state = predictor.unroll({}, None, batch[:, :5])
    second, _ = predictor.unroll({}, None, batch[:, 5:], state)
    return jnp.concatenate([first, second], axis=1)

  np.testing.assert_allclose(continued(batch), whole, atol=1e-12)


@pytest.mark.parametrize('name', BAYES)
def test_bayes_predictors_have_no_parameters(name):
  assert BAYES[name].init_params(jax.random.key(0), None, None) == {}


@pytest.mark.parametrize('name', BAYES)
def test_alphabet_of_the_batch_must_be_that_of_the_predictor(name):
  predictor = type(BAYES[name])(
    **({'depth': 3} if name in ('ptw', 'fmn') else {}), alphabet_size=2
  )
  with pytest.raises(ValueError, match='3 symbols, but alphabet_size is 2'):
    predictor.unroll({}, None, _random_batch(1, 4, 3))


@pytest.mark.parametrize('shape', [(3, 2), (2, 0, 2), (0, 3, 2)])
def test_batch_of_wrong_shape_is_refused(shape):
  with pytest.raises(ValueError, match='it must be'):
    BAYES['kt'].unroll({}, None, jnp.zeros(shape))


@pytest.mark.parametrize('name', BAYES)
@pytest.mark.parametrize(
  'symbols',
  [[0.5, 0.5], [0.0, 0.0], [1.0, 1.0], [0.0, 2.0], [np.nan, 1.0], [1.0, -1.0]],
)
def test_symbols_that_are_not_one_hot_are_refused(name, symbols):
  batch = np.tile(np.float32([0.0, 1.0]), (2, 3, 1))
  batch[1, 2] = symbols
  with pytest.raises(ValueError, match=r'one-hot; at \(1, 2\)'):
    BAYES[name].unroll({}, None, batch)
  state = BAYES[name].initial_state({}, None, 2)
  with pytest.raises(ValueError, match='one-hot; at'):
    BAYES[name].update(batch[:, 2], state)


@pytest.mark.parametrize('name', BAYES)
def test_state_of_another_predictor_is_refused(name):
  other = BAYES[{'kt': 'ptw', 'ptw': 'lad', 'lad': 'fmn', 'fmn': 'kt'}[name]]
  state = other.initial_state({}, None, 1)
  message = f'the state is a {type(state).__name__}'
  with pytest.raises(ValueError, match=message):
    BAYES[name].unroll({}, None, jnp.eye(2)[None], state)
  with pytest.raises(ValueError, match=message):
    BAYES[name].update(jnp.eye(2)[:1], state)
  with pytest.raises(ValueError, match=message):
    BAYES[name].output_from_state(state)


@pytest.mark.parametrize('name', BAYES)
def test_update_refuses_a_state_of_another_batch_size(name):
  state = BAYES[name].initial_state({}, None, 3)
  with pytest.raises(ValueError, match='for 3 sequences, the batch has 2'):
    BAYES[name].update(jnp.eye(2), state)


# Of alphabets of 2, 26 and 256, and of lengths that no chunk divides.
SYMBOLS = {2: 101, 26: 67, 256: 45}


def _symbols(alphabet_size, batch_size=2):
  """Random ones, then a constant stretch, then all symbols in order."""
  length = SYMBOLS[alphabet_size]
  rng = np.random.default_rng(alphabet_size)
  symbols = rng.integers(alphabet_size, size=(batch_size, length))
  symbols[0, length // 3 : 2 * length // 3] = 1
  symbols[1, -20:] = np.arange(20) % alphabet_size
  return symbols


def _with_alphabet(name, alphabet_size, **kwargs):
  if name in ('ptw', 'fmn'):
    kwargs['depth'] = 7
  return type(BAYES[name])(alphabet_size=alphabet_size, **kwargs)


def _by_one_hot(predictor, symbols):
  """Log-probabilities by `unroll`, and its final state."""
  state = predictor.initial_state({}, None, len(symbols))
  first = predictor.output_from_state(state)
  batch = oracles.one_hot(symbols, first.shape[-1], jnp.result_type(float))
  predictions, state = predictor.unroll({}, None, batch, state)
  predictions = np.concatenate([first[:, None], predictions[:, :-1]], axis=1)
  return np.take_along_axis(predictions, symbols[..., None], 2)[..., 0], state


@pytest.mark.parametrize('name', BAYES)
@pytest.mark.parametrize('alphabet_size', SYMBOLS)
def test_integer_symbols_have_the_probabilities_of_one_hot_ones(
  name, alphabet_size
):
  predictor = _with_alphabet(name, alphabet_size)
  symbols = _symbols(alphabet_size)
  truth, state = _by_one_hot(predictor, symbols)
  log_probs, final = predictors.symbol_log_probs(
    predictor, {}, symbols.astype(np.uint8)
  )
  np.testing.assert_allclose(log_probs, truth, atol=1e-5)
  for array, wanted in zip(final, state, strict=True):
    np.testing.assert_allclose(array, wanted, atol=1e-4)


@pytest.mark.parametrize('name', ['kt', 'ptw'])
@pytest.mark.parametrize('alphabet_size', SYMBOLS)
@pytest.mark.parametrize('concentration', [0.5, 0.1])
def test_integer_symbols_equal_a_loop_in_float64(
  name, alphabet_size, concentration
):
  predictor = _with_alphabet(name, alphabet_size, concentration=concentration)
  symbols = _symbols(alphabet_size)
  log_probs, _ = predictors.symbol_log_probs(predictor, {}, symbols)
  prior = (concentration,) * alphabet_size
  for row, sequence in zip(log_probs, symbols.tolist(), strict=True):
    truth = (
      oracles.ptw_log_probs(sequence, 7, prior)
      if name == 'ptw'
      else oracles.kt_log_probs(sequence, prior)
    )
    np.testing.assert_allclose(row, truth, atol=1e-5)


@pytest.mark.parametrize('name', BAYES)
@pytest.mark.parametrize('chunk_length', [1, 13])
def test_integer_symbols_in_chunks_and_as_a_stream_are_those_of_the_whole(
  x64, name, chunk_length
):
  predictor, symbols = _with_alphabet(name, 26), _symbols(26)[:, :40]
  whole, _ = predictors.symbol_log_probs(predictor, {}, symbols)
  chunks, _ = predictors.symbol_log_probs(
    predictor, {}, symbols, None, chunk_length
  )
  np.testing.assert_allclose(chunks, whole, atol=1e-12)
  # On from a state of `unroll`, whose time is no power of two.
  batch = oracles.one_hot(symbols[:, :27], 26)
  _, state = predictor.unroll({}, None, batch)
  rest, _ = predictors.symbol_log_probs(predictor, {}, symbols[:, 27:], state)
  np.testing.assert_allclose(rest, whole[:, 27:], atol=1e-12)


@pytest.mark.parametrize('name', ['kt', 'ptw', 'fmn'])
def test_integer_symbols_need_no_predictions_of_all(name):
  depth = {} if name == 'kt' else {'depth': 11}
  predictor = type(BAYES[name])(**depth, alphabet_size=256)
  symbols = np.zeros((1, 2048), np.int32)
  jaxpr = jax.make_jaxpr(
    lambda symbols: predictors.symbol_log_probs(predictor, {}, symbols)
  )(symbols)
  assert oracles.largest_array(jaxpr.jaxpr) < 2048 * 256 / 4


def test_prior_of_all_other_symbols_keeps_its_digits_and_is_no_matrix():
  prior = np.array([1e6, 1e-3, 2e-3, 0.3], np.float32)
  of = predictors.prior_of_symbols
  own, others = of(np.arange(4), jnp.asarray(prior))
  truth = [np.delete(prior.astype(float), index).sum() for index in range(4)]
  np.testing.assert_array_equal(own, prior)
  np.testing.assert_allclose(others, truth, rtol=1e-6)
  jaxpr = jax.make_jaxpr(of)(np.array([0, 20_000]), jnp.full(20_001, 0.5))
  assert oracles.largest_array(jaxpr.jaxpr) <= 20_001


def test_state_of_another_alphabet_is_refused():
  state = BAYES['kt'].empty_state(1, 5)
  kt = type(BAYES['kt'])(alphabet_size=3)
  with pytest.raises(ValueError, match='state has 5 symbols, but alpha'):
    predictors.symbol_log_probs(kt, {}, np.zeros((1, 4), int), state)


def test_integer_symbols_of_a_constant_file_keep_their_digits():
  """Each costs less than a float32 below 1 can tell."""
  zeros = np.zeros((1, 50_000), np.uint8)
  for predictor in (
    predictors.OptimalCategoricalPredictor(),
    ptw_predictors.PTWPredictor(16),
  ):
    log_probs, _ = predictors.symbol_log_probs(predictor, {}, zeros)
    truth = oracles.kt_log_probs(zeros[0].tolist(), (0.5, 0.5))
    if predictor.label == 'PTW':
      truth = oracles.ptw_log_probs(zeros[0, :5000].tolist(), 16, (0.5, 0.5))
    total = np.asarray(log_probs, np.float64)[0, : len(truth)].sum()
    np.testing.assert_allclose(total, truth.sum(), rtol=2e-6)


@pytest.mark.parametrize(
  ('symbols', 'message'),
  [
    ([[0, 1, 2]], r'0, ..., 1 for an alphabet of 2; at \(0, 2\) there is 2'),
    ([[0, 1], [-1, 5]], r'at \(1, 0\) there is -1'),
    ([[0.0, 1.0]], 'symbols must be integers, not float'),
    ([0, 1], r'symbols has shape \(2,\); it must be \[B, T\]'),
    ([[]], r'symbols has shape \(1, 0\)'),
  ],
)
@pytest.mark.parametrize('kind', ['exact', 'network'])
def test_wrong_integer_symbols_are_named(symbols, message, kind):
  predictor, params = BAYES['ptw'], {}
  if kind == 'network':
    predictor = _lstm()
    params = predictor.init_params(
      jax.random.key(0), jnp.zeros((1, 1, 2)), None
    )
  with pytest.raises(ValueError, match=message):
    predictors.symbol_log_probs(predictor, params, np.array(symbols))


def test_integer_symbols_do_not_run_past_the_horizon():
  symbols = np.zeros((1, 65), int)
  with pytest.raises(ValueError, match='depth 6 holds 64 symbols, not 65'):
    predictors.symbol_log_probs(BAYES['ptw'], {}, symbols, chunk_length=8)


@pytest.mark.parametrize('kind', ['lstm', 'transformer'])
def test_networks_read_integer_symbols(kind):
  predictor = {'lstm': _lstm, 'transformer': _small_transformer}[kind]()
  batch = _random_batch(2, 11)
  params = predictor.init_params(jax.random.key(0), batch, None)
  symbols = batch.argmax(axis=-1)
  log_probs, state = predictors.symbol_log_probs(predictor, params, symbols)
  logits, _ = predictor.unroll(params, None, batch)
  truth = np.take_along_axis(
    np.asarray(jax.nn.log_softmax(logits))[:, :-1], symbols[:, 1:, None], 2
  )[..., 0]
  np.testing.assert_allclose(log_probs[:, 0], -np.log(2), rtol=1e-6)
  np.testing.assert_allclose(log_probs[:, 1:], truth, atol=1e-5)
  # Chunks, and a stream.
  chunks, _ = predictors.symbol_log_probs(predictor, params, symbols, None, 4)
  first, state = predictors.symbol_log_probs(predictor, params, symbols[:, :4])
  second, _ = predictors.symbol_log_probs(
    predictor, params, symbols[:, 4:8], state
  )
  np.testing.assert_allclose(chunks[:, :4], first, atol=1e-6)
  np.testing.assert_allclose(chunks[:, 4:8], second, atol=1e-6)
  # The first one of a chunk is predicted from the chunk before it.
  np.testing.assert_allclose(chunks[:, :5], log_probs[:, :5], atol=1e-5)
  if kind == 'lstm':
    np.testing.assert_allclose(chunks, log_probs, atol=1e-5)
  with pytest.raises(ValueError, match='must come from symbol_log_probs'):
    predictors.symbol_log_probs(predictor, params, symbols, {'hidden': 0})


def _lstm():
  return predictors.RNNPredictor(basic.make_rnn(2, hk.LSTM, hidden_size=5))


def _small_transformer():
  return predictors.InContextPredictor(
    transformer.make_transformer_encoder(
      2, embedding_dim=4, num_layers=1, num_heads=2
    )
  )


def test_rnn_initialises_with_any_batch_size():
  for batch_size in (1, 7):
    batch = _random_batch(batch_size, 4).astype(jnp.float32)
    state = _lstm().initial_state({}, None, batch_size)
    params = jax.jit(_lstm().init_params)(jax.random.key(0), batch, state)
    predictions, _ = jax.jit(_lstm().unroll)(params, None, batch, state)
    assert predictions.shape == (batch_size, 4, 2)


def test_rnn_unroll_states_are_the_states_of_prefixes():
  batch = _random_batch(3, 4).astype(jnp.float32)
  params = _parameters(_lstm(), batch)
  hidden, cell = map(
    np.asarray, jax.jit(_lstm().unroll_states)(params, None, batch)
  )
  unroll = jax.jit(_lstm().unroll)
  for time in range(4):
    _, state = unroll(params, None, batch[:, : time + 1])
    np.testing.assert_allclose(hidden[:, time], state.hidden, atol=1e-6)
    np.testing.assert_allclose(cell[:, time], state.cell, atol=1e-6)


def test_state_of_another_batch_size_is_refused():
  batch = _random_batch(3, 6).astype(jnp.float32)
  params = _parameters(_lstm(), batch)
  with pytest.raises(ValueError, match='for 2 sequences, the batch has 3'):
    _lstm().unroll(params, None, batch, _lstm().initial_state({}, None, 2))


def test_predictor_without_state_refuses_one():
  predictor = predictors.InContextPredictor(basic.make_cnn(2))
  batch = _random_batch(3, 6).astype(jnp.float32)
  params = _parameters(predictor, batch)
  assert predictor.initial_state(params, None, 3) is None
  with pytest.raises(ValueError, match='init_state must be None'):
    predictor.unroll(params, None, batch, jnp.zeros(3))


def test_chunks_of_a_predictor_without_state_are_contexts_of_their_own():
  predictor = predictors.InContextPredictor(basic.make_cnn(2))
  batch = _random_batch(3, 7).astype(jnp.float32)
  params = _parameters(predictor, batch)
  chunks, _ = predictors.unroll_in_chunks(
    predictor, params, None, batch, None, 3
  )
  chunks = np.asarray(chunks)
  for begin in (0, 3, 6):
    alone, _ = predictor.unroll(params, None, batch[:, begin : begin + 3])
    np.testing.assert_allclose(chunks[:, begin : begin + 3], alone, atol=1e-6)


def test_features_are_what_the_last_linear_layer_reads():
  predictor = predictors.InContextPredictor(basic.make_cnn(3, (4, 5)))
  batch = _random_batch(2, 6)
  params = _parameters(predictor, batch)
  features = predictor.unroll_features(params, None, batch)
  assert features.shape == (2, 6, 5)
  logits, _ = predictor.unroll(params, None, batch)
  w, b = (np.asarray(params['linear'][name]) for name in 'wb')
  np.testing.assert_allclose(np.asarray(features) @ w + b, logits, 1e-5)


def test_features_of_a_model_without_a_linear_layer_are_an_error():
  predictor = predictors.InContextPredictor(lambda batch: batch)
  with pytest.raises(ValueError, match='no linear layer'):
    predictor.unroll_features({}, None, _random_batch(1, 3))


@pytest.mark.parametrize('dtype', [np.int8, np.int64])
def test_integers_of_numpy_are_sizes(dtype):
  whole, _ = ptw_predictors.PTWPredictor(10).unroll(
    {}, None, _random_batch(2, 5)
  )
  ptw = ptw_predictors.PTWPredictor(dtype(10), alphabet_size=dtype(2))
  state = ptw.initial_state({}, None, dtype(2))
  predictions, _ = predictors.unroll_in_chunks(
    ptw, {}, None, _random_batch(2, 5), state, dtype(2)
  )
  np.testing.assert_allclose(predictions, whole, atol=1e-6)
  assert ptw_predictors.min_depth(dtype(100)) == 7


def test_chunks_of_no_symbols_are_refused():
  with pytest.raises(ValueError, match='chunk_length is 0'):
    predictors.unroll_in_chunks(
      BAYES['kt'], {}, None, jnp.eye(2)[None], None, 0
    )


NETWORKS = {
  'lstm': _lstm,
  'gru': lambda: predictors.RNNPredictor(
    basic.make_rnn(2, recurrent.GRU, hidden_size=3)
  ),
  'stack_rnn': lambda: predictors.RNNPredictor(
    basic.make_rnn(
      2, stack_rnn.StackRNNCore, stack_cell_size=2, stack_size=3, hidden_size=3
    )
  ),
  'transformer': lambda: predictors.InContextPredictor(
    transformer.make_transformer_encoder(
      2,
      embedding_dim=4,
      num_layers=1,
      num_heads=2,
      positional_encodings='RELATIVE',
    )
  ),
}


def _parameters(network, batch):
  return jax.jit(lambda: network.init_params(jax.random.key(0), batch, None))()


@pytest.mark.parametrize('name', NETWORKS)
def test_network_reads_integers_as_it_reads_floats(name):
  network = NETWORKS[name]()
  floats = _random_batch(2, 4).astype(jnp.float32)
  integers = floats.astype(jnp.int32)
  params, same = (_parameters(network, b) for b in (floats, integers))
  jax.tree.map(np.testing.assert_array_equal, params, same)
  unroll = jax.jit(lambda batch: network.unroll(params, None, batch)[0])
  np.testing.assert_array_equal(unroll(floats), unroll(integers))


@pytest.mark.parametrize('name', NETWORKS)
def test_network_reads_float64_arrays_of_numpy_without_warnings(name):
  """As JAX holds them: in float32."""
  network = NETWORKS[name]()
  batch = np.asarray(_random_batch(2, 4), np.float64)
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    params = _parameters(network, batch)
    predictions, state = network.unroll(params, None, batch)
  narrow = batch.astype(np.float32)
  expected, expected_state = network.unroll(params, None, narrow)
  assert predictions.dtype == jnp.float32
  jax.tree.map(
    np.testing.assert_array_equal,
    (predictions, state),
    (expected, expected_state),
  )


def test_integers_that_stand_for_embeddings_have_positions():
  network = predictors.InContextPredictor(
    transformer.make_transformer_encoder(
      2, use_embeddings=False, num_layers=1, num_heads=1
    )
  )
  floats = _random_batch(2, 4).astype(jnp.float32)
  params = _parameters(network, floats)
  whole, integers = (
    network.unroll(params, None, batch)[0]
    for batch in (floats, floats.astype(jnp.int32))
  )
  np.testing.assert_array_equal(whole, integers)


@pytest.mark.parametrize(
  ('name', 'dtype'),
  [
    ('lstm', jnp.bfloat16),
    ('gru', jnp.float16),
    ('stack_rnn', jnp.bfloat16),
    ('stack_rnn', jnp.float16),
    ('transformer', jnp.bfloat16),
  ],
)
def test_network_computes_in_16_bits_if_its_batch_has_them(name, dtype):
  network = NETWORKS[name]()
  batch = _random_batch(2, 4).astype(jnp.float32)
  params = _parameters(network, batch)
  unroll = jax.jit(lambda batch: network.unroll(params, None, batch))
  whole, _ = unroll(batch)
  narrow, state = unroll(batch.astype(dtype))
  leaves = jax.tree.leaves((narrow, state))
  assert {leaf.dtype for leaf in leaves} == {jnp.dtype(dtype)}
  np.testing.assert_allclose(np.asarray(narrow, np.float32), whole, atol=0.03)


@pytest.mark.parametrize('name', NETWORKS)
def test_parameters_of_an_ensemble_are_recognised(name):
  network, batch = NETWORKS[name](), _random_batch(2, 4).astype(jnp.float32)
  params = _parameters(network, batch)
  several = jax.tree.map(lambda array: np.stack([array, array]), params)
  message = r'of the 2 members of an ensemble; .* run.member\(0\)'
  with pytest.raises(ValueError, match=message):
    network.unroll(several, None, batch)
  with pytest.raises(ValueError, match=message):
    jax.jit(network.unroll)(several, None, batch)
  # One by one they are right.
  predictions = jax.jit(
    jax.vmap(lambda params: network.unroll(params, None, batch)[0])
  )(several)
  assert predictions.shape == (2, 2, 4, 2)


def test_parameters_of_another_network_are_named():
  network, batch = _lstm(), jnp.eye(2)[None]
  params = _parameters(network, batch)
  other = _parameters(_lstm(), jnp.eye(3)[None])
  with pytest.raises(
    ValueError, match=r'linear.* has shape .*\(8, 20\); \(7, 20\)'
  ):
    network.unroll(other, None, batch)
  del params['recurrent_network/~/lstm/linear']
  with pytest.raises(ValueError, match='lstm/linear.* is in one of them only'):
    network.unroll(params, None, batch)


MAKE_BAYES = {
  'kt': lambda **kwargs: predictors.OptimalCategoricalPredictor(**kwargs),
  'ptw': lambda **kwargs: ptw_predictors.PTWPredictor(6, **kwargs),
  'lad': lambda **kwargs: live_and_die_predictors.LADPredictor(**kwargs),
  'period': lambda **kwargs: run_length_predictors.regular_shift_predictor(
    5, **kwargs
  ),
  'lengths': lambda **kwargs: run_length_predictors.random_shift_predictor(
    'uniform', (1.0, 9.0), **kwargs
  ),
  'fmn': lambda **kwargs: forget_me_not_predictors.ForgetMeNotPredictor(
    6, **kwargs
  ),
}


@pytest.mark.parametrize('name', MAKE_BAYES)
def test_equal_predictors_share_their_programs(name):
  batch = jax.device_put(np.asarray(_random_batch(2, 12), np.float32))
  symbols = batch[:, 0]

  def use(predictor):
    _, state = predictor.unroll({}, None, batch)
    predictor.unroll({}, None, batch, state)
    predictor.output_from_state(predictor.update(symbols, state))
    for method in ('switch_posterior', 'unroll_run_lengths'):
      if hasattr(predictor, method):
        getattr(predictor, method)(batch)

  predictor, equal = MAKE_BAYES[name](), MAKE_BAYES[name]()
  assert predictor == equal and hash(predictor) == hash(equal)
  assert predictor != MAKE_BAYES[name](concentration=0.3)
  use(predictor)
  with devices.count_compilations() as compilations:
    use(equal)
  assert compilations.programs == 0


@pytest.mark.parametrize('name', MAKE_BAYES)
@pytest.mark.parametrize(
  'copied',
  [copy.deepcopy, lambda predictor: pickle.loads(pickle.dumps(predictor))],
  ids=['deepcopy', 'pickle'],
)
def test_copies_of_exact_predictors_are_equal(name, copied):
  predictor = MAKE_BAYES[name]()
  assert copied(predictor) == predictor


def test_network_is_its_own_copy_and_says_why_it_cannot_be_pickled():
  for predictor in (
    predictors.InContextPredictor(lambda batch: batch),
    predictors.RNNPredictor(basic.make_rnn(2, hk.LSTM, hidden_size=4)),
  ):
    assert copy.deepcopy(predictor) is predictor
    assert copy.copy(predictor) is predictor
    with pytest.raises(TypeError, match='build it again.*build_predictor'):
      pickle.dumps(predictor)


def test_predictor_with_an_array_is_equal_to_itself_alone():
  class Array(predictors.OptimalCategoricalPredictor):
    def __init__(self):
      super().__init__()
      self.array = np.ones(2)

  predictor = Array()
  assert predictor != Array()
  assert {predictor: 'found'}[predictor] == 'found'
  assert isinstance(hash(predictor), int)
  assert predictor != predictors.OptimalCategoricalPredictor()


def test_attributes_of_other_types_make_another_predictor():
  """They are equal, but a program for an int computes otherwise."""

  class Scaled(predictors.OptimalCategoricalPredictor):
    def __init__(self, scale):
      super().__init__()
      self.scale = scale

  assert Scaled(1) == Scaled(1) and Scaled(1) != Scaled(1.0)
