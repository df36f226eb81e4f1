import dataclasses
import json

import numpy as np
import pytest

from nonstationary_mbml import base_config
from nonstationary_mbml.experiments import config as config_lib


def test_config_loads_back_equal_from_json():
  config = config_lib.ExperimentConfig(
    model=base_config.ModelConfig(
      model_type='rnn',
      architecture_kwargs={'before_mlp_layers': [3, 4], 'hidden_size': 5},
    ),
    eval=config_lib.EvalConfig(data=config_lib.DataConfig()),
  )
  text = json.dumps(base_config.to_dict(config))
  loaded = base_config.from_dict(config_lib.ExperimentConfig, json.loads(text))
  assert loaded == config
  assert isinstance(loaded.eval, config_lib.EvalConfig)
  assert isinstance(loaded.eval.data, config_lib.DataConfig)


def test_lists_and_numpy_values_become_plain():
  config = config_lib.DataConfig(parameter_distribution_params=[1.0, 2.0])
  assert config.parameter_distribution_params == (1.0, 2.0)
  config.parameter_distribution_params = np.array([3.0, 4.0])
  assert config.parameter_distribution_params == (3.0, 4.0)
  train_config = base_config.TrainConfig(batch_size=np.int64(3))
  assert type(train_config.batch_size) is int


def test_mistyped_field_is_an_error_that_suggests_the_nearest():
  config = base_config.TrainConfig()
  with pytest.raises(AttributeError, match="did you mean 'learning_rate'"):
    config.learnin_rate = 1e-3
  with pytest.raises(ValueError, match="did you mean 'learning_rate'"):
    base_config.from_dict(base_config.TrainConfig, {'learnin_rate': 1e-3})


def test_config_dicts_are_not_shared():
  first, second = base_config.ModelConfig(), base_config.ModelConfig()
  first.architecture_kwargs['hidden_size'] = 1
  assert second.architecture_kwargs == {'hidden_size': 64}


def test_copy_shares_nothing_and_is_as_it_is_saved():
  config = config_lib.ExperimentConfig(eval=config_lib.EvalConfig())
  config.eval.data = config_lib.DataConfig()
  kwargs = {'sizes': [1, [2]], 'weights': np.array([3.0])}
  config.eval.data.trajectory_generator_kwargs.update(kwargs)
  copied = base_config.copied(config)
  assert type(copied) is config_lib.ExperimentConfig
  assert copied == base_config.from_dict(
    config_lib.ExperimentConfig, base_config.to_dict(config)
  )
  copied.eval.data.trajectory_generator_kwargs['sizes'] = 0
  assert config.eval.data.trajectory_generator_kwargs == kwargs


def test_differences_name_the_fields():
  old = base_config.to_dict(config_lib.ExperimentConfig())
  new = base_config.to_dict(
    config_lib.with_overrides(
      config_lib.ExperimentConfig(),
      {'train.batch_size': 3, 'model.architecture_kwargs.core': 'gru'},
    )
  )
  assert base_config.differences(old, new) == [
    "model.architecture_kwargs.core: 'unset' -> 'gru'",
    'train.batch_size: 128 -> 3',
  ]


def test_registry_finds_any_case_and_suggests_the_nearest():
  registry = base_config.Registry('fruit', {'apple': 1, 'pear': 2})
  assert registry['Apple'] == 1
  message = "fruit 'aple' is not one of apple, pear; did you mean 'apple'"
  with pytest.raises(ValueError, match=message):
    registry['aple']


@pytest.mark.parametrize(
  'register',
  [
    lambda registry: registry.__setitem__('Fig', 3),
    lambda registry: registry.update({'Fig': 3}),
    lambda registry: registry.update(Fig=3),
    lambda registry: registry.setdefault('Fig', 3),
    lambda registry: registry.__ior__({'Fig': 3}),
    lambda registry: base_config.Registry('fruit', {'Fig': 3}),
  ],
)
def test_name_with_capitals_is_refused_when_it_is_registered(register):
  with pytest.raises(ValueError, match="fruit 'Fig' cannot be registered"):
    register(base_config.Registry('fruit', {}))


