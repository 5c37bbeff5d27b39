"""How models score on rows, as numbers of a record: means, chance, transfer, differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any  # Any: records are plain trees.

import numpy as np

from jaxmerge.atm import evaluate
from jaxmerge.report import comparing, words
from jaxmerge.tasks.task import Task

Scores = Mapping[str, np.ndarray]  # Of every task, one score a row.


def summary(
  tasks: Sequence[Task],
  split: str,
  scores: Mapping[str, Scores],
  experts: Mapping[str, Scores],
  facts: Mapping[str, Mapping[str, Any]],
  metric: evaluate.Metric = evaluate.ACCURACY,
) -> dict[str, Any]:
  """Returns the sections of a record that tell how good the models are.

  Args:
    tasks: with the split that was judged.
    split: "validation" or "test".
    scores: of every model and task, the score of each row.
    experts: the same of the expert of every task on all tasks.
    facts: more to say of some models.
    metric: what the scores are.
  """
  models = {}
  for name, own in scores.items():
    per_task = _means(own)
    models[name] = {"mean": float(np.mean(list(per_task.values()))), "per_task": per_task}
    models[name] |= facts.get(name, {})
  found = {
    "metric": metric.name,
    "lower_is_better": metric.lower_is_better,
    "tasks": [t.name for t in tasks],
    "families": {t.name: t.family or t.name for t in tasks},
    "models": models,
    "transfer": {name: _means(own) for name, own in experts.items()},
  }
  if metric.chance is not None:
    found["chance"] = {t.name: metric.chance(t.splits()[split].labels) for t in tasks}
  return found


def _means(scores: Scores) -> dict[str, float]:
  return {t: float(s.mean(dtype=np.float64)) for t, s in scores.items()}


def differences(record: Mapping[str, Any], scores: Mapping[str, Scores]) -> list[dict[str, Any]]:
  """Compares ATM with the best one-shot merge and with joint training, paired by row."""
  others = (words.best(record, "one-shot"), "multitask", "experts")
  pairs = [("atm", n) for n in others if n is not None and n in record["models"]]
  out = []
  for a, b in pairs:
    rows = [[scores[m][t] for t in record["tasks"]] for m in (a, b)]
    found = comparing.paired_difference(*rows, seeds=False)
    out.append({"a": a, "b": b, **found._asdict()})
  return out
