"""Model Stock: a step from the base towards the mean, by the angle between the models."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp

from jaxmerge.catalog import lookup
from jaxmerge.core import magnitudes
from jaxmerge.core.stage import Array, Leaf, Method, for_models
from jaxmerge.methods import spherical
from jaxmerge.methods.factory import named


@named
def model_stock(
  scope: Literal["leaf", "row"] = "leaf",
  clip: bool = False,
  floor: float = 0.0,
) -> Method:
  """Steps from the base towards the mean of N models, as far as their task vectors agree.

  The step is t = N cos / (1 + (N - 1) cos), with cos the mean cosine of all pairs of task vectors:
  1 if all are the same, 0 if they are orthogonal. Opposed task vectors lead to steps below 0, or of
  any size. If the denominator is below 1e-6 in magnitude, t is 0.

  Args:
    scope: one t per leaf, or per row of the leaf's matrix view; a leaf without a view has one.
    clip: clip t to [0, 1]; recommended.
    floor: least product of two norms that a cosine divides by; with 1e-6, as in mergekit, small
      task vectors count as orthogonal.

  Reference: Jang et al. 2024, Model Stock (arXiv:2403.19522).

  Example:
    >>> import jaxmerge
    >>> base = {"w": jnp.zeros(3)}
    >>> experts = {"w": jnp.array([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0]])}
    >>> print(np.asarray(jaxmerge.merge(model_stock(), experts, base)["w"]).round(4))
    [0.8    0.2667 0.    ]
  """
  lookup.check("model_stock", {"scope": scope, "clip": clip, "floor": floor})

  def solve(gram: Array, leaf: Leaf) -> Array:
    K = gram.shape[0]
    floor = magnitudes.over(leaf.scalar("floor", gram), leaf.hparams["unit"])
    cosines = spherical.cosines(gram, floor)
    cosine = jnp.sum(jnp.where(jnp.eye(K, dtype=bool), 0, cosines)) / (K * (K - 1))
    under = 1 + (K - 1) * cosine
    usable = jnp.abs(under) >= 1e-6
    t = jnp.where(usable, K * cosine / jnp.where(usable, under, 1), 0)
    return jnp.broadcast_to((jnp.clip(t, 0, 1) if clip else t) / K, (K,))

  init = for_models("model_stock", 2)
  return spherical.spanned(solve, scope=scope, hparams={"floor": floor}, init=init)
