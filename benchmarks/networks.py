"""The networks that are measured, and the work in a training step of each.

Axes: B batch, T time, K alphabet size.
"""

from typing import Any

ALPHABET_SIZE = 2
# Length of a window, as a fraction of the sequence.
_WINDOWS = 4

Kwargs = dict[str, Any]


def networks(seq_length: int, num_layers: int) -> dict[str, tuple[str, Kwargs]]:
  """Returns model type and architecture of every network, by its name.

  Args:
    seq_length: T.
    num_layers: Number of layers of the Transformers.
  """
  transformer = _transformer(num_layers)
  named = {
    'LSTM-128': lstm(128),
    'RNN-128': ('rnn', {'core': 'vanilla_rnn', 'hidden_size': 128}),
    'Stack-RNN': (
      'stack_rnn',
      {'hidden_size': 64, 'stack_cell_size': 8, 'stack_size': seq_length},
    ),
  }
  for encodings in ('NONE', 'SIN_COS', 'ALIBI', 'RELATIVE'):
    named[f'Transformer {encodings}'] = (
      'transformer',
      {**transformer, 'positional_encodings': encodings},
    )
  named['Transformer in windows'] = (
    'sliding_window_transformer',
    {**transformer, 'context_length': seq_length // _WINDOWS},
  )
  return named


def transformers(
  num_layers: int, seq_length: int
) -> dict[str, tuple[str, Kwargs]]:
  """Returns type and architecture of Transformers that differ in attention.

  Args:
    num_layers: Number of layers.
    seq_length: T.
  """
  kwargs = _transformer(num_layers)
  named = {
    encodings: ('transformer', {**kwargs, 'positional_encodings': encodings})
    for encodings in ('SIN_COS', 'NONE', 'ALIBI', 'RELATIVE')
  }
  named['attention window'] = (
    'transformer',
    {**kwargs, 'attention_window': seq_length // 8},
  )
  named['in windows'] = (
    'sliding_window_transformer',
    {**kwargs, 'context_length': seq_length // 16},
  )
  return named


def _transformer(num_layers: int) -> Kwargs:
  return {
    'embedding_dim': 64,
    'num_layers': num_layers,
    'num_heads': 8,
    'dropout_prob': 0.1,
  }


def lstm(hidden_size: int) -> tuple[str, Kwargs]:
  """Returns model type and architecture of an LSTM."""
  return 'lstm', {'hidden_size': hidden_size}


def step_flops(
  model_type: str, kwargs: Kwargs, batch_size: int, seq_length: int
) -> int:
  """Returns the floating-point operations of a training step.

  Only those of matrix products, 2 m n k each, and three times those of the
  forward pass: a gradient takes two products for each. What a causal mask hides
  is not counted, and neither is what is no matrix product (gates, norms, the
  mixing of stacks), nor what is computed twice to save memory.
  """
  if model_type in ('transformer', 'sliding_window_transformer'):
    # Each window is a sequence of its own.
    context = min(kwargs.get('context_length', seq_length), seq_length)
    forward = _transformer_products(kwargs, context) * seq_length * batch_size
    forward += _position_products(kwargs, context)
  else:
    per_symbol = _recurrent_products(model_type, kwargs)
    forward = per_symbol * seq_length * batch_size
  return 3 * 2 * forward


def _recurrent_products(model_type: str, kwargs: Kwargs) -> int:
  """Multiplications per symbol."""
  hidden = kwargs['hidden_size']
  head = hidden * ALPHABET_SIZE
  if model_type == 'lstm':
    return (ALPHABET_SIZE + hidden) * 4 * hidden + head
  if model_type == 'stack_rnn':
    cell = kwargs['stack_cell_size']
    core = (ALPHABET_SIZE + cell + hidden) * hidden
    return core + hidden * (cell + 3) + head  # Pushed values, and actions.
  return (ALPHABET_SIZE + hidden) * hidden + head


def _transformer_products(kwargs: Kwargs, context: int) -> int:
  """Multiplications per symbol."""
  dim = kwargs['embedding_dim']
  is_relative = kwargs.get('positional_encodings') == 'RELATIVE'
  # Keys, and as many values, that all queries together see.
  window = min(kwargs.get('attention_window', context), context)
  num_seen = window * (2 * context - window + 1) // 2
  attention = (3 if is_relative else 2) * dim * num_seen // context
  # Queries, keys, values and output; then an MLP four times as wide.
  block = 4 * dim**2 + 2 * 4 * dim**2 + attention
  return kwargs['num_layers'] * block + 2 * ALPHABET_SIZE * dim


def _position_products(kwargs: Kwargs, context: int) -> int:
  """Multiplications per batch, for the keys of relative positions."""
  if kwargs.get('positional_encodings') != 'RELATIVE':
    return 0
  return kwargs['num_layers'] * context * kwargs['embedding_dim'] ** 2
