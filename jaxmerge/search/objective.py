"""Objectives, strategies that ask for candidates, and the result that all searches share.

A strategy is a generator: it yields candidates and is sent their scores, and knows nothing of
models. An objective makes models of candidates and scores them. `run` brings the two together.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable  # Any: models, candidates.

import numpy as np

from jaxmerge import methods
from jaxmerge.core.tree import Tree
from jaxmerge.drivers import arguments, memory

Score = Callable[[Any], float]


class Trial(NamedTuple):
  """A candidate and its score, NaN where it has none."""

  candidate: Any
  score: float


class SearchResult(NamedTuple):
  """The result of a search.

  Attributes:
    params: the best model.
    candidate: its recipe: weights [K], a scale, fractions for each layer, ...
    score: of the best model; larger is better.
    trials: all candidates with their scores, in order.
  """

  params: Tree
  candidate: Any
  score: float
  trials: list[Trial]


class Unscored(ValueError):
  """No candidate of a search has a score."""


Strategy = Generator[Iterable[Any], list[float], Trial | None]


@runtime_checkable
class Objective(Protocol):
  """Makes models of candidates, and scores them."""

  @property
  def name(self) -> str:
    """What is searched, for errors."""
    ...

  def model(self, candidate: Any) -> Tree:
    """Makes the model of a candidate."""
    ...

  def evaluate(self, candidates: Sequence[Any]) -> Iterator[tuple[float, Tree | None]]:
    """Yields each candidate's score, and its model or None, so that `model` makes it again."""
    ...


@dataclasses.dataclass(frozen=True)
class Scored:
  """An objective of two functions, which scores one model after the other.

  Attributes:
    model: candidate -> model.
    score: model -> score, larger for better ones.
    name: what is searched, for errors.
  """

  model: Callable[[Any], Tree] | Any
  score: Score | Any
  name: str = "the search"

  def __post_init__(self) -> None:
    """Raises ValueError for a model or a score that is no function."""
    for word, value in (("model", self.model), ("score", self.score)):
      if not callable(value):
        raise ValueError(
          f"{self.name}: {word} must be a function, got {value!r:.60}: write "
          "search.Scored(model, score), of functions candidate -> model and model -> score."
        )

  def evaluate(self, candidates: Sequence[Any]) -> Iterator[tuple[float, None]]:
    """Yields the score of each candidate."""
    for candidate in candidates:
      yield _number(self.score(self.model(candidate)), self.name), None


def _number(score: Any, name: str) -> float:
  """Returns a score as a number; ValueError for anything else."""
  try:
    return float(score)
  except (TypeError, ValueError) as error:
    shape = list(getattr(score, "shape", ()))
    what = f"an array {shape}" if shape else f"{score!r:.60}"
    hint = "return its mean, such as float(x.mean())" if shape else "return float(...)"
    raise ValueError(f"{name}: a score must be one number, got {what}: {hint}.") from error


def weighted_sums(models: Tree, score: Score | Any, name: str = "the soup") -> Scored:
  """Returns an objective whose candidates are weights [K] of a stack's models [K, *s]."""
  if not callable(score):
    kind = type(score).__name__
    raise ValueError(
      f"{name}: the score must be a function of a model, got a {kind}; the models come before it."
    )
  models = arguments.check_stack(models, "{}")
  method = methods.average(normalize=False)

  def model(weights: np.ndarray) -> Tree:
    return memory.merge(method, models, hparams={"weight": np.asarray(weights, np.float32)})

  return Scored(model, score, name)


def exhaustive(candidates: Iterable[Any]) -> Strategy:
  """Asks for all candidates at once."""
  yield list(candidates)
  return None


