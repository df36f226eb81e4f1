import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nonstationary_mbml import base_config
from nonstationary_mbml import optimizers

# For every optimiser, some argument that is not its default.
KWARGS = {
  'adam': {'b1': 0.8},
  'adamw': {'weight_decay': 0.1},
  'lion': {'b2': 0.9},
  'muon': {'ns_steps': 3},
  'sgd': {'momentum': 0.9},
}


def _factors(schedule, num_steps, warmup_steps):
  """Learning rate of steps 1, ..., N over its peak."""
  config = base_config.TrainConfig(
    schedule=schedule, warmup_steps=warmup_steps, learning_rate=0.5
  )
  rate = optimizers.learning_rate(config, num_steps)
  return np.asarray(rate(jnp.arange(num_steps))) / 0.5


@pytest.mark.parametrize('schedule', optimizers.SCHEDULES)
def test_learning_rate_grows_to_its_peak_and_is_never_0(schedule):
  factors = _factors(schedule, 20, 4)
  np.testing.assert_allclose(factors[:4], [0.25, 0.5, 0.75, 1], rtol=1e-6)
  assert factors[-1] > 0
  assert np.all(np.diff(factors[3:]) <= 0)
  # All of training may be warmup.
  np.testing.assert_allclose(
    _factors(schedule, 5, 5), np.arange(1, 6) / 5, rtol=1e-6
  )


def test_warmup_is_a_twentieth_of_the_steps_by_default():
  for schedule in ('warmup_cosine', 'Warmup_Linear'):
    np.testing.assert_array_equal(
      _factors(schedule, 100, None), _factors(schedule, 100, 5)
    )
  constant = base_config.TrainConfig(schedule='constant')
  assert optimizers.learning_rate(constant, 100) == constant.learning_rate


def test_cosine_is_half_a_period_after_warmup():
  expected = (1 + np.cos(np.pi * np.arange(1, 17) / 17)) / 2
  np.testing.assert_allclose(
    _factors('warmup_cosine', 20, 4)[4:], expected, rtol=1e-4
  )


def test_line_would_be_0_one_step_after_the_last():
  np.testing.assert_allclose(
    _factors('warmup_linear', 20, 4)[4:], 1 - np.arange(1, 17) / 17, rtol=1e-5
  )


def test_stable_part_is_all_but_the_last_fifth():
  factors = _factors('warmup_stable_decay', 20, 4)
  assert optimizers.stable_steps(20, 4) == 16
  np.testing.assert_array_equal(factors[3:16], 1)
  decay = 1 - np.sqrt(np.arange(1, 5) / 5)
  np.testing.assert_allclose(factors[16:], decay, rtol=1e-5)
  # A longer warmup takes from the decay.
  factors = _factors('warmup_stable_decay', 20, 18)
  decay = 1 - np.sqrt([0, 1 / 3, 2 / 3])
  np.testing.assert_allclose(factors[17:], decay, rtol=1e-5)


@pytest.mark.parametrize(
  ('schedule', 'most'),
  [('constant', 100), ('warmup_stable_decay', 80), ('warmup_cosine', 10)],
)
def test_more_steps_are_for_runs_that_would_have_done_the_same(schedule, most):
  config = base_config.TrainConfig(schedule=schedule, warmup_steps=10)
  optimizers.check_more_steps(config, 100, 200, most)
  if most < 100:
    with pytest.raises(ValueError, match=f'200 instead of 100.* step {most},'):
      optimizers.check_more_steps(config, 100, 200, most + 1)


def test_schedule_of_a_users_own_has_warmup_and_may_get_more_steps(monkeypatch):
  def halved_after_10(step, num_steps, warmup_steps):
    return jnp.where(step > 10, 0.5, 1.0)

  monkeypatch.setitem(optimizers.SCHEDULES, 'halved', halved_after_10)
  factors = _factors('halved', 12, 2)
  np.testing.assert_array_equal(factors, [0.5, *[1] * 9, 0.5, 0.5])
  config = base_config.TrainConfig(schedule='Halved', warmup_steps=2)
  optimizers.check_more_steps(config, 12, 20, 12)


def _updates(optimizer, params, num_steps):
  """Updates of some steps with equal gradients, and the state after them."""
  state, updates = optimizer.init(params), []
  for _ in range(num_steps):
    update, state = optimizer.update(params, state, params)
    updates.append(update)
  return updates, state


def test_default_is_adam_with_a_number_as_learning_rate():
  """Bits and state are those of before there was any other."""
  params = {'w': jnp.linspace(-1, 1, 6).reshape(2, 3), 'b': jnp.ones(3)}
  default = optimizers.make_optimizer(base_config.TrainConfig(), 10)
  adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(2e-3))
  ours, expected = (_updates(o, params, 3) for o in (default, adam))
  assert jax.tree.structure(ours) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, ours, expected)


