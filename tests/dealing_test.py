"""Matrices dealt over devices: the results of one device, and a share of the work for each."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxmerge
from jaxmerge import dealing, methods, views

SHAPES = {"a": (8, 16), "b": (8, 16), "cube": (3, 8, 16), "wide": (16, 8), "bias": (16,)}
VIEWS = (("^(a|b|wide)$", "io"), ("cube", "bio"))
AXES = {"a": P("x"), "b": P(None, "x"), "cube": P(None, "x"), "wide": P("x"), "bias": P("x")}


def trees():
  draw = np.random.default_rng(0).normal
  base = {n: draw(size=s).astype(np.float32) for n, s in SHAPES.items()}
  models = {n: x[None] + draw(size=(4, *x.shape)).astype(np.float32) / 8 for n, x in base.items()}
  return base, models


def hands(**views_of):
  """Leaves with a number of their own each."""
  base, models = trees()
  return {
    name: dealing.Hand(jnp.asarray(models[name]), jnp.asarray(base[name]), view, np.float32(k))
    for k, (name, view) in enumerate(views_of.items())
  }


def rule(x, base, number):
  return x[:1] * number + base[None] @ jnp.ones((x.shape[2], x.shape[2]), x.dtype)[None]


def test_each_matrix_gets_its_own_and_comes_back():
  """Five matrices of one shape in three leaves, and one of another, over eight devices."""
  given = hands(a="io", b="io", cube="bio", wide="io")
  mesh = jax.make_mesh((2, 4), ("task", "x"))
  found = dealing.dealt(rule, given, dealing.Deal(mesh))
  for name, h in given.items():
    alone = views.by_matrix(lambda x, base, h=h: rule(x, base, h.more), h.x, h.base, h.view)
    np.testing.assert_allclose(found[name], alone, rtol=1e-6, atol=1e-6)


def test_no_device_works_on_more_than_its_share():
  """Of six matrices, over four devices, each works on two."""
  x = np.ones((3, 6, 8, 16), np.float32)
  mesh = jax.make_mesh((4,), ("x",), devices=jax.devices()[:4])
  deal = dealing.Deal(mesh)

  def merged(x):
    hand = dealing.Hand(x, None, "bio", ())
    return dealing.dealt(lambda x, base, more: x[:1], {"w": hand}, deal)["w"]

  text = str(jax.make_jaxpr(merged)(x))
  assert re.search(r"shard_map", text)
  assert re.search(r"f32\[2,3,16,8\]", text)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
  "name", ["iso_c", *(pytest.param(n, marks=pytest.mark.slow) for n in ("tsv", "wudi"))]
)
def test_sharded_trees_merge_as_on_one_device(name, kind):
  """To a few units in the last place: products around a decomposition are compiled apart."""
  every = {"wudi": methods.wudi(0.5, 1e-4, 20), "tsv": methods.tsv(), "iso_c": methods.iso_c()}
  method = every[name]
  base, models = trees()
  out = jaxmerge.merge(method, base, models, layout=VIEWS)
  mesh = jax.make_mesh((2, 4), ("task", "x"), axis_types=(kind,) * 2)
  with jax.set_mesh(mesh):
    own = {n: jax.device_put(x, NamedSharding(mesh, AXES[n])) for n, x in base.items()}
    stacks = {
      n: jax.device_put(x, NamedSharding(mesh, P("task", *AXES[n]))) for n, x in models.items()
    }
    found = jaxmerge.merge(method, own, stacks, layout=VIEWS)
  for leaf, x in out.items():
    np.testing.assert_allclose(np.asarray(found[leaf]), np.asarray(x), rtol=0, atol=2e-6)
