"""Whatever is wrong in a config is one line that names the field.

It is found before anything compiles, and not inside of JAX or Haiku. Most is
tried in this process, through the function that the launch script makes its
config with.
"""

import json
import pathlib
import subprocess
import sys
import traceback
import typing

from absl import flags
import pytest

from nonstationary_mbml import base_config
from nonstationary_mbml import train
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments import evaluator as evaluator_lib
from nonstationary_mbml.experiments import local_launch
from nonstationary_mbml.runtime import devices

SCRIPT = pathlib.Path(local_launch.__file__)
ROOT = SCRIPT.parent.parent

TRANSFORMER = '--model_type=transformer'
WINDOWS = '--model_type=sliding_window_transformer'
STACK = '--model_type=stack_rnn'
RNN = '--model_type=rnn'
REGULAR = '--source=regular_shift'
RANDOM = '--source=random_shift'
RECURRING = '--source=recurring'
MIXTURE = '--source=mixture'
DRIFT = '--source=drift'
MODEL = 'model.architecture_kwargs'
SOURCE = 'data.trajectory_generator_kwargs'
PREDICTORS = 'eval.optimal_predictors'
KWARGS = 'eval.optimal_predictors_kwargs'

# What is given, and what the message has to say. What does not begin with --
# is for --set.
CASES = {
  # Paths.
  ('train.batch_size',): "'train.batch_size': it must be path=value",
  ('=3',): "'=3': it must be path=value",
  ('train=3',): 'it is a config; set one of its fields batch_size, clip_grad',
  ('eval.data={}',): 'set one of its fields iid_distribution, iid_dist',
  ('model=lstm',): 'set one of its fields architecture_kwargs, model_type',
  ('schedule=3',): 'set one of its fields ckpt_frequency, first_save',
  ('logger=3',): 'set one of its fields log_frequency',
  ('data=ptw',): 'set one of its fields iid_distribution',
  ('trian.batch_size=3',): "'trian' is not one of .*; did you mean 'train'",
  ('train.batchsize=3',): "=3': field 'batchsize' is not .*mean 'batch_size'",
  ('eval.data.dept=3',): "'eval.data.dept=3': field 'dept' is not one of iid",
  ('seed.x=3',): "'seed.x=3': a value has no fields, and so no 'x'",
  ('train.=3',): "'train.=3': field '' is not one of batch_size",
  (f'{MODEL}.=3',): 'a name in the path is empty',
  (f'{MODEL}.hidden_size.x=3',): 'hidden_size.x: 64 has no fields',
  # The run.
  ('imports=3',): "'imports=3': the value is 3; it must be a tuple of names",
  ('imports=my-things,',): "imports 'my-things' is neither the name of a mod",
  ('imports=my_nothing,',): "my_nothing cannot .* No module named 'my_nothing'",
  ('imports=my_nothing.py,',): '/my_nothing.py cannot .*: there is no such',
  ('name=',): "name is ''; it must be a non-empty, printable string",
  ('name=a\nb',): r"name is 'a\\nb'; it must be a non-empty, printable",
  ('name=..',): "name is '..'; it must be the name of one folder, not a path",
  ('name=.',): "name is '.'; it must be the name of one folder",
  ('name=/tmp/a',): "name is '/tmp/a'; it must be the name of one folder",
  ('--name=../../a',): "name is '../../a'; it must be the name of one folder",
  ('--name=a/b',): "name is 'a/b'; it must be the name of one folder",
  ('name=a\\b',): 'it must be the name of one folder',
  ('seed=-1',): 'seed is -1; it must be an int >= 0',
  ('seed=one',): "'seed=one': the value is 'one'; it must be an int",
  ('seed=5000000000',): 'seed is 5000000000; it must be .* <= 4294967294',
  ('seed=18446744073709551616',): 'seed is .* <= 4294967294',
  # Training.
  ('train.model_init_seed=-1',): 'train.model_init_seed is -1',
  ('train.model_init_seed=1,1',): r'train.model_init_seed is \(1, 1\)',
  ('train.model_init_seed=()',): r'train.model_init_seed is \(\)',
  ('train.model_init_seed=1.5',): 'must be an int or a tuple of ints',
  ('train.learning_rate=-1',): 'train.learning_rate is -1.0',
  ('train.learning_rate=inf',): "is 'inf'; it must be a number",
  ('train.learning_rate=true',): 'learning_rate=true.* must be a number',
  ('train.learning_rate=fast',): 'learning_rate=fast.* must be a number',
  ('--learning_rate=nan',): 'train.learning_rate is nan',
  ('train.learning_rate=0',): 'train.learning_rate is 0; nothing would be',
  ('train.optimizer=adm',): "train.optimizer 'adm' is not .*mean 'adam'",
  ('train.optimizer_kwargs=3',): 'value is 3; it must be a dict',
  ('train.optimizer_kwargs.b3=1',): "optimizer_kwargs of muon has no 'b3'",
  ('train.optimizer_kwargs.beta=no',): "beta is 'no'; it must be a number",
  ('train.schedule=cosine',): "train.schedule 'cosine' is not .*mean 'warmup",
  ('train.warmup_steps=-1',): 'train.warmup_steps is -1; it must be an int',
  ('train.warmup_steps=20000',): 'warmup_steps is 20000, more than the 5000',
  ('train.target=symbol',): "train.target 'symbol' is not .*mean 'symbols'",
  (RECURRING, 'train.target=bayes'): 'the source has no exact Bayes predictor',
  ('train.compute_dtype=float16',): "compute_dtype 'float16' is not one of b",
  ('train.init_from=',): "train.init_from is ''; it must be the folder of a",
  ('train.ema_decay=0',): 'train.ema_decay is 0; None turns averaging off',
  ('train.ema_decay=1',): r'train.ema_decay is 1.0; .* in \[0.0, 1.0\)',
  ('train.seq_length=1',): 'train.seq_length is 1; it must be an int >= 2',
  ('train.seq_length=1e12',): 'train.seq_length is 1000000000000',
  ('train.seq_length=none',): "=none': the value is 'none'; it must be an int",
  ('train.seq_length_fixed=1',): 'value is 1; it must be true or false',
  ('train.batch_size=true',): 'batch_size=true.* must be an int',
  ('train.batch_size=0',): 'train.batch_size is 0; it must be an int >= 1',
  ('train.batch_size=1e10',): 'train.batch_size is .* <= 2147483647',
  ('train.batch_size=3',): 'batch_size 3 does not divide over the 2 devices',
  ('train.microbatch_size=0',): 'train.microbatch_size is 0',
  ('train.num_seed_shards=2',): 'num_seed_shards 2 does not divide the 1 seeds',
  ('train.microbatch_size=48',): 'train.microbatch_size 48 does not divide',
  ('train.clip_grad_norm=0',): 'train.clip_grad_norm is 0; None turns',
  ('train.clip_grad_norm=nan',): "is 'nan'; it must be a number or None",
  ('train.reset_predictor_init_state=no',): 'must be true or false',
  (
    TRANSFORMER,
    'train.reset_predictor_init_state=false',
  ): 'train.reset_predictor_init_state is False, but .* has no state',
  ('train.gradient_chunk_length=0',): 'train.gradient_chunk_length is 0',
  # Schedule and logs.
  ('schedule.training_steps=-1',): 'schedule.training_steps is -1',
  ('schedule.training_steps=1e10',): 'schedule.training_steps is 1000000000',
  ('schedule.num_saves=-1',): 'schedule.num_saves is -1',
  ('schedule.first_save=0',): 'schedule.first_save is 0',
  ('schedule.first_save=20000',): 'schedule.first_save is 20000.* <= 5000',
  ('schedule.saving_schedule_type=lin',): "type 'lin' is not one of linear, l",
  ('schedule.ckpt_frequency=0',): 'schedule.ckpt_frequency is 0',
  ('logger.log_frequency=0',): 'logger.log_frequency is 0',
  # The network.
  ('model.model_type=lstn',): "model_type 'lstn' is not .* mean 'lstm'",
  (f'{MODEL}=64',): "=64': the value is 64; it must be a dict",
  (f'{MODEL}={{1: 2}}',): "{1: 2}': .* a dict of named values",
  (f'{MODEL}.hidden_size={{1}}',): 'a config holds plain data',
  (f'{MODEL}.hidden_size=1e999',): 'size is inf; all numbers must be finite',
  (f'{SOURCE}={{"a": [1, -1e999]}}',): f'{SOURCE}.a is -inf; all numbers',
  (f'{MODEL}.hidden_size=0',): f'{MODEL}: hidden_size is 0',
  (f'{MODEL}.hidden_size=64.5',): f'{MODEL}: hidden_size is 64.5',
  (f'{MODEL}.hidden_size=1{"0" * 20}',): 'hidden_size is .* <= 2147483647',
  (f'{MODEL}.hidden_sise=3',): "LSTM has no 'hidden_sise'.*mean 'hidden_size'",
  (f'{MODEL}.core=gru',): f"{MODEL}: core 'gru' contradicts model_type 'lstm'",
  (f'{MODEL}.before_mlp_layers=0,',): 'before_mlp_layers is 0',
  (f"{MODEL}.after_mlp_layers=''",): "after_mlp_layers is ''; it must be a tup",
  (f'{MODEL}.gradient_checkpointing=1',): 'gradient_checkpointing is 1',
  ('model.model_type=transformer',): "transformer has no 'hidden_size'",
  (f'{MODEL}.output_size=2',): "LSTM has no 'output_size'; it takes",
  (TRANSFORMER, f'{MODEL}.output_size=2'): "transformer has no 'output_size'",
  (WINDOWS, f'{MODEL}.output_size=2'): "transformer has no 'output_size'",
  ('--model_type=cnn', f'{MODEL}.kernel_size=99'): 'power of the layers is 95',
  (RNN, f'{MODEL}.core=gruu'): "core 'gruu' is not one of .*mean 'gru'",
  (RNN, f'{MODEL}.core=3'): 'core 3 is neither the name of a core',
  (STACK, f'{MODEL}.stack_size=0'): f'{MODEL}: stack_size is 0',
  (STACK, f'{MODEL}.stack_cell_size=0'): f'{MODEL}: stack_cell_size is 0',
  (STACK, f'{MODEL}.n_stacks=-1'): f'{MODEL}: n_stacks is -1',
  (STACK, f'{MODEL}.inner_core=stack_rnn'): 'inner_core stack_rnn is the core',
  (TRANSFORMER, f'{MODEL}.num_heads=7'): '64 is not divisible by num_heads 7',
  (TRANSFORMER, f'{MODEL}.dropout_prob=1.5'): 'dropout_prob is 1.5',
  (TRANSFORMER, f'{MODEL}.dropout_prob=NaN'): 'dropout_prob is nan',
  (TRANSFORMER, f'{MODEL}.num_layers=-1'): 'num_layers is -1',
  (TRANSFORMER, f'{MODEL}.attention_window=0'): 'attention_window is 0',
  (TRANSFORMER, f'{MODEL}.positional_encodings=SINCOS'): "mean 'SIN_COS'",
  (
    TRANSFORMER,
    f'{MODEL}.positional_encodings_params.max_time=5',
  ): "positional_encodings_params of SIN_COS has no 'max_time'",
  (WINDOWS, f'{MODEL}.context_length=0'): 'context_length is 0',
  (WINDOWS, f'{MODEL}.contxt_length=8'): "no 'contxt_length'; it takes",
  # The source.
  ('data.iid_distribution=catgorical',): "data.iid_dist.*mean 'categorical'",
  ('data.iid_distribution_kwargs=2',): "=2': the value is 2; it must be a dict",
  ('data.iid_distribution_kwargs.feature_size=1',): 'feature_size is 1',
  ('data.iid_distribution_kwargs.size=2',): "has no 'size'.*'feature_size'",
  (
    'data.iid_distribution=exponential',
    'data.iid_distribution_kwargs.feature_size=2',
    'data.parameter_distribution=gamma',
    'data.parameter_distribution_params=1,1,1,1',
  ): 'data: iid_distribution is exponential; .* take categorical',
  ('data.parameter_distribution=dirchlet',): "mean 'dirichlet'",
  (
    'data.parameter_distribution=gamma',
    'data.parameter_distribution_params=1,1,1,1',
  ): 'data.parameter_distribution gamma does not draw probabilities',
  ('data.parameter_distribution_kwargs.size=3',): "_kwargs has no 'size'",
  (
    'data.parameter_distribution_params=half',
  ): 'a tuple of numbers .* or a num',
  ('data.parameter_distribution_params=0',): 'is 0.0; it must be a positive',
  ('data.parameter_distribution_params=1e39',): 'add up to 2e.39',
  (
    'data.parameter_distribution=constant',
    'data.parameter_distribution_params=0.5',
  ): 'is 0.5; one number is a symmetric dirichlet, and constant takes a tuple',
  (
    'data.iid_distribution_kwargs.feature_size=2e9',
    'data.parameter_distribution_params=0.5',
  ): 'is 0.5, for 2000000000 symbols; one number can be for at most 65536',
  (
    '--alphabet_size=3',
    'data.parameter_distribution_params=0.5,0.5',
  ): r'data.parameter_distribution_params \(0.5, 0.5\) must be 3 numbers',
  (
    'eval.data.iid_distribution_kwargs.feature_size=3',
    'eval.data.parameter_distribution_params=-1',
  ): 'eval.data.parameter_distribution_params is -1.0; it must be a positive',
  ('data.parameter_distribution_params=0.5,0',): 'must be positive and finite',
  (
    'data.parameter_distribution_params=1e-39,1e-39',
  ): r'data.parameter_distribution_params \(1e-39, 1e-39\): float32 loses',
  ('data.parameter_distribution_params=1e39,1e39',): 'add up to 2e.39',
  ('data.parameter_distribution_params=2e38,2e38',): 'add up to 4e.38',
  ('data.parameter_distribution_params=1e-30,1e8',): 'loses 1e-30 beside',
  (
    'data.parameter_distribution_params=0.5,nan',
  ): 'nan.*; it must be a tuple of numbers',
  ('data.trajectory_generator=ptww',): "data.trajectory_gen.*mean 'ptw'",
  ('data.trajectory_generator=regular_shift',): "lacks 'shift_period'",
  (f'{SOURCE}.shift_period=20',): "of ptw has no 'shift_period'; .* depth",
  (f'{SOURCE}.iid_distribution=x',): "of ptw has no 'iid_distribution'",
  (f'{SOURCE}.depth=99',): f'{SOURCE}: depth is 99; it must be an int >= 0',
  (f'{SOURCE}.depth=4',): f'{SOURCE}: depth 4 holds 16 symbols, not 32',
  (REGULAR, f'{SOURCE}.shift_period=-3'): f'{SOURCE}: shift_period is -3',
  (REGULAR, f'{SOURCE}.shift_period=1{"0" * 10}'): 'period is .* <= 2147483647',
  (RANDOM, f'{SOURCE}.shift_distribution=unifrm'): "mean 'uniform'",
  (RANDOM, f'{SOURCE}.shift_distribution=dirichlet'): 'has 2 features; a leng',
  (RANDOM, f'{SOURCE}.shift_parameters=39,1'): 'low of uniform must be below',
  (RANDOM, f"{SOURCE}.shift_parameters='19'"): "shift_parameters is '19'",
  (RECURRING, f'{SOURCE}.pool_size=1'): f'{SOURCE}: pool_size is 1',
  (RECURRING, f'{SOURCE}.switch_probability=0'): 'switch_probability is 0; it',
  (RECURRING, f'{SOURCE}.switch_probability=NaN'): 'switch_probability is nan',
  (RECURRING, f'{SOURCE}.switch_probability=True'): 'probability is True',
  (DRIFT, f'{SOURCE}.step_scale=-1'): f'{SOURCE}: step_scale is -1; it must',
  (MIXTURE, f'{SOURCE}.sources=ptw'): f"{SOURCE}: sources is 'ptw'; it must",
  (
    MIXTURE,
    f"{SOURCE}.sources=[{{'trajectory_generator': 'lyn'}}]",
  ): rf"{SOURCE}: sources\[0\].trajectory_generator 'lyn' .*mean 'lin'",
  (
    MIXTURE,
    f"{SOURCE}.sources=[{{'trajectory_generator': 'lin', 'weight': 2}}]",
  ): f'{SOURCE}: weight of sources is .* sum 2; weights must be positive and',
  # The evaluation.
  ('eval=3',): 'set one of its fields batch_size, chunk_length',
  ('eval.batch_size=0',): 'eval.batch_size is 0',
  ('eval.seq_length=1',): 'eval.seq_length is 1; it must be an int >= 2',
  (
    'eval.seq_length=64',
    f'{SOURCE}.depth=5',
  ): 'eval.data.trajectory_generator_kwargs: depth 5 holds 32 symbols, not 64',
  ('eval.chunk_length=0',): 'eval.chunk_length is 0',
  (f'{PREDICTORS}=ptw',): "the value is 'ptw'; it must be a tuple of names",
  (f'{PREDICTORS}=ptv,kt',): f"{PREDICTORS} 'ptv' is not one of .*mean 'ptw'",
  (f'{KWARGS}=3',): f"'{KWARGS}=3': the value is 3; it must be a dict",
  (f'{KWARGS}.ptw=3',): r'_kwargs\[ptw\] is 3; it must be a dict',
  (f'{KWARGS}.ptv.depth=3',): "has no 'ptv'; it takes .*mean 'ptw'",
  (f'{KWARGS}.ptw.dept=3',): r"_kwargs\[ptw\] has no 'dept'; .*mean 'depth'",
  (f'{KWARGS}.ptw.alphabet_size=3',): r'\[ptw\]: .* 2 entries for 3 symbols',
  (f'{KWARGS}.ptw.depth=2',): r'\[ptw\]: depth 2 holds 4 symbols, not 32',
  (f'{KWARGS}.kt.concentration=0',): r'\[kt\]: concentration is 0; it must',
  (f'{KWARGS}.kt.concentration=1,1,1',): r'\[kt\]: .* 3 entries for 2 symbols',
  (f'{KWARGS}.kt.concentration=[[1],[1,2]]',): r'\[kt\]: concentration is',
  (f'{PREDICTORS}=run_length,',): r"\[run_length\] lacks 'hazard'",
  (
    f'{PREDICTORS}=run_length,',
    f'{KWARGS}.run_length.hazard=0.1,2',
  ): r'\[run_length\]: hazard is 2.0 at length 2',
  (
    f'{PREDICTORS}=length_distribution,',
    f'{KWARGS}.length_distribution.pmf=0.5,0.2',
  ): r'\[length_distribution\]: pmf must be probabilities',
  (
    'eval.data.parameter_distribution_params=0.5,-1',
  ): r'eval.data.parameter_distribution_params \(0.5, -1.0\) must be positive',
  (
    'eval.data.iid_distribution_kwargs.feature_size=3',
    'eval.data.parameter_distribution_params=1,1,1',
  ): 'eval.data has an alphabet of 3 symbols, but data, to train on, of 2',
  # The flag.
  ('--config=/nowhere/run.json',): 'cannot read /nowhere/run.json: No such',
  (f'--config={"x" * 300}',): 'cannot read x*: File name too long',
}


