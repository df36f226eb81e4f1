"""Sources of piecewise-stationary sequences.

Inside a segment the symbols are i.i.d.; at every switching point the parameters
of their distribution are drawn anew. The sources differ in the prior of their
switching points, and a few in how the parameters go on:

  static         none
  regular_shift  every `shift_period` symbols
  random_shift   segment lengths i.i.d., max(1, round(X))
  ptw            the binary temporal partitions of the PTW prior
  lin            a segment ends after its a-th symbol with probability 1/(2a)
  recurring      a segment ends after any symbol with the same probability, and
                 one of a few others comes back
  drift          the same ends, and the logits walk at random inside a segment
  mixture        every sequence is of one of several sources

Everything is written for one sequence and batched by `vmap` over
`jax.random.split(rng, batch_size)`: sequences are independent, and any slice of
the keys gives that slice of the batch.
"""

import abc
from collections.abc import Mapping
from collections.abc import Sequence
import functools
import itertools
import numbers
from typing import Any
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from nonstationary_mbml import base_config
from nonstationary_mbml import predictors
from nonstationary_mbml.experiments import distributions
from nonstationary_mbml.experiments import live_and_die_predictors
from nonstationary_mbml.experiments import mixture_predictors
from nonstationary_mbml.experiments import ptw_predictors
from nonstationary_mbml.experiments import run_length_predictors


def check_prior(
  path: str,
  iid_distribution: distributions.Distribution,
  parameter_distribution: distributions.Distribution,
  parameter_distribution_params: Sequence[float],
) -> tuple[float, ...]:
  """Checks that a prior draws what the distribution of the symbols takes.

  Args:
    path: Comes before the names of the arguments in messages.
    iid_distribution: As in TrajectoryGenerator.
    parameter_distribution: As in TrajectoryGenerator.
    parameter_distribution_params: As in TrajectoryGenerator.

  Returns:
    The parameters of the prior as floats.

  Raises:
    ValueError: If they do not fit each other, in size or in range.
  """
  field = f'{path}parameter_distribution_params'
  params = base_config.check_vector(field, parameter_distribution_params)
  parameter_distribution.check_parameters(field, params)
  iid_distribution.check_fits(
    f'{path}parameter_distribution', parameter_distribution, params
  )
  return params


