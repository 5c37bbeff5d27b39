"""LCSC: evolution of the weights of checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any  # Any: arguments of a caller.

import numpy as np

from jaxmerge import methods
from jaxmerge.core import tree
from jaxmerge.core.tree import Tree
from jaxmerge.search import objective


def lcsc(
  models: Tree,
  score: objective.Score | Any,
  *,
  generations: int = 100,
  parents: int = 10,
  sigma: float = 0.1,
  decays: Sequence[float] = (0.5, 0.8, 0.9, 0.95, 0.99),
  seed: int = 0,
) -> objective.SearchResult:
  """Searches coefficients, with sum 1, of the checkpoints of one run by evolution.

  It begins with moving averages of several decays. In each generation a mixture of two of the best,
  or entry by entry one or the other, is moved at random; coefficients may leave [0, 1].

  Experimental: the authors' search has not been published; these are its ideas.

  Args:
    models: stack of K checkpoints, the oldest first, [K, *s].
    score: of a model; called once a decay and once a generation.
    generations: candidates after the first ones.
    parents: number of the best candidates that are mixed.
    sigma: standard deviation of a move.
    decays: of the moving averages.
    seed: of the random moves.

  Returns:
    The best; its candidate is the coefficients [K].

  Reference: Liu et al. 2024, Linear combination of saved checkpoints (arXiv:2404.02241).

  Example:
    >>> import jax.numpy as jnp
    >>> models = {"w": jnp.array([0.0, 1.0, 2.0])}
    >>> soup = lcsc(models, lambda params: -float(abs(params["w"] - 3.0)), generations=200)
    >>> bool(soup.score > -0.05), round(float(soup.candidate.sum()), 6)
    (True, 1.0)
  """
  soups = objective.weighted_sums(models, score, "lcsc")
  K = tree.num_models(models)
  start = [np.array(methods.moving_weights(K, 1 - decay), np.float64) for decay in decays]
  strategy = evolve(start, generations, parents, sigma, np.random.default_rng(seed))
  return objective.run(soups, strategy)


def evolve(
  start: Sequence[np.ndarray],
  generations: int,
  parents: int,
  sigma: float,
  draw: np.random.Generator,
) -> objective.Strategy:
  """Asks for the initial coefficients, then for perturbed mixtures of two of the best."""
  scores = yield start
  population = list(zip(start, scores, strict=True))
  for _ in range(generations):
    best = sorted(population, key=lambda trial: -trial[1])[:parents]
    first, second = (best[i][0] for i in draw.integers(0, len(best), 2))
    if draw.random() < 0.5:
      first = _mix(first, second, draw)
    moved = first + sigma * draw.normal(size=len(first))
    moved[-1] += 1 - moved.sum()  # The last coefficient makes the sum 1.
    (score,) = yield [moved]
    population.append((moved, score))
  return None


def _mix(first: np.ndarray, second: np.ndarray, draw: np.random.Generator) -> np.ndarray:
  """Entry by entry one or the other, or a random point between the two."""
  if draw.random() < 0.5:
    return np.where(draw.random(len(first)) < 0.5, first, second)
  share = draw.random()
  return share * first + (1 - share) * second
