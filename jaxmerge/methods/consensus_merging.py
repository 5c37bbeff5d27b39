"""Merges each entry by how many models change it (RAM), or need it (Consensus Merging)."""

from __future__ import annotations

from typing import Any, Literal  # Any: reduction results are trees of arrays.

import jax.numpy as jnp

from jaxmerge.catalog import lookup
from jaxmerge.core import wide_counts
from jaxmerge.core.stage import Array, Leaf, Method, Stage, Sum, chain, leafwise
from jaxmerge.methods import averages
from jaxmerge.methods.factory import named


@named
def ram(threshold: float = 1e-05) -> Method:
  """Divides each entry of the sum of the task vectors by the number of models that change it.

  Args:
    threshold: entries up to this magnitude count as unchanged, and as zero.

  Reference: Yuan et al. 2026, Behavior knowledge merge in reinforced agentic models
  (arXiv:2601.13572).

  Example:
    >>> import jaxmerge
    >>> base, experts = {"w": jnp.zeros(3)}, {"w": jnp.array([[1.0, 2.0, 0.0], [0.0, 4.0, 0.0]])}
    >>> jaxmerge.merge(ram(), experts, base)["w"].tolist()
    [1.0, 3.0, 0.0]
  """
  lookup.check("ram", {"threshold": threshold})

  def mean(x: Array, leaf: Leaf) -> Array:
    changed = _changed(x, leaf)
    return _shared_mean(jnp.where(changed, x, 0), changed)

  return leafwise(mean, hparams={"threshold": threshold}, combines=True)


@named
def ramplus_tl(
  threshold: float = 1e-05,
  boost: float = 0.1,
  limit: float = 0.2,
  scope: Literal["leaf", "tree"] = "leaf",
) -> Method:
  """Merges as `ram` does, but amplifies the entries that only one model changes.

  They are multiplied by 1 + boost * min(rho, limit), with rho the ratio of the entries that a model
  changes with others to those that it changes alone. The defaults are those of mergekit; the
  authors' code has a limit of 1 and counts over the whole model.

  Args:
    threshold: entries up to this magnitude count as unchanged, and as zero.
    boost: the amplification, r.
    limit: bound on rho, alpha.
    scope: rho is counted per leaf, as mergekit does ("tensor-local"), or over the whole model.

  Reference: Yuan et al. 2026 (arXiv:2601.13572), RAM+.

  Example:
    >>> import jaxmerge
    >>> base, experts = {"w": jnp.zeros(3)}, {"w": jnp.array([[1.0, 2.0, 0.0], [0.0, 4.0, 0.0]])}
    >>> jaxmerge.merge(ramplus_tl(boost=0.5, limit=2.0), experts, base)["w"].tolist()
    [1.5, 3.0, 0.0]
  """
  hparams = {"threshold": threshold, "boost": boost, "limit": limit}
  lookup.check("ramplus_tl", {**hparams, "scope": scope})

  def counts(x: Array, leaf: Leaf, known: Any) -> tuple[Array, Array]:
    changed = _changed(x, leaf)
    alone = _changers(changed) == 1
    return wide_counts.count(changed & ~alone), wide_counts.count(changed & alone)

  def update(x: Array, leaf: Leaf, known: Any) -> Array:
    shared, unique = (_number(n, x) for n in known["counts"])
    boost, limit = (leaf.hparam(n, shared) for n in ("boost", "limit"))
    factor = 1 + boost * jnp.minimum(shared / jnp.maximum(unique, 1), limit)
    changed = _changed(x, leaf)
    factor = jnp.where(_changers(changed) == 1, factor.reshape((-1,) + (1,) * (x.ndim - 1)), 1)
    return _shared_mean(jnp.where(changed, x * factor, 0), changed)

  measured = Sum("counts", counts, combine=wide_counts.plus)
  return Method((Stage(update, (measured,), hparams=hparams, scope=scope, combines=True),))


@named
def consensus(
  scale: float = 0.3,
  threshold: float | tuple[float, ...] = 0.4,
  least: int = 2,
) -> Method:
  """Adds up the task vectors, without the entries that too few models need.

  A model needs an entry if its task vector is larger there, in magnitude, than `threshold` times
  the sum of the others: these entries are its TALL mask.

  Args:
    scale: factor on the sum.
    threshold: the larger, the fewer entries a model needs; scalar or one per model.
    least: number of models that must need an entry. 2 drops entries that no model or only one
      needs; 0 drops none.

  Reference: Wang et al. 2024, Localizing task information (arXiv:2405.07813).

  Example:
    >>> import jaxmerge
    >>> x = {"w": jnp.array([[2.0, 2.0, 0.5], [1.0, -0.1, -0.5]])}
    >>> jaxmerge.merge(consensus(scale=1.0), x, deltas=True)["w"].tolist()
    [3.0, 0.0, 0.0]
  """
  lookup.check("consensus", {"scale": scale, "threshold": threshold, "least": least})

  def update(x: Array, leaf: Leaf) -> Array:
    total = jnp.sum(x, axis=0, keepdims=True)
    needed = jnp.abs(x) > leaf.hparam("threshold", x) * jnp.abs(total - x)
    many = _changers(needed).astype(x.dtype) >= leaf.scalar("least", x)
    return jnp.where(many, total, 0)

  settings = {"threshold": threshold, "least": least}
  return chain(leafwise(update, hparams=settings, combines=True), averages.scaled(scale))


def _changed(x: Array, leaf: Leaf) -> Array:
  return jnp.abs(x) > leaf.hparam("threshold", x)


def _changers(changed: Array) -> Array:
  """Counts the models that change each entry: [K, *s] -> [1, *s]."""
  return jnp.sum(changed, axis=0, keepdims=True, dtype=jnp.int32)


def _shared_mean(x: Array, changed: Array) -> Array:
  """Divides the sum of the models by how many change each entry; the divisor is exact."""
  return jnp.sum(x, axis=0, keepdims=True) / jnp.maximum(_changers(changed), 1).astype(x.dtype)


def _number(limbs: Array, like: Array) -> Array:
  return limbs[0].astype(like.dtype) * 2**wide_counts.LIMB + limbs[1].astype(like.dtype)
