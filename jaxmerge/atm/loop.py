"""Tuning and merging, round by round: saved, resumed, measured."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple  # Any: parameters are the user's tree.

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxmerge import memory, methods, stage, tree, views
from jaxmerge import mesh as meshes
from jaxmerge.atm import budget, evaluate, in_turn, outer, sampling, tune
from jaxmerge.atm import round as rounds
from jaxmerge.atm.settings import Settings
from jaxmerge.io import orbax
from jaxmerge.stage import Method
from jaxmerge.tasks import task as tasks_


class Result(NamedTuple):
  """What a run leaves.

  Attributes:
    params: the merged model.
    rounds: one record a round: means, per task, losses, geometry, exchanges, seconds.
    budget: what it cost.
    messages: what happened on the way, such as checkpoints that were set aside.
  """

  params: Any
  rounds: list[dict[str, Any]]
  budget: budget.Budget
  messages: tuple[str, ...]


def tune_and_merge(
  apply: tune.Apply,
  params: Any,
  tasks: Sequence[tasks_.Task],
  method: Method | None = None,
  settings: Settings | None = None,
  *,
  loss: tune.Rowwise = tune.cross_entropy,
  metric: tune.Rowwise = tune.accuracy,
  aux: Mapping[str, Any] | None = None,
  layout: Sequence[tuple[str, str]] = (),
  mesh: Mesh | None = None,
  checkpoints: orbax.Checkpoints | None = None,
  on_round: Callable[[dict[str, Any]], None] | None = None,
) -> Result:
  """Tunes copies of the model on every task for a while, merges them, and repeats.

  With a store of checkpoints every round is saved, and a run that was interrupted goes on from its
  last good round, with the same bits on the same mesh.

  Args:
    apply: (params, inputs [B, ...], head) -> outputs [B, C]. Heads are padded to the widest.
    params: tree of floating-point arrays, the model to start from; kept in float32.
    tasks: what to tune on; names must differ.
    method: how task vectors are merged, the plain mean by default.
    settings: how long and how; see `Settings`.
    loss: (outputs, labels) -> [B], minimised.
    metric: (outputs, labels) -> [B], reported on the validation rows.
    aux: the method's numbers.
    layout: matrix views for methods that need rows.
    mesh: devices; by default all, along the task axis.
    checkpoints: a store for this run alone.
    on_round: is given the record of each round as soon as it is known.

  Raises:
    ValueError: for bad data, trees, settings, a task whose training diverges, or a store that holds
      a run with other settings.

  Reference: Zhou et al. 2024, ATM: improving model merging by alternating tuning and merging
  (arXiv:2411.03055).
  """
  settings = settings or Settings()
  method = methods.average() if method is None else method
  params = _masters(params)
  ordered = _ordered(tasks)
  mesh = mesh or meshes.make(tasks=len(ordered))
  held = _Run(apply, params, ordered, method, settings, loss, metric, aux or {}, views.check(layout), mesh)
  state, records, messages = _restored(held, checkpoints)
  for k in range(len(records), settings.rounds):
    state, record = held.round(state, k)
    records.append(record)
    if checkpoints is not None:
      checkpoints.save(k + 1, held.saved(state), held.record(records))
    if on_round is not None:
      on_round(record)
  if checkpoints is not None:
    checkpoints.wait()
  params = held.best if settings.early_stopping and held.best is not None else state.params
  return Result(params, records, held.budget(settings.rounds), messages)


class _Run:
  """The programs and the data of a run: built once, used every round."""

  def __init__(
    self,
    apply: tune.Apply,
    params: Any,
    tasks: list[tasks_.Task],
    method: Method,
    settings: Settings,
    loss: tune.Rowwise,
    metric: tune.Rowwise,
    aux: Mapping[str, Any],
    layout: views.Views,
    mesh: Mesh,
  ) -> None:
    self.base, self.tasks, self.settings, self.mesh = params, tasks, settings, mesh
    self.names = [t.name for t in tasks]
    self.counts = [len(t.train.labels) for t in tasks]
    self.steps = sampling.totals(self.counts, settings)
    self.local = tune.direction(settings, params)
    self.outer = outer.direction(settings)
    self.kept = settings.local_state == "kept"
    self.base = meshes.put(params, meshes.everywhere(mesh))
    side = mesh.shape["task"]
    at_once = settings.at_once or len(tasks)
    self.slots = -(-min(at_once, len(tasks)) // side) * side
    self.waves = -(-len(tasks) // self.slots)
    shapes = {n: v.shape for n, v in tree.named(params).items()}
    self.size = sum(int(np.prod(s, dtype=np.int64)) for s in shapes.values())
    self.seeded = "seed" in stage.numbers(method)
    given = dict(aux, seed=0) if self.seeded else dict(aux)
    self.ready = memory.prepare(method, shapes, len(tasks), given, self.names)
    step = tune.step(apply, loss, settings, self.local)
    self.whole = meshes.put(tune.stacked(tasks, "validation", height=self._spread()), meshes.by_task(mesh))
    self.validation = [len(t.validation.labels) for t in tasks]
    self.score = evaluate.scorer(apply, metric, mesh=mesh)
    self.best, self.best_mean = None, -np.inf
    options = {"kept": self.kept, "layout": layout, "mesh": mesh}
    if self.waves == 1:
      self.rows = meshes.put(tune.stacked(tasks, "train", height=self.slots), meshes.by_task(mesh))
      self.program = rounds.program(
        step, self.local, self.outer, method, tasks=len(tasks), slots=self.slots, **options
      )
    else:
      self.rows = tune.stacked(tasks, "train", height=self.slots * self.waves)
      self.program = in_turn.program(
        step, self.local, self.outer, method, tasks=len(tasks), slots=self.slots, **options
      )

  def _spread(self) -> int:
    side = self.mesh.shape["task"]
    return -(-len(self.tasks) // side) * side

  def start(self) -> rounds.State:
    """The state before the first round."""
    params = jax.tree.map(jnp.copy, self.base)
    own = () if self.outer is None else self.outer.init(params)
    height = self.slots * self.waves
    local = jax.vmap(self.local.init)(tune.copies(params, height, self.mesh)) if self.kept else ()
    return rounds.State(params, own, local)

  def round(self, state: rounds.State, k: int) -> tuple[rounds.State, dict[str, Any]]:
    """Runs round k (from 0), and returns the new state and the round's record."""
    begun, s = time.perf_counter(), self.settings
    plan = sampling.plan(self.names, self.counts, s, k, rounds=s.rounds)
    plan = sampling.Plan(*(tune.pile_up(x, self.slots * self.waves) for x in plan))
    ready = self.ready
    if self.seeded:
      ready = ready._replace(aux=dict(ready.aux, seed=_seed(s.seed, k)))
    rate = np.float32(s.outer_learning_rate * sampling.factor(s.outer_schedule, k, s.rounds))
    reference = self.base if s.reference == "base" else state.params
    if self.waves == 1:
      plan = meshes.put(plan, meshes.by_task(self.mesh))
    state, found = self.program(state, reference, self.rows, plan, ready, rate)
    self._refuse_divergence(found, k)
    record = {
      "round": k + 1,
      **self.scores(state.params),
      "loss": self._by_task(found.loss),
      "exchanges": k + 1,
      "epochs": s.epochs * (k + 1) / s.rounds,
    }
    if found.gram is not None:
      shape = rounds.geometry(found, self.size)
      record |= dict(shape, norms=dict(zip(self.names, shape["norms"], strict=True)))
    if record["mean"] > self.best_mean:
      self.best, self.best_mean = state.params, record["mean"]
    return state, dict(record, seconds=time.perf_counter() - begun)

  def scores(self, params: Any) -> dict[str, Any]:
    """Scores a model on the validation rows: mean over the tasks, and per task."""
    found = self.score(jax.tree.map(lambda p: p[None], params), self.whole)
    each = evaluate.means(found[0], self.validation)
    return {"mean": float(np.mean(each)), "per_task": dict(zip(self.names, each, strict=True))}

  def saved(self, state: rounds.State) -> dict[str, Any]:
    """What a checkpoint holds."""
    held = {"params": state.params, "outer": state.outer, "local": state.local, "base": self.base}
    if self.settings.early_stopping:
      held["best"] = state.params if self.best is None else self.best
    return held

  def record(self, records: list[dict[str, Any]]) -> dict[str, Any]:
    """The plain record of a checkpoint."""
    done = len(records)
    return {
      "settings": dataclasses.asdict(self.settings),
      "tasks": dict(zip(self.names, self.counts, strict=True)),
      "rounds": records,
      "position": self.taken(done),
      "budget": self.budget(done)._asdict(),
    }

  def taken(self, done: int) -> dict[str, int]:
    """Local steps that each task has taken after some rounds: the position in its data."""
    ends = [sampling.bounds(n, self.settings.rounds, done)[0] for n in self.steps]
    return dict(zip(self.names, ends, strict=True))

  def budget(self, done: int) -> budget.Budget:
    """What the run has cost after some rounds."""
    steps = list(self.taken(done).values())
    return budget.tuned(steps, self.counts, self.settings.batch_size, exchanges=done)

  def _by_task(self, values: Any) -> dict[str, float]:
    return dict(zip(self.names, map(float, np.asarray(values)), strict=True))

  def _refuse_divergence(self, found: rounds.Measured, k: int) -> None:
    for name, value, finite in zip(self.names, found.loss, found.finite, strict=True):
      if not (np.isfinite(value) and finite):
        raise ValueError(
          f"task {name!r} diverged in round {k + 1}: loss {float(value)}, finite parameters: "
          f"{bool(finite)}; lower learning_rate ({self.settings.learning_rate:g})."
        )


