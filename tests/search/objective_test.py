"""The driver of all searches: what it asks and tells, which candidate is the best, and NaN."""

import types

import jax.numpy as jnp
import numpy as np
import pytest
from example import close

from jaxmerge import search
from jaxmerge.search import evolution, layerwise, objective, soups

NAN = float("nan")


def run(scores, strategy=None):
  """Searches over places in a list of scores; the model of a place is that number."""
  goal = search.Scored(lambda place: {"w": place}, lambda params: scores[params["w"]], "places")
  return search.run(goal, strategy or objective.exhaustive(range(len(scores))))


def test_the_first_of_the_best_is_the_result_with_all_trials():
  result = run([1.0, 3.0, 2.0, 3.0])
  assert (result.params, result.candidate, result.score) == ({"w": 1}, 1, 3.0)
  assert result.trials == [(0, 1.0), (1, 3.0), (2, 2.0), (3, 3.0)]


def test_candidates_may_be_an_iterator():
  """As those of `grid.candidates` are: each has its own score."""
  assert run([1.0, 3.0, 2.0, 0.0], objective.exhaustive(iter(range(4)))) == run(
    [1.0, 3.0, 2.0, 0.0]
  )


def test_nan_is_never_the_best_and_a_warning_says_so():
  with pytest.warns(UserWarning, match="places: 2 of 3 candidates have NaN .* such as 0"):
    result = run([NAN, 1.0, NAN])
  assert (result.candidate, result.score, len(result.trials)) == (1, 1.0, 3)
  assert np.isnan(result.trials[0].score)


@pytest.mark.parametrize("scores", [[NAN, NAN], [-np.inf], []])
def test_a_search_without_any_score_is_an_error(scores):
  with pytest.raises(ValueError, match=f"places: none of {len(scores)} candidates has a score"):
    run(scores)


def test_a_strategy_is_sent_the_scores_of_what_it_asked_for():
  sent = []

  def strategy():
    sent.append((yield [0]))
    sent.append((yield [2, 1]))
    return None

  with pytest.warns(UserWarning, match="NaN"):
    run([1.0, NAN, 3.0], strategy())
  assert sent == [[1.0], [3.0, -np.inf]]


def test_a_strategy_may_return_another_trial_than_the_best():
  def strategy():
    (first, _) = yield [0, 1]
    return search.Trial(0, first)

  result = run([1.0, 2.0], strategy())
  assert (result.params, result.candidate, result.score) == ({"w": 0}, 0, 1.0)


def yields(batch, choice=None):
  """A strategy that asks once, and returns a choice."""
  yield batch
  return choice


@pytest.mark.parametrize(
  ("strategy", "scores", "words"),
  [
    (yields([0], [0, 1.0]), [1.0], r"returned \[0, 1.0\]: return search.Trial\(candidate, score\)"),
    (yields(0), [1.0], r"lists of candidates, got 0: write yield \[candidate\]"),
    (yields({"w": 0}), [1.0], "lists of candidates, got {'w': 0}"),
    (yields, [1.0], r"yields makes a strategy and is none: call it, yields\(...\)"),
    (len, [1.0], "must be a generator, and len is a function without yield"),
    ([0], [1.0], r"got \[0\]: search.exhaustive\(candidates\) tries all"),
    (None, [None], r"one number, got None: return float\(...\)"),
    (None, [np.ones(2)], r"one number, got an array \[2\]: return its mean"),
  ],
)
def test_what_is_no_strategy_or_no_score_is_named(strategy, scores, words):
  with pytest.raises(ValueError, match=words):
    run(scores, strategy)


def test_what_is_no_objective_is_named():
  with pytest.raises(
    ValueError, match=r"write search.run\(search.Scored\(model, score\), strategy"
  ):
    search.run(len, search.exhaustive([0]))
  with pytest.raises(ValueError, match=r"score must be a function, got 1.0: write search.Scored"):
    search.Scored(len, 1.0)


@pytest.mark.parametrize(
  ("evaluate", "words"),
  [
    (lambda candidates: None, r"mine: evaluate must yield one pair .*, it returned None"),
    (lambda candidates: [0.5, 0.7], r"it yielded 0.5: write yield score, None"),
    (lambda candidates: [(0.5, None)], r"it yielded 1 for 2 candidates"),
    (lambda candidates: [(0.5, None)] * 3, r"it yielded more than 2"),
    (lambda candidates: [("good", None)] * 2, r"a score must be one number, got 'good'"),
  ],
)
def test_an_objective_that_yields_no_pairs_is_named(evaluate, words):
  objective = types.SimpleNamespace(name="mine", model=lambda c: {"w": c}, evaluate=evaluate)
  with pytest.raises(ValueError, match=words):
    search.run(objective, search.exhaustive([0.0, 1.0]))


def test_all_searches_return_the_same_record():
  """With the numbers that the searches had before they shared a driver."""
  models = {"w": jnp.array([[0.0, 4.0], [4.0, 0.0], [8.0, 8.0]])}
  base, goal = {"w": jnp.zeros(2)}, np.array([1.6, 2.4])
  near = lambda params: -float(((np.asarray(params["w"], np.float64) - goal) ** 2).sum())  # noqa: E731
  categories = np.array([[3.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
  hi = layerwise.hi_merging(base, models, lambda params, k: near(params), grid=(0.5, 1.0))
  far = lambda params, temperature, batch: jnp.sum((params["w"] - 3.0) ** 2)  # noqa: E731
  learned = soups.learned_soup(models, far, [0.0] * 3)
  results = {
    "greedy": soups.greedy_soup(models, near),
    "soce": soups.soce(models, categories, near, correlation=1),
    "lcsc": evolution.lcsc(models, near, generations=3),
    "hi": hi._replace(candidate=hi.candidate.scale["w"]),
    "learned": learned._replace(candidate=learned.candidate.temperature),
  }
  expected = {
    "greedy": ([0.5, 0.5, 0.0], -0.32, 5),
    "soce": ([0.6, 0.4, 0.0], 0.0, 10),
    "lcsc": ([0.81, 0.09, 0.1], -2.8832, 8),
    "hi": ([0.5, 0.0, 0.5], -18.72, 4),
    "learned": (1.0, -1.10648942, 3),
  }
  for name, result in results.items():
    assert isinstance(result, search.SearchResult)
    candidate, score, trials = expected[name]
    close(result.candidate, candidate, atol=1e-6)
    close(result.score, score, atol=1e-5)
    assert len(result.trials) == trials
  assert hi.candidate.changes == (("w", 1, "dropped"),)
  close([trial.score for trial in learned.trials], [-2.0, -1.51018596, -1.10648942], atol=1e-5)
