"""Files that are there whole or not at all."""

import os
import pathlib
import tempfile


def write_whole(path: pathlib.Path, content: bytes) -> None:
  """Writes a file, so that it is there whole or not at all.

  Raises:
    OSError: If it cannot be written.
  """
  with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
    try:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
      os.chmod(file.name, 0o644)
      os.replace(file.name, path)
    except BaseException:
      os.unlink(file.name)
      raise
