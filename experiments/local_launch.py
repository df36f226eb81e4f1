"""Trains a predictor and sets it beside the exact Bayes predictors.

  python experiments/local_launch.py
  python experiments/local_launch.py --source=lin --model_type=stack_rnn

Writes config.json, metrics.json and figure.png into <output_dir>/<name>/. Every
setting without a flag is in `make_config`.
"""

from collections.abc import Mapping
import io
import json
import logging
import os
import pathlib
import sys
import time
from typing import Any

from absl import app
from absl import flags
import jax
from matplotlib import figure
import numpy as np

from nonstationary_mbml import base_config
from nonstationary_mbml import predictor_factories
from nonstationary_mbml import train
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments import evaluator as evaluator_lib
from nonstationary_mbml.experiments import files
from nonstationary_mbml.experiments import plotting

_SOURCE = flags.DEFINE_string(
  'source',
  'ptw',
  'Where segments end: ' + ', '.join(sorted(constants.TRAJECTORY_GENERATORS)),
)
_MODEL_TYPE = flags.DEFINE_string(
  'model_type',
  'lstm',
  'The network: ' + ', '.join(sorted(predictor_factories.PREDICTOR_FACTORIES)),
)
_STEPS = flags.DEFINE_integer('steps', 10_000, 'Training steps.', lower_bound=0)
_SEED = flags.DEFINE_integer(
  'seed', 0, 'All randomness follows from it.', lower_bound=0
)
_SEQ_LENGTH = flags.DEFINE_integer(
  'seq_length', 32, 'Symbols per sequence.', lower_bound=2
)
_BATCH_SIZE = flags.DEFINE_integer(
  'batch_size', 128, 'Sequences per training step.', lower_bound=1
)
_LEARNING_RATE = flags.DEFINE_float(
  'learning_rate', 2e-3, "Adam's.", lower_bound=0
)
_NUM_SEQUENCES = flags.DEFINE_integer(
  'num_sequences', 10_240, 'Fresh sequences for the table.', lower_bound=2
)
_OUTPUT_DIR = flags.DEFINE_string('output_dir', 'runs', 'Folder of all runs.')
_NAME = flags.DEFINE_string(
  'name', None, 'Folder of this run; <model_type>_<source>_seed<seed> if unset.'
)
_OVERWRITE = flags.DEFINE_bool(
  'overwrite', False, 'Replace a run of the same name with another config.'
)
_CPU_DEVICES = flags.DEFINE_integer(
  'cpu_devices',
  None,
  'Devices that the CPU is split into, each with its share of the batch; if '
  'unset, as many as cores (up to 8) as long as they divide the batch.',
  lower_bound=1,
)

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
# More shares of a small batch would cost more than they gain, the more so where
# not all visible cores are ours.
_MAX_CPU_DEVICES = 8
# Sequences among which that of the figure is chosen.
_FIGURE_BATCH = 64


@flags.validator('source')
def _check_source(source: str) -> bool:
  return _known(constants.TRAJECTORY_GENERATORS, 'source', source)


@flags.validator('model_type')
def _check_model_type(model_type: str) -> bool:
  return _known(
    predictor_factories.PREDICTOR_FACTORIES, 'model_type', model_type
  )