def _check_launch(*given):
  """As `main` does before it opens the folder of the run."""
  values = flags.FlagValues()
  local_launch.define_flags(values)
  values(['', *(g if g.startswith('--') else f'--set={g}' for g in given)])
  train.build_components(
    local_launch.config_from_flags(values),
    constants.build_data_generator,
    evaluator_lib.build_evaluator,
  )


def _frames(error):
  return [
    pathlib.Path(frame.filename)
    for frame in traceback.extract_tb(error.__traceback__)
  ]


@pytest.mark.parametrize(('given', 'message'), CASES.items())
def test_malformed_config_is_one_line_before_anything_compiles(given, message):
  with devices.count_compilations() as compilations:
    with pytest.raises(ValueError, match=message) as caught:
      _check_launch(*given)
  assert '\n' not in str(caught.value)
  assert compilations.programs == 0
  # Raised here; and no error of JAX or Haiku said anew.
  innermost = _frames(caught.value)[-1].relative_to(ROOT)
  assert not innermost.parts[0].startswith('.')
  error = caught.value
  while error is not None:
    assert not any(
      {'jax', 'haiku'} & set(path.parts) for path in _frames(error)
    )
    error = error.__cause__ or error.__context__


def _paths(config_class, prefix=''):
  for name, annotation in typing.get_type_hints(config_class).items():
    nested = base_config.nested_class(annotation)
    # eval.data is of the class of data.
    if nested is None or prefix:
      yield prefix + name
    else:
      yield from _paths(nested, f'{prefix}{name}.')


