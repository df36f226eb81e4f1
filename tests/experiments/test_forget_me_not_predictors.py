import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nonstationary_mbml import predictors
from nonstationary_mbml.experiments import distributions
from nonstationary_mbml.experiments import forget_me_not_predictors
from nonstationary_mbml.experiments import live_and_die_predictors
from nonstationary_mbml.experiments import ptw_predictors
from nonstationary_mbml.experiments import trajectory_generators
from nonstationary_mbml.tests import oracles

# Decisions within so many nats are ties, as the module says.
TIE = 1e-4


def _make(depth, memory_size=8, concentration=0.5, alphabet_size=None):
  return forget_me_not_predictors.ForgetMeNotPredictor(
    depth, memory_size, concentration, alphabet_size
  )


def _unroll(predictor, batch, state=None):
  return predictor.unroll({}, None, jnp.asarray(batch), state)


def _stream(predictor, batch):
  """One symbol after the other."""
  batch = jnp.asarray(batch)
  state = predictor.empty_state(batch.shape[0], batch.shape[-1])
  return predictors.ScanPredictor.unroll(predictor, {}, None, batch, state)


def _regime_batch(seed, batch_size, seq_length, alphabet_size=2):
  """Sequences that return to two skewed regimes, a new one every 5 symbols."""
  rng = np.random.default_rng(seed)
  regimes = rng.dirichlet([0.3] * alphabet_size, size=(batch_size, 2))
  which = rng.integers(2, size=(batch_size, -(-seq_length // 5)))
  which = np.repeat(which, 5, axis=1)[:, :seq_length]
  probabilities = regimes[np.arange(batch_size)[:, None], which]
  uniforms = rng.random((batch_size, seq_length, 1))
  symbols = (uniforms > probabilities.cumsum(axis=-1)[..., :-1]).sum(axis=-1)
  return oracles.one_hot(symbols, alphabet_size)


class Oracle:
  """The definition, by recursion over blocks, for one sequence after another.

  A memory is a tuple of models, a model a tuple of counts.
  """

  def __init__(self, depth, memory_size, prior):
    self.depth = depth
    self.memory_size = memory_size
    self.prior = prior
    self.num_evicted = 0
    self.block = functools.cache(self._block)

  def _base_models(self, symbols, memory):
    """Probabilities of a segment under the fresh model and those in memory."""
    fresh = (0,) * len(self.prior)
    return [
      oracles.kt_probability(
        symbols, tuple(a + n for a, n in zip(self.prior, counts, strict=True))
      )
      for counts in (fresh, *memory)
    ]

  def _block(self, length, symbols, memory):
    """Probability of the (first) symbols of a block, and the memory after it.

    The memory after a block is None unless its symbols are all there.
    """
    if not symbols:
      return 1.0, None
    base_models = self._base_models(symbols, memory)
    segment = sum(base_models) / len(base_models)
    is_segment = True
    probability = segment
    after_halves = None
    if length > 1:
      half = length // 2
      left, after_left = self.block(half, symbols[:half], memory)
      right, after_halves = self.block(half, symbols[half:], after_left)
      is_segment = math.log(left * right / segment) <= TIE
      probability = segment / 2 + left * right / 2
    if len(symbols) < length:
      return probability, None
    if is_segment:
      return probability, self._learn(symbols, memory, base_models)
    return probability, after_halves

  def _learn(self, symbols, memory, base_models):
    largest = max(base_models)
    best = [math.log(largest / p) <= TIE for p in base_models].index(True)
    counts = [symbols.count(symbol) for symbol in range(len(self.prior))]
    memory = list(memory)
    if best > 0:
      known = memory[best - 1]
      memory[best - 1] = tuple(
        n + m for n, m in zip(counts, known, strict=True)
      )
    elif len(memory) < self.memory_size:
      memory.append(tuple(counts))
    elif memory:
      sizes = [sum(known) for known in memory]
      memory[sizes.index(min(sizes))] = tuple(counts)
      self.num_evicted += 1
    return tuple(memory)

  def probability(self, symbols):
    return self.block(2**self.depth, symbols, ())[0]

  def predictions(self, sequences):
    """Log predictions after every symbol but the last, `[B, T - 1, K]`."""
    return np.array(
      [
        [
          [
            math.log(self.probability((*past, symbol)) / self.probability(past))
            for symbol in range(len(self.prior))
          ]
          for past in (tuple(row[:time]) for time in range(1, len(row)))
        ]
        for row in np.asarray(sequences).tolist()
      ]
    )


@pytest.mark.parametrize('prior', [(0.5, 0.5), (0.37, 0.81)])
@pytest.mark.parametrize('memory_size', [1, 2, 8])
@pytest.mark.parametrize('form', [_unroll, _stream])
def test_equals_the_definition_for_all_binary_sequences(
  x64, form, memory_size, prior
):
  sequences = oracles.all_sequences(2, 8)
  truth = Oracle(3, memory_size, prior).predictions(sequences)
  predictions, _ = form(
    _make(3, memory_size, prior), oracles.one_hot(sequences, 2)
  )
  np.testing.assert_allclose(predictions[:, :-1], truth, atol=1e-11)


@pytest.mark.parametrize('prior', [(0.5, 0.5, 0.5), (0.37, 0.81, 1.3)])
@pytest.mark.parametrize('memory_size', [1, 2, 4])
def test_equals_the_definition_for_all_ternary_sequences(
  x64, memory_size, prior
):
  sequences = oracles.all_sequences(3, 5)
  truth = Oracle(4, memory_size, prior).predictions(sequences)
  predictions, _ = _unroll(
    _make(4, memory_size, prior), oracles.one_hot(sequences, 3)
  )
  np.testing.assert_allclose(predictions[:, :-1], truth, atol=1e-11)


@pytest.mark.parametrize('memory_size', [2, 3, 8])
def test_equals_the_definition_on_longer_sequences(x64, memory_size):
  batch = _regime_batch(0, 16, 32, 3)
  oracle = Oracle(5, memory_size, (0.37, 0.81, 0.2))
  truth = oracle.predictions(batch.argmax(axis=-1))
  predictions, _ = _unroll(_make(5, memory_size, oracle.prior), batch)
  np.testing.assert_allclose(predictions[:, :-1], truth, atol=1e-11)
  # With 2 places models are replaced, with 8 none is.
  assert (oracle.num_evicted > 0) == (memory_size < 8)


def test_without_memory_it_is_ptw(x64):
  batch = _regime_batch(1, 4, 30, 3)
  truth, _ = _unroll(ptw_predictors.PTWPredictor(5, 0.4), batch)
  predictions, _ = _unroll(_make(5, 0, 0.4), batch)
  np.testing.assert_allclose(predictions, truth, atol=1e-11)


def test_worked_example_of_the_module():
  predictor = _make(2, 2)
  state = predictor.initial_state({}, None, 1)
  memories = []
  for symbol in (0, 0, 1, 1):
    batch = oracles.one_hot([[symbol]], 2, np.float32)
    _, state = _unroll(predictor, batch, state)
    memories.append(np.asarray(state.counts)[0, -1, 1:].tolist())
  assert memories == [
    [[1, 0], [0, 0]],
    [[2, 0], [0, 0]],
    [[2, 0], [0, 1]],
    [[2, 0], [0, 2]],
  ]


def test_a_regime_that_returns_is_remembered():
  symbols = np.repeat([0, 1, 2, 0], 16)[None]
  batch = oracles.one_hot(symbols, 3, np.float32)
  predictions, state = _unroll(_make(6), batch)
  forgetful, _ = _unroll(ptw_predictors.PTWPredictor(6), batch)
  # What three models know of 16, 16 and 32 symbols, each its own: one memory.
  memory = np.asarray(state.counts)[0, -1, 1:]
  assert sorted(memory[memory.any(axis=-1)].tolist()) == [
    [0, 0, 16],
    [0, 16, 0],
    [32, 0, 0],
  ]
  # One symbol tells which regime it is: measured e^0.31 times the probability.
  gain = np.asarray(predictions) - np.asarray(forgetful)
  assert gain[0, 48, 0] > 0.25


def test_prediction_before_any_symbol_is_prior_mean(x64):
  predictor = _make(3, concentration=(1.0, 2.0, 5.0))
  state = predictor.initial_state({}, None, 2)
  np.testing.assert_allclose(
    np.exp(predictor.output_from_state(state)),
    np.tile([0.125, 0.25, 0.625], (2, 1)),
  )


@pytest.mark.parametrize('depth', [0, 5])
def test_predictions_are_normalised_up_to_the_horizon(x64, depth):
  batch = _regime_batch(2, 8, 2**depth, 3)
  predictions, _ = _unroll(_make(depth, 3), batch)
  np.testing.assert_allclose(np.exp(predictions).sum(axis=-1), 1, rtol=1e-12)


@pytest.mark.parametrize('chunk_length', [1, 13])
def test_chunks_equal_the_whole(x64, chunk_length):
  batch = jnp.asarray(_regime_batch(3, 4, 50))
  predictor = _make(6, 2)
  state = predictor.initial_state({}, None, 4)
  whole, whole_state = _unroll(predictor, batch)
  chunks, state = predictors.unroll_in_chunks(
    predictor, {}, None, batch, state, chunk_length
  )
  np.testing.assert_allclose(chunks, whole, atol=1e-12)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12),
    state,
    whole_state,
  )


def test_predictions_of_a_prefix_are_those_of_the_whole(x64):
  batch = _regime_batch(4, 4, 50)
  whole, _ = _unroll(_make(6, 2), batch)
  for length in (1, 16, 33):
    prefix, _ = _unroll(_make(6, 2), batch[:, :length])
    np.testing.assert_allclose(prefix, whole[:, :length], atol=1e-12)


def test_predictions_do_not_depend_on_the_rest_of_the_batch(x64):
  batch = _regime_batch(5, 5, 32)
  whole, _ = _unroll(_make(5, 2), batch)
  alone, _ = _unroll(_make(5, 2), batch[3:4])
  np.testing.assert_allclose(alone, whole[3:4], atol=1e-12)


def test_float32_decides_as_float64():
  # Ternary symbols by pure chance make many ties: without a tolerance, one
  # sequence in three has predictions that are wrong by up to 0.4 nats.
  symbols = np.random.default_rng(0).integers(3, size=(256, 256))

  def unroll(dtype):
    batch = oracles.one_hot(symbols, 3, dtype)
    predictions, _ = _unroll(_make(8, 4), batch)
    assert predictions.dtype == dtype
    return predictions

  with jax.enable_x64(True):
    truth = unroll(np.float64)
  np.testing.assert_allclose(unroll(np.float32), truth, atol=1e-5)


def test_code_length_is_bounded_for_every_partition(x64):
  # A mixture is no less than any of its terms: a partition's prior, and the
  # fresh model's share of each of its segments.
  memory_size, depth = 4, 4
  batch = _regime_batch(7, 8, 16)
  predictor = _make(depth, memory_size)
  predictions, _ = _unroll(predictor, batch)
  first = predictor.output_from_state(predictor.initial_state({}, None, 8))
  log_probs = np.concatenate(
    [np.asarray(first)[:, None], np.asarray(predictions)[:, :-1]], axis=1
  )
  code_lengths = -np.sum(log_probs * batch, axis=(1, 2))
  for row, code_length in zip(
    batch.argmax(axis=-1).tolist(), code_lengths, strict=True
  ):
    for level in range(depth + 1):
      length = 2 ** (depth - level)
      # Of the blocks above the last level, each is a choice of two.
      bound = (2 ** min(level + 1, depth) - 1) * math.log(2)
      for start in range(0, 16, length):
        kt = oracles.kt_probability(
          tuple(row[start : start + length]), (0.5, 0.5)
        )
        bound += math.log(1 + min(memory_size, start)) - math.log(kt)
      assert code_length <= bound


def _regrets(source, alphabet_size, names, **kwargs):
  """Cumulative regret `[B]` of each predictor on the same 512 sequences."""
  generator = trajectory_generators.TRAJECTORY_GENERATORS[source](
    distributions.Categorical(alphabet_size),
    distributions.Dirichlet(alphabet_size),
    (0.5,) * alphabet_size,
    **kwargs,
  )
  batch, parameters = jax.jit(generator.sample, static_argnums=(1, 2))(
    jax.random.key(0), 512, 256
  )
  chosen = {
    'forget_me_not': _make(8),
    'ptw': ptw_predictors.PTWPredictor(8),
    'lad': live_and_die_predictors.LADPredictor(),
  }
  regrets = {}
  for name in names:
    predictions, _ = _unroll(chosen[name], batch)
    truth = np.asarray(parameters, float)[:, 1:]
    logs = np.log(np.maximum(truth, np.finfo(np.float32).tiny))
    predictions = np.asarray(predictions)[:, :-1]
    regrets[name] = (truth * (logs - predictions)).sum(axis=(1, 2))
  return regrets


def _standard_errors(differences):
  """Mean of paired differences in standard errors."""
  return differences.mean() / (
    differences.std(ddof=1) / math.sqrt(len(differences))
  )


def test_beats_ptw_where_regimes_return():
  regrets = _regrets(
    'recurring',
    2,
    ['forget_me_not', 'ptw'],
    pool_size=3,
    switch_probability=1 / 25,
  )
  gain = regrets['ptw'] - regrets['forget_me_not']
  assert _standard_errors(gain) > 5


@pytest.mark.slow
def test_beats_ptw_and_lad_where_regimes_return_and_take_long_to_learn():
  # With two symbols LAD is better: a regime is learnt within a few nats, and
  # these switches cost more than that on a binary tree, even with a memory that
  # knows the regimes from the start.
  regrets = _regrets(
    'recurring',
    26,
    ['forget_me_not', 'ptw', 'lad'],
    pool_size=3,
    switch_probability=1 / 25,
  )
  for name in ('ptw', 'lad'):
    gain = regrets[name] - regrets['forget_me_not']
    assert _standard_errors(gain) > 5


def test_loses_little_to_ptw_where_no_regime_returns():
  regrets = _regrets('ptw', 2, ['forget_me_not', 'ptw'])
  loss = regrets['forget_me_not'] - regrets['ptw']
  # Measured 0.3 nats, of 7.7.
  assert loss.mean() < 0.5


@pytest.mark.parametrize('continued', [False, True])
def test_sequence_beyond_the_horizon_is_an_error(continued):
  batch = _regime_batch(8, 1, 9).astype(np.float32)
  with pytest.raises(ValueError, match=r'depth 3 holds 8 symbols.*depth=4'):
    if continued:
      _, state = _unroll(_make(3), batch[:, :5])
      _unroll(_make(3), batch[:, 5:], state)
    else:
      _unroll(_make(3), batch)


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    ({'depth': -1}, 'depth is -1'),
    ({'depth': 31}, 'depth is 31'),
    ({'depth': 3, 'memory_size': -1}, 'memory_size is -1'),
    ({'depth': 3, 'memory_size': 2.5}, 'memory_size is 2.5'),
    ({'depth': 3, 'concentration': 0.0}, 'concentration is 0.0'),
    (
      {'depth': 3, 'concentration': (1.0, 1.0, 1.0), 'alphabet_size': 2},
      'concentration has 3 entries for 2',
    ),
  ],
)
def test_wrong_arguments_are_named(kwargs, message):
  with pytest.raises(ValueError, match=message):
    _make(**kwargs)


