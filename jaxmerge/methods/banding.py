"""Cutting off both ends of task vectors: the largest and the smallest entries."""

from __future__ import annotations

from typing import Any, Literal  # Any: what is known is a tree of arrays.

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import catalog, statistics, views
from jaxmerge.methods import averaging
from jaxmerge.stage import Array, Group, Leaf, Method, Rank, Stage, chain

_defaults = catalog.METHODS["breadcrumbs"].parameters


def breadcrumbs(
  keep: float = _defaults["keep"].default,
  remove: float = _defaults["remove"].default,
  scale: float = _defaults["scale"].default,
  scope: Literal["tree", "leaf", "row"] = _defaults["scope"].default,
) -> Method:
  """Cuts off the largest and the smallest entries of each task vector, and adds the rest up.

  Of n entries the floor(remove * n) largest are zeroed, the floor(keep * n) next are kept, the
  others are zeroed; ties are broken by position. Scalar leaves are kept, and not counted.

  Args:
    keep: fraction kept, in (0, 1].
    remove: fraction of the largest that is zeroed first, in [0, 1].
    scale: factor on the sum of the task vectors.
    scope: entries are ranked over the whole model, per leaf, or per row of the leaf's matrix view;
      a leaf without a view counts as one row.

  Reference: Davari and Belilovsky 2024, Model breadcrumbs (arXiv:2312.06795).

  Example:
    >>> import jaxmerge
    >>> base, experts = {"w": jnp.zeros(4)}, {"w": jnp.array([[9.0, -3.0, 2.0, 1.0]])}
    >>> method = breadcrumbs(keep=0.5, remove=0.25, scale=1.0)
    >>> jaxmerge.merge(method, base, experts)["w"].tolist()
    [0.0, -3.0, 2.0, 0.0]
  """
  catalog.check("breadcrumbs", {"keep": keep, "remove": remove, "scale": scale, "scope": scope})
  adding = chain(averaging.weighted_sum(), averaging.scaled(scale))
  return chain(band(keep, remove, scope=scope), adding)


def band(keep: float, remove: float, *, scope: Literal["tree", "leaf", "row"] = "leaf") -> Method:
  """Keeps the entries between the largest and the smallest of each task vector; see `breadcrumbs`.

  Example:
    >>> import jaxmerge
    >>> x = {"w": jnp.array([[9.0, -3.0, 2.0, 1.0]])}
    >>> jaxmerge.blend(band(keep=0.5, remove=0.25), x)["w"].tolist()
    [0.0, -3.0, 2.0, 0.0]
  """
  catalog.check("breadcrumbs", {"keep": keep, "remove": remove, "scope": scope})
  numbers = {"keep": keep, "remove": remove}
  if scope == "row":
    return (Stage(_band_of_rows, numbers=numbers, unit="row", rest=_band_of_one_row),)

  def init(group: Group) -> dict[str, Any]:
    counted = group._replace(shapes={n: s for n, s in group.shapes.items() if s})
    statistics.refuse_unrankable(counted)
    return _counts(group.number("keep"), group.number("remove"), counted.size, group.height)

  def update(x: Array, leaf: Leaf, known: Any) -> Array:
    return x if x.ndim == 1 else _between(x, leaf, known)

  return (Stage(update, _ENDS, init, numbers, scope=scope),)


def _size(x: Array) -> Array:
  """Magnitudes; scalar leaves count as zeros, which no threshold tells from other zeros."""
  return jnp.abs(x) if x.ndim > 1 else jnp.zeros_like(x)


_ENDS = (
  Rank("top", lambda x, leaf: _size(x), rank="removed", exact=True),
  Rank("bottom", lambda x, leaf: _size(x), rank="reach", exact=True),
)


def _counts(keep: Any, remove: Any, size: int, height: int) -> dict[str, Any]:
  """How many of the largest are removed, and down to which rank entries are kept, as limbs."""
  removed, kept = (jnp.asarray(statistics.share(f, size, height)) for f in (remove, keep))
  return {"removed": removed, "reach": statistics.at_most(statistics.plus(removed, kept), size)}


def _between(x: Array, leaf: Leaf, known: Any) -> Array:
  size = _size(x)
  near, far = (statistics.inside(known[end], size, leaf) for end in ("bottom", "top"))
  return jnp.where(near & ~far, x, 0)


def _band_of_rows(x: Array, leaf: Leaf, known: Any) -> Array:
  """Keeps the band of each row: x [K, rows, columns], each (model, row) ranked by itself."""
  K, _, columns = x.shape
  keep, remove = (jnp.asarray(leaf.aux[n]) for n in ("keep", "remove"))
  counts = _counts(keep, remove, columns, K)
  alone = leaf._replace(start=np.uint32(0), offset=np.uint32(0))

  def one(row: Array) -> Array:
    own = dict(counts)
    for end in _ENDS:
      own[end.name] = statistics.settled(end, [(row, alone)], own)
    return _between(row, alone, own)

  return jax.vmap(one, in_axes=1, out_axes=1)(x)


def _band_of_one_row(x: Array, leaf: Leaf, known: Any) -> Array:
  if x.ndim == 1:
    return x
  flat = views.reshaped(views.whole(x), (x.shape[0], 1, x.size // x.shape[0]))
  return views.reshaped(_band_of_rows(flat, leaf, known), x.shape)
