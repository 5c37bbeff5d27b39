"""DELLA: probabilities by rank, and the methods that it generalises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from example import close, merged
from marking import some_fast

import jaxmerge
from jaxmerge import methods
from jaxmerge.core import order_statistics
from jaxmerge.methods import della_merging

TAU = np.array([[0.9, -0.1, 0.4, 0.0, -0.6, 0.2]], np.float32)
ZERO = {"w": jnp.zeros(6)}
ONES = {"a": np.ones((3, 40, 50), np.float32), "b": np.ones((3, 2000), np.float32)}
NOTHING = {n: np.zeros(x.shape[1:], np.float32) for n, x in ONES.items()}


def test_probabilities_rise_with_the_rank():
  """The worked example, for a vector, and for rows that are the columns of a kernel [in, out]."""
  example = [0.7, 0.38, 0.54, 0.3, 0.62, 0.46]
  kept = np.zeros(6)
  method = methods.magprune(0.5, 0.2, rescale=None)
  seeds = jnp.arange(2000, dtype=jnp.uint32)
  sure = {"w": jnp.where(TAU == 0, 1e-3, TAU)}
  kept = jax.vmap(lambda s: jaxmerge.merge(method, sure, seed=s)["w"])(seeds) != 0
  # Four deviations of a mean of 2000.
  close(np.asarray(kept).mean(axis=0), example, atol=4 * 0.5 / np.sqrt(2000))
  x = jnp.asarray(np.stack([TAU[0], TAU[0, ::-1]]))[None]
  close(probabilities(x, 0.5, 0.2)[0], [example, example[::-1]])


def probabilities(x, density, epsilon):
  return della_merging.probabilities(
    order_statistics.ranks(jnp.asarray(x)), jnp.float32(density), jnp.float32(epsilon)
  )


@pytest.mark.parametrize("columns", some_fast([1, 2, 7], [7]))
def test_the_mean_probability_of_a_row_is_the_density(columns):
  x = np.random.default_rng(0).normal(size=(3, 5, columns)).astype(np.float32)
  q = probabilities(x, 0.6, 0.3)
  close(q.mean(axis=2), np.full((3, 5), 0.6))
  assert probabilities(x, 1.0, 0.3).min() == 1


@pytest.mark.parametrize("rescale", some_fast(["inverse", "l1", None], ["inverse"]))
def test_without_a_window_della_is_dare(rescale):
  """Bit for bit, masks too, where rows lie as they do in the leaf."""
  rng = np.random.default_rng(0)
  models = {n: rng.normal(size=x.shape).astype(np.float32) for n, x in ONES.items()}
  found = jaxmerge.merge(
    methods.della_linear(0.5, 0.0, 1.0, rescale=rescale),
    models,
    NOTHING,
    seed=3,
    layout=(("a", "oi"),),
  )
  other = jaxmerge.merge(methods.dare(0.5, 1.0, rescale=rescale), models, NOTHING, seed=3)
  np.testing.assert_array_equal(found["a"], other["a"])


def test_della_is_unbiased():
  """The mean over 400 seeds is tau within 4 of its deviations, |tau| sqrt((1 - q) / q / 400)."""
  seeds = jnp.arange(400, dtype=jnp.uint32)
  method = methods.della(0.5, 0.2, 1.0)
  out = jax.vmap(lambda s: jaxmerge.merge(method, {"w": TAU}, ZERO, seed=s)["w"])(seeds)
  error = np.abs(np.asarray(out).mean(axis=0) - TAU[0])
  q = np.array([0.7, 0.38, 0.54, 0.3, 0.62, 0.46])
  assert (error <= 4 * np.sqrt((1 - q) / q / 400) * np.abs(TAU[0]) + 1e-7).all()


def test_keeping_all_is_ties_and_task_arithmetic():
  tau = np.random.default_rng(0).normal(size=(3, 10)).astype(np.float32)
  close(
    merged(methods.della(1.0, 0.3, 0.5), tau, seed=0),
    merged(methods.ties(1.0, 0.5, zero_sum="plus"), tau),
  )
  close(
    merged(methods.della_linear(1.0, 0.3, 0.5), tau, seed=0),
    merged(methods.task_arithmetic(0.5), tau),
  )


@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.1), (0.9, 0.1), ((0.5, 0.05), 0.1)])
def test_probabilities_outside_of_0_and_1_are_refused(density, epsilon):
  tau, hparams = {"w": jnp.ones((2, 3))}, {"density": density, "epsilon": epsilon}
  with pytest.raises(ValueError, match=r"must lie inside \(0, 1\), got density .* and epsilon 0.1"):
    jaxmerge.merge(methods.della(), tau, {"w": jnp.ones(3)}, hparams=hparams, seed=0)
