"""The record of a comparison of methods, and its leaderboard files."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any  # Any: records are plain trees.

from jaxmerge import report
from jaxmerge.experiments import workdir
from jaxmerge.experiments.folder_trials import Source
from jaxmerge.io.disk import atomic
from jaxmerge.report import leaderboard

Result = Mapping[str, Any]


def of_folders(
  source: Source,
  config: Mapping[str, Any],
  alone: Mapping[str, Result],
  results: Mapping[str, Result],
) -> dict[str, Any]:
  """Returns the record of a bench on model folders.

  Args:
    source: the models.
    config: config of the run.
    alone: numbers of the unmerged base and models, by their names in the record.
    results: results of the methods.
  """
  merges = {n: r for n, r in results.items() if "numbers" in r}
  rows = {**alone, **merges}
  failed = {n: r["error"] for n, r in results.items() if "error" in r}
  split = "final" if source.final is not None else "numbers"
  tasks = list(source.numbers or rows["base"][split])
  models = {n: _model({t: r[split][t] for t in tasks}) for n, r in rows.items()}
  best = min if source.lower_is_better else max
  experts = [m["per_task"] for n, m in models.items() if n.startswith("experts_")]
  models["experts"] = _model({t: best(e[t] for e in experts) for t in tasks})
  keys = ("settings", "trials", "merge_seconds", "evaluate_seconds")
  record = {
    "title": f"Merges of {', '.join(source.models)}",
    "tasks": tasks,
    "models": models,
    "rounds": [],
    "budget": {n: {k: r[k] for k in keys[1:]} for n, r in merges.items()},
    "metric": tasks[0] if len(tasks) == 1 else "score",
    "lower_is_better": source.lower_is_better,
    "split": "test" if source.final is not None else "validation",
    "seed": source.seed,
    "gap_closed": report.gap_closed(models),
    "methods": {
      n: {k: r[k] for k in keys} | {"validation": source.mean(r["numbers"])}
      for n, r in merges.items()
    },
    "failed": failed,
    "config": dict(config),
    "versions": workdir.versions(),
    "notes": [*_remarks(source, merges), *failures(failed)],
  }
  if source.final is not None:
    record["validation"] = {n: source.mean(r["numbers"]) for n, r in rows.items()}
  return record


def _model(per_task: dict[str, float]) -> dict[str, Any]:
  return {"mean": sum(per_task.values()) / len(per_task), "per_task": per_task}


def failures(failed: Mapping[str, str]) -> list[str]:
  """Returns a note for each method that failed."""
  return [f"{name} failed: {reason}" for name, reason in failed.items()]


def _remarks(source: Source, merges: Mapping[str, Result]) -> list[str]:
  """Returns notes on the experts, and on scores that also selected the settings."""
  lines = ["Experts: the best unmerged model for each number; each model also has a row."]
  if source.final is None and any(r["trials"] > 1 for r in merges.values()):
    lines.append("Settings were selected by the scores shown here, which are therefore optimistic.")
  return lines


def write(record: Mapping[str, Any], folder: pathlib.Path) -> None:
  """Writes the report and the leaderboard of a record into a folder."""
  facts = leaderboard.from_records([record])
  report.write(record, folder)
  with atomic.write(folder / "leaderboard.md") as file:
    file.write(leaderboard.markdown(facts).encode())
  leaderboard.write(facts, folder / "leaderboard.png")
  with atomic.write(folder / "leaderboard.json") as file:
    file.write((json.dumps(facts, indent=1) + "\n").encode())
