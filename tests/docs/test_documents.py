"""What the documents name is there, and what is ours is said to be."""

import pathlib
import re

import pytest

from nonstationary_mbml.experiments import config as config_lib

ROOT = pathlib.Path(__file__).parent.parent.parent
DOCUMENTS = sorted(
  [ROOT / 'README.md', ROOT / 'results' / 'README.md']
  + list((ROOT / 'docs').glob('*.md'))
)


def _sources():
  folders = ('models', 'runtime', 'experiments', 'benchmarks', 'tests')
  return [
    *ROOT.glob('*.py'),
    *(path for folder in folders for path in (ROOT / folder).rglob('*.py')),
  ]


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
  # Files of the reader's own begin with their names.
  names |= set(re.findall(r'^# (\w+\.py)$', text, re.MULTILINE))
  assert set(re.findall(r'\b\w+\.py\b', text)) <= names
  for link in re.findall(r'\]\(([^)#]+)\)', text):
    assert '://' in link or (document.parent / link).exists(), link


@pytest.mark.parametrize(
  ('document', 'sentence'),
  [
    (
      'docs/sweeps.md',
      'T = 256, 500,000 steps and three learning rates are ours',
    ),
    (
      'results/README.md',
      'T = 256, 500,000 steps and three learning rates are ours',
    ),
    ('docs/scaling.md', 'The rest is our reading'),
  ],
)
def test_documents_tell_our_settings_from_those_of_the_paper(
  document, sentence
):
  assert sentence in ' '.join((ROOT / document).read_text().split())


def test_readme_is_short_and_links_every_page_of_docs_once():
  text = (ROOT / 'README.md').read_text()
  assert len(text.splitlines()) <= 250
  for page in (ROOT / 'docs').glob('*.md'):
    assert text.count(f'](docs/{page.name})') == 1, page.name
