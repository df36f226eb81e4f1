"""Studies of the networks of a sweep: one function, and one table, for each.

  on_distribution        regret on the source of training
  learning               the same, in the course of training
  off_distribution       regret on other sources, and the nearest predictor
  length_generalization  regret beyond the length of training
  post_switch_regret     regret in the symbols after a true switch
  linear_probe           what a linear map of the state knows about switches
  equal_beginnings       what it costs not to count equal symbols at the start

Each takes networks and returns the rows of its table: plain dicts, one for
every network (seed) and case. `predictor` is the architecture, or 'exact' for
a Bayes predictor; `trained_on` is the source of training, or the source whose
Bayes predictor it is ('static' is KT). `seed` is None for exact predictors.
Regrets are in nats; standard errors are over sequences, and those of
differences are paired.

A new study is a reduction of `evaluate_grid`, and a line in `STUDIES`.

Axes: M seeds of a network, N sequences, T time, K alphabet size.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
from typing import Any
from typing import NamedTuple

import jax
import numpy as np

from nonstationary_mbml import base_config
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments import regret_table
from nonstationary_mbml.experiments import saved_runs
from nonstationary_mbml.experiments.analysis import linear_probe as probe_lib
from nonstationary_mbml.experiments.analysis import trained_networks
from nonstationary_mbml.runtime import progress
from nonstationary_mbml.runtime import run_folder
from nonstationary_mbml.runtime import statistics

EXACT = 'exact'
Row = dict[str, Any]
Networks = Sequence[trained_networks.Network]


class Options(NamedTuple):
  """Options of the studies.

  Attributes:
    num_sequences: Sequences of every source, N; a linear probe has a number of
      its own.
    seed: Seed of the sequences.
    use_tqdm: Whether to show progress.
  """

  num_sequences: int = 2_048
  seed: int = 0
  use_tqdm: bool = False


# Points of a learning curve, in equal factors.
_CURVE_STEPS = 14
# Length of the sequences, in lengths of training.
LENGTH_FACTOR = 8
# Bins of positions per length of training.
_BINS_PER_LENGTH = 2
# Sources whose exact predictors, PTW and LAD, are references on all others.
REFERENCES = ('ptw', 'lin')
# Sequences of every source for the bound of `equal_beginnings`, which trains
# nothing.
_NUM_SEQUENCES_OF_BOUND = 16_384
# Number of symbols of all sequences for a linear probe.
_PROBE_SYMBOLS = 2**16


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Predictions of one predictor on the sequences of one source.

  Attributes:
    predictor: Architecture, or `EXACT`.
    trained_on: Source of training, or the source of the Bayes predictor.
    tested_on: Source of the sequences.
    seed: Seed of the network; None for exact predictors.
    log_probs: Predicted log-probabilities `[N, T, K]`.
    sequences: Sequences of the source.
  """

  predictor: str
  trained_on: str
  tested_on: str
  seed: int | None
  log_probs: np.ndarray
  sequences: trained_networks.Sequences

  @property
  def regret(self) -> np.ndarray:
    """Regret of symbols 2, ..., T, `[N, T - 1]`."""
    return trained_networks.regret(self.log_probs, self.sequences.parameters)

  @property
  def exact_regret(self) -> np.ndarray | None:
    """That of the exact predictor of the source; None if it has none."""
    exact = self.sequences.log_probs.get(self.tested_on)
    if exact is None:
      return None
    return trained_networks.regret(exact, self.sequences.parameters)


def evaluate_grid(
  networks: Networks,
  sources: Mapping[str, trained_networks.Sequences],
  use_tqdm: bool = False,
) -> Iterator[Evaluation]:
  """Yields every predictor on every source: exact ones, then the networks.

  Args:
    networks: Networks of a sweep.
    sources: N sequences of every source by its name, with the predictions of
      exact predictors.
    use_tqdm: Whether to show progress.
  """
  for tested_on, sequences in sources.items():
    for name, log_probs in sequences.log_probs.items():
      yield Evaluation(EXACT, name, tested_on, None, log_probs, sequences)
  # All sources at once, so that a network is compiled once.
  symbols = np.concatenate(
    [sequences.symbols for sequences in sources.values()]
  )
  with progress.bar(len(networks), 'evaluating', 'network', use_tqdm) as bar:
    for network in networks:
      members = trained_networks.predict(network, symbols)
      for seed, member in zip(network.seeds, members, strict=True):
        by_source = np.split(member, len(sources))
        for tested_on, log_probs in zip(sources, by_source, strict=True):
          yield Evaluation(
            network.architecture,
            network.source,
            tested_on,
            seed,
            log_probs,
            sources[tested_on],
          )
      bar.update()


