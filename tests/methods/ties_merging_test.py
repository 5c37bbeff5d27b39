"""TIES: elections, with slack and with sums of zero."""

import jax.numpy as jnp
import numpy as np
import pytest
from example import close, merged

import jaxmerge
from jaxmerge import methods
from jaxmerge.core import stage


@pytest.mark.parametrize(
  ("slack", "expected"), [(0.0, [-0.4, -0.35]), ((0.5, 0.0), [0.3, -0.35]), ((9, 0), [0.3, -0.35])]
)
def test_slack_wins_elections_for_a_model(slack, expected):
  tau = [[0.3, -0.2], [-0.4, -0.5]]
  close(merged(methods.ties_slack(slack, density=1.0), tau), expected)


def test_slack_counts_where_plus_is_elected_too():
  tau = [[0.3, -0.2], [-0.4, -0.5]]
  for slack, expected in ((0.0, [-0.4, -0.7]), ((0.5, 0.0), [0.3, -0.7])):
    method = stage.chain(methods.elect_sign("plus", slack), methods.weighted_sum())
    close(merged(method, tau), expected)


def test_no_slack_is_ties():
  close(merged(methods.ties_slack(density=0.5)), merged(methods.ties(0.5)), atol=0)


def test_a_zero_sum_takes_the_majority_sign():
  tau = np.array([[1.0, 2.0, -3.0, -4.0], [-1.0, 2.0, -3.0, -4.0]], np.float32)
  draw = np.array([[1.0, 2.0, -3.0, 0.0], [-1.0, 2.0, -3.0, 0.0]], np.float32)
  method, plus = methods.ties(1.0), methods.ties(1.0, zero_sum="plus")
  assert merged(method, tau).tolist() == [-1.0, 2.0, -3.0, -4.0]
  assert merged(method, -tau).tolist() == [1.0, -2.0, 3.0, 4.0]
  assert merged(method, draw).tolist() == [0.0, 2.0, -3.0, 0.0]
  assert merged(plus, tau).tolist() == [1.0, 2.0, -3.0, -4.0]


def test_the_majority_is_of_the_whole_model():
  base = {"a": jnp.zeros(1), "b": jnp.zeros(3)}
  models = {"a": jnp.array([[1.0], [-1.0]]), "b": -jnp.ones((2, 3))}
  assert jaxmerge.merge(methods.ties(1.0), models, base)["a"].tolist() == [-1.0]
