"""Merging by singular values: worked examples, closed forms, low ranks, layouts."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from example import close
from marking import some_fast
from matrices import A, B, drawn, equations, merged, values

import jaxmerge
from jaxmerge import methods
from jaxmerge.methods import spectral

pytestmark = pytest.mark.kernels
EVERY = [methods.iso_c(), methods.iso_cts(), methods.tsv()]
IDS = ["iso_c", "iso_cts", "tsv"]


@pytest.mark.parametrize(
  ("method", "expected"),
  [
    (methods.iso_c(), [[2.923025, 0, 0.974342], [0, 3.081139, 0]]),
    (methods.iso_c(0.5), [[1.4615125, 0, 0.487171], [0, 1.5405695, 0]]),
    (methods.iso_cts(common=1.0), [[2.923025, 0, 0.974342], [0, 3.081139, 0]]),
    (methods.tsv(), [[3, 0, 0], [0, 2, 0]]),
  ],
)
def test_worked_example(method, expected):
  close(merged(method, [A, B]), expected, atol=3e-6)


@pytest.mark.parametrize(
  ("rank", "height", "common", "expected"),
  [
    (768, 8, 0.8, (616, 19)),
    (768, 14, 0.8, (614, 11)),
    (768, 20, 0.8, (608, 8)),
    (2, 8, 0.8, (2, 0)),
    (3, 2, 0.0, (1, 1)),
    (8, 4, 1.0, (8, 0)),
  ],
)
def test_directions_are_dealt(rank, height, common, expected):
  """Never more than there are, where rounding asks for it."""
  assert spectral.count_directions(rank, height, common) == expected


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
def test_iso_c_keeps_the_sum_of_the_singular_values(shape):
  matrices = drawn(3, *shape)
  total, found = sum(matrices), merged(methods.iso_c(), matrices)
  close(values(found), np.full(min(shape), values(total).mean()), atol=1e-5)
  # The directions are those of the sum.
  assert np.isclose(np.sum(found * total), values(total).mean() * values(total).sum(), rtol=1e-5)


@pytest.mark.parametrize("common", some_fast([0.0, 0.3, 0.8], [0.3]))
def test_iso_cts_has_equal_singular_values(common):
  matrices = drawn(2, 8, 12)
  found = values(merged(methods.iso_cts(common=common), matrices))
  close(found, np.full(8, found[0]), atol=1e-5)
  assert np.abs(merged(methods.iso_cts(common=common), matrices)).max() > 0.1


def test_iso_c_keeps_what_is_even_already():
  """A matrix with orthonormal rows, and one of rank 1: what it lacks it does not get."""
  q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 5)))
  close(merged(methods.iso_c(), [q.T]), q.T, atol=1e-6)
  close(merged(methods.iso_c(), [np.diag([2.0, 0.0])]), np.diag([2.0, 0.0]), atol=1e-6)


def test_tsv_of_one_model_is_the_model():
  (x,) = drawn(1, 5, 7)
  close(merged(methods.tsv(), [x]), x, atol=1e-5)


def test_tsv_adds_up_tasks_that_share_nothing():
  """Each of rank k, with left and right vectors of its own."""
  q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))
  p, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(9, 9)))
  own = [q[:, :4] @ np.diag([4, 3, 2, 1.0]) @ p[:4], q[:, 4:] @ np.diag([5, 2, 2, 0.5]) @ p[4:8]]
  close(merged(methods.tsv(), own), sum(own), atol=1e-5)


def test_tsv_lets_no_arbitrary_vectors_in():
  """Tasks of rank 2 and 1 where three directions are kept: the others have no vectors."""
  q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))
  own = [q[:, :2] @ np.diag([2, 1.0]) @ q[:2], 3 * q[:, 2:3] @ q[2:3]]
  close(merged(methods.tsv(), own), sum(own), atol=1e-5)


def test_tsv_has_a_low_rank():
  assert np.linalg.matrix_rank(merged(methods.tsv(), drawn(3, 5, 7)), tol=1e-4) == 3


@pytest.mark.parametrize("method", EVERY, ids=IDS)
@pytest.mark.parametrize("rank", [1, 2])
def test_low_ranks_do_not_depend_on_arbitrary_vectors(method, rank):
  """Noise far below the directions that are there changes nothing."""
  matrices = drawn(2, 6, 8, rank=rank)
  noise = drawn(2, 6, 8, seed=1)
  near = [x + 1e-7 * n for x, n in zip(matrices, noise, strict=True)]
  found = merged(method, matrices)
  close(merged(method, near), found, atol=1e-4)
  assert np.linalg.matrix_rank(found, tol=1e-3) <= 2 * rank


@pytest.mark.parametrize("method", EVERY, ids=IDS)
def test_stacked_layers_are_matrices_of_their_own(method):
  layers = [drawn(2, 6, 8, seed=s) for s in range(3)]
  stacked = [np.stack(own) for own in zip(*layers, strict=True)]
  found = merged(method, stacked, "boi")
  for x, own in zip(found, layers, strict=True):
    close(x, merged(method, own), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", [methods.iso_c(), methods.tsv()], ids=["iso_c", "tsv"])
def test_a_transpose_passes_through(method):
  matrices = drawn(3, 6, 8)
  close(merged(method, [x.T for x in matrices]).T, merged(method, matrices), atol=1e-5)


@pytest.mark.parametrize("method", EVERY, ids=IDS)
def test_nothing_of_nothing(method):
  """A frozen matrix among others, a task that leaves one alone, an empty one."""
  zero, (x,) = np.zeros((4, 5)), drawn(1, 4, 5)
  close(merged(method, [zero, zero]), zero, atol=0)
  assert np.isfinite(merged(method, [x, zero])).all()
  assert merged(method, [zero[:0], zero[:0]]).shape == (0, 5)


@pytest.mark.slow
def test_gradients_are_finite():
  x = {"w": jnp.asarray(np.stack(drawn(2, 4, 5)), jnp.float32)}
  for method in EVERY:
    slope = jax.grad(
      lambda x, m=method: jaxmerge.merge(m, x, layout=(("w", "oi"),), deltas=True)["w"].sum()
    )(x)
    assert np.isfinite(slope["w"]).all()


@pytest.mark.parametrize("shape", some_fast([(4, 6), (6, 4), (4, 4)], [(4, 6)]))
def test_gradients_are_those_of_the_decomposition(shape):
  x, probe = (jnp.asarray(y, jnp.float32) for y in drawn(2, *shape))

  def seen(u, s, v):
    return jnp.sum((u**3 * s[None]) @ v.T * probe)

  def plain(x):
    u, s, vt = jnp.linalg.svd(x, full_matrices=False)
    return jnp.stack([seen(u, s, vt.T), jnp.sum(u @ vt * probe) + s[0]])

  def own(x):
    q, s = spectral.flat(x, 1e-6)
    return jnp.stack([seen(*(y[0] for y in spectral.svd(x[None]))), jnp.sum(q * probe) + s[0]])

  close(jax.jit(jax.jacrev(own))(x), jax.jit(jax.jacrev(plain))(x), atol=1e-4)


SLOPES = {
  **dict(zip(IDS, EVERY, strict=True)),
  "drm": methods.drm(drop_rate=0.0, direction="horizontal"),
  "opcm": methods.opcm(),
}


@pytest.mark.parametrize("name", some_fast(SLOPES, ["iso_c"]))
def test_gradients_of_nothing_and_of_low_rank(name):
  """Singular values of zero are equal. One model of rank one stays as it is, and of that rank."""
  u, v = np.array([0.6, 0.8, 0, 0]), np.full(5, 5**-0.5)
  probe, low, zero = np.cos(np.arange(20)).reshape(4, 5), 2 * np.outer(u, v), np.zeros((4, 5))

  @jax.jit
  @jax.grad
  def slope(models):
    base = {"w": jnp.zeros((4, 5))}
    out = jaxmerge.merge(SLOPES[name], {"w": models}, base, layout=(("w", "oi"),))
    return jnp.sum(out["w"] * jnp.asarray(probe, jnp.float32))

  def of(*matrices):
    return np.asarray(slope(jnp.asarray(np.stack(matrices), jnp.float32)))

  outside = (np.eye(4) - np.outer(u, u)) @ probe @ (np.eye(5) - np.outer(v, v))
  if name != "opcm":  # The norm of the first alone is that of all.
    close(of(low)[0], probe - outside, atol=1e-5)
  close(of(zero), [zero], atol=0)
  for pair in ((zero, zero), (low, zero), (zero, low), (low, low), (low, low[::-1])):
    assert np.isfinite(of(*pair)).all()


def test_where_singular_values_are_equal_iso_c_has_a_gradient():
  """Near I the flattened matrix is I (1 + tr dx / n) + (dx - dx^T) / 2."""
  probe = jnp.asarray(drawn(1, 4, 4)[0], jnp.float32)
  merge = functools.partial(jaxmerge.merge, methods.iso_c(), layout=(("w", "oi"),), deltas=True)
  slope = jax.grad(lambda x: jnp.sum(merge({"w": x[None]})["w"] * probe))(jnp.eye(4))
  close(slope, jnp.trace(probe) / 4 * jnp.eye(4) + (probe - probe.T) / 2, atol=1e-5)


@pytest.mark.parametrize("method", [methods.iso_c(), methods.iso_cts(), methods.tsv()], ids=IDS)
def test_decompositions_come_one_after_the_other(method):
  """A batch of them waits for threads of the pool it runs in; two batches wait for ever."""
  x = {"w": jnp.ones((4, 3, 6, 5))}
  merge = functools.partial(jaxmerge.merge, method, layout=(("w", "boi"),), deltas=True)
  found = equations(jax.make_jaxpr(merge)(x).jaxpr)
  shapes = [e.invars[0].aval.shape for e in found if e.primitive.name == "svd"]
  assert shapes
  assert all(len(shape) == 2 for shape in shapes)


POLAR = [methods.iso_c, methods.iso_cts, methods.tsv]


@pytest.mark.parametrize("make", some_fast(POLAR, [methods.iso_c]), ids=IDS)
def test_products_give_what_decompositions_do(make):
  matrices = drawn(3, 12, 20)
  close(merged(make(polar="products"), matrices), merged(make(), matrices), atol=1e-4)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (1, 5), (7, 7)])
def test_products_bring_singular_values_to_one(shape):
  """As low as a thousandth of the largest, at any size; what is zero stays near zero."""
  rng, r = np.random.default_rng(0), min(shape)
  (u, _), (v, _) = (np.linalg.qr(rng.normal(size=(n, r))) for n in shape)
  for size in (1e-8, 1.0, 1e6):
    s = size * np.geomspace(1, 1.001e-3, r)
    found = np.asarray(spectral.by_products(jnp.asarray(u * s @ v.T, jnp.float32)))
    close(values(found), np.ones(r), atol=1e-5)
    close(found, u @ v.T, atol=1e-4)
  s = np.where(np.arange(r) < (r + 1) // 2, 1.0, 1e-7)
  found = values(spectral.by_products(jnp.asarray(u * s @ v.T, jnp.float32)))
  assert found[(r + 1) // 2 :].max(initial=0) < 1e-3


def test_products_alone_need_no_decomposition():
  x = {"w": jnp.ones((4, 6, 5))}
  merge = functools.partial(jaxmerge.merge, layout=(("w", "oi"),), deltas=True)
  text = str(jax.make_jaxpr(lambda x: merge(methods.iso_c(polar="products"), x))(x))
  assert "svd" not in text
  slope = jax.grad(lambda x: merge(methods.iso_c(polar="products"), x)["w"].sum())
  for value in (0.0, 1.0):
    assert np.isfinite(slope({"w": value * x["w"]})["w"]).all()
