"""Speed of the exact predictors and of sampling, as ratios in one run.

  python benchmarks/predictors_and_sources.py

Everything runs on one device of the CPU. The two sides of a ratio are timed in
turns; what is printed are medians.
"""

from collections.abc import Callable
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nonstationary_mbml import base_config
from nonstationary_mbml import predictor_factories
from nonstationary_mbml import predictors
from nonstationary_mbml import train
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments import forget_me_not_predictors
from nonstationary_mbml.experiments import live_and_die_predictors
from nonstationary_mbml.experiments import ptw_predictors
from nonstationary_mbml.experiments import run_length_predictors

BATCH_SIZE, SEQ_LENGTH = 128, 256
LONG = 2**20


def numpy_ptw(batch: np.ndarray, depth: int) -> np.ndarray:
  """PTW, one symbol after the other, over all sequences and levels at once."""
  batch_size, seq_length, alphabet_size = batch.shape
  dtype = batch.dtype
  counts = np.zeros((batch_size, depth + 1, alphabet_size), dtype)
  log_odds = np.zeros((batch_size, depth), dtype)
  lengths = 1 << np.arange(depth, -1, -1)
  log_probs = np.empty_like(batch)

  def mix() -> tuple[np.ndarray, np.ndarray]:
    totals = counts.sum(axis=-1, keepdims=True)
    kts = (counts + 0.5) / (totals + 0.5 * alphabet_size)
    split = 1 / (1 + np.exp(-log_odds))
    mixtures = np.empty_like(kts)
    mixtures[:, depth] = kts[:, depth]
    for level in reversed(range(depth)):
      weight = split[:, level, None]
      mixtures[:, level] = (1 - weight) * kts[:, level] + weight * mixtures[
        :, level + 1
      ]
    return kts, mixtures

  kts, mixtures = mix()
  for t in range(seq_length):
    symbol = batch[:, t, None]
    log_kts = np.log((kts * symbol).sum(axis=-1))
    log_mixtures = np.log((mixtures * symbol).sum(axis=-1))
    log_odds += log_mixtures[:, 1:] - log_kts[:, :-1]
    counts += symbol
    ended = (t + 1) % lengths == 0
    counts[:, ended] = 0
    log_odds[:, ended[:-1]] = 0
    kts, mixtures = mix()
    log_probs[:, t] = np.log(mixtures[:, 0])
  return log_probs


def numpy_lad(batch: np.ndarray) -> np.ndarray:
  """LAD, one symbol after the other, over all sequences and starts at once."""
  batch_size, seq_length, alphabet_size = batch.shape
  dtype = batch.dtype
  symbols, rows = batch.argmax(axis=-1), np.arange(batch_size)
  seen = np.zeros((batch_size, alphabet_size, seq_length + 1), dtype)
  seen[..., 1:] = batch.cumsum(axis=1).transpose(0, 2, 1)
  weights = np.ones((batch_size, 1), dtype)
  log_probs = np.empty_like(batch)
  for t in range(seq_length):
    run_lengths = np.arange(t, -1, -1, dtype=dtype)
    own = seen[rows, symbols[:, t]]
    joint = weights * (own[:, t, None] - own[:, : t + 1] + 0.5)
    joint /= run_lengths + 0.5 * alphabet_size
    joint /= joint.sum(axis=1, keepdims=True)
    hazards = 1 / (2 * (run_lengths + 1))
    new = joint @ hazards
    weights = np.concatenate([joint * (1 - hazards), new[:, None]], axis=1)
    scaled = weights / (np.arange(t + 1, -1, -1) + 0.5 * alphabet_size)
    for k in range(alphabet_size):
      since = seen[:, k, t + 1, None] - seen[:, k, : t + 2]
      log_probs[:, t, k] = np.log((scaled * (since + 0.5)).sum(axis=1))
  return log_probs


