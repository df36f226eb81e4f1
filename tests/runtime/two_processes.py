"""What one of two processes does in `test_multihost`; also run by the test.

  python two_processes.py <port> <process_id> <folder>

Trains and evaluates on two devices, and writes results to <folder>/<id>.json.
"""

import errno
import json
import os
import pathlib
import sys

import jax
import numpy as np

from nonstationary_mbml import base_config
from nonstationary_mbml import train
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments import evaluator as evaluator_lib
from nonstationary_mbml.runtime import checkpointing
from nonstationary_mbml.runtime import multihost
from nonstationary_mbml.runtime import sharding


def make_config(**train_kwargs):
  return config_lib.post_process_config(
    config_lib.ExperimentConfig(
      # The least to compile.
      data=config_lib.DataConfig(trajectory_generator='static'),
      model=base_config.ModelConfig(
        model_type='lstm', architecture_kwargs={'hidden_size': 4}
      ),
      train=base_config.TrainConfig(
        **{'seq_length': 8, 'batch_size': 4, **train_kwargs}
      ),
      schedule=base_config.ScheduleConfig(
        training_steps=20, num_saves=2, ckpt_frequency=8
      ),
      logger=base_config.LoggerConfig(log_frequency=5),
      # Not a multiple of the devices.
      eval=config_lib.EvalConfig(batch_size=5, optimal_predictors=('kt',)),
    )
  )


class _Evaluator:
  """Measures next to nothing, but from the parameters of every member."""

  alphabet_size = 2

  def step(self, predictor_params, predictor_state, rng):
    (first, *_) = jax.tree.leaves(predictor_params)
    return {'first': first.ravel()[0], 'key': jax.random.uniform(rng)}


# How batches and members meet in two devices.
TRAININGS = {
  # Shares of a batch, and of the state that is carried over.
  'network': (
    make_config(reset_predictor_init_state=False),
    evaluator_lib.build_evaluator,
  ),
  # A member each.
  'ensemble': (
    make_config(model_init_seed=(0, 7), ema_decay=0.9),
    lambda predictor, config: _Evaluator(),
  ),
}


def train_all(folder):
  """The results of training by name."""
  return {
    name: train.train(
      config,
      constants.build_data_generator,
      build_evaluator,
      folder=folder / name,
      callbacks=[
        lambda *args: (folder / f'called_by_{jax.process_index()}').touch()
      ],
    )
    for name, (config, build_evaluator) in TRAININGS.items()
  }


def params_and_logs(results):
  """What is left of training, for JSON."""
  return {
    name: {
      'log': list(result.member_histories) or result.history,
      'params': [
        np.asarray(x).tolist() for x in jax.tree.leaves(result.all_params)
      ],
    }
    for name, result in results.items()
  }


def regrets(result):
  """An evaluation of a network, for JSON."""
  values = result.evaluator.evaluate(result.params, jax.random.key(1), 12)
  return {name: value.tolist() for name, value in values.items()}


def agreement(folder):
  """What processes learn from each other, for JSON."""
  own = jax.process_index()

  def fail():
    if own == 1:
      raise ValueError(f'wrong in process {own}')

  def message(function):
    try:
      function()
    except Exception as error:
      return f'{type(error).__name__}: {error}'

  checkpoints = checkpointing.Checkpoints(folder / 'checkpoints')
  mesh = sharding.make(jax.devices())
  tree = sharding.place({'x': np.arange(3.0)}, sharding.replicated(mesh))
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
  )
  for step in (1, 2):
    checkpoints.save(step, tree)
  checkpoints.wait()

  def restore(step):
    return checkpoints.restore(step, abstract)['x'].addressable_data(0).tolist()

  # What one process does not see, or cannot read.
  if own == 1:
    steps = checkpoints.steps
    checkpoints.steps = lambda: steps()[:1]
    multihost.SHARED_SECONDS = 0
  unseen = message(lambda: restore(2))
  checkpoints.steps = lambda: (1, 2, 3)
  unreadable = message(lambda: restore(3 if own == 1 else 2))
  restored = restore(1)

  def fill_disk():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  class TwoPartError(LookupError):
    def __init__(self, first, second):
      super().__init__(first + second)

  def fail_in_two_parts():
    raise TwoPartError('of two ', 'parts')

  try:
    multihost.on_primary(fail_in_two_parts)
  except LookupError as error:
    in_two_parts = [isinstance(error, TwoPartError), str(error)]

  return {
    'in_two_parts': in_two_parts == [own == 0, 'of two parts'],
    'first': multihost.on_primary(lambda: (10 + own, None, 'ä')),
    'agree': multihost.max_over_processes([own, -own, 7]),
    'everywhere': message(lambda: multihost.on_all(fail)),
    'fails_in_first': message(lambda: multihost.on_primary(lambda: 1 // own)),
    'disk_is_full': message(lambda: multihost.on_primary(fill_disk)),
    'no_plain_data': message(lambda: multihost.on_primary(set)),
    'same': message(lambda: multihost.check_same('their x', {'x': (3, None)})),
    'other': message(lambda: multihost.check_same('their x', {'x': own})),
    'devices': [
      device.process_index
      for device in train.build_components(
        make_config(),
        constants.build_data_generator,
        evaluator_lib.build_evaluator,
      ).devices
    ],
    'large': len(multihost.on_primary(lambda: 'x' * 100_000)),
    'unseen': unseen,
    'unreadable': unreadable[:60],
    'restored': restored,
  }


def main():
  port, process_id, folder = sys.argv[1:]
  process_id, folder = int(process_id), pathlib.Path(folder)
  jax.config.update('jax_num_cpu_devices', 1)
  multihost.start(f'127.0.0.1:{port}', 2, process_id, timeout=120)
  content = {'agreement': agreement(folder)}
  trained = train_all(folder)
  content['trained'] = params_and_logs(trained)
  content['regrets'] = regrets(trained['network'])
  (folder / f'{process_id}.json').write_text(json.dumps(content))


if __name__ == '__main__':
  main()
