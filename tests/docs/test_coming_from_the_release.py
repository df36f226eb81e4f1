import pathlib
import re

import numpy as np
from scipy import stats

from nonstationary_mbml.experiments import constants

ROOT = pathlib.Path(__file__).parent.parent.parent
PAGE = ROOT / 'docs' / 'coming_from_the_release.md'
BLOCKS = re.findall(r'```python\n(.*?)```', PAGE.read_text(), re.DOTALL)


def _execute(block):
  names = {}
  exec(block, names)
  return names


def test_names_of_the_release_have_the_counterparts_that_the_page_shows():
  names = _execute(BLOCKS[0])
  assert names['x'].shape == (5, 1)
  np.testing.assert_allclose(
    names['densities'], stats.beta.pdf(names['x'][:, 0], 2, 3), rtol=1e-5
  )
  whole, _ = names['ptw'].unroll({}, None, names['batch'])
  np.testing.assert_allclose(names['log_probs'], whole[:, 3], atol=1e-6)


def test_defaults_of_the_release_are_a_config_that_can_be_trained():
  config = _execute(BLOCKS[1])['config']
  constants.check(config)
  assert (config.train.learning_rate, config.train.seq_length) == (1e-4, 20)
  assert config.schedule.training_steps == 100_000
  assert config.eval.optimal_predictors[0] == 'kt'
  assert config.model.architecture_kwargs == {
    'context_length': 10,
    'positional_encodings': 'ALIBI',
  }


def test_no_block_of_the_page_is_left_out():
  assert len(BLOCKS) == 2
