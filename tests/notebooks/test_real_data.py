import base64
import contextlib
import io
import pathlib

import matplotlib
import nbformat
import numpy as np
import pytest

from nonstationary_mbml.experiments import code_length

ROOT = pathlib.Path(__file__).parent.parent.parent
NOTEBOOK = ROOT / 'notebooks' / 'real_data.ipynb'
# Of the figures: returns, text, binary file.
NUM_FIGURES = 3


def test_committed_notebook_has_its_figures_and_tables():
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  outputs = [
    output for cell in notebook.cells for output in cell.get('outputs', ())
  ]
  assert not any(output.output_type == 'error' for output in outputs)
  figures = [
    base64.b64decode(output.data['image/png'])
    for output in outputs
    if 'image/png' in output.get('data', ())
  ]
  assert len(figures) == NUM_FIGURES
  assert all(figure.startswith(b'\x89PNG') for figure in figures)
  text = ''.join(o.text for o in outputs if o.output_type == 'stream')
  assert text.count('gzip') == NUM_FIGURES


def _run(folder, monkeypatch, shorter):
  """Runs the cells in this process; returns the rows of every table."""
  monkeypatch.chdir(folder)
  tables, measure = [], code_length.measure

  def recording(*args, **kwargs):
    rows, figure = measure(*args, **kwargs)
    tables.append({row['coder']: row['bits'] for row in rows})
    return rows, figure

  monkeypatch.setattr(code_length, 'measure', recording)
  names = {}
  with matplotlib.rc_context(), contextlib.redirect_stdout(io.StringIO()):
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
      if cell.cell_type == 'code':
        source = cell.source.replace('%matplotlib inline', '')
        for old, new in shorter.items():
          source = source.replace(old, new)
        exec(compile(source, NOTEBOOK.name, 'exec'), names)
  return tables


def test_notebook_runs_on_less(tmp_path, monkeypatch):
  shorter = {
    'num_days = 4096': 'num_days = 256',
    'num_bytes = 8192': 'num_bytes = 256',
    'picture[:5000]': 'picture[:100]',
  }
  tables = _run(tmp_path, monkeypatch, shorter)
  assert len(tables) == NUM_FIGURES
  assert all(np.isfinite(list(table.values())).all() for table in tables)


@pytest.mark.slow
def test_whole_notebook_finds_the_end_of_the_picture(tmp_path, monkeypatch):
  returns, text, binary = _run(tmp_path, monkeypatch, {})
  assert min(returns, key=returns.get) == 'run-length mixture'
  assert text['KT'] < text['PTW'] < 1.02 * text['KT']
  assert binary['PTW'] < binary['KT']
