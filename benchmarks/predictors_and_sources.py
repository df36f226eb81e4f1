"""Speed of the exact predictors and of sampling, as ratios in one run.

  python benchmarks/predictors_and_sources.py

Everything runs on one device of the CPU. The two sides of a ratio are timed in
turns; what is printed are medians. A part of run.py, which reads it as JSON.
"""

import argparse
from collections.abc import Callable
from collections.abc import Iterator
import dataclasses
import functools
import json
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import project
import timing

from nonstationary_mbml import predictors
from nonstationary_mbml.experiments import cli
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments import forget_me_not_predictors
from nonstationary_mbml.experiments import live_and_die_predictors
from nonstationary_mbml.experiments import ptw_predictors
from nonstationary_mbml.experiments import run_length_predictors

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """Sizes of all measurements.

  Attributes:
    batch_size: B.
    seq_length: T.
    long_mixture: T of the longest run-length mixture.
    long: T of the longest sequence.
    file: T of a file of bytes, and of one of bits.
    pruned: T of a pruned run-length mixture.
    num_starts: Starts that it keeps.
  """

  batch_size: int = 128
  seq_length: int = 256
  long_mixture: int = 8192
  long: int = 2**20
  file: int = 10**6
  pruned: int = 10**6
  num_starts: int = 512


QUICK = Sizes(
  batch_size=8,
  seq_length=32,
  long_mixture=64,
  long=2**10,
  file=1000,
  pruned=200,
  num_starts=16,
)


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


def in_turns(
  functions: dict[str, Callable[[], Any]], repeats: int
) -> dict[str, list[float]]:
  """Seconds of every function, called in turns after a warm-up."""
  for function in functions.values():
    jax.block_until_ready(function())
  times = {name: [] for name in functions}
  for _ in range(repeats):
    for name, function in functions.items():
      start = time.perf_counter()
      jax.block_until_ready(function())
      times[name].append(time.perf_counter() - start)
  return times


def jit_unroll(
  predictor: predictors.Predictor,
) -> Callable[[jax.Array], jax.Array]:
  """The predictions of whole sequences, compiled."""
  return jax.jit(lambda batch: predictor.unroll({}, None, batch)[0])


def milliseconds(name: str, times: list[float], **fields: Any) -> Row:
  """A row of times."""
  return {'name': name, 'unit': 'ms', **timing.spread(times, 1e3), **fields}


def ratio(
  name: str, times: list[float], reference: list[float], target: str
) -> Row:
  """A row of two medians, the first in units of the second."""
  value = float(np.median(times) / np.median(reference))
  return {'name': name, 'unit': '', 'value': value, 'target': target}


def quantity(name: str, value: float, unit: str, target: str = '') -> Row:
  """A row of what is measured once."""
  return {'name': name, 'unit': unit, 'value': float(value), 'target': target}


def binary_batch(batch_size: int, seq_length: int) -> np.ndarray:
  """One-hot symbols of a coin, `[B, T, 2]`."""
  rng = np.random.default_rng(0)
  symbols = (rng.random((batch_size, seq_length)) < 0.3).astype(int)
  return np.eye(2, dtype=np.float32)[symbols]


