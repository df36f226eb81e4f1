"""Compiles the project for a GPU of NVIDIA on a machine that has none.

  pip install "jax[cuda12]"
  python benchmarks/compile_for_gpu.py
  python benchmarks/compile_for_gpu.py --only='evaluation|PTW' --limit_s=60

The loop over steps of every network, evaluation beside the exact predictors on
every source, and the exact predictors, at T = 256. XLA does all that it does on
an H100 but for trying out kernels, and nothing runs. So it is seen here whether
a program compiles there, in how long, and how much memory it will take: XLA may
not get done with a program that it compiles for a CPU in a second.

Every program is compiled by a process of its own; one that takes too long, or
fails, is named at the end, and the command ends with 1.
"""

import argparse
from collections.abc import Callable
import importlib.util
import os
import re
import subprocess
import sys
import time
from unittest import mock

import jax
from jax.experimental import topologies
import jax.numpy as jnp
import networks
import project
import timing

from nonstationary_mbml import predictor_factories
from nonstationary_mbml import train
from nonstationary_mbml import train_state
from nonstationary_mbml.experiments import cli
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments import evaluator as evaluator_lib
from nonstationary_mbml.experiments import forget_me_not_predictors
from nonstationary_mbml.experiments import live_and_die_predictors
from nonstationary_mbml.experiments import ptw_predictors
from nonstationary_mbml.models import backend

