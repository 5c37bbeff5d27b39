"""Entries and columns that compete: worked examples, bounds, layouts."""

import jax.numpy as jnp
import numpy as np
import pytest
from example import close, merged

import jaxmerge
from jaxmerge import methods

BASE = np.array([[1, 0.5, 1, -1], [0.5, 1, -1, 2]], np.float32)
MOVED = np.array(
  [
    [[0.5, 0.1, 0.2, 0.1], [0.3, 0.25, -0.1, -0.35]],
    [[0.05, 0.3, -0.4, 0.2], [-0.1, 0.15, -0.45, 0.3]],
  ],
  np.float32,
)


def widened(method, base=BASE, moved=MOVED, view="oi"):
  models = {"w": jnp.asarray(base + moved)}
  found = jaxmerge.merge(method, {"w": jnp.asarray(base)}, models, layout=(("w", view),))
  return np.asarray(found["w"])


def test_worked_example_of_columns():
  expected = [[1.409510, 0.837754, 0.831347, -0.756218], [0.696394, 1.244385, -1.423381, 1.865674]]
  close(widened(methods.widen()), expected, atol=2e-6)


def test_one_model_alone_keeps_all_its_columns():
  close(widened(methods.widen(), moved=MOVED[:1]), BASE + MOVED[0])


def test_columns_of_zeros_count_as_not_turned():
  base = BASE * np.array([0, 1, 1, 1], np.float32)
  expected = [
    [0.395521, 0.840768, 0.831347, -0.756218],
    [0.183959, 1.251921, -1.423381, 1.865674],
  ]
  close(widened(methods.widen(), base=base), expected, atol=2e-6)


def test_weights_of_columns_need_a_base():
  with pytest.raises(ValueError, match="widen compares with a base; run it by merge, not by blend"):
    jaxmerge.blend(methods.widen(), {"w": jnp.asarray(MOVED)}, layout=(("w", "oi"),))


def test_worked_example_of_entries():
  close(merged(methods.pcb(0.5, 1.0)), [0.55, -0.5, -0.5, 0.5, -0.6, 0], atol=2e-6)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0])
def test_no_entry_is_larger_than_the_largest_of_the_models(ratio):
  tau = np.random.default_rng(0).normal(size=(4, 200))
  bound = np.abs(tau).max(axis=0) + 1e-6
  assert (np.abs(merged(methods.pcb(ratio, 1.0), tau)) <= bound).all()


def test_models_that_never_agree_have_scores_below_zero():
  """What one wants the other wants more of the opposite: the least disagreement counts as best."""
  one = np.array([1.0, -0.5, 0.25, 0.125])
  found = merged(methods.pcb(1.0, 1.0, clamp=0.0), [one, -2 * one])
  assert np.isfinite(found).all()
  assert found.any()


def test_scores_of_many_models_do_not_overflow():
  tau = np.random.default_rng(0).normal(size=(200, 30))
  assert np.isfinite(merged(methods.pcb(), tau)).all()
