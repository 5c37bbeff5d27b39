"""What ATM is compared with at the same budget: experts, joint training, one-shot merges."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple  # Any: parameters are the user's tree.

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from jaxmerge import layouts, memory, tree
from jaxmerge import mesh as meshes
from jaxmerge.atm import budget, checking, evaluate, placing, sampling, tune
from jaxmerge.atm.settings import Settings
from jaxmerge.stage import Array, Method
from jaxmerge.tasks import task as tasks_

Progress = Callable[[int, int], None]


def experts(
  apply: tune.Apply,
  params: Any,
  tasks: Sequence[tasks_.Task],
  settings: Settings,
  *,
  loss: tune.Rowwise = tune.cross_entropy,
  metric: evaluate.Metric | tune.Rowwise = evaluate.ACCURACY,
  mesh: Mesh | None = None,
  sharding: meshes.Rules = (),
  on_part: Progress | None = None,
) -> tuple[Any, budget.Budget]:
  """Tunes a copy of the model on each task for the whole budget, without merging.

  Runs in `settings.rounds` parts, so that progress can be shown; optimiser states carry over.

  Args:
    apply: the model, as for `tune_and_merge`.
    params: the model to start from.
    tasks: the tasks; the stack is in their order.
    settings: local settings; those of rounds and outer steps are not used. With early stopping
      each expert is the one that is best on its own validation rows after a part.
    loss: (outputs, labels) -> [B].
    metric: (outputs, labels) -> [B], for early stopping; of a function more is better.
    mesh: devices.
    sharding: rules by which a model's weights are split over the mesh's model axis.
    on_part: is called with the number of parts done and their number.

  Returns:
    The stack of experts [T, *s], and what they cost.
  """
  params = tune.masters(params)
  checking.check(apply, params, tasks, loss)
  settings = dataclasses.replace(settings, local_state="kept", round_warmup=0.0)
  mesh = mesh or meshes.make(tasks=len(tasks))
  side = mesh.shape["task"]
  slots = -(-len(tasks) // side) * side
  local = tune.direction(settings, params)
  step = tune.step(placing.in_place(apply, mesh, sharding), loss, settings, local)
  spread = meshes.by_task(mesh)
  rows = placing.rows(tasks, "train", mesh, height=slots)
  names, counts = [t.name for t in tasks], [len(t.train.labels) for t in tasks]

  @jax.jit
  def begin(params: Any) -> Any:
    models = tune.copies(params, slots, mesh, sharding)
    # All parts run one executable only if the first gets what the others return.
    return models, placing.states(local, models, mesh, sharding)

  def part(models: Any, states: Any, rows: tune.Rows, plan: sampling.Plan) -> Any:
    return tune.tune_all(step, models, states, rows, plan, mesh=mesh, rules=sharding)

  tuned, finite = jax.jit(part, donate_argnums=(0, 1)), jax.jit(tune.finite)
  models, states = begin(meshes.put(params, meshes.places(params, mesh, sharding)))
  judged = evaluate.metric_of(metric)
  best = _Best(apply, judged, tasks, models, mesh) if settings.early_stopping else None
  for k in range(settings.rounds):
    plan = sampling.plan(names, counts, settings, k, rounds=settings.rounds)
    own = sampling.Plan(*(meshes.put(tune.pile_up(x, slots), spread) for x in plan))
    models, states, losses = tuned(models, states, rows, own)
    good = finite(models)
    when = f"part {k + 1} of its expert's training"
    tune.refuse_divergence(names, losses[: len(names)], good[: len(names)], settings, when=when)
    if best:
      best.see(models)
    if on_part:
      on_part(k + 1, settings.rounds)
  models = best.models if best else models
  steps = sampling.totals(counts, settings)
  cost = budget.tuned(steps, counts, settings.batch_size, exchanges=0)
  return jax.tree.map(lambda x: x[: len(tasks)], models), cost


def joint(
  apply: tune.Apply,
  params: Any,
  tasks: Sequence[tasks_.Task],
  settings: Settings,
  *,
  mixed: bool,
  loss: tune.Rowwise = tune.cross_entropy,
  judge: Callable[[Any], float] | None = None,
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
    judge: the validation score of a model, more is better, for early stopping: the best after any
      part is returned.
    on_part: is called with the number of parts done and their number.

  Returns:
    The model, and what it cost.
  """
  params = tune.masters(params)
  checking.check(apply, params, tasks, loss)
  settings = dataclasses.replace(settings, round_warmup=0.0)
  local = tune.direction(settings, params)
  step = tune.step(apply, loss, settings, local)
  rows = jax.tree.map(jnp.asarray, tune.stacked(tasks, "train"))
  names, counts = [t.name for t in tasks], [len(t.train.labels) for t in tasks]
  task, index, rate = _joint_plan(names, counts, settings, len(tasks) if mixed else 1)

  tuned = _joint_program(step, mixed)
  state, parts = local.init(params), settings.rounds
  best = (-np.inf, params)
  width = -(-len(rate) // parts)
  for k in range(parts):
    start, stop = sampling.bounds(len(rate), parts, k)
    # All parts have one shape; what follows the steps of this one is not looked at.
    at = np.minimum(np.arange(start, start + width), len(rate) - 1)
    plan = (task[at], index[at], rate[at], np.int32(stop - start))
    params, state, total, good = tuned(params, state, rows, plan)
    when = f"part {k + 1} of {parts}"
    tune.refuse_divergence(["joint training"], total[None], good, settings, when=when)
    if settings.early_stopping and judge and (mean := judge(params)) > best[0]:
      best = (mean, params)
    if on_part:
      on_part(k + 1, parts)
  # Of mixed batches, a last one that the tasks do not fill is left out.
  batches = np.bincount(task.ravel(), minlength=len(tasks)).tolist()
  cost = budget.tuned(batches, counts, settings.batch_size, exchanges=0)
  params = best[1] if settings.early_stopping and judge else params
  return params, cost._replace(gradient_steps=len(rate), sequential_steps=len(rate))


def better_joint(
  apply: tune.Apply,
  params: Any,
  tasks: Sequence[tasks_.Task],
  settings: Settings,
  *,
  loss: tune.Rowwise,
  judge: Callable[[Any], float],
  on_part: Callable[[str, int], Progress],
) -> tuple[Any, budget.Budget, str]:
  """Trains one model on all tasks in turn, another in mixed batches; returns the better one.

  Arguments are those of `joint`; `on_part` makes its callback, for a way and a number of parts.

  Returns:
    The model; what one of them cost, with two trials; and how its batches were made.
  """
  tried = []
  for mixed, way in ((False, "in turn"), (True, "mixed batches")):
    made, cost = joint(
      apply,
      params,
      tasks,
      settings,
      mixed=mixed,
      loss=loss,
      judge=judge,
      on_part=on_part(way, settings.rounds),
    )
    tried.append((judge(made), made, cost._replace(trials=2), way))
  return max(tried, key=lambda one: one[0])[1:]


class _Best:
  """The models [T, *s] that did best on their own task's validation rows so far."""

  def __init__(
    self,
    apply: tune.Apply,
    metric: evaluate.Metric,
    tasks: Sequence[tasks_.Task],
    models: Any,
    mesh: Mesh,
  ) -> None:
    height = jax.tree.leaves(models)[0].shape[0]
    self.spread = meshes.by_task(mesh)
    self.rows = placing.rows(tasks, "validation", mesh, height=height)
    self.counts = [len(t.validation.labels) for t in tasks]
    self.gain = metric.gain
    self.score = evaluate.own_scorer(apply, metric.rowwise, mesh=mesh)
    self.models = jax.tree.map(jnp.copy, models)  # The training's program takes its own over.
    self.gains = np.full(height, -np.inf, np.float32)

  def see(self, models: Any) -> None:
    """Keeps each model that is better than what there is."""
    found = evaluate.means(self.score(models, self.rows), self.counts)
    gains = tune.pile_up(self.gain(np.array(found, np.float32)), len(self.gains))
    self.models = _better(self.models, models, meshes.put(gains > self.gains, self.spread))
    self.gains = np.maximum(gains, self.gains)


@jax.jit
def _better(best: Any, models: Any, better: Array) -> Any:
  """Takes the models [T, *s] where they are better [T], the best so far elsewhere."""
  return jax.tree.map(
    lambda b, m: jnp.where(better.reshape((-1,) + (1,) * (m.ndim - 1)), m, b), best, models
  )


class Chosen(NamedTuple):
  """A one-shot merge with the scale that is best on validation.

  Attributes:
    params: the merged model.
    scale: the scale chosen.
    means: mean validation score of every scale tried.
  """

  params: Any
  scale: float
  means: tuple[float, ...]


def best_scale(
  method: Method,
  base: Any,
  models: Any,
  scales: Sequence[float],
  score: evaluate.Scorer,
  rows: tune.Rows,
  counts: Sequence[int],
  *,
  names: Sequence[str],
  seed: int | None = None,
  aux: Mapping[str, Any] | None = None,
  layout: layouts.Said | None = (),
  metric: evaluate.Metric = evaluate.ACCURACY,
  at_once: int = 8,
  called: str = "the merge",
) -> Chosen:
  """Merges with every scale, scores all merges in one program, and takes the best.

  A merge, or a score, that is not finite is never the best.

  Args:
    method: a method with the number `scale`.
    base: the base [*s].
    models: the experts [T, *s].
    scales: what to try.
    score: what `evaluate.scorer` makes.
    rows: the validation rows.
    counts: number of validation rows of each task.
    names: names of the experts.
    seed: for methods with random masks.
    aux: other numbers of the method.
    layout: matrix views.
    metric: which of two scores is better.
    at_once: scales that are merged and scored together.
    called: what an error calls the merge.

  Raises:
    ValueError: where no scale gives a finite model with finite scores.
  """
  merged = functools.partial(
    at_scales, method=method, seed=seed, names=tuple(names), layout=layouts.check(layout)
  )
  found: list[float] = []
  best: tuple[Any, float] = (None, 0.0)
  top = -np.inf
  for start in range(0, len(scales), at_once):
    own = jnp.asarray(scales[start : start + at_once], jnp.float32)
    some = merged(base, models, own, dict(aux or {}))
    means = [float(np.mean(evaluate.means(s, counts))) for s in np.asarray(score(some, rows))]
    fine = np.isfinite(means) & np.asarray(_finite(some))
    gains = np.where(fine, metric.gain(np.array(means)), -np.inf)
    if max(gains) > top:
      k, top = int(np.argmax(gains)), max(gains)
      best = (jax.tree.map(lambda x, k=k: x[k], some), float(scales[start + k]))
    found += means
  if top == -np.inf:
    tried = ", ".join(f"{scale:g}" for scale in scales)
    raise ValueError(f"{called}: weights or scores are not finite at any scale tried, {tried}.")
  return Chosen(*best, tuple(found))


_finite = jax.jit(tune.finite)


@functools.partial(jax.jit, static_argnames=("method", "seed", "names", "layout"))
def at_scales(
  base: Any,
  models: Any,
  scales: Array,
  aux: Mapping[str, Any],
  *,
  method: Method,
  seed: int | None,
  names: tuple[str, ...],
  layout: layouts.Said,
) -> Any:
  """Merges with every one of some scales: models [T, *s], scales [S] -> [S, *s]."""

  def one(scale: Array) -> Any:
    numbers = {**aux, "scale": scale}
    return memory.merge(method, base, models, aux=numbers, seed=seed, names=names, layout=layout)

  return jax.vmap(one)(scales)


def _joint_program(step: Any, mixed: bool) -> Callable[..., Any]:
  """Compiles a part: (params, state, rows, plan) -> (params, state, summed loss, finite [1])."""

  @jax.jit
  def tuned(params: Any, state: Any, rows: tune.Rows, plan: Any) -> Any:
    def batch(task: Array, index: Array) -> Any:
      inputs, labels = jax.tree.map(lambda x: x[task, index], (rows.inputs, rows.labels))
      return inputs, labels, None if rows.head is None else rows.head[task], rows.classes[task]

    task, index, rate, steps = plan

    def body(s: Any, held: Any) -> Any:
      params, state, total = held
      batches = jax.vmap(batch)(task[s], index[s]) if mixed else batch(task[s, 0], index[s, 0])
      params, state, value = step(params, state, batches, rate[s], mixed)
      return params, state, total + value

    params, state, total = lax.fori_loop(0, steps, body, (params, state, jnp.float32(0)))
    good = tune.finite(jax.tree.map(lambda p: p[None], params))
    return params, state, total, good

  return tuned


def _joint_plan(
  names: Sequence[str], counts: Sequence[int], settings: Settings, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Interleaves the tasks' batches evenly, `width` of them a step: [S, G], [S, G, B], [S]."""
  size = settings.batch_size
  order = []
  for t, total in enumerate(sampling.totals(counts, settings)):
    batches = sampling.stream(names[t], counts[t], settings.seed, 0, total * size).reshape(-1, size)
    order += [((s + 0.5) / total, tree.tag(names[t]), t, batches[s]) for s in range(total)]
  order.sort(key=lambda entry: entry[:2])
  steps = len(order) // width
  task = np.array([t for _, _, t, _ in order[: steps * width]], np.int32).reshape(steps, width)
  index = np.stack([b for *_, b in order[: steps * width]]).reshape(steps, width, size)
  rate = sampling.learning_rate(np.arange(steps) / steps, settings).astype(np.float32)
  return task, index, rate