def run(objective: Objective | Any, strategy: Strategy | Any) -> SearchResult:
  """Runs a strategy to its end and returns the best model with all trials.

  The best is the first of the candidates with the highest score; a strategy may return another
  trial, which then is the result. A candidate whose score is NaN is never the best: the strategy is
  sent minus infinity for it, and a warning says so.

  Args:
    objective: makes and scores the models.
    strategy: yields sequences of candidates, and is sent the list of their scores.

  Raises:
    ValueError: if no candidate has a score above minus infinity, and for an objective or a strategy
      that is none.

  Example: random search, as a user's own strategy.
    >>> import jax.numpy as jnp
    >>> def random_weights(num_models, generations, seed=0):
    ...   draw = np.random.default_rng(seed)
    ...   center, best, width = np.full(num_models, 1 / num_models), -np.inf, 0.5
    ...   for _ in range(generations):
    ...     candidates = center + width * draw.normal(size=(8, num_models))
    ...     scores = yield list(candidates)
    ...     if max(scores) > best:
    ...       best, center = max(scores), candidates[np.argmax(scores)]
    ...     width *= 0.9
    >>> models = {"w": jnp.array([[1.0, 0.0], [0.0, 1.0]])}
    >>> score = lambda params: -float(jnp.sum((params["w"] - jnp.array([0.3, 0.9])) ** 2))
    >>> result = run(weighted_sums(models, score), random_weights(2, 30))
    >>> result.candidate.round(1).tolist(), len(result.trials), result.score > -0.01
    ([0.3, 0.9], 240, True)
  """
  _check(objective, strategy)
  trials: list[Trial] = []
  best: tuple[Trial, Tree | None] | None = None
  scores: Any = None  # Starts the generator.
  while True:
    try:
      batch = strategy.send(scores)
    except StopIteration as end:
      return _result(objective, trials, best, end.value)
    candidates = _candidates(batch, objective.name)
    scores = []
    for candidate, score, params in _evaluate(objective, candidates):
      trials.append(Trial(candidate, score))
      scores.append(-math.inf if math.isnan(score) else score)
      if scores[-1] > (best[0].score if best else -math.inf):
        best = trials[-1], params


def _evaluate(
  objective: Objective, candidates: Sequence[Any]
) -> Iterator[tuple[Any, float, Tree | None]]:
  """Yields each candidate with its score and model; ValueError if `evaluate` yields no pairs."""
  rule = f"{objective.name}: evaluate must yield one pair (score, model or None) per candidate"
  results: Any = objective.evaluate(candidates)
  if not isinstance(results, Iterable):
    raise ValueError(f"{rule}, it returned {results!r:.60}: write yield score, None.")
  count = 0
  for pair in results:
    if count == len(candidates):
      raise ValueError(f"{rule}, it yielded more than {len(candidates)}.")
    if not isinstance(pair, tuple) or len(pair) != 2:
      raise ValueError(f"{rule}, it yielded {pair!r:.60}: write yield score, None.")
    count += 1
    yield candidates[count - 1], _number(pair[0], objective.name), pair[1]
  if count < len(candidates):
    raise ValueError(f"{rule}, it yielded {count} for {len(candidates)} candidates.")


def _check(objective: Any, strategy: Any) -> None:
  """Raises ValueError for an objective or a strategy that is none, with what to write."""
  if not all(callable(getattr(objective, word, None)) for word in ("model", "evaluate")):
    raise ValueError(
      f"the objective must make models and score them, got {objective!r:.60}: write "
      "search.run(search.Scored(model, score), strategy)."
    )
  if inspect.isgenerator(strategy) or callable(getattr(strategy, "send", None)):
    return
  if callable(strategy):
    name = getattr(strategy, "__name__", "strategy")
    what = f"{name} makes a strategy and is none: call it, {name}(...)"
    if not inspect.isgeneratorfunction(strategy):
      what = f"the strategy must be a generator, and {name} is a function without yield"
    raise ValueError(f"{what}.")
  raise ValueError(
    f"the strategy must be a generator, got {strategy!r:.60}: search.exhaustive(candidates) tries "
    "all of a list."
  )


def _candidates(batch: Any, name: str) -> list[Any]:
  """Returns the candidates that a strategy yields at once; ValueError for one alone."""
  if not isinstance(batch, str | Mapping):
    try:
      return list(batch)
    except TypeError:
      pass
  raise ValueError(
    f"{name}: a strategy yields lists of candidates, got {batch!r:.60}: write yield [candidate]."
  )


def _result(
  objective: Objective,
  trials: list[Trial],
  best: tuple[Trial, Tree | None] | None,
  choice: Trial | Any,
) -> SearchResult:
  """The result of a search: the strategy's choice, or the best trial."""
  if not isinstance(choice, Trial | None):
    raise ValueError(
      f"{objective.name}: the strategy returned {choice!r:.60}: return search.Trial(candidate, "
      "score), or nothing for the best of all trials."
    )
  if best is None:
    examples = ", ".join(str(trial.candidate) for trial in trials[:4]) + ", ..." * (len(trials) > 4)
    raise Unscored(
      f"{objective.name}: none of {len(trials)} candidates has a score that is a number: "
      f"{examples or 'there are none'}. Check the models, and what scores them."
    )
  unscored = [trial.candidate for trial in trials if math.isnan(trial.score)]
  if unscored:
    warnings.warn(
      f"{objective.name}: {len(unscored)} of {len(trials)} candidates have NaN as their score and "
      f"are never the best, such as {unscored[0]}.",
      stacklevel=3,
    )
  trial, params = best
  if choice is not None and choice.candidate is not trial.candidate:
    trial, params = choice, None
  params = objective.model(trial.candidate) if params is None else params
  return SearchResult(params, *trial, trials)
