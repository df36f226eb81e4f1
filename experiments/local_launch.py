"""Trains a predictor and sets it beside the exact Bayes predictors.

  python experiments/local_launch.py
  python experiments/local_launch.py --source=lin --model_type=stack_rnn

Writes config.json, metrics.json and figure.png into <output_dir>/<name>/. Every
setting without a flag is in `make_config`.
"""

from collections.abc import Mapping
import io
import json
import pathlib
import sys
import time
from typing import Any
from typing import NamedTuple

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
from matplotlib import figure
import numpy as np

from nonstationary_mbml import base_config
from nonstationary_mbml import files
from nonstationary_mbml import predictor_factories
from nonstationary_mbml import runtime
from nonstationary_mbml import train
from nonstationary_mbml.experiments import command_line
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments import evaluator as evaluator_lib
from nonstationary_mbml.experiments import plotting

# What a network needs, or is better off with, besides its name.
_RECURRENT = {'hidden_size': 64}
_TRANSFORMER = {
  'embedding_dim': 64,
  'num_layers': 2,
  'num_heads': 4,
  'dropout_prob': 0.0,
}
_ARCHITECTURES = {
  'rnn': {'core': 'vanilla_rnn', **_RECURRENT},
  'lstm': _RECURRENT,
  'stack_rnn': _RECURRENT,
  'transformer': _TRANSFORMER,
  'sliding_window_transformer': {'context_length': 16, **_TRANSFORMER},
}
# Sequences among which that of the figure is chosen.
_FIGURE_BATCH = 64


def make_config(
  source: str = 'ptw',
  model_type: str = 'lstm',
  steps: int = 10_000,
  seed: int = 0,
  name: str | None = None,
  seq_length: int = 32,
  batch_size: int = 128,
  learning_rate: float = 2e-3,
  num_seeds: int = 1,
) -> config_lib.ExperimentConfig:
  """Returns the config of a run; `post_process_config` completes it.

  Args:
    source: A key of `TRAJECTORY_GENERATORS`.
    model_type: A key of `PREDICTOR_FACTORIES`.
    steps: Of training.
    seed: Of everything.
    name: Of the run; if None, made of network, source and seeds.
    seq_length: T.
    batch_size: B.
    learning_rate: Adam's.
    num_seeds: Networks that are trained together; above 1, an ensemble.

  Raises:
    ValueError: If a name is unknown.
  """
  source, model_type = source.lower(), model_type.lower()
  base_config.check_choice('model_type', model_type, _ARCHITECTURES)
  seeds = f'_{num_seeds}seeds' if num_seeds > 1 else ''
  return config_lib.ExperimentConfig(
    name=name or f'{model_type}_{source}_seed{seed}{seeds}',
    seed=seed,
    data=config_lib.DataConfig(
      iid_distribution='categorical',
      iid_distribution_kwargs={'feature_size': 2},
      parameter_distribution='dirichlet',
      parameter_distribution_params=(0.5, 0.5),
      trajectory_generator=source,
      trajectory_generator_kwargs=constants.SOURCE_KWARGS.get(source, {}),
    ),
    model=base_config.ModelConfig(
      model_type=model_type,
      architecture_kwargs=_ARCHITECTURES[model_type],
    ),
    train=base_config.TrainConfig(
      learning_rate=learning_rate,
      seq_length=seq_length,
      batch_size=batch_size,
      model_init_seed=tuple(range(num_seeds)) if num_seeds > 1 else 0,
    ),
    schedule=base_config.ScheduleConfig(training_steps=steps),
    logger=base_config.LoggerConfig(log_frequency=100),
    eval=config_lib.EvalConfig(batch_size=512, optimal_predictors='auto'),
  )


