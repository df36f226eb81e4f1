import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from nonstationary_mbml import base_config
from nonstationary_mbml import train
from nonstationary_mbml.experiments import config as config_lib
from nonstationary_mbml.experiments import constants
from nonstationary_mbml.experiments import evaluate
from nonstationary_mbml.experiments import evaluator as evaluator_lib
from nonstationary_mbml.experiments import regret_table
from nonstationary_mbml.experiments import saved_runs
from nonstationary_mbml.experiments.analysis import regret_curves
from nonstationary_mbml.runtime import atomic_files
from tests import registries


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """An ensemble of two, and its folder."""
  config = config_lib.ExperimentConfig(
    train=base_config.TrainConfig(
      seq_length=8, batch_size=4, model_init_seed=(3, 5)
    ),
    model=base_config.ModelConfig(
      model_type='stack_rnn', architecture_kwargs={'hidden_size': 3}
    ),
    schedule=base_config.ScheduleConfig(
      training_steps=6, num_saves=2, ckpt_frequency=4
    ),
    logger=base_config.LoggerConfig(log_frequency=3),
    eval=config_lib.EvalConfig(batch_size=4),
  )
  folder = tmp_path_factory.mktemp('run')
  result = train.train(
    config,
    constants.build_data_generator,
    evaluator_lib.build_evaluator,
    folder=folder,
  )
  return folder, config, result


@pytest.fixture
def folder(trained, tmp_path):
  """A copy of its folder, to be damaged."""
  return shutil.copytree(trained[0], tmp_path / 'run')


def _assert_same_params(run, other):
  jax.tree.map(np.testing.assert_array_equal, run.all_params, other.all_params)


def test_loaded_run_is_what_was_trained(trained):
  folder, config, result = trained
  run = saved_runs.load_run(str(folder))
  assert run.config == config
  assert run.step == 6
  assert run.history == result.history
  assert run.member_histories == result.member_histories
  _assert_same_params(run, result)
  batch = jax.nn.one_hot(np.array([[0, 1, 1, 0]]), 2)
  unroll = jax.jit(lambda params: run.predictor.unroll(params, None, batch)[0])
  logits = unroll(run.member(1))
  assert logits.shape == (1, 4, 2)
  assert np.abs(logits - unroll(run.member(0))).max() > 1e-3


def test_averages_are_loaded_from_snapshots_and_checkpoints(tmp_path):
  config = config_lib.ExperimentConfig(
    train=base_config.TrainConfig(seq_length=8, batch_size=4, ema_decay=0.5),
    model=base_config.ModelConfig(
      model_type='rnn', architecture_kwargs={'hidden_size': 3}
    ),
    schedule=base_config.ScheduleConfig(training_steps=2, num_saves=1),
    eval=config_lib.EvalConfig(batch_size=4, optimal_predictors=('kt',)),
  )
  result = train.train(
    config,
    constants.build_data_generator,
    evaluator_lib.build_evaluator,
    folder=tmp_path,
  )
  for kept in ('snapshots', 'checkpoints'):
    run = saved_runs.load_run(tmp_path)
    _assert_same_params(run, result)
    jax.tree.map(
      np.testing.assert_array_equal, run.ema_member(0), result.ema_member(0)
    )
    shutil.rmtree(tmp_path / kept)
  # On the same sequences, in a row of its own.
  make_table = lambda run: regret_table.make_table(
    run, result.evaluator, jax.random.key(0), 8
  )
  rows, _, names = make_table(result)
  # The evaluator knows no average, and its figure has none.
  assert names.keys() == {'network', 'kt'}
  network, averaged, kt = rows
  assert averaged['predictor'] == f'{network["predictor"]}, averaged'
  assert averaged['cumulative_regret'] != network['cumulative_regret']
  assert regret_table.reference_rows(rows) == [kt]
  swapped = dataclasses.replace(result, all_params=result.all_ema_params)
  for name in ('cumulative_regret', 'stderr', 'above_optimum'):
    assert averaged[name] == make_table(swapped).rows[0][name]


