"""Soups whose ingredients are searched by a score, or learned.

The score is a function of a model, of any kind, that is larger for better ones: the caller
evaluates. Candidates are weighted sums of the models, by one compiled program.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple  # Any: a model is a tree of arrays.

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmerge import methods
from jaxmerge.core import tree
from jaxmerge.core.tree import Tree
from jaxmerge.drivers import memory
from jaxmerge.search import objective


def greedy_soup(
  models: Tree, score: objective.Score, *, accept_ties: bool = False
) -> objective.Soup:
  """Adds the models to a mean one after the other, best first, where that raises the score.

  Args:
    models: stack of K models, [K, *s].
    score: of a model; it is called 2K - 1 times.
    accept_ties: also where the score stays the same, as the paper says; its code does not. Of
      models that score the same, the later one comes first, as in the code.

  Reference: Wortsman et al. 2022, Model soups (arXiv:2203.05482).

  Example:
    >>> import jax.numpy as jnp
    >>> models = {"w": jnp.array([0.0, 4.0, 2.5])}
    >>> soup = greedy_soup(models, lambda params: -float(abs(params["w"] - 3.0)))
    >>> soup.weights.tolist(), float(soup.params["w"])
    ([0.0, 0.5, 0.5], 3.25)
  """
  taste = objective.Tasting(models, score)
  singles = np.eye(taste.height)
  for own in singles:
    taste(own)
  order = np.argsort([found for _, found in taste.tried], kind="stable")[::-1]
  held = singles[order[0]]
  taste.weights = held
  for k in order[1:]:
    larger = held + singles[k]
    if taste(larger / larger.sum(), ties=accept_ties):
      held = larger
  return taste.soup()


class LearnedSoup(NamedTuple):
  """What descent found.

  Attributes:
    params: the model.
    weights: of the models, [K] for each leaf by name, adding up to 1.
    temperature: what the logits are multiplied by.
    losses: of each batch, before its step.
  """

  params: Tree
  weights: dict[str, np.ndarray]
  temperature: float
  losses: np.ndarray


def learned_soup(
  models: Tree,
  loss: Callable[[Tree, jax.Array, Any], jax.Array],
  batches: Iterable[Any],
  *,
  by_leaf: bool = True,
  learning_rate: float = 0.05,
) -> LearnedSoup:
  """Learns weights for each leaf by descent on held-out rows; they begin equal.

  All models are in memory. Weights are the softmax of what AdamW moves, without weight decay. The
  authors take 5 epochs in batches of 256 rows.

  Args:
    models: stack of K models, [K, *s].
    loss: (params, temperature, batch) -> scalar, of the logits times the temperature, which is
      learned as well and begins at 1. It is traced.
    batches: all batches of all epochs, of one shape.
    by_leaf: a weight for each leaf and model; else for each model.
    learning_rate: of AdamW.

  Reference: Wortsman et al. 2022, Model soups (arXiv:2203.05482), appendix on learned soups.

  Raises:
    ValueError: for no batches, and for a loss that is NaN or infinite, with its number.

  Example:
    >>> import jax.numpy as jnp
    >>> models = {"w": jnp.array([0.0, 4.0])}
    >>> far = lambda params, temperature, batch: (params["w"] - batch) ** 2
    >>> soup = learned_soup(models, far, [jnp.float32(3.0)] * 200)
    >>> print(soup.weights["w"].round(2), round(float(soup.params["w"]), 2))
    [0.25 0.75] 3.0
  """
  height, leaves = tree.num_models(models), tree.named(models)
  keys = [n for n, x in leaves.items() if tree.is_floating(x)]
  start = {n: np.zeros(height, np.float32) for n in (keys if by_leaf else [""])}
  adam = optax.adamw(learning_rate, weight_decay=0.0)

  mix = methods.average(normalize=False)

  def shares(logits: dict[str, jax.Array]) -> dict[str, jax.Array]:
    own = {n: jax.nn.softmax(v) for n, v in logits.items()}
    return {n: own[n if by_leaf else ""] for n in keys}

  def mixed(models: Tree, logits: dict[str, jax.Array]) -> Tree:
    return memory.merge(mix, models, hparams={"weight": shares(logits)})

  @jax.jit
  def step(models: Tree, held: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
    value, slope = jax.value_and_grad(lambda h: loss(mixed(models, h[0]), h[1], batch))(held)
    update, state = adam.update(slope, state, held)
    return optax.apply_updates(held, update), state, value

  held = (jax.tree.map(jnp.asarray, start), jnp.float32(1.0))
  state, losses = adam.init(held), []
  for batch in batches:
    held, state, value = step(models, held, state, batch)
    losses.append(float(value))
    if not np.isfinite(losses[-1]):
      raise ValueError(f"the loss of batch {len(losses)} is {losses[-1]}.")
  if not losses:
    raise ValueError("no batches are given.")
  weights = {n: np.asarray(v) for n, v in shares(held[0]).items()}
  return LearnedSoup(mixed(models, held[0]), weights, float(held[1]), np.array(losses))


def soce(
  models: Tree,
  scores: np.ndarray,
  score: objective.Score,
  *,
  correlation: float = 0.5,
  step: float = 0.1,
) -> objective.Soup:
  """Picks the best model of each category of a benchmark, and searches their weights on a grid.

  Categories count where their scores hardly go with those of some other. Weights are multiples of
  `step` that add up to 1, none of them 0, and equal ones.

  Experimental: the paper leaves the bound on the correlation open, and its code could not be had.

  Args:
    models: stack of K models, [K, *s].
    scores: of each model in each category, [K, C].
    score: of a model; the paper adds up its scores in all categories.
    correlation: categories count whose scores' correlation with those of some other category is
      below that, in magnitude.
    step: of the weights.

  Reference: Maiti et al. 2025, Souper-Model (arXiv:2511.13254).

  Raises:
    ValueError: if `scores` does not fit the models, or no two categories are that different.

  Example:
    >>> import jax.numpy as jnp
    >>> models, scores = {"w": jnp.array([0.0, 1.0])}, np.array([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]])
    >>> soce(models, scores, lambda params: float(params["w"])).weights.tolist()
    [0.1, 0.9]
  """
  taste = objective.Tasting(models, score)
  scores = np.asarray(scores, np.float64)
  if scores.ndim != 2 or len(scores) != taste.height or not np.isfinite(scores).all():
    raise ValueError(
      f"scores must be finite, [models, categories] of {taste.height} models, got "
      f"{list(scores.shape)}."
    )
  experts = _experts(scores, correlation)
  for own in _grid(len(experts), step):
    weights = np.zeros(taste.height)
    weights[experts] = own
    taste(weights)
  return taste.soup()


def _experts(scores: np.ndarray, bound: float) -> list[int]:
  """The best models of the categories that are unlike some other."""
  apart = scores - scores.mean(axis=0)
  norms = np.linalg.norm(apart, axis=0)
  norms = np.where(norms > 1e-12 * np.abs(scores).max(initial=1e-300), norms, np.inf)
  like = np.abs(apart.T @ apart / np.outer(norms, norms))
  np.fill_diagonal(like, np.inf)
  counted = [c for c in range(scores.shape[1]) if (like[c] < bound).any()]
  if not counted:
    raise ValueError(
      f"no two of the {scores.shape[1]} categories have a correlation below {bound:g}; "
      "give a larger one."
    )
  return sorted({int(scores[:, c].argmax()) for c in counted})


def _grid(count: int, step: float) -> Iterator[np.ndarray]:
  """Weights that add up to one: equal ones, then all multiples of a step."""
  yield np.full(count, 1 / count)
  parts = round(1 / step)
  for cuts in itertools.combinations(range(1, parts), count - 1):
    yield np.diff([0, *cuts, parts]) / parts