def results_table(
  regrets: Mapping[str, np.ndarray], names: dict[str, str], exact: str | None
) -> list[dict[str, Any]]:
  """Returns one row per predictor: its regret, and how far above the optimum.

  Args:
    regrets: Cumulative regret of every sequence `[N]`, by predictor, as from
      `MetaLearningEvaluator.evaluate`. For an ensemble of networks `[M, N]`:
      its standard errors are over the M members.
    names: What each predictor is called in the table, by its name there.
    exact: Name of the source's own Bayes predictor, from which the rows are
      measured; None measures from the best of the exact predictors.
  """
  references = [name for name in regrets if name != evaluator_lib.NETWORK]
  optimum = exact or min(
    references,
    key=lambda name: regrets[name].mean(),
    default=evaluator_lib.NETWORK,
  )

  def stderr(values: np.ndarray) -> float:
    spread_over = values.mean(axis=1) if values.ndim == 2 else values
    return float(spread_over.std(ddof=1) / np.sqrt(len(spread_over)))

  rows = []
  for name, shown in names.items():
    values = regrets[name]
    # Paired: all predictors read the same sequences.
    above = values - regrets[optimum]
    rows.append(
      {
        'predictor': shown,
        'cumulative_regret': float(values.mean()),
        'stderr': stderr(values),
        'above_optimum': float(above.mean()),
        'above_optimum_stderr': stderr(above),
        'is_optimum': name == optimum,
      }
    )
  return rows


def format_table(rows: list[dict[str, Any]]) -> str:
  """Returns the rows of `results_table` as aligned text."""
  width = max(len(row['predictor']) for row in rows)
  head = f'{"predictor":<{width}}  {"cumulative regret (nats)":>24}'
  lines = [f'{head}  {"above the optimum":>18}']
  for row in rows:
    regret = f'{row["cumulative_regret"]:.4f} ± {row["stderr"]:.4f}'
    above = (
      f'{row["above_optimum"]:+.4f} ± {row["above_optimum_stderr"]:.4f}'
      if not row['is_optimum']
      else 'optimum'
    )
    lines.append(f'{row["predictor"]:<{width}}  {regret:>24}  {above:>18}')
  return '\n'.join(lines)


def open_folder(
  folder: pathlib.Path, config: config_lib.ExperimentConfig, overwrite: bool
) -> None:
  """Makes the folder of a run and writes its config there.

  Raises:
    ValueError: If it holds a finished run with another config, unless
      overwriting, or cannot be written.
  """
  path = folder / 'config.json'
  values = base_config.to_dict(config)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    # A run that did not finish has nothing to lose.
    is_finished = path.exists() and (folder / 'metrics.json').exists()
    if is_finished and not overwrite:
      try:
        present = base_config.plain(json.loads(path.read_text()))
      except json.JSONDecodeError:
        present = {}
      try:
        # Fields that are newer than the run have their defaults.
        present = base_config.to_dict(
          base_config.from_dict(config_lib.ExperimentConfig, present)
        )
      except ValueError:
        pass  # The differences say what is wrong.
      differences = base_config.differences(present, values)
      if differences:
        raise ValueError(
          f'{folder} holds a run with another config '
          f'({"; ".join(differences)}); choose another --name, or --overwrite'
        )
    # Results never lie beside a config that they are not of.
    for name in ('metrics.json', 'figure.png'):
      (folder / name).unlink(missing_ok=True)
    files.write_whole(path, (json.dumps(values, indent=2) + '\n').encode())
  except OSError as error:
    raise ValueError(f'cannot write to {folder}: {error.strerror}') from error


