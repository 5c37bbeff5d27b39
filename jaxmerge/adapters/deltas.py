"""Merges the deltas of adapters by any method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.adapters import lora
from jaxmerge.adapters.lora import Adapter
from jaxmerge.core import double_precision, layouts, tree
from jaxmerge.core.stage import Method
from jaxmerge.core.tree import Tree
from jaxmerge.drivers import arguments, memory


@double_precision.aware
def merge(
  method: Method | Any,
  base: Tree,
  adapters: Sequence[Adapter] | Any,
  *,
  hparams: Mapping[str, Any] | None = None,
  statistics: Mapping[str, Any] | None = None,
  seed: int | jax.Array | None = None,
  names: Sequence[str] | None = None,
  layout: layouts.Layout | None = (),
) -> Tree:
  """Merges the deltas of K adapters into a model: base + M(scale * b @ a of each).

  The arguments are those of `jaxmerge.merge`. The task vectors are the products themselves, of the
  factors' ranks, which may differ; those of models that `apply` returns are rounded, because the
  base was added. Only leaves that some adapter has are merged, and counted by methods that count
  over the tree, as `ties` does; the others are the base's. An adapter adds zero to a leaf that only
  others have.

  Args:
    method: what `jaxmerge.methods` makes.
    base: tree of arrays [*s].
    adapters: a list, one per task, or a dict of them by name.
    hparams: hyperparameters by name, in place of the method's; trees have the merged leaves.
    statistics: as for `jaxmerge.merge`, of the merged leaves.
    seed: for methods with random masks.
    names: of the adapters; masks depend on them.
    layout: matrix views, as for `apply`; the method has the same view of a leaf.

  Raises:
    ValueError: as `apply` and `jaxmerge.merge` do.

  Example:
    >>> from jaxmerge import methods
    >>> base = {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    >>> from jaxmerge.adapters.lora import Lora
    >>> one = {"dense": Lora(jnp.array([[1.0, 0.0]]), jnp.array([[4.0], [2.0]]))}
    >>> two = {"dense": Lora(jnp.array([[1.0, 1.0]]), jnp.array([[0.0], [3.0]]))}
    >>> merge(methods.magmax(1.0), base, [one, two])["dense"]["kernel"].tolist()
    [[5.0, 4.0], [1.0, 4.0]]
  """
  method, leaves = arguments.method(method), tree.named(base)
  adapters, names = arguments.adapters(adapters, names)
  targets = [lora.find_targets(leaves, adapter, layout) for adapter in adapters]
  rules = {leaf: target.rule for each in targets for leaf, target in each.items()}
  if not rules:
    raise ValueError(f"none of {len(targets)} adapters has a matrix: there is nothing to merge.")
  out = memory.merge(
    method,
    {leaf: _stack(leaf, leaves[leaf], targets) for leaf in rules},
    {leaf: leaves[leaf] for leaf in rules},
    hparams=hparams,
    statistics=statistics,
    seed=seed,
    names=names,
    layout=layouts.fit(method, {n: np.shape(leaves[n]) for n in rules}, rules),
    deltas=True,
  )
  return tree.rebuild(base, leaves | out)


def _stack(leaf: str, base: Any, targets: Sequence[Mapping[str, lora.Target]]) -> jax.Array:
  """Returns each adapter's delta of a leaf, [K, *s]."""
  deltas = [each[leaf].delta() if leaf in each else None for each in targets]
  dtype = tree.compute_dtype(base.dtype, *(x.dtype for x in deltas if x is not None))
  # Sums with these zeros lie on the devices of the base.
  zeros = jnp.zeros_like(base, dtype=dtype)
  return jnp.stack([zeros if x is None else zeros + x.astype(dtype) for x in deltas])