def test_averages_of_several_steps_have_a_table_of_their_own():
  regrets = {name: np.ones(2) for name in ('network', 'averaged_network', 'kt')}
  names = {'network': 'RNN', 'averaged_network': 'averaged', 'kt': 'KT'}
  rows = regret_table.results_table(regrets, names, 'kt')
  text = evaluate.format_content(
    {
      'exact_predictor': 'kt',
      'steps': [{'step': step, 'table': rows} for step in (5, 9)],
    }
  )
  heads = [[line[:14].strip() for line in block.splitlines()]
           for block in text.split('\n\n')]  # fmt: skip
  assert [head[0].split('  ')[0] for head in heads] == [
    'step', 'step, averaged', 'predictor',
  ]  # fmt: skip
  assert [len(head) for head in heads] == [3, 3, 2]


def test_every_saved_step_can_be_loaded(trained):
  folder, _, result = trained
  assert saved_runs.saved_steps(folder) == (1, 2, 4, 6)
  norms = [
    sum(float((x**2).sum()) for x in jax.tree.leaves(run.all_params))
    for run in (saved_runs.load_run(folder, step) for step in (1, 2, 6))
  ]
  assert len(set(norms)) == 3


def test_missing_step_is_named_beside_those_that_are_there(trained):
  with pytest.raises(ValueError, match='nothing of step 5, only of .*1, 2, 4'):
    saved_runs.load_run(trained[0], 5)


def test_missing_run_is_named(tmp_path):
  with pytest.raises(ValueError, match='cannot read .*nowhere/config.json'):
    saved_runs.load_run(tmp_path / 'nowhere')


