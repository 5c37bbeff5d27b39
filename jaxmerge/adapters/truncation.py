"""Adapters from models, and adapters of a lower rank, by truncated SVDs."""

from __future__ import annotations

import functools
import operator
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
def extract(
  base: Tree,
  model: Tree,
  matrices: Iterable[str],
  rank: int | Any,
  *,
  layout: layouts.Layout | None = (),
) -> dict[str, Lora]:
  """Returns the best adapter of a given rank for the difference of a model to its base.

  Args:
    base: tree of arrays [*s].
    model: tree of arrays [*s].
    matrices: their names, as for `apply`; the keys of an adapter, where there is one.
    rank: of the adapter, or less where a matrix has fewer rows or columns.
    layout: matrix views, as for `apply`.

  Raises:
    ValueError: naming the matrix that is missing, or the leaf that differs in shape.

  Example:
    >>> base, model = {"w": jnp.ones((2, 2))}, {"w": jnp.array([[4.0, 1.0], [1.0, 2.0]])}
    >>> print(np.abs(extract(base, model, ["w"], 1)["w"].delta()).round(5))
    [[3. 0.]
     [0. 0.]]
  """
  if isinstance(matrices, str):
    raise ValueError(f"matrices must be a list of names, got a text: write [{matrices!r}].")
  rank = _check_rank(rank)
  tree.check_same(base, model, left="the base", right="the model", dtype=False)
  leaves, tuned = tree.named(base), tree.named(model)
  rules = layouts.of_leaves(leaves, layout)

  def nearest(name: str) -> Lora:
    leaf, view, _ = lora.find_matrix(leaves, name, rules)
    tau = interpreter.task_vectors(jnp.asarray(tuned[leaf])[None], jnp.asarray(leaves[leaf]))
    return _truncate(matrix_views.rows(tau, view)[0], rank)

  return combine.check_finite({name: nearest(name) for name in matrices})


@double_precision.aware
def compress(adapter: Adapter | Any, rank: int | Any) -> dict[str, Lora]:
  """Returns the nearest adapter of a lower rank.

  Only the triangles of the factors are decomposed; the matrices themselves are never formed.

  Example:
    >>> adapter = {"w": Lora(jnp.diag(jnp.array([3.0, 1.0])), jnp.eye(2))}
    >>> print(np.abs(compress(adapter, 1)["w"].delta()).round(5))
    [[3. 0.]
     [0. 0.]]
  """
  adapter, rank = arguments.adapter(adapter), _check_rank(rank)
  product = functools.partial(jnp.matmul, precision="highest")

  def nearest(x: Lora) -> Lora:
    dtype = tree.compute_dtype(x.a.dtype, x.b.dtype)
    b, left = jnp.linalg.qr(jnp.asarray(x.b).astype(dtype))
    a, right = jnp.linalg.qr(jnp.asarray(x.a).astype(dtype).T)
    core = _truncate(product(left, right.T) * jnp.asarray(x.scale, dtype), rank)
    return type(x)(product(core.a, a.T).astype(x.a.dtype), product(b, core.b).astype(x.b.dtype))

  return combine.check_finite({name: nearest(x) for name, x in adapter.items()})


def _check_rank(rank: Any) -> int:
  """Returns a rank; ValueError for what is no whole number from 1."""
  try:
    rank = operator.index(rank)
  except TypeError as error:
    raise ValueError(f"rank must be a whole number, such as 8, got {rank!r}.") from error
  if rank < 1:
    raise ValueError(f"rank must be at least 1, got {rank}.")
  return int(rank)


def _truncate(x: jax.Array, rank: int) -> Lora:
  u, s, vt = jnp.linalg.svd(x, full_matrices=False)
  rank = min(rank, s.shape[0])
  root = jnp.sqrt(s[:rank])
  return Lora(root[:, None] * vt[:rank], u[:, :rank] * root[None])
