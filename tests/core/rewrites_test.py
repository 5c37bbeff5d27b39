"""Programs rewritten: what is rounded, and what is not."""

import gc
import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import small
from marking import some_fast

from jaxmerge import methods
from jaxmerge.core import reductions, rewrites
from jaxmerge.core.interpreter import Slice
from jaxmerge.core.precision import Precision
from jaxmerge.drivers import streaming

DTYPES = [ml_dtypes.bfloat16, np.float16]
EACH = Precision("bfloat16", each=True, numbers=("weight",))


def streamed(method, precision=None, **options):
  """Merges the small tree in float32 leaves."""
  base, models = small.trees(("matrix", "vector", "cube"))
  out = {n: np.empty(x.size, np.float32) for n, x in base.items()}

  def read(name, start, stop, order, on_chunk):
    own = base[name].reshape(-1)[start:stop]
    return Slice(own, own, models[name].reshape(4, -1)[order, start:stop])

  def write(name, start, part):
    out[name][start : start + len(part)] = part

  leaves = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in base.items()}
  source = streaming.Source(
    leaves, 4, read, {} if precision is None else dict.fromkeys(out, precision)
  )
  streaming.stream(method, source, write, layout=small.VIEWS, **options)
  return out, {n: x.reshape(-1) for n, x in base.items()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounds_as_a_cast_does(dtype):
  """To even, subnormal numbers and infinity among them."""
  rng = np.random.default_rng(0)
  x = (rng.normal(size=4096) * 10.0 ** rng.integers(-9, 6, 4096)).astype(np.float32)
  x = np.concatenate([x, np.float32([0, -0.0, 65519, 65520, 2**-25, 3 * 2**-25, 1 + 2**-8])])
  with np.errstate(over="ignore"):
    expected = x.astype(dtype).astype(np.float32)
  found = jax.jit(lambda x: rewrites.round_to(x, np.dtype(dtype).name))(x)
  np.testing.assert_array_equal(found, expected)


def test_every_operation_rounds_and_a_sum_rounds_once():
  def f(x):
    return jnp.sqrt((x * x).sum(axis=0)) / 3

  x = np.float32([[1.01, 3.3], [2.02, 0.7], [5.5, 1e-3]]).astype(ml_dtypes.bfloat16)
  squares = (x * x).astype(np.float32)
  root = np.sqrt((squares[2] + (squares[1] + squares[0])).astype(x.dtype))
  expected = (root / x.dtype.type(3)).astype(np.float32)
  found = jax.jit(rewrites.unroll(f, each="bfloat16"))(x.astype(np.float32))
  np.testing.assert_array_equal(found.astype(x.dtype).astype(np.float32), expected)
  # What is returned is not rounded yet.
  assert (np.asarray(found) != expected).any()


@pytest.mark.parametrize("entries", some_fast([5, 2**20], [2**20]))
def test_a_narrow_dtype_does_not_depend_on_the_cut(entries):
  method = methods.ties(0.4, weight=(1.0, 0.3, 2.0, 0.7), scope="leaf", rule="exact", rescale="l1")
  found, _ = streamed(method, EACH, entries=entries)
  expected, _ = streamed(method, EACH, entries=16)
  small.same(found, expected)


def test_random_masks_are_those_of_float32():
  """The numbers that masks are drawn with are not rounded: only what is kept is."""
  method = methods.dare(0.5, scale=1.0, weight=(1.0, 0.0, 0.0, 0.0), rescale=None)
  wide, base = streamed(method, seed=3)
  narrow, _ = streamed(method, EACH._replace(wide=True), seed=3)
  for name, x in base.items():
    low = np.asarray(rewrites.round_to(x, "bfloat16"))
    kept = wide[name] != x
    assert ((narrow[name] != low) & ~kept).sum() == 0
    assert ((narrow[name] != low) & kept).sum() > 0.8 * kept.sum()


def test_without_a_dtype_nothing_changes():
  text = str(jax.make_jaxpr(rewrites.unroll(lambda x: x.mean(axis=0) / 3))(jnp.ones((3, 4))))
  assert "reduce_precision" not in text


@pytest.mark.parametrize("height", [1, 3, 4, 5])
def test_inner_products_are_sums_where_models_are_few(height):
  x = np.random.default_rng(0).normal(size=(height, 6, 50)).astype(np.float32)
  f = rewrites.unroll(reductions.inner_products)
  found = f(jnp.asarray(x))
  flat = x.reshape(height, -1).astype(np.float64)
  np.testing.assert_allclose(found, flat @ flat.T, rtol=1e-5, atol=1e-4)
  assert ("dot_general" in str(jax.make_jaxpr(f)(x))) == (height > 4)
  assert str(jax.make_jaxpr(f)(x)).count("reduce_sum") == (height * (height + 1) // 2) * (
    height < 5
  )


def test_products_of_matrices_with_stacks_stay_what_they_are():
  """A few rows with each matrix of a stack: no inner products of models, though rows are few."""
  rng = np.random.default_rng(0)
  u, x = rng.normal(size=(5, 2)).astype(np.float32), rng.normal(size=(3, 5, 5)).astype(np.float32)
  found = rewrites.unroll(lambda u, x: u.T @ x)(jnp.asarray(u), jnp.asarray(x))
  np.testing.assert_allclose(found, u.T @ x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1000, 4096, 10_007])
def test_long_sums_by_halves_are_the_sums(length):
  x = np.random.default_rng(0).normal(size=(3, length)).astype(np.float32)

  def f(x):
    return x.sum(axis=1), x.max(axis=1), (x > 0).sum(axis=1), reductions.inner_products(x)

  found = jax.jit(rewrites.unroll(f, halves=True))(jnp.asarray(x))
  wide = x.astype(np.float64)
  expected = wide.sum(axis=1), wide.max(axis=1), (x > 0).sum(axis=1), wide @ wide.T
  for own, right in zip(found, expected, strict=True):
    np.testing.assert_allclose(own, right, rtol=1e-5, atol=1e-3)
  np.testing.assert_array_equal(found[2], expected[2])


def test_a_called_program_is_rewritten_once_until_jax_clears_its_caches(monkeypatch):
  programs, evaluate = [], rewrites._evaluate

  def record(jaxpr, *rest):
    programs.append(weakref.ref(jaxpr))
    return evaluate(jaxpr, *rest)

  monkeypatch.setattr(rewrites, "_evaluate", record)
  inner = jax.jit(lambda x: x.sum(axis=0))
  text = str(jax.make_jaxpr(rewrites.unroll(lambda x: inner(x) + inner(x + 1)))(jnp.ones((3, 4))))
  assert "reduce_sum" not in text
  assert len(programs) == 2  # The function, and the program that it calls twice.
  jax.clear_caches()
  gc.collect()
  assert [program() for program in programs] == [None, None]
