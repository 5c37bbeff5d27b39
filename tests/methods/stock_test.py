"""Model Stock: steps by the mean cosine of the task vectors."""

import numpy as np
import pytest
from example import TAU, close, merged

from jaxmerge import methods


@pytest.mark.parametrize(
  ("tau", "t"),
  [
    ([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0]], 0.888889),
    pytest.param([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]], 1.0, marks=pytest.mark.slow),
    (np.eye(3), 0.0),
    (TAU, -0.694057),
    # Far apart beyond 90 degrees the step has any size; where it would be infinite it is none.
    ([[1.0, 0.0], [-0.8, 0.6]], -8.0),
    pytest.param([[1.0, 0.0], [-1.0, 0.0]], 0.0, marks=pytest.mark.slow),
    pytest.param(np.zeros((3, 4)), 0.0, marks=pytest.mark.slow),
  ],
)
def test_model_stock_steps_by_the_mean_cosine(tau, t):
  mean = np.mean(tau, axis=0)
  close(merged(methods.model_stock(), tau), t * mean)
  close(merged(methods.model_stock(clip=True), tau), np.clip(t, 0, 1) * mean)


def test_a_floor_takes_small_task_vectors_for_orthogonal_ones():
  """As in mergekit: norms of 1e-4 each, over 1e-6, make a cosine of 0.8 one of 0.008."""
  tau = np.array([[1.0, 0.0], [0.8, 0.6]]) * 1e-4
  cosine = 0.8e-8 / 1e-6
  t = 2 * cosine / (1 + cosine)
  close(merged(methods.model_stock(floor=1e-6), tau) * 1e4, t * tau.mean(0) * 1e4)
  close(merged(methods.model_stock(), tau) * 1e4, 0.888889 * tau.mean(0) * 1e4)


def test_model_stock_by_row():
  tau = np.array([[[1.0, 0.0], [1.0, 2.0]], [[0.0, 1.0], [1.0, 2.0]]])
  out = merged(methods.model_stock("row"), tau, layout=(("w", "oi"),))
  close(out, [[0.0, 0.0], [1.0, 2.0]])
