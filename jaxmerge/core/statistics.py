"""Statistics: arrays that a stage reads beside the models, such as a Fisher or a Gram matrix.

A statistic is a tree like the model; its arrays have a leading axis for the K models, then any
shape. A stage declares which statistics it reads, and their kind: "entry", [K, *s], has one value
for each entry of each model, and is cut as the models are; "leaf", [K, ...], has any shape, and
comes whole. If a leaf stacks matrices for a scan (a view with `b`), a matrix stage gets each matrix
with its statistic: there "leaf" is [K, *stacked, ...]. This module does not compute statistics.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Literal  # Any: arrays of any kind, or their shapes.

import jax.numpy as jnp

from jaxmerge import errors
from jaxmerge.core import layouts, matrix_views, sharding, stage, tree
from jaxmerge.core.stage import Stage

Kind = Literal["entry", "leaf"]
ByLeaf = dict[str, dict[str, Any]]


def kinds(method: Iterable[Stage]) -> dict[str, Kind]:
  """Returns the statistics that the stages of a method read, by name, with their kinds.

  Raises:
    ValueError: if two stages read one as different kinds, or a hyperparameter has its name.

  Example:
    >>> import jax.numpy as jnp
    >>> weighed = stage.leafwise(
    ...   lambda x, leaf: x * leaf.statistic("fisher", x), statistics={"fisher": "entry"}
    ... )
    >>> kinds(weighed)
    {'fisher': 'entry'}
  """
  every: dict[str, Kind] = {}
  method = tuple(method)
  for step in method:
    for name, kind in step.statistics.items():
      if kind not in ("entry", "leaf"):
        raise ValueError(f"statistic {name!r} is of kind {kind!r}; it must be 'entry' or 'leaf'.")
      if every.setdefault(name, kind) != kind:
        raise ValueError(f"one stage reads the statistic {name!r} by entry, another one by leaf.")
  if both := sorted(every.keys() & stage.hparams(method).keys()):
    raise ValueError(f"{both[0]!r} is a hyperparameter and a statistic of the method: rename one.")
  return every


def refuse(method: Iterable[Stage], where: str) -> None:
  """Raises ValueError for a method that reads statistics, for callers that cannot pass any."""
  if names := sorted(kinds(method)):
    raise ValueError(
      f"the method reads the statistic {names[0]!r}, which {where} cannot carry; merge arrays in "
      f"memory: jaxmerge.merge(method, models, base, statistics={{{names[0]!r}: ...}})."
    )


def by_leaf(statistics: Any) -> ByLeaf:
  """Returns statistics by name and leaf; ValueError unless it is a mapping of names to trees."""
  if statistics is not None and not isinstance(statistics, Mapping):
    kind = type(statistics).__name__
    raise ValueError(f"statistics must be trees by name, such as {{'fisher': tree}}, got {kind}.")
  return {name: tree.named(leaves) for name, leaves in (statistics or {}).items()}


def resolve(
  method: Iterable[Stage],
  statistics: Mapping[str, Mapping[str, Any]],
  shapes: Mapping[str, tuple[int, ...]],
  num_models: int,
  layout: layouts.Table,
  copied: Collection[str] = (),
) -> ByLeaf:
  """Returns the statistics of the merged leaves, checked against what the stages read.

  Args:
    method: the method.
    statistics: by name and leaf, arrays or only their shapes.
    shapes: shapes of the leaves that are merged, without the task axis.
    num_models: number of models K.
    layout: matrix views of the leaves.
    copied: names of leaves that are not merged: a statistic may have them too.

  Raises:
    ValueError: for a statistic that is unused or missing, a leaf missing from it or from the
      models, a wrong number of models, and a shape that its kind does not allow.
  """
  method = tuple(method)
  declared = kinds(method)
  for name in statistics:
    if name not in declared:
      if name in stage.hparams(method):
        raise ValueError(
          f"{name!r} is a hyperparameter of the method: give hparams={{{name!r}: ...}}."
        )
      raise ValueError(f"the method reads no statistic {name!r}{errors.nearest(name, declared)}.")
  for name in declared:
    if name not in statistics:
      raise ValueError(
        f"the method reads the statistic {name!r}: give statistics={{{name!r}: ...}}, a tree like "
        "the model."
      )
    for leaf in sorted(statistics[name].keys() - shapes.keys() - set(copied)):
      index, _, inner = leaf.partition("/")
      if index.isdecimal() and inner in shapes:
        raise ValueError(
          f"statistic {name!r} is a list with a tree for each model; stack them: "
          f"statistics={{{name!r}: jaxmerge.stack([...])}}."
        )
      raise ValueError(f"statistic {name!r} has {leaf!r}, which is no leaf of the models.")
  merged = {n: {leaf: v for leaf, v in statistics[n].items() if leaf in shapes} for n in declared}
  for name, leaves in merged.items():
    for leaf, value in leaves.items():
      _check_array(f"statistic {name!r} of leaf {leaf!r}", value, num_models)
  for step in method:
    for name, leaf in _reads(step, shapes, layout):
      if leaf not in merged[name]:
        raise ValueError(f"statistic {name!r} has no leaf {leaf!r}.")
      _check_shape(step, name, leaf, merged[name][leaf], shapes[leaf], layout.view(leaf))
  return merged


def of_leaf(statistics: Mapping[str, Mapping[str, Any]], leaf: str) -> dict[str, Any]:
  """Returns the statistics of one leaf, by name.

  Example:
    >>> of_leaf({"fisher": {"w": 1}, "gram": {"k": 2}}, "w")
    {'fisher': 1}
  """
  return {name: leaves[leaf] for name, leaves in statistics.items() if leaf in leaves}


def as_rows(step: Stage, statistics: Mapping[str, Any], view: str) -> dict[str, Any]:
  """Shows those by entry as the stage sees the models, [K, rows, columns]; others as they are."""
  return {
    n: matrix_views.rows(sharding.gather(v), view) if step.statistics[n] == "entry" else v
    for n, v in statistics.items()
  }


def by_matrix(
  step: Stage, statistics: Mapping[str, Any], view: str, shape: tuple[int, ...]
) -> dict[str, Any]:
  """Splits the statistics of a leaf into those of its matrices: [matrices, K, ...].

  Args:
    step: the stage that reads them.
    statistics: of one leaf, by name.
    view: the leaf's matrix view.
    shape: the leaf's shape, without the task axis.
  """

  def split(name: str, x: Any) -> Any:
    x = sharding.gather(x)
    if step.statistics[name] == "entry":
      return matrix_views.matrices(x, view).swapaxes(0, 1)
    stacked = matrix_views.stack_sizes(shape, view)
    rest = (math.prod(stacked), *x.shape[1 + len(stacked) :])
    return sharding.reshape(x, (x.shape[0], *rest)).swapaxes(0, 1)

  return {name: split(name, x) for name, x in statistics.items()}


def _reads(
  step: Stage, shapes: Mapping[str, Any], layout: layouts.Table
) -> Iterator[tuple[str, str]]:
  """Yields statistic and leaf, for all that a stage reads; its fallback needs none."""
  unit = layouts.Unit(step.unit, step.lookups)
  for leaf in shapes:
    acts = step.where is None or step.where(leaf)
    falls_back = callable(step.rest) and layouts.view_for(layout.view(leaf), unit) is None
    if acts and not (step.unit != "entry" and falls_back):
      yield from ((name, leaf) for name in step.statistics)


def _check_array(label: str, value: Any, num_models: int) -> None:
  shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
  if shape is None or dtype is None:
    raise ValueError(f"{label} must be an array, got {type(value).__name__}.")
  if not any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_)):
    raise ValueError(f"{label} must hold real numbers, got {dtype}.")
  if not shape or shape[0] != num_models:
    raise ValueError(
      f"{label} is {list(shape)}, but there are {num_models} models: its first axis counts them."
    )


def _check_shape(
  step: Stage, name: str, leaf: str, value: Any, shape: tuple[int, ...], view: str | None
) -> None:
  label, each = f"statistic {name!r} of leaf {leaf!r} is {list(value.shape)}", value.shape[1:]
  if step.statistics[name] == "entry" and tuple(each) != tuple(shape):
    raise ValueError(
      f"{label}, but the models are {list(shape)} there: a statistic by entry is "
      f"{[value.shape[0], *shape]}."
    )
  seen = layouts.view_for(view, layouts.Unit(step.unit, step.lookups))
  stacked = () if step.unit != "matrix" or seen is None else matrix_views.stack_sizes(shape, seen)
  if tuple(each[: len(stacked)]) != stacked:
    raise ValueError(
      f"{label}, but the leaf stacks matrices along {list(stacked)} (view {seen!r}): it must be "
      f"[{value.shape[0]}, {', '.join(map(str, stacked))}, ...], one for each matrix."
    )
