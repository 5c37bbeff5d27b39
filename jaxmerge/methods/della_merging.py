"""DELLA: drops entries at random, small ones of a row more often than large ones."""

from __future__ import annotations

from typing import Any, Literal  # Any: reduction results are trees of arrays.

import jax.numpy as jnp
import numpy as np

from jaxmerge.catalog import lookup
from jaxmerge.core import random_masks
from jaxmerge.core.stage import Array, Group, Leaf, Method, Stage, chain
from jaxmerge.methods import averages, sparsify, ties_merging
from jaxmerge.methods.factory import named


@named
def magprune(
  density: float = 0.7,
  epsilon: float = 0.07,
  *,
  rescale: str | None = "inverse",
) -> Method:
  """Drops entries at random by the rank of their magnitude in the row, and rescales the others.

  In a row of n entries, that of rank r = 1 ... n by ascending magnitude is kept with probability
  q = density - epsilon + 2 epsilon (r - 1) / (n - 1). A row is one of the leaf's matrix view; a
  leaf without a view counts as one row. Masks are those of `drop` where epsilon is 0.

  Args:
    density: mean probability that an entry is kept, in (0, 1]. 1 keeps all.
    epsilon: half the width of the range of probabilities, which must lie inside (0, 1).
    rescale: "inverse" divides by q; "l1", "l2", "linf" restore that norm of the whole leaf, see
      `matched`; None does not rescale.

  Reference: Deep et al. 2024, DELLA-Merging (arXiv:2406.11617).

  Example:
    >>> import jaxmerge
    >>> x = {"w": jnp.arange(1.0, 1001)[None]}
    >>> mask = jaxmerge.merge(magprune(0.5, 0.4, rescale=None), x, seed=0)["w"] > 0
    >>> bool(mask[:500].mean() < 0.4), bool(mask[500:].mean() > 0.6)
    (True, True)
  """
  lookup.check("della", {"density": density, "epsilon": epsilon, "rescale": rescale})

  def update(x: Array, leaf: Leaf, known: Any) -> Array:
    q = probabilities(known["ranks"], leaf.hparam("density", x), leaf.hparam("epsilon", x))
    mask = random_masks.chosen(x, leaf, q)
    thin = jnp.where(mask, x, 0)
    return thin / jnp.where(mask, q, 1) if rescale == "inverse" else thin

  hparams = {"density": density, "epsilon": epsilon, "seed": None}
  row = dict[str, Any](scope="leaf", unit="row", rest="row", ranked=True)
  pruned = Method((Stage(update, (), _refuse_window, hparams, **row),))
  return pruned if rescale == "inverse" else sparsify.matched(pruned, rescale)


def probabilities(ranks: Array, density: Array, epsilon: Array) -> Array:
  """Returns the probability that each entry is kept, by its rank 0, 1, ... in its row.

  Example:
    >>> ranks = jnp.array([[[5, 1, 3, 0, 4, 2]]])
    >>> print(np.asarray(probabilities(ranks, jnp.float32(0.5), jnp.float32(0.2))).round(2))
    [[[0.7  0.38 0.54 0.3  0.62 0.46]]]
  """
  columns = ranks.shape[2]
  places = ranks.astype(density.dtype) / max(columns - 1, 1)
  # The only entry of a row is in the middle.
  offset = 2 * places - 1 if columns > 1 else places
  return jnp.where(density >= 1, 1, density + epsilon * offset)


@named
def della(
  density: float = 0.7,
  epsilon: float = 0.07,
  scale: float = 1.1,
  weight: float | tuple[float, ...] = 1.0,
  rescale: str | None = "inverse",
  reduce: Literal["mean", "sum", "max"] = "mean",
  zero_sum: Literal["majority", "plus"] = "plus",
) -> Method:
  """Drops entries by rank (`magprune`), then elects signs and joins as `ties` does. Needs a seed.

  Reference: Deep et al. 2024, DELLA-Merging (arXiv:2406.11617).

  Example:
    >>> import jaxmerge
    >>> base, experts = {"w": jnp.zeros(2)}, {"w": jnp.array([[1.0, 2.0], [-3.0, 4.0]])}
    >>> jaxmerge.merge(della(density=1.0, scale=1.0), experts, base, seed=0)["w"].tolist()
    [-3.0, 3.0]
  """
  lookup.check("della", {"rescale": rescale, "reduce": reduce, "zero_sum": zero_sum})
  pruned = magprune(density, epsilon, rescale=rescale)
  return chain(pruned, ties_merging.elected(scale, weight, reduce, zero_sum))


@named
def della_linear(
  density: float = 0.7,
  epsilon: float = 0.07,
  scale: float = 1.1,
  weight: float | tuple[float, ...] = 1.0,
  rescale: str | None = "inverse",
  normalize: bool = False,
) -> Method:
  """Drops entries by rank (`magprune`), and adds up the task vectors. Needs a seed.

  Args:
    density: see `magprune`.
    epsilon: see `magprune`.
    scale: factor on the sum of the task vectors.
    weight: weight of each task vector, scalar or one per model.
    rescale: see `magprune`.
    normalize: divide by the sum of the weights, see `weighted_sum`.

  Reference: Deep et al. 2024, DELLA-Merging (arXiv:2406.11617), without its election.

  Example:
    >>> import jaxmerge
    >>> base, experts = {"w": jnp.zeros(2)}, {"w": jnp.array([[1.0, 2.0], [-3.0, 4.0]])}
    >>> method = della_linear(density=1.0, scale=0.5)
    >>> jaxmerge.merge(method, experts, base, seed=0)["w"].tolist()
    [-1.0, 3.0]
  """
  settings = {"scale": scale, "weight": weight, "rescale": rescale, "normalize": normalize}
  lookup.check("della_linear", settings)
  sums = averages.weighted_sum(weight, normalize=normalize)
  return chain(magprune(density, epsilon, rescale=rescale), sums, averages.scaled(scale))


def _refuse_window(group: Group) -> dict[str, Any]:
  density, epsilon = group.seen("density"), group.seen("epsilon")
  if density is None or epsilon is None:
    return {}
  outside = (density < 1) & ((density - epsilon <= 0) | (density + epsilon >= 1))
  if np.any(outside):
    raise ValueError(
      "magprune: density - epsilon and density + epsilon must lie inside (0, 1), got density "
      f"{density.tolist()} and epsilon {epsilon.tolist()}."
    )
  return {}