def test_kwargs_are_named_for_every_optimiser():
  assert KWARGS.keys() == optimizers.OPTIMIZERS.keys()


@pytest.mark.parametrize('name', KWARGS)
def test_optimiser_goes_down_by_steps_of_the_schedule(name):
  """The first step of a long warmup is shorter than one of full length."""
  params = {'w': jnp.linspace(-1, 1, 6).reshape(2, 3), 'b': jnp.ones(3)}
  sizes = []
  for warmup_steps in (0, 100):
    config = base_config.TrainConfig(
      optimizer=name, optimizer_kwargs=KWARGS[name], warmup_steps=warmup_steps
    )
    optimizer = optimizers.make_optimizer(config, 100)
    (update,), _ = _updates(optimizer, params, 1)
    # Gradients of |params|^2 / 2.
    sizes.append(float(optax.tree.vdot(update, params)))
  assert sizes[0] < 0
  assert sizes[1] == pytest.approx(sizes[0] / 100, rel=1e-4)


def test_kwargs_reach_the_optimiser():
  config = base_config.TrainConfig(
    optimizer='SGD',
    optimizer_kwargs={'momentum': 0.5},
    learning_rate=0.1,
    clip_grad_norm=None,
  )
  optimizer = optimizers.make_optimizer(config, 10)
  first, second = _updates(optimizer, jnp.ones(()), 2)[0]
  assert first == pytest.approx(-0.1)
  assert second == pytest.approx(-0.15)


@pytest.mark.parametrize('decay', [0.5, 0.9999])
def test_average_is_of_the_parameters_after_the_steps(decay):
  """Not of the initial ones; and training is as without it."""
  config = base_config.TrainConfig(learning_rate=0.1)
  plain = optimizers.make_optimizer(config, 5)
  config.ema_decay = decay
  averaging = optimizers.make_optimizer(config, 5)
  params = {'w': jnp.array([3.0, -2.0])}
  state, plain_state = averaging.init(params), plain.init(params)
  assert optimizers.average(plain_state) is None
  np.testing.assert_array_equal(optimizers.average(state)['w'], params['w'])
  seen = []
  for _ in range(5):
    expected, plain_state = plain.update(params, plain_state, params)
    updates, state = averaging.update(params, state, params)
    np.testing.assert_array_equal(updates['w'], expected['w'])
    params = optax.apply_updates(params, updates)
    seen.append(params['w'])
    weights = decay ** np.arange(len(seen))[::-1]
    mean = np.average(seen, axis=0, weights=weights)
    np.testing.assert_allclose(optimizers.average(state)['w'], mean, rtol=1e-5)


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('optimizer', 'adm', "train.optimizer 'adm' is not one of .*mean 'adam'"),
    ('schedule', 'cosine', "train.schedule 'cosine' is not .*'warmup_cosine'"),
    ('warmup_steps', 11, 'train.warmup_steps is 11, more than the 10 steps'),
    ('optimizer_kwargs', {'b3': 1}, "kwargs of adam has no 'b3'.*mean 'b"),
    ('optimizer_kwargs', {'learning_rate': 1}, "has no 'learning_rate'"),
    ('optimizer_kwargs', {'b1': 'no'}, "kwargs of adam: b1 is 'no'; it must"),
    ('optimizer_kwargs', {'mu_dtype': 'f99'}, "kwargs of adam: .*'f99' not un"),
  ],
)
def test_what_cannot_be_is_named(field, value, message):
  config = base_config.TrainConfig(**{field: value})
  with pytest.raises(ValueError, match=message):
    optimizers.make_optimizer(config, 10)


@pytest.mark.parametrize('ns_steps', [3, 7])
def test_muon_is_that_of_optax(ns_steps):
  """Updates and states."""
  params = {
    'w': jax.random.normal(jax.random.key(0), (8, 12)),
    'b': jnp.arange(3.0),
  }
  for kwargs in ({}, {'ns_steps': ns_steps, 'weight_decay': 0.1}):
    updates = []
    for factory in (optimizers.muon, optax.contrib.muon):
      optimizer = factory(0.1, **kwargs)
      updates.append(
        jax.jit(optimizer.update)(params, optimizer.init(params), params)
      )
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), *updates
    )
  own = ((3.0, -3.2, 1.2), (2.0, -1.5, 0.5))
  state = optimizers.muon(0.1, ns_coeffs=own).init(params)
  expected = optax.contrib.muon(0.1, ns_coeffs=own).init(params)
  jax.tree.map(np.testing.assert_array_equal, state, expected)
