"""Optimisers and learning-rate schedules of training, by name.

  optimizer = make_optimizer(config.train, config.schedule.training_steps)

Both registries can be added to; a config then names what was added. A schedule
is a factor of `train.learning_rate`, its peak, for every step n = 1, 2, ..., N.
All of them begin with `train.warmup_steps` W in which it grows as n / W; where
it is None, those called warmup_... have N / 20 and others 0.

  constant             1
  warmup_cosine        (1 + cos(pi u)) / 2,  u = (n - W) / (N - W + 1)
  warmup_linear        1 - u
  warmup_stable_decay  1, and over the last fifth of all steps to 0 as
                       1 - sqrt(u'), u' the share of them that is past (Haegele
                       et al., 2024)

None is 0 in a step that is done.

With `train.ema_decay`, the state of the optimiser has an average of the
parameters (`averaging`), which changes nothing about training.
"""

from collections.abc import Callable
import functools
import inspect
import math
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nonstationary_mbml import base_config

# Share of the steps in which the learning rate grows, by default.
_WARMUP_SHARE = 0.05
# Share of the steps in which `warmup_stable_decay` decays.
_DECAY_SHARE = 0.2


@functools.wraps(optax.contrib.muon, assigned=())
def muon(*args: Any, **kwargs: Any) -> optax.GradientTransformation:
  """Optax's Muon, whose Newton-Schulz iterations are a loop.

  With a row of `ns_coeffs` for every iteration, they compile once for every
  matrix; with one row, Optax unrolls them. The state has the one row.
  """
  optimizer = optax.contrib.muon(*args, **kwargs)
  given = inspect.signature(optax.contrib.muon).bind(*args, **kwargs)
  given.apply_defaults()
  coeffs, steps = given.arguments['ns_coeffs'], given.arguments['ns_steps']
  if np.shape(coeffs) != (3,) or steps < 1:
    return optimizer
  given.arguments['ns_coeffs'] = (tuple(coeffs),) * steps
  looped = optax.contrib.muon(*given.args, **given.kwargs)

  def with_coeffs(state: Any, change: Callable[[jax.Array], jax.Array]) -> Any:
    is_muon = lambda node: isinstance(node, optax.contrib.MuonState)
    return jax.tree.map(
      lambda node: (
        node._replace(ns_coeffs=change(node.ns_coeffs))
        if is_muon(node)
        else node
      ),
      state,
      is_leaf=is_muon,
    )

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    rows = with_coeffs(state, lambda row: jnp.tile(row, (steps, 1)))
    updates, rows = looped.update(updates, rows, params)
    return updates, with_coeffs(rows, lambda rows: rows[0])

  return optax.GradientTransformation(optimizer.init, update)


# A factory takes the learning rate (a number, or a function of the number of
# steps before), and `train.optimizer_kwargs`.
OPTIMIZERS = base_config.Registry(
  'optimizer',
  {
    'adam': optax.adam,
    'adamw': optax.adamw,
    'lion': optax.lion,
    'muon': muon,
    'sgd': optax.sgd,
  },
)

# Factor of step n, given n, N and W; n > W.
Schedule = Callable[[jax.Array, int, int], jax.Array]


def constant(step: jax.Array, num_steps: int, warmup_steps: int) -> jax.Array:
  """Returns 1."""
  del num_steps, warmup_steps
  return jnp.ones_like(step)


def warmup_cosine(
  step: jax.Array, num_steps: int, warmup_steps: int
) -> jax.Array:
  """Returns half a period of a cosine, from 1 to 0."""
  past = (step - warmup_steps) / (num_steps - warmup_steps + 1)
  return (1 + jnp.cos(jnp.pi * past)) / 2


def warmup_linear(
  step: jax.Array, num_steps: int, warmup_steps: int
) -> jax.Array:
  """Returns a straight line from 1 to 0."""
  return 1 - (step - warmup_steps) / (num_steps - warmup_steps + 1)


def warmup_stable_decay(
  step: jax.Array, num_steps: int, warmup_steps: int
) -> jax.Array:
  """Returns 1, and in the last fifth of the steps a decay to 0."""
  stable = stable_steps(num_steps, warmup_steps)
  past = (step - stable) / (num_steps - stable + 1)
  return 1 - jnp.sqrt(jnp.maximum(past, 0))


def stable_steps(num_steps: int, warmup_steps: int) -> int:
  """Returns the last step before `warmup_stable_decay` decays."""
  return max(warmup_steps, num_steps - math.ceil(_DECAY_SHARE * num_steps))


SCHEDULES = base_config.Registry(
  'schedule',
  {
    'constant': constant,
    'warmup_cosine': warmup_cosine,
    'warmup_linear': warmup_linear,
    'warmup_stable_decay': warmup_stable_decay,
  },
)


