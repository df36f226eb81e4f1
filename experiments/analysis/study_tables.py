"""The tables that `studies` measures, as text: means over seeds.

Every function takes the rows of a table and returns a table in Markdown, whose
numbers are means ± standard errors over seeds.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

from nonstationary_mbml.experiments.analysis import studies
from nonstationary_mbml.experiments.analysis import study_figures as figures

Row = Mapping[str, Any]


def on_distribution(rows: Sequence[Row]) -> str:
  """Returns the regret of every predictor on every source (nats)."""
  own = {row['source']: row for row in rows if row.get('is_own')}
  sources = list(dict.fromkeys(row['source'] for row in rows))
  by_cell = figures.groups(rows, 'predictor', 'source')
  # Networks first, then exact predictors.
  names = dict.fromkeys(
    row['predictor'] for row in rows if row['seed'] is not None
  ) | dict.fromkeys(row['predictor'] for row in rows)

  def cell(name: str, source: str) -> str:
    of_cell = by_cell.get((name, source))
    if of_cell is None:
      return ''
    regret = _mean(of_cell, 'regret')
    if of_cell[0].get('is_own'):
      return f'**{of_cell[0]["regret"]:.4f}**'
    if source not in own:
      return regret
    above, _ = figures.over_seeds(of_cell, 'above_exact')
    return f'{regret} ({100 * above / own[source]["regret"]:+.1f}%)'

  return _markdown(
    ['predictor', *sources],
    [
      [figures.label(name), *(cell(name, source) for source in sources)]
      for name in names
    ],
  )


def percent_above(rows: Sequence[Row]) -> str:
  """Returns regret above the exact predictor, in percent of its own."""
  own = {row['source']: row['regret'] for row in rows if row.get('is_own')}
  of_networks = [row for row in rows if row['seed'] is not None]
  by_cell = figures.groups(of_networks, 'predictor', 'source')

  def cell(name: str, source: str) -> str:
    of_cell = by_cell.get((name, source))
    if of_cell is None:
      return ''
    return _mean(of_cell, 'above_exact', 100 / own[source], '.2f')

  return _markdown(
    ['predictor', *own],
    [
      [figures.label(name), *(cell(name, source) for source in own)]
      for name in dict.fromkeys(row['predictor'] for row in of_networks)
    ],
  )


def off_distribution(rows: Sequence[Row]) -> str:
  """Returns the regret above the tested source's exact predictor (nats)."""
  tested = list(dict.fromkeys(row['tested_on'] for row in rows))
  by_cell = figures.groups(rows, 'predictor', 'trained_on', 'tested_on')
  pairs = figures.groups(rows, 'predictor', 'trained_on')
  return _markdown(
    ['predictor', 'trained on', *tested],
    [
      [
        *_names(predictor, trained_on),
        *(
          _mean(by_cell[predictor, trained_on, name], 'above_exact')
          for name in tested
        ),
      ]
      for predictor, trained_on in pairs
    ],
  )


def resemblance(rows: Sequence[Row]) -> str:
  """Returns the nearest exact predictor, by KL(exact || network).

  In brackets is that divergence, in 1/1000 nats per symbol; in bold is where
  it is the predictor of the source of training.
  """
  rows = [row for row in rows if row['seed'] is not None]
  tested = list(dict.fromkeys(row['tested_on'] for row in rows))
  by_cell = figures.groups(rows, 'predictor', 'trained_on', 'tested_on')

  def cell(predictor: str, trained_on: str, name: str) -> str:
    nearest, divergence = nearest_exact(by_cell[predictor, trained_on, name])
    text = f'{figures.exact_label(nearest)} ({1e3 * divergence:.1f})'
    return f'**{text}**' if nearest == trained_on else text

  return _markdown(
    ['predictor', 'trained on', *tested],
    [
      [
        *_names(predictor, trained_on),
        *(cell(predictor, trained_on, name) for name in tested),
      ]
      for predictor, trained_on in figures.groups(
        rows, 'predictor', 'trained_on'
      )
    ],
  )


