import collections

import pytest

from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments.sweeps import presets

ARCHITECTURES = {
  'rnn',
  'lstm',
  'stack_rnn',
  'stack_lstm',
  'transformer_none',
  'transformer_sin_cos',
  'transformer_alibi',
  'transformer_relative',
  'sliding_window',
}
SOURCES = {'ptw', 'lin', 'regular_shift', 'random_shift'}


@pytest.mark.parametrize('name', list(presets.SWEEPS))
def test_every_point_of_a_preset_is_valid(name):
  for config in presets.SWEEPS[name]().expand():
    constants.check(config_lib.post_process_config(config))


def _check_grid(points, sources, per_cell):
  cells = collections.Counter(
    (point.settings['data'], point.settings['model']) for point in points
  )
  assert {source for source, _ in cells} == sources
  assert {architecture for _, architecture in cells} == ARCHITECTURES
  assert set(cells.values()) == {per_cell}


def test_paper_has_the_sources_and_the_ten_seeds_of_the_paper():
  points = presets.paper().points()
  _check_grid(points, SOURCES, per_cell=3)
  for point in points:
    train = point.config.train
    assert (train.seq_length, train.batch_size) == (256, 128)
    assert train.clip_grad_norm == 1.0
    assert len(train.model_init_seed) == 10
    assert point.config.schedule.training_steps == 500_000
  rates = {point.config.train.learning_rate for point in points}
  assert rates == {1e-4, 3e-4, 1e-3}


def test_small_has_the_same_sources_and_one_that_ignores_the_length():
  points = presets.small().points()
  _check_grid(points, SOURCES | {'ptw_depth_8'}, per_cell=1)
  for point in points:
    kwargs = point.config.model.architecture_kwargs
    assert kwargs.get('hidden_size', 64) == 64
    assert kwargs.get('embedding_dim', 32) == 32
    assert kwargs.get('dropout_prob', 0) == 0
    assert point.config.train.model_init_seed == (0, 1, 2)


def test_small_has_the_recipe_and_small_constant_that_of_before():
  recipes = {
    (name, point.config.schedule.training_steps): point.config.train
    for name in ('small', 'small_constant')
    for point in presets.SWEEPS[name]().points()
  }
  train, before = recipes['small', 5_000], recipes['small_constant', 10_000]
  assert len(recipes) == 2
  assert vars(train).items() >= config_lib.RECIPE.items()
  assert (before.optimizer, before.schedule) == ('adam', 'constant')
  assert before.learning_rate == 2e-3


def test_points_have_the_networks_of_their_names():
  by_name = {
    point.settings['model']: point.config.model
    for point in presets.small().points()
  }
  assert by_name['stack_lstm'].architecture_kwargs['inner_core'] == 'lstm'
  assert by_name['rnn'].architecture_kwargs['core'] == 'vanilla_rnn'
  alibi = by_name['transformer_alibi']
  assert alibi.architecture_kwargs['positional_encodings'] == 'ALIBI'
  assert by_name['sliding_window'].model_type == 'sliding_window_transformer'


def test_t256_long_has_weight_decay_where_the_name_says_so():
  points = presets.t256_long().points()
  assert len(points) == 4
  for point in points:
    kwargs = point.config.train.optimizer_kwargs
    is_decayed = point.settings['model'].endswith('_decay')
    assert kwargs == ({'weight_decay': 0.1} if is_decayed else {})
    steps = 40_000 if is_decayed else 80_000
    assert point.config.schedule.training_steps == steps
