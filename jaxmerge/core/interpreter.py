"""Resolves a method for a model's shapes, and applies a stage to a part of a leaf."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmerge.core import (
  hyperparameters,
  layouts,
  leaf_groups,
  matrix_views,
  order_statistics,
  sharding,
  stage,
  statistics,
  tree,
)
from jaxmerge.core.stage import Array, Leaf, Method, Stage
from jaxmerge.core.tree import Tree


def check_weights(models: Tree) -> None:
  """Raises ValueError, naming the leaf, for a stack that cannot be merged without a base."""
  tree.num_models(models)
  tree.refuse_complex(None, models)
  for name, leaf in tree.named(models).items():
    if tree.is_floating(leaf) or isinstance(leaf, jax.core.Tracer):
      continue
    if not tree.is_equal(leaf, leaf[:1]):
      raise ValueError(f"leaf {name!r} is {leaf.dtype} and differs between models; drop it first.")


def check_models(base: Tree, models: Tree, reference: Tree) -> None:
  """Raises ValueError, naming the leaf, where base, reference and stack do not belong together."""
  tree.num_models(models)
  one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), models)
  tree.check_same(base, one, left="the base", right="the models", dtype=False)
  tree.check_same(base, reference, left="the base", right="the reference", dtype=False)
  tree.refuse_complex(base, models)
  stacks = tree.named(models)
  for name, leaf in tree.named(base).items():
    dtype = stacks[name].dtype
    if tree.is_floating(leaf) != tree.is_floating(stacks[name]):
      raise ValueError(f"leaf {name!r} is {leaf.dtype} in the base but {dtype} in the models.")


class Ready(NamedTuple):
  """Everything resolved before a merge, as arrays: the arguments of compiled programs.

  Attributes:
    hparams: hyperparameters by name, or by name and leaf.
    tags: of the models, in the order in which they are merged.
    order: position of each model in the caller's stack; None: the order is unchanged.
    stats: for each stage, by group, what its `init` returns.
  """

  hparams: dict[str, Any]
  tags: Any
  order: Any
  stats: tuple[dict[str, Any], ...]


def prepare(
  method: Method,
  shapes: Mapping[str, tuple[int, ...]],
  num_models: int,
  hparams: Mapping[str, Any],
  names: Sequence[str] | None,
  copied: Collection[str] = (),
) -> Ready:
  """Resolves hyperparameters, orders the models by tag, and computes counts on the host.

  Args:
    method: the method that will run.
    shapes: shapes of the leaves that are merged, without the task axis.
    num_models: number of models K.
    hparams: the caller's values.
    names: names of the models, or None.
    copied: names of the leaves that are not merged.

  Raises:
    ValueError: for unknown, missing or ill-shaped hyperparameters, for names that are not K
      distinct names, and for a leaf that no combiner will touch.
  """
  order, tags = hyperparameters.order_models(names, num_models, keep=stage.ordered(method))
  values = hyperparameters.resolve(method, hparams, shapes, num_models, copied)
  if order is not None:
    values = {n: hyperparameters.permute(v, order) for n, v in values.items()}
  counts, stats = dict.fromkeys(shapes, num_models), []
  for step in method:
    first = {}
    for group, leaves in leaf_groups.members(step, shapes).items():
      most = max(counts[n] for n in leaves)
      first[group] = step.init(hyperparameters.group(leaves, shapes, most, values))
      counts.update(dict.fromkeys(leaves, 1) if step.combines else {})
    stats.append(first)
  for name, count in counts.items():
    hyperparameters.refuse_unmerged(name, count)
  return Ready(hyperparameters.arrays(values), tags, order, tuple(stats))


class Slice(NamedTuple):
  """A leaf, or a part of it, as every driver passes it to the stages.

  Attributes:
    base: the base's part [*s], or None.
    reference: what is subtracted from the models, if not the base.
    models: the stack's part [K, *s].
    statistics: by name, [K, *s] as the models or [K, ...] whole, as the method declares.
    leaf: the `Leaf` that stages receive with it; None until the driver describes it.
    offsets: for each stage, entries of the leaves before this one in its group.
  """

  base: Any
  reference: Any
  models: Any
  statistics: Mapping[str, Any] = {}
  leaf: Any = None
  offsets: tuple[Any, ...] = ()


class Part(NamedTuple):
  """A slice between two stages.

  Attributes:
    x: the stack; inside a `join`, the inner stack.
    leaf: the `Leaf` that the next stage receives.
    statistics: statistics of all stages.
    pending: stacks that `join` saved, last in, first out.
  """

  x: Array
  leaf: Leaf
  statistics: Mapping[str, Any] = {}
  pending: tuple[Array, ...] = ()


def begin(piece: Slice, least: Any = np.float32, *, subtracted: bool = False) -> Part:
  """Returns the task vectors of a slice, or its weights if there is no base.

  Args:
    piece: the slice, its leaf described.
    least: the narrowest dtype to compute in.
    subtracted: the models are task vectors already.
  """
  base = piece.base if piece.reference is None else piece.reference
  x = task_vectors(piece.models, None if subtracted else base, least)
  return Part(x, piece.leaf._replace(base=base), piece.statistics)


def observe(step: Stage, part: Part) -> tuple[Any, Leaf]:
  """Returns the input of a stage's reductions: the stack (for `join`, the pair) and the leaf."""
  x = (part.pending[-1], part.x) if step.keep == "pop" else part.x
  return x, _leaf_for(step, part)


