"""Sweeps by name: what to run to answer a question.

  SWEEPS['small']().points()

A sweep of your own is a function that returns an ExperimentSweep, and a line in
`SWEEPS`: here, or in a module for `--import`.
"""

from typing import Any

from nonstationary_mbml import base_config
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import constants

_ENCODINGS = ('NONE', 'SIN_COS', 'ALIBI', 'RELATIVE')


def _sources(
  shift_period: int, max_shift: float, **more: dict[str, Any]
) -> dict[str, dict[str, Any]]:
  """Fields of `data` by name: the paper's four kinds of source, and more."""
  return {
    'ptw': {'trajectory_generator': 'ptw'},
    'lin': {'trajectory_generator': 'lin'},
    'regular_shift': {
      'trajectory_generator': 'regular_shift',
      'trajectory_generator_kwargs': {'shift_period': shift_period},
    },
    'random_shift': {
      'trajectory_generator': 'random_shift',
      'trajectory_generator_kwargs': {
        'shift_distribution': 'uniform',
        'shift_parameters': (1.0, max_shift),
      },
    },
    **more,
  }


def _architectures(
  hidden_size: int, context_length: int, **transformer: Any
) -> dict[str, dict[str, Any]]:
  """Fields of `model` by name: all architectures.

  Args:
    hidden_size: Hidden size of the recurrent cores.
    context_length: Symbols per window of the sliding-window Transformer.
    **transformer: Architecture arguments of all Transformers.
  """
  recurrent = {
    'rnn': ('rnn', {'core': 'vanilla_rnn'}),
    'lstm': ('lstm', {}),
    'stack_rnn': ('stack_rnn', {}),
    'stack_lstm': ('stack_rnn', {'inner_core': 'lstm'}),
  }
  in_context = {
    f'transformer_{encoding.lower()}': (
      'transformer',
      {'positional_encodings': encoding},
    )
    for encoding in _ENCODINGS
  } | {
    'sliding_window': (
      'sliding_window_transformer',
      {'context_length': context_length},
    )
  }
  shared = dict.fromkeys(recurrent, {'hidden_size': hidden_size})
  shared |= dict.fromkeys(in_context, transformer)
  return {
    name: {
      'model_type': model_type,
      'architecture_kwargs': {**shared[name], **kwargs},
    }
    for name, (model_type, kwargs) in (recurrent | in_context).items()
  }


def paper() -> config_lib.ExperimentSweep:
  """A grid of the size of the paper's: ten seeds, long runs, T = 256.

  The text of the paper says: mean cumulative regret over 10,000 sequences; ten
  initialisations; architectures chosen by an ablation with five seeds for every
  setting; and four sources, with PTW and LIN priors, regular periodic and
  random uniform. All else is our reading: T, the number of steps, the three
  learning rates, the networks, and the period and lengths of the sources.
  """
  config = config_lib.ExperimentConfig(name='paper')
  config.train = base_config.TrainConfig(
    model_init_seed=tuple(range(10)),
    seq_length=256,
    batch_size=128,
    clip_grad_norm=1.0,
  )
  config.schedule = base_config.ScheduleConfig(
    training_steps=500_000, ckpt_frequency=10_000
  )
  config.logger.log_frequency = 5_000
  return config_lib.ExperimentSweep(
    general_sweep={
      'data': _sources(shift_period=20, max_shift=39.0),
      'train.learning_rate': (1e-4, 3e-4, 1e-3),
    },
    specific_sweeps=(
      {'model': _architectures(hidden_size=128, context_length=128)},
    ),
    base_config=config,
  )


def small() -> config_lib.ExperimentSweep:
  """The same questions at a size that two CPU cores finish in 80 minutes.

  Besides the four kinds of source there is PTW of a given depth, whose
  segment-length distribution does not depend on the length of its sequences.
  """
  return _small('small', 5_000, **config_lib.RECIPE)


def small_constant() -> config_lib.ExperimentSweep:
  """`small` with Adam at a constant rate, for twice the steps."""
  return _small('small_constant', 10_000, learning_rate=2e-3)


def _small(name: str, steps: int, **recipe: Any) -> config_lib.ExperimentSweep:
  """The sweep `small`, with some fields of `train`."""
  ptw_8 = {
    'trajectory_generator': 'ptw',
    'trajectory_generator_kwargs': {'depth': 8},
  }
  return config_lib.ExperimentSweep(
    general_sweep={
      'data': _sources(shift_period=8, max_shift=15.0, ptw_depth_8=ptw_8)
    },
    specific_sweeps=({'model': _small_architectures()},),
    base_config=_small_config(name, steps, **recipe),
  )


