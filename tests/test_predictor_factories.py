import copy
import functools

import haiku as hk
import jax
import numpy as np
import optax
import pytest

from nonstationary_mbml import base_config
from nonstationary_mbml import losses as losses_lib
from nonstationary_mbml import predictor_factories
from nonstationary_mbml import predictors
from nonstationary_mbml import train
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments import evaluator as evaluator_lib
from nonstationary_mbml.models import basic
from nonstationary_mbml.models import recurrent
from nonstationary_mbml.models import transformer

SMALL_TRANSFORMER = {'embedding_dim': 8, 'num_layers': 2, 'num_heads': 2}
STATEFUL = {
  'lstm': ('lstm', {'hidden_size': 8}),
  'vanilla_rnn': ('rnn', {'core': 'vanilla_rnn', 'hidden_size': 8}),
  'gru': ('gru', {'hidden_size': 8}),
  'haiku_class': ('rnn', {'core': hk.GRU, 'hidden_size': 8}),
  'with_mlps': (
    'rnn',
    {'hidden_size': 8, 'before_mlp_layers': (6,), 'after_mlp_layers': (6, 5)},
  ),
  'stack_rnn': (
    'stack_rnn',
    {'hidden_size': 8, 'stack_cell_size': 3, 'stack_size': 5, 'n_stacks': 2},
  ),
  'stack_lstm': ('stack_rnn', {'hidden_size': 8, 'inner_core': 'lstm'}),
}
STATELESS = {
  'cnn': ('cnn', {'hidden_layers_sizes': (8, 8), 'kernel_size': 3}),
  'transformer': ('transformer', SMALL_TRANSFORMER),
  'no_positions': (
    'transformer',
    {**SMALL_TRANSFORMER, 'positional_encodings': 'NONE'},
  ),
  'alibi': (
    'transformer',
    {**SMALL_TRANSFORMER, 'positional_encodings': 'ALIBI'},
  ),
  'relative': (
    'transformer',
    {**SMALL_TRANSFORMER, 'positional_encodings': 'RELATIVE'},
  ),
  'begin_symbol': (
    'transformer',
    {
      **SMALL_TRANSFORMER,
      'positional_encodings': 'ALIBI',
      'begin_symbol': True,
    },
  ),
  'attention_window': (
    'transformer',
    {**SMALL_TRANSFORMER, 'attention_window': 3},
  ),
  'sliding_window': (
    'sliding_window_transformer',
    {**SMALL_TRANSFORMER, 'context_length': 4},
  ),
}
ALL = {**STATEFUL, **STATELESS}


def _build(name):
  model_type, kwargs = ALL[name]
  return predictor_factories.PREDICTOR_FACTORIES[model_type](2, kwargs)


def _batch(batch_size=3, seq_length=11):
  symbols = np.random.default_rng(0).integers(2, size=(batch_size, seq_length))
  return np.eye(2, dtype=np.float32)[symbols]


def _init(predictor, batch):
  return jax.jit(lambda rng: predictor.init_params(rng, batch, None))(
    jax.random.key(0)
  )


def _unroll(predictor):
  return jax.jit(
    lambda params, batch, state=None: predictor.unroll(
      params, None, batch, state
    )
  )


@functools.cache
def _network(name):
  """A batch, parameters and the compiled `unroll`, once for all tests."""
  predictor, batch = _build(name), _batch()
  return batch, _init(predictor, batch), _unroll(predictor)


@pytest.mark.parametrize('name', ALL)
def test_predictions_of_a_prefix_are_those_of_the_whole(name):
  batch, params, unroll = _network(name)
  whole = np.asarray(unroll(params, batch)[0])
  assert whole.shape == batch.shape
  for length in (1, 6):
    prefix, _ = unroll(params, batch[:, :length])
    np.testing.assert_allclose(prefix, whole[:, :length], atol=2e-5)


@pytest.mark.parametrize('name', ALL)
def test_predictions_do_not_depend_on_the_rest_of_the_batch(name):
  batch, params, unroll = _network(name)
  whole = np.asarray(unroll(params, batch)[0])
  changed, _ = unroll(params, np.concatenate([1 - batch[:1], batch[1:]]))
  changed = np.asarray(changed)
  np.testing.assert_allclose(changed[1:], whole[1:], atol=2e-5)
  assert np.max(np.abs(changed[0] - whole[0])) > 1e-3


@pytest.mark.parametrize('name', STATEFUL)
def test_chunks_with_the_state_carried_equal_the_whole(name):
  batch, params, unroll = _network(name)
  whole, final_state = unroll(params, batch)
  # The first prefix that is tried above, and the rest.
  first, state = unroll(params, batch[:, :6])
  second, state = unroll(params, batch[:, 6:], state)
  np.testing.assert_allclose(
    np.concatenate([first, second], axis=1), whole, atol=2e-5
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5),
    state,
    final_state,
  )