def apply(step: Stage, part: Part, stats: Any, view: str | None) -> Part:
  """Applies one stage to a part, which has the leaf's axes or, for elementwise stages, is flat.

  Args:
    step: the stage.
    part: output of the stages before it.
    stats: results of the reductions of the leaf's group.
    view: the leaf's matrix view.
  """
  if step.keep == "push":
    return part._replace(pending=(*part.pending, part.x))
  x, leaf = observe(step, part)
  if step.keep == "pop":
    return part._replace(x=step.update(x, leaf, stats), pending=part.pending[:-1])
  y = _update(step, x, leaf, stats, view=view)
  models_left = 1 if step.combines else x.shape[0]
  if y.shape[0] != models_left:
    raise ValueError(
      f"a stage returned a stack of {y.shape[0]} models for one of {x.shape[0]}; a combiner must "
      "leave one and say combines=True, other stages keep the number."
    )
  return part._replace(x=y)


def _leaf_for(step: Stage, part: Part) -> Leaf:
  """Returns the leaf with only the statistics that the stage declares."""
  declared = {n: v for n, v in part.statistics.items() if n in step.statistics}
  return part.leaf._replace(statistics=declared)


# A separate program: leaves of one shape are traced, rewritten and batched once.
@functools.partial(jax.jit, static_argnames=("step", "view"))
def _update(step: Stage, x: Array, leaf: Leaf, stats: Any, *, view: str | None) -> Array:
  if not x.size:  # No rows, or empty rows.
    return x[:1] if step.combines else x
  if step.unit == "entry":
    return step.update(x, leaf, stats)
  view = layouts.view_for(view, layouts.Unit(step.unit, step.lookups))
  if view is None:
    if step.rest is None:
      raise ValueError("a leaf has no matrix view; declare it in `layout` or mask the method.")
    if step.rest != "row":
      places = None if leaf.places is None else leaf.places.reshape(1, *x.shape[1:])
      return step.rest(x, leaf._replace(places=places), stats)
  view = matrix_views.or_row(x, view)
  if step.unit == "matrix":
    return _by_matrix(step, x, leaf, stats, view)
  return _by_row(step, x, leaf, stats, view)


def _by_matrix(step: Stage, x: Array, leaf: Leaf, stats: Any, view: str) -> Array:
  def update(x: Array, base: Array | None, each: Any) -> Array:
    return step.update(x, leaf._replace(base=base, places=None, statistics=each), stats)

  each = statistics.by_matrix(step, leaf.statistics, view, x.shape[1:])
  return matrix_views.by_matrix(update, x, leaf.base, view, each)


def _by_row(step: Stage, x: Array, leaf: Leaf, stats: Any, view: str) -> Array:
  rows = matrix_views.rows(sharding.gather(x), view)
  base = None if leaf.base is None else matrix_views.rows(sharding.gather(leaf.base[None]), view)[0]
  if step.ranked and "ranks" not in stats:
    stats = {**stats, "ranks": order_statistics.ranks(rows)}
  places = None if leaf.places is None else leaf.places.reshape(1, *rows.shape[1:])
  each = statistics.as_rows(step, leaf.statistics, view)
  y = step.update(rows, leaf._replace(base=base, places=places, statistics=each), stats)
  return matrix_views.from_rows(y, view, x.shape[1:])


def leaf_of(name: str, ready: Ready) -> Leaf:
  """Describes a whole leaf to a stage."""
  return Leaf(
    base=None,
    hparams={n: v[name] if isinstance(v, dict) else v for n, v in ready.hparams.items()},
    models=ready.tags,
    tag=np.uint32(tree.tag(name)),
    start=np.uint32(0),
    offset=np.uint32(0),
  )


def task_vectors(x: Array, reference: Array | None, least: Any = np.float32) -> Array:
  """Returns models - reference, [K, *s], in the compute dtype, at least as wide as `least`."""
  if reference is None:
    return x.astype(tree.compute_dtype(least, x.dtype))
  # Upcast before subtracting: bfloat16 loses the low bits of a small task vector.
  dtype = tree.compute_dtype(least, x.dtype, reference.dtype)
  return x.astype(dtype) - reference.astype(dtype)[None]


def add_to_base(name: str, merged: Array, base: Array | None, dtype: Any) -> Array:
  """Adds a merged task vector [1, *s] to the base, and casts: [1, *s] -> [*s].

  Raises:
    ValueError: if more than one model is left.
  """
  hyperparameters.refuse_unmerged(name, merged.shape[0])
  return store(merged, base, dtype)[0]


def store(merged: Array, base: Array | None, dtype: Any) -> Array:
  """Adds task vectors [M, *s] to the base, and casts: the one place that does."""
  if base is None:
    return merged.astype(dtype)
  wide = tree.compute_dtype(merged.dtype, base.dtype)
  return (base.astype(wide)[None] + merged.astype(wide)).astype(dtype)
