"""The plain networks of the benchmarks compute what the project's do.

Otherwise the two would not be comparable. Parameters are matched in the order
in which the networks make them.
"""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nonstationary_mbml import predictor_factories

SEQ_LENGTH = 16


def _in_order(params):
  """Module and name of every parameter, in the order they were made."""
  return [(module, name) for module in params for name in params[module]]


@pytest.mark.slow
@pytest.mark.parametrize(
  'name',
  [
    'LSTM-128',
    'RNN-128',
    'Stack-RNN',
    'Transformer NONE',
    'Transformer SIN_COS',
    'Transformer ALIBI',
    'Transformer RELATIVE',
    'Transformer in windows',
  ],
)
def test_plain_network_equals_the_projects(benchmarks, name):
  import networks
  import plain_jax

  model_type, kwargs = networks.networks(SEQ_LENGTH, num_layers=2)[name]
  predictor = predictor_factories.PREDICTOR_FACTORIES[model_type](2, kwargs)
  plain = hk.transform(plain_jax.make_network(model_type, 2, kwargs))
  rng = np.random.default_rng(0)
  symbols = rng.integers(2, size=(3, SEQ_LENGTH))
  batch = jnp.eye(2)[symbols]

  params = predictor.init_params(jax.random.key(0), batch, None)
  plain_params = plain.init(jax.random.key(1), batch)
  for (module, leaf), (plain_module, plain_leaf) in zip(
    _in_order(params), _in_order(plain_params), strict=True
  ):
    # Not the initial value: biases of 0 would hide that they are mixed up.
    shape = params[module][leaf].shape
    value = params[module][leaf] + 0.05 * rng.standard_normal(shape)
    params[module][leaf] = plain_params[plain_module][plain_leaf] = value

  logits, _ = predictor.unroll(params, None, batch)
  np.testing.assert_allclose(
    logits, plain.apply(plain_params, None, batch), atol=1e-5
  )


def test_host_batches_switch_as_often_as_the_source(benchmarks):
  import host_batches

  batch = host_batches.sample_ptw(np.random.default_rng(0), 20_000, 8)
  changes = np.mean(batch[:, 1:, 0] != batch[:, :-1, 0], axis=0)
  # With Dirichlet(1/2), symbols differ with probability 1/4 inside a segment
  # and 1/2 across a switch. One is at time t with probability 2^-(3 - k), where
  # 2^k is the largest power of two that divides t.
  switches = np.array([1 / 8, 1 / 4, 1 / 8, 1 / 2, 1 / 8, 1 / 4, 1 / 8])
  # Five standard deviations: a false alarm in 250,000 runs; the seed is fixed.
  np.testing.assert_allclose(changes, (1 + switches) / 4, atol=0.018)
