"""A leaderboard of methods on model folders, whose settings are searched by an external score."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import shutil
import warnings
from collections.abc import Callable, Mapping
from typing import Any  # Any: records are plain trees.

from jaxmerge.catalog import lookup
from jaxmerge.evaluation import external
from jaxmerge.experiments import folder_trials, standings, workdir
from jaxmerge.experiments.events import Event, Events
from jaxmerge.experiments.folder_config import Bench, check
from jaxmerge.experiments.folder_trials import FAILURES, Source, Trials
from jaxmerge.files import inputs
from jaxmerge.io.disk import stamps
from jaxmerge.search import box, objective

Result = dict[str, Any]

EVERYTHING = ("",)  # The prefix of all keys.
_EXTENDS = ("methods", "trials", "keep", "changes.", "download")


def run(
  bench: Bench,
  folder: str | pathlib.Path,
  *,
  resume: str = "auto",
  progress: Callable[[Event], None] = lambda event: None,
) -> dict[str, Any]:
  """Merges models by every method with several settings, evaluates each, and ranks the methods.

  Writes `leaderboard.json`, `.md` and `.png`, a report (`report.json`, `report.html`, plots), and
  in `merges/` the merges that `keep` selects. A run resumes within the trial that was interrupted.
  Methods and trials can be added to a run.

  Args:
    bench: models, methods and evaluation.
    folder: folder of the run; created if needed.
    resume: see `run.run`.
    progress: see `run.run`.

  Returns:
    The record, which is also written to `report.json`.

  Raises:
    ValueError: if an unmerged model cannot be evaluated, if all methods fail, or if the folder
      belongs to another run.
  """
  bench, folder = check(bench), pathlib.Path(folder)
  commands = [external.command(text) for text in (bench.evaluate, bench.final) if text]
  models = dict(zip(inputs.short_names(bench.models), bench.models, strict=True))
  source = Source(
    folder,
    bench.base,
    models,
    commands[0],
    commands[1] if bench.final else None,
    tuple(bench.numbers),
    bench.lower_is_better,
    bench.seed,
    bench.download,
  )
  plain = _plain(bench, models)
  free = _free(folder)
  if free != EVERYTHING:
    _refuse_changed(folder, plain)
  with workdir.hold(folder, plain, resume, free=free):
    if _free(folder) == EVERYTHING:
      _clear(folder)
    workdir.claim(folder, plain)
    events = Events(progress)
    alone = _score_alone(source, events)
    if not bench.numbers and free != _EXTENDS:  # A run with scores goes on.
      _check_scale(alone["base"]["numbers"], events)
    source = dataclasses.replace(source, numbers=source.numbers or (*alone["base"]["numbers"],))
    results: dict[str, Result] = {}
    for name in bench.methods:
      results[name] = _search(source, bench, name, events)
      _remove_merges(source, bench.keep, results)
    if not any("numbers" in result for result in results.values()):
      name, result = next(iter(results.items()))
      raise ValueError(f"no method could be merged and scored; {name}: {result['error']}")
    record = standings.of_folders(source, plain, alone, results)
    standings.write(record, folder)
    return record


def _free(folder: pathlib.Path) -> tuple[str, ...]:
  """Returns prefixes of config keys that may differ from those of the run in a folder."""
  alone = [folder_trials.read(path) for path in (folder / "alone").glob("*.json")]
  searches = [folder_trials.read(path) for path in (folder / "trials").glob("*.json")]
  if any("numbers" in trial for search in searches for trial in search.get("trials", [])):
    return _EXTENDS
  return (*_EXTENDS, "numbers") if any("numbers" in result for result in alone) else EVERYTHING


def _clear(folder: pathlib.Path) -> None:
  """Removes what a run without any score left in a folder: its settings may have been others."""
  for name in ("alone", "trials", "methods", "merges"):
    shutil.rmtree(folder / name, ignore_errors=True)


def _check_scale(numbers: Mapping[str, float], events: Events) -> None:
  """Says which numbers the score averages; raises ValueError for fractions beside large numbers."""
  if len(numbers) == 1:
    return
  sizes = {n: abs(x) for n, x in numbers.items()}
  small, large = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
  if sizes[small] <= 1 and sizes[large] > 100:
    raise ValueError(
      f"the evaluation prints {small} {numbers[small]:g} and {large} {numbers[large]:g}, whose "
      f"mean is no score: choose numbers by --score, such as --score {small}."
    )
  events.say(f"the score is the mean of {', '.join(numbers)}; --score chooses among them")


def _plain(bench: Bench, models: Mapping[str, str]) -> dict[str, Any]:
  """Returns the config of a run, with a digest of each model's files."""
  plain = bench._asdict()
  plain["changes"] = {m: {n: a._asdict() for n, a in c.items()} for m, c in bench.changes.items()}
  plain = json.loads(json.dumps(plain)) | {"models": dict(models)}
  digests = {}
  for name, reference in {"base": bench.base, **models}.items():
    text = json.dumps(folder_trials.files_of(reference, download=bench.download))
    digests[name] = hashlib.sha256(text.encode()).hexdigest()[:16]
  return plain | {"files": digests}


