"""The arithmetic of comparisons: gaps closed, means over families, paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple  # Any: a record is JSON, its values have no one type.

import numpy as np


class Difference(NamedTuple):
  """A difference of two models: the mean, and the ends of its 95 % interval."""

  mean: float
  low: float
  high: float


def gap_closed(models: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
  """Returns (mean - base) / (experts - base) of every model.

  Empty where base or experts are missing, or have the same mean: then there is no gap.

  >>> gap_closed({"base": {"mean": 0.5}, "experts": {"mean": 1.0}, "atm": {"mean": 0.75}})["atm"]
  0.5
  """
  base = models.get("base", {}).get("mean")
  experts = models.get("experts", {}).get("mean")
  if base is None or experts is None or base == experts:
    return {}
  return {
    name: (model["mean"] - base) / (experts - base)
    for name, model in models.items()
    if model.get("mean") is not None
  }


def task_gaps(
  models: Mapping[str, Mapping[str, Any]],
  tasks: Sequence[str],
  *,
  lead: float = 0.05,
  lower_is_better: bool = False,
) -> dict[str, dict[str, float]]:
  """Returns the share of each task's gap that each model closes.

  Only tasks where the experts lead the base by more than `lead` count: a small gap amplifies noise.

  >>> models = {"base": {"per_task": {"a": 0.5}}, "experts": {"per_task": {"a": 0.9}}}
  >>> task_gaps(models, ["a"])
  {'base': {'a': 0.0}, 'experts': {'a': 1.0}}
  """
  if "base" not in models or "experts" not in models:
    return {}
  low, high = models["base"]["per_task"], models["experts"]["per_task"]
  sign = -1 if lower_is_better else 1
  led = [t for t in tasks if None not in (low[t], high[t]) and sign * (high[t] - low[t]) > lead]
  return {
    name: {
      t: (model["per_task"][t] - low[t]) / (high[t] - low[t])
      for t in led
      if model["per_task"][t] is not None
    }
    for name, model in models.items()
  }


def family_mean(per_task: Mapping[str, float | None], families: Mapping[str, str]) -> float | None:
  """Returns the mean over families of the mean over a family's tasks.

  >>> family_mean({"a": 0.0, "b": 0.5, "c": 0.75}, {"a": "x", "b": "x", "c": "c"})
  0.5
  """
  if None in per_task.values():
    return None
  members: dict[str, list[Any]] = {}
  for task, family in families.items():
    members.setdefault(family, []).append(per_task[task])
  return float(np.mean([np.mean(scores) for scores in members.values()]))


def paired_difference(
  scores_a: Sequence[Any],
  scores_b: Sequence[Any],
  *,
  seeds: bool = True,
  samples: int = 2000,
  seed: int = 0,
) -> Difference:
  """Returns the score of a minus that of b, mean over tasks, with a 95 % bootstrap interval.

  Rows are drawn with replacement, the same rows for both models and for every seed, so that shared
  noise cancels. The interval also holds where seeds have different rows: the variance of a mean
  over rows of means over seeds is the same.

  Args:
    scores_a: one array per task, [rows] or [seeds, rows]: booleans (correct or not), or scores.
    scores_b: the same rows, scored by the other model.
    seeds: whether seeds are resampled too, the same for every task.
    samples: number of bootstrap samples.
    seed: of the bootstrap.

  >>> paired_difference([[True, True]], [[False, False]])
  Difference(mean=1.0, low=1.0, high=1.0)
  """
  differences = _differences(scores_a, scores_b)
  if samples < 1:
    raise ValueError(f"samples must be at least 1, got {samples}.")
  random = np.random.default_rng(seed)
  num_seeds = differences[0].shape[0]
  drawn = np.tile(np.arange(num_seeds), (samples, 1))
  if seeds:
    drawn = random.integers(0, num_seeds, (samples, num_seeds))
  means = []
  for x in differences:
    rows = random.integers(0, x.shape[1], (samples, x.shape[1]))
    of_seed = np.stack([values[rows].mean(axis=1) for values in x])  # [seeds, samples]
    means.append(of_seed[drawn.T, np.arange(samples)].mean(axis=0))
  low, high = np.percentile(np.mean(means, axis=0), [2.5, 97.5])
  return Difference(float(np.mean([x.mean() for x in differences])), float(low), float(high))


def _differences(scores_a: Sequence[Any], scores_b: Sequence[Any]) -> list[np.ndarray]:
  """Checks the arrays and returns a minus b, [seeds, rows], of every task."""
  if len(scores_a) != len(scores_b) or not len(scores_a):
    raise ValueError(
      f"scores_a has {len(scores_a)} tasks and scores_b {len(scores_b)}; "
      "both need the same tasks, one at least."
    )
  result = []
  for i, (a, b) in enumerate(zip(scores_a, scores_b, strict=True)):
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype != b.dtype or a.dtype.kind not in "bf":
      raise ValueError(f"task {i}: must be booleans or floats, got {a.dtype}, {b.dtype}.")
    if a.shape != b.shape or a.ndim not in (1, 2) or not a.size:
      raise ValueError(f"task {i}: a is {a.shape} and b is {b.shape}; both must be the same rows.")
    wide = np.int8 if a.dtype == bool else np.float64
    result.append(np.atleast_2d(a.astype(wide) - b.astype(wide)))
    if result[i].shape[0] != result[0].shape[0]:
      raise ValueError(f"task {i}: {result[i].shape[0]} seeds, task 0: {result[0].shape[0]}.")
  return result