def _restored(
  run: _Run, checkpoints: orbax.Checkpoints | None
) -> tuple[rounds.State, list[dict[str, Any]], tuple[str, ...]]:
  state = run.start()
  if checkpoints is None:
    return state, [], ()
  found = checkpoints.restore(run.saved(state))
  if found is None:
    return state, [], ()
  for part in ("settings", "tasks"):
    _refuse_other(part, found.record[part], run.record([])[part])
  held, records = found.state, found.record["rounds"]
  run.base = held["base"]
  if run.settings.early_stopping:
    run.best, run.best_mean = held["best"], max(r["mean"] for r in records)
  state = rounds.State(held["params"], held["outer"], held["local"])
  return state, records, (*found.set_aside, f"resumed after round {len(records)}")


def _refuse_other(part: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
  for name in sorted(theirs.keys() | ours.keys()):
    if theirs.get(name) != ours.get(name):
      raise ValueError(
        f"the checkpoints are of another run: {part} {name!r} is {theirs.get(name)!r} there and "
        f"{ours.get(name)!r} here; use the same, or another folder."
      )


def _masters(params: Any) -> Any:
  """The parameters in float32 or wider."""
  for name, leaf in tree.named(params).items():
    if not tree.is_floating(jnp.asarray(leaf)):
      raise ValueError(f"leaf {name!r} is {jnp.asarray(leaf).dtype}; only floating point is tuned.")
    if not bool(jnp.isfinite(leaf).all()):
      raise ValueError(f"leaf {name!r} of the model to start from has NaN or infinity.")
  return jax.tree.map(lambda p: jnp.asarray(p, tree.compute_dtype(jnp.asarray(p).dtype)), params)


def _ordered(tasks: Sequence[tasks_.Task]) -> list[tasks_.Task]:
  """The tasks in the order of their tags, so that the caller's order never matters."""
  if not tasks:
    raise ValueError("at least one task is needed, got none.")
  names = [t.name for t in tasks]
  if len(set(names)) != len(names):
    raise ValueError(f"task names must differ, got {names}.")
  for t in tasks:
    tasks_.check(t)
  return sorted(tasks, key=lambda t: tree.tag(t.name))


def _seed(seed: int, k: int) -> np.uint32:
  return np.uint32((seed * 0x9E3779B1 + k * 0x85EBCA77) % 2**32)
