"""Ends a process of a multi-process run with a message when another is lost."""

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
  "error: {who} lost another process of the run, which ended or never joined, or was killed "
  "itself. Saved state is intact: start all processes again, and the run resumes from there."
)


def run(work: Callable[[], int]) -> int:
  """Runs the work of one process, and returns its exit status; does not return where it fails.

  An orderly exit waits for the other processes, which wait for this one. So after any error the
  process exits at once, and the others notice. Where the device runtime kills the process itself,
  a small watcher process prints what happened.
  """
  done = _start_watcher()
  try:
    status = work()
  except BaseException as e:  # Whatever the error, the others must not wait.
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
  """Silences the stdout of a process other than the first."""
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
    if not os.read(reading, 1):  # The other end closed without the final byte.
      progress.log(GONE.format(who=f"process {pid}"))
    os._exit(0)
  os.close(reading)

  def done() -> None:
    with contextlib.suppress(OSError):  # The watcher is gone.
      os.write(writing, b".")

  atexit.register(done)  # Registered before jax's handler, so it runs after it.
  return done


def _who() -> str:
  import jax

  try:
    return f"process {jax.process_index()}"
  except RuntimeError:  # The devices have not started, so there is no index yet.
    return f"process {os.getpid()}"
