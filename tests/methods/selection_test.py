"""Selecting entries: MagMax, SCE, Arcee fusion, NearSwap, passthrough."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from example import TAU, close, merged
from hypothesis import given
from hypothesis import strategies as st
from reference import entries

import jaxmerge
from jaxmerge import methods
from jaxmerge.methods import selection
from jaxmerge.mixtures import masks


@pytest.mark.parametrize(
  ("method", "expected"),
  [
    (methods.magmax(1.0), [0.9, -0.5, -0.8, 0.7, -0.6, -0.4]),
    (methods.consensus(1.0), [1.1, -0.3, -0.3, 0, -0.6, -0.2]),
    (methods.consensus(1.0, 0.4, 3), [0, -0.3, 0, 0, 0, 0]),
    (methods.consensus(0.5, 1.0, 1), TAU.sum(axis=0) / 2),
    (methods.sce(), [0.714786, -0.255752, -0.8, 0.355072, -0.444248, -0.4]),
    (methods.sce(0.34), [0.708602, 0, -0.8, 0, 0, 0]),
    (methods.sce(0.1), np.zeros(6)),
    # Counted equally: the mean of those that have the sign of the sum.
    (methods.sce(floor=1e6), [0.7, -0.3, -0.8, 0.4, -0.4, -0.4]),
    # Only two models change the fourth and the last.
    (methods.ram(), [1.1 / 3, -0.1, -0.1, 0.4, -0.2, -0.1]),
    (methods.ram(0.45), [0.7, -0.5, -0.8, 0.7, -0.6, 0.0]),
    # Of the first model's entries above 0.45 one is shared and one is its own: times 1 + 0.2 * 1.
    (methods.ramplus_tl(0.45, 0.2, 2.0), [0.7, -0.5, -0.96, 0.7, -0.72, 0.0]),
    (methods.ramplus_tl(0.45, 0.2, 0.5), [0.7, -0.5, -0.88, 0.7, -0.66, 0.0]),
  ],
)
def test_worked_example(method, expected):
  close(merged(method, TAU), expected)


def test_magmax_takes_the_last_of_those_that_tie():
  close(merged(methods.magmax(1.0), [[0.3, -0.5], [-0.3, 0.5], [0.1, -0.5]]), [-0.3, -0.5])


def test_magmax_takes_the_largest_alone_against_a_majority():
  """Two that are smaller but more together elect their sign: it is theirs for TIES and EMR."""
  column = [[0.9], [-0.5], [-0.6]]
  close(merged(methods.magmax(1.0), column), [0.9])
  close(merged(methods.ties(1.0), column), [-0.55])
  close(masks.emr({"w": jnp.zeros(1)}, {"w": jnp.array(column)}).shared["w"], [-0.6])


@pytest.mark.parametrize("k", range(3))
def test_magmax_of_the_result_and_a_model_is_the_result(k):
  once = merged(methods.magmax(1.0))
  close(merged(methods.magmax(1.0), [once, TAU[k]]), once, atol=0)


def test_sce_of_small_task_vectors():
  """With mergekit's floor of 1e-6 models of entries near 1e-4 count equally, here they do not."""
  close(merged(methods.sce(), TAU * 1e-4) * 1e4, merged(methods.sce(), TAU))
  close(merged(methods.sce(floor=1e-6), TAU * 1e-4) * 1e4, [0.7, -0.3, -0.8, 0.4, -0.4, -0.4])


def test_where_all_models_agree_nothing_is_selected():
  """Variance zero is never among the largest, unless all entries are kept."""
  same = np.array([[0.1, 0.2, 0.3]] * 3, np.float32)
  close(merged(methods.sce(0.99), same), np.zeros(3))
  close(merged(methods.sce(1.0), same), same[0])


# Few values: most variances tie with others.
values = st.sampled_from([0.0, 0.5, -0.5, 1.0, -1.0])
HALF = methods.sce(0.5)


@given(st.lists(st.lists(values, min_size=8, max_size=8), min_size=2, max_size=2))
def test_sce_breaks_ties_by_position(x):
  x = np.asarray(x, np.float32)
  expected = entries.sce([{"w": row.astype(np.float64)} for row in x], 0.5)["w"]
  close(merged(HALF, x), expected)


def test_sce_of_equal_energies_and_agreeing_signs_is_the_average():
  x = np.abs(np.random.default_rng(0).normal(size=(2, 8))) * np.tile([1, -1], 4)
  x /= np.linalg.norm(x, axis=1, keepdims=True)
  close(merged(HALF, x, hparams={"density": 1.0}), x.mean(axis=0))