def on_distribution(networks: Networks, options: Options) -> list[Row]:
  """Returns the final regret of every network on its source of training.

  Beside it are the exact predictors of the run's evaluation, by their labels;
  `is_exact` marks the source's own. All are read from the runs' tables.
  """
  rows = []
  seen = set()
  for network in networks:
    source = network.source
    rows += [
      _final_row(source, network.architecture, row)
      for row in regret_table.network_rows(network.table, network.seeds)
    ]
    # All networks of a source read the same sequences.
    if source not in seen:
      seen.add(source)
      rows += [
        {
          **_final_row(source, row['predictor'], row),
          # Tables of earlier versions say only what they measure from.
          'is_exact': int(row.get('is_exact', row['is_optimum'])),
        }
        for row in regret_table.reference_rows(network.table)
      ]
  return rows


def _final_row(source: str, predictor: str, row: Mapping[str, Any]) -> Row:
  return {
    'source': source,
    'predictor': predictor,
    'seed': row.get('seed'),
    'regret': row['cumulative_regret'],
    'regret_stderr': row['stderr'],
    'above_exact': row['above_optimum'],
    'above_exact_stderr': row['above_optimum_stderr'],
  }


def learning(networks: Networks, options: Options) -> list[Row]:
  """Returns regret above the exact predictor at some steps of training.

  It is read from the logs of the runs, which are of fresh sequences at every
  step.
  """
  rows = []
  for network in networks:
    entries, _ = run_folder.read_metrics(network.folder / run_folder.METRICS)
    history, members = run_folder.split_entries(entries)
    evaluation = network.config.resolved().eval
    generator = constants.build_data_generator(evaluation.data)
    exact = constants.exact_predictor(
      generator,
      constants.build_optimal_predictors(evaluation, generator),
      evaluation.seq_length,
    )
    if exact is None or not history:
      continue
    metric = 'cumulative_regret_above_optimal'
    rows += [
      {
        'source': network.source,
        'predictor': network.architecture,
        'seed': seed,
        'step': entry['step'],
        'above_exact': entry[f'{metric}/{exact}'],
        'above_exact_stderr': entry[f'{metric}_stderr/{exact}'],
      }
      for seed, entries in zip(
        network.seeds, members or (history,), strict=True
      )
      for entry in saved_runs.thinned(entries, _CURVE_STEPS)
    ]
  return rows


def off_distribution(networks: Networks, options: Options) -> list[Row]:
  """Returns the regret of every network on every source.

  `kl/<source>` is the mean of KL(exact || network) in nats per symbol, from the
  predictions of that source's Bayes predictor to those of the network.
  """
  sources = dict(
    _sample(
      networks,
      _training_length(networks),
      options,
      stream=0,
      references=(*trained_networks.sources(networks), trained_networks.STATIC),
    )
  )
  return [
    _off_distribution_row(evaluation)
    for evaluation in evaluate_grid(networks, sources, options.use_tqdm)
  ]


def _off_distribution_row(evaluation: Evaluation) -> Row:
  regret = evaluation.regret.sum(axis=1, dtype=np.float64)
  row = {
    'predictor': evaluation.predictor,
    'trained_on': evaluation.trained_on,
    'tested_on': evaluation.tested_on,
    'seed': evaluation.seed,
    **_mean_and_stderr('regret', regret),
  }
  if (exact_regret := evaluation.exact_regret) is not None:
    exact_regret = exact_regret.sum(axis=1, dtype=np.float64)
    row |= _mean_and_stderr('above_exact', regret - exact_regret)
  for name, exact in evaluation.sequences.log_probs.items():
    divergence = trained_networks.divergence(exact, evaluation.log_probs)
    row[f'kl/{name}'] = float(divergence.mean())
  return row


