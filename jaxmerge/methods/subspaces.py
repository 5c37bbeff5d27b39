"""Merging matrices in directions that the models share, or that other models do not use.

A matrix is one of a leaf's matrix view, one per layer of stacked layers. Each method says how it
merges leaves without a view.
"""

from __future__ import annotations

from typing import Any, Literal  # Any: reduction results are trees of arrays.

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmerge.catalog import lookup
from jaxmerge.core import order_statistics, reductions, sharding, wide_counts
from jaxmerge.core.stage import Array, Leaf, Method, Rank, Stage, chain, join
from jaxmerge.methods import averages, spectral
from jaxmerge.methods.factory import named


@named
def drm(
  scale: float = 1.0,
  drop_rate: float = 0.8,
  direction: Literal["vertical", "horizontal"] = "vertical",
  weight: float | tuple[float, ...] = 1.0,
  rank_tol: float = 0.01,
) -> Method:
  """Trims, elects signs and averages in the singular directions of all task matrices together.

  The task matrices side by side are U S [V_1 ... V_K]. The rows of each V_k are scaled to norm 1,
  their smallest entries are zeroed, and the rows are scaled by S times their old norm. They are
  merged by sign election and a disjoint mean, and multiplied by U. Leaves without a view are merged
  in the same way, without trimming.

  Args:
    scale: factor on the merged task vector.
    drop_rate: this fraction of the entries is zeroed, of all models together; 0 zeroes none.
    direction: "vertical" shares the directions of inputs (the matrices are stacked), "horizontal"
      those of outputs.
    weight: factor on each model's entries after the election, scalar or one per model.
    rank_tol: directions with singular values up to this share of the largest are left out.

  Reference: Chaichana et al. 2025, Decom-Renorm-Merge (arXiv:2505.23117).

  Example:
    >>> import jaxmerge
    >>> x = {"w": jnp.array([[[3.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]])}
    >>> jaxmerge.merge(drm(drop_rate=0.0), x, layout=(("w", "oi"),), deltas=True)["w"].tolist()
    [[3.0, 0.0], [0.0, 1.0]]
  """
  hparams = {"weight": weight, "rank_tol": rank_tol}
  lookup.check("drm", {**hparams, "scale": scale, "drop_rate": drop_rate, "direction": direction})

  def update(x: Array, leaf: Leaf, known: Any) -> Array:
    x = x.transpose(0, 2, 1) if direction == "vertical" else x
    K, n, m = x.shape
    wide = x.transpose(1, 0, 2).reshape(1, n, K * m)
    u, s, v = (y[0] for y in spectral.svd(wide, leaf.scalar("rank_tol", x)))
    each = v.reshape(K, m, -1)  # Directions stay the last axis: no transpose of a large array.
    squares = jnp.sum(each * each, axis=1, keepdims=True)
    norms = jnp.sqrt(jnp.where(squares > 0, squares, 1))
    trimmed = _largest(each / norms, s > 0, 1 - drop_rate, leaf) * norms * s[None, None]
    y = (u @ _elect_and_average(trimmed, leaf.hparam("weight", x))[0].T)[None]
    return y.transpose(0, 2, 1) if direction == "vertical" else y

  def rest(x: Array, leaf: Leaf, known: Any) -> Array:
    return _elect_and_average(sharding.gather_models(x), leaf.hparam("weight", x))

  return chain(spectral.by_matrix(update, hparams, rest), averages.scaled(scale))


def _largest(x: Array, counts: Array, share: float, leaf: Leaf) -> Array:
  """Keeps a share of the entries of the directions that count, and those equal to the next one.

  Args:
    x: entries of all models in each direction, [K, m, n]; zero in directions that do not count.
    counts: whether a direction counts, [n].
    share: of their entries that is kept, by magnitude.
    leaf: the leaf.
  """
  K, m, n = x.shape
  # The rank of the next entry, by the number of directions; if there is no next, all are kept.
  places = [wide_counts.limbs(round(count * K * m * share) + 1) for count in range(n + 1)]
  state = {"place": jnp.asarray(np.stack(places))[jnp.sum(counts, dtype=jnp.int32)][:, None]}
  cut = reductions.reduce_group(_LEAST, [(x[None], leaf)], state)
  return jnp.where(order_statistics.inside(cut, jnp.abs(x)[None], leaf)[0], x, 0)


