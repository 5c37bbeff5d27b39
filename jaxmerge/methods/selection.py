"""Selects entries by size, variance over the models, importance or nearness."""

from __future__ import annotations

import functools
from typing import Any  # Reduction results are trees of arrays.

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.catalog import lookup
from jaxmerge.core import magnitudes, order_statistics, reductions, sharding, wide_counts
from jaxmerge.core.stage import (
  Array,
  Fold,
  Group,
  Leaf,
  Method,
  Rank,
  Stage,
  Sum,
  chain,
  for_models,
  join,
)
from jaxmerge.methods import averages, ties_merging
from jaxmerge.methods.factory import named


@named
def sce(density: float = 1.0, floor: float = 0.0) -> Method:
  """Selects the entries at which the models differ most, weighs the models, erases minorities.

  Leaf by leaf, the entries of largest variance over the models are kept: floor(density * n) of the
  n whose variance is not zero, ties broken by position. A model's weight is the mean square of its
  remaining entries. Entries that do not have the sign of the sum are left out of the mean.

  Args:
    density: fraction kept, in (0, 1]. 1 keeps all entries.
    floor: models count equally if the mean squares add up to less; 1e-6 in mergekit, more than
      small task vectors have.

  Reference: Wan et al. 2024, FuseChat (arXiv:2408.07990).

  Example:
    >>> import jaxmerge
    >>> base, experts = {"w": jnp.zeros(2)}, {"w": jnp.array([[1.0, 2.0], [2.0, -1.0]])}
    >>> jaxmerge.merge(sce(), experts, base)["w"].tolist()
    [1.5, 2.0]
  """
  lookup.check("sce", {"density": density, "floor": floor})
  return chain(most_varied(density), _erased(floor))


@named
def most_varied(density: float) -> Method:
  """Keeps the entries of largest variance over the models, in all models; see `sce`.

  Example:
    >>> import jaxmerge
    >>> x = {"w": jnp.array([[1.0, 2.0, 5.0, 0.0], [1.0, 3.0, 1.0, 1.0]])}
    >>> jaxmerge.merge(chain(most_varied(0.4), averages.average()), x)["w"].tolist()
    [0.0, 0.0, 3.0, 0.0]
  """

  def init(group: Group) -> dict[str, Any]:
    order_statistics.refuse_unrankable(group)
    density = jnp.asarray(group.hparam("density"), jnp.float32)
    if density.ndim:
      raise ValueError(f"sce: density must be one number for all models, got {density.shape[0]}.")
    return {"density": density.reshape(1)}

  def differing(x: Array, leaf: Leaf, known: Any) -> Array:
    return wide_counts.count(_variance(x, leaf, known) > 0)

  def rank(total: Array, known: Any) -> Array:
    # If all are kept, no cut is needed: drivers that search for it outside of a program skip it.
    return jnp.where(known["density"] >= 1, 0, wide_counts.part(known["density"], total))

  def update(x: Array, leaf: Leaf, known: Any) -> Array:
    inside = order_statistics.inside(known["cut"], _variance(x, leaf, known), leaf)
    return jnp.where(inside | (known["density"][0] >= 1), x, 0)

  count = Sum("kept", differing, combine=wide_counts.plus, finish=rank)
  measured = (count, Rank("cut", _variance, rank="kept", exact=True))
  return Method((Stage(update, measured, init, {"density": density}, scope="leaf"),))


def _variance(x: Array, leaf: Leaf, known: Any) -> Array:
  """Returns the variance over the models: [K, *s] -> [1, *s]; exactly 0 where all are equal.

  Outside the range of float32, another number of the same rank takes its place.
  """
  low, high = (f(x, axis=0, keepdims=True) for f in (jnp.min, jnp.max))
  variance = jnp.var(x, axis=0, keepdims=True)
  deviation = magnitudes.norm(x - jnp.mean(x, axis=0, keepdims=True), (0,)) / x.shape[0] ** 0.5
  for end, beyond in ((50, jnp.greater), (-50, jnp.less)):
    limit = jnp.asarray(2.0**end, x.dtype)
    # Beyond the limit it goes on with the fourth root, from the limit's square.
    rooted = limit * limit * jnp.sqrt(jnp.sqrt(deviation / limit))
    variance = jnp.where(beyond(deviation, limit), rooted, variance)
  return jnp.where(low == high, 0, variance)


