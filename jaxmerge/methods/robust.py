"""Aggregation that a minority of bad models cannot move far."""

from __future__ import annotations

import functools
from typing import Any, Literal  # Any: what is known is a tree of arrays.

import jax.numpy as jnp

from jaxmerge import catalog, statistics, views
from jaxmerge.stage import Array, Group, Leaf, Method, Stage, for_models, pointwise

_krum = catalog.METHODS["krum"].parameters
NETWORK = 32  # More models than that are sorted by the compiler's sort.


def median() -> Method:
  """Takes, entry by entry, the median of the models; the lower one of two.

  Reference: Yin et al. 2018, Byzantine-robust distributed learning (arXiv:1803.01498).

  Example:
    >>> import jaxmerge
    >>> models = {"w": jnp.array([[1.0], [2.0], [3.0], [100.0]])}
    >>> jaxmerge.blend(median(), models)["w"].tolist()
    [2.0]
  """

  def middle(x: Array) -> Array:
    return _ascending(x)[(x.shape[0] - 1) // 2]

  return pointwise(middle, combines=True)


def trimmed_mean(trim: int = catalog.METHODS["trimmed_mean"].parameters["trim"].default) -> Method:
  """Averages, entry by entry, all but the lowest and the highest `trim` models.

  Args:
    trim: models that are left out on each side; 0 averages all.

  Reference: Yin et al. 2018 (arXiv:1803.01498).

  Example:
    >>> import jaxmerge
    >>> models = {"w": jnp.array([[1.0], [2.0], [4.0], [100.0]])}
    >>> jaxmerge.blend(trimmed_mean(), models)["w"].tolist()
    [3.0]
  """
  catalog.check("trimmed_mean", {"trim": trim})

  def update(x: Array, leaf: Leaf, known: Any) -> Array:
    own = jnp.concatenate(_ascending(x)[trim : x.shape[0] - trim])
    # A product: how a division by one number rounds may depend on the length of the array.
    return jnp.sum(own, axis=0, keepdims=True) * (1 / own.shape[0])

  init = for_models("trimmed_mean", 2 * trim + 1)
  return (Stage(update, init=init, combines=True),)


def krum(
  outliers: int = _krum["outliers"].default,
  select: int = _krum["select"].default,
  scope: Literal["tree", "leaf"] = _krum["scope"].default,
) -> Method:
  """Averages the models that are nearest to the others.

  Of K models each has a score, the sum of the squared distances to the K - outliers - 2 others that
  are nearest to it. The `select` models of least score are averaged; one is Krum, more Multi-Krum.

  Args:
    outliers: as many models may be anything; there must be at least 2 * outliers + 3.
    select: as many models are averaged, at most K - outliers.
    scope: distances are those of whole models, or leaf by leaf.

  Reference: Blanchard et al. 2017, Machine learning with adversaries (arXiv:1703.02757).

  Example:
    >>> import jaxmerge
    >>> models = {"w": jnp.array([[1.0, 2.0], [1.3, 1.8], [0.9, 2.3], [1.15, 1.95], [10.0, -10.0]])}
    >>> jaxmerge.blend(krum(outliers=1), models)["w"].tolist() == models["w"][3].tolist()
    True
  """
  catalog.check("krum", {"outliers": outliers, "select": select, "scope": scope})

  def init(group: Group) -> dict[str, Any]:
    for_models("krum", 2 * outliers + 3)(group)
    if select > group.height - outliers:
      raise ValueError(
        f"krum: of {group.height} models, {outliers} of them outliers, at most "
        f"{group.height - outliers} can be selected, got select={select}."
      )
    return {}

  def distances(x: Array, leaf: Leaf) -> Array:
    x = views.together(x)
    axes = tuple(range(1, x.ndim))
    # Differences, not an expansion in inner products: near models would lose all their digits.
    return jnp.stack([jnp.sum((x - x[k : k + 1]) ** 2, axis=axes) for k in range(x.shape[0])])

  def update(x: Array, leaf: Leaf, known: Any) -> Array:
    K = x.shape[0]
    # The nearest to each is itself.
    score = jnp.sum(jnp.sort(known["distances"], axis=1)[:, 1 : K - outliers - 1], axis=1)
    before = (score[None] < score[:, None]) | (
      (score[None] == score[:, None]) & jnp.tri(K, k=-1, dtype=bool)
    )
    chosen = (jnp.sum(before, axis=1) < select).reshape((-1,) + (1,) * (x.ndim - 1))
    return jnp.sum(jnp.where(chosen, x, 0), axis=0, keepdims=True) * (1 / select)

  measured = (statistics.total("distances", distances),)
  return (Stage(update, measured, init, scope=scope, combines=True),)


def _ascending(x: Array) -> list[Array]:
  """The models' entries in ascending order, entry by entry: [K, *s] -> K times [1, *s]."""
  x, K = views.together(x), x.shape[0]
  if K > NETWORK:
    return jnp.split(jnp.sort(x, axis=0), K)
  # A network of comparisons: compilers sort along a short axis by a loop over entries.
  rows = jnp.split(x, K)
  pairs = ((a, a + 1) for i in range(K) for a in range(i % 2, K - 1, 2))
  return functools.reduce(_swapped, pairs, rows)


def _swapped(rows: list[Array], pair: tuple[int, int]) -> list[Array]:
  low, high = (rows[i] for i in pair)
  return [*rows[: pair[0]], jnp.minimum(low, high), jnp.maximum(low, high), *rows[pair[1] + 1 :]]
