"""Weights of checkpoints found by evolution (LCSC)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxmerge import methods
from jaxmerge.core.tree import Tree
from jaxmerge.search import objective


def lcsc(
  models: Tree,
  score: objective.Score,
  *,
  generations: int = 100,
  parents: int = 10,
  sigma: float = 0.1,
  decays: Sequence[float] = (0.5, 0.8, 0.9, 0.95, 0.99),
  seed: int = 0,
) -> objective.Soup:
  """Searches coefficients of the checkpoints of one run by evolution: they add up to 1.

  It begins with moving averages of several decays. In each generation a mixture of two of the best,
  or entry by entry one or the other, is moved at random; coefficients may leave [0, 1].

  Experimental: the authors' search has not been published; these are its ideas.

  Args:
    models: stack of K checkpoints, the oldest first, [K, *s].
    score: of a model; called once a decay and once a generation.
    generations: candidates after the first ones.
    parents: as many of the best are mixed.
    sigma: standard deviation of a move.
    decays: of the moving averages.
    seed: of the random moves.

  Reference: Liu et al. 2024, Linear combination of saved checkpoints (arXiv:2404.02241).

  Example:
    >>> import jax.numpy as jnp
    >>> models = {"w": jnp.array([0.0, 1.0, 2.0])}
    >>> soup = lcsc(models, lambda params: -float(abs(params["w"] - 3.0)), generations=200)
    >>> bool(soup.score > -0.05), round(float(soup.weights.sum()), 6)
    (True, 1.0)
  """
  taste, draw = objective.Tasting(models, score), np.random.default_rng(seed)
  K = taste.height
  for decay in decays:
    taste(np.array(methods.moving_weights(K, 1 - decay)))
  for _ in range(generations):
    best = sorted(taste.tried, key=lambda pair: -pair[1])[:parents]
    first, second = (best[i][0] for i in draw.integers(0, len(best), 2))
    if draw.random() < 0.5:
      share = draw.random(K) < 0.5 if draw.random() < 0.5 else draw.random()
      first = (
        np.where(share, first, second)
        if isinstance(share, np.ndarray)
        else (share * first + (1 - share) * second)
      )
    moved = first + sigma * draw.normal(size=K)
    moved[-1] += 1 - moved.sum()  # The last closes the sum.
    taste(moved)
  return taste.soup()
