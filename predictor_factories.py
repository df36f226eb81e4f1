"""From a model type and its keyword arguments to a Predictor.

  PREDICTOR_FACTORIES['lstm'](output_size=2, architecture_kwargs={})

Types: `rnn` (with a `core`), its shorthands `gru`, `lstm` and `stack_rnn`,
`cnn`, `transformer` and `sliding_window_transformer`.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import functools
import inspect
import re
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp

from nonstationary_mbml import base_config
from nonstationary_mbml import predictors
from nonstationary_mbml.models import basic
from nonstationary_mbml.models import recurrent
from nonstationary_mbml.models import stack_rnn
from nonstationary_mbml.models import transformer

CORES = base_config.Registry(
  'core',
  {
    'gru': recurrent.GRU,
    'lstm': recurrent.LSTM,
    'stack_rnn': stack_rnn.StackRNNCore,
    'vanilla_rnn': recurrent.VanillaRNN,
  },
)
# These take a hidden size, and no other arguments than the defaults below.
_BUILT_IN_CORES = frozenset(CORES.values())

_RNN_DEFAULTS = {
  'core': 'lstm',
  'hidden_size': 64,
  'before_mlp_layers': (),
  'after_mlp_layers': (),
  'gradient_checkpointing': False,
}
_CNN_DEFAULTS = {'hidden_layers_sizes': (64, 64), 'kernel_size': 3}
_STACK_DEFAULTS = {
  'stack_cell_size': 8,
  'stack_size': 30,
  'n_stacks': 1,
  'inner_core': 'vanilla_rnn',
}


def make_rnn_predictor(
  output_size: int, architecture_kwargs: Mapping[str, Any]
) -> predictors.RNNPredictor:
  """Returns a recurrent predictor.

  Args:
    output_size: K.
    architecture_kwargs: `core` (a name in `CORES`, by default `lstm`, or a
      Haiku class), `hidden_size` (64), `before_mlp_layers` and
      `after_mlp_layers` (none), `gradient_checkpointing` (False; True keeps the
      state only every sqrt(T) symbols for the backward pass). For `stack_rnn`
      also `stack_cell_size` (8), `stack_size` (30), `n_stacks` (1) and
      `inner_core` (`vanilla_rnn`). What is None takes its default. A core of
      the user's own is given all other arguments.

  Raises:
    ValueError: If an argument is unknown or its value not allowed.
  """
  kwargs = _with_defaults(_RNN_DEFAULTS, architecture_kwargs)
  core = _core_class('core', kwargs.pop('core'))
  of_network = {
    name: kwargs.pop(name)
    for name in (
      'before_mlp_layers',
      'after_mlp_layers',
      'gradient_checkpointing',
    )
  }
  if core is stack_rnn.StackRNNCore:
    kwargs = _with_defaults(_STACK_DEFAULTS, kwargs)
    kwargs['inner_core'] = _core_class('inner_core', kwargs['inner_core'])
    if kwargs['inner_core'] is core:
      raise ValueError(
        'inner_core stack_rnn is the core itself; choose another'
      )
    for name in ('stack_cell_size', 'stack_size', 'n_stacks'):
      kwargs[name] = base_config.check_int(name, kwargs[name], 1)
    defaults = _RNN_DEFAULTS | _STACK_DEFAULTS
  else:
    defaults = _RNN_DEFAULTS
  if core in _BUILT_IN_CORES:
    base_config.check_kwargs(core.__name__, kwargs, defaults)
    kwargs['hidden_size'] = base_config.check_int(
      'hidden_size', kwargs['hidden_size'], 1
    )
  else:
    hidden_size = inspect.signature(core).parameters.get('hidden_size')
    if architecture_kwargs.get('hidden_size') is None and (
      hidden_size is None or hidden_size.default is not hidden_size.empty
    ):
      del kwargs['hidden_size']  # The default is for a core that needs one.
    base_config.check_constructor(core.__name__, core, kwargs)
    # Its arguments may be called as some of `make_rnn` are.
    core, kwargs = functools.partial(core, **kwargs), {}
  network = basic.make_rnn(output_size, core, **of_network, **kwargs)
  return predictors.RNNPredictor(network)


def make_cnn_predictor(
  output_size: int, architecture_kwargs: Mapping[str, Any]
) -> predictors.InContextPredictor:
  """Returns a causal convolutional predictor.

  Args:
    output_size: K.
    architecture_kwargs: `hidden_layers_sizes` (64, 64) and `kernel_size` (3),
      as in `models.basic.make_cnn`: a prediction is made from the last
      kernel_size^layers symbols. An argument that is None has its default.

  Raises:
    ValueError: If an argument is unknown or its value not allowed.
  """
  base_config.check_kwargs('cnn', architecture_kwargs, _CNN_DEFAULTS)
  kwargs = _with_defaults(_CNN_DEFAULTS, architecture_kwargs)
  return predictors.InContextPredictor(basic.make_cnn(output_size, **kwargs))


def make_transformer_predictor(
  output_size: int, architecture_kwargs: Mapping[str, Any]
) -> predictors.InContextPredictor:
  """Returns a Transformer predictor.

  Args:
    output_size: K.
    architecture_kwargs: Fields of `models.transformer.TransformerConfig`.

  Raises:
    ValueError: If an argument is unknown or its value not allowed.
  """
  base_config.check_kwargs(
    'transformer', architecture_kwargs, transformer.FIELDS
  )
  return predictors.InContextPredictor(
    transformer.make_transformer_encoder(output_size, **architecture_kwargs)
  )


def make_sliding_window_transformer_predictor(
  output_size: int, architecture_kwargs: Mapping[str, Any]
) -> predictors.InContextPredictor:
  """Returns a Transformer that forgets everything every `context_length`.

  The sequence is cut into consecutive windows; every prediction is made from
  the symbols of its own window alone. The last window may be shorter.

    context_length 3:  0 1 1 | 0 0 1 | 1 0

  Args:
    output_size: K.
    architecture_kwargs: `context_length`, and fields of TransformerConfig.

  Raises:
    ValueError: If an argument is unknown or its value not allowed.
  """
  kwargs = dict(architecture_kwargs)
  if kwargs.get('context_length') is None:
    raise ValueError(
      'sliding_window_transformer needs context_length, the symbols per window'
    )
  context_length = kwargs.pop('context_length')
  base_config.check_kwargs(
    'sliding_window_transformer',
    kwargs,
    ('context_length', *transformer.FIELDS),
  )
  context_length = base_config.check_int('context_length', context_length, 1)
  model = transformer.make_transformer_encoder(output_size, **kwargs)

  def windowed(inputs: jax.Array) -> jax.Array:
    batch_size, seq_length, num_features = inputs.shape
    window = min(context_length, seq_length)
    num_windows = -(-seq_length // window)
    # Symbols of padding come last in the last window: nobody sees them.
    padding = num_windows * window - seq_length
    inputs = jnp.pad(inputs, ((0, 0), (0, padding), (0, 0)))
    inputs = inputs.reshape(batch_size * num_windows, window, num_features)
    outputs = model(inputs).reshape(batch_size, num_windows * window, -1)
    return outputs[:, :seq_length]

  return predictors.InContextPredictor(windowed)


def _shorthand(core: str) -> Callable[..., predictors.RNNPredictor]:
  """The factory of `rnn` with a given core."""

  def make(
    output_size: int, architecture_kwargs: Mapping[str, Any]
  ) -> predictors.RNNPredictor:
    given = architecture_kwargs.get('core')
    if given is not None and not issubclass(
      CORES[core], _core_class('core', given)
    ):
      raise ValueError(
        f'core {given!r} contradicts model_type {core!r}; use model_type rnn'
      )
    return make_rnn_predictor(
      output_size, {**architecture_kwargs, 'core': core}
    )

  return make


PREDICTOR_FACTORIES = base_config.Registry(
  'model_type',
  {
    'cnn': make_cnn_predictor,
    'rnn': make_rnn_predictor,
    'gru': _shorthand('gru'),
    'lstm': _shorthand('lstm'),
    'stack_rnn': _shorthand('stack_rnn'),
    'transformer': make_transformer_predictor,
    'sliding_window_transformer': make_sliding_window_transformer_predictor,
  },
)


# Names in tables and figures.
_LABELS = {
  'cnn': 'CNN',
  'gru': 'GRU',
  'lstm': 'LSTM',
  'sliding_window_transformer': 'Sliding-window Transformer',
  'transformer': 'Transformer',
  'vanilla_rnn': 'Vanilla RNN',
}


def label(config: base_config.ModelConfig) -> str:
  """Returns what a network is called in tables and figures.

    Vanilla RNN; Stack-LSTM; Transformer, SIN_COS; Transformer, no encoding

  A network or core of the user's own goes by its name in the registry, a Haiku
  class by its name.

  Args:
    config: Model type and architecture, as `build_predictor` takes them.
  """
  name, kwargs = config.model_type.lower(), config.architecture_kwargs
  if name == 'rnn':
    name = _core_name(kwargs.get('core') or _RNN_DEFAULTS['core'])
  if name == 'stack_rnn':
    inner = kwargs.get('inner_core') or _STACK_DEFAULTS['inner_core']
    inner = _core_name(inner)
    return f'Stack-{_LABELS.get(inner, inner).removeprefix("Vanilla ")}'
  shown = _LABELS.get(name, name)
  default = transformer.TransformerConfig.positional_encodings
  if name in ('transformer', 'sliding_window_transformer'):
    encodings = transformer.PositionalEncodings.parse(
      kwargs.get('positional_encodings', default)
    ).name
    if name == 'transformer' or encodings != default:
      shown += f', {"no encoding" if encodings == "NONE" else encodings}'
    if kwargs.get('begin_symbol'):
      shown += ', begin symbol'
  return shown


def _core_name(core: str | type[hk.RNNCore]) -> str:
  """Name of a core in `CORES`, or else of its class."""
  if isinstance(core, str):
    return core.lower()
  names = {entry: name for name, entry in CORES.items()}
  return names.get(core, core.__name__)


def build_predictor(
  config: base_config.ModelConfig, output_size: int
) -> predictors.Predictor:
  """Returns the predictor a model config describes.

  Args:
    config: Model type and architecture.
    output_size: K.

  Raises:
    ValueError: If the config is not valid.
  """
  config.validate()
  factory = PREDICTOR_FACTORIES.lookup('model.model_type', config.model_type)
  with naming_arguments():
    return factory(output_size, _Arguments(config.architecture_kwargs))


def resolved(
  config: base_config.ModelConfig, seq_length: int
) -> base_config.ModelConfig:
  """Returns a copy with the sizes that follow from T where they are not given.

  Those are the window of a sliding-window Transformer and the size of stacks.

  Args:
    config: Model type and architecture.
    seq_length: T of training.
  """
  model_type = config.model_type.lower()
  kwargs = base_config.plain(config.architecture_kwargs)
  follows = {}
  if model_type == 'sliding_window_transformer':
    follows['context_length'] = seq_length
  if 'stack_rnn' in (model_type, str(kwargs.get('core')).lower()):
    follows['stack_size'] = seq_length
  for name, size in follows.items():
    if kwargs.get(name) is None:
      kwargs[name] = size
  return base_config.ModelConfig(
    model_type=model_type, architecture_kwargs=kwargs
  )


# Python's messages for arguments that a function does not take.
_NOT_TAKEN = re.compile(
  'unexpected keyword argument|multiple values for|missing .*required'
)


@contextlib.contextmanager
def naming_arguments() -> Iterator[None]:
  """Inside a `with`, says which of `model.architecture_kwargs` is wrong.

  For a network of the user's own, which may use them only where it is traced.
  For errors other than that it does not take them, nothing is known here.
  """
  try:
    with base_config.naming('model.architecture_kwargs'):
      yield
  except TypeError as error:
    if not _NOT_TAKEN.search(str(error)):
      raise
    raise ValueError(f'model.architecture_kwargs: {error}') from error


class _Arguments(dict):
  """Arguments of a factory; one that is missing is a ValueError."""

  def __missing__(self, name: str) -> Any:
    raise ValueError(f'{name!r} is missing')


def _with_defaults(
  defaults: Mapping[str, Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
  """A new dict: `kwargs` where they are given, else the defaults."""
  given = {key: value for key, value in kwargs.items() if value is not None}
  return {**defaults, **given}


def _core_class(field: str, core: Any) -> Callable[..., hk.RNNCore]:
  if inspect.isclass(core) and issubclass(core, hk.RNNCore):
    return core
  if not isinstance(core, str):
    raise ValueError(
      f'{field} {core!r} is neither the name of a core nor a Haiku RNNCore '
      f'class; names are {", ".join(sorted(CORES))}'
    )
  return CORES.lookup(field, core)
