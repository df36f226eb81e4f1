"""Files that are there whole or not at all."""

import json
import os
import pathlib
import tempfile
from typing import Any


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


def write_json(path: pathlib.Path, content: Any) -> None:
  """Writes plain data as JSON, whole or not at all.

  Raises:
    OSError: If it cannot be written.
  """
  write_whole(path, (json.dumps(content, indent=2) + '\n').encode())


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
