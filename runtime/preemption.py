"""SIGTERM and Ctrl-C as a request to stop, not as the end.

SIGUSR1 and SIGUSR2 are handled likewise: with them schedulers of clusters warn
a job whose time is up.
"""

from collections.abc import Iterable
from collections.abc import Iterator
import contextlib
import os
import signal
import threading
from typing import Any

from nonstationary_mbml.runtime import multihost

# Not all systems have them.
_WARNINGS = {
  getattr(signal, name)
  for name in ('SIGUSR1', 'SIGUSR2')
  if hasattr(signal, name)
}
_SIGNALS = (signal.SIGTERM, signal.SIGINT, *_WARNINGS)


class Interrupts:
  """The signal that asked to stop, if one did.

  Attributes:
    received: The signal; None as long as nobody asked.
  """

  def __init__(self):
    self.received: signal.Signals | None = None

  def over_processes(
    self, seconds: float
  ) -> tuple[float, signal.Signals | None]:
    """Returns the largest of all processes' seconds, and a signal of one.

    Every process is told the same, so that all do as many steps in a call and
    stop after the same one.

    Args:
      seconds: Seconds that the last call took in this process.
    """
    milliseconds, number = multihost.max_over_processes(
      [int(1000 * seconds), self.received or 0]
    )
    return milliseconds / 1000, signal.Signals(number) if number else None


@contextlib.contextmanager
def catch(enabled: bool = True) -> Iterator[Interrupts]:
  """Notes, inside a `with`, the first signal to stop instead of dying of it.

  A second SIGTERM, and Ctrl-C after any other, does what it would have done
  before.

  Args:
    enabled: Whether to handle signals. Outside of the main thread nothing
      changes in any case: Python lets no other thread handle them.
  """
  interrupts = Interrupts()
  if not enabled or threading.current_thread() is not threading.main_thread():
    yield interrupts
    return

  def on_signal(number: int, frame: Any) -> None:
    # A scheduler may send several signals for the same request.
    restore({number, signal.SIGINT} - _WARNINGS)
    if interrupts.received is not None:
      return
    interrupts.received = signal.Signals(number)
    # Not through sys.stderr, which may be in the middle of a line.
    os.write(
      2,
      f'\n{interrupts.received.name}: finishing the step, then saving; once '
      'more stops at once\n'.encode(),
    )

  before = {number: signal.signal(number, on_signal) for number in _SIGNALS}

  def restore(numbers: Iterable[int]) -> None:
    for number in numbers:
      handler = before[number]
      # None is a handler that Python did not install.
      signal.signal(number, signal.SIG_DFL if handler is None else handler)

  try:
    yield interrupts
  finally:
    restore(before)


def terminate_with_stdin() -> None:
  """Sends this process a SIGTERM when its standard input ends.

  If that is a pipe of the process that started it, it ends with that process,
  even if that is killed.
  """

  def wait() -> None:
    # Not through sys.stdin, whose lock would be held at the end.
    while os.read(0, 1024):
      pass
    os.kill(os.getpid(), signal.SIGTERM)

  threading.Thread(target=wait, daemon=True).start()