def _erased(floor: float) -> Method:
  """Averages the entries that have the sign of the sum, weighted by the models' mean squares."""

  def squares(x: Array) -> Array:
    return jnp.sum(x * x, axis=tuple(range(1, x.ndim)))

  def means(total: Array, unit: Array, known: Any) -> tuple[Array, Array]:
    return total / jnp.asarray(known["size"], total.dtype), unit

  def update(x: Array, leaf: Leaf, known: Any) -> Array:
    means, unit = known["squares"]
    usable = (means.sum() > 0) & (means.sum() >= magnitudes.over(leaf.scalar("floor", x), unit))
    weight = jnp.where(usable, means / jnp.where(usable, means.sum(), 1), 1 / x.shape[0])
    agreeing = ties_merging.agreeing(x)
    weight = jnp.where(agreeing != 0, weight.reshape((-1,) + (1,) * (x.ndim - 1)), 0)
    total = jnp.sum(weight, axis=0, keepdims=True)
    return jnp.sum(weight * agreeing, axis=0, keepdims=True) / jnp.maximum(total, 1e-6)

  def init(group: Group) -> dict[str, Any]:
    return {"size": np.float32(max(group.size, 1))}

  measured = (reductions.squares("squares", squares, means),)
  return Method((Stage(update, measured, init, {"floor": floor}, scope="leaf", combines=True),))