def compare_predictors(sizes: Sizes) -> Iterator[Row]:
  """Exact predictors against loops in NumPy."""
  seq_length = sizes.seq_length
  batch = binary_batch(sizes.batch_size, seq_length)
  depth = ptw_predictors.min_depth(seq_length)
  # No segment of less than 20 symbols.
  hazards = np.where(np.arange(1, seq_length + 1) < 20, 0, 0.05)
  for name, predictor, numpy_loop, target in (
    (
      'PTW',
      ptw_predictors.PTWPredictor(depth),
      lambda: numpy_ptw(batch, depth),
      '>= 15',
    ),
    (
      'LAD',
      live_and_die_predictors.LADPredictor(),
      lambda: numpy_lad(batch),
      '>= 3',
    ),
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
    times = in_turns(
      {
        'ours': functools.partial(unroll, on_device),
        'posterior': functools.partial(posterior, on_device),
        'numpy': numpy_loop,
      },
      repeats=15,
    )
    yield milliseconds(f'{name}, ours', times['ours'])
    yield milliseconds(f'{name}, NumPy loop over time', times['numpy'])
    yield ratio(f'{name}, NumPy / ours', times['numpy'], times['ours'], target)
    yield ratio(
      f'{name}, switch posterior / prediction',
      times['posterior'],
      times['ours'],
      '<= 5',
    )


def time_predictors(sizes: Sizes) -> Iterator[Row]:
  """Time and memory of every exact predictor."""
  batch = jnp.asarray(binary_batch(sizes.batch_size, sizes.seq_length))
  depth = {'depth': ptw_predictors.min_depth(sizes.seq_length)}
  for name, kwargs in {
    'ptw': depth,
    'lad': {},
    'kt': {},
    'forget_me_not': depth,
  }.items():
    unroll = jit_unroll(constants.OPTIMAL_PREDICTORS[name](**kwargs))
    yield whole_batch(name, unroll, batch, sizes)


def compare_alphabets(sizes: Sizes) -> Iterator[Row]:
  """Many symbols against two, and the first call, which compiles."""
  rng = np.random.default_rng(0)
  shape = (sizes.batch_size, sizes.seq_length)
  batches = {
    f'K={size}': jnp.eye(size)[rng.integers(size, size=shape)]
    for size in (2, 26)
  }
  depth = ptw_predictors.min_depth(sizes.seq_length)
  for predictor, first_target, ratio_target in (
    # Half of what it took on one core, level by level in one vmap.
    (ptw_predictors.PTWPredictor(depth), '<= 1.3', '<= 5'),
    (live_and_die_predictors.LADPredictor(), '', '<= 5'),
    (forget_me_not_predictors.ForgetMeNotPredictor(depth), '', ''),
  ):
    unroll = jit_unroll(predictor)
    began = time.perf_counter()
    jax.block_until_ready(unroll(batches['K=2']))
    first = time.perf_counter() - began
    name = predictor.label
    yield quantity(f'{name}, first call', first, 's', first_target)
    times = in_turns(
      {size: functools.partial(unroll, batches[size]) for size in batches},
      repeats=9,
    )
    for size in batches:
      yield milliseconds(f'{name}, {size}', times[size])
    yield ratio(
      f'{name}, K=26 / K=2', times['K=26'], times['K=2'], ratio_target
    )


def time_sources(sizes: Sizes) -> Iterator[Row]:
  """Time and memory of sampling from every source."""
  for name in sorted(constants.TRAJECTORY_GENERATORS):
    generator = constants.build_data_generator(
      config_lib.DataConfig(
        trajectory_generator=name,
        trajectory_generator_kwargs=constants.source_kwargs(name),
      )
    )
    sample = jax.jit(
      lambda rng, generator=generator: generator.sample(
        rng, sizes.batch_size, sizes.seq_length
      )
    )
    yield whole_batch(name, sample, jax.random.key(0), sizes)


def whole_batch(
  name: str, function: Callable[..., Any], argument: jax.Array, sizes: Sizes
) -> Row:
  """A row of a compiled function that reads or writes a batch."""
  times = in_turns({name: lambda: function(argument)}, repeats=9)[name]
  memory = function.lower(argument).compile().memory_analysis()
  return milliseconds(
    name,
    times,
    sequences_per_second=sizes.batch_size / float(np.median(times)),
    temp_bytes=memory.temp_size_in_bytes,
  )


def scale_run_length_mixture(sizes: Sizes) -> Iterator[Row]:
  """Time and memory of the run-length mixture over the length."""
  predictor = live_and_die_predictors.LADPredictor()
  longest = sizes.long_mixture
  for seq_length in (longest // 4, longest // 2, longest):
    batch = jnp.asarray(binary_batch(8, seq_length))
    is_last = seq_length == longest
    name = f'LAD, B=8, T={seq_length}'
    # As in a notebook: not compiled yet, and with all that is around the loop.
    began = time.perf_counter()
    jax.block_until_ready(predictor.unroll({}, None, batch))
    first = time.perf_counter() - began
    yield quantity(
      f'{name}, first call', first, 's', '<= 10' if is_last else ''
    )
    unroll = jit_unroll(predictor)
    times = in_turns({'ours': functools.partial(unroll, batch)}, repeats=3)
    seconds = np.median(times['ours'])
    yield quantity(name, seconds, 's', '<= 5' if is_last else '')
    memory = unroll.lower(batch).compile().memory_analysis()
    size = memory.temp_size_in_bytes + memory.output_size_in_bytes
    yield quantity(
      f'{name}, memory', size / 2**20, 'MiB', '<= 1024' if is_last else ''
    )


def time_long_sequence(sizes: Sizes) -> Iterator[Row]:
  """PTW on a very long sequence, in float32 and in float64."""
  long = sizes.long
  predictor = ptw_predictors.PTWPredictor(ptw_predictors.min_depth(long))
  rng = np.random.default_rng(0)
  probabilities = np.repeat(rng.beta(0.5, 0.5, 64), long // 64)
  symbols = (rng.random((1, long)) < probabilities).astype(int)

  def log_loss(dtype: Any) -> float:
    batch = jnp.asarray(np.eye(2, dtype=dtype)[symbols])
    log_probs = np.asarray(jit_unroll(predictor)(batch)[:, :-1], np.float64)
    return -np.sum(log_probs * np.asarray(batch[:, 1:], np.float64))

  single = log_loss(np.float32)
  with jax.enable_x64(True):
    double = log_loss(np.float64)
  batch = jnp.asarray(np.eye(2, dtype=np.float32)[symbols])
  unroll = jit_unroll(predictor)
  times = in_turns({'long': lambda: unroll(batch)}, repeats=3)
  name = f'PTW, B=1, T={long}, float32'
  yield quantity(name, np.median(times['long']), 's', '<= 3')
  error = abs(single / double - 1)
  yield quantity(f'{name}, relative error of log loss', error, '', '<= 1e-5')


def time_stream(sizes: Sizes) -> Iterator[Row]:
  """PTW on a very long sequence that comes in chunks, in constant memory."""
  predictor, long = ptw_predictors.PTWPredictor(30), sizes.long
  chunk_length = long // 64
  batch = binary_batch(1, long)

  def stream() -> Any:
    state = predictor.initial_state({}, None, 1)
    # Not from the first symbol on: a whole first chunk is not streamed.
    _, state = predictor.unroll({}, None, batch[:, :1], state)
    for begin in range(1, long - chunk_length, chunk_length):
      chunk = batch[:, begin : begin + chunk_length]
      _, state = predictor.unroll({}, None, chunk, state)
    return state

  times = in_turns({'stream': stream}, repeats=1)
  name = f'PTW of depth 30, a stream of {long}'
  yield quantity(name, np.median(times['stream']), 's')
  size = sum(np.asarray(leaf).nbytes for leaf in stream())
  yield quantity(f'{name}, state', size, 'bytes', 'O(K log T)')


def numpy_symbols(values: np.ndarray, alphabet_size: int, depth: int) -> float:
  """PTW's code length of integers `[T]`, one symbol after the other."""
  counts = np.zeros((depth + 1, alphabet_size))
  log_odds = np.zeros(depth)
  sizes = 1 << np.arange(depth, -1, -1)
  total = 0.0
  for t, symbol in enumerate(values):
    kts = (counts[:, symbol] + 0.5) / (t % sizes + 0.5 * alphabet_size)
    split = 1 / (1 + np.exp(-log_odds))
    mixtures = kts.copy()
    for level in reversed(range(depth)):
      mixtures[level] += split[level] * (mixtures[level + 1] - kts[level])
    total -= np.log(mixtures[0])
    log_odds += np.log(mixtures[1:]) - np.log(kts[:-1])
    counts[:, symbol] += 1
    ended = (t + 1) % sizes == 0
    counts[ended] = 0
    log_odds[ended[:-1]] = 0
  return total


def code_files(sizes: Sizes) -> Iterator[Row]:
  """Integer symbols, beside the one-hot way and a loop in NumPy."""
  depth = ptw_predictors.min_depth(sizes.file)
  rng = np.random.default_rng(0)
  for alphabet_size, targets in (
    (256, {'KT': '<= 2', 'PTW': '<= 10'}),
    (2, {'PTW': '<= 2'}),
  ):
    values = rng.integers(alphabet_size, size=(1, sizes.file)).astype(np.uint8)
    for predictor in (
      predictors.OptimalCategoricalPredictor(alphabet_size=alphabet_size),
      ptw_predictors.PTWPredictor(depth, alphabet_size=alphabet_size),
    ):
      target = targets.get(predictor.label, '')
      yield from code_file(predictor, values, alphabet_size, target)


def code_file(
  predictor: predictors.OptimalPredictor,
  values: np.ndarray,
  alphabet_size: int,
  target: str,
) -> Iterator[Row]:
  """Rows of one exact predictor on the symbols of a file, `[1, T]`."""
  name = f'{predictor.label}, K={alphabet_size}, integers'
  # The other ways have to do with less.
  few = values[:, : values.size // 100]
  batch = jnp.asarray(np.eye(alphabet_size, dtype=np.float32)[few])
  unroll = jit_unroll(predictor)

  def code(values: np.ndarray) -> jax.Array:
    return predictors.symbol_log_probs(predictor, {}, values)[0]

  began = time.perf_counter()
  jax.block_until_ready(code(values))
  first = time.perf_counter() - began
  others = {'one-hot': lambda: unroll(batch)}
  if predictor.label == 'PTW':
    loop = lambda: numpy_symbols(few[0], alphabet_size, predictor.depth)
    difference = abs(-float(code(few).sum()) / loop() - 1)
    if difference > 1e-4:
      raise RuntimeError(f'PTW differs from NumPy by {difference}')
    others['NumPy loop over time'] = loop
  sides = {'all': lambda: code(values), 'few': lambda: code(few), **others}
  times = in_turns(sides, repeats=3)
  yield quantity(
    f'{name}, T={values.size}', np.median(times['all']), 's', target
  )
  yield quantity(f'{name}, T={values.size}, first call', first, 's')
  yield milliseconds(f'{name}, T={few.size}', times['few'])
  for side in others:
    yield milliseconds(f'{name}, T={few.size}, {side}', times[side])


def prune_run_lengths(sizes: Sizes) -> Iterator[Row]:
  """LAD by its heaviest starts on a long sequence of bits."""
  length = sizes.pruned
  rng = np.random.default_rng(0)
  means = np.repeat(rng.beta(0.5, 0.5, 50), length // 50)
  values = (rng.random((1, length)) < means).astype(np.uint8)
  predictor = live_and_die_predictors.LADPredictor(
    max_length=length, max_run_lengths=sizes.num_starts
  )
  began = time.perf_counter()
  log_probs, state = predictors.symbol_log_probs(predictor, {}, values)
  jax.block_until_ready(log_probs)
  name = f'LAD of {sizes.num_starts} starts, T={length}'
  yield quantity(name, time.perf_counter() - began, 's', '<= 60')
  share = float(predictor.nats_lost(state)[0]) / -float(log_probs.sum())
  yield quantity(f'{name}, bound on the loss', 100 * share, '%')


def compare_sampling(sizes: Sizes) -> Iterator[Row]:
  """Sampling a PTW batch against a training step on it."""

  def sampler(concentration: float) -> Callable[[], Any]:
    generator = constants.build_data_generator(
      config_lib.DataConfig(parameter_distribution_params=(concentration,) * 2)
    )
    sample = jax.jit(
      lambda rng: generator.sample(rng, sizes.batch_size, sizes.seq_length)
    )
    return lambda: sample(jax.random.key(0))

  job = timing.Job(
    kind='project',
    kwargs={'hidden_size': 128},
    batch_size=sizes.batch_size,
    seq_length=sizes.seq_length,
  )
  step, _ = project.project_step(project.make_config(job), 1, job.steps)
  times = in_turns(
    {
      'step': step,
      'Dirichlet(1/2)': sampler(0.5),
      'Dirichlet(0.3)': sampler(0.3),
    },
    repeats=9,
  )
  yield milliseconds('LSTM-128, training step on one device', times['step'])
  for name, target in (('Dirichlet(1/2)', 20), ('Dirichlet(0.3)', 4)):
    yield milliseconds(f'PTW batch with {name}', times[name])
    yield ratio(
      f'training step / {name}', times['step'], times[name], f'>= {target}'
    )


PARTS = {
  'sources': time_sources,
  'exact predictors': time_predictors,
  'loops in NumPy': compare_predictors,
  'alphabets': compare_alphabets,
  'long mixtures': scale_run_length_mixture,
  'long sequence': time_long_sequence,
  'stream': time_stream,
  'files': code_files,
  'pruned mixture': prune_run_lengths,
  'sampling': compare_sampling,
}


def main() -> None:
  """Reads the command line and prints a row after the other."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--json', action='store_true', help='A row per line.')
  parser.add_argument('--only', default='', help='Pattern of parts to run.')
  parser.add_argument('--quick', action='store_true', help='At tiny sizes.')
  args = parser.parse_args()
  for part, rows in PARTS.items():
    if re.search(args.only, part):
      for row in rows(QUICK if args.quick else Sizes()):
        row = {'part': part, **row}
        line = json.dumps(row) if args.json else timing.format_row(row)
        print(line, flush=True)


if __name__ == '__main__':
  with cli.printing():
    main()
