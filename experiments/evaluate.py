r"""Evaluates a run: any of its snapshots, on any source and any length.

  python experiments/evaluate.py runs/lstm_ptw_seed0
  python experiments/evaluate.py runs/lstm_ptw_seed0 --source=lin
  python experiments/evaluate.py runs/lstm_ptw_seed0 --seq_length=128
  python experiments/evaluate.py runs/lstm_ptw_seed0 --step=all
  python experiments/evaluate.py runs/lstm_ptw_seed0 --source=regular_shift \
    --set eval.data.trajectory_generator_kwargs.shift_period=8

Prints the table and writes it to <run>/evaluations/. Sequences are read a batch
at a time, shared out over all devices, so that a million of them
(--num_sequences) take no more memory of a device than one batch (--batch_size).
"""

import dataclasses
import pathlib
import sys
from typing import Any
import warnings

from absl import flags
import jax

from nonstationary_mbml import base_config
from nonstationary_mbml import train_state
from nonstationary_mbml.experiments import cli
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments import regret_table
from nonstationary_mbml.experiments import saved_runs
from nonstationary_mbml.runtime import atomic_files
from nonstationary_mbml.runtime import checkpointing
from nonstationary_mbml.runtime import devices
from nonstationary_mbml.runtime import multihost
from nonstationary_mbml.runtime import run_folder
from nonstationary_mbml.runtime import trained_run

_ALL = 'all'
_NEWEST = 'newest'


def make_config(
  run_config: config_lib.ExperimentConfig,
  source: str | None = None,
  seq_length: int | None = None,
  batch_size: int | None = None,
  items: tuple[str, ...] = (),
) -> config_lib.ExperimentConfig:
  """Returns the config of a run with another evaluation.

  Args:
    run_config: Config of the run, from `saved_runs.load_config`.
    source: A key of `TRAJECTORY_GENERATORS`; None is the evaluation's own.
    seq_length: T; None is the evaluation's own.
    batch_size: Sequences at a time; None is the evaluation's own.
    items: Further settings, `eval.<path>=<value>`.

  Raises:
    ValueError: If a value is wrong, or a path is not of the evaluation.
  """
  overrides = {
    'eval.seq_length': seq_length,
    'eval.batch_size': batch_size,
  }
  if source is not None:
    overrides['eval.data.trajectory_generator'] = source
    overrides['eval.data.trajectory_generator_kwargs'] = (
      constants.source_kwargs(source)
    )
  config = config_lib.with_overrides(
    run_config,
    {path: value for path, value in overrides.items() if value is not None},
  )
  settings = config_lib.parse_overrides(config, items)
  for path in settings:
    if not path.startswith('eval.'):
      raise ValueError(
        f'--set {path}: an evaluation changes nothing but eval.*; the network '
        'is as it was trained'
      )
  config = config_lib.with_overrides(config, settings)
  config.validate()
  return config.resolved()


def evaluate(
  folder: pathlib.Path,
  config: config_lib.ExperimentConfig,
  steps: tuple[int | None, ...],
  num_sequences: int,
  use_tqdm: bool = False,
) -> dict[str, Any]:
  """Returns the tables of a run at some of its steps, ready for JSON.

  All steps are evaluated on the same sequences: those of the table that the
  launch script made, if source and length are the same. Of several steps, one
  that cannot be read is left out with a warning.

  Args:
    folder: Folder of the run.
    config: Config from `make_config`; what it names is registered.
    steps: Steps to evaluate; None is the newest that can be read.
    num_sequences: N.
    use_tqdm: Show progress.

  Raises:
    ValueError: If a step is not there, none of them can be read, or the network
      cannot be evaluated so.
  """
  by_step, problems = [], []
  evaluator = exact = None
  for step in steps:
    try:
      run = saved_runs.load_run(folder, step, imports=())
    except checkpointing.DamagedError as error:
      problems.insert(0, str(error))
      continue
    if evaluator is None:
      evaluator = saved_runs.build_evaluator(run, config)
    table = regret_table.make_table(
      dataclasses.replace(run, config=config),
      evaluator,
      launch_keys(config)[0],
      num_sequences,
      use_tqdm,
    )
    exact = table.exact
    by_step.append({'step': run.step, 'table': table.rows})
  if not by_step:
    raise ValueError(checkpointing.shown_problems(problems))
  for problem in problems:
    warnings.warn(f'{problem}; left out', stacklevel=2)
  return {
    'eval': base_config.to_dict(config.eval),
    'num_sequences': num_sequences,
    'exact_predictor': exact,
    'steps': by_step,
  }


def launch_keys(
  config: config_lib.ExperimentConfig,
) -> tuple[jax.Array, jax.Array]:
  """Returns the keys of the sequences for a run's table, and for its figure."""
  seeds = trained_run.member_seeds(config.train)
  return tuple(
    jax.random.split(train_state.step_keys(config.seed, seeds[0], 0).evaluation)
  )


def format_content(content: dict[str, Any]) -> str:
  """Returns the tables of `evaluate` as text."""
  steps = content['steps']
  is_exact = content['exact_predictor'] is not None
  if len(steps) == 1:
    return regret_table.format_table(steps[0]['table'], is_exact=is_exact)
  network = [{'step': by['step'], **by['table'][0]} for by in steps]
  averaged = [
    {'step, averaged': by['step'], **row}
    for by in steps
    for row in by['table']
    if row.get('is_averaged')
  ]
  # The others are the same at every step.
  others = regret_table.reference_rows(steps[-1]['table'])
  blocks = [regret_table.format_table(network, 'step', is_exact)]
  if averaged:
    blocks.append(
      regret_table.format_table(averaged, 'step, averaged', is_exact)
    )
  if others:
    blocks.append(regret_table.format_table(others, is_exact=is_exact))
  return '\n\n'.join(blocks)


