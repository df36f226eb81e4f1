import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nonstationary_mbml import predictors
from nonstationary_mbml.experiments import distributions
from nonstationary_mbml.experiments import hazards
from nonstationary_mbml.experiments import live_and_die_predictors
from nonstationary_mbml.experiments import ptw_predictors
from nonstationary_mbml.experiments import run_length_predictors
from nonstationary_mbml.runtime import devices
from nonstationary_mbml.tests import oracles

_Predictor = run_length_predictors.RunLengthPredictor

# Every kind of hazard, and the same as a function of one length.
HAZARDS = {
  'function': (live_and_die_predictors.hazard, oracles.lin_hazard),
  'constant': (0.3, lambda a: 0.3),
  'never': (0.0, lambda a: 0.0),
  'always': (1.0, lambda a: 1.0),
  'period': (hazards.KnownPeriod(3), lambda a: float(a == 3)),
  'table': (
    (0.0, 0.0, 0.5, 0.1),
    lambda a: (0.0, 0.0, 0.5, 0.1)[min(a, 4) - 1],
  ),
  'pmf': (
    hazards.LengthDistribution((0.2, 0.0, 0.3, 0.5)),
    lambda a: (0.2, 0.0, 0.3 / 0.8, 1.0)[min(a, 4) - 1],
  ),
  'rounded': (
    hazards.RoundedLengths(distributions.Uniform(), (1.0, 4.0)),
    lambda a: (0.5 / 3, 1 / 2.5, 1 / 1.5, 1.0)[min(a, 4) - 1],
  ),
}


def _random_batch(seed, batch_size, seq_length, alphabet_size=2):
  rng = np.random.default_rng(seed)
  symbols = rng.integers(alphabet_size, size=(batch_size, seq_length))
  # In NumPy, so that a slice of it compiles nothing.
  return oracles.one_hot(symbols, alphabet_size, jnp.result_type(float))


@pytest.mark.parametrize(('hazard', 'truth'), HAZARDS.values(), ids=HAZARDS)
def test_equals_enumeration_for_all_binary_sequences(x64, hazard, truth):
  sequences = oracles.all_sequences(2, 8)
  truth = oracles.mixture_predictions(
    sequences, oracles.hazard_partitions(8, truth), (0.5, 0.5)
  )
  predictions, _ = _Predictor(hazard).unroll(
    {}, None, jnp.asarray(oracles.one_hot(sequences, 2))
  )
  np.testing.assert_allclose(predictions[:, :-1], truth[:, 1:], atol=1e-12)


@pytest.mark.parametrize('prior', [(0.5, 0.5, 0.5), (2.0, 0.3, 1.0)])
@pytest.mark.parametrize('name', ['constant', 'table', 'period', 'rounded'])
def test_equals_enumeration_for_three_symbols_and_any_prior(x64, name, prior):
  hazard, truth = HAZARDS[name]
  sequences = oracles.all_sequences(3, 5)
  truth = oracles.mixture_predictions(
    sequences, oracles.hazard_partitions(5, truth), prior
  )
  predictions, _ = _Predictor(hazard, concentration=prior).unroll(
    {}, None, jnp.asarray(oracles.one_hot(sequences, 3))
  )
  np.testing.assert_allclose(predictions[:, :-1], truth[:, 1:], atol=1e-12)


@pytest.mark.parametrize(('hazard', 'truth'), HAZARDS.values(), ids=HAZARDS)
def test_posteriors_equal_enumeration(x64, hazard, truth):
  sequences = oracles.all_sequences(2, 6)[::5]
  switches, run_lengths = oracles.mixture_posteriors(
    sequences, oracles.hazard_partitions(7, truth), (0.5, 0.5)
  )
  predictor = _Predictor(hazard)
  batch = jnp.asarray(oracles.one_hot(sequences, 2))
  _, state = predictor.unroll({}, None, batch)
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
  prior, (hazard, truth) = (2.0, 0.3, 1.0), HAZARDS['table']
  sequences = oracles.all_sequences(3, 5)[::7]
  switches, run_lengths = oracles.mixture_posteriors(
    sequences, oracles.hazard_partitions(6, truth), prior
  )
  predictor = _Predictor(hazard, concentration=prior)
  batch = jnp.asarray(oracles.one_hot(sequences, 3))
  np.testing.assert_allclose(
    predictor.switch_posterior(batch), switches, atol=1e-12
  )
  np.testing.assert_allclose(
    predictor.unroll_run_lengths(batch), run_lengths, atol=1e-12
  )


