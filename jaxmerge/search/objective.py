"""A score, the best model so far, and all that was tried."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxmerge import methods
from jaxmerge.core import tree
from jaxmerge.core.tree import Tree
from jaxmerge.drivers import memory

Score = Callable[[Any], float]


class Soup(NamedTuple):
  """What a search found.

  Attributes:
    params: the best model.
    weights: of the models in it, [K].
    score: of the best model.
    tried: weights and score of all candidates, in order.
  """

  params: Tree
  weights: np.ndarray
  score: float
  tried: list[tuple[np.ndarray, float]]


class Tasting:
  """Makes candidates, scores them, and remembers the best."""

  def __init__(self, models: Tree, score: Score):
    self.models, self.score = models, score
    self.height = tree.num_models(models)
    self.mix = methods.average(normalize=False)
    self.best = -np.inf
    self.weights = np.zeros(self.height)
    self.tried: list[tuple[np.ndarray, float]] = []

  def candidate(self, weights: np.ndarray) -> Tree:
    """Mixes the models."""
    hparams = {"weight": np.asarray(weights, np.float32)}
    return memory.merge(self.mix, self.models, hparams=hparams)

  def __call__(self, weights: np.ndarray, *, ties: bool = False) -> bool:
    """Scores a mixture; tells whether it is the best so far."""
    found = float(self.score(self.candidate(weights)))
    if np.isnan(found):
      raise ValueError(f"the score of the weights {np.asarray(weights).tolist()} is not a number.")
    self.tried.append((np.asarray(weights, np.float64), found))
    better = found > self.best or (ties and found == self.best)
    if better:
      self.best, self.weights = found, self.tried[-1][0]
    return better

  def soup(self) -> Soup:
    """Returns what was found."""
    return Soup(self.candidate(self.weights), self.weights, self.best, self.tried)
