"""Every method in every way to run it: one table.

The rows are the methods (`tests/support/methods_table.py`), each test is a column, of all rows or
of some (`tests/support/methods_columns.py`). Bits are compared wherever the sums are made in the
same order; elsewhere to `ATOL`, a few units in the last place of float32 weights near 1, and where
matrices are decomposed within the bound of `tests/support/rounding.py`. Those rows are marked
`kernels`, and have groups of their own.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
import small
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from marking import some_fast
from methods_columns import COLUMNS, EXCEPT, MAIN, METHOD
from methods_runs import (
  ATOL,
  GROUPS,
  alike,
  apart,
  bounds,
  drawn,
  eager,
  expected,
  far,
  few,
  marked,
  merged,
  numbers,
  of,
  program,
)
from methods_table import TABLE

import jaxmerge
from jaxmerge.catalog import lookup
from jaxmerge.core import stage
from jaxmerge.drivers import memory, streaming

# Variants share their stages with another row: with the slow tests. So do most programs of many.
rows = pytest.mark.parametrize("name", marked(TABLE, fast=MAIN))
groups = pytest.mark.parametrize("group", marked(GROUPS, fast=["average and on"]))


def check_each(names, check):
  """Checks every row; says of each that fails what it was."""
  failed = []
  for name in names:
    try:
      check(name)
    except AssertionError as e:
      failed.append(f"{name}: {e}")
  assert not failed, "\n\n".join(failed)


def test_each_method_is_in_each_column():
  """Or it is said why not."""
  assert lookup.METHODS.keys() == set(METHOD.values())
  assert COLUMNS.keys() == EXCEPT.keys()
  for column, names in COLUMNS.items():
    missing = lookup.METHODS.keys() - {METHOD[n] for n in names}
    reasons = EXCEPT[column]
    assert missing <= set().union(*reasons.values()), column
    assert all(own & missing for own in reasons.values()), column


@rows
def test_agrees_with_the_transcription(name):
  base, models, out = eager(name)
  small.close(out, expected(TABLE[name], base, models), bounds(name, small.ALL))


@rows
def test_agrees_with_the_transcription_on_random_trees(name):
  row = TABLE[name]

  kinds = ["large", "small", *([] if row.adam else ["one alone"])]
  kinds += [] if row.steep else ["sparse"]

  @settings(max_examples=5)
  @given(st.integers(0, 2**32 - 1), st.sampled_from(kinds))
  def agrees(seed, kind):
    base, models = drawn(row, seed, kind)
    limits = far(row, base, models)
    assume(rounding.well_posed(limits))
    limits = 1e-3 if row.steep else {n: x + 3 * ATOL for n, x in limits.items()}
    small.close(merged(row, base, models), expected(row, base, models), limits)

  agrees()


@rows
def test_low_ranks_and_leaves_that_no_model_changed(name):
  """Matrices of rank one, a frozen leaf, and a leaf that one model has left alone."""
  row = TABLE[name]
  base, models = drawn(row, 5, "large")
  rng, tall = np.random.default_rng(5), len(models["matrix"])
  left, right = rng.integers(-16, 17, size=(2, tall, 16)).astype(np.float32)
  low = base["matrix"] + left[:, :8, None] * right[:, None] / 2**10
  models = {**models, "matrix": low, "cube": np.stack([base["cube"]] * tall)}
  models["vector"] = np.concatenate([base["vector"][None], models["vector"][1:]])
  out = merged(row, base, models)
  assert all(np.isfinite(x).all() for x in out.values())
  if not row.steep and (row.one or "stock" in name):
    small.close(out, expected(row, base, models), 4 * ATOL)
  if not row.weights:
    np.testing.assert_array_equal(out["cube"], base["cube"])


@groups
def test_jit_agrees_with_the_transcription(group):
  """In one program with the others, and with numbers that are traced."""
  given, found = few(group)
  check_each(
    GROUPS[group],
    lambda n: small.close(
      found[n], expected(TABLE[n], *given[n][:2]), 1e-4 if TABLE[n].steep else bounds(n)
    ),
  )


@pytest.mark.kernels
@pytest.mark.parametrize(
  "name", marked(["average", "ties", "della", "tsv", "doge"], fast=["average", "ties", "della"])
)
def test_jit_gives_the_bits_of_eager(name):
  group = next(g for g, names in GROUPS.items() if name in names)
  (base, models, _), out = few(group)[0][name], few(group)[1][name]
  alike(name, merged(TABLE[name], base, models), out)


@pytest.mark.slow
@pytest.mark.parametrize("group", marked(GROUPS))
def test_vmap_over_numbers_is_a_loop_and_grad_is_the_slope(group):
  """The merged task vector is linear in the scale, so its slope is a difference quotient.

  Without a scale the task vectors are stretched: each method is linear in that, near every point.
  Where they are stretched to nothing, norms, cosines and shares have no gradient; that must not
  make one NaN.
  """
  names = GROUPS[group]
  given, _ = few(group)
  probe = np.cos(np.arange(128, dtype=np.float32)).reshape(8, 16)
  half = np.array([0.25, 0.5, 2.0, 0.5], np.float32)
  ones = np.array([1.0, 1.0, 1.0, 0.0], np.float32)
  scaled = {n: "scale" in given[n][2] for n in names}

  def stretched(n, factor):
    base, models, _ = given[n]
    zero = {m: x[None] for m, x in base.items()}
    return {m: x if m == "steps" else zero[m] + factor * (x - zero[m]) for m, x in models.items()}

  def aux_of(n, i):
    """The numbers of a case; that at the base has those of the first."""
    vary = {m: np.asarray(v[i % 3], np.float32) for m, v in TABLE[n].vary.items()}
    own = {m: v for m, v in given[n][2].items() if m not in vary}
    return {**own, **vary, **({"scale": half[i]} if scaled[n] else {})}

  def probed(n, scale, stretch, hparams):
    base = given[n][0]
    hparams = {**hparams, **({"scale": scale} if scaled[n] else {})}
    out = jaxmerge.merge(
      TABLE[n].method, stretched(n, stretch), base, hparams=hparams, **TABLE[n].options()
    )
    return jnp.sum((out["matrix"] - base["matrix"]) * probe), out

  factors = {n: (half, ones) if scaled[n] else (half, half * ones) for n in names}
  auxes = {
    n: jax.tree.map(lambda *x: np.stack(x), *(aux_of(n, i) for i in range(4))) for n in names
  }

  @jax.jit
  def every(factors, auxes):
    return {
      n: jax.vmap(jax.value_and_grad(functools.partial(probed, n), argnums=(0, 1), has_aux=True))(
        *factors[n], auxes[n]
      )
      for n in names
    }

  both = jax.device_get(every(factors, auxes))
  run = program(tuple(names))
  alone = []
  for i in range(3):
    near = {n: given[n][1] if scaled[n] else stretched(n, half[i]) for n in names}
    alone.append(run({n: (given[n][0], near[n], aux_of(n, i)) for n in names}))

  def check(n):
    (values, outs), slopes = both[n]
    for i in range(3):
      own = {m: x[i] for m, x in outs.items()}
      small.close(own, alone[i][n], apart(n))
      if n != "nearswap":
        slope = slopes[0 if scaled[n] else 1][i]
        np.testing.assert_allclose(slope * half[i], values[i], atol=1e-5)
    # Of decompositions with equal singular values the models have no gradient, but at the base.
    assert np.isfinite(slopes[0]).all()
    assert np.isfinite(slopes[1][3])

  check_each(names, check)


# Devices along tasks, rows and columns; the second where the tasks cannot be shared out evenly.
LAYOUTS = {
  "rows": ((1, 4, 1), None, AxisType.Auto),
  "columns": ((1, 1, 2), None, AxisType.Auto),
  "tasks": ((8, 1, 1), None, AxisType.Auto),
  "explicit": ((2, 2, 2), (1, 4, 2), AxisType.Explicit),
}


@pytest.mark.parametrize("layout", some_fast(LAYOUTS, ["explicit"]))
@groups
def test_two_four_and_eight_devices(group, layout):
  """Equal bits where each device sums over all models and no float is summed over entries.

  On the axis of tasks lie eight models, where a method takes as many. Entries are entries, by
  column as by row; methods of entries are run where all axes are shared.
  """
  sides, other, kind = LAYOUTS[layout]
  count = math.prod(sides)
  columns = {"columns": "devices by columns", "tasks": "devices by tasks, eight models"}
  names = of(group, columns.get(layout, "devices by rows"))
  names = GROUPS[group] if layout == "explicit" else names
  if not names:
    return
  given, out = few(group)
  if layout == "tasks":
    given = {n: (*TABLE[n].trees(small.FEW, 8), numbers(n, 8)) for n in names}
    out = {n: expected(TABLE[n], *given[n][:2]) for n in names}
  placed = {"axis_types": (kind,) * 3, "devices": jax.devices()[:count]}
  meshes = {
    s: jax.make_mesh(s, ("task", "row", "column"), **placed)
    for s in (sides, other)
    if s is not None
  }

  def spread(name, mesh):
    base, models, hparams = given[name]

    def put(x, *axes):
      return jax.device_put(x, NamedSharding(mesh, P(*axes[: x.ndim])))

    def every(tree, *lead):
      axes = {"matrix": ("row", "column"), "steps": ()}
      return {n: put(x, *lead, *axes[n]) for n, x in tree.items()}

    return every(base), every(models, "task"), hparams

  found = {}
  for side, mesh in meshes.items():
    own = tuple(
      n for n in names if (side == sides) == (TABLE[n].height % sides[0] == 0 or layout == "tasks")
    )
    if not own:
      continue
    with jax.set_mesh(mesh):
      spreads = {n: spread(n, mesh) for n in own}

      @jax.jit
      def run(spreads):
        return {
          n: jaxmerge.merge(TABLE[n].method, models, base, hparams=hparams, **TABLE[n].options())
          for n, (base, models, hparams) in spreads.items()
        }

      found.update(run(spreads))

  def check(n):
    assert found[n]["matrix"].sharding.num_devices == count
    if kind == AxisType.Explicit:
      assert jax.typeof(found[n]["matrix"]).sharding.spec == P("row", "column")
    if layout == "tasks" and TABLE[n].steep:  # Beside the transcription.
      small.close(jax.device_get(found[n]), out[n], 1e-4)
    elif sides[0] > 1 or TABLE[n].summed:
      small.close(jax.device_get(found[n]), out[n], apart(n))
    else:
      small.same(jax.device_get(found[n]), out[n])

  check_each(names, check)


SLICED = ("average", "ties", "dare, inverse", "breadcrumbs by row")


@pytest.mark.kernels
@pytest.mark.parametrize("name", marked(COLUMNS["slices"], fast=SLICED))
def test_slices_give_the_bits_of_whole_leaves(name):
  """Slices of three rows and of two; methods of entries get them in one row."""
  row = TABLE[name]
  group = next(g for g, names in GROUPS.items() if name in names)
  base, models, _ = few(group)[0][name]
  found = streaming.merge_slices(row.method, models, base, entries=48, **row.options())
  alike(name, found, few(group)[1][name])


@pytest.mark.slow
@pytest.mark.kernels
def test_two_layouts_give_one_model():
  """Files have [out, in], Flax kernels [in, out]; attention kernels have three axes.

  Random masks are those of an entry's place in the matrix, hence the same.
  """
  names = [n for n in COLUMNS["two layouts"] if n in MAIN]
  shown = {
    "oi": lambda x: x.swapaxes(-1, -2),
    "io": lambda x: x,
    "ioo": lambda x: x.reshape(*x.shape[:-1], 4, 4),
    "iio": lambda x: x.reshape(*x.shape[:-2], 2, 4, 16),
  }
  trees = {n: TABLE[n].trees(("matrix",)) for n in names}  # [in, out]

  @jax.jit
  def run(trees):
    return {
      n: {
        view: jaxmerge.merge(
          TABLE[n].method, *jax.tree.map(show, own)[::-1], **TABLE[n].options(layout=(("m", view),))
        )["matrix"]
        for view, show in shown.items()
      }
      for n, own in trees.items()
    }

  found = jax.device_get(run(jax.tree.map(jnp.asarray, trees)))

  def check(n):
    assert np.abs(found[n]["io"] - trees[n][0]["matrix"]).max() > 1e-3
    for view in found[n].keys() - {"io"}:
      own, expected = found[n][view], shown[view](found[n]["io"])
      limit = max(4 * ATOL, rounding.twice(bounds(n, ("matrix",)))["matrix"])
      np.testing.assert_allclose(own, expected, rtol=0, atol=limit, err_msg=view)

  check_each(names, check)


@pytest.mark.slow
@pytest.mark.parametrize("group", marked(GROUPS))
def test_bfloat16_in_and_out(group):
  """Computed in float32 and rounded once: the bits of the float32 merge, rounded."""
  names = tuple(GROUPS[group])  # Those of `few`, whose program they use.
  low = lambda x: np.asarray(x, jnp.bfloat16) if x.dtype == np.float32 else x  # noqa: E731
  wide = lambda x: np.asarray(x, np.float32) if x.dtype == jnp.bfloat16 else x  # noqa: E731
  given, _ = few(group)
  lows = {n: (*jax.tree.map(low, given[n][:2]), given[n][2]) for n in names}
  wides = {n: (*jax.tree.map(wide, lows[n][:2]), given[n][2]) for n in names}
  found, out = program(names)(lows), program(names)(wides)
  check_each(names, lambda n: small.same(found[n], jax.tree.map(low, out[n])))


@functools.cache
def ones(group):
  """The rows of a group that take one model, and their arguments."""
  names = tuple(of(group, "one model"))
  return names, {n: (*TABLE[n].trees(small.FEW, 1), numbers(n, 1)) for n in names}


@pytest.mark.slow
@pytest.mark.parametrize("group", marked(GROUPS))
def test_one_task(group):
  names, given = ones(group)
  found = program(names)(given)
  check_each(
    names, lambda n: small.close(found[n], expected(TABLE[n], *given[n][:2]), bounds(n, height=1))
  )


@pytest.mark.parametrize("name", [n for n in TABLE if lookup.entry(METHOD[n]).models[0] > 1])
def test_more_than_one_task_is_asked_for(name):
  with pytest.raises(ValueError, match=r"models?, got 1|there are 1 models"):
    merged(TABLE[name], *TABLE[name].trees(small.FEW, 1))


# With these numbers nothing is pruned, left out or weighed.
WHOLE = {"scale": 1, "density": 1, "keep": 1, "calibrated": 1} | dict.fromkeys(
  ("drop_rate", "remove", "prune_ratio", "threshold", "least", "boost", "rank_tol"), 0
)


@pytest.mark.slow
@groups
def test_one_model_comes_back(group):
  """Where nothing is pruned, at scale 1; of a method that takes more, from copies of it."""

  def whole(n, hparams):
    return {m: np.full_like(v, WHOLE[m]) if m in WHOLE else v for m, v in hparams.items()}

  names, given = ones(group)
  found = program(names)(
    {n: (base, own, whole(n, hparams)) for n, (base, own, hparams) in given.items()}
  )
  for n in [n for n in of(group, "one model comes back") if n not in names]:
    base, own, _ = eager(n)
    given[n] = (base, {m: np.stack([x[0]] * len(x)) for m, x in own.items()}, None)
    found[n] = merged(TABLE[n], *given[n][:2], hparams=whole(n, numbers(n)))

  def check(n):
    base, models, _ = given[n]
    own = {m: x[0] if m != "steps" else base[m] for m, x in models.items()}
    small.close(found[n], own, ATOL)
    assert np.abs(found[n]["matrix"] - base["matrix"]).max() > 0.1

  check_each(of(group, "one model comes back"), check)


@rows
def test_empty_task_vectors_give_the_base(name):
  base, models, _ = eager(name)
  same = {n: np.stack([base[n]] * len(x)) for n, x in models.items()}
  small.same(merged(TABLE[name], base, same), base)


def test_a_method_that_acts_on_no_leaf_merges_none():
  """Several models are left then, and the leaf is named; a single one passes by as it is."""

  def check(n):
    row = TABLE[n]
    none = stage.masked(row.method, lambda leaf: False)
    base, models = row.trees(small.ALL)
    if row.height == 1:
      own = jaxmerge.merge(none, models, base, **row.options())
      small.close(own, {m: x[0] if m != "steps" else base[m] for m, x in models.items()})
      return
    for merge in (jaxmerge.merge, streaming.merge_slices):
      with pytest.raises(ValueError, match=f"no combiner touched leaf '.*': {row.height} models"):
        merge(none, models, base, **row.options())

  check_each(TABLE, check)


def test_beside_another_a_method_that_acts_on_no_leaf_does_nothing():
  """One of matrices, which can tell that it has none, is an error."""
  first = stage.pointwise(lambda x: x[:1], combines=True)
  both = {
    n: stage.chain(stage.masked(r.method, lambda leaf: False), first) for n, r in TABLE.items()
  }
  given = {n: r.trees(small.FEW) for n, r in TABLE.items()}
  for name in [n for n, r in TABLE.items() if any(step.unit == "matrix" for step in r.method)]:
    with pytest.raises(ValueError, match="restricted to leaves of which there are none"):
      jaxmerge.merge(both[name], *given.pop(name)[::-1], **TABLE[name].options())
  assert len(given) < len(both)

  @jax.jit
  def run(given):
    return {
      n: jaxmerge.merge(both[n], *own[::-1], **TABLE[n].options()) for n, own in given.items()
    }

  found = jax.device_get(run(given))
  for n, (base, models) in given.items():
    zero = base["matrix"]
    small.same(found[n], {**base, "matrix": zero + (models["matrix"][0] - zero)})


@rows
def test_inputs_are_left_alone_and_give_the_same_bits_again(name):
  base, models, out = eager(name)
  before = jax.tree.map(np.copy, (base, models))
  small.same(merged(TABLE[name], base, models), out)
  small.same(base, before[0])
  small.same(models, before[1])


@pytest.mark.parametrize(
  "name", marked([n for n in COLUMNS["any order"] if not TABLE[n].seeded], fast=MAIN)
)
def test_order_does_not_matter_to_a_method(name):
  base, models, out = eager(name)
  order = np.array([2, 0, 3, 1]) if TABLE[name].height == 4 else np.arange(TABLE[name].height)[::-1]
  turned = {n: x[order] for n, x in models.items()}
  hparams = {
    n: [v[k] for k in order]
    for n, v in stage.hparams(TABLE[name].method).items()
    if isinstance(v, tuple)
  }
  small.close(merged(TABLE[name], base, turned, hparams=hparams), out, apart(name, small.ALL))


SEEDED = [n for n in COLUMNS["any order"] if TABLE[n].seeded and n in MAIN]


@pytest.mark.parametrize("name", ["average", "ties by leaf, exact, l1", *SEEDED, "iso_c", "magmax"])
def test_named_models_give_the_same_bits_in_any_order(name):
  """The driver's doing; methods to which the order matters get it as it is."""
  row = TABLE[name]
  base, models = row.trees(small.FEW)
  own = {n: v for n, v in stage.hparams(row.method).items() if isinstance(v, tuple)}
  found = []
  for shift in range(1, row.height):
    order = np.roll(np.arange(row.height), 0 if stage.ordered(row.method) else shift)
    turned = {n: x[order] for n, x in models.items()}
    hparams = {n: [v[k] for k in order] for n, v in own.items()}
    found.append(merged(row, base, turned, names=[small.NAMES[k] for k in order], hparams=hparams))
  for other in found[1:]:
    small.same(other, found[0])