class TrajectoryGenerator(base_config.EqualByValue, abc.ABC):
  """A piecewise-stationary source.

  A subclass gives its switching points. The parameters of every segment are
  drawn anew, unless `parameters_over_time` says otherwise. Sources with equal
  attributes are equal, and share their compiled programs.

  Attributes:
    default_kwargs: Arguments of the constructor besides the distributions, for
      scripts that are given the name of the source alone.
    reference_predictors: Names of predictors that were designed for a source
      without an exact one, to evaluate in its place.
  """

  default_kwargs: ClassVar[Mapping[str, Any]] = {}
  reference_predictors: ClassVar[tuple[str, ...]] = ()
  # Whether a longer sequence does not begin as a shorter one would.
  depends_on_length: bool = False

  def __init_subclass__(cls, **kwargs):
    super().__init_subclass__(**kwargs)
    if '_parameters_one' in vars(cls):  # Its name in earlier versions.
      cls.parameters_over_time = cls._parameters_one

  def __init__(
    self,
    iid_distribution: distributions.Distribution,
    parameter_distribution: distributions.Distribution,
    parameter_distribution_params: Sequence[float],
  ):
    """Initializes the source.

    Args:
      iid_distribution: Distribution of the symbols inside a segment.
      parameter_distribution: Distribution of the parameters of a segment.
      parameter_distribution_params: The parameters of the latter.

    Raises:
      ValueError: If the two do not fit each other, in size or in range.
    """
    self.iid_distribution = iid_distribution
    self.parameter_distribution = parameter_distribution
    self.parameter_distribution_params = check_prior(
      '',
      iid_distribution,
      parameter_distribution,
      parameter_distribution_params,
    )

  @property
  def alphabet_size(self) -> int:
    """K. Raises ValueError if the symbols are not categorical."""
    if not isinstance(self.iid_distribution, distributions.Categorical):
      raise ValueError(
        f'iid_distribution is {self.iid_distribution.name}; training and '
        'evaluation take categorical'
      )
    return self.iid_distribution.feature_size

  def sample(
    self, rng: jax.Array, batch_size: int, seq_length: int
  ) -> tuple[jax.Array, jax.Array]:
    """Returns a batch `[B, T, F]` and its true parameters `[B, T, P]`.

    Raises:
      ValueError: If a size is below 1 or the source cannot be that long.
    """
    batch_size = base_config.check_int('batch_size', batch_size, 1)
    return self.sample_from_keys(jax.random.split(rng, batch_size), seq_length)

  def sample_from_keys(
    self, keys: jax.Array, seq_length: int
  ) -> tuple[jax.Array, jax.Array]:
    """Returns one sequence for each of B keys, as `sample` does."""
    self.check_seq_length(seq_length)
    return _sample(self, keys, int(seq_length))

  def switch_points(
    self, rng: jax.Array, batch_size: int, seq_length: int
  ) -> jax.Array:
    """Returns the switching points behind `sample` with the same arguments.

    Returns:
      bool `[B, T]`, True where a new segment starts; False at 0.
    """
    batch_size = base_config.check_int('batch_size', batch_size, 1)
    self.check_seq_length(seq_length)
    keys = jax.random.split(rng, batch_size)
    return _switch_points(self, keys, int(seq_length))

  def bayes_predictor(
    self, seq_length: int
  ) -> predictors.OptimalPredictor | None:
    """Returns the source's exact Bayes predictor: its prior is the source's.

    None for a source without a tractable one, or whose parameters are not from
    a Dirichlet; and for a subclass that switches otherwise than the class whose
    predictor it inherits.

    Args:
      seq_length: T, which the depth of a PTW source may follow from.
    """
    owner = self._owner('_bayes_predictor')
    is_own = all(
      issubclass(owner, self._owner(name))
      for name in ('_switch_points_one', 'parameters_over_time', '_sample_one')
    )
    if not is_own or not isinstance(
      self.parameter_distribution, distributions.Dirichlet
    ):
      return None
    return self._bayes_predictor(seq_length, self.parameter_distribution_params)

  def _bayes_predictor(
    self, seq_length: int, concentration: tuple[float, ...]
  ) -> predictors.OptimalPredictor | None:
    """The exact predictor for a Dirichlet prior; None if there is none."""
    del seq_length, concentration
    return None

  def _owner(self, method: str) -> type:
    """The class from which this source has a method."""
    return next(base for base in type(self).__mro__ if method in vars(base))

  @abc.abstractmethod
  def _switch_points_one(self, rng: jax.Array, seq_length: int) -> jax.Array:
    """The switching points of one sequence, bool `[T]`."""

  def check_seq_length(self, seq_length: int) -> None:
    """Raises ValueError if the source cannot be that long."""
    base_config.check_int(
      'seq_length', seq_length, 1, base_config.MAX_SEQ_LENGTH
    )

  def _sample_one(
    self, rng: jax.Array, seq_length: int
  ) -> tuple[jax.Array, jax.Array]:
    rng_switch, rng_parameters, rng_symbols = _split(rng)
    switches = self._switch_points_one(rng_switch, seq_length)
    parameters = self.parameters_over_time(rng_parameters, switches)
    symbols = self.iid_distribution.sample(rng_symbols, parameters)
    return symbols, parameters

  def parameters_over_time(
    self, rng: jax.Array, switches: jax.Array
  ) -> jax.Array:
    """Returns the parameters of every symbol of one sequence.

    Those of a segment are one draw from the prior, and stay. A subclass in
    which they move, or depend on earlier segments, overrides this; it has no
    Bayes predictor then, unless it gives one.

    Args:
      rng: Key of the parameters.
      switches: Switching points, bool `[T]`, True where a segment starts; False
        at 0, where the first one does.

    Returns:
      `[T, P]`.
    """
    # One draw for every t; each segment keeps that of its first symbol.
    draws = self._draw_parameters(rng, switches.shape[0])
    return _at_starts(draws, switches)

  def _draw_parameters(self, rng: jax.Array, number: int) -> jax.Array:
    """Independent draws from the parameters' prior, `[number, P]`."""
    return self.parameter_distribution.sample(
      rng,
      # NumPy, so that it stays concrete inside jit.
      np.asarray(self.parameter_distribution_params, jnp.result_type(float)),
      (number,),
    )


