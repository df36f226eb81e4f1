"""Runs that were saved: loaded in one call, and evaluated on any source.

run = load_run('runs/lstm_ptw_seed0')
logits, _ = run.predictor.unroll(run.member(0), None, batch)
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
import contextlib
import copy
import os
import pathlib
import shutil
import tempfile
from typing import Any
import warnings

import numpy as np

from nonstationary_mbml import base_config
from nonstationary_mbml import predictor_factories
from nonstationary_mbml import train_state
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments import evaluator as evaluator_lib
from nonstationary_mbml.experiments import user_modules
from nonstationary_mbml.runtime import atomic_files
from nonstationary_mbml.runtime import run_folder
from nonstationary_mbml.runtime import saved_params
from nonstationary_mbml.runtime import trained_run


def load_config(
  path: str | pathlib.Path, imports: Sequence[str] | None = None
) -> config_lib.ExperimentConfig:
  """Returns a config that was saved as JSON.

  Args:
    path: Path of the file, or of the folder of a run. Fields that the file
      lacks, since they are newer, have their defaults.
    imports: Modules to import, as in `load_run`.

  Raises:
    ValueError: If it cannot be read, is not a valid config, or names a module
      that cannot be imported.
  """
  is_folder = os.path.isdir(path)  # isdir never raises.
  return _load_config(
    pathlib.Path(path, run_folder.CONFIG if is_folder else ''), imports
  )


def _load_config(
  path: pathlib.Path, imports: Sequence[str] | None
) -> config_lib.ExperimentConfig:
  config = run_folder.config_from_file(path, config_lib.ExperimentConfig)
  if imports is not None:
    names = base_config.coerce('imports', imports, tuple[str, ...])
    user_modules.import_all(map(base_config.absolute_import, names))
  else:
    try:
      user_modules.import_all(config.imports, str(path))
    except ValueError as error:
      raise ValueError(
        f'{path}: imports: {error}; say where it is now (imports=[...] of '
        'load_run, --import of a script), or load without it (imports=(), '
        '--import=)'
      ) from error
  return _without_defaults(config)


def _without_defaults(
  config: config_lib.ExperimentConfig,
) -> config_lib.ExperimentConfig:
  """An older config, which has defaults written out, as it would be today.

  So that what followed from a field follows again where that is changed.
  """
  given = config.eval
  if given.data is None or constants.EXACT in given.optimal_predictors:
    return config  # It was saved as it was given.
  try:
    complete = config.resolved()
  except ValueError:  # A name that is not registered here may not be needed.
    return config
  reduced = config

  def attempt(change: Callable[[config_lib.ExperimentConfig], None]) -> None:
    nonlocal reduced
    candidate = copy.deepcopy(reduced)
    change(candidate)
    with contextlib.suppress(ValueError):
      if candidate.resolved() == complete:
        reduced = candidate

  defaults = config_lib.EvalConfig()
  for field in ('seq_length', 'data', 'optimal_predictors'):
    attempt(lambda c, f=field: setattr(c.eval, f, getattr(defaults, f)))
  of_source = complete.eval.data.trajectory_generator_kwargs
  for name, kwargs in given.optimal_predictors_kwargs.items():
    attempt(lambda c, n=name: c.eval.optimal_predictors_kwargs.pop(n))
    # Those of a segment-length distribution go together.
    for keys in (of_source, *((key,) for key in kwargs)):
      attempt(
        lambda c, n=name, k=keys: _drop(
          c.eval.optimal_predictors_kwargs.get(n, {}), k
        )
      )
  for key in config.model.architecture_kwargs:
    attempt(lambda c, k=key: _drop(c.model.architecture_kwargs, (k,)))
  return reduced


def _drop(values: dict[str, Any], keys: Iterable[str]) -> None:
  for key in keys:
    values.pop(key, None)


def load_run(
  folder: str | pathlib.Path,
  step: int | None = None,
  imports: Sequence[str] | None = None,
) -> trained_run.Run:
  """Returns a run, with the parameters it had after a step.

  Changes nothing in the folder; the run may still be training. A checkpoint or
  a last line of the log that cannot be read is left out with a warning. The
  parameters have the dtypes in which they were trained. Of several processes
  all call it, and all get the same step.

  What the config of the run names in `imports` is imported, which runs code:
  `load_config(folder, imports=()).imports` shows what it would be.

  Args:
    folder: Folder of the run.
    step: One of `saved_steps`; None is the newest one.
    imports: Modules to import instead, by name or as paths of .py files; ()
      imports none. None imports those of the config, after saying so on stderr.

  Raises:
    ValueError: If there is no run, no such step, or a module that it names
      cannot be imported.
    DamagedError: If nothing can be read, or it is of another network.
  """
  folder = pathlib.Path(folder)
  config = _load_config(folder / run_folder.CONFIG, imports)
  entries, torn = run_folder.read_metrics(folder / run_folder.METRICS)
  if torn:
    warnings.warn(
      f'{folder / run_folder.METRICS}: the last line is torn, and left out',
      stacklevel=2,
    )
  alphabet_size = constants.build_data_generator(config.data).alphabet_size
  predictor = predictor_factories.build_predictor(
    predictor_factories.resolved(config.model, config.train.seq_length),
    alphabet_size,
  )
  step, params, average = train_state.load_params(
    folder, step, config, predictor, alphabet_size
  )
  history, member_histories = run_folder.split_entries(entries)
  return trained_run.Run(
    config=config,
    predictor=predictor,
    all_params=params,
    all_ema_params=average,
    step=step,
    history=history,
    member_histories=member_histories,
    folder=folder,
  )


def saved_steps(folder: str | pathlib.Path) -> tuple[int, ...]:
  """Returns the steps whose parameters a run has kept, in order.

  Raises:
    ValueError: If there is no run.
  """
  checkpoints, snapshots = saved_params.open_folder(pathlib.Path(folder))
  return tuple(sorted({*checkpoints.steps(), *snapshots.steps()}))


_EXPORTED_ENTRIES = 20
# Tells a copy from a run, which has more than can be made again.
_EXPORTED = 'exported.json'
# Entries of an environment that tell of somebody's machine only.
_PRIVATE = ('command', 'host')


def export(
  folder: str | pathlib.Path,
  target: str | pathlib.Path,
  imports: Sequence[str] | None = None,
) -> int:
  """Copies what is worth keeping of a finished run; `load_run` loads the copy.

  That is its last snapshot, config, table and environment, without names of
  hosts and paths (of a file that it imports, the name alone); and of the log,
  entries in equal factors of the steps.

  Args:
    folder: Folder of the run.
    target: Folder of the copy; replaced if it is there. It is written whole or
      not at all.
    imports: Modules to import, as in `load_run`.

  Returns:
    The bytes of the copy.

  Raises:
    ValueError: If the run has not ended or is damaged, or the target is
      something else.
    OSError: If it cannot be written.
  """
  folder, target = pathlib.Path(folder), pathlib.Path(target)
  schedule = _load_config(folder / run_folder.CONFIG, imports).schedule
  steps = schedule.training_steps
  checkpoints, snapshots = saved_params.open_folder(folder)
  if steps not in snapshots.steps():
    reason = 'its newest checkpoint says that it has not ended'
    if schedule.num_saves == 0:
      reason = 'schedule.num_saves is 0'
    elif steps in checkpoints.steps():
      reason = 'it has ended, but that snapshot is not there'
    elif not checkpoints.steps():
      reason = 'nor has it a checkpoint'
    raise ValueError(
      f'{folder} has no snapshot of its last step, {steps}: {reason}'
    )
  if target.exists() and not (target / _EXPORTED).exists():
    raise ValueError(f'{target} is there already, and no copy of a run')
  entries, _ = run_folder.read_metrics(folder / run_folder.METRICS)
  kept = {entry['step'] for entry in thinned(entries, _EXPORTED_ENTRIES)}
  target.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=target.parent, prefix='.export') as new:
    new = pathlib.Path(new) / 'run'
    name = pathlib.Path(run_folder.SNAPSHOTS) / str(steps)
    try:
      shutil.copytree(folder / name, new / name)
    except shutil.Error as error:
      # The error has an entry for every file; one reason is enough.
      raise OSError(error.args[0][0][-1]) from error
    # Orbax writes into them where the run was.
    for path in (new / name).rglob('commit_success.txt'):
      path.write_text('Checkpoint commit was successful\n')
    config = atomic_files.read_json(folder / run_folder.CONFIG)
    if 'imports' in config:
      config['imports'] = list(map(os.path.basename, config['imports']))
    atomic_files.write_json(new / run_folder.CONFIG, config)
    if (folder / 'table.json').exists():
      shutil.copyfile(folder / 'table.json', new / 'table.json')
    starts = run_folder.read_starts(folder)
    for start in starts:
      for name in _PRIVATE:
        start.pop(name, None)
    atomic_files.write_json(new / run_folder.ENVIRONMENT, {'starts': starts})
    lines = (folder / run_folder.METRICS).read_bytes().splitlines(True)
    atomic_files.write_whole(
      new / run_folder.METRICS,
      b''.join(
        line
        for line, entry in zip(lines, entries, strict=False)
        if entry['step'] in kept
      ),
    )
    atomic_files.write_json(new / _EXPORTED, {'steps_of_the_log': sorted(kept)})
    with base_config.naming(f'the copy of {folder} cannot be loaded'):
      load_run(new, imports=())  # They are there already.
    if target.exists():
      target.rename(new.with_name('old'))
    new.rename(target)
  return sum(path.stat().st_size for path in target.rglob('*'))


def thinned(
  entries: list[dict[str, float]], number: int
) -> list[dict[str, float]]:
  """Returns at most so many entries of a log, in equal factors of the steps.

  The first and the last one are among them.
  """
  if not entries:
    return []
  steps = np.array([entry['step'] for entry in entries])
  wanted = np.geomspace(max(1, steps[0]), max(1, steps[-1]), number)
  nearest = {int(np.abs(steps - step).argmin()) for step in wanted}
  return [entries[index] for index in sorted(nearest)]


def evaluator_of(
  run: trained_run.Run,
  source: config_lib.DataConfig | None = None,
  seq_length: int | None = None,
  batch_size: int | None = None,
) -> evaluator_lib.MetaLearningEvaluator:
  """Returns an evaluator of a run's network.

  Args:
    run: Run from `load_run`.
    source: Source to evaluate on, whose own Bayes predictor is 'exact'; None
      is the one of the run's evaluation.
    seq_length: T; None is that of the run's evaluation.
    batch_size: Sequences at a time; None is that of the run's evaluation.

  Raises:
    ValueError: If the network, the source or a predictor cannot be that long,
      or the source has another alphabet than the run's.
  """
  config = copy.deepcopy(run.config)
  for field, value in (
    ('data', copy.deepcopy(source)),
    ('seq_length', seq_length),
    ('batch_size', batch_size),
  ):
    if value is not None:
      setattr(config.eval, field, value)
  return build_evaluator(run, config)


def build_evaluator(
  run: trained_run.Run, config: config_lib.ExperimentConfig
) -> evaluator_lib.MetaLearningEvaluator:
  """Returns the evaluator of a run's network that a config describes.

  Args:
    run: Run from `load_run`.
    config: Config of the run with another evaluation.

  Raises:
    ValueError: If it is not valid, or its source has another alphabet than the
      run's.
  """
  config.validate()
  evaluator = evaluator_lib.build_evaluator(
    run.predictor, config.resolved().eval
  )
  trained_on = constants.build_data_generator(run.config.data).alphabet_size
  if evaluator.alphabet_size != trained_on:
    raise ValueError(
      f'eval.data has an alphabet of {evaluator.alphabet_size} symbols, but '
      f'{run.folder} was trained on {trained_on}'
    )
  return evaluator
