"""Logs the metrics of a run, round by round, to TensorBoard or Weights & Biases.

A tracker is any object with `write` and `close`; another service needs one such class.
"""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import secrets
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable  # Any: records are plain trees.

from jaxmerge import errors
from jaxmerge.io.disk import atomic

KINDS = ("none", "tensorboard", "wandb")
_PACKAGES = {"tensorboard": ("tensorboardX", "log"), "wandb": ("wandb", "wandb")}
_ID = "wandb_run.json"  # In the run's folder, so that a resumed run continues the same W&B run.


@runtime_checkable
class Tracker(Protocol):
  """Logs numbers to a service."""

  where: str

  def write(self, group: str, step: int, numbers: Mapping[str, float]) -> None:
    """Logs the numbers of a group, such as an ATM run, at a step."""
    ...

  def close(self) -> None:
    """Flushes pending numbers, and closes the tracker."""
    ...


class TensorBoard:
  """Writes event files for TensorBoard with tensorboardX.

  Attributes:
    where: the folder of the event files.
  """

  def __init__(self, folder: pathlib.Path) -> None:
    self.where = str(folder / "tensorboard")
    self._writer = _package("tensorboard").SummaryWriter(self.where)

  def write(self, group: str, step: int, numbers: Mapping[str, float]) -> None:
    """Writes each number as a scalar GROUP/NAME."""
    for name, value in numbers.items():
      self._writer.add_scalar(f"{group}/{name}", value, step)

  def close(self) -> None:
    """Flushes pending numbers, and closes the tracker."""
    self._writer.close()


class Wandb:
  """Logs to a Weights & Biases run; its environment variables, such as WANDB_MODE=offline, apply.

  Attributes:
    where: the page of the run, or the folder of an offline run.
  """

  def __init__(self, folder: pathlib.Path, config: Mapping[str, Any]) -> None:
    wandb = _package("wandb")
    folder.mkdir(parents=True, exist_ok=True)
    self._run = wandb.init(
      project=os.environ.get("WANDB_PROJECT", "jaxmerge"),
      name=folder.resolve().name,
      id=_run_id(folder),
      resume="allow",
      dir=str(folder),
      config=dict(config),
      settings=wandb.Settings(silent=True),
    )
    self._groups: set[str] = set()
    self.where = self._run.url or self._run.dir

  def write(self, group: str, step: int, numbers: Mapping[str, float]) -> None:
    """Logs the numbers as GROUP/NAME, with GROUP/step as their step metric."""
    if group not in self._groups:
      self._run.define_metric(f"{group}/*", step_metric=f"{group}/step")
      self._groups.add(group)
    named = {f"{group}/{name}": value for name, value in numbers.items()}
    self._run.log({f"{group}/step": step, **named})

  def close(self) -> None:
    """Finishes the W&B run."""
    self._run.finish()


def _run_id(folder: pathlib.Path) -> str:
  """Returns the W&B id of the run in a folder, or creates one."""
  path = folder / _ID
  if not path.exists():
    with atomic.write(path) as file:
      file.write(json.dumps({"id": secrets.token_hex(6)}).encode())
  return str(json.loads(path.read_text(encoding="utf-8"))["id"])


def _package(kind: str) -> Any:
  """Imports the library of a tracker; raises ValueError if it is not installed."""
  name, extra = _PACKAGES[kind]
  try:
    return importlib.import_module(name)
  except ModuleNotFoundError as error:
    raise ValueError(
      f"the tracker {kind} needs {name}, which is not installed: pip install 'jaxmerge[{extra}]'."
    ) from error


def open_tracker(
  kind: str, folder: str | os.PathLike[str], config: Mapping[str, Any] | None = None
) -> Tracker | None:
  """Opens a tracker for a run; returns None for "none".

  Args:
    kind: "none", "tensorboard" or "wandb".
    folder: folder of the run.
    config: settings of the run, which W&B shows with it.

  Raises:
    ValueError: for an unknown kind, or if the library is not installed.
  """
  if kind not in KINDS:
    raise ValueError(f"tracker cannot be {kind!r}{errors.nearest(kind, KINDS)}.")
  place = pathlib.Path(folder)
  if kind == "wandb":
    return Wandb(place, config or {})
  return TensorBoard(place) if kind == "tensorboard" else None


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
  """Returns the numbers of a round's record by name; per-task numbers are NAME/TASK.

  >>> numbers({"round": 2, "mean": 0.5, "loss": {"ant": 1.5, "bee": None}, "cosines": [[1.0]]})
  {'mean': 0.5, 'loss/ant': 1.5}
  """
  result = {}
  for name, value in record.items():
    entries = value.items() if isinstance(value, Mapping) else [("", value)]
    for task, x in entries:
      if name != "round" and isinstance(x, int | float) and not isinstance(x, bool):
        result[f"{name}/{task}" if task else name] = float(x)
  return result


def on_round(tracker: Tracker, group: str = "atm") -> Callable[[Mapping[str, Any]], None]:
  """Returns an `on_round` callback for `jaxmerge.tune_and_merge` that tracks each round."""
  return lambda record: tracker.write(group, record["round"], numbers(record))


def write_final(tracker: Tracker, record: Mapping[str, Any]) -> None:
  """Logs the scores of all models of a record as the group "final"."""
  scores: dict[str, float] = {}
  for name, model in record["models"].items():
    values = {"mean": model["mean"], **model["per_task"]}
    scores |= {f"{name}/{key}": float(x) for key, x in values.items() if x is not None}
  tracker.write("final", 0, scores)
