"""Merging matrices by their singular values and vectors.

A matrix is one of a leaf's matrix view, of stacked layers one each; leaves without a view are
averaged. Singular directions that are zero, up to `rank_tol`, are left out: their vectors are
arbitrary, and a low-rank task vector has many of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal  # Any: what is known is a tree of arrays.

import jax
import jax.numpy as jnp
from jax import lax

from jaxmerge.catalog import lookup
from jaxmerge.core import magnitudes, sharding
from jaxmerge.core.stage import Array, Leaf, Method, Stage, chain
from jaxmerge.methods import averages
from jaxmerge.methods.factory import named

_added = functools.partial(jnp.sum, axis=0, keepdims=True)
Polar = Literal["svd", "products"]
LEAST = 1e-3  # Singular values of this share of the largest come to 1 by products alone.


@named
def iso_c(
  scale: float = 1.0,
  rank_tol: float = 1e-06,
  polar: Polar = "svd",
) -> Method:
  """Adds the task matrices up, and makes all singular values of the sum equal to their mean.

  Args:
    scale: factor on the merged task vector.
    rank_tol: singular values up to this share of the largest are zero, and not counted.
    polar: "svd", or "products": matrices with orthonormal columns are found by products alone, see
      `by_products`.

  Reference: Marczak et al. 2025, No task left behind (arXiv:2502.04959).

  Example:
    >>> import jaxmerge
    >>> x = {"w": jnp.array([[[3.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]])}
    >>> jaxmerge.merge(iso_c(), x, layout=(("w", "oi"),), deltas=True)["w"].tolist()
    [[2.0, 0.0], [0.0, 2.0]]
  """
  lookup.check("iso_c", {"scale": scale, "rank_tol": rank_tol, "polar": polar})

  def update(x: Array, leaf: Leaf, known: Any) -> Array:
    return _evened(_added(x), leaf.scalar("rank_tol", x), polar)

  return chain(by_matrix(update, {"rank_tol": rank_tol}), averages.scaled(scale))


@named
def iso_cts(
  scale: float = 1.0,
  common: float = 0.8,
  rank_tol: float = 1e-06,
  polar: Polar = "svd",
) -> Method:
  """Takes most directions from the sum of the task matrices, some from each, and flattens all.

  The directions of a task are the first of what the common ones leave of its matrix on the side of
  the outputs. They share what is left of r = min(outputs, inputs) equally, rounded to the nearest;
  where that is none, the result is that of `iso_c`.

  Args:
    scale: factor on the merged task vector.
    common: share of the r directions that are the sum's, in [0, 1].
    rank_tol: singular values up to this share of the largest are zero, and not counted.
    polar: "svd", or "products": matrices with orthonormal columns are found by products alone, see
      `by_products`.

  Reference: Marczak et al. 2025, No task left behind (arXiv:2502.04959).

  Example:
    >>> import jaxmerge
    >>> x = {"w": jnp.array([[[3.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]])}
    >>> jaxmerge.merge(iso_cts(common=1.0), x, layout=(("w", "oi"),), deltas=True)["w"].tolist()
    [[2.0, 0.0], [0.0, 2.0]]
  """
  given = {"scale": scale, "common": common, "rank_tol": rank_tol, "polar": polar}
  lookup.check("iso_cts", given)

  def update(x: Array, leaf: Leaf, known: Any) -> Array:
    tol = leaf.scalar("rank_tol", x)
    shared, own = slots(min(x.shape[1:]), x.shape[0], common)
    if not own:
      return _evened(_added(x), tol, polar)
    u, s, v = (y[0] for y in svd(_added(x), tol))
    u, s, v = u[:, :shared], s[:shared], v[:, :shared]
    # What is left of a task whose directions are all common is rounding error.
    norms = magnitudes.norm(x, (1, 2))[:, 0, 0]
    rest = svd(x - u @ (u.T @ x), tol, norms)
    lefts, values, rights = _side_by_side(*(y[..., :own] for y in rest))
    lefts, rights = (jnp.concatenate(p, axis=1) for p in ((lefts, u), (rights, v)))
    values = jnp.concatenate([values, s])
    mean = _mean(values)
    lefts, rights = (_orthogonal(y, tol, polar) for y in (lefts, rights))
    return (mean * lefts @ rights.T)[None]

  return chain(by_matrix(update, {"rank_tol": rank_tol}), averages.scaled(scale))


def slots(rank: int, height: int, common: float) -> tuple[int, int]:
  """Deals the directions of a matrix: how many are common, and how many each task has.

  >>> slots(768, 8, 0.8), slots(768, 14, 0.8), slots(768, 20, 0.8)
  ((616, 19), (614, 11), (608, 8))
  """
  own = min(round((rank - int(rank * common)) / height), rank // height)
  return rank - own * height, own


@named
def tsv(
  scale: float = 1.0,
  rank_tol: float = 1e-06,
  polar: Polar = "svd",
) -> Method:
  """Keeps the first singular directions of each task matrix, and makes them orthogonal.

  Of K tasks each keeps 1/K of the directions, but at least one.

  Args:
    scale: factor on the merged task vector.
    rank_tol: singular values up to this share of the largest are zero; so are those of what the
      directions span.
    polar: "svd", or "products": matrices with orthonormal columns are found by products alone, see
      `by_products`.

  Reference: Gargiulo et al. 2025, Task singular vectors (arXiv:2412.00081), TSV-M.

  Example:
    >>> import jaxmerge
    >>> x = {"w": jnp.array([[[3.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]])}
    >>> jaxmerge.merge(tsv(), x, layout=(("w", "oi"),), deltas=True)["w"].tolist()
    [[3.0, 0.0], [0.0, 1.0]]
  """
  lookup.check("tsv", {"scale": scale, "rank_tol": rank_tol, "polar": polar})

  def update(x: Array, leaf: Leaf, known: Any) -> Array:
    tol, K = leaf.scalar("rank_tol", x), x.shape[0]
    kept = max(1, int(min(x.shape[1:]) * (1 / K)))
    lefts, values, rights = _side_by_side(*(y[..., :kept] for y in svd(x, tol)))
    lefts, rights = (_orthogonal(y, tol, polar) for y in (lefts, rights))
    return ((lefts * values[None]) @ rights.T)[None]

  return chain(by_matrix(update, {"rank_tol": rank_tol}), averages.scaled(scale))


def by_matrix(
  update: Callable[..., Array],
  hparams: dict[str, Any],
  rest: Callable[..., Array] | None = None,
  **more: Any,
) -> Method:
  """A combiner of matrices; leaves without a view are averaged, or what `rest` makes of them."""

  def together(x: Array, leaf: Leaf, known: Any) -> Array:
    return update(sharding.together(x), leaf, known) if x.size else x[:1]

  def mean(x: Array, leaf: Leaf, known: Any) -> Array:
    return _added(x) * (1 / x.shape[0])

  rest = rest or mean
  stage = Stage(together, unit="matrix", rest=rest, hparams=hparams, combines=True, **more)
  return Method((stage,))


def svd(
  x: Array, tol: Array | float = 0.0, size: Array | None = None
) -> tuple[Array, Array, Array]:
  """Thin singular value decompositions: [K, m, n] -> [K, m, r], [K, r], [K, n, r].

  Directions whose value is at most `tol` times `size` [K], or the largest, are zero; so is what the
  dtype cannot tell from zero beside it. What is zero altogether has no singular vectors, and no
  gradient. Vectors of equal values can turn into each other and have none of their own: theirs is
  that of vectors which do not.
  """
  empty = ~jnp.any(x != 0, axis=(1, 2), keepdims=True)
  unit = jnp.eye(x.shape[1], x.shape[2], dtype=x.dtype)[None]
  # One after the other: a decomposition of several on a CPU waits for threads of the pool that it
  # runs in itself, and two at a time on two cores wait for ever.
  # Over a power of two: libraries divide by other numbers where values are very large or small.
  power = magnitudes.peak(x, (1, 2))
  u, s, v = lax.map(_thin, jnp.where(empty, unit, x / power))
  s = s * power[:, 0]
  largest = s[:, :1] if size is None else size[:, None]
  kept = (s > jnp.maximum(tol, float(jnp.finfo(x.dtype).eps)) * largest) & ~empty[:, 0]
  u, v = (jnp.where(kept[:, None], y, 0) for y in (u, v))
  return u, jnp.where(kept, s, 0), v


@jax.custom_jvp
def _thin(x: Array) -> tuple[Array, Array, Array]:
  u, s, vt = jnp.linalg.svd(x, full_matrices=False)
  return u, s, vt.T


@_thin.defjvp
def _turns(given: tuple[Array], moves: tuple[Array]) -> tuple[Any, Any]:
  """How vectors and values move; JAX's own rule divides by values and differences of zero."""
  u, s, v = _thin(*given)
  (dx,) = moves
  within = u.T @ dx @ v
  left, right = s[:, None] * within, within * s[None]
  apart = _inverse((s[None] + s[:, None]) * (s[None] - s[:, None]))
  du, dv = u @ (apart * (right + right.T)), v @ (apart * (left + left.T))
  if u.shape[0] > v.shape[0]:
    du += (dx @ v - u @ within) * _inverse(s)[None]
  if u.shape[0] < v.shape[0]:
    dv += (dx.T @ u - v @ within.T) * _inverse(s)[None]
  return (u, s, v), (du, jnp.diagonal(within), dv)


@jax.custom_jvp
def flat(x: Array, tol: Array | float) -> tuple[Array, Array]:
  """Brings singular values to 1, and returns what they were: [m, n] -> [m, n], [r].

  Those up to `tol` of the largest are zero. There is a gradient where singular values are equal,
  and their vectors have none.

  Example:
    >>> flat(jnp.diag(jnp.array([3.0, 2.0, 0.0])), 1e-6)[0].tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
  """
  u, s, v = (y[0] for y in svd(x[None], tol))
  return u @ v.T, s


@flat.defjvp
def _flat_moves(given: tuple[Any, Any], moves: tuple[Any, Any]) -> tuple[Any, Any]:
  (x, tol), (dx, _) = given, moves
  u, s, v = (y[0] for y in svd(x[None], tol))
  within = u.T @ dx @ v
  turns = (within - within.T) * _inverse(s[:, None] + s[None])
  left, right = ((y * _inverse(s)[None]) for y in (dx @ v - u @ within, dx.T @ u - v @ within.T))
  moved = u @ turns @ v.T + left @ v.T + u @ right.T
  return (u @ v.T, s), (moved, jnp.diagonal(within))


def _inverse(x: Array) -> Array:
  """One over x, and 0 where that is nothing."""
  some = jnp.abs(x) > jnp.finfo(x.dtype).tiny
  return jnp.where(some, 1 / jnp.where(some, x, 1), 0)


def _evened(x: Array, tol: Array, polar: Polar) -> Array:
  """Gives all singular values their mean: [1, m, n] -> [1, m, n]."""
  if polar == "products":
    q = by_products(x[0])
    return (jnp.sum(q * x[0]) / jnp.maximum(jnp.sum(q * q), 1) * q)[None]
  q, s = flat(x[0], tol)
  return (_mean(s) * q)[None]


def _mean(values: Array) -> Array:
  """The mean of the values that are not zero."""
  count = jnp.sum(values > 0)
  return jnp.sum(values) / jnp.maximum(count, 1).astype(values.dtype)


def _side_by_side(u: Array, s: Array, v: Array) -> tuple[Array, Array, Array]:
  """The directions of all tasks next to each other: [m, K k], [K k], [n, K k]."""
  left, right = (y.transpose(1, 0, 2).reshape(y.shape[1], -1) for y in (u, v))
  return left, s.reshape(-1), right


def _orthogonal(x: Array, tol: Array, polar: Polar) -> Array:
  """The nearest matrix with orthonormal columns, on what the columns span: [m, k] -> [m, k]."""
  return by_products(x) if polar == "products" else flat(x, tol)[0]


def by_products(x: Array) -> Array:
  """Brings singular values to 1 by products of matrices alone: [m, k] -> [m, k].

  From `LEAST` of the largest on, to within 1e-5 in float32. Those below are not left out but come
  to less than 1 in proportion: rounding errors of what is zero stay below 1e-3. Newton and Schulz's
  y (3 - y^2) / 2 with the scaling that brings an interval [l, 1] of singular values nearest to 1.

  Reference: Chen and Chow 2014, A stable scaling of Newton-Schulz (Argonne, ANL/MCS-P5059-0114).

  Example:
    >>> by_products(jnp.array([[3.0, 0.0], [0.0, 0.01], [0.0, 0.0]])).round(4).tolist()
    [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
  """
  if x.shape[0] < x.shape[1]:
    return by_products(x.T).T
  if not x.size:
    return x
  product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
  most = jnp.max(jnp.abs(x))
  x = x / jnp.where(most > 0, most, 1)
  gram = product(x.T, x)
  # Between the largest singular value and its k^(1/4) times.
  bound = jnp.sqrt(jnp.sqrt(jnp.where(most > 0, jnp.sum(gram * gram), 1)))
  low, scales = LEAST / x.shape[1] ** 0.25, []
  while 1 - low > 1e-7:
    scales.append(math.sqrt(3 / (1 + low + low * low)))
    low = scales[-1] * low * (3 - (scales[-1] * low) ** 2) / 2

  def step(y: Array, scale: Array) -> tuple[Array, None]:
    y = y * scale
    return 1.5 * y - 0.5 * product(y, product(y.T, y)), None

  return lax.scan(step, x / bound, jnp.asarray(scales, x.dtype))[0]
