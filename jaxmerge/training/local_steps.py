"""Local tuning: all tasks in parallel, without collectives across tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any  # Any: parameters, inputs and heads are the user's trees.

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxmerge.core import running_statistics, tree
from jaxmerge.parallel import mesh as meshes
from jaxmerge.tasks import batch, losses
from jaxmerge.training import optimizers
from jaxmerge.training.schedule import Plan
from jaxmerge.training.settings import Settings

Array = jax.Array


def master_weights(params: Any) -> Any:
  """Returns the parameters as master weights, float32 or wider.

  Raises:
    ValueError: naming the leaf, if one is not floating point, has NaN or infinity, or is a running
      variance below zero.
  """
  tree.refuse_optimizers(params, "the model to start from")
  leaves = tree.named(params)
  if not leaves:
    raise ValueError("the model to start from has no parameters.")
  variances = running_statistics.variances(leaves)
  for name, leaf in leaves.items():
    if not hasattr(leaf, "dtype"):
      kind = type(leaf).__name__
      raise ValueError(f"leaf {name!r} of the model to start from is a {kind}; give arrays.")
    if not tree.is_floating(leaf):
      raise ValueError(f"leaf {name!r} is {np.asarray(leaf).dtype}; only floating point is tuned.")
    if not bool(jnp.isfinite(leaf).all()):
      raise ValueError(f"leaf {name!r} of the model to start from has NaN or infinity.")
    if name in variances and bool((jnp.asarray(leaf) < 0).any()):
      raise ValueError(f"leaf {name!r} of the model to start from is a variance below zero.")
  return jax.tree.map(lambda p: jnp.asarray(p, tree.compute_dtype(jnp.asarray(p).dtype)), params)


def step(
  apply: batch.Apply, loss: losses.Rowwise, settings: Settings, optimizer: optimizers.Optimizer
) -> Callable[..., tuple[Any, Any, Array]]:
  """Returns the local step: (params, state, batch, rate, mixed=False) -> (params, state, loss).

  A batch is (inputs, labels, head, classes). With `mixed`, each has a leading task axis over which
  gradients are averaged. Frozen leaves and running statistics are unchanged, bit for bit.
  """

  def objective(params: Any, inputs: Any, labels: Array, head: Any, classes: Array) -> Array:
    params, head = cast((params, head), settings.compute_dtype)
    out = batch.outputs(apply, params, inputs, head, classes)
    return loss(out.astype(tree.compute_dtype(out.dtype)), labels).mean()

  def take(params: Any, state: Any, value: Array, grads: Any, rate: Array) -> Any:
    params, state = optimizers.take(optimizer, params, grads, state, rate, settings.freeze)
    return params, state, value.astype(jnp.float32)

  def single(params: Any, state: Any, batch: Any, rate: Array) -> Any:
    value, grads = jax.value_and_grad(objective)(params, *batch)
    return take(params, state, value, grads, rate)

  def several(params: Any, state: Any, batches: Any, rate: Array) -> Any:
    def add(total: Any, batch: Any) -> Any:
      value, grads = jax.value_and_grad(objective)(params, *batch)
      return jax.tree.map(jnp.add, total, (value.astype(jnp.float32), grads)), None

    zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
    summed, _ = lax.scan(add, zero, batches)
    n = jax.tree.leaves(batches)[0].shape[0]
    value, grads = jax.tree.map(lambda x: x / n, summed)
    return take(params, state, value, grads, rate)

  return lambda params, state, batch, rate, mixed=False: (several if mixed else single)(
    params, state, batch, rate
  )


def cast(value: Any, dtype: str) -> Any:
  """Casts a tree to the compute dtype; "float32" leaves wider leaves unchanged."""
  if dtype == "float32":
    return jax.tree.map(lambda x: x.astype(tree.compute_dtype(x.dtype)), value)
  return jax.tree.map(lambda x: x.astype(dtype), value)


def tune_one(
  step_: Any,
  params: Any,
  state: Any,
  rows: batch.TaskBatch,
  plan: Plan,
  share: Callable[[Any], Any] = lambda batch: batch,
) -> tuple[Any, Any, Array]:
  """Takes the planned steps of one task, without the padding after them.

  `share` shards the rows of a batch, (inputs, labels). Returns parameters, optimiser state, and the
  mean loss of the steps.
  """

  def body(s: Any, carry: Any) -> Any:
    params, state, total = carry
    index = plan.rows[s]
    batch = share(jax.tree.map(lambda x: x[index], (rows.inputs, rows.labels)))
    batch = (*batch, rows.head, rows.classes)
    params, state, value = step_(params, state, batch, plan.learning_rate[s])
    return params, state, total + value

  # A fori_loop with a dynamic bound: a scan with a condition would copy all weights in every step.
  plan = jax.tree.map(jnp.asarray, plan)
  params, state, total = lax.fori_loop(0, plan.steps, body, (params, state, jnp.float32(0)))
  return params, state, total / jnp.maximum(plan.steps, 1).astype(jnp.float32)


def tune_all(
  step_: Any,
  params: Any,
  states: Any,
  rows: batch.TaskBatch,
  plan: Plan,
  *,
  mesh: Mesh,
  rules: meshes.Rules = (),
) -> tuple[Any, Any, Array]:
  """Tunes stacked copies [T, *s], each on its task, in parallel over the task axis of the mesh.

  A device runs its tasks in sequence, so each copy is bitwise equal to one tuned alone. There is no
  communication over the task axis. The rows of a batch are sharded over the data axis, over which
  gradients are summed. The weights of a copy are sharded over the model axis by the rules.

  Raises:
    ValueError: if the data axis does not divide the batch, if a rule does not fit a leaf, or if the
      mesh has a model axis and there are no rules.
  """
  one_model = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), params)
  shardings = meshes.shardings(one_model, mesh, rules)
  shares, size = mesh.shape["data"], plan.rows.shape[-1]
  if size % shares:
    raise ValueError(f"batch_size {size} must be a multiple of the mesh's data axis, {shares}.")

  def share(batch: Any) -> Any:
    if shares == 1:
      return batch
    by_row = jax.sharding.NamedSharding(jax.sharding.get_abstract_mesh(), P("data"))
    return lax.with_sharding_constraint(batch, by_row)

  def sharded_step(params: Any, states: Any, *rest: Any) -> Any:
    params, states, value = step_(params, states, *rest)
    here = jax.sharding.get_abstract_mesh()
    inner = jax.tree.map(lambda s: jax.sharding.NamedSharding(here, s.spec), shardings)
    return lax.with_sharding_constraint(params, inner), states, value

  def one(task: Any) -> Any:
    params, states, rows, plan = task
    # The loop carries sharded weights from step to step; XLA shards the states like them.
    return tune_one(sharded_step if rules else step_, params, states, rows, plan, share)

  tune = jax.shard_map(
    lambda *stacks: lax.map(one, stacks),
    mesh=mesh,
    in_specs=P("task"),
    out_specs=P("task"),
    axis_names={"task"},
    check_vma=False,
  )
  return tune(params, states, rows, plan)


def copies(params: Any, num_slots: int, mesh: Mesh, rules: meshes.Rules = ()) -> Any:
  """Stacks equal copies of a model over the task axis: [*s] -> [T, *s]. Call it under jit."""
  spread = jax.tree.map(lambda p: jnp.broadcast_to(p[None], (num_slots, *p.shape)), params)
  return lax.with_sharding_constraint(spread, meshes.shardings(params, mesh, rules, stacked=True))


def refuse_divergence(
  names: Sequence[str], losses: Any, finite: Any, settings: Settings, *, when: str
) -> None:
  """Raises ValueError, naming the task, for a loss or a tuned copy that is not finite."""
  for name, value, fine in zip(names, *meshes.fetch((losses, finite)), strict=True):
    if not (np.isfinite(value) and fine):
      named = isinstance(settings.optimizer, str)
      raise ValueError(
        f"{name!r} diverged in {when}: loss {float(value)}, parameters "
        f"{'finite' if fine else 'not finite or huge'}; lower "
        + (f"learning_rate ({settings.learning_rate:g})." if named else "the optimizer's rate.")
      )