def numpy_minimum_length(batch: np.ndarray, hazards: np.ndarray) -> np.ndarray:
  """The mixture with hazards of 0, in logarithms, as they need it."""
  batch_size, seq_length, alphabet_size = batch.shape
  dtype = batch.dtype
  symbols, rows = batch.argmax(axis=-1), np.arange(batch_size)
  seen = np.zeros((batch_size, alphabet_size, seq_length + 1), dtype)
  seen[..., 1:] = batch.cumsum(axis=1).transpose(0, 2, 1)
  with np.errstate(divide='ignore'):
    log_ends = np.log(hazards).astype(dtype)
    log_continues = np.log1p(-hazards).astype(dtype)
  log_weights = np.zeros((batch_size, 1), dtype)
  log_probs = np.empty_like(batch)

  def log_sum(logs: np.ndarray) -> np.ndarray:
    largest = logs.max(axis=1, keepdims=True)
    largest = np.where(np.isfinite(largest), largest, 0)
    with np.errstate(divide='ignore'):
      total = np.log(np.exp(logs - largest).sum(axis=1, keepdims=True))
    return (total + largest)[:, 0]

  for t in range(seq_length):
    run_lengths = np.arange(t, -1, -1, dtype=dtype)
    own = seen[rows, symbols[:, t]]
    joint = np.log(own[:, t, None] - own[:, : t + 1] + 0.5)
    joint += log_weights - np.log(run_lengths + 0.5 * alphabet_size)
    joint -= log_sum(joint)[:, None]
    new = log_sum(joint + log_ends[t::-1])
    log_weights = np.concatenate(
      [joint + log_continues[t::-1], new[:, None]], axis=1
    )
    scaled = np.exp(log_weights) / (
      np.arange(t + 1, -1, -1) + 0.5 * alphabet_size
    )
    for k in range(alphabet_size):
      since = seen[:, k, t + 1, None] - seen[:, k, : t + 2]
      log_probs[:, t, k] = np.log((scaled * (since + 0.5)).sum(axis=1))
  return log_probs


def medians(
  functions: dict[str, Callable[[], Any]], repeats: int
) -> dict[str, float]:
  """Seconds of every function, called in turns after a warm-up."""
  for function in functions.values():
    jax.block_until_ready(function())
  times = {name: [] for name in functions}
  for _ in range(repeats):
    for name, function in functions.items():
      start = time.perf_counter()
      jax.block_until_ready(function())
      times[name].append(time.perf_counter() - start)
  return {name: float(np.median(values)) for name, values in times.items()}


def jit_unroll(
  predictor: predictors.Predictor,
) -> Callable[[jax.Array], jax.Array]:
  """The predictions of whole sequences, compiled."""
  return jax.jit(lambda batch: predictor.unroll({}, None, batch)[0])


def report(what: str, seconds: float, target: str) -> None:
  """Prints one row."""
  print(f'{what:<58} {seconds:>10.2f}   {target}')


def compare_predictors() -> None:
  """Exact predictors against loops in NumPy."""
  symbols = np.random.default_rng(0).random((BATCH_SIZE, SEQ_LENGTH)) < 0.3
  batch = np.eye(2, dtype=np.float32)[symbols.astype(int)]
  depth = ptw_predictors.min_depth(SEQ_LENGTH)
  # No segment of less than 20 symbols.
  hazards = np.where(np.arange(1, SEQ_LENGTH + 1) < 20, 0, 0.05)
  lad = live_and_die_predictors.LADPredictor()
  for name, predictor, numpy_loop, target in (
    (
      'PTW',
      ptw_predictors.PTWPredictor(depth),
      lambda: numpy_ptw(batch, depth),
      '>= 4',
    ),
    ('LAD', lad, lambda: numpy_lad(batch), '>= 3'),
    (
      'minimum length 20',
      run_length_predictors.RunLengthPredictor(hazards),
      lambda: numpy_minimum_length(batch, hazards),
      '>= 3',
    ),
  ):
    unroll, on_device = jit_unroll(predictor), jnp.asarray(batch)
    posterior = jax.jit(predictor.switch_posterior)
    difference = np.max(np.abs(unroll(on_device) - numpy_loop()))
    if difference > 1e-3:
      raise RuntimeError(f'{name} differs from NumPy by {difference} nats')
    times = medians(
      {
        'ours': functools.partial(unroll, on_device),
        'posterior': functools.partial(posterior, on_device),
        'numpy': numpy_loop,
      },
      repeats=15,
    )
    report(f'{name}, B=128, T=256, K=2: ours (ms)', 1e3 * times['ours'], '')
    report(f'{name}, NumPy loop over time (ms)', 1e3 * times['numpy'], '')
    report(f'{name}, NumPy / ours', times['numpy'] / times['ours'], target)
    report(
      f'{name}, switch posterior / prediction',
      times['posterior'] / times['ours'],
      '<= 5',
    )
  unroll = jit_unroll(forget_me_not_predictors.ForgetMeNotPredictor(depth))
  times = medians({'ours': lambda: unroll(jnp.asarray(batch))}, repeats=3)
  report('Forget-Me-Not, the same batch (ms)', 1e3 * times['ours'], '')


