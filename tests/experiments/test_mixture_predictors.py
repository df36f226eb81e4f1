import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nonstationary_mbml import predictors
from nonstationary_mbml.experiments import forget_me_not_predictors
from nonstationary_mbml.experiments import live_and_die_predictors
from nonstationary_mbml.experiments import mixture_predictors
from nonstationary_mbml.experiments import ptw_predictors
from nonstationary_mbml.experiments import run_length_predictors
from nonstationary_mbml.runtime import devices
from nonstationary_mbml.tests import oracles

_Mixture = mixture_predictors.MixturePredictor
_KT = predictors.OptimalCategoricalPredictor
_PTW = ptw_predictors.PTWPredictor
_LAD = live_and_die_predictors.LADPredictor
_RunLength = run_length_predictors.RunLengthPredictor

WEIGHTS = (0.5, 0.2, 0.3)
# The partitions of 8 symbols that PTW of depth 3, LAD and KT mix.
PARTITIONS = (
  oracles.ptw_partitions(3),
  oracles.hazard_partitions(8, oracles.lin_hazard),
  {(8,): 1.0},
)


def _mixture(concentration=0.5):
  return _Mixture(
    (_PTW(3, concentration), _LAD(concentration), _KT(concentration)), WEIGHTS
  )


def _mixed_partitions():
  """A mixture of mixtures over partitions is a mixture over partitions."""
  mixed = {}
  for weight, partitions in zip(WEIGHTS, PARTITIONS, strict=True):
    for partition, prior in partitions.items():
      mixed[partition] = mixed.get(partition, 0.0) + weight * prior
  return mixed


def _batch(symbols, alphabet_size=2, dtype=None):
  return oracles.one_hot(
    symbols, alphabet_size, dtype or jnp.result_type(float)
  )


def _random_batch(seed, batch_size, seq_length, alphabet_size=2):
  rng = np.random.default_rng(seed)
  # Each sequence has a symbol that it prefers, so that evidence differs.
  shift = rng.integers(alphabet_size, size=(batch_size, 1))
  symbols = rng.integers(2, size=(batch_size, seq_length)) * (
    rng.random((batch_size, seq_length)) < 0.5
  )
  return _batch((symbols + shift) % alphabet_size, alphabet_size)


@pytest.mark.parametrize('prior', [(0.5, 0.5), (2.0, 0.3)])
@pytest.mark.parametrize('seq_length', range(1, 7))
def test_equals_enumeration_for_all_binary_sequences(x64, seq_length, prior):
  sequences = oracles.all_sequences(2, seq_length)
  truth = oracles.mixture_predictions(sequences, _mixed_partitions(), prior)
  mixture = _mixture(prior)
  predictions, _ = mixture.unroll({}, None, _batch(sequences))
  np.testing.assert_allclose(predictions[:, :-1], truth[:, 1:], atol=1e-12)
  first = mixture.output_from_state(mixture.initial_state({}, None, 1))
  np.testing.assert_allclose(first[0], truth[0, 0], atol=1e-12)


def _evidence(sequences, priors):
  """P(first t symbols | component), `[B, T + 1, N]`, by enumeration."""
  return np.array(
    [
      [
        [
          oracles.mixture_probability(tuple(sequence[:time]), partitions, prior)
          for partitions, prior in zip(PARTITIONS, priors, strict=True)
        ]
        for time in range(len(sequence) + 1)
      ]
      for sequence in np.asarray(sequences).tolist()
    ]
  )


def test_components_of_several_priors_and_their_posterior_equal_enumeration(
  x64,
):
  priors = (1.0, 1.0, 1.0), (0.5, 2.0, 0.3), (0.5, 0.5, 0.5)
  sequences = oracles.all_sequences(3, 5)[::3]
  joint = np.array(WEIGHTS) * _evidence(sequences, priors)
  mixture = _Mixture((_PTW(3, 1.0), _LAD(priors[1]), _KT()), WEIGHTS)
  batch = _batch(sequences, 3)
  predictions, state = mixture.unroll({}, None, batch)
  # Of the symbols that came.
  drawn = (predictions[:, :-1] * batch[:, 1:]).sum(axis=-1)
  evidence = joint.sum(axis=-1)
  np.testing.assert_allclose(
    drawn, np.log(evidence[:, 2:] / evidence[:, 1:-1]), atol=1e-12
  )
  np.testing.assert_allclose(jnp.exp(predictions).sum(axis=-1), 1)
  posteriors = joint / evidence[..., None]
  np.testing.assert_allclose(
    mixture.unroll_component_posteriors(batch), posteriors[:, 1:], atol=1e-12
  )
  np.testing.assert_allclose(
    mixture.component_posterior(state), posteriors[:, -1], atol=1e-12
  )


