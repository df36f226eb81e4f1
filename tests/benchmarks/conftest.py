"""The benchmarks import each other by name, as scripts of one folder."""

import pathlib
import sys

import pytest

BENCHMARKS = pathlib.Path(__file__).parents[2] / 'benchmarks'


@pytest.fixture
def benchmarks(monkeypatch):
  """Makes the benchmarks' modules importable, as they are to each other."""
  before = set(sys.modules)
  monkeypatch.syspath_prepend(str(BENCHMARKS))
  yield
  for name in set(sys.modules) - before:
    path = getattr(sys.modules[name], '__file__', None)
    if path and pathlib.Path(path).parent == BENCHMARKS:
      del sys.modules[name]
