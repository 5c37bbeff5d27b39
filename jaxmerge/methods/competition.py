"""Models that compete for entries (PCB) or columns (WIDEN), each of which has its weights."""

from __future__ import annotations

from typing import Any  # What is known is a tree of arrays.

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmerge.catalog import lookup
from jaxmerge.core import magnitudes, order_statistics, sharding, wide_counts
from jaxmerge.core.stage import Array, Group, Leaf, Method, Rank, Stage, chain
from jaxmerge.methods import averages, spectral
from jaxmerge.methods.factory import named


@named
def pcb(
  ratio: float = 0.1,
  scale: float = 1.2,
  weight: float | tuple[float, ...] = 1.0,
  clamp: float = 0.0001,
) -> Method:
  """Averages entries, weighted by their size in each model and by how well the models agree.

  The score of an entry is exp(K n²) tanh(tau_i * sum_j tau_j), n its magnitude from 0, the least of
  its model, to 1, the largest. The best `ratio` of a model's scores become weights from 0 to 1; the
  others are 0.

  Args:
    ratio: fraction of each model's entries that have a weight, in (0, 1].
    scale: factor on the merged task vector.
    weight: factor on each model's entries, scalar or one per model.
    clamp: this fraction of the smallest magnitudes and of the largest is clipped to the next.

  Reference: Du et al. 2024, Parameter competition balancing (arXiv:2410.02396).

  Example:
    >>> import jaxmerge
    >>> x = {"w": jnp.array([[1.0, -0.5, 0.25, 0.0], [1.0, 0.5, 0.0, 0.0]])}
    >>> jaxmerge.merge(pcb(ratio=0.5, scale=1.0, clamp=0.0), x, deltas=True)["w"].tolist()
    [1.0, 0.0, 0.0, 0.0]
  """
  hparams = {"ratio": ratio, "weight": weight, "clamp": clamp}
  lookup.check("pcb", {**hparams, "scale": scale})

  def update(x: Array, leaf: Leaf, known: Any) -> Array:
    # The least score of each model that counts, and the best; negative scores are ranked apart.
    values = _values(known["scores"], x).reshape(4, x.shape[0])
    least, best = (jnp.where(values[i] > 0, values[i], -values[i + 2]) for i in (0, 1))
    least, best = (v.reshape((-1,) + (1,) * (x.ndim - 1)) for v in (least, best))
    share = _from_0_to_1(jnp.clip(_scores(x, known), least, best), least, best)
    size = jnp.clip(jnp.abs(x), *_ends(x, known))
    weighted = share * jnp.sign(x) * size * leaf.hparam("weight", x)
    return _sum(weighted) / jnp.maximum(_sum(share), 1e-12)

  measured = (
    Rank("smallest", _magnitude, rank="low"),
    Rank("largest", _magnitude, rank="high"),
    Rank("scores", _sides, rank="ranks"),
  )
  stage = Stage(update, measured, _pcb_ranks, hparams, combines=True)
  return chain((stage,), averages.scaled(scale))


def _pcb_ranks(group: Group) -> dict[str, Any]:
  """Returns the ranks of the magnitudes to clip at, and of the scores that have weights 0 and 1."""
  order_statistics.refuse_unrankable(group)
  share, tail = group.hparam("ratio"), group.hparam("clamp")
  low, one = _from_top(group, tail), _from_top(group, 1.0) + jnp.asarray([[0], [1]], jnp.uint32)
  high = wide_counts.at_most(_from_top(group, _rest(tail), more=1), group.size)
  best = wide_counts.at_most(_from_top(group, _rest(share)), group.size)
  size = _from_top(group, 0.0)
  last = wide_counts.plus(wide_counts.minus(size, best), one)
  return {"low": low, "high": high, "ranks": jnp.concatenate([best, one, last, size], axis=1)}


def _magnitude(x: Array, leaf: Leaf, known: Any) -> Array:
  return jnp.abs(x)


def _sides(x: Array, leaf: Leaf, known: Any) -> Array:
  """Returns the positive parts of the scores twice, then the negative ones: ranks need no signs."""
  scores = _scores(x, known)
  sides = jnp.maximum(scores, 0), jnp.maximum(-scores, 0)
  return jnp.concatenate([sides[i] for i in (0, 0, 1, 1)])


def _rest(fraction: Any) -> Any:
  return 1 - (fraction if isinstance(fraction, jax.Array) else np.asarray(fraction))


def _from_top(group: Group, fraction: Any, more: int = 0) -> Array:
  """Returns the rank from the largest of the entry above floor(fraction * size) others."""
  below = jnp.asarray(wide_counts.share(fraction, group.size, group.num_models))
  size = jnp.broadcast_to(jnp.asarray(wide_counts.limbs(group.size + more))[:, None], below.shape)
  return wide_counts.minus(size, below)


def _values(cut: order_statistics.Cut, x: Array) -> Array:
  return order_statistics.at(cut).astype(x.dtype)