def test_registered_name_is_found_in_any_case():
  registry = base_config.Registry('fruit', {'apple': 1})
  registry['pear'] = 2
  registry |= {'fig': 3}
  assert registry.setdefault('plum', 4) == 4
  assert [registry[name] for name in ('Pear', 'FIG', 'plum')] == [2, 3, 4]


class _Fruit:
  def __init__(self, size, colour='red'):
    self.size, self.colour = size, colour


class _Apple(_Fruit):
  def __init__(self, sort, **kwargs):
    super().__init__(size=3, **kwargs)


def test_class_takes_what_it_hands_on_to_its_bases():
  given = {'sort': 'Cox', 'colour': 'green'}
  base_config.check_constructor('apple', _Apple, given)
  with pytest.raises(ValueError, match="apple has no 'colur'.*mean 'colour'"):
    base_config.check_constructor('apple', _Apple, {'colur': 'green'})
  with pytest.raises(ValueError, match="apple lacks 'sort'"):
    base_config.check_constructor('apple', _Apple, {'colour': 'green'})


@pytest.mark.parametrize('number', [np.int8(10), np.int64(10), np.uint16(10)])
def test_numpy_integers_are_ints(number):
  checked = base_config.check_int('field', number, 0)
  assert type(checked) is int and 2**checked == 1024


@pytest.mark.parametrize('seed', [-1, 2**32 - 1, 2**32, 2**64, np.int64(2**32)])
def test_seed_that_a_key_does_not_hold_is_refused(seed):
  with pytest.raises(ValueError, match='seed is .*<= 4294967294'):
    base_config.check_seed('seed', seed)
  assert base_config.check_seed('seed', np.uint32(7)) == 7


@pytest.mark.parametrize('value', [True, 1.0, '1', None])
def test_only_integers_are_integers(value):
  with pytest.raises(ValueError, match='field is'):
    base_config.check_int('field', value, 0)


@pytest.mark.parametrize(
  ('concentration', 'alphabet_size', 'message'),
  [
    (1e-39, None, 'loses 1e-39 beside a sum of 2e-39; .* at least 1.355e-20'),
    (1e39, None, 'add up to 2e.39; for float32 .* at most 3.169e.29'),
    (2e38, 2, 'prior 2e.38 add up to 4e.38'),
    (2e29, 2, 'prior 2e.29 add up to 4e.29'),
    (1e28, 32, 'prior 1e.28 add up to 3.2e.29'),
    ((1e-30, 1e8), 2, 'loses 1e-30 beside a sum of 1e.08'),
    ((1e-3, 1e-25, 1.0), 3, 'loses 1e-25 beside a sum of 1.001'),
    (1j, None, 'must be a positive number'),
  ],
)
def test_concentrations_that_float32_loses_are_refused(
  concentration, alphabet_size, message
):
  with pytest.raises(ValueError, match=message):
    base_config.check_dirichlet('prior', concentration, alphabet_size)


@pytest.mark.parametrize(
  'concentration', [1.4e-20, 1.5e29, (1e-3, 1e3), (1e-3, 1e7), (1e-19, 1e9)]
)
def test_concentrations_that_float32_holds_are_returned(concentration):
  value = base_config.check_dirichlet('prior', concentration)
  assert value == concentration


def test_every_field_is_a_keyword():
  for config_class in (base_config.TrainConfig, config_lib.DataConfig):
    assert all(field.kw_only for field in dataclasses.fields(config_class))


def test_path_of_an_imported_file_is_absolute_once_it_is_set(
  tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('HOME', '/home/me')
  config = base_config.ExperimentConfig(imports=['things.py', 'my_package.one'])
  assert config.imports == (f'{tmp_path}/things.py', 'my_package.one')
  monkeypatch.chdir('/')
  values = base_config.to_dict(config)
  assert base_config.from_dict(base_config.ExperimentConfig, values) == config
  config.imports = ('~/../things.py',)
  assert config.imports == ('/home/things.py',)


@pytest.mark.parametrize(
  ('imports', 'message'),
  [
    ('things.py', "imports is 'things.py'; it must be a tuple of names"),
    (('things.txt.',), "imports 'things.txt.' is neither the name of a module"),
    (('',), "imports '' is neither the name of a module"),
  ],
)
def test_imports_that_name_no_module_are_refused(imports, message):
  config = base_config.ExperimentConfig(imports=imports)
  with pytest.raises(ValueError, match=message):
    config.validate()
