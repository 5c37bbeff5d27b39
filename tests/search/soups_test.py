"""Searched soups: worked examples, and what every search keeps."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from example import close
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from reference import searches

from jaxmerge import methods
from jaxmerge.drivers import memory
from jaxmerge.search import evolution, soups

MODELS = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)


def nearness(target):
  return lambda params: -float(np.sum((np.asarray(params["w"]) - target) ** 2))


def test_a_score_that_likes_one_model_leaves_it_as_it_is():
  soup = soups.greedy_soup({"w": jnp.asarray(MODELS)}, nearness(MODELS[3]))
  np.testing.assert_array_equal(soup.params["w"], MODELS[3])
  assert soup.candidate.tolist() == [0, 0, 0, 1, 0]


def test_a_greedy_soup_is_the_mean_of_its_ingredients_and_never_worse():
  target = MODELS[:3].mean(axis=0)
  soup = soups.greedy_soup({"w": jnp.asarray(MODELS)}, nearness(target))
  chosen = soup.candidate > 0
  close(soup.params["w"], MODELS[chosen].mean(axis=0))
  close(soup.candidate[chosen], np.full(chosen.sum(), 1 / chosen.sum()))
  singles, accepted = soup.trials[:5], [max(found for _, found in soup.trials[:5])]
  for _, found in soup.trials[5:]:
    if found > accepted[-1]:
      accepted.append(found)
  assert len(singles) == 5
  assert accepted[-1] == soup.score
  assert len(accepted) == chosen.sum()


@pytest.mark.parametrize(("ties", "expected"), [(False, [0, 0, 1]), (True, [1 / 3] * 3)])
def test_ties_are_accepted_where_that_is_asked_for(ties, expected):
  models = {"w": jnp.asarray(MODELS[:3])}
  soup = soups.greedy_soup(models, lambda params: 1.0, accept_ties=ties)
  close(soup.candidate, expected)


SOUPS = {
  "greedy_soup": lambda models, score: soups.greedy_soup(models, score),
  "soce": lambda models, score: soups.soce(models, np.eye(2), score),
  "lcsc": lambda models, score: evolution.lcsc(models, score),
  "learned_soup": lambda models, score: soups.learned_soup(models, score, [0.0]),
}


@pytest.mark.parametrize("name", SOUPS)
def test_a_list_of_models_and_swapped_arguments_are_named(name):
  models = [{"w": np.ones(2)}, {"w": np.zeros(2)}]
  with pytest.raises(ValueError, match=r"stack them: jaxmerge.stack\(models\); if") as error:
    SOUPS[name](models, len)
  assert "merge(method" not in str(error.value)
  with pytest.raises(
    ValueError, match=f"{name}: the .* must be a function .*, got a dict; the mod"
  ):
    SOUPS[name](len, {"w": np.ones((2, 2))})


def family(seed, count):
  """Random models as a stack and as a list, a random goal, and how near to it a model is."""
  rng = np.random.default_rng(seed)
  shapes = {"v": (3,), "w": (2, 2)}
  stack = {n: jnp.asarray(rng.normal(size=(count, *s)), jnp.float32) for n, s in shapes.items()}
  each = [{n: np.asarray(x[k], np.float64) for n, x in stack.items()} for k in range(count)]
  goal = {n: rng.normal(size=s) for n, s in shapes.items()}

  def near(model):
    return -float(sum(np.sum((np.asarray(model[n], np.float64) - goal[n]) ** 2) for n in goal))

  return stack, each, goal, near


SEEDS = st.integers(0, 2**32 - 1)


def like(found, expected):
  assert found.keys() == expected.keys()
  for n, x in expected.items():
    close(found[n], x, atol=1e-5)


@settings(max_examples=8)
@given(SEEDS, st.booleans(), st.booleans())
def test_greedy_soups_agree_with_a_transcription(seed, coarse, ties):
  """Coarse scores are often equal."""
  stack, each, _, near = family(seed, 4)
  score = (lambda model: round(near(model) / 3)) if coarse else near
  found = soups.greedy_soup(stack, score, accept_ties=ties)
  expected, chosen = searches.greedy_soup(each, score, ties)
  assert np.flatnonzero(found.candidate).tolist() == sorted(chosen)
  like(found.params, expected)


@settings(max_examples=8)
@given(SEEDS, arrays.arrays(np.int8, (4, 3), elements=st.integers(0, 9)))
def test_soce_agrees_with_a_transcription(seed, scores):
  """No correlation of small integers is as near to the bound as rounding."""
  stack, each, _, near = family(seed, 4)
  expected = searches.soce(each, scores, near, 0.4567, 0.2)
  if expected is None:
    with pytest.raises(ValueError, match="have a correlation below"):
      soups.soce(stack, scores, near, correlation=0.4567, step=0.2)
  else:
    like(soups.soce(stack, scores, near, correlation=0.4567, step=0.2).params, expected)


@settings(max_examples=5)
@given(SEEDS)
def test_lcsc_agrees_with_a_transcription(seed):
  """It begins with moving averages, and tries what lies in the checkpoints' plane."""
  stack, each, _, near = family(seed, 4)
  decays = (0.3, 0.6, 0.9)
  found = evolution.lcsc(stack, near, generations=5, decays=decays, seed=seed)
  averages = [searches.moving_average(each, d) for d in decays]
  tried = averages + [searches.combined(each, own) for own, _ in found.trials[3:]]
  close([value for _, value in found.trials], [near(model) for model in tried], atol=1e-4)
  like(found.params, max(tried, key=near))


