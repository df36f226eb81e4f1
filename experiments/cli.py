"""The start of every script, and the folders that scripts write to.

  if __name__ == '__main__':
    define_flags()
    cli.run(main)

Whatever is wrong on the command line is one line on stderr. All scripts know
what a module of the user's own has registered, with --import=my_source.py or
--import=my_package.my_source.
"""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import functools
import io
import os
import pathlib
import signal
import sys
import traceback
from typing import NoReturn

from absl import app
from absl import flags
from absl import logging

from nonstationary_mbml import base_config
from nonstationary_mbml.experiments import user_modules
from nonstationary_mbml.runtime import devices
from nonstationary_mbml.runtime import multihost
from nonstationary_mbml.runtime import run_folder

# Exit status of a script that was asked to stop, and goes on when it is started
# again: EX_TEMPFAIL of sysexits.h.
EXIT_STOPPED = 75
# Exit status of a script that finds the disk full, or the quota used up:
# EX_IOERR of sysexits.h.
EXIT_CANNOT_SAVE = 74
# Exit status of a script whose stdout was closed, e.g. by `head`: that of a
# process that SIGPIPE has killed, as a shell shows it.
_EXIT_UNREAD = 128 + getattr(signal, 'SIGPIPE', 13)

# So that --help of a script shows the flags that are defined here.
flags.disclaim_key_flags()


def flags_of_runs(values: flags.FlagValues) -> list[str]:
  """Returns those flags of every script that its own runs are given as well."""
  return [] if values.compilation_cache else ['--nocompilation_cache']


def imports(values: flags.FlagValues) -> tuple[str, ...] | None:
  """Returns what `--import` names; None if it was not given.

  It then takes the place of what a saved config names.
  """
  flag = values['import']
  return tuple(filter(None, flag.value)) if flag.present else None


class _ImportParser(flags.ArgumentParser):
  """Imports a module.

  Flags are checked when all are parsed: by then, its names are known.
  """

  def parse(self, argument: str) -> str:
    name = base_config.absolute_import(argument)
    user_modules.import_all(filter(None, (name,)))
    return name


class _IntegerParser(flags.IntegerParser):
  """Reads 1e4 as well, as `--set` does."""

  def convert(self, argument: int | str) -> int:
    try:
      return super().convert(argument)
    except ValueError:
      return base_config.from_text('it', argument, int)


