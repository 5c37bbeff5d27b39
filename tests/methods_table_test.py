"""Every method in every way to run it: one table.

The rows are the methods, each test is a column. Bits are compared wherever the sums are made in
the same order; elsewhere to `ATOL`, a few units in the last place of float32 weights near 1.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import small
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxmerge
from jaxmerge import memory, methods, streaming

ATOL = 2e-6


class Row(NamedTuple):
  """A method and what is known of it.

  Attributes:
    method: the method.
    oracle: (task vectors, keep masks) -> merged task vector, by the transcription in NumPy.
    vary: values of its numbers besides the scale, to vectorise over.
    seeded: it needs a seed.
    summed: it measures sums of floats, whose last bits depend on how leaves are cut.
    symmetric: the order of the models does not matter.
    height: number of models.
  """

  method: tuple
  oracle: object
  vary: dict
  seeded: bool = False
  summed: bool = False
  symmetric: bool = True
  height: int = 4

  def options(self, **more):
    return {**({"seed": 11} if self.seeded else {}), "layout": small.VIEWS, **more}


WEIGHT = (1.0, 0.5, 2.0, 1.5)
RATE = 0.4


def _ties(*args, **options):
  density, scale = 0.3, 0.5
  return Row(
    methods.ties(density, scale, *args, **options),
    lambda taus, keep: oracles.ties(taus, density, scale, *args, **options),
    {"density": (0.3, 0.7, 1.0)},
  )


def _dare(rescale):
  return Row(
    methods.dare(RATE, 0.5, rescale=rescale),
    lambda taus, keep: oracles.weighted_sum(
      oracles.dare(taus, keep, RATE, rescale), np.ones(len(taus)), 0.5
    ),
    {"drop_rate": (0.0, 0.3, 1.0)},
    seeded=True,
    summed=rescale in ("l1", "l2"),
  )


def _breadcrumbs(scope):
  return Row(
    methods.breadcrumbs(0.5, 0.2, 0.5, scope),
    lambda taus, keep: oracles.breadcrumbs(taus, 0.5, 0.2, 0.5, scope, small.VIEWS),
    {"keep": (0.5, 0.3, 1.0), "remove": (0.1, 0.0, 0.7)},
  )


TABLE = {
  "average": Row(
    methods.average(WEIGHT),
    lambda taus, keep: oracles.average(taus, WEIGHT[: len(taus)]),
    {"weight": (WEIGHT, (1.0, 0.0, 0.0, 0.0), (1.0, 1.0, 1.0, 1.0))},
  ),
  "task_arithmetic": Row(
    methods.task_arithmetic(0.5, WEIGHT),
    lambda taus, keep: oracles.weighted_sum(taus, WEIGHT[: len(taus)], 0.5),
    {"weight": (WEIGHT, (1.0, 0.0, 0.0, 0.0), (-1.0, 1.0, 1.0, 2.0))},
  ),
  "negation": Row(
    methods.negation(0.5),
    lambda taus, keep: oracles.weighted_sum(taus, [-1] * len(taus), 0.5),
    {},
  ),
  "analogy": Row(
    methods.analogy(0.5),
    lambda taus, keep: oracles.weighted_sum(taus, (-1, 1, 1), 0.5),
    {},
    symmetric=False,
    height=3,
  ),
  "ties": _ties(),
  "ties by leaf, exact": _ties(scope="leaf", rule="exact"),
  "ties, sum": _ties(reduce="sum"),
  "ties, max": _ties(reduce="max", zero_sum="plus"),
  **{f"dare, {rescale}": _dare(rescale) for rescale in ("inverse", "l1", "l2", "linf", None)},
  "dare_ties": Row(
    methods.dare_ties(RATE, 0.3, 0.5),
    lambda taus, keep: oracles.ties(oracles.dare(taus, keep, RATE, "inverse"), 0.3, 0.5),
    {"drop_rate": (0.0, 0.3, 0.8), "density": (0.3, 0.7, 1.0)},
    seeded=True,
  ),
  **{f"breadcrumbs by {scope}": _breadcrumbs(scope) for scope in ("tree", "leaf", "row")},
}
# These share their stages with other rows; their columns that compile anew are marked slow.
SLOW = {"ties, sum", "ties, max", "dare_ties", "breadcrumbs by tree"}
rows = pytest.mark.parametrize("name", TABLE)
rows_slow = pytest.mark.parametrize(
  "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in TABLE]
)


@functools.cache
def eager(name, leaves=small.ALL):
  """What every column compares with: (base, models, merged), whole and on one device."""
  row = TABLE[name]
  base, models = small.trees(leaves, height=row.height)
  return base, models, merged(row, base, models)


def merged(row, base, models, **options):
  return jax.tree.map(
    np.asarray, jaxmerge.merge(row.method, base, models, **row.options(**options))
  )


def keep_masks(models, names=None):
  """What the masks of a seeded method keep: a transcription of the hash."""
  height = len(models["matrix"])
  names = [str(k) for k in range(height)] if names is None else names
  shapes = {n: x.shape[1:] for n, x in models.items()}
  return [
    {n: oracles.uniform(11, n, model, s) >= np.float32(RATE) for n, s in shapes.items()}
    for model in names
  ]


def expected(row, base, models):
  """Base plus the transcription's task vector; integers are the base's."""
  tau = row.oracle(oracles.deltas(base, models), keep_masks(models))
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
  (small.close if TABLE[name].summed else small.same)(found, out)


@rows
def test_vmap_over_numbers_is_a_loop_and_grad_is_the_slope(name):
  """The merged task vector is linear in the scale, so its slope is a difference quotient."""
  row = TABLE[name]
  base, models, _ = eager(name, small.FEW)
  numbers = {n: np.asarray(v, np.float32) for n, v in row.vary.items()}
  if name != "average":
    numbers["scale"] = np.array([0.25, 0.5, 2.0], np.float32)
  probe = np.cos(np.arange(128, dtype=np.float32)).reshape(8, 16)

  def probed(free, fixed):
    out = jaxmerge.merge(row.method, base, models, aux={**free, **fixed}, **row.options())
    return jnp.sum((out["matrix"] - base["matrix"]) * probe), out

  free = {n: numbers.pop(n) for n in ("scale",) if n in numbers} or {
    "weight": numbers.pop("weight")
  }
  both = jax.vmap(jax.value_and_grad(probed, has_aux=True))
  (values, outs), slopes = both(free, numbers)
  for i in range(3):
    one = {n: v[i].tolist() for n, v in {**free, **numbers}.items()}
    alone = merged(row, base, models, aux=one)
    small.close({n: x[i] for n, x in outs.items()}, alone, 1e-6)
    if name == "average":
      tau = models["matrix"] - base["matrix"]
      own = (probe * (tau - (alone["matrix"] - base["matrix"]))).sum(axis=(1, 2))
      np.testing.assert_allclose(slopes["weight"][i], own / sum(one["weight"]), atol=1e-5)
    else:
      np.testing.assert_allclose(slopes["scale"][i] * one["scale"], values[i], atol=1e-5)


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
  if sides[0] > 1 and row.height == 3:
    sides = (1, 8, 1)
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
    small.close(jax.device_get(found), out, ATOL)
  else:
    small.same(jax.device_get(found), out)


@pytest.mark.parametrize("entries", [1, 80])
@rows_slow
def test_slices_give_the_bits_of_whole_leaves(name, entries):
  """Slices of one row, and of five and three."""
  row = TABLE[name]
  base, models, out = eager(name, small.FEW)
  found = streaming.merge_slices(row.method, base, models, entries=entries, **row.options())
  (small.close if row.summed else small.same)(found, out)


@rows_slow
def test_bfloat16_in_and_out(name):
  """Computed in float32 and rounded once: the bits of the float32 merge, rounded."""
  row = TABLE[name]
  base, models = small.trees(small.FEW, height=row.height)
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
  if name == "analogy":
    pytest.skip("an analogy is of three models")
  base, models = small.trees(small.FEW, height=1)
  aux = {"weight": 1.0} if "weight" in row.vary else {}
  out = merged(row, base, models, aux=aux)
  small.close(out, expected(row, base, models), ATOL)


@rows
def test_empty_task_vectors_give_the_base(name):
  base, models, _ = eager(name)
  same = {n: np.stack([base[n]] * len(x)) for n, x in models.items()}
  small.same(merged(TABLE[name], base, same), base)


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
  base, models, _ = eager(name, small.FEW)
  names = small.NAMES[: row.height]
  weight = dict(zip(names, row.vary["weight"][0], strict=True)) if "weight" in row.vary else None
  if name == "analogy":
    weight = dict(zip(names, (-1.0, 1.0, 1.0), strict=True))
  found = []
  for shift in range(1, row.height):
    order = np.roll(np.arange(row.height), shift)
    turned = {n: x[order] for n, x in models.items()}
    own = [names[k] for k in order]
    aux = {} if weight is None else {"weight": [weight[n] for n in own]}
    found.append(merged(row, base, turned, names=own, aux=aux))
  for other in found[1:]:
    small.same(other, found[0])


@rows
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