_BATCH_SIZE = 128
_SEQ_LENGTH = 256
_LONG = 2**20
_NUM_LAYERS = 5
_SEEDS = 4
# What XLA asks of a device that is there: an H100.
_TARGET = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  device_memory_size: 84978434048
}
platform_name: "CUDA"
dnn_version_info { major: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
# Kernels are tried out on a device, which is not there.
_FLAGS = '--xla_gpu_autotune_level=0'


def programs() -> dict[str, Callable[[jax.Device], jax.stages.Lowered]]:
  """Returns the functions that lower every program for a device, by name."""
  named = networks.networks(_SEQ_LENGTH, _NUM_LAYERS)
  found = {
    f'training: {name}': lambda device, network=network: _loop(device, *network)
    for name, network in named.items()
  }
  for name in ('LSTM-128', 'Transformer SIN_COS'):
    found[f'training: {_SEEDS} seeds of {name}'] = lambda device, name=name: (
      _loop(device, *named[name], _SEEDS)
    )
  found |= {
    f'evaluation: {source}': lambda device, source=source: _evaluation(
      device, source
    )
    for source in sorted(constants.TRAJECTORY_GENERATORS)
  }
  lad = live_and_die_predictors.LADPredictor()
  forget_me_not = forget_me_not_predictors.ForgetMeNotPredictor(
    ptw_predictors.min_depth(_SEQ_LENGTH)
  )
  unrolled = {
    'LAD': (lad, _BATCH_SIZE, _SEQ_LENGTH),
    'Forget-Me-Not': (forget_me_not, _BATCH_SIZE, _SEQ_LENGTH),
    'PTW': (_ptw(_SEQ_LENGTH), _BATCH_SIZE, _SEQ_LENGTH),
    f'PTW, T={_LONG}': (_ptw(_LONG), 1, _LONG),
  }
  found |= {
    f'predictor: {name}': lambda device, arguments=arguments: _of_batch(
      device,
      lambda batch: arguments[0].unroll({}, None, batch, None),
      *arguments[1:],
    )
    for name, arguments in unrolled.items()
  }
  posteriors = {'LAD': lad, 'PTW': _ptw(_SEQ_LENGTH)}
  return found | {
    f'switch posterior: {name}': lambda device, predictor=predictor: _of_batch(
      device, predictor.switch_posterior, _BATCH_SIZE, _SEQ_LENGTH
    )
    for name, predictor in posteriors.items()
  }


def _ptw(seq_length: int) -> ptw_predictors.PTWPredictor:
  return ptw_predictors.PTWPredictor(ptw_predictors.min_depth(seq_length))


def _loop(
  device: jax.Device, model_type: str, kwargs: networks.Kwargs, seeds: int = 1
) -> jax.stages.Lowered:
  """The compiled loop over training steps."""
  config = project.make_config(
    timing.Job(
      kind='project',
      model_type=model_type,
      kwargs=kwargs,
      seq_length=_SEQ_LENGTH,
      batch_size=_BATCH_SIZE,
      seeds=seeds,
      optimizer='muon',
    )
  )
  generator = constants.build_data_generator(config.data)
  size = generator.alphabet_size
  predictor = predictor_factories.build_predictor(config.model, size)
  state, sums = jax.eval_shape(
    lambda: _with_sums(
      train_state.init_state(config, predictor, size, jax.devices('cpu')[:1])
    )
  )
  update = train.make_update(config, generator, predictor, num_devices=1)
  return train.make_run_steps(config, update, [device]).lower(state, sums, 10)


def _with_sums(
  state: train_state.TrainState,
) -> tuple[train_state.TrainState, train_state.StepMetrics]:
  return state, train_state.zero_sums(state)


def _evaluation(device: jax.Device, source: str) -> jax.stages.Lowered:
  """A batch of the evaluation of an LSTM beside the exact predictors."""
  config = config_lib.ExperimentConfig()
  config.train.seq_length = _SEQ_LENGTH
  config.data.trajectory_generator = source
  config.data.trajectory_generator_kwargs = constants.source_kwargs(source)
  config.eval.optimal_predictors = (constants.EXACT, 'ptw', 'lad', 'kt')
  config = config_lib.post_process_config(config)
  predictor = predictor_factories.build_predictor(
    config.model, networks.ALPHABET_SIZE
  )
  with mock.patch.object(jax, 'devices', lambda *_: [device]):
    evaluator = evaluator_lib.build_evaluator(predictor, config.eval)
  rng = jax.eval_shape(lambda: jax.random.key(0))
  symbols = jax.ShapeDtypeStruct((1, 2, networks.ALPHABET_SIZE), jnp.float32)
  params = jax.eval_shape(
    lambda rng, symbols: predictor.init_params(rng, symbols, None), rng, symbols
  )
  step = jax.jit(lambda params, rng: evaluator.step(params, None, rng))
  return step.lower(params, rng)


def _of_batch(
  device: jax.Device,
  function: Callable[[jax.Array], object],
  batch_size: int,
  seq_length: int,
) -> jax.stages.Lowered:
  """A function of a batch of symbols."""
  sharding = jax.sharding.SingleDeviceSharding(device)
  shape = (batch_size, seq_length, networks.ALPHABET_SIZE)
  batch = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
  return jax.jit(function).lower(batch)


def _has_compiler() -> bool:
  """Whether JAX's plug-in for GPUs of NVIDIA is installed."""
  return any(
    importlib.util.find_spec(f'jax_plugins.xla_cuda{version}')
    for version in (12, 13)
    if importlib.util.find_spec('jax_plugins')
  )


def compile_one(name: str) -> None:
  """Prints the seconds and the memory of a program."""
  (device, *_) = topologies.get_topology_desc(
    '', 'cuda', target_config=_TARGET, topology='1x1x1'
  ).devices
  with mock.patch.object(backend, 'platform', lambda: 'gpu'):
    lowered = programs()[name](device)
  began = time.perf_counter()
  compiled = lowered.compile()
  seconds = time.perf_counter() - began
  mebibytes = compiled.memory_analysis().temp_size_in_bytes / 2**20
  print(f'{seconds:6.1f} s {mebibytes:10,.0f} MiB  {name}', flush=True)


def main() -> None:
  """Reads the command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--only', default='', help='Pattern of names.')
  parser.add_argument(
    '--limit_s', type=float, default=180, help='Seconds for each program.'
  )
  parser.add_argument('--child', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.child:
    compile_one(args.child)
    return
  if not _has_compiler():
    cli.end_with(
      ValueError('no compiler for GPUs is here: pip install "jax[cuda12]"')
    )
  environment = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} {_FLAGS}',
  }
  problems = []
  for name in programs():
    if not re.search(args.only, name):
      continue
    try:
      subprocess.run(
        [sys.executable, __file__, f'--child={name}'],
        env=environment,
        timeout=args.limit_s,
        check=True,
      )
    except subprocess.TimeoutExpired:
      problems.append(f'{name}: not done after {args.limit_s:g} s')
    except subprocess.CalledProcessError as error:
      problems.append(f'{name}: exit status {error.returncode}')
  if problems:
    sys.exit('\n'.join(problems))


if __name__ == '__main__':
  with cli.printing():
    main()
