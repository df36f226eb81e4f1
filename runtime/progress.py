"""Progress of a long computation: a bar on a terminal, lines elsewhere."""

from collections.abc import Mapping
import sys
import time
from typing import Any

import tqdm


class Progress:
  """Shows how many of a number of things are done.

  On a terminal it is a bar with rate and remaining time. Where the output goes
  to a file it stays quiet, but for one line per report.
  """

  def __init__(
    self,
    total: int,
    desc: str,
    unit: str,
    enabled: bool = True,
    initial: int = 0,
  ):
    """Initializes the progress.

    Args:
      total: Number of things to do.
      desc: Description of the work.
      unit: Name of one thing.
      enabled: Whether to show anything.
      initial: Number of things done before.
    """
    self._is_terminal = sys.stderr.isatty()
    self._total, self._desc, self._unit = total, desc, unit
    self._enabled = enabled
    self._bar = tqdm.tqdm(
      total=total,
      desc=desc,
      unit=unit,
      initial=initial,
      disable=not (enabled and self._is_terminal),
    )
    self._initial = initial
    self._done = initial
    self._start = time.monotonic()

  def __enter__(self) -> 'Progress':
    return self

  def __exit__(self, *error: Any) -> None:
    self._bar.close()

  def update(self, num: int = 1) -> None:
    """Adds things that are done."""
    self._done += num
    self._bar.update(num)

  def report(self, values: Mapping[str, str]) -> None:
    """Shows values: beside the bar, or in a line of their own."""
    self._bar.set_postfix(values)
    if self._enabled and not self._is_terminal:
      seconds = time.monotonic() - self._start
      rate = (self._done - self._initial) / max(seconds, 1e-9)
      left = (self._total - self._done) / rate if rate else float('inf')
      shown = '  '.join(f'{name}={value}' for name, value in values.items())
      print(
        f'{self._desc}: {self._unit} {self._done}/{self._total}  '
        f'{shown}  ({rate:.3g}/s, {left:.0f} s left)',
        file=sys.stderr,
        flush=True,
      )


def bar(
  total: int, desc: str, unit: str, enabled: bool = True, initial: int = 0
) -> Progress:
  """Returns a `Progress`, to be used in a `with`."""
  return Progress(total, desc, unit, enabled, initial)
