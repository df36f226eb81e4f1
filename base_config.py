"""Config dataclasses shared by all experiments, and how they are checked.

A config is plain data (numbers, strings, tuples, dicts), so that it prints,
saves to JSON and loads back equal. Fields are edited in place or with
`dataclasses.replace`; a mistyped field name is an error, and lists become
tuples on the way in.

  config = TrainConfig(learning_rate=1e-3)
  config.batch_size = 64
  from_dict(TrainConfig, to_dict(config)) == config
"""

import ast
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import copy
import dataclasses
import difflib
import inspect
import json
import math
import numbers
import os
import types
import typing
from typing import Any

import jax
import numpy as np

# Keys of jax.random take 32 bits; the last value of model_init_seed is kept for
# the random lengths of the steps, which all of them share.
SEQ_LENGTH_STREAM = 2**32 - 1
MAX_SEED = SEQ_LENGTH_STREAM - 1
# What training goes down on; `losses` says what each is.
TARGETS = ('symbols', 'parameters', 'bayes')
COMPUTE_DTYPES = ('float32', 'bfloat16')
SAVING_SCHEDULES = ('linear', 'log')
# Times are int32.
MAX_SEQ_LENGTH = 2**30
# Sizes and counts are int32.
MAX_SIZE = 2**31 - 1
# Runs compute in float32, whose numbers below the least normal one become 0.
_FLOAT32 = np.finfo(np.float32)
FLOAT32_LIMITS = (
  f'as float32, which holds {_FLOAT32.tiny:.7g} to {_FLOAT32.max:.7g}'
)


def did_you_mean(value: Any, choices: Iterable[str]) -> str:
  """Returns `; did you mean 'x'?` for the nearest choice, or nothing."""
  by_lower = {choice.lower(): choice for choice in choices}
  nearest = difflib.get_close_matches(str(value).lower(), by_lower, 1, 0.5)
  return f"; did you mean '{by_lower[nearest[0]]}'?" if nearest else ''


def check_choice(field: str, value: Any, choices: Iterable[str]) -> None:
  """Raises ValueError unless `value` is one of `choices`.

  Args:
    field: Name of the config field or argument, for the message.
    value: The value to check.
    choices: The values that are allowed.
  """
  choices = sorted(choices)
  if value not in choices:  # A list: the value need not be hashable.
    raise ValueError(
      f'{field} {value!r} is not one of {", ".join(choices)}'
      f'{did_you_mean(value, choices)}'
    )


@contextlib.contextmanager
def naming(field: str) -> Iterator[None]:
  """Inside a `with`, names the field before the message of any ValueError."""
  try:
    yield
  except ValueError as error:
    raise ValueError(f'{field}: {error}') from error


class EqualByValue:
  """Base of objects that are equal if their class and attributes are.

  So a function that is compiled for one of them (a static argument of
  `jax.jit`) serves all that are equal to it. Attributes are those in `vars`;
  they must not change once the object was used. An object with an attribute
  that has no hash, such as an array, is equal to itself alone.
  """

  def __eq__(self, other: object) -> bool:
    if type(self) is not type(other):
      return NotImplemented
    if self is other:
      return True
    own, its = self._value(), other._value()
    return own is not None and its is not None and own == its

  def __hash__(self) -> int:
    value = self._value()
    return object.__hash__(self) if value is None else hash(value)

  def _value(self) -> tuple[Any, ...] | None:
    """Class and attributes, if they have a hash."""
    value = (
      type(self),
      # With types: 1 and 1.0 are equal, but do not compute the same.
      *((name, type(item), item) for name, item in sorted(vars(self).items())),
    )
    try:
      hash(value)
    except TypeError:
      return None
    return value