@pytest.mark.parametrize(
  ('state_of', 'batch_size', 'message'),
  [
    (_make(4, 2), 2, 'depth 4, not 3'),
    (_make(3, 5), 2, 'memory of 5 models, but memory_size is 2'),
    (_make(3, 2), 1, 'for 1 sequences'),
    (_make(3, 2, alphabet_size=3), 2, 'counts 3 symbols'),
    (ptw_predictors.PTWPredictor(3), 2, 'PTWState; ForgetMeNotPredictor takes'),
  ],
)
def test_foreign_states_are_refused(state_of, batch_size, message):
  state = state_of.initial_state({}, None, batch_size)
  batch = _regime_batch(9, 2, 4).astype(np.float32)
  with pytest.raises(ValueError, match=message):
    _unroll(_make(3, 2), batch, state)


def test_float32_does_not_drift_over_long_constant_data():
  """What a symbol adds to L_j is far below the rounding of a probability."""
  batch = np.tile(np.eye(2, dtype=np.float32)[:1], (1, 2**15, 1))
  predictor = forget_me_not_predictors.ForgetMeNotPredictor(16, memory_size=1)
  predictions, state = predictor.unroll({}, None, batch)
  with jax.enable_x64(True):
    exact, exact_state = predictor.unroll({}, None, batch.astype(np.float64))
  np.testing.assert_allclose(predictions, exact, atol=2e-6)
  np.testing.assert_allclose(state.log_odds, exact_state.log_odds, rtol=1e-6)
