"""The log loss of a batch and its gradient, in microbatches and chunks of time.

Training goes down the expected log loss of the next symbol x_{t+1} given the
past, -sum_k p_k log q_k, and `train.target` says which p stands for it:

  symbols     p = [x_{t+1} = k], the symbol that came: the paper's
  parameters  p = theta_{t+1}, the distribution that it was drawn from
  bayes       p = P(x_{t+1} = k | x_1, ..., x_t), the exact Bayes predictor's

The mean of the first over the symbol is the second, and the mean of that over
the parameters, given the past, the third; the gradient is linear in p. So all
three have the same expected gradient and the same minimiser, q = the Bayes
predictor. Of a single prediction, the gradient of each has at most the variance
of the one before it (law of total variance).

That of a sequence need not: errors of the symbols are independent over time,
while the parameters stay for a segment, and so do their errors. Of a trained
LSTM on the PTW source with T = 32, the variance of the gradient of a sequence
is, beside that of the symbols, 0.9 times as large with the parameters (1.1
early in training) and 0.01 times with Bayes, whose gradient is 0 in the
minimum.

Axes: B batch, T time, K alphabet size.
"""

import jax
import jax.numpy as jnp

from nonstationary_mbml import base_config
from nonstationary_mbml import base_constants
from nonstationary_mbml import predictors
from nonstationary_mbml.models import backend

# For a network that reads whole sequences, on a CPU: at T = 256, twice and half
# as many symbols were no quicker.
_SYMBOLS_PER_MICROBATCH = 2048


def check_target(
  target: str, generator: base_constants.DataGenerator, seq_length: int
) -> None:
  """Raises ValueError unless a source has such targets.

  Args:
    target: One of `base_config.TARGETS`.
    generator: The source.
    seq_length: T.
  """
  if target != 'bayes':
    return
  bayes_predictor = getattr(generator, 'bayes_predictor', lambda length: None)
  if bayes_predictor(seq_length) is None:
    raise ValueError(
      "train.target is 'bayes', but the source has no exact Bayes predictor; "
      "choose 'symbols' or 'parameters'"
    )


def target_probs(
  target: str,
  generator: base_constants.DataGenerator,
  batch: jax.Array,
  parameters: jax.Array,
) -> jax.Array | None:
  """Returns the distribution p of every next symbol, `[B, T, K]`.

  That at t is of symbol t + 1; the last one is 0, since nothing follows. None
  for the symbols themselves.

  Args:
    target: One of `base_config.TARGETS`.
    generator: The source of the batch.
    batch: One-hot symbols `[B, T, K]`.
    parameters: Their true probabilities `[B, T, K]`.
  """
  if target == 'symbols':
    return None
  if target == 'parameters':
    return _of_next(parameters)
  exact = generator.bayes_predictor(batch.shape[1])
  log_probs, _ = exact.unroll({}, None, batch)
  return jnp.exp(log_probs).at[:, -1].set(0)


def _of_next(array: jax.Array) -> jax.Array:
  """What comes one later in time; zeros at the end."""
  return jnp.pad(array[:, 1:], ((0, 0), (0, 1), (0, 0)))


