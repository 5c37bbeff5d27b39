"""Preemption: SIGTERM, and the grace period after it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

GRACE = 25.0  # Seconds; a spot VM on Google Cloud is stopped 30 seconds after its signal.
STATUS = 128 + signal.SIGTERM


class Stopped(Exception):
  """Raised when a run has stopped on request; everything it saved is complete."""


@contextlib.contextmanager
def watch_sigterm(grace: float = GRACE) -> Iterator[Callable[[], bool]]:
  """Yields a function that returns whether a SIGTERM has arrived.

  A second SIGTERM ends the process at once, and so does the first if the block has not ended
  `grace` seconds later: with status 143 and without cleanup, even if the main thread is blocked.
  Outside the main thread, which alone can handle signals, the function returns False.

  >>> with watch_sigterm() as stop:
  ...   signal.raise_signal(signal.SIGTERM)
  ...   stop()
  True
  """
  came = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    yield came.is_set
    return
  # A Python signal handler runs only between bytecode instructions, and a round is a single call:
  # the byte that the C handler writes to the socket arrives at once.
  reader, writer = socket.socketpair()
  writer.setblocking(False)
  watch = threading.Thread(target=_watch, args=(reader, grace), daemon=True)
  watch.start()
  before = signal.signal(signal.SIGTERM, lambda number, frame: came.set())
  woken = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
  try:
    yield came.is_set
  finally:
    signal.set_wakeup_fd(woken)
    signal.signal(signal.SIGTERM, before)
    writer.close()
    watch.join()
    reader.close()


def _watch(reader: socket.socket, grace: float) -> None:
  """Reads signal numbers until the socket closes, a second one arrives, or time is up."""
  end = None
  while True:
    reader.settimeout(None if end is None else max(1e-3, end - time.monotonic()))
    try:
      heard = reader.recv(1)
    except TimeoutError:
      _end(f"it was not done {grace:g} s after SIGTERM")
    if not heard:
      return
    if heard[0] != signal.SIGTERM:
      continue
    if end is not None:
      _end("SIGTERM came twice")
    end = time.monotonic() + grace


def _end(why: str) -> None:
  message = f"stopped in the middle of a round: {why}; saved rounds are intact."
  print(message, file=sys.stderr, flush=True)
  os._exit(STATUS)