SCORES = np.array([[0.9, 0.2, 0.5], [0.3, 0.8, 0.55], [0.6, 0.5, 0.2]])


def test_categories_and_experts_of_soce():
  """Correlations of -1, -0.13 and 0.13: each category is unlike another one."""
  assert soups._experts(SCORES, 0.5) == [0, 1]
  with pytest.raises(ValueError, match=r"no two of the 3 categories .* below 0.13206"):
    soups._experts(SCORES, 0.13206)
  assert soups._experts(SCORES, 0.13207) == [0, 1]
  # Constant scores are like none.
  assert soups._experts(np.array([[0.5, 0.1], [0.5, 0.9]]), 0.5) == [0, 1]


@pytest.mark.parametrize(("count", "size"), [(1, 1), (2, 9), (3, 36), (4, 84)])
def test_the_grid_has_all_weights_that_add_up(count, size):
  equal, *found = soups._grid(count, 0.1)
  close(equal, np.full(count, 1 / count))
  assert len(found) == size
  close(np.sum(found, axis=1), np.ones(size))
  assert all((own > 0.05).all() for own in found)
  assert len({tuple(np.round(own, 6)) for own in found}) == size


def test_soce_finds_the_best_of_the_grid():
  target = 0.7 * MODELS[0] + 0.3 * MODELS[1]
  soup = soups.soce({"w": jnp.asarray(MODELS[:3])}, SCORES, nearness(target))
  close(soup.candidate, [0.7, 0.3, 0])
  close(soup.params["w"], target)


def test_a_score_without_bends_is_best_at_a_corner_of_the_grid():
  score = lambda params: float(np.sum(np.asarray(params["w"])))  # noqa: E731
  soup = soups.soce({"w": jnp.asarray(MODELS[:3])}, SCORES, score)
  first, second = MODELS[:2].sum(axis=1)
  close(soup.candidate, [0.9, 0.1, 0] if first > second else [0.1, 0.9, 0])


