"""Tries many times to have two runs at work in one folder: `python tests/support/two_runs.py 200`.

Each try starts two processes at nearly the same moment, each of which runs an experiment, or a
bench, on the same workdir, by its own path or through a link; the work itself is a stand-in that
takes some milliseconds. One of them may be killed while it works, or both may come after one that
was. Prints one line of JSON: how many tries, how many processes were refused and killed, and what
was wrong: two at work at a time, a refusal that does not name the other, a lock that a dead process
left behind.
"""

import json
import os
import pathlib
import random
import signal
import sys
import tempfile
import time
from typing import NamedTuple

from ml_collections import config_dict

from jaxmerge.experiments import bench, bench_config
from jaxmerge.experiments import problem as problems
from jaxmerge.experiments import run as runs

PLAIN = config_dict.ConfigDict(
  {"experiment": "module:none", "seeds": 1, "methods": {}, "rounds": 1, "keep_experts": False}
)


class Setup(NamedTuple):
  """Stands in for the set-up of a run."""

  mark: pathlib.Path
  pause: float
  problem: problems.Problem = problems.Problem(len, {}, [])


def prepare(config, folder, events):
  """Stands in for the set-up of a run: notices whether anybody else is at work in its folder."""
  mark, pause = folder / "at_work", random.Random(os.getpid()).uniform(0, 0.01)
  if mark.exists() and alive(int(mark.read_text() or 0)):
    os._exit(9)
  mark.write_text(str(os.getpid()))
  time.sleep(pause)
  return Setup(mark, pause)


def compare(ready):
  """Stands in for the phases of a run."""
  mark, pause = ready.mark, ready.pause
  time.sleep(pause)
  if mark.read_text() != str(os.getpid()):
    os._exit(9)
  mark.unlink()
  return {}


def compare_methods(config, plain, home, seed, progress):
  """Stands in for the work of a seed of a bench."""
  return compare(prepare(plain, home, None))


def alive(pid):
  try:
    os.kill(pid, 0)
  except (ProcessLookupError, PermissionError):
    return False
  return not pathlib.Path(f"/proc/{pid}/stat").read_text().split(") ")[1].startswith("Z")


def run(kind, workdir, said):
  """A process that works in a folder: 0 done, 1 refused with what it says, 9 wrong."""
  pid = os.fork()
  if pid:
    return pid
  try:
    if kind == "bench":
      bench.run(PLAIN, "", workdir)
    else:
      runs.run(PLAIN, workdir)
    os._exit(0)
  except ValueError as error:
    said.write_text(str(error))
    os._exit(1)
  except BaseException as error:
    said.write_text(repr(error))
    os._exit(8)


def attempt(chance, home):
  """One try; what was wrong, and how many were refused and killed."""
  workdir, link, kind = home / "run", home / "link", chance.choice(["atm", "bench"])
  link.symlink_to(workdir)
  kill = chance.random() < 0.3
  wrong, refused, pids = [], 0, []
  for k in range(2):
    place = link if k and chance.random() < 0.3 else workdir
    pids.append(run(kind, place, home / str(k)))
    time.sleep(chance.choice([0, 0, chance.uniform(0, 0.02)]))
  if kill:
    time.sleep(chance.uniform(0, 0.06))
    os.kill(pids[0], signal.SIGKILL)
  for k, pid in enumerate(pids):
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    told = (home / str(k)).read_text() if (home / str(k)).exists() else ""
    if status == 1:
      refused += 1
      if "another run is using this folder" not in told or ("by process" in told) > (
        str(pids[1 - k]) in told
      ):
        wrong.append(f"refused with {told!r}")
    elif status not in (0, -signal.SIGKILL) or (status < 0 and (k or not kill)):
      wrong.append(f"status {status}: {told}")
  if refused == 2:
    wrong.append("both were refused")
  # Whatever happened: the next one works.
  last = run(kind, workdir, home / "last")
  if os.waitstatus_to_exitcode(os.waitpid(last, 0)[1]):
    wrong.append(f"afterwards: {(home / 'last').read_text()}")
  if (workdir / ".run.lock").exists():
    wrong.append("a lock is left")
  return wrong, refused, kill


def main(tries):
  runs.setup.prepare, runs.compare, bench._compare = prepare, compare, compare_methods
  bench._write = lambda *rest: {}
  bench_config.experiment_config = lambda *rest: PLAIN
  chance, wrong, refused, kills = random.Random(0), [], 0, 0
  for _ in range(tries):
    with tempfile.TemporaryDirectory() as folder:
      faults, some, kill = attempt(chance, pathlib.Path(folder))
    wrong, refused, kills = wrong + faults, refused + some, kills + kill
  print(json.dumps({"tries": tries, "refused": refused, "killed": kills, "wrong": wrong}))


if __name__ == "__main__":
  main(int(sys.argv[1]))