def test_what_is_damaged_is_left_out_with_a_warning(folder):
  with (folder / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 9, "lo')
  for name in ('checkpoints', 'snapshots'):
    manifest = folder / name / '6' / 'default' / 'manifest.ocdbt'
    manifest.write_bytes(manifest.read_bytes()[:20])
  before = {path: path.stat().st_mtime for path in folder.rglob('*')}
  with pytest.warns(UserWarning) as warned:
    run = saved_runs.load_run(folder)
  assert run.step == 4
  assert [entry['step'] for entry in run.history] == [3, 6]
  said = ' '.join(str(warning.message) for warning in warned)
  assert 'last line is torn' in said and 'snapshots/6 cannot be read' in said
  assert {path: path.stat().st_mtime for path in folder.rglob('*')} == before


def test_of_one_step_either_snapshot_or_checkpoint_serves(folder, trained):
  shutil.rmtree(folder / 'snapshots' / '6' / 'default')
  (folder / 'checkpoints' / '9').mkdir()
  with pytest.warns(UserWarning) as warned:
    run = saved_runs.load_run(folder)
  assert run.step == 6
  _assert_same_params(run, trained[2])
  said = [str(warning.message) for warning in warned]
  assert '/checkpoints/9 cannot' in said[0]
  assert '/snapshots/6 cannot' in said[1]


def test_network_of_other_shapes_is_one_line_that_names_them(folder, capfd):
  path = folder / 'config.json'
  values = json.loads(path.read_text())
  values['model']['architecture_kwargs']['hidden_size'] = 4
  path.write_text(json.dumps(values))
  with pytest.raises(ValueError) as error:
    saved_runs.load_run(folder)
  message = str(error.value)
  assert '\n' not in message
  assert 'snapshots/6 has ' in message and ', and 4 more' in message
  assert 'of shape (2, 3, 2), where (2, 4, 2) is expected' in message
  assert capfd.readouterr().err == ''


def test_parameters_have_the_dtype_that_was_saved(trained):
  with jax.enable_x64(True):
    run = saved_runs.load_run(trained[0])
    dtypes = {x.dtype.name for x in jax.tree.leaves(run.all_params)}
  assert dtypes == {'float32'}
  _assert_same_params(run, trained[2])


def test_evaluation_of_all_steps_leaves_out_what_is_damaged(folder, trained):
  config = evaluate.make_config(trained[1], batch_size=4)
  for name in ('snapshots/1', 'checkpoints/4'):
    shutil.rmtree(folder / name / 'default')
  with pytest.warns(UserWarning, match='cannot be read') as warned:
    content = evaluate.evaluate(
      folder, config, saved_runs.saved_steps(folder), 4
    )
  assert [by['step'] for by in content['steps']] == [2, 6]
  said = ' '.join(str(warning.message) for warning in warned)
  assert 'checkpoints/4 cannot' in said and 'snapshots/1 cannot' in said
  with pytest.raises(ValueError, match='checkpoints/4 cannot.*, and 1 more'):
    evaluate.evaluate(folder, config, (1, 4), 4)


def test_snapshots_alone_can_be_loaded(folder):
  shutil.rmtree(folder / 'checkpoints')
  assert saved_runs.load_run(folder).step == 6


def test_run_of_an_older_config_loads_with_the_defaults(folder, trained):
  path = folder / 'config.json'
  values = json.loads(path.read_text())
  del values['train']['microbatch_size']
  path.write_text(json.dumps(values))
  assert saved_runs.load_run(folder).config == trained[1]


def test_evaluator_has_the_exact_predictor_of_its_source(trained):
  run = saved_runs.load_run(trained[0])
  own = saved_runs.evaluator_of(run)
  assert own.seq_length == 8 and list(own.optimal_predictors)[0] == 'ptw'
  lin = config_lib.DataConfig(trajectory_generator='lin')
  other = saved_runs.evaluator_of(run, lin, seq_length=16, batch_size=2)
  assert (other.seq_length, other.batch_size) == (16, 2)
  assert other.optimal_predictors['ptw'].depth == 4
  # The run's own config is as it was.
  assert run.config == trained[1]


def test_evaluation_on_no_symbols_is_refused(trained):
  run = saved_runs.load_run(trained[0])
  with pytest.raises(ValueError, match='eval.seq_length is 0; .* >= 2'):
    saved_runs.evaluator_of(run, seq_length=0)
  assert regret_curves.by_source(run, {}) == {}


def test_evaluator_says_whose_parameters_it_was_given(trained):
  run = saved_runs.load_run(trained[0])
  with pytest.raises(ValueError, match='of the 2 members of an ensemble'):
    saved_runs.evaluator_of(run).evaluate(run.all_params, jax.random.key(0), 4)


def test_curves_refuse_a_seed_that_a_key_does_not_hold(trained):
  with pytest.raises(ValueError, match='seed is 4294967296; .* <= 4294967294'):
    regret_curves.over_time(saved_runs.load_run(trained[0]), 4, seed=2**32)


def test_source_of_another_alphabet_is_refused(trained):
  data = config_lib.DataConfig(
    iid_distribution_kwargs={'feature_size': 3},
    parameter_distribution_params=(0.5, 0.5, 0.5),
  )
  with pytest.raises(ValueError, match='alphabet of 3 symbols.*trained on 2'):
    saved_runs.evaluator_of(saved_runs.load_run(trained[0]), data)


def test_evaluation_of_all_steps_is_a_table_of_each(folder, trained):
  config = evaluate.make_config(
    trained[1],
    'regular_shift',
    12,
    4,
    ('eval.data.trajectory_generator_kwargs.shift_period=3',),
  )
  assert config.eval.optimal_predictors_kwargs['regular_shift'] == {
    'shift_period': 3,
    'concentration': (0.5, 0.5),
  }
  # The network is as it was trained.
  assert config.model == trained[1].resolved().model
  content = evaluate.evaluate(folder, config, (1, None), 6)
  assert [by['step'] for by in content['steps']] == [1, 6]
  assert content['exact_predictor'] == 'regular_shift'
  first, last = (by['table'] for by in content['steps'])
  assert first[0]['predictor'] == 'Stack-RNN, 2 seeds'
  assert first[0]['cumulative_regret'] != last[0]['cumulative_regret']
  # The exact predictors read the same sequences.
  assert first[1]['cumulative_regret'] == last[1]['cumulative_regret']
  lines = evaluate.format_content(content).splitlines()
  assert [line.split()[0] for line in lines if line][:3] == ['step', '1', '6']

  path = evaluate.write(folder, content)
  assert path.name == 'regular_shift_T12_step_1-6.json'
  assert evaluate.write(folder, content) == path
  # Those of other settings are not overwritten.
  other = evaluate.write(folder, {**content, 'num_sequences': 7})
  assert other.name == 'regular_shift_T12_step_1-6_2.json'
  assert json.loads(path.read_text())['num_sequences'] == 6


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'items': ('train.learning_rate=1',)}, 'nothing but eval'),
    ({'items': ('eval.batch_sise=1',)}, "mean 'batch_size'"),
    (
      {'source': 'lin', 'items': ('eval.seq_length=1',)},
      'eval.seq_length is 1',
    ),
  ],
)
def test_wrong_settings_of_an_evaluation_are_named(trained, arguments, message):
  with pytest.raises(ValueError, match=message):
    evaluate.make_config(trained[1], **arguments)


