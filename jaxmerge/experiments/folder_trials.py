"""Merges and evaluations of folders of models, each recorded once: a trial is never made twice."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any  # Any: records are plain trees.

import numpy as np

from jaxmerge import methods
from jaxmerge.catalog import lookup
from jaxmerge.core import stage
from jaxmerge.evaluation import external
from jaxmerge.files import inputs, merge
from jaxmerge.io.disk import atomic, stamps
from jaxmerge.io.huggingface import folder as folders
from jaxmerge.io.huggingface import hub

FAILURES = (ValueError, TypeError, ArithmeticError, RuntimeError)  # Of a method or an evaluation.


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
  """What is merged and how it is scored.

  Attributes:
    folder: the workdir.
    base: reference of the base, as `jaxmerge.merge_files` takes it.
    models: references of the models by name.
    evaluate: folder -> numbers by name: the score that chooses.
    final: the same with other rows, called once for the best of each method; None: there is none.
    numbers: which numbers count; empty: all of them.
    lower_is_better: whether less of them is better.
    seed: of random masks.
    download: whether models that the hub's cache lacks are fetched.
  """

  folder: pathlib.Path
  base: str
  models: Mapping[str, str]
  evaluate: external.Evaluate
  final: external.Evaluate | None = None
  numbers: Sequence[str] = ()
  lower_is_better: bool = False
  seed: int = 0
  download: bool = False

  def mean(self, numbers: Mapping[str, float]) -> float:
    """Returns the mean of the numbers that count."""
    return float(np.mean([numbers[n] for n in self.numbers or numbers]))

  def merged(self, method: str, number: int) -> pathlib.Path:
    """Returns the folder of the merge of a trial."""
    return self.folder / "merges" / f"{method}-{number}"


def read(path: pathlib.Path) -> dict[str, Any]:
  """Returns a file of results, empty if there is none; ValueError, naming it, if it is damaged."""
  try:
    return folders.read_json(path) if path.exists() else {}
  except ValueError as error:
    raise ValueError(f"{error} If it is removed, it is made again.") from error


def write(path: pathlib.Path, result: Mapping[str, Any]) -> None:
  """Writes a file of results, whole or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with atomic.write(path) as file:
    file.write((json.dumps(result, indent=1) + "\n").encode())


def evaluate(
  function: external.Evaluate, out: pathlib.Path, names: Sequence[str]
) -> tuple[dict[str, float], float]:
  """Returns the numbers of a folder, and the seconds that it took.

  Args:
    function: folder -> numbers by name.
    out: the folder.
    names: numbers that must be among them.

  Raises:
    ValueError: where the evaluation fails, or lacks one of the numbers.
  """
  begun = time.perf_counter()
  numbers = external.check_numbers(function(out))
  missing = [n for n in names if n not in numbers]
  if missing:
    raise ValueError(f"the evaluation has no number {missing[0]!r}, it has {', '.join(numbers)}.")
  return {n: float(x) for n, x in numbers.items()}, time.perf_counter() - begun


def score_alone(source: Source, name: str, reference: str) -> dict[str, Any]:
  """Returns the numbers of a model that is not merged, from its file if it has one.

  A folder of Hugging Face is evaluated where it is; a checkpoint, or a model with an adapter, is
  copied first, as a merge would write it.
  """
  path = source.folder / "alone" / f"{name.replace('/', '_')}.json"
  result = read(path)
  asked = {"numbers": source.evaluate} | ({"final": source.final} if source.final else {})
  missing = {key: function for key, function in asked.items() if key not in result}
  if missing:
    with _place(source, path.with_suffix(""), reference) as place:
      for key, function in missing.items():
        names = source.numbers or [*result.get("numbers", ())]
        result[key], seconds = evaluate(function, place, names)
        result["seconds"] = result.get("seconds", 0.0) + seconds
        write(path, result)
  return result


@contextlib.contextmanager
def _place(source: Source, copy: pathlib.Path, reference: str) -> Iterator[pathlib.Path]:
  """Yields a folder of a model that can be evaluated: itself, or a passing copy."""
  parts = inputs.split(reference)
  place = hub.locate(parts.path, parts.revision, download=source.download).folder
  if not parts.adapters and any(place.glob("*.safetensors")):
    yield place
    return
  if not copy.exists():
    merge.merge_files(methods.average(), [reference], copy, download=source.download)
  yield copy
  shutil.rmtree(copy)


def merge_trial(
  source: Source, method: str, settings: Mapping[str, Any], out: pathlib.Path
) -> float:
  """Merges the models by a method with these settings, and returns the seconds that it took."""
  parameters = lookup.entry(method).parameters
  hparams = {n: v for n, v in settings.items() if parameters[n].number}
  made = getattr(methods, method)(**{n: v for n, v in settings.items() if n not in hparams})
  seed = source.seed if "seed" in stage.hparams(made) else None
  begun = time.perf_counter()
  merge.merge_files(
    made,
    dict(source.models),
    out,
    base=source.base,
    hparams=hparams,
    seed=seed,
    download=source.download,
  )
  return time.perf_counter() - begun


