"""Trains a predictor and sets it beside the exact Bayes predictors.

  python experiments/local_launch.py
  python experiments/local_launch.py --source=lin --model_type=stack_rnn

Every field of the config can be set, by its path; so can what its dicts hold:

  --set train.clip_grad_norm=none --set model.architecture_kwargs.hidden_size=32

A run can start from the config of another. Flags that are given change it, and
--set comes last; what follows from the fields that they change (the depth of
PTW, the evaluation) follows:

  --config runs/lstm_ptw_seed0 --seq_length=64 --name=longer

A run that was killed goes on when the same command is given again. Ctrl-C and
SIGTERM save first, and exit with 75.

Several machines train one network (or ensemble) together when each is given the
same command, with a folder that they share. A TPU pod and SLURM tell them how
to meet; elsewhere, on machine 0, 1, ...:

  --distributed --coordinator=10.0.0.1:1234 --num_processes=2 --process_id=0

Writes into <output_dir>/<name>/: config.json, environment.json, metrics.jsonl,
checkpoints/ and snapshots/, and at the end table.json and figure.png.
"""

from collections.abc import Sequence
import operator
import pathlib
import sys
import time
from typing import Any

from absl import flags
import jax
from matplotlib import figure

from nonstationary_mbml import base_config
from nonstationary_mbml import predictor_factories
from nonstationary_mbml import train
from nonstationary_mbml import train_state
from nonstationary_mbml.experiments import cli
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments import evaluate
from nonstationary_mbml.experiments import evaluator as evaluator_lib
from nonstationary_mbml.experiments import plotting
from nonstationary_mbml.experiments import regret_table
from nonstationary_mbml.experiments import saved_runs
from nonstationary_mbml.experiments import user_modules
from nonstationary_mbml.runtime import atomic_files
from nonstationary_mbml.runtime import devices
from nonstationary_mbml.runtime import multihost
from nonstationary_mbml.runtime import preemption
from nonstationary_mbml.runtime import run_folder
from nonstationary_mbml.runtime import tensorboard
from nonstationary_mbml.runtime import trained_run

# Arguments that each network needs, or is better off with.
_RECURRENT = {'hidden_size': 64}
_TRANSFORMER = {
  'embedding_dim': 64,
  'num_layers': 2,
  'num_heads': 4,
  'dropout_prob': 0.0,
}
_ARCHITECTURES = {
  # An output sees 2^5 = 32 symbols: the default --seq_length.
  'cnn': {'hidden_layers_sizes': 5 * (64,), 'kernel_size': 2},
  'gru': _RECURRENT,
  'rnn': {'core': 'vanilla_rnn', **_RECURRENT},
  'lstm': _RECURRENT,
  'stack_rnn': _RECURRENT,
  'transformer': _TRANSFORMER,
  'sliding_window_transformer': {'context_length': 16, **_TRANSFORMER},
}
# Fields of a config that each flag decides.
_FIELDS_OF_FLAGS = {
  'source': ('data.trajectory_generator', 'data.trajectory_generator_kwargs'),
  'alphabet_size': (
    'data.iid_distribution_kwargs',
    'data.parameter_distribution_params',
  ),
  'model_type': ('model.model_type', 'model.architecture_kwargs'),
  'steps': ('schedule.training_steps',),
  'seed': ('seed',),
  'num_seeds': ('train.model_init_seed',),
  'seq_length': ('train.seq_length',),
  'batch_size': ('train.batch_size',),
  'learning_rate': ('train.learning_rate',),
  'name': ('name',),
}


