"""Sparsifying task vectors: by magnitude, at random, and both ends cut off."""

from __future__ import annotations

from typing import Any, Literal  # Any: what is known is a tree of arrays.

import jax
import jax.numpy as jnp
from jax import lax

from jaxmerge import catalog, statistics, views
from jaxmerge.methods import averaging
from jaxmerge.stage import Array, Group, Leaf, Method, Scope, Stage, chain

_dare = catalog.METHODS["dare"].parameters
_breadcrumbs = catalog.METHODS["breadcrumbs"].parameters


def trim(density: float, *, scope: Scope = "tree", rule: Literal["kth", "exact"] = "kth") -> Method:
  """Keeps the largest `density` of the entries of each task vector, by magnitude.

  The threshold is exact: a search over float bit patterns, with no sort and no gather.

  Args:
    density: fraction kept, in (0, 1]. 1 keeps all.
    scope: entries are counted over the whole model or per leaf.
    rule: "kth" keeps every entry at least as large as the (d - floor(density * d))-th smallest of d,
      hence one more than the fraction, and all that tie with it; "exact" keeps floor(density * d)
      entries, the first ones among those that tie.

  Reference: Yadav et al. 2023, TIES-Merging (arXiv:2306.01708), step 1.
  """
  catalog.METHODS["ties"].parameters["rule"].check("trim: rule", rule)
  exact = rule == "exact"

  def init(group: Group) -> dict[str, Any]:
    if exact:
      _rankable(group)
    plus = 0 if exact else 1
    return {"kept": statistics.share(group.aux["density"], group.size, group.height, plus=plus)}

  def update(x: Array, leaf: Leaf, known: Any) -> Array:
    if exact:
      return jnp.where(statistics.inside("kept", jnp.abs(x), leaf, known), x, 0)
    cut = known["threshold"]["found"]
    cut = cut.reshape(cut.shape + (1,) * (x.ndim - 1))
    return jnp.where(statistics.pattern(jnp.abs(x)) >= cut, x, 0)

  measured = (
    statistics.top("kept", jnp.abs)
    if exact
    else (statistics.kth("threshold", jnp.abs, rank="kept"),)
  )
  return (Stage(update, measured, init, {"density": density}, scope=scope),)


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
  """
  catalog.check("dare", {"drop_rate": drop_rate, "rescale": rescale})

  def thin(x: Array, leaf: Leaf) -> Array:
    return jnp.where(uniform(x, leaf) >= leaf.number("drop_rate", x), x, 0)

  def update(x: Array, leaf: Leaf, known: Any) -> Array:
    kept = thin(x, leaf)
    if rescale is None:
      return kept
    if rescale == "inverse":
      rate = leaf.number("drop_rate", x)
      return jnp.where(rate < 1, kept / jnp.where(rate < 1, 1 - rate, 1), 0)
    before, after = (known["norms"][i].reshape((-1,) + (1,) * (x.ndim - 1)) for i in range(2))
    usable = (before >= 1e-7) & (after >= 1e-7)
    return jnp.where(usable, kept * (before / jnp.where(usable, after, 1)), kept)

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
  """
  catalog.check("dare", {"scale": scale, "weight": weight})
  return chain(
    drop(drop_rate, rescale=rescale), averaging.weighted_sum(weight), averaging.scaled(scale)
  )


def breadcrumbs(
  keep: float = _breadcrumbs["keep"].default,
  remove: float = _breadcrumbs["remove"].default,
  scale: float = _breadcrumbs["scale"].default,
  scope: Literal["tree", "leaf", "row"] = _breadcrumbs["scope"].default,
) -> Method:
  """Cuts off the largest and the smallest entries of each task vector, and adds the rest up.

  Of n entries the floor(remove * n) largest are zeroed, the floor(keep * n) next are kept, the others
  are zeroed; ties are broken by position.

  Args:
    keep: fraction kept, in (0, 1].
    remove: fraction of the largest that is zeroed first, in [0, 1].
    scale: factor on the sum of the task vectors.
    scope: entries are ranked over the whole model, per leaf, or per row of the leaf's matrix view; a
      leaf without a view counts as one row.

  Reference: Davari and Belilovsky 2024, Model breadcrumbs (arXiv:2312.06795).
  """
  catalog.check("breadcrumbs", {"keep": keep, "remove": remove, "scale": scale, "scope": scope})
  numbers = {"keep": keep, "remove": remove}
  adding = chain(averaging.weighted_sum(), averaging.scaled(scale))
  if scope == "row":
    cut = Stage(_band_of_rows, numbers=numbers, unit="row", rest=_band_of_one_row)
    return chain((cut,), adding)

  def init(group: Group) -> dict[str, Any]:
    _rankable(group)
    removed = statistics.share(group.aux["remove"], group.size, group.height)
    return {"removed": removed, "reach": _reach(removed, group.aux["keep"], group)}

  def update(x: Array, leaf: Leaf, known: Any) -> Array:
    size = jnp.abs(x)
    near = statistics.inside("reach", size, leaf, known)
    return jnp.where(near & ~statistics.inside("removed", size, leaf, known), x, 0)

  measured = statistics.top("removed", jnp.abs) + statistics.top("reach", jnp.abs)
  return chain((Stage(update, measured, init, numbers, scope=scope),), adding)


