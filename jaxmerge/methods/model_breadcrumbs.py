"""Model Breadcrumbs: cuts off the largest and the smallest entries of task vectors."""

from __future__ import annotations

import functools
from typing import Any, Literal  # Any: reduction results are trees of arrays.

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.catalog import lookup
from jaxmerge.core import order_statistics, reductions, sharding, wide_counts
from jaxmerge.core.stage import Array, Group, Leaf, Method, Rank, Stage, chain
from jaxmerge.methods import averages, sparsify, ties_merging
from jaxmerge.methods.factory import named

Scope = Literal["tree", "leaf", "row"]
Yields = Literal["keep", "remove"]


@named
def breadcrumbs(
  keep: float = 0.2,
  remove: float = 0.1,
  scale: float = 0.3,
  weight: float | tuple[float, ...] = 1.0,
  scope: Scope = "leaf",
  yields: Yields = "keep",
  rescale: str | None = None,
  normalize: bool = False,
) -> Method:
  """Cuts off the largest and the smallest entries of each task vector, and adds up the rest.

  Of n entries the floor(remove * n) largest are zeroed, the floor(keep * n) next are kept, the
  others are zeroed; ties are broken by position. Scalar leaves are kept, and do not count.

  Args:
    keep: fraction kept, in (0, 1].
    remove: fraction of the largest that is zeroed first, in [0, 1].
    scale: factor on the sum of the task vectors.
    weight: weight of each task vector, scalar or one per model.
    scope: entries are ranked over the whole model, per leaf, or per row of the leaf's matrix view;
      a leaf without a view counts as one row.
    yields: if both fractions together exceed all entries, "keep" keeps fewer, as the authors do,
      and "remove" removes fewer, as mergekit does.
    rescale: norm of each leaf that is restored, see `matched`; None: none.
    normalize: divide by the sum of the weights, see `weighted_sum`.

  Reference: Davari and Belilovsky 2024, Model breadcrumbs (arXiv:2312.06795).

  Example:
    >>> import jaxmerge
    >>> base, experts = {"w": jnp.zeros(4)}, {"w": jnp.array([[9.0, -3.0, 2.0, 1.0]])}
    >>> method = breadcrumbs(keep=0.5, remove=0.25, scale=1.0)
    >>> jaxmerge.merge(method, experts, base)["w"].tolist()
    [0.0, -3.0, 2.0, 0.0]
  """
  settings = {"scope": scope, "yields": yields, "rescale": rescale, "normalize": normalize}
  lookup.check("breadcrumbs", {**settings, "scale": scale, "weight": weight})
  return chain(
    sparsify.matched(band(keep, remove, scope=scope, yields=yields), rescale),
    averages.weighted_sum(weight, normalize=normalize),
    averages.scaled(scale),
  )


@named
def breadcrumbs_ties(
  keep: float = 0.2,
  remove: float = 0.1,
  scale: float = 0.3,
  weight: float | tuple[float, ...] = 1.0,
  scope: Scope = "leaf",
  yields: Yields = "keep",
  rescale: str | None = None,
  reduce: Literal["mean", "sum", "max"] = "sum",
  zero_sum: Literal["majority", "plus"] = "majority",
) -> Method:
  """Cuts off both ends as `breadcrumbs` does, then elects signs and joins as `ties` does.

  Reference: Davari and Belilovsky 2024 (arXiv:2312.06795), joined with TIES in mergekit.

  Example:
    >>> import jaxmerge
    >>> base = {"w": jnp.zeros(4)}
    >>> experts = {"w": jnp.array([[9.0, -3.0, 2.0, 1.0], [8.0, 2.0, 3.0, 0.0]])}
    >>> method = breadcrumbs_ties(keep=0.5, remove=0.25, scale=1.0)
    >>> jaxmerge.merge(method, experts, base)["w"].tolist()
    [0.0, -3.0, 5.0, 0.0]
  """
  settings = {"scope": scope, "yields": yields, "rescale": rescale, "reduce": reduce}
  lookup.check("breadcrumbs_ties", {**settings, "zero_sum": zero_sum})
  return chain(
    sparsify.matched(band(keep, remove, scope=scope, yields=yields), rescale),
    ties_merging.elected(scale, weight, reduce, zero_sum),
  )


