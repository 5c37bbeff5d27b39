"""What a run reports while it is at work: messages, progress, seconds; and when it stops."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any  # Any: events are plain trees.

from jaxmerge.parallel import preemption, processes

Event = Mapping[str, Any]


class Events:
  """Where a run reports to: `progress` is given events, `stop` is asked after each part."""

  def __init__(
    self,
    progress: Callable[[Event], None] = lambda event: None,
    stop: Callable[[], bool] = lambda: False,
  ) -> None:
    self.progress, self.stop = progress, stop
    self.seconds: dict[str, float] = {}

  @contextlib.contextmanager
  def timed(self, phase: str) -> Iterator[None]:
    """Adds up the seconds of a phase."""
    begun = time.perf_counter()
    yield
    self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - begun

  def say(self, message: str) -> None:
    """Passes a message on."""
    self.progress({"message": message})

  def bar(
    self, phase: str, total: int, unit: str = "part", *, fresh: bool = True
  ) -> Callable[..., None]:
    """Shows that a phase begins; returns the callback (done, total, **numbers) that shows more.

    A phase that is not `fresh` goes on from somewhere, which its first callback says. After a part,
    but not after a round, the run stops if `stop` says so: the loop stops by itself.
    """

    def show(done: int, total: int, **numbers: float | None) -> None:
      known = {k: v for k, v in numbers.items() if v is not None}
      self.progress({"phase": phase, "done": done, "total": total, "unit": unit, "numbers": known})
      if done and unit != "round" and processes.agree(self.stop()):
        raise preemption.Stopped(f"stopped in {phase}, after {unit} {done} of {total}")

    if fresh:
      show(0, total)
    return show
