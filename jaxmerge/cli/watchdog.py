"""Ends one process of many when another is lost, with a message."""

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
  process itself, a second, small process prints what has happened.
  """
  done = _start_watcher()
  try:
    status = work()
  except BaseException as e:  # Whatever it was, the others must not wait.
    from jaxmerge.parallel import processes

    if processes.is_lost(e):
      progress.log(f"{GONE.format(who=_who())} ({str(e).splitlines()[0]:.200})")
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


def _start_watcher() -> Callable[[], None]:
  """Starts a process that reports this one as lost, unless the function returned is called."""
  if not hasattr(os, "fork"):
    return lambda: None
  reading, writing = os.pipe()
  pid = os.getpid()
  if os.fork() == 0:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
      signal.signal(number, signal.SIG_IGN)
    os.close(writing)
    if not os.read(reading, 1):  # The other end is closed without a word.
      progress.log(GONE.format(who=f"process {pid}"))
    os._exit(0)
  os.close(reading)

  def done() -> None:
    with contextlib.suppress(OSError):  # Somebody has ended the watcher.
      os.write(writing, b".")

  atexit.register(done)  # Before jax's own, hence after it: ends run backwards.
  return done


def _who() -> str:
  import jax

  try:
    return f"process {jax.process_index()}"
  except RuntimeError:  # Its devices have not started: it has no number yet.
    return f"process {os.getpid()}"
