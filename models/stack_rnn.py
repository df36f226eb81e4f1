"""Recurrent cores with differentiable stacks.

Joulin & Mikolov, Inferring Algorithmic Patterns with Stack-Augmented Recurrent
Nets, NeurIPS 2015, section 3.2: the network reads the top of its stacks with
every symbol and answers with a soft choice of pushing, popping or leaving each
of them.
"""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp

from nonstationary_mbml import base_config


class StackState(NamedTuple):
  """State of a StackRNNCore.

  Attributes:
    stacks: `[B, n_stacks, stack_size, stack_cell_size]`, the top at index 0.
    inner: State of the inner core.
  """

  stacks: jax.Array
  inner: Any


class StackRNNCore(hk.RNNCore):
  """A recurrent core around any other, with one or more stacks.

  With h_t the inner core's output and (a_push, a_pop, a_noop) = softmax(A h_t)
  for every stack:

    s_t[0] = a_push D h_t      + a_pop s_{t-1}[1]     + a_noop s_{t-1}[0]
    s_t[i] = a_push s_{t-1}[i-1] + a_pop s_{t-1}[i+1] + a_noop s_{t-1}[i]

  A pop from an empty stack gives zeros; a push on a full one drops its bottom.
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
      name: Of the module.
      **inner_core_kwargs: For the inner core, e.g. `hidden_size`.

    Raises:
      ValueError: If a size is not a positive integer.
    """
    super().__init__(name)
    base_config.check_int('stack_cell_size', stack_cell_size, 1)
    base_config.check_int('stack_size', stack_size, 1)
    base_config.check_int('n_stacks', n_stacks, 1)
    self._shape = (n_stacks, stack_size, stack_cell_size)
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
    n_stacks, _, cell_size = self._shape
    stacks, inner = state
    batch_shape = inputs.shape[:-1]
    tops = stacks[..., 0, :].reshape(*batch_shape, n_stacks * cell_size)
    outputs, inner = self._inner(
      jnp.concatenate([inputs, tops], axis=-1), inner
    )

    pushed = hk.Linear(n_stacks * cell_size, name='push')(outputs)
    pushed = pushed.reshape(*batch_shape, n_stacks, 1, cell_size)
    actions = hk.Linear(3 * n_stacks, name='actions')(outputs)
    # A softmax of its own for each stack.
    actions = jax.nn.softmax(actions.reshape(*batch_shape, n_stacks, 3))
    push, pop, noop = jnp.split(actions[..., None], 3, axis=-2)

    above = jnp.concatenate([pushed, stacks[..., :-1, :]], axis=-2)
    below = jnp.concatenate(
      [stacks[..., 1:, :], jnp.zeros_like(pushed)], axis=-2
    )
    stacks = push * above + pop * below + noop * stacks
    return outputs, StackState(stacks, inner)
