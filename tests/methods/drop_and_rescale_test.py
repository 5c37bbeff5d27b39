"""Dropping entries at random: DARE, and the masks themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from example import TAU as THREE
from example import close, merged
from reference import basics

import jaxmerge
from jaxmerge import methods
from jaxmerge.core import stage

TAU = np.array([[0.9, -0.1, 0.4, 0.0, -0.6, 0.2]], np.float32)
ZERO = {"w": jnp.zeros(6)}


ONES = {"a": np.ones((3, 40, 50), np.float32), "b": np.ones((3, 2000), np.float32)}
NOTHING = {n: np.zeros(x.shape[1:], np.float32) for n, x in ONES.items()}


DROPPED = stage.chain(methods.drop(0.5, rescale=None), methods.weighted_sum())


def masks(drop_rate, seed=0):
  """Which entries are kept: a stack of booleans per leaf."""
  picked = [
    jaxmerge.merge(DROPPED, ONES, seed=seed, hparams={"drop_rate": drop_rate, "weight": tuple(one)})
    for one in np.eye(3).tolist()
  ]
  return {n: np.stack([np.asarray(one[n]) != 0 for one in picked]) for n in ONES}


@pytest.mark.parametrize("drop_rate", [0.1, 0.5, 0.9])
def test_masks_drop_the_share_asked_for(drop_rate):
  """Mean within 4 standard deviations; counts over cells of 50 follow the binomial's variance."""
  kept = masks(drop_rate)
  q = 1 - drop_rate
  for x in kept.values():
    for model in x:
      n = model.size
      assert abs(model.mean() - q) < 4 * np.sqrt(q * drop_rate / n)
      cells = model.reshape(40, 50).sum(axis=1)
      chi = ((cells - 50 * q) ** 2 / (50 * q * drop_rate)).sum()
      assert abs(chi - 40) < 5 * np.sqrt(2 * 40)


def test_masks_of_models_leaves_seeds_and_neighbours_are_independent():
  """Correlations of fair masks of 2000 entries stay within 4 standard deviations."""
  kept, other = masks(0.5), masks(0.5, seed=1)

  def sign(x):
    return np.where(x, 1.0, -1.0).reshape(-1)

  a, b = kept["a"], kept["b"]
  pairs = [
    (a[0], a[1]),
    (a[0], a[2]),
    (b[1], b[2]),
    (a[0], b[0]),
    (a[0], other["a"][0]),
    (b[2], other["b"][2]),
    (a[0], a[0].T.reshape(40, 50)),
  ]
  for x, y in pairs:
    assert abs((sign(x) * sign(y)).mean()) < 4 / np.sqrt(2000)
  for axis in (0, 1):
    turned = np.where(a[0], 1.0, -1.0)
    assert abs((turned * np.roll(turned, 1, axis=axis)).mean()) < 4 / np.sqrt(2000)


def test_masks_do_not_depend_on_order_or_on_what_else_there_is():
  names = ("x", "y", "z")
  tau = np.random.default_rng(0).normal(size=(3, 2000)).astype(np.float32)
  method = methods.dare(0.5, 1.0)
  zero = {"b": NOTHING["b"]}
  alone = jaxmerge.merge(method, {"b": tau}, zero, seed=7, names=names)["b"]
  both = jaxmerge.merge(method, {"a": ONES["a"], "b": tau}, NOTHING, seed=7, names=names)["b"]
  turned = jaxmerge.merge(
    method, {"b": tau[[2, 0, 1]]}, zero, seed=7, names=[names[k] for k in (2, 0, 1)]
  )["b"]
  np.testing.assert_array_equal(alone, both)
  np.testing.assert_array_equal(alone, turned)
  parts = [
    jaxmerge.merge(method, {"b": tau[k : k + 1]}, zero, seed=7, names=names[k : k + 1])["b"]
    for k in range(3)
  ]
  close(alone, sum(parts), atol=1e-5)


def test_kept_entries_are_divided():
  """Exactly where 1 - p is a power of two; elsewhere the compiler may multiply by the inverse."""
  tau = np.random.default_rng(0).normal(size=(1, 500)).astype(np.float32)
  method = methods.dare(0.5, 1.0)
  for p in (0.5, 0.75, 0.875, 0.1, 0.9):
    out = merged(method, tau, seed=2, hparams={"drop_rate": p})
    kept = out != 0
    expected = (tau[0] / (np.float32(1) - np.float32(p)))[kept]
    np.testing.assert_array_max_ulp(out[kept], expected, 0 if p in (0.5, 0.75, 0.875) else 2)


