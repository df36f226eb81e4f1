import json
import os
import pathlib
import shutil
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest

from nonstationary_mbml.experiments import code_length
from nonstationary_mbml.experiments import live_and_die_predictors
from nonstationary_mbml.experiments import symbol_files
from nonstationary_mbml.tests import oracles

ROOT = pathlib.Path(__file__).parent.parent.parent
LSTM = ROOT / 'results' / 'models' / 'lstm_ptw'
TRANSFORMER = ROOT / 'results' / 'models' / 'transformer_sin_cos_ptw'

# A real text, a real binary file and a series of bits; K of the predictors.
FILES = {
  'text': ('bytes', (ROOT / 'LICENSE').read_bytes()[:1500]),
  'binary': (
    'bytes',
    (ROOT / 'results' / 'default' / 'figure.png').read_bytes()[:700],
  ),
  'bits': (
    'bits',
    np.packbits(
      np.random.default_rng(0).random(2000) < np.repeat([0.1, 0.8], 1000)
    ).tobytes(),
  ),
}


def _oracle(name, values, alphabet_size):
  """Code length so far in bits, `[T]`, by a loop in float64."""
  prior = (0.5,) * alphabet_size
  if name == 'kt':
    log_probs = oracles.kt_log_probs(values, prior)
  elif name == 'ptw':
    depth = (len(values) - 1).bit_length()
    log_probs = oracles.ptw_log_probs(values, depth, prior)
  else:
    predictions = oracles.run_length_log_domain(
      values, prior, live_and_die_predictors.hazard
    )
    log_probs = np.array(
      [-np.log(alphabet_size)]
      + [predictions[t, symbol] for t, symbol in enumerate(values[1:])]
    )
  return -np.cumsum(log_probs) / np.log(2)


@pytest.mark.parametrize('name', FILES)
def test_code_lengths_are_those_of_a_loop_in_float64(tmp_path, name):
  kind, content = FILES[name]
  (tmp_path / name).write_bytes(content)
  symbols = symbol_files.read(tmp_path / name, kind)
  names = ['kt', 'ptw', *(['lad'] if kind == 'bits' else [])]
  coders = code_length.make_coders(names, [], symbols)
  positions = np.array([1, 10, len(symbols.values)])
  for name, coder in zip(names, coders, strict=True):
    found = code_length.code_length(coder, symbols.values, positions)
    truth = _oracle(name, symbols.values.tolist(), symbols.alphabet_size)
    np.testing.assert_allclose(found.so_far, truth[positions - 1], rtol=1e-4)
    np.testing.assert_allclose(found.bits, truth[-1], rtol=1e-4)


def test_chunks_add_up_and_pruning_is_told():
  values = np.random.default_rng(1).integers(2, size=300).astype(np.uint8)
  symbols = symbol_files.Symbols(values, 2)
  coder, pruned = code_length.make_coders(
    ['lad', 'run_length'], [], symbols, max_run_lengths=16, hazard=0.02
  )
  whole = code_length.code_length(coder, values, np.array([5, 300]))
  chunks = code_length.code_length(
    coder._replace(chunk_length=77), values, np.array([5, 300])
  )
  np.testing.assert_allclose(chunks.so_far, whole.so_far, rtol=1e-6)
  assert coder.label == 'LAD' and pruned.label == 'run-length mixture'
  nats = coder.predictor.nats_lost(
    code_length.predictors.symbol_log_probs(coder.predictor, {}, values[None])[
      1
    ]
  )
  np.testing.assert_allclose(whole.bits_lost * np.log(2), nats[0], rtol=1e-4)


@pytest.mark.parametrize('folder', [LSTM, TRANSFORMER])
def test_networks_code_in_pieces_that_they_can_read(folder):
  values = np.random.default_rng(2).integers(2, size=75).astype(np.uint8)
  symbols = symbol_files.Symbols(values, 2)
  coder = code_length.network_coder(str(folder), symbols)
  assert coder.chunk_length == (32 if folder == TRANSFORMER else 2**15)
  found = code_length.code_length(coder, values, np.array([1, 75]))
  assert found.so_far[0] == pytest.approx(1)  # Uniform.
  assert 70 < found.bits < 130
  with pytest.raises(ValueError, match='alphabet of 2, the file one of 256'):
    code_length.network_coder(str(folder), symbols._replace(alphabet_size=256))


def test_networks_of_one_name_have_labels_of_their_own(tmp_path):
  folders = [str(tmp_path / name / 'run') for name in 'ab']
  for folder in folders:
    shutil.copytree(LSTM, folder)
  symbols = symbol_files.Symbols(np.zeros(9, np.uint8), 2)
  coders = code_length.make_coders(['kt', 'kt'], folders, symbols)
  assert [coder.label for coder in coders] == [
    'KT',
    *(f'LSTM ({folder})' for folder in folders),
  ]