def learning_rate(
  config: base_config.TrainConfig, num_steps: int
) -> float | optax.Schedule:
  """Returns the learning rate: a number, or a function of the steps before.

  Args:
    config: Config of the training.
    num_steps: Training steps, N.

  Raises:
    ValueError: If the schedule is unknown, or warmup is longer than training.
  """
  schedule = SCHEDULES.lookup('train.schedule', config.schedule)
  warmup = config.warmup_steps
  if warmup is None:
    has_warmup = config.schedule.lower().startswith('warmup_')
    warmup = int(_WARMUP_SHARE * num_steps) if has_warmup else 0
  if warmup > num_steps:
    raise ValueError(
      f'train.warmup_steps is {warmup}, more than the {num_steps} steps of '
      'schedule.training_steps'
    )
  if schedule is constant and not warmup:
    return config.learning_rate

  def rate(count: jax.Array) -> jax.Array:
    step = jnp.asarray(count, jnp.float32) + 1
    factor = schedule(step, num_steps, warmup)
    if warmup:
      factor = jnp.where(step <= warmup, step / warmup, factor)
    return config.learning_rate * factor

  return rate


def check_more_steps(
  config: base_config.TrainConfig,
  num_steps: int,
  more_steps: int,
  num_done: int,
) -> None:
  """Raises ValueError unless a run can be given more steps.

  It can while a training of more steps would have done the same ones so far:
  with a constant learning rate always, and else while it is in the part of the
  schedule, such as warmup, that does not depend on N.

  Args:
    config: Config of the training.
    num_steps: Steps that the run was to have, N.
    more_steps: Steps that it shall have.
    num_done: Steps that it has done.
  """
  rates = [learning_rate(config, total) for total in (num_steps, more_steps)]
  if not callable(rates[0]):
    return
  before, after = (np.asarray(rate(np.arange(num_done))) for rate in rates)
  is_other = before != after
  if is_other.any():
    raise ValueError(
      f'train.schedule {config.schedule!r} knows its length, and with '
      f'schedule.training_steps {more_steps} instead of {num_steps} the '
      f'learning rate would have been another one after step '
      f'{is_other.argmax()}, but {num_done} are done'
    )


def make_optimizer(
  config: base_config.TrainConfig, num_steps: int
) -> optax.GradientTransformation:
  """Returns the optimiser that is configured, with clipping and averaging.

  Args:
    config: Config of the training.
    num_steps: Training steps, N.

  Raises:
    ValueError: If a name is unknown or an argument wrong.
  """
  factory = OPTIMIZERS.lookup('train.optimizer', config.optimizer)
  path = f'train.optimizer_kwargs of {config.optimizer}'
  base_config.check_constructor(
    path, factory, config.optimizer_kwargs, given=('learning_rate',)
  )
  for name, parameter in inspect.signature(factory).parameters.items():
    kind = type(parameter.default)
    if name in config.optimizer_kwargs and kind in (bool, int, float, str):
      base_config.coerce(f'{path}: {name}', config.optimizer_kwargs[name], kind)
  rate = learning_rate(config, num_steps)
  with base_config.naming(path):
    try:
      optimizer = factory(rate, **config.optimizer_kwargs)
      jax.eval_shape(lambda: _first_update(optimizer))
    except TypeError as error:
      raise ValueError(str(error)) from error
  if config.clip_grad_norm is not None:
    clip = optax.clip_by_global_norm(config.clip_grad_norm)
    optimizer = optax.chain(clip, optimizer)
  if config.ema_decay is not None:
    optimizer = averaging(optimizer, config.ema_decay)
  return optimizer


def _first_update(optimizer: optax.GradientTransformation) -> optax.Updates:
  """An update of a matrix and a vector, to be traced: it uses all arguments."""
  params = {'matrix': jnp.zeros((2, 2)), 'vector': jnp.zeros(2)}
  return optimizer.update(params, optimizer.init(params), params)


class AveragingState(NamedTuple):
  """State of an optimiser that averages the parameters.

  Attributes:
    optimizer: State of the optimiser itself.
    num_steps: Steps in the average, n; int32.
    average: The average a_n; before the first step, the initial parameters.
  """

  optimizer: optax.OptState
  num_steps: jax.Array
  average: optax.Params


def averaging(
  optimizer: optax.GradientTransformation, decay: float
) -> optax.GradientTransformation:
  """Returns an optimiser with an average of the parameters in its state.

  The parameters p_k after step k have weights in proportion to d^(n - k), k =
  1, ..., n, as in the bias-corrected moments of Adam (Kingma & Ba, 2015); the
  initial parameters have none:

    a_n = a_{n-1} + (1 - d) / (1 - d^n) (p_n - a_{n-1})

  Args:
    optimizer: The optimiser, whose updates stay as they are.
    decay: Decay d of the weights, in (0, 1).
  """

  def init(params: optax.Params) -> AveragingState:
    return AveragingState(optimizer.init(params), jnp.int32(0), params)

  def update(
    updates: optax.Updates, state: AveragingState, params: optax.Params
  ) -> tuple[optax.Updates, AveragingState]:
    updates, inner = optimizer.update(updates, state.optimizer, params)
    num_steps = state.num_steps + 1
    # 1 - d^n, to full precision even if d is near 1.
    weights = -jnp.expm1(num_steps * math.log(decay))
    rate = (1 - decay) / weights
    average = jax.tree.map(
      lambda old, new: old + rate.astype(old.dtype) * (new - old),
      state.average,
      optax.apply_updates(params, updates),
    )
    return updates, AveragingState(inner, num_steps, average)

  return optax.GradientTransformation(init, update)


def average(opt_state: Any) -> optax.Params | None:
  """Returns the average in the state of an optimiser, if there is one."""
  is_averaging = isinstance(opt_state, AveragingState)
  return opt_state.average if is_averaging else None
