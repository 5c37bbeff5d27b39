"""Preemption: SIGTERM, the grace period after it, and what is left of a run."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

GRACE = 25.0  # Seconds; a spot VM of Google's cloud is taken away 30 after its signal.
STATUS = 128 + signal.SIGTERM


class Stopped(Exception):
  """A run has stopped on request; all that it saved is whole."""


@contextlib.contextmanager
def watch_sigterm(grace: float = GRACE) -> Iterator[Callable[[], bool]]:
  """Yields a function that tells whether a SIGTERM has come.

  A second one ends the process at once, and so does the first when the block has not ended `grace`
  seconds later, with status 143 and without any cleaning up, whatever the main thread is waiting
  for. Outside the main thread, which alone may ask for signals, the answer is always no.

  >>> with watch_sigterm() as stop:
  ...   signal.raise_signal(signal.SIGTERM)
  ...   stop()
  True
  """
  came = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    yield came.is_set
    return
  # A handler of Python's runs only between two of its steps, and a round is one: the byte that the
  # handler below it writes comes at once.
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
  """Reads the numbers of signals until there are no more, or too many, or it is too late."""
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
  message = f"stopped in the middle of a round: {why}; what was saved before it is whole."
  print(message, file=sys.stderr, flush=True)
  os._exit(STATUS)
