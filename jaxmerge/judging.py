"""What models have got right, as numbers of a record: means, chance, transfer, differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any  # Any: records are plain trees.

import numpy as np

from jaxmerge import catalog
from jaxmerge.report import comparing
from jaxmerge.tasks.task import Task

Correct = Mapping[str, np.ndarray]  # Of every task, one boolean a row.


def summary(
  tasks: Sequence[Task],
  split: str,
  correct: Mapping[str, Correct],
  experts: Mapping[str, Correct],
  facts: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
  """Returns the sections of a record that tell how good the models are.

  Args:
    tasks: with the split that was judged.
    split: "validation" or "test".
    correct: of every model and task, which rows are right.
    experts: the same of the expert of every task on all tasks.
    facts: more to say of some models.
  """
  models = {}
  for name, own in correct.items():
    per_task = _shares(own)
    models[name] = {"mean": float(np.mean(list(per_task.values()))), "per_task": per_task}
    models[name] |= facts.get(name, {})
  return {
    "tasks": [t.name for t in tasks],
    "families": {t.name: t.family or t.name for t in tasks},
    "models": models,
    "chance": {t.name: chance(t, split) for t in tasks},
    "transfer": {name: _shares(own) for name, own in experts.items()},
  }


def _shares(correct: Correct) -> dict[str, float]:
  return {t: float(c.mean(dtype=np.float64)) for t, c in correct.items()}


def chance(task: Task, split: str) -> float:
  """Share of the most frequent class: what guessing it always would score."""
  labels = task.splits()[split].labels
  return float(np.bincount(labels).max() / len(labels))


def differences(record: Mapping[str, Any], correct: Mapping[str, Correct]) -> list[dict[str, Any]]:
  """Compares ATM with the best one-shot merge and with joint training, paired by row."""
  shots = [n for n in record["models"] if n in catalog.METHODS]
  chosen_by = record.get("validation") or {n: m["mean"] for n, m in record["models"].items()}
  best = max(shots, key=lambda n: chosen_by[n])
  pairs = [("atm", best)] + [("atm", n) for n in ("multitask", "experts") if n in record["models"]]
  out = []
  for a, b in pairs:
    rows = [[correct[m][t] for t in record["tasks"]] for m in (a, b)]
    found = comparing.paired_difference(*rows, seeds=False)
    out.append({"a": a, "b": b, **found._asdict()})
  return out