def _ends(x: Array, known: Any) -> list[Array]:
  """Returns the magnitudes to which each model's are clipped, [K, 1, ...]."""
  ends = (_values(known[end], x) for end in ("smallest", "largest"))
  return [v.reshape((-1,) + (1,) * (x.ndim - 1)) for v in ends]


def _scores(x: Array, known: Any) -> Array:
  x = sharding.gather_models(x)
  low, high = _ends(x, known)
  size = _from_0_to_1(jnp.clip(jnp.abs(x), low, high), low, high)
  # Divided by exp(K), which no weight depends on: it would overflow for many models.
  return jnp.exp(x.shape[0] * ((size - 1) * (size + 1))) * jnp.tanh(x * _sum(x))


def _from_0_to_1(x: Array, low: Array, high: Array) -> Array:
  # A product: how a division by one number rounds may depend on the length of the array.
  factor = jnp.where(high > low, 1 / jnp.where(high > low, high - low, 1), 0)
  # The difference comes first: compilers round a product in a sum once or twice, as they choose.
  return jnp.clip((x - low) * factor, 0, 1)


@named
def widen(
  scale: float = 1.0,
  threshold: float = 1.0,
  calibrated: float = 1.0,
) -> Method:
  """Weighs the columns of the task matrices by how far each model moved them.

  It suits models of which one moved much farther from the base than others. Columns are ranked
  within their model by their change of norm, and by their change of direction. A rank r from 0 to 1
  has the weight exp(r_i) / sum_j exp(r_j), or `calibrated`, if it is larger than `threshold` times
  the mean rank; the two weights are averaged. Columns are those of the leaf's matrix view, one per
  input; a column that was or becomes zero has not turned. In leaves without a view each entry is a
  column, with its magnitude for r.

  Args:
    scale: factor on the merged task vector.
    threshold: ranks larger than this times their mean are calibrated.
    calibrated: weight of these.

  Reference: Yu et al. 2024, WIDEN (arXiv:2408.03092).

  Example:
    >>> import jaxmerge
    >>> base, experts = {"w": jnp.ones((1, 2))}, {"w": jnp.array([[[3.0, 2.0]]])}
    >>> jaxmerge.merge(widen(), experts, base, layout=(("w", "oi"),))["w"].tolist()
    [[3.0, 2.0]]
  """
  hparams = {"threshold": threshold, "calibrated": calibrated}
  lookup.check("widen", {**hparams, "scale": scale})

  def shares(score: Array, leaf: Leaf) -> Array:
    mean = jnp.mean(score, axis=tuple(range(1, score.ndim)), keepdims=True)
    softmax = jax.nn.softmax(score, axis=0)
    high = score > leaf.scalar("threshold", score) * mean
    return jnp.where(high, leaf.scalar("calibrated", score), softmax)

  def update(x: Array, leaf: Leaf, known: Any) -> Array:
    changes = _changes(leaf.compared("widen").astype(x.dtype)[None], x)
    both = [shares(_places(change), leaf) for change in changes]
    return _sum(x * (both[0] + both[1]) * 0.5)

  def rest(x: Array, leaf: Leaf, known: Any) -> Array:
    x = sharding.gather_models(x)
    return _sum(x * shares(jnp.abs(x), leaf))

  columns = lookup.METHODS["widen"].lookups
  merged = spectral.by_matrix(update, hparams, rest, lookups=columns)
  return chain(merged, averages.scaled(scale))


def _changes(base: Array, x: Array) -> tuple[Array, Array]:
  """Returns the changes of columns in norm and in direction, [K, 1, i] each.

  Neither subtracts norms or directions, which are nearly equal for small changes: |b + x| - |b| is
  (x, 2 b + x) / (|b + x| + |b|). A column that was or becomes zero has not turned.
  """
  base, x = lax.stop_gradient((base, x))
  size, size_0 = magnitudes.norm(base + x, (1,)), magnitudes.norm(base, (1,))
  unit = jnp.maximum(magnitudes.peak(base, (1,)), magnitudes.peak(x, (1,)))
  parts = (x / unit) * (base / unit + (base / unit + x / unit))
  both = size / unit + size_0 / unit
  longer = jnp.sum(parts, axis=1, keepdims=True) / jnp.where(both == 0, 1, both)
  direction = (base / unit) / jnp.where(size_0 == 0, 1, size_0 / unit)
  moved = (x / unit - direction * longer) / jnp.where(size == 0, 1, size / unit)
  turned = jnp.sum(moved * moved, axis=1, keepdims=True)
  return jnp.abs(longer) * unit, jnp.where((size == 0) | (size_0 == 0), 0, turned)


def _places(x: Array) -> Array:
  """Returns the ranks of columns by size as 0, 1/n, ..., (n - 1)/n: [K, 1, i] -> [K, 1, i]."""
  return order_statistics.ranks(x).astype(x.dtype) * (1 / max(x.shape[2], 1))


def _sum(x: Array) -> Array:
  return jnp.sum(x, axis=0, keepdims=True)
