import haiku as hk
import pytest

from nonstationary_mbml import base_config
from nonstationary_mbml.experiments import config as config_lib


def test_post_process_fills_what_is_none():
  config = config_lib.post_process_config(
    config_lib.ExperimentConfig(train=base_config.TrainConfig(seq_length=20))
  )
  assert config.eval.seq_length == 20
  assert config.eval.data == config.data
  assert config.eval.data is not config.data
  assert config.eval.optimal_predictors_kwargs['ptw'] == {
    'depth': 5,
    'concentration': (0.5, 0.5),
  }


def test_post_process_leaves_the_given_config_as_it_is():
  config = config_lib.ExperimentConfig()
  before = base_config.to_dict(config)
  config_lib.post_process_config(config)
  assert base_config.to_dict(config) == before


def test_post_process_twice_is_once():
  config = config_lib.post_process_config(config_lib.ExperimentConfig())
  assert config_lib.post_process_config(config) == config


def test_names_mean_the_same_in_any_case_of_letters():
  config = config_lib.ExperimentConfig(
    model=base_config.ModelConfig(
      model_type='RNN', architecture_kwargs={'core': 'Stack_RNN'}
    ),
    data=config_lib.DataConfig(
      trajectory_generator='PTW',
      trajectory_generator_kwargs={'depth': 9},
      parameter_distribution='Dirichlet',
      parameter_distribution_params=(3.0, 1.0),
    ),
    eval=config_lib.EvalConfig(optimal_predictors=('PTW', 'KT')),
  )
  config = config_lib.post_process_config(config)
  assert config.eval.optimal_predictors_kwargs == {
    'ptw': {'depth': 9, 'concentration': (3.0, 1.0)},
    'kt': {'concentration': (3.0, 1.0)},
  }
  assert config.model.architecture_kwargs['stack_size'] == 32


@pytest.mark.parametrize(
  ('source', 'kwargs', 'expected'),
  [
    ('static', {}, ('kt', 'ptw', 'lad')),
    ('PTW', {}, ('ptw', 'lad', 'kt')),
    ('iid_ptw_cat', {}, ('ptw', 'lad', 'kt')),
    ('lin', {}, ('lad', 'ptw', 'kt')),
    (
      'regular_shift',
      {'shift_period': 7},
      ('regular_shift', 'ptw', 'lad', 'kt'),
    ),
    (
      'random_shift',
      {'shift_distribution': 'gamma', 'shift_parameters': (2.0, 0.1)},
      ('random_shift', 'ptw', 'lad', 'kt'),
    ),
    (
      'recurring',
      {'pool_size': 3, 'switch_probability': 0.1},
      ('forget_me_not', 'ptw', 'lad', 'kt'),
    ),
  ],
)
def test_auto_is_the_sources_own_predictor_and_the_references(
  source, kwargs, expected
):
  config = config_lib.ExperimentConfig(
    data=config_lib.DataConfig(
      trajectory_generator=source,
      trajectory_generator_kwargs=kwargs,
      parameter_distribution_params=(2.0, 1.0),
    ),
    eval=config_lib.EvalConfig(
      optimal_predictors='Auto',
      optimal_predictors_kwargs={'KT': {'concentration': 1.0}},
    ),
  )
  config = config_lib.post_process_config(config)
  assert config.eval.optimal_predictors == expected
  own_kwargs = config.eval.optimal_predictors_kwargs[expected[0]]
  if expected[0] == source:
    assert kwargs.items() <= own_kwargs.items()
  if expected[0] != 'kt':
    assert own_kwargs['concentration'] == (2.0, 1.0)
  # What is given stays.
  assert config.eval.optimal_predictors_kwargs['kt']['concentration'] == 1.0


def test_law_of_a_predictor_is_not_mixed_with_that_of_the_source():
  given = {'shift_distribution': 'uniform'}
  config = config_lib.ExperimentConfig(
    data=config_lib.DataConfig(
      trajectory_generator='random_shift',
      trajectory_generator_kwargs={
        'shift_distribution': 'gamma',
        'shift_parameters': (2.0, 0.1),
      },
    ),
    eval=config_lib.EvalConfig(
      optimal_predictors_kwargs={'random_shift': given}
    ),
  )
  config = config_lib.post_process_config(config)
  kwargs = config.eval.optimal_predictors_kwargs['random_shift']
  assert kwargs == {**given, 'concentration': (0.5, 0.5)}


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    ({'optimal_predictors': 'ptw'}, "is 'ptw'; it must be 'auto' or a tuple"),
    (
      {'optimal_predictors_kwargs': {'kd': {}}},
      "optimal_predictors_kwargs has no 'kd'",
    ),
  ],
)
def test_wrong_choice_of_optimal_predictors_is_named(kwargs, message):
  config = config_lib.ExperimentConfig(eval=config_lib.EvalConfig(**kwargs))
  with pytest.raises(ValueError, match=message):
    config_lib.post_process_config(config)


