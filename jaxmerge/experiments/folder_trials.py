"""The trials of a bench on model folders: a merge and its evaluation.

Each is recorded on disk, so that a resumed run repeats none.
"""

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
from jaxmerge.io.checkpoints import other_programs
from jaxmerge.io.disk import atomic, stamps
from jaxmerge.io.huggingface import folder as folders
from jaxmerge.io.huggingface import hub

FAILURES = (ValueError, TypeError, ArithmeticError, RuntimeError)  # Of a method or an evaluation.


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
  """The models to merge, and how merges are scored.

  Attributes:
    folder: the workdir.
    base: reference of the base, as `jaxmerge.merge_files` takes it.
    models: references of the models by name.
    evaluate: folder -> numbers by name; their mean selects the settings.
    final: the same on held-out rows, called once for the best merge of each method; None: skipped.
    numbers: which numbers enter the score; empty: all.
    lower_is_better: whether lower numbers are better.
    seed: seed of random masks.
    download: whether models missing from the hub's cache are downloaded.
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
    """Returns the mean of the numbers that enter the score."""
    return float(np.mean([numbers[n] for n in self.numbers or numbers]))

  def merge_folder(self, method: str, number: int) -> pathlib.Path:
    """Returns the folder of a trial's merge."""
    return self.folder / "merges" / f"{method}-{number}"


def read(path: pathlib.Path) -> dict[str, Any]:
  """Reads a file of results; empty if it does not exist. Raises ValueError if it is damaged."""
  try:
    return folders.read_json(path) if path.exists() else {}
  except ValueError as error:
    raise ValueError(f"{error} Remove it, and the next run writes it again.") from error


def write(path: pathlib.Path, result: Mapping[str, Any]) -> None:
  """Writes a file of results, whole or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with atomic.write(path) as file:
    file.write((json.dumps(result, indent=1) + "\n").encode())


def evaluate(
  function: external.Evaluate, out: pathlib.Path, names: Sequence[str]
) -> tuple[dict[str, float], float]:
  """Returns the numbers of a folder, and how many seconds the evaluation took.

  Args:
    function: folder -> numbers by name.
    out: the folder.
    names: numbers that the evaluation must return.

  Raises:
    ValueError: if the evaluation fails or does not return one of them.
  """
  begun = time.perf_counter()
  numbers = external.check_numbers(function(out))
  missing = [n for n in names if n not in numbers]
  if missing:
    raise ValueError(f"the evaluation has no number {missing[0]!r}, it has {', '.join(numbers)}.")
  return {n: float(x) for n, x in numbers.items()}, time.perf_counter() - begun


def score_alone(source: Source, name: str, reference: str) -> dict[str, Any]:
  """Returns the numbers of an unmerged model, from its file of results if it has one.

  A Hugging Face folder is evaluated in place. A checkpoint, or a model with an adapter, is first
  written as a folder, in the form that a merge has.
  """
  path = source.folder / "alone" / f"{name.replace('/', '_')}.json"
  result = read(path)
  evaluations = {"numbers": source.evaluate} | ({"final": source.final} if source.final else {})
  missing = {key: function for key, function in evaluations.items() if key not in result}
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
  """Yields a folder that can be evaluated: the model's, or a temporary copy."""
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
  """Merges the models with a method and these settings, and returns the seconds it took."""
  parameters = lookup.entry(method).parameters
  hparams = {n: v for n, v in settings.items() if parameters[n].number}
  static = {n: v for n, v in settings.items() if n not in hparams}
  merge_method = getattr(methods, method)(**static)
  seed = source.seed if "seed" in stage.hparams(merge_method) else None
  begun = time.perf_counter()
  merge.merge_files(
    merge_method,
    dict(source.models),
    out,
    base=source.base,
    hparams=hparams,
    seed=seed,
    download=source.download,
  )
  return time.perf_counter() - begun


class Failed(ValueError):
  """The method cannot be merged: other settings would fail the same way."""


@dataclasses.dataclass(eq=False)
class Trials:
  """The objective of a search over the settings of one method.

  Attributes:
    source: the models to merge.
    name: name of the method.
    keep_all: whether all merges stay on disk, or only the best.
    on_trial: called with each completed trial.
    history: the trials of this search in order, including those recorded by an earlier run.
  """

  source: Source
  name: str
  keep_all: bool = False
  on_trial: Callable[[Mapping[str, Any]], None] = lambda trial: None
  history: list[dict[str, Any]] = dataclasses.field(default_factory=list)

  def __post_init__(self) -> None:
    """Reads the trials that earlier runs recorded."""
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
      self.history.append(trial)
      self.on_trial(trial)
      if "merge_seconds" not in trial:
        raise Failed(trial["error"])
      if not self.keep_all:
        self.remove_all_but(self.best())
      yield self.gain(trial), None

  def model(self, candidate: Mapping[str, Any]) -> pathlib.Path:
    """Returns the folder of a merge; merges again if the folder was removed."""
    out = self.source.merge_folder(self.name, self._trial(candidate)["number"])
    if not out.exists():
      merge_trial(self.source, self.name, candidate, out)
    return out

  def gain(self, trial: Mapping[str, Any]) -> float:
    """Returns the score of a trial (higher is better); NaN if it failed."""
    if "numbers" not in trial:
      return float("nan")
    mean = self.source.mean(trial["numbers"])
    return -mean if self.source.lower_is_better else mean

  def best(self) -> Mapping[str, Any] | None:
    """Returns the trial with the highest score; of equal scores, the first."""
    scored = [t for t in self.history if "numbers" in t]
    return max(scored, key=self.gain, default=None)

  def remove_all_but(self, trial: Mapping[str, Any] | None) -> None:
    """Removes all merges of this method except that of a trial."""
    for out in (
      self.source.merge_folder(self.name, t["number"]) for t in self.recorded if t != trial
    ):
      shutil.rmtree(out, ignore_errors=True)

  def _trial(self, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the recorded trial with these settings, or records a new one."""
    for trial in self.recorded:
      if trial["settings"] == settings:
        return trial
    self.recorded.append({"number": len(self.recorded) + 1, "settings": dict(settings)})
    return self.recorded[-1]

  def _complete(self, trial: dict[str, Any]) -> None:
    """Runs the merge and the evaluation that a trial lacks, and records them."""
    out = self.source.merge_folder(self.name, trial["number"])
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
  """Returns name, size and modification time of all files of a model, to detect a change."""
  parts = inputs.split(reference)
  places = [
    hub.locate(*part, download=download).folder
    for part in ((parts.path, parts.revision), *parts.adapters)
  ]
  result = []
  for place in places:
    root, paths = _files(place)
    for path in paths:
      status = path.stat()
      result.append([str(path.relative_to(root)), status.st_size, status.st_mtime_ns])
  return result


def _files(place: pathlib.Path) -> tuple[pathlib.Path, Sequence[pathlib.Path]]:
  """Returns the folder of a model, or of the run of a `RUN@STEP`, and the model's files."""
  if place.exists():
    return place, sorted(p for p in place.rglob("*") if p.is_file())
  checkpoint = other_programs.open_checkpoint(place)
  if checkpoint is None:
    raise ValueError(f"{place}: neither a folder nor a model in the hub's cache.")
  return checkpoint.root.path, checkpoint.files
