"""`compare`: merges of experts in memory by many methods, searched on validation, scored once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple  # Any: parameters are the user's tree.

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxmerge import methods as methods_
from jaxmerge.catalog import lookup
from jaxmerge.core import layouts, stage
from jaxmerge.core.stage import Method
from jaxmerge.drivers import arguments
from jaxmerge.evaluation import metrics, scoring
from jaxmerge.experiments import standings, workdir
from jaxmerge.experiments.setup import place_rows, replicate
from jaxmerge.parallel import mesh as meshes
from jaxmerge.report import comparisons, labels
from jaxmerge.search import box, grid, objective, scales
from jaxmerge.tasks import batch, losses
from jaxmerge.tasks.task import Task
from jaxmerge.training import references, settings

METHODS = ("average", "task_arithmetic", "ties")
Methods = Sequence[str] | Mapping[str, Mapping[str, Any] | Method]


class Searched(NamedTuple):
  """The best merge of a method: its weights, and what the record says of it."""

  params: Any
  facts: dict[str, Any]


def compare(
  apply: batch.Apply | Any,
  base: Any,
  experts: Any,
  tasks: Sequence[Task] | Any,
  methods: Methods | Any = METHODS,
  *,
  trials: int = 8,
  split: str | None = None,
  models: Mapping[str, Any] | Any = None,
  metric: metrics.Metric | losses.Rowwise = metrics.ACCURACY,
  layout: layouts.Layout | None = (),
  mesh: Mesh | None = None,
  seed: int = 0,
) -> dict[str, Any]:
  """Merges experts by many methods, chooses settings on validation rows, and scores all once.

  Args:
    apply: the model, as for `jaxmerge.tune_and_merge`.
    base: the weights that the experts were tuned from.
    experts: one a task: a list of trees or a stack [T, *s] in their order, or a dict by task name.
    tasks: the tasks, whose validation rows choose.
    methods: names, of which usual ranges are searched; or, by name, settings of which a list or
      tuple holds values to try, as in a config of `jaxmerge bench`, or a method itself.
    trials: settings that are tried of each method that is only named, at most.
    split: of the scores that are reported, "validation" or "test"; None: test if all tasks have it.
    models: more models to score, by names that are new: trees, or results of
      `jaxmerge.tune_and_merge`.
    metric: (outputs, labels) -> [B]; of a function more is better.
    layout: matrix views, as for `jaxmerge.merge`.
    mesh: devices; by default all, along the task axis.
    seed: of random masks.

  Returns:
    The record, which `jaxmerge.report(record, folder)` draws. A method that fails is not among its
    models; `failed` says why.

  Raises:
    ValueError: for methods that there are not, or tasks, experts and base that do not fit.
  """
  tasks = arguments.tasks(apply, tasks, settings.Settings())
  if experts is None:
    raise ValueError(
      "there are no experts: tune_and_merge(..., baselines=['experts']) returns them, as "
      "result.experts."
    )
  metric = metrics.metric_of(metric)
  listed = _listed(methods, trials)
  if models is not None and not isinstance(models, Mapping):
    raise ValueError("models must be a dict of models by name, such as {'atm': result}.")
  _refuse_taken(listed, models or {}, len(tasks))
  split = _split(split, tasks)
  base, stack = _base_and_experts(base, experts, tasks)
  mesh = mesh or meshes.make(tasks=len(tasks))
  score = scoring.scorer(apply, metric.rowwise, mesh=mesh)
  goal = scales.Validation(
    replicate(mesh, base),
    stack,
    score,
    place_rows(mesh, tasks, "validation"),
    counts=[len(t.validation.labels) for t in tasks],
    names=[t.name for t in tasks],
    layout=layout,
    metric=metric,
  )
  merges, failed = _search_all(goal, listed, seed)
  others = {n: getattr(m, "params", m) for n, m in (models or {}).items()}
  singles = {"base": base, **{n: m.params for n, m in merges.items()}, **others}
  record, rows = references.score_models(score, mesh, singles, stack, tasks, split, metric)
  if split == "test":
    validation, _ = references.score_models(
      score, mesh, singles, stack, tasks, "validation", metric
    )
    record["validation"] = {n: m["mean"] for n, m in validation["models"].items()}
  record |= {"split": split, "seed": seed, **_facts(merges, failed, models or {})}
  record["parameters"] = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(base))
  record["gap_closed"] = comparisons.gap_closed(record["models"])
  record["differences"] = _differences(record, rows, merges)
  return record


def _base_and_experts(base: Any, experts: Any, tasks: Sequence[Task]) -> tuple[Any, Any]:
  """Returns the base and the stack of experts in the tasks' order, in float32."""
  stack, of = arguments.stack_models(base, experts, call="compare(apply, base, experts, tasks)")
  stack = arguments.in_order_of_tasks(stack, of, [t.name for t in tasks])
  base, stack = (jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), t) for t in (base, stack))
  height = jax.tree.leaves(stack)[0].shape[0]
  if height != len(tasks):
    raise ValueError(f"there must be an expert for each task: {len(tasks)}, got {height}.")
  return base, stack


