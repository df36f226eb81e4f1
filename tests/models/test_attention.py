"""Blocked attention against plain attention, value and gradient."""

import functools
import types

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nonstationary_mbml.models import attention
from nonstationary_mbml.models import positional_encodings
from nonstationary_mbml.models import transformer

_HEADS, _SIZE = 2, 3
_ENCODINGS = ('NONE', 'ALIBI', 'RELATIVE')


def _inputs(encoding, seq_length, batch_size=3, dtype=jnp.float32):
  """Query, key, value, the encoding, and weights of what is read."""
  rng = np.random.default_rng(0)

  def normal(*shape):
    return rng.standard_normal(shape).astype(dtype)

  shape = (batch_size, seq_length, _HEADS, _SIZE)
  query, key, value, weights = (normal(*shape) for _ in range(4))
  learned = {
    'NONE': positional_encodings.Content,
    'ALIBI': positional_encodings.Alibi,
    'RELATIVE': lambda: positional_encodings.Relative(
      normal(_HEADS, _SIZE),
      normal(_HEADS, _SIZE),
      normal(_HEADS, _SIZE, seq_length + 1),
    ),
  }[encoding]()
  return (query, key, value, learned), weights


def _plain_logits(query, key, encoding):
  """Logits of all pairs `[B, H, T, T]`, from the formulas."""
  seq_length = query.shape[1]
  time = np.arange(seq_length)
  past = np.maximum(time[:, None] - time, 0)
  root = np.sqrt(_SIZE).astype(query.dtype)
  if isinstance(encoding, positional_encodings.Relative):
    content = query + encoding.content_bias
    positions = query + encoding.position_bias
    by_distance = encoding.position_key[..., ::-1][..., past]  # [H, D, T, T]
    logits = jnp.einsum('bthd,bshd->bhts', content, key)
    logits += jnp.einsum('bthd,hdts->bhts', positions, by_distance)
    return logits / root
  logits = jnp.einsum('bthd,bshd->bhts', query, key) / root
  if isinstance(encoding, positional_encodings.Alibi):
    slopes = positional_encodings.alibi_slopes(_HEADS).astype(query.dtype)
    logits -= slopes[:, None, None] * past
  return logits


def _plain(query, key, value, encoding, window=None):
  """Attention with all logits and a mask."""
  time = np.arange(query.shape[1])
  distances = time[:, None] - time
  visible = (distances >= 0) & (distances < (window or len(time)))
  logits = jnp.where(visible, _plain_logits(query, key, encoding), -jnp.inf)
  return jnp.einsum('bhts,bshd->bthd', jax.nn.softmax(logits, axis=-1), value)


def _with_grads(attend, weights):
  def weighted(args):
    read = attend(*args)
    return jnp.sum(weights * read), read

  return jax.jit(jax.value_and_grad(weighted, has_aux=True))


def _assert_same(attend, args, weights, window=None, tolerance=1e-5):
  plain = functools.partial(_plain, window=window)
  (_, read), grads = _with_grads(attend, weights)(args)
  (_, plain_read), plain_grads = _with_grads(plain, weights)(args)
  jax.tree.map(
    functools.partial(
      np.testing.assert_allclose, rtol=tolerance, atol=tolerance
    ),
    (read, grads),
    (plain_read, plain_grads),
  )


# Blocks of 4 with a shorter last one or not, groups of 2 of 3 sequences.
@pytest.mark.parametrize(
  ('encoding', 'seq_length', 'window'),
  [
    *((encoding, 6, 3) for encoding in _ENCODINGS),
    *(
      pytest.param(encoding, 8, None, marks=pytest.mark.slow)
      for encoding in _ENCODINGS
    ),
    ('RELATIVE', 5, 1),
    ('RELATIVE', 1, None),
    # Every block, with its keys, a sequence of its own.
    *((encoding, 18, 5) for encoding in _ENCODINGS),
    ('NONE', 16, 4),
    ('RELATIVE', 11, 1),
  ],
)
def test_blocked_attention_is_plain_attention(encoding, seq_length, window):
  args, weights = _inputs(encoding, seq_length)
  attend = functools.partial(
    attention.blocked_attention, window=window, block_size=4, group_size=2
  )
  _assert_same(attend, args, weights, window)


@pytest.mark.parametrize(
  ('encoding', 'window'), [('NONE', None), ('ALIBI', 4), ('RELATIVE', None)]
)
def test_fused_attention_is_plain_attention(encoding, window):
  args, weights = _inputs(encoding, 7)
  attend = functools.partial(attention.fused_attention, window=window)
  _assert_same(attend, args, weights, window)


@pytest.mark.parametrize(
  ('capability', 'dtype', 'implementation'),
  [
    ('9.0', jnp.bfloat16, 'cudnn'),
    ('9.0', jnp.float32, 'xla'),
    ('7.0', jnp.bfloat16, 'xla'),
    ('gfx90a', jnp.bfloat16, 'xla'),
  ],
)
def test_gpus_take_fused_attention(
  monkeypatch, capability, dtype, implementation
):
  seen = {}

  def spy(query, key, value, **kwargs):
    seen.update(kwargs)
    return value

  device = types.SimpleNamespace(compute_capability=capability)
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  monkeypatch.setattr(jax, 'local_devices', lambda: [device])
  monkeypatch.setattr(jax.nn, 'dot_product_attention', spy)
  array = np.zeros((1, 4, 2, 8), dtype)
  attention.causal_attention(
    array, array, array, positional_encodings.Content(), window=3
  )
  assert seen == {
    'bias': None,
    'is_causal': True,
    'local_window_size': (2, 0),
    'implementation': implementation,
  }