class Registry(dict):
  """Entries by name, in any case of letters.

  A missing name is a ValueError with the list and the nearest match; so is an
  entry under a name that is not in lower case, which no lookup would find.
  """

  def __init__(self, kind: str, entries: Mapping[str, Any]):
    """Initializes the registry.

    Args:
      kind: Word for what the names stand for, for messages.
      entries: Entries by lower-case name.
    """
    super().__init__()
    self.kind = kind
    self.update(entries)

  def __setitem__(self, name: str, entry: Any) -> None:
    if not isinstance(name, str) or name != name.lower():
      raise ValueError(
        f'{self.kind} {name!r} cannot be registered: names are text in lower '
        'case, and found in any'
      )
    super().__setitem__(name, entry)

  # dict's own methods do not call `__setitem__`.
  def update(self, *args: Any, **kwargs: Any) -> None:
    for name, entry in dict(*args, **kwargs).items():
      self[name] = entry

  def setdefault(self, name: str, default: Any = None) -> Any:
    if name not in self:
      self[name] = default
    return self[name]

  def __ior__(self, entries: Mapping[str, Any]) -> 'Registry':
    self.update(entries)
    return self

  def lookup(self, field: str, name: Any) -> Any:
    """Returns the entry; `field` is what the message calls the name."""
    key = name.lower() if isinstance(name, str) else name
    check_choice(field, key, self)
    return self[key]

  def __missing__(self, name: Any) -> Any:
    return self.lookup(self.kind, name)


def check_kwargs(
  field: str, kwargs: Mapping[str, Any], choices: Iterable[str]
) -> None:
  """Raises ValueError if `kwargs` has a key that is not one of `choices`."""
  for key in kwargs:
    if key not in choices:
      raise ValueError(
        f'{field} has no {key!r}; it takes '
        f'{", ".join(sorted(choices)) or "nothing"}'
        f'{did_you_mean(key, choices)}'
      )


def check_constructor(
  field: str,
  constructor: Callable[..., Any],
  kwargs: Mapping[str, Any],
  given: Iterable[str] = (),
) -> None:
  """Raises ValueError unless a constructor can be called with `kwargs`.

  Args:
    field: Name of the kwargs, for the message.
    constructor: A class or function.
    kwargs: Keyword arguments by name.
    given: Parameters that the caller supplies besides.
  """
  choices = keywords(constructor).difference(given)
  check_kwargs(field, kwargs, choices)
  for name, parameter in inspect.signature(constructor).parameters.items():
    is_required = name in choices and parameter.default is parameter.empty
    if is_required and name not in kwargs:
      raise ValueError(f'{field} lacks {name!r}')


def keywords(constructor: Callable[..., Any]) -> set[str]:
  """Returns the names of all arguments that a class or function takes.

  Arguments that a class does not know itself are those of its bases, if it
  has `**kwargs`.
  """
  names = set()
  bases = constructor.__mro__[1:-1] if inspect.isclass(constructor) else ()
  for function in (constructor, *bases):
    hands_on = False
    for name, parameter in inspect.signature(function).parameters.items():
      hands_on |= parameter.kind is parameter.VAR_KEYWORD
      if parameter.kind not in (
        parameter.POSITIONAL_ONLY,
        parameter.VAR_KEYWORD,
        parameter.VAR_POSITIONAL,
      ):
        names.add(name)
    if not hands_on:
      break
  return names


def check_int(
  field: str, value: Any, minimum: int, maximum: int | None = None
) -> int:
  """Returns an integer in [minimum, maximum] as an int, or raises ValueError.

  Without a maximum it is that of int32, since sizes and counts are. A NumPy
  integer may have as few as 8 bits: compute with the int that is returned.
  """
  is_int = isinstance(value, numbers.Integral) and not isinstance(value, bool)
  if maximum is None and is_int and value > MAX_SIZE:
    maximum = MAX_SIZE
  if not is_int or value < minimum or (maximum is not None and value > maximum):
    limit = f' and <= {maximum}' if maximum is not None else ''
    raise ValueError(
      f'{field} is {value!r}; it must be an int >= {minimum}{limit}'
    )
  return int(value)


def check_seed(field: str, value: Any) -> int:
  """Returns a seed as an int, or raises ValueError.

  `jax.random.key` takes 32 bits: it would take 2^32 for 0, and -1 for 2^32 - 1.
  """
  return check_int(field, value, 0, MAX_SEED)


