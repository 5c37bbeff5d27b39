"""Summarises the scores of rows in a record: means, chance, transfer, differences."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any  # Any: records are plain trees.

import jax
import numpy as np

from jaxmerge.evaluation import metrics, scoring
from jaxmerge.report import comparisons, labels
from jaxmerge.tasks.task import Split, Task

Scores = Mapping[str, np.ndarray]  # One score per row, by task.


def split_experts(experts: Any, num_tasks: int) -> dict[str, Any]:
  """Returns the experts of a stack [T, *s] one by one, under the names that `by_row` expects."""
  return {f"expert_{k}": jax.tree.map(lambda x, k=k: x[k], experts) for k in range(num_tasks)}


def shapes(names: Sequence[str], tasks: Sequence[Task], split: str) -> dict[str, Any]:
  """Returns the shapes of the scores [T, N] of each model on the rows of a split."""
  rows = max(len(t.splits()[split].labels) for t in tasks)
  return {n: jax.ShapeDtypeStruct((len(tasks), rows), np.float32) for n in names}


def by_row(
  padded: Mapping[str, np.ndarray],
  names: Sequence[str],
  tasks: Sequence[Task],
  split: str,
  metric: metrics.Metric,
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, dict[str, np.ndarray]]]:
  """Returns the scores of models, and of experts, by model and task.

  Args:
    padded: scores [T, N] by model; experts under the names of `split_experts`.
    names: names of the models, in order.
    tasks: the tasks.
    split: "validation" or "test".
    metric: the metric of the scores.

  Raises:
    ValueError: naming model, task and row, if a score is not finite.
  """
  scores = {}
  task_names = [t.name for t in tasks]
  for name in names:
    by_task = scoring.per_row(padded[name], [len(t.splits()[split].labels) for t in tasks])
    scoring.refuse_unscored(task_names, by_task, f"{name}, {split}")
    scores[name] = dict(zip(task_names, map(metric.to_stored, by_task), strict=True))
  pairs = [(n, f"expert_{k}") for k, n in enumerate(task_names)]
  experts = {n: scores.pop(expert) for n, expert in pairs if expert in scores}
  if experts:
    scores["experts"] = {n: experts[n][n] for n in task_names}
  return scores, experts


def summary(
  tasks: Sequence[Task],
  split: str,
  scores: Mapping[str, Scores],
  experts: Mapping[str, Scores],
  facts: Mapping[str, Mapping[str, Any]],
  metric: metrics.Metric = metrics.ACCURACY,
) -> dict[str, Any]:
  """Returns the sections of a record with the scores of the models.

  Args:
    tasks: the tasks, with the split that was scored.
    split: "validation" or "test".
    scores: the score of each row, by model and task.
    experts: the scores of every task's expert on all tasks.
    facts: further fields of some models.
    metric: the metric of the scores.
  """
  models = {}
  for name, by_task in scores.items():
    per_task = _means(by_task)
    models[name] = {"mean": float(np.mean(list(per_task.values()))), "per_task": per_task}
    models[name] |= facts.get(name, {})
  record = {
    "metric": metric.name,
    "lower_is_better": metric.lower_is_better,
    "tasks": [t.name for t in tasks],
    "families": {t.name: t.family or t.name for t in tasks},
    "models": models,
    "transfer": {name: _means(by_task) for name, by_task in experts.items()},
  }
  record["rows"] = {t.name: digest(t.splits()[split]) for t in tasks}
  if metric.chance is not None:
    record["chance"] = {t.name: metric.chance(t.splits()[split].labels) for t in tasks}
  return record


def digest(split: Split) -> str:
  """Returns a digest of the rows of a split, which is equal for equal rows."""
  code = hashlib.sha256()
  for leaf in jax.tree.leaves((split.inputs, split.labels)):
    array = np.asarray(leaf)
    code.update(f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
  return code.hexdigest()[:16]


def _means(scores: Scores) -> dict[str, float]:
  return {t: float(s.mean(dtype=np.float64)) for t, s in scores.items()}


def differences(record: Mapping[str, Any], scores: Mapping[str, Scores]) -> list[dict[str, Any]]:
  """Compares ATM with the best one-shot merge and with joint training, paired by row."""
  others = (labels.best(record, "one-shot"), "multitask", "experts")
  pairs = [("atm", n) for n in others if n is not None and n in record["models"]]
  out = []
  for a, b in pairs:
    rows = [[scores[m][t] for t in record["tasks"]] for m in (a, b)]
    difference = comparisons.paired_difference(*rows, seeds=False)
    out.append({"a": a, "b": b, **difference._asdict()})
  return out
