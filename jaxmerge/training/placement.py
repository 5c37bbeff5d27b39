"""Shards the arrays of a round: rows by task, optimiser states like their weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any  # Any: parameters and states are the user's trees.

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh

from jaxmerge.parallel import mesh as meshes
from jaxmerge.tasks import batch, task


def shard_weights(apply: batch.Apply, mesh: Mesh, rules: meshes.Rules = ()) -> batch.Apply:
  """Returns a model whose weights, and so its gradients, are sharded by the rules.

  Call it inside the `shard_map` over the task axis, as local steps do. Without the constraint, the
  compiler may shard a gradient differently and reshard it in every step.
  """
  if not rules:
    return apply

  def placed(params: Any, inputs: Any, head: Any) -> Any:
    here = jax.sharding.get_abstract_mesh()
    shardings = jax.tree.map(
      lambda s: jax.sharding.NamedSharding(here, s.spec), meshes.shardings(params, mesh, rules)
    )
    return apply(lax.with_sharding_constraint(params, shardings), inputs, head)

  return placed


def rows(
  tasks: Sequence[task.Task], split: str, mesh: Mesh, *, num_slots: int | None = None
) -> batch.TaskBatch:
  """Stacks one split, sharded over the task axis; each process stacks its local slots only.

  Arguments and errors are those of `batch.stack`; without a number of slots, there are as few as
  the task axis divides.
  """
  if num_slots is None:
    side = mesh.shape["task"]
    num_slots = -(-len(tasks) // side) * side
  sharding, slots = meshes.task_sharding(mesh), meshes.local_slots(mesh, num_slots)
  stack = batch.stack(tasks, split, num_slots=num_slots, slots=slots)
  if sharding.is_fully_addressable:
    return meshes.put(stack, sharding)

  def put(x: np.ndarray) -> jax.Array:
    def shard(index: Any) -> np.ndarray:
      start, stop, _ = index[0].indices(num_slots)
      return x[start - slots.start : stop - slots.start]

    return jax.make_array_from_callback((num_slots, *x.shape[1:]), sharding, shard)

  return jax.tree.map(put, stack)


def states(
  optimizer: optax.GradientTransformation, params: Any, mesh: Mesh, rules: meshes.Rules = ()
) -> Any:
  """Initialises an optimiser per copy of a stack [T, *s], sharded like it. Call it under jit."""
  one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), params)
  shardings = state_shardings(optimizer, one, mesh, rules, stacked=True)
  return lax.with_sharding_constraint(jax.vmap(optimizer.init)(params), shardings)


def pad_states(used: Any, every: Any, shardings: Any) -> Any:
  """Extends a stack [n, *s] by the slots after the first n of a longer stack.

  Runs on the devices: the states of all tasks are many times the model, and may not fit on a host.

  Args:
    used: tree of arrays, the first n slots.
    every: tree of arrays, all slots.
    shardings: shardings of the result.

  >>> from jax.sharding import SingleDeviceSharding
  >>> where = {"m": SingleDeviceSharding(jax.devices()[0])}
  >>> pad_states({"m": jnp.ones(2)}, {"m": jnp.zeros(3)}, where)["m"].tolist()
  [1.0, 1.0, 0.0]
  """

  def one(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.concatenate([x, y[x.shape[0] :]])

  return jax.jit(lambda a, b: jax.tree.map(one, a, b), out_shardings=shardings)(used, every)


def state_shardings(
  optimizer: optax.GradientTransformation | None,
  params: Any,
  mesh: Mesh,
  rules: meshes.Rules = (),
  *,
  stacked: bool = False,
) -> Any:
  """Returns the shardings of an optimiser's state: those of the weights, else replicated.

  Args:
    optimizer: the optimiser; None has the state ().
    params: tree of the weights of one model, or of their shapes.
    mesh: the mesh.
    rules: sharding rules of the weights.
    stacked: whether the result is for a stack of states, one per task.
  """
  if optimizer is None:
    return ()
  rest = meshes.task_sharding(mesh) if stacked else meshes.replicated(mesh)
  return optax.tree_utils.tree_map_params(
    optimizer,
    lambda x, place: x if isinstance(x, optax.MaskedNode) else place,
    jax.eval_shape(optimizer.init, params),
    meshes.shardings(params, mesh, rules, stacked=stacked),
    transform_non_params=lambda _: rest,
    is_leaf=lambda x: isinstance(x, optax.MaskedNode),  # Of `optax.masked`, where it has no state.
  )
