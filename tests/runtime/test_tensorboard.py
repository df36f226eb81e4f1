import struct
import sys

import pytest

from nonstationary_mbml.runtime import tensorboard

pytest.importorskip('tensorboardX')
from tensorboardX.proto import event_pb2


def read(folder):
  """The events of a folder, file after file: records of TensorFlow.

  A record is its length (8 bytes), their checksum (4), itself, and its (4).
  """
  events = []
  for path in sorted(folder.iterdir()):
    content, begin = path.read_bytes(), 0
    while begin < len(content):
      (length,) = struct.unpack_from('<Q', content, begin)
      record = content[begin + 12 : begin + 12 + length]
      events.append(event_pb2.Event.FromString(record))
      begin += 16 + length
  return events


def scalars(folder):
  """Numbers by name and step."""
  return {
    (value.tag, event.step): value.simple_value
    for event in read(folder)
    for value in event.summary.value
  }


def test_every_number_is_there_at_its_step_once_it_is_logged(tmp_path):
  write = tensorboard.Writer(tmp_path / 'tensorboard')
  assert not list(tmp_path.iterdir())
  write(2, {'step': 2, 'loss': 0.5, 'regret/PTW': 3.0}, None)
  write(4, {'step': 4, 'loss': 0.25, 'regret/PTW': 2.0}, None)
  assert scalars(tmp_path / 'tensorboard') == {
    ('loss', 2): 0.5,
    ('regret/PTW', 2): 3.0,
    ('loss', 4): 0.25,
    ('regret/PTW', 4): 2.0,
  }


def test_run_that_goes_on_takes_back_the_steps_that_it_does_again(tmp_path):
  tensorboard.Writer(tmp_path)(4, {'step': 4, 'loss': 0.25}, None)
  tensorboard.Writer(tmp_path)(2, {'step': 2, 'loss': 0.5}, None)
  starts = [
    event.step
    for event in read(tmp_path)
    if event.session_log.status == event_pb2.SessionLog.START
  ]
  # TensorBoard drops what comes from there on in earlier files.
  assert starts[-1] == 2


def test_without_tensorboardx_the_command_that_installs_it_is_named(
  tmp_path, monkeypatch
):
  monkeypatch.setitem(sys.modules, 'tensorboardX', None)
  with pytest.raises(ValueError, match=r"pip install -e '\.\[tensorboard\]'"):
    tensorboard.Writer(tmp_path)
