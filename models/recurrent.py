"""The project's own LSTM, GRU and vanilla RNN, quick to train.

Recursion, parameters and initialisation are those of the Haiku cores they
extend; `unroll` is new. Autodiff of a scan adds a weight gradient to the last
one at every time. Here only the gradient of the state stays inside the loop,
and weight gradients are one matrix product over all times after it.

Axes: B batch, T time, F features of an input, H hidden units, G gates times H.
"""

from collections.abc import Callable
import functools
import math
from typing import Any
from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

# The hidden units first: `(h,)`, or `(h, c)` of an LSTM; arrays `[B, H]`.
_State = tuple[jax.Array, ...]


class _Weights(NamedTuple):
  """Weights of z_t = x_t W_x + b and of the recurrent products."""

  inputs: jax.Array  # [F, G]
  recurrent: jax.Array  # [H, G]
  bias: jax.Array  # [G]


class _Cell(NamedTuple):
  """One step of a recursion, and its derivative.

  Attributes:
    forward: (z_t, W_h, state before) -> (state, what `backward` needs).
    backward: (W_h, h after, what was kept, gradient of the state) -> (gradient
      of the state before, gradient of z_t in one or more blocks `[B, .]`).
    operands: (h before, what was kept) -> for every block, by what its columns
      of W_h were multiplied. All times at once.
  """

  forward: Callable[[jax.Array, jax.Array, _State], tuple[_State, Any]]
  backward: Callable[[jax.Array, jax.Array, Any, _State], tuple[_State, _State]]
  operands: Callable[[jax.Array, Any], _State] = lambda hidden, _: (hidden,)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _unroll(
  cell: _Cell, weights: _Weights, inputs: jax.Array, state: _State
) -> tuple[jax.Array, _State]:
  """h_t for all t, `[T, B, H]`, and the final state, from `[T, B, F]`.

  With z_t = x_t W_x + b, and d for the gradient of the loss with respect to:

    forward in t    (h_t, c_t) = cell(z_t, h_{t-1} W_h, c_{t-1})
    backward in t   dz_t from (dh_t, dc_t),  dh_{t-1} = dz_t W_h'
    after the loop  dW_h = sum_t h_{t-1}' dz_t,  dW_x = sum_t x_t' dz_t,
                    db = sum_t dz_t,  dx_t = dz_t W_x'
  """
  return _forward(cell, weights, inputs, state)[0]


def _forward(
  cell: _Cell, weights: _Weights, inputs: jax.Array, state: _State
) -> tuple[tuple[jax.Array, _State], Any]:
  def step(state: _State, x: jax.Array) -> tuple[_State, Any]:
    z = x @ weights.inputs + weights.bias
    state, kept = cell.forward(z, weights.recurrent, state)
    return state, (state[0], kept)

  last, (hidden, kept) = jax.lax.scan(step, state, inputs)
  return (hidden, last), (weights, inputs, state[0], hidden, kept)


def _backward(
  cell: _Cell, residuals: Any, gradients: tuple[jax.Array, _State]
) -> tuple[_Weights, jax.Array, _State]:
  weights, inputs, first_hidden, hidden, kept = residuals

  def step(d_state: _State, at_t: Any) -> tuple[_State, _State]:
    d_output, hidden, kept = at_t
    d_state = (d_state[0] + d_output, *d_state[1:])
    return cell.backward(weights.recurrent, hidden, kept, d_state)

  d_hidden, d_last = gradients
  d_state, d_blocks = jax.lax.scan(
    step, d_last, (d_hidden, hidden, kept), reverse=True
  )
  before = jnp.concatenate([first_hidden[None], hidden[:-1]])
  d_recurrent = [
    _rows(operand).T @ _rows(block)
    for operand, block in zip(
      cell.operands(before, kept), d_blocks, strict=True
    )
  ]
  # A one beside the inputs: the gradient of the bias in the same product.
  with_one = jnp.pad(_rows(inputs), ((0, 0), (0, 1)), constant_values=1)
  d_inputs = jnp.concatenate(
    [with_one.T @ _rows(block) for block in d_blocks], axis=1
  )
  d_z = jnp.concatenate(d_blocks, axis=-1)
  d_weights = _Weights(
    d_inputs[:-1], jnp.concatenate(d_recurrent, axis=1), d_inputs[-1]
  )
  return d_weights, d_z @ weights.inputs.T, d_state


_unroll.defvjp(_forward, _backward)


