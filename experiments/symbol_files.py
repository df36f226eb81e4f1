"""Files as sequences of integer symbols, read in blocks.

  symbols = read('LICENSE', 'bytes')
  symbols.values         # [T], 0, ..., K - 1, in the smallest integers
  symbols.alphabet_size  # K

A file of bytes is mapped into memory and takes none. Whatever else, pipes and
devices without an end among it, is read up to `max_symbols` and no further.
"""

import array
import bz2
import codecs
from collections.abc import Iterator
import csv
import lzma
import os
import pathlib
import stat
from typing import BinaryIO
from typing import NamedTuple
import zlib

import numpy as np

from nonstationary_mbml import base_config

MAX_SYMBOLS = 2**24
# Predictors count every symbol; a column of dates would fill the memory.
MAX_ALPHABET_SIZE = 2**20
# Bytes read, or compressed, at a time.
_BLOCK = 2**20
# A longer line is none of integers, but perhaps a device without an end.
_LONGEST_LINE = 2**16


class Symbols(NamedTuple):
  """A sequence of integer symbols.

  Attributes:
    values: Symbols 0, ..., K - 1, `[T]`, in integers of 8, 16 or 32 bits.
    alphabet_size: K.
  """

  values: np.ndarray
  alphabet_size: int


def read(
  path: str | pathlib.Path,
  kind: str = 'bytes',
  column: str | None = None,
  alphabet_size: int | None = None,
  max_symbols: int = MAX_SYMBOLS,
) -> Symbols:
  """Returns the symbols of a file.

  Args:
    path: Path of the file.
    kind: A key of `KINDS`: every byte is a symbol, every bit (that of most
      weight first), every line, or every row of a CSV file with a header.
    column: Column of a CSV file; None is its only one.
    alphabet_size: K; None is 256 for bytes, 2 for bits, and else one more than
      the largest symbol, at least 2.
    max_symbols: The most that are read; a longer file is an error.

  Raises:
    ValueError: If it is empty, too long or has no such column, or a symbol is
      none of the alphabet, which the message says with its place.
    OSError: If it cannot be read.
  """
  reader = KINDS.lookup('kind', kind)
  if column is not None and kind.lower() != 'csv':
    raise ValueError(f'column {column!r} needs a CSV file, not {kind}')
  if alphabet_size is not None:
    alphabet_size = base_config.check_int(
      'alphabet_size', alphabet_size, 2, MAX_ALPHABET_SIZE
    )
  max_symbols = base_config.check_int('max_symbols', max_symbols, 1)
  with base_config.naming(str(path)), open(path, 'rb') as file:
    values = reader(file, max_symbols, column)
    if not len(values):
      raise ValueError('the file is empty')
    if len(values) > max_symbols:
      raise _too_long(max_symbols)
    if alphabet_size is None:
      default = {'bytes': 256, 'bits': 2}.get(kind.lower())
      alphabet_size = default or max(2, int(values.max()) + 1)
    if alphabet_size > MAX_ALPHABET_SIZE:
      raise ValueError(
        f'its largest symbol is {values.max()}; an alphabet has at most '
        f'{MAX_ALPHABET_SIZE}'
      )
    _check(
      values, alphabet_size, 'offset' if kind.lower() == 'bytes' else 'symbol'
    )
  return Symbols(values, alphabet_size)


def _check(values: np.ndarray, alphabet_size: int, place: str) -> None:
  """Raises ValueError if a symbol is outside of the alphabet."""
  for begin in range(0, len(values), _BLOCK):
    block = values[begin : begin + _BLOCK]
    wrong = (block < 0) | (block >= alphabet_size)
    if wrong.any():
      index = int(np.argmax(wrong))
      raise ValueError(
        f'{block[index]} at {place} {begin + index} is outside of the alphabet '
        f'0, ..., {alphabet_size - 1}'
      )


def _too_long(max_symbols: int) -> ValueError:
  return ValueError(
    f'it has more than max_symbols={max_symbols} symbols; raise that, or read '
    'a part of it'
  )