class Failed(ValueError):
  """A method failed; further settings of it would fail in the same way."""


@dataclasses.dataclass(eq=False)
class Trials:
  """An objective: merges of folders by one method, whose candidates are settings.

  Attributes:
    source: what is merged.
    name: of the method.
    keep_all: whether all merges stay on the disk, or only the best one.
    on_trial: called with each trial that is complete.
    asked: the trials of this search, in order; those recorded before are among them.
  """

  source: Source
  name: str
  keep_all: bool = False
  on_trial: Callable[[Mapping[str, Any]], None] = lambda trial: None
  asked: list[dict[str, Any]] = dataclasses.field(default_factory=list)

  def __post_init__(self) -> None:
    """Reads what earlier runs have recorded."""
    self.path = self.source.folder / "trials" / f"{self.name}.json"
    self.recorded: list[dict[str, Any]] = read(self.path).get("trials", [])
    for trial in self.recorded:  # What failed is tried again.
      trial.pop("error", None)

  def evaluate(self, candidates: Sequence[Mapping[str, Any]]) -> Iterator[tuple[float, None]]:
    """Yields the score of each candidate; NaN where its evaluation failed."""
    for settings in candidates:
      trial = self._trial(settings)
      if not {"numbers", "error"} & trial.keys():
        self._complete(trial)
      self.asked.append(trial)
      self.on_trial(trial)
      if "merge_seconds" not in trial:
        raise Failed(trial["error"])
      if not self.keep_all:
        self.remove_all_but(self.best())
      yield self.gain(trial), None

  def model(self, candidate: Mapping[str, Any]) -> pathlib.Path:
    """Returns the folder of a merge, merged again if it is no longer there."""
    out = self.source.merged(self.name, self._trial(candidate)["number"])
    if not out.exists():
      merge_trial(self.source, self.name, candidate, out)
    return out

  def gain(self, trial: Mapping[str, Any]) -> float:
    """Returns the score of a trial, NaN where it has none."""
    if "numbers" not in trial:
      return float("nan")
    mean = self.source.mean(trial["numbers"])
    return -mean if self.source.lower_is_better else mean

  def best(self) -> Mapping[str, Any] | None:
    """Returns the trial with the highest score, the first of equal ones."""
    scored = [t for t in self.asked if "numbers" in t]
    return max(scored, key=self.gain, default=None)

  def remove_all_but(self, trial: Mapping[str, Any] | None) -> None:
    """Removes the merges of this method but that of a trial."""
    for out in (self.source.merged(self.name, t["number"]) for t in self.recorded if t != trial):
      shutil.rmtree(out, ignore_errors=True)

  def _trial(self, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the record of a trial with these settings, a new one if there is none."""
    for trial in self.recorded:
      if trial["settings"] == settings:
        return trial
    self.recorded.append({"number": len(self.recorded) + 1, "settings": dict(settings)})
    return self.recorded[-1]

  def _complete(self, trial: dict[str, Any]) -> None:
    """Merges and evaluates what a trial lacks, and records it in place."""
    out = self.source.merged(self.name, trial["number"])
    if "merge_seconds" not in trial or not out.exists():
      try:
        seconds = merge_trial(self.source, self.name, trial["settings"], out)
      except stamps.Changed:
        raise
      except FAILURES as error:
        trial["error"] = f"the merge failed: {error}"
        return
      trial.setdefault("merge_seconds", seconds)
      write(self.path, {"trials": self.recorded})
    try:
      numbers, seconds = evaluate(self.source.evaluate, out, self.source.numbers)
      write(out / external.NAME, numbers)
      trial |= {"numbers": numbers, "evaluate_seconds": seconds}
    except FAILURES as error:
      trial["error"] = f"the evaluation failed: {error}"
    write(self.path, {"trials": self.recorded})


def files_of(reference: str, *, download: bool) -> list[list[Any]]:
  """Returns name, size and time of all files of a model: they change with it."""
  parts = inputs.split(reference)
  places = [
    hub.locate(*part, download=download).folder
    for part in ((parts.path, parts.revision), *parts.adapters)
  ]
  result = []
  for place in places:
    if not place.exists():
      raise ValueError(f"{place}: no such folder, nor a model of the hub.")
    for path in sorted(p for p in place.rglob("*") if p.is_file()):
      status = path.stat()
      result.append([str(path.relative_to(place)), status.st_size, status.st_mtime_ns])
  return result
