"""Where arrays lie on several devices, of this process and of others.

An ensemble is laid out on a grid: its members are shared out over the rows, and
the devices of a row share each batch of a member.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

# The axes of a mesh.
SEEDS = 'seeds'
BATCH = 'batch'


def make(
  devices: Sequence[jax.Device], num_seed_shards: int = 1
) -> jax.sharding.Mesh:
  """Returns a mesh with `num_seed_shards` rows.

  Args:
    devices: Row by row, so that a row has neighbours: those of one process, if
      there are enough.
    num_seed_shards: A divisor of their number.
  """
  grid = np.asarray(devices).reshape(num_seed_shards, -1)
  return jax.sharding.Mesh(grid, (SEEDS, BATCH))


def replicated(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """Returns the sharding of what every device has whole."""
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def place(tree: Any, sharding: jax.sharding.Sharding) -> Any:
  """Lays out arrays that every process has whole.

  Args:
    tree: Tree of arrays, the same in every process.
    sharding: Sharding of all of them.
  """

  def place_array(array: Any) -> jax.Array:
    if sharding.is_fully_addressable:
      return jax.device_put(array, sharding)
    if isinstance(array, jax.Array) and array.sharding == sharding:
      return array
    host = np.asarray(array)
    return jax.make_array_from_callback(
      host.shape, sharding, lambda index: host[index]
    )

  return jax.tree.map(place_array, tree)


def collect(tree: Any) -> Any:
  """Returns whole arrays, on the first device of every process.

  All processes call it.

  Args:
    tree: Tree of arrays that lie anywhere.
  """

  def collect_array(array: jax.Array) -> jax.Array:
    if array.is_fully_replicated:
      array = array.addressable_data(0)
    elif not array.is_fully_addressable:
      array = multihost_utils.process_allgather(array, tiled=True)
    return jax.device_put(array, jax.local_devices()[0])

  return jax.tree.map(collect_array, tree)
