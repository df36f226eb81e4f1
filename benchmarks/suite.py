"""The measurements, the processes they run in, and the targets."""

from collections.abc import Iterator
import dataclasses

import networks
import timing

# Length from which on a step of a Transformer takes seconds.
_SLOW_LENGTH = 256
# Networks whose first step is timed, with the optimiser of the project's
# recipe, and the seconds that it may take.
_STARTED = {'LSTM-128': 4, 'Transformer SIN_COS': 10}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """Sizes of all measurements.

  Attributes:
    batch_size: B.
    lengths: T of the training steps; the last one is that of all else.
    loop_length: T of a run that is fast.
    loop_steps: Its steps between two logs.
    num_layers: Number of layers of the Transformers.
    num_sequences: Sequences of an evaluation; a multiple of B.
    matmul_size: Rows and columns of a matrix.
    copy_size: Numbers that are read and written.
  """

  batch_size: int = 128
  lengths: tuple[int, ...] = (64, 256)
  loop_length: int = 32
  loop_steps: int = 100
  num_layers: int = 5
  num_sequences: int = 1024
  matmul_size: int = 4096
  copy_size: int = 2**27


QUICK = Sizes(
  batch_size=8,
  lengths=(16,),
  loop_length=8,
  loop_steps=10,
  num_layers=1,
  num_sequences=32,
  matmul_size=256,
  copy_size=2**20,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
  """Sides that take turns.

  Attributes:
    part: Part of the suite.
    name: Name of the work that all sides do.
    jobs: Job of each side, by its name; the others are compared with the first.
    is_whole: Whether turns are compared as a whole, not by their steps.
    is_slow: Whether few turns have to do.
  """

  part: str
  name: str
  jobs: dict[str, timing.Job]
  is_whole: bool = False
  is_slow: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
  """A ratio, or a value of ours, to be reached.

  Attributes:
    name: Name of the row.
    part: Part of the suite.
    group: Name of the group.
    ours: Side.
    against: Side; None bounds the value of ours alone.
    field: Column of the rows of both sides: time, memory or share of peak.
    at_least: Lower bound on against / ours, or on ours; None if `at_most` is
      given.
    at_most: Upper bound on ours / against, or on ours.
  """

  name: str
  part: str
  group: str
  ours: str = 'ours'
  against: str | None = 'plain'
  field: str = 'value'
  at_least: float | None = None
  at_most: float | None = None


def cpu_groups(sizes: Sizes) -> Iterator[Group]:
  """Returns all groups, for a CPU."""
  length = sizes.lengths[-1]
  for seq_length in sizes.lengths:
    named = networks.networks(seq_length, sizes.num_layers)
    for name, (model_type, kwargs) in named.items():
      yield _training_group(name, _ours(model_type, kwargs, sizes, seq_length))

  yield Group(
    part='transformers',
    name=_row_name('Transformer', length),
    jobs={
      name: _ours(model_type, kwargs, sizes, length)
      for name, (model_type, kwargs) in networks.transformers(
        sizes.num_layers, length
      ).items()
    },
    is_slow=True,
  )

  named = networks.networks(length, sizes.num_layers)
  for name in ('LSTM-128', 'Transformer SIN_COS'):
    model_type, kwargs = named[name]
    ours = _ours(model_type, kwargs, sizes, length)
    is_lstm = model_type == 'lstm'
    plain_name = 'hk.LSTM' if is_lstm else 'plain attention'
    change = lambda ours=ours, **changes: dataclasses.replace(ours, **changes)
    yield Group(
      part='one by one',
      name=_row_name(name, length),
      jobs={
        'ours': ours,
        'one device': change(all_cores=False),
        'default allocator': change(huge_pages=False),
        'one device, default allocator': change(
          all_cores=False, huge_pages=False
        ),
        f'{plain_name} in our loop': change(
          network='plain', whole_batches=is_lstm
        ),
        'in bfloat16': change(compute_dtype='bfloat16'),
        **({} if is_lstm else {'whole batches': change(whole_batches=True)}),
      },
      is_slow=_is_slow(ours),
    )

  model_type, kwargs = named['Stack-RNN']
  ours = _ours(model_type, kwargs, sizes, length)
  yield Group(
    part='stack',
    name=_row_name('Stack-RNN', length),
    jobs={
      'ours': ours,
      'all states kept': dataclasses.replace(
        ours, network='keep_states', whole_batches=True
      ),
    },
  )

  for name in _STARTED:
    ours = _ours(*named[name], sizes, length)
    yield Group(
      part='start',
      name=_row_name(name, length),
      jobs={'ours': dataclasses.replace(ours, optimizer='muon', steps=1)},
      is_slow=True,
    )

  model_type, kwargs = networks.lstm(64)
  loop = dataclasses.replace(
    _ours(model_type, kwargs, sizes, sizes.loop_length), steps=sizes.loop_steps
  )
  yield Group(
    part='loop',
    name=_row_name('LSTM-64', sizes.loop_length),
    jobs={'ours': loop, 'plain': _as_a_user_would(loop)},
  )
  yield Group(
    part='seeds',
    name=f'8 of {_row_name("LSTM-64", sizes.loop_length)}',
    jobs={
      'ours': dataclasses.replace(loop, seeds=8),
      'one after another': dataclasses.replace(loop, runs=8),
    },
  )

  model_type, kwargs = networks.lstm(128)
  ours = _ours(model_type, kwargs, sizes, length)
  yield Group(
    part='evaluation',
    name=_row_name('LSTM-128', length),
    jobs={
      'ours': dataclasses.replace(
        ours, kind='evaluation', num_sequences=sizes.num_sequences
      ),
      'training': dataclasses.replace(
        ours, steps=sizes.num_sequences // sizes.batch_size
      ),
    },
    is_whole=True,
  )


def gpu_groups(sizes: Sizes) -> Iterator[Group]:
  """Returns the groups for a GPU."""
  length = sizes.lengths[-1]
  named = networks.networks(length, sizes.num_layers)
  for name in ('LSTM-128', 'Transformer SIN_COS'):
    # Enough steps for the time of their start to be negligible.
    ours = dataclasses.replace(
      _ours(*named[name], sizes, length), steps=sizes.loop_steps
    )
    yield _training_group(name, ours)
    yield Group(
      part='seeds',
      name=f'16 of {_row_name(name, length)}',
      jobs={
        'ours': dataclasses.replace(ours, seeds=16),
        'one after another': dataclasses.replace(ours, runs=16),
      },
    )


def targets(sizes: Sizes) -> tuple[Target, ...]:
  """Returns the targets."""
  length = sizes.lengths[-1]
  transformer = _row_name('Transformer SIN_COS', length)
  lstm, stack = _row_name('LSTM-128', length), _row_name('Stack-RNN', length)
  loop = _row_name('LSTM-64', sizes.loop_length)
  keep = {'part': 'stack', 'group': stack, 'against': 'all states kept'}
  short_lstm = _row_name('LSTM-128', sizes.lengths[0])
  share = {'against': None, 'field': 'share_of_peak'}
  started = {'part': 'start', 'against': None, 'field': 'start_seconds'}
  variants = {
    'RELATIVE': 1.4,
    'ALIBI': 1.1,
    'NONE': 1.1,
    'attention window': 0.65,
    'in windows': 0.5,
  }
  return (
    Target(
      name=f'{transformer}: step, against plain JAX',
      part='training',
      group=transformer,
      at_least=3.5,
    ),
    Target(
      name=f'{transformer}: step, against nn.TransformerEncoder of PyTorch',
      part='training',
      group=transformer,
      against='pytorch',
      at_least=7,
    ),
    Target(
      name=f'{transformer}: the same, with all its dropout',
      part='training',
      group=transformer,
      against='pytorch, more dropout',
      at_least=7,
    ),
    Target(
      name=f'{lstm}: step, against nn.LSTM of PyTorch',
      part='training',
      group=lstm,
      against='pytorch',
      at_least=1.5,
    ),
    Target(
      name=f'{lstm}: step, against plain JAX (hk.LSTM, hk.dynamic_unroll)',
      part='training',
      group=lstm,
      at_least=1.5,
    ),
    Target(
      name=f'{lstm}: step, against hk.LSTM, hk.dynamic_unroll in our loop',
      part='one by one',
      group=lstm,
      against='hk.LSTM in our loop',
      at_least=1.5,
    ),
    Target(
      name=f'{loop}: loop, against jitted steps on batches from the host',
      part='loop',
      group=loop,
      at_least=2,
    ),
    Target(
      name=f'{stack}: step, against a plain one that keeps all states',
      **keep,
      at_least=3,
    ),
    Target(
      name=f'{stack}: temporary memory, against keeping all states',
      **keep,
      field='temp_bytes',
      at_most=0.5,
    ),
    Target(
      name=f'{stack}: peak memory of the process, against the same',
      **keep,
      field='peak_bytes',
      at_most=0.5,
    ),
    Target(
      name=f'{lstm}: evaluation, against training on as many sequences',
      part='evaluation',
      group=lstm,
      against='training',
      at_most=1,
    ),
    Target(
      name=f'8 seeds of {loop}, against one after another',
      part='seeds',
      group=f'8 of {loop}',
      against='one after another',
      at_least=1.1,
    ),
    *(
      Target(
        name=f'{_row_name("Transformer", length)}: {name}, against SIN_COS',
        part='transformers',
        group=_row_name('Transformer', length),
        ours=name,
        against='SIN_COS',
        at_most=at_most,
      )
      for name, at_most in variants.items()
    ),
    Target(
      name=f'{transformer}: share of the peak',
      part='training',
      group=transformer,
      **share,
      at_least=0.5,
    ),
    Target(
      name=f'{short_lstm}: share of the peak',
      part='training',
      group=short_lstm,
      **share,
      at_least=0.55,
    ),
    *(
      Target(
        name=f'{_row_name(network, length)}: cold start to the first step',
        group=_row_name(network, length),
        **started,
        at_most=at_most,
      )
      for network, at_most in _STARTED.items()
    ),
  )


def _row_name(network: str, seq_length: int) -> str:
  return f'{network}, T={seq_length}'


def _ours(
  model_type: str, kwargs: networks.Kwargs, sizes: Sizes, seq_length: int
) -> timing.Job:
  """Training steps as `make run` does them, about a second of them."""
  is_transformer = 'transformer' in model_type
  if seq_length >= _SLOW_LENGTH:
    steps = 1 if is_transformer else 2 if model_type == 'stack_rnn' else 5
  else:
    steps = 4 if is_transformer else 20
  return timing.Job(
    kind='project',
    model_type=model_type,
    kwargs=kwargs,
    batch_size=sizes.batch_size,
    seq_length=seq_length,
    steps=steps,
    all_cores=True,
    huge_pages=True,
  )


def _as_a_user_would(job: timing.Job, kind: str = 'plain') -> timing.Job:
  return dataclasses.replace(job, kind=kind, all_cores=False, huge_pages=False)


def _training_group(network: str, ours: timing.Job) -> Group:
  """Training beside plain JAX, and beside PyTorch where it has the network."""
  jobs = {'ours': ours, 'plain': _as_a_user_would(ours)}
  if network in ('LSTM-128', 'Transformer SIN_COS'):
    pytorch = jobs['pytorch'] = _as_a_user_would(ours, 'pytorch')
    jobs['pytorch, huge pages'] = dataclasses.replace(pytorch, huge_pages=True)
    if network == 'Transformer SIN_COS':
      jobs['pytorch, more dropout'] = dataclasses.replace(
        pytorch, network='pytorch_defaults'
      )
  return Group(
    part='training',
    name=_row_name(network, ours.seq_length),
    jobs=jobs,
    is_slow=_is_slow(ours),
  )


def _is_slow(job: timing.Job) -> bool:
  return job.model_type == 'transformer' and job.seq_length >= _SLOW_LENGTH
