import io
import math
import os

from matplotlib import figure as figure_lib
from matplotlib import image as plt_image
import numpy as np
import pytest

from nonstationary_mbml.runtime import atomic_files


def test_file_that_cannot_be_replaced_stays_whole(tmp_path, monkeypatch):
  path = tmp_path / 'metrics.json'
  atomic_files.write_whole(path, b'old')

  def fail(*args):
    raise OSError('disk full')

  monkeypatch.setattr(os, 'replace', fail)
  with pytest.raises(OSError, match='disk full'):
    atomic_files.write_whole(path, b'new')
  assert path.read_bytes() == b'old'
  assert list(tmp_path.iterdir()) == [path]


def test_what_is_not_finite_is_null_and_read_as_nan(tmp_path):
  path = tmp_path / 'table.json'
  content = {'rows': [{'regret': 0.5, 'stderr': math.nan}], 'all': (math.inf,)}
  atomic_files.write_json(path, content)
  read = atomic_files.read_json(path)
  assert read == {'rows': [{'regret': 0.5, 'stderr': None}], 'all': [None]}
  (row,) = atomic_files.null_to_nan(read)['rows']
  assert row['regret'] == 0.5 and math.isnan(row['stderr'])
  # What was written before is read as it is.
  path.write_text('[NaN, -Infinity]')
  assert atomic_files.read_json(path)[1] == -math.inf


def test_table_comes_back_as_it_was_written(tmp_path):
  path = tmp_path / 'table.csv'
  rows = [
    {'name': 'LSTM, "64"', 'seed': 0, 'regret': 0.1 + 0.2, 'exact': None},
    {'name': 'KT', 'seed': None, 'regret': 1e-30, 'exact': 'yes'},
  ]
  atomic_files.write_csv(path, rows)
  assert atomic_files.read_csv(path) == rows
  assert type(atomic_files.read_csv(path)[0]['seed']) is int


def test_table_has_the_columns_of_all_rows(tmp_path):
  path = tmp_path / 'table.csv'
  atomic_files.write_csv(path, [{'a': 1}, {'b': 2}])
  assert atomic_files.read_csv(path) == [
    {'a': 1, 'b': None},
    {'a': None, 'b': 2},
  ]


def test_table_that_is_not_there_is_named(tmp_path):
  with pytest.raises(ValueError, match='cannot read .*none.csv'):
    atomic_files.read_csv(tmp_path / 'none.csv')


def test_figure_keeps_its_colours_in_a_palette():
  figure = figure_lib.Figure(figsize=(3, 2))
  panel = figure.subplots()
  panel.imshow(np.linspace(0, 1, 400).reshape(20, 20), cmap='viridis')
  whole = io.BytesIO()
  figure.savefig(whole, format='png')
  png = atomic_files.to_png(figure)
  assert len(png) < 0.7 * len(whole.getvalue())
  whole.seek(0)
  np.testing.assert_allclose(
    plt_image.imread(io.BytesIO(png))[..., :3],
    plt_image.imread(whole)[..., :3],
    atol=12 / 255,
  )
