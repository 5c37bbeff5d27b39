"""Merging by descent: worked examples, fixed points, and what a step may do."""

import jax.numpy as jnp
import numpy as np
import pytest
from example import close
from matrices import A, B, drawn, merged
from reference import descent, subspaces

from jaxmerge import methods

pytestmark = pytest.mark.kernels


def test_the_first_step_of_wudi():
  """Of the sum of the two matrices one entry disturbs: it moves by the learning rate."""
  found = merged(methods.wudi(steps=1), [A, B])
  expected = A + B
  expected[1, 1] -= 1e-5
  close(found, expected, atol=3e-7)
  assert descent.loss(A + B, [A, B], [A, B], [A, B]) == pytest.approx(1.2)
  close(descent.slope(A + B, [A, B], [A, B], [A, B]), [[0, 0, 0], [0, 2, 0]])


def test_worked_example_of_optmerge():
  """The transcription has the losses that the specification of the method gives."""
  first = lambda x: descent.truncated(x, 1)  # noqa: E731
  rows = [first(x) for x in (A, B)]
  mean = (A + B) / 2
  lora = descent.loss(mean, rows, rows, [A, B])
  full = descent.loss(A + B, [mean + first(x - mean) for x in (A, B)], rows, [A, B])
  assert (lora, full) == (pytest.approx(2.225), pytest.approx(1.8))


@pytest.mark.parametrize("method", [methods.wudi(steps=0), methods.optmerge(steps=0)])
def test_no_steps_leave_the_sum(method):
  matrices = drawn(3, 4, 6)
  close(merged(method, matrices), sum(matrices), atol=1e-6)


def gaps(moved, matrices, eta):
  """The loss that DOGE descends on, by its definition."""
  rates = [eta / np.linalg.norm(x) for x in matrices]
  total = sum(c * (x + moved) for c, x in zip(rates, matrices, strict=True))
  return sum(np.sum(np.sum(x * (x - total), axis=1) ** 2) for x in matrices)


def corrected(matrices, eta, **settings):
  """The correction that DOGE adds to every task matrix."""
  found = merged(methods.doge(eta=eta, density=1.0, **settings), matrices)
  rates = [eta / np.linalg.norm(x) for x in matrices]
  return found / sum(rates) - sum(c * x for c, x in zip(rates, matrices, strict=True)) / sum(rates)


def test_doge_without_steps_adds_task_matrices_of_one_norm():
  assert gaps(0, [A, B], 0.07) == pytest.approx(93.902521)
  close(corrected([A, B], 0.07, steps=0), 0 * A, atol=1e-6)


def test_worked_example_of_doge():
  """The losses of plain steps of a half down the transcription's gradient; nothing is shared."""
  rates, moved, losses = [0.07 / np.linalg.norm(x) for x in (A, B)], 0 * A, []
  assert not subspaces.doge_shared([A, B], 6).any()
  for _ in range(4):
    losses.append(gaps(moved, [A, B], 0.07))
    moved = moved - 0.5 * subspaces.doge_slope(moved, [A, B], rates)
  close(losses, [93.902521, 89.5496, 85.4080, 81.4672], atol=5e-5)


def test_directions_that_are_shared_are_projected_on():
  shared = subspaces.doge_shared(drawn(3, 12, 9), 3)
  close(shared @ shared, shared, atol=1e-12)
  assert np.linalg.matrix_rank(shared) == 9 // 3


@pytest.mark.slow
def test_doge_closes_gaps_outside_the_shared_directions():
  matrices = drawn(3, 12, 9)
  found = [corrected(matrices, 0.5, learning_rate=1e-2, steps=n) for n in (1, 100)]
  losses = [gaps(moved, matrices, 0.5) for moved in (0, *found)]
  assert losses[0] > losses[1] > losses[2]
  free = corrected(matrices, 0.5, learning_rate=1e-2, steps=100, subspace=99)
  assert gaps(free, matrices, 0.5) < losses[2]


def test_the_first_step_of_doge_is_that_of_adam():
  """In every entry by the learning rate, down the slope: no direction is shared of two."""
  slope = np.zeros_like(A)
  for place in np.ndindex(A.shape):
    step = np.zeros_like(A)
    step[place] = 1e-4
    slope[place] = gaps(step, [A, B], 0.07) - gaps(-step, [A, B], 0.07)
  moved = corrected([A, B], 0.07, learning_rate=1e-2, steps=1)
  close(moved, -1e-2 * np.sign(np.round(slope, 9)), atol=1e-5)


def test_no_steps_leave_the_mean_of_adapters():
  matrices = drawn(3, 4, 6, rank=1)
  close(merged(methods.optmerge(tuned="lora", steps=0), matrices), np.mean(matrices, axis=0))


def test_tasks_with_inputs_of_their_own_add_up():
  """None disturbs another: the sum is where the descent ends as well."""
  own = np.zeros((2, 4, 6))
  own[0, :, :3], own[1, :, 3:] = drawn(2, 4, 3)
  close(merged(methods.wudi(steps=50), own), own.sum(axis=0), atol=1e-6)


def test_one_model_is_itself():
  (x,) = drawn(1, 4, 6)
  close(merged(methods.wudi(), [x]), x)
  close(merged(methods.optmerge(), [x]), x, atol=1e-5)


@pytest.mark.parametrize("steps", [10, 100])
def test_descent_goes_down_and_not_far(steps):
  matrices = drawn(3, 8, 12)
  found = merged(methods.wudi(learning_rate=1e-3, steps=steps), matrices).astype(np.float64)
  loss = lambda x: descent.loss(x, matrices, matrices, matrices)  # noqa: E731
  assert loss(found) < loss(sum(matrices))
  assert np.abs(found - sum(matrices)).max() <= 1e-3 * steps * 1.5


@pytest.mark.slow
@pytest.mark.parametrize("method", [methods.wudi(steps=9), methods.optmerge(steps=9)])
def test_a_transpose_gives_another_model(method):
  matrices = drawn(2, 6, 8)
  found, far = merged(method, matrices), merged(method, [x.T for x in matrices]).T
  assert np.abs(far - found).max() > 1e-6


@pytest.mark.parametrize("method", [methods.wudi(), methods.optmerge()])
def test_frozen_matrices_stay(method):
  zero, (x,) = np.zeros((4, 5)), drawn(1, 4, 5)
  close(merged(method, [zero, zero]), zero, atol=0)
  assert np.isfinite(merged(method, [jnp.asarray(x), zero])).all()