def test_a_density_of_sce_is_one_number():
  with pytest.raises(ValueError, match="density must be one number for all models, got 3"):
    merged(methods.sce(), TAU, hparams={"density": (0.1, 0.2, 0.3)})


# --- Arcee fusion ---

W = jnp.array([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
W0 = jnp.array([[0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 2.0, 2.5]])
ROWS = (("w", "oi"),)


def fused(base, model, **options):
  return jaxmerge.merge(methods.arcee_fusion(), {"w": model[None]}, {"w": base}, **options)["w"]


def test_importance_is_distance_times_divergence_of_the_row():
  """The worked example: two values of 0.117993 and 0.014892, the quartiles are zero."""
  join = methods.arcee_fusion()
  leaf = jaxmerge.core.stage.Leaf(W0, {}, *(None,) * 4)
  importance = join[1].update((W - W0)[None], leaf, {})[0]
  expected = np.zeros((2, 4))
  expected[0, 0], expected[1, 3] = 0.117993, 0.014892
  close(importance, expected)
  np.testing.assert_array_equal(fused(W0, W, layout=ROWS), W)


def test_a_model_like_the_base_is_the_base():
  np.testing.assert_array_equal(fused(W0, W0, layout=ROWS), W0)


@pytest.mark.slow
def test_each_entry_is_the_bases_or_the_models():
  base = np.random.default_rng(0).normal(size=(30, 40)).astype(np.float32)
  model = base + np.random.default_rng(1).normal(size=(30, 40)).astype(np.float32)
  out = np.asarray(fused(base, model, layout=ROWS))
  taken = np.abs(out - model) < 1e-6
  assert ((out == base) | taken).all()
  assert 0.02 < taken.mean() < 0.2
  kernel = fused(base.T, model.T, layout=(("w", "io"),))
  np.testing.assert_array_equal(kernel.T, out)


def test_fusion_needs_a_base_and_one_model():
  with pytest.raises(ValueError, match="arcee_fusion compares with a base, but there is none"):
    jaxmerge.merge(methods.arcee_fusion(), {"w": W[None]}, deltas=True)
  with pytest.raises(ValueError, match="arcee_fusion merges 1 model, got 2"):
    jaxmerge.merge(methods.arcee_fusion(), {"w": jnp.stack([W, W])}, {"w": W0})


# --- NearSwap and passthrough ---


NEAR = methods.nearswap(0.5)


@given(st.lists(st.floats(-2, 2, width=32), min_size=6, max_size=6))
def test_nearswap_swaps_what_is_near(x):
  base = np.array([0.0, 0.5, -0.5, 1.0, 0.1, -0.1], np.float32)
  other = np.asarray(x, np.float32)
  out = np.asarray(jaxmerge.merge(NEAR, {"w": jnp.stack([base, other])})["w"])
  near = np.abs(other - base) <= 0.5
  np.testing.assert_array_equal(out[near], other[near])
  close(np.abs(out - base)[~near], np.full((~near).sum(), 0.5))


def test_gradient_of_nearswap():
  """By t it is the direction, where values are far apart."""
  models = {"w": jnp.array([[0.0, 0.0, 0.0], [1.0, -1.0, 0.1]])}
  slope = jax.jacobian(lambda t: jaxmerge.merge(methods.nearswap(), models, hparams={"t": t})["w"])
  assert slope(0.5).tolist() == [1.0, -1.0, 0.0]


def test_passthrough_takes_one_model():
  out = jaxmerge.merge(
    methods.passthrough(0.5), {"w": jnp.array([[2.0]])}, hparams={"scale": {"w": 3.0}}
  )
  assert out["w"].tolist() == [6.0]
  with pytest.raises(ValueError, match="passthrough merges 1 model, got 2"):
    jaxmerge.merge(methods.passthrough(), {"w": jnp.ones((2, 1))})


def test_the_divergence_of_nearly_equal_rows_keeps_its_digits():
  """A sum of p log(p / q) alone has three of seven, where rows differ by a thousandth."""
  rng = np.random.default_rng(0)
  base = rng.normal(size=(4, 300))
  for size in (1e-4, 1e-2, 1.0, 10.0):
    x = size * rng.normal(size=base.shape)
    p, q = (np.exp(w) / np.exp(w).sum(axis=1, keepdims=True) + 1e-8 for w in (base + x, base))
    # With double precision the plain sum has digits to spare.
    expected = np.sum(p * np.log(p / q) + (q - p), axis=1)
    found = selection.divergence(*(jnp.asarray(v, jnp.float32) for v in (base, x))).sum(axis=1)
    np.testing.assert_allclose(found, expected, rtol=3e-5)
