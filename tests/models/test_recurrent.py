"""Quick recurrences equal the plain ones, in value and in gradient.

Axes: B batch, T time, F features of an input, H hidden units.
"""

import functools

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nonstationary_mbml import losses
from nonstationary_mbml import predictor_factories
from nonstationary_mbml.models import recurrent
from nonstationary_mbml.models import stack_rnn

B, T, F, H = 3, 11, 4, 5
CORES = {
  'lstm': (recurrent.LSTM, hk.LSTM),
  'gru': (recurrent.GRU, hk.GRU),
  'vanilla_rnn': (recurrent.VanillaRNN, hk.VanillaRNN),
}


class PlainStackRNN(stack_rnn.StackRNNCore):
  """The update cell by cell, with autodiff's gradient, to compare with."""

  def __call__(self, inputs, state):
    n_stacks, _, cell_size = self._shape
    stacks, inner = state
    tops = stacks[:, :, 0].reshape(len(inputs), -1)
    outputs, inner = self._inner(
      jnp.concatenate([inputs, tops], axis=-1), inner
    )
    pushed = hk.Linear(n_stacks * cell_size, name='push')(outputs)
    pushed = pushed.reshape(-1, n_stacks, 1, cell_size)
    actions = hk.Linear(3 * n_stacks, name='actions')(outputs)
    actions = jax.nn.softmax(actions.reshape(-1, n_stacks, 3))
    push, pop, noop = jnp.split(actions[..., None], 3, axis=-2)
    above = jnp.concatenate([pushed, stacks[:, :, :-1]], axis=2)
    below = jnp.concatenate([stacks[:, :, 1:], jnp.zeros_like(pushed)], axis=2)
    stacks = push * above + pop * below + noop * stacks
    return outputs, stack_rnn.StackState(stacks, inner)


def _normal(seed, shape):
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


def _noise(tree, seed):
  return jax.tree.map(
    lambda leaf: np.asarray(leaf) + np.float32(0.5) * _normal(seed, leaf.shape),
    tree,
  )


def _problem(core):
  """Parameters, inputs and a state for a builder of cores."""
  inputs = _normal(1, (T, B, F))
  transformed = hk.transform(
    lambda inputs: recurrent.unroll(core(), inputs, core().initial_state(B))
  )
  params = jax.jit(transformed.init)(jax.random.key(0), inputs)
  _, state = jax.eval_shape(transformed.apply, params, None, inputs)
  zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), state)
  return _noise(params, 2), inputs, _noise(zeros, 3)


def _value_and_grads(core, unroll, *problem):
  """Outputs, final state and gradients of a function of all of them."""
  transformed = hk.transform(
    lambda inputs, state: unroll(core(), inputs, state)
  )

  def loss(params, inputs, state):
    results = transformed.apply(params, None, inputs, state)
    waves = (
      jnp.sum(jnp.sin(leaf + jnp.arange(leaf.size).reshape(leaf.shape)))
      for leaf in jax.tree.leaves(results)
    )
    return sum(waves), results

  return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*problem)


def _assert_equal(actual, expected, **tolerance):
  tolerance = tolerance or {'rtol': 1e-5, 'atol': 1e-5}
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, **tolerance),
    actual,
    expected,
  )


@pytest.mark.parametrize('name', CORES)
def test_unroll_is_haikus_in_value_and_gradient(name):
  ours, haikus = (functools.partial(core, H) for core in CORES[name])
  problem = _problem(ours)
  _assert_equal(
    _value_and_grads(ours, recurrent.unroll, *problem),
    _value_and_grads(haikus, hk.dynamic_unroll, *problem),
  )


@pytest.mark.parametrize('name', CORES)
def test_initial_parameters_are_haikus(name):
  inputs = np.zeros((T, B, F), np.float32)

  def init(core, unroll):
    transformed = hk.transform(
      lambda: unroll(core(H), inputs, core(H).initial_state(B))
    )
    return jax.jit(transformed.init)(jax.random.key(0))

  ours, haikus = CORES[name]
  _assert_equal(
    init(ours, recurrent.unroll), init(haikus, hk.dynamic_unroll), rtol=0
  )


@pytest.mark.parametrize(
  ('stack_size', 'n_stacks', 'inner_core'),
  [
    (1, 1, recurrent.VanillaRNN),
    pytest.param(2, 2, recurrent.VanillaRNN, marks=pytest.mark.slow),
    (4, 2, hk.LSTM),
    (T + 2, 1, recurrent.VanillaRNN),
    # In blocks of three cells, with one or none left over.
    (28, 1, recurrent.VanillaRNN),
    pytest.param(27, 2, recurrent.LSTM, marks=pytest.mark.slow),
  ],
)
def test_stack_rnn_is_the_plain_one(stack_size, n_stacks, inner_core):
  ours, plain = (
    functools.partial(
      core,
      3,
      stack_size,
      n_stacks,
      inner_core,
      hidden_size=H,
      name='stack_rnn_core',
    )
    for core in (stack_rnn.StackRNNCore, PlainStackRNN)
  )
  problem = _problem(ours)
  _assert_equal(
    _value_and_grads(ours, recurrent.unroll, *problem),
    _value_and_grads(plain, hk.dynamic_unroll, *problem),
  )


