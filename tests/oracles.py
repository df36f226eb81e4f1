"""Slow float64 truths, by enumeration, that share no code with what they test.

Symbols are integers, sequences tuples of them, probabilities Python floats.
A partition is the tuple of its segments' lengths.
"""

import functools
import itertools
import math

import jax
import numpy as np
from scipy import special

Partition = tuple[int, ...]


def one_hot(sequences, alphabet_size, dtype=np.float64):
  """Returns `[B, T, K]`."""
  return np.eye(alphabet_size, dtype=dtype)[np.asarray(sequences)]


def all_sequences(alphabet_size, seq_length):
  """Returns every sequence, `[K^T, T]`."""
  return np.array(
    list(itertools.product(range(alphabet_size), repeat=seq_length))
  )


@functools.cache
def kt_probability(symbols, prior):
  """Probability of a whole segment, from the Dirichlet-multinomial formula."""
  log_probability = math.lgamma(sum(prior)) - math.lgamma(
    sum(prior) + len(symbols)
  )
  for symbol, concentration in enumerate(prior):
    count = symbols.count(symbol)
    log_probability += math.lgamma(concentration + count) - math.lgamma(
      concentration
    )
  return math.exp(log_probability)


@functools.cache
def ptw_partitions(depth):
  """All binary temporal partitions of 2^depth symbols: {partition: prior}."""
  if depth == 0:
    return {(1,): 1.0}
  halves = ptw_partitions(depth - 1)
  partitions = {(2**depth,): 0.5}
  for left, left_prior in halves.items():
    for right, right_prior in halves.items():
      partitions[left + right] = 0.5 * left_prior * right_prior
  return partitions


@functools.cache
def hazard_partitions(seq_length, hazard):
  """All partitions when a segment ends after its a-th symbol with hazard(a).

  The last segment may go on, so its end is not counted.
  """
  partitions = {}
  for ends in itertools.product((False, True), repeat=seq_length - 1):
    prior, length, lengths = 1.0, 0, []
    for end in ends:
      length += 1
      prior *= hazard(length) if end else 1 - hazard(length)
      if end:
        lengths.append(length)
        length = 0
    partitions[(*lengths, length + 1)] = prior
  return partitions


def lin_hazard(run_length):
  """Willems, 1996."""
  return 1 / (2 * run_length)


def mixture_probability(symbols, partitions, prior):
  """Probability of symbols, or of a first part of the partitioned ones."""
  total = 0.0
  for partition, weight in partitions.items():
    probability, start = weight, 0
    for length in partition:
      segment = symbols[start : start + length]
      if segment:
        probability *= kt_probability(segment, prior)
      start += length
    total += probability
  return total


def mixture_predictions(sequences, partitions, prior):
  """Log predictions of symbols 1, ..., T given those before, `[B, T, K]`."""
  cache = {}

  def probability(symbols):
    if symbols not in cache:
      cache[symbols] = mixture_probability(symbols, partitions, prior)
    return cache[symbols]

  predictions = np.empty((*np.shape(sequences), len(prior)))
  for row, sequence in enumerate(np.asarray(sequences).tolist()):
    for time in range(len(sequence)):
      past = tuple(sequence[:time])
      for symbol in range(len(prior)):
        joint = probability((*past, symbol))
        predictions[row, time, symbol] = math.log(joint / probability(past))
  return predictions


def mixture_posteriors(sequences, partitions, prior):
  """Posteriors of the mixture, given partitions of one symbol more than seen.

  Returns P(a segment starts at t | all T symbols) `[B, T]`, with 0 at t = 0;
  and P(n symbols of its segment lie before symbol t | those t) for t = 1, ...,
  T, `[B, T, T + 1]`.
  """
  batch_size, seq_length = np.shape(sequences)
  switches = np.zeros((batch_size, seq_length))
  run_lengths = np.zeros((batch_size, seq_length, seq_length + 1))
  for row, sequence in enumerate(np.asarray(sequences).tolist()):
    for time in range(1, seq_length + 1):
      past = tuple(sequence[:time])
      total = 0.0
      for partition, weight in partitions.items():
        if not weight:
          continue
        joint = weight * mixture_probability(past, {partition: 1.0}, prior)
        total += joint
        starts = np.cumsum((0, *partition[:-1]))
        current = max(start for start in starts if start <= time)
        run_lengths[row, time - 1, time - current] += joint
        if time == seq_length:
          inside = [start for start in starts if 0 < start < seq_length]
          switches[row, inside] += joint
      run_lengths[row, time - 1] /= total
      if time == seq_length:
        switches[row] /= total
  return switches, run_lengths


def kt_log_probs(symbols, prior):
  """Log-probability of every symbol given those before it, `[T]`."""
  counts = list(prior)
  log_probs = []
  for symbol in symbols:
    log_probs.append(math.log(counts[symbol] / math.fsum(counts)))
    counts[symbol] += 1
  return np.array(log_probs)


