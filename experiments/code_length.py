r"""How short exact predictors and trained networks make a file.

  python experiments/code_length.py LICENSE
  python experiments/code_length.py data.bin --as=bits --predictors=ptw,lad
  python experiments/code_length.py returns.csv --as=csv --column=up \
    --predictors=kt,ptw,lad,run_length,forget_me_not --hazard=0.01 \
    --network=results/models/lstm_ptw

A predictor codes a symbol of probability p in -log2 p bits. Prints a table
beside gzip, bz2 and xz, and writes it with a figure into <output_dir>. A file
is read in blocks, and a pipe up to --max_symbols.

Beyond --max_run_lengths symbols, lad and run_length keep the heaviest starts of
segments only; the table says how many bits that costs at most.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import inspect
import pathlib
import sys
import time
from typing import Any
from typing import NamedTuple

from absl import flags
import jax
from matplotlib import figure as figure_lib
import numpy as np

from nonstationary_mbml import base_config
from nonstationary_mbml import predictor_factories
from nonstationary_mbml import predictors
from nonstationary_mbml.experiments import cli
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments import plotting
from nonstationary_mbml.experiments import ptw_predictors
from nonstationary_mbml.experiments import run_length_predictors
from nonstationary_mbml.experiments import saved_runs
from nonstationary_mbml.experiments import symbol_files
from nonstationary_mbml.runtime import atomic_files
from nonstationary_mbml.runtime import progress

# Symbols between two reports of the progress.
_CHUNK_LENGTH = 2**16
# Positions at which a figure has points.
_NUM_POINTS = 1000
# Most steps times alphabet of the smoothed posterior of a whole mixture, which
# takes T^2 of them.
_LARGEST_POSTERIOR = 2**28


class Coder(NamedTuple):
  """A predictor that is to code a file.

  Attributes:
    label: Name in the table and the figure.
    predictor: Predictor.
    params: Its parameters.
    chunk_length: Symbols at a time.
  """

  label: str
  predictor: predictors.Predictor
  params: predictors.Params
  chunk_length: int = _CHUNK_LENGTH


class CodeLength(NamedTuple):
  """What a coder made of a file.

  Attributes:
    bits: Code length of the whole file.
    seconds: Time that it took.
    so_far: Code length of the first `positions` symbols, in bits, `[P]`.
    bits_lost: The most bits that pruning has cost; None without pruning.
  """

  bits: float
  seconds: float
  so_far: np.ndarray
  bits_lost: float | None


def exact_coder(
  name: str, symbols: symbol_files.Symbols, **kwargs: Any
) -> Coder:
  """Returns an exact predictor of the symbols of a file.

  Args:
    name: A key of `constants.OPTIMAL_PREDICTORS`.
    symbols: Symbols of the file.
    **kwargs: Its arguments. Those that it does not take are left out, and of
      those that are None, or not given, the depth follows from the file.

  Raises:
    ValueError: If the name or an argument is wrong, or the file longer than it
      can be.
  """
  constructor = constants.OPTIMAL_PREDICTORS.lookup('predictor', name)
  length = len(symbols.values)
  depth = ptw_predictors.min_depth(length)
  given = {'depth': depth, 'max_length': length}
  given |= {key: value for key, value in kwargs.items() if value is not None}
  given['alphabet_size'] = symbols.alphabet_size
  takes = base_config.keywords(constructor)
  given = {key: value for key, value in given.items() if key in takes}
  with base_config.naming(f'predictor {name}'):
    try:
      inspect.signature(constructor).bind(**given)
    except TypeError as error:
      raise ValueError(str(error)) from error
    predictor = constructor(**given)
    predictor.check_seq_length(length)
  return Coder(predictor.label, predictor, {})


def network_coder(
  folder: str,
  symbols: symbol_files.Symbols,
  imports: Sequence[str] | None = None,
) -> Coder:
  """Returns a saved network, to code the symbols of a file.

  A network without a state reads them in pieces as long as it was trained on.

  Args:
    folder: Folder of its run.
    symbols: Symbols of the file.
    imports: Modules to import, as in `saved_runs.load_run`.

  Raises:
    ValueError: If it cannot be loaded, or is of another alphabet.
  """
  run = saved_runs.load_run(folder, imports=imports)
  alphabet_size = constants.build_data_generator(run.config.data).alphabet_size
  if alphabet_size != symbols.alphabet_size:
    raise ValueError(
      f'network {folder} has an alphabet of {alphabet_size}, the file one of '
      f'{symbols.alphabet_size}'
    )
  chunk_length = max(1, _CHUNK_LENGTH // alphabet_size)
  if not run.predictor.has_state:
    chunk_length = run.config.train.seq_length
  label = predictor_factories.label(run.config.model)
  # The first one of an ensemble.
  return Coder(label, run.predictor, run.member(0), chunk_length)


def code_length(
  coder: Coder,
  values: np.ndarray,
  positions: np.ndarray,
  use_tqdm: bool = False,
) -> CodeLength:
  """Returns how many bits a coder needs for a file.

  Args:
    coder: Coder.
    values: Symbols `[T]`.
    positions: Positions 1, ..., T at which to report, `[P]`, in order.
    use_tqdm: Show progress.
  """
  start = time.monotonic()
  state, bits, so_far = None, 0.0, []
  length = len(values)
  with progress.bar(length, coder.label, 'symbols', use_tqdm) as shown:
    for begin in range(0, length, coder.chunk_length):
      chunk = values[None, begin : begin + coder.chunk_length]
      log_probs, state = predictors.symbol_log_probs(
        coder.predictor, coder.params, chunk, state
      )
      lengths = bits - np.cumsum(np.asarray(log_probs[0], float)) / np.log(2)
      end = begin + len(lengths)
      inside = positions[(positions > begin) & (positions <= end)]
      so_far.append(lengths[inside - begin - 1])
      bits = float(lengths[-1])
      shown.update(len(lengths))
      if end % (16 * _CHUNK_LENGTH) == 0 or end == length:
        shown.report({'bits per symbol': f'{bits / end:.4f}'})
  lost = None
  if getattr(coder.predictor, 'max_run_lengths', None) is not None:
    lost = float(coder.predictor.nats_lost(state)[0]) / np.log(2)
  seconds = time.monotonic() - start
  return CodeLength(bits, seconds, np.concatenate(so_far), lost)


def switch_posterior(
  coder: Coder, symbols: symbol_files.Symbols
) -> np.ndarray | None:
  """Returns P(a segment starts at t | the whole file), `[T]`.

  None for what has no such posterior, or takes too long for it: PTW has it at
  any length, a run-length mixture in O(T^2).
  """
  predictor, values = coder.predictor, symbols.values[None]
  if isinstance(predictor, ptw_predictors.PTWPredictor):
    return np.asarray(predictor.symbol_switch_posterior(values)[0])
  if not isinstance(predictor, run_length_predictors.RunLengthPredictor):
    return None
  if len(symbols.values) ** 2 * symbols.alphabet_size > _LARGEST_POSTERIOR:
    return None
  whole = run_length_predictors.RunLengthPredictor(
    predictor.hazard, predictor.concentration, symbols.alphabet_size
  )
  # No np.eye, which of a large alphabet is larger than all else.
  batch = jax.nn.one_hot(values, symbols.alphabet_size)
  return np.asarray(whole.switch_posterior(batch)[0])


def measure(
  coders: Sequence[Coder],
  symbols: symbol_files.Symbols,
  title: str = '',
  use_tqdm: bool = False,
) -> tuple[list[dict[str, Any]], figure_lib.Figure]:
  """Codes a file with every coder, and with the compressors of Python.

  Args:
    coders: Coders, with a label each.
    symbols: Symbols of the file.
    title: Title of the figure.
    use_tqdm: Show progress.

  Returns:
    A row for each, the shortest code first, and the figure of the coders.
  """
  length = len(symbols.values)
  num = min(length, _NUM_POINTS)
  positions = np.unique(np.linspace(1, length, num).astype(int))
  rows, so_far, switches = [], {}, {}
  for coder in coders:
    found = code_length(coder, symbols.values, positions, use_tqdm)
    so_far[coder.label] = found.so_far
    rows.append(_row(coder.label, found.bits, length, found.seconds))
    if found.bits_lost is not None:
      rows[-1]['bits_lost_at_most'] = found.bits_lost
    posterior = switch_posterior(coder, symbols)
    if posterior is not None:
      switches[coder.label] = posterior
  for name in symbol_files.COMPRESSORS:
    start = time.monotonic()
    bits = symbol_files.compressed_bits(symbols, name)
    rows.append(_row(name, bits, length, time.monotonic() - start))
  figure = plotting.plot_code_lengths(positions, so_far, switches, title)
  return sorted(rows, key=lambda row: row['bits']), figure


def _row(
  label: str, bits: float, length: int, seconds: float
) -> dict[str, Any]:
  return {
    'coder': label,
    'bits': float(bits),
    'bits_per_symbol': float(bits) / length,
    'seconds': seconds,
  }


def format_rows(rows: Sequence[Mapping[str, Any]]) -> str:
  """Returns rows as aligned text."""
  width = max(len('coder'), *(len(row['coder']) for row in rows))
  has_bound = any('bits_lost_at_most' in row for row in rows)
  lines = [f'{"coder":<{width}}  {"bits":>13}  {"a symbol":>9}  {"seconds":>7}']
  if has_bound:
    lines[0] += f'  {"lost by pruning":>17}'
  for row in rows:
    line = (
      f'{row["coder"]:<{width}}  {row["bits"]:>13,.1f}  '
      f'{row["bits_per_symbol"]:>9.5f}  {row["seconds"]:>7.1f}'
    )
    bound = row.get('bits_lost_at_most')
    if bound is not None:
      shown = 'no bound' if np.isinf(bound) else f'<= {bound:,.1f}'
      line += f'  {shown:>17}'
    lines.append(line)
  return '\n'.join(lines)


def _hazard(text: str | None) -> float | tuple[float, ...] | None:
  """A hazard as it is given: one number, or a table with commas between."""
  if text is None:
    return None
  try:
    values = tuple(float(value) for value in text.split(','))
  except ValueError as error:
    raise ValueError(
      f'--hazard {text!r} is neither a number nor numbers with commas between'
    ) from error
  return values[0] if len(values) == 1 else values


def make_coders(
  names: Sequence[str],
  folders: Sequence[str],
  symbols: symbol_files.Symbols,
  imports: Sequence[str] | None = None,
  **kwargs: Any,
) -> list[Coder]:
  """Returns the coders of a file, each with a label of its own.

  Args:
    names: Names of exact predictors.
    folders: Folders of the runs of networks.
    symbols: Symbols of the file.
    imports: Modules to import for the networks, as in `saved_runs.load_run`.
    **kwargs: Arguments of exact predictors, as in `exact_coder`.

  Raises:
    ValueError: If one cannot be made, or there is none.
  """
  names, folders = dict.fromkeys(names), dict.fromkeys(folders)
  coders = [exact_coder(name, symbols, **kwargs) for name in names]
  coders += [network_coder(folder, symbols, imports) for folder in folders]
  if not coders:
    raise ValueError('there is no predictor; give --predictors or --network')
  labels = [coder.label for coder in coders]
  return [
    coder._replace(label=f'{coder.label} ({name})')
    if labels.count(coder.label) > 1
    else coder
    for coder, name in zip(coders, [*names, *folders], strict=True)
  ]


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the flags.

  Args:
    values: Flag values to define them in.
  """
  define = cli.FlagDefiner(values)
  define.choice('as', 'bytes', symbol_files.KINDS, 'What a symbol is')
  define.string('column', None, 'Column of a CSV file; if unset, its only one.')
  define.integer(
    'alphabet',
    None,
    'K, symbols 0, ..., K - 1; if unset, 256 for bytes, 2 for bits, and for '
    'integers one more than the largest.',
    2,
  )
  define.integer(
    'max_symbols',
    symbol_files.MAX_SYMBOLS,
    'The most symbols that are read; a longer file is an error.',
    1,
  )
  define.string(
    'predictors',
    'kt,ptw,lad',
    'Exact predictors, with commas between: kt, ptw, lad, run_length, '
    'forget_me_not or one of your own.',
  )
  define.strings(
    'network',
    'Folder of a saved network of the same alphabet; may be given several '
    'times.',
  )
  define.number(
    'concentration', 0.5, 'Dirichlet concentration of the exact predictors.'
  )
  define.integer(
    'depth', None, 'Depth of the trees of ptw; if unset, the least.', 0
  )
  define.string(
    'hazard',
    None,
    'Hazard of run_length: a number, or a table with commas between, of which '
    'the last one goes on.',
  )
  define.integer(
    'max_run_lengths',
    512,
    'Starts that lad and run_length keep; 0 keeps all, in time that grows with '
    'the square of the length.',
    0,
  )
  define.string(
    'output_dir', 'runs/code_length', 'Folder of the tables and figures.'
  )


