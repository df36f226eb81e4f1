"""The trained networks of a sweep, and their predictions and states.

  for network in networks('runs/sweeps/small'):
    log_probs = predict(network, symbols)  # [M, N, T, K]

Axes: M seeds of a network, N sequences, T time, K alphabet size, D numbers in a
state.
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
from nonstationary_mbml import train_state
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments import evaluator as evaluator_lib
from nonstationary_mbml.experiments import saved_runs
from nonstationary_mbml.experiments.sweeps import sweep_folder
from nonstationary_mbml.runtime import run_folder
from nonstationary_mbml.runtime import trained_run

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
    config: Config of its run, resolved.
    table: Rows of its table.json.
    seeds: Seeds of the members of the ensemble.
  """

  source: str
  architecture: str
  folder: pathlib.Path
  config: config_lib.ExperimentConfig
  table: list[dict[str, Any]]
  seeds: tuple[int, ...]


def networks(
  folder: str | pathlib.Path, imports: Sequence[str] | None = None
) -> list[Network]:
  """Returns the finished networks of a sweep, one per source and architecture.

  Where a sweep has several of them, as with several learning rates, it is the
  one of the least regret in the last evaluation of training, whose sequences
  are not those of any table.

  Args:
    folder: Folder of the sweep, which sets `data` and `model` by name.
    imports: Modules to import, as in `saved_runs.load_run`.

  Raises:
    ValueError: If it is no sweep, sets something else, or has seeds as points
      of their own.
  """
  sweep = sweep_folder.SweepFolder(folder)
  best = {}
  for point in sweep.finished():
    _check_settings(folder, point.settings)
    path = sweep.run_path(point.name)
    config = saved_runs.load_config(path, imports).resolved()
    network = Network(
      source=point.settings['data'],
      architecture=point.settings['model'],
      folder=path,
      config=config,
      table=sweep.table(point.name),
      seeds=trained_run.member_seeds(config.train),
    )
    key = network.source, network.architecture
    if key not in best or _last_regret(network) < _last_regret(best[key]):
      best[key] = network
  return list(best.values())


def _check_settings(
  folder: str | pathlib.Path, settings: Mapping[str, Any]
) -> None:
  """Raises ValueError if points with such settings cannot be compared."""
  if not all(isinstance(settings.get(name), str) for name in ('data', 'model')):
    raise ValueError(
      f'{folder} is swept over {", ".join(settings)}; what can be compared are '
      'named values of data and model'
    )
  for path in sweep_folder.SEED_PATHS:
    if path in settings:
      raise ValueError(
        f'{folder} is swept over {path}; what is compared has all seeds in one '
        'point, as a tuple in train.model_init_seed'
      )


def _last_regret(network: Network) -> float:
  """Regret in the last evaluation of training."""
  entries, _ = run_folder.read_metrics(network.folder / run_folder.METRICS)
  return entries[-1]['cumulative_regret'] if entries else np.inf


def sources(trained: Sequence[Network]) -> dict[str, config_lib.DataConfig]:
  """Returns the sources that networks were trained on, by name."""
  by_name = {}
  for network in trained:
    by_name.setdefault(network.source, network.config.data)
  return by_name


class Sequences(NamedTuple):
  """Sequences of a source, with the predictions of exact predictors.

  Attributes:
    symbols: One-hot symbols `[N, T, K]`.
    parameters: True probabilities `[N, T, K]`.
    switches: Switches, bool `[N, T]`, True where a new segment starts.
    log_probs: Log probabilities of exact predictors, `[N, T, K]`, by name.
  """

  symbols: np.ndarray
  parameters: np.ndarray
  switches: np.ndarray
  log_probs: dict[str, np.ndarray]


