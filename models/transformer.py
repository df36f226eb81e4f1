"""A causal Transformer encoder.

Vaswani et al., Attention Is All You Need, 2017: post-norm, ReLU. Axes: B batch,
T time, F features of a symbol, D embedding_dim, H heads, K outputs.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from nonstationary_mbml import base_config
from nonstationary_mbml.models import attention as attention_lib
from nonstationary_mbml.models import backend
from nonstationary_mbml.models import positional_encodings as pos_encs_lib

PositionalEncodings = pos_encs_lib.PositionalEncodings


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
  """Hyperparameters of the Transformer.

  Attributes:
    embedding_dim: D.
    num_layers: Blocks of attention and MLP.
    num_heads: H.
    num_hiddens_per_head: Size of queries, keys and values; by default D / H.
    dropout_prob: After the embeddings, and on what every sub-layer adds.
    emb_init_scale: Standard deviation of the initial embeddings.
    use_embeddings: If False the symbols are taken as embeddings, and their F
      features take the place of `embedding_dim`.
    begin_symbol: Whether all positions also see one before the first symbol.
      Without it, and without absolute positions, n equal symbols at the
      beginning look the same for every n: attention is a mean, and the mean of
      equal values does not tell their number.
    attention_window: Each position sees this many most recent ones, itself
      included; None is all of them.
    widening_factor: Hidden units of the MLPs, in units of D.
    gradient_checkpointing: Keep only the inputs of the layers for the backward
      pass, and compute the rest again.
    positional_encodings: NONE, SIN_COS, ALIBI or RELATIVE.
    positional_encodings_params: `max_timescale` of the sinusoids in SIN_COS and
      RELATIVE, 10,000 by default.

  Raises:
    ValueError: If a value is out of range, or the heads do not divide D.
  """

  embedding_dim: int = 64
  num_layers: int = 5
  num_heads: int = 8
  num_hiddens_per_head: int | None = None
  dropout_prob: float = 0.1
  emb_init_scale: float = 0.02
  use_embeddings: bool = True
  begin_symbol: bool = False
  attention_window: int | None = None
  widening_factor: int = 4
  gradient_checkpointing: bool = False
  positional_encodings: str | PositionalEncodings = 'SIN_COS'
  positional_encodings_params: dict[str, Any] = dataclasses.field(
    default_factory=dict
  )

  def __post_init__(self):
    for field in ('embedding_dim', 'num_heads', 'widening_factor'):
      self._check_int(field, 1)
    self._check_int('num_layers', 0)
    for field in ('num_hiddens_per_head', 'attention_window'):
      if getattr(self, field) is not None:
        self._check_int(field, 1)
    base_config.check_float('dropout_prob', self.dropout_prob, 0.0, 1.0)
    base_config.check_float('emb_init_scale', self.emb_init_scale, 0.0)
    for field in ('use_embeddings', 'begin_symbol', 'gradient_checkpointing'):
      base_config.check_bool(field, getattr(self, field))
    if self.use_embeddings:
      self.check_heads('embedding_dim', self.embedding_dim)
    encodings = PositionalEncodings.parse(self.positional_encodings)
    object.__setattr__(self, 'positional_encodings', encodings)
    params = self.positional_encodings_params
    params = {} if params is None else params
    object.__setattr__(self, 'positional_encodings_params', params)
    base_config.check_mapping('positional_encodings_params', params)
    base_config.check_kwargs(
      f'positional_encodings_params of {encodings.name}',
      params,
      pos_encs_lib.PARAMS[encodings],
    )
    if 'max_timescale' in params:
      base_config.check_float('max_timescale', params['max_timescale'], 1.0)

  def _check_int(self, field: str, minimum: int) -> None:
    value = base_config.check_int(field, getattr(self, field), minimum)
    object.__setattr__(self, field, value)

  def check_heads(self, field: str, embedding_dim: int) -> None:
    """Raises ValueError unless the heads divide the embedding."""
    if self.num_hiddens_per_head is None and embedding_dim % self.num_heads:
      raise ValueError(
        f'{field} {embedding_dim} is not divisible by num_heads '
        f'{self.num_heads}; set num_hiddens_per_head, or change one of them'
      )


FIELDS = tuple(field.name for field in dataclasses.fields(TransformerConfig))


class Linear(hk.Linear):
  """`hk.Linear` at every position, `[B, T, F]` to `[B, T, output_size]`.

  Its weight gradients are quicker on a CPU.
  """

  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Returns the outputs."""
    size, dtype = inputs.shape[-1], inputs.dtype
    w_init = self.w_init or hk.initializers.TruncatedNormal(
      stddev=1 / math.sqrt(size)
    )
    shape = (size, self.output_size)
    weights = hk.get_parameter('w', shape, dtype, w_init)
    # As a product of two matrices; of more axes, XLA would transpose some.
    product = _product if backend.is_cpu() else jnp.matmul
    outputs = product(inputs.reshape(-1, size), weights)
    if self.with_bias:
      outputs += hk.get_parameter('b', shape[1:], dtype, jnp.zeros)
    return outputs.reshape(*inputs.shape[:-1], -1)