def test_worked_example_of_the_module(x64):
  predictor = live_and_die_predictors.LADPredictor()
  batch = jnp.asarray(oracles.one_hot([[0, 0]], 2))
  _, state = predictor.unroll({}, None, batch)
  # By run length: the latest start first.
  np.testing.assert_allclose(
    predictor.run_length_posterior(state), [[7 / 20, 4 / 20, 9 / 20]]
  )


def test_filtered_probability_of_a_switch_is_a_constant_hazard(x64):
  posterior = _Predictor(0.15).unroll_run_lengths(_random_batch(0, 3, 40))
  np.testing.assert_allclose(posterior[:, :, 0], 0.15)
  np.testing.assert_allclose(posterior.sum(axis=-1), 1)


# A hazard with a minimum length, and sequences that contradict it.
def _late(run_length):
  return np.where(run_length < 300, 0.0, 0.02)


ADVERSARIAL = {
  'blocks_shorter_than_the_least': (np.arange(1200) // 150) % 2,
  'blocks_off_the_grid': np.roll(np.repeat([0, 1, 0, 1], 300), 137),
  'alternating': np.arange(1200) % 2,
}


@pytest.mark.parametrize('hazard', [_late, hazards.KnownPeriod(300)])
@pytest.mark.parametrize('symbols', ADVERSARIAL.values(), ids=ADVERSARIAL)
def test_float32_holds_with_long_minimum_lengths(hazard, symbols):
  function = _late if hazard is _late else lambda a: float(a == 300)
  prior = (0.5, 0.5)
  predictor = _Predictor(hazard)
  batch = jnp.asarray(oracles.one_hot(symbols[None], 2, np.float32))
  predictions, _ = predictor.unroll({}, None, batch)
  truth = oracles.run_length_log_domain(symbols, prior, function)
  np.testing.assert_allclose(predictions[0], truth, atol=1e-5)
  # The whole code length, too, to well below the 1e-3 nats asked for.
  time = np.arange(len(symbols) - 1)
  loss, exact = (
    -np.asarray(p, np.float64)[time, symbols[1:]].sum()
    for p in (predictions[0], truth)
  )
  np.testing.assert_allclose(loss, exact, atol=1e-4)
  np.testing.assert_allclose(
    predictor.switch_posterior(batch)[0],
    oracles.switch_posterior_log_domain(symbols, prior, function),
    atol=1e-4,
  )


@pytest.mark.parametrize('concentration', [0.02, 1e-5, 1e-8])
def test_float32_holds_with_small_concentrations(concentration):
  """A small prior is not lost in a large count."""
  prior = (concentration, concentration)
  symbols = np.repeat([0, 1], [700, 300])
  predictor = _Predictor(0.01, concentration)
  batch = jnp.asarray(oracles.one_hot(symbols[None], 2, np.float32))
  predictions, _ = predictor.unroll({}, None, batch)
  np.testing.assert_allclose(
    predictions[0],
    oracles.run_length_log_domain(symbols, prior, lambda a: 0.01),
    atol=2e-5,
  )
  np.testing.assert_allclose(
    predictor.switch_posterior(batch)[0],
    oracles.switch_posterior_log_domain(symbols, prior, lambda a: 0.01),
    atol=1e-4,
  )


def test_posteriors_of_a_long_sequence_are_probabilities():
  batch = _random_batch(9, 1, 3000).astype(jnp.float32)
  posterior = _Predictor(hazards.KnownPeriod(77)).switch_posterior(batch)[0]
  switches = (np.arange(3000) % 77 == 0) & (np.arange(3000) > 0)
  np.testing.assert_allclose(posterior, switches, atol=1e-6)


def test_narrow_floats_are_computed_in_float32():
  batch = _random_batch(9, 2, 60).astype(jnp.bfloat16)
  predictor = live_and_die_predictors.LADPredictor()
  for function in (
    predictor.switch_posterior,
    lambda batch: predictor.unroll({}, None, batch)[0],
  ):
    narrow = function(batch)
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
      narrow, function(batch.astype(jnp.float32)).astype(jnp.bfloat16)
    )


@pytest.mark.parametrize('seq_length', [1, 12, 64, 999])
def test_chunks_have_capacity_for_their_past_and_no_more(seq_length):
  chunks = run_length_predictors._chunks(seq_length)
  assert [begin for begin, _, _ in chunks] == [
    0,
    *(end for _, end, _ in chunks[:-1]),
  ]
  assert chunks[-1][1] == seq_length
  assert all(capacity == end for _, end, capacity in chunks)
  work = sum((end - begin) * capacity for begin, end, capacity in chunks)
  assert seq_length < 64 or work < 0.63 * seq_length**2


