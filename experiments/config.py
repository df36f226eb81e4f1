"""Config of a meta-learning experiment: its data and its evaluation.

  config = post_process_config(ExperimentConfig(name='my_run'))

Field names and values are checked by `validate`, which `post_process_config`
calls; names are looked up in experiments/constants.py. To start from a run that
was saved, and let what followed from its fields follow again:

  config = without_derived(saved_runs.load_config('runs/my_run'))
  overrides = parse_overrides(config, ['train.seq_length=64'])
  config = post_process_config(with_overrides(config, overrides))
"""

import ast
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
import copy
import dataclasses
import functools
import itertools
import json
import re
import types
import typing
from typing import Any
from typing import NamedTuple

from nonstationary_mbml import base_config
from nonstationary_mbml.experiments import ptw_predictors

# The source's own Bayes predictor, and the references.
AUTO = 'auto'
_OWN_PREDICTORS = {
  'iid_ptw_cat': 'ptw',
  'lin': 'lad',
  'ptw': 'ptw',
  'random_shift': 'random_shift',
  # Not exact, but designed for it.
  'recurring': 'forget_me_not',
  'regular_shift': 'regular_shift',
  'static': 'kt',
}
_REFERENCES = ('ptw', 'lad', 'kt')
PTW_SOURCES = ('ptw', 'iid_ptw_cat')
_OF_A_DEPTH = (*PTW_SOURCES, 'forget_me_not')
_EVAL_DATA = 'eval.data.'
# Predictors that take the arguments of the source of their name.
_LIKE_THEIR_SOURCE = ('random_shift', 'regular_shift')


@dataclasses.dataclass(kw_only=True)
class DataConfig(base_config.Config):
  """The source of the sequences.

  Attributes:
    iid_distribution: Distribution of the symbols in a segment, a key of
      `DISTRIBUTIONS`.
    iid_distribution_kwargs: Keyword arguments of its constructor;
      `feature_size` is the alphabet size K of a categorical.
    parameter_distribution: Distribution of the parameters of a segment.
    parameter_distribution_kwargs: Keyword arguments of its constructor;
      `feature_size` follows from `iid_distribution` when left out.
    parameter_distribution_params: Its parameters: the concentration of a
      Dirichlet.
    trajectory_generator: A key of `TRAJECTORY_GENERATORS`, which says where
      segments end.
    trajectory_generator_kwargs: Keyword arguments of its constructor:
      `shift_period` of regular_shift, `shift_distribution` and
      `shift_parameters` of random_shift, optionally `depth` of ptw.
  """

  iid_distribution: str = 'categorical'
  iid_distribution_kwargs: dict[str, Any] = dataclasses.field(
    default_factory=lambda: {'feature_size': 2}
  )
  parameter_distribution: str = 'dirichlet'
  parameter_distribution_kwargs: dict[str, Any] = dataclasses.field(
    default_factory=dict
  )
  parameter_distribution_params: tuple[float, ...] = (0.5, 0.5)
  trajectory_generator: str = 'ptw'
  trajectory_generator_kwargs: dict[str, Any] = dataclasses.field(
    default_factory=dict
  )

  def validate(self, path: str = 'data') -> None:
    """Raises ValueError, naming the field, if a value has the wrong type.

    Args:
      path: Path of this config, for the message: `data` or `eval.data`.
    """
    for field in (
      'iid_distribution',
      'parameter_distribution',
      'trajectory_generator',
    ):
      value = getattr(self, field)
      if not isinstance(value, str):
        raise ValueError(f'{path}.{field} is {value!r}; it must be a name')
      kwargs = f'{field}_kwargs'
      base_config.check_mapping(f'{path}.{kwargs}', getattr(self, kwargs))
    base_config.check_vector(
      f'{path}.parameter_distribution_params',
      self.parameter_distribution_params,
    )


