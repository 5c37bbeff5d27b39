"""One round as one program: copy, tune on every task, merge, take the outer step, measure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple  # Any: parameters and states are the user's trees.

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxmerge import memory, statistics, tree, views
from jaxmerge.atm import outer as outers
from jaxmerge.atm import tune
from jaxmerge.atm.sampling import Plan
from jaxmerge.stage import Array, Method


class State(NamedTuple):
  """What a round takes and returns: parameters float32, outer and kept local optimiser states."""

  params: Any
  outer: Any
  local: Any


class Measured(NamedTuple):
  """What a round measures.

  Attributes:
    loss: [T] mean training loss of each task's steps.
    gram: [T, T] inner products of the task vectors to the current model.
    conflict: limbs [2] of the number of entries at which task vectors of opposite sign meet.
    finite: [T] whether a tuned copy is free of NaN and infinity.
  """

  loss: Array
  gram: Array
  conflict: Array
  finite: Array


def program(
  step: Any,
  local: optax.GradientTransformation,
  outer: optax.GradientTransformation | None,
  method: Method,
  *,
  tasks: int,
  slots: int,
  kept: bool,
  layout: views.Views,
  mesh: Mesh,
) -> Callable[..., tuple[State, Measured]]:
  """Compiles the round: (state, base, rows, plan, ready, rate) -> (state, measured).

  Learning rates, batches and the method's numbers are arguments: all rounds run one executable.

  Args:
    step: the local step.
    local: the local optimiser.
    outer: the outer optimiser, or None.
    method: how task vectors are merged.
    tasks: number of tasks T.
    slots: T rounded up to a multiple of the mesh's task axis; the spare slots do nothing.
    kept: local optimiser states carry over.
    layout: matrix views of the leaves.
    mesh: the mesh.
  """

  def once(
    state: State, base: Any, rows: tune.Rows, plan: Plan, ready: memory.Ready, rate: Array
  ) -> tuple[State, Measured]:
    spread = tune.copies(state.params, slots, mesh)
    states = state.local if kept else jax.vmap(local.init)(spread)
    tuned, states, loss = tune.tune_all(step, spread, states, rows, plan, mesh=mesh)
    stacks = {n: v[:tasks] for n, v in tree.named(tuned).items()}
    target = merged(method, stacks, base, ready, layout)
    params, own = outers.moved(outer, state.params, target, state.outer, rate)
    return (
      State(params, own, states if kept else state.local),
      measured(stacks, state.params, loss[:tasks]),
    )

  return jax.jit(once, donate_argnames=("state",) if kept else ())


def merged(
  method: Method, stacks: dict[str, Array], base: Any, ready: memory.Ready, layout: views.Views
) -> Any:
  """Returns base + M(models - base) inside a program: stacks [T, *s] by name -> tree of [*s]."""
  references = tree.named(base)
  deltas = {n: x - references[n][None] for n, x in stacks.items()}
  out = memory.transform(method, deltas, references, ready, layout)
  return tree.rebuild(
    base, {n: memory.added(n, v, references[n], references[n].dtype) for n, v in out.items()}
  )


def measured(stacks: dict[str, Array], current: Any, loss: Array) -> Measured:
  """Measures task vectors, models - current: losses, geometry, finiteness."""
  now = tree.named(current)
  gram, conflict, finite = None, None, None
  for name, x in stacks.items():
    delta = x - now[name][None]
    axes = list(range(1, delta.ndim))
    own = jax.lax.dot_general(delta, delta, ((axes, axes), ((), ())), precision="highest")
    meet = (delta > 0).any(0, keepdims=True) & (delta < 0).any(0, keepdims=True)
    good = jnp.isfinite(x).all(axis=tuple(axes))
    gram = own if gram is None else gram + own
    met = statistics.count(meet)[:, 0]
    conflict = met if conflict is None else statistics.normal(conflict + met)
    finite = good if finite is None else finite & good
  return Measured(loss, gram, conflict, finite)


def geometry(found: Measured, size: int) -> dict[str, Any]:
  """Returns norms [T], cosines [T, T] and the sign conflict rate of `size` entries, as plain lists."""
  gram = np.asarray(found.gram, np.float64)
  norms = np.sqrt(np.maximum(np.diag(gram), 0))
  cosines = gram / np.maximum(np.outer(norms, norms), 1e-30)
  high, low = (int(v) for v in np.asarray(found.conflict))
  return {
    "norms": norms.tolist(),
    "cosines": np.clip(cosines, -1, 1).tolist(),
    "sign_conflict": ((high << statistics.LIMB) + low) / size,
  }