def length_generalization(networks: Networks, options: Options) -> list[Row]:
  """Returns the regret per symbol over position, beyond the training length.

  The source is that of training, and its segment-length distribution must not
  depend on the length of the sequence: all sources but PTW of a depth that
  follows from it. Positions are those of predicted symbols, the first symbol
  being 1, in bins.
  """
  training_length = _training_length(networks)
  seq_length = LENGTH_FACTOR * training_length
  networks = [
    network for network in networks if _can_be_longer(network, seq_length)
  ]
  if not networks:
    return []
  # The length of training is an edge, also if it is odd.
  edges = np.arange(1, LENGTH_FACTOR * _BINS_PER_LENGTH + 1) * training_length
  edges = np.unique(np.maximum(edges // _BINS_PER_LENGTH, 2))
  return [
    row
    for evaluation in _diagonal(
      networks, seq_length, options, stream=1, references=()
    )
    for row in _position_rows(evaluation, edges)
  ]


def _can_be_longer(network: trained_networks.Network, seq_length: int) -> bool:
  """Whether the source has such long sequences, distributed as in training."""
  data = network.config.data
  generator = constants.build_data_generator(data)
  if generator.depends_on_length:
    return False
  try:
    generator.check_seq_length(seq_length)
    return True
  except ValueError:  # A tree that is too small.
    return False


def _position_rows(evaluation: Evaluation, edges: Sequence[int]) -> list[Row]:
  """A row for every bin of positions that ends at an edge."""
  regret = evaluation.regret
  # Symbol p is predicted at index p - 2, and the first one never.
  firsts = [2, *(edge + 1 for edge in edges[:-1])]
  return [
    {
      'predictor': evaluation.predictor,
      'trained_on': evaluation.trained_on,
      'seed': evaluation.seed,
      'first_position': int(first),
      'last_position': int(last),
      **_mean_and_stderr(
        'regret_per_symbol', regret[:, first - 2 : last - 1].mean(axis=1)
      ),
    }
    for first, last in zip(firsts, edges, strict=True)
  ]


def length_of_training(rows: Sequence[Mapping[str, Any]]) -> int:
  """Returns the length of training that rows of length_generalization have."""
  return max(row['last_position'] for row in rows) // LENGTH_FACTOR


def post_switch_regret(networks: Networks, options: Options) -> list[Row]:
  """Returns the regret per symbol against the time since a true switch.

  `symbols_since` is 1 for the first symbol of a segment; segments that no
  switch began do not count. The source is that of training; beside the networks
  are its Bayes predictor, PTW and LAD.
  """
  seq_length = _training_length(networks)
  return [
    row
    for evaluation in _diagonal(
      networks, seq_length, options, stream=2, references=REFERENCES
    )
    for row in _age_rows(evaluation, range(1, seq_length // 2 + 1))
  ]


def symbols_since_switch(switches: np.ndarray) -> np.ndarray:
  """Returns how many symbols the current segment has, this one included.

  switches      0 0 1 0 0 1 0
  symbols since 0 0 1 2 3 1 2

  Args:
    switches: Switches, bool `[N, T]`, True where a new segment starts.

  Returns:
    `[N, T]`; 0 before the first switch.
  """
  times = np.arange(switches.shape[1])
  latest = np.maximum.accumulate(np.where(switches, times, -1), axis=1)
  return np.where(latest >= 0, times - latest + 1, 0)


def _age_rows(evaluation: Evaluation, ages: Sequence[int]) -> list[Row]:
  """A row for every age of a segment that the sequences have."""
  regret = evaluation.regret
  since = symbols_since_switch(evaluation.sequences.switches)[:, 1:]
  rows = []
  for age in ages:
    counted = since == age
    sums = np.where(counted, regret, 0).sum(axis=1, dtype=np.float64)
    numbers = counted.sum(axis=1)
    if not numbers.any():
      continue
    # A ratio of sums over sequences, which are independent of each other.
    mean = sums.sum() / numbers.sum()
    spread = np.sqrt(np.sum((sums - mean * numbers) ** 2)) / numbers.sum()
    rows.append(
      {
        'tested_on': evaluation.tested_on,
        'predictor': evaluation.predictor,
        'trained_on': evaluation.trained_on,
        'seed': evaluation.seed,
        'symbols_since': age,
        'regret_per_symbol': float(mean),
        'regret_per_symbol_stderr': float(spread),
      }
    )
  return rows


def linear_probe(networks: Networks, options: Options) -> list[Row]:
  """Returns how well a linear map of the state gives the exact posterior.

  Targets are the posteriors of the source's Bayes predictor after every symbol,
  and scores those of `linear_probe.r2_scores`: a ridge regression, the same at
  all times, from all that the network keeps (of a Transformer: what its last
  linear layer reads). `is_trained` is 0 for the same networks before training.
  """
  seq_length = _training_length(networks)
  options = options._replace(num_sequences=max(4, _PROBE_SYMBOLS // seq_length))
  exact = trained_networks.exact_predictors(
    trained_networks.sources(networks), seq_length
  )
  rows = []
  with progress.bar(
    len(networks), 'probing', 'network', options.use_tqdm
  ) as bar:
    for name, sequences in _sample(
      networks, seq_length, options, stream=3, references=None
    ):
      if not hasattr(exact.get(name), 'unroll_run_lengths'):
        continue
      targets = probe_lib.posteriors(exact[name], sequences.symbols)
      for network in _trained_on(networks, name):
        rows += _probe_rows(network, sequences.symbols, targets)
        bar.update()
  return rows


def _probe_rows(
  network: trained_networks.Network,
  symbols: np.ndarray,
  targets: Mapping[str, np.ndarray],
) -> list[Row]:
  """A row for every seed and target, after training and before."""
  rows = []
  for is_trained in (True, False):
    states = trained_networks.read_states(
      network, symbols, untrained=not is_trained
    )
    rows += [
      {
        'source': network.source,
        'predictor': network.architecture,
        'seed': seed,
        'is_trained': int(is_trained),
        'target': target,
        **scores,
      }
      for seed, member in zip(network.seeds, states, strict=True)
      for target, scores in probe_lib.r2_scores(member, targets).items()
    ]
  return rows


def equal_beginnings(networks: Networks, options: Options) -> list[Row]:
  """Returns what is lost at least without counting equal symbols at the start.

  Attention is a mean. Without absolute positions or a begin symbol, what a
  Transformer reads from n equal symbols at the beginning is the same for every
  n, and so is its prediction q. Where a sequence has been equal for n symbols,
  n = 1, ..., the exact predictor says p_n; the sum of KL(p_n || q) over them is
  the regret above it, and least where q is the mean of all p_n.

  `above_exact` is that least regret on a source, a lower bound for all such
  networks; `exact_regret` that of the exact predictor.
  """
  seq_length = _training_length(networks)
  options = options._replace(num_sequences=_NUM_SEQUENCES_OF_BOUND)
  return [
    {
      'source': source,
      **_mean_and_stderr('above_exact', _uncounted(sequences, source)),
      'exact_regret': float(
        trained_networks.regret(
          sequences.log_probs[source], sequences.parameters
        )
        .sum(axis=1, dtype=np.float64)
        .mean()
      ),
    }
    for source, sequences in _sample(
      networks, seq_length, options, stream=4, references=()
    )
    if source in sequences.log_probs
  ]


def _uncounted(
  sequences: trained_networks.Sequences, source: str
) -> np.ndarray:
  """Least regret above the exact predictor, by sequence `[N]`."""
  log_probs = sequences.log_probs[source][:, :-1].astype(np.float64)
  symbols = sequences.symbols.argmax(axis=-1)
  is_equal = np.logical_and.accumulate(symbols == symbols[:, :1], axis=1)
  lost = np.zeros(len(symbols))
  for symbol in np.unique(symbols[:, 0]):
    where = is_equal[:, :-1] & (symbols[:, :1] == symbol)
    counted = log_probs[where]
    nearest = np.log(np.exp(counted).mean(axis=0))
    divergence = np.zeros(where.shape)
    divergence[where] = (np.exp(counted) * (counted - nearest)).sum(axis=-1)
    lost += divergence.sum(axis=1)
  return lost


def _sample(
  networks: Networks,
  seq_length: int,
  options: Options,
  stream: int,
  references: Sequence[str] | None,
) -> Iterator[tuple[str, trained_networks.Sequences]]:
  """Yields sequences of every source of training, by its name.

  Args:
    networks: Networks of a sweep.
    seq_length: Length of the sequences, T.
    options: Options of the study.
    stream: Number of the study, so that each has sequences of its own.
    references: Sources whose exact predictors read the sequences, besides that
      of the source itself; None if none is to read them.
  """
  seed = base_config.check_seed('seed', options.seed)
  key = jax.random.fold_in(jax.random.key(seed), stream)
  sources = trained_networks.sources(networks)
  exact = trained_networks.exact_predictors(sources, seq_length)
  for index, (name, source) in enumerate(sources.items()):
    readers = {
      other: predictor
      for other, predictor in exact.items()
      if references is not None and other in (name, *references)
    }
    yield (
      name,
      trained_networks.sample(
        source,
        readers,
        seq_length,
        options.num_sequences,
        jax.random.fold_in(key, index),
      ),
    )


def _diagonal(
  networks: Networks,
  seq_length: int,
  options: Options,
  stream: int,
  references: Sequence[str],
) -> Iterator[Evaluation]:
  """Yields the networks on their source of training; see `_sample`."""
  for name, sequences in _sample(
    networks, seq_length, options, stream, references
  ):
    yield from evaluate_grid(
      _trained_on(networks, name), {name: sequences}, options.use_tqdm
    )


def _trained_on(networks: Networks, source: str) -> Networks:
  return [network for network in networks if network.source == source]


def _training_length(networks: Networks) -> int:
  """The length of training, which all networks share."""
  lengths = {network.config.train.seq_length for network in networks}
  if len(lengths) != 1:
    raise ValueError(
      f'the networks were trained on lengths {sorted(lengths)}; what is '
      'compared has one, and at least one point that is finished'
    )
  return lengths.pop()


def _mean_and_stderr(name: str, values: np.ndarray) -> dict[str, float]:
  mean, stderr = statistics.mean_and_stderr(values.astype(np.float64))
  return {name: float(mean), f'{name}_stderr': float(stderr)}


# By the name of the table.
STUDIES: dict[str, Callable[[Networks, Options], list[Row]]] = {
  'on_distribution': on_distribution,
  'learning': learning,
  'off_distribution': off_distribution,
  'length_generalization': length_generalization,
  'post_switch_regret': post_switch_regret,
  'linear_probe': linear_probe,
  'equal_beginnings': equal_beginnings,
}
