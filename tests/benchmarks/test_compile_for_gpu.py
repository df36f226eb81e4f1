"""The compiler of GPU programs, where JAX's plug-in for GPUs is not needed."""

import jax
import pytest


@pytest.fixture
def compile_for_gpu(benchmarks):
  import compile_for_gpu

  return compile_for_gpu


def test_every_network_and_source_is_compiled(compile_for_gpu):
  names = set(compile_for_gpu.programs())
  assert {
    'training: LSTM-128',
    'training: 4 seeds of Transformer SIN_COS',
    'evaluation: ptw',
    'evaluation: mixture',
    'predictor: PTW',
    'switch posterior: LAD',
  } <= names


@pytest.mark.parametrize(
  'name', ['training: LSTM-128', 'evaluation: lin', 'switch posterior: PTW']
)
def test_programs_lower(compile_for_gpu, name):
  # For a CPU here, whose branches differ.
  lowered = compile_for_gpu.programs()[name](jax.devices('cpu')[0])
  assert 'stablehlo' in lowered.as_text()


def test_without_the_plug_in_there_is_an_error(
  compile_for_gpu, monkeypatch, capsys
):
  monkeypatch.setattr('sys.argv', ['compile_for_gpu.py'])
  monkeypatch.setattr(compile_for_gpu, '_has_compiler', lambda: False)
  with pytest.raises(SystemExit):
    compile_for_gpu.main()
  assert 'no compiler for GPUs' in capsys.readouterr().err


def test_what_does_not_compile_is_named(compile_for_gpu, monkeypatch):
  monkeypatch.setattr('sys.argv', ['compile_for_gpu.py', '--limit_s=0.01'])
  monkeypatch.setattr(compile_for_gpu, '_has_compiler', lambda: True)
  monkeypatch.setattr(compile_for_gpu, 'programs', lambda: {'all': None})
  with pytest.raises(SystemExit, match='all: not done after 0.01 s'):
    compile_for_gpu.main()
