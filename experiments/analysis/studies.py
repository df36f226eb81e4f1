"""Studies of the networks of a sweep: one function for each.

  on_distribution   what they lose on the source they were trained on
  learning          the same, while they were trained
  off_distribution  what they lose on other sources, and whom they are like
  length            what they lose beyond the length of training
  after_switch      what they lose in the symbols after a true switch
  read_out          what can be read from their state about switches

Each is a function from networks to the rows of a table: plain dicts, one for
every network (seed) and case. `predictor` is the architecture, or 'exact' for
a Bayes predictor; `trained_on` is the source it was trained on, or whose Bayes
predictor it is ('static' is KT). `seed` is None for what has none. Regrets are
in nats; standard errors are over sequences, and those of differences are
paired.

Axes: M seeds of a network, N sequences, T time, D numbers in a state.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from nonstationary_mbml import base_config
from nonstationary_mbml import predictors
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments import regret_table
from nonstationary_mbml.experiments import saved_runs
from nonstationary_mbml.experiments.analysis import trained_networks
from nonstationary_mbml.runtime import progress
from nonstationary_mbml.runtime import run_folder
from nonstationary_mbml.runtime import statistics

EXACT = 'exact'
Row = dict[str, Any]
Networks = Sequence[trained_networks.Network]

# Points of a learning curve, in equal factors.
_CURVE_STEPS = 14
# Length of the sequences, in lengths of training.
LENGTH_FACTOR = 8
# Bins of positions per length of training.
_BINS_PER_LENGTH = 2
# Sources whose exact predictors, PTW and LAD, are references on all others.
REFERENCES = ('ptw', 'lin')
# Number of symbols of all sequences for a read-out.
_READ_OUT_SYMBOLS = 2**16
# Longest age of a segment, in symbols, that counts as recent.
RECENT = 4
# Penalty of the ridge regression, relative to the number of symbols.
_RIDGE = 1e-6


def on_distribution(networks: Networks) -> list[Row]:
  """Returns the final regret of every network on its own source.

  Beside it are the exact predictors of the run's evaluation, by their labels;
  `is_own` is that of the source. All are read from the runs' tables.
  """
  rows = []
  seen = set()
  for network in networks:
    _, *others = network.table
    rows += [
      _on_distribution_row(
        network.source, network.architecture, row['seed'], row
      )
      for row in regret_table.network_rows(network.table, network.seeds)
    ]
    # All networks of a source read the same sequences.
    if network.source not in seen:
      seen.add(network.source)
      rows += [
        {
          **_on_distribution_row(network.source, row['predictor'], None, row),
          'is_own': int(row['is_optimum']),
        }
        for row in others
      ]
  return rows


def _on_distribution_row(
  source: str, predictor: str, seed: int | None, row: Mapping[str, Any]
) -> Row:
  return {
    'source': source,
    'predictor': predictor,
    'seed': seed,
    'regret': row['cumulative_regret'],
    'regret_stderr': row['stderr'],
    'above_exact': row['above_optimum'],
    'above_exact_stderr': row['above_optimum_stderr'],
  }


def learning(networks: Networks) -> list[Row]:
  """Returns regret above the own exact predictor, at some steps of training.

  From the logs of the runs, on a batch of fresh sequences at every step.
  """
  rows = []
  for network in networks:
    entries, _ = run_folder.read_metrics(network.folder / run_folder.METRICS)
    history, members = run_folder.split_entries(entries)
    evaluation = network.config.eval
    generator = constants.build_data_generator(evaluation.data)
    own = constants.exact_predictor(
      evaluation,
      generator,
      constants.build_optimal_predictors(evaluation, generator.alphabet_size),
    )
    if own is None or not history:
      continue
    for seed, entries in zip(network.seeds, members or (history,), strict=True):
      rows += [
        {
          'source': network.source,
          'predictor': network.architecture,
          'seed': seed,
          'step': entry['step'],
          'above_exact': entry[f'cumulative_regret_above_optimal/{own}'],
          'above_exact_stderr': entry[
            f'cumulative_regret_above_optimal_stderr/{own}'
          ],
        }
        for entry in saved_runs.thinned(entries, _CURVE_STEPS)
      ]
  return rows


def off_distribution(
  networks: Networks, num_sequences: int, seed: int = 0, use_tqdm: bool = False
) -> list[Row]:
  """Returns what every network loses on every source, and whom it resembles.

  `kl/<source>` is the mean of KL(exact || network) in nats per symbol, from the
  predictions of that source's Bayes predictor to those of the network.

  Args:
    networks: Networks of a sweep.
    num_sequences: N, the same for all networks.
    seed: Seed of the sequences.
    use_tqdm: Show progress.
  """
  seq_length = _train_length(networks)
  sources = trained_networks.sources(networks)
  exact = trained_networks.exact_predictors(sources, seq_length)
  sampled = dict(
    _sampled(sources, exact, seq_length, num_sequences, seed, question=0)
  )
  own_regrets = {
    name: _cumulative(sequences.log_probs[name], sequences)
    for name, sequences in sampled.items()
    if name in sequences.log_probs
  }
  rows = [
    _off_distribution_row(
      EXACT,
      name,
      tested_on,
      None,
      log_probs,
      own_regrets.get(tested_on),
      sequences,
    )
    for tested_on, sequences in sampled.items()
    for name, log_probs in sequences.log_probs.items()
  ]
  # All sources at once, so that a network is compiled once.
  symbols = np.concatenate(
    [sequences.symbols for sequences in sampled.values()]
  )
  with _bar(len(networks), use_tqdm) as bar:
    for network in networks:
      predictions = trained_networks.predict(network, symbols)
      for member_seed, of_member in zip(
        network.seeds, predictions, strict=True
      ):
        of_sources = np.split(of_member, len(sampled))
        rows += [
          _off_distribution_row(
            network.architecture,
            network.source,
            tested_on,
            member_seed,
            log_probs,
            own_regrets.get(tested_on),
            sequences,
          )
          for (tested_on, sequences), log_probs in zip(
            sampled.items(), of_sources, strict=True
          )
        ]
      bar.update(1)
  return rows


def _off_distribution_row(
  predictor: str,
  trained_on: str,
  tested_on: str,
  seed: int | None,
  log_probs: np.ndarray,
  own_regret: np.ndarray | None,
  sequences: trained_networks.Sequences,
) -> Row:
  regret = _cumulative(log_probs, sequences)
  row = {
    'predictor': predictor,
    'trained_on': trained_on,
    'tested_on': tested_on,
    'seed': seed,
    **_mean_and_stderr('regret', regret),
  }
  if own_regret is not None:
    row |= _mean_and_stderr('above_exact', regret - own_regret)
  for name, exact in sequences.log_probs.items():
    row[f'kl/{name}'] = float(
      trained_networks.divergence(exact, log_probs).mean()
    )
  return row


def length(
  networks: Networks, num_sequences: int, seed: int = 0, use_tqdm: bool = False
) -> list[Row]:
  """Returns the regret per symbol over position, beyond the training length.

  The source is that of training, and its segment-length distribution must not
  depend on the length of the sequence: all sources but PTW of a depth that
  follows from it. Positions are those of predicted symbols, the first symbol
  being 1, in bins.

  Args:
    networks: Networks of a sweep.
    num_sequences: N, the same for all networks of a source.
    seed: Seed of the sequences.
    use_tqdm: Show progress.
  """
  train_length = _train_length(networks)
  seq_length = LENGTH_FACTOR * train_length
  networks = [
    network for network in networks if _can_be_longer(network, seq_length)
  ]
  if not networks:
    return []
  sources = trained_networks.sources(networks)
  # The length of training is an edge, also if it is odd.
  edges = np.arange(1, LENGTH_FACTOR * _BINS_PER_LENGTH + 1) * train_length
  edges = np.unique(np.maximum(edges // _BINS_PER_LENGTH, 2))
  exact = trained_networks.exact_predictors(sources, seq_length)
  rows = []
  with _bar(len(networks), use_tqdm) as bar:
    for name, sequences in _sampled(
      sources, exact, seq_length, num_sequences, seed, question=1
    ):
      if name in exact:
        rows += _length_rows(
          EXACT, name, None, sequences.log_probs[name], sequences, edges
        )
      for network, member_seed, log_probs in _predictions(
        networks, name, sequences, bar
      ):
        rows += _length_rows(
          network.architecture, name, member_seed, log_probs, sequences, edges
        )
  return rows


def _can_be_longer(network: trained_networks.Network, seq_length: int) -> bool:
  """Whether the source has such long sequences, distributed as in training."""
  data = network.config.data
  is_ptw = data.trajectory_generator in config_lib.PTW_SOURCES
  if is_ptw and data.trajectory_generator_kwargs.get('depth') is None:
    return False
  try:
    constants.build_data_generator(data).check_seq_length(seq_length)
    return True
  except ValueError:  # A tree that is too small.
    return False


def _length_rows(
  predictor: str,
  trained_on: str,
  seed: int | None,
  log_probs: np.ndarray,
  sequences: trained_networks.Sequences,
  edges: Sequence[int],
) -> list[Row]:
  regret = trained_networks.regret(log_probs, sequences.parameters)
  # Symbol p is predicted at index p - 2, and the first one never.
  firsts = [2, *(edge + 1 for edge in edges[:-1])]
  return [
    {
      'predictor': predictor,
      'trained_on': trained_on,
      'seed': seed,
      'first_position': int(first),
      'last_position': int(last),
      **_mean_and_stderr(
        'regret_per_symbol', regret[:, first - 2 : last - 1].mean(axis=1)
      ),
    }
    for first, last in zip(firsts, edges, strict=True)
  ]


def after_switch(
  networks: Networks, num_sequences: int, seed: int = 0, use_tqdm: bool = False
) -> list[Row]:
  """Returns the regret per symbol against the time since a true switch.

  `symbols_since` is 1 for the first symbol of a segment; segments that no
  switch began do not count. On the source of training, beside its own Bayes
  predictor, PTW and LAD.

  Args:
    networks: Networks of a sweep.
    num_sequences: N, the same for all networks of a source.
    seed: Seed of the sequences.
    use_tqdm: Show progress.
  """
  seq_length = _train_length(networks)
  sources = trained_networks.sources(networks)
  exact = trained_networks.exact_predictors(sources, seq_length)
  exact.pop(trained_networks.STATIC)
  rows = []
  with _bar(len(networks), use_tqdm) as bar:
    for name, sequences in _sampled(
      sources, exact, seq_length, num_sequences, seed, question=2
    ):
      since = symbols_since_switch(sequences.switches)[:, 1:]
      ages = range(1, seq_length // 2 + 1)
      for own, log_probs in sequences.log_probs.items():
        if own in (name, *REFERENCES):
          regret = trained_networks.regret(log_probs, sequences.parameters)
          rows += _after_switch_rows(
            name, EXACT, own, None, regret, since, ages
          )
      for network, member_seed, log_probs in _predictions(
        networks, name, sequences, bar
      ):
        regret = trained_networks.regret(log_probs, sequences.parameters)
        rows += _after_switch_rows(
          name, network.architecture, name, member_seed, regret, since, ages
        )
  return rows


def symbols_since_switch(switches: np.ndarray) -> np.ndarray:
  """Returns how many symbols the current segment has, this one included.

  switches      0 0 1 0 0 1 0
  symbols since 0 0 1 2 3 1 2

  Args:
    switches: bool `[N, T]`, True where a new segment starts.

  Returns:
    `[N, T]`; 0 before the first switch.
  """
  times = np.arange(switches.shape[1])
  latest = np.maximum.accumulate(np.where(switches, times, -1), axis=1)
  return np.where(latest >= 0, times - latest + 1, 0)


def _after_switch_rows(
  tested_on: str,
  predictor: str,
  trained_on: str,
  seed: int | None,
  regret: np.ndarray,
  since: np.ndarray,
  ages: Sequence[int],
) -> list[Row]:
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
        'tested_on': tested_on,
        'predictor': predictor,
        'trained_on': trained_on,
        'seed': seed,
        'symbols_since': age,
        'regret_per_symbol': float(mean),
        'regret_per_symbol_stderr': float(spread),
      }
    )
  return rows


def read_out(
  networks: Networks, seed: int = 0, use_tqdm: bool = False
) -> list[Row]:
  """Returns how well a linear map of the state gives the exact posterior.

  Targets are those of the source's own Bayes predictor after every symbol:

    run_length     E[symbols of the current segment | the past]
    recent_switch  P(it has at most 4 symbols so far | the past)

  A ridge regression, the same at all times, from all that the network keeps
  (of a Transformer: what its last linear layer reads) is fitted on half of the
  sequences and tested on the other half. `r2` is the share of the target's
  variance that it explains. For `r2_given_time` states and targets are taken
  from their means at every time, so that a clock explains nothing. None is
  where there is no variance. `is_trained` is 0 for the same networks before
  training.

  Args:
    networks: Networks of a sweep.
    seed: Seed of the sequences.
    use_tqdm: Show progress.
  """
  seq_length = _train_length(networks)
  num_sequences = max(4, _READ_OUT_SYMBOLS // seq_length)
  sources = trained_networks.sources(networks)
  exact = trained_networks.exact_predictors(sources, seq_length)
  rows = []
  with _bar(2 * len(networks), use_tqdm) as bar:
    for name, sequences in _sampled(
      sources, {}, seq_length, num_sequences, seed, question=3
    ):
      if not hasattr(exact.get(name), 'unroll_run_lengths'):
        continue
      targets = posteriors(exact[name], sequences.symbols)
      for network in networks:
        if network.source != name:
          continue
        for is_trained in (True, False):
          states = trained_networks.read_states(
            network, sequences.symbols, untrained=not is_trained
          )
          for member_seed, of_member in zip(network.seeds, states, strict=True):
            rows += [
              {
                'source': name,
                'predictor': network.architecture,
                'seed': member_seed,
                'is_trained': int(is_trained),
                'target': target,
                **shares,
              }
              for target, shares in read_out_shares(of_member, targets).items()
            ]
          bar.update(1)
  return rows


def read_out_shares(
  states: np.ndarray, targets: Mapping[str, np.ndarray]
) -> dict[str, dict[str, float | None]]:
  """Returns `r2` and `r2_given_time` of every target; see `read_out`.

  Args:
    states: `[N, T, D]`; the first half of the sequences is for the fit.
    targets: `[N, T]`, by name.
  """
  half = len(states) // 2
  centred = lambda values: values - values[:half].mean(axis=0)
  plain = linear_read_out(states, targets)
  given_time = linear_read_out(
    centred(states), {name: centred(values) for name, values in targets.items()}
  )
  return {
    name: {
      'r2': explained(values[half:], plain[name]),
      'r2_given_time': explained(centred(values)[half:], given_time[name]),
    }
    for name, values in targets.items()
  }


def posteriors(
  exact: predictors.OptimalPredictor, symbols: np.ndarray
) -> dict[str, np.ndarray]:
  """Returns what a Bayes predictor knows of the current segment, `[N, T]` each.

  Args:
    exact: Predictor with `unroll_run_lengths`.
    symbols: One-hot `[N, T, K]`.
  """
  size = max(1, 2**18 // symbols.shape[1] ** 2)
  run_lengths, recent = [], []
  for begin in range(0, len(symbols), size):
    posterior = np.asarray(
      exact.unroll_run_lengths(symbols[begin : begin + size]), np.float64
    )
    run_lengths.append(posterior @ np.arange(posterior.shape[-1]))
    recent.append(posterior[..., : RECENT + 1].sum(axis=-1))
  return {
    'run_length': np.concatenate(run_lengths),
    'recent_switch': np.concatenate(recent),
  }


def linear_read_out(
  states: np.ndarray, targets: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """Returns targets of the second half of sequences, predicted from states.

  Args:
    states: `[N, T, D]`; the first half of the sequences is for the fit.
    targets: `[N, T]`, by name.
  """
  half = len(states) // 2
  flat = states.reshape(-1, states.shape[-1]).astype(np.float64)
  fit = slice(0, half * states.shape[1])
  mean, spread = flat[fit].mean(axis=0), flat[fit].std(axis=0)
  # A constant feature says nothing.
  flat = (flat - mean)[:, spread > 0] / spread[spread > 0]
  inputs = flat[fit]
  gram = inputs.T @ inputs + _RIDGE * len(inputs) * np.eye(inputs.shape[1])
  predicted = {}
  for name, values in targets.items():
    goal = values[:half].ravel()
    weights = np.linalg.solve(gram, inputs.T @ (goal - goal.mean()))
    out = flat[half * states.shape[1] :] @ weights + goal.mean()
    predicted[name] = out.reshape(values[half:].shape)
  return predicted


def explained(values: np.ndarray, predicted: np.ndarray) -> float | None:
  """Returns the share of variance that predictions explain, 1 at most.

  None where the values have no variance beyond rounding.
  """
  variance = np.sum((values - values.mean()) ** 2)
  if variance <= 1e-9 * max(np.sum(values**2), len(values)):
    return None
  return float(1 - np.sum((values - predicted) ** 2) / variance)


def _sampled(
  sources: Mapping[str, config_lib.DataConfig],
  exact: Mapping[str, predictors.OptimalPredictor],
  seq_length: int,
  num_sequences: int,
  seed: int,
  question: int,
) -> Iterator[tuple[str, trained_networks.Sequences]]:
  """Sequences of every source, from a key of its own for every question."""
  base_config.check_seed('seed', seed)
  key = jax.random.fold_in(jax.random.key(seed), question)
  for index, (name, source) in enumerate(sources.items()):
    yield (
      name,
      trained_networks.sample(
        source,
        exact,
        seq_length,
        num_sequences,
        jax.random.fold_in(key, index),
      ),
    )


def _predictions(
  networks: Networks,
  source: str,
  sequences: trained_networks.Sequences,
  bar: progress.Progress,
) -> Iterator[tuple[trained_networks.Network, int, np.ndarray]]:
  """Predictions of all networks trained on a source, seed by seed."""
  for network in networks:
    if network.source == source:
      members = trained_networks.predict(network, sequences.symbols)
      for member_seed, log_probs in zip(network.seeds, members, strict=True):
        yield network, member_seed, log_probs
      bar.update(1)


def _train_length(networks: Networks) -> int:
  """The length of training, which all networks share."""
  lengths = {network.config.train.seq_length for network in networks}
  if len(lengths) != 1:
    raise ValueError(
      f'the networks were trained on lengths {sorted(lengths)}; what is '
      'compared has one, and at least one point that is finished'
    )
  return lengths.pop()


def _cumulative(
  log_probs: np.ndarray, sequences: trained_networks.Sequences
) -> np.ndarray:
  regret = trained_networks.regret(log_probs, sequences.parameters)
  return regret.sum(axis=-1, dtype=np.float64)


def _mean_and_stderr(name: str, values: np.ndarray) -> dict[str, float]:
  mean, stderr = statistics.mean_and_stderr(values.astype(np.float64))
  return {name: float(mean), f'{name}_stderr': float(stderr)}


def _bar(total: int, use_tqdm: bool) -> progress.Progress:
  return progress.bar(total, 'measuring', 'network', use_tqdm)


# By the name of the table: from networks, a number of sequences and a seed.
QUESTIONS: dict[str, dict[str, Callable[..., list[Row]]]] = {
  'on_distribution': {
    'on_distribution': lambda networks, n, seed, bar: on_distribution(networks),
    'learning': lambda networks, n, seed, bar: learning(networks),
  },
  'off_distribution': {'off_distribution': off_distribution},
  'length': {'length': length},
  'inside': {
    'after_switch': after_switch,
    'read_out': lambda networks, n, seed, bar: read_out(networks, seed, bar),
  },
}