def test_posteriors_over_switches_and_run_lengths_equal_enumeration(x64):
  sequences = oracles.all_sequences(2, 6)[::5]
  switches, run_lengths = oracles.mixture_posteriors(
    sequences, _mixed_partitions(), (0.5, 0.5)
  )
  mixture, batch = _mixture(), _batch(sequences)
  np.testing.assert_allclose(
    mixture.switch_posterior(batch), switches, atol=1e-12
  )
  np.testing.assert_allclose(
    mixture.unroll_run_lengths(batch), run_lengths, atol=1e-12
  )
  _, state = mixture.unroll({}, None, batch[:, :4])
  np.testing.assert_allclose(
    mixture.run_length_posterior(state), run_lengths[:, 3, :5], atol=1e-12
  )
  np.testing.assert_allclose(
    mixture.unroll_run_lengths(batch[:, 4:], state),
    run_lengths[:, 4:],
    atol=1e-12,
  )


def test_worked_example_of_the_module(x64):
  mixture = _Mixture((_KT(), _RunLength(1.0)))
  posteriors = mixture.unroll_component_posteriors(_batch([[0, 0]]))
  np.testing.assert_allclose(posteriors, [[[1 / 2, 1 / 2], [3 / 5, 2 / 5]]])


def test_whole_chunks_and_single_symbols_agree(x64):
  mixture, batch = _mixture((0.5, 1.0, 2.0)), _random_batch(0, 3, 8, 3)
  whole, last = mixture.unroll({}, None, batch)
  posteriors = mixture.unroll_component_posteriors(batch)

  state = mixture.empty_state(3, 3)
  for time in range(8):
    state = mixture.update(batch[:, time], state)
    np.testing.assert_allclose(
      mixture.output_from_state(state), whole[:, time], atol=1e-12
    )
  np.testing.assert_allclose(state.log_weights, last.log_weights, atol=1e-12)

  chunked, _ = predictors.unroll_in_chunks(
    mixture, {}, None, batch, chunk_length=3
  )
  np.testing.assert_allclose(chunked, whole, atol=1e-12)
  _, state = mixture.unroll({}, None, batch[:, :3])
  np.testing.assert_allclose(
    mixture.unroll_component_posteriors(batch[:, 3:], state),
    posteriors[:, 3:],
    atol=1e-12,
  )


def test_state_goes_through_jit_and_scan(x64):
  mixture = _Mixture((_PTW(4), _KT(), _LAD(max_length=12)))
  batch = jnp.asarray(_random_batch(1, 2, 12))
  whole, _ = mixture.unroll({}, None, batch)

  @jax.jit
  def continued(batch):
    first, state = mixture.unroll({}, None, batch[:, :4])
    state = state._replace(
      components=jax.tree.map(jnp.asarray, state.components)
    )

    def step(state, symbols):
      state = mixture.update(symbols, state)
      return state, mixture.output_from_state(state)

    _, rest = jax.lax.scan(step, state, batch[:, 4:].swapaxes(0, 1))
    return jnp.concatenate([first, rest.swapaxes(0, 1)], axis=1)

  np.testing.assert_allclose(continued(batch), whole, atol=1e-12)


def test_mixture_of_mixtures_is_the_mixture_of_all(x64):
  batch = _random_batch(2, 4, 8)
  nested = _Mixture((_PTW(3), _Mixture((_LAD(), _KT()), (0.4, 0.6))))
  flat = _Mixture((_PTW(3), _LAD(), _KT()), (0.5, 0.2, 0.3))
  for method in ('unroll_run_lengths', 'switch_posterior'):
    np.testing.assert_allclose(
      getattr(nested, method)(batch), getattr(flat, method)(batch), atol=1e-12
    )
  np.testing.assert_allclose(
    nested.unroll({}, None, batch)[0],
    flat.unroll({}, None, batch)[0],
    atol=1e-12,
  )