def _read_bytes(
  file: BinaryIO, max_symbols: int, column: str | None
) -> np.ndarray:
  """Every byte, as uint8."""
  del column
  status = os.fstat(file.fileno())
  if stat.S_ISREG(status.st_mode) and status.st_size:
    return np.memmap(file, np.uint8, 'r')
  content = bytearray()
  while len(content) <= max_symbols:
    block = file.read(min(_BLOCK, max_symbols + 1 - len(content)))
    if not block:
      break
    content += block
  return np.frombuffer(content, np.uint8)


def _read_bits(
  file: BinaryIO, max_symbols: int, column: str | None
) -> np.ndarray:
  """Every bit, as uint8."""
  content = _read_bytes(file, max_symbols // 8, column)
  # Not unpacked beyond what is said to fit.
  return np.unpackbits(content[: max_symbols // 8 + 1])


def _lines(file: BinaryIO) -> Iterator[str]:
  """The lines of a text, none of them without an end."""
  number = 0
  while line := file.readline(_LONGEST_LINE + 1):
    number += 1
    if number == 1:  # Spreadsheets begin a text in UTF-8 with a mark.
      line = line.removeprefix(codecs.BOM_UTF8)
    if len(line) > _LONGEST_LINE:
      raise ValueError(
        f'line {number} is longer than {_LONGEST_LINE} bytes; is it a text?'
      )
    yield line.decode('utf-8', 'replace')


def _integers(texts: Iterator[tuple[int, str]], max_symbols: int) -> np.ndarray:
  """Integers of texts, which come with the number of their line."""
  values = array.array('i')
  for number, text in texts:
    try:
      values.append(int(text))
    except (ValueError, OverflowError) as error:
      raise ValueError(
        f'line {number}: {text.strip()[:40]!r} is not an integer of 32 bits'
      ) from error
    if len(values) > max_symbols:
      raise _too_long(max_symbols)
  found = np.frombuffer(values, np.int32)
  if len(found) and 0 <= found.min():
    return found.astype(np.min_scalar_type(int(found.max())))
  return found


def _read_integers(
  file: BinaryIO, max_symbols: int, column: str | None
) -> np.ndarray:
  """An integer in every line."""
  del column
  return _integers(enumerate(_lines(file), 1), max_symbols)


def _read_csv(
  file: BinaryIO, max_symbols: int, column: str | None
) -> np.ndarray:
  """A column of integers, under a line with the names of all."""
  rows = csv.reader(_lines(file))
  try:
    header = [name.strip() for name in next(filter(None, rows), ())]
    if column is None and len(header) == 1:
      column = header[0]
    if not header:
      return np.zeros(0, np.int32)
    if column not in header:
      missing = f'no column {column!r}' if column else 'column is needed'
      raise ValueError(f'{missing}; it has {", ".join(header)[:200]}')
    place = header.index(column)
    texts = (
      (rows.line_num, row[place] if place < len(row) else '')
      for row in rows
      if row
    )
    return _integers(texts, max_symbols)
  except csv.Error as error:
    raise ValueError(f'line {rows.line_num}: {error}') from error


KINDS = base_config.Registry(
  'kind of file',
  {
    'bits': _read_bits,
    'bytes': _read_bytes,
    'csv': _read_csv,
    'integers': _read_integers,
  },
)

# Of Python's own, at their best.
COMPRESSORS = {
  'gzip': lambda: zlib.compressobj(9, wbits=31),
  'bz2': lambda: bz2.BZ2Compressor(9),
  'xz': lambda: lzma.LZMACompressor(preset=9),
}


def compressed_bits(symbols: Symbols, name: str) -> int:
  """Returns the bits that a compressor of `COMPRESSORS` makes of symbols.

  Eight symbols are a byte where K is 2, one where it is at most 256, and else
  each is of 16 or 32 bits.
  """
  compressor = COMPRESSORS[name]()
  size = 0
  for begin in range(0, len(symbols.values), _BLOCK):
    block = symbols.values[begin : begin + _BLOCK]
    if symbols.alphabet_size == 2:
      block = np.packbits(block.astype(bool))
    else:
      block = block.astype(np.min_scalar_type(symbols.alphabet_size - 1))
    size += len(compressor.compress(block.tobytes()))
  return 8 * (size + len(compressor.flush()))
