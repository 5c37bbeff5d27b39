"""Rounds with more tasks than fit on the devices at once, tuned in waves.

A method with a fold adds each wave to one accumulator. For other methods, the tuned copies go to
host memory and are merged slice by slice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any  # Any: parameters and states are the user's trees.

import jax
import numpy as np
from jax import lax

from jaxmerge.core import interpreter, layouts, stage
from jaxmerge.core.stage import Method
from jaxmerge.drivers import accumulator, finiteness, streaming
from jaxmerge.parallel import mesh as meshes
from jaxmerge.tasks import batch
from jaxmerge.training import outer_optimizers, placement
from jaxmerge.training import round as rounds
from jaxmerge.training.schedule import Plan


def program(parts: rounds.Parts) -> Callable[..., tuple[rounds.State, rounds.Measured]]:
  """Returns a round like `round.program` that tunes `parts.slots` tasks at a time.

  Rows, plan and local states are host arrays with a multiple of `slots` tasks. The geometry of the
  task vectors is not measured, since the copies are never on the devices together.
  """
  method, layout, mesh, rules = parts.method, parts.layout, parts.mesh, parts.rules
  tune, step = _tune(parts), _step(parts)
  add, finish = (_fold if stage.foldable(method) else _gather)(method, layout)

  def run_round(
    state: rounds.State,
    base: Any,
    rows: batch.TaskBatch,
    plan: Plan,
    ready: interpreter.Ready,
    rate: Any,
  ) -> tuple[rounds.State, rounds.Measured]:
    merged, states, losses, finite = None, [], [], []
    for start in range(0, parts.tasks, parts.slots):
      filled = min(parts.slots, parts.tasks - start)
      cut = functools.partial(jax.tree.map, lambda x, s=start: x[s : s + parts.slots])
      wave = tune(state.params, cut(state.local), base, cut((rows, plan)))
      copies = jax.tree.map(lambda x, n=filled: x[:n], wave[0])
      merged = add(merged, copies, base, _select(ready, start, start + filled))
      states.append(meshes.fetch(wave[1]))
      losses.append(np.asarray(wave[2])[:filled])
      finite.append(np.asarray(wave[3])[:filled])
    measured = rounds.Measured(np.concatenate(losses), np.concatenate(finite), merged=True)
    if not np.all(measured.finite):
      return state, measured  # The caller raises an error; there is nothing to merge.
    target = meshes.put(finish(merged, base, ready), meshes.shardings(base, mesh, rules))
    params, outer_state, is_finite = step(state.params, target, state.outer, np.float32(rate))
    after = jax.tree.map(lambda *xs: np.concatenate(xs), *states)
    return rounds.State(params, outer_state, after), measured._replace(merged=is_finite)

  return run_round


def _tune(parts: rounds.Parts) -> Callable[..., Any]:
  """Compiles the tuning of a wave; it returns copies, states, losses, and which are finite."""
  mesh, rules = parts.mesh, parts.rules

  @jax.jit
  def tune_wave(params: Any, states: Any, rows: batch.TaskBatch, plan: Plan) -> Any:
    copies, states, loss = rounds.tune(parts, params, states, rows, plan)
    finite = finiteness.finite_models(copies)
    return copies, states, *lax.with_sharding_constraint((loss, finite), meshes.replicated(mesh))

  def put_and_tune(params: Any, states: Any, base: Any, data: Any) -> Any:
    shardings: Any = ()
    if parts.keeps_states:
      shardings = placement.state_shardings(parts.local, base, mesh, rules, stacked=True)
    return tune_wave(
      params, meshes.put(states, shardings), *meshes.put(data, meshes.task_sharding(mesh))
    )

  return put_and_tune


def _step(parts: rounds.Parts) -> Callable[..., Any]:
  """Compiles the outer step; it returns model, optimiser state, and whether it is finite."""
  mesh, rules = parts.mesh, parts.rules

  @jax.jit
  def step(current: Any, target: Any, state: Any, rate: Any) -> Any:
    params, state = outer_optimizers.step(parts.outer, current, target, state, rate, parts.freeze)
    states = placement.state_shardings(parts.outer, params, mesh, rules)
    shardings = meshes.shardings(params, mesh, rules), states
    params, state = lax.with_sharding_constraint((params, state), shardings)
    is_finite = lax.with_sharding_constraint(rounds.is_finite(params), meshes.replicated(mesh))
    return params, state, is_finite

  return step


def _select(ready: interpreter.Ready, start: int, stop: int) -> interpreter.Ready:
  """Returns the tags and hyperparameters of some of the models."""
  num_models = len(ready.tags)

  def cut(value: Any) -> Any:
    return value[start:stop] if np.ndim(value) and np.shape(value)[0] == num_models else value

  return ready._replace(tags=ready.tags[start:stop], hparams=jax.tree.map(cut, ready.hparams))


def _fold(method: Method, layout: layouts.Table) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """Returns a function that adds a wave to an accumulator, and one that finishes the merge."""
  take, finish = accumulator.accumulator(method, layout)
  return take, lambda merged, base, ready: finish(merged, base, base, ready)


def _gather(method: Method, layout: layouts.Table) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """Returns a function that adds a wave to the copies on the host, and one that merges them."""

  def add(waves: Any, copies: Any, base: Any, ready: interpreter.Ready) -> Any:
    return [*(waves or []), meshes.fetch(copies)]

  def finish(waves: Any, base: Any, ready: interpreter.Ready) -> Any:
    models = jax.tree.map(lambda *xs: np.concatenate(xs), *waves)
    return streaming.merge_slices(method, models, meshes.fetch(base), ready=ready, layout=layout)

  return add, finish
