"""The tables that `studies` measures, in Markdown.

Every function takes the rows of a table. Numbers are means ± standard errors
over seeds.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

from nonstationary_mbml.experiments.analysis import studies
from nonstationary_mbml.experiments.analysis import study_figures as figures

Row = Mapping[str, Any]


def pivot(
  rows: Sequence[Any],
  lines: Mapping[str, Callable[[Any], str]],
  column: Callable[[Any], str],
  cell: Callable[[Sequence[Any]], str],
) -> str:
  """Returns rows as a table in Markdown, in order of appearance.

  Args:
    rows: Rows of any form.
    lines: Texts at the head of a row's line, as functions of the row, by title.
    column: Title of a row's column, as a function of the row.
    cell: Text of the rows that have a line and a column in common.
  """
  cells = {}
  for row in rows:
    line = cells.setdefault(tuple(text(row) for text in lines.values()), {})
    line.setdefault(column(row), []).append(row)
  columns = list(dict.fromkeys(column(row) for row in rows))
  return markdown(
    [*lines, *columns],
    [
      [*heads, *(cell(line[c]) if c in line else '' for c in columns)]
      for heads, line in cells.items()
    ],
  )


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
  """Returns a table in Markdown."""
  rows = [head, ['---'] * len(head), *lines]
  return '\n'.join(f'| {" | ".join(row)} |' for row in rows) + '\n'


def on_distribution(rows: Sequence[Row]) -> str:
  """Returns the regret of every predictor on every source (nats)."""
  exact = _exact_regrets(rows)

  def cell(rows: Sequence[Row]) -> str:
    regret = _mean(rows, 'regret')
    source = rows[0]['source']
    if rows[0].get('is_exact'):
      return f'**{rows[0]["regret"]:.4f}**'
    if source not in exact:
      return regret
    above, _ = figures.over_seeds(rows, 'above_exact')
    return f'{regret} ({100 * above / exact[source]:+.1f}%)'

  # Networks first, then exact predictors.
  return pivot(
    sorted(rows, key=lambda row: row['seed'] is None),
    {'predictor': _label},
    lambda row: row['source'],
    cell,
  )


def percent_above(rows: Sequence[Row]) -> str:
  """Returns regret above the exact predictor, in percent of its own."""
  exact = _exact_regrets(rows)
  return pivot(
    [row for row in _of_networks(rows) if row['source'] in exact],
    {'predictor': _label},
    lambda row: row['source'],
    lambda rows: _mean(
      rows, 'above_exact', 100 / exact[rows[0]['source']], '.2f'
    ),
  )


def off_distribution(rows: Sequence[Row]) -> str:
  """Returns the regret above the tested source's exact predictor (nats)."""
  return pivot(
    rows,
    {'predictor': _label, 'trained on': _trained_on},
    lambda row: row['tested_on'],
    lambda rows: _mean(rows, 'above_exact'),
  )


def resemblance(rows: Sequence[Row]) -> str:
  """Returns the nearest exact predictor, by KL(exact || network).

  In brackets is that divergence, in 1/1000 nats per symbol; in bold is where
  it is the predictor of the source of training.
  """

  def cell(rows: Sequence[Row]) -> str:
    nearest, divergence = nearest_exact(rows)
    text = f'{figures.exact_label(nearest)} ({1e3 * divergence:.1f})'
    return f'**{text}**' if nearest == rows[0]['trained_on'] else text

  return pivot(
    _of_networks(rows),
    {'predictor': _label, 'trained on': _trained_on},
    lambda row: row['tested_on'],
    cell,
  )


def nearest_exact(rows: Sequence[Row]) -> tuple[str, float]:
  """Returns the source of the nearest exact predictor, and the divergence.

  Args:
    rows: Rows of one case in the table off_distribution.
  """
  means = {
    column.removeprefix('kl/'): figures.over_seeds(rows, column)[0]
    for column in rows[0]
    if column.startswith('kl/')
  }
  nearest = min(means, key=means.__getitem__)
  return nearest, means[nearest]


def length_generalization(rows: Sequence[Row]) -> str:
  """Returns regret per symbol (1/1000 nats) where training ends, and beyond."""
  trained = studies.length_of_training(rows)
  ends = [trained * 2**k for k in range(studies.LENGTH_FACTOR.bit_length())]
  return pivot(
    [row for row in rows if row['last_position'] in ends],
    {
      'source': lambda row: row['trained_on'],
      'predictor': lambda row: (
        'exact' if row['predictor'] == studies.EXACT else _label(row)
      ),
    },
    lambda row: f'up to symbol {row["last_position"]}',
    lambda rows: _mean(rows, 'regret_per_symbol', 1e3, '.2f'),
  )


def post_switch_regret(rows: Sequence[Row]) -> str:
  """Returns regret (nats) of the first symbols after a switch."""
  return pivot(
    [row for row in rows if row['symbols_since'] in (1, 2, 3, 4, 8, 16, 32)],
    {'source': lambda row: row['tested_on'], 'predictor': _label},
    lambda row: str(row['symbols_since']),
    lambda rows: _mean(rows, 'regret_per_symbol'),
  )


