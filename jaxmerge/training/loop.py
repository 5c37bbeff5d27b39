"""Tuning and merging, round by round: saved, resumed, measured.

Reference: Zhou et al. 2024, ATM: improving model merging by alternating tuning and merging
(arXiv:2411.03055).
"""

from __future__ import annotations

import contextlib
import functools
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple  # Any: parameters are the user's tree.

import jax
import numpy as np
from jax.sharding import Mesh

from jaxmerge import methods
from jaxmerge.core import double_precision, layouts, statistics
from jaxmerge.core.stage import Method
from jaxmerge.drivers import arguments
from jaxmerge.errors import suggest_keywords
from jaxmerge.evaluation import metrics, scoring
from jaxmerge.io.checkpoints import store
from jaxmerge.parallel import mesh as meshes
from jaxmerge.parallel import preemption, processes
from jaxmerge.tasks import batch, losses
from jaxmerge.tasks import task as tasks_
from jaxmerge.training import (
  budget,
  build,
  checks,
  local_steps,
  placement,
  references,
  saving,
  waves,
)
from jaxmerge.training import round as rounds
from jaxmerge.training.settings import Settings


class Result(NamedTuple):
  """The result of a run.

  Attributes:
    params: the merged model.
    rounds: one record a round: means, per task, losses, geometry, exchanges, seconds.
    budget: what it cost.
    messages: notes, such as checkpoints that were set aside, rounds without a step; for methods of
      rows and matrices, how many leaves have which matrix view.
    record: what `jaxmerge.report` draws: settings, rounds, and the scores of all models.
    scores: on request, by split: mean and per task of every model, on "validation" and "test".
    experts: on request, a stack [T, *s] of models that were tuned for the same budget.
    merges: on request, the experts merged once, by method.
  """

  params: Any
  rounds: list[dict[str, Any]]
  budget: budget.Budget
  messages: tuple[str, ...]
  record: Mapping[str, Any] = types.MappingProxyType({})
  scores: Mapping[str, Mapping[str, Any]] = types.MappingProxyType({})
  experts: Any = None
  merges: Mapping[str, Any] = types.MappingProxyType({})

  def __repr__(self) -> str:
    mean = self.rounds[-1]["mean"] if self.rounds else None
    return f"Result({len(self.rounds)} rounds, mean {mean}; has {', '.join(self._fields)})"


@suggest_keywords
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
  layout: layouts.Layout | None = (),
  mesh: Mesh | None = None,
  sharding: meshes.Rules = (),
  checkpoints: store.Checkpoints | None = None,
  save_every: int = 1,
  score_every: int = 1,
  test: bool = False,
  baselines: Sequence[str] = (),
  on_round: Callable[[dict[str, Any]], None] | None = None,
  stop: Callable[[], bool] | None = None,
) -> Result:
  """Tunes copies of the model on every task for a while, merges them, and repeats.

  A run with checkpoints goes on from the last round saved, with the same bits on the same mesh.

  Args:
    apply: (params, inputs [B, ...], head) -> outputs [B, C]. Heads are padded to the widest.
    params: tree of floating-point arrays to start from; running statistics stay as they are.
    tasks: tasks to tune on, with different names.
    method: how task vectors are merged, the plain mean by default.
    settings: how long and how; see `Settings`.
    loss: (outputs, labels) -> [B, ...], whose mean is minimised.
    metric: (outputs, labels) -> [B], reported on validation rows; of a function more is better.
    hparams: the method's hyperparameters.
    layout: matrix views, as for `jaxmerge.merge`.
    mesh: devices; by default all, along the task axis.
    sharding: rules for the mesh's model axis, see `jaxmerge.parallel.mesh`.
    checkpoints: a store for this run alone, closed at the end.
    save_every: rounds from one save to the next; the last round is always saved.
    score_every: rounds from one scoring to the next; others have None for scores.
    test: whether the model in the end, and the baselines, are scored on test rows too.
    baselines: what the result is compared with: "experts", and names of methods, which merge them
      once with default hyperparameters; experts are tuned again by a run that is resumed.
    on_round: called with the record of each round.
    stop: asked after each round; if it returns True in any process, all save that round and stop.

  Raises:
    Stopped: where `stop` returned True before the last round.
    ValueError: for bad data or settings, a task that diverges, or checkpoints of another run.
  """
  if isinstance(method, Settings):
    raise ValueError("the settings are in the method's place: give them by name, settings=...")
  settings = settings or Settings()
  method = methods.average() if method is None else arguments.method(method)
  statistics.refuse(method, "tune_and_merge")
  tasks = arguments.tasks(apply, tasks, settings)
  names = references.check(baselines, tasks, test=test)
  checks.check_arguments(mesh, checkpoints, save_every=save_every, score_every=score_every)
  params = local_steps.master_weights(params)
  checks.check(apply, params, tasks, loss)
  mesh = mesh or meshes.make(tasks=len(tasks))
  spec = build.Spec(apply, tasks, method, settings, mesh, loss, hparams or {}, layout, sharding)
  metric = metrics.metric_of(metric)
  run = _Run(spec, params, metric, checkpoints)
  with contextlib.closing(checkpoints) if checkpoints is not None else contextlib.nullcontext():
    for record in run.rounds(save_every, score_every, stop):
      if on_round is not None:
        on_round(record)
  return _compare(spec, run, metric, names, test=test)