def test_lcsc_comes_near_what_the_checkpoints_span():
  """Coefficients may be negative; they always add up to one."""
  target = 1.5 * MODELS[4] - 0.5 * MODELS[0]
  models = {"w": jnp.asarray(MODELS)}
  start = evolution.lcsc(models, nearness(target), generations=0)
  soup = evolution.lcsc(models, nearness(target), generations=300)
  assert soup.score == max(found for _, found in soup.trials)
  assert soup.score > start.score / 20
  close([own.sum() for own, _ in soup.trials], np.ones(305))
  assert soup.candidate.min() < 0
  assert evolution.lcsc(models, nearness(target), generations=300).score == soup.score
  best = list(itertools.accumulate((found for _, found in start.trials), max))
  assert start.score == best[-1]
  decay = methods.checkpoint_average("ema", 0.5)
  close(memory.merge(decay, models)["w"], MODELS.T @ start.trials[0][0])


def test_bad_scores_are_refused():
  models = {"w": jnp.asarray(MODELS)}
  with pytest.raises(ValueError, match=r"greedy_soup: none of 9 candidates has a score that is"):
    soups.greedy_soup(models, lambda params: float("nan"))
  for scores in (SCORES, np.full((5, 2), np.nan), np.zeros(5)):
    with pytest.raises(ValueError, match=r"scores must be finite, \[models, categories\] of 5"):
      soups.soce(models, scores, lambda params: 0.0)


def learned(models, target, steps=300, **options):
  def far(params, temperature, batch):
    return sum(jnp.sum((params[n] - target[n]) ** 2) for n in target) + (temperature - 2.0) ** 2

  return soups.learned_soup(models, far, [0.0] * steps, **options)


def test_a_learned_soup_begins_as_the_mean():
  soup = learned({"w": jnp.asarray(MODELS)}, {"w": MODELS[0]}, 1, learning_rate=0.0)
  close(soup.params["w"], MODELS.mean(axis=0))
  close(soup.candidate.weights["w"], np.full(5, 0.2))
  assert soup.candidate.temperature == 1.0


def test_a_learned_soup_has_weights_for_each_leaf():
  """One leaf is best in one model, one in another: what is one for all leaves cannot have both."""
  models = {"v": jnp.asarray(MODELS), "w": jnp.asarray(MODELS[::-1].copy())}
  best = {"v": 1, "w": 3}
  target = {n: x[best[n]] for n, x in models.items()}
  soup, shared = (learned(models, target, by_leaf=by_leaf) for by_leaf in (True, False))
  losses, of_shared = ([-trial.score for trial in result.trials] for result in (soup, shared))
  assert losses[-1] < 0.1 * of_shared[-1]
  assert losses[-1] < 0.01 * losses[0]
  for n in target:
    assert soup.candidate.weights[n].argmax() == best[n]
    assert soup.candidate.weights[n].sum() == pytest.approx(1.0, abs=1e-5)
    close(soup.params[n], soup.candidate.weights[n] @ np.asarray(models[n]), atol=1e-5)
  close(shared.candidate.weights["v"], shared.candidate.weights["w"])
  assert soup.candidate.temperature == pytest.approx(2.0, abs=0.05)


@pytest.mark.slow
@settings(max_examples=2)
@given(SEEDS)
def test_learned_soups_agree_with_a_transcription(seed):
  stack, each, goal, _ = family(seed, 4)
  found = learned(stack, goal, steps=5)
  slopes = lambda model, t: ({n: 2 * (x - goal[n]) for n, x in model.items()}, 2 * (t - 2.0))  # noqa: E731
  expected, temperature = searches.learned_soup(each, slopes, 5, 0.05)
  like(found.params, expected)
  close(found.candidate.temperature, temperature, atol=1e-5)


def test_a_learned_soup_needs_batches_and_a_loss_that_is_a_number():
  models = {"w": jnp.asarray(MODELS)}
  with pytest.raises(ValueError, match="there are no batches"):
    soups.learned_soup(models, lambda params, temperature, batch: 0.0, [])
  with pytest.raises(ValueError, match="the loss of batch 1 is nan"):
    soups.learned_soup(models, lambda p, t, b: jnp.sum(p["w"]) * b, [jnp.float32(np.nan)])