def ptw_log_probs(symbols, depth, prior):
  """The same under PTW, from probabilities of blocks, in O(T d).

  For sequences too long to enumerate.
  """
  total = math.fsum(prior)
  counts = [{} for _ in range(depth + 1)]
  sizes = [0] * (depth + 1)
  segments = [0.0] * (depth + 1)  # Log-probability as one segment.
  lefts = [0.0] * (depth + 1)  # That of the left half.
  log_probs, before = [], 0.0
  for time, symbol in enumerate(symbols):
    for level in range(depth + 1):
      if time % 2 ** (depth - level) == 0:
        counts[level], sizes[level], segments[level] = {}, 0, 0.0
      seen = counts[level].get(symbol, 0)
      segments[level] += math.log(
        (seen + prior[symbol]) / (sizes[level] + total)
      )
      counts[level][symbol] = seen + 1
      sizes[level] += 1
    block = segments[depth]
    for level in reversed(range(depth)):
      half = 2 ** (depth - level - 1)
      if time // half % 2 == 0:
        lefts[level] = block
      else:
        block += lefts[level]
      block = np.logaddexp(segments[level], block) - math.log(2)
    log_probs.append(block - before)
    # The whole tree is one block, so its probability is that of all symbols.
    before = block
  return np.array(log_probs)


def run_length_log_domain(symbols, prior, hazard):
  """Log predictions `[T, K]` after each symbol, in O(T^2), all in logs.

  The recursion over the start of the current segment, for sequences too long
  to enumerate.
  """
  prior = np.asarray(prior, float)
  log_weights = np.zeros(1)
  counts = np.zeros((1, len(prior)))
  predictions = []
  table = np.array([hazard(length) for length in range(1, len(symbols) + 1)])
  for symbol in symbols:
    log_kt = np.log(counts[:, symbol] + prior[symbol]) - np.log(
      counts.sum(axis=1) + prior.sum()
    )
    ends = table[counts.sum(axis=1).astype(int)]
    joint = log_weights + log_kt
    with np.errstate(divide='ignore'):  # log 0
      log_weights = np.append(
        joint + np.log1p(-ends), np.logaddexp.reduce(joint + np.log(ends))
      )
    log_weights -= np.logaddexp.reduce(log_weights)
    counts[:, symbol] += 1
    counts = np.vstack([counts, np.zeros(len(prior))])
    log_kts = np.log(counts + prior) - np.log(
      counts.sum(axis=1, keepdims=True) + prior.sum()
    )
    predictions.append(
      np.logaddexp.reduce(log_weights[:, None] + log_kts, axis=0)
    )
  return np.array(predictions)


def switch_posterior_log_domain(symbols, prior, hazard):
  """P(a segment starts at t | all symbols) `[T]`, for sequences of any length.

  Sums over whole segments, forwards up to each start and backwards from it.
  """
  seq_length = len(symbols)
  log_lengths, log_survival = [-np.inf], [0.0]  # Of lengths 0, 1, ...
  with np.errstate(divide='ignore'):
    for length in range(1, seq_length + 1):
      log_lengths.append(log_survival[-1] + np.log(hazard(length)))
      log_survival.append(log_survival[-1] + np.log1p(-hazard(length)))
  log_lengths, log_survival = np.array(log_lengths), np.array(log_survival)
  counts = np.vstack(
    [np.zeros(len(prior)), np.cumsum(np.eye(len(prior))[symbols], axis=0)]
  )

  def evidence(start):
    """Log probability of the symbols from `start` to every later end."""
    own = counts[start:] - counts[start]
    return (
      special.gammaln(own + prior).sum(axis=1)
      - special.gammaln(own.sum(axis=1) + np.sum(prior))
      - np.sum(special.gammaln(prior))
      + special.gammaln(np.sum(prior))
    )

  forward = np.full(seq_length + 1, -np.inf)
  forward[0] = 0.0
  for start in range(seq_length):
    ended = (
      forward[start] + evidence(start) + log_lengths[: seq_length + 1 - start]
    )
    forward[start:] = np.logaddexp(forward[start:], ended)
  backward = np.full(seq_length + 1, -np.inf)
  for start in reversed(range(seq_length)):
    logs = evidence(start)
    size = seq_length + 1 - start
    terms = logs + log_lengths[:size] + backward[start:]
    # The last segment ends there or later.
    last = logs[-1] + log_survival[seq_length - start - 1]
    backward[start] = np.logaddexp.reduce([*terms[:-1], last])
  posterior = np.exp(forward + backward - backward[0])[:seq_length]
  return np.array([0.0, *posterior[1:]])


def ptw_switch_probability(depth, time):
  """P(a new segment starts at `time`): its block and all ancestors split."""
  trailing_zeros = (time & -time).bit_length() - 1
  return 0.5 ** (depth - trailing_zeros)


def lin_switch_probabilities(seq_length):
  """P(a new segment starts at t) for t < T, by the renewal recursion."""
  lengths = []  # P(a segment has length a).
  survival = 1.0
  for age in range(1, seq_length):
    lengths.append(survival * lin_hazard(age))
    survival *= 1 - lin_hazard(age)
  starts = [1.0]
  for time in range(1, seq_length):
    starts.append(
      sum(starts[time - age] * lengths[age - 1] for age in range(1, time + 1))
    )
  return np.array([0.0, *starts[1:]])


def largest_array(jaxpr):
  """Elements of the largest array in a jaxpr."""
  sizes = [0]
  for equation in jaxpr.eqns:
    sizes += [np.prod(v.aval.shape) for v in equation.outvars]
    for inner in jax.tree.leaves(
      equation.params, is_leaf=lambda p: hasattr(p, 'eqns')
    ):
      inner = getattr(inner, 'jaxpr', inner)
      if hasattr(inner, 'eqns'):
        sizes.append(largest_array(inner))
  return max(sizes)