def _compare(
  spec: build.Spec, run: _Run, metric: metrics.Metric, names: Sequence[str], *, test: bool
) -> Result:
  """Returns the result of a run that is done, scored beside what it is to be compared with."""
  result, base = run.result(), run.loop.base
  costs, summaries = {"atm": result.budget._asdict()}, {}
  others = references.train(spec, base, metric, names)
  if names or test:
    models = {"base": base, **others.merges, "atm": result.params}
    for split in ("validation", *(["test"] if test else [])):
      summaries[split], _ = references.score_models(
        run.score, spec.mesh, models, others.experts, spec.tasks, split, metric
      )
  record = references.record(
    spec, result.rounds, summaries, {**others.budget, **costs}, base, metric
  )
  return result._replace(
    record=record,
    scores={split: summary["models"] for split, summary in summaries.items()},
    experts=others.experts,
    merges=others.merges,
  )


class _Run:
  """A run in progress: the built loop, its state, its records, and the best model so far."""

  def __init__(
    self,
    spec: build.Spec,
    params: Any,
    metric: metrics.Metric,
    checkpoints: store.Checkpoints | None,
  ) -> None:
    self.loop = build.build(spec, params)
    self.settings, self.metric, self.checkpoints = spec.settings, metric, checkpoints
    parts, self.tasks = self.loop.parts, self.loop.spec.tasks
    compiled = rounds if self.loop.waves == 1 else waves
    self.program = compiled.program(parts)
    side = parts.mesh.shape["task"]
    slots = -(-len(self.tasks) // side) * side
    self.validation = placement.rows(self.tasks, "validation", parts.mesh, num_slots=slots)
    self.score = scoring.scorer(spec.apply, metric.rowwise, mesh=parts.mesh)
    self.size = sum(int(np.prod(x.shape, dtype=np.int64)) for x in jax.tree.leaves(self.loop.base))
    self.best: Any = None
    self.best_score = -np.inf
    self.state = build.start(self.loop)
    self.records: list[dict[str, Any]] = []
    self.messages: tuple[str, ...] = ()
    self.head = saving.replicated_head(self.loop)

  def rounds(
    self, save_every: int, score_every: int, stop: Callable[[], bool] | None
  ) -> Iterator[dict[str, Any]]:
    """Runs the rounds that are not done yet, saves, and yields the record of each."""
    self.restore()
    total = self.settings.rounds
    for k in range(len(self.records), total):
      last = k + 1 == total
      record = self.round(k, scored=last or (k + 1) % score_every == 0)
      self.records.append(record)
      stopped = stop is not None and not last and processes.agree(stop())
      due = last or stopped or (k + 1) % save_every == 0
      if self.checkpoints is not None and due:
        facts = saving.record(self.loop, self.records)
        self.checkpoints.save(k + 1, self.saved(), facts)
      yield record
      if stopped:
        if self.checkpoints is not None:
          self.checkpoints.wait()
        raise preemption.Stopped(f"stopped after round {k + 1} of {total}")

  def round(self, k: int, *, scored: bool = True) -> dict[str, Any]:
    """Runs round k (from 0), and returns its record."""
    begun, settings, names = time.perf_counter(), self.settings, self.loop.names
    reference = self.loop.base if settings.reference == "base" else self.state.params
    plan, ready, rate = build.arguments(self.loop, k)
    self.state, measured = self.program(self.state, reference, self.loop.rows, plan, ready, rate)
    params, when = self.state.params, f"round {k + 1}"
    local_steps.refuse_divergence(names, measured.loss, measured.finite, settings, when=when)
    rounds.refuse_overflow(measured, params, when)
    losses = dict(zip(names, map(float, np.asarray(measured.loss)), strict=True))
    before, after = (saving.steps_taken(self.loop, done) for done in (k, k + 1))
    record: dict[str, Any] = {
      "round": k + 1,
      **(self.scores(params, when) if scored else {"mean": None, "per_task": dict.fromkeys(names)}),
      "loss": {n: x if after[n] > before[n] else None for n, x in losses.items()},
      "exchanges": k + 1,
      "epochs": settings.epochs * (k + 1) / settings.rounds,
    }
    if measured.gram is not None:
      geometry = rounds.geometry(measured, self.size)
      record |= dict(geometry, norms=dict(zip(names, geometry["norms"], strict=True)))
    if scored and self.metric.gain(record["mean"]) > self.best_score:
      self.best, self.best_score = params, self.metric.gain(record["mean"])
    return dict(record, seconds=time.perf_counter() - begun)

  def scores(self, params: Any, when: str) -> dict[str, Any]:
    """Returns the mean score on the validation rows over the tasks, and that of each task."""
    counts = [len(t.validation.labels) for t in self.tasks]
    rows = np.asarray(self.score(jax.tree.map(lambda p: p[None], params), self.validation)[0])
    scoring.refuse_unscored(self.loop.names, scoring.per_row(rows, counts), when)
    means = scoring.means(rows, counts)
    return {
      "mean": float(np.mean(means)),
      "per_task": dict(zip(self.loop.names, means, strict=True)),
    }

  def result(self) -> Result:
    """Returns the last model (with early stopping, the best one) and its cost."""
    early = self.settings.early_stopping and self.best is not None
    params = self.best if early else self.state.params
    layout = layouts.lines(self.loop.parts.method, self.loop.parts.layout)
    lines = (*layout, *saving.empty_rounds(self.loop))
    cost = saving.cost(self.loop, self.settings.rounds)
    return Result(params, self.records, cost, (*lines, *self.messages))

  def saved(self) -> dict[str, Any]:
    """Returns the arrays of a checkpoint."""
    arrays = saving.arrays(self.loop, self.state, self.head)
    if self.settings.early_stopping:
      arrays["best"] = self.state.params if self.best is None else self.best
    return arrays

  def restore(self) -> None:
    """Restores state and records from the last good checkpoint, if there is one."""
    if self.checkpoints is None:
      return
    accept = functools.partial(saving.refuse_other_run, self.loop)
    checkpoint = self.checkpoints.restore(self.saved(), accept=accept)
    if checkpoint is None:
      return
    arrays, self.records = checkpoint.state, checkpoint.record["rounds"]
    self.loop = saving.restore_loop(self.loop, arrays)
    if self.loop.rows.head is not None:
      self.head = arrays["head"]
      self.validation = saving.with_head(self.validation, meshes.fetch(self.head))
    if self.settings.early_stopping:
      means = [r["mean"] for r in self.records if r["mean"] is not None]
      self.best = arrays["best"]
      self.best_score = max(map(self.metric.gain, means), default=-np.inf)
    self.state = saving.restore_state(self.loop, arrays, self.state)
    resumed = f"resumed after round {len(self.records)}"
    notes = saving.unchecked(self.loop, checkpoint.record)
    self.messages = (*checkpoint.set_aside, resumed, *notes)