def test_module_of_a_network_may_have_moved(tmp_path):
  shutil.copytree(LSTM, tmp_path / 'run')
  path = tmp_path / 'run' / 'config.json'
  config = json.loads(path.read_text())
  path.write_text(json.dumps({**config, 'imports': ['/nowhere/mine.py']}))
  symbols = symbol_files.Symbols(np.zeros(9, np.uint8), 2)
  folders = [str(tmp_path / 'run')]
  with pytest.raises(ValueError, match='mine.py cannot be imported'):
    code_length.make_coders([], folders, symbols)
  assert code_length.make_coders([], folders, symbols, imports=())


def test_posterior_of_a_large_alphabet_takes_no_matrix_of_it(monkeypatch):
  symbols = symbol_files.Symbols(np.array([0, 50_000, 3]), 50_001)
  coder = code_length.exact_coder('lad', symbols, max_run_lengths=2)
  monkeypatch.setattr(np, 'eye', None)  # Of 10 GB.
  posterior = code_length.switch_posterior(coder, symbols)
  assert posterior.shape == (3,) and posterior[0] == 0


@pytest.mark.parametrize(
  ('names', 'kwargs', 'message'),
  [
    (['ptw'], {'depth': 3}, 'predictor ptw: depth 3 holds 8 .*depth=4 does'),
    (['run_length'], {}, "run_length: missing a required argument: 'hazard'"),
    (['regular_shift'], {}, "regular_shift: missing .*'shift_period'"),
    (['run_length'], {'hazard': 2.0}, 'predictor run_length: hazard is 2.0'),
    (['ptv'], {}, "predictor 'ptv' is not one of .*did you mean 'ptw'"),
    (['kt'], {'concentration': -1.0}, 'predictor kt: concentration is -1.0'),
    ([], {}, 'there is no predictor'),
  ],
)
def test_wrong_coders_are_named(names, kwargs, message):
  symbols = symbol_files.Symbols(np.zeros(9, np.uint8), 2)
  with pytest.raises(ValueError, match=message):
    code_length.make_coders(names, [], symbols, **kwargs)


def test_wrong_hazard_of_a_flag_is_named():
  assert code_length._hazard('0.1') == 0.1
  assert code_length._hazard('0,0.5') == (0.0, 0.5)
  with pytest.raises(ValueError, match="--hazard 'often' is neither"):
    code_length._hazard('often')


def _script(tmp_path, *arguments):
  environment = {
    **os.environ,
    'JAX_COMPILATION_CACHE_DIR': str(ROOT / '.cache' / 'jax'),
  }
  return subprocess.run(
    [sys.executable, ROOT / 'experiments' / 'code_length.py', *arguments],
    cwd=tmp_path,
    env=environment,
    capture_output=True,
    text=True,
  )


def test_script_writes_a_table_and_a_figure_of_every_file(tmp_path):
  folders = [tmp_path / name for name in ('a', 'b', 'up.csv_2')]
  for number, folder in enumerate(folders):
    folder.mkdir()
    rng = np.random.default_rng(number)
    lines = (f'{int(x)}' for x in rng.random(40) < 0.2)
    (folder / 'up.csv').write_text('\n'.join(('up', *lines)))
  (folders[2] / 'up.csv').rename(folders[2] / 'up.csv_2')
  result = _script(
    tmp_path,
    tmp_path / 'up.csv_2' / 'up.csv_2',
    *(folder / 'up.csv' for folder in folders[:2]),
    '--as=csv',
    '--predictors=kt,ptw',
    f'--network={LSTM}',
  )
  assert result.returncode == 0, result.stderr
  written = tmp_path / 'runs' / 'code_length'
  for name in ('up.csv_2', 'up.csv', 'up.csv_3'):
    content = json.loads((written / f'{name}.json').read_text())
    assert content['num_symbols'] == 40 and content['alphabet_size'] == 2
    coders = [row['coder'] for row in content['rows']]
    assert sorted(coders) == ['KT', 'LSTM', 'PTW', 'bz2', 'gzip', 'xz']
    bits = [row['bits'] for row in content['rows']]
    assert bits == sorted(bits)
    assert all(f'{value:,.1f}' in result.stdout for value in bits)
    image = matplotlib.image.imread(written / f'{name}.png')
    assert image.std() > 0.05
  assert 'KT: symbols 40/40' in result.stderr


def test_script_says_in_a_line_what_is_wrong_with_a_file(tmp_path):
  (tmp_path / 'text').write_bytes(b'ab\xff')
  result = _script(tmp_path, tmp_path / 'text', '--alphabet=128')
  assert result.returncode == 1
  assert result.stderr == (
    f'error: {tmp_path / "text"}: 255 at offset 2 is outside of the alphabet '
    '0, ..., 127\n'
  )
