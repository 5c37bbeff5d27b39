"""How models score on rows, as numbers of a record: means, chance, transfer, differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any  # Any: records are plain trees.

import jax
import numpy as np

from jaxmerge.evaluation import metrics, scoring
from jaxmerge.report import comparisons, labels
from jaxmerge.tasks.task import Task

Scores = Mapping[str, np.ndarray]  # Of every task, one score a row.


def unstacked(experts: Any, number: int) -> dict[str, Any]:
  """Returns the experts of a stack [T, *s] one by one, as `by_row` expects them to be called."""
  return {f"expert_{k}": jax.tree.map(lambda x, k=k: x[k], experts) for k in range(number)}


def like(names: Sequence[str], tasks: Sequence[Task], split: str) -> dict[str, Any]:
  """Returns the shapes of scores [T, N] by model, of the rows of a split."""
  rows = max(len(t.splits()[split].labels) for t in tasks)
  return {n: jax.ShapeDtypeStruct((len(tasks), rows), np.float32) for n in names}


def by_row(
  found: Mapping[str, np.ndarray],
  names: Sequence[str],
  tasks: Sequence[Task],
  split: str,
  metric: metrics.Metric,
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, dict[str, np.ndarray]]]:
  """Returns what models, and experts, score on the rows of every task.

  Args:
    found: scores [T, N] by model, of the experts as `unstacked` calls them.
    names: of the models, in their order.
    tasks: the tasks.
    split: whose rows they are.
    metric: what they are scores of.

  Raises:
    ValueError: naming model, task and row, for a score that is no finite number.
  """
  scores = {}
  own = [t.name for t in tasks]
  for name in names:
    parts = scoring.per_row(found[name], [len(t.splits()[split].labels) for t in tasks])
    scoring.refuse_unscored(own, parts, f"{name}, {split}")
    scores[name] = dict(zip(own, map(metric.kept, parts), strict=True))
  experts = {n: scores.pop(f"expert_{k}") for k, n in enumerate(own)}
  scores["experts"] = {n: experts[n][n] for n in own}
  return scores, experts


def summary(
  tasks: Sequence[Task],
  split: str,
  scores: Mapping[str, Scores],
  experts: Mapping[str, Scores],
  facts: Mapping[str, Mapping[str, Any]],
  metric: metrics.Metric = metrics.ACCURACY,
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
  others = (labels.best(record, "one-shot"), "multitask", "experts")
  pairs = [("atm", n) for n in others if n is not None and n in record["models"]]
  out = []
  for a, b in pairs:
    rows = [[scores[m][t] for t in record["tasks"]] for m in (a, b)]
    found = comparisons.paired_difference(*rows, seeds=False)
    out.append({"a": a, "b": b, **found._asdict()})
  return out