def check_float(
  field: str, value: Any, minimum: float, maximum: float = math.inf
) -> None:
  """Raises ValueError unless `value` is a number in [minimum, maximum)."""
  is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
  if not is_number or not minimum <= value < maximum:
    raise ValueError(
      f'{field} is {value!r}; it must be a number in [{minimum}, {maximum})'
    )


def check_bool(field: str, value: Any) -> None:
  """Raises ValueError unless `value` is True or False."""
  if not isinstance(value, bool):
    raise ValueError(f'{field} is {value!r}; it must be True or False')


def check_name(field: str, value: Any) -> None:
  """Raises ValueError unless `value` can be the name of a folder."""
  if not (isinstance(value, str) and value and value.isprintable()):
    raise ValueError(
      f'{field} is {value!r}; it must be a non-empty, printable string'
    )
  # A path could lead out of the folder that it is to be in.
  if value in ('.', '..') or set(value) & set('/\\'):
    raise ValueError(
      f'{field} is {value!r}; it must be the name of one folder, not a path'
    )


def is_file(name: str) -> bool:
  """Whether an entry of `imports` is the path of a file, not a name."""
  return name.endswith('.py')


def absolute_import(name: Any) -> Any:
  """Returns an entry of `imports` with the path of a file made absolute."""
  if isinstance(name, str) and is_file(name):
    return os.path.abspath(os.path.expanduser(name))
  return name


def check_import(field: str, name: str) -> None:
  """Raises ValueError unless `name` can be a module's, or a file's path."""
  if not is_file(name) and not all(map(str.isidentifier, name.split('.'))):
    raise ValueError(
      f'{field} {name!r} is neither the name of a module, such as '
      'my_package.my_module, nor the path of a .py file'
    )


def check_mapping(field: str, value: Any) -> None:
  """Raises ValueError unless `value` is a dict of plain data by name."""
  if not isinstance(value, Mapping) or not all(
    isinstance(key, str) for key in value
  ):
    raise ValueError(f'{field} is {value!r}; it must be a dict of named values')
  for key, item in value.items():
    _check_plain(f'{field}[{key}]', item)


def _check_plain(field: str, value: Any) -> None:
  if isinstance(value, Mapping):
    check_mapping(field, value)
  elif isinstance(value, (list, tuple)):
    for item in value:
      _check_plain(field, item)
  elif value is not None and not isinstance(value, (str, numbers.Real)):
    raise ValueError(
      f'{field} is {value!r}; a config holds plain data (numbers, strings, '
      'tuples, dicts), and classes by name'
    )


def check_vector(field: str, value: Any) -> tuple[float, ...]:
  """Returns a flat sequence of numbers as floats, or raises ValueError."""
  try:
    items = tuple(value)
    # float() takes text, too.
    if not any(isinstance(item, (bool, str)) for item in items):
      return tuple(float(item) for item in items)
  except (OverflowError, TypeError, ValueError):
    pass
  raise ValueError(f'{field} is {value!r}; it must be a sequence of numbers')


def check_dirichlet(
  field: str, concentration: Any, alphabet_size: int | None = None
) -> tuple[float, ...] | float:
  """Checks the concentration of a Dirichlet prior.

  Args:
    field: Name of the config field or argument, for the message.
    concentration: A positive number (symmetric prior) or one per symbol.
    alphabet_size: K, if known.

  Returns:
    The concentration as a float, or as a tuple of K floats.

  Raises:
    ValueError: If an entry is not positive, or their number is not K, or
      float32 loses one (see `check_concentrations`).
  """
  try:
    values = np.asarray(concentration)
  except ValueError:  # Rows of unequal length.
    values = np.asarray(None)
  if not (
    values.ndim <= 1
    and values.size
    and values.dtype.kind in 'iuf'
    and np.all(np.isfinite(values))
    and np.all(values > 0)
  ):
    raise ValueError(
      f'{field} is {concentration!r}; it must be a positive number or one '
      'positive number per symbol'
    )
  if values.ndim == 1 and values.size != (alphabet_size or values.size):
    raise ValueError(
      f'{field} has {values.size} entries for {alphabet_size} symbols'
    )
  values = values.astype(float)
  # All priors have two symbols at least.
  copies = 1 if values.ndim else alphabet_size or 2
  check_concentrations(
    field, concentration, values.min(), copies * values.sum()
  )
  if values.ndim == 1:
    return tuple(float(value) for value in values)
  return float(values)


