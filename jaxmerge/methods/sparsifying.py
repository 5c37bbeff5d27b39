"""Sparsifying task vectors: by magnitude and at random."""

from __future__ import annotations

from typing import Any, Literal  # Any: what is known is a tree of arrays.

import jax.numpy as jnp

from jaxmerge import catalog, statistics
from jaxmerge.methods import averaging, random_masks
from jaxmerge.stage import Array, Group, Leaf, Method, Rank, Scope, Stage, Sum, chain

_dare = catalog.METHODS["dare"].parameters


def trim(density: float, *, scope: Scope = "tree", rule: Literal["kth", "exact"] = "kth") -> Method:
  """Keeps the largest `density` of the entries of each task vector, by magnitude.

  The threshold is exact: a search over float bit patterns, with no sort and no gather.

  Args:
    density: fraction kept, in (0, 1]. 1 keeps all.
    scope: entries are counted over the whole model or per leaf.
    rule: "kth" keeps every entry at least as large as the (d - floor(density * d))-th smallest of
      d, hence one more than the fraction, and all that tie with it; "exact" keeps
      floor(density * d) entries, the first ones among those that tie.

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
    more = 0 if exact else 1
    return {"kept": statistics.share(group.number("density"), group.size, group.height, more=more)}

  def update(x: Array, leaf: Leaf, known: Any) -> Array:
    return jnp.where(statistics.inside(known["cut"], jnp.abs(x), leaf), x, 0)

  cut = Rank("cut", lambda x, leaf: jnp.abs(x), rank="kept", exact=exact)
  return (Stage(update, (cut,), init, {"density": density}, scope=scope),)


def drop(
  drop_rate: float = _dare["drop_rate"].default,
  *,
  rescale: str | None = _dare["rescale"].default,
) -> Method:
  """Drops entries of each task vector at random, and makes up for them.

  Masks come from one hash of (seed, leaf, model, index), so they depend neither on visiting order,
  cutting or sharding, nor on which other leaves and models there are. The driver takes the seed.

  Args:
    drop_rate: probability that an entry is dropped, in [0, 1]. 1 drops all.
    rescale: "inverse" divides by 1 - drop_rate; "l1", "l2", "linf" restore that norm of the whole
      leaf, where neither norm is below 1e-7; None leaves the entries as they are.

  Reference: Yu et al. 2024, Language models are super Mario (arXiv:2311.03099).

  Example:
    >>> import jaxmerge
    >>> kept = jaxmerge.blend(drop(0.75), {"w": jnp.ones((1, 1000))}, seed=0)["w"]
    >>> sorted(set(kept.tolist())), 0.7 < (kept == 0).mean() < 0.8
    ([0.0, 4.0], Array(True, dtype=bool))
  """
  catalog.check("dare", {"drop_rate": drop_rate, "rescale": rescale})

  def kept(x: Array, leaf: Leaf) -> Array:
    return random_masks.uniform(x, leaf) >= leaf.number("drop_rate", x)

  def thin(x: Array, leaf: Leaf) -> Array:
    return jnp.where(kept(x, leaf), x, 0)

  def share(x: Array, leaf: Leaf, known: Any) -> Array:
    """What the kept entries amount to, of the whole."""
    if rescale == "inverse":
      return 1 - leaf.number("drop_rate", x)
    before, after = (known["norms"][i].reshape((-1,) + (1,) * (x.ndim - 1)) for i in range(2))
    usable = (before >= 1e-7) & (after >= 1e-7)
    return jnp.where(usable, after / jnp.where(usable, before, 1), 1)

  def update(x: Array, leaf: Leaf, known: Any) -> Array:
    if rescale is None:
      return thin(x, leaf)
    # The divisor is chosen entry by entry: compilers make a product of a division by one number
    # where the array is large, and the last bit would depend on how a leaf is cut.
    mask = kept(x, leaf)
    return jnp.where(mask, x, 0) / jnp.where(mask, share(x, leaf, known), 1)

  numbers = {"drop_rate": drop_rate, "seed": None}
  if rescale in ("inverse", None):
    return (Stage(update, numbers=numbers),)
  return (Stage(update, _norms(rescale, thin), numbers=numbers, scope="leaf"),)


def dare(
  drop_rate: float = _dare["drop_rate"].default,
  scale: float = _dare["scale"].default,
  weight: float | tuple[float, ...] = _dare["weight"].default,
  rescale: str | None = _dare["rescale"].default,
) -> Method:
  """Drops entries at random, rescales the rest, and adds the task vectors up. Needs a seed.

  Args:
    drop_rate: probability that an entry is dropped, in [0, 1].
    scale: factor on the sum of the task vectors.
    weight: weight of each task vector, scalar or one per model.
    rescale: see `drop`.

  Reference: Yu et al. 2024 (arXiv:2311.03099).

  Example:
    >>> import jaxmerge
    >>> base, experts = {"w": jnp.zeros(2)}, {"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
    >>> jaxmerge.merge(dare(drop_rate=0.0, scale=0.5), base, experts, seed=0)["w"].tolist()
    [2.0, 3.0]
  """
  catalog.check("dare", {"scale": scale, "weight": weight})
  return chain(
    drop(drop_rate, rescale=rescale), averaging.weighted_sum(weight), averaging.scaled(scale)
  )


def _norms(kind: str, thin: Any) -> tuple[Sum, ...]:
  """Measures a norm of each model's leaf before and after thinning: [2, K]."""

  def powers(x: Array, leaf: Leaf) -> Array:
    both = jnp.stack([jnp.abs(x), jnp.abs(thin(x, leaf))])
    axes = tuple(range(2, both.ndim))
    if kind == "linf":
      return jnp.max(both, axis=axes)
    return jnp.sum(both if kind == "l1" else both * both, axis=axes)

  if kind == "linf":
    return (statistics.greatest("norms", powers),)
  if kind == "l1":
    return (statistics.total("norms", powers),)
  return (statistics.total("norms", powers)._replace(finish=jnp.sqrt),)
