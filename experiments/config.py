"""Config of a meta-learning experiment: its data and its evaluation.

  config = ExperimentConfig(name='my_run')
  config.train.seq_length = 64
  config.resolved()  # What the fields that are None stand for.

Types and ranges of the fields are checked by `validate`; names are looked up in
experiments/constants.py. Settings by path, as flags give them:

  overrides = parse_overrides(config, ['train.seq_length=64'])
  config = with_overrides(config, overrides)
"""

from collections.abc import Iterable
from collections.abc import Mapping
import copy
import dataclasses
import itertools
import re
import typing
from typing import Any
from typing import NamedTuple

from nonstationary_mbml import base_config
from nonstationary_mbml import predictor_factories
from nonstationary_mbml.experiments import constants

# The source's own, and references.
_OPTIMAL_PREDICTORS = (constants.EXACT, 'ptw', 'lad', 'kt')

_EVAL_DATA = 'eval.data.'


# Fields of `train` that come nearest to the Bayes predictor in 5,000 steps, of
# what the sweep `recipes` tries; one peak for all networks.
RECIPE = {
  'optimizer': 'muon',
  'schedule': 'warmup_cosine',
  'learning_rate': 1e-2,
}


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
    parameter_distribution_params: Its parameters: the concentrations of a
      Dirichlet, or one number that all of them are.
    trajectory_generator: A key of `TRAJECTORY_GENERATORS`, which says where
      segments end.
    trajectory_generator_kwargs: Keyword arguments of its constructor:
      `shift_period` of regular_shift, `shift_distribution` and
      `shift_parameters` of random_shift, optionally `depth` of ptw, `sources`
      of mixture.
  """

  _path = 'data'

  iid_distribution: str = 'categorical'
  iid_distribution_kwargs: dict[str, Any] = dataclasses.field(
    default_factory=lambda: {'feature_size': 2}
  )
  parameter_distribution: str = 'dirichlet'
  parameter_distribution_kwargs: dict[str, Any] = dataclasses.field(
    default_factory=dict
  )
  parameter_distribution_params: tuple[float, ...] | float = (0.5, 0.5)
  trajectory_generator: str = 'ptw'
  trajectory_generator_kwargs: dict[str, Any] = dataclasses.field(
    default_factory=dict
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
      same sequences. 'exact' is the source's `bayes_predictor`; where it has
      none, its `reference_predictors`.
    optimal_predictors_kwargs: Keyword arguments of their constructors, by name.
      Those that are not given follow from the source: `concentration` from its
      Dirichlet prior, `depth` from the source's depth or the sequence length,
      and the parameters of its segment-length distribution for the predictor of
      the same name.
    data: The source to evaluate on; None is that of training.
  """

  seq_length: int | None = base_config.limited(
    None, 2, base_config.MAX_SEQ_LENGTH
  )
  chunk_length: int | None = base_config.limited(None, 1)
  optimal_predictors: tuple[str, ...] = _OPTIMAL_PREDICTORS
  optimal_predictors_kwargs: dict[str, Any] = dataclasses.field(
    default_factory=dict
  )
  data: DataConfig | None = None

  @classmethod
  def upgrade(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
    # The default was called 'auto'.
    if str(values.get('optimal_predictors')).lower() == 'auto':
      return {**values, 'optimal_predictors': _OPTIMAL_PREDICTORS}
    return values

  def validate(self, path: str | None = None) -> None:
    super().validate(path)
    for name, value in self.optimal_predictors_kwargs.items():
      base_config.check_mapping(
        f'eval.optimal_predictors_kwargs[{name}]', value
      )


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

  def resolved(self) -> 'ExperimentConfig':
    """Returns a copy in which what is None or left out follows from the rest.

    Evaluation takes length and source from training, and the arguments of
    exact predictors from its source; a symmetric prior has a concentration for
    every symbol; the window of a sliding-window Transformer
    and the size of stacks take the length of the sequence. Names become lower
    case.

    Raises:
      ValueError: If a source or predictor cannot be built.
    """
    config = base_config.copied(self)
    evaluation = config.eval
    if evaluation.seq_length is None:
      evaluation.seq_length = config.train.seq_length
    path = 'eval.data'
    if evaluation.data is None:
      evaluation.data, path = copy.deepcopy(config.data), 'data'
    for data, data_path in ((config.data, 'data'), (evaluation.data, path)):
      data.parameter_distribution_params = constants.prior_parameters(
        data, data_path
      )
      data.iid_distribution = data.iid_distribution.lower()
      data.parameter_distribution = data.parameter_distribution.lower()
      data.trajectory_generator = data.trajectory_generator.lower()
    kwargs = constants.optimal_predictors_kwargs(
      evaluation, constants.build_data_generator(evaluation.data, path)
    )
    evaluation.optimal_predictors = tuple(kwargs)
    evaluation.optimal_predictors_kwargs = kwargs
    config.model = predictor_factories.resolved(
      config.model, config.train.seq_length
    )
    return config


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
      annotation = _annotation_at(type(config), path)
      nested = base_config.nested_class(annotation)
      if nested is not None and text.lower() not in ('none', 'null'):
        fields = ', '.join(sorted(typing.get_type_hints(nested)))
        raise ValueError(f'it is a config; set one of its fields {fields}')
      value = base_config.from_text('the value', text, annotation)
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


def post_process_config(config: ExperimentConfig) -> ExperimentConfig:
  """Returns `config.resolved()` after `config.validate()`, to look at.

  Nothing needs it: whatever is built from a config resolves it first, and a
  config is saved as it was given.

  Raises:
    ValueError: If a value is out of range, or a name unknown.
  """
  config.validate()
  return config.resolved()
