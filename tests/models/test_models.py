import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nonstationary_mbml import predictor_factories
from nonstationary_mbml.models import basic
from nonstationary_mbml.models import positional_encodings
from nonstationary_mbml.models import stack_rnn
from nonstationary_mbml.models import transformer


def _normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


def _apply(model, inputs):
  transformed = hk.transform(model)
  params = jax.jit(transformed.init)(jax.random.key(0), inputs)
  apply = jax.jit(transformed.apply)
  return params, lambda x: np.asarray(apply(params, None, x))


def _after_change_at(inputs, time):
  """The same inputs but for one time."""
  return inputs + (np.arange(inputs.shape[1]) == time)[:, None]


def test_mlp_maps_the_last_axis():
  inputs = _normal(1, 4, 5, 3)
  params, apply = _apply(basic.make_mlp(2, (7, 6)), inputs)
  assert apply(inputs).shape == (4, 5, 2)
  assert [layer['w'].shape for layer in params.values()] == [
    (3, 7),
    (7, 6),
    (6, 2),
  ]
  np.testing.assert_allclose(
    apply(inputs)[1, 2], apply(inputs[1, 2]), atol=1e-6
  )


def test_cnn_sees_the_last_kernel_size_to_the_layers_symbols():
  inputs = _normal(1, 1, 20, 3)
  _, apply = _apply(basic.make_cnn(2, (8, 8), kernel_size=3), inputs)
  changed = apply(_after_change_at(inputs, 5))
  differs = np.any(np.abs(changed - apply(inputs)) > 1e-6, axis=(0, 2))
  np.testing.assert_array_equal(np.flatnonzero(differs), np.arange(5, 14))


@pytest.mark.parametrize('begin_symbol', [False, True])
@pytest.mark.parametrize('encoding', ['NONE', 'SIN_COS', 'ALIBI', 'RELATIVE'])
def test_transformer_is_causal(encoding, begin_symbol):
  inputs = _normal(1, 1, 9, 3)
  model = transformer.make_transformer_encoder(
    2,
    embedding_dim=8,
    num_heads=2,
    num_layers=2,
    positional_encodings=encoding,
    begin_symbol=begin_symbol,
  )
  _, apply = _apply(model, inputs)
  changed = apply(_after_change_at(inputs, 4))
  differs = np.any(np.abs(changed - apply(inputs)) > 1e-5, axis=(0, 2))
  np.testing.assert_array_equal(np.flatnonzero(differs), np.arange(4, 9))


@pytest.mark.parametrize('encoding', ['SIN_COS', 'ALIBI', 'RELATIVE'])
def test_transformer_with_positions_tells_the_order_of_the_past(encoding):
  inputs = _normal(1, 1, 4, 3)
  swapped = inputs[:, [1, 0, 2, 3]]

  def difference(encoding):
    model = transformer.make_transformer_encoder(
      2,
      embedding_dim=8,
      num_heads=2,
      num_layers=1,
      emb_init_scale=1.0,
      positional_encodings=encoding,
    )
    _, apply = _apply(model, inputs)
    return np.abs(apply(inputs) - apply(swapped))[0, -1].max()

  assert difference('NONE') < 1e-6
  assert difference(encoding) > 1e-4


@pytest.mark.parametrize('encoding', ['NONE', 'ALIBI', 'RELATIVE'])
def test_equal_symbols_are_counted_from_a_begin_symbol_only(encoding):
  """A mean of equal values does not tell their number."""
  inputs = np.ones((1, 9, 3), np.float32)

  def spread(**kwargs):
    model = transformer.make_transformer_encoder(
      2,
      embedding_dim=8,
      num_heads=2,
      num_layers=2,
      positional_encodings=encoding,
      **kwargs,
    )
    _, apply = _apply(model, inputs)
    return np.ptp(apply(inputs), axis=1).max()

  assert spread() < 1e-5
  assert spread(begin_symbol=True) > 1e-3
  assert spread(begin_symbol=True, attention_window=20) > 1e-3


