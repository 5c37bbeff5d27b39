"""Aggregation against outliers: worked examples, identities, and what one bad model can do."""

import numpy as np
import pytest
from example import TAU, blended, close, merged
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from marking import some_fast
from reference import robust

from jaxmerge import methods

pytestmark = pytest.mark.kernels
# Four models that agree, and one that does not.
G = np.array([[1.0, 2.0], [1.3, 1.8], [0.9, 2.3], [1.15, 1.95], [10.0, -10.0]], np.float32)


@pytest.mark.parametrize(
  ("method", "expected"),
  [
    (methods.median(), [1.15, 1.95]),
    (methods.trimmed_mean(1), [1.15, 1.916667]),
    (methods.trimmed_mean(2), [1.15, 1.95]),
    (methods.meamed(1), [1.0875, 2.0125]),
    (methods.meamed(2), [1.15, 1.916667]),
    (methods.phocas(1), [1.0875, 2.0125]),
    (methods.krum(1), [1.15, 1.95]),
    (methods.krum(1, 2), [1.075, 1.975]),
    (methods.krum(1, 4), [1.0875, 2.0125]),
  ],
)
def test_worked_example(method, expected):
  close(blended(method, G), expected)


def test_worked_example_of_scores():
  """Squared distances, summed over the two nearest: of the fifth they are far above the others."""
  close(robust.krum_scores(G.astype(np.float64), 1), [0.125, 0.175, 0.285, 0.07, 436.055], 1e-4)


H = np.array([[1.0, 2.0], [1.2, 1.8], [0.9, 2.1], [1.1, 1.9], [10.0, -10.0]], np.float32)


def far(x):
  """What is left of the models' directions beside one, which the descent makes small."""
  h = H / np.linalg.norm(H, axis=1, keepdims=True)
  return np.sum(np.sqrt(np.maximum(1 - (h @ x / np.linalg.norm(x)) ** 2, 0)))


def test_worked_example_of_directions():
  """The transcription goes the authors' way, from (1, 0); from equal weights it comes further."""
  models = [{"w": x.astype(np.float64)} for x in H]
  first = np.array([[1.0], [0.0]])
  steps = [robust.flag(models, 1, n, 0.0, first)["w"] for n in range(1, 6)]
  expected = [1.362057, 1.241882, 1.209737, 1.193122, 1.192956]
  np.testing.assert_allclose([far(first[:, 0]), *map(far, steps)], [4.218156, *expected], atol=2e-5)
  factor = 5 / np.median(np.linalg.norm(H, axis=1))
  close(steps[-1] * factor, [1.647099, 3.283883], atol=2e-5)
  assert far(blended(methods.flag(), H)) <= expected[-1]


@pytest.mark.slow
def test_as_many_directions_as_models_leave_the_mean():
  x = np.random.default_rng(0).normal(size=(4, 30)).astype(np.float32)
  norms = np.linalg.norm(x, axis=1, keepdims=True)
  expected = np.mean(x / norms, axis=0) * np.sort(norms.ravel())[1]
  close(blended(methods.flag(4), x), expected, atol=1e-5)


def test_directions_do_not_depend_on_the_norms_of_the_models():
  factors = np.array([[1.0], [3.0], [0.5], [1.0], [7.0]], np.float32)
  one, other = (blended(methods.flag(2, pairs=0.5), x) for x in (H, H * factors))
  close(one / np.linalg.norm(one), other / np.linalg.norm(other), atol=1e-5)


def test_an_outlier_hardly_turns_the_direction():
  good, all_ = blended(methods.flag(), H[:4]), blended(methods.flag(), H)
  mean = blended(methods.average(), H)
  cosine = [x @ good / np.linalg.norm(x) / np.linalg.norm(good) for x in (all_, mean)]
  assert cosine[0] > 0.999
  assert cosine[1] < 0.5


def test_the_lower_of_two_middles_is_the_median():
  close(blended(methods.median(), [[4.0], [1.0], [3.0], [2.0]]), [2.0])


def test_identities():
  close(merged(methods.trimmed_mean(0)), merged(methods.average()))
  close(merged(methods.median()), merged(methods.trimmed_mean(1)))
  close(merged(methods.krum(0, 3)), merged(methods.average()))


@pytest.mark.parametrize("height", some_fast([31, 32, 33, 40], [33]))
def test_many_models_are_sorted_as_well(height):
  x = np.random.default_rng(0).normal(size=(height, 50)).astype(np.float32)
  close(blended(methods.median(), x), np.sort(x, axis=0)[(height - 1) // 2], atol=0)
  close(blended(methods.trimmed_mean(4), x), np.sort(x, axis=0)[4:-4].mean(axis=0))


finite = st.floats(-1e6, 1e6, width=32)
INNER = (methods.median(), methods.trimmed_mean(1))


@given(arrays.arrays(np.float32, (5, 3), elements=finite), st.integers(0, 4), finite)
def test_one_model_cannot_leave_the_range_of_the_others(x, which, value):
  others = np.delete(x, which, axis=0)
  x[which] = value
  slack = 1e-6 * np.abs(others).max()
  for method in INNER:
    out = blended(method, x)
    assert (others.min(axis=0) - slack <= out).all()
    assert (out <= others.max(axis=0) + slack).all()


@pytest.mark.parametrize("far", [1e2, 1e6, 1e12])
def test_krum_leaves_out_what_is_far(far):
  x = np.array(G)
  x[4] = far
  close(blended(methods.krum(1, 4), x), x[:4].mean(axis=0))


def test_near_models_are_told_apart():
  """By their differences: squares of weights near 100 have no digits left for those of 1e-3."""
  x = 100 + 1e-3 * np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [8.0, 8.0]])
  close(blended(methods.krum(1), x), x[3].astype(np.float32), atol=0)


@pytest.mark.parametrize(
  ("method", "message"),
  [
    (methods.trimmed_mean(2), "trimmed_mean merges 5 or more models, got 3"),
    (methods.krum(1), "krum merges 5 or more models, got 3"),
    (methods.krum(0, 4), "krum: of 3 models, 0 of them outliers, at most 3 can be selected, got"),
  ],
)
def test_too_few_models_are_refused(method, message):
  with pytest.raises(ValueError, match=message):
    merged(method, TAU)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "pairs"), [(1, 0.0), (2, 0.5)])
def test_float32_descends_as_far_as_double_precision(rank, pairs):
  """Five models with a common direction: ended early, the result is 2 % off."""
  worst = 0.0
  for seed in range(4):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(5, 400)) + 2 * rng.normal(size=400)
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    out = blended(FLAGS[rank], x)
    expected = robust.flag([{"w": row.astype(np.float64)} for row in x], rank, 20, pairs)["w"]
    worst = max(worst, float(np.abs(out - expected).max() / np.abs(expected).max()))
  assert worst < 3e-4


FLAGS = {1: methods.flag(1, 20, 0.0), 2: methods.flag(2, 20, 0.5)}