def _code_file(
  path: pathlib.Path, coders_of: Callable[..., list[Coder]]
) -> tuple[dict[str, Any], figure_lib.Figure]:
  """Reads, codes and reports one file."""
  values = flags.FLAGS
  kind = values['as'].value
  symbols = symbol_files.read(
    path, kind, values.column, values.alphabet, values.max_symbols
  )
  with base_config.naming(str(path)):
    coders = coders_of(symbols)
  about = f'{path.name}: {len(symbols.values):,} symbols of {kind}'
  rows, figure = measure(coders, symbols, about, use_tqdm=True)
  content = {
    'file': path.name,
    'as': kind,
    'alphabet_size': symbols.alphabet_size,
    'num_symbols': len(symbols.values),
    'rows': rows,
  }
  cli.say(f'{about}, K = {symbols.alphabet_size}\n\n{format_rows(rows)}\n')
  return content, figure


def main(argv: list[str]) -> None:
  """Codes every file, and prints and writes what came out."""
  if len(argv) < 2:
    sys.exit('error: give one file or more')
  values = flags.FLAGS
  names = [name.strip() for name in values.predictors.split(',') if name]

  def coders_of(symbols: symbol_files.Symbols) -> list[Coder]:
    return make_coders(
      names,
      values.network,
      symbols,
      cli.imports(values),
      concentration=values.concentration,
      depth=values.depth,
      hazard=_hazard(values.hazard),
      max_run_lengths=values.max_run_lengths or None,
    )

  try:
    cli.start(argv[:1])
    folder = cli.make_folder(values.output_dir)
    written = set()
    for path in map(pathlib.Path, argv[1:]):
      content, figure = _code_file(path, coders_of)
      # Two files may have one name.
      name, count = path.name, 1
      while name in written:
        count += 1
        name = f'{path.name}_{count}'
      written.add(name)
      with cli.saving(folder):
        atomic_files.write_json(folder / f'{name}.json', content)
        atomic_files.write_whole(
          folder / f'{name}.png', atomic_files.to_png(figure)
        )
      cli.say(f'Wrote {name}.json and {name}.png to {folder}')
  except (ValueError, OSError) as error:
    cli.end_with(error)


if __name__ == '__main__':
  define_flags()
  cli.run(main)
