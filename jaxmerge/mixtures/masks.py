"""Masks of a shared task vector for each task: EMR-Merging and TALL masks."""

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
  """Elects a shared task vector, with a mask and a rescaling factor for each task: EMR-Merging.

  Each entry of the shared vector has the sign of the sum of the task vectors (minus where it is
  zero), and the largest magnitude among those of that sign. A task's mask selects the entries where
  it has that sign; its scale restores the mean magnitude of its task vector.

  Args:
    base: tree of arrays [*s].
    models: stack of K models, [K, *s].
    names: names of the tasks; by default "0", "1", and so on.
    ratio: "leaf" sums the mean magnitudes of the leaves, as the authors' code does; "tree" sums
      magnitudes over the whole tree.

  Reference: Huang et al. 2024, EMR-Merging (arXiv:2405.17461).

  Example:
    >>> base, models = {"w": jnp.zeros(3)}, {"w": jnp.array([[3.0, 1.0, -1.0], [1.0, -3.0, 0.0]])}
    >>> bundle = emr(base, models, names=("cat", "dog"))
    >>> bundle.for_task("cat")["w"].tolist()
    [3.75, 0.0, -1.25]
  """
  taus, statistics = bundle.task_vectors(base, models)
  elected = {n: _elect(x) for n, x in taus.items()}
  shared, masks = ({n: pair[i] for n, pair in elected.items()} for i in (0, 1))
  # Divide by the peak first: the sums of magnitudes may overflow, their ratio does not.
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

  masked = magnitude({n: jnp.where(masks[n], x[None], 0) for n, x in shared.items()})
  scales = jnp.where(masked > 0, magnitude(taus) / jnp.where(masked > 0, masked, 1), 1)
  return bundle.Bundle(
    "emr", bundle.task_names(names, models), base, shared, masks, scales, statistics
  )


def _elect(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the shared vector [*s] of task vectors [K, *s], and which entries agree with it."""
  sign = jnp.where(jnp.sum(x, axis=0, keepdims=True) > 0, 1, -1).astype(x.dtype)
  masks = x * sign > 0
  return sign[0] * jnp.max(jnp.where(masks, jnp.abs(x), 0), axis=0), masks


@double_precision.aware
def tall_masks(
  base: Tree,
  models: Tree,
  *,
  names: Sequence[str] | None = None,
  threshold: float | Sequence[float] = 0.4,
  method: Method | None = None,
) -> bundle.Bundle:
  """Selects the entries of a merged task vector that each task needs: TALL masks.

  A task needs an entry if the magnitude of its task vector there exceeds `threshold` times the
  distance to the merged task vector.

  Args:
    base: tree of arrays [*s].
    models: stack of K models, [K, *s].
    names: names of the tasks; by default "0", "1", and so on.
    threshold: scalar or one per task; the authors select one per task on validation.
    method: merges the task vectors; by default, their sum.

  Reference: Wang et al. 2024, Localizing task information (arXiv:2405.07813).

  Example:
    >>> base, models = {"w": jnp.zeros(3)}, {"w": jnp.array([[2.0, 1.0, -1.0], [1.0, -3.0, 0.0]])}
    >>> bundle = tall_masks(base, models, names=("cat", "dog"), threshold=1.0)
    >>> bundle.for_task("cat")["w"].tolist()
    [3.0, 0.0, -1.0]
  """
  taus, statistics = bundle.task_vectors(base, models)
  names = bundle.task_names(names, models)
  method = methods.task_arithmetic(1.0) if method is None else method
  shared = memory.merge(method, taus, names=names, deltas=True)
  limits = jnp.broadcast_to(jnp.asarray(threshold, jnp.float32), (len(names),))

  def mask(x: jax.Array, total: jax.Array) -> jax.Array:
    limit = limits.astype(x.dtype).reshape((-1,) + (1,) * (x.ndim - 1))
    return jnp.abs(x) > limit * jnp.abs(total[None] - x)

  masks = {n: mask(x, shared[n]) for n, x in taus.items()}
  return bundle.Bundle("tall_masks", names, base, shared, masks, jnp.ones(len(names)), statistics)
