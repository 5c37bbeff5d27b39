"""Trims task vectors by magnitude, and restores their norms."""

from __future__ import annotations

from typing import Any, Literal  # Any: reduction results are trees of arrays.

import jax.numpy as jnp

from jaxmerge.catalog import lookup
from jaxmerge.core import order_statistics, reductions, wide_counts
from jaxmerge.core.stage import Array, Group, Leaf, Method, Rank, Scope, Stage, join
from jaxmerge.methods.factory import named


@named
def trim(density: float, *, scope: Scope = "tree", rule: Literal["kth", "exact"] = "kth") -> Method:
  """Keeps the largest `density` of the entries of each task vector, by magnitude.

  The threshold is exact: a search over float bit patterns, with no sort and no gather.

  Args:
    density: fraction kept, in (0, 1]. 1 keeps all.
    scope: entries are counted over the whole model or per leaf.
    rule: "kth" keeps every entry at least as large as the (d - floor(density * d))-th smallest of
      d, hence one more than the fraction, and all that are equal to it; "exact" keeps
      max(1, floor(density * d)) entries, the first ones among equal ones.

  Reference: Yadav et al. 2023, TIES-Merging (arXiv:2306.01708), step 1.

  Example:
    >>> import jaxmerge
    >>> x = {"w": jnp.array([[4.0, -3.0, 2.0, 1.0]])}
    >>> jaxmerge.merge(trim(0.5), x)["w"].tolist()
    [4.0, -3.0, 2.0, 0.0]
    >>> jaxmerge.merge(trim(0.5, rule="exact"), x)["w"].tolist()
    [4.0, -3.0, 0.0, 0.0]
  """
  settings = {"rule": rule} if callable(scope) else {"rule": rule, "scope": scope}
  lookup.check("ties", {"density": density, **settings})
  exact = rule == "exact"

  def init(group: Group) -> dict[str, Any]:
    if exact:
      order_statistics.refuse_unrankable(group)
    density = group.hparam("density")
    extra = {"least": 1} if exact else {"more": 1}
    return {"kept": wide_counts.share(density, group.size, group.num_models, **extra)}

  def update(x: Array, leaf: Leaf, known: Any) -> Array:
    return jnp.where(order_statistics.inside(known["cut"], jnp.abs(x), leaf), x, 0)

  cut = Rank("cut", lambda x, leaf, known: jnp.abs(x), rank="kept", exact=exact)
  return Method((Stage(update, (cut,), init, {"density": density}, scope=scope),))


@named
def matched(method: Method, norm: str | None) -> Method:
  """Runs a transform, then restores the norm that each model's leaf had before.

  Args:
    method: a transform.
    norm: "l1", "l2" or "linf"; None runs the transform alone. If a norm before or after is zero,
      entries are not rescaled.

  Example:
    >>> import jaxmerge
    >>> x = {"w": jnp.array([[4.0, -3.0, 2.0, 1.0]])}
    >>> jaxmerge.merge(matched(trim(0.25, rule="exact"), "l1"), x)["w"].tolist()
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
    # The divisor is selected entry by entry, as in `drop`.
    return pair[1] / jnp.where(pair[1] != 0, share.reshape((-1,) + (1,) * (pair[1].ndim - 1)), 1)

  if norm == "linf":
    measured = reductions.greatest("powers", lambda pair, leaf: powers(*pair))
  else:
    measured = reductions.squares("powers", powers, degree=2 if norm == "l2" else 1)
  return join(method, Stage(update, (measured,), scope="leaf"))
