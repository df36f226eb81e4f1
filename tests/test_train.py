import dataclasses
import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nonstationary_mbml import base_config
from nonstationary_mbml import losses as losses_lib
from nonstationary_mbml import optimizers
from nonstationary_mbml import predictor_factories
from nonstationary_mbml import train
from nonstationary_mbml import train_state
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments import evaluator as evaluator_lib
from nonstationary_mbml.runtime import devices as devices_lib


def _config(model_type='lstm', architecture_kwargs=None, steps=6, **kwargs):
  return config_lib.post_process_config(
    config_lib.ExperimentConfig(
      model=base_config.ModelConfig(
        model_type=model_type,
        architecture_kwargs=architecture_kwargs or {'hidden_size': 8},
      ),
      train=base_config.TrainConfig(
        **{'seq_length': 8, 'batch_size': 4, **kwargs}
      ),
      schedule=base_config.ScheduleConfig(training_steps=steps),
      logger=base_config.LoggerConfig(log_frequency=3),
      eval=config_lib.EvalConfig(batch_size=4, optimal_predictors=('ptw',)),
    )
  )


def _train(config):
  return train.train(
    config, constants.build_data_generator, evaluator_lib.build_evaluator
  )


def _run_steps(config, num_steps, num_devices):
  """Losses `[steps, M]` and final state of a run without logs."""
  devices = jax.local_devices()[:num_devices]
  generator = constants.build_data_generator(config.data)
  predictor = predictor_factories.build_predictor(config.model, 2)
  state = train_state.init_state(config, predictor, 2, devices)
  update = train.make_update(config, generator, predictor, num_devices)
  run_steps = train.make_run_steps(config, update, devices)
  zeros = train_state.zero_sums(state)
  losses = []
  for _ in range(num_steps):
    state, sums, _ = run_steps(state, zeros, 1)
    losses.append(np.asarray(sums.loss))
  return np.stack(losses), jax.device_get(state)


def _member(tree, index):
  return jax.tree.map(lambda array: array[index], tree)


def _assert_trees_close(first, second, **tolerance):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, **tolerance), first, second
  )


def test_training_lowers_the_regret():
  config = _config(steps=120, learning_rate=1e-2)
  config.logger.log_frequency = 60
  config.eval.batch_size = 256
  history = _train(config).history
  assert [entry['step'] for entry in history] == [60, 120]
  assert history[-1]['loss'] < np.log(2)
  assert history[-1]['cumulative_regret'] < 2.0


# Every pair of settings once.
@pytest.mark.parametrize(
  ('fixed', 'reset', 'num_devices'),
  [(True, True, 1), (True, False, 2), (False, True, 2), (False, False, 1)],
)
def test_scanned_loop_equals_a_loop_in_python(fixed, reset, num_devices):
  config = _config(reset_predictor_init_state=reset, seq_length_fixed=fixed)
  losses, state = _run_steps(config, 20, num_devices)

  generator = constants.build_data_generator(config.data)
  predictor = predictor_factories.build_predictor(config.model, 2)
  optimizer = optimizers.make_optimizer(config.train, 1)
  keys = train_state.step_keys(config.seed, 0, 0)
  params = predictor.init_params(keys.predictor, jnp.zeros((4, 2, 2)), None)
  opt_state = optimizer.init(params)
  predictor_state = predictor.initial_state(params, None, 4)
  lengths = train_state.sequence_lengths(config.train)

  def loss_fn(params, batch, predictor_state):
    logits, final_state = predictor.unroll(
      params, None, batch, None if reset else predictor_state
    )
    log_probs = jax.nn.log_softmax(logits[:, :-1])
    return -(batch[:, 1:] * log_probs).sum(-1).mean(), final_state

  loss_and_grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
  for step in range(1, 21):
    keys = train_state.step_keys(config.seed, 0, step)
    index = int(train._length_index(config.seed, step, len(lengths)))
    batch, _ = generator.sample(keys.data, 4, lengths[index])
    (loss, predictor_state), grads = loss_and_grads(
      params, batch, predictor_state
    )
    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = jax.tree.map(jnp.add, params, updates)
    np.testing.assert_allclose(losses[step - 1], [loss], rtol=1e-5)
  _assert_trees_close(_member(state.params, 0), params, atol=1e-5)
  if reset:
    assert state.predictor_state is None
  else:
    _assert_trees_close(
      _member(state.predictor_state, 0), predictor_state, atol=1e-5
    )