def make_config(
  source: str = 'ptw',
  model_type: str = 'lstm',
  steps: int = 5_000,
  seed: int = 0,
  name: str | None = None,
  seq_length: int = 32,
  batch_size: int = 128,
  learning_rate: float = config_lib.RECIPE['learning_rate'],
  num_seeds: int = 1,
  alphabet_size: int = 2,
) -> config_lib.ExperimentConfig:
  """Returns the config of a run.

  Args:
    source: A key of `TRAJECTORY_GENERATORS`.
    model_type: A key of `PREDICTOR_FACTORIES`.
    steps: Number of training steps.
    seed: Seed from which all randomness follows.
    name: Name of the run; if None, made of network, source and seeds.
    seq_length: T.
    batch_size: B.
    learning_rate: Learning rate; the peak of its schedule.
    num_seeds: Networks that are trained together; above 1, an ensemble.
    alphabet_size: K; the prior is a Dirichlet(1/2).

  Raises:
    ValueError: If a name is unknown.
  """
  source, model_type = source.lower(), model_type.lower()
  predictor_factories.PREDICTOR_FACTORIES.lookup('model_type', model_type)
  seeds = f'_{num_seeds}seeds' if num_seeds > 1 else ''
  return config_lib.ExperimentConfig(
    name=name or f'{model_type}_{source}_seed{seed}{seeds}',
    seed=seed,
    data=config_lib.DataConfig(
      iid_distribution='categorical',
      iid_distribution_kwargs={'feature_size': alphabet_size},
      parameter_distribution='dirichlet',
      parameter_distribution_params=0.5,
      trajectory_generator=source,
      trajectory_generator_kwargs=constants.source_kwargs(source),
    ),
    model=base_config.ModelConfig(
      model_type=model_type,
      architecture_kwargs=_ARCHITECTURES.get(model_type, {}),
    ),
    train=base_config.TrainConfig(
      **{**config_lib.RECIPE, 'learning_rate': learning_rate},
      seq_length=seq_length,
      batch_size=batch_size,
      model_init_seed=tuple(range(num_seeds)) if num_seeds > 1 else 0,
    ),
    schedule=base_config.ScheduleConfig(training_steps=steps),
    logger=base_config.LoggerConfig(log_frequency=100),
    eval=config_lib.EvalConfig(batch_size=512),
  )


def config_from_flags(values: flags.FlagValues) -> config_lib.ExperimentConfig:
  """Returns the config that the flags describe.

  Without `--config` it is that of `make_config`. On top of a saved one come
  only those flags that were given. `--set` comes last. Whatever can be wrong,
  but for the devices, is found here, and JAX is not started.

  Args:
    values: Parsed flags, as from `define_flags`.

  Raises:
    ValueError: If the config is not valid.
  """
  imports = cli.imports(values)
  saved = None
  if values.config is not None:
    # First: it may import what flags name.
    saved = saved_runs.load_config(values.config, imports)
  config = make_config(
    **{flag: values[flag].value for flag in _FIELDS_OF_FLAGS}
  )
  if saved is not None:
    of_flags = config
    config = config_lib.with_overrides(
      saved,
      {
        path: operator.attrgetter(path)(of_flags)
        for flag, paths in _FIELDS_OF_FLAGS.items()
        if values[flag].present
        for path in paths
      },
    )
  if imports is not None:
    config.imports = imports
  overrides = config_lib.parse_overrides(config, values['set'].value)
  config = config_lib.with_overrides(config, overrides)
  user_modules.import_all(config.imports)  # --set may have added some.
  constants.check(config)
  return config


def build_components(config: config_lib.ExperimentConfig) -> train.Components:
  """Returns what a config describes; raises ValueError if it is not valid."""
  return train.build_components(
    config, constants.build_data_generator, evaluator_lib.build_evaluator
  )


