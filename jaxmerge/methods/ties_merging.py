"""TIES-Merging: elects a sign where task vectors disagree, and joins the entries that agree."""

from __future__ import annotations

import functools
from typing import Any, Literal  # Any: reduction results are trees of arrays.

import jax.numpy as jnp

from jaxmerge.catalog import lookup
from jaxmerge.core import reductions, wide_counts
from jaxmerge.core.stage import Array, Group, Leaf, Method, Scope, Stage, chain, leafwise, pointwise
from jaxmerge.methods import averages, sparsify
from jaxmerge.methods.factory import named

_sum = functools.partial(jnp.sum, axis=0, keepdims=True)


@named
def elect_sign(
  zero_sum: Literal["majority", "plus"] = "majority",
  slack: float | tuple[float, ...] | None = None,
  *,
  votes: Literal["sum", "count"] = "sum",
  deferred: bool = False,
) -> Method:
  """Zeroes the entries whose sign is not that of the sum over the models: [K, ...] -> [K, ...].

  Args:
    zero_sum: for sums of zero, "majority" elects the sign that most entries of the merged model
      have, as the authors do, and zeroes the entry in all models if that is a draw; "plus" elects
      the positive sign, as mergekit and peft do.
    slack: how much more a model's entries count in the sum, scalar or one per model; None: 0.
    votes: what is added up: "sum" the entries, "count" their signs.
    deferred: whether the majority may be counted late, see `Stage`; stages that follow must not
      change NaN.

  Reference: Yadav et al. 2023, TIES-Merging (arXiv:2306.01708), step 2.

  Example:
    >>> import jaxmerge
    >>> x = {"w": jnp.array([[3.0, 1.0], [-1.0, 1.0]])}
    >>> method = chain(elect_sign(), averages.weighted_sum())
    >>> jaxmerge.merge(method, x)["w"].tolist()
    [3.0, 2.0]
  """
  hparams = {} if slack is None else {"slack": slack}
  is_equal = slack is None

  def total(x: Array, leaf: Leaf) -> Array:
    each = jnp.sign(x) if votes == "count" else x
    return _sum(each if is_equal else each * (1 + leaf.hparam("slack", x)))

  if zero_sum == "plus":
    return leafwise(lambda x, leaf: agreeing(x, total(x, leaf)), hparams=hparams)

  def sides(x: Array, leaf: Leaf) -> Array:
    # Minus, zero and plus count 0, 1 and 2, so that one sum counts both signs.
    return wide_counts.count((1 + jnp.sign(total(x, leaf))).astype(jnp.uint32), most=2)

  def update(x: Array, leaf: Leaf, known: Any) -> Array:
    merged = total(x, leaf)
    signs = x * jnp.where(merged > 0, 1, jnp.where(merged < 0, -1, majority(x, known)))
    agreed = jnp.where(signs > 0, x, 0)
    return agreed if "sides" in known else jnp.where(jnp.isnan(signs) & (x != 0), jnp.nan, agreed)

  def majority(x: Array, known: Any) -> Array | float:
    if "sides" not in known:
      return jnp.nan
    total, even = known["sides"], known["even"]
    more, fewer = (wide_counts.at_least(a, b)[0] for a, b in ((total, even), (even, total)))
    return more.astype(x.dtype) - fewer.astype(x.dtype)

  count = reductions.total("sides", sides)._replace(combine=wide_counts.plus)
  return Method((Stage(update, (count,), _even, hparams, deferred=deferred),))


def _even(group: Group) -> dict[str, Any]:
  """Returns the total of `sides` if as many entries are positive as negative."""
  return {"even": wide_counts.limbs(group.size)[:, None]}


def agreeing(x: Array, total: Array | None = None) -> Array:
  """Zeroes the entries whose sign is not that of the sum; a sum of zero counts as positive.

  A total [1, *s] may take the place of the sum.

  Example:
    >>> agreeing(jnp.array([[3.0, 1.0], [-1.0, -1.0]])).tolist()
    [[3.0, 1.0], [0.0, 0.0]]
  """
  total = _sum(x) if total is None else total
  return jnp.where(x * jnp.where(total < 0, -1, 1) > 0, x, 0)


@named
def disjoint_mean(weight: float | tuple[float, ...] | None = 1.0) -> Method:
  """Averages, entry by entry, the models whose entry is not zero: [K, ...] -> [1, ...].

  The divisor is the sum of the weights of those models, by which the entries must already be
  multiplied; with None it is their number. An entry that is zero in all models stays zero.

  Reference: Yadav et al. 2023, TIES-Merging (arXiv:2306.01708), step 3.

  Example:
    >>> import jaxmerge
    >>> jaxmerge.merge(disjoint_mean(), {"w": jnp.array([[3.0, 0.0], [1.0, 4.0]])})["w"].tolist()
    [2.0, 4.0]
  """
  is_equal = weight is None

  def mean(x: Array, leaf: Leaf) -> Array:
    each = jnp.ones((), x.dtype) if is_equal else leaf.hparam("weight", x)
    divisor = _sum(jnp.where(x != 0, each, 0))
    return _sum(x) / jnp.where(divisor == 0, 1, divisor)

  return leafwise(mean, hparams={} if weight is None else {"weight": weight}, combines=True)


