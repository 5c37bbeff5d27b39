"""Hi-Merging: what a search may do, and that it never loses."""

import jax.numpy as jnp
import numpy as np
import pytest
from example import close
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference import basics, searches

import jaxmerge
from jaxmerge import methods
from jaxmerge.core import stage
from jaxmerge.search.layerwise import hi_merging

LAYERS = ("layer_0/w", "layer_1/w", "head/w")
FEW = (0.5, 1.0)


def family(height=2, seed=0):
  rng = np.random.default_rng(seed)
  base = {n: jnp.asarray(rng.normal(size=6), jnp.float32) for n in LAYERS}
  taus = {n: jnp.asarray(rng.normal(size=(height, 6)), jnp.float32) for n in base}
  return base, {n: x[None] + taus[n] for n, x in base.items()}


def far(params, target):
  return -float(sum(jnp.sum((params[n] - target[n]) ** 2) for n in params))


def test_a_score_that_says_nothing_leaves_the_merge():
  base, models = family()
  found = hi_merging(base, models, lambda params, k: 1.0, grid=FEW)
  method = stage.chain(methods.elected(reduce="sum"))
  expected = jaxmerge.merge(method, models, base)
  for n in base:
    close(found.params[n], expected[n])
  assert found.candidate.changes == ()


def test_one_model_that_is_best_as_it_is_comes_back():
  base, models = family(1)
  own = {n: x[0] for n, x in models.items()}
  found = hi_merging(base, models, lambda params, k: far(params, own))
  for n in base:
    close(found.params[n], models[n][0])
  for table in (found.candidate.density, found.candidate.scale):
    assert all(v.tolist() == [1.0] for v in table.values())


def test_models_may_be_a_list():
  base, models = family(2)
  each = [{n: x[k] for n, x in models.items()} for k in range(2)]
  score = lambda params, k: float(params["head/w"][k])  # noqa: E731
  result, expected = (hi_merging(base, m, score, grid=(1.0,)) for m in (each, models))
  assert result.score == expected.score
  with pytest.raises(ValueError, match=r"swapped: it is hi_merging\(base, models, score\)"):
    hi_merging(models, base, score)


def test_a_layer_that_is_in_the_way_gives_way():
  """The heads add up to more than either model wants; the rest is the same for both."""
  base = {n: jnp.zeros(4) for n in LAYERS}
  models = {n: jnp.ones((2, 4)) * 0.5 for n in LAYERS}
  models["head/w"] = jnp.array([[1.0] * 4, [3.0] * 4])

  def score(params, k):
    return -float(jnp.sum((params["head/w"] - (1.0 + k)) ** 2))

  before = jaxmerge.merge(methods.elected(reduce="sum"), models, base)
  found = hi_merging(base, models, score, grid=(1.0,))
  assert found.score > np.mean([score(before, k) for k in range(2)])
  assert [change[0] for change in found.candidate.changes] == ["head"]
  assert found.candidate.changes[0][2] in ("trimmed", "scaled", "dropped")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("most", [None, 1])
def test_a_search_never_loses(seed, most):
  base, models = family(3, seed)
  targets = [{n: x[k] for n, x in models.items()} for k in range(3)]

  def score(params, k):
    return far(params, targets[k])

  found = hi_merging(base, models, score, grid=(1.0,), most=most)
  plain = jaxmerge.merge(methods.elected(reduce="sum"), models, base)
  assert found.score >= np.mean([score(plain, k) for k in range(3)])
  assert found.score == pytest.approx(np.mean([score(found.params, k) for k in range(3)]))
  assert most is None or len(found.candidate.changes) <= most


def test_one_model_alone_comes_nearer_to_what_is_sought():
  base, models = family(1)
  target = {n: x[0] * 0.9 for n, x in models.items()}
  own = far({n: x[0] for n, x in models.items()}, target)
  assert hi_merging(base, models, lambda params, k: far(params, target)).score >= own


def test_a_layer_gives_way_in_a_model_that_it_helps():
  """The second model's head harms more, but the base does not score better with it alone."""
  base = {n: jnp.zeros(4) for n in LAYERS}
  models = {n: jnp.ones((2, 4)) * 0.5 for n in LAYERS}
  models["head/w"] = jnp.array([[1.0] * 4, [3.0] * 4])

  def score(params, k):
    return -float(jnp.sum(jnp.abs(params["head/w"] - 1.0))) * (1 + k)

  found = hi_merging(base, models, score, grid=(1.0,))
  assert [change[1] for change in found.candidate.changes] == [0]
  assert (found.candidate.scale["head"] <= 1).all()


@settings(max_examples=1)
@given(st.integers(0, 2**32 - 1))
@example(3)
def test_a_search_agrees_with_a_transcription(seed):
  """Each task likes models near its own one; in the example layers are trimmed and scaled."""
  base, models = family(2, seed)
  rng = np.random.default_rng(seed)
  mixed = lambda x, y: 0.3 * x + 0.7 * y + 0.5 * rng.normal(size=6)  # noqa: E731
  goals = [{n: mixed(base[n], x[k]) for n, x in models.items()} for k in range(2)]

  def score(params, k):
    return -sum(np.sum((np.asarray(params[n], np.float64) - x) ** 2) for n, x in goals[k].items())

  found = hi_merging(base, models, score, grid=FEW)
  wide = {n: np.asarray(x, np.float64) for n, x in base.items()}
  params, best = searches.hi_merging(wide, basics.deltas(base, models), score, FEW)
  for n in base:
    close(found.params[n], params[n], atol=1e-5)
  close(found.score, best, atol=1e-4)


def test_a_score_that_is_no_number_is_refused():
  base, models = family()
  with pytest.raises(ValueError, match="hi_merging, model 0: none of 4 candidates has a score"):
    hi_merging(base, models, lambda params, k: float("nan"), grid=FEW)