class StaticGenerator(TrajectoryGenerator):
  """One segment: `0 1 0 0 1 0 0 0`."""

  def _switch_points_one(self, rng: jax.Array, seq_length: int) -> jax.Array:
    del rng
    return jnp.zeros(seq_length, bool)

  def _bayes_predictor(
    self, seq_length: int, concentration: tuple[float, ...]
  ) -> predictors.OptimalPredictor:
    return predictors.OptimalCategoricalPredictor(concentration)


class RegularShiftGenerator(TrajectoryGenerator):
  """A new segment every `shift_period` symbols: `0 1 0 | 1 1 1 | 0 0`."""

  default_kwargs = {'shift_period': 20}

  def __init__(self, *args, shift_period: int, **kwargs):
    """Initializes the source; other arguments as in TrajectoryGenerator."""
    super().__init__(*args, **kwargs)
    self.shift_period = base_config.check_int('shift_period', shift_period, 1)

  def _switch_points_one(self, rng: jax.Array, seq_length: int) -> jax.Array:
    del rng
    time = jnp.arange(seq_length)
    return (time % self.shift_period == 0) & (time > 0)

  def _bayes_predictor(
    self, seq_length: int, concentration: tuple[float, ...]
  ) -> predictors.OptimalPredictor:
    return run_length_predictors.regular_shift_predictor(
      self.shift_period, concentration
    )


class RandomShiftGenerator(TrajectoryGenerator):
  """Segments of i.i.d. length max(1, round(X)), X from any distribution.

  Halves round to even; a segment is never empty.
  """

  default_kwargs = {
    'shift_distribution': 'uniform',
    'shift_parameters': (1.0, 39.0),
  }

  def __init__(
    self,
    *args,
    shift_distribution: str | distributions.Distribution,
    shift_parameters: Sequence[float],
    **kwargs,
  ):
    """Initializes the source; other arguments as in TrajectoryGenerator.

    Args:
      *args: As in TrajectoryGenerator.
      shift_distribution: Distribution of X, by name or as an object of one
        feature.
      shift_parameters: Its parameters.
      **kwargs: As in TrajectoryGenerator.

    Raises:
      ValueError: If the distribution is unknown, not univariate, or does not
        take these parameters.
    """
    super().__init__(*args, **kwargs)
    self.shift_distribution, self.shift_parameters = (
      distributions.check_univariate(
        'shift_distribution',
        shift_distribution,
        'shift_parameters',
        shift_parameters,
      )
    )

  def _switch_points_one(self, rng: jax.Array, seq_length: int) -> jax.Array:
    parameters = np.asarray(self.shift_parameters, jnp.result_type(float))
    # Even if all lengths are 1, T of them reach the end.
    draws = self.shift_distribution.sample(rng, parameters, (seq_length,))
    lengths = jnp.clip(jnp.round(draws[:, 0]), 1, seq_length).astype(jnp.int32)

    # Ends beyond T count as T, so that no sum is too large for an integer.
    def step(end: jax.Array, length: jax.Array) -> tuple[jax.Array, jax.Array]:
      end = jnp.minimum(end + jnp.minimum(length, seq_length), seq_length)
      return end, end

    _, ends = jax.lax.scan(step, jnp.int32(0), lengths)
    return jnp.zeros(seq_length, bool).at[ends].set(True, mode='drop')

  def _bayes_predictor(
    self, seq_length: int, concentration: tuple[float, ...]
  ) -> predictors.OptimalPredictor:
    return run_length_predictors.random_shift_predictor(
      self.shift_distribution, self.shift_parameters, concentration
    )


