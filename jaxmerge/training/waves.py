"""Rounds of more tasks than fit side by side: a wave at a time.

A method with a fold takes each wave as it is tuned, and one accumulator is all that is held. For
all others the tuned copies go to host memory and are merged there slice by slice.
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
from jaxmerge.training import outer as outers
from jaxmerge.training import placement
from jaxmerge.training import round as rounds
from jaxmerge.training.schedule import Plan


def program(parts: rounds.Parts) -> Callable[..., tuple[rounds.State, rounds.Measured]]:
  """Makes a round like `round.program`, which tunes `parts.slots` tasks at a time.

  Rows, plan and kept local states are host arrays with a multiple of `slots` tasks. The geometry of
  the task vectors is not measured: the copies are never together on the devices.
  """
  _, local, outer, method, tasks, slots, kept, layout, mesh, rules = parts
  whole = meshes.everywhere(mesh)

  @jax.jit
  def tuned(params: Any, states: Any, rows: batch.Rows, plan: Plan) -> Any:
    copies, states, loss = rounds.tuning(parts, params, states, rows, plan)
    told = lax.with_sharding_constraint((loss, finiteness.finite_models(copies)), whole)
    return copies, states, *told

  @jax.jit
  def move(*given: Any) -> Any:
    params, own = outers.step(outer, *given)
    places = meshes.places(params, mesh, rules), placement.of_states(outer, params, mesh, rules)
    params, own = lax.with_sharding_constraint((params, own), places)
    return params, own, lax.with_sharding_constraint(rounds.is_finite(params), whole)

  def placed(states: Any, base: Any) -> Any:
    places = placement.of_states(local, base, mesh, rules, stacked=True) if kept else ()
    return meshes.put(states, places)

  take, finish = _folded(method, layout) if stage.foldable(method) else _held(method, layout)

  def once(
    state: rounds.State,
    base: Any,
    rows: batch.Rows,
    plan: Plan,
    ready: interpreter.Ready,
    rate: Any,
  ) -> tuple[rounds.State, rounds.Measured]:
    held, states, losses, finites = None, [], [], []
    for start in range(0, tasks, slots):
      filled = min(slots, tasks - start)
      cut = functools.partial(jax.tree.map, lambda x, s=start: x[s : s + slots])
      spread = meshes.put(cut((rows, plan)), meshes.by_task(mesh))
      copies, after, loss, finite = tuned(state.params, placed(cut(state.local), base), *spread)
      copies = jax.tree.map(lambda x, n=filled: x[:n], copies)
      held = take(held, copies, base, _own(ready, start, start + filled))
      states.append(meshes.fetch(after))
      losses.append(np.asarray(loss)[:filled])
      finites.append(np.asarray(finite)[:filled])
    found = rounds.Measured(np.concatenate(losses), np.concatenate(finites), merged=True)
    if not np.all(found.finite):
      return state, found  # The caller refuses it; there is nothing to merge.
    target = meshes.put(finish(held, base, ready), meshes.places(base, mesh, rules))
    params, own_state, fine = move(state.params, target, state.outer, np.float32(rate))
    after = jax.tree.map(lambda *xs: np.concatenate(xs), *states)
    return rounds.State(params, own_state, after), found._replace(merged=fine)

  return once


def _folded(method: Method, layout: layouts.Table) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """Merges waves as they come: take one into the accumulator, finish."""
  take, finish = accumulator.accumulator(method, layout)
  return take, lambda held, base, ready: finish(held, base, base, ready)


def _own(ready: interpreter.Ready, start: int, stop: int) -> interpreter.Ready:
  """The tags and numbers of some of the models."""
  height = len(ready.tags)

  def cut(value: Any) -> Any:
    return value[start:stop] if np.ndim(value) and np.shape(value)[0] == height else value

  return ready._replace(tags=ready.tags[start:stop], hparams=jax.tree.map(cut, ready.hparams))


def _held(method: Method, layout: layouts.Table) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """Keeps the tuned copies in host memory, and merges them there at the end."""

  def take(held: Any, copies: Any, base: Any, ready: interpreter.Ready) -> Any:
    return [*(held or []), meshes.fetch(copies)]

  def finish(held: Any, base: Any, ready: interpreter.Ready) -> Any:
    models = jax.tree.map(lambda *xs: np.concatenate(xs), *held)
    return streaming.merge_slices(method, models, meshes.fetch(base), ready=ready, layout=layout)

  return take, finish
