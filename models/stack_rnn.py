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
from nonstationary_mbml.models import backend
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
    tops: `[B, n_stacks, C]`, C numbers in a cell. The network reads nothing
      else: apart, their gradient is not one of whole stacks.
    stacks: Stacks with tops, `[B, n_stacks, stack_size * C]`.
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

    The backward pass keeps the stacks every sqrt(T) inputs only; of a stack of
    many more cells, only the ends go through the loop over time (`_Blocks`).
    """
    if hk.running_init():
      return hk.dynamic_unroll(self, inputs, state)
    step = functools.partial(self._step, self._layers())
    run = functools.partial(hk.dynamic_unroll, step)
    _, stack_size, cell_size = self._shape
    blocks = _Blocks(
      recurrent.segment_length(len(inputs)), stack_size, cell_size
    )
    carry = self._carry(state)
    if not blocks.are_quicker:
      outputs, carry = recurrent.unroll_segments(run, inputs, carry)
      return outputs, self._state(carry)
    outputs, carry = recurrent.unroll_segments(
      functools.partial(blocks.unroll, run),
      inputs,
      carry._replace(stacks=blocks.split(state.stacks)),
    )
    stacks = blocks.join(carry.stacks, stack_size)
    return outputs, StackState(stacks, carry.inner)

  @hk.name_like('__call__')
  def _layers(self) -> tuple[hk.Linear, hk.Linear]:
    """From outputs to what is pushed, and to logits of the actions."""
    n_stacks, _, cell_size = self._shape
    return (
      hk.Linear(n_stacks * cell_size, name='push'),
      hk.Linear(3 * n_stacks, name='actions'),
    )

  def _carry(self, state: StackState) -> _Carry:
    stacks = state.stacks
    return _Carry(stacks[..., 0, :], _merge_last(stacks), state.inner)

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
    cell_size = self._shape[-1]
    read = tops[..., :cell_size].reshape(*inputs.shape[:-1], -1)
    outputs, inner = self._inner(
      jnp.concatenate([inputs, read], axis=-1), inner
    )
    pushed = push(outputs).reshape(*tops.shape[:-1], cell_size)
    # The impulse of `_Blocks` is beside what the network knows of a cell.
    pushed = _pad_last(pushed, tops.shape[-1] - cell_size)
    # A softmax of its own for each stack.
    actions = jax.nn.softmax(act(outputs).reshape(*tops.shape[:-1], 3))
    tops, stacks = _update(stacks, pushed, actions)
    return outputs, _Carry(tops, stacks, inner)


class _Blocks:
  """Stacks in blocks of L cells, for up to L steps at once.

  In so many steps, nothing comes further than L cells. So the tops that the
  network reads, and the last L cells, depend on 2 L cells at either end alone;
  only these ends go through the loop over time. In between, the actions do to
  every cell what they do to an impulse in the middle of an empty stack, which
  goes through the loop beside them. What becomes of it are the weights k of

    s_{t+L}[i] = sum_j k[j] s_t[i - j],    j = -L, ..., L,

  for whole blocks a product of matrices: each comes from three, the one above
  it, itself, and the one below.

    cells       0 1 2 | 3 4 5 | 6 7 8 | 9 10 11 | 12 13 14 | 15 16     L = 3
    loop        0 1 2   3 4 5                9 10 11 12 13 14 15 16
    convolution         3 4 5   6 7 8   9 10 11

  Blocks are arrays `[..., L, num_blocks * C]`, C numbers in a cell: first cells
  of all blocks, then all second ones, and so on.
  """

  def __init__(self, length: int, stack_size: int, cell_size: int):
    """Initializes the blocks.

    Args:
      length: L.
      stack_size: Cells of a stack.
      cell_size: C.
    """
    self._length = length
    self._stack_size = stack_size
    self._cell_size = cell_size
    # Blocks by convolution: all but the first, the last, and a part of one.
    self._num_inside = stack_size // length - 2

  @property
  def are_quicker(self) -> bool:
    """Whether the whole stack is so much more than its ends that it pays."""
    # Measured on a CPU alone: 0.9 times at 4, 1.6 times at 14.
    return backend.is_cpu() and self._num_inside > 6

  def split(self, cells: jax.Array) -> jax.Array:
    """Returns the blocks of `[..., num_cells, C]`; the last ends in zeros."""
    num_cells, size = cells.shape[-2:]
    # Flat, since the last axis is the one that is padded.
    flat = _pad_last(_merge_last(cells), -num_cells % self._length * size)
    cells = flat.reshape(*flat.shape[:-1], -1, self._length, size)
    return _merge_last(cells.swapaxes(-3, -2))

  def join(self, blocks: jax.Array, num_cells: int) -> jax.Array:
    """Returns the first cells of blocks, `[..., num_cells, C]`."""
    cells = blocks.reshape(*blocks.shape[:-1], -1, self._cell_size)
    cells = cells.swapaxes(-3, -2)
    cells = cells.reshape(*blocks.shape[:-2], -1, self._cell_size)
    return cells[..., :num_cells, :]

  def unroll(
    self,
    run: Callable[[jax.Array, _Carry], tuple[jax.Array, _Carry]],
    inputs: jax.Array,
    carry: _Carry,
  ) -> tuple[jax.Array, _Carry]:
    """As `run` of up to L inputs, with blocks for stacks before and after."""
    length, size = self._length, self._cell_size
    _, blocks, inner = carry
    ends = jnp.concatenate(
      [
        self.join(blocks[..., : 2 * size], 2 * length),
        self.join(
          blocks[..., self._num_inside * size :],
          self._stack_size - self._num_inside * length,
        ),
      ],
      axis=-2,
    )
    # In the middle of the ends, apart from them in a column of its own.
    impulse = jnp.zeros_like(ends[..., :1]).at[..., 2 * length, :].set(1)
    ends = jnp.concatenate([ends, impulse], axis=-1)  # [..., cells, C + 1]
    outputs, (tops, after, inner) = run(
      inputs, _Carry(ends[..., 0, :], _merge_last(ends), inner)
    )
    after = after.reshape(ends.shape)
    weights = after[..., length : 3 * length + 1, size]  # k[-L], ..., k[L]
    ends = after[..., :size]
    # Row i has the weights of cell i of a block, and begins i later.
    rows = jnp.tile(_pad_last(weights[..., ::-1], length), length)
    rows = rows[..., : 3 * length**2].reshape(
      *rows.shape[:-1], length, 3 * length
    )
    num_inside = self._num_inside * size
    windows = [blocks[..., i * size : i * size + num_inside] for i in range(3)]
    inside = jnp.matmul(
      rows, jnp.concatenate(windows, axis=-2), precision='highest'
    )
    blocks = jnp.concatenate(
      [
        self.split(ends[..., :length, :]),
        inside,
        self.split(ends[..., 3 * length :, :]),
      ],
      axis=-1,
    )
    return outputs, _Carry(tops[..., :size], blocks, inner)


def _pad_last(array: jax.Array, num_zeros: int) -> jax.Array:
  """An array with zeros at the end of its last axis."""
  return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, num_zeros)])


def _merge_last(array: jax.Array) -> jax.Array:
  """An array with its last two axes as one."""
  return array.reshape(*array.shape[:-2], -1)


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
    # Not a sum, and no product of two matrices for each sequence: on a CPU,
    # XLA does the first ten times and the second twice as slowly.
    return jnp.matmul(
      a * b, jnp.ones((a.shape[-1], 1), a.dtype), precision='highest'
    )

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
