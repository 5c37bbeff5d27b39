"""Every method in every way to run it: one table.

The rows are the methods (`methods_table.py`), each test is a column. Bits are compared wherever the
sums are made in the same order; elsewhere to `ATOL`, a few units in the last place of float32
weights near 1.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from methods_table import SEED, TABLE
from reference import basics

import jaxmerge
from jaxmerge import memory, stage, streaming

ATOL = 2e-6


# These share their stages with other rows; their columns that compile anew are marked slow.
SLOW = {
  "task_arithmetic, normalized",
  "ties by leaf, exact, l1",
  "ties, sum",
  "ties, max",
  "dare, normalized",
  "dare_ties",
  "breadcrumbs by tree",
  "breadcrumbs by leaf, remove",
  "breadcrumbs by row, remove",
  "breadcrumbs_ties",
  "della, l1",
  "della_linear",
  "nuslerp by leaf",
  "nuslerp by column",
  "multislerp",
  "model_stock by row",
  "sce of a third",
  "ram",
  "ramplus_tl by tree",
  "portllm",
  "ties_slack",
  "lwptv by norm",
  "lwptv by size",
  "drm, horizontal",
  "lore, elected",
  "flag of two, pairs",
  "passthrough",
}
rows = pytest.mark.parametrize("name", TABLE)
MARKED = {n: pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in TABLE}
rows_slow = pytest.mark.parametrize("name", MARKED.values())
rows_of_entries = pytest.mark.parametrize(
  "name", [p for n, p in MARKED.items() if all(s.unit == "entry" for s in TABLE[n].method)]
)


@functools.cache
def eager(name, leaves=small.ALL):
  """What every column compares with: (base, models, merged), whole and on one device."""
  row = TABLE[name]
  base, models = row.trees(leaves)
  return base, models, merged(row, base, models)


def merged(row, base, models, **options):
  return jax.tree.map(
    np.asarray, jaxmerge.merge(row.method, base, models, **row.options(**options))
  )


def alike(row, found, out):
  """Bits, or what is left to sums that are made in another order."""
  if row.summed:
    small.close(found, out, row.atol)
  else:
    small.same(found, out)


def draw(k, leaf, shape):
  """The random numbers of a model called str(k): a transcription of the hash."""
  return basics.uniform(SEED, leaf, str(k), shape)


def expected(row, base, models):
  """Base plus the transcription's task vector; integers are the base's."""
  tau = row.oracle(basics.deltas(base, models), draw)
  return {n: base[n] + tau[n] if n in tau else base[n] for n in base}


@rows
def test_agrees_with_the_transcription(name):
  base, models, out = eager(name)
  small.close(out, expected(TABLE[name], base, models), ATOL)


@rows_slow
def test_jit_gives_the_bits_of_eager(name):
  base, models, out = eager(name, small.FEW)
  jitted = jax.jit(jaxmerge.merge, static_argnums=0, static_argnames="layout")
  found = jitted(TABLE[name].method, base, models, **TABLE[name].options())
  alike(TABLE[name], found, out)


@rows_slow
def test_vmap_over_numbers_is_a_loop_and_grad_is_the_slope(name):
  """The merged task vector is linear in the scale, so its slope is a difference quotient.

  Without a scale the task vectors are stretched: each method is linear in that, near every point.
  """
  row = TABLE[name]
  base, models, _ = eager(name, small.FEW)
  numbers = {n: np.asarray(v, np.float32) for n, v in row.vary.items()}
  scaled = "scale" in stage.numbers(row.method)
  factors = np.array([0.25, 0.5, 2.0], np.float32)
  probe = np.cos(np.arange(128, dtype=np.float32)).reshape(8, 16)

  def stretched(factor):
    zero = {n: x[None] for n, x in base.items()}
    return {n: x if n == "steps" else zero[n] + factor * (x - zero[n]) for n, x in models.items()}

  def probed(factor, fixed):
    near = models if scaled else stretched(factor)
    aux = {**fixed, **({"scale": factor} if scaled else {})}
    out = jaxmerge.merge(row.method, base, near, aux=aux, **row.options())
    return jnp.sum((out["matrix"] - base["matrix"]) * probe), out

  both = jax.vmap(jax.value_and_grad(probed, has_aux=True))
  (values, outs), slopes = both(factors, numbers)
  for i, factor in enumerate(factors.tolist()):
    one = {n: v[i].tolist() for n, v in numbers.items()}
    near = models if scaled else jax.tree.map(np.asarray, stretched(np.float32(factor)))
    alone = merged(row, base, near, aux={**one, **({"scale": factor} if scaled else {})})
    small.close({n: x[i] for n, x in outs.items()}, alone, ATOL if row.summed else 1e-6)
    if name != "nearswap":
      np.testing.assert_allclose(slopes[i] * factor, values[i], atol=1e-5)


LAYOUTS = {
  "rows": ((1, 8, 1), AxisType.Auto),
  "columns": ((1, 1, 8), AxisType.Auto),
  "tasks": ((4, 2, 1), AxisType.Auto),
  "explicit": ((2, 2, 2), AxisType.Explicit),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@rows_slow
def test_eight_devices(name, layout):
  """Equal bits where each device sums over all models and no float is summed over entries."""
  row = TABLE[name]
  base, models, out = eager(name, small.FEW)
  sides, kind = LAYOUTS[layout]
  if row.height % sides[0]:
    sides = (1, 8, 1) if kind == AxisType.Auto else (1, 4, 2)
  mesh = jax.make_mesh(sides, ("task", "row", "column"), axis_types=(kind,) * 3)

  def put(x, *axes):
    return jax.device_put(x, NamedSharding(mesh, P(*axes[: x.ndim])))

  def spread(tree, *lead):
    axes = {"vector": ("row",), "matrix": ("row", "column"), "steps": ()}
    return {n: put(x, *lead, *axes[n]) for n, x in tree.items()}

  with jax.set_mesh(mesh):
    found = jaxmerge.merge(row.method, spread(base), spread(models, "task"), **row.options())
  assert found["matrix"].sharding.num_devices == 8
  if kind == AxisType.Explicit:
    assert jax.typeof(found["matrix"]).sharding.spec == P("row", "column")
  if sides[0] > 1 or row.summed:
    small.close(jax.device_get(found), out, max(ATOL, row.atol))
  else:
    small.same(jax.device_get(found), out)


@pytest.mark.parametrize("entries", [1, 80])
@rows_slow
def test_slices_give_the_bits_of_whole_leaves(name, entries):
  """Slices of one row, and of five and three."""
  row = TABLE[name]
  base, models, out = eager(name, small.FEW)
  found = streaming.merge_slices(row.method, base, models, entries=entries, **row.options())
  alike(row, found, out)


@rows_of_entries
def test_stages_of_entries_see_no_axes(name):
  """Drivers may hand them a leaf in one row, in pieces."""
  row = TABLE[name]
  base, models, out = eager(name, small.FEW)
  flat = {n: x.reshape(-1) for n, x in base.items()}
  found = merged(row, flat, {n: x.reshape(row.height, -1) for n, x in models.items()})
  found = {n: x.reshape(base[n].shape) for n, x in found.items()}
  alike(row, found, out)


@rows_slow
def test_bfloat16_in_and_out(name):
  """Computed in float32 and rounded once: the bits of the float32 merge, rounded."""
  row = TABLE[name]
  base, models = row.trees(small.FEW)
  low = lambda x: jnp.asarray(x, jnp.bfloat16) if x.dtype == np.float32 else x  # noqa: E731
  wide = lambda x: np.asarray(x, np.float32) if x.dtype == jnp.bfloat16 else x  # noqa: E731
  base, models = jax.tree.map(low, (base, models))
  out = merged(row, base, models)
  small.same(
    out,
    jax.tree.map(lambda x: np.asarray(low(x)), merged(row, *jax.tree.map(wide, (base, models)))),
  )


@rows_slow
def test_one_task(name):
  row = TABLE[name]
  base, models = row.trees(small.FEW, height=1)
  # Of numbers that are one per model the first.
  aux = {n: v[0] for n, v in stage.numbers(row.method).items() if isinstance(v, tuple)}
  if row.one:
    out = merged(row, base, models, aux=aux)
    small.close(out, expected(row, base, models), ATOL)
  elif row.height == 2 or "stock" in name:
    with pytest.raises(ValueError, match=r"merges 2 (or more )?models, got 1"):
      merged(row, base, models, aux=aux)


@rows
def test_empty_task_vectors_give_the_base(name):
  base, models, _ = eager(name)
  same = {n: np.stack([base[n]] * len(x)) for n, x in models.items()}
  small.same(merged(TABLE[name], base, same), base)


@rows_slow
def test_gradients_at_the_base_are_finite(name):
  """Norms, cosines and shares of nothing have no gradient; that must not make one NaN."""
  row = TABLE[name]
  base, models, _ = eager(name, small.FEW)
  same = np.stack([base["matrix"]] * row.height)

  @jax.jit
  @jax.grad
  def slope(x):
    out = jaxmerge.merge(row.method, base, {**models, "matrix": x}, **row.options())
    return jnp.sum(out["matrix"])

  assert np.isfinite(slope(same)).all()


@rows
def test_inputs_are_left_alone_and_give_the_same_bits_again(name):
  base, models, out = eager(name)
  before = jax.tree.map(np.copy, (base, models))
  small.same(merged(TABLE[name], base, models), out)
  small.same(base, before[0])
  small.same(models, before[1])


@rows_slow
def test_order_of_named_models_does_not_matter(name):
  row = TABLE[name]
  base, models, out = eager(name, small.FEW)
  names = small.NAMES[: row.height]
  numbers = {n: v for n, v in stage.numbers(row.method).items() if isinstance(v, tuple)}
  found = []
  for shift in range(1, row.height):
    order = np.roll(np.arange(row.height), shift)
    turned = {n: x[order] for n, x in models.items()}
    own = [names[k] for k in order]
    aux = {n: [v[k] for k in order] for n, v in numbers.items()}
    if stage.ordered(row.method):
      small.same(merged(row, base, models, names=own), out)
    else:
      found.append(merged(row, base, turned, names=own, aux=aux))
  for other in found[1:]:
    small.same(other, found[0])


@pytest.mark.parametrize("name", [n for n in TABLE if TABLE[n].weights])
def test_weights_are_task_vectors_from_zero(name):
  row = TABLE[name]
  base, models, out = eager(name)
  models = {**models, "steps": np.stack([base["steps"]] * row.height)}
  found = jaxmerge.blend(row.method, models, **row.options())
  small.same(jax.tree.map(np.asarray, found), out)


@pytest.mark.parametrize("name", [n for n in TABLE if TABLE[n].homogeneous])
def test_twice_the_task_vectors_give_twice_the_result(name):
  row = TABLE[name]
  base, models, _ = eager(name)
  tau = {n: x - base[n][None] if x.dtype == np.float32 else x for n, x in models.items()}
  zero = jax.tree.map(np.zeros_like, base)
  once = merged(row, zero, tau)
  twice = merged(row, zero, {n: 2 * x for n, x in tau.items()})
  small.same(twice, {n: 2 * x for n, x in once.items()})


@rows
def test_second_value_of_a_number_does_not_compile_again(name):
  row = TABLE[name]
  base, models, _ = eager(name)
  size = memory._compiled._cache_size()
  for n, value in jaxmerge.stage.numbers(row.method).items():
    if n != "seed":
      merged(row, base, models, aux={n: jax.tree.map(lambda v: v / 2, value)})
  if row.seeded:
    merged(row, base, models, seed=2**32 - 1)
  assert memory._compiled._cache_size() == size
