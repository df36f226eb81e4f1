r"""Studies the networks of a sweep: tables and figures.

  python experiments/analysis/report.py                # all studies
  python experiments/analysis/report.py --study=length_generalization
  python experiments/analysis/report.py --draw_only    # from the tables alone
  python experiments/analysis/report.py --sweep_dir=runs/sweeps/tiny \
    --output_dir=runs/t

`studies.py` says what each study is. Measures the networks of a finished sweep
(with --partial those that are finished) and writes into <output_dir>/ the
tables (CSV: a row for every seed), the figures (PNG), and tables.md, with means
and standard errors over seeds. With --draw_only the figures and tables.md are
made again from the CSV files that are there.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import os
import pathlib
import sys
from typing import Any

from absl import flags
from matplotlib import figure as figure_lib

from nonstationary_mbml import base_config
from nonstationary_mbml.experiments import cli
from nonstationary_mbml.experiments.analysis import studies
from nonstationary_mbml.experiments.analysis import study_figures
from nonstationary_mbml.experiments.analysis import study_tables
from nonstationary_mbml.experiments.analysis import trained_networks
from nonstationary_mbml.experiments.sweeps import sweep_folder
from nonstationary_mbml.runtime import atomic_files
from nonstationary_mbml.runtime import run_folder

RUNS = 'runs'
COMMANDS = 'commands.json'
TABLES = 'tables.md'
_DRAW = {
  'on_distribution': study_figures.draw_on_distribution,
  'learning': study_figures.draw_learning,
  'off_distribution': study_figures.draw_off_distribution,
  'post_switch_regret': study_figures.draw_post_switch_regret,
}
# Architectures whose nearest exact predictors are drawn.
_RESEMBLANCES = ('lstm', 'transformer_sin_cos')
Rows = Sequence[dict[str, Any]]


def describe_runs(networks: studies.Networks) -> list[dict[str, Any]]:
  """Returns a row for every run: its settings, machine and time."""
  rows = []
  for network in networks:
    row = {
      'point': network.config.name,
      'source': network.source,
      'predictor': network.architecture,
      'num_seeds': len(network.seeds),
      'seeds': ' '.join(map(str, network.seeds)),
      'learning_rate': network.config.train.learning_rate,
      'seq_length': network.config.train.seq_length,
      'steps': network.config.schedule.training_steps,
    }
    starts = run_folder.read_starts(network.folder)
    with _naming(network.folder / run_folder.ENVIRONMENT):
      last = starts[-1]
      row |= {
        'seconds': sum(start['seconds'] for start in starts),
        'starts': len(starts),
        'device': ' '.join(last['devices']),
        'python': last['python'],
        'jax': last['packages']['jax'],
        'commit': last['commit'],
      }
    rows.append(row)
  return rows


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
  """Turns errors inside a `with` into one that names the file at fault."""
  try:
    yield
  except (
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
  ) as error:
    raise ValueError(f'{path} is not what it should be: {error!r}') from error


def _read_commands(folder: pathlib.Path) -> dict[str, Any]:
  """Digest of the sweep that a folder has tables of, and their commands."""
  path = folder / COMMANDS
  if not path.exists():
    return {'sweep': None, 'commands': {}}
  content = atomic_files.read_json(path)
  with _naming(path):
    return {'sweep': content['sweep'], 'commands': dict(content['commands'])}


def measure(
  networks: studies.Networks,
  chosen: Sequence[str],
  folder: pathlib.Path,
  options: studies.Options,
  command: str,
  sweep: str = '',
) -> None:
  """Runs studies, and writes a CSV file for each.

  Args:
    networks: Networks of a sweep.
    chosen: Keys of `STUDIES`.
    folder: Folder to write to.
    options: Options of the studies.
    command: Command line of the script, for the record.
    sweep: Digest of the sweep, as from `SweepFolder.digest`. A folder has
      tables of one sweep only.

  Raises:
    ValueError: If the networks cannot be compared, or the folder has tables of
      another sweep.
    SaveError: If a table cannot be written; then it is printed.
  """
  made = _read_commands(folder)
  if made['sweep'] not in (None, sweep):
    raise ValueError(
      f'{folder} has the tables of another sweep; choose another --output_dir, '
      'or delete them'
    )
  made['sweep'] = sweep

  def write(table: str, rows: Rows) -> None:
    path = folder / f'{table}.csv'
    if rows:
      try:
        atomic_files.write_csv(path, rows)
      except OSError as error:
        cli.say(f'{path.name}:\n{atomic_files.to_csv(rows)}')
        raise run_folder.save_error(folder, error) from error
      made['commands'][table] = command
    else:  # Nothing to measure; an earlier table is of something else.
      path.unlink(missing_ok=True)
      made['commands'].pop(table, None)
    atomic_files.write_json(folder / COMMANDS, made)

  write(RUNS, describe_runs(networks))
  for name in chosen:
    print(f'{name} ...', file=sys.stderr, flush=True)
    write(name, studies.STUDIES[name](networks, options))


def _figures(table: str, rows: Rows) -> Iterator[tuple[str, figure_lib.Figure]]:
  """Yields the figures of a table, by name."""
  if table == 'length_generalization':
    yield (
      table,
      study_figures.draw_length_generalization(
        rows, studies.length_of_training(rows)
      ),
    )
  elif table == 'linear_probe':
    # A posterior that depends on time only has nothing to show.
    if any(row['r2_given_time'] is not None for row in rows):
      yield table, study_figures.draw_linear_probe(rows)
  elif table in _DRAW:
    yield table, _DRAW[table](rows)
  if table == 'off_distribution':
    names = {row['predictor'] for row in rows}
    for name in _RESEMBLANCES:
      if name in names:
        yield f'resemblance_{name}', study_figures.draw_resemblance(rows, name)


def draw(folder: pathlib.Path) -> list[str]:
  """Draws all tables that a folder has, and writes tables.md.

  Args:
    folder: Folder with the CSV files, and the commands that made them.

  Returns:
    The names of the files that were written.

  Raises:
    ValueError: If there is no table, or one that cannot be read.
    OSError: If a file cannot be written.
  """
  commands = _read_commands(folder)['commands']
  written, blocks = [], []
  for name in (RUNS, *studies.STUDIES):
    path = folder / f'{name}.csv'
    if not path.exists():
      continue
    rows = atomic_files.read_csv(path)
    made_by = f', made by `{commands[name]}`' if name in commands else ''
    with _naming(path):
      blocks += [
        f'## {title}\n\nFrom `{path.name}`{made_by}.\n\n{to_text(rows)}'
        for table, title, to_text in study_tables.TABLES
        if table == name
      ]
      pngs = {
        f'{drawn}.png': atomic_files.to_png(figure)
        for drawn, figure in _figures(name, rows)
      }
    for png, content in pngs.items():
      atomic_files.write_whole(folder / png, content)
    written += pngs
  if not blocks:
    raise ValueError(f'{folder} has no tables to draw')
  text = '\n'.join(
    ['# Tables\n\nMeans ± standard errors over seeds.\n', *blocks]
  )
  atomic_files.write_whole(folder / TABLES, text.encode())
  return [*written, TABLES]


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the flags; not at import, so that scripts do not meet in a test."""
  define = cli.FlagDefiner(values)
  define.strings(
    'study',
    f'Study to run, if not all: {", ".join(studies.STUDIES)}; may be given '
    'several times.',
  )
  define.string('sweep_dir', 'runs/sweeps/small', 'Sweep directory.')
  define.string(
    'output_dir',
    None,
    'Folder of the tables and figures; unset: results/<name of the sweep>.',
  )
  define.integer(
    'num_sequences',
    2_048,
    'Fresh sequences of every source; the linear probe reads 65,536 symbols.',
    lower_bound=2,
  )
  define.seed('Seed of the sequences.')
  define.boolean(
    'partial',
    False,
    'Measure the points that are finished, if not all are.',
  )
  define.boolean(
    'draw_only',
    False,
    'Draw the tables that <output_dir> has, and measure nothing.',
  )


