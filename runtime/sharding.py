"""Where arrays lie on several devices, of this process and of others.

The devices are a grid: the members of an ensemble are shared out over its rows,
and the devices of a row share each batch of a member. Without an ensemble there
is one member, and one row.
"""

from collections.abc import Callable
from collections.abc import Sequence
import math
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from nonstationary_mbml import base_config

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


def device_mesh(
  config: base_config.TrainConfig, devices: Sequence[jax.Device]
) -> jax.sharding.Mesh:
  """Returns the devices as a grid, on which a config is trained."""
  return make(devices, num_seed_shards(config, len(devices)))


def num_seed_shards(config: base_config.TrainConfig, num_devices: int) -> int:
  """Returns over how many rows of devices the members are shared out."""
  if config.num_seed_shards is not None:
    return config.num_seed_shards
  return math.gcd(np.size(config.model_init_seed), num_devices)


def check(config: base_config.TrainConfig, num_devices: int) -> None:
  """Raises ValueError unless members and batch divide over the devices."""
  num_rows = num_seed_shards(config, num_devices)
  row_length, rest = divmod(num_devices, num_rows)
  if rest:
    raise ValueError(
      f'train.num_seed_shards {num_rows} does not divide the {num_devices} '
      'devices'
    )
  if config.batch_size % row_length:
    raise ValueError(
      f'train.batch_size {config.batch_size} does not divide over the '
      f'{row_length} devices that share it'
    )
  device_batch_size = config.batch_size // row_length
  if device_batch_size % (config.microbatch_size or device_batch_size):
    raise ValueError(
      f'train.microbatch_size {config.microbatch_size} does not divide '
      f'the {device_batch_size} sequences of a device'
    )


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


def abstract(tree: Any, default: jax.sharding.Sharding) -> Any:
  """Returns the form of a tree, of `jax.ShapeDtypeStruct`.

  Args:
    tree: Tree of arrays, of JAX or NumPy, or of their forms.
    default: Sharding of what has none.
  """
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=getattr(x, 'sharding', None) or default
    ),
    tree,
  )


def without_first_axis(form: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  """Returns the form of the only item of an array."""
  layout = form.sharding
  if isinstance(layout, jax.sharding.NamedSharding):
    spec = jax.sharding.PartitionSpec(*layout.spec[1:])
    layout = jax.sharding.NamedSharding(layout.mesh, spec)
  return jax.ShapeDtypeStruct(form.shape[1:], form.dtype, sharding=layout)


def reshaping(form: Any) -> Callable[[Any], Any]:
  """Returns a function that gives arrays the shapes and places of a form."""
  return jax.jit(
    lambda tree: jax.tree.map(
      lambda array, wanted: array.reshape(wanted.shape), tree, form
    ),
    out_shardings=jax.tree.map(lambda wanted: wanted.sharding, form),
  )