def check_concentrations(
  field: str, given: Any, least: np.ndarray, total: np.ndarray
) -> None:
  """Raises ValueError if float32 loses a concentration of a Dirichlet prior.

  An exact predictor sums over as many as 2^30 segments, and gives a weight as
  small as 2^-30 to the probability a / (A + 2^30) of a symbol that is not among
  2^30 others. So 2^30 A must be finite, with A the sum of the concentrations,
  and 2^-30 a / (A + 2^30) a normal number for each of them.

  Args:
    field: Name of the concentrations, for the message.
    given: The concentrations as they were given, likewise.
    least: Smallest concentration of every prior.
    total: Their sum A, of the same shape.
  """
  least, total = np.ravel(least), np.ravel(total)
  highest = float(_FLOAT32.max) / MAX_SEQ_LENGTH
  if not np.all(total <= highest):
    raise ValueError(
      f'{field} {given!r} add up to {total.max():.4g}; for float32 their sum '
      f'must be at most {highest:.4g}'
    )
  lowest = float(_FLOAT32.tiny) * MAX_SEQ_LENGTH * (total + MAX_SEQ_LENGTH)
  worst = np.argmin(least / lowest)
  if least[worst] < lowest[worst]:
    raise ValueError(
      f'{field} {given!r}: float32 loses {least[worst]:.4g} beside a sum of '
      f'{total[worst]:.4g}; it must be at least {lowest[worst]:.4g}'
    )


def fits_float32(values: np.ndarray, positive: bool = True) -> np.ndarray:
  """Whether float32 holds numbers; positive ones must be normal in it."""
  with np.errstate(over='ignore', under='ignore'):
    rounded = np.asarray(values).astype(np.float32)
  return np.isfinite(rounded) & ((rounded >= _FLOAT32.tiny) | (not positive))


