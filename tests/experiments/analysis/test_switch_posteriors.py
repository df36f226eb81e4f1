import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments import ptw_predictors
from nonstationary_mbml.experiments.analysis import switch_posteriors


@pytest.mark.slow
def test_figure_is_of_one_sequence_and_its_own_posterior():
  figure = switch_posteriors.make_figure('ptw', 32, seed=1)
  top, ptw, *_ = figure.axes
  source = constants.build_data_generator(config_lib.DataConfig())
  batch, parameters = source.sample(jax.random.key(1), 64, 32)
  (truth,) = (
    line.get_ydata()
    for line in top.get_lines()
    if line.get_label() == 'true parameter'
  )
  (chosen,) = np.flatnonzero((parameters[..., 1] == truth).all(axis=1))
  switches = source.switch_points(jax.random.key(1), 64, 32)[chosen]
  assert 3 <= switches.sum() <= 6
  posterior = ptw_predictors.PTWPredictor(5).switch_posterior(
    batch[chosen, None]
  )
  (bars,) = ptw.collections
  heights = [segment[1][1] for segment in bars.get_segments()]
  np.testing.assert_allclose(heights, posterior[0], atol=1e-6)


def test_folder_that_cannot_be_written_is_an_error_in_one_line(tmp_path):
  result = subprocess.run(
    [
      sys.executable,
      pathlib.Path(switch_posteriors.__file__),
      '--output_dir=/dev/null/figures',
    ],
    cwd=tmp_path,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 1
  assert 'cannot write to /dev/null/figures' in result.stderr
  assert 'Traceback' not in result.stderr
