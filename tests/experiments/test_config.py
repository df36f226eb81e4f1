import dataclasses
import json

from absl import flags
import haiku as hk
import numpy as np
import pytest

from nonstationary_mbml import base_config
from nonstationary_mbml import predictor_factories
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments import live_and_die_predictors
from nonstationary_mbml.experiments import local_launch
from nonstationary_mbml.experiments import trajectory_generators


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
    # KT with another prior than the source's is not exact.
    ('static', {}, ('static', 'ptw', 'lad', 'kt')),
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
    (
      'drift',
      {'switch_probability': 0.1, 'step_scale': 0.2},
      ('ptw', 'lad', 'kt'),
    ),
  ],
)
def test_default_is_the_sources_exact_predictor_and_the_references(
  source, kwargs, expected
):
  config = config_lib.ExperimentConfig(
    data=config_lib.DataConfig(
      trajectory_generator=source,
      trajectory_generator_kwargs=kwargs,
      parameter_distribution_params=(2.0, 1.0),
    ),
    eval=config_lib.EvalConfig(
      optimal_predictors=('Exact', 'ptw', 'lad', 'kt'),
      optimal_predictors_kwargs={'KT': {'concentration': 1.0}},
    ),
  )
  config = config_lib.post_process_config(config)
  assert config.eval.optimal_predictors == expected
  own_kwargs = config.eval.optimal_predictors_kwargs[expected[0]]
  if expected[0] == source:
    assert kwargs.items() <= own_kwargs.items()
  assert own_kwargs['concentration'] == (2.0, 1.0)
  # What is given stays.
  assert config.eval.optimal_predictors_kwargs['kt']['concentration'] == 1.0


@pytest.mark.parametrize('name', ['auto', 'Auto'])
def test_default_is_that_of_configs_that_call_it_auto(name):
  values = {'eval': {'optimal_predictors': name}}
  with pytest.raises(ValueError, match="'automatic'; it must be a tuple"):
    base_config.from_dict(
      config_lib.ExperimentConfig, {'eval': {'optimal_predictors': 'automatic'}}
    )
  config = base_config.from_dict(config_lib.ExperimentConfig, values)
  assert config == config_lib.ExperimentConfig()


