"""One round as one program: copy, tune on every task, merge, take the outer step, measure."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple  # Any: parameters and states are the user's trees.

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh

from jaxmerge.core import interpreter, layouts, tree, wide_counts
from jaxmerge.core.stage import Array, Method
from jaxmerge.drivers import distributed_matrices, finiteness, memory
from jaxmerge.parallel import mesh as meshes
from jaxmerge.tasks import batch
from jaxmerge.training import local_steps, outer_optimizers, placement
from jaxmerge.training.schedule import Plan


class State(NamedTuple):
  """The state between rounds: float32 parameters, outer and local optimiser states."""

  params: Any
  outer: Any
  local: Any


class Measured(NamedTuple):
  """The measurements of a round.

  Attributes:
    loss: [T] mean training loss over each task's steps.
    finite: [T] whether a tuned copy and the squared norm of its task vector are finite.
    merged: [] whether the model after merge and outer step is finite.
    gram: [T, T] inner products of the task vectors to the current model; None if not measured.
    conflict: limbs [2] of the number of entries with task vectors of opposite sign.
  """

  loss: Array | np.ndarray
  finite: Array | np.ndarray
  merged: Array | np.ndarray | bool
  gram: Array | None = None
  conflict: Array | None = None


class Parts(NamedTuple):
  """The parts of a round.

  Attributes:
    step: the local step.
    local: the local optimiser.
    outer: the outer optimiser, or None.
    method: merges the task vectors.
    tasks: number of tasks T.
    slots: tasks tuned in parallel, a multiple of the mesh's task axis; spare slots are idle.
    keeps_states: whether local optimiser states carry over.
    layout: matrix views of the leaves.
    mesh: the mesh.
    rules: sharding rules of weights over the mesh's model axis.
    freeze: pattern of the names of frozen leaves; "": none.
  """

  step: Any
  local: optax.GradientTransformation
  outer: optax.GradientTransformation | None
  method: Method
  tasks: int
  slots: int
  keeps_states: bool
  layout: layouts.Table
  mesh: Mesh
  rules: meshes.Rules = ()
  freeze: str = ""


def program(parts: Parts) -> Callable[..., tuple[State, Measured]]:
  """Compiles the round: (state, base, rows, plan, ready, rate) -> (state, measured).

  Learning rates, batches and hyperparameters are arguments: all rounds run one executable.
  """
  # Donate the local states only: the model may also be the reference, or the best so far.
  compiled = jax.jit(function(parts), donate_argnames=("states",) if parts.keeps_states else ())
  return lambda state, *rest: compiled(state._replace(local=()), state.local, *rest)


def function(parts: Parts) -> Callable[..., tuple[State, Measured]]:
  """Returns a round as a function (state, states, base, rows, plan, ready, rate), see `program`.

  `states` are the local optimiser states that carry over; `state.local` is empty.
  """

  def run_round(
    state: State, states: Any, base: Any, rows: batch.TaskBatch, plan: Plan, *rest: Any
  ) -> Any:
    tuned, states, loss = tune(parts, state.params, states, rows, plan)
    arguments = tuned, loss, state.params, state.outer, base, *rest
    params, outer_state, measured = merge_and_step(parts, *arguments)
    return State(params, outer_state, states), measured

  return run_round


def tune(
  parts: Parts, params: Any, states: Any, rows: batch.TaskBatch, plan: Plan
) -> tuple[Any, Any, Array]:
  """Tunes a copy of the model on each task: the first half of a round. Call it under jit.

  Returns the stack of tuned copies, their optimiser states if they carry over, and losses [T].
  """
  mesh, rules = parts.mesh, parts.rules
  spread = local_steps.copies(params, parts.slots, mesh, rules)
  states = states if parts.keeps_states else placement.states(parts.local, spread, mesh, rules)
  tuned, states, loss = local_steps.tune_all(
    parts.step, spread, states, rows, plan, mesh=mesh, rules=rules
  )
  return tuned, states if parts.keeps_states else (), loss


def merge_and_step(
  parts: Parts,
  tuned: Any,
  loss: Array,
  current: Any,
  outer_state: Any,
  base: Any,
  ready: interpreter.Ready,
  rate: Any,
) -> tuple[Any, Any, Measured]:
  """Merges, takes the outer step and measures: the second half of a round. Call it under jit.

  Returns the new parameters, the outer optimiser's state, and the measurements.
  """
  stacks = {n: v[: parts.tasks] for n, v in tree.named(tuned).items()}
  # No device holds all of a sharded matrix, so matrix methods are distributed.
  distribution = None
  if parts.rules and parts.mesh.size > 1:
    distribution = distributed_matrices.Distribution(parts.mesh)
  target = merge(parts.method, stacks, base, ready, parts.layout, distribution)
  params, outer_state = outer_optimizers.step(
    parts.outer, current, target, outer_state, rate, parts.freeze
  )
  # Sharded like the inputs, so that the next round runs the same executable.
  shardings = (
    meshes.shardings(params, parts.mesh, parts.rules),
    placement.state_shardings(parts.outer, params, parts.mesh, parts.rules),
  )
  params, outer_state = lax.with_sharding_constraint((params, outer_state), shardings)
  # Replicated, so that every process can read them.
  measured = measure(stacks, current, loss[: parts.tasks], params)
  measured = lax.with_sharding_constraint(measured, meshes.replicated(parts.mesh))
  return params, outer_state, measured


def merge(
  method: Method,
  stacks: dict[str, Array],
  base: Any,
  ready: interpreter.Ready,
  layout: layouts.Table,
  distribution: distributed_matrices.Distribution | None = None,
) -> Any:
  """Returns base + M(models - base) inside a program: stacks [T, *s] by name -> tree of [*s]."""
  references = tree.named(base)
  pieces = {n: interpreter.Slice(references[n], None, x) for n, x in stacks.items()}
  out = memory.transform(method, pieces, ready, layout, distribution)
  return tree.rebuild(
    base,
    {n: interpreter.add_to_base(n, v, references[n], references[n].dtype) for n, v in out.items()},
  )


def measure(stacks: dict[str, Array], current: Any, loss: Array, params: Any) -> Measured:
  """Measures the geometry of the task vectors, models - current, and whether all is finite."""
  start = tree.named(current)
  sums = []
  for name, x in stacks.items():
    delta = x - start[name][None]
    axes = list(range(1, delta.ndim))
    gram = lax.dot_general(delta, delta, ((axes, axes), ((), ())), precision="highest")
    meet = (delta > 0).any(0, keepdims=True) & (delta < 0).any(0, keepdims=True)
    sums.append((gram, wide_counts.count(meet)[:, 0]))
  gram, conflict = functools.reduce(
    lambda a, b: (a[0] + b[0], wide_counts.normal(a[1] + b[1])), sums
  )
  finite = finiteness.finite_models(stacks) & jnp.isfinite(jnp.diagonal(gram))
  return Measured(loss, finite, is_finite(params), gram, conflict)


def is_finite(params: Any) -> Array:
  """Returns whether a model is free of NaN and infinity."""
  return finiteness.finite_models(jax.tree.map(lambda p: p[None], params))[0]


def refuse_overflow(measured: Measured, params: Any, when: str) -> None:
  """Raises ValueError, naming the leaf, if finite copies merged to a non-finite result."""
  if bool(measured.merged):
    return
  wrong = [n for n, x in tree.named(params).items() if not bool(jnp.isfinite(x).all())]
  raise ValueError(
    f"{when}: the tuned copies of all tasks are finite, but {len(wrong)} leaves of the merged "
    f"model are not, {wrong[0]!r} the first; use a smaller outer_learning_rate, smaller weights "
    "of the method, or another method."
  )


def geometry(measured: Measured, size: int) -> dict[str, Any]:
  """Returns norms [T], cosines [T, T] and the sign conflict rate of `size` entries, as lists."""
  gram = np.asarray(measured.gram, np.float64)
  norms = np.sqrt(np.maximum(np.diag(gram), 0))
  under = np.outer(norms, norms)
  cosines = gram / np.where(under > 0, under, 1)
  high, low = (int(v) for v in np.asarray(measured.conflict))
  return {
    "norms": norms.tolist(),
    "cosines": np.clip(cosines, -1, 1).tolist(),
    "sign_conflict": ((high << wide_counts.LIMB) + low) / size,
  }
