"""What a run logs, for TensorBoard.

  train.train(..., callbacks=[tensorboard.Writer('runs/a/tensorboard')])

  tensorboard --logdir=runs

A callback of training that needs tensorboardX, an optional dependency.
"""

import os
import pathlib
import time

from nonstationary_mbml import predictors


class Writer:
  """Writes the entry of every log, each number under its own name.

  A run that goes on writes another file into the same folder, which takes back
  the steps that it does again.
  """

  def __init__(self, folder: str | pathlib.Path):
    """Initializes the writer; touches nothing yet.

    Args:
      folder: Folder of the files.

    Raises:
      ValueError: If tensorboardX is not installed.
    """
    try:
      from tensorboardX import proto  # noqa: PLC0415 (optional)
      from tensorboardX import record_writer
    except ImportError as error:
      raise ValueError(
        'logs for TensorBoard need tensorboardX: pip install -e '
        "'.[tensorboard]'"
      ) from error
    self._folder = pathlib.Path(folder)
    self._proto = proto
    # Its SummaryWriter writes later, in a thread: a kill would lose the end.
    self._record_writer = record_writer.RecordWriter
    self._records = None

  def __call__(
    self, step: int, entry: dict[str, float], params: predictors.Params
  ) -> None:
    """Writes what is logged at a step; as `train.Callback`."""
    del params
    if self._records is None:
      self._begin(step)
    summary = self._proto.summary_pb2.Summary()
    for name, value in entry.items():
      if name != 'step':
        summary.value.add(tag=name, simple_value=value)
    self._write(step=step, summary=summary)
    self._records.flush()

  def _begin(self, step: int) -> None:
    """Begins a file; TensorBoard reads those of a folder by their names."""
    self._folder.mkdir(parents=True, exist_ok=True)
    name = f'events.out.tfevents.{time.time():.6f}.{os.getpid()}'
    self._records = self._record_writer(str(self._folder / name))
    self._write(file_version='brain.Event:2')
    start = self._proto.event_pb2.SessionLog.START
    self._write(
      step=step, session_log=self._proto.event_pb2.SessionLog(status=start)
    )

  def _write(self, **fields: object) -> None:
    event = self._proto.event_pb2.Event(wall_time=time.time(), **fields)
    self._records.write(event.SerializeToString())