@named
def disjoint_max() -> Method:
  """Takes, entry by entry, the largest magnitude: [K, ...] -> [1, ...].

  The models should agree on the sign; where they do not, it takes the largest positive entry.

  Example:
    >>> import jaxmerge
    >>> jaxmerge.merge(disjoint_max(), {"w": jnp.array([[3.0, -1.0], [1.0, -4.0]])})["w"].tolist()
    [3.0, -4.0]
  """

  def extreme(x: Array, leaf: Leaf) -> Array:
    high = jnp.max(x, axis=0, keepdims=True)
    return jnp.where(high > 0, high, jnp.min(x, axis=0, keepdims=True))

  return leafwise(extreme, combines=True)


@named
def elected(
  scale: float = 1.0,
  weight: float | tuple[float, ...] = 1.0,
  reduce: Literal["mean", "sum", "max"] = "mean",
  zero_sum: Literal["majority", "plus"] = "majority",
  votes: Literal["sum", "count"] = "sum",
) -> Method:
  """Weighs the models, elects a sign per entry, and joins the entries that agree.

  It is TIES after the trimming; arguments as for `ties`.

  Example:
    >>> import jaxmerge
    >>> x = {"w": jnp.array([[3.0, 1.0], [-1.0, 2.0]])}
    >>> jaxmerge.merge(elected(scale=2.0), x)["w"].tolist()
    [6.0, 3.0]
  """
  election = {"zero_sum": zero_sum, "votes": votes}
  lookup.check("ties", {"scale": scale, "weight": weight, "reduce": reduce, **election})
  join = {
    "mean": lambda: disjoint_mean(weight),
    # The entries are multiplied by their weights already.
    "sum": lambda: pointwise(_sum, combines=True),
    "max": disjoint_max,
  }[reduce]()
  election_stage = elect_sign(zero_sum, votes=votes, deferred=True)
  return chain(averages.weighted(weight), election_stage, join, averages.scaled(scale))


@named
def ties(
  density: float = 0.2,
  scale: float = 1.0,
  weight: float | tuple[float, ...] = 1.0,
  scope: Scope = "tree",
  rule: Literal["kth", "exact"] = "kth",
  reduce: Literal["mean", "sum", "max"] = "mean",
  zero_sum: Literal["majority", "plus"] = "majority",
  rescale: str | None = None,
  votes: Literal["sum", "count"] = "sum",
) -> Method:
  """Trims each task vector, elects a sign per entry, and averages the entries that agree.

  Args:
    density: fraction of the entries kept, in (0, 1].
    scale: factor on the merged task vector.
    weight: weight of each model, scalar or one per model; weighted entries vote, and the mean
      divides by the weights of those that agree.
    scope: entries are ranked over the whole model, as the authors do, or per leaf.
    rule: for entries at the threshold, see `trim`.
    reduce: joins the entries that agree.
    zero_sum: the sign elected where the entries cancel out, see `elect_sign`.
    rescale: norm of each leaf that is restored after trimming, see `matched`; None: none.
    votes: elects the sign: the "sum" of the entries, or the "count" of those with either sign.

  Reference: Yadav et al. 2023, TIES-Merging (arXiv:2306.01708).

  Example:
    >>> import jax.numpy as jnp, jaxmerge
    >>> base = {"w": jnp.zeros(3)}
    >>> experts = {"w": jnp.array([[1.0, -2.0, 0.1], [3.0, 1.0, 0.2]])}
    >>> jaxmerge.merge(ties(density=0.4), experts, base)["w"].tolist()
    [2.0, -2.0, 0.0]
  """
  settings = {"rule": rule, "rescale": rescale, "reduce": reduce, "zero_sum": zero_sum}
  settings |= {"votes": votes} if callable(scope) else {"votes": votes, "scope": scope}
  lookup.check("ties", {"density": density, "scale": scale, "weight": weight, **settings})
  trimmed = sparsify.matched(sparsify.trim(density, scope=scope, rule=rule), rescale)
  return chain(trimmed, elected(scale, weight, reduce, zero_sum, votes))


@named
def ties_slack(
  slack: float | tuple[float, ...] = 0.0,
  density: float = 0.2,
  scale: float = 1.0,
  scope: Scope = "tree",
  rule: Literal["kth", "exact"] = "kth",
) -> Method:
  """Merges as `ties` does, but the entries of some models count for more in the election.

  It helps a model tuned on little data beside one that moved far: its entries lose fewer elections.
  They are averaged without the slack.

  Experimental: the paper's inequality could not be read; this is one way to have its effect.

  Args:
    slack: an entry votes as if (1 + slack) times as large, scalar or one per model: (0, 0.5) helps
      the second of two models. 0 is TIES; with a large slack a model always wins.
    density: fraction of the entries kept, in (0, 1].
    scale: factor on the merged task vector.
    scope: see `ties`.
    rule: see `trim`.

  Reference: Tao et al. 2024, Model merging for low-resource languages (arXiv:2407.03994), TIES-SV.

  Example:
    >>> import jaxmerge
    >>> x = {"w": jnp.array([[-0.5, -0.5], [0.375, -0.25]])}
    >>> jaxmerge.merge(ties_slack(slack=(0.0, 0.5), density=1.0), x, deltas=True)["w"].tolist()
    [0.375, -0.375]
  """
  lookup.check("ties_slack", {"slack": slack, "density": density, "scale": scale, "rule": rule})
  trimmed = sparsify.trim(density, scope=scope, rule=rule)
  return chain(trimmed, elect_sign(slack=slack), disjoint_mean(), averages.scaled(scale))
