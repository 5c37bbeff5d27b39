"""The problem of an experiment: model, tasks, loss and metric, as arrays or as shapes."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple  # Any: parameters are nested dicts of arrays.

import jax
import numpy as np

from jaxmerge.core import layouts, tree
from jaxmerge.evaluation import metrics
from jaxmerge.io.disk import atomic
from jaxmerge.io.tensors import safetensors
from jaxmerge.parallel import mesh as meshes
from jaxmerge.parallel import processes
from jaxmerge.tasks import batch, losses
from jaxmerge.tasks.task import Split, Task

Struct = jax.ShapeDtypeStruct


class Problem(NamedTuple):
  """The problem that an experiment's function returns.

  Attributes:
    apply: the model, (params, inputs, head) -> outputs.
    params: the base's parameters; `jax.ShapeDtypeStruct`s for compilation only.
    tasks: the tasks, with heads.
    loss: (outputs, labels) -> [B, ...], whose mean is minimised.
    metric: how models are scored.
    layout: matrix views of the leaves.
    sharding: rules for splitting weights over the model axis; none: it is not supported.
    title: one line for the report.
    base: name of the base model, for the model card.
    license: of the base model, for the model card.
    save: (folder, params, readme) writes a model that other tools open; by default weights and
      heads go to `model.safetensors`.
  """

  apply: batch.Apply
  params: Any
  tasks: Sequence[Task]
  loss: losses.Rowwise = losses.cross_entropy
  metric: metrics.Metric = metrics.ACCURACY
  layout: layouts.Layout | None = ()
  sharding: meshes.Rules = ()
  title: str = "Tuning and merging"
  base: str = "a base model"
  license: str = "other"
  save: Callable[[pathlib.Path, Any, str], None] | None = None


def save(problem: Problem, folder: pathlib.Path, params: Any, readme: str) -> None:
  """Writes a model and its readme by `problem.save`, by default as one safetensors file."""
  if problem.save is not None:
    problem.save(folder, params, readme)
    return
  leaves = {n: np.asarray(v) for n, v in tree.named(params).items()}
  heads = {f"head/{t.name}": np.asarray(t.head) for t in problem.tasks if t.head is not None}
  with atomic.folder(folder, replace=True) as beside:
    safetensors.save(beside / "model.safetensors", leaves | heads)
    (beside / "README.md").write_text(readme, encoding="utf-8")


def share(problem: Problem) -> Problem:
  """Returns the problem with the weights and heads of the first process."""
  heads = [t.head for t in problem.tasks if t.head is not None]
  params, heads = processes.broadcast((problem.params, heads))
  if heads:
    tasks = zip(problem.tasks, heads, strict=True)
    problem = problem._replace(tasks=tuple(dataclasses.replace(t, head=h) for t, h in tasks))
  return problem._replace(params=params)


def is_abstract(problem: Problem) -> bool:
  """Returns whether a problem has shapes instead of weights."""
  return any(isinstance(x, Struct) for x in jax.tree.leaves(problem.params))


def shapes(problem: Problem) -> Problem:
  """Returns a problem with shapes instead of weights, rows and heads."""

  def structs(value: Any) -> Any:
    return jax.tree.map(lambda x: Struct(np.shape(x), x.dtype), value)

  def task_shapes(task: Task) -> Task:
    splits = {name: structs(split) for name, split in task.splits().items()}
    return dataclasses.replace(task, **splits, head=structs(task.head))

  params = jax.tree.map(lambda x: Struct(np.shape(x), np.float32), problem.params)
  return problem._replace(params=params, tasks=tuple(map(task_shapes, problem.tasks)))


def split_shapes(count: int, inputs: Any, labels: tuple[int, ...] = ()) -> Split:
  """Returns the shapes of `count` rows with these inputs and int32 labels."""
  stacked = jax.tree.map(lambda s: Struct((count, *s.shape), s.dtype), inputs)
  return Split(stacked, Struct((count, *labels), np.int32))  # type: ignore[arg-type]


def zeros(like: Any) -> Any:
  """Returns zeros of the given shapes."""
  return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)


def post_hoc(tasks: Sequence[Task]) -> tuple[Task, ...]:
  """Returns tasks for post-hoc ATM: tuned on one half of the validation rows, chosen by the other.

  The halves are drawn at random, the same for every run.
  """
  halved = []
  for t in tasks:
    rows = len(t.validation.labels)
    drawn = np.random.default_rng(tree.tag(t.name)).permutation(rows)
    halves = (np.sort(drawn[: -(-rows // 2)]), np.sort(drawn[-(-rows // 2) :]))
    train, validation = (jax.tree.map(lambda x, i=i: x[i], t.validation) for i in halves)
    halved.append(dataclasses.replace(t, train=train, validation=validation))
  return tuple(halved)
