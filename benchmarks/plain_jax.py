"""The same networks and training, the plain way of writing them in JAX.

Haiku's own cores and `hk.dynamic_unroll`, attention that makes the whole matrix
and masks it, and a Python loop of jitted steps on batches made by the host.
Nothing here is the project's, so it stays as it is when that gets faster.

Axes: B batch, T time, K alphabet size, D embedding, H heads.
"""

from collections.abc import Callable
import math
from typing import Any
from typing import NamedTuple

import haiku as hk
import host_batches
import jax
import jax.numpy as jnp
import networks
import numpy as np
import optax
import timing

Network = Callable[[jax.Array], jax.Array]


def make_network(
  model_type: str,
  output_size: int,
  kwargs: dict[str, Any],
  keep_states: bool = False,
) -> Network:
  """Returns a network `[B, T, K] -> [B, T, K]`, for `hk.transform`.

  Args:
    model_type: Type of the network, by the project's name.
    output_size: K.
    kwargs: Architecture, as the project takes it.
    keep_states: Unroll a recurrent core so that it returns all its states.
  """
  if model_type == 'transformer':
    return lambda inputs: transformer(inputs, output_size, **kwargs)
  if model_type == 'sliding_window_transformer':
    return lambda inputs: windowed(inputs, output_size, **kwargs)
  cores = {
    'lstm': lambda: hk.LSTM(kwargs['hidden_size']),
    'rnn': lambda: hk.VanillaRNN(kwargs['hidden_size']),
    'stack_rnn': lambda: StackRNN(**kwargs),
  }
  make_core = cores[model_type]
  return lambda inputs: recurrent(inputs, output_size, make_core(), keep_states)


def recurrent(
  inputs: jax.Array, output_size: int, core: hk.RNNCore, keep_states: bool
) -> jax.Array:
  """Core -> ReLU -> linear."""
  outputs, _ = hk.dynamic_unroll(
    core,
    inputs,
    core.initial_state(inputs.shape[0]),
    time_major=False,
    return_all_states=keep_states,
  )
  return hk.Linear(output_size)(jax.nn.relu(outputs))


class StackState(NamedTuple):
  """Attributes: stack: `[B, cells, cell size]`. hidden: State of the core."""

  stack: jax.Array
  hidden: jax.Array


class StackRNN(hk.RNNCore):
  """A vanilla RNN with a stack (Joulin & Mikolov, 2015)."""

  def __init__(self, hidden_size: int, stack_cell_size: int, stack_size: int):
    """Initializes the core."""
    super().__init__()
    self._shape = (stack_size, stack_cell_size)
    self._inner = hk.VanillaRNN(hidden_size)

  def initial_state(self, batch_size: int) -> StackState:
    """Returns an empty stack."""
    return StackState(
      jnp.zeros((batch_size, *self._shape)),
      self._inner.initial_state(batch_size),
    )

  def __call__(
    self, inputs: jax.Array, state: StackState
  ) -> tuple[jax.Array, StackState]:
    """Returns the inner core's output and the next state."""
    stack, hidden = state
    outputs, hidden = self._inner(
      jnp.concatenate([inputs, stack[:, 0]], axis=-1), hidden
    )
    pushed = hk.Linear(self._shape[1], name='push')(outputs)[:, None]
    actions = jax.nn.softmax(hk.Linear(3, name='actions')(outputs))
    push, pop, noop = jnp.split(actions[..., None], 3, axis=1)
    above = jnp.concatenate([pushed, stack[:, :-1]], axis=1)
    below = jnp.concatenate([stack[:, 1:], jnp.zeros_like(pushed)], axis=1)
    stack = push * above + pop * below + noop * stack
    return outputs, StackState(stack, hidden)