def run(
  config: config_lib.ExperimentConfig, folder: pathlib.Path, num_sequences: int
) -> list[dict[str, Any]]:
  """Trains and evaluates as configured, and writes what came of it.

  Args:
    config: Complete, as `post_process_config` leaves it.
    folder: Of the run; must exist.
    num_sequences: For the table.

  Returns:
    The rows of the table.
  """
  start = time.time()
  with runtime.count_compilations() as compilations:
    result = train.train(
      config,
      constants.build_data_generator,
      evaluator_lib.build_evaluator,
      use_tqdm=True,
    )
    seconds = time.time() - start
    # All members of an ensemble read the same sequences.
    evaluator = result.evaluator
    seeds = train.member_seeds(config.train)
    keys = train.step_keys(config.seed, seeds[0], 0)
    rng_table, rng_figure = jax.random.split(keys.evaluation)
    members = [
      train.member_params(config.train, result.params, member)
      for member in range(len(seeds))
    ]
    by_member = [
      evaluator.evaluate(params, rng_table, num_sequences) for params in members
    ]
    sequence = draw_sequence(evaluator, members[0], rng_figure)
  regrets = by_member[0]
  network = config.model.model_type
  if len(seeds) > 1:
    network += f', {len(seeds)} seeds'
    regrets[evaluator_lib.NETWORK] = np.stack(
      [member[evaluator_lib.NETWORK] for member in by_member]
    )
  exact = constants.exact_predictor(
    config.eval, evaluator.generator, evaluator.optimal_predictors
  )
  names = {evaluator_lib.NETWORK: network}
  names |= {
    name: constants.label(name) for name in evaluator.optimal_predictors
  }
  rows = results_table(regrets, names, exact)

  content = {
    'training_seconds': round(seconds, 1),
    'num_sequences': num_sequences,
    'exact_predictor': exact,
    'table': rows,
    'history': result.history,
    'member_histories': result.member_histories,
  }
  files.write_whole(
    folder / 'metrics.json', (json.dumps(content, indent=2) + '\n').encode()
  )
  png = io.BytesIO()
  drawn = {
    name: shown
    for name, shown in names.items()
    if name in (evaluator_lib.NETWORK, 'ptw', 'lad', exact)
  }
  sequence_figure(sequence, drawn).savefig(png, format='png')
  files.write_whole(folder / 'figure.png', png.getvalue())

  source = config.eval.data.trajectory_generator
  print(
    f'\n{num_sequences} fresh sequences of {config.eval.seq_length} symbols '
    f'from the {source} source, after {config.schedule.training_steps} steps '
    f'({seconds:.0f} s):\n'
  )
  print(format_table(rows))
  if exact is None:
    print(
      f'\nThe {source} source has no exact predictor of its own here: measured '
      'from the best of the references.'
    )
  print(
    f'\nCompiled {compilations.compiled} programs and loaded '
    f'{compilations.loaded} from the cache, in {compilations.seconds:.1f} s.'
  )
  print(f'Wrote config.json, metrics.json and figure.png to {folder}')
  return rows


class DrawnSequence(NamedTuple):
  """A sequence, and what the predictors make of it.

  Attributes:
    symbols: `[T, K]`.
    parameters: True probabilities `[T, K]`.
    switches: bool `[T]`, True where a new segment starts.
    probabilities: Of symbols 2, ..., T by predictor, `[T - 1, K]`.
    regrets: Of predicting them, `[T - 1]`.
  """

  symbols: np.ndarray
  parameters: np.ndarray
  switches: np.ndarray
  probabilities: dict[str, np.ndarray]
  regrets: dict[str, np.ndarray]


def draw_sequence(
  evaluator: evaluator_lib.MetaLearningEvaluator, params: Any, rng: jax.Array
) -> DrawnSequence:
  """Returns a sequence for a figure.

  Of a small batch it is the first sequence with two switching points or more,
  or else the first one.

  Args:
    evaluator: Knows source and predictors.
    params: Of its predictor.
    rng: Key of the batch.
  """
  size = (_FIGURE_BATCH, evaluator.seq_length)

  @jax.jit
  def draw(params: Any, rng: jax.Array) -> DrawnSequence:
    batch, parameters = evaluator.generator.sample(rng, *size)
    switches = evaluator.generator.switch_points(rng, *size)
    chosen = jnp.argmax(jnp.sum(switches, axis=1) >= 2)
    batch, parameters = batch[chosen, None], parameters[chosen, None]
    predictions = evaluator.predict(params, batch)
    return DrawnSequence(
      batch[0],
      parameters[0],
      switches[chosen],
      {
        name: jax.nn.softmax(logits[0, :-1])
        for name, logits in predictions.items()
      },
      {
        name: evaluator_lib.instantaneous_regret(logits, parameters)[0]
        for name, logits in predictions.items()
      },
    )

  return jax.device_get(draw(params, rng))


