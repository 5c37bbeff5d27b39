"""Joins several finished runs into one record, and compares their models on the same rows.

Free of jax, like all that shows finished runs.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple  # Any: records are plain trees.

import numpy as np

from jaxmerge import report
from jaxmerge.experiments import workdir
from jaxmerge.report import comparisons, labels


class Run(NamedTuple):
  """A finished run.

  Attributes:
    name: short name, from its folder.
    record: the content of its `report.json`.
    rows: the score of each row by MODEL/TASK; empty if there is no `rows.npz`.
  """

  name: str
  record: Mapping[str, Any]
  rows: Mapping[str, np.ndarray]


def read(folders: Sequence[str]) -> list[Run]:
  """Reads finished runs, named by the shortest ends of their paths that are unique.

  Raises:
    ValueError: if a folder has no report or is repeated, or if tasks or metrics differ.
  """
  names = _short_names(folders)
  runs = []
  for name, folder in zip(names, map(pathlib.Path, folders), strict=True):
    runs.append(Run(name, workdir.read_record(folder), workdir.read_rows(folder)))
  first = runs[0]
  for run in runs[1:]:
    for key in ("tasks", "metric", "lower_is_better", "split"):
      mine, theirs = run.record.get(key), first.record.get(key)
      if mine != theirs:
        raise ValueError(
          f"runs to compare must have the same {key}: {run.name} has {mine!r}, {first.name} "
          f"{theirs!r}."
        )
  return runs


def _short_names(folders: Sequence[str]) -> list[str]:
  """Returns the shortest ends of the paths that are unique, with `_` for separators."""
  parts = [pathlib.Path(os.path.abspath(f)).parts for f in folders]
  for each, folder in zip(parts, folders, strict=True):
    if parts.count(each) > 1:
      raise ValueError(f"{folder} is listed twice; compare different runs.")
  ends = ([each[-n:] for each in parts] for n in range(1, 1 + max(map(len, parts))))
  shortest = next(short for short in ends if len(set(short)) == len(short))
  return ["_".join(each) for each in shortest]


def record(runs: Sequence[Run]) -> dict[str, Any]:
  """Returns a record of the models of several runs, with the curves of all in one plot.

  A model with equal scores in all runs, such as their base, appears once. Other names end with
  that of the run: `atm_RUN`.
  """
  first = runs[0].record
  models: dict[str, Any] = {}
  result: dict[str, Any] = {
    "title": f"Comparison of {', '.join(r.name for r in runs)}",
    "tasks": list(first["tasks"]),
    "models": models,
    "rounds": [],
    "curves": {},
    "budget": {},
    "config": _differing([r.record["config"] for r in runs], [r.name for r in runs]),
    "versions": first["versions"],
  }
  keys = ("families", "metric", "lower_is_better", "split", "rounds_split", "chance")
  result |= {key: first[key] for key in keys if key in first}
  validation: dict[str, float] = {}
  for run in runs:
    names = {n: _name(n, run.name, runs) for n in run.record["models"]}
    models |= {names[n]: m for n, m in run.record["models"].items()}
    for key, target in (("budget", result["budget"]), ("validation", validation)):
      target |= {names[n]: x for n, x in run.record.get(key, {}).items() if n in names}
    curves = {"atm": run.record["rounds"], **run.record.get("curves", {})}
    result["curves"] |= {names[n]: c for n, c in curves.items() if c and n in names}
  if all("validation" in run.record for run in runs):
    result["validation"] = validation
  result["gap_closed"] = report.gap_closed(models)
  result["differences"], result["notes"] = differences(runs)
  return result


def _name(model: str, run: str, runs: Sequence[Run]) -> str:
  """Returns the name of a run's model in the record of all."""
  entries = [r.record["models"].get(model) for r in runs]
  is_same = all(e == entries[0] for e in entries)
  if is_same and labels.kind(model) != "loop":
    return model
  head, _, rest = model.partition("_")
  if head in ("atm", "base", "experts", "multitask"):
    return "_".join([head, run, *([rest] if rest else [])])
  return f"{model}_{run}"


def differences(runs: Sequence[Run]) -> tuple[list[dict[str, Any]], list[str]]:
  """Returns how much each run's best model differs from the first run's, and notes.

  Differences have 95 % intervals, paired by row. Where the rows of two runs differ, a note says
  why there is no interval.
  """
  tasks, entries, notes = runs[0].record["tasks"], [], []
  best = {r.name: _best(r.record) for r in runs}
  for run in runs[1:]:
    pair = (run, runs[0])
    if reason := _unpaired(*pair):
      notes.append(f"{run.name} and {runs[0].name} have no interval of their difference: {reason}.")
      continue
    scores = [[r.rows[f"{best[r.name]}/{t}"] for t in tasks] for r in pair]
    a, b = (_name(best[r.name], r.name, runs) for r in pair)
    if a != b:
      difference = comparisons.paired_difference(*scores, seeds=False)
      entries.append({"a": a, "b": b, **difference._asdict()})
  return entries, notes


def _best(record: Mapping[str, Any]) -> str:
  """Returns the main model of a run: its best ATM run, else its best one-shot merge."""
  return (
    labels.best(record, "loop") or labels.best(record, "one-shot") or next(iter(record["models"]))
  )


def _unpaired(run: Run, other: Run) -> str:
  """Returns why the rows of two runs cannot be paired; empty if they can."""
  if not run.rows or not other.rows:
    return "one of them has no rows.npz"
  mine, theirs = (r.record.get("rows") for r in (run, other))
  if mine is None or theirs is None:
    # Older runs have no digests of rows. Equal scores of the base on each row imply equal rows.
    names = [f"base/{t}" for t in run.record["tasks"]]
    same = all(
      n in run.rows and n in other.rows and np.array_equal(run.rows[n], other.rows[n])
      for n in names
    )
    return "" if same else "nothing says that they were scored on the same rows"
  changed = [t for t in run.record["tasks"] if mine.get(t) != theirs.get(t)]
  return f"the rows of {changed[0]} differ" if changed else ""


def _differing(configs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
  """Returns the keys in which configs differ, each with its value in every run."""
  from jaxmerge.experiments import config

  flat = [config.flat(c) for c in configs]
  keys = sorted(set().union(*flat))
  differing = [k for k in keys if any(f.get(k) != flat[0].get(k) for f in flat)]
  return {k: {n: f.get(k) for n, f in zip(names, flat, strict=True)} for k in differing}
