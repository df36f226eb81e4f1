"""What the scripts share: how they start, and the folders they write to.

  if __name__ == '__main__':
    define_flags()
    command_line.run(main)

Whatever is wrong on the command line is one line on stderr.
"""

from collections.abc import Callable
import errno
import pathlib
import sys

from absl import app
from absl import flags
from absl import logging

from nonstationary_mbml import base_config
from nonstationary_mbml import run_folder
from nonstationary_mbml import runtime

# Of a script that was asked to stop, and goes on when it is started again:
# EX_TEMPFAIL of sysexits.h.
EXIT_STOPPED = 75
# Of a script that cannot write, as on a full disk: EX_IOERR.
EXIT_CANNOT_SAVE = 74

# So that --help of a script shows the flags that are defined here.
flags.disclaim_key_flags()


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the flags of every script; not at import, so that none meet."""
  flags.DEFINE_bool(
    'compilation_cache',
    True,
    'Keep compiled programs for the next start, in '
    '~/.cache/nonstationary_mbml/jax or $JAX_COMPILATION_CACHE_DIR.',
    flag_values=values,
  )


def define_choice(
  values: flags.FlagValues,
  flag: str,
  default: str | None,
  registry: base_config.Registry,
  doc: str,
) -> None:
  """A flag that names an entry of a registry, in any case of letters."""
  flags.DEFINE_string(
    flag, default, f'{doc}: {", ".join(sorted(registry))}', flag_values=values
  )

  def is_known(value: str | None) -> bool:
    if value is None:
      return True
    try:
      registry.lookup(f'--{flag}', value)
    except ValueError as error:
      raise flags.ValidationError(str(error)) from None
    return True

  flags.register_validator(flag, is_known, flag_values=values)


def run(main: Callable[[list[str]], None]) -> None:
  """Runs a script: `main` is called with what is no flag, then it exits."""
  app.run(main, flags_parser=_parse_flags)


def start(argv: list[str], cpu_devices: int = 1) -> None:
  """Starts JAX as the flags say; exits if there are arguments but flags.

  Args:
    argv: What absl left of the command line.
    cpu_devices: As in `runtime.start`.
  """
  if len(argv) > 1:
    sys.exit(f'error: unexpected arguments: {" ".join(argv[1:])}')
  if not flags.FLAGS['verbosity'].present:
    # Orbax tells what it does, and errors twice: we get them as exceptions.
    logging.set_verbosity(logging.FATAL)
  runtime.start(cpu_devices, flags.FLAGS.compilation_cache)


def cannot_save(error: Exception) -> bool:
  """Whether what went wrong is that there is no place to write to."""
  return isinstance(error, run_folder.SaveError) or (
    isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
  )


def make_folder(path: str) -> pathlib.Path:
  """Returns a folder that is there, or exits with an error."""
  folder = pathlib.Path(path)
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    sys.exit(f'error: cannot write to {folder}: {error.strerror}')
  return folder


def _parse_flags(argv: list[str]) -> list[str]:
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    sys.exit(f'error: {" ".join(str(error).split())}')