def uniform(x: Array, leaf: Leaf) -> Array:
  """Returns numbers in [0, 1) for the entries of a stack [K, *s], each a hash of its identity."""
  models = leaf.models.reshape((-1,) + (1,) * (x.ndim - 1))
  h = _mixed(jnp.asarray(leaf.aux["seed"]).astype(jnp.uint32) ^ leaf.tag)
  h = _mixed(h ^ (models * jnp.uint32(0x9E3779B1)))
  for axis in range(1, x.ndim):
    index = lax.broadcasted_iota(jnp.uint32, (x.shape[axis],), 0)
    if axis == 1:
      index = index + leaf.start.astype(jnp.uint32)
    index = index.reshape((1,) * axis + (-1,) + (1,) * (x.ndim - axis - 1))
    h = _mixed(h + index * jnp.uint32(0x85EBCA77) + jnp.uint32(0xC2B2AE3D + axis))
  return (h >> 8).astype(jnp.float32) * jnp.float32(2**-24)


def _mixed(h: Array) -> Array:
  """Mixes the bits of uint32 so that every input bit moves every output bit."""
  h = (h ^ (h >> 16)) * jnp.uint32(0x7FEB352D)
  h = (h ^ (h >> 15)) * jnp.uint32(0x846CA68B)
  return h ^ (h >> 16)


def _norms(kind: str, thin: Any) -> tuple[statistics.Statistic, ...]:
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
  squares = statistics.total("norms", powers)
  return (squares._replace(refine=lambda state, total, known: jnp.sqrt(total)),)


def _rankable(group: Group) -> None:
  if group.size >= 2**32:
    raise ValueError(
      f"ranking by position needs groups of fewer than 2**32 entries, got {group.size}; "
      "use rule='kth' or scope='leaf'."
    )


def _reach(removed: Array, keep: Any, group: Group) -> Array:
  """Counts min(removed + floor(keep * n), n), as limbs."""
  kept = statistics.share(keep, group.size, group.height)
  both = statistics.normal(jnp.asarray(removed) + jnp.asarray(kept))
  whole = jnp.broadcast_to(jnp.asarray(statistics.limbs(group.size))[:, None], both.shape)
  return jnp.where(statistics.at_least(both, whole), whole, both)


def _band_of_rows(x: Array, leaf: Leaf, known: Any) -> Array:
  """Keeps the band of each row: x [K, rows, columns], each (model, row) ranked by itself."""
  size = x.shape[2]
  group = Group(size, x.shape[0], leaf.aux)
  removed = statistics.share(jnp.asarray(leaf.aux["remove"]), size, group.height)
  known = {"removed": removed, "reach": _reach(removed, jnp.asarray(leaf.aux["keep"]), group)}
  alone = leaf._replace(start=jnp.int32(0), shape=(size,), offset=jnp.uint32(0))

  def band(row: Array) -> Array:
    own = dict(known)
    for stat in statistics.top("removed", jnp.abs) + statistics.top("reach", jnp.abs):
      own[stat.name] = _settle(stat, row, alone, own)
    near = statistics.inside("reach", jnp.abs(row), alone, own)
    return jnp.where(near & ~statistics.inside("removed", jnp.abs(row), alone, own), row, 0)

  return jax.vmap(band, in_axes=1, out_axes=1)(x)


def _band_of_one_row(x: Array, leaf: Leaf, known: Any) -> Array:
  if x.ndim == 1:
    return x
  flat = views.reshaped(views.whole(x), (x.shape[0], 1, x.size // x.shape[0]))
  return views.reshaped(_band_of_rows(flat, leaf, known), x.shape)


def _settle(stat: statistics.Statistic, x: Array, leaf: Leaf, known: Any) -> Any:
  """Runs all passes of a statistic over one array."""

  def one(_: Any, state: Any) -> Any:
    return stat.refine(state, stat.measure(x, leaf, state, known), known)

  state = stat.begin(known)
  return one(0, state) if stat.passes == 1 else lax.fori_loop(0, stat.passes, one, state)
