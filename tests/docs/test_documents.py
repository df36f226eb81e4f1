"""What the documents name is there, and their claims about the paper hold."""

import json
import pathlib
import re

import pytest

from nonstationary_mbml.experiments import config as config_lib

ROOT = pathlib.Path(__file__).parent.parent.parent
DOCUMENTS = sorted(
  [ROOT / 'README.md', ROOT / 'results' / 'README.md']
  + list((ROOT / 'docs').glob('*.md'))
)
NOTEBOOKS = sorted((ROOT / 'notebooks').glob('*.ipynb'))


def _sources():
  folders = ('.', 'models', 'experiments', 'benchmarks', 'tests')
  return [path for folder in folders for path in (ROOT / folder).glob('*.py')]


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: path.name)
def test_every_field_that_a_document_names_is_there(document):
  named = re.findall(
    r'(?<![\w/])(?:config\.)?((?:data|eval|logger|model|schedule|train)'
    r'(?:\.[a-z_]+)+)(?![\w(])',
    document.read_text(),
  )
  for path in set(named) - {'train.py'}:
    config_lib.with_overrides(config_lib.ExperimentConfig(), {path: None})


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: path.name)
def test_every_module_and_link_of_a_document_is_there(document):
  text = document.read_text()
  names = {path.name for path in _sources()}
  assert set(re.findall(r'\b\w+\.py\b', text)) <= names
  for link in re.findall(r'\]\(([^)#]+)\)', text):
    assert '://' in link or (document.parent / link).exists(), link


def test_no_text_takes_our_settings_for_those_of_the_paper():
  """T = 256, the number of steps and the learning rates are ours."""
  paths = {*DOCUMENTS, *_sources()} - {pathlib.Path(__file__)}
  texts = {path: path.read_text() for path in paths}
  for path in NOTEBOOKS:
    cells = json.loads(path.read_text())['cells']
    texts[path] = '\n'.join(''.join(cell['source']) for cell in cells)
  for path, text in texts.items():
    words = ' '.join(text.split())
    claim = r"(grid|sources) of the paper\b(?!')"
    assert not re.search(claim, words), path
