"""Tuning and merging, round by round: saved, resumed, measured."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple  # Any: parameters are the user's tree.

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmerge import methods
from jaxmerge.core import (
  double_precision,
  fingerprint,
  interpreter,
  layouts,
  stage,
  statistics,
  tree,
)
from jaxmerge.core.stage import Method
from jaxmerge.drivers import arguments
from jaxmerge.evaluation import metrics, scoring
from jaxmerge.io.checkpoints import store
from jaxmerge.methods import averages
from jaxmerge.parallel import mesh as meshes
from jaxmerge.parallel import preemption, processes
from jaxmerge.tasks import batch, losses
from jaxmerge.tasks import task as tasks_
from jaxmerge.training import (
  budget,
  checks,
  identity,
  local_steps,
  optimizers,
  outer,
  placement,
  schedule,
  waves,
)
from jaxmerge.training import round as rounds
from jaxmerge.training import settings as settings_lib
from jaxmerge.training.settings import Settings


class Result(NamedTuple):
  """What a run leaves.

  Attributes:
    params: the merged model.
    rounds: one record a round: means, per task, losses, geometry, exchanges, seconds.
    budget: what it cost.
    messages: what happened on the way, such as checkpoints that were set aside; for methods of
      rows and matrices, how many leaves lie how.
  """

  params: Any
  rounds: list[dict[str, Any]]
  budget: budget.Budget
  messages: tuple[str, ...]


@double_precision.aware
def tune_and_merge(
  apply: batch.Apply | Any,
  params: Any,
  tasks: Sequence[tasks_.Task] | Any,
  method: Method | Any = None,
  settings: Settings | Any = None,
  *,
  loss: losses.Rowwise = losses.cross_entropy,
  metric: metrics.Metric | losses.Rowwise = metrics.ACCURACY,
  hparams: Mapping[str, Any] | None = None,
  layout: layouts.Said | None = (),
  mesh: Mesh | None = None,
  sharding: meshes.Rules = (),
  checkpoints: store.Checkpoints | None = None,
  save_every: int = 1,
  score_every: int = 1,
  on_round: Callable[[dict[str, Any]], None] | None = None,
  stop: Callable[[], bool] | None = None,
) -> Result:
  """Tunes copies of the model on every task for a while, merges them, and repeats.

  With a store of checkpoints rounds are saved, and a run that was interrupted goes on from the last
  good one, with the same bits on the same mesh.

  Args:
    apply: (params, inputs [B, ...], head) -> outputs [B, C]. Heads are padded to the widest.
    params: tree of floating-point arrays, the model to start from; kept in float32. Its running
      statistics, such as `batch_stats`, stay as they are: no gradient is theirs.
    tasks: what to tune on; names must differ.
    method: how task vectors are merged, the plain mean by default.
    settings: how long and how; see `Settings`.
    loss: (outputs, labels) -> [B, ...], whose mean is minimised.
    metric: (outputs, labels) -> [B], reported on the validation rows; of a function more is better.
    hparams: the method's numbers.
    layout: matrix views, as for `jaxmerge.merge`.
    mesh: devices; by default all, along the task axis.
    sharding: rules by which a model's weights are split over the mesh's model axis, see
      `jaxmerge.parallel.mesh`; a mesh with such an axis needs them.
    checkpoints: a store for this run alone; it is closed at the end, and opens again when used.
    save_every: rounds from one save to the next; the last round is always saved.
    score_every: rounds from one scoring to the next; the last round is always scored, those between
      have None for scores, and none of them is the best of early stopping.
    on_round: is given the record of each round as soon as it is known.
    stop: is asked after each round; where it says yes in any process, all save that round and stop.

  Raises:
    Stopped: where `stop` said yes before the last round.
    ValueError: for bad data, trees, settings, a task whose training diverges, or a store that holds
      a run with other settings.

  Reference: Zhou et al. 2024, ATM: improving model merging by alternating tuning and merging
  (arXiv:2411.03055).
  """
  for name, every in {"save_every": save_every, "score_every": score_every}.items():
    if every < 1:
      raise ValueError(f"{name} must be at least 1 round, got {every}.")
  settings = settings or Settings()
  method = methods.average() if method is None else arguments.method(method)
  statistics.refuse(method, "tune_and_merge")
  tasks = arguments.tasks(apply, tasks, settings)
  checks.check_parts(mesh, checkpoints)
  params = local_steps.masters(params)
  checks.check(apply, params, tasks, loss)
  mesh = mesh or meshes.make(tasks=len(tasks))
  given = (loss, metrics.metric_of(metric), hparams or {}, layout, mesh, sharding)
  held = _Run(apply, params, tasks, method, settings, *given)
  with contextlib.closing(checkpoints) if checkpoints is not None else contextlib.nullcontext():
    state, records, messages = _restored(held, checkpoints)
    for k in range(len(records), settings.rounds):
      last = k + 1 == settings.rounds
      state, record = held.round(state, k, scored=last or (k + 1) % score_every == 0)
      records.append(record)
      asked = stop is not None and not last and processes.agree(stop())
      due = last or asked or (k + 1) % save_every == 0
      if checkpoints is not None and due:
        checkpoints.save(k + 1, held.saved(state), held.record(records))
      if on_round is not None:
        on_round(record)
      if asked:
        if checkpoints is not None:
          checkpoints.wait()
        raise preemption.Stopped(f"stopped after round {k + 1} of {settings.rounds}")
  params = held.best if settings.early_stopping and held.best is not None else state.params
  return Result(params, records, held.budget(settings.rounds), (*held.laid_out, *messages))


class _Run:
  """The programs and the data of a run: built once, used every round."""

  def __init__(
    self,
    apply: batch.Apply,
    params: Any,
    given: Sequence[tasks_.Task],
    method: Method,
    settings: Settings,
    loss: losses.Rowwise,
    metric: metrics.Metric,
    hparams: Mapping[str, Any],
    layout: layouts.Said | None,
    mesh: Mesh,
    rules: meshes.Rules,
  ) -> None:
    # In the order of the tags, so that the caller's order never matters but where it must.
    by_tag = sorted(given, key=lambda t: tree.tag(t.name))
    self.tasks = tasks = list(given) if stage.ordered(method) else by_tag
    self.settings, self.mesh, self.rules = settings, mesh, rules
    self.names = [t.name for t in tasks]
    self.counts = [len(t.train.labels) for t in tasks]
    self.steps = schedule.totals(self.counts, settings)
    self.local = optimizers.local(settings, params)
    self.outer = outer.optimizer(settings, params)
    self.kept = settings.local_state == "kept"
    self.base = meshes.put(params, meshes.places(params, mesh, rules))
    side = mesh.shape["task"]
    at_once = settings.at_once or len(tasks)
    self.slots = -(-min(at_once, len(tasks)) // side) * side
    self.waves = -(-len(tasks) // self.slots)
    shapes = {n: v.shape for n, v in tree.named(params).items()}
    self.size = sum(int(np.prod(s, dtype=np.int64)) for s in shapes.values())
    self.seeded = "seed" in stage.hparams(method)
    hparams = dict(hparams, seed=0) if self.seeded else dict(hparams)
    self.method = identity.method_record(method, hparams)
    method = averages.with_moments(method, shapes)
    # Numbers per model come in the caller's order, the stacks of the loop are in that of the tags.
    ready = interpreter.prepare(method, shapes, len(tasks), hparams, [t.name for t in given])
    self.ready = ready._replace(order=None)
    self.layout = layouts.settled(method, shapes, layout)
    self.laid_out = layouts.lines(method, self.layout)
    step = local_steps.step(placement.in_place(apply, mesh, rules), loss, settings, self.local)
    height = -(-len(tasks) // side) * side
    self.whole = placement.rows(tasks, "validation", mesh, height=height)
    self.validation = [len(t.validation.labels) for t in tasks]
    self.gain = metric.gain
    self.score = scoring.scorer(apply, metric.rowwise, mesh=mesh)
    self.best: Any = None
    self.best_gain = -np.inf
    height = self.slots * self.waves
    if self.waves == 1:
      self.rows = placement.rows(tasks, "train", mesh, height=height)
    else:
      self.rows = batch.stacked(tasks, "train", height=height)
    head = meshes.fetch(self.rows.head)
    self.head = () if head is None else meshes.put(head[: len(tasks)], meshes.everywhere(mesh))
    sizes = (len(tasks), self.slots, self.kept)
    parts = rounds.Parts(step, self.local, self.outer, method, *sizes, self.layout, mesh, rules)
    self.program = rounds.program(parts) if self.waves == 1 else waves.program(parts)

  def start(self) -> rounds.State:
    """The state before the first round."""
    own = () if self.outer is None else self.outer.init(self.base)

    @jax.jit
    def local(params: Any) -> Any:
      spread = local_steps.copies(params, self.slots * self.waves, self.mesh, self.rules)
      return placement.states(self.local, spread, self.mesh, self.rules)

    # Placed as a round returns it, so that all rounds run one executable.
    own = meshes.put(own, placement.of_states(self.outer, self.base, self.mesh, self.rules))
    states = local(self.base) if self.kept else ()
    return rounds.State(self.base, own, states if self.waves == 1 else meshes.fetch(states))

  def round(
    self, state: rounds.State, k: int, *, scored: bool = True
  ) -> tuple[rounds.State, dict[str, Any]]:
    """Runs round k (from 0), and returns the new state and the round's record."""
    begun, s = time.perf_counter(), self.settings
    plan = schedule.plan(self.names, self.counts, s, k, rounds=s.rounds)
    plan = schedule.Plan(*(batch.pile_up(x, self.slots * self.waves) for x in plan))
    ready = self.ready
    if self.seeded:
      ready = ready._replace(hparams=dict(ready.hparams, seed=_seed(s.seed, k)))
    rate = np.float32(s.outer_learning_rate * schedule.factor(s.outer_schedule, k, s.rounds))
    reference = self.base if s.reference == "base" else state.params
    if self.waves == 1:
      plan = meshes.put(plan, meshes.by_task(self.mesh))
      ready, rate = meshes.put((ready, rate), meshes.everywhere(self.mesh))
    state, found = self.program(state, reference, self.rows, plan, ready, rate)
    when = f"round {k + 1}"
    local_steps.refuse_divergence(self.names, found.loss, found.finite, s, when=when)
    rounds.refuse_overflow(found, state.params, when)
    losses, before, later = self._by_task(found.loss), self.taken(k), self.taken(k + 1)
    record: dict[str, Any] = {
      "round": k + 1,
      **(self.scores(state.params, when) if scored else self.unscored()),
      "loss": {n: x if later[n] > before[n] else None for n, x in losses.items()},
      "exchanges": k + 1,
      "epochs": s.epochs * (k + 1) / s.rounds,
    }
    if found.gram is not None:
      shape = rounds.geometry(found, self.size)
      record |= dict(shape, norms=dict(zip(self.names, shape["norms"], strict=True)))
    if scored and self.gain(record["mean"]) > self.best_gain:
      self.best, self.best_gain = state.params, self.gain(record["mean"])
    return state, dict(record, seconds=time.perf_counter() - begun)

  def scores(self, params: Any, when: str) -> dict[str, Any]:
    """Scores a model on the validation rows: mean over the tasks, and per task."""
    found = np.asarray(self.score(jax.tree.map(lambda p: p[None], params), self.whole)[0])
    scoring.refuse_unscored(self.names, scoring.per_row(found, self.validation), when)
    each = scoring.means(found, self.validation)
    return {"mean": float(np.mean(each)), "per_task": dict(zip(self.names, each, strict=True))}

  def unscored(self) -> dict[str, Any]:
    """What stands for the scores of a model that is not scored."""
    return {"mean": None, "per_task": dict.fromkeys(self.names)}

  def saved(self, state: rounds.State) -> dict[str, Any]:
    """What a checkpoint holds."""
    n, side = len(self.tasks), self.mesh.shape["task"]
    # Without the empty slots, whose number depends on the mesh.
    local = jax.tree.map(lambda x: x[:n], state.local)
    if self.kept and self.waves == 1:
      local = meshes.put(local, self.local_places(even=n % side == 0))
    held = {"params": state.params, "outer": state.outer, "local": local, "base": self.base}
    held["head"] = self.head  # Frozen: computed once, and never again after a resume.
    if self.settings.early_stopping:
      held["best"] = state.params if self.best is None else self.best
    return held

  def local_places(self, *, even: bool = True) -> Any:
    """Where kept local states go: over the task axis, if it divides them, or whole to all of it."""
    places = placement.of_states(self.local, self.base, self.mesh, self.rules, stacked=True)
    if even:
      return places
    return jax.tree.map(lambda s: NamedSharding(self.mesh, P(None, *s.spec[1:])), places)

  def resumed(self, held: dict[str, Any], start: rounds.State) -> rounds.State:
    """The state that a checkpoint holds, with the empty slots of the start."""
    n = len(self.tasks)
    if self.rows.head is not None:
      head = meshes.fetch(held["head"])
      self.head = held["head"]
      self.rows = _headed(self.rows, head)
      self.whole = _headed(self.whole, head)
    local, spare = held["local"], start.local
    if self.kept and self.waves > 1:
      local = jax.tree.map(lambda x, y: np.concatenate([x, y[n:]]), meshes.fetch(local), spare)
    elif self.kept and n < self.slots:
      local = placement.padded(local, spare, self.local_places())
    return rounds.State(held["params"], held["outer"], local)

  def record(self, records: list[dict[str, Any]]) -> dict[str, Any]:
    """The plain record of a checkpoint."""
    done = len(records)
    return {
      "settings": settings_lib.record(self.settings),
      "method": self.method,
      "tasks": {t.name: identity.task_digest(t) for t in self.tasks},
      "rounds": records,
      "position": self.taken(done),
      "budget": self.budget(done)._asdict(),
    }

  def accept(self, record: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the first difference, for the record of another run."""
    own = self.record([])
    record = {**record, "method": fingerprint.placeless(record["method"])}
    for part in ("settings", "method", "tasks"):
      identity.refuse_other(part, record[part], own[part])

  def taken(self, done: int) -> dict[str, int]:
    """Local steps that each task has taken after some rounds: the position in its data."""
    ends = [schedule.bounds(n, self.settings.rounds, done)[0] for n in self.steps]
    return dict(zip(self.names, ends, strict=True))

  def budget(self, done: int) -> budget.Budget:
    """What the run has cost after some rounds."""
    steps = list(self.taken(done).values())
    return budget.tuned(steps, self.counts, self.settings.batch_size, exchanges=done)

  def _by_task(self, values: Any) -> dict[str, float]:
    return dict(zip(self.names, map(float, np.asarray(values)), strict=True))


def _restored(
  run: _Run, checkpoints: store.Checkpoints | None
) -> tuple[rounds.State, list[dict[str, Any]], tuple[str, ...]]:
  state = run.start()
  if checkpoints is None:
    return state, [], ()
  found = checkpoints.restore(run.saved(state), accept=run.accept)
  if found is None:
    return state, [], ()
  held, records = found.state, found.record["rounds"]
  identity.refuse_other_start(held["base"], run.base)
  run.base = held["base"]
  if run.settings.early_stopping:
    gains = [run.gain(r["mean"]) for r in records if r["mean"] is not None]
    run.best, run.best_gain = held["best"], max(gains, default=-np.inf)
  return (
    run.resumed(held, state),
    records,
    (*found.set_aside, f"resumed after round {len(records)}"),
  )


def _headed(rows: batch.Rows, head: np.ndarray) -> batch.Rows:
  """The rows with other heads [T, features, C], placed as they were."""
  piled = batch.pile_up(head, rows.filled.shape[0])
  if isinstance(rows.head, jax.Array):
    return rows._replace(head=meshes.put(piled, rows.head.sharding))
  return rows._replace(head=piled)


def _seed(seed: int, k: int) -> np.uint32:
  return np.uint32((seed * 0x9E3779B1 + k * 0x85EBCA77) % 2**32)
