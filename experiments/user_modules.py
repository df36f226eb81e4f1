"""Modules of the user's own, which add to the registries of names.

  import_all(('my_package.my_source', '/home/me/my_network.py'))

A config names them in `imports`, so that they are there for whoever loads the
run, and in every process of a sweep. Importing a module runs its code.
"""

from collections.abc import Iterable
import hashlib
import importlib
import importlib.util
import os
import pathlib
import sys
import traceback
from types import ModuleType

from nonstationary_mbml import base_config

# Files whose frames say nothing about the user's code.
_OURS = (__file__, importlib.__file__, importlib.util.__file__)


def import_all(names: Iterable[str], named_by: str | None = None) -> None:
  """Imports modules; those that this process has already are left alone.

  A module is looked up as `import` does, and in the working directory after
  all other places. A file is known by its path, also if it was imported by
  another name, or is the script itself.

  Args:
    names: Names of modules, and paths of .py files.
    named_by: File that names them, which stderr is told before one is run; None
      if it was the user, just now.

  Raises:
    ValueError: If one cannot be imported; says which, and why.
  """
  for name in names:
    base_config.check_import('imports', name)
    if _is_imported(name):
      continue
    if base_config.is_file(name) and not os.path.isfile(name):
      raise ValueError(f'{name} cannot be imported: there is no such file')
    if named_by is not None:
      print(f'importing {name}, which {named_by} names', file=sys.stderr)
    try:
      _import(name)
    # A script that ends itself is not one to import, either.
    except (Exception, SystemExit) as error:
      raise ValueError(
        f'{name} cannot be imported: {_one_line(error)}'
      ) from error


def _is_imported(name: str) -> bool:
  if not base_config.is_file(name):
    return name in sys.modules
  return _find(name) is not None


def _find(path: str) -> ModuleType | None:
  """The module that is from a file, if there is one yet."""
  modules = list(sys.modules.values())
  return next((module for module in modules if _is_from(module, path)), None)


def _is_from(module: ModuleType, path: str) -> bool:
  """Whether a file is where a module is from."""
  # Not by getattr, for which some modules import others.
  file = getattr(module, '__dict__', {}).get('__file__')
  # Most modules are called otherwise, and not looked for on the disk.
  return (
    isinstance(file, str)
    and os.path.basename(file) == os.path.basename(path)
    and os.path.realpath(file) == os.path.realpath(path)
  )


def _import(name: str) -> None:
  importlib.invalidate_caches()
  if base_config.is_file(name):
    _import_file(pathlib.Path(name))
    return
  # Of a script, Python looks into the folder of the script only.
  if os.getcwd() not in sys.path:
    sys.path.append(os.getcwd())
  spec = importlib.util.find_spec(name)
  if spec is not None and (same := _find(spec.origin or '')):
    sys.modules[name] = same
    return
  importlib.import_module(name)


def _import_file(path: pathlib.Path) -> None:
  # Not by its own name, which may be that of another module.
  digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()
  name = f'imported_{path.stem}_{digest[:8]}'
  spec = importlib.util.spec_from_file_location(name, path)
  sys.modules[name] = module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except BaseException:
    del sys.modules[name]
    raise


def _one_line(error: BaseException) -> str:
  """Class and message of an error, and where in the user's code it was."""
  text = ' '.join(f'{type(error).__name__}: {error}'.split())
  places = [
    f' ({frame.filename}, line {frame.lineno})'
    for frame in traceback.extract_tb(error.__traceback__)
    if frame.filename not in _OURS and not frame.filename.startswith('<')
  ]
  return text + (places or [''])[-1]
