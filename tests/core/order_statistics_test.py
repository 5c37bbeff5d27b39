"""Exact ranks against sorting, and what sharded leaves cost."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from marking import some_fast

import jaxmerge
from jaxmerge.core import order_statistics, reductions, stage, wide_counts
from jaxmerge.core.stage import Leaf, Rank

HEIGHT, SIZE = 2, 24
# Few values, so that most tie; subnormal and huge ones, and both zeros.
values = st.sampled_from([0.0, -0.0, 1e-40, -1e-40, 1e-30, 0.5, -0.5, 1.0, -1.0, 1.5, 3e38, -3e38])
stacks = st.lists(st.lists(values, min_size=SIZE, max_size=SIZE), min_size=HEIGHT, max_size=HEIGHT)
ranks = st.tuples(*[st.integers(0, SIZE)] * HEIGHT)


def leaf(start=0, offset=0):
  tags = jnp.zeros(HEIGHT, jnp.uint32)
  return Leaf(None, {}, tags, jnp.uint32(0), np.uint32(start), np.uint32(offset))


def limbs(counts):
  return np.stack([wide_counts.limbs(n) for n in counts], axis=1)


@functools.partial(jax.jit, static_argnums=0)
def settle(exact, x, n):
  """The cut at a rank over one leaf of three axes, and which entries are inside."""
  rank = Rank("cut", lambda x, leaf, known: jnp.abs(x), rank="n", exact=exact)
  cut = reductions.reduce_group(rank, [(x, leaf())], {"n": n})
  return cut.value, order_statistics.inside(cut, jnp.abs(x), leaf())


def cube(x):
  return jnp.asarray(x, jnp.float32).reshape(HEIGHT, 2, 3, 4)


@settings(max_examples=100)
@given(stacks, ranks)
def test_kth_is_the_value_that_sorting_finds(x, n):
  found, inside = settle(False, cube(x), limbs(n))
  for k in range(HEIGHT):
    down = np.sort(np.abs(np.asarray(x[k], np.float32)).view(np.uint32))[::-1]
    if n[k]:
      assert found[k] == down[n[k] - 1]
      assert inside[k].sum() == (down >= found[k]).sum()
    else:
      assert found[k] > np.float32(np.inf).view(np.uint32)


@settings(max_examples=100)
@given(stacks, ranks)
def test_an_exact_cut_is_the_head_of_a_stable_sort(x, n):
  found = np.asarray(settle(True, cube(x), limbs(n))[1]).reshape(HEIGHT, SIZE)
  for k in range(HEIGHT):
    head = np.argsort(-np.abs(np.asarray(x[k], np.float32)), kind="stable")[: n[k]]
    assert sorted(head) == np.flatnonzero(found[k]).tolist()


@pytest.mark.parametrize("columns", [0, 1, 7, 300, 2**16, 2**16 + 1])
@pytest.mark.parametrize("dtype", some_fast(["float32", "bfloat16", "float16"], ["float32"]))
def test_ranks_are_places_in_a_stable_sort(columns, dtype):
  drawn = np.random.default_rng(columns).standard_normal((2, 3, columns))
  x = jnp.asarray(drawn.round(2), dtype)  # Rounded: many tie.
  order = np.argsort(np.abs(np.asarray(x, np.float32)), axis=2, kind="stable")
  expected = np.empty(order.shape, int)
  np.put_along_axis(expected, order, np.arange(columns)[None, None], axis=2)
  np.testing.assert_array_equal(order_statistics.ranks(x), expected)


def test_ranks_place_zeros_infinities_and_what_is_not_a_number():
  x = jnp.asarray([[[jnp.nan, -0.0, jnp.inf, 1e-45, 0.0, -jnp.inf, -jnp.nan, -3.0]]])
  assert order_statistics.ranks(x)[0, 0].tolist() == [6, 0, 4, 2, 1, 5, 7, 3]


@pytest.mark.parametrize("exact", [False, True])
def test_a_device_by_itself_counts_the_same(exact, monkeypatch):
  """There masks are counted together; tests have eight devices."""
  x = jnp.asarray(np.random.default_rng(0).standard_normal((HEIGHT, 300)).round(1), jnp.float32)
  rank = Rank("cut", lambda x, leaf, known: jnp.abs(x), rank="n", exact=exact)

  def kept():
    cut = reductions.reduce_group(rank, [(x, leaf())], {"n": limbs([77, 200])})
    return order_statistics.inside(cut, jnp.abs(x), leaf())

  expected = kept()
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  jax.clear_caches()  # Traced once for eight devices.
  alone = jax.make_jaxpr(kept)()
  assert "platform_index" in str(alone)
  np.testing.assert_array_equal(jax.jit(kept)(), expected)


def test_patterns_order_as_values_do():
  x = np.sort(np.abs(np.random.default_rng(0).normal(size=1000)).astype(np.float32))
  x = np.concatenate([[0, 1e-45, 1e-40], x, [3e38, np.inf]]).astype(np.float32)
  assert (np.diff(np.asarray(order_statistics.pattern(jnp.asarray(x))).astype(np.int64)) > 0).all()


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4)])
def test_positions_number_a_group_row_by_row(shape):
  """A slice has the positions that its entries have in the whole leaf, behind the leaves before."""
  x = jnp.zeros((1, *shape))
  whole = np.asarray(order_statistics.position(x, leaf(offset=100)))
  np.testing.assert_array_equal(whole.reshape(-1), 100 + np.arange(x.size))
  if shape:
    row = x[0, 0].size
    part = order_statistics.position(x[:, 1:2], leaf(start=row, offset=100))
    np.testing.assert_array_equal(part, whole[:, 1:2])
    flat = order_statistics.position(x.reshape(1, -1)[:, 2:], leaf(start=2, offset=100))
    np.testing.assert_array_equal(flat[0], whole.reshape(-1)[2:])


def test_gram_is_the_matrix_of_inner_products():
  x = np.random.default_rng(0).normal(size=(HEIGHT, 4, 5)).astype(np.float32)
  gram = reductions.gram("gram")
  measured = gram.finish(gram.measure(jnp.asarray(x), leaf(), {}), {}).products
  np.testing.assert_allclose(measured, np.einsum("kij,lij->kl", x, x), rtol=1e-5)


def test_totals_and_maxima_over_a_tree():
  models = {"a": jnp.array([[1.0, -5.0], [2.0, 3.0]]), "b": jnp.array([4.0, -6.0])}

  def axes(x):
    return tuple(range(1, x.ndim))

  measured = (
    reductions.total("sum", lambda x, leaf: x.sum(axes(x))),
    reductions.greatest("max", lambda x, leaf: jnp.abs(x).max(axes(x))),
  )

  def update(x, leaf, known):
    both = known["sum"] * 100 + known["max"]
    return jnp.zeros_like(x) + both.reshape((-1,) + (1,) * (x.ndim - 1))

  method = (stage.Stage(update, measured),)
  out = jaxmerge.merge(stage.chain(method, jaxmerge.methods.weighted_sum((1.0, 0.0))), models)
  assert out["b"] == 5.0
  out = jaxmerge.merge(stage.chain(method, jaxmerge.methods.weighted_sum((0.0, 1.0))), models)
  assert out["b"] == -94.0


def test_thresholds_of_another_height():
  """Three ranks of one row: the quartiles of 0 ... 8."""
  x = jnp.arange(9.0).reshape(1, 3, 3)
  thrice = Rank("cut", lambda x, leaf, known: jnp.broadcast_to(x, (3, 3, 3)), rank="n")
  found = reductions.reduce_group(thrice, [(x, leaf())], {"n": limbs([7, 5, 3])})
  patterns = order_statistics.pattern(jnp.array([2.0, 4.0, 6.0]))
  assert found.value.tolist() == patterns.tolist()


def test_groups_that_are_too_large_are_refused():
  with pytest.raises(ValueError, match=r"a group of 140737488355328 entries is too large to rank"):
    jax.eval_shape(lambda f: wide_counts.share(f, 2**47, 1), jnp.float32(0.5))
  group = stage.Group({"w": (2**16, 2**16)}, 2, {})
  with pytest.raises(ValueError, match=r"fewer than 2\*\*32 entries, got 4294967296; use scope="):
    order_statistics.refuse_unrankable(group)


# --- What sharded leaves cost ---


def compiled(method, spec):
  """The program of a merge of two sharded leaves, as text."""
  mesh = jax.make_mesh(
    (2, 2, 2), ("task", "row", "column"), axis_types=(jax.sharding.AxisType.Auto,) * 3
  )
  spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
  base_spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec[1:]))
  models = {n: jax.ShapeDtypeStruct((4, 8, 16), jnp.float32, sharding=spread) for n in "ab"}
  base = {n: jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=base_spread) for n in "ab"}
  run = jax.jit(jaxmerge.merge, static_argnums=0)
  return run.lower(method, models, base).compile().as_text()


RANKING = {
  "ties": jaxmerge.methods.ties(),
  "ties by leaf, exact": jaxmerge.methods.ties(scope="leaf", rule="exact"),
  "breadcrumbs": jaxmerge.methods.breadcrumbs(),
  "breadcrumbs by tree": jaxmerge.methods.breadcrumbs(scope="tree"),
}
COSTLY = ("sort(", "all-gather", "all-to-all", "collective-permute", "gather(")


@pytest.mark.parametrize("name", RANKING)
def test_ranking_sharded_leaves_neither_sorts_nor_gathers(name):
  text = compiled(RANKING[name], (None, "row", "column"))
  assert "all-reduce" in text
  assert [word for word in COSTLY if word in text] == []
  # Only counts travel: a few integers per model, never entries.
  reduced = [line.split(" all-reduce(")[0] for line in text.splitlines() if " all-reduce(" in line]
  assert reduced
  for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", " ".join(reduced)):
    assert math.prod(int(n) for n in shape.split(",") if n) <= 8, (dtype, shape)


def test_a_flattening_method_gathers():
  """The control: what the test above would see if a threshold were found by sorting."""

  def trim(x):
    flat = jnp.abs(x.reshape(x.shape[0], -1))
    cut = jnp.sort(flat, axis=1)[:, flat.shape[1] // 2]
    return jnp.where(jnp.abs(x) >= cut.reshape(-1, 1, 1), x, 0)

  method = stage.chain(stage.pointwise(trim), jaxmerge.methods.average())
  text = compiled(method, (None, "row", "column"))
  assert "all-gather" in text
  assert "sort(" in text