def write(folder: pathlib.Path, content: dict[str, Any]) -> pathlib.Path:
  """Writes the tables into the folder of a run, beside those of other settings.

  Returns:
    The file.

  Raises:
    SaveError: If it cannot be written.
  """
  source = content['eval']['data']['trajectory_generator']
  steps = [by['step'] for by in content['steps']]
  shown = str(steps[0]) if len(steps) == 1 else f'{steps[0]}-{steps[-1]}'
  name = f'{source}_T{content["eval"]["seq_length"]}_step_{shown}'
  folder = folder / 'evaluations'
  try:
    folder.mkdir(exist_ok=True)
    path = folder / f'{name}.json'
    if path.exists() and not _is_same_evaluation(path, content):
      path = checkpointing.free_path(path)
    atomic_files.write_json(path, content)
  except OSError as error:
    raise run_folder.save_error(folder, error) from error
  return path


def _is_same_evaluation(path: pathlib.Path, content: dict[str, Any]) -> bool:
  """Whether a file has a table of the same settings, made anew now."""
  try:
    present = atomic_files.read_json(path)
    steps = [[by['step'] for by in c['steps']] for c in (present, content)]
    return steps[0] == steps[1] and all(
      base_config.plain(present[name]) == base_config.plain(content[name])
      for name in ('eval', 'num_sequences')
    )
  except (ValueError, KeyError, TypeError):
    return False


def define_flags() -> None:
  """Defines the flags; not at import, so that scripts do not meet in a test."""
  define = cli.FlagDefiner()
  define.distributed()
  # Looked up with the run, which may import it.
  define.string(
    'source',
    None,
    'Where segments end; if unset, as in the evaluation of the run: '
    f'{", ".join(sorted(constants.TRAJECTORY_GENERATORS))}',
  )
  define.integer(
    'seq_length', None, 'Symbols per sequence; if unset, as in the run.', 2
  )
  define.integer(
    'batch_size', None, 'Sequences at a time; if unset, as in the run.', 1
  )
  define.string(
    'step',
    _NEWEST,
    'Step whose parameters are evaluated; several with commas between, '
    f'{_NEWEST} or {_ALL}.',
  )
  define.integer(
    'num_sequences', 10_240, 'Fresh sequences for the table.', lower_bound=2
  )
  define.integer(
    'cpu_devices',
    None,
    'Devices that the CPU is split into, each with its share of a batch; if '
    'unset, as many as cores (up to 8), or one with --distributed.',
    lower_bound=1,
  )
  define.strings(
    'set',
    'eval.<path>=<value> of any setting of the evaluation; may be given '
    'several times.',
  )


def _parse_steps(folder: pathlib.Path, text: str) -> tuple[int | None, ...]:
  if text.lower() == _NEWEST:
    return (None,)
  if text.lower() == _ALL:
    steps = saved_runs.saved_steps(folder)
    if not steps:
      raise ValueError(f'{folder} has kept no step')
    return steps
  try:
    return tuple(int(step) for step in text.split(','))
  except ValueError as error:
    raise ValueError(
      f'--step {text!r} is neither {_NEWEST}, {_ALL} nor steps with commas '
      'between'
    ) from error


def _print(
  config: config_lib.ExperimentConfig, content: dict[str, Any]
) -> None:
  """Prints the tables; before they are written, which may fail."""
  source = config.eval.data.trajectory_generator
  cli.say(
    f'{content["num_sequences"]} fresh sequences of {config.eval.seq_length} '
    f'symbols from the {source} source:\n'
  )
  cli.say(format_content(content))
  if content['exact_predictor'] is None:
    cli.say(f'\n{regret_table.no_exact_predictor(source)}')


def main(argv: list[str]) -> None:
  """Loads the run, evaluates, and prints and writes the tables."""
  if len(argv) != 2:
    sys.exit('error: give the folder of one run')
  values = flags.FLAGS
  folder = pathlib.Path(argv[1])
  # In one line, without the place in the code.
  warnings.showwarning = lambda message, *args, **kwargs: print(
    f'warning: {message}', file=sys.stderr
  )
  try:
    cli.check_distributed_flags()
    default = 1 if values.distributed else devices.num_cpu_devices()
    cli.start(argv[:1], values.cpu_devices or default)
    config = make_config(
      saved_runs.load_config(folder, cli.imports(values)),
      values.source,
      values.seq_length,
      values.batch_size,
      tuple(values['set'].value),
    )
    steps = multihost.on_primary(lambda: _parse_steps(folder, values.step))
    multihost.check_same(
      'their flags',
      {
        'num_sequences': values.num_sequences,
        **base_config.to_dict(config),
      },
    )
    content = evaluate(
      folder, config, steps, values.num_sequences, use_tqdm=True
    )
    if multihost.is_primary():
      _print(config, content)
    path = multihost.on_primary(lambda: str(write(folder, content)))
  except (ValueError, OSError) as error:
    cli.end_with(error)
  if multihost.is_primary():
    print(f'\nWrote {path}')


if __name__ == '__main__':
  define_flags()
  cli.run(main)