@dataclasses.dataclass(kw_only=True)
class EvalConfig(base_config.EvalConfig):
  """How the network is evaluated, and with which exact predictors.

  Attributes:
    seq_length: T of the evaluation; None is that of training.
    chunk_length: The network reads its sequences in pieces of this length, to
      save memory: with its state carried over, or, for a network without a
      state, each a context of its own. None is the whole sequence.
    optimal_predictors: Names in `OPTIMAL_PREDICTORS` that are evaluated on the
      same sequences; 'auto' is the source's own Bayes predictor, and PTW, LAD
      and KT as references.
    optimal_predictors_kwargs: Keyword arguments of their constructors, by name.
      Those that are not given follow from the source: `concentration` from its
      Dirichlet prior, `depth` from the source's depth or the sequence length,
      and the parameters of its segment-length distribution for the predictor of
      the same name.
    data: The source to evaluate on; None is that of training.
  """

  seq_length: int | None = None
  chunk_length: int | None = None
  optimal_predictors: tuple[str, ...] | str = AUTO
  optimal_predictors_kwargs: dict[str, Any] = dataclasses.field(
    default_factory=dict
  )
  data: DataConfig | None = None

  def validate(self) -> None:
    """Raises ValueError, naming the field, if a value is out of range."""
    super().validate()
    if self.seq_length is not None:
      base_config.check_int(
        'eval.seq_length', self.seq_length, 2, base_config.MAX_SEQ_LENGTH
      )
    if self.chunk_length is not None:
      base_config.check_int('eval.chunk_length', self.chunk_length, 1)
    names = self.optimal_predictors
    is_auto = isinstance(names, str) and names.lower() == AUTO
    if not is_auto and not (
      isinstance(names, tuple) and all(isinstance(name, str) for name in names)
    ):
      raise ValueError(
        f'eval.optimal_predictors is {names!r}; it must be {AUTO!r} or a tuple '
        'of names'
      )
    kwargs = self.optimal_predictors_kwargs
    base_config.check_mapping('eval.optimal_predictors_kwargs', kwargs)
    if not is_auto:
      base_config.check_kwargs(
        'eval.optimal_predictors_kwargs',
        {name.lower(): value for name, value in kwargs.items()},
        [name.lower() for name in names],
      )
    for name, value in kwargs.items():
      base_config.check_mapping(
        f'eval.optimal_predictors_kwargs[{name}]', value
      )
    if self.data is not None:
      base_config.check_instance('eval.data', self.data, DataConfig)
      self.data.validate('eval.data')


@dataclasses.dataclass(kw_only=True)
class ExperimentConfig(base_config.ExperimentConfig):
  """A network, a source to train it on, and an evaluation.

  Attributes:
    data: The source it is trained on.
    eval: The evaluation.
  """

  name: str = 'lstm_ptw'
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)


class SweepPoint(NamedTuple):
  """One experiment of a sweep.

  Attributes:
    config: Its config, whose name is that of the point.
    settings: Values that the sweep has set, by path: the name of a named value,
      else the value.
  """

  config: ExperimentConfig
  settings: dict[str, Any]


@dataclasses.dataclass(kw_only=True)
class ExperimentSweep(base_config.Config):
  """Many experiments around one.

  Every combination of the general sweep's values is run, once with each
  combination of every specific sweep's. Keys are paths of fields, and values
  are in a tuple, or in a dict if they have names; a value of a path that leads
  to a config is a dict of its fields:

    ExperimentSweep(
      general_sweep={'seed': (0, 1), 'train.learning_rate': (1e-3, 3e-3)},
      specific_sweeps=(
        {'model': {'small': {'architecture_kwargs': {'hidden_size': 32}}}},
        {'model.model_type': ('stack_rnn',),
         'model.architecture_kwargs.n_stacks': (1, 2)},
      ),
    ).expand()  # 4 LSTMs, called small, and 8 Stack-RNNs

  Attributes:
    general_sweep: Values by path.
    specific_sweeps: Further values by path, one dict per group.
    base_config: Values of all other fields.
  """

  general_sweep: dict[str, Any] = dataclasses.field(default_factory=dict)
  specific_sweeps: tuple[dict[str, Any], ...] = ()
  base_config: ExperimentConfig = dataclasses.field(
    default_factory=ExperimentConfig
  )

  def points(self) -> list[SweepPoint]:
    """Returns the points, each named by the base and by what was set.

    A named value is shown by its name, any other as `path=value`:

      base,seed=0,train.learning_rate=0.001,small

    Slashes, which the name of a folder cannot have, become `-`.

    Raises:
      ValueError: If a path is unknown, its values are neither a sequence nor
        named, two points have the same name, or the base is called by a path.
    """
    base_config.check_name('base_config.name', self.base_config.name)
    points = {}
    for specific in self.specific_sweeps or ({},):
      sweep = {**self.general_sweep, **specific}
      choices = [_choices(path, values) for path, values in sweep.items()]
      for chosen in itertools.product(*choices):
        overrides, settings, shown = {}, {}, [self.base_config.name]
        for path, (label, value, is_named) in zip(sweep, chosen, strict=True):
          with base_config.naming(path):
            overrides |= _fields_set(path, value)
          settings[path] = label
          text = label if is_named else f'{path}={label}'
          shown.append(re.sub(r'[/\\]', '-', text))
        config = with_overrides(self.base_config, overrides)
        config.name = ','.join(shown)
        if config.name in points:
          raise ValueError(f'two points of the sweep are called {config.name}')
        points[config.name] = SweepPoint(config, settings)
    return list(points.values())

  def expand(self) -> list[ExperimentConfig]:
    """Returns the configs of all `points`; raises as it does."""
    return [point.config for point in self.points()]


