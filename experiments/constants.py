"""Names that a config can use, and how what they name is built."""

from typing import Any

import numpy as np

from nonstationary_mbml import base_config
from nonstationary_mbml import predictor_factories
from nonstationary_mbml import predictors
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import distributions
from nonstationary_mbml.experiments import forget_me_not_predictors
from nonstationary_mbml.experiments import live_and_die_predictors
from nonstationary_mbml.experiments import ptw_predictors
from nonstationary_mbml.experiments import run_length_predictors
from nonstationary_mbml.experiments import trajectory_generators

DISTRIBUTIONS = distributions.DISTRIBUTIONS
TRAJECTORY_GENERATORS = trajectory_generators.TRAJECTORY_GENERATORS
# Also by the name of the source whose exact predictor each is.
OPTIMAL_PREDICTORS = base_config.Registry(
  'optimal_predictor',
  {
    'forget_me_not': forget_me_not_predictors.ForgetMeNotPredictor,
    'iid_ptw_cat': ptw_predictors.PTWPredictor,
    'kt': predictors.OptimalCategoricalPredictor,
    'lad': live_and_die_predictors.LADPredictor,
    'length_distribution': run_length_predictors.length_distribution_predictor,
    'lin': live_and_die_predictors.LADPredictor,
    'ptw': ptw_predictors.PTWPredictor,
    'random_shift': run_length_predictors.random_shift_predictor,
    'regular_shift': run_length_predictors.regular_shift_predictor,
    'run_length': run_length_predictors.RunLengthPredictor,
    'static': predictors.OptimalCategoricalPredictor,
  },
)

_LABELS = {
  'forget_me_not': 'Forget-Me-Not',
  'iid_ptw_cat': 'PTW',
  'kt': 'KT',
  'lad': 'LAD',
  'length_distribution': 'known length law',
  'lin': 'LAD',
  'ptw': 'PTW',
  'random_shift': 'known length law',
  'regular_shift': 'known period',
  'run_length': 'run-length mixture',
  'static': 'KT',
}


def source_kwargs(source: str) -> dict[str, Any]:
  """Returns the default arguments of a source, for a config.

  Args:
    source: A key of `TRAJECTORY_GENERATORS`; {} if it is none.
  """
  generator = TRAJECTORY_GENERATORS.get(source.lower())
  return dict(getattr(generator, 'default_kwargs', {}))


def label(optimal_predictor: str) -> str:
  """Returns what an exact predictor is called in tables and figures."""
  return _LABELS.get(optimal_predictor, optimal_predictor)


def check(config: config_lib.ExperimentConfig) -> None:
  """Raises ValueError, naming the field, if the parts do not fit together.

  JAX is not started, so that a script can still say how; what depends on its
  devices is left to `train.build_components`.

  Args:
    config: As `post_process_config` leaves it.
  """
  config.validate()
  alphabet_sizes = []
  for path, data, seq_length in (
    ('data', config.data, config.train.seq_length),
    ('eval.data', config.eval.data, config.eval.seq_length),
  ):
    generator = build_data_generator(data, path)
    with base_config.naming(f'{path}.trajectory_generator_kwargs'):
      generator.check_seq_length(seq_length)
    with base_config.naming(path):
      alphabet_sizes.append(generator.alphabet_size)
  alphabet_size, eval_alphabet_size = alphabet_sizes
  if eval_alphabet_size != alphabet_size:
    raise ValueError(
      f'eval.data has an alphabet of {eval_alphabet_size} symbols, but data, '
      f'to train on, of {alphabet_size}'
    )
  predictor = predictor_factories.build_predictor(config.model, alphabet_size)
  if not (config.train.reset_predictor_init_state or predictor.has_state):
    raise ValueError(
      'train.reset_predictor_init_state is False, but model.model_type '
      f'{config.model.model_type!r} has no state to carry over'
    )
  optimal_predictors = build_optimal_predictors(config.eval, alphabet_size)
  for name, optimal_predictor in optimal_predictors.items():
    if isinstance(
      optimal_predictor,
      (
        ptw_predictors.PTWPredictor,
        forget_me_not_predictors.ForgetMeNotPredictor,
      ),
    ):
      with base_config.naming(f'eval.optimal_predictors_kwargs[{name}]'):
        ptw_predictors.check_horizon(
          optimal_predictor.depth, config.eval.seq_length
        )