def _first_params(config):
  """The network of a config, and the parameters that training begins with."""
  predictor = predictor_factories.build_predictor(config.model, 2)
  params = jax.jit(predictor.init_params)(
    train_state.step_keys(config.seed, 0, 0).predictor,
    jnp.zeros((4, 2, 2)),
    None,
  )
  return predictor, params


@pytest.mark.parametrize('target', base_config.TARGETS)
def test_a_step_goes_down_on_the_target_and_reports_the_symbols(target):
  config = _config(
    target=target, optimizer='sgd', learning_rate=1.0, clip_grad_norm=None
  )
  losses, state = _run_steps(config, 1, 1)
  generator = constants.build_data_generator(config.data)
  predictor, params = _first_params(config)
  keys = train_state.step_keys(config.seed, 0, 1)
  batch, parameters = generator.sample(keys.data, 4, 8)
  log_probs, _ = generator.bayes_predictor(8).unroll({}, None, batch)
  targets = {
    'symbols': batch[:, 1:],
    'parameters': parameters[:, 1:],
    'bayes': jnp.exp(log_probs[:, :-1]),
  }

  def loss_fn(params, targets):
    logits, _ = predictor.unroll(params, None, batch)
    return -(targets * jax.nn.log_softmax(logits[:, :-1])).sum(-1).mean()

  loss_and_grads = jax.jit(jax.value_and_grad(loss_fn))
  loss, _ = loss_and_grads(params, targets['symbols'])
  np.testing.assert_allclose(losses, [[loss]], rtol=1e-5)
  _, grads = loss_and_grads(params, targets[target])
  expected = jax.tree.map(jnp.subtract, params, grads)
  _assert_trees_close(_member(state.params, 0), expected, atol=1e-6)


@pytest.mark.parametrize('chunk_length', [None, 4])
def test_dropout_is_on_in_training_with_a_key_for_every_chunk(chunk_length):
  """The first loss is that of the step's own dropout keys, of no others."""
  kwargs = {
    'embedding_dim': 8,
    'num_heads': 2,
    'num_layers': 1,
    'dropout_prob': 0.5,
  }
  config = _config('transformer', kwargs, gradient_chunk_length=chunk_length)
  losses, _ = _run_steps(config, 1, 1)
  generator = constants.build_data_generator(config.data)
  predictor, params = _first_params(config)
  keys = train_state.step_keys(config.seed, 0, 1)
  batch, _ = generator.sample(keys.data, 4, 8)
  unroll = jax.jit(predictor.unroll)

  def loss(rng_of):
    total, length = 0.0, chunk_length or 8
    for begin in range(0, 8, length):
      chunk = batch[:, begin : begin + length]
      logits, _ = unroll(params, rng_of(begin), chunk)
      targets = batch[:, begin + 1 : begin + 1 + length]
      total += losses_lib.log_loss(logits[:, : targets.shape[1]], targets)
    return float(total / (4 * 7))

  expected = loss(lambda begin: jax.random.fold_in(keys.predictor, begin))
  assert losses[0] == pytest.approx(expected, rel=1e-5)
  assert losses[0] != pytest.approx(loss(lambda begin: None), rel=1e-3)


def test_every_device_has_dropout_masks_of_its_own():
  kwargs = {
    'embedding_dim': 8,
    'num_heads': 2,
    'num_layers': 1,
    'dropout_prob': 0.5,
  }
  config = _config('transformer', kwargs, batch_size=2)
  update = train.make_update(
    config, _SameSequence(), _predictor(config), num_devices=2
  )
  devices = jax.local_devices()
  state = train_state.init_state(config, _predictor(config), 2, devices)
  params = _member(jax.device_get(state.params), 0)
  zeros = train_state.zero_sums(state)
  _, sums, _ = train.make_run_steps(config, update, devices)(state, zeros, 1)
  # Both devices have the same sequence: with the same masks, the mean of their
  # losses would be that of one mask.
  key = train_state.step_keys(config.seed, 0, 1).predictor
  batch, _ = _SameSequence().sample_from_keys(jax.random.split(key, 1), 8)
  loss = jax.jit(
    lambda rng: losses_lib.loss_and_grads(
      _predictor(config), params, rng, batch, None
    )[0]
  )
  single = [float(loss(jax.random.fold_in(key, device))) for device in (0, 1)]
  assert single[0] != pytest.approx(single[1], rel=1e-4)
  assert float(sums.loss[0]) == pytest.approx(np.mean(single), rel=1e-5)


