import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nonstationary_mbml import base_config
from nonstationary_mbml import losses
from nonstationary_mbml import predictor_factories


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
