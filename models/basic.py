"""Builders of MLPs, causal CNNs and recurrent networks.

Axes: B batch, T time, F features of a symbol, H hidden units, K outputs.
"""

from collections.abc import Callable
from collections.abc import Sequence
import inspect
from typing import Any

import haiku as hk
import jax

from nonstationary_mbml import base_config
from nonstationary_mbml.models import recurrent

Model = Callable[[jax.Array], jax.Array]

# Symbols that an output of a CNN sees.
_MAX_CONTEXT = 2**20


def make_mlp(
  output_size: int,
  hidden_layers_sizes: Sequence[int] = (64,),
  activation: Model = jax.nn.relu,
) -> Model:
  """Returns an MLP over the last axis, `[..., F] -> [..., K]`.

  Args:
    output_size: K.
    hidden_layers_sizes: Width of every hidden layer.
    activation: After every hidden layer, not after the last one.
  """
  sizes = (
    *_check_sizes('hidden_layers_sizes', hidden_layers_sizes),
    base_config.check_int('output_size', output_size, 1),
  )

  def mlp(inputs: jax.Array) -> jax.Array:
    return hk.nets.MLP(sizes, activation=activation)(inputs)

  return mlp


def make_cnn(
  output_size: int,
  hidden_layers_sizes: Sequence[int] = (64, 64),
  kernel_size: int = 3,
  activation: Model = jax.nn.relu,
) -> Model:
  """Returns a causal convolutional network over time.

  Args:
    output_size: K.
    hidden_layers_sizes: Channels of every convolution. Layer l is dilated by
      kernel_size^l, so that output t sees the last kernel_size^layers symbols.
    kernel_size: Width of every convolution.
    activation: After every convolution.

  Returns:
    A model `[B, T, F] -> [B, T, K]` whose output t depends on symbols up to t.

  Raises:
    ValueError: If a size is not a positive integer, or an output would see more
      than 2^20 symbols, for which there has to be as much padding.
  """
  output_size = base_config.check_int('output_size', output_size, 1)
  kernel_size = base_config.check_int('kernel_size', kernel_size, 1)
  sizes = _check_sizes('hidden_layers_sizes', hidden_layers_sizes)
  base_config.check_int(
    'kernel_size to the power of the layers',
    kernel_size ** len(sizes),
    1,
    _MAX_CONTEXT,
  )

  def cnn(inputs: jax.Array) -> jax.Array:
    hidden = inputs
    for layer, size in enumerate(sizes):
      convolution = hk.Conv1D(
        size, kernel_size, rate=kernel_size**layer, padding=hk.pad.causal
      )
      hidden = activation(convolution(hidden))
    return hk.Linear(output_size)(hidden)

  return cnn


class RecurrentNetwork(hk.Module):
  """MLP -> recurrent core -> ReLU -> MLP -> logits.

  Only the core runs inside the loop over time.
  """

  def __init__(
    self,
    output_size: int,
    core: Callable[..., hk.RNNCore],
    core_kwargs: dict[str, Any],
    before_mlp_layers: Sequence[int] = (),
    after_mlp_layers: Sequence[int] = (),
    gradient_checkpointing: bool = False,
    name: str | None = None,
  ):
    """Initializes the network; arguments as in `make_rnn`."""
    super().__init__(name)
    self._before = hk.nets.MLP(
      before_mlp_layers, activate_final=True, name='before_mlp'
    )
    self._core = core(**core_kwargs)
    self._gradient_checkpointing = gradient_checkpointing
    self._after = hk.nets.MLP(
      (*after_mlp_layers, output_size), name='after_mlp'
    )

  def initial_state(self, batch_size: int) -> Any:
    """Returns the core's state before any symbol, arrays `[B, ...]`."""
    return self._core.initial_state(batch_size)

  def __call__(self, inputs: jax.Array, state: Any) -> tuple[jax.Array, Any]:
    """Returns logits `[B, T, K]` for `[B, T, F]`, and the final state."""
    outputs, state = recurrent.unroll(
      self._core,
      self._before(inputs.swapaxes(0, 1)),  # [T, B, F]
      state,
      self._gradient_checkpointing,
    )
    logits = self._after(jax.nn.relu(outputs))  # [T, B, K]
    return logits.swapaxes(0, 1), state

  def unroll_states(self, inputs: jax.Array, state: Any) -> Any:
    """Returns the states after every symbol, arrays `[B, T, ...]`."""
    _, states = hk.dynamic_unroll(
      self._core,
      self._before(inputs),
      state,
      time_major=False,
      return_all_states=True,
    )
    return states


def make_rnn(
  output_size: int,
  core: Callable[..., hk.RNNCore],
  before_mlp_layers: Sequence[int] = (),
  after_mlp_layers: Sequence[int] = (),
  gradient_checkpointing: bool = False,
  **core_kwargs: Any,
) -> Callable[[], RecurrentNetwork]:
  """Returns a builder of recurrent networks, for `RNNPredictor`.

  Args:
    output_size: K.
    core: Haiku class of the core, e.g. `recurrent.LSTM`.
    before_mlp_layers: Widths of ReLU layers between input and core.
    after_mlp_layers: Widths of ReLU layers between core and logits.
    gradient_checkpointing: Whether the backward pass keeps the core's state
      only every sqrt(T) symbols, and computes the rest again: less memory, the
      same gradient.
    **core_kwargs: Keyword arguments of the core, e.g. `hidden_size`.

  Raises:
    ValueError: If a size is not a positive integer, a flag not a bool, or the
      core does not take its arguments.
  """
  output_size = base_config.check_int('output_size', output_size, 1)
  base_config.check_bool('gradient_checkpointing', gradient_checkpointing)
  before_mlp_layers = _check_sizes('before_mlp_layers', before_mlp_layers)
  after_mlp_layers = _check_sizes('after_mlp_layers', after_mlp_layers)
  try:
    inspect.signature(core).bind(**core_kwargs)
  except TypeError as error:
    raise ValueError(f'{getattr(core, "__name__", core)}: {error}') from error

  def build() -> RecurrentNetwork:
    return RecurrentNetwork(
      output_size,
      core,
      core_kwargs,
      before_mlp_layers,
      after_mlp_layers,
      gradient_checkpointing,
    )

  return build


def _check_sizes(field: str, sizes: Any) -> tuple[int, ...]:
  """The widths of layers as ints, or a ValueError."""
  if isinstance(sizes, str) or not isinstance(sizes, Sequence):
    raise ValueError(f'{field} is {sizes!r}; it must be a tuple of sizes')
  return tuple(base_config.check_int(field, size, 1) for size in sizes)
