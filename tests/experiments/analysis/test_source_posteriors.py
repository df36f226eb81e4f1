import pathlib

import jax
import numpy as np
import pytest

from nonstationary_mbml import base_config
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments.analysis import source_posteriors
from nonstationary_mbml.experiments.analysis import trained_networks
from nonstationary_mbml.runtime import atomic_files

COMMITTED = pathlib.Path(__file__).parents[3] / 'results' / 'mixture'
SEQ_LENGTH = 8
_REGULAR = {
  'trajectory_generator': 'regular_shift',
  'trajectory_generator_kwargs': {'shift_period': 3},
}
SOURCES = (
  {'trajectory_generator': 'static', 'weight': 0.5},
  {**_REGULAR, 'weight': 0.25},
  {'trajectory_generator': 'lin', 'weight': 0.25},
)


def _data(source='mixture', **kwargs):
  return config_lib.DataConfig(
    trajectory_generator=source, trajectory_generator_kwargs=kwargs
  )


@pytest.fixture(scope='module')
def mixture():
  return source_posteriors.mixture_of(_data(sources=SOURCES), SEQ_LENGTH)


@pytest.fixture(scope='module')
def sample(mixture):
  return source_posteriors.draw_sample(
    mixture.generator, 400, SEQ_LENGTH, jax.random.key(0)
  )


@pytest.fixture
def network():
  """One whose predictions and states the tests make up."""
  return trained_networks.Network(
    source='mixture',
    architecture='lstm',
    folder=pathlib.Path('nowhere'),
    config=config_lib.ExperimentConfig(
      data=_data(sources=SOURCES),
      model=base_config.ModelConfig(model_type='lstm'),
    ),
    table=[],
    seeds=(5, 6),
  )


def test_sources_of_one_kind_are_numbered():
  mixture = source_posteriors.mixture_of(
    _data(sources=(_REGULAR, {'trajectory_generator': 'PTW'}, _REGULAR)), 8
  )
  assert mixture.names == ('regular_shift 1', 'ptw', 'regular_shift 3')
  assert mixture.labels == ('regular_shift 1', 'PTW', 'regular_shift 3')


@pytest.mark.parametrize(
  'data',
  [
    _data('ptw'),
    _data(
      sources=(
        {
          'trajectory_generator': 'recurring',
          'trajectory_generator_kwargs': constants.source_kwargs('recurring'),
        },
      )
    ),
  ],
)
def test_what_is_no_mixture_with_an_exact_predictor_is_refused(data):
  with pytest.raises(ValueError, match='takes a mixture of sources, all with'):
    source_posteriors.mixture_of(data, 8)


def test_sequences_are_of_the_source_of_their_index(sample):
  changes = np.diff(sample.parameters[..., 0], axis=1) != 0
  assert not changes[sample.index == 0].any()
  period = np.array([False, False, True, False, False, True, False])
  assert np.all(changes[sample.index == 1] == period)


def test_regrets_are_those_of_the_sequences_of_each_source(
  mixture, sample, network, monkeypatch
):
  kt = mixture.exact.components[0]
  members = [
    np.asarray(predictor.unroll({}, None, sample.symbols)[0])
    for predictor in (mixture.exact, kt)
  ]
  monkeypatch.setattr(
    trained_networks, 'predict', lambda network, symbols: np.stack(members)
  )
  rows = {
    (row['predictor'], row['seed'], row['source']): row
    for row in source_posteriors.regret_rows(network, mixture, sample)
  }
  assert len(rows) == (1 + 3 + 3 + 2) * 4
  regret = trained_networks.regret(members[1], sample.parameters).sum(axis=1)
  exact = trained_networks.regret(members[0], sample.parameters).sum(axis=1)
  for number, source in enumerate(mixture.names):
    chosen = sample.index == number
    row = rows['KT', None, source]
    assert row['num_sequences'] == chosen.sum()
    assert row['regret'] == pytest.approx(regret[chosen].mean(), rel=1e-5)
    above = regret[chosen] - exact[chosen]
    assert row['above_exact'] == pytest.approx(above.mean(), rel=1e-4)
    stderr = above.std(ddof=1) / np.sqrt(chosen.sum())
    assert row['above_exact_stderr'] == pytest.approx(stderr, rel=1e-4)
    assert rows['LSTM', 5, source]['above_exact'] == 0
    kt_again = rows['LSTM', 6, source]
    assert kt_again['above_exact'] == pytest.approx(row['above_exact'])
  # Who knows the source is better on its sequences, and worse on all.
  assert rows['KT', None, 'static']['above_exact'] < 0
  assert rows['KT', None, 'all']['above_exact'] > 0
  # Who knows all other sources loses on its sequences.
  assert rows['without lin', None, 'lin']['above_exact'] > 0
  assert rows['without lin', None, 'all']['above_exact'] > 0


