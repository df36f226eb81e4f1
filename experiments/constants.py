"""Names that a config can use, and how what they name is built."""

import collections
from collections.abc import Mapping
from collections.abc import Sequence
import inspect
from typing import Any

from nonstationary_mbml import base_config
from nonstationary_mbml import losses
from nonstationary_mbml import optimizers
from nonstationary_mbml import predictor_factories
from nonstationary_mbml import predictors
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

# Largest K of a prior that is given as one number.
MAX_ALPHABET_SIZE = 2**16
# Among the names of an evaluation's exact predictors: the source's own.
EXACT = 'exact'


def source_kwargs(source: str) -> dict[str, Any]:
  """Returns the default arguments of a source, for a config.

  Args:
    source: A key of `TRAJECTORY_GENERATORS`; {} if it is none.
  """
  generator = TRAJECTORY_GENERATORS.get(source.lower())
  return dict(getattr(generator, 'default_kwargs', {}))


def labels(
  optimal_predictors: Mapping[str, predictors.Predictor],
) -> dict[str, str]:
  """Returns what exact predictors are called in tables and figures.

  Args:
    optimal_predictors: Predictors by name. Their labels are those of their
      classes; without one, and where two have the same, it is the name.
  """
  found = {
    name: getattr(predictor, 'label', name)
    for name, predictor in optimal_predictors.items()
  }
  counts = collections.Counter(found.values())
  return {
    name: label if counts[label] == 1 else name for name, label in found.items()
  }


def in_figures(names: Mapping[str, str], exact: str | None) -> dict[str, str]:
  """Returns the predictors that the figure of a sequence shows.

  All of them but KT, whose line follows no switch and would hide others; where
  it is the exact one, it is shown.

  Args:
    names: Labels of predictors, by name.
    exact: Name of the source's own Bayes predictor, if it has one.
  """
  return {
    name: label
    for name, label in names.items()
    if name != 'kt' or name == exact
  }


def check(config: base_config.ExperimentConfig) -> None:
  """Raises ValueError, naming the field, if the parts do not fit together.

  JAX is not started, so that a script can still say how; what depends on its
  devices is left to `train.build_components`.

  Args:
    config: An `experiments.config.ExperimentConfig`.
  """
  config.validate()
  config = config.resolved()
  generators = []
  for path, data, seq_length in (
    ('data', config.data, config.train.seq_length),
    ('eval.data', config.eval.data, config.eval.seq_length),
  ):
    generator = build_data_generator(data, path)
    with base_config.naming(f'{path}.trajectory_generator_kwargs'):
      generator.check_seq_length(seq_length)
    with base_config.naming(path):
      generator.alphabet_size  # noqa: B018
    generators.append(generator)
  alphabet_size, eval_alphabet_size = (g.alphabet_size for g in generators)
  if eval_alphabet_size != alphabet_size:
    raise ValueError(
      f'eval.data has an alphabet of {eval_alphabet_size} symbols, but data, '
      f'to train on, of {alphabet_size}'
    )
  losses.check_target(
    config.train.target, generators[0], config.train.seq_length
  )
  optimizers.make_optimizer(config.train, config.schedule.training_steps)
  predictor = predictor_factories.build_predictor(config.model, alphabet_size)
  if not (config.train.reset_predictor_init_state or predictor.has_state):
    raise ValueError(
      'train.reset_predictor_init_state is False, but model.model_type '
      f'{config.model.model_type!r} has no state to carry over'
    )
  optimal_predictors = build_optimal_predictors(config.eval, generators[1])
  for name, optimal_predictor in optimal_predictors.items():
    if isinstance(optimal_predictor, predictors.OptimalPredictor):
      with base_config.naming(f'eval.optimal_predictors_kwargs[{name}]'):
        optimal_predictor.check_seq_length(config.eval.seq_length)


def build_data_generator(
  config: base_config.Config, path: str = 'data'
) -> trajectory_generators.TrajectoryGenerator:
  """Returns the source that a data config describes.

  Args:
    config: An `experiments.config.DataConfig`.
    path: Path of that config, for messages: `data` or `eval.data`.

  Raises:
    ValueError: If a name is unknown, an argument is wrong, or the two
      distributions do not fit each other.
  """
  config.validate(path)
  iid, prior = _build_distributions(config, path)
  params = trajectory_generators.check_prior(
    f'{path}.', iid, prior, prior_parameters(config, path)
  )
  return trajectory_generators.build(
    config.trajectory_generator,
    config.trajectory_generator_kwargs,
    iid,
    prior,
    params,
    path,
  )


def _build_distributions(
  config: base_config.Config, path: str
) -> tuple[distributions.Distribution, distributions.Distribution]:
  """The distribution of the symbols, and the prior over its parameters."""
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
  return iid, prior


def prior_parameters(
  config: base_config.Config, path: str = 'data'
) -> tuple[float, ...]:
  """Returns the parameters of a source's prior, one for every symbol.

  Args:
    config: An `experiments.config.DataConfig`.
    path: Path of that config, for messages.

  Raises:
    ValueError: If a single number is given, and the prior is no Dirichlet or
      has too many symbols.
  """
  params = config.parameter_distribution_params
  if isinstance(params, tuple):
    return params
  _, prior = _build_distributions(config, path)
  field = f'{path}.parameter_distribution_params'
  if not isinstance(prior, distributions.Dirichlet):
    raise ValueError(
      f'{field} is {params!r}; one number is a symmetric dirichlet, and '
      f'{prior.name} takes a tuple of {prior.parameter_size}'
    )
  if prior.feature_size > MAX_ALPHABET_SIZE:
    raise ValueError(
      f'{field} is {params!r}, for {prior.feature_size} symbols; one number '
      f'can be for at most {MAX_ALPHABET_SIZE}'
    )
  base_config.check_dirichlet(field, params, prior.feature_size)
  return (float(params),) * prior.feature_size


