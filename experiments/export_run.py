"""Copies what is worth keeping of a finished run.

  python experiments/export_run.py runs/lstm_ptw_seed0 results/models/my_lstm

That is its last snapshot, config, table, environment and a few lines of its
log; `saved_runs.load_run` loads the copy, and evaluate.py evaluates it.
"""

import sys

from absl import flags

from nonstationary_mbml.experiments import cli
from nonstationary_mbml.experiments import saved_runs


def main(argv: list[str]) -> None:
  """Copies the run, and tells how large it is."""
  if len(argv) != 3:
    sys.exit('error: give the folder of a run, and that of its copy')
  _, folder, target = argv
  cli.start(argv[:1])
  try:
    size = saved_runs.export(folder, target, cli.imports(flags.FLAGS))
  except (ValueError, OSError) as error:
    cli.end_with(error)
  print(f'Wrote {target}: {size / 1024:.0f} KiB')


if __name__ == '__main__':
  define = cli.FlagDefiner()
  cli.run(main)
