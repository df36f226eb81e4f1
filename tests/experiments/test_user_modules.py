import sys

import pytest

from nonstationary_mbml.experiments import user_modules
from tests import registries


@pytest.fixture(autouse=True)
def _restored():
  with registries.restored():
    yield


@pytest.fixture
def things(tmp_path, monkeypatch):
  """A file in the working directory that notes that it has run."""
  monkeypatch.chdir(tmp_path)
  path = tmp_path / 'my_things.py'
  path.write_text("open('runs', 'a').write('x')\n")
  return path


def _runs():
  with open('runs') as file:
    return len(file.read())


def test_module_runs_once_by_whatever_name_it_is_called(things, monkeypatch):
  user_modules.import_all([str(things), str(things)])
  assert _runs() == 1
  link = things.parent / 'link'
  link.symlink_to(things.parent, target_is_directory=True)
  user_modules.import_all([str(link / things.name)])
  assert _runs() == 1


def test_file_that_was_imported_by_its_name_does_not_run_again(things):
  user_modules.import_all(['my_things'])
  user_modules.import_all(['my_things', str(things)])
  assert _runs() == 1


def test_name_of_a_file_that_was_imported_does_not_run_it_again(things):
  user_modules.import_all([str(things), 'my_things'])
  assert _runs() == 1
  import my_things  # noqa: PLC0415 (nor does code that imports it)

  assert my_things.__file__ == str(things) and _runs() == 1


def test_files_of_one_name_are_two_modules(things):
  other = things.parent / 'other' / things.name
  other.parent.mkdir()
  other.write_text(things.read_text())
  user_modules.import_all([str(things), str(other)])
  assert _runs() == 2


def test_name_of_a_file_hides_no_module(tmp_path):
  path = tmp_path / 'json.py'
  path.write_text('')
  before = sys.modules['json']
  user_modules.import_all([str(path)])
  assert sys.modules['json'] is before


def test_one_who_loads_a_run_is_told_what_is_imported(things, capsys):
  user_modules.import_all([str(things)], 'runs/a/config.json')
  said = f'importing {things}, which runs/a/config.json names\n'
  assert capsys.readouterr().err == said
  user_modules.import_all([str(things)], 'runs/a/config.json')
  assert not capsys.readouterr().err


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('\n1 / 0', r'ZeroDivisionError: .* \(.*my_things.py, line 2\)'),
    ('x = = 1', r'SyntaxError: .*\(my_things.py, line 1\)'),
    ('raise ValueError("a\\n b")', 'ValueError: a b'),
    ('import sys; sys.exit(3)', 'SystemExit: 3'),
    ('import my_other', "ModuleNotFoundError: No module named 'my_other'"),
  ],
)
@pytest.mark.parametrize('by_name', [False, True])
def test_error_of_a_module_is_one_line_with_its_place(
  things, text, message, by_name
):
  good = things.read_text()
  things.write_text(text)
  name = 'my_things' if by_name else str(things)
  with pytest.raises(ValueError) as caught:
    user_modules.import_all([name])
  assert '\n' not in str(caught.value)
  assert caught.match(f'^{name} cannot be imported: {message}')
  # Mended, it can be imported.
  things.write_text(good + '#' * 10)
  user_modules.import_all([name])
  assert _runs() == 1