@pytest.mark.parametrize("name", marked([n for n in TABLE if TABLE[n].weights], fast=MAIN))
def test_weights_are_task_vectors_from_zero(name):
  row = TABLE[name]
  base, models, out = eager(name)
  models = {**models, "steps": np.stack([base["steps"]] * row.height)}
  found = jax.tree.map(np.asarray, jaxmerge.merge(row.method, models, **row.options()))
  # Sums of floats are added as each program does: a coefficient may differ in its last bit.
  sums = any(isinstance(s, stage.Sum) for step in row.method for s in step.reductions)
  small.close(found, out, 4 * rounding.EPS) if sums else small.same(found, out)


@rows
def test_a_multiple_of_the_task_vectors_gives_that_multiple_of_the_result(name):
  """Bit for bit, of numbers from 1e-30 to 1e36; or else a row says that it is not homogeneous."""
  row = TABLE[name]
  base, models, _ = eager(name)
  tau = {n: x - base[n][None] if x.dtype == np.float32 else x for n, x in models.items()}
  zero = jax.tree.map(np.zeros_like, base)
  once = merged(row, zero, tau)

  def times(factor, tree):
    return {n: x * np.float32(factor) if x.dtype == np.float32 else x for n, x in tree.items()}

  for factor in row.times if row.homogeneous else (8,):
    found, out = merged(row, zero, times(factor, tau)), times(factor, once)
    if row.homogeneous:
      small.same(found, out)
    else:
      assert max(np.abs(x - out[n]).max() for n, x in found.items()) > 10 * ATOL


@rows
def test_second_value_of_a_number_does_not_compile_again(name):
  row = TABLE[name]
  base, models, _ = eager(name)
  size = memory._compiled._cache_size()
  for n, value in jaxmerge.core.stage.hparams(row.method).items():
    if n != "seed":
      merged(row, base, models, hparams={n: jax.tree.map(lambda v: v / 2, value)})
  if row.seeded:
    merged(row, base, models, seed=2**32 - 1)
  assert memory._compiled._cache_size() == size


EMPTY = ["average", "ties", "tsv", "opcm"]


@pytest.mark.parametrize("name", EMPTY)
def test_matrices_without_columns_are_passed_by(name):
  row = TABLE[name]
  base = {"none": np.zeros((3, 0), np.float32), "one": np.ones((2, 2), np.float32)}
  models = {n: np.stack([x + k for k in range(row.height)]) for n, x in base.items()}
  options = row.options(layout=(("n", "oi"),))
  out = merged(row, base, models, layout=options["layout"])
  found = streaming.merge_slices(row.method, models, base, **options)
  assert out["none"].shape == found["none"].shape == (3, 0)
  small.close(found, out)