class FlagDefiner:
  """Defines the flags of a script; not at import, where two would clash.

  It begins with those that every script has.
  """

  def __init__(self, values: flags.FlagValues = flags.FLAGS):
    """Initializes the definer.

    Args:
      values: Flag values to define the flags in.
    """
    self._values = values
    self.boolean = functools.partial(flags.DEFINE_bool, flag_values=values)
    self.string = functools.partial(flags.DEFINE_string, flag_values=values)
    self.number = functools.partial(flags.DEFINE_float, flag_values=values)
    self.boolean(
      'compilation_cache',
      True,
      'Keep compiled programs for the next start, in '
      '~/.cache/nonstationary_mbml/jax or $JAX_COMPILATION_CACHE_DIR.',
    )
    flags.DEFINE_multi(
      _ImportParser(),
      flags.ArgumentSerializer(),
      'import',
      [],
      'Module (my_package.my_module) or .py file of your own to import first, '
      'which registers sources, networks, exact predictors or sweeps; may be '
      'given several times. It takes the place of what the config of a saved '
      'run imports; --import= alone imports nothing.',
      flag_values=values,
    )

  def strings(self, name: str, doc: str) -> None:
    """Defines a flag that may be given several times, by default never."""
    flags.DEFINE_multi_string(name, [], doc, flag_values=self._values)

  def integer(
    self,
    name: str,
    default: int | None,
    doc: str,
    lower_bound: int | None = None,
    upper_bound: int | None = base_config.MAX_SIZE,
  ) -> None:
    """Defines an integer, with the limit of all sizes and counts."""
    flags.DEFINE(
      _IntegerParser(lower_bound, upper_bound),
      name,
      default,
      doc,
      self._values,
      flags.ArgumentSerializer(),
    )

  def seed(self, doc: str) -> None:
    """Defines `--seed`, with the limit of `base_config.check_seed`."""
    self.integer('seed', 0, doc, 0, base_config.MAX_SEED)

  def choice(
    self,
    name: str,
    default: str | None,
    registry: base_config.Registry,
    doc: str,
    config: str | None = None,
  ) -> None:
    """Defines a flag that names an entry of a registry, in any case.

    Args:
      name: Name of the flag.
      default: Its default.
      registry: Entries to choose from.
      doc: Help text, before the list of names.
      config: Flag of a config whose imports may add to the registry: where that
        is given, the name is for the script to look up.
    """
    self.string(name, default, f'{doc}: {", ".join(sorted(registry))}')

    def is_known(value: str | None) -> bool:
      if value is None or (config and self._values[config].value is not None):
        return True
      try:
        registry.lookup(f'--{name}', value)
      except ValueError as error:
        raise flags.ValidationError(str(error)) from None
      return True

    flags.register_validator(name, is_known, flag_values=self._values)

  def distributed(self) -> None:
    """Defines the flags by which several processes find each other."""
    self.boolean(
      'distributed',
      False,
      'Compute with other processes, each on its own devices: start the same '
      'command in all of them, with a folder that they share. On a TPU pod and '
      'under SLURM or Open MPI they find each other; elsewhere give '
      '--coordinator, --num_processes and --process_id. A process has all GPUs '
      'of its machine, or those of CUDA_VISIBLE_DEVICES; a task of SLURM has '
      'one; on a CPU it has one device, or --cpu_devices.',
    )
    self.string(
      'coordinator',
      None,
      'host:port at which process 0 can be reached, with a port that is free.',
    )
    self.integer('num_processes', None, 'Number of processes.', 1)
    self.integer('process_id', None, 'Index of this process: 0, 1, ...', 0)
    self.number(
      'connect_timeout',
      120.0,
      'Seconds after which processes that have not all met give up.',
      lower_bound=1.0,
    )


def run(main: Callable[[list[str]], None]) -> None:
  """Runs a script: calls `main` with the arguments but flags, then exits."""

  def run_main(argv: list[str]) -> None:
    try:
      main(argv)
    except BrokenPipeError:
      raise
    except Exception as error:
      problem = _problem(error)
      if problem is not None:
        print(f'error: {problem}', file=sys.stderr)
        multihost.exit_now(1)
        sys.exit(1)
      if multihost.is_peer_failure(error):
        reason = str(error).splitlines()[0][:200]
        print(
          f'error: another process has ended, or cannot be reached ({reason}). '
          'Start all of them again: they go on from the last checkpoint',
          file=sys.stderr,
        )
        multihost.exit_now(EXIT_STOPPED)
      if multihost.is_multiprocess():
        traceback.print_exc()
      multihost.exit_now(1)
      raise

  for stream in (sys.stdout, sys.stderr):
    # A terminal in ASCII has no sign for ±, but can show all else.
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors='replace')
  with printing():
    app.run(run_main, flags_parser=_parse_flags)


@contextlib.contextmanager
def printing() -> Iterator[None]:
  """Inside a `with`, a script ends quietly when its stdout was closed."""
  try:
    yield
  except OSError as error:
    if not isinstance(error, BrokenPipeError) and not run_folder.is_full(error):
      raise
    _print_nowhere()
    if run_folder.is_full(error):
      end_with(error)
    multihost.exit_now(_EXIT_UNREAD)
    sys.exit(_EXIT_UNREAD)
  finally:
    flush()


def say(text: str) -> None:
  """Prints; if that fails, the script goes on.

  For results that are written to a file as well.
  """
  try:
    print(text, flush=True)
  except OSError as error:
    _print_nowhere()
    if not isinstance(error, BrokenPipeError):
      with contextlib.suppress(OSError):
        print(f'warning: cannot print: {error.strerror}', file=sys.stderr)


def flush() -> None:
  """Flushes stdout; if it was closed, drops what is left."""
  try:
    if sys.stdout is not None:  # None if closed before the start.
      sys.stdout.flush()
  except OSError as error:
    _print_nowhere()
    if not isinstance(error, BrokenPipeError):
      end_with(error)


def _print_nowhere() -> None:
  """Redirects stdout to nowhere: a flush at exit would print a traceback."""
  if sys.stdout is not None:
    with open(os.devnull, 'w') as nowhere:
      os.dup2(nowhere.fileno(), sys.stdout.fileno())


def end_with(error: Exception) -> NoReturn:
  """Ends a script with a line on stderr that says what is wrong.

  Raises:
    Exception: The error itself, where `run` knows better how to end.
  """
  if multihost.is_peer_failure(error) or isinstance(error, BrokenPipeError):
    raise error
  # stderr may go to the disk that is full.
  with contextlib.suppress(OSError):
    print(f'error: {error}', file=sys.stderr)
  code = EXIT_CANNOT_SAVE if run_folder.is_full(error) else 1
  if isinstance(error, OSError):
    # The first process alone writes; the others end when it has.
    multihost.exit_now(code)
  sys.exit(code)


def _problem(error: Exception) -> str | None:
  """Message for an error that the machine causes; None for others."""
  if devices.is_out_of_memory(error):
    return (
      f'out of memory ({(str(error) or "of the host").splitlines()[0][:200]}). '
      'Less is taken with a smaller train.batch_size, train.microbatch_size or '
      'eval.batch_size, and with gradient_checkpointing=true among '
      'model.architecture_kwargs'
    )
  # JAX starts when it is first used, and where it cannot, raises one of these.
  if isinstance(error, (AssertionError, RuntimeError)):
    return devices.backend_problem()
  return None


def check_distributed_flags() -> None:
  """Raises ValueError unless the flags of several processes fit together."""
  values = flags.FLAGS
  given = ('coordinator', 'num_processes', 'process_id')
  with base_config.naming('--distributed'):
    if not values.distributed:
      for name in given:
        if values[name].value is not None:
          raise ValueError(f'--{name} needs it')
    multihost.check_address(*(values[name].value for name in given))


def start(argv: list[str], cpu_devices: int = 1) -> None:
  """Starts JAX as the flags say; exits if there are arguments but flags.

  Args:
    argv: Arguments that absl left of the command line.
    cpu_devices: As in `devices.start`.

  Raises:
    ValueError: If the processes of `--distributed` cannot meet.
  """
  if len(argv) > 1:
    sys.exit(f'error: unexpected arguments: {" ".join(argv[1:])}')
  if not flags.FLAGS['verbosity'].present:
    # Orbax logs its progress, and its errors, which are raised as well.
    logging.set_verbosity(logging.FATAL)
  devices.start(cpu_devices, flags.FLAGS.compilation_cache)
  if 'distributed' in flags.FLAGS and flags.FLAGS.distributed:
    multihost.start(
      flags.FLAGS.coordinator,
      flags.FLAGS.num_processes,
      flags.FLAGS.process_id,
      flags.FLAGS.connect_timeout,
    )


def make_folder(path: str) -> pathlib.Path:
  """Returns a folder that is there, or exits with an error."""
  folder = pathlib.Path(path)
  with saving(folder):
    folder.mkdir(parents=True, exist_ok=True)
  return folder


@contextlib.contextmanager
def saving(folder: pathlib.Path) -> Iterator[None]:
  """Inside a `with`, ends the script if a folder cannot be written to."""
  try:
    yield
  except BrokenPipeError:  # Of stdout, not of the folder.
    raise
  except OSError as error:
    end_with(run_folder.save_error(folder, error))


def _parse_flags(argv: list[str]) -> list[str]:
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    sys.exit(f'error: {" ".join(str(error).split())}')
