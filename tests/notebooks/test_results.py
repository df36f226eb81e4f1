import base64
import pathlib

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
NOTEBOOK = ROOT / 'notebooks' / 'results.ipynb'
NUM_FIGURES = 8


def _figures(notebook):
  outputs = [
    output for cell in notebook.cells for output in cell.get('outputs', ())
  ]
  assert not any(output.output_type == 'error' for output in outputs)
  return [
    base64.b64decode(output.data['image/png'])
    for output in outputs
    if 'image/png' in output.get('data', ())
  ]


# test_report.py draws the same figures from the same tables.
@pytest.mark.slow
def test_notebook_draws_every_figure_from_the_committed_tables(
  tmp_path, monkeypatch
):
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(ROOT / '.cache' / 'jax'))
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  # The notebook is committed with its figures.
  assert len(_figures(notebook)) == NUM_FIGURES
  nbclient.NotebookClient(
    notebook, timeout=300, resources={'metadata': {'path': str(tmp_path)}}
  ).execute()
  figures = _figures(notebook)
  assert len(figures) == NUM_FIGURES
  assert all(figure.startswith(b'\x89PNG') for figure in figures)
