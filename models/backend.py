"""What the code does otherwise on one kind of device than on another.

Everything that depends on the kind asks here, so that a test can stand in for a
device that is not there.
"""

import jax


def platform() -> str:
  """Returns where JAX computes: `cpu`, `gpu` or `tpu`."""
  return jax.default_backend()


def is_cpu() -> bool:
  """Whether work comes in pieces that stay in the cache of a CPU.

  Attention comes in blocks, a batch in microbatches, and the members of an
  ensemble one after another; elsewhere, each of them all at once.
  """
  return platform() == 'cpu'


def has_flash_attention() -> bool:
  """Whether cuDNN has attention for the device: NVIDIA, Ampere or newer."""
  if platform() != 'gpu':
    return False
  try:
    return float(jax.local_devices()[0].compute_capability) >= 8
  except (AttributeError, ValueError):  # A GPU of another maker.
    return False