def test_begin_symbol_takes_no_part_of_what_is_predicted():
  """The last of T positions is where it is without one."""
  inputs = _normal(1, 1, 9, 3)
  model = transformer.make_transformer_encoder(
    2, embedding_dim=8, num_heads=2, num_layers=0, begin_symbol=True
  )
  plain = transformer.make_transformer_encoder(
    2, embedding_dim=8, num_heads=2, num_layers=0
  )
  params, apply = _apply(model, inputs)
  np.testing.assert_allclose(
    apply(inputs), hk.transform(plain).apply(params, None, inputs), atol=1e-6
  )


def test_transformer_sizes_follow_its_config():
  inputs = np.zeros((1, 4, 3), np.float32)
  model = transformer.make_transformer_encoder(
    2,
    embedding_dim=8,
    num_heads=2,
    num_layers=1,
    num_hiddens_per_head=5,
    widening_factor=3,
  )
  params, _ = _apply(model, inputs)
  shapes = {
    name.split('/', 1)[1]: layer['w'].shape
    for name, layer in params.items()
    if 'w' in layer and '/' in name
  }
  assert shapes == {
    '~_embed/embedding': (3, 8),
    'attention_0/query': (8, 10),
    'attention_0/key': (8, 10),
    'attention_0/value': (8, 10),
    'attention_0/output': (10, 8),
    'mlp_0/~/linear_0': (8, 24),
    'mlp_0/~/linear_1': (24, 8),
  }


def test_sinusoids_are_the_formula():
  waves = positional_encodings.sinusoids(np.arange(4), 6, max_timescale=100.0)
  for position in range(4):
    for pair in range(3):
      angle = position / 100 ** (2 * pair / 6)
      np.testing.assert_allclose(
        waves[position, 2 * pair : 2 * pair + 2],
        [np.sin(angle), np.cos(angle)],
      )


def test_sinusoids_of_a_prefix_are_those_of_the_whole():
  np.testing.assert_array_equal(
    positional_encodings.sinusoids(np.arange(3), 5),
    positional_encodings.sinusoids(np.arange(9), 5)[:3],
  )


@pytest.mark.parametrize(
  ('num_heads', 'slopes'),
  [
    (1, [2.0**-8]),
    (8, [2.0**-h for h in range(1, 9)]),
    (3, [2.0**-4, 2.0**-8, 2.0**-2]),
  ],
)
def test_alibi_slopes_are_the_papers(num_heads, slopes):
  np.testing.assert_allclose(
    positional_encodings.alibi_slopes(num_heads), slopes
  )


def test_alibi_bias_grows_with_the_distance():
  query = jnp.zeros((2, 1, 3, 1))
  bias = positional_encodings.Alibi().bias(query, range(1, 4), range(4))
  for head, slope in enumerate((2.0**-4, 2.0**-8)):
    for query in range(4):
      of_itself = bias[head, 0, 0, query]
      for key in range(query + 1):
        distance = query - key
        assert bias[head, 0, 0, key] - of_itself == -slope * distance


def test_relative_logits_are_the_formula():
  seq_length, num_heads, size = 5, 2, 3
  query, key = _normal(2, 2, 1, seq_length, num_heads, size)
  transformed = hk.transform(
    lambda: positional_encodings.RelativePositions()(
      seq_length, num_heads, size, jnp.float32
    )
  )
  params = jax.jit(transformed.init)(jax.random.key(0))

  @jax.jit
  def make_logits(params):
    encoding = transformed.apply(params, None)
    by_head = jnp.moveaxis(jnp.asarray(query), 2, 0)
    times = range(seq_length)
    logits = jnp.einsum('hbtd,bshd->hbts', encoding.content_query(by_head), key)
    return logits + np.sqrt(size) * encoding.bias(by_head, times, times)

  logits = np.asarray(make_logits(params))
  own = params['relative_positions']
  u, v = np.asarray(own['content_bias']), np.asarray(own['position_bias'])
  w = np.asarray(params['relative_positions/position_key']['w'])
  waves = positional_encodings.sinusoids(np.arange(5), num_heads * size)
  keys = (waves @ w).reshape(seq_length, num_heads, size)
  for head in range(num_heads):
    for i in range(seq_length):
      for j in range(i + 1):
        q = query[0, i, head]
        expected = (q + u[head]) @ key[0, j, head]
        expected += (q + v[head]) @ keys[i - j, head]
        np.testing.assert_allclose(logits[head, 0, i, j], expected, atol=1e-5)


