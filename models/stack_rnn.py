"""Recurrent cores with differentiable stacks.

Joulin & Mikolov, Inferring Algorithmic Patterns with Stack-Augmented Recurrent
Nets, NeurIPS 2015, section 3.2: the network reads the top of its stacks with
every symbol and answers with a soft choice of pushing, popping or leaving each
of them.
"""

from collections.abc import Callable
import functools
from typing import Any
from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp

from nonstationary_mbml import base_config
from nonstationary_mbml.models import recurrent


class StackState(NamedTuple):
  """State of a StackRNNCore.

  Attributes:
    stacks: `[B, n_stacks, stack_size, stack_cell_size]`, the top at index 0.
    inner: State of the inner core.
  """

  stacks: jax.Array
  inner: Any


class _Carry(NamedTuple):
  """A StackState as the loop over time wants it.

  Attributes:
    tops: `[B, n_stacks, stack_cell_size]`. The network reads nothing else:
      apart, their gradient is not one of whole stacks.
    stacks: Stacks with tops, `[B, n_stacks, stack_size * stack_cell_size]`.
    inner: State of the inner core.
  """

  tops: jax.Array
  stacks: jax.Array
  inner: Any


class StackRNNCore(hk.RNNCore):
  """A recurrent core around any other, with one or more stacks.

  With h_t the inner core's output and (a_push, a_pop, a_noop) = softmax(A h_t)
  for every stack:

    s_t[0] = a_push D h_t      + a_pop s_{t-1}[1]     + a_noop s_{t-1}[0]
    s_t[i] = a_push s_{t-1}[i-1] + a_pop s_{t-1}[i+1] + a_noop s_{t-1}[i]

  A pop from an empty stack gives zeros; a push on a full one drops its bottom.
  Joulin and Mikolov's own code has -1 in an empty stack and a sigmoid on what
  is pushed; ours has 0 and none, as the release of 2023 that
  docs/coming_from_the_release.md compares with.
  """

  def __init__(
    self,
    stack_cell_size: int,
    stack_size: int = 30,
    n_stacks: int = 1,
    inner_core: Callable[..., hk.RNNCore] = hk.VanillaRNN,
    name: str | None = None,
    **inner_core_kwargs: Any,
  ):
    """Initializes the core.

    Args:
      stack_cell_size: Numbers in one cell of a stack.
      stack_size: Cells of a stack.
      n_stacks: Number of stacks.
      inner_core: Haiku class of the core that drives the stacks.
      name: Name of the module.
      **inner_core_kwargs: Keyword arguments of the inner core, e.g.
        `hidden_size`.

    Raises:
      ValueError: If a size is not a positive integer.
    """
    super().__init__(name)
    self._shape = (
      base_config.check_int('n_stacks', n_stacks, 1),
      base_config.check_int('stack_size', stack_size, 1),
      base_config.check_int('stack_cell_size', stack_cell_size, 1),
    )
    self._inner = inner_core(**inner_core_kwargs)

  def initial_state(self, batch_size: int | None) -> StackState:
    """Returns empty stacks; without a batch axis if `batch_size` is None."""
    batch_shape = () if batch_size is None else (batch_size,)
    return StackState(
      stacks=jnp.zeros(batch_shape + self._shape),
      inner=self._inner.initial_state(batch_size),
    )

  def __call__(
    self, inputs: jax.Array, state: StackState
  ) -> tuple[jax.Array, StackState]:
    """Returns the inner core's output and the next state.

    Args:
      inputs: `[B, F]`, or `[F]` with a state without a batch axis.
      state: The state before them.
    """
    outputs, carry = self._step(self._layers(), inputs, self._carry(state))
    return outputs, self._state(carry)

  def unroll(
    self, inputs: jax.Array, state: StackState
  ) -> tuple[jax.Array, StackState]:
    """Unrolls over `[T, B, F]`; returns outputs `[T, B, H]` and the last state.

    The backward pass keeps the stacks every sqrt(T) inputs only.
    """
    if hk.running_init():
      return hk.dynamic_unroll(self, inputs, state)
    step = functools.partial(self._step, self._layers())
    outputs, carry = recurrent.unroll_segments(
      functools.partial(hk.dynamic_unroll, step), inputs, self._carry(state)
    )
    return outputs, self._state(carry)

  @hk.name_like('__call__')
  def _layers(self) -> tuple[hk.Linear, hk.Linear]:
    """From outputs to what is pushed, and to logits of the actions."""
    n_stacks, _, cell_size = self._shape
    return (
      hk.Linear(n_stacks * cell_size, name='push'),
      hk.Linear(3 * n_stacks, name='actions'),
    )

  def _carry(self, state: StackState) -> _Carry:
    flat = state.stacks.reshape(*state.stacks.shape[:-2], -1)
    return _Carry(flat[..., : self._shape[-1]], flat, state.inner)

  def _state(self, carry: _Carry) -> StackState:
    batch_shape = carry.stacks.shape[:-2]
    return StackState(
      carry.stacks.reshape(*batch_shape, *self._shape), carry.inner
    )

  def _step(
    self,
    layers: tuple[hk.Linear, hk.Linear],
    inputs: jax.Array,
    carry: _Carry,
  ) -> tuple[jax.Array, _Carry]:
    push, act = layers
    tops, stacks, inner = carry
    read = tops.reshape(*inputs.shape[:-1], -1)
    outputs, inner = self._inner(
      jnp.concatenate([inputs, read], axis=-1), inner
    )
    pushed = push(outputs).reshape(tops.shape)
    # A softmax of its own for each stack.
    actions = jax.nn.softmax(act(outputs).reshape(*tops.shape[:-1], 3))
    tops, stacks = _update(stacks, pushed, actions)
    return outputs, _Carry(tops, stacks, inner)