_LEAST = Rank("least", lambda x, leaf, known: jnp.abs(x), rank="place")


def _elect_and_average(x: Array, weight: Array | float = 1) -> Array:
  """Averages the entries that have the sign of the sum, each times the weight of its model.

  A sum of zero has the sign that most sums have.
  """
  total = jnp.sum(x, axis=0, keepdims=True)
  more, less = (jnp.sum(side, dtype=jnp.int32) for side in (total > 0, total < 0))
  draw = jnp.sign(more - less).astype(x.dtype)
  sign = jnp.where(total > 0, 1, jnp.where(total < 0, -1, draw))
  agreeing = jnp.where(x * sign > 0, x, 0) * weight
  count = jnp.sum(agreeing != 0, axis=0, keepdims=True, dtype=jnp.int32)
  return jnp.sum(agreeing, axis=0, keepdims=True) / jnp.maximum(count, 1).astype(x.dtype)


@named
def lore(
  delta_scale: float = 1.0,
  mu: float = 0.01,
  relative: bool = False,
  sweeps: int = 20,
  join: Literal["mean", "elected"] = "mean",
) -> Method:
  """Splits the models into a common matrix and low-rank parts, and adds the parts' mean to it.

  In turns, the common matrix becomes the mean of the models without their parts, and each part the
  difference of its model from the common matrix, with every singular value smaller by mu. It needs
  no base. With delta_scale 1 and the mean, it converges to the average of the models. Leaves
  without a view are averaged.

  The paper prints the square of the nuclear norm; this is the descent that it describes, on the
  norm itself.

  Args:
    delta_scale: factor on the merged low-rank parts.
    mu: subtracted from each singular value: in units of the weights, see `relative`.
    relative: whether mu is a share of the largest singular value of the models' distances from
      their mean.
    sweeps: of the descent.
    join: merges the parts: their mean, or the mean of the entries with the elected sign.

  Reference: Liu et al. 2025, LoRE-Merging (arXiv:2502.10749).

  Example:
    >>> import jaxmerge
    >>> x = {"w": jnp.array([[[4.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 1.0]]])}
    >>> jaxmerge.merge(lore(mu=0.5), x, layout=(("w", "oi"),))["w"].round(3).tolist()
    [[2.0, 0.0], [0.0, 1.0]]
  """
  hparams = {"delta_scale": delta_scale, "mu": mu}
  lookup.check("lore", {**hparams, "relative": relative, "sweeps": sweeps, "join": join})

  def update(x: Array, leaf: Leaf, known: Any) -> Array:
    common, parts, mu = _mean(x), jnp.zeros_like(x), leaf.scalar("mu", x)

    def shrink(u: Array, s: Array, v: Array) -> Array:
      return (u * jnp.maximum(s - mu, 0)[:, None]) @ v.transpose(0, 2, 1)

    def sweep(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
      common = _mean(x - carry[1])
      return (common, shrink(*spectral.svd(x - common))), None

    if sweeps:  # The first sweep's decomposition also measures the unit of mu.
      first = spectral.svd(x - common)
      mu = mu * jnp.max(first[1]) if relative else mu
      (common, parts), _ = lax.scan(sweep, (common, shrink(*first)), length=sweeps - 1)
    merged = _mean(parts) if join == "mean" else _elect_and_average(parts)
    return common + leaf.scalar("delta_scale", x) * merged

  return spectral.by_matrix(update, hparams)


def _mean(x: Array) -> Array:
  return jnp.sum(x, axis=0, keepdims=True) * (1 / x.shape[0])


@named
def opcm(
  scale: float = 1.0,
  alpha: float = 0.5,
  rank_tol: float = 1e-06,
) -> Method:
  """Adds one model after the other, each outside the directions of those before it.

  A task matrix is added to the matrix M of the models before, without its part on the singular
  directions of M: without u_j u_j^T tau v_j v_j^T for every j, and without the block of the first
  k, which have a share `alpha` of the sum of the singular values. At the end all leaves are scaled
  so that the norm of the whole is the mean norm of the task vectors. Leaves without a view are
  added up.

  The authors scale after each model. Neither the directions nor k depend on the scale, so that
  scaling once is the same, and the state between two models is M with the sum and number of norms.

  Args:
    scale: factor on the merged task vector.
    alpha: the larger, the more directions are protected from later models.
    rank_tol: singular values of M up to this share of the largest count as zero.

  Reference: Tang et al. 2025, Merging models on the fly (arXiv:2501.09522).

  Example:
    >>> import jaxmerge
    >>> x = {"w": jnp.array([[[3.0, 0.0], [0.0, 1.0]], [[1.0, 2.0], [2.0, 1.0]]])}
    >>> out = jaxmerge.merge(opcm(), x, layout=(("w", "oi"),), deltas=True)
    >>> print(np.asarray(out["w"]).round(3))
    [[2.236 1.491]
     [1.491 0.745]]
  """
  hparams = {"alpha": alpha, "rank_tol": rank_tol}
  lookup.check("opcm", {**hparams, "scale": scale})

  def update(x: Array, leaf: Leaf, known: Any) -> Array:
    alpha, tol = leaf.scalar("alpha", x), leaf.scalar("rank_tol", x)

    def add(total: Array, tau: Array) -> tuple[Array, None]:
      return total + project_out(tau, total, alpha, tol), None

    return lax.scan(add, x[0], x[1:])[0][None]

  def rest(x: Array, leaf: Leaf, known: Any) -> Array:
    return jnp.sum(x, axis=0, keepdims=True)

  def squares(*pair: Array) -> tuple[Array, ...]:
    return tuple(jnp.sum(y * y, axis=tuple(range(1, y.ndim))) for y in pair)

  def factor(total: tuple[Array, Array], unit: Array, known: Any) -> Array:
    # A root of zero has no gradient.
    each, merged = (jnp.where(t > 0, jnp.sqrt(jnp.where(t > 0, t, 1)), 0) for t in total)
    return jnp.sum(each) * (1 / each.shape[0]) / jnp.where(merged > 0, merged, 1)[0]

  def scaled(pair: tuple[Array, Array], leaf: Leaf, known: Any) -> Array:
    return pair[1] * known["factor"]

  in_turn = spectral.by_matrix(update, hparams, rest, ordered=True)
  last = Stage(scaled, (reductions.squares("factor", squares, factor),))
  return chain(join(in_turn, last), averages.scaled(scale))


def project_out(tau: Array, matrix: Array, alpha: Array | float, tol: Array | float) -> Array:
  """Projects a task matrix off the singular directions of another matrix: [m, n] -> [m, n].

  Singular values of the other up to `tol` of the largest have no directions.

  Example:
    >>> matrix, tau = jnp.diag(jnp.array([4.0, 1.0])), jnp.array([[1.0, 2.0], [3.0, 4.0]])
    >>> project_out(tau, matrix, 0.5, 1e-6).round(4).tolist()
    [[0.0, 2.0], [3.0, 0.0]]
    >>> project_out(tau, matrix, 0.5, 0.3).round(4).tolist()
    [[0.0, 2.0], [3.0, 4.0]]
  """
  u, s, v = (y[0] for y in spectral.svd(matrix[None], tol))
  k = jnp.sum(jnp.cumsum(s) <= alpha * jnp.sum(s))  # Before the first sum that is larger.
  place = jnp.arange(s.shape[0])
  block = (place[:, None] < k) & (place[None] < k)
  inner = jnp.where(block | jnp.eye(s.shape[0], dtype=bool), u.T @ tau @ v, 0)
  return tau - u @ inner @ v.T
