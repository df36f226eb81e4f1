import errno
import json
import os
import pkgutil
import subprocess
import sys
import types

from absl import flags
import pytest

from nonstationary_mbml import base_config
from nonstationary_mbml.experiments import cli
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import evaluate
from nonstationary_mbml.experiments.analysis import bayes_table
from nonstationary_mbml.runtime import run_folder


def _script(body):
  """The command of a script with a main function of such a body."""
  lines = [
    'import pathlib, sys',
    'from nonstationary_mbml.experiments import cli',
    'def main(argv):',
    *(f'  {line}' for line in body),
    'cli.run(main)',
  ]
  return [sys.executable, '-c', '\n'.join(lines)]


@pytest.mark.parametrize(
  ('body', 'code'),
  [
    # Printed into a buffer, and not read.
    (['print(1)', "pathlib.Path('written').touch()"], 0),
    (
      [
        "cli.say('x' * 10**6)",
        "print('x' * 10**6)",
        "pathlib.Path('written').touch()",
        'sys.exit(3)',
      ],
      3,
    ),
    (["pathlib.Path('written').touch()", "print('x' * 10**6)"], 141),
  ],
  ids=['a line', 'results', 'more'],
)
def test_script_ends_quietly_when_nobody_reads_what_it_prints(
  tmp_path, body, code
):
  read, write = os.pipe()
  os.close(read)
  environment = {k: v for k, v in os.environ.items() if 'UNBUFFERED' not in k}
  result = subprocess.run(
    _script(body),
    cwd=tmp_path,
    env=environment,
    stdout=write,
    stderr=subprocess.PIPE,
    check=False,
  )
  os.close(write)
  assert result.stderr == b''
  assert result.returncode == code
  assert (tmp_path / 'written').exists()


@pytest.mark.skipif(
  not os.path.exists('/dev/full'), reason='a device that is always full'
)
def test_output_that_cannot_be_written_is_a_line_on_stderr():
  with open('/dev/full', 'w') as full:
    result = subprocess.run(
      _script(['print(1)']),
      stdout=full,
      stderr=subprocess.PIPE,
      text=True,
      check=False,
    )
  (line,) = result.stderr.splitlines()
  assert line.startswith('error: ') and 'No space left' in line
  assert result.returncode == cli.EXIT_CANNOT_SAVE


@pytest.mark.skipif(
  not os.path.exists('/dev/full'), reason='a device that is always full'
)
def test_results_are_written_where_they_cannot_be_printed(tmp_path):
  body = ["cli.say('1')", "pathlib.Path('written').touch()"]
  with open('/dev/full', 'w') as full:
    result = subprocess.run(
      _script(body),
      cwd=tmp_path,
      stdout=full,
      stderr=subprocess.PIPE,
      text=True,
      check=False,
    )
  assert result.stderr == 'warning: cannot print: No space left on device\n'
  assert result.returncode == 0
  assert (tmp_path / 'written').exists()


@pytest.mark.parametrize(
  ('number', 'code'),
  [
    (errno.ENOSPC, cli.EXIT_CANNOT_SAVE),
    (errno.EDQUOT, cli.EXIT_CANNOT_SAVE),
    (errno.EACCES, 1),
    (errno.ENOTDIR, 1),
  ],
)
def test_status_tells_a_full_disk_from_a_folder_that_is_none(
  tmp_path, capsys, number, code
):
  with pytest.raises(SystemExit) as exit_:
    with cli.saving(tmp_path):
      raise OSError(number, os.strerror(number))
  assert exit_.value.code == code
  said = f'error: cannot write to {tmp_path}: {os.strerror(number)}\n'
  assert capsys.readouterr().err == said


class _Flags(types.SimpleNamespace):
  """Values of flags, as absl has them once they are parsed."""

  def __getitem__(self, name):
    return types.SimpleNamespace(value=getattr(self, name, None), present=0)


