"""Outer steps: what is done with the merged task vector."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_tasks as small

from jaxmerge.training import outer_optimizers, settings


def chosen(name, momentum=0.0):
  return settings.Settings(outer=name, outer_momentum=momentum)


def path(optimizer, start, vectors, rate):
  """The models after each of some rounds whose merged task vectors are given."""
  params, found = jax.tree.map(jnp.asarray, start), []
  state = () if optimizer is None else optimizer.init(params)
  step = jax.jit(lambda *given: outer_optimizers.step(optimizer, *given))
  for vector in vectors:
    target = jax.tree.map(jnp.add, params, vector)
    params, state = step(params, target, state, jnp.float32(rate))
    found.append(params)
  return found


@pytest.fixture
def start():
  return {"a": np.float32([1.0, -2.0, 0.25]), "b": np.float32([[3.0]])}


@pytest.fixture
def vectors(start):
  # Multiples of 1/64: sums and differences are exact.
  r = np.random.default_rng(0)
  return [
    jax.tree.map(lambda x: (r.integers(-64, 64, x.shape) / 64).astype(np.float32), start)
    for _ in range(4)
  ]


def test_none_is_the_merged_model_itself(start, vectors):
  assert outer_optimizers.optimizer(chosen("none"), start) is None
  target = jax.tree.map(jnp.add, start, vectors[0])
  params, state = outer_optimizers.step(None, start, target, (), jnp.float32(9))
  assert params is target
  assert state == ()


def test_sgd_of_rate_one_is_the_merged_model_to_one_ulp():
  r = np.random.default_rng(1)
  current, target = r.standard_normal((2, 1000)).astype(np.float32)
  found, _ = outer_optimizers.step(
    outer_optimizers.optimizer(chosen("sgd"), current),
    current,
    target,
    optax.EmptyState(),
    jnp.float32(1),
  )
  ulp = np.spacing(np.maximum(np.abs(current), np.abs(target)))
  assert (np.abs(np.asarray(found) - target) <= ulp).all()


@pytest.mark.parametrize(("name", "momentum"), [("sgd", 0.0), ("sgd", 0.5), ("nesterov", 0.75)])
def test_sgd_and_nesterov_are_those_of_optax(start, vectors, name, momentum):
  found = path(outer_optimizers.optimizer(chosen(name, momentum), start), start, vectors, 0.5)
  optimizer = optax.sgd(0.5, momentum or None, nesterov=name == "nesterov")
  params, state = jax.tree.map(jnp.asarray, start), optimizer.init(start)
  for vector, expected in zip(vectors, found, strict=True):
    updates, state = optimizer.update(jax.tree.map(jnp.negative, vector), state, params)
    params = optax.apply_updates(params, updates)
    small.assert_close(params, expected, rtol=1e-6)


def test_no_decay_moves_frozen_leaves_and_running_statistics():
  start = {"bn": {"mean": np.ones(3, np.float32), "var": np.ones(3, np.float32)}}
  start |= {"bias": np.float32([1.0, -0.0]), "kernel": np.ones((2, 2), np.float32)}
  chosen = settings.Settings(outer=optax.adamw(0.1, weight_decay=1.0), freeze="^bias")
  optimizer = outer_optimizers.optimizer(chosen, start)
  rest = optimizer.init(start), jnp.float32(1), chosen.freeze
  params, _ = outer_optimizers.step(optimizer, start, start, *rest)
  np.testing.assert_allclose(params.pop("kernel"), np.full((2, 2), 0.9), rtol=1e-6)
  small.assert_same_bits(params, {n: start[n] for n in params})


def test_nesterov_is_the_formula_of_diloco(start, vectors):
  # v <- m v + g, theta <- theta - rate (g + m v), with g minus the merged task vector.
  found = path(outer_optimizers.optimizer(chosen("nesterov", 0.5), start), start, vectors, 0.25)
  theta, v = start["a"].astype(np.float64), 0.0
  for vector, expected in zip(vectors, found, strict=True):
    g = -vector["a"].astype(np.float64)
    v = 0.5 * v + g
    theta = theta - 0.25 * (g + 0.5 * v)
    np.testing.assert_allclose(expected["a"], theta, rtol=1e-6)


def test_adam_is_that_of_optax(start, vectors):
  found = path(outer_optimizers.optimizer(chosen("adam", 0.75), start), start, vectors[:2], 0.125)
  optimizer = optax.adam(0.125, b1=0.75, b2=0.95)
  params, state = jax.tree.map(jnp.asarray, start), optimizer.init(start)
  for vector, expected in zip(vectors, found, strict=False):
    updates, state = optimizer.update(jax.tree.map(jnp.negative, vector), state, params)
    params = optax.apply_updates(params, updates)
    small.assert_close(params, expected, rtol=1e-5)


def test_damped_momentum_has_no_factor_in_the_first_round(start, vectors):
  # u_1 = mean tau_1; u_k = (1 - m) mean tau_k + m (ref_{k-1} - ref_{k-2}).
  found = path(outer_optimizers.optimizer(chosen("damped", 0.25), start), start, vectors, 1.0)
  models = [start["a"].astype(np.float64)]
  for k, vector in enumerate(vectors):
    u = vector["a"].astype(np.float64)
    if k:
      u = 0.75 * u + 0.25 * (models[-1] - models[-2])
    models.append(models[-1] + u)
    np.testing.assert_allclose(found[k]["a"], models[-1], rtol=1e-6)


def test_damping_by_nothing_is_plain(start, vectors):
  damped = path(outer_optimizers.optimizer(chosen("damped", 0.0), start), start, vectors, 1.0)
  small.assert_same_bits(damped, path(None, start, vectors, 1.0))