def test_equal_components_reduce_to_one(x64):
  batch = _random_batch(3, 2, 8)
  mixture = _Mixture((_LAD(), _LAD(), _LAD()))
  predictions, _ = mixture.unroll({}, None, batch)
  truth, _ = _LAD().unroll({}, None, batch)
  np.testing.assert_allclose(predictions, truth, atol=1e-12)
  np.testing.assert_allclose(mixture.unroll_component_posteriors(batch), 1 / 3)


def test_unknown_constant_hazard_equals_enumeration(x64):
  grid = (0.02, 0.1, 0.4)
  mixed = {}
  for hazard in grid:
    of_hazard = oracles.hazard_partitions(6, lambda length, h=hazard: h)
    for partition, prior in of_hazard.items():
      mixed[partition] = mixed.get(partition, 0.0) + prior / 3
  sequences = oracles.all_sequences(2, 6)
  truth = oracles.mixture_predictions(sequences, mixed, (0.5, 0.5))
  mixture = _Mixture([_RunLength(hazard) for hazard in grid])
  predictions, _ = mixture.unroll({}, None, _batch(sequences))
  np.testing.assert_allclose(predictions[:, :-1], truth[:, 1:], atol=1e-12)


class _OnlyZeros(_KT):
  """Excludes all other symbols."""

  def unroll(self, params, rng, batch, init_state=None):
    log_probs, state = super().unroll(params, rng, batch, init_state)
    return jnp.broadcast_to(self._only_zeros(log_probs), log_probs.shape), state

  def output_from_state(self, state):
    return self._only_zeros(super().output_from_state(state))

  def _only_zeros(self, log_probs):
    return jnp.zeros_like(log_probs).at[..., 1:].set(-jnp.inf)


def test_component_that_has_excluded_a_symbol_is_out_for_good(x64):
  mixture = _Mixture((_OnlyZeros(), _KT()))
  batch = _batch([[0, 0, 1, 0, 0]])
  predictions, _ = mixture.unroll({}, None, batch)
  posteriors = mixture.unroll_component_posteriors(batch)
  # KT gives 0 0 probability 3/8.
  np.testing.assert_allclose(posteriors[0, 1], [8 / 11, 3 / 11])
  np.testing.assert_array_equal(posteriors[0, 2:], [[0.0, 1.0]] * 3)
  truth, _ = _KT().unroll({}, None, batch)
  np.testing.assert_allclose(predictions[:, 2:], truth[:, 2:], atol=1e-12)


def test_float32_keeps_the_evidence_of_a_long_sequence():
  # 4,000 nats for KT, then as many against it. A sum without its remainder
  # would be off by 0.02.
  symbols = np.repeat([0, 1], 6000)[None]
  mixture = _Mixture((_KT(1e6), _KT()))
  _, state = mixture.unroll({}, None, _batch(symbols, dtype=np.float32))
  with jax.enable_x64(True):
    _, truth = mixture.unroll({}, None, _batch(symbols, dtype=np.float64))
    truth = np.asarray(jax.nn.log_softmax(truth.log_weights))
  assert -6 < truth.min() < -4
  np.testing.assert_allclose(
    jax.nn.log_softmax(state.log_weights), truth, atol=1e-3
  )


def test_narrow_floats_are_mixed_in_float32():
  batch = _random_batch(5, 2, 8)
  mixture = _mixture()
  narrow, _ = mixture.unroll({}, None, batch.astype(jnp.float16))
  wide, _ = mixture.unroll({}, None, batch.astype(jnp.float32))
  assert narrow.dtype == jnp.float16
  np.testing.assert_array_equal(narrow, wide.astype(jnp.float16))