def test_linear_map_finds_the_posterior_in_states_that_have_it(
  mixture, sample, network, monkeypatch
):
  posteriors = np.asarray(
    mixture.exact.unroll_component_posteriors(sample.symbols)
  )
  noise = np.random.default_rng(0).normal(size=posteriors.shape)
  # Trained, the first seed knows it and the second does not.
  monkeypatch.setattr(
    trained_networks,
    'read_states',
    lambda network, symbols, untrained: np.stack(
      [noise if untrained else posteriors @ np.diag([1.0, 2, 3]), noise]
    ),
  )
  scores, curves = source_posteriors.posterior_rows(network, mixture, sample)
  for row in scores:
    knows = row['is_trained'] and row['seed'] == 5
    assert row['r2_given_time'] == pytest.approx(float(knows), abs=0.1)
  by_reader = {
    (row['reader'], row['seed'], row['source'], row['symbols_seen']): row[
      'posterior'
    ]
    for row in curves
  }
  assert len(curves) == 3 * 3 * SEQ_LENGTH
  for number, source in enumerate(mixture.names):
    truth = posteriors[200:, :, number][sample.index[200:] == number]
    for time in range(SEQ_LENGTH):
      exact = by_reader['exact', None, source, time + 1]
      assert exact == pytest.approx(truth[:, time].mean(), rel=1e-5)
      read = by_reader['LSTM', 5, source, time + 1]
      assert read == pytest.approx(exact, abs=1e-3)


@pytest.fixture(scope='module')
def committed():
  return [
    atomic_files.read_csv(COMMITTED / f'{name}.csv')
    for name in ('regret', 'probe', 'posterior')
  ]


def test_committed_table_is_of_its_rows(committed):
  regrets, scores, _ = committed
  text = (COMMITTED / 'table.md').read_text()
  assert source_posteriors.to_markdown(regrets, scores) == text


def test_committed_figure_shows_every_row(committed):
  regrets, scores, curves = committed
  left, middle, right = source_posteriors.draw(*committed).axes
  points = sum(len(line.get_xdata()) for line in left.get_lines()) - 2
  # The mixture is the line at 0; those that lack a source are not shown.
  assert points == sum(
    not row['predictor'].startswith(('Bayes mixture', 'without'))
    for row in regrets
  )
  lengths = {len(line.get_xdata()) for line in middle.get_lines()}
  assert lengths == {max(row['symbols_seen'] for row in curves)}
  assert len(right.get_lines()) == len(scores)


def test_committed_network_is_near_the_exact_mixture(committed):
  """Nearer than any predictor that takes one source for granted."""
  regrets = committed[0]
  above = {
    row['predictor']: row['above_exact']
    for row in regrets
    if row['source'] == 'all' and row['seed'] is None
  }
  exact = regrets[0]['regret']
  networks = [
    row for row in regrets if row['source'] == 'all' and row['seed'] is not None
  ]
  assert len(networks) == 3
  for row in networks:
    assert 0 < row['above_exact'] < 0.02 * exact
    assert all(
      row['above_exact'] < value
      for name, value in above.items()
      if name in ('PTW', 'LAD', 'KT', 'known length distribution')
    )