def scale_run_length_mixture() -> None:
  """Time and memory of the run-length mixture over the length."""
  predictor = live_and_die_predictors.LADPredictor()
  rng = np.random.default_rng(0)
  for seq_length in (2048, 4096, 8192):
    symbols = (rng.random((8, seq_length)) < 0.3).astype(int)
    batch = jnp.asarray(np.eye(2, dtype=np.float32)[symbols])
    unroll = jit_unroll(predictor)
    times = medians({'ours': functools.partial(unroll, batch)}, repeats=3)
    is_last = seq_length == 8192
    report(
      f'LAD, B=8, T={seq_length} (s)',
      times['ours'],
      '<= 5' if is_last else '',
    )
    memory = unroll.lower(batch).compile().memory_analysis()
    size = memory.temp_size_in_bytes + memory.output_size_in_bytes
    report('  its memory (MiB)', size / 2**20, '<= 1024' if is_last else '')


def time_long_sequence() -> None:
  """PTW on a million symbols, in float32 and in float64."""
  predictor = ptw_predictors.PTWPredictor(20)
  rng = np.random.default_rng(0)
  probabilities = np.repeat(rng.beta(0.5, 0.5, 64), LONG // 64)
  symbols = (rng.random((1, LONG)) < probabilities).astype(int)

  def log_loss(dtype: Any) -> float:
    batch = jnp.asarray(np.eye(2, dtype=dtype)[symbols])
    log_probs = np.asarray(jit_unroll(predictor)(batch)[:, :-1], np.float64)
    return -np.sum(log_probs * np.asarray(batch[:, 1:], np.float64))

  single = log_loss(np.float32)
  with jax.enable_x64(True):
    double = log_loss(np.float64)
  batch = jnp.asarray(np.eye(2, dtype=np.float32)[symbols])
  unroll = jit_unroll(predictor)
  times = medians({'long': lambda: unroll(batch)}, repeats=3)
  report('PTW, one sequence of 2^20, float32 (s)', times['long'], '<= 3')
  error = abs(single / double - 1)
  print(f'{"  relative error of its log loss":<58} {error:>10.1e}   <= 1e-5')


def time_stream() -> None:
  """PTW on a million symbols that come in chunks, in constant memory."""
  predictor, chunk_length = ptw_predictors.PTWPredictor(30), 2**14
  symbols = (np.random.default_rng(0).random((1, LONG)) < 0.3).astype(int)
  batch = np.eye(2, dtype=np.float32)[symbols]

  def stream() -> Any:
    state = predictor.initial_state({}, None, 1)
    # Not from the first symbol on: a whole first chunk is not streamed.
    _, state = predictor.unroll({}, None, batch[:, :1], state)
    for begin in range(1, LONG - chunk_length, chunk_length):
      chunk = batch[:, begin : begin + chunk_length]
      _, state = predictor.unroll({}, None, chunk, state)
    return state

  times = medians({'stream': stream}, repeats=1)
  report('PTW of depth 30, a stream of 2^20 (s)', times['stream'], '')
  size = sum(np.asarray(leaf).nbytes for leaf in stream())
  report('  its state (bytes)', size, 'O(K log T)')


def compare_sampling() -> None:
  """Sampling a PTW batch against a training step on it."""

  def sampler(concentration: float) -> Callable[[], Any]:
    generator = constants.build_data_generator(
      config_lib.DataConfig(parameter_distribution_params=(concentration,) * 2)
    )
    sample = jax.jit(lambda rng: generator.sample(rng, BATCH_SIZE, SEQ_LENGTH))
    return lambda: sample(jax.random.key(0))

  config = config_lib.ExperimentConfig(
    model=base_config.ModelConfig(architecture_kwargs={'hidden_size': 128}),
    train=base_config.TrainConfig(seq_length=SEQ_LENGTH, batch_size=BATCH_SIZE),
  )
  devices = jax.local_devices()[:1]
  generator = constants.build_data_generator(config.data)
  predictor = predictor_factories.build_predictor(config.model, 2)
  run_steps = train.make_run_steps(
    train.make_update(config, generator, predictor), devices
  )

  def step() -> Any:
    # The state is donated, so each call starts from a new one.
    return run_steps(states.pop(), 1)

  repeats = 9
  states = [
    train.init_state(config, predictor, 2, devices) for _ in range(repeats + 1)
  ]
  times = medians(
    {
      'step': step,
      'Dirichlet(1/2)': sampler(0.5),
      'Dirichlet(0.3)': sampler(0.3),
    },
    repeats,
  )
  report('LSTM-128 training step, T=256 (ms)', 1e3 * times['step'], '')
  for name, target in (('Dirichlet(1/2)', 20), ('Dirichlet(0.3)', 4)):
    report(f'PTW batch with {name} (ms)', 1e3 * times[name], '')
    report(
      f'  training step / {name}', times['step'] / times[name], f'>= {target}'
    )


if __name__ == '__main__':
  print(f'{"":<58} {"":>10}   to reach')
  compare_predictors()
  scale_run_length_mixture()
  time_long_sequence()
  time_stream()
  compare_sampling()