class PTWGenerator(TrajectoryGenerator):
  """Binary temporal partitions of depth d (Veness et al., 2013, section 3).

  A block of 2^d symbols is one segment or split in the middle, with probability
  1/2 each, and so are its halves, down to single symbols. The mean number of
  switching points in 2^d symbols is d/2. Symbols beyond the first T of the 2^d
  are not drawn.

    d = 3:  0 1 1 0 | 1 1 | 1 | 0     split at 4, at 6 and at 7
  """

  def __init__(self, *args, depth: int | None = None, **kwargs):
    """Initializes the source.

    Args:
      *args: As in TrajectoryGenerator.
      depth: d; by default the least that holds the sequence, ceil(log2 T).
      **kwargs: As in TrajectoryGenerator.
    """
    super().__init__(*args, **kwargs)
    if depth is not None:
      depth = base_config.check_int('depth', depth, 0, ptw_predictors.MAX_DEPTH)
    self.depth = depth

  @property
  def depends_on_length(self) -> bool:
    return self.depth is None

  def depth_for(self, seq_length: int) -> int:
    """Returns the depth of the tree behind a sequence of T symbols."""
    if self.depth is None:
      return ptw_predictors.min_depth(seq_length)
    return self.depth

  def check_seq_length(self, seq_length: int) -> None:
    super().check_seq_length(seq_length)
    ptw_predictors.check_horizon(self.depth_for(seq_length), seq_length)

  def _switch_points_one(self, rng: jax.Array, seq_length: int) -> jax.Array:
    depth = self.depth_for(seq_length)
    # Only the blocks of a level that begin before T: ceil(T / length).
    num_blocks = [-(-seq_length >> depth - level) for level in range(depth)]
    coins = jax.random.bernoulli(rng, 0.5, (sum(num_blocks),))
    switches = jnp.zeros(seq_length, bool)
    splits = jnp.ones(1, bool)
    for level, count in enumerate(num_blocks):
      coins_here, coins = coins[:count], coins[count:]
      # A block is there if its parent, and so all its ancestors, are split.
      splits = jnp.repeat(splits, 2 if level else 1)[:count] & coins_here
      length = 1 << depth - level
      middles = np.arange(count) * length + length // 2
      inside = middles < seq_length
      switches = switches.at[middles[inside]].set(splits[inside])
    return switches

  def _bayes_predictor(
    self, seq_length: int, concentration: tuple[float, ...]
  ) -> predictors.OptimalPredictor:
    return ptw_predictors.PTWPredictor(
      self.depth_for(seq_length), concentration
    )


class LINGenerator(TrajectoryGenerator):
  """A segment ends after its a-th symbol with probability 1/(2a).

  The switching prior behind Live-and-Die weighting (Willems, 1996).
  """

  def _switch_points_one(self, rng: jax.Array, seq_length: int) -> jax.Array:
    uniforms = jax.random.uniform(rng, (seq_length - 1,))

    def step(age: jax.Array, uniform: jax.Array) -> tuple[jax.Array, jax.Array]:
      ends = uniform < live_and_die_predictors.hazard(age)
      return jnp.where(ends, 1, age + 1), ends

    _, ends = jax.lax.scan(step, jnp.int32(1), uniforms)
    return jnp.concatenate([jnp.zeros(1, bool), ends])

  def _bayes_predictor(
    self, seq_length: int, concentration: tuple[float, ...]
  ) -> predictors.OptimalPredictor:
    return live_and_die_predictors.LADPredictor(concentration)


