"""Files that are there whole or not at all, and locks of one process."""

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import csv
import io
import json
import math
import os
import pathlib
import tempfile
import time
from typing import Any
from typing import TextIO

try:
  import fcntl
except ImportError:  # Not on Windows.
  fcntl = None


def write_whole(path: pathlib.Path, content: bytes) -> None:
  """Writes a file, so that it is there whole or not at all.

  Raises:
    OSError: If it cannot be written.
  """
  with tempfile.NamedTemporaryFile(
    dir=path.parent, prefix=f'.{path.name}.', delete=False
  ) as file:
    try:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
      os.chmod(file.name, 0o644)
      os.replace(file.name, path)
    except BaseException:
      os.unlink(file.name)
      raise


def to_png(figure: Any) -> bytes:
  """Returns a figure of matplotlib as the content of a PNG file.

  Its palette of 256 colours makes it a third as large.
  """
  from PIL import Image  # Of matplotlib; what trains needs neither.

  png = io.BytesIO()
  figure.savefig(png, format='png')
  # Of the methods, that which keeps colour scales smooth.
  image = Image.open(png).convert('RGB')
  image = image.quantize(256, Image.Quantize.MAXCOVERAGE)
  png = io.BytesIO()
  image.save(png, format='png', optimize=True)
  return png.getvalue()


@contextlib.contextmanager
def locked(path: pathlib.Path, wait_seconds: float) -> Iterator[TextIO]:
  """Holds a lock file inside a `with`; the lock ends with the process, too.

  A file system without locks holds nothing.

  Args:
    path: Path of the file, which is made if it is not there.
    wait_seconds: Seconds to wait for another process that holds it.

  Yields:
    The open file. A child process that inherits it holds the lock, too.

  Raises:
    BlockingIOError: If another process holds it all that time.
    OSError: If the file cannot be opened.
  """
  deadline = time.monotonic() + wait_seconds
  with path.open('a') as lock:
    while fcntl is not None:
      try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        break
      except BlockingIOError:
        if time.monotonic() >= deadline:
          raise
        time.sleep(0.05)
      except OSError:
        break
    yield lock


def to_json(content: Any, indent: int | None = None) -> str:
  """Returns plain data as JSON, which has null for NaN and infinity."""
  return json.dumps(_finite(content), indent=indent, allow_nan=False)


def _finite(content: Any) -> Any:
  if isinstance(content, Mapping):
    return {key: _finite(value) for key, value in content.items()}
  if isinstance(content, (list, tuple)):
    return [_finite(value) for value in content]
  if isinstance(content, float) and not math.isfinite(content):
    return None
  return content


def null_to_nan(content: Any) -> Any:
  """Returns plain data as read from JSON, with NaN for null."""
  if isinstance(content, dict):
    return {key: null_to_nan(value) for key, value in content.items()}
  if isinstance(content, list):
    return [null_to_nan(value) for value in content]
  return math.nan if content is None else content


def write_json(path: pathlib.Path, content: Any) -> None:
  """Writes plain data as JSON, whole or not at all; see `to_json`.

  Raises:
    OSError: If it cannot be written.
  """
  write_whole(path, (to_json(content, indent=2) + '\n').encode())


def read_json(path: pathlib.Path) -> Any:
  """Returns the content of a JSON file.

  Raises:
    ValueError: If the file cannot be read, or is not JSON.
  """
  try:
    return json.loads(path.read_text())
  except OSError as error:
    raise ValueError(f'cannot read {path}: {error.strerror}') from error
  except ValueError as error:  # Also of text that is not UTF-8.
    raise ValueError(f'{path} is not JSON: {error}') from error


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
  """Returns a table as text.

  Args:
    rows: Values of each row, by column. The table has the columns of all rows;
      a value that a row lacks or has as None is empty.
  """
  columns = dict.fromkeys(column for row in rows for column in row)
  text = io.StringIO()
  writer = csv.DictWriter(text, list(columns), lineterminator='\n')
  writer.writeheader()
  writer.writerows(rows)
  return text.getvalue()


def write_csv(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
  """Writes a table, whole or not at all; see `to_csv`.

  Raises:
    OSError: If it cannot be written.
  """
  write_whole(path, to_csv(rows).encode())


def read_csv(path: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the rows of a table that `write_csv` wrote.

  Numbers are numbers again; what is empty is None.

  Raises:
    ValueError: If the file cannot be read.
  """
  try:
    with path.open(newline='') as file:
      return [
        {column: _parse(text) for column, text in row.items()}
        for row in csv.DictReader(file)
      ]
  except OSError as error:
    raise ValueError(f'cannot read {path}: {error.strerror}') from error
  except (csv.Error, UnicodeDecodeError) as error:
    raise ValueError(f'{path} is not a table: {error}') from error


def _parse(text: str | None) -> Any:
  for read in (int, float):
    try:
      return read(text)
    except (TypeError, ValueError):
      pass
  return text or None