def nearest_exact(rows: Sequence[Row]) -> tuple[str, float]:
  """Returns whom the networks of some rows are nearest to, and how near.

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


def length(rows: Sequence[Row]) -> str:
  """Returns regret per symbol (1/1000 nats) where training ends, and beyond."""
  last = max(row['last_position'] for row in rows)
  trained = last // studies.LENGTH_FACTOR
  wanted = [trained * 2**k for k in range(studies.LENGTH_FACTOR.bit_length())]
  by_cell = figures.groups(rows, 'trained_on', 'predictor', 'last_position')
  cases = figures.groups(rows, 'trained_on', 'predictor')
  return _markdown(
    ['source', 'predictor', *(f'up to symbol {end}' for end in wanted)],
    [
      [
        source,
        'exact' if predictor == studies.EXACT else figures.label(predictor),
        *(
          _mean(
            by_cell[source, predictor, end], 'regret_per_symbol', 1e3, '.2f'
          )
          for end in wanted
        ),
      ]
      for source, predictor in cases
    ],
  )


def after_switch(rows: Sequence[Row]) -> str:
  """Returns regret (nats) of the first symbols after a switch."""
  last = max(row['symbols_since'] for row in rows)
  ages = [age for age in (1, 2, 3, 4, 8, 16, 32) if age <= last]
  by_cell = figures.groups(
    rows, 'tested_on', 'predictor', 'trained_on', 'symbols_since'
  )
  lines = []
  for tested_on, predictor, trained_on in figures.groups(
    rows, 'tested_on', 'predictor', 'trained_on'
  ):
    if predictor == studies.EXACT:
      name = figures.exact_label(trained_on)
    else:
      name = figures.label(predictor)
    cells = [
      by_cell.get((tested_on, predictor, trained_on, age)) for age in ages
    ]
    lines.append(
      [
        tested_on,
        name,
        *(_mean(cell, 'regret_per_symbol') if cell else '' for cell in cells),
      ]
    )
  return _markdown(['source', 'predictor', *map(str, ages)], lines)


def read_out(rows: Sequence[Row], column: str = 'r2_given_time') -> str:
  """Returns the share of variance that a linear map of the state explains.

  Args:
    rows: Rows of the table read_out.
    column: `r2_given_time`, or `r2`, which includes the share of a clock.
  """
  sources = list(dict.fromkeys(row['source'] for row in rows))
  by_cell = figures.groups(rows, 'target', 'predictor', 'is_trained', 'source')
  cases = figures.groups(rows, 'target', 'predictor', 'is_trained')

  def cell(of_cell: Sequence[Row] | None) -> str:
    if of_cell is None:
      return ''
    if of_cell[0][column] is None:
      return 'no variance'
    return _mean(of_cell, column, spec='.3f')

  return _markdown(
    ['posterior', 'predictor', 'training', *sources],
    [
      [
        figures.TARGETS[target],
        figures.label(predictor),
        'after' if is_trained else 'before',
        *(
          cell(by_cell.get((target, predictor, is_trained, source)))
          for source in sources
        ),
      ]
      for target, predictor, is_trained in sorted(
        cases,
        key=lambda case: (
          list(figures.TARGETS).index(case[0]),
          list(figures.LABELS).index(case[1])
          if case[1] in figures.LABELS
          else len(figures.LABELS),
          -case[2],
        ),
      )
    ],
  )


def runs(rows: Sequence[Row]) -> str:
  """Returns where and how long every point was trained."""
  return _markdown(
    ['source', 'predictor', 'seeds', 'steps', 'minutes', 'device', 'jax'],
    [
      [
        row['source'],
        figures.label(row['predictor']),
        str(row['num_seeds']),
        str(row['steps']),
        f'{row["seconds"] / 60:.1f}',
        str(row['device']),
        str(row['jax']),
      ]
      for row in rows
    ],
  )


def _names(predictor: str, trained_on: str) -> tuple[str, str]:
  if predictor == studies.EXACT:
    return figures.exact_label(trained_on), '(exact)'
  return figures.label(predictor), trained_on


def _mean(
  rows: Sequence[Row], column: str, factor: float = 1.0, spec: str = '.4f'
) -> str:
  mean, stderr = figures.over_seeds(rows, column)
  text = f'{factor * mean:{spec}}'
  if np.isfinite(stderr):
    text += f' ± {factor * stderr:{spec}}'
  return text


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
  rows = [head, ['---'] * len(head), *lines]
  return '\n'.join(f'| {" | ".join(row)} |' for row in rows) + '\n'


# Title and text of every table, by the name of its rows.
TABLES: dict[str, tuple[tuple[str, Callable[[Sequence[Row]], str]], ...]] = {
  'runs': (('What was trained, and for how long', runs),),
  'on_distribution': (
    (
      'On the source of training: regret in nats, in brackets above the exact '
      'predictor, which is in bold',
      on_distribution,
    ),
    (
      'The same: regret above the exact predictor in percent of its own',
      percent_above,
    ),
  ),
  'off_distribution': (
    (
      'On other sources: regret in nats above the exact predictor of the '
      'source that the column names',
      off_distribution,
    ),
    (
      'The exact predictor that is nearest on the source of the column, and '
      'KL(exact || network) in 1/1000 nats per symbol; in bold where it is '
      'that of the source of training',
      resemblance,
    ),
  ),
  'length': (
    (
      'Beyond the length of training: regret per symbol in 1/1000 nats, in the '
      'bin of positions that ends where the column says',
      length,
    ),
  ),
  'after_switch': (
    (
      'After a true switch: regret in nats of the 1st, 2nd, ... symbol of a '
      'new segment',
      after_switch,
    ),
  ),
  'read_out': (
    (
      'Read from the state: share of the variance of the exact posterior, '
      'around its mean at every time, that a linear map explains',
      read_out,
    ),
    (
      'The same with the variance of the means: where all depends on time, it '
      'says whether the state has a clock',
      lambda rows: read_out(rows, 'r2'),
    ),
  ),
}
