"""Merging matrices by descent, with task vectors in place of the inputs of their tasks.

A matrix is one of a leaf's matrix view, one per layer of stacked layers; leaves without a view are
averaged. The rows of a task matrix nearly span the inputs of its layer: another update does not
harm the task if the two differ in other directions only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal  # Any: reduction results, an optimiser's state.

import jax.numpy as jnp
import optax
from jax import lax

from jaxmerge.catalog import lookup
from jaxmerge.core import magnitudes, order_statistics, sharding, wide_counts
from jaxmerge.core.stage import Array, Group, Leaf, Method, Rank, chain
from jaxmerge.methods import averages, spectral
from jaxmerge.methods.factory import named

_sum = functools.partial(jnp.sum, axis=0)


@named
def wudi(
  scale: float = 1.0,
  learning_rate: float = 1e-05,
  steps: int = 300,
) -> Method:
  """Moves the sum of the task matrices until it disturbs each task less.

  Adam minimises the sum over tasks of |(x - tau) tau^T|^2 / |tau|^2, from x the sum of all tau.

  Args:
    scale: factor on the merged task vector.
    learning_rate: about the most that an entry moves in a step.
    steps: of descent; 0 returns the sum.

  Reference: Cheng et al. 2025, Whoever started the interference should end it (arXiv:2503.08099).

  Example:
    >>> import jaxmerge
    >>> x = {"w": jnp.array([[[3.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]])}
    >>> jaxmerge.merge(wudi(), x, layout=(("w", "oi"),), deltas=True)["w"].tolist()
    [[3.0, 0.0], [0.0, 1.0]]
  """
  lookup.check("wudi", {"scale": scale, "learning_rate": learning_rate, "steps": steps})

  def update(x: Array, leaf: Leaf, known: Any) -> Array:
    unit = x / _norms(x)
    rate = leaf.scalar("learning_rate", x)
    return _minimize(_sum(x), x, unit.transpose(0, 2, 1) @ unit, _adam(rate), steps)

  hparams = {"learning_rate": learning_rate}
  return chain(spectral.by_matrix(update, hparams), averages.scaled(scale))


@named
def optmerge(
  scale: float = 1.0,
  tuned: Literal["full", "lora"] = "full",
  learning_rate: float = 1e-05,
  steps: int = 300,
) -> Method:
  """As `wudi`, with the first singular directions of each task matrix in its place.

  Each of K tasks has 1/K of the directions, at least one. If models were tuned as a whole, they are
  those of the distance from the mean, and the descent begins at the sum. If models were tuned by
  adapters, they are those of the task matrix, and the descent begins at the mean, by momentum in
  place of Adam.

  Args:
    scale: factor on the merged task vector.
    tuned: "full" or "lora".
    learning_rate: of Adam; the authors have 1e-4 for adapters.
    steps: of descent.

  Reference: Wei et al. 2025, OptMerge (arXiv:2505.19892).

  Example:
    >>> import jaxmerge
    >>> x = {"w": jnp.array([[[3.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]])}
    >>> jaxmerge.merge(optmerge(steps=0), x, layout=(("w", "oi"),), deltas=True)["w"].tolist()
    [[3.0, 0.0], [0.0, 1.0]]
  """
  settings = {"learning_rate": learning_rate, "steps": steps}
  lookup.check("optmerge", {"scale": scale, "tuned": tuned, **settings})

  def update(x: Array, leaf: Leaf, known: Any) -> Array:
    K, rate = x.shape[0], leaf.scalar("learning_rate", x)
    count = max(1, int(min(x.shape[1:]) * (1 / K)))
    mean = _sum(x) * (1 / K)
    u, s, v = (y[..., :count] for y in spectral.svd(x))
    shares = s / _norms(x)[:, 0]
    spans = (v * (shares * shares)[:, None]) @ v.transpose(0, 2, 1)
    if tuned == "lora":
      first = (u * s[:, None]) @ v.transpose(0, 2, 1)
      return _minimize(mean, first, spans, optax.sgd(rate, momentum=0.9), steps)
    targets = mean[None] + _first(x - mean[None], count)
    return _minimize(_sum(x), targets, spans, _adam(rate), steps)

  hparams = {"learning_rate": learning_rate}
  return chain(spectral.by_matrix(update, hparams), averages.scaled(scale))


@named
def doge(
  scale: float = 1.0,
  eta: float = 0.07,
  density: float = 0.3,
  subspace: int = 6,
  learning_rate: float = 0.0001,
  steps: int = 400,
  rank_tol: float = 1e-06,
) -> Method:
  """Adds a correction to all task matrices that brings their sum nearer to each of them.

  Task matrices are scaled to norm `eta`. Adam minimises the sum, over tasks and rows, of the
  squared products of a row of tau and a row of the gap tau - sum_i eta_i (tau_i + x); the gradient
  is projected off the first singular directions, of outputs, that the tasks share. Entries of
  tau_i + x count where tau_i is large. Leaves without a view stay those of the base.

  Args:
    scale: factor on the merged task vector.
    eta: norm of each task matrix.
    density: fraction of each task vector's entries that count, in (0, 1], over the whole model; the
      authors count the entries of matrices only.
    subspace: floor(r / subspace) of r = min(outputs, inputs) directions are shared.
    learning_rate: of Adam.
    steps: of descent; 0 leaves x at 0.
    rank_tol: singular values up to this share of the largest count as zero.

  Reference: Wei et al. 2025, Adaptive projective gradient descent (arXiv:2501.01230), DOGE TA.

  Example:
    >>> import jaxmerge
    >>> x = {"w": jnp.array([[[3.0, 0.0], [0.0, 4.0]]])}
    >>> method = doge(eta=1.0, density=1.0, steps=0)
    >>> print(jaxmerge.merge(method, x, layout=(("w", "oi"),), deltas=True)["w"])
    [[0.6 0. ] [0.  0.8]]
  """
  settings = {"density": density, "eta": eta, "learning_rate": learning_rate, "rank_tol": rank_tol}
  lookup.check("doge", {**settings, "scale": scale, "subspace": subspace, "steps": steps})

  def update(x: Array, leaf: Leaf, known: Any) -> Array:
    not_zero = jnp.any(x != 0, axis=(1, 2), keepdims=True)
    rates = jnp.where(not_zero, leaf.scalar("eta", x) / _norms(x), 0)
    total, weight = _sum(x * rates), jnp.sum(rates)
    shared = _shared_directions(x, leaf.scalar("rank_tol", x), subspace)

    def gradient(correction: Array) -> Array:
      gaps = jnp.sum(x * (x - (total + weight * correction)[None]), axis=2, keepdims=True)
      slope = _sum(gaps * x) * (-2 * weight)
      return slope - shared @ (shared.T @ slope)

    adam = _adam(leaf.scalar("learning_rate", x))
    correction = _descend(gradient, jnp.zeros_like(total), adam, steps)
    is_large = order_statistics.inside(known["cut"], jnp.abs(x), leaf)
    return _sum(jnp.where(is_large, (x + correction[None]) * rates, 0))[None]

  cut = Rank("cut", lambda x, leaf, known: jnp.abs(x), rank="kept")
  merged = spectral.by_matrix(
    update, settings, _stay_base, reductions=(cut,), init=_rank_of_density
  )
  return chain(merged, averages.scaled(scale))


def _rank_of_density(group: Group) -> dict[str, Any]:
  count = wide_counts.share(group.hparam("density"), group.size, group.num_models, more=1)
  return {"kept": count}


def _stay_base(x: Array, leaf: Leaf, known: Any) -> Array:
  return jnp.zeros_like(sharding.gather_models(x)[:1])


def _shared_directions(x: Array, tol: Array, subspace: int) -> Array:
  """Returns the first floor(r / subspace) directions of outputs that tasks share, [o, n].

  Each of K tasks contributes its first floor(r / K).
  """
  K, r = x.shape[0], min(x.shape[1:])
  each = spectral.svd(x, tol)[0][..., : r // K].transpose(1, 0, 2).reshape(1, x.shape[1], -1)
  return spectral.svd(each, tol)[0][0, :, : r // subspace] if each.shape[2] else each[0]


def _minimize(
  start: Array,
  targets: Array,
  spans: Array,
  optimizer: optax.GradientTransformation,
  steps: int,
) -> Array:
  """Minimises the sum over tasks of trace((x - target) span (x - target)^T): [o, i] -> [1, o, i].

  The gradient needs the tasks' spans [K, i, i] and targets [K, o, i] only as two sums.
  """
  span, pull = _sum(spans), _sum(targets @ spans)
  return _descend(lambda x: 2 * (x @ span - pull), start, optimizer, steps)[None]


def _descend(
  gradient: Callable[[Array], Array],
  start: Array,
  optimizer: optax.GradientTransformation,
  steps: int,
) -> Array:
  """Takes steps of an optimiser."""

  def step(carry: tuple[Array, Any], _: None) -> tuple[tuple[Array, Any], None]:
    x, state = carry
    update, state = optimizer.update(gradient(x), state, x)
    return (optax.apply_updates(x, update), state), None

  (x, _), _ = lax.scan(step, (start, optimizer.init(start)), length=steps)
  return x


def _adam(rate: Array) -> optax.GradientTransformation:
  # Far below `eps`: it only keeps gradients through a root of zero finite.
  return optax.adam(rate, eps_root=1e-30)


def _norms(x: Array) -> Array:
  """Returns the norm of each task matrix, 1 in place of 0: [K, o, i] -> [K, 1, 1]."""
  norms = magnitudes.norm(x, (1, 2))
  return jnp.where(norms == 0, 1, norms)


def _first(x: Array, count: int) -> Array:
  """Returns each matrix in its first singular directions alone."""
  u, s, v = (y[..., :count] for y in spectral.svd(x))
  return (u * s[:, None]) @ v.transpose(0, 2, 1)
