import os

import pytest

from nonstationary_mbml import files


def test_file_that_cannot_be_replaced_stays_whole(tmp_path, monkeypatch):
  path = tmp_path / 'metrics.json'
  files.write_whole(path, b'old')

  def fail(*args):
    raise OSError('disk full')

  monkeypatch.setattr(os, 'replace', fail)
  with pytest.raises(OSError, match='disk full'):
    files.write_whole(path, b'new')
  assert path.read_bytes() == b'old'
  assert list(tmp_path.iterdir()) == [path]
