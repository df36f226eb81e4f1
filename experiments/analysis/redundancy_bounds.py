"""Redundancy bounds of KT, PTW and LAD on individual sequences, in nats.

The redundancy of a predictor for a partition of the sequence into segments is
its log loss on all T symbols, the first included, less that of the best fixed
parameters of each segment, chosen in hindsight. The bounds hold for every
sequence and every partition, and for a Dirichlet(1/2) prior only:

  redundancy <= -log prior of the partition + sum of the segments' KT bounds

They bound expected cumulative regret as well, the sum over time of the KL
divergence from the true parameters for their own partition: the true ones lose
at least as much as the best in hindsight, and regret that leaves out the first
symbol is smaller still.

A partition is given by its switch points, True where a new segment starts:

  symbols        0 0 0 1 1 | 0 0 0    one switch, T = 8
  switch_points  F F F F F   T F F
"""

import math

import numpy as np
from numpy import typing as npt
from scipy import special

from nonstationary_mbml import base_config
from nonstationary_mbml.experiments import ptw_predictors


def kt(seq_length: npt.ArrayLike, alphabet_size: int = 2) -> np.ndarray:
  """Returns the bound of the KT estimator against the best fixed parameter.

    ((K - 1) / 2) ln n + ln K   for n >= 1;   0 for n = 0

  Source: K = 2: Krichevsky & Trofimov, The performance of universal encoding,
  1981; in this form Willems, Shtarkov & Tjalkens, The context-tree weighting
  method, 1995. Any K: the redundancy of symbol counts n_1, ..., n_K is, up to
  terms in n, a sum of g(n_k) = n_k ln n_k - ln Gamma(n_k + 1/2). As g is
  convex, constant sequences are the worst (Xie & Barron, Asymptotic minimax
  regret, 2000). They meet the bound at n = 1, and from n to n + 1 they lose
  ln(1 + (K - 1) / (2n + 1)) <= ((K - 1) / 2) ln(1 + 1/n) more.

  Args:
    seq_length: Length n, integers >= 0 of any shape.
    alphabet_size: Number of symbols, K.

  Returns:
    Nats, of the shape of `seq_length`. For large n, constant sequences lose
    ln K - ln(Gamma(1/2) / Gamma(K/2)) less: 0.12 for K = 2, 0.81 for K = 4.

  Raises:
    ValueError: If an argument is out of range.
  """
  alphabet_size = base_config.check_int('alphabet_size', alphabet_size, 2)
  return _kt(_check_ints('seq_length', seq_length, 0), alphabet_size)


def ptw(
  switch_points: npt.ArrayLike, depth: int, alphabet_size: int = 2
) -> np.ndarray:
  """Returns the bound of PTW for any partition, aligned with the tree or not.

    ln 2 * (nodes above the last level) + sum of KT bounds of the blocks

  of the coarsest binary temporal partition that refines the given one: a block
  is split in the middle if there is a switch inside. Blocks that begin at T or
  later cost nothing, as what is not seen integrates out; one of which only a
  part is seen costs at most its bit and the KT bound of that part.

    lengths 1 3, d = 2: blocks 1 1 2, bits for the root and both its halves

  Source: Veness, White, Bowling & Gyorgy, Partition Tree Weighting, DCC 2013
  (the redundancy theorem).

  Args:
    switch_points: Switches, bool `[..., T]`, True where a new segment starts,
      False at 0.
    depth: Depth d of the PTW predictor, T <= 2^d.
    alphabet_size: Number of symbols, K.

  Returns:
    Nats `[...]`.

  Raises:
    ValueError: If an argument is out of range.
  """
  alphabet_size = base_config.check_int('alphabet_size', alphabet_size, 2)
  depth = base_config.check_int('depth', depth, 0, ptw_predictors.MAX_DEPTH)
  switch_points = _check_switch_points(switch_points)
  seq_length = switch_points.shape[-1]
  ptw_predictors.check_horizon(depth, seq_length)

  num_switches = np.cumsum(switch_points, axis=-1)
  bound = np.zeros(switch_points.shape[:-1])
  is_node = np.ones((*switch_points.shape[:-1], 1), bool)
  for level in range(depth + 1):
    length = 2 ** (depth - level)
    begins = np.arange(0, seq_length, length)
    ends = np.minimum(begins + length, seq_length)
    is_node = is_node[..., : len(begins)]
    is_split = num_switches[..., ends - 1] > num_switches[..., begins]
    bound += (is_node & ~is_split) @ _kt(ends - begins, alphabet_size)
    if level < depth:
      bound += math.log(2) * is_node.sum(axis=-1)
    # A block with a switch inside is in the tree: its ancestors are split, too.
    is_node = np.repeat(is_split, 2, axis=-1)
  return bound[()]


