"""Any method, applied to what adapters add to a model."""

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
def merged(
  method: Method | Any,
  base: Tree,
  adapters: Sequence[Adapter] | Any,
  *,
  hparams: Mapping[str, Any] | None = None,
  seed: int | jax.Array | None = None,
  names: Sequence[str] | None = None,
  layout: layouts.Said | None = (),
) -> Tree:
  """Merges what K adapters add to a model: base + M(scale * b @ a of each). Like `jaxmerge.merge`.

  The task vectors are the products themselves, of the factors' ranks, which may differ; those of
  the models that `applied` makes are rounded where the base is added. Only leaves that some adapter
  has are merged: they alone are counted by methods that count over the tree, as `ties` does. The
  others are the base's. An adapter adds zero to a leaf that only others have.

  Args:
    method: what `jaxmerge.methods` makes.
    base: tree of arrays [*s].
    adapters: a list, one a task, or a dict of them by name.
    hparams: numbers by name, in place of the method's own; trees of them have the merged leaves.
    seed: for methods with random masks.
    names: names of the adapters; masks depend on them.
    layout: matrix views. Leaves lie as for `applied`, and the method has the same view of them.

  Raises:
    ValueError: naming the matrix that the model does not have, or that has another shape, and what
      `jaxmerge.merge` refuses.

  Example:
    >>> from jaxmerge import methods
    >>> base = {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    >>> from jaxmerge.adapters.lora import Lora
    >>> one = {"dense": Lora(jnp.array([[1.0, 0.0]]), jnp.array([[4.0], [2.0]]))}
    >>> two = {"dense": Lora(jnp.array([[1.0, 1.0]]), jnp.array([[0.0], [3.0]]))}
    >>> merged(methods.magmax(1.0), base, [one, two])["dense"]["kernel"].tolist()
    [[5.0, 4.0], [1.0, 4.0]]
  """
  method, leaves = arguments.method(method), tree.named(base)
  adapters, names = arguments.adapters(adapters, names)
  placed = [lora.placed(leaves, own, layout) for own in adapters]
  rules = {leaf: own.rule for each in placed for leaf, own in each.items()}
  if not rules:
    raise ValueError(f"{len(placed)} adapters without a matrix are given: there is none to merge.")

  def stack(leaf: str) -> jax.Array:
    added = [each[leaf].delta() if leaf in each else None for each in placed]
    dtype = tree.compute_dtype(leaves[leaf].dtype, *(x.dtype for x in added if x is not None))
    # What is added to these zeros lies on the devices on which the base lies.
    zero = jnp.zeros_like(leaves[leaf], dtype=dtype)
    return jnp.stack([zero if x is None else zero + x.astype(dtype) for x in added])

  out = memory.merge(
    method,
    {leaf: stack(leaf) for leaf in rules},
    {leaf: leaves[leaf] for leaf in rules},
    hparams=hparams,
    seed=seed,
    names=names,
    layout=layouts.fitted(method, {n: np.shape(leaves[n]) for n in rules}, rules),
    deltas=True,
  )
  return tree.rebuild(base, leaves | out)