def _listed(methods: Methods | Any, trials: int) -> dict[str, Any]:
  """Returns what is tried by name: a count of trials, settings, or a method."""
  if isinstance(methods, str):
    raise ValueError(f"methods must be a list of names, got {methods!r}: write [{methods!r}].")
  if isinstance(methods, Method) or any(isinstance(one, Method) for one in methods):
    raise ValueError("methods must be names, or methods by name, such as {'mine': method}.")
  if isinstance(trials, bool) or not isinstance(trials, int) or trials < 1:
    raise ValueError(f"trials must be a whole number, 1 or more, got {trials!r}.")
  listed = dict(methods) if isinstance(methods, Mapping) else dict.fromkeys(methods, trials)
  for name, tried in listed.items():
    if isinstance(tried, Method):
      continue
    factory = tried.get("name", name) if isinstance(tried, Mapping) else name
    entry = lookup.entry(factory)
    if entry.on == "weights" or entry.models[1] is not None:
      raise ValueError(f"{factory} does not merge the task vectors of any number of models.")
    for key, values in tried.items() if isinstance(tried, Mapping) else ():
      for value in values if isinstance(values, list | tuple) else (values,):
        if key != "name":
          lookup.check(factory, {key: value})
  return listed


def _refuse_taken(methods: Iterable[str], models: Iterable[str], num_tasks: int) -> None:
  """Raises ValueError for a name that stands for two rows, as a report shows names."""
  rows = {labels.label(n).lower(): "the reference" for n in ("base", "experts")}
  rows |= {labels.label(f"expert_{k}").lower(): "an expert" for k in range(num_tasks)}
  for part, names in (("methods", methods), ("models", models)):
    for name in names:
      shown = labels.label(str(name)).lower()
      if shown in rows:
        raise ValueError(
          f"{part}: the name {name!r} is taken by {rows[shown]} of that name: give another, such "
          f"as {f'my_{name}'!r}."
        )
      rows[shown] = "one of the methods" if part == "methods" else "another model"


def _split(split: str | None, tasks: Sequence[Task]) -> str:
  """Returns the split that is reported; ValueError for one that a task lacks."""
  without = [t.name for t in tasks if t.test is None]
  if split is None:
    return "validation" if without else "test"
  if split not in ("validation", "test"):
    raise ValueError(f"split must be 'validation' or 'test', got {split!r}.")
  if split == "test" and without:
    raise ValueError(f"split='test': task {without[0]!r} has no test rows.")
  return split


def _search_all(
  goal: scales.Validation, listed: Mapping[str, Any], seed: int
) -> tuple[dict[str, Searched], dict[str, str]]:
  """Returns the best merge of each method, and why others failed."""
  merges, failed = {}, {}
  for name, tried in listed.items():
    try:
      merges[name] = _search(goal, name, tried, seed)
    except (ValueError, ArithmeticError) as error:
      failed[name] = str(error)
  if not merges:
    name, reason = next(iter(failed.items()), ("", "no methods to compare."))
    raise ValueError(f"no method could be merged and scored; {name}: {reason}")
  return merges, failed