def _layer_norm(x, layer):
  centred = x - x.mean(axis=-1, keepdims=True)
  scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
  return scaled * np.asarray(layer['scale']) + np.asarray(layer['offset'])


def test_transformer_is_the_papers_post_norm_block():
  """One layer, position by position and head by head, in NumPy."""
  seq_length, num_heads, size = 5, 2, 3
  inputs = _normal(4, 1, seq_length, 4)
  model = transformer.make_transformer_encoder(
    2, embedding_dim=6, num_heads=2, num_layers=1, emb_init_scale=0.5
  )
  params, apply = _apply(model, inputs)
  params = {
    name.removeprefix('transformer_encoder/'): jax.tree.map(np.asarray, layer)
    for name, layer in params.items()
  }
  hidden = inputs[0] @ params['~_embed/embedding']['w']
  hidden = hidden * np.sqrt(6)
  hidden = hidden + positional_encodings.sinusoids(np.arange(seq_length), 6)
  query, key, value = (
    (hidden @ params[f'attention_0/{name}']['w']).reshape(-1, num_heads, size)
    for name in ('query', 'key', 'value')
  )
  read = np.zeros((seq_length, num_heads, size))
  for t in range(seq_length):
    for head in range(num_heads):
      logits = key[: t + 1, head] @ query[t, head] / np.sqrt(size)
      weights = np.exp(logits) / np.exp(logits).sum()
      read[t, head] = weights @ value[: t + 1, head]
  read = read.reshape(seq_length, -1) @ params['attention_0/output']['w']
  hidden = _layer_norm(hidden + read, params['attention_norm_0'])
  mlp = hidden
  for layer in ('mlp_0/~/linear_0', 'mlp_0/~/linear_1'):
    mlp = mlp @ params[layer]['w'] + params[layer]['b']
    mlp = np.maximum(mlp, 0) if layer.endswith('0') else mlp
  hidden = _layer_norm(hidden + mlp, params['mlp_norm_0'])
  expected = hidden @ params['logits']['w'] + params['logits']['b']
  np.testing.assert_allclose(apply(inputs)[0], expected, atol=1e-4)


def test_rnn_has_a_relu_and_mlps_around_its_core():
  predictor = predictor_factories.PREDICTOR_FACTORIES['rnn'](
    2,
    {
      'core': 'gru',
      'hidden_size': 5,
      'before_mlp_layers': (4,),
      'after_mlp_layers': (3,),
    },
  )
  inputs = _normal(5, 2, 6, 2)
  params = jax.jit(predictor.init_params)(jax.random.key(0), inputs, None)
  logits, _ = jax.jit(predictor.unroll)(params, None, inputs)
  states = np.asarray(jax.jit(predictor.unroll_states)(params, None, inputs))
  hidden = np.maximum(states, 0)  # Outputs of a GRU are its states.
  for layer in (0, 1):
    weights = params[f'recurrent_network/~/after_mlp/~/linear_{layer}']
    hidden = hidden @ np.asarray(weights['w']) + np.asarray(weights['b'])
    hidden = np.maximum(hidden, 0) if layer == 0 else hidden
  np.testing.assert_allclose(logits, hidden, atol=1e-5)
  assert params['recurrent_network/~/before_mlp/~/linear_0']['w'].shape == (
    2,
    4,
  )


