"""Every command line of the documents is one that its script takes."""

import importlib
import pathlib
import re
import shlex

from absl import flags
import pytest

from nonstationary_mbml.experiments import cli
from nonstationary_mbml.experiments import local_launch
from nonstationary_mbml.experiments.sweeps import launch

ROOT = pathlib.Path(__file__).parent.parent.parent
DOCUMENTS = (
  ROOT / 'README.md',
  ROOT / 'results' / 'README.md',
  *sorted((ROOT / 'docs').glob('*.md')),
)
# Arguments that are no flags.
_NUM_POSITIONAL = {'code_length': 1, 'evaluate': 1, 'export_run': 2}


def _commands():
  """Each command of a script of experiments/, of all documents, once.

  Those with files of the reader's own are run by test_python_blocks.
  """
  found = {}
  for document in DOCUMENTS:
    text = document.read_text()
    shell = '\n'.join(re.findall(r'```sh\n(.*?)```', text, re.DOTALL))
    lines = re.sub(r'\s*\\\n\s*', ' ', shell).split('\n')
    prose = re.sub(r'```.*?```', '', text, flags=re.DOTALL)
    lines += [
      ' '.join(code.split()) for code in re.findall(r'`([^`]+)`', prose)
    ]
    for line in lines:
      if line.startswith('python experiments/') and '--import' not in line:
        found[line] = None
  return list(found)


def _define_flags(script, values):
  """Defines the flags of a script in `values`, and nowhere else."""
  module = importlib.import_module('.'.join(('nonstationary_mbml', *script)))
  # A script without flags of its own has those of all scripts.
  define = getattr(module, 'define_flags', cli.FlagDefiner)
  try:
    define(values)
  except TypeError:  # One that defines them for the process only.
    before = set(flags.FLAGS)
    define()
    for name in set(flags.FLAGS) - before:
      values[name] = flags.FLAGS[name]
      delattr(flags.FLAGS, name)


def _parse(command):
  """Returns a script's name, its flags and its other arguments."""
  _, path, *arguments = shlex.split(command, comments=True)
  script = pathlib.PurePath(path).with_suffix('').parts
  values = flags.FlagValues()
  _define_flags(script, values)
  return script[-1], values, values([path, *arguments])[1:]


def test_documents_have_commands():
  assert len(_commands()) > 20


@pytest.mark.parametrize('command', _commands())
def test_script_takes_the_command(command):
  command = command.replace(' --help', '')  # It ends the process.
  script, values, arguments = _parse(command)
  assert len(arguments) == _NUM_POSITIONAL.get(script, 0)
  # Names and values inside of flags, where they need no run on disk.
  if script == 'local_launch' and values.config is None:
    local_launch.config_from_flags(values)
  if script == 'launch':
    launch.points_from_flags(values)


@pytest.mark.parametrize(
  'command',
  [
    'python experiments/local_launch.py --sorce=lin',
    'python experiments/evaluate.py runs/a --num_seeds=2',
    'python experiments/sweeps/launch.py --sweep=big',
    'python experiments/analysis/bayes_table.py --seq_length=long',
  ],
)
def test_flag_that_is_not_there_would_be_found(command):
  with pytest.raises(flags.Error):
    _parse(command)
