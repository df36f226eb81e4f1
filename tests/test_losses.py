import itertools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from nonstationary_mbml import base_config
from nonstationary_mbml import losses
from nonstationary_mbml import predictor_factories
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.tests import oracles


def _assert_trees_close(first, second, **tolerance):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, **tolerance), first, second
  )


def _predictor_and_batch(seq_length=11, batch_size=3):
  predictor = predictor_factories.PREDICTOR_FACTORIES['lstm'](
    2, {'hidden_size': 5}
  )
  symbols = np.random.default_rng(0).integers(2, size=(batch_size, seq_length))
  batch = jnp.eye(2)[symbols]
  params = jax.jit(predictor.init_params)(jax.random.key(0), batch, None)
  return predictor, params, batch


def test_loss_is_finite_where_a_symbol_that_did_not_come_is_impossible():
  logits = jnp.array([[[0.0, 0.0, -jnp.inf]]])
  targets = jnp.array([[[1.0, 0.0, 0.0]]])
  loss, gradient = jax.value_and_grad(losses.log_loss)(logits, targets)
  np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
  np.testing.assert_allclose(gradient, [[[-0.5, 0.5, 0]]], rtol=1e-6)


def test_sequences_of_one_symbol_are_refused():
  predictor, params, batch = _predictor_and_batch(1)
  with pytest.raises(ValueError, match='seq_length is 1'):
    losses.loss_and_grads(predictor, params, None, batch, None)


@pytest.mark.parametrize(
  'chunk_length',
  [
    3,
    pytest.param(5, marks=pytest.mark.slow),
    pytest.param(10, marks=pytest.mark.slow),
    50,
  ],
)
def test_chunks_change_the_gradient_but_not_the_loss(chunk_length):
  """Every target counts the same, however the chunks divide the sequence."""
  predictor, params, batch = _predictor_and_batch()
  loss_and_grads = jax.jit(
    lambda state, chunk_length: losses.loss_and_grads(
      predictor, params, None, batch, state, chunk_length
    ),
    static_argnums=1,
  )
  whole, _, whole_state = loss_and_grads(None, None)
  loss, grads, state = loss_and_grads(
    predictor.initial_state(params, None, 3), chunk_length
  )
  np.testing.assert_allclose(loss, whole, rtol=1e-5)
  _assert_trees_close(state, whole_state, atol=1e-5)

  def truncated_loss(params):
    state, total = predictor.initial_state(params, None, 3), 0.0
    for begin in range(0, 11, chunk_length):
      chunk = batch[:, begin : begin + chunk_length]
      logits, state = predictor.unroll(params, None, chunk, state)
      state = jax.lax.stop_gradient(state)
      targets = batch[:, begin + 1 : begin + 1 + chunk_length]
      log_probs = jax.nn.log_softmax(logits[:, : targets.shape[1]])
      total -= (targets * log_probs).sum()
    return total / (3 * 10)

  truncated = jax.jit(jax.grad(truncated_loss))(params)
  _assert_trees_close(grads, truncated, atol=1e-6)


@pytest.mark.parametrize('microbatch_size', [None, 2])
def test_symbols_given_as_targets_change_nothing(microbatch_size):
  """Chunks and microbatches take the targets of their own symbols."""
  predictor, params, batch = _predictor_and_batch(batch_size=6)
  state = predictor.initial_state(params, None, 6)
  loss_and_grads = jax.jit(
    lambda size, targets: losses.loss_and_grads(
      predictor, params, None, batch, state, 4, size, targets
    ),
    static_argnums=0,
  )
  symbols = losses.target_probs('parameters', None, batch, batch)
  _assert_trees_close(
    loss_and_grads(microbatch_size, symbols),
    loss_and_grads(None, None),
    atol=1e-6,
  )


def test_bfloat16_is_near_float32_and_goes_no_further_than_the_network():
  predictor, params, batch = _predictor_and_batch(batch_size=6)
  state = predictor.initial_state(params, None, 6)
  loss_and_grads = jax.jit(
    lambda dtype: losses.loss_and_grads(
      predictor, params, None, batch, state, 4, 2, None, dtype
    ),
    static_argnums=0,
  )
  exact, rounded = loss_and_grads(None), loss_and_grads('bfloat16')
  assert jax.tree.map(jnp.result_type, rounded) == jax.tree.map(
    jnp.result_type, exact
  )
  # Two digits and a half, in a sum of ten terms.
  _assert_trees_close(rounded, exact, atol=2e-2)
  assert rounded[0] != exact[0]