def _choices(path: str, values: Any) -> list[tuple[Any, Any, bool]]:
  """Label and value of each sweep value, and whether it is named."""
  if isinstance(values, Mapping):
    return [(name, value, True) for name, value in values.items()]
  if not isinstance(values, tuple):
    raise ValueError(f'{path} is swept over {values!r}, not a sequence')
  return [(value, value, False) for value in values]


def _fields_set(path: str, value: Any) -> dict[str, Any]:
  """The overrides that a value stands for: of a config, those of its fields."""
  annotation = _annotation_at(ExperimentConfig, path)
  if base_config.nested_class(annotation) is None:
    return {path: value}
  if not isinstance(value, Mapping):
    raise ValueError(f'{value!r} is no dict of the fields of a config')
  return {f'{path}.{field}': inner for field, inner in value.items()}


def with_overrides(
  config: ExperimentConfig, overrides: Mapping[str, Any]
) -> ExperimentConfig:
  """Returns a copy with other values at some paths.

  Args:
    config: Config to copy; it stays as it is.
    overrides: Values by path, e.g. `train.batch_size` or
      `model.architecture_kwargs.hidden_size`. Those inside `eval.data` come
      last; where it is None, they change a copy of `data`.

  Raises:
    ValueError: If a path leads to no field.
  """
  config = copy.deepcopy(config)
  # eval.data last: it may start as a copy of `data` with all its overrides.
  for path in sorted(overrides, key=lambda path: path.startswith(_EVAL_DATA)):
    with base_config.naming(path):
      _annotation_at(type(config), path)
      if path.startswith(_EVAL_DATA) and config.eval.data is None:
        config.eval.data = copy.deepcopy(config.data)
      *parents, last = path.split('.')
      target = config
      for name in parents:
        target = _inside(target, name)
      if isinstance(target, dict):
        target[last] = base_config.plain(overrides[path])
      else:
        _inside(target, last)
        setattr(target, last, overrides[path])
  return config


def _inside(target: Any, name: str) -> Any:
  if isinstance(target, base_config.Config):
    return getattr(target, name)
  if isinstance(target, dict):
    return target.setdefault(name, {})
  raise ValueError(f'{target!r} has no fields')


def parse_overrides(
  config: ExperimentConfig, items: Iterable[str]
) -> dict[str, Any]:
  """Returns the overrides that texts stand for, for `with_overrides`.

    ['train.learning_rate=3e-4', 'model.architecture_kwargs.core=gru']
    {'train.learning_rate': 3e-4, 'model.architecture_kwargs.core': 'gru'}

  A value is read as the type of its field: `1e4` is an int where the field is
  one, `none` is None where that is allowed, and `0.5,0.5` a tuple. Tuples and
  dicts, and all that is inside of a dict, are Python or JSON; there, what is
  neither is a string, and a whole number is an int however it is written:
  `1e2` and `100.0` are 100. What takes a number takes an int.

  Args:
    config: Config to be overridden.
    items: Settings, `path=value` each. Of two for the same path, the last wins.

  Raises:
    ValueError: If a path leads to no field, or a value is not of its type.
  """
  overrides = {}
  for item in items:
    with base_config.naming(f'--set {item!r}'):
      path, equals, text = item.partition('=')
      if not path or not equals:
        raise ValueError('it must be path=value, as in train.batch_size=64')
      value = _parse(text, _annotation_at(type(config), path))
      overrides.pop(path, None)  # Its place is that of the last.
      overrides[path] = value
  return overrides