def linear_probe(rows: Sequence[Row], column: str = 'r2_given_time') -> str:
  """Returns the share of variance that a linear map of the state explains.

  Args:
    rows: Rows of the table linear_probe.
    column: Score, `r2_given_time` or `r2`; the latter counts what only a clock
      explains.
  """
  targets, architectures = list(figures.TARGETS), list(figures.LABELS)

  def order(row: Row) -> tuple[int, int, int]:
    predictor = row['predictor']
    return (
      targets.index(row['target']),
      architectures.index(predictor)
      if predictor in architectures
      else len(architectures),
      -row['is_trained'],
    )

  def cell(rows: Sequence[Row]) -> str:
    if rows[0][column] is None:
      return 'no variance'
    return _mean(rows, column, spec='.3f')

  return pivot(
    sorted(rows, key=order),
    {
      'posterior': lambda row: figures.TARGETS[row['target']],
      'predictor': _label,
      'training': lambda row: 'after' if row['is_trained'] else 'before',
    },
    lambda row: row['source'],
    cell,
  )


def equal_beginnings(rows: Sequence[Row]) -> str:
  """Returns the lower bound of every source, in nats and percent."""
  columns = {
    'source': lambda row: row['source'],
    'at least (nats)': lambda row: (
      f'{row["above_exact"]:.4f} ± {row["above_exact_stderr"]:.4f}'
    ),
    "in percent of the exact predictor's regret": lambda row: (
      f'{100 * row["above_exact"] / row["exact_regret"]:.2f}'
    ),
  }
  return _listed(columns, rows)


def _listed(
  columns: Mapping[str, Callable[[Row], str]], rows: Sequence[Row]
) -> str:
  """A line for every row."""
  return markdown(
    list(columns), [[text(row) for text in columns.values()] for row in rows]
  )


def runs(rows: Sequence[Row]) -> str:
  """Returns where and how long every point was trained."""
  columns = {
    'source': lambda row: row['source'],
    'predictor': _label,
    'seeds': lambda row: str(row['num_seeds']),
    'steps': lambda row: str(row['steps']),
    'minutes': lambda row: f'{row["seconds"] / 60:.1f}',
    'device': lambda row: str(row['device']),
    'jax': lambda row: str(row['jax']),
  }
  return _listed(columns, rows)


def _label(row: Row) -> str:
  if row['predictor'] == studies.EXACT:
    return figures.exact_label(row['trained_on'])
  return figures.label(row['predictor'])


def _trained_on(row: Row) -> str:
  is_exact = row['predictor'] == studies.EXACT
  return '(exact)' if is_exact else row['trained_on']


def _of_networks(rows: Sequence[Row]) -> list[Row]:
  return [row for row in rows if row['seed'] is not None]


def _exact_regrets(rows: Sequence[Row]) -> dict[str, float]:
  """Regret of the exact predictor of every source that has one."""
  return {row['source']: row['regret'] for row in rows if row.get('is_exact')}


def _mean(
  rows: Sequence[Row], column: str, factor: float = 1.0, spec: str = '.4f'
) -> str:
  mean, stderr = figures.over_seeds(rows, column)
  text = f'{factor * mean:{spec}}'
  if np.isfinite(stderr):
    text += f' ± {factor * stderr:{spec}}'
  return text


# Rows, title and text of every table, in the order of tables.md.
TABLES: tuple[tuple[str, str, Callable[[Sequence[Row]], str]], ...] = (
  ('runs', 'What was trained, and for how long', runs),
  (
    'on_distribution',
    'On the source of training: regret in nats, in brackets above the exact '
    'predictor, which is in bold',
    on_distribution,
  ),
  (
    'on_distribution',
    'The same: regret above the exact predictor in percent of its own',
    percent_above,
  ),
  (
    'off_distribution',
    'On other sources: regret in nats above the exact predictor of the source '
    'that the column names',
    off_distribution,
  ),
  (
    'off_distribution',
    'The exact predictor that is nearest on the source of the column, and '
    'KL(exact || network) in 1/1000 nats per symbol; in bold where it is that '
    'of the source of training',
    resemblance,
  ),
  (
    'length_generalization',
    'Beyond the length of training: regret per symbol in 1/1000 nats, in the '
    'bin of positions that ends where the column says',
    length_generalization,
  ),
  (
    'post_switch_regret',
    'After a true switch: regret in nats of the 1st, 2nd, ... symbol of a new '
    'segment',
    post_switch_regret,
  ),
  (
    'linear_probe',
    'Linear probe: share of the variance of the exact posterior, around its '
    'mean at every time, that a linear map of the state explains',
    linear_probe,
  ),
  (
    'linear_probe',
    'The same with the variance of the means: where all depends on time, it '
    'says whether the state has a clock',
    lambda rows: linear_probe(rows, 'r2'),
  ),
  (
    'equal_beginnings',
    'What every network loses at least that does not count equal symbols at '
    'the beginning, such as a Transformer without absolute positions: regret '
    'above the exact predictor, means ± standard errors over sequences',
    equal_beginnings,
  ),
)