@pytest.mark.parametrize(
  ('core', 'seq_length'),
  [
    (functools.partial(recurrent.LSTM, H), 9),
    (functools.partial(hk.GRU, H), 1),
    (functools.partial(stack_rnn.StackRNNCore, 3, 4, hidden_size=H), 11),
  ],
)
def test_gradient_checkpointing_changes_no_value(core, seq_length):
  params, inputs, state = _problem(core)
  problem = params, inputs[:seq_length], state
  _assert_equal(
    _value_and_grads(
      core,
      functools.partial(recurrent.unroll, gradient_checkpointing=True),
      *problem,
    ),
    _value_and_grads(core, recurrent.unroll, *problem),
  )


def _temp_bytes(kwargs, seq_length=256):
  predictor = predictor_factories.PREDICTOR_FACTORIES['rnn'](2, kwargs)
  batch = np.zeros((4, seq_length, 2), np.float32)
  params = jax.eval_shape(
    lambda: predictor.init_params(jax.random.key(0), batch, None)
  )
  compiled = jax.jit(
    lambda params: losses.loss_and_grads(predictor, params, None, batch, None)
  ).lower(params)
  return compiled.compile().memory_analysis().temp_size_in_bytes


def test_backward_pass_of_a_stack_rnn_does_not_keep_all_stacks():
  stack = {'stack_size': 64, 'stack_cell_size': 8, 'hidden_size': 4}
  all_stacks = 4 * 256 * 64 * 8 * 4
  assert _temp_bytes({'core': 'stack_rnn', **stack}) < all_stacks / 2


def test_gradient_checkpointing_needs_less_memory():
  lstm = {'core': 'lstm', 'hidden_size': 16}
  plain = _temp_bytes(lstm)
  assert _temp_bytes({**lstm, 'gradient_checkpointing': True}) < plain / 2


@pytest.mark.parametrize('name', ['lstm', 'gru', 'vanilla_rnn', 'stack_rnn'])
@pytest.mark.parametrize('params_dtype', [jnp.float32, jnp.float64])
def test_loss_follows_the_batch_and_gradients_their_parameters(
  x64, name, params_dtype
):
  predictor = predictor_factories.PREDICTOR_FACTORIES['rnn'](
    2, {'core': name, 'hidden_size': 4}
  )
  batch = np.zeros((2, 5, 2), np.float64)
  loss, grads, _ = jax.eval_shape(
    lambda: losses.loss_and_grads(
      predictor,
      predictor.init_params(
        jax.random.key(0), batch.astype(params_dtype), None
      ),
      None,
      batch,
      None,
    )
  )
  assert loss.dtype == jnp.float64
  assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {
    jnp.dtype(params_dtype)
  }


@pytest.mark.parametrize('name', ['lstm', 'stack_rnn'])
def test_an_ensemble_is_its_members(name):
  predictor = predictor_factories.PREDICTOR_FACTORIES['rnn'](
    2, {'core': name, 'hidden_size': 4}
  )
  batch = np.eye(2, dtype=np.float32)[np.arange(2 * T).reshape(2, T) % 3 % 2]

  @jax.jit
  def members(keys):
    return jax.vmap(lambda key: predictor.init_params(key, batch, None))(keys)

  params = members(jax.random.split(jax.random.key(0), 3))

  def grads(params):
    return losses.loss_and_grads(predictor, params, None, batch, None)[:2]

  together = jax.jit(jax.vmap(grads))(params)
  alone = jax.jit(lambda params: jax.lax.map(grads, params))(params)
  _assert_equal(together, alone)


def test_subclass_with_a_step_of_its_own_is_unrolled_by_it():
  class Silent(recurrent.LSTM):
    def __call__(self, inputs, state):
      outputs, state = super().__call__(inputs, state)
      return 0 * outputs, state

  transformed = hk.transform(
    lambda x: recurrent.unroll(Silent(3), x, Silent(3).initial_state(2))[0]
  )
  inputs = np.ones((4, 2, 2), np.float32)
  params = jax.jit(transformed.init)(jax.random.key(0), inputs)
  assert not np.any(jax.jit(transformed.apply)(params, None, inputs))