def _importing(folder, text="open('runs', 'a').write('x')\n"):
  """Has a run import a file; returns the file."""
  path = folder.parent / 'my_things.py'
  path.write_text(text)
  config = folder / 'config.json'
  values = json.loads(config.read_text())
  config.write_text(json.dumps({**values, 'imports': [str(path)]}))
  return path


@pytest.fixture
def modules(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with registries.restored():
    yield


def test_load_imports_once_what_the_config_names(folder, modules, capsys):
  path = _importing(folder)
  run = saved_runs.load_run(folder)
  assert run.config.imports == (str(path),)
  said = f'importing {path}, which {folder / "config.json"} names\n'
  assert capsys.readouterr().err == said
  saved_runs.load_run(folder)
  saved_runs.load_config(folder)
  assert not capsys.readouterr().err
  assert pathlib.Path('runs').read_text() == 'x'


def test_run_is_loaded_without_its_imports_and_shows_them(folder, modules):
  path = _importing(folder, 'raise RuntimeError')
  assert saved_runs.load_config(folder, imports=()).imports == (str(path),)
  run = saved_runs.load_run(folder, imports=())
  assert run.config.imports == (str(path),)
  saved_runs.evaluator_of(run)


def test_module_that_has_moved_is_named_with_the_run(folder, modules):
  path = _importing(folder)
  path.rename('elsewhere.py')
  for load in (saved_runs.load_run, saved_runs.load_config):
    with pytest.raises(ValueError) as caught:
      load(folder)
    assert str(caught.value).startswith(
      f'{folder / "config.json"}: imports: {path} cannot be imported: there is '
      'no such file; say where it is now (imports=[...] of load_run'
    )
    assert '\n' not in str(caught.value)
  with pytest.raises(ValueError, match="imports is 'elsewhere.py'; it must be"):
    saved_runs.load_run(folder, imports='elsewhere.py')
  saved_runs.load_run(folder, imports=['elsewhere.py'])
  assert pathlib.Path('runs').read_text() == 'x'


def test_export_keeps_the_name_of_an_imported_file(folder, modules):
  path = _importing(folder)
  saved_runs.export(folder, 'copy')
  values = json.loads(pathlib.Path('copy/config.json').read_text())
  assert values['imports'] == ['my_things.py']
  assert saved_runs.load_config('copy').imports == (str(path),)


MODELS = pathlib.Path(saved_runs.__file__).parent.parent / 'results' / 'models'


@pytest.mark.parametrize(
  'name', ['lstm_ptw', 'transformer_alibi_lin', 'lstm_ptw_t256']
)
def test_committed_model_loses_what_its_table_says(name):
  """Within three standard errors, on fresh sequences of a fixed seed."""
  run = saved_runs.load_run(MODELS / name)
  evaluator = saved_runs.evaluator_of(run)
  network, *_ = atomic_files.read_json(MODELS / name / 'table.json')['table']
  own = next(iter(evaluator.optimal_predictors))
  for member, committed in enumerate(network['seeds'][:2]):
    regrets = evaluator.evaluate(run.member(member), jax.random.key(123), 2048)
    for values, column, stderr in (
      (regrets['network'], 'cumulative_regret', 'stderr'),
      (
        regrets['network'] - regrets[own],
        'above_optimum',
        'above_optimum_stderr',
      ),
    ):
      error = np.hypot(values.std() / np.sqrt(len(values)), committed[stderr])
      assert abs(values.mean() - committed[column]) < 3 * error


def test_committed_models_are_small():
  sizes = {
    folder.name: sum(path.stat().st_size for path in folder.rglob('*'))
    for folder in MODELS.iterdir()
    if folder.is_dir()
  }
  assert len(sizes) >= 4
  assert max(sizes.values()) < 2**20
  assert sum(sizes.values()) < 10 * 2**20


def test_export_is_loaded_like_the_run(folder, tmp_path):
  target = tmp_path / 'models' / 'copy'
  size = saved_runs.export(folder, target)
  assert size == sum(path.stat().st_size for path in target.rglob('*'))
  run, copy = saved_runs.load_run(folder), saved_runs.load_run(target)
  assert copy.config == run.config and copy.step == run.step
  assert copy.member_histories == run.member_histories
  _assert_same_params(copy, run)
  # Nothing of the machine.
  text = (target / 'environment.json').read_text()
  assert 'command' not in text and 'host' not in text
  path = str(folder.parent).encode()
  for file in target.rglob('*'):
    assert file.is_dir() or path not in file.read_bytes(), file
  # Again: in its place.
  assert saved_runs.export(folder, target) == size
  assert [path.name for path in target.parent.iterdir()] == ['copy']
  # A run that is not a copy is never replaced, nor is the run itself.
  for run_path in (folder, tmp_path):
    with pytest.raises(ValueError, match='no copy of a run'):
      saved_runs.export(target, run_path)
  with pytest.raises(ValueError, match='no copy of a run'):
    saved_runs.export(folder, folder)
  assert (folder / 'checkpoints').is_dir()


def test_export_refuses_what_has_not_ended_and_what_is_no_run(folder, tmp_path):
  def refused():
    with pytest.raises(ValueError) as error:
      saved_runs.export(folder, tmp_path / 'copy')
    return str(error.value)

  path = folder / 'snapshots' / '6' / 'default' / '_METADATA'
  content = path.read_bytes()
  path.write_bytes(content[:50])
  assert f'the copy of {folder} cannot be loaded' in refused()
  path.write_bytes(content)
  (folder / 'environment.json').write_text('{"starts": null}')
  assert 'environment.json has no list of starts' in refused()
  shutil.rmtree(folder / 'snapshots' / '6')
  said = f'{folder} has no snapshot of its last step, 6: '
  assert refused() == said + 'it has ended, but that snapshot is not there'
  shutil.rmtree(folder / 'checkpoints' / '6')
  assert refused() == said + 'its newest checkpoint says that it has not ended'
  config = json.loads((folder / 'config.json').read_text())
  config['schedule']['num_saves'] = 0
  (folder / 'config.json').write_text(json.dumps(config))
  assert refused() == said + 'schedule.num_saves is 0'
  with pytest.raises(ValueError, match='none is no folder|cannot read .*none'):
    saved_runs.export(tmp_path / 'none', tmp_path / 'copy')
  assert not (tmp_path / 'copy').exists()


def test_log_is_thinned_in_equal_factors():
  entries = [{'step': step} for step in range(10, 1001, 10)]
  thinned = [entry['step'] for entry in saved_runs.thinned(entries, 3)]
  assert thinned == [10, 100, 1000]
  assert saved_runs.thinned([], 3) == []
