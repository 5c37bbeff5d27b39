"""Merging matrices by their singular values and vectors.

A matrix is one of a leaf's matrix view, one per layer of stacked layers; leaves without a view are
averaged. Singular directions whose value is zero, up to `rank_tol`, are left out: their vectors are
arbitrary, and a low-rank task vector has many of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal  # Any: reduction results are trees of arrays.

import jax
import jax.numpy as jnp
from jax import lax

from jaxmerge.catalog import lookup
from jaxmerge.core import magnitudes, sharding
from jaxmerge.core.stage import Array, Leaf, Method, Stage, chain
from jaxmerge.methods import averages
from jaxmerge.methods.factory import named

_sum = functools.partial(jnp.sum, axis=0, keepdims=True)
Polar = Literal["svd", "products"]
LEAST = 1e-3  # `by_products` brings singular values of this share of the largest to 1.


@named
def iso_c(
  scale: float = 1.0,
  rank_tol: float = 1e-06,
  polar: Polar = "svd",
) -> Method:
  """Adds up the task matrices, and sets all singular values of the sum to their mean.

  Args:
    scale: factor on the merged task vector.
    rank_tol: singular values up to this share of the largest count as zero.
    polar: finds matrices with orthonormal columns by an "svd", or by "products" alone, see
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
    return _flatten(_sum(x), leaf.scalar("rank_tol", x), polar)

  return chain(by_matrix(update, {"rank_tol": rank_tol}), averages.scaled(scale))


@named
def iso_cts(
  scale: float = 1.0,
  common: float = 0.8,
  rank_tol: float = 1e-06,
  polar: Polar = "svd",
) -> Method:
  """Takes most directions from the sum of the task matrices, some from each, and flattens all.

  The directions of a task are the first ones of its matrix, projected off the common ones on the
  side of the outputs. The tasks share the rest of r = min(outputs, inputs) directions equally,
  rounded to the nearest; if there is none, the result is that of `iso_c`.

  Args:
    scale: factor on the merged task vector.
    common: share of the r directions that come from the sum, in [0, 1].
    rank_tol: singular values up to this share of the largest count as zero.
    polar: finds matrices with orthonormal columns by an "svd", or by "products" alone, see
      `by_products`.

  Reference: Marczak et al. 2025, No task left behind (arXiv:2502.04959).

  Example:
    >>> import jaxmerge
    >>> x = {"w": jnp.array([[[3.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]])}
    >>> jaxmerge.merge(iso_cts(common=1.0), x, layout=(("w", "oi"),), deltas=True)["w"].tolist()
    [[2.0, 0.0], [0.0, 2.0]]
  """
  settings = {"scale": scale, "common": common, "rank_tol": rank_tol, "polar": polar}
  lookup.check("iso_cts", settings)

  def update(x: Array, leaf: Leaf, known: Any) -> Array:
    tol = leaf.scalar("rank_tol", x)
    shared, per_task = count_directions(min(x.shape[1:]), x.shape[0], common)
    if not per_task:
      return _flatten(_sum(x), tol, polar)
    u, s, v = (y[0] for y in svd(_sum(x), tol))
    u, s, v = u[:, :shared], s[:shared], v[:, :shared]
    # If all directions of a task are common, the rest is rounding error.
    norms = magnitudes.norm(x, (1, 2))[:, 0, 0]
    rest = svd(x - u @ (u.T @ x), tol, norms)
    lefts, values, rights = _side_by_side(*(y[..., :per_task] for y in rest))
    lefts, rights = (jnp.concatenate(p, axis=1) for p in ((lefts, u), (rights, v)))
    values = jnp.concatenate([values, s])
    mean = _mean(values)
    lefts, rights = (_orthogonal(y, tol, polar) for y in (lefts, rights))
    return (mean * lefts @ rights.T)[None]

  return chain(by_matrix(update, {"rank_tol": rank_tol}), averages.scaled(scale))


