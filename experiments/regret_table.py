"""Tables of regret: a network, or an ensemble of them, beside exact Bayes."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import numpy as np

from nonstationary_mbml import predictor_factories
from nonstationary_mbml import predictors
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments import evaluator as evaluator_lib
from nonstationary_mbml.runtime import statistics
from nonstationary_mbml.runtime import trained_run


class Table(NamedTuple):
  """Regrets of all predictors on the same sequences.

  Attributes:
    rows: Rows from `results_table`.
    exact: Name of the source's own Bayes predictor; None if it has none.
    names: Label of each predictor, by its name in the evaluator.
  """

  rows: list[dict[str, Any]]
  exact: str | None
  names: dict[str, str]


def make_table(
  run: trained_run.Run,
  evaluator: evaluator_lib.MetaLearningEvaluator,
  rng: jax.Array,
  num_sequences: int,
  use_tqdm: bool = False,
) -> Table:
  """Evaluates all members of a run on fresh sequences.

  Args:
    run: The run.
    evaluator: Evaluator of its network, built from its `config.eval`.
    rng: Key of the sequences, which all members read.
    num_sequences: Number of sequences, N.
    use_tqdm: Show progress.
  """

  def measure(
    member_params: Callable[[int], predictors.Params],
  ) -> dict[str, np.ndarray]:
    by_member = [
      evaluator.evaluate(member_params(member), rng, num_sequences, use_tqdm)
      for member in range(len(run.seeds))
    ]
    regrets = by_member[0]
    if len(run.seeds) > 1:
      regrets[evaluator_lib.NETWORK] = np.stack(
        [member[evaluator_lib.NETWORK] for member in by_member]
      )
    return regrets

  regrets = measure(run.member)
  network = predictor_factories.label(run.config.model)
  if len(run.seeds) > 1:
    network += f', {len(run.seeds)} seeds'
  exact = constants.exact_predictor(
    evaluator.generator, evaluator.optimal_predictors, evaluator.seq_length
  )
  names = {evaluator_lib.NETWORK: network}
  averaged = {}
  if run.all_ema_params is not None:
    averaged[evaluator_lib.AVERAGED] = f'{network}, averaged'
    of_average = measure(run.ema_member)
    regrets[evaluator_lib.AVERAGED] = of_average[evaluator_lib.NETWORK]
  optimal = constants.labels(evaluator.optimal_predictors)
  rows = results_table(regrets, names | averaged | optimal, exact)
  for row in rows:
    if 'seeds' in row:
      row['seeds'] = network_rows([row], run.seeds)
  return Table(rows, exact, names | optimal)


def results_table(
  regrets: Mapping[str, np.ndarray], names: dict[str, str], exact: str | None
) -> list[dict[str, Any]]:
  """Returns one row per predictor: its regret, and how far above the optimum.

  `stderr_over` says what the standard errors of a row are over: `sequences`, or
  `seeds` for an ensemble. `is_optimum` is the row that the others are measured
  from: without an exact predictor (`is_exact`) it is only the best reference,
  and what is better than it has a negative distance. The row of a network's
  averaged parameters has `is_averaged`.

  Args:
    regrets: Cumulative regret of every sequence `[N]`, by predictor, as from
      `MetaLearningEvaluator.evaluate`. For an ensemble of networks `[M, N]`:
      its standard errors are over the M members, of which it has a row each
      under `seeds`.
    names: Label of each predictor in the table, by its name in `regrets`.
    exact: Name of the source's own Bayes predictor, from which the rows are
      measured; None measures from the best of the exact predictors.
  """
  networks = (evaluator_lib.NETWORK, evaluator_lib.AVERAGED)
  references = [name for name in regrets if name not in networks]
  optimum = exact or min(
    references,
    key=lambda name: regrets[name].mean(),
    default=evaluator_lib.NETWORK,
  )

  def stderr(values: np.ndarray) -> float:
    spread_over = values.mean(axis=1) if values.ndim == 2 else values
    return float(statistics.mean_and_stderr(spread_over)[1])

  def measured(values: np.ndarray) -> dict[str, float | str]:
    # Paired: all predictors read the same sequences.
    above = values - regrets[optimum]
    return {
      'stderr_over': 'seeds' if values.ndim == 2 else 'sequences',
      'cumulative_regret': float(values.mean()),
      'stderr': stderr(values),
      'above_optimum': float(above.mean()),
      'above_optimum_stderr': stderr(above),
    }

  rows = []
  for name, shown in names.items():
    values = regrets[name]
    row = {
      'predictor': shown,
      **measured(values),
      'is_optimum': name == optimum,
      'is_exact': name == exact,
    }
    if name == evaluator_lib.AVERAGED:
      row['is_averaged'] = True
    if values.ndim == 2:
      row['seeds'] = [measured(member) for member in values]
    rows.append(row)
  return rows


def reference_rows(
  table: Sequence[Mapping[str, Any]],
) -> list[Mapping[str, Any]]:
  """Returns the rows of a table that are of exact predictors."""
  return [row for row in table[1:] if not row.get('is_averaged')]


def network_rows(
  table: Sequence[Mapping[str, Any]], seeds: Sequence[int]
) -> list[dict[str, Any]]:
  """Returns a row for every network of a table, with its `seed`.

  Args:
    table: Table from `make_table`, of one network or of an ensemble.
    seeds: Seeds of the members.
  """
  rows = table[0].get('seeds') or [table[0]]
  return [{**row, 'seed': seed} for row, seed in zip(rows, seeds, strict=True)]


def format_table(
  rows: Sequence[Mapping[str, Any]],
  head: str = 'predictor',
  is_exact: bool = True,
) -> str:
  """Returns rows as aligned text.

  Args:
    rows: Rows, as from `results_table`; each has a name under `head`.
    head: Title of the first column.
    is_exact: Whether the rows are measured from the source's exact predictor;
      else there is no telling how far from the optimum they are.
  """
  optimum = 'optimum' if is_exact else 'best reference'
  above_optimum = f'above the {optimum}'
  last = max(18, len(above_optimum))
  width = max(len(head), *(len(str(row[head])) for row in rows))
  lines = [
    f'{head:<{width}}  {"cumulative regret (nats)":>24}  '
    f'{above_optimum:>{last}}  {"± over":>9}'
  ]
  for row in rows:
    regret = f'{row["cumulative_regret"]:.4f} ± {row["stderr"]:.4f}'
    above = (
      f'{row["above_optimum"]:+.4f} ± {row["above_optimum_stderr"]:.4f}'
      if not row['is_optimum']
      else optimum
    )
    lines.append(
      f'{row[head]!s:<{width}}  {regret:>24}  {above:>{last}}  '
      f'{row["stderr_over"]:>9}'
    )
  return '\n'.join(lines)


def no_exact_predictor(source: str) -> str:
  """Returns the sentence under a table without a predictor of the source."""
  return (
    f'The {source} source has no exact predictor of its own here: distances '
    'are from\nthe best of the references, and negative for what is better.'
  )