@pytest.mark.parametrize(
  'name',
  [
    name
    if name in ('lstm', 'transformer')
    else pytest.param(name, marks=pytest.mark.slow)
    for name in ALL
  ],
)
def test_three_steps_lower_the_loss_on_a_fixed_batch(name):
  predictor, batch = _build(name), _batch(4, 8)
  params = _init(predictor, batch)
  optimizer = optax.adam(1e-2)
  opt_state = optimizer.init(params)

  @jax.jit
  def step(params, opt_state):
    loss, grads, _ = losses_lib.loss_and_grads(
      predictor, params, None, batch, None
    )
    updates, opt_state = optimizer.update(grads, opt_state)
    return optax.apply_updates(params, updates), opt_state, loss

  losses = []
  for _ in range(4):
    params, opt_state, loss = step(params, opt_state)
    losses.append(float(loss))
  assert losses[-1] < losses[0]


@pytest.mark.parametrize('name', ALL)
def test_factory_leaves_its_kwargs_as_they_are(name):
  model_type, kwargs = ALL[name]
  before = copy.deepcopy(kwargs)
  for _ in range(2):  # The second build has to work as the first did.
    predictor = predictor_factories.PREDICTOR_FACTORIES[model_type](2, kwargs)
    assert isinstance(predictor, predictors.Predictor)
  assert kwargs == before


def test_dropout_is_off_in_evaluation_and_on_in_training():
  kwargs = {**SMALL_TRANSFORMER, 'dropout_prob': 0.5}
  predictor = predictor_factories.PREDICTOR_FACTORIES['transformer'](2, kwargs)
  batch = _batch()
  params = _init(predictor, batch)

  unroll = jax.jit(predictor.unroll)

  def predict(rng):
    return np.asarray(unroll(params, rng, batch)[0])

  without = predictor_factories.PREDICTOR_FACTORIES['transformer'](
    2, {**kwargs, 'dropout_prob': 0.0}
  )
  expected = np.asarray(jax.jit(without.unroll)(params, None, batch)[0])
  np.testing.assert_array_equal(predict(None), expected)
  first, second = jax.random.split(jax.random.key(1))
  assert np.any(predict(first) != expected)
  assert np.any(predict(first) != predict(second))
  np.testing.assert_array_equal(predict(first), predict(first))


def test_sliding_window_predicts_each_window_from_its_own_symbols():
  batch, params, unroll = _network('sliding_window')
  whole = np.asarray(unroll(params, batch)[0])
  for begin in (0, 4, 8):
    alone, _ = unroll(params, batch[:, begin : begin + 4])
    np.testing.assert_allclose(whole[:, begin : begin + 4], alone, atol=2e-5)


def test_attention_window_forgets_what_lies_before_it():
  kwargs = {**SMALL_TRANSFORMER, 'num_layers': 1, 'attention_window': 3}
  predictor = predictor_factories.PREDICTOR_FACTORIES['transformer'](2, kwargs)
  batch = _batch(1, 8)
  params = _init(predictor, batch)
  other = batch.copy()
  other[:, 2] = 1 - batch[:, 2]
  before, changed = (
    np.asarray(_unroll(predictor)(params, symbols)[0])
    for symbols in (batch, other)
  )
  differs = np.any(np.abs(changed - before) > 1e-6, axis=(0, 2))
  assert differs.tolist() == [False, False, True, True, True] + 3 * [False]


@pytest.mark.parametrize('name', ['LSTM', 'Stack_RNN', 'TRANSFORMER'])
def test_model_type_in_any_case_of_letters(name):
  registry = predictor_factories.PREDICTOR_FACTORIES
  assert registry[name] is registry[name.lower()]


