"""As much of SLURM as submitit asks for, on this machine.

  slurm.install(folder) makes the commands sbatch, srun, sacct, scontrol and
  scancel, which keep their state in the folder.

A job is `<array>_<index>`, or a number if it is in no array. Its state is what
sacct would tell, its process the task that srun has started.
"""

import os
import pathlib
import re
import signal
import stat
import subprocess
import sys
import threading


def install(folder):
  """Returns the environment in which the commands are found."""
  commands = folder / 'bin'
  commands.mkdir(parents=True)
  for name in ('sbatch', 'srun', 'sacct', 'scontrol', 'scancel'):
    path = commands / name
    path.write_text(
      f'#!/bin/sh\nexec {sys.executable} {__file__} {name} {folder} "$@"\n'
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
  return {**os.environ, 'PATH': f'{commands}{os.pathsep}{os.environ["PATH"]}'}


def submitted(folder):
  """The scripts of all arrays."""
  return [path.read_text() for path in sorted(folder.glob('*.sbatch'))]


def _write(path, text):
  path.with_suffix('.new').write_text(text)
  path.with_suffix('.new').rename(path)


def sbatch(folder, script):
  if '--partition=nowhere' in pathlib.Path(script).read_text():
    sys.exit('sbatch: error: invalid partition specified: nowhere')
  array = 100 + len(list(folder.glob('*.sbatch')))
  copy = folder / f'{array}.sbatch'
  copy.write_text(pathlib.Path(script).read_text())
  subprocess.Popen(
    [sys.executable, __file__, 'run', folder, str(array)],
    start_new_session=True,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  print(f'Submitted batch job {array}')


def run(folder, array):
  """The scheduler: runs the jobs of an array, some at a time."""
  script = folder / f'{array}.sbatch'
  found = re.search(r'--array=0-(\d+)%(\d+)', script.read_text())
  last, limit = map(int, found.groups()) if found else (0, 1)
  free = threading.Semaphore(limit)

  def run_job(index):
    job_id = f'{array}_{index}' if found else array
    state = folder / f'{job_id}.state'
    of_array = {
      'SLURM_ARRAY_JOB_ID': array,
      'SLURM_ARRAY_TASK_ID': str(index),
    }
    with free:
      while True:
        _write(state, 'RUNNING')
        job = subprocess.run(
          ['bash', script],
          env={
            **os.environ,
            **(of_array if found else {}),
            'SLURM_JOB_ID': f'{array}{index:03d}' if found else array,
            'SLURM_NTASKS': '1',
            'SLURM_JOB_NUM_NODES': '1',
            'SLURM_NODEID': '0',
            'SLURM_PROCID': '0',
            'SLURM_LOCALID': '0',
          },
          check=False,
        )
        requeued = folder / f'{job_id}.requeued'
        if not requeued.exists():
          break
        requeued.unlink()
      _write(state, 'FAILED' if job.returncode else 'COMPLETED')

  jobs = range(last + 1)
  for index in jobs if found else ():
    _write(folder / f'{array}_{index}.state', 'PENDING')
  threads = [threading.Thread(target=run_job, args=(index,)) for index in jobs]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()


def srun(folder, *args):
  array, index = (
    os.environ.get(f'SLURM_ARRAY_{name}_ID', '') for name in ('JOB', 'TASK')
  )
  job_id = f'{array}_{index}' if array else os.environ['SLURM_JOB_ID']
  files, args = {}, list(args)
  while args[0].startswith('--'):
    option = args.pop(0)
    if option in ('--output', '--error'):
      path = args.pop(0).replace('%A', array).replace('%a', index)
      path = pathlib.Path(path.replace('%t', '0').replace('%j', job_id))
      files[option] = path.open('ab')
  process = subprocess.Popen(
    args, stdout=files['--output'], stderr=files['--error']
  )
  _write(folder / f'{job_id}.pid', str(process.pid))
  sys.exit(process.wait() != 0)


def sacct(folder, *args):
  print('JobID|State|NodeList')
  for path in folder.glob('*.state'):
    print(f'{path.stem}|{path.read_text()}|here')


def scontrol(folder, verb, job):
  if verb != 'requeue':
    sys.exit(f'no {verb} here')
  (folder / f'{job}.requeued').touch()


def scancel(folder, job, *args):
  """`scancel <job> --signal <name>`, or without a signal ends it."""
  number = getattr(signal, f'SIG{args[1]}') if args else signal.SIGKILL
  os.kill(int((folder / f'{job}.pid').read_text()), number)


if __name__ == '__main__':
  name, state, *rest = sys.argv[1:]
  globals()[name](pathlib.Path(state), *rest)