def count_directions(rank: int, num_models: int, common: float) -> tuple[int, int]:
  """Returns how many directions of a matrix are common, and how many each task has.

  >>> count_directions(768, 8, 0.8), count_directions(768, 14, 0.8), count_directions(768, 20, 0.8)
  ((616, 19), (614, 11), (608, 8))
  """
  per_task = min(round((rank - int(rank * common)) / num_models), rank // num_models)
  return rank - per_task * num_models, per_task


@named
def tsv(
  scale: float = 1.0,
  rank_tol: float = 1e-06,
  polar: Polar = "svd",
) -> Method:
  """Keeps the first singular directions of each task matrix, and makes them orthogonal.

  Each of K tasks keeps 1/K of the directions, at least one.

  Args:
    scale: factor on the merged task vector.
    rank_tol: singular values up to this share of the largest count as zero, also those of the
      directions side by side.
    polar: finds matrices with orthonormal columns by an "svd", or by "products" alone, see
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
    count = max(1, int(min(x.shape[1:]) * (1 / K)))
    lefts, values, rights = _side_by_side(*(y[..., :count] for y in svd(x, tol)))
    lefts, rights = (_orthogonal(y, tol, polar) for y in (lefts, rights))
    return ((lefts * values[None]) @ rights.T)[None]

  return chain(by_matrix(update, {"rank_tol": rank_tol}), averages.scaled(scale))


def by_matrix(
  update: Callable[..., Array],
  hparams: dict[str, Any],
  rest: Callable[..., Array] | None = None,
  **more: Any,
) -> Method:
  """Returns a combiner of matrices; leaves without a view are averaged, or combined by `rest`."""

  def together(x: Array, leaf: Leaf, known: Any) -> Array:
    return update(sharding.gather_models(x), leaf, known) if x.size else x[:1]

  def mean(x: Array, leaf: Leaf, known: Any) -> Array:
    return _sum(x) * (1 / x.shape[0])

  rest = rest or mean
  stage = Stage(together, unit="matrix", rest=rest, hparams=hparams, combines=True, **more)
  return Method((stage,))


def svd(
  x: Array, tol: Array | float = 0.0, size: Array | None = None
) -> tuple[Array, Array, Array]:
  """Returns thin singular value decompositions: [K, m, n] -> [K, m, r], [K, r], [K, n, r].

  Values and vectors are zero if the value is at most `tol` times `size` [K], or times the largest,
  or within the dtype's rounding of zero. A zero matrix has no singular vectors and no gradient.
  Vectors of equal values are not unique: their gradient is that of vectors that do not turn into
  each other.
  """
  empty = ~jnp.any(x != 0, axis=(1, 2), keepdims=True)
  unit = jnp.eye(x.shape[1], x.shape[2], dtype=x.dtype)[None]
  # One after the other: on a CPU a decomposition of several waits for threads of the pool that it
  # runs in itself, and two at a time on two cores wait for ever.
  # Scaled by a power of two: libraries rescale by other numbers if values are very large or small.
  power = magnitudes.peak(x, (1, 2))
  u, s, v = lax.map(_thin, jnp.where(empty, unit, x / power))
  s = s * power[:, 0]
  largest = s[:, :1] if size is None else size[:, None]
  nonzero = (s > jnp.maximum(tol, float(jnp.finfo(x.dtype).eps)) * largest) & ~empty[:, 0]
  u, v = (jnp.where(nonzero[:, None], y, 0) for y in (u, v))
  return u, jnp.where(nonzero, s, 0), v


@jax.custom_jvp
def _thin(x: Array) -> tuple[Array, Array, Array]:
  u, s, vt = jnp.linalg.svd(x, full_matrices=False)
  return u, s, vt.T


@_thin.defjvp
def _thin_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Any, Any]:
  """Returns the derivatives of values and vectors; JAX's rule divides by zero values and gaps."""
  u, s, v = _thin(*primals)
  (dx,) = tangents
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
  """Sets singular values to 1, and returns the values before: [m, n] -> [m, n], [r].

  Values up to `tol` of the largest become zero. Unlike the singular vectors, the result has a
  gradient where singular values are equal.

  Example:
    >>> flat(jnp.diag(jnp.array([3.0, 2.0, 0.0])), 1e-6)[0].tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
  """
  u, s, v = (y[0] for y in svd(x[None], tol))
  return u @ v.T, s


@flat.defjvp
def _flat_jvp(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
  (x, tol), (dx, _) = primals, tangents
  u, s, v = (y[0] for y in svd(x[None], tol))
  within = u.T @ dx @ v
  turns = (within - within.T) * _inverse(s[:, None] + s[None])
  left, right = ((y * _inverse(s)[None]) for y in (dx @ v - u @ within, dx.T @ u - v @ within.T))
  moved = u @ turns @ v.T + left @ v.T + u @ right.T
  return (u @ v.T, s), (moved, jnp.diagonal(within))


def _inverse(x: Array) -> Array:
  """Returns one over x, and 0 for x = 0."""
  some = jnp.abs(x) > jnp.finfo(x.dtype).tiny
  return jnp.where(some, 1 / jnp.where(some, x, 1), 0)


def _flatten(x: Array, tol: Array, polar: Polar) -> Array:
  """Sets all singular values to their mean: [1, m, n] -> [1, m, n]."""
  if polar == "products":
    q = by_products(x[0])
    return (jnp.sum(q * x[0]) / jnp.maximum(jnp.sum(q * q), 1) * q)[None]
  q, s = flat(x[0], tol)
  return (_mean(s) * q)[None]


def _mean(values: Array) -> Array:
  """Returns the mean of the values that are not zero."""
  count = jnp.sum(values > 0)
  return jnp.sum(values) / jnp.maximum(count, 1).astype(values.dtype)


def _side_by_side(u: Array, s: Array, v: Array) -> tuple[Array, Array, Array]:
  """Concatenates the directions of all tasks: [m, K k], [K k], [n, K k]."""
  left, right = (y.transpose(1, 0, 2).reshape(y.shape[1], -1) for y in (u, v))
  return left, s.reshape(-1), right


def _orthogonal(x: Array, tol: Array, polar: Polar) -> Array:
  """Returns the nearest matrix with orthonormal columns in the same span: [m, k] -> [m, k]."""
  return by_products(x) if polar == "products" else flat(x, tol)[0]


def by_products(x: Array) -> Array:
  """Sets singular values to 1 by products of matrices alone: [m, k] -> [m, k].

  Values of at least `LEAST` times the largest come within 1e-5 of 1 in float32. Smaller ones become
  less than 1 in proportion: rounding errors of zero stay below 1e-3. The Newton-Schulz iteration is
  y (3 - y^2) / 2, with the scaling that brings an interval [l, 1] of singular values nearest to 1.

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
  # At least the largest singular value, at most k^(1/4) times it.
  bound = jnp.sqrt(jnp.sqrt(jnp.where(most > 0, jnp.sum(gram * gram), 1)))
  low, scales = LEAST / x.shape[1] ** 0.25, []
  while 1 - low > 1e-7:
    scales.append(math.sqrt(3 / (1 + low + low * low)))
    low = scales[-1] * low * (3 - (scales[-1] * low) ** 2) / 2

  def step(y: Array, scale: Array) -> tuple[Array, None]:
    y = y * scale
    return 1.5 * y - 0.5 * product(y, product(y.T, y)), None

  return lax.scan(step, x / bound, jnp.asarray(scales, x.dtype))[0]
