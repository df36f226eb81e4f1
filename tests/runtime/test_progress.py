import io

from nonstationary_mbml.runtime import progress


class _Terminal(io.StringIO):
  def isatty(self):
    return True


def test_without_a_terminal_there_is_one_line_per_report(monkeypatch):
  stderr = io.StringIO()
  monkeypatch.setattr('sys.stderr', stderr)
  with progress.bar(10, 'training', 'step', initial=2) as bar:
    for _ in range(4):
      bar.update(2)
    bar.report({'loss': '0.5', 'regret': '3.1'})
  (line,) = stderr.getvalue().splitlines()
  assert line.startswith('training: step 10/10  loss=0.5  regret=3.1  (')
  assert line.endswith('0 s left)')


def test_a_terminal_has_a_bar_with_values_rate_and_remaining_time(monkeypatch):
  stderr = _Terminal()
  monkeypatch.setattr('sys.stderr', stderr)
  with progress.bar(10, 'training', 'step') as bar:
    bar.update(5)
    bar.report({'loss': '0.5'})
  assert 'training:  50%' in stderr.getvalue()
  assert 'loss=0.5' in stderr.getvalue()
  assert 'step' in stderr.getvalue().replace('?step', '')


def test_what_is_not_enabled_is_silent(monkeypatch):
  for stderr in (io.StringIO(), _Terminal()):
    monkeypatch.setattr('sys.stderr', stderr)
    with progress.bar(10, 'training', 'step', enabled=False) as bar:
      bar.update(5)
      bar.report({'loss': '0.5'})
    assert stderr.getvalue() == ''
