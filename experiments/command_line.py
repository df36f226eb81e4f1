"""What the scripts share: how they start, and the folders they write to.

  if __name__ == '__main__':
    define_flags()
    command_line.run(main)

Whatever is wrong on the command line is one line on stderr.
"""

from collections.abc import Callable
import errno
import io
import pathlib
import sys
import traceback

from absl import app
from absl import flags
from absl import logging

from nonstationary_mbml import base_config
from nonstationary_mbml import processes
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


class _IntegerParser(flags.IntegerParser):
  """Reads 1e4 as well, as `--set` does."""

  def convert(self, argument: int | str) -> int:
    try:
      return super().convert(argument)
    except ValueError:
      return base_config.read_int(argument)


def define_integer(
  name: str,
  default: int | None,
  doc: str,
  lower_bound: int | None = None,
  upper_bound: int | None = base_config.MAX_SIZE,
  flag_values: flags.FlagValues = flags.FLAGS,
) -> None:
  """`flags.DEFINE_integer`, with the limit of all sizes and counts."""
  flags.DEFINE(
    _IntegerParser(lower_bound, upper_bound),
    name,
    default,
    doc,
    flag_values,
    flags.ArgumentSerializer(),
  )


def define_seed(doc: str, values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines `--seed`, with the limit of `base_config.check_seed`."""
  define_integer('seed', 0, doc, 0, base_config.MAX_SEED, values)


def define_distributed_flags(
  values: flags.FlagValues = flags.FLAGS,
) -> None:
  """Defines the flags by which several processes find each other."""
  flags.DEFINE_bool(
    'distributed',
    False,
    'Compute with other processes, each on its own devices: start the same '
    'command in all of them, with a folder that they share. On a TPU pod and '
    'under SLURM or Open MPI they find each other; elsewhere give '
    '--coordinator, --num_processes and --process_id. A process has all GPUs '
    'of its machine, or those of CUDA_VISIBLE_DEVICES; a task of SLURM has '
    'one; on a CPU it has one device, or --cpu_devices.',
    flag_values=values,
  )
  flags.DEFINE_string(
    'coordinator',
    None,
    'host:port at which process 0 can be reached, with a port that is free.',
    flag_values=values,
  )
  define_integer(
    'num_processes',
    None,
    'How many processes there are.',
    lower_bound=1,
    flag_values=values,
  )
  define_integer(
    'process_id',
    None,
    'Of this process: 0, 1, ...',
    lower_bound=0,
    flag_values=values,
  )
  flags.DEFINE_float(
    'connect_timeout',
    120.0,
    'Seconds after which processes that have not all met give up.',
    lower_bound=1.0,
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

  def run_main(argv: list[str]) -> None:
    try:
      main(argv)
    except Exception as error:
      problem = _problem(error)
      if problem is not None:
        print(f'error: {problem}', file=sys.stderr)
        processes.end_at_once(1)
        sys.exit(1)
      if processes.is_lost(error):
        reason = str(error).splitlines()[0][:200]
        print(
          f'error: another process has ended, or cannot be reached ({reason}). '
          'Start all of them again: they go on from the last checkpoint',
          file=sys.stderr,
        )
        processes.end_at_once(EXIT_STOPPED)
      if processes.are_several():
        traceback.print_exc()
      processes.end_at_once(1)
      raise

  for stream in (sys.stdout, sys.stderr):
    # A terminal in ASCII has no sign for ±, but can show all else.
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors='replace')
  app.run(run_main, flags_parser=_parse_flags)


def _problem(error: Exception) -> str | None:
  """What to say of an error that comes of the machine; None for others."""
  if runtime.is_out_of_memory(error):
    return (
      f'out of memory ({(str(error) or "of the host").splitlines()[0][:200]}). '
      'Less is taken with a smaller train.batch_size, train.microbatch_size or '
      'eval.batch_size, and with gradient_checkpointing=true among '
      'model.architecture_kwargs'
    )
  # JAX starts when it is first used, and where it cannot, raises one of these.
  if isinstance(error, (AssertionError, RuntimeError)):
    return runtime.backend_problem()
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
    processes.check_address(*(values[name].value for name in given))


def start(argv: list[str], cpu_devices: int = 1) -> None:
  """Starts JAX as the flags say; exits if there are arguments but flags.

  Args:
    argv: What absl left of the command line.
    cpu_devices: As in `runtime.start`.

  Raises:
    ValueError: If the processes of `--distributed` cannot meet.
  """
  if len(argv) > 1:
    sys.exit(f'error: unexpected arguments: {" ".join(argv[1:])}')
  if not flags.FLAGS['verbosity'].present:
    # Orbax tells what it does, and errors twice: we get them as exceptions.
    logging.set_verbosity(logging.FATAL)
  runtime.start(cpu_devices, flags.FLAGS.compilation_cache)
  if 'distributed' in flags.FLAGS and flags.FLAGS.distributed:
    processes.start(
      flags.FLAGS.coordinator,
      flags.FLAGS.num_processes,
      flags.FLAGS.process_id,
      flags.FLAGS.connect_timeout,
    )


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