def test_equal_mixtures_share_their_programs():
  batch = jax.device_put(np.asarray(_random_batch(6, 2, 8), np.float32))

  def use(mixture):
    mixture.unroll({}, None, batch)
    mixture.switch_posterior(batch)
    mixture.unroll_run_lengths(batch)

  mixture = _mixture()
  assert mixture == _mixture() and hash(mixture) == hash(_mixture())
  assert mixture != _mixture(0.3)
  assert mixture != _Mixture(mixture.components)
  assert copy.deepcopy(mixture) == mixture
  assert pickle.loads(pickle.dumps(mixture)) == mixture
  use(mixture)
  with devices.count_compilations() as compilations:
    use(_mixture())
  assert compilations.programs == 0


@pytest.mark.parametrize(
  ('components', 'weights', 'message'),
  [
    ((), None, 'components is empty'),
    (('ptw',), None, r"components\[0\] is 'ptw'; it must be an OptimalPre"),
    ((_KT(), _KT((1.0, 1.0, 1.0))), (0.5, 0.6), 'weights is .* sum 1.1;'),
    ((_KT(), _LAD()), (1.0, 0.0), 'must be positive and sum to 1'),
    ((_KT(), _LAD()), (1.5, -0.5), 'must be positive and sum to 1'),
    ((_KT(), _LAD()), (float('nan'), 1.0), 'must be positive and sum to 1'),
    ((_KT(), _LAD()), (1.0,), 'weights has 1 entries for 2'),
    ((_KT(), _LAD()), 'ab', "weights is 'ab'; it must be a sequence of numb"),
    (
      (_KT((1.0, 2.0)), _LAD(), _KT(alphabet_size=3)),
      None,
      r'alphabets of \[2, None, 3\] symbols; all must have the same',
    ),
  ],
)
def test_wrong_arguments_are_named(components, weights, message):
  with pytest.raises(ValueError, match=message):
    _Mixture(components, weights)


def test_weights_may_be_rounded():
  assert _Mixture([_KT()] * 3, (0.3333333, 0.3333333, 0.3333333)).weights


def test_integer_symbols_have_the_probabilities_of_one_hot_ones():
  mixture, batch = _mixture(), _random_batch(9, 2, 8)
  symbols = batch.argmax(axis=-1)
  log_probs, state = predictors.symbol_log_probs(mixture, {}, symbols[:, :3])
  rest, _ = predictors.symbol_log_probs(mixture, {}, symbols[:, 3:], state)
  found = np.concatenate([log_probs, rest], axis=1)
  predictions, _ = mixture.unroll({}, None, batch)
  truth = (predictions[:, :-1] * batch[:, 1:]).sum(axis=-1)
  np.testing.assert_allclose(found[:, 0], np.log(0.5), atol=1e-6)
  np.testing.assert_allclose(found[:, 1:], truth, atol=1e-5)


def test_sequences_and_states_that_do_not_fit_are_refused():
  mixture, batch = _mixture(), _random_batch(7, 2, 9)
  with pytest.raises(ValueError, match='depth 3 holds 8 symbols, not 9'):
    mixture.check_seq_length(9)
  with pytest.raises(ValueError, match='depth 3 holds 8 symbols, not 9'):
    mixture.unroll({}, None, batch)
  with pytest.raises(ValueError, match='KTState; MixturePredictor takes a Mix'):
    mixture.unroll({}, None, batch[:, :4], _KT().initial_state({}, None, 2))
  two = _Mixture((_PTW(3), _LAD())).initial_state({}, None, 2)
  with pytest.raises(ValueError, match='the state is of 2 components, not 3'):
    mixture.unroll({}, None, batch[:, :4], two)
  with pytest.raises(ValueError, match='for 5 sequences, the batch has 2'):
    mixture.unroll({}, None, batch[:, :4], mixture.initial_state({}, None, 5))
  with pytest.raises(ValueError, match='3 symbols, but alphabet_size is 2'):
    _mixture((0.5, 0.5)).unroll({}, None, _random_batch(8, 2, 4, 3))


@pytest.mark.parametrize('method', ['switch_posterior', 'unroll_run_lengths'])
def test_component_without_a_posterior_is_named(method):
  mixture = _Mixture((_KT(), forget_me_not_predictors.ForgetMeNotPredictor(3)))
  with pytest.raises(ValueError, match=f'Forget-Me-Not .* has no {method}'):
    getattr(mixture, method)(_random_batch(9, 2, 8))