@named
def band(
  keep: float,
  remove: float,
  *,
  scope: Scope = "leaf",
  yields: Yields = "keep",
) -> Method:
  """Keeps the entries between the largest and the smallest of each task vector; see `breadcrumbs`.

  Example:
    >>> import jaxmerge
    >>> x = {"w": jnp.array([[9.0, -3.0, 2.0, 1.0]])}
    >>> jaxmerge.merge(band(keep=0.5, remove=0.25), x)["w"].tolist()
    [0.0, -3.0, 2.0, 0.0]
  """
  hparams = {"keep": keep, "remove": remove}
  lookup.check("breadcrumbs", {**hparams, "scope": scope, "yields": yields})
  if scope == "row":

    def by_row(x: Array, leaf: Leaf, known: Any) -> Array:
      return _band_of_rows(x, leaf, known, yields=yields)

    alone = functools.partial(_band_of_one_row, yields=yields)
    return Method((Stage(by_row, hparams=hparams, unit="row", rest=alone),))

  def init(group: Group) -> dict[str, Any]:
    arrays = group._replace(shapes={n: s for n, s in group.shapes.items() if s})
    order_statistics.refuse_unrankable(arrays)
    fractions = group.hparam("keep"), group.hparam("remove")
    return _counts(*fractions, arrays.size, group.num_models, yields)

  def update(x: Array, leaf: Leaf, known: Any) -> Array:
    return _between(x, leaf, known) if x.ndim > 1 else x

  return Method((Stage(update, _ENDS, init, hparams, scope=scope),))


def _size(x: Array, leaf: Leaf, known: Any) -> Array:
  """Returns magnitudes; scalar leaves count as zeros, so that no threshold depends on them."""
  return jnp.abs(x) if x.ndim > 1 else jnp.zeros_like(x)


_ENDS = (
  Rank("top", _size, rank="removed", exact=True),
  Rank("bottom", _size, rank="reach", exact=True),
)


def _counts(keep: Any, remove: Any, size: int, num_models: int, yields: Yields) -> dict[str, Any]:
  """Returns how many of the largest are removed, and the last rank that is kept, as limbs."""
  removed, count = (jnp.asarray(wide_counts.share(f, size, num_models)) for f in (remove, keep))
  if yields == "remove":
    room = wide_counts.minus(jnp.broadcast_to(wide_counts.limbs(size)[:, None], count.shape), count)
    removed = jnp.where(wide_counts.at_least(room, removed), removed, room)
  return {"removed": removed, "reach": wide_counts.at_most(wide_counts.plus(removed, count), size)}


def _between(x: Array, leaf: Leaf, known: Any) -> Array:
  size = _size(x, leaf, known)
  near, far = (order_statistics.inside(known[end], size, leaf) for end in ("bottom", "top"))
  return jnp.where(near & ~far, x, 0)


def _band_of_rows(x: Array, leaf: Leaf, known: Any, *, yields: Yields) -> Array:
  """Keeps the band of each row of x [K, rows, columns], ranked within the row of one model."""
  K, _, columns = x.shape
  keep, remove = (jnp.asarray(leaf.hparams[n]) for n in ("keep", "remove"))
  counts = _counts(keep, remove, columns, K, yields)
  alone = leaf._replace(start=np.uint32(0), offset=np.uint32(0), places=None)

  def cut_row(row: Array) -> Array:
    state = dict(counts)
    for end in _ENDS:
      state[end.name] = reductions.reduce_group(end, [(row, alone)], state)
    return _between(row, alone, state)

  return jax.vmap(cut_row, in_axes=1, out_axes=1)(x)


def _band_of_one_row(x: Array, leaf: Leaf, known: Any, *, yields: Yields) -> Array:
  if x.ndim == 1:
    return x
  flat = sharding.reshape(sharding.gather(x), (x.shape[0], 1, x.size // x.shape[0]))
  return sharding.reshape(_band_of_rows(flat, leaf, known, yields=yields), x.shape)
