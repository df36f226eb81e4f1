"""A child process of the benchmarks: does its job once for every line it reads.

  python benchmarks/worker.py '{"kind": "matmul", "size": 1024}'

Answers each line on stdin with one of JSON: `seconds`, `loss` (mean over the
steps), `temp_bytes`, `peak_bytes` (of the process, or in use on the GPU),
`devices` and `device`.
"""

import importlib
import json
import resource
import sys
import time

import timing

# Module and function of each kind of work. A child imports no more than it
# needs, since that counts as its memory.
KINDS = {
  'copy': ('plain_jax', 'copy'),
  'evaluation': ('project', 'evaluation'),
  'matmul': ('plain_jax', 'matmul'),
  'plain': ('plain_jax', 'training'),
  'project': ('project', 'training'),
  'pytorch': ('pytorch', 'training'),
}


def main() -> None:
  """Does the job of the command line for every line of stdin, then times it."""
  job = timing.Job(**json.loads(sys.argv[1]))
  module, function = KINDS[job.kind]
  work = getattr(importlib.import_module(module), function)(job)
  for _ in sys.stdin:
    # While a process sleeps, its memory may be taken and its caches are.
    work.run()
    start = time.perf_counter()
    losses = work.run()
    seconds = time.perf_counter() - start
    if losses is not None:
      losses = [float(loss.mean()) for loss in losses]
    # Linux counts in KiB.
    resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answer = {
      'seconds': seconds,
      'loss': losses and sum(losses) / len(losses),
      'temp_bytes': work.temp_bytes,
      'peak_bytes': work.peak_device_bytes() or resident,
      'devices': work.num_devices,
      'device': work.device,
    }
    print(json.dumps(answer), flush=True)


if __name__ == '__main__':
  main()