def _shift(
  stacks: jax.Array, pushed: jax.Array, actions: jax.Array
) -> jax.Array:
  """The stacks after the actions; arguments as in `_update`."""
  push, pop, noop = jnp.split(actions, 3, axis=-1)
  size = pushed.shape[-1]
  if stacks.shape[-1] == size:  # A single cell.
    return push * pushed + noop * stacks
  # The ends apart, so that XLA reads slices and makes no shifted copies.
  top = push * pushed + pop * stacks[..., size : 2 * size]
  inside = push * stacks[..., : -2 * size] + pop * stacks[..., 2 * size :]
  bottom = push * stacks[..., -2 * size : -size]
  return jnp.concatenate(
    [
      top + noop * stacks[..., :size],
      inside + noop * stacks[..., size:-size],
      bottom + noop * stacks[..., -size:],
    ],
    axis=-1,
  )


@jax.custom_vjp
def _update(
  stacks: jax.Array, pushed: jax.Array, actions: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the tops and the stacks after actions (push, pop, noop).

  It is linear in the stacks, and its transpose exchanges push and pop: a cell
  that went down sends its gradient up. With d for gradients,

    ds_{t-1} = update(ds_t, pushed 0, actions (a_pop, a_push, a_noop))
    da_push  = <ds_t[0], D h_t> + sum_i <ds_t[i], s_{t-1}[i-1]>
    da_pop   = sum_i <ds_t[i], s_{t-1}[i+1]>
    da_noop  = sum_i <ds_t[i], s_{t-1}[i]>

  Args:
    stacks: s_{t-1}, `[..., stack_size C]`, C numbers in a cell.
    pushed: D h_t, `[..., C]`.
    actions: a, `[..., 3]`.
  """
  stacks = _shift(stacks, pushed, actions)
  return stacks[..., : pushed.shape[-1]], stacks


def _update_forward(*args: jax.Array) -> tuple[Any, Any]:
  return _update(*args), args


def _update_backward(args: Any, gradients: Any) -> tuple[jax.Array, ...]:
  stacks, pushed, actions = args
  d_tops, d_stacks = gradients
  push, pop, noop = jnp.split(actions, 3, axis=-1)
  size = pushed.shape[-1]
  d_stacks = d_stacks.at[..., :size].add(d_tops)
  d_tops = d_stacks[..., :size]

  def product(a: jax.Array, b: jax.Array) -> jax.Array:
    # Not the sum of a * b, which XLA does ten times slower.
    return jnp.einsum('...k,...k->...', a, b)[..., None]

  d_actions = [
    product(d_tops, pushed)
    + product(d_stacks[..., size:], stacks[..., :-size]),
    product(d_stacks[..., :-size], stacks[..., size:]),
    product(d_stacks, stacks),
  ]
  exchanged = jnp.concatenate([pop, push, noop], axis=-1)
  return (
    _shift(d_stacks, jnp.zeros_like(pushed), exchanged),
    push * d_tops,
    jnp.concatenate(d_actions, axis=-1),
  )


_update.defvjp(_update_forward, _update_backward)
