"""One task vector that is shared, and a mask and a scale for each task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from jaxmerge import methods
from jaxmerge.core import double_precision, magnitudes, tree
from jaxmerge.core.stage import Method
from jaxmerge.core.tree import Tree
from jaxmerge.drivers import memory
from jaxmerge.mixtures import bundle


@double_precision.aware
def emr(
  base: Tree,
  models: Tree,
  *,
  names: Sequence[str] | None = None,
  ratio: Literal["leaf", "tree"] = "leaf",
) -> bundle.Bundle:
  """Elects, masks and rescales: EMR-Merging.

  Shared is, entry by entry, the largest of the task vectors that have the sign of their sum (minus,
  where that is zero). A task takes the entries at which it has that sign, times what gives it its
  own mean magnitude back.

  Args:
    base: tree of arrays [*s].
    models: stack of K models, [K, *s].
    names: of the tasks; else "0", "1", and so on.
    ratio: magnitudes are averaged in each leaf and then added up, as the authors' code does, or
      added up over the tree.

  Reference: Huang et al. 2024, EMR-Merging (arXiv:2405.17461).

  Example:
    >>> base, models = {"w": jnp.zeros(3)}, {"w": jnp.array([[3.0, 1.0, -1.0], [1.0, -3.0, 0.0]])}
    >>> bundle = emr(base, models, names=("cat", "dog"))
    >>> bundle.for_task("cat")["w"].tolist()
    [3.75, 0.0, -1.25]
  """
  taus, statistics = bundle.task_vectors(base, models)

  def elect(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    sign = jnp.where(jnp.sum(x, axis=0, keepdims=True) > 0, 1, -1).astype(x.dtype)
    masks = x * sign > 0
    return sign[0] * jnp.max(jnp.where(masks, jnp.abs(x), 0), axis=0), masks

  elected = {n: elect(x) for n, x in taus.items()}

  # The ratio of two sums of magnitudes, which might not be in range themselves.
  dtype = tree.compute_dtype(*(v.dtype for v in taus.values()))
  peaks = [magnitudes.peak(v.astype(dtype), range(v.ndim)).reshape(()) for v in taus.values()]
  unit = jnp.max(jnp.stack(peaks)) if peaks else jnp.ones(())

  def magnitude(x: dict[str, jax.Array]) -> jax.Array:
    each = [
      jnp.sum(jnp.abs(v.astype(dtype) / unit), axis=tuple(range(1, v.ndim)))
      / (v[0].size if ratio == "leaf" else 1)
      for v in x.values()
      if v.size
    ]
    return sum(each, start=jnp.zeros(tree.num_models(models)))

  own = magnitude(taus)
  taken = magnitude(
    {n: jnp.where(masks, shared[None], 0) for n, (shared, masks) in elected.items()}
  )
  scales = jnp.where(taken > 0, own / jnp.where(taken > 0, taken, 1), 1)
  shared, masks = ({n: pair[i] for n, pair in elected.items()} for i in (0, 1))
  return bundle.Bundle("emr", bundle.named(names, models), base, shared, masks, scales, statistics)


@double_precision.aware
def tall_masks(
  base: Tree,
  models: Tree,
  *,
  names: Sequence[str] | None = None,
  threshold: float | Sequence[float] = 0.4,
  method: Method | None = None,
) -> bundle.Bundle:
  """Finds the entries of a merged task vector that each task needs: TALL masks.

  A task needs an entry where its task vector is larger in magnitude than `threshold` times its
  distance from the merged one.

  Args:
    base: tree of arrays [*s].
    models: stack of K models, [K, *s].
    names: of the tasks; else "0", "1", and so on.
    threshold: scalar or one per task; the authors choose each task's on validation.
    method: what merges the task vectors; else they are added up.

  Reference: Wang et al. 2024, Localizing task information (arXiv:2405.07813).

  Example:
    >>> base, models = {"w": jnp.zeros(3)}, {"w": jnp.array([[2.0, 1.0, -1.0], [1.0, -3.0, 0.0]])}
    >>> bundle = tall_masks(base, models, names=("cat", "dog"), threshold=1.0)
    >>> bundle.for_task("cat")["w"].tolist()
    [3.0, 0.0, -1.0]
  """
  taus, statistics = bundle.task_vectors(base, models)
  names = bundle.named(names, models)
  method = methods.task_arithmetic(1.0) if method is None else method
  shared = memory.merge(method, taus, names=names, deltas=True)
  limits = jnp.broadcast_to(jnp.asarray(threshold, jnp.float32), (len(names),))

  def needed(x: jax.Array, total: jax.Array) -> jax.Array:
    limit = limits.astype(x.dtype).reshape((-1,) + (1,) * (x.ndim - 1))
    return jnp.abs(x) > limit * jnp.abs(total[None] - x)

  masks = {n: needed(x, shared[n]) for n, x in taus.items()}
  return bundle.Bundle("tall_masks", names, base, shared, masks, jnp.ones(len(names)), statistics)