class _TwoCoins:
  """A source of 4 symbols that switches between two coins, enumerated.

  Attributes:
    symbols: One-hot symbols `[N, 4, 2]` of all pairs of symbols and coins.
    parameters: Probabilities `[N, 4, 2]` that they were drawn from.
    weights: Probabilities of the pairs `[N]`.
  """

  def __init__(self):
    paths = np.array(list(itertools.product((0, 1), repeat=4)))
    stays = paths[:, 1:] == paths[:, :-1]
    path_probs = 0.5 * np.where(stays, 0.7, 0.3).prod(axis=1)
    probs_of_one = np.array([0.2, 0.9])[paths]
    self._coins = np.stack([1 - probs_of_one, probs_of_one], axis=-1)
    self._path_probs = path_probs
    self.symbols = np.repeat(np.eye(2)[paths], 16, axis=0)
    self.parameters = np.tile(self._coins, (16, 1, 1))
    likelihoods = (self.symbols * self.parameters).sum(-1).prod(-1)
    self.weights = np.tile(path_probs, 16) * likelihoods

  def bayes_predictor(self, seq_length):
    assert seq_length == 4
    return self

  def unroll(self, params, rng, batch):
    # Joint probability of the symbols so far and each path, [B, paths, T].
    likelihoods = jnp.einsum('btk,ptk->bpt', batch, self._coins)
    joint = self._path_probs[:, None] * jnp.cumprod(likelihoods, axis=-1)
    posterior = joint / joint.sum(axis=1, keepdims=True)
    coins = np.roll(self._coins, -1, axis=1)
    return jnp.log(jnp.einsum('bpt,ptk->btk', posterior, coins)), None


def test_targets_have_one_expected_gradient_and_ever_less_variance(x64):
  """Exactly, of every prediction, over all sequences and parameters."""
  source = _TwoCoins()
  assert source.weights.sum() == pytest.approx(1)
  batch, parameters = jnp.array(source.symbols), jnp.array(source.parameters)
  predictor = predictor_factories.PREDICTOR_FACTORIES['rnn'](
    2, {'core': 'vanilla_rnn', 'hidden_size': 2}
  )
  params = predictor.init_params(jax.random.key(0), batch[:1], None)

  @jax.jit
  @jax.vmap
  def loss_and_gradients(sequence, probs):
    def of_one_prediction(time):
      loss, grads, _ = losses.loss_and_grads(
        predictor,
        params,
        None,
        sequence[None],
        None,
        target_probs=jnp.zeros_like(probs).at[time].set(probs[time])[None],
      )
      return loss, jax.flatten_util.ravel_pytree(grads)[0]

    return jax.vmap(of_one_prediction)(jnp.arange(3))

  means, variances, logged = [], [], []
  for target in base_config.TARGETS:
    probs = losses.target_probs(target, source, batch, parameters)
    if target == 'symbols':
      assert probs is None
      probs = losses.target_probs('parameters', source, batch, batch)
    loss, gradients = loss_and_gradients(batch, probs)
    mean = np.einsum('n,ntp->tp', source.weights, gradients)
    means.append(mean)
    variances.append(
      np.einsum('n,ntp->tp', source.weights, (gradients - mean) ** 2)
    )
    logged.append(loss)
  assert np.abs(means[0]).max() > 1e-3
  np.testing.assert_allclose(means[1:], [means[0]] * 2, rtol=0, atol=1e-12)
  assert np.all(np.diff(variances, axis=0) <= 1e-12)
  symbols, of_parameters, of_bayes = np.sum(variances, axis=-1)
  assert np.all(symbols > 1.1 * of_parameters)
  assert np.all(of_parameters > 1.1 * of_bayes)
  # What is logged is the loss of the symbols, whatever the target.
  np.testing.assert_array_equal(logged[1:], [logged[0]] * 2)


