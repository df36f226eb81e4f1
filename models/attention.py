"""Causal attention that computes only what is seen.

Written for CPUs, where the logits of all pairs are what costs: queries are
taken in blocks, each against the keys up to its own end (and from the first key
in its window), a few sequences at a time so that a block's logits stay in the
cache. The backward pass computes them again from the log-sum-exp of every
query (Dao et al., FlashAttention, 2022, section 3.1). On other devices it is
`jax.nn.dot_product_attention`.

Axes: B batch, T time, H heads, D size of a head; t queries of a block, s its
keys, b sequences of a group.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nonstationary_mbml.models import backend
from nonstationary_mbml.models import positional_encodings as pos_encs_lib

# Queries of a block, unless the sequence is so long that there would be more
# than `_MAX_BLOCKS`, each of which is compiled on its own.
_BLOCK_SIZE = 64
_MAX_BLOCKS = 16
# Logits of a block, for all sequences of a group: 1 MiB in float32. At T =
# 256, half or twice as many, or blocks of 32 or 96, were slower.
_LOGITS_PER_GROUP = 2**18


class Block(NamedTuple):
  """Consecutive queries and the keys that any of them sees.

  Attributes:
    queries: Times of the queries.
    keys: Times of the keys.
  """

  queries: range
  keys: range


def make_blocks(
  seq_length: int, window: int | None = None, block_size: int | None = None
) -> tuple[Block, ...]:
  """Returns blocks of queries that make up the sequence.

  Args:
    seq_length: T.
    window: Each query sees this many most recent keys, its own included; None
      is all of them.
    block_size: Queries per block; the last one may have fewer. By default it
      follows from T.
  """
  if block_size is None:
    block_size = max(_BLOCK_SIZE, -(-seq_length // _MAX_BLOCKS))
  window = window or seq_length
  blocks = []
  for begin in range(0, seq_length, block_size):
    end = min(begin + block_size, seq_length)
    first_key = max(0, begin - window + 1)
    blocks.append(Block(range(begin, end), range(first_key, end)))
  return tuple(blocks)


def causal_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  encoding: pos_encs_lib.Encoding,
  window: int | None = None,
) -> jax.Array:
  """Returns the output of every query, `[B, T, H, D]`.

    read_t = sum_s softmax_s(logits(q_t, k_s)) v_s,  t - window < s <= t

  Args:
    query: `[B, T, H, D]`.
    key: `[B, T, H, D]`.
    value: `[B, T, H, D]`.
    encoding: Gives the logits.
    window: Each query sees this many most recent keys, its own included; None
      is all of them.
  """
  attend = blocked_attention if backend.is_cpu() else fused_attention
  return attend(query, key, value, encoding, window)


def fused_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  encoding: pos_encs_lib.Encoding,
  window: int | None = None,
) -> jax.Array:
  """`causal_attention` as `jax.nn.dot_product_attention`.

  cuDNN's flash attention where it serves: half precision without a bias.
  """
  _, seq_length, _, size = query.shape
  by_head = query.swapaxes(1, 2)
  times = range(seq_length)
  bias = encoding.bias(by_head, times, times)
  has_cudnn = (
    backend.has_flash_attention()
    and query.dtype in (jnp.float16, jnp.bfloat16)
    and bias is None
    and size % 8 == 0
    and size <= 128
  )
  return jax.nn.dot_product_attention(
    encoding.content_query(by_head).swapaxes(1, 2),
    key,
    value,
    bias=bias,
    is_causal=True,
    local_window_size=None if window is None else (window - 1, 0),
    implementation='cudnn' if has_cudnn else 'xla',
  )


def blocked_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  encoding: pos_encs_lib.Encoding,
  window: int | None = None,
  block_size: int | None = None,
  group_size: int | None = None,
) -> jax.Array:
  """`causal_attention` in blocks; differentiable in reverse, once.

  Args:
    query: Queries, as in `causal_attention`.
    key: Keys, as in `causal_attention`.
    value: Values, as in `causal_attention`.
    encoding: Positional encoding, as in `causal_attention`.
    window: Window, as in `causal_attention`.
    block_size: Queries per block. By default it follows from the sizes; it does
      not change the result.
    group_size: Sequences computed together; likewise.
  """
  batch_size, seq_length, num_heads, _ = query.shape
  blocks = make_blocks(seq_length, window, block_size)
  if group_size is None:
    logits = num_heads * max(len(b.queries) * len(b.keys) for b in blocks)
    group_size = max(1, _LOGITS_PER_GROUP // logits)
  num_groups = -(-batch_size // group_size)
  group_size = -(-batch_size // num_groups)
  # Sequences of padding fill up the last group.
  padding = num_groups * group_size - batch_size

  def split(array: jax.Array) -> jax.Array:
    array = jnp.pad(array, [(0, padding)] + [(0, 0)] * (array.ndim - 1))
    return array.reshape(num_groups, group_size, *array.shape[1:])

  read = _attend(blocks, window, encoding, *map(split, (query, key, value)))
  return read.reshape(-1, *query.shape[1:])[:batch_size]


def _logits(
  block: Block,
  query: jax.Array,
  key: jax.Array,
  encoding: pos_encs_lib.Encoding,
) -> jax.Array:
  """Logits of one block `[b, H, t, s]`, of any value where s > t."""
  # The queries are scaled: they are fewer than the logits.
  content = encoding.content_query(query) / math.sqrt(query.shape[-1])
  logits = jnp.einsum('bhtd,bhds->bhts', content, key)
  bias = encoding.bias(query, *block)
  return logits if bias is None else logits + bias


def _mask(block: Block, window: int | None, logits: jax.Array) -> jax.Array:
  """Logits, and -inf where a key is not seen."""
  distances = pos_encs_lib.distances(*block)
  visible = distances >= 0
  if window is not None:
    visible &= distances < window
  return jnp.where(visible, logits, -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
  blocks: tuple[Block, ...],
  window: int | None,
  encoding: pos_encs_lib.Encoding,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
) -> jax.Array:
  """`blocked_attention` on `[groups, b, T, H, D]`."""
  return _forward(blocks, window, encoding, query, key, value)[0]


def _forward(blocks, window, encoding, query, key, value):
  def group(_, inputs):
    query, key, value = _by_head(*inputs)
    reads, log_norms = [], []
    for block in blocks:
      queries, keys = _slices(block)
      logits = _logits(block, query[:, :, queries], key[..., keys], encoding)
      logits = _mask(block, window, logits)
      largest = jnp.max(logits, axis=-1, keepdims=True)
      weights = jnp.exp(logits - largest)
      norm = jnp.sum(weights, axis=-1, keepdims=True)
      read = jnp.einsum('bhts,bhds->bhtd', weights, value[..., keys])
      reads.append(read / norm)
      log_norms.append(largest + jnp.log(norm))
    read = jnp.concatenate(reads, axis=2).swapaxes(1, 2)
    return None, (read, jnp.concatenate(log_norms, axis=2))

  _, (read, log_norm) = jax.lax.scan(group, None, (query, key, value))
  return read, (encoding, query, key, value, read, log_norm)


def _backward(blocks, window, residuals, read_grad):
  encoding, *arrays = residuals

  def group(encoding_grad, inputs):
    query, key, value, read, log_norm, read_grad = inputs
    # Mean that the softmax subtracts from every gradient: [b, H, T, 1].
    mean = jnp.sum(read * read_grad, axis=-1, keepdims=True).swapaxes(1, 2)
    query, key, value = _by_head(query, key, value)
    read_grad = read_grad.swapaxes(1, 2)
    query_grads = []
    key_grad, value_grad = jnp.zeros_like(key), jnp.zeros_like(value)
    for block in blocks:
      queries, keys = _slices(block)
      logits, logits_vjp = jax.vjp(
        functools.partial(_logits, block),
        query[:, :, queries],
        key[..., keys],
        encoding,
      )
      # Their gradient is 0 where the weight is: the mask needs none.
      logits = _mask(block, window, logits)
      weights = jnp.exp(logits - log_norm[:, :, queries])
      grad = read_grad[:, :, queries]
      value_grad = value_grad.at[..., keys].add(
        jnp.einsum('bhtd,bhts->bhds', grad, weights)
      )
      weights_grad = jnp.einsum('bhtd,bhds->bhts', grad, value[..., keys])
      logits_grad = weights * (weights_grad - mean[:, :, queries])
      query_block_grad, key_block_grad, block_grad = logits_vjp(logits_grad)
      query_grads.append(query_block_grad)
      key_grad = key_grad.at[..., keys].add(key_block_grad)
      encoding_grad = jax.tree.map(jnp.add, encoding_grad, block_grad)
    query_grad = jnp.concatenate(query_grads, axis=2).swapaxes(1, 2)
    key_grad, value_grad = (
      jnp.moveaxis(grad, -1, 1) for grad in (key_grad, value_grad)
    )
    return encoding_grad, (query_grad, key_grad, value_grad)

  zeros = jax.tree.map(jnp.zeros_like, encoding)
  encoding_grad, grads = jax.lax.scan(group, zeros, (*arrays, read_grad))
  return encoding_grad, *grads


_attend.defvjp(_forward, _backward)


def _by_head(
  query: jax.Array, key: jax.Array, value: jax.Array
) -> tuple[jax.Array, ...]:
  """Queries `[b, H, T, D]`, keys and values `[b, H, D, T]`.

  So no product, forward or backward, has to transpose logits.
  """
  return (
    query.swapaxes(1, 2),
    jnp.moveaxis(key, 1, -1),
    jnp.moveaxis(value, 1, -1),
  )


def _slices(block: Block) -> tuple[slice, slice]:
  queries, keys = block
  return slice(queries.start, queries.stop), slice(keys.start, keys.stop)
