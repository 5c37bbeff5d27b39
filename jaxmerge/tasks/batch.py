"""Stacks the rows of all tasks, padded to one size, with their heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmerge.core import tree
from jaxmerge.tasks import task as tasks

Array = jax.Array
Apply = Callable[[Any, Any, Any], Array]


class TaskBatch(NamedTuple):
  """One split of all tasks, stacked and padded to one size.

  Attributes:
    inputs: tree of [T, N, ...].
    labels: [T, N, ...].
    head: [T, features, C] or None.
    classes: int32 [T], number of classes of each task; columns after them are padding.
    filled: int32 [T], number of rows of each task; rows after them are padding.
  """

  inputs: Any
  labels: Array | np.ndarray
  head: Array | np.ndarray | None
  classes: Array | np.ndarray
  filled: Array | np.ndarray


def stack(
  task_list: Sequence[tasks.Task],
  split: str,
  *,
  num_slots: int | None = None,
  slots: range | None = None,
) -> TaskBatch:
  """Stacks one split of the tasks, padded with zeros that no step reads.

  Args:
    task_list: the tasks.
    split: name of the split.
    num_slots: number of slots T; those past the last task stay empty.
    slots: the slots to stack; all by default.

  Raises:
    ValueError: if a task lacks the split, or if two tasks differ in the structure, dtype or shape
      of their rows, or in their heads.
  """
  for t in task_list:
    if split not in t.splits():
      raise ValueError(f"task {t.name!r} has no {split} split, only {', '.join(t.splits())}.")
  parts = [t.splits()[split] for t in task_list]
  rows = max(len(p.labels) for p in parts)
  slots = slots or range(num_slots or len(parts))
  for t, part in zip(task_list[1:], parts[1:], strict=True):
    first_rows = [{"inputs": jax.tree.map(_first, p.inputs)} for p in (parts[0], part)]
    left, right = (f"a row of task {name!r}" for name in (task_list[0].name, t.name))
    tree.check_same(*first_rows, left=left, right=right)
  columns = heads(task_list)
  wide = max(t.num_classes for t in task_list)

  def stack_rows(*xs: Any) -> np.ndarray:
    parts = [pad(np.asarray(xs[k]), rows) for k in slots if k < len(xs)]
    return _stack(parts, xs[0], rows, len(slots))

  def each(values: Sequence[int], empty: int) -> np.ndarray:
    return np.array([values[k] if k < len(values) else empty for k in slots], np.int32)

  columns = [_widen(h, wide) for h in columns]
  return TaskBatch(
    jax.tree.map(stack_rows, *[p.inputs for p in parts]),
    stack_rows(*[p.labels for p in parts]),
    pad(np.stack(columns), max(slots) + 1)[slots.start : slots.stop] if columns else None,
    each([t.num_classes for t in task_list], wide),
    each([len(p.labels) for p in parts], 0),
  )


def shapes(task_list: Sequence[tasks.Task], split: str, num_slots: int) -> TaskBatch:
  """Returns the shapes of the result of `stack`; the tasks may hold shapes themselves."""
  parts = [t.splits()[split] for t in task_list]
  rows = max(p.labels.shape[0] for p in parts)

  def struct(x: Any, *shape: int) -> Any:  # It stands for an array.
    return jax.ShapeDtypeStruct((num_slots, *shape), jax.dtypes.canonicalize_dtype(x.dtype))

  def padded(x: Any) -> Any:
    return struct(x, rows, *x.shape[1:])

  head = heads(task_list)
  count: Any = jax.ShapeDtypeStruct((num_slots,), np.int32)
  return TaskBatch(
    jax.tree.map(padded, parts[0].inputs),
    padded(parts[0].labels),
    struct(head[0], *head[0].shape[:-1], max(h.shape[-1] for h in head)) if head else None,
    count,
    count,
  )


def outputs(apply: Apply, params: Any, inputs: Any, head: Any, classes: Any) -> Array:
  """Runs the model; logits of padded classes become -inf."""
  out = apply(params, inputs, head)
  if head is None:
    return out
  real = lax.broadcasted_iota(jnp.int32, out.shape, out.ndim - 1) < classes
  return jnp.where(real, out, jnp.asarray(-jnp.inf, out.dtype))


def _stack(parts: Sequence[np.ndarray], like: Any, rows: int, num_slots: int) -> np.ndarray:
  empty = np.zeros((rows, *np.shape(like)[1:]), np.asarray(like).dtype)
  return np.stack([*parts, *[empty] * (num_slots - len(parts))])


def _first(x: Any) -> np.ndarray:
  return np.asarray(x)[0]


def heads(task_list: Sequence[tasks.Task]) -> list[np.ndarray]:
  """Returns the heads of all tasks, or []; ValueError if only some have one, or sizes differ."""
  heads = [t.head for t in task_list if t.head is not None]
  if 0 < len(heads) < len(task_list):
    kinds = {t.name: "a head" if t.head is not None else "none" for t in task_list}
    raise ValueError(f"either all tasks have a head or none has, got {kinds}.")
  for t, head in zip(task_list, heads, strict=False):
    if head.shape[:-1] != heads[0].shape[:-1]:
      raise ValueError(
        f"the head of task {t.name!r} is {head.shape}, but that of {task_list[0].name!r} is "
        f"{heads[0].shape}; all but the classes must agree."
      )
  return heads


def _widen(head: np.ndarray, classes: int) -> np.ndarray:
  head = np.asarray(head)
  spare = np.zeros((*head.shape[:-1], classes - head.shape[-1]), head.dtype)
  return np.concatenate([head, spare], axis=-1)


def pad(x: np.ndarray, num_slots: int) -> np.ndarray:
  """Appends empty slots to an array with a leading task axis: [T, ...] -> [num_slots, ...]."""
  return np.concatenate([x, np.zeros((max(0, num_slots - len(x)), *x.shape[1:]), x.dtype)])