def test_bayes_targets_are_those_of_the_exact_predictor_of_the_source(x64):
  generator = constants.build_data_generator(config_lib.DataConfig())
  symbols = oracles.all_sequences(2, 4)
  batch = jnp.array(oracles.one_hot(symbols, 2))
  probs = losses.target_probs('bayes', generator, batch, None)
  expected = oracles.mixture_predictions(
    symbols, oracles.ptw_partitions(2), (0.5, 0.5)
  )
  np.testing.assert_allclose(probs[:, :-1], np.exp(expected[:, 1:]), rtol=1e-9)
  np.testing.assert_array_equal(probs[:, -1], 0)


@pytest.mark.parametrize('chunk_length', [None, 4])
def test_microbatches_change_neither_loss_nor_gradient(chunk_length):
  predictor, params, batch = _predictor_and_batch(batch_size=6)
  state = predictor.initial_state(params, None, 6)
  # Sequences start from states of their own.
  state = jax.tree.map(lambda x: x + jnp.arange(6.0)[:, None] / 10, state)
  whole, split = (
    jax.jit(
      lambda params, batch, state, size=size: losses.loss_and_grads(
        predictor, params, None, batch, state, chunk_length, size
      )
    )(params, batch, state)
    for size in (6, 2)
  )
  _assert_trees_close(split, whole, atol=1e-6)


def test_every_microbatch_has_dropout_masks_of_its_own():
  predictor = predictor_factories.PREDICTOR_FACTORIES['transformer'](
    2,
    {
      'embedding_dim': 8,
      'num_heads': 2,
      'num_layers': 1,
      'dropout_prob': 0.5,
    },
  )
  key = jax.random.key(3)
  # The same sequence twice.
  batch = jnp.tile(jnp.eye(2)[jnp.arange(8) // 3 % 2], (2, 1, 1))
  params = jax.jit(predictor.init_params)(key, batch, None)
  loss = jax.jit(
    lambda rng, batch, size: losses.loss_and_grads(
      predictor, params, rng, batch, None, None, size
    )[0],
    static_argnums=2,
  )
  single = [
    float(loss(jax.random.fold_in(key, index), batch[:1], 1))
    for index in (0, 1)
  ]
  assert single[0] != pytest.approx(single[1], rel=1e-4)
  assert float(loss(key, batch, 1)) == pytest.approx(np.mean(single), rel=1e-5)


def test_microbatches_that_do_not_divide_the_batch_are_refused():
  predictor, params, batch = _predictor_and_batch(batch_size=6)
  with pytest.raises(ValueError, match='4 does not divide a batch of 6'):
    losses.loss_and_grads(predictor, params, None, batch, None, None, 4)


def test_microbatches_of_a_transformer_are_what_the_cache_holds():
  config = base_config.TrainConfig()
  lstm, transformer = (
    predictor_factories.PREDICTOR_FACTORIES[name](2, {})
    for name in ('lstm', 'transformer')
  )
  assert losses.microbatch_size(config, lstm, 128, 256) == 128
  assert losses.microbatch_size(config, transformer, 128, 256) == 8
  assert losses.microbatch_size(config, transformer, 12, 256) == 6
  assert losses.microbatch_size(config, transformer, 7, 10_000) == 1
  # Only the activations of a chunk are there at a time.
  config.gradient_chunk_length = 64
  assert losses.microbatch_size(config, transformer, 128, 4096) == 32
  config.microbatch_size = 4
  assert losses.microbatch_size(config, lstm, 128, 256) == 4


def test_bayes_targets_need_an_exact_predictor():
  source = 'recurring'
  config = config_lib.DataConfig(
    trajectory_generator=source,
    trajectory_generator_kwargs=constants.source_kwargs(source),
  )
  generator = constants.build_data_generator(config)
  with pytest.raises(ValueError, match="'bayes', but .* choose 'symbols' or"):
    losses.check_target('bayes', generator, 8)
  losses.check_target('parameters', generator, 8)


def test_memory_of_the_gradient_does_not_grow_with_the_number_of_chunks():
  def temporary_bytes(seq_length):
    predictor, params, batch = _predictor_and_batch(seq_length, 16)
    step = jax.jit(
      lambda params, batch: losses.loss_and_grads(
        predictor,
        params,
        None,
        batch,
        predictor.initial_state(params, None, 16),
        32,
      )[1]
    )
    compiled = step.lower(params, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes - batch.nbytes

  # The shifted targets, as large as the batch, are not the gradient's.
  assert temporary_bytes(32 * 32) < 1.5 * temporary_bytes(4 * 32)
