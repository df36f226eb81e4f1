"""The registries, and modules of the user's own that add to them."""

import contextlib
import sys

from nonstationary_mbml import optimizers
from nonstationary_mbml import predictor_factories
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments.sweeps import presets

_REGISTRIES = (
  constants.OPTIMAL_PREDICTORS,
  constants.TRAJECTORY_GENERATORS,
  optimizers.OPTIMIZERS,
  predictor_factories.CORES,
  predictor_factories.PREDICTOR_FACTORIES,
  presets.SWEEPS,
)
# How modules are called that a test imports, once it has made them.
_PREFIXES = ('imported_', 'my_')


@contextlib.contextmanager
def restored():
  """Inside a `with`, modules can be imported, and are forgotten at its end."""
  before = [dict(registry) for registry in _REGISTRIES]
  path = list(sys.path)
  try:
    yield
  finally:
    sys.path[:] = path
    for name in list(sys.modules):
      if name.startswith(_PREFIXES):
        del sys.modules[name]
    for registry, entries in zip(_REGISTRIES, before, strict=True):
      registry.clear()
      registry.update(entries)
