"""One process of many: it ends by itself where another is gone, and says so."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable

from jaxmerge.cli import progress

GONE = (
  "error: {who} has lost another process of the run, which ended or never came, or was killed "
  "itself. Whatever was saved is whole: start all processes again, and the run goes on from there."
)


def run(work: Callable[[], int]) -> int:
  """Runs the work of one process, and returns its exit status; does not return where it fails.

  An orderly end waits for the other processes, which wait for this one: after an error, whatever it
  is, the process ends at once, and the others hear of it. Where the runtime of the devices ends the
  process itself, a second, small process says what has happened.
  """
  done = _watched()
  try:
    status = work()
  except BaseException as e:  # Whatever it was, the others must not wait.
    from jaxmerge.parallel import processes

    if processes.lost(e):
      progress.say(f"{GONE.format(who=_who())} ({str(e).splitlines()[0]:.200})")
    else:
      traceback.print_exception(e)
    status = 1
  if status:
    sys.stdout.flush()
    sys.stderr.flush()
    done()
    os._exit(status)
  return 0


def quiet() -> None:
  """Makes a process that is not the first one silent, but for its errors."""
  sys.stdout.flush()
  with open(os.devnull, "wb") as nowhere:
    os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _watched() -> Callable[[], None]:
  """Starts the process that speaks where this one cannot; gives what tells it that all is said."""
  if not hasattr(os, "fork"):
    return lambda: None
  reading, writing = os.pipe()
  whose = os.getpid()
  if os.fork() == 0:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
      signal.signal(number, signal.SIG_IGN)
    os.close(writing)
    if not os.read(reading, 1):  # The other end is closed, and nothing was said.
      progress.say(GONE.format(who=f"process {whose}"))
    os._exit(0)
  os.close(reading)

  def done() -> None:
    with contextlib.suppress(OSError):  # The watcher was ended by someone: there is nobody to tell.
      os.write(writing, b".")

  atexit.register(done)  # Before jax's own, hence after it: ends run backwards.
  return done


def _who() -> str:
  import jax

  try:
    return f"process {jax.process_index()}"
  except RuntimeError:  # Its devices have not started: nobody has told it its number.
    return f"process {os.getpid()}"
