"""Checks before training: tasks, rows, and whether the model fits them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any  # Any: parameters, inputs and what is to be checked are the user's.

import jax
import numpy as np

from jaxmerge.parallel import mesh as meshes
from jaxmerge.tasks import batch, losses
from jaxmerge.tasks import task as tasks


def check(apply: batch.Apply, params: Any, task_list: Any, loss: losses.Rowwise | Any) -> None:
  """Raises ValueError, naming task and row, for tasks that cannot be trained on.

  Nothing is computed: shapes come from `jax.eval_shape`.

  Args:
    apply: (params, inputs, head) -> outputs.
    params: tree of arrays.
    task_list: a list of tasks.
    loss: the loss; the shape of outputs is checked for `cross_entropy` only.
  """
  if not callable(loss):
    raise ValueError(
      f"loss must be a function (outputs, labels) -> [B, ...], got {loss!r}: give one, such as "
      "jaxmerge.tasks.losses.cross_entropy."
    )
  if isinstance(task_list, tasks.Task | Mapping | str) or not isinstance(task_list, Sequence):
    raise ValueError(f"tasks must be a list of jaxmerge.Task, got {type(task_list).__name__}.")
  if not task_list:
    raise ValueError("at least one task is needed, got none.")
  for k, task in enumerate(task_list):
    if not isinstance(task, tasks.Task):
      raise ValueError(f"tasks[{k}] must be a jaxmerge.Task, got {type(task).__name__}.")
  names = [t.name for t in task_list]
  if wrong := [name for name in names if not isinstance(name, str) or not name]:
    raise ValueError(f"task names must be non-empty strings, got {wrong[0]!r}.")
  if len(set(names)) != len(names):
    raise ValueError(f"task names must differ, got {names}.")
  for task in task_list:
    tasks.check(task)
  batch.heads(task_list)
  _check_outputs(apply, params, task_list, loss)


def check_arguments(mesh: Any, checkpoints: Any, **every: int) -> None:
  """Raises ValueError for an invalid mesh, checkpoint store or number of rounds."""
  for name, number in every.items():
    if number < 1:
      raise ValueError(f"{name} must be at least 1 round, got {number}.")
  if mesh is not None and not set(meshes.AXES) <= set(mesh.axis_names):
    raise ValueError(
      f"mesh must have the axes {', '.join(meshes.AXES)}, as jaxmerge.parallel.mesh.make makes it, "
      "got "
      f"{', '.join(map(str, mesh.axis_names))}."
    )
  if isinstance(checkpoints, str | os.PathLike):
    raise ValueError(
      "checkpoints must be a store, jaxmerge.io.checkpoints.store.Checkpoints(pathlib.Path("
      f"{str(checkpoints)!r})), in a `with`."
    )


def _check_outputs(
  apply: batch.Apply, params: Any, task_list: Sequence[tasks.Task], loss: losses.Rowwise
) -> None:
  """Compares the shape of the model's outputs with the labels, class by class."""
  try:
    inspect.signature(apply).bind(None, None, None)
  except TypeError as error:
    raise ValueError(
      f"apply must take (params, inputs, head), where head is None if tasks have none: {error}."
    ) from error
  except ValueError:  # A callable without an introspectable signature.
    pass
  task = max(task_list, key=lambda t: t.num_classes)
  for name in ("train", "validation"):
    if name in task.splits():
      where = f"task {task.name!r}, {name} split"
      _check_split(apply, params, where, task.splits()[name], task, loss)


def _check_split(
  apply: batch.Apply,
  params: Any,
  where: str,
  split: tasks.Split,
  task: tasks.Task,
  loss: losses.Rowwise,
) -> None:
  """Compares the outputs for the rows of a split with their labels."""
  inputs, labels, head = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(np.shape(x), jax.dtypes.canonicalize_dtype(x.dtype)),
    (split.inputs, np.asarray(split.labels), task.head),
  )
  try:
    shape = np.shape(jax.eval_shape(apply, params, inputs, head))
  except (TypeError, ValueError) as error:
    rows = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", (inputs, head))
    raise ValueError(
      f"{where}: the model does not take inputs {rows[0]} and head {rows[1]}: "
      f"{' '.join(str(error).split())}"
    ) from error
  if loss is not losses.cross_entropy:
    return
  if shape[:-1] != labels.shape or shape[-1] < task.num_classes:
    raise ValueError(
      f"{where}: the model's outputs are {list(shape)} for labels {list(labels.shape)}; cross "
      f"entropy needs logits {[*labels.shape, task.num_classes]} or more, one for each class: give "
      "the tasks a head, or the model a wider output."
    )
  if task.head is not None and shape[-1] > task.num_classes:
    raise ValueError(
      f"{where}: the model's outputs are {list(shape)}, but the head has {task.num_classes} "
      "classes: apply must return features @ head; if it uses no head, leave the tasks' heads out."
    )
