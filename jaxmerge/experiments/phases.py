"""The phases of a run: experts, one-shot merges, joint training, tuning and merging."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple  # Any: parameters are trees of arrays, configs plain trees.

import jax

from jaxmerge import methods
from jaxmerge.catalog import lookup
from jaxmerge.core import stage
from jaxmerge.experiments import merges, phase_cache, user_functions, workdir
from jaxmerge.experiments import problem as problems
from jaxmerge.experiments.setup import Setup, model_shapes, replicate, stack_shapes
from jaxmerge.io.checkpoints import store as stores
from jaxmerge.parallel import mesh as meshes
from jaxmerge.parallel import processes
from jaxmerge.report import labels
from jaxmerge.search import objective, scales
from jaxmerge.training import finetune, joint, loop
from jaxmerge.training.budget import Budget


class Model(NamedTuple):
  """A model to compare, or a stack of models [T, *s], one per task.

  Attributes:
    params: its weights.
    cost: the budget spent on it.
    facts: further facts for the report.
    rounds: records of its rounds.
  """

  params: Any
  cost: Budget
  facts: Mapping[str, Any] = {}
  rounds: tuple[dict[str, Any], ...] = ()


Models = dict[str, Model]


def tune_experts(setup: Setup) -> Models:
  """Tunes an expert per task, and further sets such as `experts_longer` with other settings.

  Returns a stack of models per set.
  """
  changes = {"experts": {}} | setup.config["baselines"]
  stacks = {n: _stack(setup, n, changes[n]) for n in changes if n.split("_")[0] == "experts"}
  if setup.config["keep_experts"]:
    for k, name in enumerate(setup.names):
      folder = setup.folder / "experts" / name
      expert = meshes.fetch(jax.tree.map(lambda x, k=k: x[k], stacks["experts"].params))
      if processes.is_first() and not folder.exists():
        problems.save(setup.problem, folder, expert, f"Expert of task {name}.\n")
  return stacks


def _stack(setup: Setup, name: str, changes: Mapping[str, Any]) -> Model:
  """Tunes a model per task, with changes of the settings."""

  def make() -> tuple[Any, dict[str, Any]]:
    changed = user_functions.make_settings({**setup.config, **changes})
    models, cost = finetune.experts(
      setup.problem.apply,
      setup.params,
      setup.problem.tasks,
      changed,
      **setup.training,
      on_part=setup.events.bar(name, changed.rounds),
    )
    return models, cost._asdict()

  like = stack_shapes(setup.params, setup.mesh, len(setup.names))
  with setup.events.timed(name):
    models, cost = setup.restore_or_make(name, like, make)
  return Model(models, Budget(**cost))


def merge_once(setup: Setup, experts: Model) -> Models:
  """Merges the experts by each one-shot method of the config, each with its best scale."""
  listed = merges.one_shot_settings(setup.config)
  show = setup.events.bar("one-shot merges", len(listed), "method")
  digest = phase_cache.digest([setup.params, experts.params])
  models = {}
  with setup.events.timed("one-shot merges"):
    for done, (name, options) in enumerate(listed.items()):
      models[name] = _merge(setup, experts, name, options, digest)
      show(done + 1, len(listed))
  return models


def _merge(setup: Setup, experts: Model, name: str, options: dict[str, Any], digest: str) -> Model:
  """Merges the experts by one method; `digest` identifies base and experts."""
  tried = options.pop("scales", None) or (1.0,)

  def make() -> tuple[Any, dict[str, Any]]:
    method = merges.make_method({"name": name, **options})
    seed = setup.settings.seed if "seed" in stage.hparams(method) else None
    if "scales" not in setup.config["baselines"].get(name, {}):
      method = stage.chain(method, methods.scaled(1.0))
    candidates = [scales.Scaled(method, {}, float(scale)) for scale in tried]
    goal = setup.validation(experts.params, name, seed)
    best = objective.run(goal, objective.exhaustive(candidates))
    return replicate(setup.mesh, best.params), {"scale": best.candidate.scale}

  like = model_shapes(setup.params, setup.mesh)
  params, facts = setup.restore_or_make(f"one_shot/{name}", like, make, digest)
  cost = experts.cost._replace(exchanges=1, trials=len(tried))
  return Model(params, cost, {**facts, "settings": options} if len(tried) > 1 else {})


def train_jointly(setup: Setup) -> Models:
  """Trains one model on all tasks, alternating or in mixed batches, whichever validates better.

  Returns no model where the config does not list `multitask`.
  """
  if "multitask" not in setup.config["baselines"]:
    return {}
  changes = dict(setup.config["baselines"]["multitask"])

  def make() -> tuple[Any, dict[str, Any]]:
    params, cost, way = joint.train_both_ways(
      setup.problem.apply,
      setup.params,
      setup.problem.tasks,
      user_functions.make_settings(setup.config | changes),
      loss=setup.problem.loss,
      score=lambda p: setup.problem.metric.gain(setup.mean(p)),
      on_part=lambda way, rounds: setup.events.bar(f"multitask, {way}", rounds),
    )
    facts = {"cost": cost._asdict(), "settings": {"batches": way, **changes}}
    return replicate(setup.mesh, params), facts

  with setup.events.timed("multitask"):
    like = model_shapes(setup.params, setup.mesh)
    params, facts = setup.restore_or_make("multitask", like, make)
  return {"multitask": Model(params, Budget(**facts["cost"]), {"settings": facts["settings"]})}


def tune_and_merge(setup: Setup, models: Models) -> Models:
  """Runs the loop, `atm`, and its further runs in the config's `also`.

  Args:
    setup: the set-up.
    models: the one-shot merges; post-hoc runs start from the best of them.
  """
  runs: Models = {}
  for name, changes in {"atm": {}, **setup.config["also"]}.items():
    runs[name] = _run_loop(setup, name, setup.config | changes, models, runs)
  return runs


def _run_loop(
  setup: Setup, name: str, config: dict[str, Any], models: Models, earlier: Models
) -> Model:
  """Runs the loop once, resuming from its checkpoints."""
  changed, tasks, first = user_functions.make_settings(config), setup.problem.tasks, None
  if config["variant"] == "ph":
    tasks, first = problems.post_hoc(tasks), models[_best_one_shot(setup, models)]
  folder, records = setup.folder / "checkpoints" / name, []
  bar = setup.events.bar(name, changed.rounds, "round", fresh=not folder.exists())

  def on_round(record: dict[str, Any]) -> None:
    records.append(record)
    if processes.is_first():
      curves = {n: m.rounds for n, m in earlier.items()}
      workdir.write_metrics(setup.folder, {**curves, name: records})
    setup.events.track(name, record)
    bar(record["round"], changed.rounds, mean=record["mean"])

  keep, every = config["checkpoint"]["keep"], config["checkpoint"]["every"]
  with stores.Checkpoints(folder, keep=keep) as store, setup.events.timed(name):
    result = loop.tune_and_merge(
      setup.problem.apply,
      first.params if first else setup.params,
      tasks,
      merges.make_method(config["method"]),
      changed,
      **setup.training,
      layout=setup.problem.layout,
      checkpoints=store,
      save_every=every,
      score_every=config.get("score_every", 1),
      on_round=on_round,
      stop=setup.events.stop,
    )
  for message in result.messages:
    setup.events.say(f"{name}: {message}")
  cost = (first.cost if first else Budget()).plus(result.budget)
  return Model(result.params, cost, rounds=tuple(result.rounds))


def _best_one_shot(setup: Setup, models: Models) -> str:
  """Returns the name of the best one-shot merge on validation."""
  means = {n: {"mean": setup.mean(m.params)} for n, m in models.items() if n in lookup.METHODS}
  record = {"models": means, "lower_is_better": setup.problem.metric.lower_is_better}
  return labels.best(record, "one-shot") or "average"
