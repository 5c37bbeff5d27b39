"""Matrices distributed over devices: the results of one device, each works on its share."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxmerge
from jaxmerge import methods
from jaxmerge.catalog import lookup
from jaxmerge.core import matrix_views
from jaxmerge.drivers import distributed_matrices

pytestmark = pytest.mark.kernels
SHAPES = {"a": (8, 16), "b": (8, 16), "cube": (3, 8, 16), "wide": (16, 8), "bias": (16,)}
VIEWS = (("^(a|b|wide)$", "io"), ("cube", "bio"))
AXES = {"a": P("x"), "b": P(None, "x"), "cube": P(None, "x"), "wide": P("x"), "bias": P("x")}


def trees():
  draw = np.random.default_rng(0).normal
  base = {n: draw(size=s).astype(np.float32) for n, s in SHAPES.items()}
  models = {n: x[None] + draw(size=(4, *x.shape)).astype(np.float32) / 8 for n, x in base.items()}
  return base, models


def leaves(**views_of):
  """Leaves with a number of their own each."""
  base, models = trees()
  return {
    name: distributed_matrices.LeafMatrices(
      jnp.asarray(models[name]), jnp.asarray(base[name]), view, np.float32(k)
    )
    for k, (name, view) in enumerate(views_of.items())
  }


def rule(x, base, number, each):
  return x[:1] * number + base[None] @ jnp.ones((x.shape[2], x.shape[2]), x.dtype)[None]


@pytest.mark.slow
def test_each_matrix_gets_its_own_and_comes_back():
  """Five matrices of one shape in three leaves, and one of another, over eight devices."""
  given = leaves(a="io", b="io", cube="bio", wide="io")
  mesh = jax.make_mesh((2, 4), ("task", "x"))
  found = distributed_matrices.map_matrices(rule, given, distributed_matrices.Distribution(mesh))
  for name, h in given.items():
    alone = matrix_views.by_matrix(
      lambda x, base, _, h=h: rule(x, base, h.more, ()), h.x, h.base, h.view
    )
    np.testing.assert_allclose(found[name], alone, rtol=1e-6, atol=1e-6)


def test_no_device_works_on_more_than_its_share():
  """Of six matrices, over four devices, each works on two."""
  x = np.ones((3, 6, 8, 16), np.float32)
  mesh = jax.make_mesh((4,), ("x",), devices=jax.devices()[:4])
  distribution = distributed_matrices.Distribution(mesh)

  def merged(x):
    hand = distributed_matrices.LeafMatrices(x, None, "bio", ())
    return distributed_matrices.map_matrices(
      lambda x, base, more, each: x[:1], {"w": hand}, distribution
    )["w"]

  text = str(jax.make_jaxpr(merged)(x))
  assert re.search(r"shard_map", text)
  assert re.search(r"f32\[2,3,16,8\]", text)


KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
EVERY = {
  "iso_c": methods.iso_c(),
  "iso_cts": methods.iso_cts(common=0.4),
  "tsv": methods.tsv(),
  "drm": methods.drm(),
  "lore": methods.lore(mu=0.3, relative=True, sweeps=2),
  "opcm": methods.opcm(),
  "widen": methods.widen(),
  "wudi": methods.wudi(0.5, 1e-4, 20),
  "optmerge": methods.optmerge(0.5, "full", 1e-4, 20),
  "doge": methods.doge(learning_rate=1e-3, steps=20),
}


def merged(names, base, models):
  return {
    n: jaxmerge.merge(
      EVERY[n],
      models,
      base,
      layout=tuple(v for v in VIEWS if any(re.search(v[0], n) for n in base)),
    )
    for n in names
  }


def sharded(kind, few=tuple(SHAPES)):
  """A mesh, and the trees on it: models along tasks, matrices along rows or columns."""
  mesh = jax.make_mesh((2, 4), ("task", "x"), axis_types=(kind,) * 2)
  base, models = ({n: tree[n] for n in few} for tree in trees())
  own = {n: jax.device_put(x, NamedSharding(mesh, AXES[n])) for n, x in base.items()}
  stacks = {
    n: jax.device_put(x, NamedSharding(mesh, P("task", *AXES[n]))) for n, x in models.items()
  }
  return mesh, own, stacks


def alike(found, out):
  """To a few units in the last place: products around a decomposition are compiled apart."""
  for name, tree in out.items():
    for leaf, x in tree.items():
      close = np.testing.assert_allclose
      close(np.asarray(found[name][leaf]), x, rtol=0, atol=2e-6, err_msg=f"{name}, {leaf}")


@KINDS
def test_sharded_trees_merge_as_on_one_device(kind):
  mesh, own, stacks = sharded(kind)
  with jax.set_mesh(mesh):
    found = merged(["iso_c"], own, stacks)
  alike(found, jax.device_get(merged(["iso_c"], *trees())))


@functools.cache
def alone():
  """Every method on one device, in one program."""
  base, models = ({n: tree[n] for n in ("cube", "bias")} for tree in trees())
  return jax.device_get(jax.jit(functools.partial(merged, tuple(EVERY)))(base, models))


@pytest.mark.slow
@KINDS
def test_every_method_of_matrices_merges_alike_where_they_are_distributed(kind):
  """In a caller's program, which knows the devices by types alone."""
  assert {n for n, e in lookup.METHODS.items() if e.unit == "matrix"} == EVERY.keys()
  _, own, stacks = sharded(kind, ("cube", "bias"))
  program = jax.jit(functools.partial(merged, tuple(EVERY)))
  alike(jax.device_get(program(own, stacks)), alone())


def count_distributed(f, *given, mesh=None):
  """How many sharded parts the program of f has."""
  with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
    return str(jax.make_jaxpr(f)(*given)).count("shard_map")


@KINDS
def test_a_program_of_the_caller_distributes_where_it_knows_the_mesh(kind):
  """By the types of what it is given, or by the context."""
  mesh, own, stacks = sharded(kind)
  program = jax.jit(functools.partial(merged, ["iso_c"]))
  assert count_distributed(program, own, stacks, mesh=mesh)
  assert count_distributed(program, own, stacks) or kind == AxisType.Auto
  assert bool(count_distributed(program, *trees(), mesh=mesh)) == (kind == AxisType.Auto)
  assert not count_distributed(program, *trees())


@KINDS
def test_nothing_is_distributed_where_axes_are_taken(kind):
  """A shard_map inside of another takes no axis twice; nor does one under a vmap over a shard."""
  mesh, own, _ = sharded(kind)
  run = functools.partial(merged, ["iso_c"])
  mapped = jax.shard_map(run, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
  assert count_distributed(mapped, *trees()) == 1
  if kind == AxisType.Explicit:
    many = {
      n: jax.device_put(np.stack([x] * 2), NamedSharding(mesh, P("task")))
      for n, x in trees()[1].items()
    }
    for each in (run, jax.jit(run)):
      assert not count_distributed(jax.vmap(each, (None, 0)), own, many)


def test_axes_of_two_kinds_are_left_to_the_compiler():
  kinds = (AxisType.Explicit, AxisType.Auto)
  mesh = jax.make_mesh((2, 4), ("task", "x"), axis_types=kinds)
  x = jax.device_put(np.ones((4, 8, 16), np.float32), NamedSharding(mesh, P("task")))
  assert distributed_matrices.of([x], chains=False).mesh is None
