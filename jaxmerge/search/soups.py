"""Soups: weighted sums of models, with weights chosen by a score or learned.

The score is any function of a model; higher is better. One compiled program computes all
candidates.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple  # Any: a model is a tree of arrays.

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmerge import methods
from jaxmerge.core import tree
from jaxmerge.core.tree import Tree
from jaxmerge.drivers import arguments, memory
from jaxmerge.search import objective


def greedy_soup(
  models: Tree, score: objective.Score | Any, *, accept_ties: bool = False
) -> objective.SearchResult:
  """Averages models greedily: adds each to the mean, best first, if that raises the score.

  Args:
    models: stack of K models, [K, *s].
    score: function of a model; it is called 2K - 1 times.
    accept_ties: whether to add a model if the score stays the same, as in the paper but not in its
      code. Of models with equal scores, the later one comes first, as in the code.

  Returns:
    The final mean; its candidate is the weights [K].

  Reference: Wortsman et al. 2022, Model soups (arXiv:2203.05482).

  Example:
    >>> import jax.numpy as jnp
    >>> models = {"w": jnp.array([0.0, 4.0, 2.5])}
    >>> soup = greedy_soup(models, lambda params: -float(abs(params["w"] - 3.0)))
    >>> soup.candidate.tolist(), float(soup.params["w"])
    ([0.0, 0.5, 0.5], 3.25)
  """
  soups = objective.weighted_sums(models, score, "greedy_soup")
  return objective.run(soups, grow_mean(tree.num_models(models), accept_ties))


def grow_mean(num_models: int, accept_ties: bool) -> objective.Strategy:
  """Proposes each model, then the mean with the next best one; returns the last mean accepted."""
  singles = list(np.eye(num_models))
  scores = yield singles
  order = np.argsort(scores, kind="stable")[::-1]
  ingredients = singles[order[0]]
  best = objective.Trial(ingredients, scores[order[0]])
  for k in order[1:]:
    larger = ingredients + singles[k]
    mean = larger / larger.sum()
    (score,) = yield [mean]
    if score > best.score or (accept_ties and score == best.score):
      ingredients, best = larger, objective.Trial(mean, score)
  return best


Loss = Callable[[Tree, jax.Array, Any], jax.Array]


class LeafWeights(NamedTuple):
  """Weights of the models for each leaf, as logits.

  Attributes:
    logits: [K] by leaf name, or under "" for all leaves.
    temperature: factor on the model's logits.
    leaves: names of all leaves.
  """

  logits: dict[str, jax.Array]
  temperature: jax.Array
  leaves: tuple[str, ...]

  @property
  def weights(self) -> dict[str, jax.Array]:
    """Returns the weights [K] of each leaf: the softmax of its logits."""
    softmax = {n: jax.nn.softmax(x) for n, x in self.logits.items()}
    return {n: softmax[n if n in softmax else ""] for n in self.leaves}


class _Descent:
  """An objective with its strategy: each evaluation is one optimiser step on the weights."""

  name = "learned_soup"

  def __init__(
    self, models: Tree, loss: Loss, by_leaf: bool, optimizer: optax.GradientTransformation
  ):
    leaves = tuple(n for n, x in tree.named(models).items() if tree.is_floating(x))
    logits = {
      n: jnp.zeros(tree.num_models(models), jnp.float32) for n in (leaves if by_leaf else [""])
    }
    self.models, self.candidate = models, LeafWeights(logits, jnp.float32(1.0), leaves)
    self.state = optimizer.init(self.candidate[:2])
    self.number, self.batch = 0, None

    @jax.jit
    def step(models: Tree, variables: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
      def loss_of(variables: Any) -> jax.Array:
        return loss(
          _mix(models, LeafWeights(variables[0], variables[1], leaves)), variables[1], batch
        )

      value, gradient = jax.value_and_grad(loss_of)(variables)
      update, state = optimizer.update(gradient, state, variables)
      return optax.apply_updates(variables, update), state, value

    self.step = step

  def model(self, candidate: LeafWeights) -> Tree:
    return _mix(self.models, candidate)

  def evaluate(self, candidates: Sequence[LeafWeights]) -> Iterator[tuple[float, None]]:
    for candidate in candidates:
      moved, self.state, loss = self.step(self.models, candidate[:2], self.state, self.batch)
      self.candidate = LeafWeights(moved[0], moved[1], candidate.leaves)
      if not np.isfinite(loss):
        raise ValueError(f"the loss of batch {self.number} is {float(loss)}.")
      yield -float(loss), None

  def descend(self, batches: Iterable[Any]) -> objective.Strategy:
    """Proposes the weights before each step, and returns those after the last step."""
    score = np.nan
    for self.number, self.batch in enumerate(batches, 1):
      (score,) = yield [self.candidate]
    if not self.number:
      raise ValueError("there are no batches.")
    return objective.Trial(self.candidate, score)


def _mix(models: Tree, candidate: LeafWeights) -> Tree:
  method = methods.average(normalize=False)
  return memory.merge(method, models, hparams={"weight": candidate.weights})


def learned_soup(
  models: Tree,
  loss: Loss | Any,
  batches: Iterable[Any],
  *,
  by_leaf: bool = True,
  learning_rate: float = 0.05,
) -> objective.SearchResult:
  """Learns weights for each leaf by gradient descent on held-out rows, starting from equal weights.

  All models are in memory. The weights are a softmax of logits, which AdamW optimises without
  weight decay. The authors use 5 epochs in batches of 256 rows.

  Args:
    models: stack of K models, [K, *s].
    loss: (params, temperature, batch) -> scalar, a loss on the logits times the temperature, which
      is learned too and starts at 1. It is traced.
    batches: all batches of all epochs, of one shape.
    by_leaf: whether each leaf has a weight per model; otherwise all leaves share them.
    learning_rate: learning rate of AdamW.

  Returns:
    The model after the last step. Its trials are the weights before each step; their score is
    minus the loss of the step's batch. The result's score is that of the last trial.

  Reference: Wortsman et al. 2022, Model soups (arXiv:2203.05482), appendix on learned soups.

  Raises:
    ValueError: if there are no batches, or if a batch's loss is NaN or infinite.

  Example:
    >>> import jax.numpy as jnp
    >>> models = {"w": jnp.array([0.0, 4.0])}
    >>> far = lambda params, temperature, batch: (params["w"] - batch) ** 2
    >>> soup = learned_soup(models, far, [jnp.float32(3.0)] * 200)
    >>> print(soup.candidate.weights["w"].round(2), round(float(soup.params["w"]), 2))
    [0.25 0.75] 3.0
  """
  if not callable(loss):
    kind = type(loss).__name__
    raise ValueError(
      "learned_soup: the loss must be a function (params, temperature, batch) -> number, got a "
      f"{kind}; the models come before it."
    )
  models = arguments.check_stack(models, "{}")
  descent = _Descent(models, loss, by_leaf, optax.adamw(learning_rate, weight_decay=0.0))
  return objective.run(descent, descent.descend(batches))


def soce(
  models: Tree,
  scores: np.ndarray,
  score: objective.Score | Any,
  *,
  correlation: float = 0.5,
  step: float = 0.1,
) -> objective.SearchResult:
  """Picks the best model of each category of a benchmark, and searches their weights on a grid.

  Only weakly correlated categories count. The grid has equal weights, and all positive multiples of
  `step` that sum to 1.

  Experimental: the paper does not state the correlation threshold, and its code was not available.

  Args:
    models: stack of K models, [K, *s].
    scores: score of each model in each category, [K, C].
    score: function of a model; the paper sums its scores over all categories.
    correlation: a category counts if the correlation of its scores with those of another one is
      below this, in magnitude.
    step: step of the grid.

  Returns:
    The best model of the grid; its candidate is the weights [K].

  Reference: Maiti et al. 2025, Souper-Model (arXiv:2511.13254).

  Raises:
    ValueError: if `scores` does not fit the models, or if no category counts.

  Example:
    >>> import jax.numpy as jnp
    >>> models, scores = {"w": jnp.array([0.0, 1.0])}, np.array([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]])
    >>> soce(models, scores, lambda params: float(params["w"])).candidate.tolist()
    [0.1, 0.9]
  """
  soups = objective.weighted_sums(models, score, "soce")
  scores, K = np.asarray(scores, np.float64), tree.num_models(models)
  if scores.ndim != 2 or len(scores) != K or not np.isfinite(scores).all():
    raise ValueError(
      f"scores must be finite, [models, categories] of {K} models, got {list(scores.shape)}."
    )
  experts = _experts(scores, correlation)
  # Models that are no experts have weight 0.
  grid = [weights @ np.eye(K)[experts] for weights in _grid(len(experts), step)]
  return objective.run(soups, objective.exhaustive(grid))


def _experts(scores: np.ndarray, bound: float) -> list[int]:
  """Returns the best models of categories whose correlation with another is below the bound."""
  apart = scores - scores.mean(axis=0)
  norms = np.linalg.norm(apart, axis=0)
  norms = np.where(norms > 1e-12 * np.abs(scores).max(initial=1e-300), norms, np.inf)
  like = np.abs(apart.T @ apart / np.outer(norms, norms))
  np.fill_diagonal(like, np.inf)
  counted = [c for c in range(scores.shape[1]) if (like[c] < bound).any()]
  if not counted:
    raise ValueError(
      f"no two of the {scores.shape[1]} categories have a correlation below {bound:g}; "
      "raise the bound."
    )
  return sorted({int(scores[:, c].argmax()) for c in counted})


def _grid(count: int, step: float) -> Iterator[np.ndarray]:
  """Yields weights that sum to 1: equal ones, then all positive multiples of a step."""
  yield np.full(count, 1 / count)
  parts = round(1 / step)
  for cuts in itertools.combinations(range(1, parts), count - 1):
    yield np.diff([0, *cuts, parts]) / parts
