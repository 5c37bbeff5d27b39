"""Hi-Merging: prunes and scales task vectors by model, then by layer, guided by a score."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple  # Any: a model is a tree of arrays.

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import methods
from jaxmerge.core import double_precision, stage, tree
from jaxmerge.core.tree import Tree
from jaxmerge.drivers import arguments, memory
from jaxmerge.search import objective

GRID = tuple(round(0.1 * n, 1) for n in range(1, 11))
# Factors on density and scale of a conflicting layer.
_CHANGES = {"trimmed": (0.5, 1.0), "scaled": (1.0, 0.5), "dropped": (1.0, 0.0)}


class Layers(NamedTuple):
  """Density and scale of each model's task vector, by layer.

  Attributes:
    density: fraction of each leaf's entries to keep, by layer, [K].
    scale: factor on these entries, by layer, [K].
    changes: of conflicting layers: layer, model, and "trimmed", "scaled" or "dropped".
  """

  density: dict[str, np.ndarray]
  scale: dict[str, np.ndarray]
  changes: tuple[tuple[str, int, str], ...] = ()

  def change(self, layer: str, k: int, word: str) -> Layers:
    """Returns a copy with a layer of model k trimmed, scaled or dropped."""
    density, scale = ({n: v.copy() for n, v in table.items()} for table in self[:2])
    density[layer][k] *= _CHANGES[word][0]
    scale[layer][k] *= _CHANGES[word][1]
    return Layers(density, scale, (*self.changes, (layer, k, word)))


class _Family:
  """Merges candidates with one compiled program, and scores them."""

  def __init__(
    self, base: Tree, models: Tree, score: Callable[[Any, int], float], layer: Callable[[str], str]
  ):
    models, _ = arguments.stack_models(base, models, call="hi_merging(base, models, score)")
    self.base, self.models, self.score = base, models, score
    self.num_models = tree.num_models(models)
    leaves = [n for n, x in tree.named(base).items() if tree.is_floating(x)]
    self.layer_of = {n: layer(n) for n in leaves}
    self.layers = sorted(set(self.layer_of.values()))
    trim = methods.trim(1.0, scope="leaf", rule="exact")
    method = stage.chain(trim, methods.elected(reduce="sum", zero_sum="plus"))
    self._merge = jax.jit(functools.partial(memory.merge, method))

  def fill(self, values: Sequence[float]) -> dict[str, np.ndarray]:
    """Returns one value per model, for every layer."""
    return {layer: np.array(values, np.float32) for layer in self.layers}

  def merge(self, candidate: Layers) -> Tree:
    """Trims and scales the task vectors layer by layer, and merges them."""
    tables = ("density", candidate.density), ("weight", candidate.scale)
    hparams = {
      n: {k: jnp.asarray(t[layer]) for k, layer in self.layer_of.items()} for n, t in tables
    }
    return self._merge(self.models, self.base, hparams=hparams)

  def scores(self, params: Tree) -> np.ndarray:
    """Returns the score on every task, [K]."""
    return np.array([float(self.score(params, k)) for k in range(self.num_models)])

  def fit_alone(self, k: int, grid: Sequence[float]) -> tuple[float, float]:
    """Searches the density and scale at which a single task vector is best on its task."""

    def merge(pair: tuple[float, float]) -> Tree:
      scale = (np.eye(self.num_models)[k] * pair[1]).tolist()
      return self.merge(Layers(self.fill([pair[0]] * self.num_models), self.fill(scale)))

    goal = objective.Scored(merge, lambda params: self.score(params, k), f"hi_merging, model {k}")
    # Among equal scores the first pair wins: the largest.
    pairs = sorted(itertools.product(grid, grid), reverse=True)
    return objective.run(goal, objective.exhaustive(pairs)).candidate

  def layers_in_the_way(self, merged: Layers) -> list[tuple[str, int]]:
    """Returns layers that help a model alone but harm it when merged, the worst first."""
    K, zeros = self.num_models, self.fill([0.0] * self.num_models)
    base_scores, merged_scores = self.scores(self.base), self.scores(self.merge(merged))
    conflicts = []
    for name in self.layers:
      helps, harms = np.zeros(K), np.zeros(K)
      for k in range(K):
        alone = {**zeros, name: merged.scale[name] * np.eye(K, dtype=np.float32)[k]}
        params = self.merge(merged._replace(scale=alone))
        helps[k] = float(self.score(params, k)) - base_scores[k]
        params = self.merge(merged.change(name, k, "dropped"))
        harms[k] = float(self.score(params, k)) - merged_scores[k]
      both = (helps > 0) & (harms > 0)
      if both.any():
        worst = int(np.argmax(np.where(both, harms, -np.inf)))
        conflicts.append((-float(np.nansum(helps + harms)), name, worst))
    return [(name, k) for _, name, k in sorted(conflicts)]


@double_precision.aware
def hi_merging(
  base: Tree,
  models: Tree,
  score: Callable[[Any, int], float],
  *,
  grid: Sequence[float] = GRID,
  most: int | None = None,
  layer: Callable[[str], str] = methods.layer_of,
) -> objective.SearchResult:
  """Searches how much of each task vector to merge, then of each layer that is in the way.

  First each model alone: of its task vector the fraction and the factor on the grid that score best
  on its own task. What is left is merged by electing signs and adding up. Then layer by layer: a
  layer helps its model if the base scores better with it alone, and is in the way if the merged
  model scores better without it; where both are so, its part is trimmed by half, scaled by half, or
  dropped, if that raises the mean score.

  Takes K len(grid)² + 2K·(layers + 1) scorings of a task, K for the merged model, and 3K for each
  layer that is in the way. In memory.

  Experimental: the authors' scripts have the first step; the rule of the second is a
  reconstruction.

  Args:
    base: tree of arrays [*s].
    models: stack of K models, [K, *s], or a list of them.
    score: (params, k) -> score on the task of model k, larger for better ones.
    grid: fractions and factors to try.
    most: as many layers are changed at most; None: all that are in the way.
    layer: the layer that a leaf belongs to, by their names.

  Returns:
    The best merged model; trials are all merged models, with their mean score over the tasks.

  Reference: Fu et al. 2025, Training-free LLM merging (arXiv:2506.12379).

  Raises:
    ValueError: if all scores of a model, or all of the merged ones, are NaN.

  Example:
    >>> base, models = {"w": jnp.zeros(2)}, {"w": jnp.array([[4.0, 0.5]])}
    >>> score = lambda params, k: -float(jnp.sum((params["w"] - jnp.array([2.0, 0.0])) ** 2))
    >>> result = hi_merging(base, models, score)
    >>> result.params["w"].tolist(), result.candidate.scale["w"].tolist(), result.score
    ([2.0, 0.0], [0.5], 0.0)
  """
  family = _Family(base, models, score, layer)
  density, scale = zip(*(family.fit_alone(k, grid) for k in range(family.num_models)), strict=True)
  start = Layers(family.fill(density), family.fill(scale))
  conflicts = family.layers_in_the_way(start)[:most]
  goal = objective.Scored(
    family.merge, lambda params: float(np.mean(family.scores(params))), "hi_merging"
  )
  return objective.run(goal, thin_out(start, conflicts))


def thin_out(best: Layers, conflicts: Sequence[tuple[str, int]]) -> objective.Strategy:
  """Asks for the merged model, then with each conflicting layer trimmed, scaled and dropped.

  A change that raises the score stays.
  """
  (highest,) = yield [best]
  for layer, k in conflicts:
    candidates = [best.change(layer, k, word) for word in _CHANGES]
    scores = yield candidates
    if max(scores) > highest:
      highest, best = max(scores), candidates[int(np.argmax(scores))]
  return None
