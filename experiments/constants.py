"""What a config can name, and how it is built."""

from nonstationary_mbml import base_config
from nonstationary_mbml import predictors
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import distributions
from nonstationary_mbml.experiments import live_and_die_predictors
from nonstationary_mbml.experiments import ptw_predictors
from nonstationary_mbml.experiments import trajectory_generators

DISTRIBUTIONS = distributions.DISTRIBUTIONS
TRAJECTORY_GENERATORS = trajectory_generators.TRAJECTORY_GENERATORS
OPTIMAL_PREDICTORS = base_config.Registry(
  'optimal_predictor',
  {
    'kt': predictors.OptimalCategoricalPredictor,
    'lad': live_and_die_predictors.LADPredictor,
    'lin': live_and_die_predictors.LADPredictor,
    'ptw': ptw_predictors.PTWPredictor,
  },
)

# The Bayes predictor of each source whose segments have a Dirichlet prior.
_EXACT_PREDICTORS = {
  trajectory_generators.StaticGenerator: predictors.OptimalCategoricalPredictor,
  trajectory_generators.PTWGenerator: ptw_predictors.PTWPredictor,
  trajectory_generators.LINGenerator: live_and_die_predictors.LADPredictor,
}


def build_data_generator(
  config: config_lib.DataConfig,
) -> trajectory_generators.TrajectoryGenerator:
  """Returns the source that a data config describes.

  Raises:
    ValueError: If a name is unknown, an argument is wrong, or the two
      distributions do not fit each other.
  """
  config.validate()
  iid = _build_distribution(
    'data.iid_distribution',
    config.iid_distribution,
    config.iid_distribution_kwargs,
  )
  prior = _build_distribution(
    'data.parameter_distribution',
    config.parameter_distribution,
    {
      'feature_size': iid.parameter_size,
      **config.parameter_distribution_kwargs,
    },
  )
  generator = TRAJECTORY_GENERATORS.lookup(
    'data.trajectory_generator', config.trajectory_generator
  )
  base_config.check_constructor(
    f'data.trajectory_generator_kwargs of {config.trajectory_generator}',
    generator,
    config.trajectory_generator_kwargs,
    given=(
      'iid_distribution',
      'parameter_distribution',
      'parameter_distribution_params',
    ),
  )
  return generator(
    iid,
    prior,
    config.parameter_distribution_params,
    **config.trajectory_generator_kwargs,
  )


def build_optimal_predictors(
  config: config_lib.EvalConfig, alphabet_size: int
) -> dict[str, predictors.OptimalPredictor]:
  """Returns the exact Bayes predictors of an evaluation, by name.

  Args:
    config: As `post_process_config` leaves it.
    alphabet_size: K.

  Raises:
    ValueError: If a name is unknown or an argument is wrong.
  """
  built = {}
  for name in config.optimal_predictors:
    optimal_predictor = OPTIMAL_PREDICTORS.lookup(
      'eval.optimal_predictors', name
    )
    kwargs = {
      'alphabet_size': alphabet_size,
      **config.optimal_predictors_kwargs.get(name, {}),
    }
    base_config.check_constructor(
      f'eval.optimal_predictors_kwargs[{name}]', optimal_predictor, kwargs
    )
    built[name] = optimal_predictor(**kwargs)
  return built


def exact_predictor(
  config: config_lib.EvalConfig,
  generator: trajectory_generators.TrajectoryGenerator,
  optimal_predictors: dict[str, predictors.OptimalPredictor],
) -> str | None:
  """Returns the name of the source's own Bayes predictor, if it is there.

  Its prior must be the source's: the same law of switches, the same Dirichlet.

  Args:
    config: Of the evaluation.
    generator: The source.
    optimal_predictors: To choose from.
  """
  if not isinstance(generator.parameter_distribution, distributions.Dirichlet):
    return None
  wanted = _EXACT_PREDICTORS.get(type(generator))
  prior = generator.parameter_distribution_params
  for name, predictor in optimal_predictors.items():
    concentration = predictor.concentration
    if isinstance(concentration, float):
      concentration = (concentration,) * generator.alphabet_size
    same_depth = not isinstance(
      generator, trajectory_generators.PTWGenerator
    ) or (
      isinstance(predictor, ptw_predictors.PTWPredictor)
      and predictor.depth == generator.depth_for(config.seq_length)
    )
    if type(predictor) is wanted and concentration == prior and same_depth:
      return name
  return None


def _build_distribution(
  field: str, name: str, kwargs: dict
) -> distributions.Distribution:
  distribution = DISTRIBUTIONS.lookup(field, name)
  base_config.check_constructor(f'{field}_kwargs', distribution, kwargs)
  return distribution(**kwargs)
