"""Programs for GPUs and TPUs, as far as a CPU can tell: lowered, not run.

The whole compiled loop and the evaluation of every network are lowered for
another platform, and take every branch that they would take there.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nonstationary_mbml import base_config
from nonstationary_mbml import losses
from nonstationary_mbml import predictor_factories
from nonstationary_mbml import predictors
from nonstationary_mbml import train
from nonstationary_mbml import train_state
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments import evaluator as evaluator_lib
from nonstationary_mbml.experiments import forget_me_not_predictors
from nonstationary_mbml.experiments import live_and_die_predictors
from nonstationary_mbml.experiments import mixture_predictors
from nonstationary_mbml.experiments import ptw_predictors
from nonstationary_mbml.models import attention
from nonstationary_mbml.models import backend

BATCH_SIZE = 4
SEQ_LENGTH = 8
# Custom calls that XLA resolves itself, and JAX's kernel of random bits.
_ALLOWED = {
  'Sharding',
  'SPMDFullToShardShape',
  'SPMDShardToFullShape',
  'cu_threefry2x32_ffi',
}
_TRANSFORMER = {'embedding_dim': 8, 'num_layers': 1, 'num_heads': 2}
_STACK = {'hidden_size': 4, 'stack_cell_size': 2, 'stack_size': SEQ_LENGTH}
_SMALLEST = {
  'cnn': {'hidden_layers_sizes': (4,), 'kernel_size': 2},
  'gru': {'hidden_size': 4},
  'lstm': {'hidden_size': 4},
  'rnn': {'hidden_size': 4, 'core': 'vanilla_rnn'},
  'sliding_window_transformer': {'context_length': 4, **_TRANSFORMER},
  'stack_rnn': _STACK,
  'transformer': _TRANSFORMER,
}
NETWORKS = {
  # A new network has to be added above.
  **{
    name: (name, _SMALLEST[name])
    for name in predictor_factories.PREDICTOR_FACTORIES
  },
  **{
    name: ('transformer', {**_TRANSFORMER, 'positional_encodings': name})
    for name in ('NONE', 'ALIBI', 'RELATIVE')
  },
  'attention window': ('transformer', {**_TRANSFORMER, 'attention_window': 3}),
  'stack_rnn, lstm': (
    'stack_rnn',
    {**_STACK, 'inner_core': 'lstm', 'n_stacks': 2},
  ),
  'lstm, recomputed': (
    'lstm',
    {'hidden_size': 4, 'gradient_checkpointing': True},
  ),
  'transformer, recomputed': (
    'transformer',
    {**_TRANSFORMER, 'gradient_checkpointing': True},
  ),
}


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch):
  """Takes the branches of a GPU, which in float32 are those of a TPU."""
  monkeypatch.setattr(backend, 'platform', lambda: 'gpu')


def _problems(traced, platforms=('cuda', 'tpu')):
  """What an accelerator would not run, or would wait for."""
  text = traced.lower(lowering_platforms=platforms).as_text()
  found = {'float64'} if re.search(r'\bf64\b|xf64\b', text) else set()
  return found | set(re.findall(r'custom_call @"?([\w.]+)', text)) - _ALLOWED


def _config(network, **training):
  model_type, kwargs = NETWORKS[network]
  return config_lib.post_process_config(
    config_lib.ExperimentConfig(
      model=base_config.ModelConfig(
        model_type=model_type, architecture_kwargs=kwargs
      ),
      train=base_config.TrainConfig(
        seq_length=SEQ_LENGTH, batch_size=BATCH_SIZE, **training
      ),
      eval=config_lib.EvalConfig(batch_size=BATCH_SIZE, optimal_predictors=()),
    )
  )


def _trace_evaluation(config):
  """An evaluation of a batch beside the exact predictors, traced."""
  predictor = predictor_factories.build_predictor(config.model, 2)
  evaluator = evaluator_lib.build_evaluator(predictor, config.eval)
  rng = jax.eval_shape(lambda: jax.random.key(0))
  params = jax.eval_shape(
    lambda rng: predictor.init_params(rng, jnp.zeros((1, 2, 2)), None), rng
  )
  step = lambda params, rng: evaluator.step(params, None, rng)
  return jax.jit(step).trace(params, rng)


def _trace_loop(config, num_devices=1):
  """The compiled loop over steps, traced."""
  generator = constants.build_data_generator(config.data)
  size = generator.alphabet_size
  predictor = predictor_factories.build_predictor(config.model, size)
  devices = jax.devices()[:num_devices]
  update = train.make_update(config, generator, predictor, num_devices)
  state = jax.eval_shape(
    lambda: train_state.init_state(config, predictor, size, devices[:1])
  )
  sums = train_state.zero_sums(state)
  return train.make_run_steps(config, update, devices).trace(state, sums, 3)


@pytest.mark.parametrize('network', NETWORKS)
def test_training_of_an_ensemble_lowers_for_accelerators(network):
  traced = _trace_loop(_config(network, model_init_seed=(0, 1)))
  assert not _problems(traced)


@pytest.mark.parametrize(
  ('network', 'training'),
  [
    ('lstm', {}),
    ('transformer', {}),
    ('transformer', {'microbatch_size': 2, 'clip_grad_norm': None}),
    ('stack_rnn', {'seq_length_fixed': False}),
    (
      'gru',
      {'reset_predictor_init_state': False, 'gradient_chunk_length': 3},
    ),
  ],
  ids=str,
)
def test_training_of_one_network_lowers_for_accelerators(network, training):
  assert not _problems(_trace_loop(_config(network, **training)))


@pytest.mark.parametrize(
  'seeds', [0, (0, 1), (0, 1, 2)], ids=['batches', 'seeds', 'members of both']
)
def test_training_on_several_devices_lowers_for_accelerators(seeds):
  config = _config('lstm', model_init_seed=seeds)
  assert not _problems(_trace_loop(config, num_devices=2))


@pytest.mark.parametrize('network', NETWORKS)
def test_evaluation_lowers_for_accelerators(network):
  assert not _problems(_trace_evaluation(_config(network)))


@pytest.mark.parametrize('source', sorted(constants.TRAJECTORY_GENERATORS))
def test_sources_and_all_their_predictors_lower_for_accelerators(source):
  config = _config('lstm')
  config.eval.data.trajectory_generator = source
  config.eval.data.trajectory_generator_kwargs = constants.source_kwargs(source)
  config.eval.optimal_predictors = ('exact', 'ptw', 'lad', 'kt')
  config = config_lib.post_process_config(config)
  assert not _problems(_trace_evaluation(config))


@pytest.mark.parametrize('network', ['lstm', 'stack_rnn', 'transformer'])
def test_training_lowers_with_products_in_bfloat16(network):
  with jax.default_matmul_precision('BF16_BF16_F32'):
    traced = _trace_loop(_config(network, model_init_seed=(0, 1)))
    text = traced.lower(lowering_platforms=('cuda',)).as_text()
  assert 'lhs_precision_type = bf16' in text


@pytest.mark.parametrize('network', ['lstm', 'stack_rnn', 'transformer'])
def test_all_products_of_training_in_bfloat16_are_in_it(network):
  traced = _trace_loop(_config(network, compute_dtype='bfloat16'))
  assert not _problems(traced)
  text = traced.lower(lowering_platforms=('cuda', 'tpu')).as_text()
  products = re.findall('dot_general.*', text)
  assert products
  # Of bfloat16, or of float32 that is rounded to it first (attention).
  assert all(
    re.search(r'lhs_precision_type = bf16|\(tensor<\S*bf16>, tensor', product)
    for product in products
  )


@pytest.mark.parametrize(
  'predictor',
  [
    predictors.OptimalCategoricalPredictor(),
    ptw_predictors.PTWPredictor(3),
    live_and_die_predictors.LADPredictor(max_length=2 * SEQ_LENGTH),
    forget_me_not_predictors.ForgetMeNotPredictor(3),
    mixture_predictors.MixturePredictor(
      (
        predictors.OptimalCategoricalPredictor(),
        live_and_die_predictors.LADPredictor(),
      )
    ),
  ],
  ids=lambda predictor: type(predictor).__name__,
)
def test_streams_lower_and_their_products_keep_float32(predictor):
  batch = jnp.zeros((2, SEQ_LENGTH, 2))

  def read_twice(batch, time):
    state = predictor.initial_state({}, None, 2)
    if hasattr(state, 'time'):
      state = state._replace(time=time)
    state = predictor.unroll({}, None, batch[:, :4], state)[1]
    return predictor.unroll({}, None, batch[:, 4:], state)

  traced = jax.jit(read_twice).trace(batch, jnp.int32(0))
  assert not _problems(traced)
  products = re.findall(
    r'dot_general.*?precision = \[(\w+), (\w+)\]',
    traced.lower(lowering_platforms=('cuda',)).as_text(),
  )
  # In the default precision, a GPU would round to TF32.
  assert set(products) <= {('HIGHEST', 'HIGHEST')}


def test_levels_of_ptw_are_a_loop():
  # benchmarks/compile_for_gpu.py: written out, no GPU program comes of them.
  predictor = ptw_predictors.PTWPredictor(8)
  unroll = jax.jit(lambda batch: predictor.unroll({}, None, batch, None))
  traced = unroll.trace(jnp.zeros((BATCH_SIZE, 256, 2)))
  text = traced.lower(lowering_platforms=('cuda',)).as_text()
  assert 'stablehlo.while' in text


def test_members_compute_no_length_but_that_of_the_step():
  config = _config('lstm', model_init_seed=(0, 1), seq_length_fixed=False)
  text = _trace_loop(config).lower(lowering_platforms=('cuda',)).as_text()
  # A `select` in its place would take the results of all lengths.
  assert 'stablehlo.case' in text


def _never(*args, **kwargs):
  raise AssertionError('a branch of CPUs was taken')


def test_branches_are_those_of_an_accelerator(monkeypatch):
  monkeypatch.setattr(attention, 'blocked_attention', _never)
  monkeypatch.setattr(jax.lax, 'map', _never)
  config = _config('transformer', model_init_seed=(0, 1))
  _trace_loop(config)
  predictor = predictor_factories.build_predictor(config.model, 2)
  assert losses.microbatch_size(config.train, predictor, 128, 256) == 128

  monkeypatch.setattr(backend, 'platform', lambda: 'cpu')
  with pytest.raises(AssertionError, match='a branch of CPUs was taken'):
    _trace_loop(config)


def _in_float64(x):
  with jax.enable_x64(True):
    return (x.astype(jnp.float64) + 1).astype(jnp.float32)


def _asking_the_host(x):
  return jax.pure_callback(np.asarray, x, x)


@pytest.mark.parametrize(
  ('function', 'platform', 'problem'),
  [
    (_in_float64, 'cuda', 'float64'),
    (_asking_the_host, 'cpu', 'callback'),
    (jnp.linalg.qr, 'cpu', 'lapack'),
  ],
)
def test_what_must_not_be_in_a_program_would_be_found(
  function, platform, problem
):
  traced = jax.jit(function).trace(jnp.ones((2, 2)))
  assert any(problem in found for found in _problems(traced, (platform,)))
