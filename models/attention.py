"""Causal attention that computes only what is seen.

Written for CPUs, where the logits of all pairs are what costs: queries are
taken in blocks, each against the keys up to its own end (and from the first key
in its window), a few sequences at a time so that a block's logits stay in the
cache. In a window much shorter than the sequence all blocks are alike, and each
becomes a sequence of its own. The backward pass computes the logits again from
the log-sum-exp of every query (Dao et al., FlashAttention, 2022, section 3.1).
On other devices it is `jax.nn.dot_product_attention`.

Axes: B batch, T time, H heads, D size of a head; t queries of a block, s its
keys, b sequences of a group, n blocks of a sequence.
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
# With a shorter window, products get too small.
_MIN_BLOCK_SIZE = 16
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
  by_head = _by_head(query)
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
    jnp.moveaxis(encoding.content_query(by_head), 0, 2),
    key,
    value,
    bias=None if bias is None else bias.swapaxes(0, 1),
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
  # In half precision a logit of 200 has no fraction.
  dtype = jnp.promote_types(query.dtype, jnp.float32)
  encoding, *arrays = jax.tree.map(
    lambda array: array.astype(dtype), (encoding, query, key, value)
  )
  batch_size, seq_length, num_heads, _ = query.shape
  blocks, first_key = make_blocks(seq_length, window, block_size), None
  if window is not None:
    row_length = block_size or min(max(window, _MIN_BLOCK_SIZE), _BLOCK_SIZE)
    if 2 * (window + row_length) <= seq_length:
      arrays, first_key = _rows(*arrays, window, row_length)
      times = range(window + row_length)
      blocks = (Block(times[window:], times),)
  if group_size is None:
    logits = num_heads * max(len(b.queries) * len(b.keys) for b in blocks)
    group_size = max(1, _LOGITS_PER_GROUP // logits)
  num_rows = len(arrays[0])
  num_groups = -(-num_rows // group_size)
  group_size = -(-num_rows // num_groups)
  # Sequences of padding fill up the last group.
  padding = num_groups * group_size - num_rows

  def split(array: jax.Array) -> jax.Array:
    array = jnp.pad(array, [(0, padding)] + [(0, 0)] * (array.ndim - 1))
    return array.reshape(num_groups, group_size, *array.shape[1:])

  arrays, first_key = jax.tree.map(split, (arrays, first_key))
  read = _attend(blocks, window, encoding, first_key, *arrays)
  read = read.reshape(-1, *read.shape[2:])[:num_rows]
  read = read.reshape(batch_size, -1, *read.shape[2:])[:, :seq_length]
  return read.astype(query.dtype)


def _rows(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  window: int,
  row_length: int,
) -> tuple[list[jax.Array], jax.Array]:
  """Makes a sequence of each block of queries and the keys that they see.

    T 6, window 1, row_length 2:  queries 0 1 | 2 3 | 4 5
                                  keys  _ 0 1 | 1 2 3 | 3 4 5

  Returns:
    Queries `[B n, row_length, H, D]`, keys and values `[B n, window +
    row_length, H, D]`; and of each of the B n the first key that is there.
  """
  batch_size, seq_length = query.shape[:2]
  num_rows = -(-seq_length // row_length)
  length = num_rows * row_length
  num_before = -(-window // row_length)  # Rows that a row also sees.

  def cut(array: jax.Array, num_before: int) -> jax.Array:
    padding = (num_before * row_length, length - seq_length)
    array = jnp.pad(array, ((0, 0), padding, (0, 0), (0, 0)))
    pieces = [
      array[:, i * row_length :][:, :length].reshape(
        -1, row_length, *array.shape[2:]
      )
      for i in range(num_before + 1)
    ]
    return jnp.concatenate(pieces, axis=1)

  key, value = (
    cut(array, num_before)[:, -(window + row_length) :]
    for array in (key, value)
  )
  first_key = jnp.maximum(window - row_length * jnp.arange(num_rows), 0)
  return [cut(query, 0), key, value], jnp.tile(first_key, batch_size)


def _content_and_bias(
  block: Block, encoding: pos_encs_lib.Encoding, query: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """What makes the logits of a block: content^T key + bias.

  Args:
    block: The block.
    encoding: Positional encoding.
    query: Queries of the block `[H, b, t, D]`.

  Returns:
    Arrays `[H, b, t, D]` and `[H, b, t, s]`.
  """
  # The queries are scaled: they are fewer than the logits.
  content = encoding.content_query(query) / math.sqrt(query.shape[-1])
  bias = encoding.bias(query, *block)
  bias = jnp.zeros((), query.dtype) if bias is None else bias
  shape = (*query.shape[:-1], len(block.keys))
  return content, jnp.broadcast_to(bias, shape)


def _mask(
  block: Block,
  window: int | None,
  first_key: jax.Array | None,
  logits: jax.Array,
) -> jax.Array:
  """Logits, and -inf where a key is not seen."""
  distances = pos_encs_lib.distances(*block)
  visible = distances >= 0
  if window is not None:
    visible &= distances < window
  if first_key is not None:
    is_there = jnp.arange(len(block.keys)) >= first_key[:, None, None]
    visible = visible & is_there
  return jnp.where(visible, logits, -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
  blocks: tuple[Block, ...],
  window: int | None,
  encoding: pos_encs_lib.Encoding,
  first_key: jax.Array | None,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
) -> jax.Array:
  """`blocked_attention` on `[groups, b, T, H, D]`.

  The queries are those of the last times of the keys. Keys before `first_key`
  `[groups, b]` are not there; None is all are.
  """
  return _forward(blocks, window, encoding, first_key, query, key, value)[0]


def _forward(blocks, window, encoding, first_key, query, key, value):
  first_query = blocks[0].queries.start

  def group(_, inputs):
    first_key, query, key, value = inputs
    query = _by_head(query)
    # So no product, forward or backward, has to transpose logits.
    key, value = _transposed(key), _transposed(value)
    reads, log_norms = [], []
    for block in blocks:
      queries, keys = _slices(block, first_query)
      content, bias = _content_and_bias(block, encoding, query[:, :, queries])
      logits = content @ key[..., keys] + bias
      logits = _mask(block, window, first_key, logits)
      largest = jnp.max(logits, axis=-1, keepdims=True)
      weights = jnp.exp(logits - largest)
      norm = jnp.sum(weights, axis=-1, keepdims=True)
      read = jnp.einsum('hbts,hbds->hbtd', weights, value[..., keys])
      reads.append(read / norm)
      log_norms.append(largest + jnp.log(norm))
    read = jnp.moveaxis(jnp.concatenate(reads, axis=2), 0, 2)
    return None, (read, jnp.concatenate(log_norms, axis=2))

  arrays = (first_key, query, key, value)
  _, (read, log_norm) = jax.lax.scan(group, None, arrays)
  return read, (encoding, *arrays, read, log_norm)


def _backward(blocks, window, residuals, read_grad):
  encoding, *arrays = residuals
  first_query = blocks[0].queries.start

  def group(encoding_grad, inputs):
    first_key, query, key, value, read, log_norm, read_grad = inputs
    # Mean that the softmax subtracts from every gradient: [H, b, T, 1].
    mean = _by_head(jnp.sum(read * read_grad, axis=-1, keepdims=True))
    query, key, value = _by_head(query), _transposed(key), _transposed(value)
    read_grad, read_grad_t = _by_head(read_grad), _transposed(read_grad)
    query_grads = []
    key_grad, value_grad = jnp.zeros_like(key), jnp.zeros_like(value)
    for block in blocks:
      queries, keys = _slices(block, first_query)
      (content, bias), vjp = jax.vjp(
        functools.partial(_content_and_bias, block),
        encoding,
        query[:, :, queries],
      )
      # The gradient is 0 where the weight is: the mask needs none.
      logits = content @ key[..., keys] + bias
      logits = _mask(block, window, first_key, logits)
      weights = jnp.exp(logits - log_norm[:, :, queries])
      value_grad = value_grad.at[..., keys].add(
        read_grad_t[..., queries] @ weights
      )
      weights_grad = read_grad[:, :, queries] @ value[..., keys]
      logits_grad = weights * (weights_grad - mean[:, :, queries])
      key_grad = key_grad.at[..., keys].add(
        content.swapaxes(-1, -2) @ logits_grad
      )
      content_grad = jnp.einsum('hbts,hbds->hbtd', logits_grad, key[..., keys])
      block_grad, query_grad = vjp((content_grad, logits_grad))
      query_grads.append(query_grad)
      encoding_grad = jax.tree.map(jnp.add, encoding_grad, block_grad)
    query_grad = jnp.moveaxis(jnp.concatenate(query_grads, axis=2), 0, 2)
    key_grad, value_grad = (
      grad.transpose(1, 3, 0, 2) for grad in (key_grad, value_grad)
    )
    return encoding_grad, (query_grad, key_grad, value_grad)

  zeros = jax.tree.map(jnp.zeros_like, encoding)
  encoding_grad, grads = jax.lax.scan(group, zeros, (*arrays, read_grad))
  return encoding_grad, None, *grads


_attend.defvjp(_forward, _backward)


def _by_head(array: jax.Array) -> jax.Array:
  """`[b, T, H, D]` as `[H, b, T, D]`."""
  return jnp.moveaxis(array, 2, 0)


def _transposed(array: jax.Array) -> jax.Array:
  """`[b, T, H, D]` as `[H, b, D, T]`."""
  return array.transpose(2, 0, 3, 1)


def _slices(block: Block, first_query: int) -> tuple[slice, slice]:
  queries, keys = block
  return (
    slice(queries.start - first_query, queries.stop - first_query),
    slice(keys.start, keys.stop),
  )