def _predictor(config):
  return predictor_factories.build_predictor(config.model, 2)


class _SameSequence:
  """A source of one sequence only."""

  alphabet_size = 2

  def sample_from_keys(self, keys, seq_length):
    symbols = jnp.arange(seq_length) // 3 % 2
    batch = jnp.tile(jnp.eye(2)[symbols], (len(keys), 1, 1))
    return batch, batch


def test_evaluation_has_its_own_keys():
  seen = []

  class Spy:
    alphabet_size = 2

    def step(self, params, state, rng):
      seen.append(np.asarray(jax.random.key_data(rng)).tolist())
      return {'cumulative_regret': 0.0}

  train.train(_config(), constants.build_data_generator, lambda *args: Spy())
  assert seen == [
    np.asarray(
      jax.random.key_data(train_state.step_keys(0, 0, step).evaluation)
    ).tolist()
    for step in (3, 6)
  ]


# Rows of devices that share out the members, and the batch inside of each.
GRIDS = {
  'each of two members over four': {'model_init_seed': (3, 7)},
  'all three members over eight': {'model_init_seed': (0, 3, 7)},
  'as it is told': {'model_init_seed': (0, 1, 2, 3), 'num_seed_shards': 2},
}


def _grid_config(name):
  return _config(
    steps=20, batch_size=8, reset_predictor_init_state=False, **GRIDS[name]
  )


def test_eight_devices_train_as_one():
  """In a process that has them."""
  code = f"""
import json, runpy, jax
jax.config.update('jax_num_cpu_devices', 8)
module = runpy.run_path({__file__!r})
for name in module['GRIDS']:
  losses, _ = module['_run_steps'](module['_grid_config'](name), 20, 8)
  print(json.dumps(losses.tolist()))
"""
  result = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=False
  )
  assert result.returncode == 0, result.stderr
  for name, line in zip(GRIDS, result.stdout.splitlines(), strict=True):
    config = _grid_config(name)
    # The grid is for eight.
    config.train.num_seed_shards = None
    losses, _ = _run_steps(config, 20, 1)
    np.testing.assert_allclose(json.loads(line), losses, atol=1e-5)


@pytest.mark.parametrize(
  ('seeds', 'num_held'), [((0, 1, 2, 3), 2), ((0, 1, 2), 3), (0, 1)]
)
def test_device_holds_the_members_of_its_row(seeds, num_held):
  """Two devices: rows of one, or a row of both."""
  config = _config(model_init_seed=seeds, reset_predictor_init_state=False)
  devices = jax.local_devices()
  predictor = _predictor(config)
  generator = constants.build_data_generator(config.data)
  state = train_state.init_state(config, predictor, 2, devices)
  update = train.make_update(config, generator, predictor, 2)
  run_steps = train.make_run_steps(config, update, devices)
  after, *_ = run_steps(state, train_state.zero_sums(state), 1)
  held = lambda tree: {
    shard.data.shape
    for array in jax.tree.leaves(tree)
    for shard in array.addressable_shards
  }
  for tree in (after.params, after.predictor_state):
    assert {shape[0] for shape in held(tree)} == {num_held}
  # Of the batch of 4, all or a half.
  num_sequences = 4 if num_held == 2 else 2
  assert {shape[1] for shape in held(after.predictor_state)} == {num_sequences}


def test_no_program_is_compiled_after_the_first_log():
  """Neither for another number of steps nor for another drawn length."""
  config = _config(steps=8, seq_length_fixed=False)
  counts = []

  def build_evaluator(predictor, eval_config):
    evaluator = evaluator_lib.build_evaluator(predictor, eval_config)
    step = evaluator.step

    def spy(*args):
      metrics = step(*args)
      counts.append(compilations.programs)
      return metrics

    evaluator.step = spy
    return evaluator

  with devices_lib.count_compilations() as compilations:
    train.train(config, constants.build_data_generator, build_evaluator)
  # Logs after 3, 3 and 2 steps.
  assert len(counts) == 3
  assert counts[0] > 0
  assert counts[1:] == [counts[0], counts[0]]