def _annotation_at(config_class: type[base_config.Config], path: str) -> Any:
  """The type of the field at a path; `Any` inside of a dict."""
  annotation = config_class
  for name in path.split('.'):
    nested = base_config.nested_class(annotation)
    if nested is not None:
      fields = typing.get_type_hints(nested)
      base_config.check_choice('field', name, fields)
      annotation = fields[name]
    elif annotation is not Any and typing.get_origin(annotation) is not dict:
      raise ValueError(f'a value has no fields, and so no {name!r}')
    elif not name:
      raise ValueError('a name in the path is empty')
    else:
      annotation = Any
  return annotation


def _parse(text: str, annotation: Any) -> Any:
  """The value of an annotated type that a text stands for."""
  is_union = isinstance(annotation, types.UnionType)
  options = typing.get_args(annotation) if is_union else (annotation,)
  nested = base_config.nested_class(annotation)
  for option in options:
    if option is not nested:
      try:
        return _READERS[option].read(text)
      except ValueError:
        pass
  if nested is not None:
    fields = ', '.join(sorted(typing.get_type_hints(nested)))
    raise ValueError(f'it is a config; set one of its fields {fields}')
  allowed = ' or '.join(_READERS[option].allowed for option in options)
  raise ValueError(f'the value must be {allowed}')


def _read_bool(text: str) -> bool:
  if text.lower() not in ('true', 'false'):
    raise ValueError
  return text.lower() == 'true'


def _read_none(text: str) -> None:
  if text.lower() not in ('none', 'null'):
    raise ValueError


def _read_literal(text: str) -> Any:
  for read in (ast.literal_eval, json.loads):
    try:
      return base_config.plain(read(text))
    except (MemoryError, RecursionError, SyntaxError, TypeError, ValueError):
      pass
  raise ValueError


def _read_any(text: str) -> Any:
  try:
    return _whole(_read_literal(text))
  except ValueError:
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


def _read_dict(text: str) -> dict[str, Any]:
  value = _whole(_read_literal(text))
  if not isinstance(value, dict):
    raise ValueError
  return value


def _read_tuple(text: str, read_item: Callable[[str], Any]) -> tuple[Any, ...]:
  try:
    items = _read_literal(text)
  except ValueError:
    if ',' not in text:
      raise
    # Names without quotes.
    items = tuple(item.strip() for item in text.split(',') if item.strip())
  if not isinstance(items, tuple):
    raise ValueError
  return tuple(read_item(str(item)) for item in items)


class _Reader(NamedTuple):
  """A type that a text can be read as.

  Attributes:
    allowed: Description of the texts that are allowed, for messages.
    read: Function from the text to the value; raises ValueError.
  """

  allowed: str
  read: Callable[[str], Any]


_READERS = {
  Any: _Reader('a value', _read_any),
  bool: _Reader('true or false', _read_bool),
  dict[str, Any]: _Reader('a dict such as {"depth": 7}', _read_dict),
  float: _Reader('a number', float),
  int: _Reader('an int', base_config.read_int),
  str: _Reader('a string', str),
  tuple[float, ...]: _Reader(
    'a tuple of numbers such as 0.5,0.5',
    functools.partial(_read_tuple, read_item=float),
  ),
  tuple[int, ...]: _Reader(
    'a tuple of ints such as 0,1',
    functools.partial(_read_tuple, read_item=base_config.read_int),
  ),
  tuple[str, ...]: _Reader(
    'a tuple of names such as ptw,kt',
    functools.partial(_read_tuple, read_item=str),
  ),
  type(None): _Reader('None', _read_none),
}


