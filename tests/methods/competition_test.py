"""Entries and columns that compete: worked examples, bounds, layouts."""

import jax.numpy as jnp
import numpy as np
import pytest
from example import TAU, close, merged
from reference import entries, subspaces

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
  found = jaxmerge.merge(method, models, {"w": jnp.asarray(base)}, layout=(("w", view),))
  return np.asarray(found["w"])


def test_worked_example_of_columns():
  expected = [[1.409510, 0.837754, 0.831347, -0.756218], [0.696394, 1.244385, -1.423381, 1.865674]]
  close(widened(methods.widen()), expected, atol=2e-6)


def test_worked_example_of_ranks_and_weights():
  """Columns by change of norm, and by change of direction; those above the mean weigh one."""
  ranks = [subspaces.widen_ranks(*np.array([BASE, tau], np.float64)) for tau in MOVED]
  close(ranks[0], [[0.75, 0.25, 0, 0.5], [0.25, 0, 0.75, 0.5]], atol=0)
  close(ranks[1], [[0, 0.75, 0.25, 0.5], [0, 0.5, 0.75, 0.25]], atol=0)
  expected = [[0.781088, 0.377541, 0.718912, 1], [0.379322, 1, 0.781088, 0.718912]]
  close(subspaces.widen_columns(ranks, 1.0, 1.0), expected)


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
  with pytest.raises(ValueError, match="widen compares with a base, but there is none"):
    jaxmerge.merge(methods.widen(), {"w": jnp.asarray(MOVED)}, layout=(("w", "oi"),), deltas=True)


PCB = methods.pcb(0.5, 1.0)


@pytest.mark.parametrize(
  ("weight", "expected"),
  [
    ((1, 1, 1), [0.55, -0.5, -0.5, 0.5, -0.6, 0]),
    ((1, 0, 0), [0.3, 0, 0, 0, -0.6, 0]),
    ((0, 1, 0), [0, -0.5, 0, 0.5, 0, 0]),
    ((0, 0, 1), [0.25, 0, -0.5, 0, 0, 0]),
  ],
)
def test_worked_example_of_entries(weight, expected):
  """Of all models, and what each of them has in it: the scores of the others count as well."""
  close(merged(PCB, hparams={"weight": weight}), expected, atol=2e-6)


def test_worked_example_of_scores():
  """The largest of each model counts as the second largest; half of the scores are zero."""
  share, clipped = entries.pcb_scores(TAU.astype(np.float64), 0.5, 1e-4)
  close(share, [[1, 0, 0, 0, 0.454642, 0], [0, 0.279464, 0, 1, 0, 0], [1, 0, 0.446753, 0, 0, 0]])
  near = [[0.6, -0.1, 0.4, 0, -0.6, 0.2], [-0.3, -0.5, 0.1, 0.5, -0.2, 0]]
  close(clipped, [*near, [0.5, 0.3, -0.5, 0.1, 0.2, -0.4]])


@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0])
def test_no_entry_is_larger_than_the_largest_of_the_models(ratio):
  """Outliers cut off; scores lie from 0 to 1, the largest of each model at 1."""
  tau = np.random.default_rng(0).normal(size=(4, 200))
  share, clipped = entries.pcb_scores(tau, ratio, 1e-4)
  assert share.min() >= 0
  assert (share.max(axis=1) == 1).all()
  bound = np.abs(clipped).max(axis=0) + 1e-6
  assert (np.abs(merged(PCB, tau, hparams={"ratio": ratio})) <= bound).all()


def test_models_that_never_agree_have_scores_below_zero():
  """What one wants the other wants more of the opposite: the least disagreement counts as best."""
  one = np.array([1.0, -0.5, 0.25, 0.125])
  found = merged(methods.pcb(1.0, 1.0, clamp=0.0), [one, -2 * one])
  assert np.isfinite(found).all()
  assert found.any()


@pytest.mark.slow
def test_scores_of_many_models_do_not_overflow():
  tau = np.random.default_rng(0).normal(size=(200, 30))
  assert np.isfinite(merged(methods.pcb(), tau)).all()
