"""Sparsifying task vectors: by magnitude and at random."""

from __future__ import annotations

from typing import Any, Literal  # Any: what is known is a tree of arrays.

import jax.numpy as jnp

from jaxmerge import catalog, counting, statistics
from jaxmerge.methods import averaging, random_masks
from jaxmerge.methods.factory import named
from jaxmerge.stage import (
  Array,
  Group,
  Leaf,
  Method,
  Rank,
  Scope,
  Stage,
  chain,
  join,
  leafwise,
)


@named
def trim(density: float, *, scope: Scope = "tree", rule: Literal["kth", "exact"] = "kth") -> Method:
  """Keeps the largest `density` of the entries of each task vector, by magnitude.

  The threshold is exact: a search over float bit patterns, with no sort and no gather.

  Args:
    density: fraction kept, in (0, 1]. 1 keeps all.
    scope: entries are counted over the whole model or per leaf.
    rule: "kth" keeps every entry at least as large as the (d - floor(density * d))-th smallest of
      d, hence one more than the fraction, and all that tie with it; "exact" keeps
      max(1, floor(density * d)) entries, the first ones among those that tie.

  Reference: Yadav et al. 2023, TIES-Merging (arXiv:2306.01708), step 1.

  Example:
    >>> import jaxmerge
    >>> x = {"w": jnp.array([[4.0, -3.0, 2.0, 1.0]])}
    >>> jaxmerge.blend(trim(0.5), x)["w"].tolist()
    [4.0, -3.0, 2.0, 0.0]
    >>> jaxmerge.blend(trim(0.5, rule="exact"), x)["w"].tolist()
    [4.0, -3.0, 0.0, 0.0]
  """
  chosen = {} if callable(scope) else {"scope": scope}
  catalog.check("ties", {"density": density, "rule": rule, **chosen})
  exact = rule == "exact"

  def init(group: Group) -> dict[str, Any]:
    if exact:
      statistics.refuse_unrankable(group)
    density = group.number("density")
    extra = {"least": 1} if exact else {"more": 1}
    return {"kept": counting.share(density, group.size, group.height, **extra)}

  def update(x: Array, leaf: Leaf, known: Any) -> Array:
    return jnp.where(statistics.inside(known["cut"], jnp.abs(x), leaf), x, 0)

  cut = Rank("cut", lambda x, leaf, known: jnp.abs(x), rank="kept", exact=exact)
  return Method((Stage(update, (cut,), init, {"density": density}, scope=scope),))


@named
def drop(
  drop_rate: float = 0.5,
  *,
  rescale: str | None = "inverse",
) -> Method:
  """Drops entries of each task vector at random, and makes up for them.

  Masks come from one hash of (seed, leaf, model, index), so they depend neither on visiting order,
  cutting or sharding, nor on which other leaves and models there are. The driver takes the seed.

  Args:
    drop_rate: probability that an entry is dropped, in [0, 1]. 1 drops all.
    rescale: "inverse" divides by 1 - drop_rate; "l1", "l2", "linf" restore that norm of the whole
      leaf, see `matched`; None leaves the entries as they are.

  Reference: Yu et al. 2024, Language models are super Mario (arXiv:2311.03099).

  Example:
    >>> import jaxmerge
    >>> kept = jaxmerge.blend(drop(0.75), {"w": jnp.ones((1, 1000))}, seed=0)["w"]
    >>> sorted(set(kept.tolist())), 0.7 < (kept == 0).mean() < 0.8
    ([0.0, 4.0], Array(True, dtype=bool))
  """
  catalog.check("dare", {"drop_rate": drop_rate, "rescale": rescale})

  def update(x: Array, leaf: Leaf) -> Array:
    rate = leaf.number("drop_rate", x)
    kept = random_masks.chosen(x, leaf, 1 - rate)
    thin = jnp.where(kept, x, 0)
    # The divisor is chosen entry by entry: compilers make a product of a division by one number
    # where the array is large, and the last bit would depend on how a leaf is cut.
    return thin / jnp.where(kept, 1 - rate, 1) if rescale == "inverse" else thin

  thinned = leafwise(update, numbers={"drop_rate": drop_rate, "seed": None})
  return thinned if rescale == "inverse" else matched(thinned, rescale)


@named
def matched(method: Method, norm: str | None) -> Method:
  """Runs a transform, then gives each model's leaf back the norm that it had before.

  Args:
    method: a transform.
    norm: "l1", "l2" or "linf"; None runs the transform alone. Where a norm before or after is zero,
      entries stay as they are.

  Example:
    >>> import jaxmerge
    >>> x = {"w": jnp.array([[4.0, -3.0, 2.0, 1.0]])}
    >>> jaxmerge.blend(matched(trim(0.25, rule="exact"), "l1"), x)["w"].tolist()
    [10.0, 0.0, 0.0, 0.0]
  """
  if norm is None:
    return method

  def powers(*pair: Array) -> tuple[Array, ...]:
    sizes = (jnp.abs(x) if norm != "l2" else x * x for x in pair)
    reduce = jnp.max if norm == "linf" else jnp.sum
    return tuple(reduce(size, axis=tuple(range(1, size.ndim))) for size in sizes)

  def update(pair: tuple[Array, Array], leaf: Leaf, known: Any) -> Array:
    before, after = known["powers"]
    usable = (before > 0) & (after > 0)
    share = jnp.where(usable, after, 1) / jnp.where(usable, before, 1)
    share = jnp.sqrt(share) if norm == "l2" else share
    # Chosen entry by entry, as in `drop`.
    return pair[1] / jnp.where(pair[1] != 0, share.reshape((-1,) + (1,) * (pair[1].ndim - 1)), 1)

  if norm == "linf":
    measured = statistics.greatest("powers", lambda pair, leaf: powers(*pair))
  else:
    measured = statistics.squares("powers", powers, degree=2 if norm == "l2" else 1)
  return join(method, Stage(update, (measured,), scope="leaf"))


@named
def dare(
  drop_rate: float = 0.5,
  scale: float = 0.3,
  weight: float | tuple[float, ...] = 1.0,
  rescale: str | None = "inverse",
  normalize: bool = False,
) -> Method:
  """Drops entries at random, rescales the rest, and adds the task vectors up. Needs a seed.

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
    >>> jaxmerge.merge(dare(drop_rate=0.0, scale=0.5), base, experts, seed=0)["w"].tolist()
    [2.0, 3.0]
  """
  catalog.check("dare", {"scale": scale, "weight": weight, "normalize": normalize})
  adding = averaging.weighted_sum(weight, normalize=normalize)
  return chain(drop(drop_rate, rescale=rescale), adding, averaging.scaled(scale))