def build_optimal_predictors(
  config: base_config.EvalConfig,
  generator: trajectory_generators.TrajectoryGenerator,
) -> dict[str, predictors.Predictor]:
  """Returns the exact Bayes predictors of an evaluation, by name.

  'exact' is there under the name of the predictor that it is: one that the
  config names besides, or one that is registered under the name of the source.
  Without such a name it stays 'exact'.

  Args:
    config: An `experiments.config.EvalConfig` with data and length.
    generator: The source that it evaluates on.

  Raises:
    ValueError: If a name is unknown or an argument is wrong.
  """
  resolved = optimal_predictors_kwargs(config, generator)
  return {
    name: _build_optimal_predictor(config, generator, name, kwargs)
    for name, kwargs in resolved.items()
  }


def optimal_predictors_kwargs(
  config: base_config.EvalConfig,
  generator: trajectory_generators.TrajectoryGenerator,
) -> dict[str, dict[str, Any]]:
  """Returns the arguments of an evaluation's exact predictors, by name.

  Those that the config does not give follow from the source, where the
  predictor takes them: `concentration` from a Dirichlet prior, `depth` from its
  depth or the length; and to the predictor of the name of the source go the
  arguments of the source.

  Args:
    config: Config, as in `build_optimal_predictors`.
    generator: Source, likewise.

  Raises:
    ValueError: As `build_optimal_predictors`.
  """
  names = [name.lower() for name in config.optimal_predictors]
  given = {
    name.lower(): kwargs
    for name, kwargs in config.optimal_predictors_kwargs.items()
  }
  source = config.data.trajectory_generator.lower()

  def with_derived(name: str) -> dict[str, Any]:
    if name == EXACT:
      return {}
    kwargs = dict(given.get(name, {}))
    derived = _derived_kwargs(config.seq_length, generator)
    of_source = config.data.trajectory_generator_kwargs
    # All parameters of one distribution: never half of one and half of another.
    if name == source and not of_source.keys() & kwargs.keys():
      derived |= {k: v for k, v in of_source.items() if v is not None}
    constructor = OPTIMAL_PREDICTORS.lookup('eval.optimal_predictors', name)
    takes = base_config.keywords(constructor)
    if 'depth' not in inspect.signature(constructor).parameters:
      takes.discard('depth')  # A subclass that hides it has chosen it.
    for key, value in derived.items():
      if key in takes and kwargs.get(key) is None:
        kwargs[key] = value
    return kwargs

  def exact_names() -> Sequence[str]:
    """The names that 'exact' stands for."""
    exact = generator.bayes_predictor(config.seq_length)
    if exact is None:
      return generator.reference_predictors
    for name in (*names, source):
      if name in OPTIMAL_PREDICTORS:
        kwargs = with_derived(name)
        if exact == _build_optimal_predictor(config, generator, name, kwargs):
          return (name,)
    return (EXACT,)

  resolved = dict.fromkeys(
    inner
    for name in names
    for inner in (exact_names() if name == EXACT else (name,))
  )
  path = 'eval.optimal_predictors_kwargs'
  base_config.check_kwargs(path, given, resolved)
  base_config.check_kwargs(f'{path}[{EXACT}]', given.get(EXACT, {}), ())
  return {name: with_derived(name) for name in resolved}


def _derived_kwargs(
  seq_length: int, generator: trajectory_generators.TrajectoryGenerator
) -> dict[str, Any]:
  """Arguments of exact predictors that follow from any source."""
  depth_for = getattr(generator, 'depth_for', ptw_predictors.min_depth)
  derived = {'depth': depth_for(seq_length)}
  if isinstance(generator.parameter_distribution, distributions.Dirichlet):
    derived['concentration'] = generator.parameter_distribution_params
  return derived


def _build_optimal_predictor(
  config: base_config.EvalConfig,
  generator: trajectory_generators.TrajectoryGenerator,
  name: str,
  kwargs: Mapping[str, Any],
) -> predictors.Predictor:
  """The exact predictor of a name, with complete arguments."""
  if name == EXACT:
    return generator.bayes_predictor(config.seq_length)
  constructor = OPTIMAL_PREDICTORS[name]
  path = f'eval.optimal_predictors_kwargs[{name}]'
  if 'alphabet_size' in base_config.keywords(constructor):
    kwargs = {'alphabet_size': generator.alphabet_size, **kwargs}
  base_config.check_constructor(path, constructor, kwargs)
  with base_config.naming(path):
    return constructor(**kwargs)


def exact_predictor(
  generator: trajectory_generators.TrajectoryGenerator,
  optimal_predictors: Mapping[str, predictors.Predictor],
  seq_length: int,
) -> str | None:
  """Returns the name of the source's own Bayes predictor, if it is there.

  Args:
    generator: The source.
    optimal_predictors: Predictors to choose from, by name.
    seq_length: T.
  """
  exact = generator.bayes_predictor(seq_length)
  if exact is None:
    return None
  if EXACT in optimal_predictors:  # It may be equal to itself alone.
    return EXACT
  found = (name for name, p in optimal_predictors.items() if p == exact)
  return next(found, None)


def _build_distribution(
  field: str, name: str, kwargs: dict
) -> distributions.Distribution:
  distribution = DISTRIBUTIONS.lookup(field, name)
  base_config.check_constructor(f'{field}_kwargs', distribution, kwargs)
  with base_config.naming(f'{field}_kwargs'):
    return distribution(**kwargs)