@functools.cache
def _train_alone(seed):
  """Losses and state of a member that has no others."""
  config = _config(
    model_init_seed=seed,
    seq_length_fixed=False,
    reset_predictor_init_state=False,
  )
  return _run_steps(config, 20, 1)


# Two devices split three members' batches, and of four take two each.
@pytest.mark.parametrize(
  ('num_devices', 'seeds'), [(1, (3, 7)), (2, (3, 0, 7)), (2, (3, 0, 1, 7))]
)
def test_members_of_an_ensemble_train_as_alone(num_devices, seeds):
  config = _config(
    model_init_seed=seeds,
    seq_length_fixed=False,
    reset_predictor_init_state=False,
  )
  losses, state = _run_steps(config, 20, num_devices)
  assert losses.shape == (20, len(seeds))
  for member, seed in ((0, 3), (-1, 7)):
    expected, expected_state = _train_alone(seed)
    np.testing.assert_allclose(losses[:, member], expected[:, 0], atol=1e-5)
    _assert_trees_close(
      _member(state[1:], member), _member(expected_state[1:], 0), atol=1e-4
    )
  assert np.abs(losses[:, 0] - losses[:, -1]).max() > 1e-3


def test_ensemble_logs_means_and_standard_errors_over_its_members():
  config = _config(model_init_seed=(4, 9))
  result = _train(config)
  config.train.model_init_seed = 9
  alone = _train(config)
  first, second = result.member_histories
  for entry, expected in zip(second, alone.history, strict=True):
    assert entry == pytest.approx(expected, abs=1e-5)
  assert alone.member_histories == ()
  _assert_trees_close(result.member(1), alone.params, atol=1e-5)
  for entry, *members in zip(result.history, first, second, strict=True):
    assert entry['step'] == members[0]['step']
    values = [member['cumulative_regret'] for member in members]
    assert entry['cumulative_regret'] == pytest.approx(np.mean(values))
    assert entry['seeds_stderr/cumulative_regret'] == pytest.approx(
      np.std(values, ddof=1) / np.sqrt(2)
    )


def test_result_does_not_depend_on_how_often_the_run_logs():
  often, seldom = _config(), _config()
  often.logger.log_frequency = 1
  seldom.logger.log_frequency = 4  # Does not divide the number of steps.
  first, second = _train(often), _train(seldom)
  _assert_trees_close(first.params, second.params, rtol=1e-6)
  assert [entry['step'] for entry in second.history] == [4, 6]
  np.testing.assert_allclose(
    np.mean([entry['loss'] for entry in first.history[:4]]),
    second.history[0]['loss'],
    rtol=1e-5,
  )
  assert first.history[-1]['cumulative_regret'] == pytest.approx(
    second.history[-1]['cumulative_regret'], rel=1e-5
  )


@pytest.mark.parametrize('field', ['seed', 'model_init_seed'])
def test_each_seed_makes_another_run(field):
  config, other = _config(steps=3), _config(steps=3)
  setattr(other if field == 'seed' else other.train, field, 1)
  assert _train(config).history[0]['loss'] == _train(config).history[0]['loss']
  assert _train(config).history[0]['loss'] != _train(other).history[0]['loss']


def test_no_key_is_used_twice():
  keys = [
    np.asarray(jax.random.key_data(key)).tobytes()
    for seed in (0, 1)
    for model_init_seed in (0, 1)
    for step in range(20)
    for key in train_state.step_keys(seed, model_init_seed, step)
  ]
  assert len(set(keys)) == len(keys)


def test_zero_steps_leave_the_initial_parameters():
  result = _train(_config(steps=0))
  assert result.history == []
  assert result.params


@pytest.mark.parametrize(
  ('seq_length', 'lengths'),
  [(2, (2,)), (32, (2, 4, 8, 16, 32)), (40, (2, 4, 8, 16, 32))],
)
def test_random_lengths_are_powers_of_two_and_never_one(seq_length, lengths):
  config = base_config.TrainConfig(
    seq_length=seq_length, seq_length_fixed=False
  )
  assert train_state.sequence_lengths(config) == lengths


