"""Rows of all tasks as one batch: padded to one size, stacked, with their heads."""

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


class Rows(NamedTuple):
  """One split of all tasks, stacked and padded: what the device holds.

  Attributes:
    inputs: tree of [T, N, ...].
    labels: [T, N, ...].
    head: [T, features, C] or None.
    classes: int32 [T], columns of the head that are real.
    filled: int32 [T], rows that are real.
  """

  inputs: Any
  labels: Array | np.ndarray
  head: Array | np.ndarray | None
  classes: Array | np.ndarray
  filled: Array | np.ndarray


def stacked(
  given: Sequence[tasks.Task],
  split: str,
  *,
  height: int | None = None,
  slots: range | None = None,
) -> Rows:
  """Stacks one split of the tasks; shorter ones are padded with zeros, which no step reads.

  Args:
    given: the tasks.
    split: name of the split.
    height: number of slots T; those past the last task stay empty.
    slots: those of them that are stacked; all by default.

  Raises:
    ValueError: if the rows of two tasks differ in structure, dtype or shape, or their heads in kind
      or number of features, naming both; or if a task has no such split.
  """
  for t in given:
    if split not in t.splits():
      raise ValueError(f"task {t.name!r} has no {split} split, only {', '.join(t.splits())}.")
  parts = [t.splits()[split] for t in given]
  rows = max(len(p.labels) for p in parts)
  slots = slots or range(height or len(parts))
  for t, part in zip(given[1:], parts[1:], strict=True):
    rowed = [{"inputs": jax.tree.map(_first, p.inputs)} for p in (parts[0], part)]
    left, right = (f"a row of task {name!r}" for name in (given[0].name, t.name))
    tree.check_same(*rowed, left=left, right=right)
  own = heads(given)
  wide = max(t.num_classes for t in given)

  def pile(*xs: Any) -> np.ndarray:
    parts = [pile_up(np.asarray(xs[k]), rows) for k in slots if k < len(xs)]
    return _pile(parts, xs[0], rows, len(slots))

  def each(values: Sequence[int], empty: int) -> np.ndarray:
    return np.array([values[k] if k < len(values) else empty for k in slots], np.int32)

  own = [_widened(h, wide) for h in own]
  return Rows(
    jax.tree.map(pile, *[p.inputs for p in parts]),
    pile(*[p.labels for p in parts]),
    pile_up(np.stack(own), max(slots) + 1)[slots.start : slots.stop] if own else None,
    each([t.num_classes for t in given], wide),
    each([len(p.labels) for p in parts], 0),
  )


def shapes(given: Sequence[tasks.Task], split: str, num_slots: int) -> Rows:
  """Returns the shapes of what `stacked` makes of tasks, which may be shapes themselves."""
  parts = [t.splits()[split] for t in given]
  rows = max(p.labels.shape[0] for p in parts)

  def struct(x: Any, *shape: int) -> Any:  # It stands for an array.
    return jax.ShapeDtypeStruct((num_slots, *shape), jax.dtypes.canonicalize_dtype(x.dtype))

  def padded(x: Any) -> Any:
    return struct(x, rows, *x.shape[1:])

  head = heads(given)
  count: Any = jax.ShapeDtypeStruct((num_slots,), np.int32)
  return Rows(
    jax.tree.map(padded, parts[0].inputs),
    padded(parts[0].labels),
    struct(head[0], *head[0].shape[:-1], max(h.shape[-1] for h in head)) if head else None,
    count,
    count,
  )


def outputs(apply: Apply, params: Any, inputs: Any, head: Any, classes: Any) -> Array:
  """Runs the model; logits of classes that the task does not have become -inf."""
  out = apply(params, inputs, head)
  if head is None:
    return out
  real = lax.broadcasted_iota(jnp.int32, out.shape, out.ndim - 1) < classes
  return jnp.where(real, out, jnp.asarray(-jnp.inf, out.dtype))


def _pile(parts: Sequence[np.ndarray], like: Any, rows: int, height: int) -> np.ndarray:
  empty = np.zeros((rows, *np.shape(like)[1:]), np.asarray(like).dtype)
  return np.stack([*parts, *[empty] * (height - len(parts))])


def _first(x: Any) -> np.ndarray:
  return np.asarray(x)[0]


def heads(given: Sequence[tasks.Task]) -> list[np.ndarray]:
  """Returns the heads of all tasks, or none; ValueError where some have one, or sizes differ."""
  heads = [t.head for t in given if t.head is not None]
  if 0 < len(heads) < len(given):
    own = {t.name: "a head" if t.head is not None else "none" for t in given}
    raise ValueError(f"either all tasks have a head or none has, got {own}.")
  for t, head in zip(given, heads, strict=False):
    if head.shape[:-1] != heads[0].shape[:-1]:
      raise ValueError(
        f"the head of task {t.name!r} is {head.shape}, but that of {given[0].name!r} is "
        f"{heads[0].shape}; all but the classes must agree."
      )
  return heads


def _widened(head: np.ndarray, classes: int) -> np.ndarray:
  head = np.asarray(head)
  spare = np.zeros((*head.shape[:-1], classes - head.shape[-1]), head.dtype)
  return np.concatenate([head, spare], axis=-1)


def pile_up(x: np.ndarray, height: int) -> np.ndarray:
  """Appends empty slots to an array with a leading task axis: [T, ...] -> [height, ...]."""
  return np.concatenate([x, np.zeros((max(0, height - len(x)), *x.shape[1:]), x.dtype)])