def exact_predictors(
  data: Mapping[str, config_lib.DataConfig], seq_length: int
) -> dict[str, predictors.OptimalPredictor]:
  """Returns the Bayes predictor of every source by its name, and KT.

  Args:
    data: Configs of the sources by name.
    seq_length: Length of the sequences, T.

  Raises:
    ValueError: If the sources have several priors, or one that is no Dirichlet:
      KT takes one Dirichlet.
  """
  priors = {
    (source.parameter_distribution, constants.prior_parameters(source))
    for source in data.values()
  }
  if len(priors) != 1 or next(iter(priors))[0] != 'dirichlet':
    raise ValueError(
      'the sources have the priors '
      f'{", ".join(map(str, sorted(priors)))}; what is compared has one, and a '
      'Dirichlet'
    )
  exact = {}
  for name, source in data.items():
    generator = constants.build_data_generator(source)
    predictor = generator.bayes_predictor(seq_length)
    if predictor is not None:
      exact[name] = predictor
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
    seq_length: Length of the sequences, T.
    num_sequences: Number of sequences, N.
    rng: Key of the sequences.
  """
  generator = constants.build_data_generator(source)
  batch_size = _batch_size(seq_length, num_sequences)

  @jax.jit
  def draw(rng: jax.Array) -> Sequences:
    batch, parameters = generator.sample(rng, batch_size, seq_length)
    return Sequences(
      batch,
      parameters,
      generator.switch_points(rng, batch_size, seq_length),
      {name: p.unroll({}, None, batch)[0] for name, p in exact.items()},
    )

  keys = jax.random.split(rng, -(-num_sequences // batch_size))
  drawn = [jax.device_get(draw(key)) for key in keys]
  joined = jax.tree.map(lambda *x: np.concatenate(x)[:num_sequences], *drawn)
  # In the order given, which JAX does not keep.
  return joined._replace(
    log_probs={name: joined.log_probs[name] for name in exact}
  )


def predict(network: Network, symbols: np.ndarray) -> np.ndarray:
  """Returns the log-probabilities that all members predict, `[M, N, T, K]`.

  Args:
    network: Network of a sweep, as from `networks`.
    symbols: One-hot symbols `[N, T, K]`.
  """
  run = saved_runs.load_run(network.folder, imports=())

  def log_probs(params: predictors.Params, batch: jax.Array) -> jax.Array:
    logits, _ = run.predictor.unroll(params, None, batch)
    return jax.nn.log_softmax(logits)

  return _by_member(log_probs, run, symbols)


def read_states(
  network: Network, symbols: np.ndarray, untrained: bool = False
) -> np.ndarray:
  """Returns the states of a network after every symbol, `[M, N, T, D]`.

  For a network without a state it is the input of its last linear layer.

  Args:
    network: Network of a sweep, as from `networks`.
    symbols: One-hot symbols `[N, T, K]`.
    untrained: Whether to take the parameters that training started from.
  """
  run = saved_runs.load_run(network.folder, imports=())
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
  state = train_state.init_state(
    run.config, run.predictor, alphabet_size, jax.local_devices()[:1]
  )
  return dataclasses.replace(run, all_params=state.params, step=0)


def _by_member(
  function: Callable[[predictors.Params, jax.Array], jax.Array],
  run: trained_run.Run,
  symbols: np.ndarray,
) -> np.ndarray:
  """Applies a function to all sequences, for every member: `[M, N, ...]`."""
  num_sequences, seq_length, _ = symbols.shape
  batch_size = _batch_size(seq_length, num_sequences)
  compiled = jax.jit(function)
  # The last batch as large as the others, so that nothing is compiled for it.
  padded = np.concatenate([symbols, symbols[: -num_sequences % batch_size]])
  batches = padded.reshape(-1, batch_size, *symbols.shape[1:])
  members = []
  for member in range(len(run.seeds)):
    params = run.member(member)
    outputs = [np.asarray(compiled(params, batch)) for batch in batches]
    members.append(np.concatenate(outputs)[:num_sequences])
  return np.stack(members)


def _batch_size(seq_length: int, num_sequences: int) -> int:
  return min(num_sequences, max(1, _SYMBOLS_PER_BATCH // seq_length))


def regret(log_probs: np.ndarray, parameters: np.ndarray) -> np.ndarray:
  """Returns the regret of predicting symbols 2, ..., T, `[N, T - 1]`.

  Args:
    log_probs: Predicted log-probabilities `[N, T, K]`.
    parameters: True probabilities `[N, T, K]`.
  """
  return np.asarray(_instantaneous_regret(log_probs, parameters))


_instantaneous_regret = jax.jit(evaluator_lib.instantaneous_regret)


def divergence(log_probs: np.ndarray, others: np.ndarray) -> np.ndarray:
  """Returns KL(p || q) of predictions of symbols 2, ..., T, `[N, T - 1]`.

    sum_k p_k (log p_k - log q_k)

  Args:
    log_probs: Log-probabilities log p, `[N, T, K]`.
    others: Log-probabilities log q, `[N, T, K]`.

  Returns:
    Nats.
  """
  log_probs = log_probs[:, :-1].astype(np.float64)
  gaps = log_probs - others[:, :-1]
  return np.sum(np.exp(log_probs) * gaps, axis=-1)