def _check_finished(sweep: sweep_folder.SweepFolder, partial: bool) -> None:
  points, finished = sweep.points(), sweep.finished()
  if not finished or (len(finished) < len(points) and not partial):
    raise ValueError(
      f'{len(finished)} of {len(points)} points of {sweep.path} are '
      'finished; sweeps/launch.py goes on, --partial takes what there is, and '
      '--draw_only draws the tables again'
    )


def main(argv: list[str]) -> None:
  """Measures and draws."""
  values = flags.FLAGS
  sweep = sweep_folder.SweepFolder(values.sweep_dir)
  folder = pathlib.Path(
    values.output_dir
    or pathlib.Path('results', os.path.basename(os.path.abspath(sweep.path)))
  )
  chosen = values.study or list(studies.STUDIES)
  try:
    for study in chosen:
      base_config.check_choice('--study', study, studies.STUDIES)
    if not values.draw_only:
      _check_finished(sweep, values.partial)
    cli.start(argv)
    if not values.draw_only:
      cli.make_folder(folder)
      measure(
        trained_networks.networks(sweep.path, cli.imports(values)),
        chosen,
        folder,
        studies.Options(values.num_sequences, values.seed, use_tqdm=True),
        f'python experiments/analysis/report.py --sweep_dir={sweep.path} '
        f'--output_dir={folder} --num_sequences={values.num_sequences} '
        f'--seed={values.seed}' + (' --partial' if values.partial else ''),
        sweep.digest(),
      )
    written = draw(folder)
  except (ValueError, OSError) as error:
    cli.end_with(error)
  print(f'Wrote {", ".join(written)} to {folder}')


if __name__ == '__main__':
  define_flags()
  cli.run(main)