def test_every_field_is_among_the_malformed():
  given = [item for items in CASES for item in items]
  missing = {
    path
    for path in _paths(config_lib.ExperimentConfig)
    if not any(item.startswith((f'{path}=', f'{path}.')) for item in given)
  }
  assert not missing


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ('', 'Expecting value: line 1'),
    ('\udcff', 'can.t decode byte 0xff'),
    ('[1, 2]', r'its content is \[1, 2\]; it must be a dict'),
    ('{"sed": 1}', "ExperimentConfig has no 'sed'; .*did you mean 'seed'"),
    ('{"train": {"batchsize": 1}}', "train has no 'batchsize'; .*'batch_size'"),
    ('{"eval": {"data": {"depth": 1}}}', "eval.data has no 'depth'"),
    ('{"train": 3}', 'train is 3; it must be a TrainConfig'),
    ('{"train": null}', 'train is None; it must be a TrainConfig'),
    ('{"seed": "0"}', "seed is '0'; it must be an int"),
    ('{"train": {"seq_length_fixed": 1}}', 'seq_length_fixed is 1; it must'),
    ('{"train": {"learning_rate": NaN}}', 'train.learning_rate is nan'),
    (
      '{"data": {"trajectory_generator": null}}',
      'generator is None; .* a string',
    ),
    (
      '{"data": {"parameter_distribution_params": "12"}}',
      "distribution_params is '12'; it must be a tuple of numbers",
    ),
    ('{"eval": {"data": {"iid_distribution": 3}}}', 'eval.data.iid_dis.* is 3'),
    ('{"model": {"model_type": 3}}', 'model.model_type is 3'),
    ('{"name": "a\\u0000"}', 'name is .*printable'),
    ('{"name": "../../x"}', "name is '../../x'; .* one folder, not a path"),
    ('{"model": {"architecture_kwargs": {"x": NaN}}}', 'kwargs.x is nan'),
  ],
)
def test_malformed_file_is_named_with_its_field(tmp_path, content, message):
  path = tmp_path / 'run.json'
  path.write_text(content, errors='surrogateescape')
  with pytest.raises(ValueError, match=f'run.json.*: .*{message}') as caught:
    _check_launch(f'--config={path}')
  assert '\n' not in str(caught.value)


def test_folder_without_a_config_is_named(tmp_path):
  with pytest.raises(ValueError, match='cannot read .*config.json: No such'):
    _check_launch(f'--config={tmp_path}')


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    (['--config=old.json'], "old.json: train has no 'batch'"),
    (['--set', 'seed=3', 'name=a'], 'unexpected arguments: name=a'),
    (['--cpu_devices=3'], 'batch_size 128 does not divide over the 3 devices'),
  ],
)
def test_script_says_what_is_wrong_in_one_line(tmp_path, given, message):
  (tmp_path / 'old.json').write_text(json.dumps({'train': {'batch': 3}}))
  result = subprocess.run(
    [sys.executable, SCRIPT, *given],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode != 0
  assert len(result.stderr.splitlines()) == 1
  assert result.stderr.startswith('error: ') and message in result.stderr
  assert [path.name for path in tmp_path.iterdir()] == ['old.json']
