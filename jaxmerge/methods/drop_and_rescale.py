"""DARE: drops entries at random, and rescales the others."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp

from jaxmerge.catalog import lookup
from jaxmerge.core import random_masks
from jaxmerge.core.stage import Array, Leaf, Method, Scope, chain, leafwise
from jaxmerge.methods import averages, sparsify, ties_merging
from jaxmerge.methods.factory import named


@named
def drop(
  drop_rate: float = 0.5,
  *,
  rescale: str | None = "inverse",
) -> Method:
  """Drops entries of each task vector at random, and rescales the others.

  Masks come from one hash of (seed, leaf, model, index). They do not depend on the order of visits,
  slices or shards, nor on other leaves and models. The driver takes the seed.

  Args:
    drop_rate: probability that an entry is dropped, in [0, 1]. 1 drops all.
    rescale: "inverse" divides by 1 - drop_rate; "l1", "l2", "linf" restore that norm of the whole
      leaf, see `matched`; None does not rescale.

  Reference: Yu et al. 2024, Language models are super Mario (arXiv:2311.03099).

  Example:
    >>> import jaxmerge
    >>> x = jaxmerge.merge(drop(0.75), {"w": jnp.ones((1, 1000))}, seed=0)["w"]
    >>> sorted(set(x.tolist())), 0.7 < (x == 0).mean() < 0.8
    ([0.0, 4.0], Array(True, dtype=bool))
  """
  lookup.check("dare", {"drop_rate": drop_rate, "rescale": rescale})

  def update(x: Array, leaf: Leaf) -> Array:
    rate = leaf.hparam("drop_rate", x)
    mask = random_masks.chosen(x, leaf, 1 - rate)
    thin = jnp.where(mask, x, 0)
    # The divisor is selected entry by entry: compilers turn a division by one number into a product
    # if the array is large, and the last bit would depend on how a leaf is cut.
    return thin / jnp.where(mask, 1 - rate, 1) if rescale == "inverse" else thin

  thinned = leafwise(update, hparams={"drop_rate": drop_rate, "seed": None})
  return thinned if rescale == "inverse" else sparsify.matched(thinned, rescale)


@named
def dare(
  drop_rate: float = 0.5,
  scale: float = 0.3,
  weight: float | tuple[float, ...] = 1.0,
  rescale: str | None = "inverse",
  normalize: bool = False,
) -> Method:
  """Drops entries at random, rescales the rest, and adds up the task vectors. Needs a seed.

  Args:
    drop_rate: probability that an entry is dropped, in [0, 1].
    scale: factor on the sum of the task vectors.
    weight: weight of each task vector, scalar or one per model.
    rescale: see `drop`.
    normalize: divide by the sum of the weights, see `weighted_sum`.

  Reference: Yu et al. 2024 (arXiv:2311.03099).

  Example:
    >>> import jaxmerge
    >>> base, experts = {"w": jnp.zeros(2)}, {"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
    >>> jaxmerge.merge(dare(drop_rate=0.0, scale=0.5), experts, base, seed=0)["w"].tolist()
    [2.0, 3.0]
  """
  lookup.check("dare", {"scale": scale, "weight": weight, "normalize": normalize})
  sums = averages.weighted_sum(weight, normalize=normalize)
  return chain(drop(drop_rate, rescale=rescale), sums, averages.scaled(scale))


@named
def dare_ties(
  drop_rate: float = 0.5,
  density: float = 0.2,
  scale: float = 1.0,
  weight: float | tuple[float, ...] = 1.0,
  rescale: str | None = "inverse",
  scope: Scope = "tree",
  rule: Literal["kth", "exact"] = "kth",
  reduce: Literal["mean", "sum", "max"] = "mean",
  zero_sum: Literal["majority", "plus"] = "majority",
) -> Method:
  """Drops entries at random (`drop`), then merges by `ties`. Needs a seed.

  Reference: Yu et al. 2024 (arXiv:2311.03099).

  Example:
    >>> import jaxmerge
    >>> base = {"w": jnp.zeros(3)}
    >>> experts = {"w": jnp.array([[1.0, -2.0, 0.1], [3.0, 1.0, 0.2]])}
    >>> method = dare_ties(drop_rate=0.0, density=0.4)
    >>> jaxmerge.merge(method, experts, base, seed=0)["w"].tolist()
    [2.0, -2.0, 0.0]
  """
  return chain(
    drop(drop_rate, rescale=rescale),
    ties_merging.ties(density, scale, weight, scope, rule, reduce, zero_sum),
  )
