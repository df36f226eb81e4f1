import bz2
import gzip
import lzma
import os
import threading

import numpy as np
import pytest

from nonstationary_mbml.experiments import symbol_files


def _file(tmp_path, content):
  path = tmp_path / 'data'
  path.write_bytes(content)
  return path


@pytest.mark.parametrize(
  ('kind', 'content', 'values', 'alphabet_size'),
  [
    ('bytes', b'ab\xff', [97, 98, 255], 256),
    ('bits', b'\xa0\x01', [1, 0, 1] + [0] * 12 + [1], 2),
    ('integers', b'3\n 0\n+1', [3, 0, 1], 4),
    ('integers', b'0\n0\n', [0, 0], 2),
    ('integers', b'0\n70000\n', [0, 70000], 70001),
    ('integers', b'\xef\xbb\xbf1\r\n0', [1, 0], 2),
    ('csv', b'day,up\n1,0\n2,"1"\n\n3,1\n', [0, 1, 1], 2),
    ('csv', b'\xef\xbb\xbfup,day\r\n0,1\r\n1,2', [0, 1], 2),
    ('csv', b'\nday,up\n1,1', [1], 2),
  ],
)
def test_files_are_read_as_they_are_said_to_be(
  tmp_path, kind, content, values, alphabet_size
):
  column = 'up' if kind == 'csv' else None
  symbols = symbol_files.read(_file(tmp_path, content), kind, column)
  assert symbols.values.tolist() == values
  assert symbols.alphabet_size == alphabet_size


def test_only_column_of_a_csv_needs_no_name(tmp_path):
  symbols = symbol_files.read(_file(tmp_path, b'up\n0\n1\n'), 'csv')
  assert symbols.values.tolist() == [0, 1]


@pytest.mark.parametrize(
  ('kind', 'content', 'kwargs', 'message'),
  [
    ('bytes', b'', {}, 'data: the file is empty'),
    ('integers', b'', {}, 'the file is empty'),
    ('csv', b'up\n', {}, 'the file is empty'),
    ('csv', b'\n', {'column': 'up'}, 'the file is empty'),
    ('bytes', b'ab\xc8d', {'alphabet_size': 128}, '200 at offset 2 is outside'),
    ('integers', b'0\n-1\n', {}, '-1 at symbol 1 is outside of the alphabet'),
    ('integers', b'1\n5\n', {'alphabet_size': 4}, '5 at symbol 1 is outside'),
    ('integers', b'1\n1.5\n', {}, "line 2: '1.5' is not an integer"),
    ('integers', b'1\n9999999999\n', {}, 'line 2: .* not an integer of 32'),
    ('integers', b'1\n1048576', {}, 'largest symbol is 1048576; an alphabet'),
    ('csv', b'a,b\n1,2\n', {'column': 'up'}, "no column 'up'; it has a, b"),
    ('csv', b'a,b\n1,2\n', {}, 'column is needed; it has a, b'),
    ('csv', b'a,b\n1,2\n3\n', {'column': 'b'}, "line 3: '' is not an integer"),
    ('bytes', b'abc', {'max_symbols': 2}, 'more than max_symbols=2 symbols'),
    ('bits', b'ab', {'max_symbols': 15}, 'more than max_symbols=15 symbols'),
    ('integers', b'1\n' * 5, {'max_symbols': 4}, 'more than max_symbols=4'),
    ('bytes', b'ab', {'column': 'up'}, "column 'up' needs a CSV file"),
    ('byte', b'ab', {}, "'byte' is not one of .*did you mean 'bytes'"),
    ('bytes', b'ab', {'alphabet_size': 1}, 'alphabet_size is 1'),
  ],
)
def test_wrong_files_are_named(tmp_path, kind, content, kwargs, message):
  with pytest.raises(ValueError, match=message) as error:
    symbol_files.read(_file(tmp_path, content), kind, **kwargs)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('kind', ['bytes', 'bits', 'integers', 'csv'])
def test_a_device_without_an_end_is_not_read_to_it(kind):
  message = 'line 1 is longer' if kind in ('integers', 'csv') else 'more than'
  with pytest.raises(ValueError, match=message):
    symbol_files.read('/dev/zero', kind, max_symbols=10_000)


def test_pipes_are_read():
  end, begin = os.pipe()

  def write():
    with os.fdopen(begin, 'wb') as file:
      file.write(b'abc' * 100_000)

  thread = threading.Thread(target=write)
  thread.start()
  symbols = symbol_files.read(f'/dev/fd/{end}')
  thread.join()
  os.close(end)
  assert bytes(symbols.values) == b'abc' * 100_000


@pytest.mark.parametrize(
  ('alphabet_size', 'pack'),
  [
    (2, np.packbits),
    (3, lambda values: values),
    (300, lambda values: values.astype('<u2')),
  ],
)
def test_compressors_are_those_of_python(monkeypatch, alphabet_size, pack):
  monkeypatch.setattr(symbol_files, '_BLOCK', 4096)
  values = np.random.default_rng(0).integers(2, size=50_001)
  symbols = symbol_files.Symbols(values.astype(np.int32), alphabet_size)
  data = pack(values.astype(np.uint8)).tobytes()
  for name, compress in (
    ('gzip', gzip.compress),
    ('bz2', bz2.compress),
    ('xz', lambda data: lzma.compress(data, preset=9)),
  ):
    bits = symbol_files.compressed_bits(symbols, name)
    # The headers may differ.
    np.testing.assert_allclose(bits, 8 * len(compress(data)), rtol=0.01)