class MLP(hk.Module):
  """A hidden ReLU layer: `hk.nets.MLP` at every position."""

  def __init__(self, hidden_size: int, output_size: int, name: str):
    """Initializes the module."""
    super().__init__(name)
    self._hidden = Linear(hidden_size, name='linear_0')
    self._output = Linear(output_size, name='linear_1')

  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Returns the outputs, `[B, T, output_size]`."""
    return self._output(jax.nn.relu(self._hidden(inputs)))


class MultiHeadAttention(hk.Module):
  """Causal multi-head self-attention (Vaswani et al., 2017, section 3.2)."""

  def __init__(self, config: TransformerConfig, name: str | None = None):
    """Initializes the module."""
    super().__init__(name)
    self._config = config

  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Returns what each position reads from the past and itself `[B, T, D]`."""
    config = self._config
    batch_size, seq_length, embedding_dim = inputs.shape
    num_heads = config.num_heads
    size = config.num_hiddens_per_head or embedding_dim // num_heads

    def project(name: str) -> jax.Array:
      projected = Linear(num_heads * size, with_bias=False, name=name)(inputs)
      return projected.reshape(batch_size, seq_length, num_heads, size)

    query, key, value = project('query'), project('key'), project('value')
    if config.positional_encodings is PositionalEncodings.RELATIVE:
      encoding = pos_encs_lib.RelativePositions(
        **config.positional_encodings_params
      )(seq_length, num_heads, size, inputs.dtype)
    elif config.positional_encodings is PositionalEncodings.ALIBI:
      encoding = pos_encs_lib.Alibi()
    else:
      encoding = pos_encs_lib.Content()
    read = attention_lib.causal_attention(
      query, key, value, encoding, config.attention_window
    )
    read = read.reshape(batch_size, seq_length, num_heads * size)
    return Linear(embedding_dim, with_bias=False, name='output')(read)


class TransformerEncoder(hk.Module):
  """Embeddings and post-norm blocks: symbols `[B, T, F]` to `[B, T, D]`.

  Dropout is on when the Haiku context has a key, and off without one.
  """

  def __init__(self, config: TransformerConfig, name: str | None = None):
    """Initializes the module."""
    super().__init__(name)
    self._config = config

  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Returns the last block's output at every position, `[B, T, D]`."""
    config = self._config
    rng = hk.maybe_next_rng_key() if config.dropout_prob else None
    # One key for the embeddings and one for every layer.
    rngs = [None] * (config.num_layers + 1)
    if rng is not None:
      rngs = jax.random.split(rng, config.num_layers + 1)
    hidden = self._embed(inputs)
    keep, _ = _keep_masks(rngs[0], config.dropout_prob, hidden)
    hidden = _dropout(keep, config.dropout_prob, hidden)
    for layer in range(config.num_layers):
      block = functools.partial(_block, config, layer)
      if config.gradient_checkpointing and not hk.running_init():
        block = self._recomputed(block, f'_{layer}')
      hidden = block(rngs[layer + 1], hidden)
    return hidden[:, int(config.begin_symbol) :]

  def _recomputed(
    self, block: Callable[[jax.Array | None, jax.Array], jax.Array], suffix: str
  ) -> Callable[[jax.Array | None, jax.Array], jax.Array]:
    """A block that keeps its input only, and is computed again for a gradient.

    The names of its modules end in `suffix`.

    `jax.checkpoint` does not serve: XLA for CPUs computes all layers again
    before the first gradient, and so keeps all of them.
    """
    pure = hk.transform(block).apply
    prefix = f'{self.module_name}/'
    params = {}
    for path, value in self.params_dict().items():
      module, name = path.removeprefix(prefix).rsplit('/', 1)
      if module.split('/')[0].endswith(suffix):
        params.setdefault(module, {})[name] = value

    @jax.custom_vjp
    def run(params: hk.Params, rng: Any, hidden: jax.Array) -> jax.Array:
      return pure(params, None, rng, hidden)

    def forward(*args: Any) -> tuple[jax.Array, Any]:
      return run(*args), args

    def backward(args: Any, grad: jax.Array) -> tuple[Any, None, jax.Array]:
      params, rng, hidden = args
      # Adds nothing, but cannot be computed before the gradient is there.
      hidden = hidden + 0 * grad
      _, vjp = jax.vjp(lambda p, h: pure(p, None, rng, h), params, hidden)
      params_grad, hidden_grad = vjp(grad)
      return params_grad, None, hidden_grad

    run.defvjp(forward, backward)
    return functools.partial(run, params)

  def _embed(self, inputs: jax.Array) -> jax.Array:
    config = self._config
    _, seq_length, num_features = inputs.shape
    if config.use_embeddings:
      init = hk.initializers.TruncatedNormal(stddev=config.emb_init_scale)
      embed = Linear(
        config.embedding_dim, with_bias=False, w_init=init, name='embedding'
      )
      hidden = embed(inputs) * math.sqrt(config.embedding_dim)
    else:
      config.check_heads(
        'use_embeddings is False, and feature size', num_features
      )
      hidden = inputs
    if config.positional_encodings is PositionalEncodings.SIN_COS:
      waves = pos_encs_lib.sinusoids(
        np.arange(seq_length),
        hidden.shape[-1],
        **config.positional_encodings_params,
      )
      hidden = hidden + jnp.asarray(waves, hidden.dtype)
    if config.begin_symbol:
      begin = hk.get_parameter(
        'begin',
        hidden.shape[-1:],
        init=hk.initializers.TruncatedNormal(),
      ).astype(hidden.dtype)
      begin = jnp.broadcast_to(begin, (len(hidden), 1, hidden.shape[-1]))
      hidden = jnp.concatenate([begin, hidden], axis=1)
    return hidden


