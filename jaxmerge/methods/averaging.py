"""Averages and sums of the models."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import catalog
from jaxmerge.stage import Array, Fold, Group, Leaf, Method, Stage, leafwise

_weight = catalog.METHODS["average"].parameters["weight"].default


def average(weight: float | tuple[float, ...] = _weight, normalize: bool = True) -> Method:
  """Averages the models, or their task vectors: [K, ...] -> [1, ...].

  The weighted mean of task vectors, added to the base, is the weighted mean of the models; without
  `normalize` the weighted sum is returned.

  Args:
    weight: weight of each model, scalar or one per model. Their sum must not be zero.
    normalize: divide by the sum of the weights.

  Reference: Wortsman et al. 2022, Model soups (arXiv:2203.05482).

  Example:
    >>> import jax.numpy as jnp, jaxmerge
    >>> jaxmerge.blend(average(), {"w": jnp.array([[1.0], [3.0]])})["w"].tolist()
    [2.0]
  """
  catalog.check("average", {"weight": weight, "normalize": normalize})
  if not normalize:
    return weighted_sum(weight)
  return (
    Stage(
      lambda x, leaf, known: _mean(x, leaf),
      init=_refuse_zero_sum,
      numbers={"weight": weight},
      scope="leaf",
      combines=True,
      fold=Fold(_add_to_mean, lambda held, leaf: _over(held["sum"], held["weight"])),
    ),
  )


def weighted_sum(weight: float | tuple[float, ...] = _weight) -> Method:
  """Adds the models up, each times its weight: [K, ...] -> [1, ...].

  Example:
    >>> import jaxmerge
    >>> jaxmerge.blend(weighted_sum((1.0, -1.0)), {"w": jnp.array([[3.0], [1.0]])})["w"].tolist()
    [2.0]
  """

  def add(held: Array | None, x: Array, leaf: Leaf) -> Array:
    part = _sum(x * leaf.number("weight", x))
    return part if held is None else held + part

  return leafwise(
    lambda x, leaf: _sum(x * leaf.number("weight", x)),
    numbers={"weight": weight},
    combines=True,
    fold=Fold(add, lambda held, leaf: held),
  )


def scaled(scale: float | tuple[float, ...]) -> Method:
  """Multiplies the stack by the number `scale`.

  Example:
    >>> import jaxmerge
    >>> jaxmerge.blend(scaled(0.5), {"w": jnp.array([[3.0]])})["w"].tolist()
    [1.5]
  """
  return leafwise(lambda x, leaf: x * leaf.number("scale", x), numbers={"scale": scale})


def weighted(weight: float | tuple[float, ...]) -> Method:
  """Multiplies each model by its weight, and keeps them apart.

  Example:
    >>> import jaxmerge
    >>> jaxmerge.blend(weighted(2.0), {"w": jnp.array([[3.0]])})["w"].tolist()
    [6.0]
  """
  return leafwise(lambda x, leaf: x * leaf.number("weight", x), numbers={"weight": weight})


_sum = functools.partial(jnp.sum, axis=0, keepdims=True)


def _spread(x: Array, leaf: Leaf) -> Array:
  """The weights as [K, 1, ...], also where one number stands for all models."""
  weight = leaf.number("weight", x)
  return jnp.broadcast_to(weight, x.shape[:1] + (1,) * (x.ndim - 1)) if weight.ndim == 0 else weight


def _mean(x: Array, leaf: Leaf) -> Array:
  weight = _spread(x, leaf)
  return _over(_sum(x * weight), _sum(weight))


def _over(total: Array, weight: Array) -> Array:
  # Compilers make a product of a division by one number where the array is large, but not where it
  # is small: the last bit would depend on how a leaf is cut.
  return total * (1 / weight)


def _add_to_mean(held: dict[str, Array] | None, x: Array, leaf: Leaf) -> dict[str, Array]:
  weight = _spread(x, leaf)
  part = {"sum": _sum(x * weight), "weight": _sum(weight)}
  return part if held is None else {k: held[k] + part[k] for k in part}


def _refuse_zero_sum(group: Group) -> dict[str, Array]:
  weight = group.number("weight")
  if isinstance(weight, jax.core.Tracer) or not getattr(weight, "is_fully_addressable", True):
    return {}
  each = np.asarray(weight, np.float64)
  if each.ndim <= 1 and abs(np.broadcast_to(each, (group.height,)).sum()) < 1e-8:
    (name,) = group.shapes
    raise ValueError(
      f"average: weights must not add up to zero, got {each.tolist()} for leaf {name!r}; "
      "give other weights or normalize=False."
    )
  return {}