def _stack_step(params, inputs, state):
  """One step of a Stack-RNN with a vanilla RNN, stack by stack, in NumPy."""
  stacks, hidden = np.asarray(state.stacks), np.asarray(state.inner)
  n_stacks, size, _ = stacks.shape

  def linear(name, x):
    layer = params[f'stack_rnn_core/{name}']
    return x @ np.asarray(layer['w']) + np.asarray(layer['b'])

  tops = stacks[:, 0].reshape(-1)
  inputs = np.concatenate([inputs, tops])
  hidden = np.maximum(
    linear('~/vanilla_rnn/linear', inputs)
    + linear('~/vanilla_rnn/linear_1', hidden),
    0,
  )
  pushed = linear('push', hidden).reshape(n_stacks, -1)
  actions = linear('actions', hidden).reshape(n_stacks, 3)
  new = np.zeros_like(stacks)
  for stack in range(n_stacks):
    exps = np.exp(actions[stack])
    push, pop, noop = exps / exps.sum()
    for cell in range(size):
      above = pushed[stack] if cell == 0 else stacks[stack, cell - 1]
      below = 0 if cell == size - 1 else stacks[stack, cell + 1]
      new[stack, cell] = push * above + pop * below + noop * stacks[stack, cell]
  return hidden, new


def test_stack_rnn_has_zeros_when_empty_and_pushes_what_is_linear():
  transformed = hk.transform(
    lambda x, state: stack_rnn.StackRNNCore(
      3, stack_size=4, n_stacks=2, hidden_size=5
    )(x, state)
  )
  inputs = _normal(3, 6, 2)
  state = stack_rnn.StackState(
    np.zeros((2, 4, 3), np.float32), np.zeros(5, np.float32)
  )
  params = jax.jit(transformed.init)(jax.random.key(0), inputs[0], state)
  # Larger weights than initial ones, so that the stacks fill.
  params = jax.tree.map(lambda w: np.float32(1.5) * np.asarray(w), params)
  apply = jax.jit(transformed.apply)
  for symbol in inputs:
    hidden, stacks = _stack_step(params, symbol, state)
    outputs, state = apply(params, None, symbol, state)
    np.testing.assert_allclose(outputs, hidden, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state.stacks, stacks, rtol=1e-4, atol=1e-5)


def test_each_stack_has_a_softmax_of_its_own():
  """Constant pushes of ones: all weight of each stack adds to one."""
  transformed = hk.transform(
    lambda x, state: stack_rnn.StackRNNCore(
      1, stack_size=2, n_stacks=3, hidden_size=4
    )(x, state)
  )
  ones = stack_rnn.StackState(
    np.ones((3, 2, 1), np.float32), np.zeros(4, np.float32)
  )
  inputs = np.ones(2, np.float32)
  params = dict(jax.jit(transformed.init)(jax.random.key(0), inputs, ones))
  push = params['stack_rnn_core/push']
  params['stack_rnn_core/push'] = {
    'w': np.zeros_like(push['w']),
    'b': np.ones_like(push['b']),
  }
  _, state = jax.jit(transformed.apply)(params, None, inputs, ones)
  np.testing.assert_allclose(np.asarray(state.stacks)[:, 0], 1, rtol=1e-6)


@pytest.mark.parametrize('name', ['lstm', 'stack_rnn', 'rnn'])
def test_recurrent_networks_compute_in_the_dtype_of_the_batch(x64, name):
  predictor = predictor_factories.PREDICTOR_FACTORIES[name](
    2, {'hidden_size': 4}
  )
  for dtype in (jnp.float32, jnp.float64):
    batch = np.zeros((1, 4, 2), dtype)
    params = jax.jit(predictor.init_params)(jax.random.key(0), batch, None)
    predictions, _ = jax.jit(predictor.unroll)(params, None, batch)
    assert predictions.dtype == dtype


def test_models_compute_in_the_dtype_of_the_batch(x64):
  inputs = np.zeros((1, 4, 3), np.float32)
  model = transformer.make_transformer_encoder(
    2, embedding_dim=8, num_heads=2, positional_encodings='RELATIVE'
  )
  _, apply = _apply(model, inputs)
  assert apply(inputs).dtype == jnp.float32
