"""Resolves a method for given shapes, and applies a stage to a part of a leaf."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmerge.core import (
  hyperparameters,
  layouts,
  matrix_views,
  order_statistics,
  sharding,
  stage,
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
  """Numbers, tags and first knowledge of a merge: arrays, hence arguments of compiled programs."""

  hparams: dict[str, Any]
  tags: Any
  order: Any
  known: tuple[dict[str, Any], ...]


def prepare(
  method: Method,
  shapes: Mapping[str, tuple[int, ...]],
  num_models: int,
  hparams: Mapping[str, Any],
  names: Sequence[str] | None,
  copied: Collection[str] = (),
) -> Ready:
  """Resolves numbers, orders the models by tag, and computes counts on the host.

  Args:
    method: the method that will run.
    shapes: shapes of the leaves that are merged, without the task axis.
    num_models: number of models K.
    hparams: numbers given by the caller.
    names: names of the models, or None.
    copied: names of the leaves that are not merged.

  Raises:
    ValueError: for unknown, missing or ill-shaped numbers, for names that are not K different ones,
      and for a leaf that no combiner will touch.
  """
  order, tags = hyperparameters.ordered(names, num_models, keep=stage.ordered(method))
  values = hyperparameters.resolved(method, hparams, shapes, num_models, copied)
  if order is not None:
    values = {n: hyperparameters.permuted(v, order) for n, v in values.items()}
  counts, known = dict.fromkeys(shapes, num_models), []
  for step in method:
    first = {}
    for group, found in stage.members(step, shapes).items():
      at = max(counts[n] for n in found)
      first[group] = step.init(hyperparameters.group(found, shapes, at, values))
      counts.update(dict.fromkeys(found, 1) if step.combines else {})
    known.append(first)
  for name, left in counts.items():
    hyperparameters.refuse_unmerged(name, left)
  return Ready(hyperparameters.arrays(values), tags, order, tuple(known))


def update(
  step: Stage, x: Array, leaf: Leaf, known: Any, kept: list[Array], view: str | None
) -> Array:
  """Applies one stage to one part of a leaf; `kept` is what `join` holds for it."""
  if step.keep == "push":
    kept.append(x)
    return x
  if step.keep == "pop":
    return step.update((kept.pop(), x), leaf, known)
  y = _updated(step, x, leaf, known, view)
  models_left = 1 if step.combines else x.shape[0]
  if y.shape[0] != models_left:
    raise ValueError(
      f"a stage returned a stack of {y.shape[0]} models for one of {x.shape[0]}; a combiner must "
      "leave one and say combines=True, other stages keep the number."
    )
  return y


def seen(step: Stage, x: Any, kept: list[Array]) -> Any:
  """Returns what a stage measures: x, or the pair of x and what `join` holds."""
  return (kept[-1], x) if step.keep == "pop" else x


def _updated(step: Stage, x: Array, leaf: Leaf, known: Any, view: str | None) -> Array:
  if not x.size:  # There are no rows, or no entries in them.
    return x[:1] if step.combines else x
  if step.unit == "entry":
    return step.update(x, leaf, known)
  view = layouts.seen(view, layouts.Unit(step.unit, step.lookups))
  if view is None:
    if step.rest is None:
      raise ValueError("a leaf has no matrix view; declare it in `layout` or mask the method.")
    if step.rest != "row":
      own = None if leaf.places is None else leaf.places.reshape(1, *x.shape[1:])
      return step.rest(x, leaf._replace(places=own), known)
  view = matrix_views.or_row(x, view)
  if step.unit == "matrix":
    return matrix_views.by_matrix(
      lambda own, base: step.update(own, leaf._replace(base=base, places=None), known),
      x,
      leaf.base,
      view,
    )
  rows = matrix_views.rows(sharding.whole(x), view)
  base = None if leaf.base is None else matrix_views.rows(sharding.whole(leaf.base[None]), view)[0]
  if step.ranked and "ranks" not in known:
    known = {**known, "ranks": order_statistics.ranks(rows)}
  places = None if leaf.places is None else leaf.places.reshape(1, *rows.shape[1:])
  y = step.update(rows, leaf._replace(base=base, places=places), known)
  return matrix_views.from_rows(y, view, x.shape[1:])


def leaf_of(name: str, base: Mapping[str, Array] | None, ready: Ready) -> Leaf:
  """Describes a whole leaf to a stage."""
  hparams = {n: v[name] if isinstance(v, dict) else v for n, v in ready.hparams.items()}
  return Leaf(
    base=None if base is None else base[name],
    hparams=hparams,
    models=ready.tags,
    tag=np.uint32(tree.tag(name)),
    start=np.uint32(0),
    offset=np.uint32(0),
  )


def task_vectors(x: Array, reference: Array | None, least: Any = np.float32) -> Array:
  """Returns models - reference, [K, *s], in the dtype to compute in, of at least this width."""
  if reference is None:
    return x.astype(tree.compute_dtype(least, x.dtype))
  # Upcast before subtracting: bfloat16 loses the low bits of a small task vector.
  dtype = tree.compute_dtype(least, x.dtype, reference.dtype)
  return x.astype(dtype) - reference.astype(dtype)[None]


def added(name: str, merged: Array, base: Array | None, dtype: Any) -> Array:
  """Adds a merged task vector [1, *s] to the base, and casts: [1, *s] -> [*s].

  Raises:
    ValueError: if there is not one.
  """
  hyperparameters.refuse_unmerged(name, merged.shape[0])
  return stored(merged, base, dtype)[0]


def stored(merged: Array, base: Array | None, dtype: Any) -> Array:
  """Adds task vectors [M, *s] to the base, and casts: the one place that does."""
  if base is None:
    return merged.astype(dtype)
  wide = tree.compute_dtype(merged.dtype, base.dtype)
  return (base.astype(wide)[None] + merged.astype(wide)).astype(dtype)
