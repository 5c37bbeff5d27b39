"""Silences what Orbax's threads print beside the errors that they raise, or after them."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable

_CLOSED = "Event loop is closed"


def start() -> Callable[[], None]:
  """Silences Orbax's log, and tracebacks of its writers whose error has been raised already.

  Returns:
    What ends the silence.
  """
  import orbax.checkpoint as ocp  # late: a second of imports that help and errors need not pay

  folder = os.path.dirname(ocp.__file__)
  before = sys.unraisablehook

  def quiet(record: logging.LogRecord) -> bool:
    return not record.pathname.startswith(folder)

  def hook(error: sys.UnraisableHookArgs) -> None:
    # Of several writers that fail, the first one's error ends the loop that the others report to.
    if not (isinstance(error.exc_value, RuntimeError) and str(error.exc_value) == _CLOSED):
      before(error)

  def end() -> None:
    logging.getLogger("absl").removeFilter(quiet)
    if sys.unraisablehook is hook:
      sys.unraisablehook = before

  logging.getLogger("absl").addFilter(quiet)
  sys.unraisablehook = hook
  return end