def run(
  config: config_lib.ExperimentConfig,
  folder: pathlib.Path,
  num_sequences: int,
  components: train.Components | None = None,
  callbacks: Sequence[train.Callback] = (),
) -> list[dict[str, Any]]:
  """Trains and evaluates as configured, and writes the results.

  A run that was stopped goes on from its last checkpoint. If there are several
  processes, all call this, and the first one writes.

  Args:
    config: Config of the run.
    folder: Folder of the run.
    num_sequences: Number of sequences for the table.
    components: What `build_components` made of the config; None makes it here.
    callbacks: Functions that are called at every log, as in `train.train`.

  Returns:
    The rows of the table.

  Raises:
    ValueError: As `train.train_components`; so are the errors that follow.
    NonFiniteError: If training diverges.
    StoppedError: If it was asked to stop.
    SaveError: If the folder cannot be written to.
  """
  if components is None:
    components = build_components(config)
  start = time.monotonic()
  with devices.count_compilations() as compilations:
    trained = train.train_components(
      config, components, use_tqdm=True, folder=folder, callbacks=callbacks
    )
    seconds = time.monotonic() - start
    rng_table, rng_figure = evaluate.launch_keys(config)
    table = regret_table.make_table(
      trained, components.evaluator, rng_table, num_sequences, use_tqdm=True
    )
    if multihost.is_primary():
      _print_table(config, table, num_sequences, seconds)
    multihost.on_primary(
      lambda: _write_table(trained, table, rng_figure, num_sequences)
    )
  if not multihost.is_primary():
    return table.rows
  print(
    f'\nCompiled {compilations.compiled} programs and loaded '
    f'{compilations.loaded} from the cache, in {compilations.seconds:.1f} s.'
  )
  print(f'Wrote the run, table.json and figure.png to {folder}')
  return table.rows


def _print_table(
  config: config_lib.ExperimentConfig,
  table: regret_table.Table,
  num_sequences: int,
  seconds: float,
) -> None:
  """Prints the table of a run; before it is written, which may fail."""
  evaluation = config.resolved().eval
  source = evaluation.data.trajectory_generator
  cli.say(
    f'\n{num_sequences} fresh sequences of {evaluation.seq_length} symbols '
    f'from the {source} source, after {config.schedule.training_steps} steps '
    f'({seconds:.0f} s):\n'
  )
  is_exact = table.exact is not None
  cli.say(regret_table.format_table(table.rows, is_exact=is_exact))
  if not is_exact:
    cli.say(f'\n{regret_table.no_exact_predictor(source)}')


def _write_table(
  trained: trained_run.Run,
  table: regret_table.Table,
  rng: jax.Array,
  num_sequences: int,
) -> None:
  """Writes figure and table of a run that has ended."""
  folder = trained.folder
  sequence = evaluator_lib.draw_sequence(
    trained.evaluator, trained.member(0), rng
  )
  drawn = constants.in_figures(table.names, table.exact)
  png = atomic_files.to_png(sequence_figure(sequence, drawn))
  try:
    atomic_files.write_whole(folder / 'figure.png', png)
    # Last: a sweep takes a run that has its table for finished.
    atomic_files.write_json(
      folder / 'table.json',
      {
        'num_sequences': num_sequences,
        'exact_predictor': table.exact,
        'table': table.rows,
      },
    )
  except OSError as error:
    raise run_folder.SaveError(
      f'cannot write to {folder}: {error.strerror}; the run is whole'
    ) from error


def clear(folder: pathlib.Path) -> None:
  """Deletes what a run of the launch script wrote, to begin it anew.

  Raises:
    ValueError: If another process is training it.
    SaveError: If it cannot be deleted.
  """
  run_folder.RunFolder(folder).clear()

  def clear_tables() -> None:
    for name in ('table.json', 'figure.png'):
      (folder / name).unlink(missing_ok=True)

  multihost.on_primary(clear_tables)