def test_random_lengths_follow_from_the_seed_alone():
  def lengths(seed, model_init_seed):
    config = _config(
      seq_length=16, seq_length_fixed=False, model_init_seed=model_init_seed
    )
    config.seed = seed
    shapes = []

    class Spy:
      def sample_from_keys(self, keys, seq_length):
        jax.debug.callback(lambda: shapes.append(seq_length))
        batch = jnp.tile(jnp.eye(2)[0], (len(keys), seq_length, 1))
        return batch, batch

    predictor = _predictor(config)
    devices = jax.local_devices()[:1]
    state = train_state.init_state(config, predictor, 2, devices)
    update = train.make_update(config, Spy(), predictor)
    zeros = train_state.zero_sums(state)
    run_steps = train.make_run_steps(config, update, devices)
    jax.block_until_ready(run_steps(state, zeros, 12))
    jax.effects_barrier()
    return shapes

  drawn = sorted(lengths(0, 0))
  assert len(drawn) == 12
  assert drawn == sorted(lengths(0, 1))
  assert drawn != sorted(lengths(1, 0))


def test_random_lengths_are_equally_likely():
  indices = jax.vmap(lambda step: train._length_index(3, step, 4))(
    jnp.arange(4000)
  )
  counts = np.bincount(indices, minlength=4)
  # Chi-squared with 3 degrees of freedom exceeds 21.1 with probability 1e-4.
  assert ((counts - 1000) ** 2 / 1000).sum() < 21.1


def test_state_is_donated():
  config = _config()
  devices = jax.local_devices()[:1]
  generator = constants.build_data_generator(config.data)
  predictor = _predictor(config)
  state = train_state.init_state(config, predictor, 2, devices)
  update = train.make_update(config, generator, predictor)
  zeros = train_state.zero_sums(state)
  train.make_run_steps(config, update, devices)(state, zeros, 1)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_members_under_one_vmap_train_as_one_after_another(monkeypatch):
  config = _config(model_init_seed=(3, 7))
  losses, state = _run_steps(config, 5, 1)
  monkeypatch.setattr(
    train, '_map_members', lambda function, members: jax.vmap(function)(members)
  )
  vmapped_losses, vmapped_state = _run_steps(config, 5, 1)
  np.testing.assert_allclose(vmapped_losses, losses, atol=1e-5)
  _assert_trees_close(vmapped_state.params, state.params, atol=1e-5)


def test_gradients_are_clipped_by_their_global_norm():
  config = base_config.TrainConfig(clip_grad_norm=0.5, learning_rate=1.0)
  optimizer = optimizers.make_optimizer(config, 1)
  grads = {'a': jnp.array([30.0, 0.0]), 'b': jnp.array([40.0])}
  state = optimizer.init(grads)
  _, state = optimizer.update(grads, state)
  # Adam's first moment is 0.1 of the clipped gradient.
  np.testing.assert_allclose(state[1][0].mu['a'], [0.03, 0.0], rtol=1e-5)
  np.testing.assert_allclose(state[1][0].mu['b'], [0.04], rtol=1e-5)


@pytest.mark.parametrize('seeds', [3, (3, 7)])
def test_average_is_kept_and_evaluated_beside_the_parameters(seeds):
  """Over two devices, which share a batch or the members."""
  config = _config(model_init_seed=seeds, ema_decay=0.75, steps=3)
  config.logger.log_frequency = 1
  params = []

  def build_evaluator(predictor, eval_config):
    evaluator = evaluator_lib.build_evaluator(predictor, eval_config)
    step = evaluator.step

    def spy(*args):
      params.append(jax.device_get(args[0]))
      return step(*args)

    evaluator.step = spy
    return evaluator

  run = train.train(config, constants.build_data_generator, build_evaluator)
  num_members = np.size(seeds)
  for member in range(num_members):
    # Parameters and average take turns, member by member.
    raw, averaged = (params[2 * member + i :: 2 * num_members] for i in (0, 1))
    for last in (1, 2, 3):
      weights = 0.75 ** np.arange(last)[::-1]
      mean = jax.tree.map(
        lambda *steps, w=weights: np.average(steps, axis=0, weights=w),
        *raw[:last],
      )
      _assert_trees_close(averaged[last - 1], mean, atol=1e-6)
    _assert_trees_close(run.member(member), raw[-1], rtol=0)
    _assert_trees_close(run.ema_member(member), averaged[-1], rtol=0)
  first, *_, last = run.history
  assert first['ema/mean_regret'] == pytest.approx(first['mean_regret'])
  assert last['ema/mean_regret'] != last['mean_regret']
  # On the same sequences.
  name = 'optimal_cumulative_regret/ptw'
  assert last[f'ema/{name}'] == last[name]


