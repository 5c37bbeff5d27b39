"""Being asked to stop, by SIGTERM, as machines do that are about to be taken away."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


class Stopped(Exception):
  """A run has stopped where it was asked to; all that it saved is whole."""


@contextlib.contextmanager
def asked() -> Iterator[Callable[[], bool]]:
  """Yields what tells whether a SIGTERM has come; a second one ends the process at once.

  Outside the main thread, which alone hears of signals, the answer is always no.

  >>> with asked() as stop:
  ...   signal.raise_signal(signal.SIGTERM)
  ...   stop()
  True
  """
  came = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    yield came.is_set
    return

  def hear(number: int, frame: object) -> None:
    came.set()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

  before = signal.signal(signal.SIGTERM, hear)
  try:
    yield came.is_set
  finally:
    signal.signal(signal.SIGTERM, before)