def ptw_worst_case(
  seq_length: npt.ArrayLike,
  num_switches: npt.ArrayLike,
  depth: int,
  alphabet_size: int = 2,
) -> np.ndarray:
  """Returns a bound of `ptw` for all partitions with c switches.

    s_j = min(c, ceil((T - 1) / 2h))   h = 2^(d-j-1), half a block of level j
    m_j = min(c, number of odd multiples of h below T)
    ln 2 (1 + sum_{j<d-1} (s_j + m_j)) + max_{1<=b<=m} b kt(T/b)
    m = 1 + sum_{j<d} m_j

  At level j at most s_j blocks have a switch inside and are split, m_j of them
  where the second half has begun. These are 1 + sum (s_j + m_j) <= 2 c d + 1
  nodes, and m <= min(c d + 1, T) blocks with T symbols in total. KT bounds are
  concave, so b blocks cost at most b kt(T/b). That grows with b for K <= 3; for
  larger alphabets there is a maximum before b = T. (No bit for d = 0.)

  Source: Veness, White, Bowling & Gyorgy, Partition Tree Weighting, DCC 2013;
  their bound on the nodes without the overlap of the switches' paths.

  Args:
    seq_length: Length T, integers from 1 to 2^d.
    num_switches: Number c, integers from 0 to T - 1; broadcast against
      `seq_length`.
    depth: Depth d of the PTW predictor.
    alphabet_size: Number of symbols, K.

  Returns:
    Nats, of the shape of both together.

  Raises:
    ValueError: If an argument is out of range.
  """
  alphabet_size = base_config.check_int('alphabet_size', alphabet_size, 2)
  depth = base_config.check_int('depth', depth, 0, ptw_predictors.MAX_DEPTH)
  lengths, switches = _check_num_switches(seq_length, num_switches)
  ptw_predictors.check_horizon(depth, int(lengths.max()))

  num_nodes = np.full(lengths.shape, min(depth, 1))
  max_blocks = np.ones(lengths.shape, int)
  for level in range(depth):
    half = 2 ** (depth - level - 1)
    # Blocks of which two symbols are seen, and midpoints that are seen.
    splits = np.minimum(switches, -((1 - lengths) // (2 * half)))
    seen_splits = np.minimum(switches, ((lengths - 1) // half + 1) // 2)
    max_blocks += seen_splits
    if level < depth - 1:
      num_nodes += splits + seen_splits
  # Where the derivative of b kt(T/b) is 0.
  log_peak = 2 * math.log(alphabet_size) / (alphabet_size - 1) - 1
  num_blocks = np.clip(lengths * math.exp(log_peak), 1, max_blocks)
  kts = num_blocks * _kt(lengths / num_blocks, alphabet_size)
  return (math.log(2) * num_nodes + kts)[()]


def lad(switch_points: npt.ArrayLike, alphabet_size: int = 2) -> np.ndarray:
  """Returns the bound of LAD for any partition.

    sum over ended segments   ln 2l - ln S(l-1) + kt(l)
    and for the last one            - ln S(l-1) + kt(l)

  where l is a segment's length and S(n) the prior probability that it goes on
  after its n-th symbol, for the hazard h(a) = 1/(2a):

    S(n) = prod_{a<=n} (1 - 1/(2a)) = Gamma(n + 1/2) / (sqrt(pi) n!)

    lengths 1 3: prior h(1) S(2) = 1/2 * 3/8

  Source: Willems, Coding for a binary independent
  piecewise-identically-distributed source, 1996 (linear complexity).

  Args:
    switch_points: Switches, bool `[..., T]`, True where a new segment starts,
      False at 0.
    alphabet_size: Number of symbols, K.

  Returns:
    Nats `[...]`.

  Raises:
    ValueError: If an argument is out of range.
  """
  alphabet_size = base_config.check_int('alphabet_size', alphabet_size, 2)
  switch_points = _check_switch_points(switch_points)

  lengths = np.arange(1, switch_points.shape[-1] + 1)
  last = _kt(lengths, alphabet_size) - _log_survival(lengths - 1)
  ended = last + np.log(2 * lengths)
  # Index of the current segment's first symbol, and of each symbol in it.
  starts = np.maximum.accumulate(
    np.where(switch_points, lengths - 1, 0), axis=-1
  )
  ages = lengths - 1 - starts
  costs = np.where(switch_points[..., 1:], ended[ages[..., :-1]], 0)
  return costs.sum(axis=-1) + last[ages[..., -1]]


def lad_worst_case(
  seq_length: npt.ArrayLike,
  num_switches: npt.ArrayLike,
  alphabet_size: int = 2,
) -> np.ndarray:
  """Returns a bound of `lad` for all partitions with c switches.

    (c + 1) ln 2K + c ln 2 + c v ln(v T/V) + w ln(w T/V)
    w = K/2,  v = w + 1,  V = c v + w

  From S(l-1) >= S(l) >= 1/(2 sqrt(l)), l >= 1, a segment that ended costs at
  most ln 4K + v ln l and the last one ln 2K + w ln l. The logarithm is concave:
  with T symbols in total, lengths in proportion to v and w cost the most.

  Source: Willems, Coding for a binary independent
  piecewise-identically-distributed source, 1996 (linear complexity).

  Args:
    seq_length: Length T, integers >= 1.
    num_switches: Number c, integers from 0 to T - 1; broadcast against
      `seq_length`.
    alphabet_size: Number of symbols, K.

  Returns:
    Nats, of the shape of both together.

  Raises:
    ValueError: If an argument is out of range.
  """
  alphabet_size = base_config.check_int('alphabet_size', alphabet_size, 2)
  lengths, switches = _check_num_switches(seq_length, num_switches)

  last_weight = alphabet_size / 2
  weight = last_weight + 1
  scale = lengths / (switches * weight + last_weight)
  return (
    (switches + 1) * math.log(2 * alphabet_size)
    + switches * (math.log(2) + weight * np.log(weight * scale))
    + last_weight * np.log(last_weight * scale)
  )[()]


def _kt(lengths: np.ndarray, alphabet_size: int) -> np.ndarray:
  """`kt` without checks, also between the integers."""
  bound = (alphabet_size - 1) / 2 * np.log(np.maximum(lengths, 1))
  return np.where(lengths > 0, bound + math.log(alphabet_size), 0.0)[()]


def _log_survival(lengths: np.ndarray) -> np.ndarray:
  """Log of the prior probability S(n) that a segment goes on."""
  return (
    special.gammaln(lengths + 0.5)
    - special.gammaln(lengths + 1)
    - special.gammaln(0.5)
  )


def _check_ints(field: str, values: npt.ArrayLike, minimum: int) -> np.ndarray:
  """Returns an array of integers >= minimum, or raises ValueError."""
  array = np.asarray(values)
  is_int = array.size and np.issubdtype(array.dtype, np.integer)
  base_config.check_int(
    field, array.min().item() if is_int else values, minimum
  )
  return array.astype(np.int64)


def _check_num_switches(
  seq_length: npt.ArrayLike, num_switches: npt.ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
  """Returns both, broadcast, or raises ValueError if there is no partition."""
  lengths = _check_ints('seq_length', seq_length, 1)
  switches = _check_ints('num_switches', num_switches, 0)
  try:
    lengths, switches = np.broadcast_arrays(lengths, switches)
  except ValueError as error:
    raise ValueError(
      f'seq_length of shape {lengths.shape} and num_switches of shape '
      f'{switches.shape} do not broadcast'
    ) from error
  too_many = switches >= lengths
  if too_many.any():
    length = lengths[too_many][0]
    raise ValueError(
      f'num_switches is {switches[too_many][0]}; {length} symbols have at most '
      f'{length - 1}'
    )
  return lengths, switches


def _check_switch_points(switch_points: npt.ArrayLike) -> np.ndarray:
  """Returns a bool array `[..., T]`, or raises ValueError."""
  array = np.asarray(switch_points)
  if array.dtype != bool or not array.ndim or not array.shape[-1]:
    raise ValueError(
      f'switch_points has dtype {array.dtype} and shape {array.shape}; it must '
      'be bool [..., T], T >= 1'
    )
  if array[..., 0].any():
    raise ValueError(
      'switch_points is True at time 0; the first segment is no switch, it '
      'must be False there'
    )
  return array