def test_distribution_of_a_predictor_is_not_mixed_with_that_of_the_source():
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
      optimal_predictors=('random_shift',),
      optimal_predictors_kwargs={'random_shift': given},
    ),
  )
  with pytest.raises(ValueError, match="lacks 'shift_parameters'"):
    constants.check(config)
  kwargs = config.resolved().eval.optimal_predictors_kwargs['random_shift']
  assert kwargs == {**given, 'concentration': (0.5, 0.5)}


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    ({'optimal_predictors': 'ptw'}, "is 'ptw'; it must be a tuple of names"),
    ({'optimal_predictors': ('ptv',)}, "'ptv' is not one of .*mean 'ptw'"),
    (
      {'optimal_predictors_kwargs': {'kd': {}}},
      "optimal_predictors_kwargs has no 'kd'",
    ),
    (
      # 'ptw' is not the exact one, which keeps its name.
      {'optimal_predictors_kwargs': {'ptw': {'depth': 9}, 'exact': {'a': 1}}},
      r"optimal_predictors_kwargs\[exact\] has no 'a'; it takes nothing",
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


def test_depth_of_a_source_may_be_given_as_none():
  config = config_lib.ExperimentConfig()
  config.data.trajectory_generator_kwargs = {'depth': None}
  constants.check(config)
  config = config.resolved()
  assert config.eval.optimal_predictors_kwargs['ptw']['depth'] == 5


def test_exact_predictor_may_be_equal_to_itself_alone(monkeypatch):
  class WithTable(live_and_die_predictors.LADPredictor):
    def __init__(self, *args):
      super().__init__(*args)
      self.table = np.ones(3)  # Has no hash.

  monkeypatch.setattr(
    trajectory_generators.LINGenerator,
    '_bayes_predictor',
    lambda self, seq_length, concentration: WithTable(concentration),
  )
  config = config_lib.ExperimentConfig()
  config.data.trajectory_generator = 'lin'
  config = config.resolved()
  generator = constants.build_data_generator(config.data)
  built = constants.build_optimal_predictors(config.eval, generator)
  assert constants.exact_predictor(generator, built, 32) == 'exact'
  assert isinstance(built['exact'], WithTable)


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


def test_named_values_of_a_sweep_name_its_points():
  sweep = config_lib.ExperimentSweep(
    general_sweep={
      'data': {
        'tree': {'trajectory_generator': 'ptw'},
        'period': {
          'trajectory_generator': 'regular_shift',
          'trajectory_generator_kwargs': {'shift_period': 4},
        },
      },
      'seed': (3,),
    },
    specific_sweeps=({'train.learning_rate': {'slow': 1e-4}},),
    base_config=config_lib.ExperimentConfig(name='base'),
  )
  tree, period = sweep.points()
  assert tree.config.name == 'base,tree,seed=3,slow'
  assert period.config.name == 'base,period,seed=3,slow'
  assert period.settings == {
    'data': 'period',
    'seed': 3,
    'train.learning_rate': 'slow',
  }
  assert period.config.data.trajectory_generator_kwargs == {'shift_period': 4}
  # Fields that a named value leaves out are the base's.
  assert period.config.data.parameter_distribution_params == (0.5, 0.5)
  assert period.config.train.learning_rate == 1e-4


def test_sweep_over_a_config_needs_its_fields():
  with pytest.raises(ValueError, match="model: 'lstm' is no dict"):
    config_lib.ExperimentSweep(general_sweep={'model': ('lstm',)}).points()
  with pytest.raises(ValueError, match="'modle_type' is not one of"):
    config_lib.ExperimentSweep(
      general_sweep={'model': {'a': {'modle_type': 'lstm'}}}
    ).points()


def test_two_points_of_a_sweep_cannot_have_one_name():
  with pytest.raises(ValueError, match='two points of the sweep are called'):
    config_lib.ExperimentSweep(
      specific_sweeps=({'seed': (1,)}, {'seed': (1,)})
    ).points()


def test_overrides_inside_evaluation_data_change_a_copy_of_the_training_data():
  config = config_lib.with_overrides(
    config_lib.ExperimentConfig(),
    # Whatever the order.
    {
      'eval.data.trajectory_generator': 'lin',
      'data.parameter_distribution_params': (2.0, 2.0),
    },
  )
  assert config.data.trajectory_generator == 'ptw'
  assert config.eval.data == config_lib.DataConfig(
    trajectory_generator='lin', parameter_distribution_params=(2.0, 2.0)
  )


@pytest.mark.parametrize(
  ('item', 'value'),
  [
    ('train.learning_rate=3e-4', 3e-4),
    ('train.learning_rate=1', 1.0),
    ('schedule.training_steps=1e4', 10_000),
    ('train.seq_length_fixed=False', False),
    ('train.seq_length_fixed=true', True),
    ('train.clip_grad_norm=none', None),
    ('train.microbatch_size=null', None),
    ('train.microbatch_size=8', 8),
    ('train.model_init_seed=3', 3),
    ('train.model_init_seed=3,4', (3, 4)),
    ('train.model_init_seed=[3, 1e1]', (3, 10)),
    ('data.parameter_distribution_params=0.5,1', (0.5, 1.0)),
    ('data.parameter_distribution_params=1', 1.0),
    ('data.parameter_distribution_params=(0.5, 1)', (0.5, 1.0)),
    ('name=None', 'None'),
    ('name=a=b', 'a=b'),
    ('eval.data=none', None),
    ('eval.optimal_predictors=exact,kt', ('exact', 'kt')),
    ('eval.optimal_predictors=ptw, kt', ('ptw', 'kt')),
    ('eval.optimal_predictors=["ptw"]', ('ptw',)),
    ('eval.optimal_predictors=()', ()),
    ('eval.optimal_predictors_kwargs.kt.concentration=1e-1', 0.1),
    ("model.architecture_kwargs={'core': 'gru'}", {'core': 'gru'}),
    ('model.architecture_kwargs={"use": true}', {'use': True}),
    ('model.architecture_kwargs.hidden_size=1e2', 100),
    ('model.architecture_kwargs={"hidden_size": 1e2}', {'hidden_size': 100}),
    ('model.architecture_kwargs.before_mlp_layers=[3e1, 4]', (30, 4)),
    ('model.architecture_kwargs.dropout_prob=1e-1', 0.1),
    ('model.architecture_kwargs.max_timescale=1e300', 1e300),
    ('model.architecture_kwargs.max_timescale=inf', 'inf'),
    ('model.architecture_kwargs.core=gru', 'gru'),
    ("model.architecture_kwargs.core='gru'", 'gru'),
    ('model.architecture_kwargs.positional_encodings=NONE', 'NONE'),
    ('model.architecture_kwargs.attention_window=None', None),
    ('model.architecture_kwargs.use_embeddings=true', True),
    ('model.architecture_kwargs.before_mlp_layers=[3, 4]', (3, 4)),
    ('data.trajectory_generator_kwargs.shift_parameters=1,39', (1, 39)),
  ],
)
def test_texts_become_values_of_the_type_of_their_field(item, value):
  path = item.partition('=')[0]
  parsed = config_lib.parse_overrides(config_lib.ExperimentConfig(), [item])
  assert parsed == {path: value}
  assert type(parsed[path]) is type(value)


def test_the_last_of_two_texts_for_a_path_wins():
  dropout = 'model.architecture_kwargs.dropout_prob'
  parsed = config_lib.parse_overrides(
    config_lib.ExperimentConfig(),
    [f'{dropout}=0.1', 'model.architecture_kwargs={}', f'{dropout}=0.2'],
  )
  assert list(parsed) == ['model.architecture_kwargs', dropout]
  assert parsed[dropout] == 0.2


def _leaves(config, prefix=''):
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if isinstance(value, base_config.Config):
      yield from _leaves(value, f'{prefix}{field.name}.')
    else:
      yield f'{prefix}{field.name}', value


def test_every_field_reads_the_text_of_its_value():
  config = config_lib.post_process_config(config_lib.ExperimentConfig())
  values = dict(_leaves(config))
  assert {'eval.data.parameter_distribution_params', 'seed'} <= values.keys()
  items = [f'{path}={value}' for path, value in values.items()]
  assert config_lib.parse_overrides(config, items) == values


@pytest.mark.parametrize('model_type', predictor_factories.PREDICTOR_FACTORIES)
@pytest.mark.parametrize('source', constants.TRAJECTORY_GENERATORS)
def test_what_was_resolved_stays(source, model_type):
  given = local_launch.make_config(source=source, model_type=model_type)
  resolved = given.resolved()
  assert resolved.resolved() == resolved != given


def _config_from_flags(*given):
  values = flags.FlagValues()
  local_launch.define_flags(values)
  values(['', *given])
  return local_launch.config_from_flags(values)


@pytest.fixture
def saved(tmp_path):
  """The folder of a run on `random_shift`, and its config."""
  config = _config_from_flags(
    '--source=random_shift',
    '--model_type=stack_rnn',
    '--seed=3',
    '--batch_size=64',
    '--set=logger.log_frequency=7',
  )
  values = base_config.to_dict(config)
  (tmp_path / 'config.json').write_text(json.dumps(values))
  return tmp_path, config


def test_mixture_of_sources_is_saved_and_read_as_it_was_given():
  config = local_launch.make_config(source='mixture')
  config = config_lib.with_overrides(
    config,
    config_lib.parse_overrides(
      config,
      [
        "data.trajectory_generator_kwargs.sources=[{'trajectory_generator': "
        "'lin', 'weight': 0.5}, {'trajectory_generator': 'random_shift', "
        "'trajectory_generator_kwargs': {'shift_distribution': 'constant', "
        "'shift_parameters': [4.0]}, 'weight': 0.5}]"
      ],
    ),
  )
  text = json.dumps(base_config.to_dict(config))
  loaded = base_config.from_dict(config_lib.ExperimentConfig, json.loads(text))
  assert loaded == config
  generator = constants.build_data_generator(loaded.data)
  assert generator == constants.build_data_generator(config.data)
  assert generator.sources[1].shift_parameters == (4.0,)
  resolved = loaded.resolved()
  assert resolved.eval.optimal_predictors == ('exact', 'ptw', 'lad', 'kt')
  built = constants.build_optimal_predictors(resolved.eval, generator)
  assert constants.exact_predictor(generator, built, 32) == 'exact'


def test_saved_config_is_the_config(saved):
  folder, config = saved
  assert _config_from_flags(f'--config={folder}') == config
  assert _config_from_flags(f'--config={folder}/config.json') == config


def test_saved_config_may_be_older_than_its_fields(saved):
  folder, config = saved
  values = base_config.to_dict(config)
  del values['schedule']['num_saves'], values['train']['microbatch_size']
  (folder / 'config.json').write_text(json.dumps(values))
  assert _config_from_flags(f'--config={folder}') == config


def test_flags_that_are_given_change_a_saved_config(saved):
  folder, config = saved
  changed = _config_from_flags(
    f'--config={folder}',
    '--steps=50',
    '--seed=0',  # Given, though it is the default.
    '--num_seeds=2',
    '--seq_length=64',
    '--learning_rate=0.1',
    '--name=other',
  )
  assert changed.schedule.training_steps == 50
  assert changed.seed == 0
  assert changed.train.model_init_seed == (0, 1)
  assert changed.train.learning_rate == 0.1
  assert changed.name == 'other'
  # What is not given stays.
  assert changed.train.batch_size == 64
  assert changed.logger.log_frequency == 7
  assert changed.data == config.data
  # What follows from the length follows again.
  resolved = changed.resolved()
  assert resolved.eval.seq_length == 64
  assert resolved.eval.optimal_predictors_kwargs['ptw']['depth'] == 6
  assert resolved.model.architecture_kwargs['stack_size'] == 64


def test_defaults_that_older_runs_wrote_out_follow_again(saved):
  folder, config = saved
  values = base_config.to_dict(config.resolved())
  (folder / 'config.json').write_text(json.dumps(values))
  assert _config_from_flags(f'--config={folder}').resolved() == (
    config.resolved()
  )
  changed = _config_from_flags(f'--config={folder}', '--source=regular_shift')
  expected = _config_from_flags('--source=regular_shift')
  assert changed.resolved().eval == expected.resolved().eval


def test_evaluation_that_an_older_run_was_given_stays(saved):
  folder, config = saved
  config.eval.optimal_predictors = ('kt',)
  values = base_config.to_dict(config.resolved())
  (folder / 'config.json').write_text(json.dumps(values))
  changed = _config_from_flags(f'--config={folder}')
  assert changed.eval.optimal_predictors == ('kt',)


@pytest.mark.parametrize(
  'given', [('eval.seq_length=16',), ('eval.data.trajectory_generator=lin',)]
)
def test_rest_of_an_older_evaluation_follows_again(tmp_path, given):
  args = [f'--set={item}' for item in given]
  values = base_config.to_dict(_config_from_flags(*args).resolved())
  (tmp_path / 'config.json').write_text(json.dumps(values))
  changed = _config_from_flags(
    f'--config={tmp_path}',
    '--seq_length=64',
    '--set=eval.data.trajectory_generator=regular_shift',
    '--set=eval.data.trajectory_generator_kwargs={"shift_period": 8}',
  ).resolved()
  seq_length = 16 if 'eval.seq_length=16' in given else 64
  assert changed.eval.seq_length == seq_length
  kwargs = changed.eval.optimal_predictors_kwargs
  assert list(kwargs) == ['regular_shift', 'ptw', 'lad', 'kt']
  assert 2 ** kwargs['ptw']['depth'] == seq_length


def test_arguments_that_an_older_run_was_given_stay(tmp_path):
  given = _config_from_flags(
    '--set=eval.optimal_predictors_kwargs.ptw.depth=9',
    '--set=eval.optimal_predictors=ptw,lad,kt',
  )
  values = base_config.to_dict(given.resolved())
  (tmp_path / 'config.json').write_text(json.dumps(values))
  changed = _config_from_flags(
    f'--config={tmp_path}', '--set=data.parameter_distribution_params=1,1'
  ).resolved()
  assert changed.eval.optimal_predictors_kwargs['ptw'] == {
    'depth': 9,
    'concentration': (1.0, 1.0),
  }


def test_sizes_that_older_runs_wrote_out_follow_again(saved):
  folder, config = saved
  values = base_config.to_dict(config.resolved())
  assert values['model']['architecture_kwargs']['stack_size'] == 32
  (folder / 'config.json').write_text(json.dumps(values))
  changed = _config_from_flags(f'--config={folder}', '--seq_length=64')
  assert changed.resolved().model.architecture_kwargs['stack_size'] == 64


def test_sizes_that_a_run_was_given_stay(saved):
  folder, config = saved
  config.model.architecture_kwargs['stack_size'] = 32
  config.eval.seq_length = 32
  values = base_config.to_dict(config)
  (folder / 'config.json').write_text(json.dumps(values))
  changed = _config_from_flags(f'--config={folder}', '--seq_length=64')
  assert changed.eval.seq_length == 32
  assert changed.model == config.model


def test_source_and_network_bring_their_arguments_to_a_saved_config(saved):
  folder, _ = saved
  changed = _config_from_flags(
    f'--config={folder}', '--source=regular_shift', '--model_type=lstm'
  )
  expected = _config_from_flags('--source=regular_shift', '--model_type=lstm')
  assert changed.data == expected.data
  resolved = changed.resolved()
  assert resolved.eval.data == resolved.data == expected.resolved().data
  assert changed.model == expected.model
  assert changed.eval == expected.eval


def test_set_comes_after_all_other_flags(saved):
  folder, _ = saved
  changed = _config_from_flags(
    '--set=train.seq_length=16',
    f'--config={folder}',
    '--seq_length=64',
    '--set=eval.data.trajectory_generator_kwargs.shift_parameters=1,9',
  ).resolved()
  assert changed.train.seq_length == changed.eval.seq_length == 16
  assert changed.data.trajectory_generator_kwargs['shift_parameters'] == (1, 39)
  own = changed.eval.optimal_predictors_kwargs['random_shift']
  assert own['shift_parameters'] == (1, 9)


def test_point_of_a_sweep_is_named_without_slashes():
  sweep = config_lib.ExperimentSweep(
    general_sweep={
      'data.trajectory_generator_kwargs.path': ('a/b', '../c'),
      'seed': {'x/y': 0, 'z': 1},
    },
  )
  names = [config.name for config in sweep.expand()]
  path = 'data.trajectory_generator_kwargs.path'
  assert names == [
    f'lstm_ptw,{path}=a-b,x-y',
    f'lstm_ptw,{path}=a-b,z',
    f'lstm_ptw,{path}=..-c,x-y',
    f'lstm_ptw,{path}=..-c,z',
  ]
  for config in sweep.expand():
    config.validate()
  sweep.base_config.name = '../elsewhere'
  with pytest.raises(ValueError, match="base_config.name is '../elsewhere'"):
    sweep.points()


@pytest.mark.parametrize(
  ('model_type', 'path', 'text'),
  [
    ('lstm', 'model.architecture_kwargs.hidden_size', '1e1'),
    ('transformer', 'model.architecture_kwargs.emb_init_scale', '1e0'),
    ('lstm', 'eval.optimal_predictors_kwargs.kt.concentration', '2.0'),
  ],
)
def test_whole_number_in_any_notation_serves_sizes_and_numbers(
  model_type, path, text
):
  config = local_launch.make_config(model_type=model_type)
  overrides = config_lib.parse_overrides(config, [f'{path}={text}'])
  config = config_lib.post_process_config(
    config_lib.with_overrides(config, overrides)
  )
  constants.check(config)
  saved = json.loads(json.dumps(base_config.to_dict(config)))
  assert base_config.from_dict(config_lib.ExperimentConfig, saved) == config
