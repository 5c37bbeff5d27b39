"""Adapters from models, and adapters of a lower rank."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxmerge.adapters import combine, lora
from jaxmerge.adapters.lora import Adapter, Lora
from jaxmerge.core import double_precision, interpreter, layouts, matrix_views, tree
from jaxmerge.core.tree import Tree
from jaxmerge.drivers import arguments


@double_precision.aware
def extracted(
  base: Tree,
  model: Tree,
  matrices: Iterable[str],
  rank: int,
  *,
  layout: layouts.Said | None = (),
) -> dict[str, Lora]:
  """Makes an adapter of what a model adds to its base: the nearest matrices of a rank.

  Args:
    base: tree of arrays [*s].
    model: tree of arrays [*s].
    matrices: their names, as for `applied`; of an adapter, those that it has.
    rank: of the adapter, or less where a matrix has fewer rows or columns.
    layout: matrix views, as for `applied`.

  Raises:
    ValueError: naming the matrix that is not there, or the leaf that differs in shape.

  Example:
    >>> base, model = {"w": jnp.ones((2, 2))}, {"w": jnp.array([[4.0, 1.0], [1.0, 2.0]])}
    >>> print(np.abs(extracted(base, model, ["w"], 1)["w"].delta()).round(5))
    [[3. 0.]
     [0. 0.]]
  """
  tree.check_same(base, model, left="the base", right="the model", dtype=False)
  leaves, tuned = tree.named(base), tree.named(model)
  rules = layouts.of_leaves(leaves, layout)

  def nearest(name: str) -> Lora:
    leaf, view, _ = lora.place(leaves, name, rules)
    tau = interpreter.task_vectors(jnp.asarray(tuned[leaf])[None], jnp.asarray(leaves[leaf]))
    return _nearest(matrix_views.rows(tau, view)[0], rank)

  return combine.sound({name: nearest(name) for name in matrices})


@double_precision.aware
def recompressed(adapter: Adapter | Any, rank: int) -> dict[str, Lora]:
  """Brings an adapter to a lower rank: the nearest matrices of that rank.

  The matrices themselves are never made: the decomposition is that of the factors' triangles.

  Example:
    >>> adapter = {"w": Lora(jnp.diag(jnp.array([3.0, 1.0])), jnp.eye(2))}
    >>> print(np.abs(recompressed(adapter, 1)["w"].delta()).round(5))
    [[3. 0.]
     [0. 0.]]
  """
  adapter = arguments.adapter(adapter)
  product = functools.partial(jnp.matmul, precision="highest")

  def nearest(own: Lora) -> Lora:
    dtype = tree.compute_dtype(own.a.dtype, own.b.dtype)
    b, left = jnp.linalg.qr(jnp.asarray(own.b).astype(dtype))
    a, right = jnp.linalg.qr(jnp.asarray(own.a).astype(dtype).T)
    core = _nearest(product(left, right.T) * jnp.asarray(own.scale, dtype), rank)
    return type(own)(
      product(core.a, a.T).astype(own.a.dtype), product(b, core.b).astype(own.b.dtype)
    )

  return combine.sound({name: nearest(own) for name, own in adapter.items()})


def _nearest(x: jax.Array, rank: int) -> Lora:
  if rank < 1:
    raise ValueError(f"rank must be at least 1, got {rank}.")
  u, s, vt = jnp.linalg.svd(x, full_matrices=False)
  kept = min(rank, s.shape[0])
  root = jnp.sqrt(s[:kept])
  return Lora(root[:, None] * vt[:kept], u[:, :kept] * root[None])