def _small_config(
  name: str, steps: int, **recipe: Any
) -> config_lib.ExperimentConfig:
  """Config of three seeds at T = 32, with some fields of `train`."""
  config = config_lib.ExperimentConfig(name=name)
  config.train = base_config.TrainConfig(
    model_init_seed=(0, 1, 2), seq_length=32, batch_size=128, **recipe
  )
  config.schedule = base_config.ScheduleConfig(
    training_steps=steps, ckpt_frequency=steps // 5
  )
  config.logger.log_frequency = steps // 40
  return config


def _small_architectures() -> dict[str, dict[str, Any]]:
  """Fields of `model` by name: all architectures, small."""
  return _architectures(
    hidden_size=64,
    context_length=16,
    embedding_dim=32,
    num_layers=2,
    num_heads=4,
    dropout_prob=0.0,
  )


def recipes() -> config_lib.ExperimentSweep:
  """Which recipe of training comes nearest, for which network, on `ptw`.

  Optimisers at several peak rates; schedules and targets of the loss; and for
  the Transformers that do not come near, the exact targets and a begin symbol:
  is it the recipe or the encoding?
  """
  models = _small_architectures()
  recurrent = _chosen(models, 'rnn', 'lstm', 'stack_rnn')
  sin_cos = _chosen(models, 'transformer_sin_cos')
  far = _chosen(
    models, 'transformer_none', 'transformer_alibi', 'transformer_relative'
  )
  begun = _begun(far)
  config = _small_config('recipes', 5_000)
  config.logger.log_frequency = 250
  return config_lib.ExperimentSweep(
    specific_sweeps=(
      _recipes_of(recurrent | sin_cos, rates=(5e-3, 1e-2, 2e-2, 4e-2)),
      _recipes_of(far, targets=('symbols', 'bayes')),
      _recipes_of(begun),
      _recipes_of(recurrent, 'adam', rates=(2e-3, 5e-3, 1e-2, 2e-2)),
      _recipes_of(recurrent, schedules=('constant', 'warmup_stable_decay')),
      _recipes_of(recurrent, targets=('parameters', 'bayes')),
      _recipes_of(
        _chosen(models, 'rnn', 'lstm'),
        schedules=('constant', 'warmup_stable_decay'),
        targets=('parameters', 'bayes'),
      ),
      # A Transformer takes as long as five recurrent networks.
      _recipes_of(sin_cos, 'adam'),
      _recipes_of(sin_cos, schedules=('constant',)),
      _recipes_of(sin_cos, targets=('bayes',)),
    ),
    base_config=config,
  )


def _chosen(models: dict[str, Any], *names: str) -> dict[str, Any]:
  return {name: models[name] for name in names}