@named
def arcee_fusion() -> Method:
  """Takes over the entries of a model that are far from the base and in a changed row.

  An entry's importance is its distance from the base times the divergence of its row:
  sum (p log(p / q) + q - p), with p and q the softmax of the model's and the base's row, each plus
  1e-8; all p and all q have the same sum. Leaf by leaf, it takes the entries of at least the median
  plus 1.5 times the distance of the quartiles. Rows are those of the leaf's matrix view; a leaf
  without a view is one row.

  Reference: mergekit 0.1 (arcee.ai, 2025).

  Example:
    >>> import jaxmerge
    >>> base, expert = {"w": jnp.zeros(5)}, {"w": jnp.array([[1.0, 0.1, 0.2, 0.3, 0.4]])}
    >>> jaxmerge.merge(arcee_fusion(), expert, base)["w"].tolist()
    [1.0, 0.0, 0.0, 0.0, 0.0]
  """

  def importance(x: Array, leaf: Leaf, known: Any) -> Array:
    base = leaf.compared("arcee_fusion").astype(x.dtype)[None]
    return jnp.abs(x) * jnp.sum(divergence(base, x), axis=-1, keepdims=True)

  def init(group: Group) -> dict[str, Any]:
    for_models("arcee_fusion", 1, 1)(group)
    last = max(group.size - 1, 0)
    ranks = {name: group.size - n * last // 4 for n, name in enumerate(quartiles, 1)}
    return {f"{name}_rank": jnp.asarray(wide_counts.limbs(n))[:, None] for name, n in ranks.items()}

  def second(pair: tuple[Array, Array], leaf: Leaf, known: Any) -> Array:
    return pair[1]

  def update(pair: tuple[Array, Array], leaf: Leaf, known: Any) -> Array:
    lower, median, upper = (order_statistics.at(known[name])[0] for name in quartiles)
    threshold = median + 1.5 * (upper - lower)
    return jnp.where(order_statistics.comparable(pair[1]) >= threshold, pair[0], 0)

  quartiles = ("lower", "median", "upper")
  measured = tuple(Rank(name, second, rank=f"{name}_rank") for name in quartiles)
  rows = Stage(importance, unit="row", rest="row")
  return join(Method((rows,)), Stage(update, measured, init, scope="leaf"))


def divergence(base: Array, x: Array) -> Array:
  """Returns the terms of each row's divergence: q ((1 + t) log(1 + t) - t), with p = q (1 + t).

  They follow from the task vector x, because p and q of nearly equal rows differ in the last bits
  only.
  """
  q = jax.nn.softmax(base, axis=-1)
  most = jnp.max(x, axis=-1, keepdims=True)
  moved = jnp.sum(q * jnp.expm1(x - most), axis=-1, keepdims=True)
  by = x - (most + jnp.log1p(moved))  # That is log(softmax(base + x) / q).
  both = q + 1e-8
  t = q * jnp.expm1(by) / both
  series = t * t * (1 / 2 - t * (1 / 6 - t * (1 / 12 - t * (1 / 20 - t * (1 / 30)))))
  small = jnp.abs(t) < 0.05
  return both * jnp.where(small, series, (1 + t) * jnp.log1p(t) - t)


@named
def magmax(scale: float = 0.5) -> Method:
  """Takes, entry by entry, the task vector of largest magnitude; the last of equal ones.

  Args:
    scale: factor on the result.

  Reference: Marczak et al. 2024, MagMax (arXiv:2407.06322).

  Example:
    >>> import jaxmerge
    >>> x = {"w": jnp.array([[0.75, 0.25], [-0.5, -0.25]])}
    >>> jaxmerge.merge(magmax(scale=1.0), x, deltas=True)["w"].tolist()
    [0.75, -0.25]
  """
  lookup.check("magmax", {"scale": scale})

  def larger(state: Array | None, x: Array, leaf: Leaf) -> Array:
    rows = jnp.split(sharding.gather_models(x), x.shape[0])
    return functools.reduce(_larger, rows if state is None else [state, *rows])

  fold = Fold(larger, lambda state, leaf: state)
  largest = Stage(
    lambda x, leaf, known: larger(None, x, leaf), combines=True, ordered=True, fold=fold
  )
  return chain((largest,), averages.scaled(scale))


def _larger(first: Array, second: Array) -> Array:
  return jnp.where(jnp.abs(second) >= jnp.abs(first), second, first)


@named
def nearswap(t: float = 0.0001) -> Method:
  """Moves each entry of the first model towards the second's by at most t.

  Entries no further apart than t become those of the second model. The stack is the base and the
  other model, in this order.

  Args:
    t: how far an entry may move.

  Reference: alchemonaut 2024, the model card of QuartetAnemoi-70B-t0.0001.

  Example:
    >>> import jaxmerge
    >>> models = {"w": jnp.array([[1.0, 1.0, 1.0], [1.25, 2.0, 0.0]])}
    >>> jaxmerge.merge(nearswap(t=0.5), models)["w"].tolist()
    [1.25, 1.5, 0.5]
  """
  lookup.check("nearswap", {"t": t})

  def update(x: Array, leaf: Leaf, known: Any) -> Array:
    x = sharding.gather_models(x)
    first, second = x[:1], x[1:]
    t, apart = leaf.scalar("t", x), second - first
    return jnp.where(jnp.abs(apart) <= t, second, first + t * jnp.sign(apart))

  init = for_models("nearswap", 2, 2)
  return Method((Stage(update, (), init, {"t": t}, combines=True, ordered=True),))


@named
def passthrough(
  scale: float = 1.0,
) -> Method:
  """Returns one model, times a number.

  Reference: mergekit (Goddard et al. 2024, arXiv:2403.13257).

  Example:
    >>> import jaxmerge
    >>> jaxmerge.merge(passthrough(0.5), {"w": jnp.array([[3.0]])})["w"].tolist()
    [1.5]
  """
  lookup.check("passthrough", {"scale": scale})
  one = Stage(lambda x, leaf, known: x, init=for_models("passthrough", 1, 1))
  return chain((one,), averages.scaled(scale))
