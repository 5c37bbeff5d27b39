"""From a config to a run: base, experts, joint training, one-shot merges, ATM, and the report."""

from __future__ import annotations

import contextlib
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any  # Any: configs and records are plain trees.

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import methods, report
from jaxmerge.catalog import lookup
from jaxmerge.core import stage
from jaxmerge.evaluation import compare, scoring
from jaxmerge.experiments import built_in, phase_cache, problem
from jaxmerge.experiments import workdir as workdirs
from jaxmerge.io.checkpoints import store as stores
from jaxmerge.io.disk import shared
from jaxmerge.parallel import mesh as meshes
from jaxmerge.parallel import preemption, processes
from jaxmerge.report import labels
from jaxmerge.search import scales as search_scales
from jaxmerge.tasks import batch
from jaxmerge.tasks.task import Task
from jaxmerge.training import budget, finetune, joint, loop, placement
from jaxmerge.training import settings as training_settings

Event = Mapping[str, Any]


def run(
  config: Any,
  workdir: str | pathlib.Path,
  *,
  resume: str = "auto",
  progress: Callable[[Event], None] = lambda event: None,
  stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
  """Runs the experiment of a config and leaves report, plots, checkpoints and models in `workdir`.

  Args:
    config: an ml_collections ConfigDict, as in `configs/`.
    workdir: the folder; it is created, or goes on from where an interrupted run has stopped.
    resume: "auto" goes on with a run of the same config, "never" wants an empty folder, "must"
      wants a run to go on with.
    progress: is given events: {"phase", "done", "total", "unit", "numbers"} or {"message"}.
    stop: is asked after each round, or part of another phase, whether to stop there.

  Returns:
    The record that `report.json` holds. Of many processes the first one writes, alone.

  Raises:
    Stopped: where `stop` said yes; rounds are saved, a phase that is not done will start anew.
    ValueError: if the folder holds a run of another config, or another run is at work in it.
  """
  workdir = pathlib.Path(workdir)
  plain = json.loads(config.to_json())
  with workdirs.held(workdir, plain, resume):
    shared.check(workdir)
    if record := workdirs.finished(workdir, plain):
      return record
    work = Work(plain, workdir, progress, stop)
    if processes.first():
      workdirs.claim(workdir, plain)
    work.base()
    work.experts()
    work.one_shot()
    work.multitask()
    work.atm()
    return work.finish()


class Work:
  """A run in progress: the problem, what is compared so far, and where it goes."""

  def __init__(
    self,
    config: dict[str, Any],
    workdir: pathlib.Path,
    progress: Callable[[Event], None],
    stop: Callable[[], bool] = lambda: False,
  ) -> None:
    self.config, self.workdir, self.progress, self.stop = config, workdir, progress, stop
    self.seconds: dict[str, float] = {}
    with self.timed("data and base"):
      self.problem = problem.shared(built_in.make(config, self.trained))
    self.settings = training_settings.from_config(config)
    self.names = [t.name for t in self.problem.tasks]
    axes = {k: config["mesh"][k] for k in meshes.AXES}
    self.mesh = meshes.make(**axes, tasks=len(self.names))
    self.params = self.whole(
      jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), self.problem.params)
    )
    self.metric = self.problem.metric
    apply, rowwise = self.problem.apply, self.metric.rowwise
    self.score = scoring.scorer(apply, rowwise, mesh=self.mesh)
    self.own_score = scoring.expert_scorer(apply, rowwise, mesh=self.mesh)
    self.given: Any = {"loss": self.problem.loss, "metric": self.metric, "mesh": self.mesh}
    self.given["sharding"] = self.problem.sharding if self.mesh.shape["model"] > 1 else ()
    self.rows = self.placed(self.problem.tasks, "validation")
    self.models: dict[str, Any] = {}
    self.stacks: dict[str, Any] = {}  # A model for each task, [T, *s]: "experts" and longer ones.
    self.facts: dict[str, dict[str, Any]] = {}
    self.costs: dict[str, budget.Budget] = {}
    self.curves: dict[str, list[dict[str, Any]]] = {}

  @contextlib.contextmanager
  def timed(self, phase: str) -> Iterator[None]:
    """Adds up the seconds of a phase."""
    begun = time.perf_counter()
    yield
    self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - begun

  def placed(self, tasks: Sequence[Task], split: str) -> batch.Rows:
    """Puts a split of all tasks on the devices."""
    side = self.mesh.shape["task"]
    height = -(-len(tasks) // side) * side
    return placement.rows(tasks, split, self.mesh, height=height)

  def padded(self, stack: Any, height: int) -> Any:
    """Puts a stack of models on the devices, with empty slots up to a height."""
    own = jax.tree.map(lambda x: batch.pile_up(x, height), meshes.fetch(stack))
    return meshes.put(own, meshes.by_task(self.mesh))

  def whole(self, params: Any) -> Any:
    """A model that each process has computed by itself, as all of them see it: the first one's."""
    if jax.process_count() == 1 or not jax.tree.leaves(params)[0].is_fully_addressable:
      return params
    return meshes.put(processes.same(params), meshes.everywhere(self.mesh))

  def say(self, message: str) -> None:
    """Passes a message on."""
    self.progress({"message": message})

  def bar(
    self, phase: str, total: int, unit: str = "part", *, fresh: bool = True
  ) -> Callable[..., None]:
    """Shows that a phase begins; returns the callback (done, total, **numbers) that shows more.

    One that is not `fresh` goes on from somewhere, which its first callback tells. After a part,
    but not after a round, the run stops where it is asked to: the loop stops by itself.
    """

    def show(done: int, total: int, **numbers: float | None) -> None:
      known = {k: v for k, v in numbers.items() if v is not None}
      self.progress({"phase": phase, "done": done, "total": total, "unit": unit, "numbers": known})
      if done and unit != "round" and processes.agree(self.stop()):
        raise preemption.Stopped(f"stopped in {phase}, after {unit} {done} of {total}")

    if fresh:
      show(0, total)
    return show

  def trained(self, like: Any, make: Callable[[], Any]) -> Any:
    """What was trained for the base, in the memory of every process."""

    def first() -> tuple[Any, dict[str, Any]]:
      made = processes.same(make())
      if processes.first():
        workdirs.claim(self.workdir, self.config)  # What is saved belongs to a run.
      return made, {}

    return meshes.fetch(self.found("base", like, first)[0])

  def kept(self, phase: str, make: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
    """Returns what a phase made, from its checkpoint if it has one: (arrays, plain facts)."""
    like = problem.make_like(self.params, len(self.names), phase, self.mesh)

    def whole() -> tuple[Any, Any]:
      made, facts = make()
      return made if phase.split("_")[0] == "experts" else self.whole(made), facts

    with self.timed(phase):
      return self.found(phase, like, whole)

  def found(self, phase: str, like: Any, make: Callable[[], Any], of: str = "") -> tuple[Any, Any]:
    """The same of any arrays, which are like some, and made of models with some digest."""
    folder = self.workdir / "checkpoints" / phase
    return phase_cache.kept(folder, like, make, say=self.say, called=phase, of=of)

  def base(self) -> None:
    """The model before any tuning."""
    self.models["base"] = self.params
    self.costs["base"] = budget.Budget()

  def experts(self) -> None:
    """A model for each task; and again with other settings, for `experts_longer` and the like."""
    changes = {"experts": {}} | self.config["baselines"]
    for name in [n for n in changes if n.split("_")[0] == "experts"]:
      self.one_stack(name, changes[name])
    if self.config["keep_experts"]:
      for k, name in enumerate(self.names):
        folder = self.workdir / "experts" / name
        one = meshes.fetch(jax.tree.map(lambda x, k=k: x[k], self.stacks["experts"]))
        if processes.first() and not folder.exists():
          self.problem.save(folder, one, f"Expert of task {name}.\n")

  def one_stack(self, name: str, own: Mapping[str, Any]) -> None:
    """Tunes a model for each task, with the config's own settings for it."""

    def make() -> tuple[Any, Any]:
      settings = training_settings.from_config({**self.config, **own})
      models, cost = finetune.experts(
        self.problem.apply,
        self.params,
        self.problem.tasks,
        settings,
        **self.given,
        on_part=self.bar(name, settings.rounds),
      )
      return models, cost._asdict()

    self.stacks[name], cost = self.kept(name, make)
    self.costs[name] = budget.Budget(**cost)

  def one_shot(self) -> None:
    """The merges of the experts, each with its best scale."""
    tuned = self.costs["experts"]
    plan = problem.one_shot_plan(self.config)
    shown = self.bar("one-shot merges", len(plan), "method")
    of = phase_cache.digest([self.params, self.stacks["experts"]])
    like = problem.make_like(self.params, 1, "one_shot", self.mesh)
    with self.timed("one-shot merges"):
      for done, (name, settings) in enumerate(plan.items()):
        scales = settings.pop("scales", None) or (1.0,)

        def make(name: str = name, settings: Any = settings, scales: Any = scales) -> Any:
          chosen = self.merged(name, settings, scales)
          return chosen.params, {"scale": chosen.candidate.scale}

        self.models[name], facts = self.found(f"one_shot/{name}", like, make, of)
        self.facts[name] = {} if len(scales) == 1 else {**facts, "settings": settings}
        self.costs[name] = tuned._replace(exchanges=1, trials=len(scales))
        shown(done + 1, len(plan))

  def merged(self, name: str, settings: Any, scales: Sequence[float]) -> Any:
    """The experts, merged by a method with its best scale."""
    method = problem.method_of({"name": name, **settings})
    seed = self.settings.seed if "seed" in stage.hparams(method) else None
    if "scales" not in self.config["baselines"].get(name, {}):
      method = stage.chain(method, methods.scaled(1.0))
    return search_scales.best_scale(
      method,
      self.params,
      self.stacks["experts"],
      scales,
      self.score,
      self.rows,
      [len(t.validation.labels) for t in self.problem.tasks],
      names=self.names,
      seed=seed,
      layout=self.problem.layout,
      metric=self.metric,
      called=name,
    )

  def multitask(self) -> None:
    """One model trained on all tasks, in turn or in mixed batches: the better on validation."""
    if "multitask" not in self.config["baselines"]:
      return
    own = dict(self.config["baselines"]["multitask"])

    def make() -> tuple[Any, Any]:
      params, cost, way = joint.better_joint(
        self.problem.apply,
        self.params,
        self.problem.tasks,
        training_settings.from_config(self.config | own),
        loss=self.problem.loss,
        judge=lambda p: self.metric.gain(self.mean(p)),
        on_part=lambda way, rounds: self.bar(f"multitask, {way}", rounds),
      )
      return params, {"cost": cost._asdict(), "settings": {"batches": way, **own}}

    params, facts = self.kept("multitask", make)
    self.models["multitask"] = params
    self.facts["multitask"] = {"settings": facts["settings"]}
    self.costs["multitask"] = budget.Budget(**facts["cost"])

  def mean(self, params: Any) -> float:
    """Mean validation score over the tasks."""
    counts = [len(t.validation.labels) for t in self.problem.tasks]
    found = self.score(jax.tree.map(lambda p: p[None], self.whole(params)), self.rows)
    return float(np.mean(scoring.means(found[0], counts)))

  def atm(self) -> None:
    """ATM, and the further runs of the loop that the config asks for."""
    for name, changes in {"atm": {}, **self.config["also"]}.items():
      self.one_loop(name, self.config | changes)

  def one_loop(self, name: str, config: dict[str, Any]) -> None:
    """One run of the loop, resumed from its own checkpoints."""
    settings, tasks, params = training_settings.from_config(config), self.problem.tasks, self.params
    before = budget.Budget()
    if config["variant"] == "ph":
      best = self.best_one_shot()
      tasks, params, before = problem.post_hoc(tasks), self.models[best], self.costs[best]

    fresh = not (self.workdir / "checkpoints" / name).exists()
    shown = self.bar(name, settings.rounds, "round", fresh=fresh)

    def show(record: dict[str, Any]) -> None:
      self.curves[name] = [*self.curves.get(name, []), record]
      if processes.first():
        workdirs.write_metrics(self.workdir, self.curves)
      shown(record["round"], settings.rounds, mean=record["mean"])

    keep = config["checkpoint"]["keep"]
    with (
      stores.Checkpoints(self.workdir / "checkpoints" / name, keep=keep) as store,
      self.timed(name),
    ):
      result = loop.tune_and_merge(
        self.problem.apply,
        params,
        tasks,
        problem.method_of(config["method"]),
        settings,
        **self.given,
        layout=self.problem.layout,
        checkpoints=store,
        save_every=config["checkpoint"]["every"],
        score_every=config.get("score_every", 1),
        on_round=show,
        stop=self.stop,
      )
    for message in result.messages:
      self.say(f"{name}: {message}")
    self.models[name] = result.params
    self.costs[name] = before.plus(result.budget)
    self.curves[name] = result.rounds

  def best_one_shot(self) -> str:
    """Name of the one-shot merge that is best on validation."""
    models = {n: {"mean": self.mean(p)} for n, p in self.models.items() if n in lookup.METHODS}
    record = {"models": models, "lower_is_better": self.metric.lower_is_better}
    return labels.best(record, "one-shot") or "average"

  def finish(self) -> dict[str, Any]:
    """Scores all models, and writes report, models and metrics."""
    split = "test" if self.config["final"] else "validation"
    with self.timed("final scores"):
      record, scores = self.judged(split)
      if split == "test":
        seen, _ = self.judged("validation")
        record["validation"] = {n: m["mean"] for n, m in seen["models"].items()}
    record |= {
      "title": self.problem.title,
      "seed": self.settings.seed,
      "split": split,
      "rounds_split": "validation",
      "rounds": self.curves["atm"],
      "curves": {n: c for n, c in self.curves.items() if n != "atm"},
      "budget": {n: c._asdict() for n, c in self.costs.items()},
      "parameters": sum(x.size for x in jax.tree.leaves(self.params)),
      "seconds": self.seconds,
      "config": self.config,
      "versions": workdirs.versions(),
      "notes": problem.layout_notes(self.problem, self.params, self.config),
    }
    record["gap_closed"] = report.gap_closed(record["models"])
    record["differences"] = compare.differences(record, scores)
    card = report.model_card(record, self.problem.base, "atm", license=self.problem.license)
    merged = meshes.fetch(self.models["atm"])
    if processes.first():
      self.problem.save(self.workdir / "merged", merged, card)
      workdirs.write_metrics(self.workdir, self.curves)
      workdirs.write_rows(self.workdir, scores)
      report.write(record, self.workdir)
    return record

  def judged(self, split: str) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
    """Scores every model on every task's rows of a split, once."""
    tasks, stacks = self.problem.tasks, dict(self.stacks)
    models = self.models | compare.split_experts(stacks.pop("experts"), len(tasks))

    def make() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
      rows = self.rows if split == "validation" else self.placed(tasks, split)
      found = {
        n: self.score(jax.tree.map(lambda p: p[None], m), rows)[0] for n, m in models.items()
      }
      for name, stack in stacks.items():
        found[name] = self.own_score(self.padded(stack, rows.filled.shape[0]), rows)
      return {n: np.asarray(own)[: len(tasks)] for n, own in found.items()}, {}

    like = compare.shapes([*models, *stacks], tasks, split)
    of = phase_cache.digest([models, stacks])
    found = meshes.fetch(self.found(f"scores_{split}", like, make, of)[0])
    scores, experts = compare.by_row(found, list(like), tasks, split, self.metric)
    return compare.summary(tasks, split, scores, experts, self.facts, self.metric), scores
