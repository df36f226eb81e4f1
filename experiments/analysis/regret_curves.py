"""Regrets of a trained run on fresh sequences, for figures.

  run = saved_runs.load_run('runs/lstm_ptw_seed0')
  over_time(run)            # {'LSTM': [N, T - 1], 'PTW': ..., 'LAD': ...}
  by_length(run)            # {'LSTM': {8: [N], 16: [N], ...}, 'PTW': ...}
  by_source(run)            # {'ptw': {'LSTM': [N], 'PTW': [N], ...}, ...}
  plotting.plot_sequence(*sequence(run))

The network comes first, then the exact predictors of the source. Runs that are
evaluated on the same source, with the same seed and batch size, read the same
sequences. Of an ensemble it is the first member. Regrets are in nats.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses

import jax
import numpy as np

from nonstationary_mbml import base_config
from nonstationary_mbml import predictor_factories
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments import evaluator as evaluator_lib
from nonstationary_mbml.experiments import saved_runs
from nonstationary_mbml.runtime import trained_run

NUM_SEQUENCES = 4096
# Sequence lengths, in lengths of training.
_LENGTH_FACTORS = (0.25, 0.5, 1, 2, 4)
# Another name of the PTW source.
_ALIASES = ('iid_ptw_cat',)


def labels(
  run: trained_run.Run, evaluator: evaluator_lib.MetaLearningEvaluator
) -> dict[str, str]:
  """Returns the labels of predictors in figures, by name in the evaluator."""
  network = predictor_factories.label(run.config.model)
  if len(run.seeds) > 1:
    network += f', 1 of {len(run.seeds)} seeds'
  labels = constants.labels(evaluator.optimal_predictors)
  return {evaluator_lib.NETWORK: network} | labels


def over_time(
  run: trained_run.Run,
  num_sequences: int = NUM_SEQUENCES,
  seed: int = 0,
  use_tqdm: bool = False,
) -> dict[str, np.ndarray]:
  """Returns the regret of every symbol, on the run's own source.

  Args:
    run: The run.
    num_sequences: N.
    seed: Seed of the sequences.
    use_tqdm: Show a progress bar.

  Returns:
    Regret of symbols 2, ..., T of every sequence `[N, T - 1]`, by label.
  """
  evaluator = saved_runs.evaluator_of(run)
  regrets = evaluator.regrets_over_time(
    run.member(0), _key(seed), num_sequences, use_tqdm
  )
  return _by_label(run, evaluator, regrets)


def by_length(
  run: trained_run.Run,
  lengths: Sequence[int] | None = None,
  num_sequences: int = NUM_SEQUENCES,
  seed: int = 0,
  use_tqdm: bool = False,
) -> dict[str, dict[int, np.ndarray]]:
  """Returns cumulative regrets on sequences of several lengths.

  Args:
    run: The run.
    lengths: T of the sequences; None is a quarter, a half, once, twice and four
      times the length of training.
    num_sequences: N, of every length.
    seed: Seed of the sequences.
    use_tqdm: Show a progress bar for every length.

  Returns:
    Cumulative regret of every sequence `[N]`, by label and length.

  Raises:
    ValueError: If a length is below 2.
  """
  if lengths is None:
    trained = run.config.train.seq_length
    lengths = [max(2, round(trained * factor)) for factor in _LENGTH_FACTORS]
  for length in lengths:
    base_config.check_int('lengths', length, 2)
  regrets = {}
  for length in sorted(set(lengths)):
    evaluator = saved_runs.evaluator_of(run, seq_length=length)
    of_length = evaluator.evaluate(
      run.member(0), _key(seed), num_sequences, use_tqdm
    )
    for label, values in _by_label(run, evaluator, of_length).items():
      regrets.setdefault(label, {})[length] = values
  return regrets


def by_source(
  run: trained_run.Run,
  sources: Mapping[str, config_lib.DataConfig] | None = None,
  num_sequences: int = NUM_SEQUENCES,
  seed: int = 0,
  use_tqdm: bool = False,
) -> dict[str, dict[str, np.ndarray]]:
  """Returns cumulative regrets on several sources.

  Args:
    run: The run.
    sources: Sources by name; None is `default_sources`.
    num_sequences: N, of every source.
    seed: Seed of the sequences.
    use_tqdm: Show a progress bar for every source.

  Returns:
    Cumulative regret of every sequence `[N]`, by source and label. Sources
    differ in their exact predictors.
  """
  regrets = {}
  if sources is None:
    sources = default_sources(run)
  for name, source in sources.items():
    evaluator = saved_runs.evaluator_of(run, source=source)
    of_source = evaluator.evaluate(
      run.member(0), _key(seed), num_sequences, use_tqdm
    )
    regrets[name] = _by_label(run, evaluator, of_source)
  return regrets


def sequence(
  run: trained_run.Run, seed: int = 0
) -> evaluator_lib.DrawnSequence:
  """Returns a sequence of the run's own source, to be drawn.

  Args:
    run: The run.
    seed: Seed of the sequence.

  Returns:
    The sequence with probabilities and regrets by label, of the predictors that
    `constants.in_figures` chooses.
  """
  evaluator = saved_runs.evaluator_of(run)
  drawn = evaluator_lib.draw_sequence(evaluator, run.member(0), _key(seed))
  exact = constants.exact_predictor(
    evaluator.generator, evaluator.optimal_predictors, evaluator.seq_length
  )
  shown = constants.in_figures(labels(run, evaluator), exact)
  by_label = lambda values: {
    label: values[name] for name, label in shown.items()
  }
  return drawn._replace(
    probabilities=by_label(drawn.probabilities),
    regrets=by_label(drawn.regrets),
  )


def default_sources(run: trained_run.Run) -> dict[str, config_lib.DataConfig]:
  """Returns all sources with the symbols of the run's own, by name.

  The own one comes first, as the run has it; the others switch as
  `default_kwargs` of their classes say.
  """
  own = run.config.resolved().eval.data
  sources = {own.trajectory_generator: own}
  for name in constants.TRAJECTORY_GENERATORS:
    if name not in (*sources, *_ALIASES):
      sources[name] = dataclasses.replace(
        own,
        trajectory_generator=name,
        trajectory_generator_kwargs=constants.source_kwargs(name),
      )
  return sources


def _key(seed: int) -> jax.Array:
  return jax.random.key(base_config.check_seed('seed', seed))


def _by_label(
  run: trained_run.Run,
  evaluator: evaluator_lib.MetaLearningEvaluator,
  regrets: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
  return {
    label: regrets[name] for name, label in labels(run, evaluator).items()
  }
