"""Events of a run: messages, progress, timings, and requests to stop."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any  # Any: events are plain trees.

from jaxmerge.parallel import preemption, processes
from jaxmerge.training import trackers

Event = Mapping[str, Any]


class Events:
  """Reports events to `progress` and rounds to a tracker, and polls `stop` after each part.

  Attributes:
    progress: called with events.
    stop: called after each part; True stops the run there.
    tracker: receives the numbers of each round.
    seconds: of the phases.
  """

  def __init__(
    self,
    progress: Callable[[Event], None] = lambda event: None,
    stop: Callable[[], bool] = lambda: False,
    tracker: trackers.Tracker | None = None,
  ) -> None:
    self.progress, self.stop, self.tracker = progress, stop, tracker
    self.seconds: dict[str, float] = {}

  @contextlib.contextmanager
  def timed(self, phase: str) -> Iterator[None]:
    """Adds the seconds of a block to those of its phase."""
    begun = time.perf_counter()
    yield
    self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - begun

  def track(self, run: str, record: Mapping[str, Any]) -> None:
    """Passes the record of a round to the tracker, if there is one."""
    if self.tracker is not None:
      trackers.on_round(self.tracker, run)(record)

  def say(self, message: str) -> None:
    """Reports a message."""
    self.progress({"message": message})

  def bar(
    self, phase: str, total: int, unit: str = "part", *, fresh: bool = True
  ) -> Callable[..., None]:
    """Announces a phase; returns the callback (done, total, **numbers) for its progress.

    A phase that is not `fresh` resumes where its first callback says. The run stops after a part
    if `stop` says so; rounds are excluded, as the loop polls `stop` itself.
    """

    def show(done: int, total: int, **numbers: float | None) -> None:
      known = {k: v for k, v in numbers.items() if v is not None}
      self.progress({"phase": phase, "done": done, "total": total, "unit": unit, "numbers": known})
      if done and unit != "round" and processes.agree(self.stop()):
        raise preemption.Stopped(f"stopped in {phase}, after {unit} {done} of {total}")

    if fresh:
      show(0, total)
    return show
