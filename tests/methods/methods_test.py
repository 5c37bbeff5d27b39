"""The methods against worked examples, closed forms, identities and a transcription in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from example import TAU, close, merged
from hypothesis import given
from hypothesis import strategies as st
from marking import some_fast
from reference import basics

import jaxmerge
from jaxmerge import methods
from jaxmerge.core import stage

ZERO = {"w": jnp.zeros(6)}


@pytest.mark.parametrize(
  ("method", "expected"),
  [
    (methods.average(), [0.366667, -0.1, -0.1, 0.266667, -0.2, -0.066667]),
    (methods.average(weight=(1.0, 0.0, 0.0)), TAU[0]),
    (methods.average(weight=(1.0, 2.0, 0.0), normalize=False), TAU[0] + 2 * TAU[1]),
    (methods.negate(scale=0.3), [-0.33, 0.09, 0.09, -0.24, 0.18, 0.06]),
    (methods.analogy(scale=1.0), [-0.7, -0.1, -1.1, 0.8, 0.6, -0.6]),
    (methods.ties(0.5), [0.7, -0.5, -0.8, 0.7, -0.4, -0.4]),
    (methods.ties(0.5, reduce="sum"), [1.4, -0.5, -0.8, 0.7, -0.8, -0.4]),
    (methods.ties(0.5, reduce="max"), [0.9, -0.5, -0.8, 0.7, -0.6, -0.4]),
    (methods.ties(0.5, rule="exact"), [0.7, -0.5, -0.8, 0.7, -0.6, -0.4]),
    (
      methods.ties(0.5, weight=(1.0, 0.5, 0.5), scope="leaf", rule="exact", zero_sum="plus"),
      [0.766667, -0.5, 0.4, 0.7, -0.6, -0.4],
    ),
    (
      methods.ties(0.5, 1.0, (1.0, 0.5, 0.5), "leaf", "exact", "sum", "plus"),
      [1.15, -0.25, 0.4, 0.35, -0.6, -0.2],
    ),
    (methods.task_arithmetic(1.0, (1.0, 2.0, 1.0), normalize=True), TAU.T @ (0.25, 0.5, 0.25)),
    (methods.task_arithmetic(1.0, (1.0, 0.0, -1.0), normalize=True), TAU[0] - TAU[2]),
    (methods.dare(0.0, 1.0, (1.0, 2.0, 1.0), normalize=True), TAU.T @ (0.25, 0.5, 0.25)),
    (
      methods.breadcrumbs(1.0, 0.0, 1.0, (1.0, 2.0, 1.0), normalize=True),
      TAU.T @ (0.25, 0.5, 0.25),
    ),
    (
      methods.breadcrumbs_ties(1.0, 0.0, 1.0, (1.0, 0.5, 0.5), zero_sum="plus"),
      [1.15, -0.35, 0.45, 0.4, -0.7, 0.2],
    ),
  ],
)
def test_worked_example(method, expected):
  close(merged(method, **({"seed": 0} if "seed" in stage.hparams(method) else {})), expected)


# Few different magnitudes: most entries tie with others.
entries = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 1.5, -1.5, 2.0, -2.0])
stacks = st.lists(st.lists(entries, min_size=12, max_size=12), min_size=3, max_size=3)


def in_leaves(x):
  x = np.asarray(x, np.float32)
  return {"a": x[:, :4].reshape(3, 2, 2), "b": x[:, 4:9], "c": x[:, 9], "d": x[:, 10:]}


EMPTY = {n: x[0] * 0 for n, x in in_leaves(np.zeros((3, 12))).items()}
TABLE = {
  **{
    f"ties {rule} {scope} {reduce} {zero}": (
      methods.ties(0.4, 0.5, (1.0, 2.0, 1.0), scope, rule, reduce, zero),
      functools.partial(
        basics.ties,
        density=0.4,
        scale=0.5,
        weights=(1, 2, 1),
        scope=scope,
        rule=rule,
        reduce=reduce,
        zero_sum=zero,
      ),
    )
    for rule, scope, reduce, zero in [
      ("kth", "tree", "mean", "majority"),
      ("kth", "leaf", "sum", "majority"),
      ("exact", "tree", "max", "plus"),
      ("exact", "leaf", "mean", "plus"),
    ]
  },
  **{
    f"breadcrumbs {scope}": (
      methods.breadcrumbs(0.5, 0.2, 1.0, scope=scope),
      functools.partial(
        basics.breadcrumbs, keep=0.5, remove=0.2, scope=scope, views=((("a"), "oi"),)
      ),
    )
    for scope in ("tree", "leaf", "row")
  },
  "average": (
    methods.average((1.0, 2.0, 4.0)),
    lambda taus: basics.average(taus, (1, 2, 4)),
  ),
  "task_arithmetic": (
    methods.task_arithmetic(0.5, (1.0, 2.0, -1.0)),
    lambda taus: basics.weighted_sum(taus, (1, 2, -1), 0.5),
  ),
}


@pytest.mark.parametrize(
  "name", some_fast(TABLE, ["ties kth tree mean majority", "breadcrumbs leaf"])
)
@given(x=stacks)
def test_agrees_with_the_transcription(name, x):
  method, oracle = TABLE[name]
  models = in_leaves(x)
  out = jaxmerge.merge(method, models, EMPTY, layout=(("a", "oi"),))
  expected = oracle(basics.deltas(EMPTY, models))
  for n in out:
    close(out[n], expected[n])


@pytest.mark.slow
@given(stacks)
def test_single_model_comes_back(x):
  """N = 1, scale 1, nothing pruned: the result is the model itself, bit for bit."""
  models = jax.tree.map(lambda leaf: leaf[:1], in_leaves(x))
  for method, options in SINGLE:
    out = jaxmerge.merge(method, models, EMPTY, **options)
    for n in out:
      np.testing.assert_array_equal(out[n], models[n][0])


SINGLE = [
  (methods.average(), {}),
  (methods.task_arithmetic(1.0), {}),
  (methods.ties(1.0), {}),
  (methods.ties(1.0, reduce="max"), {}),
  (methods.magmax(1.0), {}),
  (methods.dare(0.0, 1.0), {"seed": 3}),
  (methods.breadcrumbs(1.0, 0.0, 1.0), {}),
]


TA, MEAN, TIES = methods.task_arithmetic(1.0), methods.average(), methods.ties(0.5)
NEGATE = methods.negate(1.0)
LEAFWISE = methods.ties(0.5, rule="exact", scope="leaf")
IDENTITIES = {
  "task arithmetic at 1/K is the mean": (
    lambda x: merged(TA, x, hparams={"scale": 1 / 3}),
    lambda x: merged(MEAN, x),
  ),
  "ties of agreeing signs at full density is the mean": (
    lambda x: merged(TIES, np.abs(x), hparams={"density": 1.0}),
    lambda x: merged(MEAN, np.abs(x)),
  ),
  "negate is task arithmetic of the negatives": (
    lambda x: merged(NEGATE, -x),
    lambda x: merged(TA, x),
  ),
  "what is negated twice is the model": (
    lambda x: merged(NEGATE, merged(NEGATE, x[:1])[None]),
    lambda x: x[0],
  ),
  "ties by the largest is magmax where the largest entry has the sign of the sum": (
    lambda x: merged(methods.ties(1.0, reduce="max")),
    lambda x: merged(methods.magmax(1.0)),
  ),
  "breadcrumbs of everything is task arithmetic": (
    lambda x: merged(methods.breadcrumbs(1.0, 0.0, 1.0), x),
    lambda x: merged(TA, x),
  ),
  "dare without dropping is task arithmetic": (
    lambda x: merged(methods.dare(0.0, 1.0), x, seed=1),
    lambda x: merged(TA, x),
  ),
  "dare without dropping, then ties, is ties": (
    lambda x: merged(methods.dare_ties(0.0, 0.5), x, seed=1),
    lambda x: merged(TIES, x),
  ),
  "ties of one model three times trims it": (
    lambda x: merged(TIES, np.stack([x[0]] * 3)),
    lambda x: merged(methods.trim(0.5), x[:1]),
  ),
  "breadcrumbs without removing trims exactly": (
    lambda x: merged(methods.breadcrumbs(0.5, 0.0, 1.0), x[:1]),
    lambda x: merged(LEAFWISE, x[:1]),
  ),
  "an analogy of A and A to C is C": (
    lambda x: merged(methods.analogy(1.0), x[[0, 0, 1]]),
    lambda x: x[1],
  ),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_identity(name):
  left, right = IDENTITIES[name]
  x = np.random.default_rng(0).normal(size=(3, 10)).astype(np.float32)
  close(left(x), right(x))


@given(stacks)
def test_ties_follows_the_elected_sign_and_stays_in_bounds(x):
  x = np.asarray(x, np.float32)
  models = in_leaves(x)
  tau = basics.flat(jaxmerge.merge(TIES, models, EMPTY))
  trimmed = np.stack([basics.kth(row, 0.5) for row in x])
  sign = np.sign(trimmed.sum(axis=0))
  assert (np.sign(tau) * sign >= 0).all()
  assert (np.abs(tau) <= np.abs(x).max(axis=0)).all()