def test_list_put_into_a_dict_becomes_a_tuple():
  config = config_lib.ExperimentConfig()
  config.model.architecture_kwargs['before_mlp_layers'] = [3, 4]
  config = config_lib.post_process_config(config)
  assert config.model.architecture_kwargs['before_mlp_layers'] == (3, 4)


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('train', {'batch_size': 3}, 'train is .* must be a TrainConfig'),
    ('data', None, 'data is None; it must be a DataConfig'),
    ('eval', base_config.EvalConfig(), 'eval is .* must be a EvalConfig'),
  ],
)
def test_nested_configs_of_another_kind_are_named(field, value, message):
  config = config_lib.ExperimentConfig()
  setattr(config, field, value)
  with pytest.raises(ValueError, match=message):
    config_lib.post_process_config(config)


def test_classes_in_a_config_are_refused():
  config = config_lib.ExperimentConfig()
  config.model.architecture_kwargs = {'core': hk.GRU}
  with pytest.raises(ValueError, match=r'architecture_kwargs\[core\] is'):
    config_lib.post_process_config(config)


def test_post_process_keeps_what_is_given():
  config = config_lib.ExperimentConfig()
  config.eval.seq_length = 64
  config.eval.data = config_lib.DataConfig(trajectory_generator='lin')
  config.eval.optimal_predictors_kwargs = {
    'ptw': {'depth': 9},
    'kt': {'concentration': 1.0},
  }
  config = config_lib.post_process_config(config)
  assert config.eval.seq_length == 64
  assert config.eval.data.trajectory_generator == 'lin'
  assert config.eval.optimal_predictors_kwargs['ptw']['depth'] == 9
  assert config.eval.optimal_predictors_kwargs['kt']['concentration'] == 1.0


def test_ptw_takes_the_depth_of_its_source():
  config = config_lib.ExperimentConfig()
  config.data.trajectory_generator_kwargs = {'depth': 11}
  config = config_lib.post_process_config(config)
  assert config.eval.optimal_predictors_kwargs['ptw']['depth'] == 11


def test_exact_predictors_take_the_prior_of_the_source():
  config = config_lib.ExperimentConfig()
  config.data.parameter_distribution_params = (2.0, 3.0)
  config = config_lib.post_process_config(config)
  for kwargs in config.eval.optimal_predictors_kwargs.values():
    assert kwargs['concentration'] == (2.0, 3.0)


@pytest.mark.parametrize(
  ('model_type', 'kwargs', 'filled'),
  [
    ('stack_rnn', {}, {'stack_size': 32}),
    ('rnn', {'core': 'stack_rnn'}, {'core': 'stack_rnn', 'stack_size': 32}),
    ('stack_rnn', {'stack_size': 3}, {'stack_size': 3}),
    ('sliding_window_transformer', {}, {'context_length': 32}),
    ('lstm', {}, {}),
  ],
)
def test_sizes_of_a_network_follow_the_sequence_length(
  model_type, kwargs, filled
):
  config = config_lib.ExperimentConfig(
    model=base_config.ModelConfig(
      model_type=model_type, architecture_kwargs=kwargs
    )
  )
  config = config_lib.post_process_config(config)
  assert config.model.architecture_kwargs == filled


def test_overrides_reach_nested_fields_and_dicts():
  config = config_lib.ExperimentConfig()
  changed = config_lib.with_overrides(
    config, {'train.batch_size': 7, 'model.architecture_kwargs.core': 'gru'}
  )
  assert changed.train.batch_size == 7
  assert changed.model.architecture_kwargs == {'hidden_size': 64, 'core': 'gru'}
  assert config == config_lib.ExperimentConfig()


@pytest.mark.parametrize(
  ('path', 'message'),
  [
    ('train.batchsize', "'batchsize' is not one of .*mean 'batch_size'"),
    ('trian.batch_size', "'trian' is not one of .*mean 'train'"),
    ('seed.value', '0 has no fields|int has no|has no fields'),
  ],
)
def test_overrides_of_unknown_fields_are_named(path, message):
  with pytest.raises(ValueError, match=message):
    config_lib.with_overrides(config_lib.ExperimentConfig(), {path: 3})


def test_sweep_is_the_product_of_general_and_each_specific():
  sweep = config_lib.ExperimentSweep(
    general_sweep={'seed': [0, 1]},
    specific_sweeps=(
      {'model.model_type': ['lstm']},
      {
        'model.model_type': ['stack_rnn'],
        'model.architecture_kwargs.n_stacks': [1, 2, 3],
      },
    ),
    base_config=config_lib.ExperimentConfig(name='base'),
  )
  configs = sweep.expand()
  assert len(configs) == 2 * (1 + 3)
  assert configs[-1].seed == 1
  assert configs[-1].model.architecture_kwargs['n_stacks'] == 3
  names = [config.name for config in configs]
  assert len(set(names)) == len(names)
  assert names[0] == 'base,seed=0,model.model_type=lstm'


def test_sweep_over_nothing_is_the_base():
  (config,) = config_lib.ExperimentSweep().expand()
  assert config == config_lib.ExperimentConfig()


def test_sweep_over_what_is_no_sequence_is_refused():
  with pytest.raises(ValueError, match='seed is swept over 3'):
    config_lib.ExperimentSweep(general_sweep={'seed': 3}).expand()
