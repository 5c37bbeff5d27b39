"""Model Breadcrumbs: which entries of a leaf, or a row, remain."""

import jax.numpy as jnp
import numpy as np
import pytest
from example import TAU, close, merged
from reference import basics

import jaxmerge
from jaxmerge import methods


@pytest.mark.parametrize("scope", ["tree", "leaf", "row"])
def test_breadcrumbs_keeps_the_middle(scope):
  method = methods.breadcrumbs(keep=0.5, remove=0.2, scale=1.0, scope=scope)
  close(merged(method, TAU[:1]), [0, 0, 0.4, 0, -0.6, 0.2])


def test_breadcrumbs_removing_nothing_trims():
  """A share of the largest that rounds to none leaves the others, not an empty slice."""
  method = methods.breadcrumbs(keep=0.5, remove=0.01, scale=1.0)
  close(merged(method, TAU[:1]), [0.9, 0, 0.4, 0, -0.6, 0])


@pytest.mark.parametrize("scope", ["tree", "leaf", "row"])
def test_one_of_the_fractions_gives_way(scope):
  """Four of six kept and three removed: one fewer is kept, or one fewer removed."""
  for yields, expected in (
    ("keep", [0, -0.1, 0, 0, 0, 0.2]),
    ("remove", [0, -0.1, 0.4, 0, 0, 0.2]),
  ):
    method = methods.breadcrumbs(0.7, 0.5, 1.0, scope=scope, yields=yields)
    close(merged(method, TAU[:1]), expected)
    both = methods.breadcrumbs(0.5, 0.2, 1.0, scope=scope, yields=yields)
    close(merged(both, TAU[:1]), [0, 0, 0.4, 0, -0.6, 0.2])


@pytest.mark.parametrize("scope", ["tree", "leaf", "row"])
def test_breadcrumbs_passes_scalars_by(scope):
  base = {"w": jnp.zeros(2), "s": jnp.float32(0)}
  models = {"w": jnp.array([[3.0, 1.0]]), "s": jnp.array([7.0])}
  method = methods.breadcrumbs(keep=0.5, remove=0.0, scale=1.0, scope=scope)
  out = jaxmerge.merge(method, models, base)
  assert (out["w"].tolist(), out["s"].tolist()) == ([3.0, 0.0], 7.0)


@pytest.mark.slow
def test_breadcrumbs_by_row_ranks_each_output():
  """A kernel [in, out] has its rows along the second axis; a file's weight along the first."""
  x = jnp.array([[[4.0, 1.0, 2.0], [3.0, 8.0, 1.0]]])
  method = methods.breadcrumbs(keep=0.5, remove=0.0, scale=1.0, scope="row")
  base = {"w": jnp.zeros((2, 3))}
  kernel = jaxmerge.merge(method, {"w": x}, base, layout=(("w", "io"),))["w"]
  weight = jaxmerge.merge(method, {"w": x}, base, layout=(("w", "oi"),))["w"]
  assert kernel.tolist() == [[4.0, 0.0, 2.0], [0.0, 8.0, 0.0]]
  assert weight.tolist() == [[4.0, 0.0, 0.0], [0.0, 8.0, 0.0]]


def test_breadcrumbs_by_row_removing_nothing_is_the_sum_of_trimmed_rows():
  x = np.random.default_rng(0).normal(size=(3, 4, 6)).astype(np.float32)
  found = merged(methods.breadcrumbs(0.5, 0.0, 1.0, scope="row"), x, layout=(("w", "oi"),))
  close(found, np.apply_along_axis(basics.exact, 2, x, 0.5).sum(axis=0))
