import pytest


@pytest.fixture
def suite(benchmarks):
  import suite

  return suite


@pytest.fixture
def run(benchmarks):
  import run

  return run


def _row(part, name, side='ours', **columns):
  return {'part': part, 'name': name, 'side': side, **columns}


def test_goals(run, suite):
  name = 'Transformer SIN_COS, T=256'
  rows = [
    _row('training', name, value=400.0, share_of_peak=0.52),
    _row('training', name, 'plain', value=2000.0),
    _row('start', name, value=400.0, start_seconds=12.0),
    {
      'part': 'alphabets',
      'name': 'LAD, K=26 / K=2',
      'unit': '',
      'value': 5.6,
      'target': '<= 5',
    },
    {
      'part': 'files',
      'name': 'KT',
      'unit': 's',
      'value': 0.06,
      'target': '<= 2',
    },
    {
      'part': 'stream',
      'name': 'PTW, state',
      'unit': 'bytes',
      'value': 492.0,
      'target': 'O(K log T)',
    },
  ]
  table = run.reached(rows, suite.Sizes())
  assert run.markdown({'to_reach': table}).splitlines()[2:] == [
    f'| {name}: step, against plain JAX | 400 ms | 2000 ms | 5 | >= 3.5 '
    '| yes |',
    f'| {name}: share of the peak | 52% |  |  | >= 0.5 | yes |',
    f'| {name}: cold start to the first step | 12 s |  |  | <= 10 | no |',
    '| alphabets: LAD, K=26 / K=2 |  |  | 5.6 | <= 5 | no |',
    '| files: KT | 0.06 s |  |  | <= 2 | yes |',
  ]


def test_import_times(run):
  rows = run.import_rows(repeats=1)
  assert [row['unit'] for row in rows] == ['s', 's']
  assert all(row['value'] > 0 for row in rows)