@pytest.mark.parametrize('num', [1, 64, 65, 96, 97, 1000])
def test_capacity_grows_in_steps_of_a_half_or_less(num):
  capacity = run_length_predictors._capacity_for(num)
  assert num <= capacity <= max(64, 1.5 * num)
  assert run_length_predictors._capacity_for(capacity) == capacity


@pytest.mark.parametrize(
  ('hazard', 'seq_length'),
  [(live_and_die_predictors.hazard, 100), (0.05, 701)],
)
def test_a_sequence_of_any_length_takes_one_program(hazard, seq_length):
  batch = np.asarray(_random_batch(0, 1, seq_length), np.float32)
  batch = jax.device_put(batch)
  predictor = _Predictor(hazard)
  with devices.count_compilations() as compilations:
    predictor.unroll({}, None, batch)
  assert compilations.programs == 1


LONG = {
  'zeros': np.zeros(2048, int),
  'random': np.random.default_rng(0).integers(2, size=2048),
  'rare': (np.random.default_rng(1).random(2048) < 0.01).astype(int),
}


@pytest.mark.parametrize('hazard', [1e-6, live_and_die_predictors.hazard, 0.05])
def test_float32_keeps_its_digits_in_sums_over_thousands_of_starts(hazard):
  """The whole, the last prediction, and a stream of chunks."""
  batch = oracles.one_hot(np.stack(list(LONG.values())), 2, np.float32)
  predictor = _Predictor(hazard)
  whole, final = predictor.unroll({}, None, batch)
  state = predictor.initial_state({}, None, len(batch))
  chunks = []
  for begin in range(0, 2048, 512):
    chunk, state = predictor.unroll(
      {}, None, batch[:, begin : begin + 512], state
    )
    chunks.append(chunk)
  with jax.enable_x64(True):
    exact, _ = predictor.unroll({}, None, jnp.asarray(batch, jnp.float64))
  for predictions in (whole, np.concatenate(chunks, axis=1)):
    predictions = np.asarray(predictions, np.float64)
    np.testing.assert_allclose(predictions, exact, atol=2e-6)
    np.testing.assert_allclose(np.exp(predictions).sum(axis=-1), 1, atol=1e-6)
  np.testing.assert_array_equal(
    predictor.output_from_state(final), np.asarray(whole)[:, -1]
  )
  posterior = np.asarray(predictor.run_length_posterior(final), np.float64)
  np.testing.assert_allclose(posterior.sum(axis=-1), 1, atol=1e-6)


def test_float32_stream_of_single_symbols_adds_up_to_one_unroll():
  """2,047 zeros: each predicted from the state after those before it."""
  predictor = _Predictor(1e-6, max_length=2048)
  zero = jnp.eye(2)[:1]

  def step(state, _):
    return predictor.update(zero, state), predictor.output_from_state(state)

  state = predictor.initial_state({}, None, 1)
  _, streamed = jax.jit(lambda s: jax.lax.scan(step, s, None, 2047))(state)
  with jax.enable_x64(True):
    batch = jnp.tile(jnp.eye(2)[:1], (1, 2046, 1))
    exact = np.asarray(predictor.unroll({}, None, batch)[0])
  total = np.asarray(streamed, np.float64)[:, 0, 0].sum()
  np.testing.assert_allclose(
    total, exact[0, :, 0].sum() + np.log(0.5), atol=1e-4
  )


def test_float32_holds_by_hand_where_a_segment_never_ends():
  """4,096 zeros, hazard 1e-6: KT's prediction, but for a switch's chance."""
  batch = np.tile(np.float32([1, 0]), (1, 4096, 1))
  predictions, _ = _Predictor(1e-6, max_length=4096).unroll({}, None, batch)
  np.testing.assert_allclose(predictions[0, -1, 0], -1.2303e-4, atol=2e-6)


@pytest.mark.parametrize(
  ('dtype', 'tolerance'),
  [
    pytest.param(np.float64, 1e-10, marks=pytest.mark.slow),
    (np.float32, 2e-5),
  ],
)
def test_switch_posterior_of_a_long_sequence(x64, dtype, tolerance):
  symbols = (np.random.default_rng(0).random(200) < 0.03).astype(int)
  symbols[70:130] = np.arange(60) % 2
  posterior = live_and_die_predictors.LADPredictor().switch_posterior(
    jnp.asarray(oracles.one_hot([symbols], 2, dtype))
  )
  assert posterior.dtype == dtype
  truth = oracles.switch_posterior_log_domain(
    symbols, (0.5, 0.5), oracles.lin_hazard
  )
  np.testing.assert_allclose(posterior[0], truth, atol=tolerance)