def make_config(
  source: str = 'ptw',
  model_type: str = 'lstm',
  steps: int = 10_000,
  seed: int = 0,
  name: str | None = None,
  seq_length: int = 32,
  batch_size: int = 128,
  learning_rate: float = 2e-3,
) -> config_lib.ExperimentConfig:
  """Returns the config of a run; `post_process_config` completes it.

  Args:
    source: A key of `TRAJECTORY_GENERATORS`.
    model_type: A key of `PREDICTOR_FACTORIES`.
    steps: Of training.
    seed: Of everything.
    name: Of the run; if None, made of network, source and seed.
    seq_length: T.
    batch_size: B.
    learning_rate: Adam's.

  Raises:
    ValueError: If a name is unknown.
  """
  source, model_type = source.lower(), model_type.lower()
  base_config.check_choice('model_type', model_type, _ARCHITECTURES)
  return config_lib.ExperimentConfig(
    name=name or f'{model_type}_{source}_seed{seed}',
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
      `MetaLearningEvaluator.evaluate`.
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
    return float(values.std(ddof=1) / np.sqrt(len(values)))

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
  result = train.train(
    config,
    constants.build_data_generator,
    evaluator_lib.build_evaluator,
    use_tqdm=True,
  )
  seconds = time.time() - start

  evaluator = evaluator_lib.build_evaluator(result.predictor, config.eval)
  keys = train.step_keys(config.seed, config.train.model_init_seed, 0)
  rng_table, rng_figure = jax.random.split(keys.evaluation)
  regrets = evaluator.evaluate(result.params, rng_table, num_sequences)
  exact = constants.exact_predictor(
    config.eval, evaluator.generator, evaluator.optimal_predictors
  )
  names = {evaluator_lib.NETWORK: config.model.model_type}
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
  sequence_figure(evaluator, result.params, rng_figure, drawn).savefig(
    png, format='png'
  )
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
  print(f'\nWrote config.json, metrics.json and figure.png to {folder}')
  return rows


def sequence_figure(
  evaluator: evaluator_lib.MetaLearningEvaluator,
  params: Any,
  rng: jax.Array,
  names: dict[str, str],
) -> figure.Figure:
  """Draws a sequence, predicted by the network and by PTW and LAD.

  Of a small batch it is the first sequence with two switching points or more,
  or else the first one.

  Args:
    evaluator: Knows source and predictors.
    params: Of its predictor.
    rng: Key of the batch.
    names: What to call the predictors to draw, by name in the evaluator.
  """
  size = (_FIGURE_BATCH, evaluator.seq_length)
  batch, parameters = evaluator.generator.sample(rng, *size)
  switches = evaluator.generator.switch_points(rng, *size)
  chosen = int(np.argmax(np.sum(switches, axis=1) >= 2))
  batch, parameters = batch[chosen, None], parameters[chosen, None]
  logits = evaluator.predict(params, batch)
  return plotting.plot_sequence(
    np.asarray(batch[0]),
    np.asarray(parameters[0]),
    np.asarray(switches[chosen]),
    {shown: _probabilities(logits[name]) for name, shown in names.items()},
    {
      shown: np.asarray(
        evaluator_lib.instantaneous_regret(logits[name], parameters)[0]
      )
      for name, shown in names.items()
    },
    title='One sequence: the true parameter, and what the predictors expect '
    'of each next symbol',
  )


def _probabilities(logits: jax.Array) -> np.ndarray:
  """Of symbols 2, ..., T of the only sequence, `[T - 1, K]`."""
  return np.asarray(jax.nn.softmax(logits[0, :-1], axis=-1))


def _known(registry: base_config.Registry, flag: str, value: str) -> bool:
  """Whether a flag names an entry of a registry; an error with names if not."""
  try:
    registry.lookup(f'--{flag}', value)
  except ValueError as error:
    raise flags.ValidationError(str(error)) from None
  return True


def _num_cpu_devices(batch_size: int) -> int:
  """As many as cores, up to a limit, as long as they divide the batch."""
  if hasattr(os, 'sched_getaffinity'):  # Those this process may use; on Linux.
    cores = len(os.sched_getaffinity(0))
  else:
    cores = os.cpu_count() or 1
  limit = min(cores, _MAX_CPU_DEVICES)
  return max(n for n in range(1, limit + 1) if batch_size % n == 0)


def main(argv: list[str]) -> None:
  """Makes the config, checks the folder, and runs."""
  # Which backends are not there is of no interest.
  logging.getLogger('jax._src.xla_bridge').setLevel(logging.WARNING)
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
  jax.config.update(
    'jax_num_cpu_devices',
    _CPU_DEVICES.value or _num_cpu_devices(_BATCH_SIZE.value),
  )
  try:
    config = config_lib.post_process_config(
      make_config(
        source=_SOURCE.value,
        model_type=_MODEL_TYPE.value,
        steps=_STEPS.value,
        seed=_SEED.value,
        name=_NAME.value,
        seq_length=_SEQ_LENGTH.value,
        batch_size=_BATCH_SIZE.value,
        learning_rate=_LEARNING_RATE.value,
      )
    )
    # What can be wrong with a config is found before the folder is touched.
    train.build_parts(
      config, constants.build_data_generator, evaluator_lib.build_evaluator
    )
    folder = pathlib.Path(_OUTPUT_DIR.value) / config.name
    open_folder(folder, config, _OVERWRITE.value)
  except ValueError as error:
    sys.exit(f'error: {error}')
  run(config, folder, _NUM_SEQUENCES.value)


if __name__ == '__main__':
  app.run(main)
