"""Aggregation that a minority of bad models cannot move far."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal  # Any: reduction results are trees of arrays.

import jax.numpy as jnp
from jax import lax

from jaxmerge.catalog import lookup
from jaxmerge.core import reductions, sharding
from jaxmerge.core.stage import Array, Group, Leaf, Method, Stage, for_models, pointwise
from jaxmerge.methods.factory import named

NETWORK = 32  # The compiler sorts more models than that.


@named
def median() -> Method:
  """Takes, entry by entry, the median of the models; the lower one of two.

  Reference: Yin et al. 2018, Byzantine-robust distributed learning (arXiv:1803.01498).

  Example:
    >>> import jaxmerge
    >>> models = {"w": jnp.array([[1.0], [2.0], [3.0], [100.0]])}
    >>> jaxmerge.merge(median(), models)["w"].tolist()
    [2.0]
  """

  def middle(x: Array) -> Array:
    return _central(_ascending(x))

  return pointwise(middle, combines=True)


@named
def trimmed_mean(trim: int = 1) -> Method:
  """Averages, entry by entry, all but the lowest and the highest `trim` models.

  Args:
    trim: models that are left out on each side; 0 averages all.

  Reference: Yin et al. 2018 (arXiv:1803.01498).

  Example:
    >>> import jaxmerge
    >>> models = {"w": jnp.array([[1.0], [2.0], [4.0], [100.0]])}
    >>> jaxmerge.merge(trimmed_mean(), models)["w"].tolist()
    [3.0]
  """
  lookup.check("trimmed_mean", {"trim": trim})

  def update(x: Array, leaf: Leaf, known: Any) -> Array:
    return _mean(_ascending(x)[trim : x.shape[0] - trim])

  init = for_models("trimmed_mean", 2 * trim + 1)
  return Method((Stage(update, init=init, combines=True),))


@named
def meamed(outliers: int = 1) -> Method:
  """Averages, entry by entry, all but the `outliers` models farthest from the median.

  Of two that are equally far, the higher is left out.

  Args:
    outliers: models that are left out at each entry; there must be at least 2 * outliers + 1.

  Reference: Xie et al. 2018, Generalized Byzantine-tolerant SGD (arXiv:1802.10116), mean around
  the median.

  Example:
    >>> import jaxmerge
    >>> models = {"w": jnp.array([[1.0], [2.0], [3.0], [100.0]])}
    >>> jaxmerge.merge(meamed(), models)["w"].tolist()
    [2.0]
  """
  lookup.check("meamed", {"outliers": outliers})
  return _around(_central, outliers, "meamed")


@named
def phocas(outliers: int = 1) -> Method:
  """Averages, entry by entry, all but the `outliers` models farthest from the trimmed mean.

  The trimmed mean leaves out as many on each side. Of two that are equally far, the higher is left
  out.

  Args:
    outliers: models that are left out at each entry; there must be at least 2 * outliers + 1.

  Reference: Xie et al. 2018, Phocas (arXiv:1805.09682).

  Example:
    >>> import jaxmerge
    >>> models = {"w": jnp.array([[1.0], [2.0], [3.0], [100.0]])}
    >>> jaxmerge.merge(phocas(), models)["w"].tolist()
    [2.0]
  """
  lookup.check("phocas", {"outliers": outliers})
  return _around(lambda rows: _mean(rows[outliers : len(rows) - outliers]), outliers, "phocas")


def _around(center: Callable[[list[Array]], Array], outliers: int, name: str) -> Method:
  """Averages, entry by entry, the models nearest to the `center` of the ordered entries."""

  def update(x: Array, leaf: Leaf, known: Any) -> Array:
    rows = _ascending(x)
    middle, n = center(rows), len(rows) - outliers
    # The nearest are neighbours in the order: of each low entry and the n-th after it, one goes.
    pairs = zip(rows[:outliers], rows[n:], strict=True)
    ends = [jnp.where(high - middle < middle - low, high, low) for low, high in pairs]
    return _mean([*ends, *rows[outliers:n]])

  return Method((Stage(update, init=for_models(name, 2 * outliers + 1), combines=True),))


def _central(rows: list[Array]) -> Array:
  """Returns the median of rows in ascending order; the lower one of two."""
  return rows[(len(rows) - 1) // 2]


def _mean(rows: list[Array]) -> Array:
  x = jnp.concatenate(rows)
  # A product: how a division by one number rounds may depend on the length of the array.
  return jnp.sum(x, axis=0, keepdims=True) * (1 / x.shape[0])


@named
def krum(
  outliers: int = 1,
  select: int = 1,
  scope: Literal["tree", "leaf"] = "tree",
) -> Method:
  """Averages the models that are nearest to the others.

  The score of each of K models is the sum of its squared distances to the K - outliers - 2 nearest
  others. The `select` models of least score are averaged: one is Krum, more are Multi-Krum.

  Args:
    outliers: number of bad models; there must be at least 2 * outliers + 3 models.
    select: number of models that are averaged, at most K - outliers.
    scope: distances are those of whole models, or leaf by leaf.

  Reference: Blanchard et al. 2017, Machine learning with adversaries (arXiv:1703.02757).

  Example:
    >>> import jaxmerge
    >>> models = {"w": jnp.array([[1.0, 2.0], [1.3, 1.8], [0.9, 2.3], [1.15, 1.95], [10.0, -10.0]])}
    >>> jaxmerge.merge(krum(outliers=1), models)["w"].tolist() == models["w"][3].tolist()
    True
  """
  lookup.check("krum", {"outliers": outliers, "select": select, "scope": scope})

  def init(group: Group) -> dict[str, Any]:
    for_models("krum", 2 * outliers + 3)(group)
    if select > group.num_models - outliers:
      raise ValueError(
        f"krum: of {group.num_models} models, {outliers} of them outliers, at most "
        f"{group.num_models - outliers} can be selected, got select={select}."
      )
    return {}

  def distances(x: Array) -> Array:
    x = sharding.gather_models(x)
    axes = tuple(range(1, x.ndim))
    # Not from inner products: the distances of near models would lose all digits.
    return jnp.stack([jnp.sum((x - x[k : k + 1]) ** 2, axis=axes) for k in range(x.shape[0])])

  def update(x: Array, leaf: Leaf, known: Any) -> Array:
    K = x.shape[0]
    # The nearest model to each is itself.
    score = jnp.sum(jnp.sort(known["distances"], axis=1)[:, 1 : K - outliers - 1], axis=1)
    is_before = (score[None] < score[:, None]) | (
      (score[None] == score[:, None]) & jnp.tri(K, k=-1, dtype=bool)
    )
    chosen = (jnp.sum(is_before, axis=1) < select).reshape((-1,) + (1,) * (x.ndim - 1))
    return jnp.sum(jnp.where(chosen, x, 0), axis=0, keepdims=True) * (1 / select)

  measured = (reductions.squares("distances", distances),)
  return Method((Stage(update, measured, init, scope=scope, combines=True),))


@named
def flag(
  rank: int = 1,
  steps: int = 10,
  pairs: float = 0.0,
) -> Method:
  """Projects the models' directions on the few directions that are nearest to most of them.

  With h_i the models at norm 1, orthonormal directions Y minimise the sum over models of
  sqrt(1 - |Y^T h_i|^2). Each step takes the first singular directions of the h_i, weighted by how
  near each is to the last Y. The result is the mean of the projected h_i times the median of the
  models' norms.

  The descent begins at equal weights, so that nothing is random; the authors begin anywhere. They
  divide the sum of the projections by `rank`, and leave the norm to the caller.

  Args:
    rank: number of directions; as many as there are models leave the mean of the h_i.
    steps: at most; the descent ends when the sum grows.
    pairs: weight of the differences h_i - h_j beside the h_i.

  Reference: Almasi et al. 2023, Flag Aggregator (arXiv:2302.05865).

  Example:
    >>> import jaxmerge
    >>> models = {"w": jnp.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 9.0]])}
    >>> print(np.asarray(jaxmerge.merge(flag(), models)["w"]).round(3))
    [0.75 0. ]
  """
  lookup.check("flag", {"rank": rank, "steps": steps, "pairs": pairs})

  def coefficients(products: Array, unit: Array, known: Any) -> Array:
    squares = jnp.diagonal(products)
    norms = jnp.sqrt(jnp.where(squares > 0, squares, 1))
    # Directions are constant for gradients: those of equal eigenvalues have none.
    cosines = lax.stop_gradient(products / (norms[:, None] * norms[None]))
    shares = _near(cosines, known["pairs"], rank, steps) / norms
    length = _middle(jnp.where(squares > 0, norms, 0))
    return length * shares * (1 / products.shape[0])

  def init(group: Group) -> dict[str, Any]:
    return {"pairs": jnp.asarray(group.hparam("pairs"))}

  def update(x: Array, leaf: Leaf, known: Any) -> Array:
    weights = known["coefficients"].astype(x.dtype)
    return jnp.sum(x * weights.reshape((-1,) + (1,) * (x.ndim - 1)), axis=0, keepdims=True)

  measured = reductions.squares("coefficients", reductions.inner_products, coefficients)
  return Method((Stage(update, (measured,), init, {"pairs": pairs}, combines=True),))


def _middle(values: Array) -> Array:
  """Returns the median; the lower one of two."""
  return jnp.sort(values)[(values.shape[0] - 1) // 2]


def _near(products: Array, pairs: Array, rank: int, steps: int) -> Array:
  """Returns the models' coefficients in the sum of the projections, from inner products [K, K]."""
  K = products.shape[0]
  values, vectors = jnp.linalg.eigh(products)
  roots = jnp.sqrt(jnp.where(values > 1e-6 * values[-1], values, 0) + 1e-30)
  points = vectors * roots[None]  # One row per model, in coordinates of the space they span.
  first, second = jnp.triu_indices(K, 1)
  apart = points[first] - points[second]
  share = pairs.astype(points.dtype) / max(K * (K - 1), 1)

  def residuals(basis: Array) -> Array:
    # Not one minus the projections: that would be a difference of numbers near 1.
    return jnp.sum((points - (points @ basis) @ basis.T) ** 2, axis=1)

  def reweighted(basis: Array | None) -> Array:
    weights = jnp.ones(K, points.dtype) if basis is None else _weights(residuals(basis))
    ones = jnp.ones(len(first), points.dtype)
    of_pairs = ones if basis is None else _weights(1 - jnp.sum((apart @ basis) ** 2, axis=1))
    both = points * weights[:, None], apart * (share * of_pairs)[:, None]
    # Each pair counts in both orders.
    spread = both[0].T @ both[0] + 2 * both[1].T @ both[1]
    return jnp.linalg.eigh(spread)[1][:, ::-1][:, :rank]

  def loss(basis: Array) -> Array:
    return jnp.sum(jnp.sqrt(residuals(basis)))

  def step(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
    basis, going = carry
    candidate = reweighted(basis)
    # Growth by rounding does not count.
    going = going & (loss(candidate) < loss(basis) * (1 + 8 * jnp.finfo(points.dtype).eps))
    return (jnp.where(going, candidate, basis), going), None

  (basis, _), _ = lax.scan(step, (reweighted(None), jnp.bool_(True)), length=steps)
  projected = basis @ (basis.T @ jnp.sum(points, axis=0))
  return vectors @ jnp.where(roots > 1e-14, projected / roots, 0)


def _weights(residuals: Array) -> Array:
  return (jnp.abs(residuals) + 1e-7) ** -0.25


def _ascending(x: Array) -> list[Array]:
  """Sorts the models entry by entry: [K, *s] -> K times [1, *s]."""
  x, K = sharding.gather_models(x), x.shape[0]
  if K > NETWORK:
    return jnp.split(jnp.sort(x, axis=0), K)
  # A network of comparisons: compilers sort along a short axis by a loop over entries.
  rows = jnp.split(x, K)
  pairs = ((a, a + 1) for i in range(K) for a in range(i % 2, K - 1, 2))
  return functools.reduce(_sort_pair, pairs, rows)


def _sort_pair(rows: list[Array], pair: tuple[int, int]) -> list[Array]:
  low, high = (rows[i] for i in pair)
  return [*rows[: pair[0]], jnp.minimum(low, high), jnp.maximum(low, high), *rows[pair[1] + 1 :]]