class RecurringGenerator(TrajectoryGenerator):
  """A few regimes that come again: `A A A | B B | A | C C C | A`.

  Every sequence draws a pool of m parameter vectors. The first segment has any
  of them, with equal chances. After every symbol the segment ends with
  probability h, and the next one has any of the m - 1 others, so that every
  switching point is a change.
  """

  default_kwargs = {'pool_size': 3, 'switch_probability': 0.05}
  reference_predictors = ('forget_me_not',)

  def __init__(
    self, *args, pool_size: int, switch_probability: float, **kwargs
  ):
    """Initializes the source.

    Args:
      *args: As in TrajectoryGenerator.
      pool_size: m, at least 2.
      switch_probability: h, in (0, 1].
      **kwargs: As in TrajectoryGenerator.

    Raises:
      ValueError: If an argument is out of range.
    """
    super().__init__(*args, **kwargs)
    # So that a sum of two regimes is no more than an int32.
    pool_size = base_config.check_int('pool_size', pool_size, 2, 2**30)
    self.pool_size = pool_size
    self.switch_probability = _check_probability(
      'switch_probability', switch_probability
    )

  def _switch_points_one(self, rng: jax.Array, seq_length: int) -> jax.Array:
    return _constant_hazard_switches(rng, self.switch_probability, seq_length)

  def parameters_over_time(
    self, rng: jax.Array, switches: jax.Array
  ) -> jax.Array:
    rng_pool, rng_first, rng_steps = jax.random.split(rng, 3)
    pool = self._draw_parameters(rng_pool, self.pool_size)
    first = jax.random.randint(rng_first, (), 0, self.pool_size)
    # A switch goes 1 to m - 1 regimes further around the pool: to any other.
    steps = jax.random.randint(rng_steps, switches.shape, 1, self.pool_size)

    def follow(regime: jax.Array, step: jax.Array) -> tuple[jax.Array, ...]:
      regime = (regime + step) % self.pool_size
      return regime, regime

    _, regimes = jax.lax.scan(follow, first, jnp.where(switches, steps, 0))
    return pool[regimes]


class DriftGenerator(TrajectoryGenerator):
  """Probabilities that drift inside a segment, and jump at its end.

  A segment starts with a draw from the prior, and ends after any symbol with
  probability h. Inside of it, the logits of all symbols walk at random:

    log p_k(t + 1) = log p_k(t) + step_scale * normal_k(t),  then normalised

  With a scale of 0 it is a source of constant hazard. It has no tractable exact
  predictor: those of segments that stay are references.
  """

  default_kwargs = {'switch_probability': 0.02, 'step_scale': 0.2}

  def __init__(
    self, *args, switch_probability: float, step_scale: float, **kwargs
  ):
    """Initializes the source.

    Args:
      *args: As in TrajectoryGenerator.
      switch_probability: h, in [0, 1].
      step_scale: Standard deviation of a step of a logit.
      **kwargs: As in TrajectoryGenerator.

    Raises:
      ValueError: If an argument is out of range, or symbols are not categorical
        and have no logits.
    """
    super().__init__(*args, **kwargs)
    if not isinstance(self.iid_distribution, distributions.Categorical):
      raise ValueError(
        f'iid_distribution is {self.iid_distribution.name}; what drifts are '
        'the logits of categorical'
      )
    self.switch_probability = _check_probability(
      'switch_probability', switch_probability, allows_zero=True
    )
    base_config.check_float('step_scale', step_scale, 0)
    self.step_scale = float(step_scale)

  def _switch_points_one(self, rng: jax.Array, seq_length: int) -> jax.Array:
    return _constant_hazard_switches(rng, self.switch_probability, seq_length)

  def parameters_over_time(
    self, rng: jax.Array, switches: jax.Array
  ) -> jax.Array:
    rng_starts, rng_steps = jax.random.split(rng)
    starts = super().parameters_over_time(rng_starts, switches)
    steps = jax.random.normal(rng_steps, starts.shape, starts.dtype)
    walk = jnp.cumsum(self.step_scale * steps, axis=0)
    # From 0 at the first symbol of every segment.
    return jax.nn.softmax(jnp.log(starts) + walk - _at_starts(walk, switches))