def plain(value: Any) -> Any:
  """Returns `value` with lists as tuples and NumPy scalars as Python's."""
  if isinstance(value, Mapping):
    return {key: plain(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return tuple(plain(item) for item in value)
  if isinstance(value, (np.ndarray, jax.Array)):
    return plain(np.asarray(value).tolist())
  if isinstance(value, np.generic):
    return value.item()
  return value


def coerce(field: str, value: Any, annotation: Any) -> Any:
  """Returns a value as the type of a config field, or raises ValueError.

  An int serves where a number is wanted, and a list where a tuple is.

  Args:
    field: Path of the field, for the message.
    value: Python data, or a config.
    annotation: Type of the field: bool, int, float, str, Any, a dict, a tuple
      of one of these, a config class, or a union of them with None.
  """
  options = _options(annotation)
  value = plain(value)
  for option in options:
    try:
      return _as_option(field, value, option)
    except _OtherTypeError:
      pass
  allowed = ' or '.join(map(_describe, options))
  raise ValueError(f'{field} is {value!r}; it must be {allowed}')


class _OtherTypeError(Exception):
  """A value is not of the type that was tried."""


def _as_option(field: str, value: Any, option: Any) -> Any:
  """A value as one type; raises _OtherTypeError if it is of another."""
  if option is Any:
    return value
  nested = nested_class(option)
  if nested is not None:
    if isinstance(value, nested):
      return value
  elif typing.get_origin(option) is dict:
    check_mapping(field, value)
    return value
  elif typing.get_origin(option) is tuple:
    if isinstance(value, tuple):
      item_type, _ = typing.get_args(option)
      return tuple(_as_option(field, item, item_type) for item in value)
  elif option is float:
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
      try:
        return float(value)
      except OverflowError:
        pass
  elif option is int:
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
      return int(value)
  elif isinstance(value, option):
    return value
  raise _OtherTypeError


def from_text(field: str, text: str, annotation: Any) -> Any:
  """Returns the value of a config field that a text stands for.

  A whole number is an int however it is written: `1e4` is 10,000. `none` and
  `true` are what they are in JSON or Python, in any case of letters, where the
  field can be that. Names in a tuple need no quotes.

  Args:
    field: Path of the field, for the message.
    text: Text, as from a flag.
    annotation: Type of the field, as in `coerce`.

  Raises:
    ValueError: If it is not of that type.
  """
  options = _options(annotation)
  if type(None) in options and text.lower() in ('none', 'null'):
    return None
  if str in options:
    return text
  if bool in options and text.lower() in ('false', 'true'):
    return text.lower() == 'true'
  value = _literal(text)
  is_tuple = any(typing.get_origin(option) is tuple for option in options)
  if is_tuple and isinstance(value, str) and ',' in text:
    items = [item.strip() for item in text.split(',')]
    value = tuple(item for item in items if item)
  return coerce(field, value, annotation)


def _literal(text: str) -> Any:
  """The Python or JSON value in a text; the text itself if there is none."""
  for read in (ast.literal_eval, json.loads):
    try:
      return _whole(plain(read(text)))
    except (MemoryError, RecursionError, SyntaxError, TypeError, ValueError):
      pass
  return text


def _whole(value: Any) -> Any:
  """A value with whole floats up to 2^53, where they are exact, as ints."""
  if isinstance(value, dict):
    return {key: _whole(item) for key, item in value.items()}
  if isinstance(value, tuple):
    return tuple(map(_whole, value))
  if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
    return int(value)
  return value


_DESCRIPTIONS = {
  Any: 'a value',
  bool: 'true or false',
  dict[str, Any]: 'a dict such as {"depth": 7}',
  float: 'a number',
  int: 'an int',
  str: 'a string',
  tuple[float, ...]: 'a tuple of numbers such as 0.5,0.5',
  tuple[int, ...]: 'a tuple of ints such as 0,1',
  tuple[str, ...]: 'a tuple of names such as ptw,kt',
  type(None): 'None',
}


def _describe(option: Any) -> str:
  """The values of a type, for messages."""
  nested = nested_class(option)
  return f'a {nested.__name__}' if nested else _DESCRIPTIONS[option]


def _options(annotation: Any) -> tuple[Any, ...]:
  """The types of a union; of another type, itself."""
  is_union = isinstance(annotation, types.UnionType)
  return typing.get_args(annotation) if is_union else (annotation,)


_ConfigT = typing.TypeVar('_ConfigT', bound='Config')


def limited(default: Any, minimum: float, maximum: float | None = None) -> Any:
  """Returns a field of numbers in a range, which `Config.validate` checks.

  Args:
    default: Default of the field.
    minimum: Least number that is allowed, also of those in a tuple.
    maximum: Greatest that is allowed; for floats, the bound that is not.
  """
  limits = {'minimum': minimum}
  if maximum is not None:
    limits['maximum'] = maximum
  return dataclasses.field(default=default, metadata={'limits': limits})


class Config:
  """Base of the config dataclasses: known fields only, plain values only."""

  # Path of the config in that of an experiment, for messages.
  _path = ''

  def __setattr__(self, name: str, value: Any) -> None:
    fields = [field.name for field in dataclasses.fields(self)]
    if name not in fields:
      raise AttributeError(
        f'{type(self).__name__} has no field {name!r}; its fields are '
        f'{", ".join(fields)}{did_you_mean(name, fields)}'
      )
    object.__setattr__(self, name, plain(value))

  @classmethod
  def upgrade(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns saved values as they are called today.

    Args:
      values: Values by field, as an older version saved them.
    """
    return values

  def validate(self, path: str | None = None) -> None:
    """Raises ValueError, naming the field, if a value has no place in it.

    Types and ranges are those of the fields; a subclass adds what depends on
    several of them.

    Args:
      path: Path of this config, for messages, such as `eval.data`; None is
        where configs of its class are.
    """
    path = self._path if path is None else path
    annotations = typing.get_type_hints(type(self))
    for field in dataclasses.fields(self):
      name = f'{path}.{field.name}' if path else field.name
      value = getattr(self, field.name)
      value = coerce(name, value, annotations[field.name])
      if isinstance(value, Config):
        value.validate(name)
      limits = field.metadata.get('limits')
      if limits and value is not None:
        for item in value if isinstance(value, tuple) else (value,):
          check = check_int if isinstance(item, int) else check_float
          check(name, item, **limits)


@dataclasses.dataclass(kw_only=True)
class TrainConfig(Config):
  """How the network is trained.

  Attributes:
    model_init_seed: Second seed, of the initial parameters and the batches. A
      tuple of them trains an ensemble, one member for each, together.
    optimizer: Optimiser, a key of `optimizers.OPTIMIZERS`.
    optimizer_kwargs: Keyword arguments of it, but for the learning rate.
    learning_rate: Learning rate; the peak of its schedule.
    schedule: Schedule of the learning rate, a key of `optimizers.SCHEDULES`.
    warmup_steps: Steps in which the learning rate grows to its peak; None is a
      twentieth of all steps for schedules called warmup_..., else 0.
    target: Distribution of the next symbol that the loss of training is taken
      against: 'symbols', 'parameters' or 'bayes'. What is logged is the loss of
      the symbols.
    init_from: Folder of a saved run of the same network whose parameters
      training begins with, or `folder@step`; None draws them. An ensemble takes
      those of one network for all members, or of as many member by member.
    compute_dtype: Dtype in which the network computes loss and gradient:
      'float32', or 'bfloat16', which GPUs have units for and most CPUs do not.
      Parameters, optimiser and evaluation stay in float32.
    ema_decay: Decay of an average of the parameters over the steps, which is
      kept and evaluated beside them; in (0, 1), or None for no average.
    seq_length: T, symbols per sequence.
    seq_length_fixed: If False, each step draws its length uniformly from
      2, 4, 8, ..., the largest power of two up to `seq_length`.
    batch_size: B, sequences per step.
    microbatch_size: Sequences whose gradient is computed at a time, on each
      device; the batch's is the mean. Fewer take less memory. None is all of a
      device's, but for a Transformer on a CPU as many as its cache holds.
    clip_grad_norm: Largest global norm of a gradient; None does not clip.
    reset_predictor_init_state: If False, each batch starts from the final
      state of the one before it (networks with a state only).
    gradient_chunk_length: The gradient is cut every so many symbols, which
      bounds the memory; None keeps the whole sequence. A network with a state
      carries it over; for one without, every chunk is a context of its own.
    num_seed_shards: Groups into which the devices are divided, to share the
      members of an ensemble; the devices of a group share each batch. None is
      as many as divide both. It changes rounding and dropout masks only.
  """

  _path = 'train'

  model_init_seed: int | tuple[int, ...] = limited(0, 0, MAX_SEED)
  optimizer: str = 'adam'
  optimizer_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
  learning_rate: float = limited(2e-3, 0.0)
  schedule: str = 'constant'
  warmup_steps: int | None = limited(None, 0)
  target: str = 'symbols'
  init_from: str | None = None
  compute_dtype: str = 'float32'
  ema_decay: float | None = limited(None, 0.0, 1.0)
  seq_length: int = limited(32, 2, MAX_SEQ_LENGTH)
  seq_length_fixed: bool = True
  batch_size: int = limited(128, 1)
  microbatch_size: int | None = limited(None, 1)
  clip_grad_norm: float | None = limited(1.0, 0.0)
  reset_predictor_init_state: bool = True
  gradient_chunk_length: int | None = limited(None, 1)
  num_seed_shards: int | None = limited(None, 1)

  def validate(self, path: str | None = None) -> None:
    super().validate(path)
    seeds = self.model_init_seed
    if isinstance(seeds, tuple) and len(set(seeds)) != max(len(seeds), 1):
      raise ValueError(
        f'train.model_init_seed is {seeds!r}; an ensemble has at least one '
        'seed, and each once'
      )
    num_members = len(seeds) if isinstance(seeds, tuple) else 1
    if num_members % (self.num_seed_shards or 1):
      raise ValueError(
        f'train.num_seed_shards {self.num_seed_shards} does not divide the '
        f'{num_members} seeds of train.model_init_seed'
      )
    check_choice('train.target', self.target, TARGETS)
    check_choice('train.compute_dtype', self.compute_dtype, COMPUTE_DTYPES)
    if self.learning_rate == 0:
      raise ValueError('train.learning_rate is 0; nothing would be learned')
    if self.init_from == '':
      raise ValueError(
        "train.init_from is ''; it must be the folder of a run, or None"
      )
    if self.ema_decay == 0:
      raise ValueError('train.ema_decay is 0; None turns averaging off')
    if self.clip_grad_norm == 0:
      raise ValueError('train.clip_grad_norm is 0; None turns clipping off')


@dataclasses.dataclass(kw_only=True)
class ModelConfig(Config):
  """Which network is trained.

  Attributes:
    model_type: A key of `predictor_factories.PREDICTOR_FACTORIES`.
    architecture_kwargs: Keyword arguments of its factory, e.g. `hidden_size`.
  """

  _path = 'model'

  model_type: str = 'lstm'
  architecture_kwargs: dict[str, Any] = dataclasses.field(
    default_factory=lambda: {'hidden_size': 64}
  )


@dataclasses.dataclass(kw_only=True)
class ScheduleConfig(Config):
  """How long the network is trained, and what is kept of it.

  Attributes:
    training_steps: Number of gradient updates.
    num_saves: Snapshots of the parameters that are kept for good, to study
      learning after the fact; 1 keeps that of the last step and 0 none, and no
      step is saved twice.
    first_save: Step of the first snapshot, if there are several; the last one
      is of the last step. 0 is before training.
    saving_schedule_type: 'linear' or 'log': whether the steps of the snapshots
      grow by equal amounts or by equal factors.
    ckpt_frequency: The most steps that a killed run loses. Checkpoints are
      begun at every half of it: training goes on while the disk is written,
      and one is on disk before the next begins.
  """

  _path = 'schedule'

  training_steps: int = limited(10_000, 0)
  num_saves: int = limited(10, 0)
  first_save: int = limited(1, 0)
  saving_schedule_type: str = 'log'
  ckpt_frequency: int = limited(1_000, 1)

  def validate(self, path: str | None = None) -> None:
    super().validate(path)
    check_choice(
      'schedule.saving_schedule_type',
      self.saving_schedule_type,
      SAVING_SCHEDULES,
    )
    is_log = self.saving_schedule_type == 'log'
    last = max(self.training_steps, 1)
    check_int('schedule.first_save', self.first_save, int(is_log), last)


@dataclasses.dataclass(kw_only=True)
class LoggerConfig(Config):
  """How often the run reports.

  Attributes:
    log_frequency: Training steps from one log entry to the next. The steps
      between two logs are one compiled call.
  """

  _path = 'logger'

  log_frequency: int = limited(100, 1)


@dataclasses.dataclass(kw_only=True)
class EvalConfig(Config):
  """How the network is evaluated.

  Attributes:
    batch_size: Sequences per evaluation step.
  """

  _path = 'eval'

  batch_size: int = limited(512, 1)


@dataclasses.dataclass(kw_only=True)
class ExperimentConfig(Config):
  """The fields of every experiment; subclasses add data and evaluation.

  Attributes:
    name: Name of the run and of its folder; no path.
    imports: Modules of your own, which register what other fields name: names
      such as my_package.my_module, and paths of .py files. A path is relative
      to the working directory when it is set, and absolute from then on.
    seed: Seed from which, with `train.model_init_seed`, all randomness follows.
    model: The network.
    train: Its training.
    schedule: Its length.
    logger: Its reports.
    eval: Its evaluation.
  """

  name: str = 'experiment'
  imports: tuple[str, ...] = ()
  seed: int = limited(0, 0, MAX_SEED)
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
  schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
  logger: LoggerConfig = dataclasses.field(default_factory=LoggerConfig)
  eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)

  def __setattr__(self, name: str, value: Any) -> None:
    value = plain(value)
    if name == 'imports' and isinstance(value, tuple):
      value = tuple(map(absolute_import, value))
    super().__setattr__(name, value)

  def validate(self, path: str | None = None) -> None:
    super().validate(path)
    check_name('name', self.name)
    for module in self.imports:
      check_import('imports', module)
    _check_finite('', to_dict(self))

  def resolved(self) -> 'ExperimentConfig':
    """Returns a copy in which what is None or left out follows from the rest.

    Two configs that resolve to the same describe the same run.
    """
    return copied(self)


def _check_finite(field: str, value: Any) -> None:
  """Raises ValueError if a number is not finite: JSON has no others."""
  if isinstance(value, Mapping):
    for key, item in value.items():
      _check_finite(f'{field}.{key}' if field else key, item)
  elif isinstance(value, tuple):
    for item in value:
      _check_finite(field, item)
  elif isinstance(value, float) and not math.isfinite(value):
    raise ValueError(f'{field} is {value!r}; all numbers must be finite')


def to_dict(config: Config) -> dict[str, Any]:
  """Returns the config as nested dicts of plain data, ready for JSON."""
  return plain(dataclasses.asdict(config))


def copied(config: _ConfigT) -> _ConfigT:
  """Returns a copy that shares nothing with a config.

  Lists and arrays that were put into its dicts are tuples in it, as they are
  where it is saved and loaded.
  """
  config = copy.deepcopy(config)
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    is_config = isinstance(value, Config)
    setattr(config, field.name, copied(value) if is_config else value)
  return config


def from_dict(
  config_class: type[_ConfigT], values: Mapping[str, Any], field: str = ''
) -> _ConfigT:
  """Returns the config that `to_dict` made the values of.

  Args:
    config_class: The dataclass to build.
    values: Nested dicts, as from `to_dict` or `json.load`. Fields left out
      keep their defaults.
    field: Path of the config inside the one it is part of, for messages.

  Raises:
    ValueError: If a field is unknown, or a value is not of its type.
  """
  types_by_field = typing.get_type_hints(config_class)
  check_mapping(field or config_class.__name__, values)
  values = config_class.upgrade(values)
  check_kwargs(field or config_class.__name__, values, types_by_field)
  kwargs = {}
  for name, value in values.items():
    path = f'{field}.{name}' if field else name
    nested = nested_class(types_by_field[name])
    if nested is not None and isinstance(value, Mapping):
      value = from_dict(nested, value, path)
    kwargs[name] = coerce(path, value, types_by_field[name])
  return config_class(**kwargs)


def differences(old: Any, new: Any, path: str = '') -> list[str]:
  """Returns `path: old -> new` for every field that differs.

  Args:
    old: Nested dicts, as from `to_dict`.
    new: Nested dicts to compare with.
    path: Path of the two dicts inside the whole config.
  """
  if isinstance(old, Mapping) and isinstance(new, Mapping):
    lines = []
    for key in sorted({*old, *new}):
      inner = f'{path}.{key}' if path else key
      lines += differences(old.get(key, 'unset'), new.get(key, 'unset'), inner)
    return lines
  return [] if old == new else [f'{path}: {old!r} -> {new!r}']


def nested_class(annotation: Any) -> type[Config] | None:
  """Returns the Config class in `X` or `X | None`, if there is one."""
  for option in _options(annotation):
    if isinstance(option, type) and issubclass(option, Config):
      return option
  return None