def _refuse_changed(folder: pathlib.Path, plain: Mapping[str, Any]) -> None:
  """Raises ValueError if a model has changed since the run began."""
  if not (folder / "config.json").is_file():
    return
  there = workdir.read_config(folder)
  for name, digest in there.get("files", {}).items():
    if there.get("models") == plain["models"] and plain["files"].get(name) != digest:
      raise ValueError(
        f"{name} has changed since the run in {folder} began: the recorded scores are those of "
        "other weights. Choose another workdir."
      )


def _score_alone(source: Source, events: Events) -> dict[str, Result]:
  """Evaluates base and models unmerged; a failure here is one of the command and ends the run."""
  listed = {"base": source.base, **{f"experts_{n}": m for n, m in source.models.items()}}
  show = events.bar("models alone", len(listed), "model")
  results: dict[str, Result] = {}
  for name, reference in listed.items():
    if "base" in results and not source.numbers:
      source = dataclasses.replace(source, numbers=(*results["base"]["numbers"],))
    try:
      results[name] = folder_trials.score_alone(source, name, reference)
    except ValueError as error:
      raise ValueError(f"{reference} could not be evaluated: {error}") from error
    show(len(results), len(listed), score=source.mean(results[name]["numbers"]))
  return results


def _search(source: Source, bench: Bench, name: str, events: Events) -> Result:
  """Returns the result of a method: its best trial, or the reason of its failure."""
  path = source.folder / "methods" / f"{name}.json"
  axes = box.axes(name, bench.changes.get(name))
  tried = {"trials": bench.trials, "box": {n: list(a) for n, a in axes.items()}}
  tried = json.loads(json.dumps(tried))
  result = folder_trials.read(path)
  if result.get("tried") == tried:
    return result
  show = events.bar(name, bench.trials, "trial")

  def on_trial(trial: Mapping[str, Any]) -> None:
    if "error" in trial:
      events.say(f"{name}, trial {trial['number']}: {trial['error']}")
    show(len(trials.history), bench.trials, score=_mean(source, trial))

  trials = Trials(source, name, bench.keep == "all", on_trial)
  parameters = lookup.entry(name).parameters
  strategy = box.search(axes, bench.trials, {n: parameters[n].default for n in axes})
  try:
    with warnings.catch_warnings():
      # Reported by on_trial.
      warnings.filterwarnings("ignore", message=".*have NaN as their score")
      best = objective.run(trials, strategy)
    result = _best(source, trials, best.params)
  except stamps.Changed:
    raise
  except FAILURES as error:
    reason = next((t["error"] for t in trials.history if "error" in t), str(error))
    events.say(f"{name} failed, {reason}")
    return {"error": reason, "trials": len(trials.history)}  # The next run tries it again.
  folder_trials.write(path, {"tried": tried, **result})
  return {"tried": tried, **result}


def _mean(source: Source, trial: Mapping[str, Any]) -> float | None:
  numbers = trial.get("numbers")
  return None if numbers is None else source.mean(numbers)


def _best(source: Source, trials: Trials, merge_folder: pathlib.Path) -> Result:
  """Returns the record of a method's best trial, with its final numbers if `final` is set."""
  best = trials.best()
  assert best is not None
  result = {**best, "trials": len(trials.history)}
  for key in ("merge_seconds", "evaluate_seconds"):
    result[key] = sum(t.get(key, 0.0) for t in trials.history)
  if source.final is not None:
    result["final"], _ = folder_trials.evaluate(source.final, merge_folder, source.numbers)
  return result


def _remove_merges(source: Source, keep: str, results: Mapping[str, Result]) -> None:
  """Removes the merges that `keep` does not select; merges the best again if it is missing."""
  scored = {n: source.mean(r["numbers"]) for n, r in results.items() if "numbers" in r}
  best_folder = pathlib.Path()
  if keep == "best" and scored:
    choose = min if source.lower_is_better else max
    name = choose(scored, key=lambda n: scored[n])
    best = results[name]
    best_folder = source.merge_folder(name, best["number"])
    if not best_folder.exists():
      folder_trials.merge_trial(source, name, best["settings"], best_folder)
  if keep != "all":
    for path in (source.folder / "merges").glob("*"):  # Also hidden folders of interrupted merges.
      if path.is_dir() and path != best_folder:
        shutil.rmtree(path, ignore_errors=True)
