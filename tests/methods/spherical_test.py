"""Means on spheres: worked examples, closed forms, and what happens to zeros and opposites."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from example import blended, close
from hypothesis import given
from hypothesis import strategies as st
from reference import spheres

import jaxmerge
from jaxmerge import methods

A, B = [2.0, 0.0], [0.0, 1.0]
THREE = [[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 1.0]]
PAIR = [[[2.0, 0.0], [1.0, 1.0]], [[0.0, 1.0], [1.0, 1.0]]]


@pytest.mark.parametrize(
  ("method", "models", "expected"),
  [
    (methods.slerp(0.5), [A, B], [1.414214, 0.707107]),
    (methods.slerp(0.25), [A, B], [1.847759, 0.382683]),
    (methods.slerp(0.0), [A, B], A),
    (methods.slerp(1.0), [A, B], B),
    (methods.slerp(0.25), [[1.0, 0.01], [1.0, 0.0]], [1.0, 0.0075]),
    (methods.slerp(0.25), [[1.0, 0.0], [-2.0, 0.0]], [0.25, 0.0]),
    (methods.nuslerp((0.75, 0.25)), [A, B], [1.847759, 0.382683]),
    (methods.nuslerp((1.0, -1.0)), [A, B], [1.414214, 0.707107]),
    (methods.nuslerp(), PAIR, [[1.165867, 0.582933], [1.165867, 1.165867]]),
    (methods.nuslerp(scope="row"), PAIR, [[1.414214, 0.707107], [1, 1]]),
    (methods.nuslerp(scope="column"), PAIR, [[1.175571, 0.541196], [1.175571, 1.082392]]),
    (methods.multislerp(), [A, B], [1.06066, 1.06066]),
    (methods.multislerp((0.75, 0.25)), [[1.0, 0.0], [0.0, 1.0]], [0.948683, 0.316228]),
    (methods.multislerp(), THREE, [0.839254, 0.279751, 0.466252]),
    (methods.multislerp((2.0, 2.0), normalize=False), [A, B], np.array([1.06066, 1.06066]) * 4),
    (methods.karcher(), [A, B], [1.06066, 1.06066]),
    (methods.karcher(), np.eye(3), np.full(3, 3**-0.5)),
    (methods.karcher(), THREE, [0.815391, 0.271797, 0.511139]),
  ],
)
def test_worked_example(method, models, expected):
  close(blended(method, models, layout=(("w", "oi"),) if np.ndim(models) == 3 else ()), expected)


vectors = st.lists(st.floats(-1, 1, width=16), min_size=8, max_size=8).filter(
  lambda x: np.linalg.norm(x) > 0.1
)
SLERP = methods.slerp()


@given(vectors, vectors, st.floats(0, 1, width=16))
def test_unit_vectors_stay_unit_vectors(a, b, t):
  a, b = (np.array(v) / np.linalg.norm(v) for v in (a, b))
  if abs(a @ b) < 0.999:
    close(np.linalg.norm(blended(SLERP, [a, b], hparams={"t": t})), 1, atol=1e-5)


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_halfway_the_means_of_two_agree(factor):
  """In the middle of the arc; slerp turns to the longer one, but where both norms are equal."""
  a, b = np.random.default_rng(0).normal(size=(2, 8))
  pair = [a / np.linalg.norm(a), factor * b / np.linalg.norm(b)]
  one, mean = (blended(ALIKE[name][0], pair) for name in ("multislerp", "karcher"))
  close(one, mean)
  far = np.abs(blended(SLERP, pair, hparams={"t": 0.5}) - mean).max()
  assert far < 1e-6 if factor == 1 else far > 0.1


ALIKE = {
  "slerp": (methods.slerp(0.3), 2),
  "nuslerp": (methods.nuslerp(), 2),
  "multislerp": (methods.multislerp(), 3),
  "karcher": (methods.karcher(), 3),
}


@pytest.mark.parametrize("name", ALIKE)
def test_equal_models_come_back(name):
  method, height = ALIKE[name]
  x = np.random.default_rng(0).normal(size=50)
  close(blended(method, [x] * height), x, atol=1e-5)


@pytest.mark.parametrize("name", ["multislerp", "karcher"])
def test_single_model_comes_back(name):
  x = np.random.default_rng(0).normal(size=(1, 50))
  close(blended(ALIKE[name][0], x), x[0])


@pytest.mark.slow
def test_models_near_each_other():
  """Cosines of 0.9999 lose four digits in float32, the mean does not."""
  rng = np.random.default_rng(0)
  base = rng.normal(size=5000)
  models = (base + rng.normal(size=(3, 5000)) / 100).astype(np.float32)
  wide = [{"w": x.astype(np.float64)} for x in models]
  close(blended(methods.karcher(), models), spheres.karcher(wide, (1, 1, 1))["w"], 5e-6)
  close(blended(methods.multislerp(), models), spheres.multislerp(wide, (1, 1, 1))["w"], 5e-6)
  close(blended(methods.nuslerp(), models[:2]), spheres.nuslerp(wide[:2], (1, 1))["w"], 5e-6)


def test_double_precision():
  with jax.enable_x64():
    x = jnp.asarray(THREE, jnp.float64)
    out = jaxmerge.merge(methods.karcher(max_iter=100, tol=0.0), {"w": x})["w"]
    expected = spheres.karcher([{"w": np.array(row)} for row in THREE], (1, 1, 1))["w"]
    np.testing.assert_allclose(out, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
  ("method", "models", "expected"),
  [
    (methods.slerp(0.5), [A, [0.0, 0.0]], [1.414214, 0.0]),
    (methods.nuslerp(), [[2.0, 0.0], [-1.0, 0.0]], [0.5, 0.0]),
    (methods.multislerp(), [[2.0, 0.0], [-1.0, 0.0]], [0.5, 0.0]),
    (methods.multislerp(), [A, B, [0.0, 0.0]], [0.707107, 0.707107]),
    # A model of zeros has no direction, but its norm counts.
    (methods.karcher(), [A, B, [0.0, 0.0]], [0.707107, 0.707107]),
    # Opposites have no mean direction: that of the first model is taken.
    (methods.karcher(), [[2.0, 0.0], [-1.0, 0.0]], [1.5, 0.0]),
  ],
)
def test_zeros_and_opposites(method, models, expected):
  close(blended(method, models), expected)


@pytest.mark.slow
def test_a_frozen_leaf_stays_the_base():
  base = {"w": jnp.ones(4), "frozen": jnp.array([1.0, 2.0])}
  tau = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
  models = {"w": base["w"][None] + tau, "frozen": jnp.stack([base["frozen"]] * 3)}
  for method in (methods.multislerp(), methods.model_stock()):
    assert jaxmerge.merge(method, models, base)["frozen"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
  "method",
  [
    methods.slerp(),
    methods.nuslerp(),
    pytest.param(methods.nuslerp(scope="row"), marks=pytest.mark.slow),
    pytest.param(methods.multislerp(), marks=pytest.mark.slow),
    pytest.param(methods.karcher(), marks=pytest.mark.slow),
    methods.model_stock(),
    pytest.param(methods.model_stock("row"), marks=pytest.mark.slow),
  ],
)
def test_gradients_are_finite_at_zeros_equals_and_opposites(method):
  layout = (("w", "oi"),)

  def total(x):
    return jaxmerge.merge(method, {"w": x}, layout=layout, deltas=True)["w"].sum()

  slope = jax.jit(jax.grad(total))
  a = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
  for pair in (
    [a, a],
    [a, -a],
    [a, a * 0],
    [a * 0, a * 0],
    [a, 2 * a],
    [np.ones((3, 4)), -np.ones((3, 4))],
  ):
    assert np.isfinite(slope(jnp.asarray(pair, jnp.float32))).all()


def test_gradient_in_t_is_the_velocity_on_the_arc():
  """d/dt (cos(t pi / 2), sin(t pi / 2)) = pi / 2 (-sin, cos)."""
  models = {"w": jnp.eye(2)}
  found = jax.jacobian(lambda t: jaxmerge.merge(methods.slerp(), models, hparams={"t": t})["w"])(
    0.25
  )
  close(found, np.pi / 2 * np.array([-np.sin(np.pi / 8), np.cos(np.pi / 8)]))


def test_t_may_differ_by_leaf():
  models = {"a": jnp.asarray([A, B]), "b": jnp.asarray([A, B])}
  out = jaxmerge.merge(methods.slerp(), models, hparams={"t": {"a": 0.0, "b": 1.0}})
  assert (out["a"].tolist(), out["b"].tolist()) == (A, B)


def test_the_ends_of_an_arc_keep_their_places_under_any_name():
  for names in (("a", "b"), ("b", "a"), ("x", "y"), ("y", "x")):
    close(blended(methods.slerp(0.0), [A, B], names=names), A)
    close(blended(methods.nearswap(0.0), [A, B], names=names), A)


@pytest.mark.parametrize("method", [methods.slerp(), methods.nuslerp(), methods.nearswap()])
def test_other_numbers_of_models_are_refused(method):
  for models in ([A], [A, B, A]):
    with pytest.raises(ValueError, match=f"merges 2 models, got {len(models)}"):
      blended(method, models)


def test_t_is_one_number():
  with pytest.raises(ValueError, match="t must be one number for all models, got 2 values"):
    blended(methods.slerp(), [A, B], hparams={"t": (0.0, 1.0)})


@pytest.mark.parametrize("method", [methods.multislerp((1.0, -1.0)), methods.karcher((1.0, -1.0))])
def test_weights_that_cancel_out_are_refused(method):
  with pytest.raises(ValueError, match=r"weights must not add up to zero, got \[1.0, -1.0\] for"):
    blended(method, [A, B])
