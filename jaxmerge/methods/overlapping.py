"""RAM: entries that only one model changes are kept, those that many change are averaged."""

from __future__ import annotations

from typing import Any, Literal  # Any: what is known is a tree of arrays.

import jax.numpy as jnp

from jaxmerge import catalog, statistics
from jaxmerge.stage import Array, Leaf, Method, Stage, Sum, leafwise

_ram = catalog.METHODS["ramplus_tl"].parameters


def ram(threshold: float = _ram["threshold"].default) -> Method:
  """Divides each entry of the sum of the task vectors by the number of models that change it.

  Experimental: it has been checked against mergekit, not against the authors' code.

  Args:
    threshold: entries up to this magnitude count as unchanged, and as zero.

  Reference: Yuan et al. 2026, Behavior knowledge merge in reinforced agentic models
  (arXiv:2601.13572).

  Example:
    >>> import jaxmerge
    >>> base, experts = {"w": jnp.zeros(3)}, {"w": jnp.array([[1.0, 2.0, 0.0], [0.0, 4.0, 0.0]])}
    >>> jaxmerge.merge(ram(), base, experts)["w"].tolist()
    [1.0, 3.0, 0.0]
  """
  catalog.check("ram", {"threshold": threshold})

  def mean(x: Array, leaf: Leaf) -> Array:
    changed = _changed(x, leaf)
    return _shared_mean(jnp.where(changed, x, 0), changed)

  return leafwise(mean, numbers={"threshold": threshold}, combines=True)


def ramplus_tl(
  threshold: float = _ram["threshold"].default,
  boost: float = _ram["boost"].default,
  limit: float = _ram["limit"].default,
  scope: Literal["leaf", "tree"] = _ram["scope"].default,
) -> Method:
  """As `ram`, but amplifies the entries that only one model changes.

  They are multiplied by 1 + boost * min(rho, limit), with rho the number of entries that the model
  shares with others, for each that it alone changes.

  Experimental: it has been checked against mergekit, not against the authors' code.

  Args:
    threshold: entries up to this magnitude count as unchanged, and as zero.
    boost: how much is amplified, r.
    limit: bound on rho, alpha.
    scope: rho is counted per leaf, as mergekit does ("tensor-local"), or over the whole model.

  Reference: Yuan et al. 2026 (arXiv:2601.13572), RAM+.

  Example:
    >>> import jaxmerge
    >>> base, experts = {"w": jnp.zeros(3)}, {"w": jnp.array([[1.0, 2.0, 0.0], [0.0, 4.0, 0.0]])}
    >>> jaxmerge.merge(ramplus_tl(boost=0.5, limit=2.0), base, experts)["w"].tolist()
    [1.5, 3.0, 0.0]
  """
  given = {"threshold": threshold, "boost": boost, "limit": limit}
  catalog.check("ramplus_tl", {**given, "scope": scope})

  def counts(x: Array, leaf: Leaf, known: Any) -> tuple[Array, Array]:
    changed = _changed(x, leaf)
    alone = _changers(changed) == 1
    return statistics.count(changed & ~alone), statistics.count(changed & alone)

  def update(x: Array, leaf: Leaf, known: Any) -> Array:
    shared, unique = (_number(n, x) for n in known["counts"])
    boost, limit = (leaf.number(n, shared) for n in ("boost", "limit"))
    factor = 1 + boost * jnp.minimum(shared / jnp.maximum(unique, 1), limit)
    changed = _changed(x, leaf)
    factor = jnp.where(_changers(changed) == 1, factor.reshape((-1,) + (1,) * (x.ndim - 1)), 1)
    return _shared_mean(jnp.where(changed, x * factor, 0), changed)

  measured = Sum("counts", counts, combine=statistics.plus)
  return (Stage(update, (measured,), numbers=given, scope=scope, combines=True),)


def _changed(x: Array, leaf: Leaf) -> Array:
  return jnp.abs(x) > leaf.number("threshold", x)


def _changers(changed: Array) -> Array:
  """How many models change each entry: [K, *s] -> [1, *s]."""
  return jnp.sum(changed, axis=0, keepdims=True, dtype=jnp.int32)


def _shared_mean(x: Array, changed: Array) -> Array:
  """The sum of the models over how many change each entry; the divisor is a whole number."""
  return jnp.sum(x, axis=0, keepdims=True) / jnp.maximum(_changers(changed), 1).astype(x.dtype)


def _number(limbs: Array, like: Array) -> Array:
  return limbs[0].astype(like.dtype) * 2**statistics.LIMB + limbs[1].astype(like.dtype)
