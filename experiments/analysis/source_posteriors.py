"""Does a network that was trained on a mixture of sources infer which it is?

  python experiments/sweeps/launch.py --sweep=mixture
  python experiments/analysis/source_posteriors.py

Takes the first network of a sweep on a `mixture` source with an exact
predictor, and asks twice:

  regret     how far above the exact mixture it is, on the sequences of each
             source, beside the predictors that know that source, and mixtures
             that know all but one
  posterior  P(source | past), of the exact mixture, and what a linear map of
             the network's state says of it

Writes the tables (CSV), table.md and figure.png into <output_dir>.

Axes: M seeds of the network, N sequences, T time, K alphabet size.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import pathlib
from typing import Any
from typing import NamedTuple

from absl import flags
import jax
import matplotlib
from matplotlib import figure as figure_lib
import numpy as np

from nonstationary_mbml import base_config
from nonstationary_mbml import predictor_factories
from nonstationary_mbml.experiments import cli
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments import mixture_predictors
from nonstationary_mbml.experiments import plotting
from nonstationary_mbml.experiments import trajectory_generators
from nonstationary_mbml.experiments.analysis import linear_probe
from nonstationary_mbml.experiments.analysis import study_figures
from nonstationary_mbml.experiments.analysis import study_tables
from nonstationary_mbml.experiments.analysis import trained_networks
from nonstationary_mbml.runtime import atomic_files
from nonstationary_mbml.runtime import statistics

# All sequences, among the sources of the sequences.
ALL = 'all'
# Label of a mixture that lacks one source, before the name of that.
WITHOUT = 'without '
EXACT = 'exact'
Row = dict[str, Any]


class Mixture(NamedTuple):
  """A mixture source and its exact predictors.

  Attributes:
    generator: The source.
    names: Names of its sources.
    exact: Its exact predictor.
    labels: Labels of the exact predictors of its sources.
  """

  generator: trajectory_generators.MixtureGenerator
  names: tuple[str, ...]
  exact: mixture_predictors.MixturePredictor
  labels: tuple[str, ...]


class Sample(NamedTuple):
  """Sequences of a mixture.

  Attributes:
    symbols: One-hot symbols `[N, T, K]`.
    parameters: True probabilities `[N, T, K]`.
    index: Index of the source of each sequence, `[N]`.
  """

  symbols: np.ndarray
  parameters: np.ndarray
  index: np.ndarray


def mixture_of(data: config_lib.DataConfig, seq_length: int) -> Mixture:
  """Returns the mixture that a config describes.

  Args:
    data: Config of the source.
    seq_length: Length of the sequences, T.

  Raises:
    ValueError: If it is no mixture, or one without an exact predictor.
  """
  generator = constants.build_data_generator(data)
  exact = generator.bayes_predictor(seq_length)
  if not isinstance(exact, mixture_predictors.MixturePredictor):
    raise ValueError(
      f'the network was trained on {data.trajectory_generator!r}; what is '
      'asked here takes a mixture of sources, all with an exact predictor'
    )
  names = [
    source['trajectory_generator'].lower()
    for source in data.trajectory_generator_kwargs['sources']
  ]
  names = [
    name if names.count(name) == 1 else f'{name} {index + 1}'
    for index, name in enumerate(names)
  ]
  labels = constants.labels(dict(zip(names, exact.components, strict=True)))
  return Mixture(generator, tuple(names), exact, tuple(labels.values()))


def draw_sample(
  generator: trajectory_generators.MixtureGenerator,
  num_sequences: int,
  seq_length: int,
  rng: jax.Array,
) -> Sample:
  """Returns fresh sequences, and which source each is of."""
  return Sample(
    *map(np.asarray, generator.sample(rng, num_sequences, seq_length)),
    np.asarray(generator.source_indices(rng, num_sequences)),
  )


def regret_rows(
  network: trained_networks.Network, mixture: Mixture, sample: Sample
) -> list[Row]:
  """Returns the regret of every predictor on the sequences of every source.

  Args:
    network: Network of the sweep.
    mixture: Its source.
    sample: Sequences of it.

  Returns:
    A row for every predictor, source of the sequences and seed, which is None
    for exact predictors. Standard errors are over sequences, and of differences
    from the exact mixture they are paired.
  """
  readers = {mixture.exact.label: mixture.exact}
  readers |= zip(mixture.labels, mixture.exact.components, strict=True)
  if len(mixture.names) > 1:
    readers |= {
      f'{WITHOUT}{name}': _without(mixture.exact, index)
      for index, name in enumerate(mixture.names)
    }
  log_probs = [
    (label, None, np.asarray(reader.unroll({}, None, sample.symbols)[0]))
    for label, reader in readers.items()
  ]
  label = predictor_factories.label(network.config.model)
  log_probs += [
    (label, seed, member)
    for seed, member in zip(
      network.seeds,
      trained_networks.predict(network, sample.symbols),
      strict=True,
    )
  ]
  rows, exact = [], None
  for predictor, seed, predictions in log_probs:
    regret = trained_networks.regret(predictions, sample.parameters)
    regret = regret.sum(axis=1, dtype=np.float64)
    exact = regret if exact is None else exact
    for source, chosen in _by_source(mixture.names, sample.index).items():
      mean, stderr = statistics.mean_and_stderr(regret[chosen])
      above, above_stderr = statistics.mean_and_stderr(
        regret[chosen] - exact[chosen]
      )
      rows.append(
        {
          'predictor': predictor,
          'seed': seed,
          'source': source,
          'num_sequences': int(chosen.sum()),
          'regret': float(mean),
          'regret_stderr': float(stderr),
          'above_exact': float(above),
          'above_exact_stderr': float(above_stderr),
        }
      )
  return rows


def _without(
  exact: mixture_predictors.MixturePredictor, index: int
) -> mixture_predictors.MixturePredictor:
  """The mixture of all components but one."""
  kept = [i for i in range(len(exact.components)) if i != index]
  total = sum(exact.weights[i] for i in kept)
  return mixture_predictors.MixturePredictor(
    [exact.components[i] for i in kept],
    [exact.weights[i] / total for i in kept],
  )


def _by_source(
  names: Sequence[str], index: np.ndarray
) -> dict[str, np.ndarray]:
  """Which sequences are of each source, bool `[N]`, and all of them."""
  chosen = {name: index == number for number, name in enumerate(names)}
  return {ALL: np.ones(len(index), bool)} | chosen


def posterior_rows(
  network: trained_networks.Network, mixture: Mixture, sample: Sample
) -> tuple[list[Row], list[Row]]:
  """Returns how well a linear map of the state gives P(source | past).

  The map is a ridge regression, the same at all times, from all that the
  network keeps; one half of the sequences is for the fit, the other is
  measured.

  Args:
    network: Network of the sweep.
    mixture: Its source.
    sample: Sequences of it.

  Returns:
    Rows of the scores of `linear_probe.r2_scores`, for every source and seed,
    after training and before (`is_trained`); and rows of the mean posterior of
    the source that the sequences are of, for every source, number of symbols
    seen, and reader: the exact mixture (`seed` None) or the map.
  """
  posteriors = np.asarray(
    mixture.exact.unroll_component_posteriors(sample.symbols), np.float64
  )
  targets = dict(
    zip(mixture.names, np.moveaxis(posteriors, -1, 0), strict=True)
  )
  label = predictor_factories.label(network.config.model)
  half = len(sample.symbols) // 2
  scores, curves = (
    [],
    _curve_rows(
      EXACT,
      None,
      {name: target[half:] for name, target in targets.items()},
      sample.index[half:],
    ),
  )
  for is_trained in (True, False):
    states = trained_networks.read_states(
      network, sample.symbols, untrained=not is_trained
    )
    for seed, member in zip(network.seeds, states, strict=True):
      scores += [
        {
          'predictor': label,
          'seed': seed,
          'is_trained': int(is_trained),
          'source': source,
          **score,
        }
        for source, score in linear_probe.r2_scores(member, targets).items()
      ]
      if is_trained:
        predicted = linear_probe.predict(member, targets)
        curves += _curve_rows(label, seed, predicted, sample.index[half:])
  return scores, curves


def _curve_rows(
  reader: str,
  seed: int | None,
  posteriors: Mapping[str, np.ndarray],
  index: np.ndarray,
) -> list[Row]:
  """Mean posterior `[N, T]` of the true source, over the symbols seen."""
  return [
    {
      'reader': reader,
      'seed': seed,
      'source': source,
      'symbols_seen': time + 1,
      'posterior': float(value),
    }
    for number, (source, posterior) in enumerate(posteriors.items())
    for time, value in enumerate(posterior[index == number].mean(axis=0))
  ]


def to_markdown(regrets: Sequence[Row], scores: Sequence[Row]) -> str:
  """Returns the tables of regrets and scores.

  Args:
    regrets: Rows from `regret_rows`.
    scores: Scores from `posterior_rows`.
  """

  def regret(rows: Sequence[Row]) -> str:
    is_exact = rows[0]['predictor'] == regrets[0]['predictor']
    column = 'regret' if is_exact else 'above_exact'
    mean, stderr = study_figures.over_seeds(rows, column)
    if rows[0]['seed'] is None:
      stderr = rows[0][f'{column}_stderr']
    return _text(mean, stderr, '' if is_exact else '+')

  def score(rows: Sequence[Row]) -> str:
    if rows[0]['r2_given_time'] is None:
      return 'no variance'
    return _text(*study_figures.over_seeds(rows, 'r2_given_time'))

  return '\n'.join(
    [
      'Cumulative regret above the exact mixture, whose own is in the first '
      'line (nats), on the sequences of each source. Standard errors are over '
      'seeds for networks, else over sequences, paired for differences.\n',
      study_tables.pivot(
        regrets,
        {'predictor': lambda row: row['predictor']},
        lambda row: row['source'],
        regret,
      ),
      'Share of the variance of P(source | past), around its mean at every '
      'time, that a linear map of the state explains:\n',
      study_tables.pivot(
        scores,
        {
          'predictor': lambda row: row['predictor'],
          'training': lambda row: 'after' if row['is_trained'] else 'before',
        },
        lambda row: row['source'],
        score,
      ),
    ]
  )


def _text(mean: float, stderr: float, sign: str = '') -> str:
  """A number with its standard error, where it has one."""
  error = f' ± {stderr:.3f}' if np.isfinite(stderr) else ''
  return f'{mean:{sign}.3f}{error}'


def draw(
  regrets: Sequence[Row], scores: Sequence[Row], curves: Sequence[Row]
) -> figure_lib.Figure:
  """Draws the tables of `regret_rows` and `posterior_rows`.

  Returns:
    The figure: what every predictor loses on each source's sequences, the
    posterior of the true source over time, and the scores of the linear map.
  """
  title = 'What a network that was trained on a mixture knows of the source'
  regrets = [r for r in regrets if not r['predictor'].startswith(WITHOUT)]
  sources = list(dict.fromkeys(row['source'] for row in scores))
  # The first is the mixture, the last the network.
  exact, *references, network = dict.fromkeys(r['predictor'] for r in regrets)
  colours = {
    source: _looks(label)['color']
    for source, label in zip(sources, references, strict=True)
  }
  with plotting.new_figure(12, 4.8, title) as figure:
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.3, 1.3, 1])
    _draw_regrets(left, [r for r in regrets if r['predictor'] != exact])
    _draw_curves(middle, curves, colours)
    _draw_scores(right, scores, sources)
    grey = {'color': '0.4'}
    plotting.add_legend(
      figure,
      [
        *(
          plotting.handle(f'{label}, exact for {source}', **_looks(label))
          for source, label in zip(sources, references, strict=True)
        ),
        plotting.handle(network, **_looks(network)),
        *(
          plotting.handle(f'sequences of {name}', color=colour, linestyle='-')
          for name, colour in colours.items()
        ),
        plotting.handle(
          'exact posterior', **grey, linestyle='-', linewidth=3, alpha=0.5
        ),
        plotting.handle(f'linear map of {network}', **grey, marker='.'),
      ],
    )
  return figure


def _looks(label: str) -> dict[str, Any]:
  """A marker of a predictor: lines of exact ones have none."""
  looks = plotting.style(label)
  return {'color': looks.colour, 'marker': looks.marker or 'D'}


def _draw_regrets(panel: matplotlib.axes.Axes, regrets: Sequence[Row]) -> None:
  sources = list(dict.fromkeys(row['source'] for row in regrets))
  by_cell = study_figures.groups(regrets, 'predictor', 'source')
  predictors = list(dict.fromkeys(row['predictor'] for row in regrets))
  for (predictor, source), rows in by_cell.items():
    shift = 0.12 * (predictors.index(predictor) - (len(predictors) - 1) / 2)
    panel.plot(
      [row['above_exact'] for row in rows],
      [sources.index(source) + shift] * len(rows),
      linestyle='none',
      markersize=5,
      **_looks(predictor),
    )
  panel.axvline(0, color='0.35', linewidth=1, zorder=0)
  panel.margins(x=0.1)
  panel.set_xscale('symlog', linthresh=0.1)
  panel.xaxis.set_major_formatter(plotting.plain_number)
  panel.set_yticks(range(len(sources)), sources)
  panel.invert_yaxis()
  panel.set_ylabel('sequences of')
  panel.set_xlabel(
    'regret above the exact mixture\n(nats, log scale beyond ±0.1)'
  )
  plotting.add_grid(panel, 'x')


def _draw_curves(
  panel: matplotlib.axes.Axes,
  curves: Sequence[Row],
  colours: Mapping[str, str],
) -> None:
  by_line = study_figures.groups(curves, 'source', 'reader', 'symbols_seen')
  lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
  for (source, reader, seen), rows in by_line.items():
    mean, _ = study_figures.over_seeds(rows, 'posterior')
    lines.setdefault((source, reader), []).append((seen, mean))
  for (source, reader), points in lines.items():
    is_exact = reader == EXACT
    panel.plot(
      *zip(*points, strict=True),
      color=colours[source],
      linewidth=3 if is_exact else 0,
      alpha=0.5 if is_exact else 1,
      marker=None if is_exact else '.',
      markersize=4,
    )
  panel.set_xlabel('symbols seen')
  panel.set_ylabel('P(true source | past), mean')
  panel.set_ylim(bottom=0)
  plotting.add_grid(panel)


def _draw_scores(
  panel: matplotlib.axes.Axes, scores: Sequence[Row], sources: Sequence[str]
) -> None:
  for row in scores:
    if row['r2_given_time'] is None:
      continue
    looks = _looks(row['predictor'])
    panel.plot(
      row['r2_given_time'],
      sources.index(row['source']),
      markersize=6,
      markerfacecolor=looks['color'] if row['is_trained'] else 'white',
      **looks,
    )
  panel.set_yticks(range(len(sources)), [f'P({name})' for name in sources])
  panel.invert_yaxis()
  panel.set_xlim(0, 1)
  panel.set_xlabel(
    'share of the posterior explained\nby the state (open: before training)'
  )
  plotting.add_grid(panel)


def define_flags() -> None:
  """Defines the flags; not at import, so that scripts do not meet in a test."""
  define = cli.FlagDefiner()
  define.string('sweep_dir', 'runs/sweeps/mixture', 'Sweep directory.')
  define.string('output_dir', 'results/mixture', 'Folder of the tables.')
  define.integer(
    'num_sequences',
    10_240,
    'Fresh sequences for the regrets.',
    lower_bound=64,
  )
  define.integer(
    'num_probed',
    2_048,
    'Fresh sequences for the linear map, half of them to fit it.',
    lower_bound=64,
  )
  define.seed('Seed of all sequences.')


def measure(
  network: trained_networks.Network,
  num_sequences: int,
  num_probed: int,
  seed: int,
) -> tuple[list[Row], list[Row], list[Row]]:
  """Returns the rows of all tables: regrets, scores and curves.

  Args:
    network: Network that was trained on a mixture.
    num_sequences: Sequences for the regrets.
    num_probed: Sequences for the linear map.
    seed: Seed of all sequences.

  Raises:
    ValueError: If the source is no mixture with an exact predictor.
  """
  seq_length = network.config.train.seq_length
  mixture = mixture_of(network.config.data, seq_length)
  keys = jax.random.split(jax.random.key(base_config.check_seed('seed', seed)))
  of_regret, of_probe = (
    draw_sample(mixture.generator, number, seq_length, key)
    for number, key in zip((num_sequences, num_probed), keys, strict=True)
  )
  regrets = regret_rows(network, mixture, of_regret)
  return regrets, *posterior_rows(network, mixture, of_probe)


def main(argv: list[str]) -> None:
  """Measures, prints and writes."""
  cli.start(argv)
  values = flags.FLAGS
  folder = cli.make_folder(values.output_dir)
  try:
    networks = trained_networks.networks(values.sweep_dir)
    if not networks:
      raise ValueError(f'{values.sweep_dir} has no finished network')
    tables = measure(
      networks[0], values.num_sequences, values.num_probed, values.seed
    )
  except (ValueError, OSError) as error:
    cli.end_with(error)
  # Printed before it is written, which may fail.
  text = to_markdown(*tables[:2])
  cli.say(text)
  with cli.saving(folder):
    _write(folder, text, tables)
  print(f'Wrote tables and figure.png to {folder}')


def _write(
  folder: pathlib.Path,
  text: str,
  tables: tuple[list[Row], list[Row], list[Row]],
) -> None:
  for name, rows in zip(('regret', 'probe', 'posterior'), tables, strict=True):
    atomic_files.write_csv(folder / f'{name}.csv', rows)
  atomic_files.write_whole(folder / 'table.md', text.encode())
  figure = atomic_files.to_png(draw(*tables))
  atomic_files.write_whole(folder / 'figure.png', figure)


if __name__ == '__main__':
  define_flags()
  cli.run(main)