def test_hazard_zero_reduces_to_kt(x64):
  batch = _random_batch(1, 3, 50, 3)
  kt = predictors.OptimalCategoricalPredictor((0.2, 1.0, 3.0))
  predictor = _Predictor(0.0, concentration=(0.2, 1.0, 3.0))
  np.testing.assert_allclose(
    predictor.unroll({}, None, batch)[0],
    kt.unroll({}, None, batch)[0],
    atol=1e-12,
  )
  np.testing.assert_array_equal(predictor.switch_posterior(batch), 0)


def test_hazard_one_over_2a_reduces_to_lad(x64):
  batch = _random_batch(2, 3, 50)
  table = 1 / (2 * np.arange(1, 51))
  np.testing.assert_allclose(
    _Predictor(table).unroll({}, None, batch)[0],
    live_and_die_predictors.LADPredictor().unroll({}, None, batch)[0],
    atol=1e-12,
  )


def test_known_period_reduces_to_kt_restarted(x64):
  batch = _random_batch(3, 3, 50)
  predictor = run_length_predictors.regular_shift_predictor(7)
  predictions, _ = predictor.unroll({}, None, batch)
  kt = predictors.OptimalCategoricalPredictor()
  for begin in range(0, 49, 7):
    within, _ = kt.unroll({}, None, batch[:, begin : begin + 7])
    # The last one of a period is about the first symbol of the next.
    np.testing.assert_allclose(
      predictions[:, begin : begin + 6], within[:, :6], atol=1e-12
    )
    np.testing.assert_allclose(
      np.exp(predictions[:, begin + 6 : begin + 7]), 0.5
    )
  switches = np.arange(50) % 7 == 0
  switches[0] = False
  np.testing.assert_allclose(
    predictor.switch_posterior(batch), np.tile(switches, (3, 1)), atol=1e-12
  )


@pytest.mark.parametrize('name', ['ptw', 'mixture'])
def test_ptw_and_the_mixture_agree_by_hand_where_their_priors_do(x64, name):
  """Two symbols: one segment or two, with probability 1/2 each."""
  predictor = {
    'ptw': ptw_predictors.PTWPredictor(1),
    'mixture': _Predictor((0.5, 0.25)),
  }[name]
  before = predictor.output_from_state(predictor.initial_state({}, None, 1))
  np.testing.assert_allclose(np.exp(before), 1 / 2)  # T = 1
  batch = jnp.asarray(oracles.one_hot([[0, 0], [0, 1]], 2))
  predictions, _ = predictor.unroll({}, None, batch)
  # T = 2: half KT's 3/4 and 1/4, half a new segment's 1/2 and 1/2.
  np.testing.assert_allclose(np.exp(predictions[:, 0]), [[5 / 8, 3 / 8]] * 2)
  # Of P(00) = 5/16, the split half has 2/16; of P(01) = 3/16, too.
  np.testing.assert_allclose(
    predictor.switch_posterior(batch), [[0, 2 / 5], [0, 2 / 3]]
  )


@pytest.mark.parametrize('chunk_length', [1, 24])
def test_streaming_equals_the_whole(x64, chunk_length):
  """Predictions and run-length posteriors, over the growth of the state."""
  batch = np.asarray(_random_batch(4, 2, 72))
  predictor = _Predictor(HAZARDS['table'][0])
  whole = np.asarray(predictor.unroll({}, None, batch)[0])
  posteriors = np.asarray(predictor.unroll_run_lengths(batch))
  state = predictor.initial_state({}, None, 2)
  for end in range(chunk_length, 73, chunk_length):
    begin = end - chunk_length
    predictions, state = predictor.unroll({}, None, batch[:, begin:end], state)
    np.testing.assert_allclose(predictions, whole[:, begin:end], atol=1e-12)
    np.testing.assert_allclose(
      predictor.run_length_posterior(state),
      posteriors[:, end - 1, : end + 1],
      atol=1e-12,
    )
    np.testing.assert_array_equal(posteriors[:, end - 1, end + 1 :], 0)


