import pytest


@pytest.fixture
def sweep_throughput(benchmarks):
  import sweep_throughput

  return sweep_throughput


@pytest.mark.slow
def test_points_run_in_both_ways(sweep_throughput):
  for way in (sweep_throughput._EACH, sweep_throughput._ALL):
    assert sweep_throughput.launch('lstm', way, steps=40, sources=('lin',)) > 0


def test_a_sweep_that_fails_is_an_error(sweep_throughput):
  with pytest.raises(ValueError, match='the sweep failed: .*no_such_source'):
    sweep_throughput.launch(
      'lstm', sweep_throughput._EACH, steps=40, sources=('no_such_source',)
    )


def test_table(sweep_throughput):
  rows = [
    {'architecture': 'lstm', 'way': way, 'points_per_hour': rate}
    for way, rate in (
      (sweep_throughput._ALL, 20.0),
      (sweep_throughput._EACH, 30.0),
    )
  ]
  assert sweep_throughput.markdown(rows).splitlines()[2:] == [
    '| lstm | 30 | 20 | 1.50 |'
  ]
