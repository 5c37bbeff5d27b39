"""Experts: one model fine-tuned per task, with the budget of the loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any  # Any: parameters are the user's tree.

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxmerge.core.stage import Array
from jaxmerge.drivers import finiteness
from jaxmerge.evaluation import metrics, scoring
from jaxmerge.parallel import mesh as meshes
from jaxmerge.tasks import batch, losses
from jaxmerge.tasks import task as tasks_
from jaxmerge.training import budget, checks, local_steps, optimizers, placement, schedule
from jaxmerge.training.settings import Settings

Progress = Callable[[int, int], None]


def experts(
  apply: batch.Apply,
  params: Any,
  tasks: Sequence[tasks_.Task],
  settings: Settings,
  *,
  loss: losses.Rowwise = losses.cross_entropy,
  metric: metrics.Metric | losses.Rowwise = metrics.ACCURACY,
  mesh: Mesh | None = None,
  sharding: meshes.Rules = (),
  on_part: Progress | None = None,
) -> tuple[Any, budget.Budget]:
  """Tunes a copy of the model on each task for the whole budget, without merging.

  Training runs in `settings.rounds` parts, to report progress; optimiser states carry over.

  Args:
    apply: the model, as for `tune_and_merge`.
    params: the model to start from.
    tasks: the tasks, in the order of the stack.
    settings: local settings; those of rounds and outer steps are ignored. With early stopping,
      each expert is its best checkpoint, after a part, on the validation rows of its task.
    loss: (outputs, labels) -> [B].
    metric: (outputs, labels) -> [B], for early stopping; a plain function is maximised.
    mesh: the mesh of devices.
    sharding: rules by which weights are sharded over the mesh's model axis.
    on_part: called with the number of finished parts, and of all parts.

  Returns:
    The stack of experts [T, *s], and their cost.
  """
  params = local_steps.master_weights(params)
  checks.check(apply, params, tasks, loss)
  settings = dataclasses.replace(settings, local_state="kept", round_warmup=0.0)
  mesh = mesh or meshes.make(tasks=len(tasks))
  side = mesh.shape["task"]
  slots = -(-len(tasks) // side) * side
  rows = placement.rows(tasks, "train", mesh, num_slots=slots)
  names, counts = [t.name for t in tasks], [len(t.train.labels) for t in tasks]
  begin, tune = _programs(apply, params, loss, settings, mesh, sharding, slots)
  models, states = begin(meshes.put(params, meshes.shardings(params, mesh, sharding)))
  best = None
  if settings.early_stopping:
    best = _Best(apply, metrics.metric_of(metric), tasks, models, mesh)
  for k in range(settings.rounds):
    plan = schedule.plan(names, counts, settings, k, rounds=settings.rounds)
    padded = schedule.Plan(*(batch.pad(x, slots) for x in plan))
    plan = meshes.put(padded, meshes.task_sharding(mesh))
    models, states, losses, finite = tune(models, states, rows, plan)
    when, used = f"part {k + 1} of its expert's training", len(names)
    local_steps.refuse_divergence(names, losses[:used], finite[:used], settings, when=when)
    if best:
      best.update(models)
    if on_part:
      on_part(k + 1, settings.rounds)
  models = best.models if best else models
  steps = schedule.totals(counts, settings)
  cost = budget.of_tuning(steps, counts, settings.batch_size, exchanges=0)
  return jax.tree.map(lambda x: x[: len(tasks)], models), cost


def _programs(
  apply: batch.Apply,
  params: Any,
  loss: losses.Rowwise,
  settings: Settings,
  mesh: Mesh,
  rules: meshes.Rules,
  slots: int,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """Compiles the initialisation, params -> (models, states), and a part of the training."""
  local = optimizers.local(settings, params)
  step = local_steps.step(placement.shard_weights(apply, mesh, rules), loss, settings, local)

  @jax.jit
  def begin(params: Any) -> Any:
    models = local_steps.copies(params, slots, mesh, rules)
    # All parts share one executable if the first gets shardings like those the others return.
    return models, placement.states(local, models, mesh, rules)

  def part(models: Any, states: Any, rows: batch.TaskBatch, plan: schedule.Plan) -> Any:
    return local_steps.tune_all(step, models, states, rows, plan, mesh=mesh, rules=rules)

  tune, is_finite = jax.jit(part, donate_argnums=(0, 1)), jax.jit(finiteness.finite_models)

  def tune_part(*arguments: Any) -> Any:
    models, states, losses = tune(*arguments)
    return models, states, losses, is_finite(models)

  return begin, tune_part


class _Best:
  """The models [T, *s] with the best validation score on their task so far."""

  def __init__(
    self,
    apply: batch.Apply,
    metric: metrics.Metric,
    tasks: Sequence[tasks_.Task],
    models: Any,
    mesh: Mesh,
  ) -> None:
    slots = jax.tree.leaves(models)[0].shape[0]
    self.mesh, self.metric = mesh, metric
    self.rows = placement.rows(tasks, "validation", mesh, num_slots=slots)
    self.counts = [len(t.validation.labels) for t in tasks]
    self.score = scoring.expert_scorer(apply, metric.rowwise, mesh=mesh)
    self.models = jax.tree.map(jnp.copy, models)  # The next part takes over their buffers.
    self.scores = np.full(slots, -np.inf, np.float32)

  def update(self, models: Any) -> None:
    """Replaces each model that a new one beats."""
    means = scoring.means(self.score(models, self.rows), self.counts)
    scores = batch.pad(self.metric.gain(np.array(means, np.float32)), len(self.scores))
    better = meshes.put(scores > self.scores, meshes.task_sharding(self.mesh))
    self.models = _take_better(self.models, models, better)
    self.scores = np.maximum(scores, self.scores)


@jax.jit
def _take_better(best: Any, models: Any, better: Array) -> Any:
  """Selects `models` where `better` [T] is true, and `best` elsewhere."""
  return jax.tree.map(
    lambda b, m: jnp.where(better.reshape((-1,) + (1,) * (m.ndim - 1)), m, b), best, models
  )
