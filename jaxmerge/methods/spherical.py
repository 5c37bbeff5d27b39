"""Means on spheres: methods that need only the inner products of the models.

Every result lies in the span of the models, so a method is a function from the Gram matrix to K
coefficients; the weights themselves are read once to measure it and once to combine them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal  # Any: reduction results are trees of arrays.

import jax
import jax.numpy as jnp
from jax import lax

from jaxmerge.catalog import lookup
from jaxmerge.core import magnitudes, reductions, sharding
from jaxmerge.core.stage import Array, Group, Leaf, Method, Stage, for_models
from jaxmerge.methods import averages
from jaxmerge.methods.factory import named

Solve = Callable[[Array, Leaf], Array]
_dot = functools.partial(jnp.dot, precision="highest")


def spanned(
  solve: Solve,
  *,
  scope: Literal["leaf", "row", "column"] = "leaf",
  hparams: Mapping[str, Any] | None = None,
  init: Callable[[Group], Any] = lambda group: {},
  ordered: bool = False,
  straight: Callable[[Array, Leaf], Array] | None = None,
) -> Method:
  """Combines the models with coefficients that follow from their inner products.

  Args:
    solve: (inner products [K, K], leaf) -> coefficients [K]. The products are divided by the square
      of `leaf.hparams["unit"]`, which is 1 unless squares would leave the range of the dtype.
    scope: a vector is the leaf, or each row or column of its matrix view. A leaf without a view is
      one vector.
    hparams: the hyperparameters that `solve` reads from the leaf.
    init: checks, before any weight is read.
    ordered: whether the order of the models matters.
    straight: the coefficients of running statistics, (zeros [K, K], leaf) -> [K]; None: equal.

  Example:
    >>> import jaxmerge
    >>> unit = spanned(lambda gram, leaf: 1 / jnp.sqrt(jnp.diagonal(gram)))
    >>> models = {"w": jnp.array([[0.0, 4.0], [2.0, 0.0]])}
    >>> jaxmerge.merge(unit, models)["w"].tolist()
    [1.0, 1.0]
  """
  make = functools.partial(
    Stage, init=init, hparams=hparams or {}, scope="leaf", combines=True, ordered=ordered
  )
  moments = straight and make(lambda x, leaf, known: _combine(straight(_blank(x), leaf), x))
  make = functools.partial(make, moments=moments)
  if scope == "leaf":
    whole = make(
      lambda x, leaf, known: _combine(solve(*_scaled(known["gram"], leaf)), x),
      (reductions.gram("gram"),),
    )
    return Method((whole,))

  def update(x: Array, leaf: Leaf, known: Any) -> Array:
    across = 2 if scope == "row" else 1
    batch = 3 - across
    contract = (([across], [across]), ([batch], [batch]))
    place = sharding.replicated_like(x, 3)
    unit = jnp.max(magnitudes.peak(x, (across,)), axis=0, keepdims=True)
    scaled = x / unit
    grams = lax.dot_general(scaled, scaled, contract, precision="highest", out_sharding=place)
    each = reductions.Gram(grams, unit.reshape(-1))
    coefficients = jax.vmap(lambda gram: solve(*_scaled(gram, leaf)), out_axes=1)(each)
    return jnp.sum(x * jnp.expand_dims(coefficients, across), axis=0, keepdims=True)

  def rest(x: Array, leaf: Leaf, known: Any) -> Array:
    unit = jnp.max(magnitudes.peak(x, range(1, x.ndim)))
    gram = reductions.Gram(reductions.inner_products(x / unit), unit)
    return _combine(solve(*_scaled(gram, leaf)), x)

  unit: Literal["row", "matrix"] = "row" if scope == "row" else "matrix"
  return Method((make(update, unit=unit, lookups="row", rest=rest),))


def _scaled(gram: reductions.Gram, leaf: Leaf) -> tuple[Array, Leaf]:
  """Returns inner products over the square of a unit, and the leaf with that unit."""
  return gram.products, leaf._replace(hparams={**leaf.hparams, "unit": gram.unit})


@named
def slerp(t: float = 0.5) -> Method:
  """Interpolates two models along the arc between them, leaf by leaf.

  With w the angle between the leaves a and b, the result is (sin((1-t) w) a + sin(t w) b) / sin w.
  If their cosine is above 0.9995 in magnitude, it is (1-t) a + t b. The stack is the first and the
  second end, in this order.

  Args:
    t: 0 is the first model, 1 the second.

  Reference: Shoemake 1985, Animating rotation with quaternion curves (SIGGRAPH).

  Example:
    >>> import jaxmerge
    >>> models = {"w": jnp.array([[2.0, 0.0], [0.0, 1.0]])}
    >>> print(np.asarray(jaxmerge.merge(slerp(t=0.5), models)["w"]).round(4))
    [1.4142 0.7071]
  """
  lookup.check("slerp", {"t": t})

  def solve(gram: Array, leaf: Leaf) -> Array:
    cosine = cosines(gram)[0, 1]
    return _arc(leaf.scalar("t", gram), cosine, jnp.abs(cosine) > 0.9995)

  def straight(gram: Array, leaf: Leaf) -> Array:
    t = leaf.scalar("t", gram)
    return jnp.stack([1 - t, t])

  init = for_models("slerp", 2, 2)
  return spanned(solve, hparams={"t": t}, init=init, ordered=True, straight=straight)


@named
def nuslerp(
  weight: float | tuple[float, ...] = 1.0,
  scope: Literal["leaf", "row", "column"] = "leaf",
) -> Method:
  """Interpolates two models, or their task vectors, along the arc between them, by weights.

  It is `slerp` with t = w2 / (w1 + w2), or 0.5 if the weights cancel out; only parallel and
  antiparallel vectors are interpolated along a line.

  Args:
    weight: weight of each model, scalar or one per model.
    scope: the vectors are whole leaves, or the rows (all inputs of an output) or columns (all
      outputs of an input) of the leaf's matrix view; a leaf without a view is one vector.

  Reference: mergekit (Goddard et al. 2024, arXiv:2403.13257).

  Example:
    >>> import jaxmerge
    >>> models = {"w": jnp.array([[2.0, 0.0], [0.0, 1.0]])}
    >>> print(np.asarray(jaxmerge.merge(nuslerp(weight=(1.0, 3.0)), models)["w"]).round(4))
    [0.7654 0.9239]
  """
  lookup.check("nuslerp", {"weight": weight, "scope": scope})

  def straight(gram: Array, leaf: Leaf) -> Array:
    weights = _weights(gram, leaf)
    usable = jnp.abs(weights.sum()) >= 1e-6
    t = jnp.where(usable, weights[1] / jnp.where(usable, weights.sum(), 1), 0.5)
    return jnp.stack([1 - t, t])

  def solve(gram: Array, leaf: Leaf) -> Array:
    cosine = cosines(gram)[0, 1]
    t = straight(gram, leaf)[1]
    return _arc(t, cosine, 1 - jnp.abs(cosine) <= _noise(gram))

  init, hparams = for_models("nuslerp", 2, 2), {"weight": weight}
  return spanned(solve, scope=scope, straight=straight, hparams=hparams, init=init)


@named
def multislerp(
  weight: float | tuple[float, ...] = 1.0,
  normalize: bool = True,
) -> Method:
  """Averages directions and norms of the models, or of their task vectors, leaf by leaf.

  The result is (sum_i w_i norm_i) times the unit vector along sum_i w_i unit_i. If the unit vectors
  cancel out, it is the weighted mean, so that a leaf of zeros stays zero.

  Args:
    weight: weight of each model, scalar or one per model.
    normalize: divide by the sum of the weights.

  Reference: mergekit (Goddard et al. 2024, arXiv:2403.13257), in closed form: its step in the
  tangent space at the mean is zero.

  Example:
    >>> import jaxmerge
    >>> models = {"w": jnp.array([[2.0, 0.0], [0.0, 1.0]])}
    >>> print(np.asarray(jaxmerge.merge(multislerp(), models)["w"]).round(4))
    [1.0607 1.0607]
  """
  lookup.check("multislerp", {"weight": weight, "normalize": normalize})

  def straight(gram: Array, leaf: Leaf) -> Array:
    return _normalize(_weights(gram, leaf))

  def solve(gram: Array, leaf: Leaf) -> Array:
    weights = straight(gram, leaf) if normalize else _weights(gram, leaf)
    norms = root(jnp.diagonal(gram))
    square = _dot(_dot(weights, cosines(gram)), weights)
    usable = square > _noise(gram)
    unit = jnp.where(usable, _dot(weights, norms), 1) / root(jnp.where(usable, square, 1))
    return jnp.where(usable, unit * _over(weights, norms), weights)

  init = averages.refuse_zero_sum("multislerp") if normalize else for_models("multislerp", 1)
  of_statistics = straight if normalize else None
  return spanned(solve, hparams={"weight": weight}, init=init, straight=of_statistics)


@named
def karcher(
  weight: float | tuple[float, ...] = 1.0,
  max_iter: int = 10,
  tol: float = 1e-05,
) -> Method:
  """Returns the Karcher mean of the directions of the models times their mean norm, leaf by leaf.

  Gradient steps lead to the mean of the unit vectors on the sphere: from u along
  sum_i w_i (angle_i / sin angle_i) (u_i - cos(angle_i) u). They start at the normalised mean.

  Args:
    weight: weight of each model, scalar or one per model.
    max_iter: steps, at most.
    tol: models whose norm is below this share of the largest have no direction; a step smaller than
      this is the last.

  Reference: Karcher 1977, Riemannian center of mass and mollifier smoothing.

  Example:
    >>> import jaxmerge
    >>> models = {"w": jnp.array([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 1.0]])}
    >>> print(np.asarray(jaxmerge.merge(karcher(), models)["w"]).round(4))
    [0.8154 0.2718 0.5111]
  """
  lookup.check("karcher", {"weight": weight, "max_iter": max_iter, "tol": tol})

  def solve(gram: Array, leaf: Leaf) -> Array:
    weights, tol = _normalize(_weights(gram, leaf)), leaf.scalar("tol", gram)
    norms = root(jnp.diagonal(gram))
    valid = norms > tol * jnp.max(norms)
    shares = _normalize(jnp.where(valid, weights, 0))
    mean = _mean_direction(cosines(gram), shares, valid, tol, max_iter)
    return _dot(weights, norms) * jnp.where(valid, _over(mean, norms), 0)

  init = averages.refuse_zero_sum("karcher")
  return spanned(solve, hparams={"weight": weight, "tol": tol}, init=init)


def _mean_direction(cosine: Array, weight: Array, valid: Array, tol: Array, max_iter: int) -> Array:
  """Returns the Karcher mean of unit vectors as coefficients [K]; all steps stay in their span."""

  def norm(c: Array) -> Array:
    return root(_dot(_dot(c, cosine), c))

  def step(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
    c, done = carry
    dots = jnp.clip(_dot(cosine, c), -1, 1)
    inside = 1 - jnp.abs(dots) > _noise(cosine)
    angle = jnp.arccos(jnp.where(inside, dots, 0))
    # Near the mean, angle / sin angle is 1; the opposite point has no direction.
    factor = jnp.where(inside, angle / jnp.sin(angle), jnp.where(dots > 0, 1, 0))
    pull = weight * factor
    tangent = pull - _dot(pull, dots) * c
    length = norm(tangent)
    moved = jnp.cos(length) * c + jnp.sinc(length / jnp.pi) * tangent
    done = done | (length < tol)
    return (jnp.where(done, c, _over(moved, norm(moved))), done), None

  first = (valid & (jnp.cumsum(valid) == 1)).astype(cosine.dtype)
  start = norm(weight)
  usable = start > jnp.maximum(tol, jnp.sqrt(_noise(cosine)))
  c = jnp.where(usable, weight / jnp.where(usable, start, 1), first)
  return lax.scan(step, (c, jnp.asarray(False)), length=max_iter)[0][0]


def _arc(t: Array, cosine: Array, straight: Array) -> Array:
  """Returns coefficients [2] of two vectors at t of the arc, or of the line, between them."""
  angle = jnp.arccos(jnp.where(straight, 0, cosine))
  arc = jnp.stack([jnp.sin((1 - t) * angle), jnp.sin(t * angle)]) / jnp.sin(angle)
  return jnp.where(straight, jnp.stack([1 - t, t]), arc)


def cosines(gram: Array, floor: Array | float = 0.0) -> Array:
  """Returns the cosines of inner products, 0 for norms of 0: [K, K] -> [K, K].

  `floor` is the least product of two norms to divide by.

  Example:
    >>> cosines(jnp.array([[4.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])).tolist()
    [[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 0.0]]
  """
  norms = root(jnp.diagonal(gram))
  products = jnp.maximum(norms[:, None] * norms[None], floor)
  return jnp.clip(_over(gram, products), -1, 1)


def root(square: Array) -> Array:
  """Returns the square root, 0 with gradient 0 where the argument is not positive.

  Example:
    >>> root(jnp.array([4.0, 0.0, -1e-9])).tolist()
    [2.0, 0.0, 0.0]
  """
  positive = square > 0
  return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)


def _over(x: Array, y: Array) -> Array:
  """Divides, 0 where the divisor is not positive."""
  return jnp.where(y > 0, x / jnp.where(y > 0, y, 1), 0)


def _noise(x: Array) -> Array:
  """Returns a bound on rounding errors in differences of numbers near 1."""
  return jnp.asarray(16 * jnp.finfo(x.dtype).eps, x.dtype)


def _normalize(weights: Array) -> Array:
  """Divides weights by their sum, or by 1 where that is nearly zero."""
  return weights / jnp.where(jnp.abs(weights.sum()) < 1e-8, 1, weights.sum())


def _weights(gram: Array, leaf: Leaf) -> Array:
  return jnp.broadcast_to(leaf.hparam("weight", gram[0]), gram[0].shape)


def _blank(x: Array) -> Array:
  return jnp.zeros(x.shape[:1] * 2, x.dtype)


def _combine(coefficients: Array, x: Array) -> Array:
  return jnp.sum(x * coefficients.reshape((-1,) + (1,) * (x.ndim - 1)), axis=0, keepdims=True)
