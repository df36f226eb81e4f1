"""The protocols of an experiment, against which training is written.

Axes: B batch, T time, F features of a symbol, P parameters of its distribution,
K alphabet size.
"""

from collections.abc import Mapping
from typing import Any
from typing import Protocol

import jax

from nonstationary_mbml import base_config
from nonstationary_mbml import predictors


class DataGenerator(Protocol):
  """A source of sequences, from which batches are drawn."""

  @property
  def alphabet_size(self) -> int:
    """K. Raises ValueError if the symbols are not categorical."""
    ...

  def sample(
    self, rng: jax.Array, batch_size: int, seq_length: int
  ) -> tuple[jax.Array, jax.Array]:
    """Returns a batch `[B, T, F]` and its true parameters `[B, T, P]`."""
    ...

  def sample_from_keys(
    self, keys: jax.Array, seq_length: int
  ) -> tuple[jax.Array, jax.Array]:
    """Returns one sequence for each of B keys, as `sample` does.

    `sample(rng, B, T)` is `sample_from_keys(jax.random.split(rng, B), T)`, so a
    device can draw its own share of a batch.
    """
    ...


class Evaluator(Protocol):
  """Measures how well a predictor predicts."""

  @property
  def alphabet_size(self) -> int:
    """K of the sequences it is measured on."""
    ...

  def step(
    self, predictor_params: Any, predictor_state: Any, rng: jax.Array
  ) -> Mapping[str, jax.Array]:
    """Returns metrics over one batch of fresh sequences.

    Every process of a distributed run calls it, with whole parameters on its
    first device.

    Args:
      predictor_params: Parameters of the predictor that the evaluator was built
        with. Training overwrites them after the call: to keep them, copy them.
      predictor_state: State to start from; None is the predictor's initial
        state.
      rng: Key of the batch.
    """
    ...


class DataGeneratorBuilder(Protocol):
  """Builds the source that an experiment's data config describes."""

  def __call__(self, config: base_config.Config) -> DataGenerator: ...


class EvaluatorBuilder(Protocol):
  """Builds an evaluator of a predictor from an evaluation config."""

  def __call__(
    self, predictor: predictors.Predictor, config: base_config.EvalConfig
  ) -> Evaluator: ...