def log_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Returns the summed code length of the targets, in nats.

    -sum log softmax(logits)[target]

  Args:
    logits: `[B, T, K]`.
    targets: One-hot or probabilities `[B, T, K]`; a row of zeros counts
      nothing.
  """
  log_probs = jax.nn.log_softmax(logits, axis=-1)
  # A symbol that did not come may have probability 0.
  return -jnp.sum(targets * jnp.where(targets == 0, 0, log_probs))


def loss_and_grads(
  predictor: predictors.Predictor,
  params: predictors.Params,
  rng: jax.Array | None,
  batch: jax.Array,
  init_state: predictors.State,
  chunk_length: int | None = None,
  microbatch_size: int | None = None,
  target_probs: jax.Array | None = None,
  compute_dtype: str | None = None,
) -> tuple[jax.Array, predictors.Params, predictors.State]:
  """Returns the mean log loss of a batch, a gradient and the final state.

  Symbols 2, ..., T of each sequence are predicted, and every one of them counts
  the same. With chunks, the state is carried from each to the next and the
  gradient is cut between them; memory does not grow with their number.
  Microbatches come one after another, and the gradient is their mean.

  Args:
    predictor: The predictor.
    params: Its parameters.
    rng: Key of dropout, or None.
    batch: One-hot symbols `[B, T, K]`, T >= 2.
    init_state: State before the first symbol.
    chunk_length: Symbols per chunk; None is the whole sequence.
    microbatch_size: Sequences per microbatch, a divisor of B; None is B.
    target_probs: Targets from `target_probs`, whose loss the gradient is of;
      None is the symbols. The loss that is returned is always of the symbols.
    compute_dtype: Dtype in which the network computes; None is the batch's. All
      that is taken and returned is in the batch's.

  Raises:
    ValueError: If T < 2, or the microbatches do not divide the batch.
  """
  batch_size, seq_length, _ = batch.shape
  base_config.check_int('seq_length', seq_length, 2)
  if microbatch_size is None:
    microbatch_size = batch_size
  base_config.check_int('microbatch_size', microbatch_size, 1)
  if microbatch_size == batch_size:
    return _microbatch_loss_and_grads(
      predictor,
      params,
      rng,
      batch,
      init_state,
      chunk_length,
      target_probs,
      compute_dtype,
    )
  num_microbatches, rest = divmod(batch_size, microbatch_size)
  if rest:
    raise ValueError(
      f'microbatch_size {microbatch_size} does not divide a batch of '
      f'{batch_size}'
    )

  def add_microbatch(sums, inputs):
    index, batch, init_state, target_probs = inputs
    microbatch_rng = None if rng is None else jax.random.fold_in(rng, index)
    *new, state = _microbatch_loss_and_grads(
      predictor,
      params,
      microbatch_rng,
      batch,
      init_state,
      chunk_length,
      target_probs,
      compute_dtype,
    )
    return jax.tree.map(jnp.add, sums, tuple(new)), state

  split = lambda x: x.reshape(num_microbatches, microbatch_size, *x.shape[1:])
  zeros = jnp.zeros((), batch.dtype), jax.tree.map(jnp.zeros_like, params)
  sums, states = jax.lax.scan(
    add_microbatch,
    zeros,
    (
      jnp.arange(num_microbatches),
      *jax.tree.map(split, (batch, init_state, target_probs)),
    ),
  )
  loss, grads = jax.tree.map(lambda x: x / num_microbatches, sums)
  merge = lambda x: x.reshape(batch_size, *x.shape[2:])
  return loss, grads, jax.tree.map(merge, states)


def _microbatch_loss_and_grads(
  predictor: predictors.Predictor,
  params: predictors.Params,
  rng: jax.Array | None,
  batch: jax.Array,
  init_state: predictors.State,
  chunk_length: int | None,
  target_probs: jax.Array | None,
  compute_dtype: str | None,
) -> tuple[jax.Array, predictors.Params, predictors.State]:
  """`loss_and_grads` of a single microbatch."""
  batch_size, seq_length, _ = batch.shape
  num_targets = batch_size * (seq_length - 1)
  # The last prediction has no target.
  symbols = _of_next(batch)
  if chunk_length is None:
    chunk_length = seq_length
  chunk_length = min(
    base_config.check_int('chunk_length', chunk_length, 1), seq_length
  )

  def chunk_loss(params, chunk_rng, state, inputs, symbols, target_probs):
    # A network computes in the dtype of what it reads.
    logits, state = predictor.unroll(
      params, chunk_rng, inputs.astype(compute_dtype or batch.dtype), state
    )
    logits, state = predictors.cast_like((logits, state), batch)
    loss = log_loss(logits, symbols) / num_targets
    objective = loss
    if target_probs is not None:
      objective = log_loss(logits, target_probs) / num_targets
    return objective, (loss, state)

  def add_chunk(carry, begin, length):
    state, loss, grads = carry
    chunk_rng = None if rng is None else jax.random.fold_in(rng, begin)
    chunks = jax.tree.map(
      lambda x: jax.lax.dynamic_slice_in_dim(x, begin, length, axis=1),
      (batch, symbols, target_probs),
    )
    chunk_grads, (chunk, state) = jax.grad(chunk_loss, has_aux=True)(
      params, chunk_rng, state, *chunks
    )
    return state, loss + chunk, jax.tree.map(jnp.add, grads, chunk_grads)

  carry = (
    init_state,
    jnp.zeros((), batch.dtype),
    jax.tree.map(jnp.zeros_like, params),
  )
  num_chunks, rest = divmod(seq_length, chunk_length)
  if num_chunks == 1:
    carry = add_chunk(carry, 0, chunk_length)
  else:
    carry, _ = jax.lax.scan(
      lambda carry, begin: (add_chunk(carry, begin, chunk_length), None),
      carry,
      jnp.arange(num_chunks) * chunk_length,
    )
  if rest:
    carry = add_chunk(carry, seq_length - rest, rest)
  state, loss, grads = carry
  return loss, grads, state


def microbatch_size(
  config: base_config.TrainConfig,
  predictor: predictors.Predictor,
  device_batch_size: int,
  seq_length: int,
) -> int:
  """Returns the number of sequences in a microbatch.

  Args:
    config: Config of the training.
    predictor: Predictor to train.
    device_batch_size: Sequences of a step on one device.
    seq_length: T.

  Returns:
    A divisor of `device_batch_size`.
  """
  if config.microbatch_size is not None:
    return config.microbatch_size
  if predictor.has_state or not backend.is_cpu():
    return device_batch_size
  # The activations of so many symbols stay in the cache. Recurrent networks
  # have large products only with large batches.
  length = min(seq_length, config.gradient_chunk_length or seq_length)
  limit = max(1, _SYMBOLS_PER_MICROBATCH // length)
  return max(
    size
    for size in range(1, device_batch_size + 1)
    if device_batch_size % size == 0 and size <= limit
  )