def _with_kwargs(model: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
  """Fields of `model` with other architecture arguments."""
  return {
    **model,
    'architecture_kwargs': {**model['architecture_kwargs'], **kwargs},
  }


def _begun(models: dict[str, Any]) -> dict[str, Any]:
  """Transformers with a begin symbol, by names that say so."""
  return {
    f'{name}_begin': _with_kwargs(model, begin_symbol=True)
    for name, model in models.items()
  }


def _recipes_of(
  models: dict[str, Any],
  optimizer: str = 'muon',
  rates: tuple[float, ...] = (1e-2,),
  schedules: tuple[str, ...] = ('warmup_cosine',),
  targets: tuple[str, ...] = ('symbols',),
) -> dict[str, Any]:
  """Values of a sweep of recipes: every combination, for some networks."""
  values = {
    'train.optimizer': (optimizer,),
    'train.schedule': schedules,
    'train.target': targets,
    'train.learning_rate': rates,
    'schedule.training_steps': (5_000,),
  }
  # Named by the values alone, since all points have all of them.
  return {'model': models} | {
    path: {f'{value}': value for value in chosen}
    for path, chosen in values.items()
  }


def t256() -> config_lib.ExperimentSweep:
  """The questions of `small` at T = 256, the length of the paper as we read it.

  Reckoned from the time of steps, five hours of two CPU cores. What is hard at
  this length is the clock of `ptw`, which therefore has more steps, but for
  windows and relative encodings, for want of time. Recurrent networks have
  three seeds; Transformers, whose steps take three to eight times as long, one.
  Relative encodings have a begin symbol, without which they cannot count equal
  symbols at the beginning.
  """
  models = _t256_architectures()
  three_seeds = _chosen(models, 'rnn', 'lstm', 'stack_lstm')
  one_seed = _chosen(models, 'stack_rnn', 'transformer_sin_cos')
  rest = {n: m for n, m in models.items() if n not in three_seeds | one_seed}
  sources = _sources(shift_period=20, max_shift=39.0)
  short = (2_000, 1e-2)
  # At twice the rate, 5,000 steps on `ptw` end no nearer than 2,000: the losses
  # of some seeds jump half-way, and hardly recover.
  long = (5_000, 5e-3)
  return config_lib.ExperimentSweep(
    specific_sweeps=tuple(
      {
        'data': {name: source},
        'model': models,
        **_length_of_training(*(on_ptw if name == 'ptw' else short), num_seeds),
      }
      for models, on_ptw, num_seeds in (
        (three_seeds, long, 3),
        (one_seed, long, 1),
        (rest, short, 1),
      )
      for name, source in sources.items()
    ),
    base_config=_t256_config('t256'),
  )


def t256_bayes() -> config_lib.ExperimentSweep:
  """Points of `t256` with the exact predictor's predictions as targets.

  Is what the networks of `t256` lose a limit of theirs, or of optimisation on
  the noise of symbols?
  """
  config = _t256_config('t256_bayes')
  config.train.target = 'bayes'
  models = _t256_architectures()
  return _on_ptw_and_lin(
    config,
    _chosen(models, 'lstm', 'stack_lstm', 'transformer_sin_cos'),
    num_seeds=1,
  )


def t256_large() -> config_lib.ExperimentSweep:
  """Larger networks than those of `t256`, of four seeds, for a GPU.

  An LSTM of twice the width, a Stack-LSTM likewise, and a Transformer of five
  layers, trained for the steps of `t256`.
  """
  models = _t256_architectures()
  return _on_ptw_and_lin(
    _t256_config('t256_large'),
    {
      'lstm': _with_kwargs(models['lstm'], hidden_size=256),
      'stack_lstm': _with_kwargs(models['stack_lstm'], hidden_size=128),
      'transformer_sin_cos': _with_kwargs(
        models['transformer_sin_cos'], num_layers=5
      ),
    },
    num_seeds=4,
  )


def t256_long() -> config_lib.ExperimentSweep:
  """Can networks without gates learn the clock of `ptw`?

  After the steps of `t256` they lose 16 to 21% there. Here they have 16 times
  as many, an hour of one CPU core each; and half of that with weight decay,
  without which Muon's steps make the weights ever larger.
  """
  models = _chosen(_t256_architectures(), 'rnn', 'stack_rnn')
  config = _t256_config('t256_long')
  config.schedule.ckpt_frequency = 1_000
  config.logger.log_frequency = 500
  decayed = _length_of_training(40_000, 5e-3, num_seeds=1)
  decayed['train'] = {
    'weight_decay=0.1': {
      **decayed['train']['seeds=1'],
      'optimizer_kwargs': {'weight_decay': 0.1},
    }
  }
  return config_lib.ExperimentSweep(
    general_sweep={
      'data': _chosen(_sources(shift_period=20, max_shift=39.0), 'ptw')
    },
    specific_sweeps=(
      {'model': models, **_length_of_training(80_000, 5e-3, num_seeds=1)},
      {
        'model': {f'{name}_decay': model for name, model in models.items()},
        **decayed,
      },
    ),
    base_config=config,
  )


def t256_width() -> config_lib.ExperimentSweep:
  """Is a wide LSTM better than a narrow one that has the same time?

  The numbers of steps are those of five minutes of one CPU core.
  """
  sources = _sources(shift_period=20, max_shift=39.0)
  return config_lib.ExperimentSweep(
    general_sweep={'data': _chosen(sources, 'ptw', 'lin')},
    specific_sweeps=tuple(
      {
        'model': {
          f'lstm_{width}': {
            'model_type': 'lstm',
            'architecture_kwargs': {'hidden_size': width},
          }
        },
        **_length_of_training(steps, 5e-3, num_seeds=1),
      }
      for width, steps in ((32, 12_000), (64, 5_500), (128, 2_300), (256, 700))
    ),
    base_config=_t256_config('t256_width'),
  )


def _on_ptw_and_lin(
  config: config_lib.ExperimentConfig, models: dict[str, Any], num_seeds: int
) -> config_lib.ExperimentSweep:
  """Sweep of some networks on two sources, each as long as in `t256`."""
  sources = _sources(shift_period=20, max_shift=39.0)
  return config_lib.ExperimentSweep(
    specific_sweeps=tuple(
      {
        'data': {name: sources[name]},
        'model': models,
        **_length_of_training(*length, num_seeds),
      }
      for name, length in (('ptw', (5_000, 5e-3)), ('lin', (2_000, 1e-2)))
    ),
    base_config=config,
  )


def _t256_architectures() -> dict[str, dict[str, Any]]:
  """Fields of `model` by name: the architectures of `t256`."""
  models = _architectures(
    hidden_size=128,
    context_length=32,
    embedding_dim=64,
    num_layers=2,
    num_heads=8,
    dropout_prob=0.0,
  )
  stacks = {
    name: _with_kwargs(models[name], hidden_size=64, stack_size=32)
    for name in ('stack_rnn', 'stack_lstm')
  }
  relative = _chosen(models, 'transformer_alibi', 'transformer_relative')
  others = _chosen(
    models, 'rnn', 'lstm', 'transformer_sin_cos', 'sliding_window'
  )
  return others | stacks | _begun(relative)


def _t256_config(name: str) -> config_lib.ExperimentConfig:
  """Config of sequences of 256 symbols, with the recipe of the project."""
  config = config_lib.ExperimentConfig(name=name)
  config.train = base_config.TrainConfig(
    seq_length=256, batch_size=128, **config_lib.RECIPE
  )
  config.schedule = base_config.ScheduleConfig(ckpt_frequency=250)
  config.logger.log_frequency = 50
  return config


def _length_of_training(
  steps: int, peak: float, num_seeds: int
) -> dict[str, Any]:
  """Values of a sweep by name: steps, the peak of the rate, and seeds."""
  fields = {
    'model_init_seed': tuple(range(num_seeds)),
    'learning_rate': peak,
  }
  return {
    'train': {f'seeds={num_seeds}': fields},
    'schedule': {f'steps={steps}': {'training_steps': steps}},
  }


def mixture() -> config_lib.ExperimentSweep:
  """An LSTM on sequences of four sources: does it infer which one it is?

  The source is that of `--source=mixture`. Beside the exact mixture are the
  predictors that know the source of one part of the sequences.
  """
  config = config_lib.ExperimentConfig(name='mixture')
  config.train = base_config.TrainConfig(
    model_init_seed=(0, 1, 2),
    optimizer='muon',
    schedule='warmup_cosine',
    learning_rate=2e-2,
    seq_length=64,
    batch_size=128,
  )
  config.schedule = base_config.ScheduleConfig(
    training_steps=5_000, ckpt_frequency=1_000
  )
  config.logger.log_frequency = 250
  config.eval.batch_size = 512
  config.eval.optimal_predictors = (
    constants.EXACT,
    'ptw',
    'lad',
    'random_shift',
    'kt',
  )
  config.eval.optimal_predictors_kwargs = {
    'random_shift': constants.source_kwargs('random_shift')
  }
  return config_lib.ExperimentSweep(
    general_sweep={
      'data': {
        'mixture': {
          'trajectory_generator': 'mixture',
          'trajectory_generator_kwargs': constants.source_kwargs('mixture'),
        }
      }
    },
    specific_sweeps=(
      {
        'model': {
          'lstm': {
            'model_type': 'lstm',
            'architecture_kwargs': {'hidden_size': 64},
          }
        }
      },
    ),
    base_config=config,
  )


def tiny() -> config_lib.ExperimentSweep:
  """Six short runs, to see a sweep from start to end in a minute."""
  config = config_lib.ExperimentConfig(name='tiny')
  config.train = base_config.TrainConfig(
    model_init_seed=(0, 1), seq_length=8, batch_size=16
  )
  config.schedule = base_config.ScheduleConfig(
    training_steps=300, num_saves=2, ckpt_frequency=100
  )
  config.logger.log_frequency = 50
  config.eval.batch_size = 128
  return config_lib.ExperimentSweep(
    general_sweep={
      'data': {name: {'trajectory_generator': name} for name in ('ptw', 'lin')},
      'model': {
        name: architecture
        for name, architecture in _architectures(8, 8).items()
        if name in ('rnn', 'lstm', 'stack_rnn')
      },
    },
    base_config=config,
  )


SWEEPS = base_config.Registry(
  'sweep',
  {
    'mixture': mixture,
    'paper': paper,
    'recipes': recipes,
    'small': small,
    'small_constant': small_constant,
    't256': t256,
    't256_bayes': t256_bayes,
    't256_large': t256_large,
    't256_long': t256_long,
    't256_width': t256_width,
    'tiny': tiny,
  },
)