def test_average_of_a_run_without_one_is_refused():
  with pytest.raises(ValueError, match='train.ema_decay is None'):
    _train(_config(steps=0)).ema_member(0)


@pytest.mark.parametrize('seeds', [3, (3, 7, 9)])
def test_callbacks_get_every_entry_and_parameters_to_keep(seeds):
  calls = []
  config = _config(model_init_seed=seeds)
  run = train.train(
    config,
    constants.build_data_generator,
    lambda *args: _NoEvaluator(),
    callbacks=[lambda *args: args[1].clear(), lambda *args: calls.append(args)],
  )
  assert [step for step, _, _ in calls] == [3, 6]
  assert [entry for _, entry, _ in calls] == run.history
  first, last = (params for _, _, params in calls)
  expected = run.all_params if isinstance(seeds, tuple) else run.params
  _assert_trees_close(last, expected, rtol=0)
  norms = [float(optax.tree.norm(params)) for params in (first, last)]
  assert norms[0] != norms[1]


class _NoEvaluator:
  alphabet_size = 2

  def step(self, params, state, rng):
    return {}


def test_training_leaves_its_config_as_it_is():
  config = _config(steps=1)
  before = base_config.to_dict(config)
  _train(config)
  assert base_config.to_dict(config) == before


def test_list_put_into_a_dict_is_saved_and_kept_as_a_tuple(tmp_path):
  config = _config(steps=0)
  config.model.architecture_kwargs['after_mlp_layers'] = []
  run = train.train(
    config,
    constants.build_data_generator,
    evaluator_lib.build_evaluator,
    folder=tmp_path,
  )
  assert run.config.model.architecture_kwargs['after_mlp_layers'] == ()


