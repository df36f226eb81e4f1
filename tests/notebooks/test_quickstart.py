import base64
import pathlib

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
NOTEBOOK = ROOT / 'notebooks' / 'quickstart.ipynb'


def _execute(folder, monkeypatch):
  """The notebook after it ran."""
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(ROOT / '.cache' / 'jax'))
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  nbclient.NotebookClient(
    notebook, timeout=600, resources={'metadata': {'path': str(folder)}}
  ).execute()
  return notebook


def _outputs(notebook, mime_type):
  return [
    output.data[mime_type]
    for cell in notebook.cells
    for output in cell.get('outputs', ())
    if mime_type in output.get('data', ())
  ]


def _check(notebook, folder):
  figures = _outputs(notebook, 'image/png')
  assert len(figures) == 4
  assert all(base64.b64decode(x).startswith(b'\x89PNG') for x in figures)
  assert (folder / 'runs' / 'quickstart' / 'metrics.jsonl').exists()


@pytest.mark.slow
def test_whole_notebook_comes_near_ptw(tmp_path, monkeypatch):
  notebook = _execute(tmp_path, monkeypatch)
  _check(notebook, tmp_path)
  nats = {
    name: float(text.split()[0])
    for name, text in eval(_outputs(notebook, 'text/plain')[-1]).items()
  }
  assert nats['ptw'] < nats['network'] < nats['ptw'] + 0.2


def test_committed_notebook_has_its_figures():
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  assert len(_outputs(notebook, 'image/png')) == 4
  assert not any(
    output.output_type == 'error'
    for cell in notebook.cells
    for output in cell.get('outputs', ())
  )