def transformer(
  inputs: jax.Array,
  output_size: int,
  embedding_dim: int,
  num_layers: int,
  num_heads: int,
  dropout_prob: float,
  positional_encodings: str = 'SIN_COS',
) -> jax.Array:
  """A causal, post-norm Transformer with a linear head."""

  def dropout(values: jax.Array) -> jax.Array:
    rng = hk.maybe_next_rng_key()
    return values if rng is None else hk.dropout(rng, dropout_prob, values)

  def norm(values: jax.Array) -> jax.Array:
    return hk.LayerNorm(-1, create_scale=True, create_offset=True)(values)

  init = hk.initializers.TruncatedNormal(stddev=0.02)
  embed = hk.Linear(embedding_dim, with_bias=False, w_init=init)
  hidden = embed(inputs) * math.sqrt(embedding_dim)
  if positional_encodings == 'SIN_COS':
    hidden += sinusoids(np.arange(inputs.shape[1]), embedding_dim)
  hidden = dropout(hidden)
  for _ in range(num_layers):
    read = Attention(num_heads, positional_encodings)(hidden)
    hidden = norm(hidden + dropout(read))
    mlp = hk.nets.MLP((4 * embedding_dim, embedding_dim))
    hidden = norm(hidden + dropout(mlp(hidden)))
  return hk.Linear(output_size)(hidden)


def windowed(
  inputs: jax.Array, output_size: int, context_length: int, **kwargs: Any
) -> jax.Array:
  """A Transformer on windows that divide the sequence."""
  batch_size, seq_length, num_features = inputs.shape
  windows = inputs.reshape(-1, context_length, num_features)
  outputs = transformer(windows, output_size, **kwargs)
  return outputs.reshape(batch_size, seq_length, output_size)