def _run(
  cell: _Cell, weights: _Weights, inputs: jax.Array, state: _State
) -> tuple[jax.Array, _State]:
  """As `_unroll`, in the dtype of the state."""
  weights = jax.tree.map(lambda w: w.astype(state[0].dtype), weights)
  return _unroll(cell, weights, inputs, state)


def _rows(array: jax.Array) -> jax.Array:
  """`[T, B, .]` as `[T B, .]`."""
  return array.reshape(-1, array.shape[-1])


def _lstm_forward(
  z: jax.Array, w_h: jax.Array, state: _State
) -> tuple[_State, Any]:
  hidden, cell = state
  # sigmoid(z) = (1 + tanh(z / 2)) / 2, so that one tanh over [B, 4H] gives all
  # gates i, g, f, o. Haiku adds 1 to the forget gate.
  size = hidden.shape[-1]
  scale = np.repeat([0.5, 1, 0.5, 0.5], size).astype(z.dtype)
  shift = np.repeat([0, 0, 0.5, 0], size).astype(z.dtype)
  gates = jnp.tanh((z + hidden @ w_h) * scale + shift) * scale + (1 - scale)
  # Else XLA computes the tanh again for all that reads it.
  gates = jax.lax.optimization_barrier(gates)
  i, g, f, o = gates = jnp.split(gates, 4, axis=-1)
  new_cell = f * cell + i * g
  return (o * jnp.tanh(new_cell), new_cell), (*gates, cell)


def _lstm_backward(
  w_h: jax.Array, _: jax.Array, kept: Any, d_state: _State
) -> tuple[_State, _State]:
  i, g, f, o, cell = kept
  d_hidden, d_cell = d_state
  tanh_cell = jnp.tanh(f * cell + i * g)
  d_cell = d_cell + d_hidden * o * (1 - tanh_cell**2)
  d_z = jnp.concatenate(
    [
      d_cell * g * i * (1 - i),
      d_cell * i * (1 - g**2),
      d_cell * cell * f * (1 - f),
      d_hidden * tanh_cell * o * (1 - o),
    ],
    axis=-1,
  )
  return (d_z @ w_h.T, d_cell * f), (d_z,)


def _gru_forward(
  z: jax.Array, w_h: jax.Array, state: _State
) -> tuple[_State, Any]:
  (hidden,) = state
  size = hidden.shape[-1]
  gates = jax.nn.sigmoid(z[:, : 2 * size] + hidden @ w_h[:, : 2 * size])
  update, reset = jnp.split(jax.lax.optimization_barrier(gates), 2, axis=-1)
  read = reset * hidden
  new = jnp.tanh(z[:, 2 * size :] + read @ w_h[:, 2 * size :])
  new = jax.lax.optimization_barrier(new)
  kept = (update, reset, new, hidden)
  return ((1 - update) * hidden + update * new,), kept


def _gru_backward(
  w_h: jax.Array, _: jax.Array, kept: Any, d_state: _State
) -> tuple[_State, _State]:
  update, reset, new, hidden = kept
  (d_hidden,) = d_state
  size = hidden.shape[-1]
  d_new = d_hidden * update * (1 - new**2)
  d_read = d_new @ w_h[:, 2 * size :].T
  d_gates = jnp.concatenate(
    [
      d_hidden * (new - hidden) * update * (1 - update),
      d_read * hidden * reset * (1 - reset),
    ],
    axis=-1,
  )
  d_before = d_hidden * (1 - update) + d_read * reset
  d_before = d_before + d_gates @ w_h[:, : 2 * size].T
  return (d_before,), (d_gates, d_new)


def _gru_operands(hidden: jax.Array, kept: Any) -> _State:
  return hidden, kept[1] * hidden


def _vanilla_forward(
  z: jax.Array, w_h: jax.Array, state: _State
) -> tuple[_State, Any]:
  hidden = jax.nn.relu(z + state[0] @ w_h)
  return (hidden,), ()


def _vanilla_backward(
  w_h: jax.Array, after: jax.Array, kept: Any, d_state: _State
) -> tuple[_State, _State]:
  d_z = jnp.where(after > 0, d_state[0], 0)
  return (d_z @ w_h.T,), (d_z,)


_LSTM = _Cell(_lstm_forward, _lstm_backward)
_GRU = _Cell(_gru_forward, _gru_backward, _gru_operands)
_VANILLA = _Cell(_vanilla_forward, _vanilla_backward)


