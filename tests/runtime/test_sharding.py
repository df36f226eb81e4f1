import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nonstationary_mbml import base_config
from nonstationary_mbml.runtime import sharding


@pytest.mark.parametrize(
  ('num_members', 'num_devices', 'num_rows'),
  [(8, 8, 8), (2, 8, 2), (3, 8, 1), (6, 4, 2), (16, 8, 8), (8, 1, 1)],
)
def test_members_are_shared_out_as_far_as_they_divide(
  num_members, num_devices, num_rows
):
  config = base_config.TrainConfig(model_init_seed=tuple(range(num_members)))
  assert sharding.num_seed_shards(config, num_devices) == num_rows
  config.model_init_seed = 0
  assert sharding.num_seed_shards(config, num_devices) == 1


def test_arrays_take_the_shapes_and_places_of_a_form():
  """Of a member on two devices: its sequences stay where they are."""
  mesh = sharding.make(jax.devices()[:2])
  by_sequence = jax.sharding.PartitionSpec(sharding.SEEDS, sharding.BATCH)
  state = jax.device_put(
    jnp.arange(12.0).reshape(1, 4, 3),
    jax.sharding.NamedSharding(mesh, by_sequence),
  )
  form = sharding.abstract((state, np.zeros(1)), sharding.replicated(mesh))
  alone = jax.tree.map(sharding.without_first_axis, form)
  saved, total = sharding.reshaping(alone)((state, np.ones(1)))
  assert saved.shape == (4, 3) and total.shape == ()
  assert {shard.data.shape for shard in saved.addressable_shards} == {(2, 3)}
  assert total.sharding.is_fully_replicated
  restored, _ = sharding.reshaping(form)((saved, total))
  assert restored.sharding == state.sharding
  np.testing.assert_array_equal(restored, state)