def sequence_figure(
  sequence: evaluator_lib.DrawnSequence, names: dict[str, str]
) -> figure.Figure:
  """Draws a sequence and its predictions.

  Args:
    sequence: Sequence from `draw_sequence`.
    names: Labels of the predictors to draw, by name in the evaluator.
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


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the flags; not at import, so that scripts do not meet in a test.

  Args:
    values: Flag values to define them in.
  """
  define = cli.FlagDefiner(values)
  define.distributed()
  define.choice(
    'source',
    'ptw',
    constants.TRAJECTORY_GENERATORS,
    'Where segments end',
    config='config',
  )
  define.integer(
    'alphabet_size',
    2,
    'Different symbols, K; the prior of their probabilities is Dirichlet(1/2), '
    'or --set data.parameter_distribution_params.',
    lower_bound=2,
    upper_bound=constants.MAX_ALPHABET_SIZE,
  )
  define.choice(
    'model_type',
    'lstm',
    predictor_factories.PREDICTOR_FACTORIES,
    'The network',
    config='config',
  )
  define.integer('steps', 5_000, 'Training steps.', lower_bound=0)
  define.seed('All randomness follows from it.')
  define.integer(
    'num_seeds',
    1,
    'Networks that are trained together, each from its own initial parameters '
    'and on its own data; the table has their mean.',
    lower_bound=1,
    upper_bound=2**16,
  )
  define.integer('seq_length', 32, 'Symbols per sequence.', lower_bound=2)
  define.integer(
    'batch_size', 128, 'Sequences per training step.', lower_bound=1
  )
  define.number(
    'learning_rate',
    config_lib.RECIPE['learning_rate'],
    'Learning rate; the peak of its schedule.',
    lower_bound=0,
  )
  define.integer(
    'num_sequences', 10_240, 'Fresh sequences for the table.', lower_bound=2
  )
  define.string(
    'config',
    None,
    'A config.json to start from, or the folder of its run; other flags change '
    'it where they are given.',
  )
  define.strings(
    'set',
    'path=value of any field of the config, such as train.learning_rate=3e-4; '
    'may be given several times, and of two for one path the last wins',
  )
  define.string('output_dir', 'runs', 'Folder of all runs.')
  define.string(
    'name',
    None,
    'Folder of this run; if unset, that of --config, or else '
    '<model_type>_<source>_seed<seed>, with _<num_seeds>seeds after it for '
    'more than one.',
  )
  define.boolean(
    'overwrite',
    False,
    'Delete a run of the same name, and begin anew. Without it, a run of the '
    'same config goes on, and one of another is an error.',
  )
  define.boolean(
    'tensorboard',
    False,
    "Also log for TensorBoard, into the run's tensorboard/; that needs "
    'tensorboardX.',
  )
  define.integer(
    'cpu_devices',
    None,
    'Devices that the CPU is split into, each with its share of the batch or '
    'of the networks; if unset, as many as cores (up to 8) as long as they '
    'divide the batch, or one with --distributed.',
    lower_bound=1,
  )
  define.boolean(
    'stop_with_stdin',
    False,
    'Stop, as after SIGTERM, when the standard input ends: a script that '
    'starts runs keeps it open, and whatever ends the script stops its runs.',
  )


def main(argv: list[str]) -> None:
  """Makes the config, checks the folder, and runs."""
  values = flags.FLAGS
  try:
    config = config_from_flags(values)
    folder = pathlib.Path(values.output_dir) / config.name
    callbacks = []
    if values.tensorboard:
      callbacks.append(tensorboard.Writer(folder / run_folder.TENSORBOARD))
    cli.check_distributed_flags()
    # Other processes may have the other cores.
    default = 1
    if not values.distributed:
      default = devices.num_cpu_devices(config.train.batch_size)
    cli.start(argv, values.cpu_devices or default)
    # An error in a config is found before the folder is touched.
    components = build_components(config)
    multihost.check_same(
      'their flags',
      {
        'overwrite': values.overwrite,
        'num_sequences': values.num_sequences,
        **base_config.to_dict(config),
      },
    )
    if values.overwrite:
      # Before anything is deleted.
      train_state.initial_params(
        config, components.predictor, components.generator.alphabet_size
      )
      clear(folder)
    if values.stop_with_stdin:
      preemption.terminate_with_stdin()
    run(config, folder, values.num_sequences, components, callbacks)
  except train.StoppedError as error:
    print(error, file=sys.stderr)
    sys.exit(cli.EXIT_STOPPED)
  except KeyboardInterrupt:
    print(
      f'stopped; what {folder} holds is whole, and started again, it goes on '
      'from there',
      file=sys.stderr,
    )
    multihost.exit_now(cli.EXIT_STOPPED)
    sys.exit(cli.EXIT_STOPPED)
  except (ValueError, OSError, train.NonFiniteError) as error:
    cli.end_with(error)


if __name__ == '__main__':
  define_flags()
  cli.run(main)