def _main(module, monkeypatch, capsys, argv=(), **values):
  """What a script prints that cannot write, and its exit status."""

  def fail(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  namespace = types.SimpleNamespace(FLAGS=_Flags(**values))
  monkeypatch.setattr(module, 'flags', namespace)
  monkeypatch.setattr(cli, 'start', lambda *args: None)
  monkeypatch.setattr(cli, 'check_distributed_flags', lambda: None)
  monkeypatch.setattr(
    'nonstationary_mbml.runtime.atomic_files.write_whole', fail
  )
  with pytest.raises(SystemExit) as exit_:
    module.main(['script.py', *argv])
  printed = capsys.readouterr()
  (line,) = printed.err.splitlines()
  assert line.startswith('error: cannot write to ') and 'No space left' in line
  assert exit_.value.code == cli.EXIT_CANNOT_SAVE
  return printed.out


def test_table_of_exact_predictors_is_printed_before_it_is_written(
  tmp_path, monkeypatch, capsys
):
  cells = [
    bayes_table.Cell(
      source='ptw',
      predictor=name,
      is_exact=name == 'ptw',
      cumulative_regret=1.25,
      stderr=0.5,
      above_exact=0.0,
      above_exact_stderr=0.0,
      bound=None,
      num_sequences=2,
      seq_length=4,
      alphabet_size=2,
      seed=0,
    )
    for name in bayes_table.PREDICTORS
  ]
  monkeypatch.setattr(bayes_table, 'make_row', lambda *args: cells)
  monkeypatch.setattr(bayes_table, 'SOURCES', ('ptw',))
  printed = _main(
    bayes_table,
    monkeypatch,
    capsys,
    output_dir=str(tmp_path),
    num_sequences=2,
    seq_length=4,
    batch_size=2,
    seed=0,
    alphabet_size=2,
  )
  assert '| `ptw` | **1.25 ± 0.50** |' in printed


def test_evaluation_is_printed_before_it_is_written(
  tmp_path, monkeypatch, capsys
):
  row = {
    'predictor': 'lstm',
    'cumulative_regret': 1.25,
    'stderr': 0.5,
    'stderr_over': 'sequences',
    'above_optimum': 0.0,
    'above_optimum_stderr': 0.0,
    'is_optimum': True,
  }

  def stand_in(folder, config, steps, num_sequences, use_tqdm):
    return {
      'eval': base_config.to_dict(config.eval),
      'num_sequences': num_sequences,
      'exact_predictor': 'ptw',
      'steps': [{'step': 3, 'table': [row]}],
    }

  config = base_config.to_dict(config_lib.ExperimentConfig())
  (tmp_path / run_folder.CONFIG).write_text(json.dumps(config))
  monkeypatch.setattr(evaluate, 'evaluate', stand_in)
  printed = _main(
    evaluate,
    monkeypatch,
    capsys,
    [str(tmp_path)],
    distributed=False,
    cpu_devices=1,
    source=None,
    seq_length=None,
    batch_size=None,
    step='newest',
    num_sequences=2,
    set=(),
  )
  assert 'lstm' in printed and '1.2500 ± 0.5000' in printed


@pytest.mark.parametrize(
  ('text', 'problem'),
  [
    ('0', '0 is not an integer in the range'),
    ('101', '101 is not an integer in the range'),
    ('2.5', 'it is 2.5; it must be an int'),
    ('true', 'it is True; it must be an int'),
    ('ten', "it is 'ten'; it must be an int"),
  ],
)
def test_integer_flag_has_its_bounds(text, problem):
  values = flags.FlagValues()
  cli.FlagDefiner(values).integer('num', 3, 'A number.', 1, 100)
  assert values(['script', '--num=1e2']) and values.num == 100
  with pytest.raises(flags.IllegalFlagValueError, match=f'--num.*{problem}'):
    values(['script', f'--num={text}'])


_SCRIPT = """
from absl import flags
import jax.numpy as jnp
from nonstationary_mbml.experiments import cli

def main(argv):
  cli.start(argv)
  print('1.0 \\xb1 0.1', flush=True)
  jnp.zeros(2**42).block_until_ready()

cli.FlagDefiner()
cli.run(main)
"""


def _run(**env):
  return subprocess.run(
    [sys.executable, '-c', _SCRIPT],
    env={**os.environ, **env},
    capture_output=True,
    text=True,
    check=False,
  )


def test_memory_that_is_not_there_is_a_line_that_says_what_helps():
  """And a stream that has no sign for some letter shows the others."""
  result = _run(JAX_PLATFORMS='cpu', PYTHONIOENCODING='ascii')
  assert result.stdout == '1.0 ? 0.1\n'
  assert result.returncode == 1
  (line,) = result.stderr.splitlines()
  assert line.startswith('error: out of memory (RESOURCE_EXHAUSTED')
  for setting in ('batch_size', 'microbatch_size', 'gradient_checkpointing'):
    assert setting in line


_HAS_CUDA = any(m.name.startswith('jax_cuda') for m in pkgutil.iter_modules())


@pytest.mark.parametrize(
  'platform',
  [
    pytest.param(
      'cuda', marks=pytest.mark.skipif(_HAS_CUDA, reason='is there')
    ),
    'cudda',
  ],
)
def test_platform_that_is_not_there_is_a_line(platform):
  result = _run(JAX_PLATFORMS=platform)
  assert result.returncode == 1
  (line,) = result.stderr.splitlines()
  assert line.startswith(
    f'error: JAX does not start on the platform {platform}'
  )


@pytest.mark.parametrize(
  ('name', 'text', 'message'),
  [
    (
      'missing.py',
      None,
      'missing.py cannot be imported: there is no such',
    ),
    ('no-name', None, "imports 'no-name' is neither the name of a module"),
    ('my_nothing', None, "ModuleNotFoundError: No module named 'my_nothing'"),
    (
      'things.py',
      'from nonstationary_mbml.experiments import constants\n'
      "constants.OPTIMAL_PREDICTORS['Own'] = None\n",
      "things.py cannot be imported: ValueError: optimal_predictor 'Own' can",
    ),
  ],
)
def test_module_that_cannot_be_imported_is_a_flag_error(
  tmp_path, monkeypatch, name, text, message
):
  monkeypatch.chdir(tmp_path)
  if text is not None:
    (tmp_path / name).write_text(text)
  values = flags.FlagValues()
  cli.FlagDefiner(values)
  with pytest.raises(flags.Error, match=f'--import={name}: .*{message}'):
    values(['script.py', f'--import={name}'])


@pytest.mark.parametrize(
  ('given', 'imports'),
  [
    ((), None),
    (('--import=',), ()),
    (('--import=json', '--import=ast'), ('json', 'ast')),
  ],
)
def test_imports_of_the_command_line(given, imports):
  values = flags.FlagValues()
  cli.FlagDefiner(values)
  values(['script.py', *given])
  assert cli.imports(values) == imports
