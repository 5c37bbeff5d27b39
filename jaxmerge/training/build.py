"""Builds the loop: its programs and what they take, as arrays to run or as shapes to compile."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple  # Any: parameters and states are the user's trees.

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding

from jaxmerge.core import interpreter, layouts, stage, tree
from jaxmerge.core.stage import Method
from jaxmerge.methods import averages
from jaxmerge.parallel import mesh as meshes
from jaxmerge.tasks import batch, losses
from jaxmerge.tasks.task import Task
from jaxmerge.training import local_steps, optimizers, outer_optimizers, placement, schedule
from jaxmerge.training import round as rounds
from jaxmerge.training.settings import Settings


class Spec(NamedTuple):
  """What is tuned and merged, how, and on which devices.

  Attributes:
    apply: the model, (params, inputs, head) -> outputs.
    tasks: the tasks.
    method: how task vectors are merged.
    settings: how long and how.
    mesh: the mesh.
    loss: (outputs, labels) -> [B, ...].
    hparams: hyperparameters of the method.
    layout: matrix views of the leaves.
    rules: how the weights of a model are sharded over the mesh's model axis.
  """

  apply: batch.Apply
  tasks: Sequence[Task]
  method: Method
  settings: Settings
  mesh: Mesh
  loss: losses.Rowwise = losses.cross_entropy
  hparams: Mapping[str, Any] = {}
  layout: layouts.Layout | None = ()
  rules: meshes.Rules = ()


class Loop(NamedTuple):
  """A loop that is ready to run, or to be compiled.

  Attributes:
    spec: with the tasks in the order of the stacks.
    parts: what a round is made of.
    waves: rounds of tasks in turn have several waves of `parts.slots` tasks.
    counts: training rows of each task.
    base: parameters to start from, on the devices.
    rows: training rows of all tasks; host arrays where there are several waves.
    ready: hyperparameters and tags of the merge.
    put: (tree, shardings) -> arrays on the devices, or their shapes.
    abstract: whether all arrays are shapes.
  """

  spec: Spec
  parts: rounds.Parts
  waves: int
  counts: tuple[int, ...]
  base: Any
  rows: batch.TaskBatch
  ready: interpreter.Ready
  put: Callable[[Any, Any], Any]
  abstract: bool

  @property
  def names(self) -> list[str]:
    """Names of the tasks, in the order of the stacks."""
    return [t.name for t in self.spec.tasks]

  @property
  def total_slots(self) -> int:
    """Slots of all waves together: the length of the stacks."""
    return self.parts.slots * self.waves


def build(spec: Spec, params: Any, *, abstract: bool = False) -> Loop:
  """Builds the loop from a model and tasks, of arrays or, to be compiled alone, of shapes.

  Args:
    spec: what is tuned and merged; checked before, see `checks`.
    params: the model to start from, float32.
    abstract: tasks and parameters are `jax.ShapeDtypeStruct`s; nothing is computed.
  """
  put = put_shapes if abstract else meshes.put
  settings, mesh, rules = spec.settings, spec.mesh, spec.rules
  in_callers_order = [t.name for t in spec.tasks]
  spec = _settle(spec)
  tasks, method = spec.tasks, spec.method
  shapes = {n: v.shape for n, v in tree.named(params).items()}
  local = optimizers.local(settings, params)
  step = local_steps.step(
    placement.shard_weights(spec.apply, mesh, rules), spec.loss, settings, local
  )
  slots, waves = _slots(len(tasks), settings.at_once, mesh.shape["task"])
  parts = rounds.Parts(
    step,
    local,
    outer_optimizers.optimizer(settings, params),
    averages.with_moments(method, shapes),
    len(tasks),
    slots,
    settings.local_state == "kept",
    layouts.resolve(method, shapes, spec.layout),
    mesh,
    rules,
    settings.freeze,
  )
  # Hyperparameters per model are in the caller's order, the stacks of the loop in that of the tags.
  ready = interpreter.prepare(parts.method, shapes, len(tasks), spec.hparams, in_callers_order)
  return Loop(
    spec,
    parts,
    waves,
    tuple(t.train.labels.shape[0] for t in tasks),
    put(params, meshes.shardings(params, mesh, rules)),
    _rows(tasks, mesh, slots * waves, abstract=abstract, on_host=waves > 1),
    ready._replace(order=None),
    put,
    abstract,
  )


def start(loop: Loop) -> rounds.State:
  """Returns the state before the first round."""
  parts, mesh, rules = loop.parts, loop.parts.mesh, loop.parts.rules

  def local_states(params: Any) -> Any:
    copies = local_steps.copies(params, loop.total_slots, mesh, rules)
    return placement.states(parts.local, copies, mesh, rules)

  outer_state: Any = ()
  if parts.outer is not None:
    init = parts.outer.init
    outer_state = jax.eval_shape(init, loop.base) if loop.abstract else init(loop.base)
  # Placed as a round returns it, so that all rounds run one executable.
  outer_state = loop.put(
    outer_state, placement.state_shardings(parts.outer, loop.base, mesh, rules)
  )
  states: Any = ()
  if parts.keeps_states and loop.abstract:
    states = jax.eval_shape(local_states, loop.base)
    states = loop.put(
      states, placement.state_shardings(parts.local, loop.base, mesh, rules, stacked=True)
    )
  elif parts.keeps_states:
    states = jax.jit(local_states)(loop.base)
  return rounds.State(loop.base, outer_state, states if loop.waves == 1 else meshes.fetch(states))


def arguments(loop: Loop, k: int) -> tuple[schedule.Plan, interpreter.Ready, Any]:
  """Returns what round k (from 0) takes beside state, reference and rows: plan, ready and rate."""
  settings, mesh = loop.spec.settings, loop.parts.mesh
  plan = schedule.plan(loop.names, loop.counts, settings, k, rounds=settings.rounds)
  plan = schedule.Plan(*(batch.pad(x, loop.total_slots) for x in plan))
  ready = loop.ready
  if "seed" in stage.hparams(loop.spec.method):
    ready = ready._replace(hparams=dict(ready.hparams, seed=seed(settings.seed, k)))
  factor = schedule.factor(settings.outer_schedule, k, settings.rounds)
  rate = np.float32(settings.outer_learning_rate * factor)
  if loop.waves == 1:
    plan = loop.put(plan, meshes.task_sharding(mesh))
    ready, rate = loop.put((ready, rate), meshes.replicated(mesh))
  return plan, ready, rate


def seed(seed: int, k: int) -> np.uint32:
  """Returns the seed of random masks in round k (from 0)."""
  return np.uint32((seed * 0x9E3779B1 + k * 0x85EBCA77) % 2**32)


def put_shapes(value: Any, where: Any) -> Any:
  """Returns the shapes of a tree with their shardings: one for all, or a like tree of them."""

  def struct(x: Any, sharding: Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x), sharding=sharding)

  if isinstance(where, Sharding):
    return jax.tree.map(lambda x: struct(x, where), value)
  return jax.tree.map(struct, value, where)


def _settle(spec: Spec) -> Spec:
  """Returns a spec with the tasks in the order of the stacks, and with a seed if one is used."""
  # In the order of the tags, so that the caller's order never matters but where it must.
  tasks = list(spec.tasks)
  if not stage.ordered(spec.method):
    tasks.sort(key=lambda t: tree.tag(t.name))
  seeded = {"seed": 0} if "seed" in stage.hparams(spec.method) else {}
  return spec._replace(tasks=tasks, hparams={**spec.hparams, **seeded})


def _slots(num_tasks: int, at_once: int, side: int) -> tuple[int, int]:
  """Returns the number of slots of a wave, a multiple of the mesh's task axis, and of waves.

  >>> _slots(8, 0, 3), _slots(8, 3, 2)
  ((9, 1), (4, 2))
  """
  slots = -(-min(at_once or num_tasks, num_tasks) // side) * side
  return slots, -(-num_tasks // slots)


def _rows(
  tasks: Sequence[Task], mesh: Mesh, num_slots: int, *, abstract: bool, on_host: bool
) -> batch.TaskBatch:
  """Returns the training rows of all tasks, on the devices, on the host, or as shapes."""
  if abstract:
    return put_shapes(batch.shapes(tasks, "train", num_slots), meshes.task_sharding(mesh))
  if on_host:
    return batch.stack(tasks, "train", num_slots=num_slots)
  return placement.rows(tasks, "train", mesh, num_slots=num_slots)