def make_transformer_encoder(
  output_size: int, **config_kwargs: Any
) -> Callable[[jax.Array], jax.Array]:
  """Returns a causal Transformer with a linear head.

  Args:
    output_size: K.
    **config_kwargs: Fields of TransformerConfig.

  Returns:
    A model `[B, T, F] -> [B, T, K]`, for `InContextPredictor`.

  Raises:
    ValueError: If a field is unknown or its value not allowed.
  """
  output_size = base_config.check_int('output_size', output_size, 1)
  base_config.check_kwargs('transformer', config_kwargs, FIELDS)
  config = TransformerConfig(**config_kwargs)

  def transformer(inputs: jax.Array) -> jax.Array:
    hidden = TransformerEncoder(config)(inputs)
    return Linear(output_size, name='logits')(hidden)

  return transformer


def _block(
  config: TransformerConfig,
  layer: int,
  rng: jax.Array | None,
  hidden: jax.Array,
) -> jax.Array:
  """One layer, `[B, T, D]` to `[B, T, D]`."""
  embedding_dim = hidden.shape[-1]
  keep_read, keep_mlp = _keep_masks(rng, config.dropout_prob, hidden)
  read = MultiHeadAttention(config, name=f'attention_{layer}')(hidden)
  read = _dropout(keep_read, config.dropout_prob, read)
  hidden = _layer_norm(hidden + read, f'attention_norm_{layer}')
  hidden_size = config.widening_factor * embedding_dim
  mlp = MLP(hidden_size, embedding_dim, name=f'mlp_{layer}')
  added = _dropout(keep_mlp, config.dropout_prob, mlp(hidden))
  return _layer_norm(hidden + added, f'mlp_norm_{layer}')


def _keep_masks(
  rng: jax.Array | None, dropout_prob: float, hidden: jax.Array
) -> tuple[jax.Array | None, jax.Array | None]:
  """Two independent masks of what dropout keeps; None without a key."""
  if rng is None:
    return None, None
  # Random bits are slow on a CPU: 16 of them decide. A batch is never split
  # inside the model, so the bits need not be those of a split array.
  with jax.threefry_partitionable(False):
    words = jax.random.bits(rng, hidden.shape, jnp.uint32)
  kept = np.uint32(_kept_of_2_16(dropout_prob))
  return (words & np.uint32(2**16 - 1)) < kept, (words >> 16) < kept


def _kept_of_2_16(dropout_prob: float) -> int:
  """Number of 2^16 equally likely values that are kept."""
  return max(1, round((1 - dropout_prob) * 2**16))


def _dropout(
  keep: jax.Array | None, dropout_prob: float, inputs: jax.Array
) -> jax.Array:
  if keep is None:
    return inputs
  # In expectation the inputs, exactly.
  scale = 2**16 / _kept_of_2_16(dropout_prob)
  return jnp.where(keep, inputs * scale, jnp.zeros_like(inputs))


@jax.custom_vjp
def _product(inputs: jax.Array, weights: jax.Array) -> jax.Array:
  """Returns inputs `[n, F]` times weights `[F, D]`."""
  return inputs @ weights


def _product_forward(
  inputs: jax.Array, weights: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return inputs @ weights, (inputs, weights)


def _product_backward(
  residuals: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
  inputs, weights = residuals
  if inputs.shape[1] <= grad.shape[1]:
    weights_grad = inputs.T @ grad
  else:
    # Twice as fast on a CPU, which would else make the product above of it.
    weights_grad = jax.lax.optimization_barrier(grad.T @ inputs).T
  return grad @ weights.T, weights_grad


_product.defvjp(_product_forward, _product_backward)


def _layer_norm(inputs: jax.Array, name: str) -> jax.Array:
  return hk.LayerNorm(-1, create_scale=True, create_offset=True, name=name)(
    inputs
  )