@pytest.mark.parametrize(
  ('overrides', 'message'),
  [
    ({'train.seq_length': 1}, 'train.seq_length is 1'),
    ({'train.seq_length': 0}, 'train.seq_length is 0'),
    ({'train.batch_size': 0}, 'train.batch_size is 0'),
    (
      {'train.batch_size': 3},
      'batch_size 3 does not divide over the 2 devices',
    ),
    ({'train.microbatch_size': 0}, 'train.microbatch_size is 0'),
    ({'train.num_seed_shards': 0}, 'train.num_seed_shards is 0'),
    (
      {'train.num_seed_shards': 2},
      'num_seed_shards 2 does not divide the 1 seeds',
    ),
    (
      {'train.num_seed_shards': 3, 'train.model_init_seed': (0, 1, 2)},
      'num_seed_shards 3 does not divide the 2 devices',
    ),
    (
      {'train.batch_size': 8, 'train.microbatch_size': 3},
      'train.microbatch_size 3 does not divide the 4 sequences of a device',
    ),
    ({'train.learning_rate': -1.0}, 'train.learning_rate is -1.0'),
    ({'train.learning_rate': 0.0}, 'train.learning_rate is 0'),
    (
      {'train.compute_dtype': 'float16'},
      "train.compute_dtype 'float16' is not one of bfloat16, float32.*bfloat16",
    ),
    ({'train.target': 'symbol'}, "train.target 'symbol'.*mean 'symbols'"),
    ({'train.optimizer': 'adm'}, "^train.optimizer 'adm'.*mean 'adam'"),
    (
      {'train.optimizer_kwargs': {'b1': 'no'}},
      "^train.optimizer_kwargs of adam: b1 is 'no'; it must be a number",
    ),
    ({'train.warmup_steps': 7}, '^train.warmup_steps is 7, more than the 6 '),
    ({'train.ema_decay': 0.0}, 'train.ema_decay is 0; None turns'),
    ({'train.ema_decay': 1.0}, 'train.ema_decay is 1.0'),
    ({'train.clip_grad_norm': 0.0}, 'train.clip_grad_norm is 0'),
    ({'train.seq_length_fixed': 1}, 'train.seq_length_fixed is 1'),
    ({'train.gradient_chunk_length': 0}, 'gradient_chunk_length is 0'),
    ({'schedule.training_steps': -1}, 'training_steps is -1'),
    ({'logger.log_frequency': 0}, 'log_frequency is 0'),
    ({'seed': -1}, 'seed is -1'),
    ({'train.model_init_seed': -1}, 'train.model_init_seed is -1'),
    ({'train.model_init_seed': (0, -1)}, 'train.model_init_seed is -1'),
    ({'train.model_init_seed': (1, 1)}, 'and each once'),
    ({'train.model_init_seed': ()}, 'at least one seed'),
    ({'seed': 2**32}, 'seed is 4294967296'),
    ({'name': ''}, 'name is'),
    ({'model.model_type': 'lstn'}, "model.model_type 'lstn'.*mean 'lstm'"),
    ({'model.architecture_kwargs': 3}, 'model.architecture_kwargs is 3'),
    (
      {'data.trajectory_generator': 'ptww'},
      "data.trajectory_generator 'ptww' is not one of .*mean 'ptw'",
    ),
    (
      {'data.iid_distribution': 'categoric'},
      "data.iid_distribution 'categoric' .*mean 'categorical'",
    ),
    (
      {
        'data.iid_distribution': 'exponential',
        'data.iid_distribution_kwargs': {},
        'data.parameter_distribution': 'gamma',
        'data.parameter_distribution_params': (1.0, 1.0),
      },
      'iid_distribution is exponential; training and evaluation take categ',
    ),
    (
      {'data.parameter_distribution_params': (0.5, 0.5, 0.5)},
      'parameter_distribution_params .* must be 2 numbers',
    ),
    (
      {'data.parameter_distribution_kwargs.feature_size': 3},
      'must be 3 numbers for dirichlet',
    ),
    (
      {'data.trajectory_generator_kwargs.shift_period': 3},
      "trajectory_generator_kwargs of ptw has no 'shift_period'",
    ),
    (
      {'data.trajectory_generator': 'regular_shift'},
      "trajectory_generator_kwargs of regular_shift lacks 'shift_period'",
    ),
    ({'eval.seq_length': 1}, 'eval.seq_length is 1'),
    ({'eval.chunk_length': 0}, 'eval.chunk_length is 0'),
    ({'eval.batch_size': 0}, 'eval.batch_size is 0'),
    (
      {'data.trajectory_generator_kwargs.depth': 2},
      'depth 2 holds 4 symbols, not 8',
    ),
    (
      {'eval.data.trajectory_generator_kwargs.depth': 2},
      'depth 2 holds 4 symbols, not 8',
    ),
    (
      {
        'eval.data.iid_distribution_kwargs': {'feature_size': 3},
        'eval.data.parameter_distribution_params': (0.5,) * 3,
        'eval.optimal_predictors': (),
        'eval.optimal_predictors_kwargs': {},
      },
      'eval.data has an alphabet of 3 symbols, but data.* of 2',
    ),
    ({'train.seq_length': 2**31}, 'train.seq_length is 2147483648'),
    (
      {
        'eval.optimal_predictors': ('ptv',),
        'eval.optimal_predictors_kwargs': {},
      },
      "eval.optimal_predictors 'ptv' is not one of .*mean 'ptw'",
    ),
    (
      {'eval.optimal_predictors_kwargs.ptw.dept': 3},
      r"optimal_predictors_kwargs\[ptw\] has no 'dept'.*mean 'depth'",
    ),
    (
      {'eval.optimal_predictors_kwargs.ptw.depth': 2},
      'depth 2 holds 4 symbols, not 8',
    ),
  ],
)
def test_wrong_configs_are_refused_before_anything_compiles(
  overrides, message, monkeypatch
):
  def no_initialisation(*args):
    raise AssertionError('went on to initialise the network')

  monkeypatch.setattr(train_state, 'init_state', no_initialisation)
  config = config_lib.with_overrides(_config(), overrides)
  with pytest.raises(ValueError, match=message):
    _train(config)


def test_carrying_a_state_that_is_not_there_is_refused():
  config = _config(
    'transformer',
    {'embedding_dim': 8, 'num_heads': 2, 'num_layers': 1},
    reset_predictor_init_state=False,
  )
  with pytest.raises(ValueError, match="'transformer' has no state"):
    _train(config)


def test_parameters_of_several_networks_are_not_those_of_one():
  result = _train(_config(steps=0, model_init_seed=(4, 9)))
  with pytest.raises(ValueError, match=r'of 2 .*4, 9.*run.member\(i\)'):
    _ = result.params
  with pytest.raises(ValueError, match='member is 2; .* <= 1'):
    result.member(2)
  with pytest.raises(dataclasses.FrozenInstanceError):
    result.step = 1
