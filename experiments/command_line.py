"""What the scripts share: how they start, and the folders they write to."""

import pathlib
import sys

from absl import app
from absl import flags

from nonstationary_mbml import runtime


def define_flags() -> None:
  """Defines the flags of every script; not at import, so that none meet."""
  flags.DEFINE_bool(
    'compilation_cache',
    True,
    'Keep compiled programs for the next start, in '
    '~/.cache/nonstationary_mbml/jax or $JAX_COMPILATION_CACHE_DIR.',
  )


def start(argv: list[str], cpu_devices: int = 1) -> None:
  """Starts JAX as the flags say.

  Args:
    argv: What absl left of the command line.
    cpu_devices: As in `runtime.start`.

  Raises:
    UsageError: If there are arguments that are no flags.
  """
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
  runtime.start(cpu_devices, flags.FLAGS.compilation_cache)


def make_folder(path: str) -> pathlib.Path:
  """Returns a folder that is there, or exits with an error."""
  folder = pathlib.Path(path)
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    sys.exit(f'error: cannot write to {folder}: {error.strerror}')
  return folder