@pytest.mark.parametrize("rescale", ["inverse", "l1", "l2", "linf", None])
def test_dropping_nothing_and_everything(rescale):
  np.testing.assert_array_equal(
    merged(methods.dare(0.0, 1.0, rescale=rescale), TAU, seed=0), TAU[0]
  )
  np.testing.assert_array_equal(merged(methods.dare(1.0, 1.0, rescale=rescale), seed=0), 0)


@pytest.mark.parametrize("rescale", ["inverse", "l1", "l2", "linf", None])
def test_dare_agrees_with_the_transcription(rescale):
  rng = np.random.default_rng(1)
  models = {n: rng.normal(size=x.shape).astype(np.float32) for n, x in ONES.items()}
  kept = masks(0.8, seed=5)
  kept = [{n: x[k] for n, x in kept.items()} for k in range(3)]
  taus = basics.dare(basics.deltas(NOTHING, models), kept, 0.8, rescale)
  expected = basics.weighted_sum(taus, (1, 2, 1), 0.5)
  method = methods.dare(0.8, 0.5, (1.0, 2.0, 1.0), rescale=rescale)
  out = jaxmerge.merge(method, models, NOTHING, seed=5)
  for n in out:
    close(out[n], expected[n], atol=2e-5)


def test_dare_ties_agrees_with_the_transcription():
  rng = np.random.default_rng(1)
  models = {n: rng.normal(size=x.shape).astype(np.float32) for n, x in ONES.items()}
  kept = masks(0.8, seed=5)
  kept = [{n: x[k] for n, x in kept.items()} for k in range(3)]
  taus = basics.dare(basics.deltas(NOTHING, models), kept, 0.8, "inverse")
  out = jaxmerge.merge(methods.dare_ties(0.8, 0.3), models, NOTHING, seed=5)
  expected = basics.ties(taus, 0.3)
  for n in out:
    close(out[n], expected[n], atol=2e-5)


def test_the_l1_norm_is_restored():
  """Worked example: of tau_1 the first and fifth entries survive, times 2.2 / 1.5."""
  tau, keep = TAU[0], np.array([1, 0, 0, 0, 1, 0], bool)
  (out,) = basics.dare([{"w": tau}], [{"w": keep}], 0.5, "l1")
  close(out["w"], [1.32, 0, 0, 0, -0.88, 0])
  seeds = jnp.arange(300, dtype=jnp.uint32)
  one = {"w": jnp.asarray(TAU)}
  bare = jax.vmap(lambda s: jaxmerge.merge(methods.drop(0.5, rescale=None), one, seed=s)["w"])
  # The fourth entry of the example is zero, kept or not.
  same = ((np.asarray(bare(seeds)) != 0) == (keep & (tau != 0))).all(axis=1)
  seed = int(np.argmax(same))
  assert same[seed]
  close(jaxmerge.merge(methods.drop(0.5, rescale="l1"), one, seed=seed)["w"], out["w"])


def test_dare_is_unbiased():
  """The mean over n = 400 seeds is tau within 3 of its deviations, tau * sqrt(p / (1 - p) / n)."""
  seeds = jnp.arange(400, dtype=jnp.uint32)
  method = methods.dare(0.9, 1.0)
  out = jax.vmap(lambda s: jaxmerge.merge(method, {"w": TAU}, ZERO, seed=s)["w"])(seeds)
  error = np.abs(np.asarray(out).mean(axis=0) - TAU[0])
  assert (error <= 3 * np.sqrt(9 / 400) * np.abs(TAU[0]) + 1e-7).all()


def test_dropping_before_an_average_leaves_its_mean():
  """Over n seeds, within 3 deviations: the root of the sum of 9 tau^2 / n, over the 3 models."""
  seeds = jnp.arange(2000, dtype=jnp.uint32)
  method, models = stage.chain(methods.drop(0.9), methods.average()), {"w": jnp.asarray(THREE)}
  out = jax.vmap(lambda s: jaxmerge.merge(method, models, ZERO, seed=s)["w"])(seeds)
  error = np.abs(np.asarray(out, np.float64).mean(axis=0) - THREE.mean(axis=0))
  assert (error <= 3 * np.sqrt(9 / 2000 * np.sum(THREE**2, axis=0)) / 3).all()
