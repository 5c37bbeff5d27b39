"""The reference models of an ATM run: the base, experts, and one-shot merges of the experts."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple  # Any: parameters are the user's tree.

import jax
import numpy as np
from jax.sharding import Mesh

from jaxmerge import errors, methods
from jaxmerge.catalog import lookup
from jaxmerge.core import stage
from jaxmerge.drivers import memory
from jaxmerge.evaluation import compare, metrics, scoring
from jaxmerge.report import comparisons
from jaxmerge.tasks.task import Task
from jaxmerge.training import finetune, placement, settings
from jaxmerge.training.build import Spec

EXPERTS = "experts"


class References(NamedTuple):
  """The models that an ATM run is compared with.

  Attributes:
    base: the initial model of the run.
    experts: a stack [T, *s], tuned for the whole budget without merging; None: not requested.
    merges: one-shot merges of the experts, by method.
    budget: the cost of each, by name.
  """

  base: Any
  experts: Any
  merges: dict[str, Any]
  budget: dict[str, dict[str, Any]]


def check(baselines: Sequence[str], tasks: Sequence[Task], *, test: bool) -> tuple[str, ...]:
  """Returns the names of the requested references; raises ValueError for an unavailable one.

  >>> check(["experts", "experts"], [], test=False)
  ('experts',)
  """
  if isinstance(baselines, str):
    raise ValueError(
      f"baselines must be a list of names, got {baselines!r}: write [{baselines!r}]."
    )
  for name in baselines:
    if isinstance(name, stage.Method):
      called = name.name if name.name in lookup.METHODS else "ties"
      raise ValueError(
        f"baselines are names of methods, which merge with their defaults, got a method: give "
        f"{called!r}, or compare it by jaxmerge.compare(..., methods={{{called!r}: method}})."
      )
    if name == EXPERTS:
      continue
    if name not in lookup.METHODS:
      near = errors.nearest(str(name), [EXPERTS, *lookup.METHODS])
      raise ValueError(f"baselines: {name!r} is neither {EXPERTS!r} nor a method{near}.")
    low, high = lookup.METHODS[name].models
    if len(tasks) < low or (high is not None and len(tasks) > high):
      raise ValueError(f"baselines: {name} does not merge {len(tasks)} models.")
  if test and (lacking := [t.name for t in tasks if t.test is None]):
    raise ValueError(f"test=True scores test rows, and task {lacking[0]!r} has none.")
  return tuple(dict.fromkeys(baselines))


def train(spec: Spec, base: Any, metric: metrics.Metric, names: Sequence[str]) -> References:
  """Tunes experts, if any of the names needs them, and merges them by each method's defaults."""
  if not names:
    return References(base, None, {}, {})
  experts, cost = finetune.experts(
    spec.apply,
    base,
    spec.tasks,
    spec.settings,
    loss=spec.loss,
    metric=metric,
    mesh=spec.mesh,
    sharding=spec.rules,
  )
  merges, budget = {}, {EXPERTS: cost._asdict()}
  for name in names:
    if name == EXPERTS:
      continue
    method = getattr(methods, name)()
    merges[name] = memory.merge(
      method,
      experts,
      base,
      seed=spec.settings.seed if "seed" in stage.hparams(method) else None,
      names=[t.name for t in spec.tasks],
      layout=spec.layout,
    )
    budget[name] = cost._replace(exchanges=1)._asdict()
  return References(base, experts, merges, budget)


def score_models(
  score: scoring.Scorer,
  mesh: Mesh,
  models: Mapping[str, Any],
  experts: Any,
  tasks: Sequence[Task],
  split: str,
  metric: metrics.Metric,
) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
  """Scores models, and a stack of experts if there is one, on all rows of a split.

  Returns:
    The sections of a record with the scores, and the scores of rows by model and task.
  """
  rows = placement.rows(tasks, split, mesh)
  single = dict(models)
  if experts is not None:
    single |= compare.split_experts(experts, len(tasks))
  padded = {
    n: np.asarray(score(jax.tree.map(lambda x: x[None], p), rows)[0]) for n, p in single.items()
  }
  scores, by_expert = compare.by_row(padded, list(padded), tasks, split, metric)
  return compare.summary(tasks, split, scores, by_expert, {}, metric), scores


def record(
  spec: Spec,
  rounds: Sequence[Mapping[str, Any]],
  summaries: Mapping[str, Mapping[str, Any]],
  budget: Mapping[str, Mapping[str, Any]],
  base: Any,
  metric: metrics.Metric,
) -> dict[str, Any]:
  """Returns a run of the loop as `jaxmerge.report` draws it.

  Args:
    spec: of the loop.
    rounds: its records.
    summaries: of the scored splits, by split; without any, the last round is the result.
    budget: counters by model.
    base: the model that the loop started from.
    metric: of the scores.
  """
  split = "test" if "test" in summaries else "validation"
  final = rounds[-1]
  if spec.settings.early_stopping:
    final = max((r for r in rounds if r["mean"] is not None), key=lambda r: metric.gain(r["mean"]))
  result = {
    "title": f"Tuning and merging {len(spec.tasks)} tasks",
    "tasks": [t.name for t in spec.tasks],
    "metric": metric.name,
    "lower_is_better": metric.lower_is_better,
    "models": {"atm": {key: final[key] for key in ("mean", "per_task")}},
    **summaries.get(split, {}),
    "seed": spec.settings.seed,
    "split": split,
    "rounds_split": "validation",
    "rounds": [dict(r) for r in rounds],
    "budget": {n: dict(b) for n, b in budget.items()},
    "parameters": sum(int(np.prod(x.shape)) for x in jax.tree.leaves(base)),
    "config": _config(spec),
    "versions": {n: importlib.metadata.version(n) for n in ("jaxmerge", "jax")},
  }
  result["gap_closed"] = comparisons.gap_closed(result["models"])
  if "validation" in summaries and split == "test":
    models = summaries["validation"]["models"]
    result["validation"] = {n: m["mean"] for n, m in models.items()}
  return result


def _config(spec: Spec) -> dict[str, Any]:
  """Returns the settings of a run as plain values."""
  fields = {f.name: getattr(spec.settings, f.name) for f in dataclasses.fields(spec.settings)}
  plain = {
    n: "an optax transformation" if settings.is_transformation(v) else v for n, v in fields.items()
  }
  method = {"name": spec.method.name or "a method of one's own"}
  return plain | {"method": method | {n: str(v) for n, v in spec.method.settings}}
