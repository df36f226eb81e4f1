"""A run as Python sees it: its config, network, parameters and history.

Axes: M members, one network for each seed in `train.model_init_seed`.
"""

import dataclasses
import pathlib
from typing import Any

import jax

from nonstationary_mbml import base_config
from nonstationary_mbml import base_constants
from nonstationary_mbml import predictors


def member_seeds(config: base_config.TrainConfig) -> tuple[int, ...]:
  """Returns the seed of every member."""
  seeds = config.model_init_seed
  return seeds if isinstance(seeds, tuple) else (seeds,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """A run, as it was after one of its steps: just trained, or loaded.

  Attributes:
    config: Config of the training.
    predictor: The network.
    all_params: Parameters of all M members, with a leading axis of them.
    all_ema_params: Averages of them over the steps, likewise; None without
      `train.ema_decay`.
    step: Training steps that the parameters have seen.
    history: One dict per log: `step`; `loss` (nats per symbol) and `grad_norm`
      (before clipping), means since the last log; `param_norm`; and the
      evaluator's metrics, those of the averaged parameters under `ema/<name>`.
      If `model_init_seed` is a tuple, means over the
      members, and under `seeds_stderr/<name>` their standard errors.
    member_histories: Histories of the members, as they would be alone, dropout
      masks aside; () if `model_init_seed` is an int.
    evaluator: Evaluator of the training; None if the run was loaded.
    folder: Folder of the run; None if nothing was kept.
  """

  config: base_config.ExperimentConfig
  predictor: predictors.Predictor
  all_params: predictors.Params
  all_ema_params: predictors.Params | None = None
  step: int
  history: list[dict[str, float]] = dataclasses.field(default_factory=list)
  member_histories: tuple[list[dict[str, float]], ...] = ()
  evaluator: base_constants.Evaluator | None = None
  folder: pathlib.Path | None = None

  @property
  def seeds(self) -> tuple[int, ...]:
    """The seed of every member."""
    return member_seeds(self.config.train)

  @property
  def params(self) -> predictors.Params:
    """Parameters of the only member. Raises ValueError if there are several."""
    if len(self.seeds) > 1:
      raise ValueError(
        f'the run has no params of one network, but of {len(self.seeds)} '
        f'(train.model_init_seed {self.seeds}): take run.member(i)'
      )
    return self.member(0)

  def member(self, index: int) -> predictors.Params:
    """Returns the parameters of one member, 0 <= index < M."""
    return take(self.all_params, self._checked(index))

  def ema_member(self, index: int) -> predictors.Params:
    """Returns the averaged parameters of one member, 0 <= index < M.

    Raises:
      ValueError: If the run has no averages.
    """
    if self.all_ema_params is None:
      raise ValueError('the run has no averages: its train.ema_decay is None')
    return take(self.all_ema_params, self._checked(index))

  def _checked(self, index: int) -> int:
    return base_config.check_int('member', index, 0, len(self.seeds) - 1)


@jax.jit
def take(tree: Any, index: jax.Array | int) -> Any:
  """Returns the item of every array at an index of its leading axis."""
  return jax.tree.map(lambda array: array[index], tree)