def sequence_figure(
  sequence: DrawnSequence, names: dict[str, str]
) -> figure.Figure:
  """Draws a sequence, predicted by the network and by PTW and LAD.

  Args:
    sequence: From `draw_sequence`.
    names: What to call the predictors to draw, by name in the evaluator.
  """
  return plotting.plot_sequence(
    sequence.symbols,
    sequence.parameters,
    sequence.switches,
    {shown: sequence.probabilities[name] for name, shown in names.items()},
    {shown: sequence.regrets[name] for name, shown in names.items()},
    title='One sequence: the true parameter, and what the predictors expect '
    'of each next symbol',
  )


def define_flags() -> None:
  """Defines the flags; not at import, so that scripts do not meet in a test."""
  command_line.define_flags()
  _define_choice(
    'source', 'ptw', constants.TRAJECTORY_GENERATORS, 'Where segments end'
  )
  _define_choice(
    'model_type', 'lstm', predictor_factories.PREDICTOR_FACTORIES, 'The network'
  )
  flags.DEFINE_integer('steps', 10_000, 'Training steps.', lower_bound=0)
  flags.DEFINE_integer(
    'seed', 0, 'All randomness follows from it.', lower_bound=0
  )
  flags.DEFINE_integer(
    'num_seeds',
    1,
    'Networks that are trained together, each from its own initial parameters '
    'and on its own data; the table has their mean.',
    lower_bound=1,
  )
  flags.DEFINE_integer('seq_length', 32, 'Symbols per sequence.', lower_bound=2)
  flags.DEFINE_integer(
    'batch_size', 128, 'Sequences per training step.', lower_bound=1
  )
  flags.DEFINE_float('learning_rate', 2e-3, "Adam's.", lower_bound=0)
  flags.DEFINE_integer(
    'num_sequences', 10_240, 'Fresh sequences for the table.', lower_bound=2
  )
  flags.DEFINE_string('output_dir', 'runs', 'Folder of all runs.')
  flags.DEFINE_string(
    'name',
    None,
    'Folder of this run; if unset, <model_type>_<source>_seed<seed>, with '
    '_<num_seeds>seeds after it for more than one.',
  )
  flags.DEFINE_bool(
    'overwrite', False, 'Replace a run of the same name with another config.'
  )
  flags.DEFINE_integer(
    'cpu_devices',
    None,
    'Devices that the CPU is split into, each with its share of the batch or '
    'of the networks; if unset, as many as cores (up to 8) as long as they '
    'divide the batch.',
    lower_bound=1,
  )


def _define_choice(
  flag: str, default: str, registry: base_config.Registry, doc: str
) -> None:
  """A flag that names an entry of a registry, in any case of letters."""
  flags.DEFINE_string(flag, default, f'{doc}: {", ".join(sorted(registry))}')

  def is_known(value: str) -> bool:
    try:
      registry.lookup(f'--{flag}', value)
    except ValueError as error:
      raise flags.ValidationError(str(error)) from None
    return True

  flags.register_validator(flag, is_known)


def main(argv: list[str]) -> None:
  """Makes the config, checks the folder, and runs."""
  values = flags.FLAGS
  command_line.start(
    argv, values.cpu_devices or runtime.num_cpu_devices(values.batch_size)
  )
  try:
    config = config_lib.post_process_config(
      make_config(
        source=values.source,
        model_type=values.model_type,
        steps=values.steps,
        seed=values.seed,
        name=values.name,
        seq_length=values.seq_length,
        batch_size=values.batch_size,
        learning_rate=values.learning_rate,
        num_seeds=values.num_seeds,
      )
    )
    # What can be wrong with a config is found before the folder is touched.
    train.build_parts(
      config, constants.build_data_generator, evaluator_lib.build_evaluator
    )
    folder = pathlib.Path(values.output_dir) / config.name
    open_folder(folder, config, values.overwrite)
  except ValueError as error:
    sys.exit(f'error: {error}')
  run(config, folder, values.num_sequences)


if __name__ == '__main__':
  define_flags()
  app.run(main)
