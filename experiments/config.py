"""Config of a meta-learning experiment: its data and its evaluation.

  config = post_process_config(ExperimentConfig(name='my_run'))

Field names and values are checked by `validate`, which `post_process_config`
calls; names are looked up in experiments/constants.py.
"""

from collections.abc import Mapping
import copy
import dataclasses
import itertools
from typing import Any

from nonstationary_mbml import base_config
from nonstationary_mbml.experiments import ptw_predictors

# The source's own Bayes predictor, and the references.
AUTO = 'auto'
_OWN_PREDICTORS = {
  'iid_ptw_cat': 'ptw',
  'lin': 'lad',
  'ptw': 'ptw',
  'random_shift': 'random_shift',
  # Not exact, but made for it.
  'recurring': 'forget_me_not',
  'regular_shift': 'regular_shift',
  'static': 'kt',
}
_REFERENCES = ('ptw', 'lad', 'kt')
_PTW_SOURCES = ('ptw', 'iid_ptw_cat')
_OF_A_DEPTH = (*_PTW_SOURCES, 'forget_me_not')
# Predictors that take the arguments of the source of their name.
_LIKE_THEIR_SOURCE = ('random_shift', 'regular_shift')


@dataclasses.dataclass(kw_only=True)
class DataConfig(base_config.Config):
  """The source of the sequences.

  Attributes:
    iid_distribution: Of the symbols in a segment, a key of `DISTRIBUTIONS`.
    iid_distribution_kwargs: For its constructor; `feature_size` is the alphabet
      size K of a categorical.
    parameter_distribution: Of the parameters of a segment.
    parameter_distribution_kwargs: For its constructor; `feature_size` follows
      from `iid_distribution` when left out.
    parameter_distribution_params: Its parameters: the concentration of a
      Dirichlet.
    trajectory_generator: A key of `TRAJECTORY_GENERATORS`, which says where
      segments end.
    trajectory_generator_kwargs: For its constructor: `shift_period` of
      regular_shift, `shift_distribution` and `shift_parameters` of
      random_shift, optionally `depth` of ptw.
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

  def validate(self) -> None:
    """Raises ValueError, naming the field, if a value has the wrong type."""
    for field in (
      'iid_distribution_kwargs',
      'parameter_distribution_kwargs',
      'trajectory_generator_kwargs',
    ):
      base_config.check_mapping(f'data.{field}', getattr(self, field))
    for field in (
      'iid_distribution',
      'parameter_distribution',
      'trajectory_generator',
    ):
      base_config.check_instance(f'data.{field}', getattr(self, field), str)


@dataclasses.dataclass(kw_only=True)
class EvalConfig(base_config.EvalConfig):
  """How the network is evaluated, and beside whom.

  Attributes:
    seq_length: T of the evaluation; None is that of training.
    chunk_length: The network reads its sequences in pieces of this length, to
      save memory: with its state carried over, or, for a network without a
      state, each a context of its own. None is the whole sequence.
    optimal_predictors: Names in `OPTIMAL_PREDICTORS` that are evaluated on the
      same sequences; 'auto' is the source's own Bayes predictor, and PTW, LAD
      and KT as references.
    optimal_predictors_kwargs: For their constructors, by name. What is not
      given follows from the source: `concentration` from its Dirichlet prior,
      `depth` from the source's depth or the sequence length, and the law of its
      segment lengths for the predictor of the same name.
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
      base_config.check_kwargs('eval.optimal_predictors_kwargs', kwargs, names)
    for name, value in kwargs.items():
      base_config.check_mapping(
        f'eval.optimal_predictors_kwargs[{name}]', value
      )
    if self.data is not None:
      base_config.check_instance('eval.data', self.data, DataConfig)
      self.data.validate()


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


@dataclasses.dataclass(kw_only=True)
class ExperimentSweep(base_config.Config):
  """Many experiments around one.

  Every combination of the general sweep's values is run, once with each
  combination of every specific sweep's. Keys are paths of fields:

    ExperimentSweep(
      general_sweep={'seed': (0, 1), 'train.learning_rate': (1e-3, 3e-3)},
      specific_sweeps=(
        {'model.model_type': ('lstm',)},
        {'model.model_type': ('stack_rnn',),
         'model.architecture_kwargs.n_stacks': (1, 2)},
      ),
    ).expand()  # 4 LSTMs and 8 Stack-RNNs

  Attributes:
    general_sweep: Values by path.
    specific_sweeps: Further values by path, one dict per group.
    base_config: What the sweeps leave as it is.
  """

  general_sweep: dict[str, tuple[Any, ...]] = dataclasses.field(
    default_factory=dict
  )
  specific_sweeps: tuple[dict[str, tuple[Any, ...]], ...] = ()
  base_config: ExperimentConfig = dataclasses.field(
    default_factory=ExperimentConfig
  )

  def expand(self) -> list[ExperimentConfig]:
    """Returns the configs, each named by the base and by what was set.

    Raises:
      ValueError: If a path is unknown, or its values are not a sequence.
    """
    configs = []
    for specific in self.specific_sweeps or ({},):
      sweep = {**self.general_sweep, **specific}
      for path, values in sweep.items():
        if not isinstance(values, tuple):
          raise ValueError(f'{path} is swept over {values!r}, not a sequence')
      for values in itertools.product(*sweep.values()):
        overrides = dict(zip(sweep, values, strict=True))
        config = with_overrides(self.base_config, overrides)
        settings = [f'{path}={value}' for path, value in overrides.items()]
        config.name = ','.join([self.base_config.name, *settings])
        configs.append(config)
    return configs


def with_overrides(
  config: ExperimentConfig, overrides: Mapping[str, Any]
) -> ExperimentConfig:
  """Returns a copy with other values at some paths.

  Args:
    config: Stays as it is.
    overrides: Values by path, e.g. `train.batch_size` or
      `model.architecture_kwargs.hidden_size`.

  Raises:
    ValueError: If a path leads to no field.
  """
  config = copy.deepcopy(config)
  for path, value in overrides.items():
    *parents, last = path.split('.')
    target = config
    for name in parents:
      target = _get_field(path, target, name)
    if isinstance(target, dict):
      target[last] = base_config.plain(value)
    else:
      _get_field(path, target, last)
      setattr(target, last, value)
  return config


def _get_field(path: str, target: Any, name: str) -> Any:
  if isinstance(target, base_config.Config):
    fields = [field.name for field in dataclasses.fields(target)]
    base_config.check_choice(f'{path}: field', name, fields)
    return getattr(target, name)
  if isinstance(target, dict):
    return target.setdefault(name, {})
  raise ValueError(f'{path}: {target!r} has no fields')


def post_process_config(config: ExperimentConfig) -> ExperimentConfig:
  """Returns a copy in which what is None is filled from the rest.

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
    law = evaluation.data.trajectory_generator_kwargs
    # All of the law or nothing: never half of one and half of another.
    if name in _LIKE_THEIR_SOURCE and name == source:
      if not law.keys() & predictor_kwargs.keys():
        predictor_kwargs.update(law)
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


def _fill(kwargs: dict[str, Any], key: str, value: Any) -> None:
  if kwargs.get(key) is None:
    kwargs[key] = value


def _ptw_depth(data: DataConfig, seq_length: int) -> int:
  """The depth of the source, if it has one; else the least for the length."""
  if data.trajectory_generator in _PTW_SOURCES:
    depth = data.trajectory_generator_kwargs.get('depth')
    if depth is not None:
      return depth
  return ptw_predictors.min_depth(seq_length)