def test_fused_attention_lowers_for_a_gpu():
  args, weights = _inputs('ALIBI', 7)
  step = _with_grads(attention.fused_attention, weights)
  assert step.trace(args).lower(lowering_platforms=('cuda',)).as_text()


def test_blocked_attention_is_exact_in_float64(x64):
  args, weights = _inputs('RELATIVE', 4, dtype=jnp.float64)
  attend = functools.partial(
    attention.blocked_attention, window=3, block_size=2, group_size=2
  )
  _assert_same(attend, args, weights, 3, tolerance=1e-12)


def test_vmap_over_an_ensemble_is_a_loop_over_it():
  args, weights = _inputs('RELATIVE', 4)
  attend = functools.partial(
    attention.blocked_attention, block_size=2, group_size=2
  )
  stacked = jax.tree.map(lambda array: np.stack([array, 2 * array]), args)
  step = _with_grads(attend, weights)
  (_, reads), grads = jax.tree.map(np.asarray, jax.jit(jax.vmap(step))(stacked))
  for member, factor in enumerate((1, 2)):
    (_, read), own = step(jax.tree.map(lambda a, f=factor: f * a, args))
    jax.tree.map(
      lambda ours, one, i=member: np.testing.assert_allclose(
        ours[i], one, rtol=1e-5, atol=1e-5
      ),
      (reads, grads),
      (read, own),
    )


@pytest.mark.parametrize(
  ('seq_length', 'window'), [(1, None), (10, None), (10, 1), (11, 5), (300, 7)]
)
def test_blocks_hold_every_visible_pair_and_few_others(seq_length, window):
  block_size = 4
  blocks = attention.make_blocks(seq_length, window, block_size)
  queries = [query for block in blocks for query in block.queries]
  assert queries == list(range(seq_length))
  seen = window or seq_length
  for block in blocks:
    first, last = block.queries[0], block.queries[-1]
    assert block.keys == range(max(0, first - seen + 1), last + 1)


def test_default_blocks_skip_most_of_the_masked_half():
  for seq_length in (256, 4096):
    blocks = attention.make_blocks(seq_length)
    pairs = sum(len(block.queries) * len(block.keys) for block in blocks)
    assert pairs < 0.63 * seq_length**2
    assert len(blocks) <= 16


def _loss_and_grads(**kwargs):
  model = transformer.make_transformer_encoder(
    2, embedding_dim=8, num_heads=2, num_layers=1, dropout_prob=0.3, **kwargs
  )
  transformed = hk.transform(model)
  inputs = np.random.default_rng(1).standard_normal((2, 5, 2), np.float32)
  params = jax.jit(transformed.init)(jax.random.key(0), inputs)

  def loss(params):
    outputs = transformed.apply(params, jax.random.key(2), inputs)
    return jnp.sum(outputs**2)

  return jax.jit(jax.value_and_grad(loss))(params)


def test_gradient_checkpointing_changes_no_value():
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
    _loss_and_grads(gradient_checkpointing=True),
    _loss_and_grads(),
  )


@pytest.mark.slow
def test_gradient_checkpointing_keeps_less_than_half_of_a_layer():
  def temporary_bytes(num_layers, gradient_checkpointing):
    model = hk.transform(
      transformer.make_transformer_encoder(
        2,
        embedding_dim=16,
        num_heads=2,
        num_layers=num_layers,
        gradient_checkpointing=gradient_checkpointing,
      )
    )
    inputs = jnp.zeros((8, 64, 2))
    params = jax.eval_shape(model.init, jax.random.key(0), inputs)
    loss = lambda params, rng: model.apply(params, rng, inputs).sum()
    compiled = (
      jax.jit(jax.grad(loss)).lower(params, jax.random.key(0)).compile()
    )
    return compiled.memory_analysis().temp_size_in_bytes

  of_a_layer = {
    checkpointing: temporary_bytes(4, checkpointing)
    - temporary_bytes(2, checkpointing)
    for checkpointing in (False, True)
  }
  assert of_a_layer[True] < of_a_layer[False] / 2


def test_gradient_checkpointing_is_checked():
  with pytest.raises(ValueError, match='gradient_checkpointing is 1'):
    transformer.TransformerConfig(gradient_checkpointing=1)


def test_dropout_masks_keep_as_configured_and_are_independent():
  """Each frequency is within 5 standard deviations: 1e-6 false alarms."""
  hidden = jnp.zeros((40, 50, 50))
  masks = [
    np.asarray(mask)
    for rng in (0, 1)
    for mask in transformer._keep_masks(jax.random.key(rng), 0.3, hidden)
  ]
  for i, one in enumerate(masks):
    assert abs(one.mean() - 0.7) < 5 * np.sqrt(0.21 / one.size)
    for other in masks[:i]:
      both = np.mean(one & other)
      assert abs(both - 0.49) < 5 * np.sqrt(0.25 / one.size)


def test_dropout_keeps_the_mean():
  """Within 5 standard deviations: 1e-6 false alarms."""
  hidden = jnp.ones((40, 50, 50))
  keep, _ = transformer._keep_masks(jax.random.key(0), 0.3, hidden)
  mean = float(transformer._dropout(keep, 0.3, hidden).mean())
  assert abs(mean - 1) < 5 * np.sqrt(0.3 / 0.7 / hidden.size)