@pytest.mark.parametrize(
  ('model_type', 'kwargs', 'message'),
  [
    ('lstn', {}, "model_type 'lstn' is not one of .*did you mean 'lstm'"),
    ('rnn', {'core': 'gruu'}, "core 'gruu' is not one of .*mean 'gru'"),
    ('rnn', {'core': 3}, 'core 3 is neither'),
    ('rnn', {'hidden_sise': 3}, "no 'hidden_sise'.*mean 'hidden_size'"),
    ('rnn', {'hidden_size': 0}, 'hidden_size is 0'),
    ('rnn', {'before_mlp_layers': (0,)}, 'before_mlp_layers is 0'),
    ('rnn', {'before_mlp_layers': 3}, 'before_mlp_layers is 3'),
    ('rnn', {'gradient_checkpointing': 1}, 'gradient_checkpointing is 1'),
    ('lstm', {'stack_size': 3}, "no 'stack_size'"),
    ('lstm', {'core': 'gru'}, "core 'gru' contradicts model_type 'lstm'"),
    ('stack_rnn', {'n_stacks': 0}, 'n_stacks is 0'),
    ('stack_rnn', {'inner_core': 'stack_rnn'}, 'inner_core stack_rnn'),
    ('gru', {'core': 'lstm'}, "core 'lstm' contradicts model_type 'gru'"),
    ('cnn', {'kernel_size': 0}, 'kernel_size is 0'),
    ('cnn', {'hidden_layers_sizes': 3}, 'hidden_layers_sizes is 3'),
    ('cnn', {'activation': 'relu'}, "cnn has no 'activation'"),
    ('cnn', {'kernel_size': 2000}, 'power of the layers is 4000000'),
    *(
      (name, {'context_length': 3, argument: 3}, f"has no '{argument}'")
      for name in ('sliding_window_transformer',)
      for argument in ('output_size', 'self', 'architecture_kwargs')
    ),
    *(
      (name, {argument: 3}, f"has no '{argument}'")
      for name in ('cnn', 'gru', 'lstm', 'rnn', 'stack_rnn', 'transformer')
      for argument in ('output_size', 'self', 'architecture_kwargs')
    ),
    ('transformer', {'num_heads': 7}, 'embedding_dim 64 .* num_heads 7'),
    (
      'transformer',
      {'positional_encodings': 'SINCOS'},
      "positional_encodings 'SINCOS' is not one of .*'SIN_COS'",
    ),
    (
      'transformer',
      {'positional_encodings': None},
      'positional_encodings None is not one of',
    ),
    (
      'transformer',
      {'positional_encodings_params': {'max_time': 5}},
      "SIN_COS has no 'max_time'",
    ),
    ('transformer', {'embedding_size': 8}, "no 'embedding_size'"),
    ('transformer', {'dropout_prob': 1.0}, 'dropout_prob is 1.0'),
    ('transformer', {'attention_window': 0}, 'attention_window is 0'),
    ('sliding_window_transformer', {}, 'needs context_length'),
    (
      'sliding_window_transformer',
      {'context_length': 0},
      'context_length is 0',
    ),
  ],
)
def test_wrong_architectures_are_named(model_type, kwargs, message):
  config = base_config.ModelConfig(
    model_type=model_type, architecture_kwargs=kwargs
  )
  with pytest.raises(ValueError, match=message):
    predictor_factories.build_predictor(config, 2)


def test_wrong_arguments_of_a_haiku_class_are_named():
  make = predictor_factories.PREDICTOR_FACTORIES['rnn']
  with pytest.raises(ValueError, match="ResetCore has no 'size'"):
    make(2, {'core': hk.ResetCore, 'size': 3})


def test_heads_must_divide_the_features_that_stand_for_embeddings():
  predictor = predictor_factories.PREDICTOR_FACTORIES['transformer'](
    2, {'use_embeddings': False, 'num_heads': 4}
  )
  with pytest.raises(ValueError, match='feature size 2 .* num_heads 4'):
    _init(predictor, _batch())


class _OwnCore(hk.VanillaRNN):
  """A core with an argument that `make_rnn` has as well."""

  def __init__(self, output_size):
    super().__init__(output_size)


def test_core_of_ones_own_may_call_its_arguments_as_it_likes():
  predictor = predictor_factories.PREDICTOR_FACTORIES['rnn'](
    2, {'core': _OwnCore, 'output_size': 5}
  )
  assert predictor.initial_state({}, None, 3).shape == (3, 5)


def test_registered_core_takes_its_own_arguments(monkeypatch):
  monkeypatch.setitem(predictor_factories.CORES, 'own', _OwnCore)
  config = base_config.ModelConfig(
    model_type='rnn', architecture_kwargs={'core': 'own', 'output_size': 5}
  )
  predictor = predictor_factories.build_predictor(config, 2)
  assert predictor.initial_state({}, None, 3).shape == (3, 5)
  config.architecture_kwargs = {'core': 'own', 'output_sise': 5}
  with pytest.raises(ValueError, match="_OwnCore has no 'output_sise'"):
    predictor_factories.build_predictor(config, 2)


def _with_a_size(output_size, size=8):
  return predictors.InContextPredictor(basic.make_mlp(output_size, (size,)))


