"""A task: three splits of labelled rows and a frozen head."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple  # Any: inputs are trees; a head may be its shape.

import jax
import numpy as np

from jaxmerge.errors import suggest_keywords


class Split(NamedTuple):
  """Labelled rows of one task.

  `inputs` is an array [rows, ...] or a tree of such arrays (`Any`: the user's model defines it);
  `labels` is an integer array [rows].
  """

  inputs: Any
  labels: np.ndarray


@suggest_keywords
@dataclasses.dataclass(frozen=True, eq=False)
class Task:
  """One task: training, validation and test rows, and a frozen head.

  Attributes:
    name: unique among the tasks of a run; seeds the task's random streams.
    train: training rows.
    validation: rows that select scales, settings and the best round.
    test: rows that are read once, at the end; None: no test split.
    head: frozen array [features, classes], passed to the model with every batch; None if the model
      needs none. Heads with fewer classes than the widest are padded, and the padding is masked. A
      task for compilation only may hold shapes, here and in its splits.
    classes: names of the classes, in the order of the labels.
    family: group of similar tasks, which reports also average as one task. Empty: a group of one.
  """

  name: str
  train: Split
  validation: Split
  test: Split | None = None
  head: Any = None
  classes: tuple[str, ...] = ()
  family: str = ""

  @property
  def num_classes(self) -> int:
    """Number of classes: from the head, else from the names, else from the labels."""
    if self.head is not None:
      return self.head.shape[-1]
    if self.classes:
      return len(self.classes)
    return int(max(s.labels.max() for s in self.splits().values())) + 1

  def splits(self) -> dict[str, Split]:
    """The splits that the task has, by name."""
    named = {"train": self.train, "validation": self.validation, "test": self.test}
    return {k: v for k, v in named.items() if v is not None}


def check(task: Task) -> None:
  """Raises ValueError, naming task, split and row, for data that cannot be trained on."""
  for name, split in task.splits().items():
    if not isinstance(split, Split):
      raise ValueError(
        f"task {task.name!r}, {name} split: must be a jaxmerge.Split(inputs, labels), "
        f"got {type(split).__name__}."
      )
    if not hasattr(split.labels, "dtype"):
      kind = type(split.labels).__name__
      raise ValueError(
        f"task {task.name!r}, {name} split: labels must be an array of integers [rows], got {kind}."
      )
  for name, split in task.splits().items():
    where = f"task {task.name!r}, {name} split"
    labels = np.asarray(split.labels)
    if labels.size == 0:
      raise ValueError(f"{where}: no rows; at least one is needed.")
    if labels.ndim < 1 or labels.dtype.kind not in "iu":
      raise ValueError(
        f"{where}: labels must be integers [rows], got {labels.dtype} {labels.shape}."
      )
    wrong = np.argwhere((labels < 0) | (labels >= task.num_classes))
    if wrong.size:
      at = tuple(wrong[0])
      raise ValueError(
        f"{where}, row {at[0]}: label {labels[at]} is out of range; "
        f"{task.num_classes} classes allow 0 to {task.num_classes - 1}."
      )
    for path, leaf in jax.tree_util.tree_leaves_with_path(split.inputs):
      x = np.asarray(leaf)
      part = f"{where}, inputs{jax.tree_util.keystr(path)}"
      if not hasattr(leaf, "shape"):
        raise ValueError(f"{part} is a {type(leaf).__name__}; convert it with np.asarray.")
      if x.shape[:1] != labels.shape[:1]:
        raise ValueError(
          f"{part}: {x.shape[0] if x.ndim else 0} rows, but {labels.shape[0]} labels."
        )
      if x.dtype.kind == "f" and not np.isfinite(x).all():
        row = int(np.argwhere(~np.isfinite(x))[0][0])
        raise ValueError(f"{part}, row {row}: NaN or infinity; remove or repair the row.")
  if task.head is not None and not np.isfinite(task.head).all():
    raise ValueError(f"task {task.name!r}: the head has NaN or infinity.")
