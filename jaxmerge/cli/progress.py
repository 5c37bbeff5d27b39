"""Progress on the terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any  # A progress event is plain JSON.

from jaxmerge import display

Event = Mapping[str, Any]


def log(text: str) -> None:
  """Prints a line to stderr, flushed, with control characters of names made visible."""
  print(display.shown(text), file=sys.stderr, flush=True)


def output(text: str) -> None:
  """Prints a result to stdout in any encoding, with control characters made visible."""
  encoding = sys.stdout.encoding or "utf-8"
  print(display.shown(text).encode(encoding, "backslashreplace").decode(encoding), flush=True)


@contextlib.contextmanager
def bars() -> Iterator[Callable[[Event], None]]:
  """Yields a function that shows progress events: bars on a terminal, else lines on stderr.

  An event is {"phase", "done", "total", "unit", "numbers"} or {"message"}.
  """
  if not sys.stderr.isatty():
    yield lines()
    return
  from rich import console, progress

  columns = (
    progress.TextColumn("{task.description}", markup=False),
    progress.BarColumn(bar_width=24),
    progress.TextColumn("{task.completed:g}/{task.total:g} {task.fields[unit]}", markup=False),
    progress.TimeElapsedColumn(),
    # Rounds may take minutes, so the speed is averaged over all of them.
    progress.TimeRemainingColumn(elapsed_when_finished=False),
    progress.TextColumn("{task.fields[numbers]}", markup=False),
  )
  known: dict[str, progress.TaskID] = {}
  to = console.Console(stderr=True)
  with progress.Progress(*columns, console=to, speed_estimate_period=3600.0) as drawn:

    def show(event: Event) -> None:
      if "message" in event:
        to.print(display.shown(event["message"]), markup=False, highlight=False)
        return
      phase, done, total = event["phase"], event["done"], event["total"]
      text = display.name(numbers(event.get("numbers", {})))
      if phase not in known:
        # A resumed run starts in the middle; earlier work must not count as speed.
        unit = event.get("unit", "")
        known[phase] = drawn.add_task(
          display.name(phase), total=total, completed=done, unit=unit, numbers=text
        )
      else:
        drawn.update(known[phase], completed=done, total=total, numbers=text)

    yield show


def lines(
  pause: float = 5.0, clock: Callable[[], float] = time.monotonic
) -> Callable[[Event], None]:
  """Returns a function that prints the progress of long phases as lines.

  A phase that lasts longer than `pause` seconds has a line every `pause` seconds, and one at its
  end.
  """
  last: dict[str, float] = {}
  slow = set()

  def show(event: Event) -> None:
    if "message" in event:
      log(event["message"])
      return
    phase, now = event["phase"], clock()
    if now - last.setdefault(phase, now) >= pause:
      slow.add(phase)
    elif phase not in slow or event["done"] != event["total"]:
      return
    last[phase] = now
    text = f"{phase}: {event['done']:g}/{event['total']:g} {event.get('unit', '')}".rstrip()
    rest = numbers(event.get("numbers", {}))
    log(display.name(f"{text}, {rest}" if rest else text))

  return show


def numbers(values: Mapping[str, Any]) -> str:
  """Formats current numbers as a short text.

  >>> numbers({"mean": 0.71234, "round": 3})
  'mean 0.7123, round 3'
  """
  shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
  return ", ".join(shown)


def byte_counter(show: Callable[[Event], None], phase: str, size: int) -> Callable[[int], None]:
  """Returns a function that counts bytes, and shows their sum out of `size` and the speed."""
  done, first, begun = 0, 0, 0.0

  def count(more: int) -> None:
    nonlocal done, first, begun
    done += more
    event = {"phase": phase, "done": done // 10**6, "total": size // 10**6, "unit": "MB"}
    if not begun:  # The first count may be what an interrupted run had done.
      first, begun = done, time.monotonic()
      show(event)
      return
    speed = (done - first) / 1e6 / max(time.monotonic() - begun, 1e-3)
    show({**event, "numbers": {"MB/s": round(speed)}})

  return count
