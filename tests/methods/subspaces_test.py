"""Merging in shared or free directions: worked examples, identities, what the papers claim."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from example import close
from matrices import A, B, drawn, equations, merged, values
from reference import subspaces as transcribed

import jaxmerge
from jaxmerge import methods
from jaxmerge.methods import subspaces

pytestmark = pytest.mark.kernels
D = [np.diag([4.0, 1.0]), np.diag([0.0, 1.0])]
PAIR = [np.diag([3.0, 1.0]), np.array([[1.0, 2.0], [2.0, 1.0]])]
OPCM = methods.opcm()


@pytest.mark.parametrize(
  ("method", "matrices", "expected"),
  [
    (methods.drm(drop_rate=0.5, direction="horizontal"), [A, B], [[3, 0, 1], [0, 1.5, 0]]),
    (methods.drm(drop_rate=0.5), [A, B], [[3, 0, 1], [0, 1.5, 0]]),
    (methods.lore(mu=0.5), D, [[2, 0], [0, 1]]),
    (methods.lore(2.0, mu=0.5), D, [[2, 0], [0, 1]]),
    (methods.lore(mu=5.0), D, [[2, 0], [0, 1]]),
    (OPCM, PAIR, [[2.236068, 1.490712], [1.490712, 0.745356]]),
  ],
)
def test_worked_example(method, matrices, expected):
  close(merged(method, matrices), expected, atol=3e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("alpha", "zeros"),
  [(0.5, np.eye(4, dtype=bool)), (0.8, np.eye(4, dtype=bool) | (np.indices((4, 4)) < 2).all(0))],
)
def test_what_is_added_avoids_the_directions(alpha, zeros):
  tau = np.arange(1.0, 17).reshape(4, 4)
  found = subspaces.project_out(jnp.asarray(tau), jnp.diag(jnp.array([4.0, 3, 2, 1])), alpha, 1e-6)
  close(found, np.where(zeros, 0, tau), atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (5, 5)])
def test_what_is_added_is_orthogonal_to_what_is_held(shape):
  held, tau = (np.asarray(x, np.float32) for x in drawn(2, *shape))
  found = np.asarray(subspaces.project_out(jnp.asarray(tau), jnp.asarray(held), 0.3, 1e-6))
  assert abs(np.sum(found * held)) < 1e-4 * np.linalg.norm(tau) * np.linalg.norm(held)


def test_worked_example_of_what_the_whole_is_divided_by():
  """By 1.341641 in the second step: the norm of the two beside the mean of their norms."""
  whole = PAIR[0] + transcribed.outside(PAIR[1], PAIR[0], 0.5)
  factor = np.linalg.norm(whole) / np.mean([np.linalg.norm(x) for x in PAIR])
  close(factor, 1.341641)
  close(merged(OPCM, PAIR), whole / factor, atol=3e-6)


def test_the_whole_has_the_mean_norm_of_the_task_vectors():
  each = drawn(5, 6, 4)
  norms = [np.linalg.norm(x) for x in each]
  assert np.linalg.norm(merged(methods.opcm(), each)) == pytest.approx(np.mean(norms), rel=1e-5)


def test_what_holds_nothing_leaves_all_room():
  (x,) = drawn(1, 6, 4)
  close(merged(methods.opcm(), [0 * x, x]), x / 2, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", [methods.opcm(), methods.lore(1.5, mu=0.8, sweeps=4)])
def test_a_transpose_passes_through(method):
  each = drawn(3, 6, 4)
  close(merged(method, [x.T for x in each]).T, merged(method, each), atol=1e-5)


def test_the_order_of_what_comes_one_after_the_other_matters():
  each = drawn(3, 6, 4)
  assert np.abs(merged(methods.opcm(), each) - merged(methods.opcm(), each[::-1])).max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["vertical", "horizontal"])
def test_directions_swap_under_transposition(direction):
  other = {"vertical": "horizontal", "horizontal": "vertical"}[direction]
  each = drawn(3, 6, 4)
  turned = merged(methods.drm(direction=other), [x.T for x in each])
  close(merged(methods.drm(direction=direction), each), turned.T, atol=1e-5)


@pytest.mark.parametrize(
  "method",
  [
    methods.drm(drop_rate=0.0, rank_tol=0.0),
    methods.lore(sweeps=3),
    methods.opcm(),
    methods.lore(join="elected"),
  ],
)
def test_one_model_is_itself(method):
  x = drawn(1, 6, 4)
  close(merged(method, x), x[0], atol=1e-5)


@pytest.mark.parametrize("direction", ["vertical", "horizontal"])
def test_equal_models_are_themselves_where_nothing_is_dropped(direction):
  x = drawn(1, 6, 4) * 3
  close(merged(methods.drm(drop_rate=0.0, direction=direction, rank_tol=0.0), x), x[0], atol=1e-5)


def test_lore_tends_to_the_average():
  each = drawn(3, 4, 5)
  found = [merged(methods.lore(mu=0.8, sweeps=n), each) for n in (5, 60)]
  far = [np.abs(x - np.mean(each, axis=0)).max() for x in found]
  assert far[1] < 0.1 * far[0]
  assert far[1] < 1e-3


def test_no_sweep_of_lore_raises_the_objective():
  """Half the squared distances, plus mu times the nuclear norms; the parts are what lowers it."""
  each, mu = drawn(3, 4, 5), 0.8
  parts, losses = [0 * x for x in each], []
  for _ in range(8):
    common, parts = transcribed.lore_sweep(each, parts, mu)
    far = sum(np.sum((common + p - x) ** 2) for p, x in zip(parts, each, strict=True)) / 2
    losses.append(far + mu * sum(np.sum(values(p)) for p in parts))
  assert (np.diff(losses) <= 1e-12).all()
  assert losses[-1] < losses[0] - 0.1
  close(merged(methods.lore(0.0, mu, sweeps=8), each), common, atol=1e-5)


def test_lore_that_takes_nothing_off_splits_at_the_mean():
  """Common and own part make up each model after one sweep; their mean is that of the models."""
  each = drawn(3, 4, 5)
  common, parts = transcribed.lore_sweep(each, [0 * x for x in each], 0.0)
  close([common + p for p in parts], each, atol=1e-12)
  close(merged(methods.lore(2.0, mu=0.0, sweeps=1), each), np.mean(each, axis=0), atol=1e-5)


def test_what_is_taken_off_every_singular_value_lowers_the_rank():
  """All that is left of the parts is what delta_scale multiplies."""
  each = drawn(3, 8, 6)
  one, two = (merged(methods.lore(s, 0.7, relative=True), each) for s in (1.0, 2.0))
  rank = np.sum(values(two - one) > 1e-4)
  assert 0 < rank < 6


@pytest.mark.slow
@pytest.mark.parametrize("method", [methods.drm(), methods.lore(), methods.opcm()])
def test_low_ranks_zeros_and_empty_matrices(method):
  low = drawn(3, 7, 6, rank=1)
  assert np.isfinite(merged(method, low)).all()
  zero = np.zeros((4, 5))
  assert not merged(method, [zero, zero]).any()
  assert np.isfinite(merged(method, [zero, *drawn(1, 4, 5)])).all()
  assert merged(method, [zero[:0], zero[:0]]).shape == (0, 5)


def test_without_a_view_signs_are_elected():
  x = {"w": jnp.array([[1.0, -1.0, 2.0], [1.0, 2.0, -2.0]]), "kernel": jnp.ones((2, 1, 2))}
  found = jaxmerge.merge(methods.drm(), x, deltas=True)["w"]
  close(found, [1.0, 2.0, 2.0])


ADAPTED = {
  "opcm": (
    methods.opcm(),
    lambda taus: transcribed.opcm(taus, 0.5, (("w", "oi"),)),
  ),
  "doge": (
    methods.doge(learning_rate=1e-5, steps=20),
    lambda taus: transcribed.doge(taus, 1.0, 0.07, 0.3, 6, 1e-5, 20, (("w", "oi"),)),
  ),
}


@pytest.mark.parametrize("name", ADAPTED)
def test_directions_of_adapters_are_those_that_they_have(name):
  """Also where they were added to a base: what float32 left of a subtraction is no direction."""
  method, rule = ADAPTED[name]
  base = np.random.default_rng(1).normal(size=(24, 32)).astype(np.float32) / 20
  exact = np.asarray(drawn(3, 24, 32, rank=4), np.float32) / 20000
  again = (base + exact) - base
  tol = np.finfo(np.float32).eps * np.linalg.norm(base) / np.linalg.norm(exact[0])
  expected = rule([{"w": x.astype(np.float64)} for x in exact])["w"]

  def far(tau, tol):
    options = {"hparams": {"rank_tol": tol}, "layout": (("w", "oi"),)}
    found = np.asarray(jaxmerge.merge(method, {"w": jnp.asarray(tau)}, **options, deltas=True)["w"])
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)

  assert far(exact, 1e-6) < 1e-5
  assert far(again, tol) < 1e-4
  assert far(again, 1e-6) > 1e-2


@pytest.mark.parametrize(
  ("direction", "rate"),
  [("vertical", 0.5), ("horizontal", 0.5), ("vertical", 0.0), ("vertical", 0.9), ("vertical", 1.0)],
)
def test_drm_drops_of_the_directions_that_there_are(direction, rate):
  """Task matrices of rank two have four directions of eight; none of the others is dropped."""
  rng = np.random.default_rng(3)
  left, right = rng.normal(size=(2, 8, 2)), rng.normal(size=(2, 2, 10))
  x = {"w": jnp.asarray(left @ right, jnp.float32)}
  found = jaxmerge.merge(methods.drm(1.0, rate, direction), x, layout=(("w", "oi"),), deltas=True)
  close(
    found["w"], transcribed.drm(list(np.asarray(x["w"], np.float64)), rate, direction), atol=1e-5
  )


@pytest.mark.parametrize("direction", ["vertical", "horizontal"])
def test_drm_decomposes_the_models_together_and_sorts_nothing(direction):
  x = {"w": jnp.ones((4, 3, 6, 5))}
  merge = functools.partial(jaxmerge.merge, methods.drm(direction=direction), deltas=True)
  traced = jax.make_jaxpr(functools.partial(merge, layout=(("w", "boi"),)))(x)
  found = equations(traced.jaxpr)
  shapes = {e.invars[0].aval.shape for e in found if e.primitive.name == "svd"}
  assert shapes == {{"vertical": (5, 24), "horizontal": (6, 20)}[direction]}
  assert not any("sort" in e.primitive.name for e in found)
