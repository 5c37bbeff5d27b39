"""One model trained on all tasks, at the budget of the loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmerge.core import tree
from jaxmerge.core.stage import Array
from jaxmerge.drivers import finiteness
from jaxmerge.tasks import batch, losses
from jaxmerge.tasks import task as tasks_
from jaxmerge.training import budget, checks, local_steps, optimizers, schedule
from jaxmerge.training.settings import Settings

Progress = Callable[[int, int], None]


def train(
  apply: batch.Apply,
  params: Any,
  tasks: Sequence[tasks_.Task],
  settings: Settings,
  *,
  mixed: bool,
  loss: losses.Rowwise = losses.cross_entropy,
  score: Callable[[Any], float] | None = None,
  on_part: Progress | None = None,
) -> tuple[Any, budget.Budget]:
  """Trains one model on all tasks at once, on the rows that the experts see.

  Args:
    apply: the model, as for `tune_and_merge`.
    params: the model to start from.
    tasks: the tasks.
    settings: local settings; the learning rate follows the schedule over all steps.
    mixed: a step averages the gradients of T batches; otherwise tasks take turns, one batch a step.
    loss: (outputs, labels) -> [B].
    score: of a model on validation, more is better, for early stopping: the best after any
      part is returned.
    on_part: is called with the number of parts done and their number.

  Returns:
    The model, and what it cost.
  """
  params = local_steps.master_weights(params)
  checks.check(apply, params, tasks, loss)
  settings = dataclasses.replace(settings, round_warmup=0.0)
  local = optimizers.local(settings, params)
  step = local_steps.step(apply, loss, settings, local)
  rows = jax.tree.map(jnp.asarray, batch.stack(tasks, "train"))
  names, counts = [t.name for t in tasks], [len(t.train.labels) for t in tasks]
  task, index, rate = _plan(names, counts, settings, len(tasks) if mixed else 1)

  tuned = _program(step, mixed)
  state, parts = local.init(params), settings.rounds
  best = (-np.inf, params)
  width = -(-len(rate) // parts)
  for k in range(parts):
    start, stop = schedule.bounds(len(rate), parts, k)
    # All parts have one shape; what follows the steps of this one is not looked at.
    at = np.minimum(np.arange(start, start + width), len(rate) - 1)
    plan = (task[at], index[at], rate[at], np.int32(stop - start))
    params, state, total, good = tuned(params, state, rows, plan)
    when = f"part {k + 1} of {parts}"
    local_steps.refuse_divergence(["joint training"], total[None], good, settings, when=when)
    if settings.early_stopping and score and (mean := score(params)) > best[0]:
      best = (mean, params)
    if on_part:
      on_part(k + 1, parts)
  # Of mixed batches, a last one that the tasks do not fill is left out.
  batches = np.bincount(task.ravel(), minlength=len(tasks)).tolist()
  cost = budget.of_tuning(batches, counts, settings.batch_size, exchanges=0)
  params = best[1] if settings.early_stopping and score else params
  return params, cost._replace(gradient_steps=len(rate), sequential_steps=len(rate))


def train_both_ways(
  apply: batch.Apply,
  params: Any,
  tasks: Sequence[tasks_.Task],
  settings: Settings,
  *,
  loss: losses.Rowwise,
  score: Callable[[Any], float],
  on_part: Callable[[str, int], Progress],
) -> tuple[Any, budget.Budget, str]:
  """Trains a model on all tasks in turn, another in mixed batches, and returns the better one.

  Arguments are those of `train`; `on_part` makes its callback, for a way and a number of parts.

  Returns:
    The model; what one of them cost, with two trials; and how its batches were drawn.
  """
  tried = []
  for mixed, way in ((False, "in turn"), (True, "mixed batches")):
    model, cost = train(
      apply,
      params,
      tasks,
      settings,
      mixed=mixed,
      loss=loss,
      score=score,
      on_part=on_part(way, settings.rounds),
    )
    tried.append((score(model), model, cost._replace(trials=2), way))
  return max(tried, key=lambda one: one[0])[1:]


def _program(step: Any, mixed: bool) -> Callable[..., Any]:
  """Compiles a part: (params, state, rows, plan) -> (params, state, summed loss, finite [1])."""

  @jax.jit
  def tuned(params: Any, state: Any, rows: batch.TaskBatch, plan: Any) -> Any:
    def batch(task: Array, index: Array) -> Any:
      inputs, labels = jax.tree.map(lambda x: x[task, index], (rows.inputs, rows.labels))
      return inputs, labels, None if rows.head is None else rows.head[task], rows.classes[task]

    task, index, rate, steps = plan

    def body(s: Any, carry: Any) -> Any:
      params, state, total = carry
      batches = jax.vmap(batch)(task[s], index[s]) if mixed else batch(task[s, 0], index[s, 0])
      params, state, value = step(params, state, batches, rate[s], mixed)
      return params, state, total + value

    params, state, total = lax.fori_loop(0, steps, body, (params, state, jnp.float32(0)))
    good = finiteness.finite_models(jax.tree.map(lambda p: p[None], params))
    return params, state, total, good

  return tuned


def _plan(
  names: Sequence[str], counts: Sequence[int], settings: Settings, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Interleaves the tasks' batches evenly, `width` of them a step: [S, G], [S, G, B], [S]."""
  size = settings.batch_size
  order = []
  for t, total in enumerate(schedule.totals(counts, settings)):
    batches = schedule.stream(names[t], counts[t], settings.seed, 0, total * size).reshape(-1, size)
    order += [((s + 0.5) / total, tree.tag(names[t]), t, batches[s]) for s in range(total)]
  order.sort(key=lambda entry: entry[:2])
  steps = len(order) // width
  task = np.array([t for _, _, t, _ in order[: steps * width]], np.int32).reshape(steps, width)
  index = np.stack([b for *_, b in order[: steps * width]]).reshape(steps, width, size)
  rate = schedule.learning_rate(np.arange(steps) / steps, settings).astype(np.float32)
  return task, index, rate
