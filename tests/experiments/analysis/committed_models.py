"""The committed models, as networks of a sweep."""

import pathlib

from nonstationary_mbml.experiments import saved_runs
from nonstationary_mbml.experiments.analysis import trained_networks
from nonstationary_mbml.runtime import atomic_files

MODELS = pathlib.Path(__file__).parents[3] / 'results' / 'models'


def network(name: str) -> trained_networks.Network:
  """Returns a model of results/models/ by the name of its folder."""
  config = saved_runs.load_config(MODELS / name)
  table = atomic_files.read_json(MODELS / name / 'table.json')['table']
  return trained_networks.Network(
    config.data.trajectory_generator,
    config.model.model_type,
    MODELS / name,
    config,
    table,
    config.train.model_init_seed,
  )