class MixtureGenerator(TrajectoryGenerator):
  """Every sequence is of one of several sources, drawn by their weights.

  A predictor of it infers the source besides its switches. All sources have the
  same distributions of symbols and parameters.

  Attributes:
    sources: Sources of the mixture.
    weights: Probability of each.
  """

  default_kwargs = {
    'sources': (
      {'trajectory_generator': 'ptw', 'weight': 0.25},
      {'trajectory_generator': 'lin', 'weight': 0.25},
      {'trajectory_generator': 'static', 'weight': 0.25},
      {
        'trajectory_generator': 'random_shift',
        'trajectory_generator_kwargs': RandomShiftGenerator.default_kwargs,
        'weight': 0.25,
      },
    )
  }

  def __init__(self, *args, sources: Sequence[Mapping[str, Any]], **kwargs):
    """Initializes the source.

    Args:
      *args: As in TrajectoryGenerator.
      sources: One dict for each: its `trajectory_generator`, by name, its
        `trajectory_generator_kwargs` (none by default), and its `weight`, which
        may be left out of all where they are equal.
      **kwargs: As in TrajectoryGenerator.

    Raises:
      ValueError: If a source cannot be built, or the weights are not positive
        or do not sum to 1.
    """
    super().__init__(*args, **kwargs)
    if isinstance(sources, (str, Mapping)) or not isinstance(sources, Sequence):
      raise ValueError(f'sources is {sources!r}; it must be a tuple of dicts')
    if not sources:
      raise ValueError('sources is empty; a mixture has at least one')
    self.sources = tuple(
      self._build(f'sources[{index}]', source)
      for index, source in enumerate(sources)
    )
    weights = [source['weight'] for source in sources if 'weight' in source]
    if 0 < len(weights) < len(sources):
      raise ValueError(
        f'{len(weights)} of {len(sources)} sources have a weight; give one to '
        'all or to none'
      )
    self.weights = mixture_predictors.check_weights(
      'weight of sources', weights or None, len(sources)
    )

  def _build(self, path: str, source: Any) -> TrajectoryGenerator:
    """The source that a dict describes."""
    base_config.check_mapping(path, source)
    base_config.check_kwargs(path, source, _SOURCE_KEYS)
    if 'trajectory_generator' not in source:
      raise ValueError(f"{path} lacks 'trajectory_generator'")
    return build(
      source['trajectory_generator'],
      source.get('trajectory_generator_kwargs', {}),
      self.iid_distribution,
      self.parameter_distribution,
      self.parameter_distribution_params,
      path,
    )

  @property
  def reference_predictors(self) -> tuple[str, ...]:
    names = (source.reference_predictors for source in self.sources)
    return tuple(dict.fromkeys(itertools.chain(*names)))

  @property
  def depends_on_length(self) -> bool:
    return any(source.depends_on_length for source in self.sources)

  def check_seq_length(self, seq_length: int) -> None:
    super().check_seq_length(seq_length)
    for source in self.sources:
      source.check_seq_length(seq_length)

  def source_indices(self, rng: jax.Array, batch_size: int) -> jax.Array:
    """Returns which source each sequence of `sample` is of.

    Args:
      rng: Key of the batch, as in `sample`.
      batch_size: Number of sequences, B.

    Returns:
      Indices of `sources`, int32 `[B]`.
    """
    batch_size = base_config.check_int('batch_size', batch_size, 1)
    return _source_indices(self, jax.random.split(rng, batch_size))

  def _draw_source(self, rng: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The index of a source, and the key of its sequence."""
    rng_index, rng_sequence = jax.random.split(rng)
    weights = np.asarray(self.weights, jnp.result_type(float))
    index = jax.random.choice(rng_index, len(self.sources), p=weights)
    return index, rng_sequence

  def _switch_points_one(self, rng: jax.Array, seq_length: int) -> jax.Array:
    index, rng = self._draw_source(rng)
    return jax.lax.switch(
      index,
      [
        # As `_sample_one` of the source splits its key.
        lambda rng, s=source: s._switch_points_one(_split(rng)[0], seq_length)
        for source in self.sources
      ],
      rng,
    )

  def _sample_one(
    self, rng: jax.Array, seq_length: int
  ) -> tuple[jax.Array, jax.Array]:
    # From the key that `_switch_points_one` is given.
    index, rng = self._draw_source(_split(rng)[0])
    return jax.lax.switch(
      index,
      [
        lambda rng, s=source: s._sample_one(rng, seq_length)
        for source in self.sources
      ],
      rng,
    )

  def _bayes_predictor(
    self, seq_length: int, concentration: tuple[float, ...]
  ) -> predictors.OptimalPredictor | None:
    components = [source.bayes_predictor(seq_length) for source in self.sources]
    if None in components:
      return None
    return mixture_predictors.MixturePredictor(components, self.weights)


TRAJECTORY_GENERATORS = base_config.Registry(
  'trajectory_generator',
  {
    'static': StaticGenerator,
    'regular_shift': RegularShiftGenerator,
    'random_shift': RandomShiftGenerator,
    'ptw': PTWGenerator,
    'iid_ptw_cat': PTWGenerator,
    'lin': LINGenerator,
    'recurring': RecurringGenerator,
    'drift': DriftGenerator,
    'mixture': MixtureGenerator,
  },
)

# What describes a source of a mixture.
_SOURCE_KEYS = (
  'trajectory_generator',
  'trajectory_generator_kwargs',
  'weight',
)


def build(
  name: str,
  kwargs: Mapping[str, Any],
  iid_distribution: distributions.Distribution,
  parameter_distribution: distributions.Distribution,
  parameter_distribution_params: Sequence[float],
  path: str,
) -> TrajectoryGenerator:
  """Returns a source by its name.

  Args:
    name: A key of `TRAJECTORY_GENERATORS`.
    kwargs: Arguments of its constructor besides the distributions.
    iid_distribution: As in TrajectoryGenerator.
    parameter_distribution: As in TrajectoryGenerator.
    parameter_distribution_params: As in TrajectoryGenerator.
    path: Path of what has `trajectory_generator` and
      `trajectory_generator_kwargs`, for messages.

  Raises:
    ValueError: If the name is unknown or an argument is wrong.
  """
  generator = TRAJECTORY_GENERATORS.lookup(f'{path}.trajectory_generator', name)
  path = f'{path}.trajectory_generator_kwargs'
  base_config.check_mapping(path, kwargs)
  base_config.check_constructor(
    f'{path} of {name}',
    generator,
    kwargs,
    given=(
      'iid_distribution',
      'parameter_distribution',
      'parameter_distribution_params',
    ),
  )
  with base_config.naming(path):
    return generator(
      iid_distribution,
      parameter_distribution,
      parameter_distribution_params,
      **kwargs,
    )


# Compiled as a whole: op by op, in a notebook, the first batch takes seconds.
@functools.partial(jax.jit, static_argnums=(0, 2))
def _sample(
  generator: TrajectoryGenerator, keys: jax.Array, seq_length: int
) -> tuple[jax.Array, jax.Array]:
  return jax.vmap(lambda key: generator._sample_one(key, seq_length))(keys)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _switch_points(
  generator: TrajectoryGenerator, keys: jax.Array, seq_length: int
) -> jax.Array:
  return jax.vmap(
    lambda key: generator._switch_points_one(_split(key)[0], seq_length)
  )(keys)


@functools.partial(jax.jit, static_argnums=0)
def _source_indices(generator: MixtureGenerator, keys: jax.Array) -> jax.Array:
  draw = lambda key: generator._draw_source(_split(key)[0])[0]
  return jax.vmap(draw)(keys)


def _check_probability(
  field: str, value: Any, allows_zero: bool = False
) -> float:
  """Returns a probability of a switch as a float, or raises ValueError."""
  is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
  if not is_number or not 0 <= value <= 1 or (value == 0 and not allows_zero):
    raise ValueError(
      f'{field} is {value!r}; it must be in {"[" if allows_zero else "("}0, 1]'
    )
  return float(value)  # JAX takes no 1.


def _constant_hazard_switches(
  rng: jax.Array, probability: float, seq_length: int
) -> jax.Array:
  """Switching points where a segment ends after any symbol alike, `[T]`."""
  ends = jax.random.bernoulli(rng, probability, (seq_length - 1,))
  return jnp.concatenate([jnp.zeros(1, bool), ends])


def _at_starts(values: jax.Array, switches: jax.Array) -> jax.Array:
  """Of values `[T, ...]`, at every t that at the start of t's segment."""
  starts = jnp.where(switches, jnp.arange(len(switches)), 0)
  return values[jax.lax.cummax(starts)]


def _split(rng: jax.Array) -> jax.Array:
  """The keys of one sequence: switching points, parameters, symbols."""
  return jax.random.split(rng, 3)