def unroll(
  core: hk.RNNCore,
  inputs: jax.Array,
  state: Any,
  gradient_checkpointing: bool = False,
) -> tuple[jax.Array, Any]:
  """Unrolls a core: by its own method `unroll` if it has one, else by Haiku.

  A subclass with a step of its own is unrolled by Haiku, unless it has an
  `unroll` to go with it.

  Args:
    core: Any core.
    inputs: `[T, B, F]`.
    state: Before them.
    gradient_checkpointing: Whether the backward pass keeps a state every
      sqrt(T) inputs only, and computes what lies between again.

  Returns:
    Outputs `[T, B, H]` and the state after them.
  """
  whole = functools.partial(hk.dynamic_unroll, core)
  for base in type(core).__mro__:
    if 'unroll' in vars(base):
      whole = core.unroll
    if 'unroll' in vars(base) or '__call__' in vars(base):
      break
  if not gradient_checkpointing or hk.running_init():
    return whole(inputs, state)
  return unroll_segments(whole, inputs, state)


def segment_length(num_inputs: int) -> int:
  """Returns the inputs of a segment of `unroll_segments`."""
  return math.isqrt(num_inputs)


def unroll_segments(
  run: Callable[[jax.Array, Any], tuple[jax.Array, Any]],
  inputs: jax.Array,
  state: Any,
) -> tuple[jax.Array, Any]:
  """Runs segment after segment of about sqrt(T) inputs.

  The backward pass keeps the states between them, and computes a segment again
  for its gradient.

  Args:
    run: Inputs `[t, B, F]` and a state to outputs `[t, B, H]` and a state.
    inputs: `[T, B, F]`.
    state: Before them.

  Returns:
    As `run` of the whole.
  """

  @hk.remat
  def segment(state: Any, inputs: jax.Array) -> tuple[Any, jax.Array]:
    outputs, state = run(inputs, state)
    return state, outputs

  length = segment_length(len(inputs))
  rest = len(inputs) % length
  segments = inputs[rest:].reshape(-1, length, *inputs.shape[1:])
  if rest:
    state, first = segment(state, inputs[:rest])
  state, outputs = hk.scan(segment, state, segments)
  outputs = outputs.reshape(-1, *outputs.shape[2:])
  return jnp.concatenate([first, outputs]) if rest else outputs, state


class LSTM(hk.LSTM):
  """`hk.LSTM` with a quick unroll."""

  def unroll(
    self, inputs: jax.Array, state: hk.LSTMState
  ) -> tuple[jax.Array, hk.LSTMState]:
    """As `hk.dynamic_unroll`, `[T, B, F] -> [T, B, H]`, and the last state."""
    if hk.running_init():
      return hk.dynamic_unroll(self, inputs, state)
    linear = _params(self)['linear']
    weights = _Weights(
      linear['w'][: inputs.shape[-1]],
      linear['w'][inputs.shape[-1] :],
      linear['b'],
    )
    hidden, state = _run(_LSTM, weights, inputs, tuple(state))
    return hidden, hk.LSTMState(*state)


class GRU(hk.GRU):
  """`hk.GRU` with a quick unroll."""

  def unroll(
    self, inputs: jax.Array, state: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """As `hk.dynamic_unroll`, `[T, B, F] -> [T, B, H]`, and the last state."""
    if hk.running_init():
      return hk.dynamic_unroll(self, inputs, state)
    own = _params(self)['']
    weights = _Weights(own['w_i'], own['w_h'], own['b'])
    hidden, (state,) = _run(_GRU, weights, inputs, (state,))
    return hidden, state


class VanillaRNN(hk.VanillaRNN):
  """`hk.VanillaRNN` with a quick unroll."""

  def unroll(
    self, inputs: jax.Array, state: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """As `hk.dynamic_unroll`, `[T, B, F] -> [T, B, H]`, and the last state."""
    if hk.running_init():
      return hk.dynamic_unroll(self, inputs, state)
    params = _params(self)
    x, h = params['linear'], params['linear_1']
    weights = _Weights(x['w'], h['w'], x['b'] + h.get('b', 0))
    hidden, (state,) = _run(_VANILLA, weights, inputs, (state,))
    return hidden, state


def _params(module: hk.Module) -> dict[str, dict[str, jax.Array]]:
  """A module's parameters, by the names of submodule and parameter."""
  params = {}
  for path, value in module.params_dict().items():
    submodule, name = path.removeprefix(module.module_name).rsplit('/', 1)
    params.setdefault(submodule.removeprefix('/'), {})[name] = value
  return params