class Attention(hk.Module):
  """Multi-head attention over the whole matrix `[B, H, T, T]`, masked."""

  def __init__(self, num_heads: int, positional_encodings: str):
    """Initializes the module."""
    super().__init__()
    self._num_heads = num_heads
    self._encodings = positional_encodings

  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Returns what each position reads, `[B, T, D]`."""
    batch_size, seq_length, dim = inputs.shape
    size = dim // self._num_heads

    def project(name: str) -> jax.Array:
      outputs = hk.Linear(dim, with_bias=False, name=name)(inputs)
      return outputs.reshape(batch_size, seq_length, self._num_heads, size)

    query, key, value = project('query'), project('key'), project('value')
    if self._encodings == 'RELATIVE':
      logits = relative_logits(query, key)
    else:
      logits = jnp.einsum('bthd,bshd->bhts', query, key)
    logits = logits / math.sqrt(size)
    distances = jnp.arange(seq_length)[:, None] - jnp.arange(seq_length)
    if self._encodings == 'ALIBI':
      # Press et al., 2022, for a number of heads that is a power of two.
      heads = jnp.arange(1, self._num_heads + 1)
      slopes = 2.0 ** (-8 * heads / self._num_heads)
      logits -= slopes[:, None, None] * distances
    logits = jnp.where(distances >= 0, logits, jnp.finfo(logits.dtype).min)
    weights = jax.nn.softmax(logits)
    read = jnp.einsum('bhts,bshd->bthd', weights, value)
    read = read.reshape(batch_size, seq_length, dim)
    return hk.Linear(dim, with_bias=False, name='output')(read)


def relative_logits(query: jax.Array, key: jax.Array) -> jax.Array:
  """Content and distance (Dai et al., 2019, section 3.3), before scaling."""
  _, seq_length, num_heads, size = query.shape
  # Column c is distance T - 1 - c.
  waves = sinusoids(np.arange(seq_length)[::-1], num_heads * size)
  projected = hk.Linear(num_heads * size, with_bias=False, name='position')(
    waves
  ).reshape(seq_length, num_heads, size)
  init = hk.initializers.TruncatedNormal(stddev=0.02)
  shape = (num_heads, size)
  content_bias = hk.get_parameter('content_bias', shape, init=init)
  position_bias = hk.get_parameter('position_bias', shape, init=init)
  content = jnp.einsum('bthd,bshd->bhts', query + content_bias, key)
  logits = jnp.einsum('bthd,shd->bhts', query + position_bias, projected)
  # Row t moves left by T - 1 - t (appendix B).
  padded = jnp.pad(logits, [(0, 0), (0, 0), (0, 0), (1, 0)])
  padded = padded.reshape(*logits.shape[:2], seq_length + 1, seq_length)
  return content + padded[:, :, 1:].reshape(logits.shape)


def sinusoids(positions: np.ndarray, size: int) -> jax.Array:
  """Sinusoids of the positions (Vaswani et al., 2017), `[T, size]`."""
  angles = positions[:, None] * 1e4 ** (-np.arange(0, size, 2) / size)
  waves = np.stack([np.sin(angles), np.cos(angles)], axis=-1)
  return jnp.asarray(waves.reshape(len(positions), size), jnp.float32)


class TrainState(NamedTuple):
  """All that a step changes."""

  params: hk.Params
  opt_state: optax.OptState
  rng: jax.Array


def make_training(
  network: Network,
  batch: np.ndarray,
  learning_rate: float,
  clip_grad_norm: float,
) -> tuple[
  TrainState, Callable[[TrainState, jax.Array], tuple[TrainState, jax.Array]]
]:
  """Returns the first state and the jitted step, (state, batch) -> both.

  Args:
    network: Network from `make_network`.
    batch: An example of the batches, `[B, T, K]`.
    learning_rate: Learning rate of Adam.
    clip_grad_norm: Largest global norm of a gradient.
  """
  transformed = hk.transform(network)
  optimizer = optax.chain(
    optax.clip_by_global_norm(clip_grad_norm), optax.adam(learning_rate)
  )

  def loss(params: hk.Params, rng: jax.Array, batch: jax.Array) -> jax.Array:
    logits = transformed.apply(params, rng, batch)
    log_probs = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.mean(jnp.sum(batch[:, 1:] * log_probs, axis=-1))

  @jax.jit
  def step(state: TrainState, batch: jax.Array) -> tuple[TrainState, jax.Array]:
    rng, dropout_rng = jax.random.split(state.rng)
    value, grads = jax.value_and_grad(loss)(state.params, dropout_rng, batch)
    updates, opt_state = optimizer.update(grads, state.opt_state)
    params = optax.apply_updates(state.params, updates)
    return TrainState(params, opt_state, rng), value

  params = transformed.init(jax.random.key(0), batch)
  return TrainState(params, optimizer.init(params), jax.random.key(1)), step


def training(job: timing.Job) -> timing.Work:
  """The work of training, for a child process."""
  rng = np.random.default_rng(0)
  shape = (job.batch_size, job.seq_length, networks.ALPHABET_SIZE)
  batch = host_batches.sample_ptw(rng, *shape)
  state, step = make_training(
    make_network(job.model_type, networks.ALPHABET_SIZE, job.kwargs),
    batch,
    job.learning_rate,
    job.clip_grad_norm,
  )

  def run() -> list[jax.Array]:
    nonlocal state
    losses = []
    for _ in range(job.steps):
      state, loss = step(state, host_batches.sample_ptw(rng, *shape))
      losses.append(loss)
    jax.block_until_ready(state)
    return losses

  memory = step.lower(state, batch).compile().memory_analysis()
  return timing.Work(
    run,
    memory.temp_size_in_bytes,
    device=jax.devices()[0].device_kind,
    peak_device_bytes=peak_device_bytes,
  )


def matmul(job: timing.Job) -> timing.Work:
  """The work of a product of square float32 matrices, `job.size` wide."""
  matrix = jax.random.normal(jax.random.key(0), (job.size, job.size))
  multiply = jax.jit(lambda a, b: a @ b)

  def run() -> None:
    jax.block_until_ready(multiply(matrix, matrix))

  return timing.Work(run, device=jax.devices()[0].device_kind)


def copy(job: timing.Job) -> timing.Work:
  """The work of adding one to `job.size` float32 numbers, in place."""
  add_one = jax.jit(lambda array: array + 1, donate_argnums=0)
  array = jnp.zeros(job.size)

  def run() -> None:
    nonlocal array
    array = jax.block_until_ready(add_one(array))

  return timing.Work(run)


def peak_device_bytes() -> int | None:
  """Returns the most memory in use so far on a GPU; None on a CPU."""
  stats = jax.local_devices()[0].memory_stats()
  return stats and stats.get('peak_bytes_in_use')
