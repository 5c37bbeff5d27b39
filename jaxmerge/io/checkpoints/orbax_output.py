"""Silences messages of Orbax's threads about errors that are raised anyway."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable

_CLOSED = "Event loop is closed"


def start() -> Callable[[], None]:
  """Silences Orbax's log, and tracebacks of writers whose error was raised already.

  Returns:
    A function that restores the output.
  """
  import orbax.checkpoint as ocp  # late: a second of imports that help and errors need not pay

  folder = os.path.dirname(ocp.__file__)
  before = sys.unraisablehook

  def quiet(record: logging.LogRecord) -> bool:
    return not record.pathname.startswith(folder)

  def hook(error: sys.UnraisableHookArgs) -> None:
    # If several writers fail, the first error closes the event loop that the others report to.
    if not (isinstance(error.exc_value, RuntimeError) and str(error.exc_value) == _CLOSED):
      before(error)

  def end() -> None:
    logging.getLogger("absl").removeFilter(quiet)
    if sys.unraisablehook is hook:
      sys.unraisablehook = before

  logging.getLogger("absl").addFilter(quiet)
  sys.unraisablehook = hook
  return end
