import argparse
import dataclasses
import json

import pytest


@pytest.fixture
def time_to_bayes(benchmarks):
  import time_to_bayes

  return time_to_bayes


def _tiny(time_to_bayes):
  case = time_to_bayes.cases()[0]
  return dataclasses.replace(
    case,
    model={'model_type': 'lstm', 'architecture_kwargs': {'hidden_size': 4}},
    seq_length=8,
    steps=(5, 10),
  )


def test_a_constant_rate_is_read_on_the_way_and_others_are_trained_anew(
  time_to_bayes,
):
  case = _tiny(time_to_bayes)
  constant = list(time_to_bayes.measure(case, 'Adam, constant', (0, 1), 64))
  assert [row['steps'] for row in constant] == [5, 10, 20]
  # One training: one time of a step.
  per_step = [row['seconds'] / row['steps'] for row in constant]
  assert per_step == pytest.approx(per_step[:1] * 3)
  cosine = list(time_to_bayes.measure(case, 'Muon, cosine', (0, 1), 64))
  assert [row['steps'] for row in cosine] == [5, 10]
  for row in constant + cosine:
    assert row['percent'] > 0 and row['percent_stderr'] > 0
    assert row['case'] == 'LSTM-64, ptw, T=8' and row['seeds'] == 2


def test_table_has_the_quickest_that_is_near_enough(time_to_bayes):
  row = lambda steps, percent, recipe='a': {
    'case': 'LSTM',
    'recipe': recipe,
    'steps': steps,
    'seconds': steps / 100,
    'percent': percent,
    'percent_stderr': None,
    'seeds': 1,
  }
  rows = [row(100, 6.0), row(200, 1.5), row(400, 1.2), row(50, 9.0, 'b')]
  lines = time_to_bayes.markdown(rows).splitlines()
  assert lines[0].startswith('| network, source | recipe | 5% | 2% | 1% |')
  assert lines[2:] == [
    '| LSTM | a | 2 s (200 steps) | 2 s (200 steps) | – | – | – | '
    '1.20% in 4 s (400 steps) |',
    '| LSTM | b | – | – | – | – | – | 9.00% in 0.5 s (50 steps) |',
  ]


def test_only_times_keeps_what_was_reached(
  time_to_bayes, tmp_path, monkeypatch
):
  case = _tiny(time_to_bayes)
  recipe = 'Muon, cosine'
  row = {'case': case.name, 'recipe': recipe, 'steps': 10, 'percent': 3.0}
  # Rows are in the order of the cases, which this one takes the place of.
  monkeypatch.setattr(time_to_bayes, 'cases', lambda: [case])
  results = {'rows': [{**row, 'seconds': 1e6}]}
  args = argparse.Namespace(only_times=True, output=tmp_path / 'times.json')
  time_to_bayes._replace_rows(results, case, recipe, args)
  (new,) = json.loads(args.output.read_text())['rows']
  assert {**new, 'seconds': None} == {**row, 'seconds': None}
  assert 0 < new['seconds'] < 1e3