def _search(goal: scales.Validation, name: str, tried: Any, seed: int) -> Searched:
  """Returns the best merge of one method."""
  if isinstance(tried, Method):
    candidates = [_of_method(tried)]
  elif isinstance(tried, Mapping):
    candidates = list(grid.candidates(name, tried))
  else:
    candidates = [_scaled(name, {})]
  random = "seed" in stage.hparams(candidates[0].method)
  goal = dataclasses.replace(goal, name=name, seed=seed if random else None)
  in_box = isinstance(tried, int)
  strategy = _in_box(name, tried) if in_box else objective.exhaustive(candidates)
  result = objective.run(goal, strategy)
  best = result.candidate
  chosen = {**best.static, **best.hparams}
  if "scale" in stage.hparams(tried if isinstance(tried, Method) else _plain(name, tried)):
    chosen["scale"] = best.scale
  mean = goal.metric.gain(result.score)
  facts = {"settings": chosen, "trials": len(result.trials), "validation": mean}
  return Searched(result.params, facts)


def _plain(name: str, tried: Any) -> Method:
  """Returns a method with its defaults, without a scale behind it."""
  factory = tried.get("name", name) if isinstance(tried, Mapping) else name
  return getattr(methods_, factory)()


def _of_method(method: Method) -> scales.Scaled:
  """Returns a method as it is, for an objective that needs a scale."""
  hparams = stage.hparams(method)
  if "scale" in hparams:
    return scales.Scaled(method, {}, float(hparams["scale"]))
  return scales.Scaled(stage.chain(method, methods_.scaled(1.0)), {}, 1.0)


def _scaled(name: str, chosen: Mapping[str, Any]) -> scales.Scaled:
  """Returns the merge of a method with some settings."""
  parameters = lookup.entry(name).parameters
  hparams = {n: float(v) for n, v in chosen.items() if parameters[n].number}
  static = {n: v for n, v in chosen.items() if n not in hparams}
  default = parameters["scale"].default if grid.has_scale(name) else 1.0
  scale = hparams.pop("scale", default)
  return scales.Scaled(grid.with_scale(name, static), hparams, float(scale), static)


def _in_box(name: str, trials: int) -> objective.Strategy:
  """Proposes merges of a method with settings in their usual ranges."""
  axes, parameters = box.axes(name), lookup.entry(name).parameters
  strategy = box.search(axes, trials, {n: parameters[n].default for n in axes})
  scores: Any = None  # Starts the generator.
  while True:
    try:
      candidates = strategy.send(scores)
    except StopIteration:
      return None
    scores = yield [_scaled(name, one) for one in candidates]


def _facts(
  merges: Mapping[str, Searched], failed: Mapping[str, str], others: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns what a record says beside scores: settings, costs, curves of other results."""
  budget = {n: {"trials": m.facts["trials"]} for n, m in merges.items()}
  curves = {}
  for name, other in others.items():
    if getattr(other, "rounds", None):
      curves[name] = [dict(r) for r in other.rounds]
      budget[name] = other.budget._asdict()
  return {
    "title": "Merges of experts by several methods",
    "rounds": curves.pop("atm", []),
    "rounds_split": "validation",
    "curves": curves,
    "budget": budget,
    "methods": {n: m.facts for n, m in merges.items()},
    "failed": dict(failed),
    "config": {},
    "versions": workdir.versions(),
    "notes": standings.failures(failed),
  }


def _differences(
  record: Mapping[str, Any], rows: Mapping[str, Mapping[str, np.ndarray]], merges: Iterable[str]
) -> list[dict[str, Any]]:
  """Returns the best merge, by validation, less each other one, paired by row."""
  listed = {"models": {n: record["models"][n] for n in merges}}
  best = labels.best({**record, **listed}, "one-shot")
  result = []
  for other in merges:
    if best is not None and other != best:
      pair = [[rows[m][t] for t in record["tasks"]] for m in (best, other)]
      difference = comparisons.paired_difference(*pair, seeds=False)
      result.append({"a": best, "b": other, **difference._asdict()})
  return result
