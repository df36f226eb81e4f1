"""The trained networks of a sweep, and their predictions and states.

  for network in networks('runs/sweeps/small'):
    logits = predict(network, batch)  # [M, B, T, K]

Axes: M seeds of a network, N sequences, B of them at a time, T time, K alphabet
size.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import pathlib
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nonstationary_mbml import predictors
from nonstationary_mbml import train
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments import evaluator as evaluator_lib
from nonstationary_mbml.experiments import saved_runs
from nonstationary_mbml.experiments import trajectory_generators
from nonstationary_mbml.experiments.sweeps import sweep_folder
from nonstationary_mbml.runtime import run_folder
from nonstationary_mbml.runtime import trained_run

# Settings that a sweep must have, by name.
_SOURCE, _ARCHITECTURE = 'data', 'model'
# Symbols that a network reads at a time.
_SYMBOLS_PER_BATCH = 2**15
# KT is the exact predictor of a source that never switches.
STATIC = 'static'


class Network(NamedTuple):
  """A point of a sweep that is finished.

  Attributes:
    source: Name of the source it was trained on.
    architecture: Name of its architecture.
    folder: Folder of its run.
    config: Config of its run, complete.
    table: Rows of its table.json.
    seeds: Seeds of the members of the ensemble.
  """

  source: str
  architecture: str
  folder: pathlib.Path
  config: config_lib.ExperimentConfig
  table: list[dict[str, Any]]
  seeds: tuple[int, ...]


def networks(folder: str | pathlib.Path) -> list[Network]:
  """Returns the finished networks of a sweep, one per source and architecture.

  Where a sweep has several of them, as with several learning rates, it is the
  one of the least regret in the last evaluation of training, whose sequences
  are not those of any table.

  Args:
    folder: Folder of the sweep, which sets `data` and `model` by name.

  Raises:
    ValueError: If it is no sweep, sets something else, or has seeds as points
      of their own.
  """
  of_sweep = sweep_folder.SweepFolder(folder)
  best = {}
  for point in of_sweep.finished():
    settings = point.settings
    if not isinstance(settings.get(_SOURCE), str) or not isinstance(
      settings.get(_ARCHITECTURE), str
    ):
      raise ValueError(
        f'{folder} is swept over {", ".join(settings)}; what can be compared '
        f'are named values of {_SOURCE} and {_ARCHITECTURE}'
      )
    for path in sweep_folder.SEED_PATHS:
      if path in settings:
        raise ValueError(
          f'{folder} is swept over {path}; what is compared has all seeds in '
          'one point, as a tuple in train.model_init_seed'
        )
    path = of_sweep.run_path(point.name)
    config = saved_runs.load_config(path)
    network = Network(
      settings[_SOURCE],
      settings[_ARCHITECTURE],
      path,
      config,
      of_sweep.table(point.name),
      trained_run.member_seeds(config.train),
    )
    key = network.source, network.architecture
    if key not in best or _validation(network) < _validation(best[key]):
      best[key] = network
  return list(best.values())


def _validation(network: Network) -> float:
  entries, _ = run_folder.read_metrics(network.folder / run_folder.METRICS)
  return entries[-1]['cumulative_regret'] if entries else np.inf


def sources(
  of_networks: Sequence[Network],
) -> dict[str, config_lib.DataConfig]:
  """Returns the sources that networks were trained on, by name."""
  by_name = {}
  for network in of_networks:
    by_name.setdefault(network.source, network.config.data)
  return by_name


class Sequences(NamedTuple):
  """Sequences of a source, with the predictions of exact predictors.

  Attributes:
    symbols: `[N, T, K]`.
    parameters: True probabilities `[N, T, K]`.
    switches: bool `[N, T]`, True where a new segment starts.
    log_probs: Log probabilities of exact predictors, `[N, T, K]`, by name.
  """

  symbols: np.ndarray
  parameters: np.ndarray
  switches: np.ndarray
  log_probs: dict[str, np.ndarray]


def exact_predictors(
  of_sources: Mapping[str, config_lib.DataConfig], seq_length: int
) -> dict[str, predictors.OptimalPredictor]:
  """Returns the Bayes predictor of every source by its name, and KT.

  Args:
    of_sources: Configs of the sources by name.
    seq_length: T.

  Raises:
    ValueError: If their priors differ, or are no Dirichlet: KT has but one.
  """
  priors = {
    (source.parameter_distribution, source.parameter_distribution_params)
    for source in of_sources.values()
  }
  if len(priors) != 1 or next(iter(priors))[0] != 'dirichlet':
    raise ValueError(
      'the sources have the priors '
      f'{", ".join(map(str, sorted(priors)))}; what is compared has one, and a '
      'Dirichlet'
    )
  exact = {}
  for name, source in of_sources.items():
    generator = constants.build_data_generator(source)
    own = generator.bayes_predictor(seq_length)
    if own is not None:
      exact[name] = own
  prior = generator.parameter_distribution_params
  exact[STATIC] = predictors.OptimalCategoricalPredictor(prior)
  return exact


def sample(
  source: config_lib.DataConfig,
  exact: Mapping[str, predictors.OptimalPredictor],
  seq_length: int,
  num_sequences: int,
  rng: jax.Array,
) -> Sequences:
  """Returns fresh sequences, with the predictions of exact predictors.

  Args:
    source: Source of the sequences.
    exact: Exact predictors, by name.
    seq_length: T.
    num_sequences: N.
    rng: Key of the sequences.
  """
  generator = constants.build_data_generator(source)
  batch_size = _batch_size(seq_length, num_sequences)
  draw = _drawer(generator, tuple(exact.items()), batch_size, seq_length)
  keys = jax.random.split(rng, -(-num_sequences // batch_size))
  drawn = [jax.device_get(draw(key)) for key in keys]
  joined = jax.tree.map(lambda *x: np.concatenate(x)[:num_sequences], *drawn)
  # In the order given, which JAX does not keep.
  return joined._replace(
    log_probs={name: joined.log_probs[name] for name in exact}
  )


def _drawer(
  generator: trajectory_generators.TrajectoryGenerator,
  exact: tuple[tuple[str, predictors.OptimalPredictor], ...],
  batch_size: int,
  seq_length: int,
) -> Callable[[jax.Array], Sequences]:
  @jax.jit
  def draw(rng: jax.Array) -> Sequences:
    batch, parameters = generator.sample(rng, batch_size, seq_length)
    return Sequences(
      batch,
      parameters,
      generator.switch_points(rng, batch_size, seq_length),
      {name: p.unroll({}, None, batch)[0] for name, p in exact},
    )

  return draw


def predict(network: Network, symbols: np.ndarray) -> np.ndarray:
  """Returns the log-probabilities that all members predict, `[M, N, T, K]`.

  Args:
    network: Network of a sweep, as from `networks`.
    symbols: One-hot `[N, T, K]`.
  """
  run = saved_runs.load_run(network.folder)

  def log_probs(params: predictors.Params, batch: jax.Array) -> jax.Array:
    logits, _ = run.predictor.unroll(params, None, batch)
    return jax.nn.log_softmax(logits)

  return _by_member(log_probs, run, symbols)


def read_states(
  network: Network, symbols: np.ndarray, untrained: bool = False
) -> np.ndarray:
  """Returns all that a network keeps after every symbol, `[M, N, T, D]`.

  For a recurrent network it is the state; for one without a state, the input
  of its last linear layer.

  Args:
    network: Network of a sweep, as from `networks`.
    symbols: One-hot `[N, T, K]`.
    untrained: Whether to take the parameters from before training, which are
      those of the same seeds.
  """
  run = saved_runs.load_run(network.folder)
  if untrained:
    run = untrained_run(run)

  def states(params: predictors.Params, batch: jax.Array) -> jax.Array:
    if not run.predictor.has_state:
      return run.predictor.unroll_features(params, None, batch)
    state = run.predictor.unroll_states(params, None, batch)
    return jnp.concatenate(
      [leaf.reshape(*batch.shape[:2], -1) for leaf in jax.tree.leaves(state)],
      axis=-1,
    )

  return _by_member(states, run, symbols)


def untrained_run(run: trained_run.Run) -> trained_run.Run:
  """Returns a run with the parameters it started from."""
  alphabet_size = constants.build_data_generator(run.config.data).alphabet_size
  state = train.init_state(
    run.config, run.predictor, alphabet_size, jax.local_devices()[:1]
  )
  return dataclasses.replace(run, all_params=state.params, step=0)


def _by_member(
  function: Callable[[predictors.Params, jax.Array], jax.Array],
  run: trained_run.Run,
  symbols: np.ndarray,
) -> np.ndarray:
  """A function of all sequences, for every member, `[M, N, ...]`."""
  num_sequences, seq_length, _ = symbols.shape
  batch_size = _batch_size(seq_length, num_sequences)
  compiled = jax.jit(function)
  batches = [
    symbols[begin : begin + batch_size]
    for begin in range(0, num_sequences, batch_size)
  ]
  # The last one as large as the others, so that nothing is compiled for it.
  missing = batch_size - len(batches[-1])
  batches[-1] = np.concatenate([batches[-1], symbols[:missing]])
  members = []
  for member in range(len(run.seeds)):
    params = run.member(member)
    outputs = [np.asarray(compiled(params, batch)) for batch in batches]
    members.append(np.concatenate(outputs)[:num_sequences])
  return np.stack(members)


def _batch_size(seq_length: int, num_sequences: int) -> int:
  return min(num_sequences, max(1, _SYMBOLS_PER_BATCH // seq_length))


def regret(log_probs: np.ndarray, parameters: np.ndarray) -> np.ndarray:
  """Returns the regret of predicting symbols 2, ..., T, `[..., T - 1]`.

  Args:
    log_probs: `[..., N, T, K]`.
    parameters: True probabilities `[N, T, K]`.
  """
  flat = log_probs.reshape(-1, *log_probs.shape[-3:])
  regrets = [np.asarray(_instantaneous_regret(one, parameters)) for one in flat]
  return np.stack(regrets).reshape(*log_probs.shape[:-3], *regrets[0].shape)


_instantaneous_regret = jax.jit(evaluator_lib.instantaneous_regret)


def divergence(log_probs: np.ndarray, others: np.ndarray) -> np.ndarray:
  """Returns KL(p || q) in nats, of predictions of symbols 2, ..., T.

    sum_k p_k (log p_k - log q_k)

  Args:
    log_probs: log p, `[N, T, K]`.
    others: log q, `[..., N, T, K]`.

  Returns:
    `[..., N, T - 1]`.
  """
  log_probs = log_probs[:, :-1].astype(np.float64)
  gaps = log_probs - others[..., :-1, :]
  return np.sum(np.exp(log_probs) * gaps, axis=-1)