def build_data_generator(
  config: config_lib.DataConfig, path: str = 'data'
) -> trajectory_generators.TrajectoryGenerator:
  """Returns the source that a data config describes.

  Args:
    config: Config of the data.
    path: Path of that config, for messages: `data` or `eval.data`.

  Raises:
    ValueError: If a name is unknown, an argument is wrong, or the two
      distributions do not fit each other.
  """
  config.validate(path)
  iid = _build_distribution(
    f'{path}.iid_distribution',
    config.iid_distribution,
    config.iid_distribution_kwargs,
  )
  prior = _build_distribution(
    f'{path}.parameter_distribution',
    config.parameter_distribution,
    {
      'feature_size': iid.parameter_size,
      **config.parameter_distribution_kwargs,
    },
  )
  params = trajectory_generators.check_prior(
    f'{path}.', iid, prior, config.parameter_distribution_params
  )
  generator = TRAJECTORY_GENERATORS.lookup(
    f'{path}.trajectory_generator', config.trajectory_generator
  )
  kwargs_path = f'{path}.trajectory_generator_kwargs'
  base_config.check_constructor(
    f'{kwargs_path} of {config.trajectory_generator}',
    generator,
    config.trajectory_generator_kwargs,
    given=(
      'iid_distribution',
      'parameter_distribution',
      'parameter_distribution_params',
    ),
  )
  with base_config.naming(kwargs_path):
    return generator(iid, prior, params, **config.trajectory_generator_kwargs)


def build_optimal_predictors(
  config: config_lib.EvalConfig, alphabet_size: int
) -> dict[str, predictors.OptimalPredictor]:
  """Returns the exact Bayes predictors of an evaluation, by name.

  Alphabet and prior of the source are passed to those that take them.

  Args:
    config: As `post_process_config` leaves it.
    alphabet_size: K.

  Raises:
    ValueError: If a name is unknown or an argument is wrong.
  """
  if isinstance(config.optimal_predictors, str):
    raise ValueError(
      f'eval.optimal_predictors is {config.optimal_predictors!r}; '
      'post_process_config turns it into names'
    )
  derived = {'alphabet_size': alphabet_size}
  if config.data.parameter_distribution == 'dirichlet':
    derived['concentration'] = config.data.parameter_distribution_params
  built = {}
  for name in config.optimal_predictors:
    optimal_predictor = OPTIMAL_PREDICTORS.lookup(
      'eval.optimal_predictors', name
    )
    kwargs = {**derived, **config.optimal_predictors_kwargs.get(name, {})}
    # One of the user's own need not take what follows from the source.
    takes = base_config.keywords(optimal_predictor)
    kwargs = {
      key: value
      for key, value in kwargs.items()
      if key in takes or key not in derived or value != derived[key]
    }
    path = f'eval.optimal_predictors_kwargs[{name}]'
    base_config.check_constructor(path, optimal_predictor, kwargs)
    with base_config.naming(path):
      built[name] = optimal_predictor(**kwargs)
  return built


def exact_predictor(
  config: config_lib.EvalConfig,
  generator: trajectory_generators.TrajectoryGenerator,
  optimal_predictors: dict[str, predictors.OptimalPredictor],
) -> str | None:
  """Returns the name of the source's own Bayes predictor, if it is there.

  Args:
    config: Config of the evaluation.
    generator: The source.
    optimal_predictors: To choose from.
  """
  wanted = generator.bayes_predictor(config.seq_length)
  if wanted is None:
    return None
  for name, predictor in optimal_predictors.items():
    if _are_equal(
      predictor, wanted, generator.alphabet_size, config.seq_length
    ):
      return name
  return None


def _are_equal(
  a: predictors.OptimalPredictor,
  b: predictors.OptimalPredictor,
  alphabet_size: int,
  seq_length: int,
) -> bool:
  """Whether two predictors have the same prior over T symbols."""
  if not isinstance(a, predictors.OptimalPredictor):
    return False  # One of the user's own, of which nothing is known.
  priors = [np.asarray(p.prior(alphabet_size, float)) for p in (a, b)]
  if not np.array_equal(*priors):
    return False
  if isinstance(a, run_length_predictors.RunLengthPredictor):
    # Whether a segment ends with the last symbol is of no account.
    num = max(1, seq_length - 1)
    return isinstance(
      b, run_length_predictors.RunLengthPredictor
    ) and np.array_equal(a.hazard.log_probs(num), b.hazard.log_probs(num))
  return type(a) is type(b) and (
    not isinstance(a, ptw_predictors.PTWPredictor) or a.depth == b.depth
  )


def _build_distribution(
  field: str, name: str, kwargs: dict
) -> distributions.Distribution:
  distribution = DISTRIBUTIONS.lookup(field, name)
  base_config.check_constructor(f'{field}_kwargs', distribution, kwargs)
  with base_config.naming(f'{field}_kwargs'):
    return distribution(**kwargs)
