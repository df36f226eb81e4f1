import signal
import threading

import pytest

from nonstationary_mbml.runtime import preemption


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_first_signal_is_noted_and_the_second_kills_as_before(number, capfd):
  before = []
  old = signal.signal(number, lambda *args: before.append(args[0]))
  try:
    with preemption.catch() as caught:
      assert caught.received is None
      signal.raise_signal(number)
      assert caught.received == number
      assert not before
      signal.raise_signal(number)
    assert before == [number]
    signal.raise_signal(number)
    assert before == [number, number]
  finally:
    signal.signal(number, old)
  assert f'{number.name}: finishing the step' in capfd.readouterr().err


def test_without_being_enabled_signals_stay_as_they_are():
  handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
  with preemption.catch(enabled=False):
    assert handlers == [
      signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)
    ]


def test_other_threads_train_without_handlers():
  received = []

  def work():
    with preemption.catch() as caught:
      received.append(caught.received)

  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert received == [None]


def test_warnings_of_a_scheduler_and_the_signal_after_them_are_one_wish():
  with preemption.catch() as caught:
    for number in (signal.SIGUSR2, signal.SIGUSR2, signal.SIGTERM):
      signal.raise_signal(number)
    assert caught.received == signal.SIGUSR2
    # A second of the same is another.
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
  assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL
