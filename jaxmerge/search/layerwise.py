"""Hi-Merging: task vectors pruned and scaled model by model, then layer by layer, by a score."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple  # Any: a model is a tree of arrays.

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import methods
from jaxmerge.core import double_precision, stage, tree
from jaxmerge.core.tree import Tree
from jaxmerge.drivers import memory

GRID = tuple(round(0.1 * n, 1) for n in range(1, 11))
_WAYS = {"trimmed": (0.5, 1.0), "scaled": (1.0, 0.5), "dropped": (1.0, 0.0)}


class HiMerged(NamedTuple):
  """What a search found.

  Attributes:
    params: the merged model.
    score: its mean score over the tasks.
    density: fraction of each leaf's entries that is kept, by layer, [K].
    scale: factor on what is kept, by layer, [K].
    steps: for each layer that was looked at, its name, the model whose part was in the way, and
      what became of it: "trimmed", "scaled", "dropped" or "kept".
  """

  params: Tree
  score: float
  density: dict[str, np.ndarray]
  scale: dict[str, np.ndarray]
  steps: list[tuple[str, int, str]]


class _Search:
  """Makes candidates by one compiled program, and scores them."""

  def __init__(
    self, base: Tree, models: Tree, score: Callable[[Any, int], float], layer: Callable[[str], str]
  ):
    self.base, self.models, self.score = base, models, score
    self.height = tree.num_models(models)
    leaves = [n for n, x in tree.named(base).items() if tree.is_floating(x)]
    self.layer_of = {n: layer(n) for n in leaves}
    self.layers = sorted(set(self.layer_of.values()))
    kept = methods.trim(1.0, scope="leaf", rule="exact")
    method = stage.chain(kept, methods.elected(reduce="sum", zero_sum="plus"))
    self.merge = jax.jit(functools.partial(memory.merge, method))

  def table(self, values: Sequence[float]) -> dict[str, np.ndarray]:
    """One value a model, in every layer."""
    return {layer: np.array(values, np.float32) for layer in self.layers}

  def made(self, density: Mapping[str, np.ndarray], scale: Mapping[str, np.ndarray]) -> Tree:
    """Trims and scales the task vectors layer by layer, and merges them."""
    both = ("density", density), ("weight", scale)
    hparams = {n: {k: jnp.asarray(t[layer]) for k, layer in self.layer_of.items()} for n, t in both}
    return self.merge(self.models, self.base, hparams=hparams)

  def one(self, params: Tree, k: int) -> float:
    """The score on the task of a model."""
    found = float(self.score(params, k))
    if not np.isfinite(found):
      raise ValueError(f"the score on the task of model {k} is {found}; it must be finite.")
    return found

  def each(self, params: Tree) -> np.ndarray:
    """The score on every task."""
    return np.array([self.one(params, k) for k in range(self.height)])


@double_precision.aware
def hi_merging(
  base: Tree,
  models: Tree,
  score: Callable[[Any, int], float],
  *,
  grid: Sequence[float] = GRID,
  most: int | None = None,
  layer: Callable[[str], str] = methods.layer_of,
) -> HiMerged:
  """Searches how much of each task vector to keep, then of each layer that is in the way.

  First each model alone: of its task vector the fraction and the factor on the grid that score best
  on its own task. What is left is merged by electing signs and adding up. Then layer by layer: a
  layer helps its model if the base scores better with it alone, and is in the way if the merged
  model scores better without it; where both are so, its part is trimmed by half, scaled by half, or
  dropped, if that raises the mean score.

  Takes K len(grid)² + 2K·layers scorings of a task, and 3K for each layer that is in the way.
  In memory.

  Experimental: the authors' scripts have the first step; the rule of the second is a
  reconstruction.

  Args:
    base: tree of arrays [*s].
    models: stack of K models, [K, *s].
    score: (params, k) -> score on the task of model k, larger for better ones.
    grid: fractions and factors to try.
    most: as many layers are changed at most; None: all that are in the way.
    layer: the layer that a leaf belongs to, by their names.

  Reference: Fu et al. 2025, Training-free LLM merging (arXiv:2506.12379).

  Raises:
    ValueError: for a score that is NaN or infinite.

  Example:
    >>> base, models = {"w": jnp.zeros(2)}, {"w": jnp.array([[4.0, 0.5]])}
    >>> score = lambda params, k: -float(jnp.sum((params["w"] - jnp.array([2.0, 0.0])) ** 2))
    >>> found = hi_merging(base, models, score)
    >>> found.params["w"].tolist(), found.scale["w"].tolist(), found.score
    ([2.0, 0.0], [0.5], 0.0)
  """
  search = _Search(base, models, score, layer)
  K = search.height
  density, scale = np.ones(K), np.ones(K)
  for k in range(K):
    tried = []
    for p, s in itertools.product(grid, repeat=2):
      alone = np.eye(K)[k] * s
      made = search.made(search.table([p] * K), search.table(alone.tolist()))
      tried.append((search.one(made, k), p, s))
    # Of what scores the same, the most is kept.
    _, density[k], scale[k] = max(tried)
  densities, scales = search.table(density.tolist()), search.table(scale.tolist())
  best = float(np.mean(search.each(search.made(densities, scales))))
  steps: list[tuple[str, int, str]] = []
  for name, k in _in_the_way(search, densities, scales)[:most]:
    word = "kept"
    for way, (thinner, smaller) in _WAYS.items():
      tried_density = _changed(densities, name, k, thinner)
      tried_scale = _changed(scales, name, k, smaller)
      found = float(np.mean(search.each(search.made(tried_density, tried_scale))))
      if found > best:
        best, word, kept = found, way, (tried_density, tried_scale)
    if word != "kept":
      densities, scales = kept
    steps.append((name, k, word))
  return HiMerged(search.made(densities, scales), best, densities, scales, steps)


def _changed(table: Mapping[str, np.ndarray], name: str, k: int, factor: float) -> dict[str, Any]:
  own = {n: v.copy() for n, v in table.items()}
  own[name][k] *= factor
  return own


def _in_the_way(
  search: _Search, density: Mapping[str, np.ndarray], scale: Mapping[str, np.ndarray]
) -> list[tuple[str, int]]:
  """Layers that help a model alone, and harm it in the merged one: the worst first."""
  K, nothing = search.height, search.table([0.0] * search.height)
  start = search.each(search.base)
  merged = search.each(search.made(density, scale))
  found = []
  for name in search.layers:
    helps, harms = np.zeros(K), np.zeros(K)
    for k in range(K):
      alone = {**nothing, name: scale[name] * np.eye(K, dtype=np.float32)[k]}
      helps[k] = search.one(search.made(density, alone), k) - start[k]
      without = search.made(density, _changed(scale, name, k, 0.0))
      harms[k] = search.one(without, k) - merged[k]
    if ((helps > 0) & (harms > 0)).any():
      worst = int(np.argmax(np.where(helps > 0, harms, -np.inf)))
      found.append((-float(np.sum(helps + harms)), name, worst))
  return [(name, k) for _, name, k in sorted(found)]