@pytest.mark.parametrize(
  'predictor',
  [
    _Predictor(0.1),
    ptw_predictors.PTWPredictor(6),
    predictors.OptimalCategoricalPredictor(),
  ],
  ids=['run_length', 'ptw', 'kt'],
)
def test_saved_state_goes_on_as_if_never_saved(x64, tmp_path, predictor):
  batch = _random_batch(5, 2, 40)
  whole, _ = predictor.unroll({}, None, batch)
  _, state = predictor.unroll({}, None, batch[:, :30])
  np.savez(tmp_path / 'state.npz', **state._asdict())
  restored = predictor.state_class(**np.load(tmp_path / 'state.npz'))
  rest, _ = predictor.unroll({}, None, batch[:, 30:], restored)
  np.testing.assert_allclose(rest, whole[:, 30:], atol=1e-12)


def test_run_lengths_continue_from_a_state(x64):
  batch = _random_batch(6, 2, 20)
  for predictor in (_Predictor(0.1), ptw_predictors.PTWPredictor(5)):
    whole = np.asarray(predictor.unroll_run_lengths(batch))
    _, state = predictor.unroll({}, None, batch[:, :9])
    rest = predictor.unroll_run_lengths(batch[:, 9:], state)
    np.testing.assert_allclose(rest, whole[:, 9:], atol=1e-12)


def test_posteriors_with_a_fixed_capacity_and_inside_jit(x64):
  batch = _random_batch(7, 2, 20)
  fixed, growing = _Predictor(0.1, max_length=30), _Predictor(0.1)
  switches = jax.jit(fixed.switch_posterior)(batch)
  np.testing.assert_allclose(
    switches, growing.switch_posterior(batch), atol=1e-12
  )

  @jax.jit
  def run_length(batch):
    _, state = fixed.unroll({}, None, batch)
    return fixed.run_length_posterior(state)

  _, state = growing.unroll({}, None, batch)
  np.testing.assert_allclose(
    run_length(batch)[:, :21], growing.run_length_posterior(state), atol=1e-12
  )


def test_state_that_ran_past_its_capacity_inside_jit_is_refused():
  predictor = _Predictor(0.1, max_length=10)
  batch = _random_batch(8, 1, 6).astype(jnp.float32)
  unroll = jax.jit(lambda state: predictor.unroll({}, None, batch, state)[1])
  state = unroll(unroll(predictor.initial_state({}, None, 1)))
  with pytest.raises(
    ValueError, match='capacity for 10 symbols, .* time is 12'
  ):
    predictor.run_length_posterior(state)


@pytest.mark.parametrize('what', ['unroll', 'switch_posterior'])
def test_no_array_is_quadratic_in_time(what):
  batch_size, seq_length = 2, 1000
  predictor = live_and_die_predictors.LADPredictor()
  if what == 'unroll':
    function = lambda batch: predictor.unroll({}, None, batch)
  else:
    function = predictor.switch_posterior
  jaxpr = jax.make_jaxpr(function)(jnp.zeros((batch_size, seq_length, 2)))
  # Twice the starts, for both symbols.
  assert oracles.largest_array(jaxpr.jaxpr) <= batch_size * 2 * 2 * 1025


@pytest.mark.parametrize(
  ('make_state', 'message'),
  [
    (
      lambda: ptw_predictors.PTWPredictor(3).initial_state({}, None, 2),
      'a PTWState; RunLengthPredictor takes a RunLengthState',
    ),
    (lambda: _Predictor(0.1).initial_state({}, None, 3), 'for 3 sequences'),
    (
      lambda: _Predictor(0.1, alphabet_size=3).initial_state({}, None, 2),
      'counts 3 symbols',
    ),
  ],
)
def test_foreign_states_are_refused(make_state, message):
  with pytest.raises(ValueError, match=message):
    _Predictor(0.1).unroll(
      {}, None, _random_batch(8, 2, 4).astype(jnp.float32), make_state()
    )


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: _Predictor(2.0), 'hazard is 2.0 at length 1'),
    (lambda: _Predictor(0.1, concentration=-1.0), 'concentration is -1.0'),
    (lambda: _Predictor(0.1, max_length=0), 'max_length is 0'),
    (
      lambda: run_length_predictors.length_distribution_predictor((0.5, 0.1)),
      'they sum to 0.6',
    ),
    (
      lambda: run_length_predictors.regular_shift_predictor(0),
      'shift_period is 0',
    ),
    (
      lambda: run_length_predictors.random_shift_predictor('unifrom', (1, 3)),
      "shift_distribution 'unifrom' is not one of",
    ),
    (
      lambda: run_length_predictors.random_shift_predictor('uniform', (1,)),
      'shift_parameters',
    ),
  ],
)
def test_wrong_arguments_are_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()