def post_process_config(config: ExperimentConfig) -> ExperimentConfig:
  """Returns a copy in which fields that are None are filled from the others.

  Evaluation takes length and source from training, and the arguments of exact
  predictors from its source; PTW's depth, the window of a sliding-window
  Transformer and the size of the stacks take the length of the
  sequence. Names become lower case. The config that is given stays as it is.

  Raises:
    ValueError: If a value is out of range.
  """
  config.validate()
  config = copy.deepcopy(config)
  config.model.model_type = config.model.model_type.lower()
  evaluation = config.eval
  if evaluation.seq_length is None:
    evaluation.seq_length = config.train.seq_length
  if evaluation.data is None:
    evaluation.data = copy.deepcopy(config.data)
  for data in (config.data, evaluation.data):
    data.iid_distribution = data.iid_distribution.lower()
    data.parameter_distribution = data.parameter_distribution.lower()
    data.trajectory_generator = data.trajectory_generator.lower()
  source = evaluation.data.trajectory_generator
  names = evaluation.optimal_predictors
  given = {
    name.lower(): value
    for name, value in evaluation.optimal_predictors_kwargs.items()
  }
  if isinstance(names, str):
    own = _OWN_PREDICTORS.get(source)
    # Each once, the source's own first.
    names = tuple(dict.fromkeys((own, *_REFERENCES) if own else _REFERENCES))
    base_config.check_kwargs('eval.optimal_predictors_kwargs', given, names)
  kwargs = {name.lower(): dict(given.get(name.lower(), {})) for name in names}
  evaluation.optimal_predictors = tuple(kwargs)
  for name, predictor_kwargs in kwargs.items():
    if name in _OF_A_DEPTH:
      _fill(
        predictor_kwargs,
        'depth',
        _ptw_depth(evaluation.data, evaluation.seq_length),
      )
    of_source = evaluation.data.trajectory_generator_kwargs
    # All parameters of one distribution: never half of one and half of another.
    if name in _LIKE_THEIR_SOURCE and name == source:
      if not of_source.keys() & predictor_kwargs.keys():
        predictor_kwargs.update(of_source)
    if evaluation.data.parameter_distribution == 'dirichlet':
      _fill(
        predictor_kwargs,
        'concentration',
        evaluation.data.parameter_distribution_params,
      )
  evaluation.optimal_predictors_kwargs = kwargs

  # Assigned anew: lists that were put into the dict become tuples.
  architecture = base_config.plain(config.model.architecture_kwargs)
  model_type = config.model.model_type
  if model_type == 'sliding_window_transformer':
    _fill(architecture, 'context_length', config.train.seq_length)
  core = str(architecture.get('core')).lower()
  if 'stack_rnn' in (model_type, core):
    _fill(architecture, 'stack_size', config.train.seq_length)
  config.model.architecture_kwargs = architecture
  return config


def without_derived(config: ExperimentConfig) -> ExperimentConfig:
  """Returns a copy without what `post_process_config` would fill in again.

    post_process_config(without_derived(config)) == post_process_config(config)

  So what followed from a field follows again after the field has changed. What
  was given, but is what would be filled in, goes too.

  Args:
    config: Config, complete or not.

  Raises:
    ValueError: If a value is out of range.
  """
  complete = post_process_config(config)
  reduced = complete

  def attempt(forget: Callable[[ExperimentConfig], None]) -> None:
    nonlocal reduced
    candidate = copy.deepcopy(reduced)
    forget(candidate)
    try:
      if post_process_config(candidate) == complete:
        reduced = candidate
    except ValueError:
      pass  # The rest does not fit the defaults.

  for field, default in (
    ('seq_length', None),
    ('data', None),
    ('optimal_predictors', AUTO),
  ):
    attempt(lambda c, f=field, d=default: setattr(c.eval, f, d))
  of_source = tuple(complete.eval.data.trajectory_generator_kwargs)
  for name in complete.eval.optimal_predictors:
    for keys in (('depth',), ('concentration',), of_source):
      attempt(
        lambda c, n=name, k=keys: _drop(c.eval.optimal_predictors_kwargs[n], k)
      )
    if not reduced.eval.optimal_predictors_kwargs[name]:
      attempt(lambda c, n=name: _drop(c.eval.optimal_predictors_kwargs, (n,)))
  for key in ('context_length', 'stack_size'):
    attempt(lambda c, k=key: _drop(c.model.architecture_kwargs, (k,)))
  return reduced


def _drop(values: dict[str, Any], keys: Iterable[str]) -> None:
  for key in keys:
    values.pop(key, None)


def _fill(kwargs: dict[str, Any], key: str, value: Any) -> None:
  if kwargs.get(key) is None:
    kwargs[key] = value


def _ptw_depth(data: DataConfig, seq_length: int) -> int:
  """The depth of the source, if it has one; else the least for the length."""
  if data.trajectory_generator in PTW_SOURCES:
    depth = data.trajectory_generator_kwargs.get('depth')
    if depth is not None:
      return depth
  return ptw_predictors.min_depth(seq_length)