OWN_FACTORIES = {
  'keywords': lambda output_size, kwargs: _with_a_size(output_size, **kwargs),
  'core': lambda output_size, kwargs: predictors.RNNPredictor(
    basic.make_rnn(output_size, hk.VanillaRNN, **kwargs)
  ),
  # Uses its arguments only where it is traced.
  'late': lambda output_size, kwargs: predictors.InContextPredictor(
    lambda batch: hk.nets.MLP((output_size,), **kwargs)(batch)
  ),
  'item': lambda output_size, kwargs: _with_a_size(output_size, kwargs['size']),
}


@pytest.mark.parametrize(
  ('name', 'kwargs', 'message'),
  [
    ('keywords', {'sise': 3}, "unexpected keyword argument 'sise'"),
    ('keywords', {'output_size': 3}, "multiple values .*'output_size'"),
    ('keywords', {'size': 0}, 'hidden_layers_sizes is 0'),
    ('core', {'hidden_sise': 3}, "VanillaRNN: .*'hidden_s"),
    ('late', {'sise': 3}, "unexpected keyword argument 'sise'"),
    ('item', {}, "'size' is missing"),
  ],
)
def test_arguments_that_a_registered_factory_does_not_take_are_named(
  monkeypatch, name, kwargs, message
):
  registry = predictor_factories.PREDICTOR_FACTORIES
  monkeypatch.setitem(registry, 'mine', OWN_FACTORIES[name])
  config = config_lib.post_process_config(
    config_lib.ExperimentConfig(
      model=base_config.ModelConfig(
        model_type='Mine', architecture_kwargs=kwargs
      )
    )
  )
  with pytest.raises(
    ValueError, match=f'model.architecture_kwargs: .*{message}'
  ):
    train.build_components(
      config, constants.build_data_generator, evaluator_lib.build_evaluator
    )


def test_error_inside_of_a_registered_factory_stays_what_it_is(monkeypatch):
  registry = predictor_factories.PREDICTOR_FACTORIES
  monkeypatch.setitem(registry, 'mine', lambda output_size, kwargs: 1 + '1')
  config = base_config.ModelConfig(model_type='mine')
  with pytest.raises(TypeError, match='unsupported operand'):
    predictor_factories.build_predictor(config, 2)


def test_sizes_of_a_network_may_be_of_8_bits():
  small = predictor_factories.PREDICTOR_FACTORIES['lstm'](
    np.int8(2), {'hidden_size': np.int8(100)}
  )
  params = jax.eval_shape(
    lambda: small.init_params(jax.random.key(0), _batch(), None)
  )
  shapes = {leaf.shape for leaf in jax.tree.leaves(params)}
  assert shapes == {(102, 400), (400,), (100, 2), (2,)}


@pytest.mark.parametrize(
  ('model_type', 'kwargs', 'label'),
  [
    ('lstm', {}, 'LSTM'),
    ('RNN', {}, 'LSTM'),
    ('rnn', {'core': None}, 'LSTM'),
    ('rnn', {'core': 'vanilla_rnn'}, 'Vanilla RNN'),
    ('rnn', {'core': 'GRU'}, 'GRU'),
    ('rnn', {'core': recurrent.VanillaRNN}, 'Vanilla RNN'),
    ('rnn', {'core': _OwnCore}, '_OwnCore'),
    ('gru', {}, 'GRU'),
    ('stack_rnn', {}, 'Stack-RNN'),
    ('rnn', {'core': 'stack_rnn'}, 'Stack-RNN'),
    ('stack_rnn', {'inner_core': 'lstm'}, 'Stack-LSTM'),
    ('stack_rnn', {'inner_core': hk.IdentityCore}, 'Stack-IdentityCore'),
    ('cnn', {}, 'CNN'),
    ('transformer', {}, 'Transformer, SIN_COS'),
    (
      'transformer',
      {'positional_encodings': 'alibi'},
      'Transformer, ALIBI',
    ),
    (
      'transformer',
      {'positional_encodings': transformer.PositionalEncodings.NONE},
      'Transformer, no encoding',
    ),
    (
      'transformer',
      {'positional_encodings': 'RELATIVE', 'begin_symbol': True},
      'Transformer, RELATIVE, begin symbol',
    ),
    (
      'sliding_window_transformer',
      {'context_length': 4, 'positional_encodings': 'SIN_COS'},
      'Sliding-window Transformer',
    ),
    (
      'sliding_window_transformer',
      {'positional_encodings': 'RELATIVE'},
      'Sliding-window Transformer, RELATIVE',
    ),
    ('my_network', {'positional_encodings': 3}, 'my_network'),
  ],
)
def test_networks_have_one_label_in_tables_and_figures(
  model_type, kwargs, label
):
  config = base_config.ModelConfig(
    model_type=model_type, architecture_kwargs=kwargs
  )
  assert predictor_factories.label(config) == label
