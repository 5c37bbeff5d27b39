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
from jaxmerge.core import interpreter, stage

BASE = {"w": jnp.array([1.0, -1.0, 0.5, 0.0, 2.0, -0.5])}
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


def test_task_arithmetic_adds_to_the_base():
  models = {"w": BASE["w"][None] + TAU}
  out = jaxmerge.merge(methods.task_arithmetic(scale=0.3), models, BASE)
  close(out["w"], [1.33, -1.09, 0.41, 0.24, 1.82, -0.56])


def test_a_patch_is_carried_over_to_a_newer_base():
  old, tuned = TAU[0], TAU[1]
  models = {"w": jnp.stack([jnp.asarray(old), jnp.asarray(tuned)])}
  close(jaxmerge.merge(methods.portllm(), models, BASE)["w"], BASE["w"] + tuned - old)
  same = jaxmerge.merge(methods.portllm(), models, {"w": models["w"][0]})
  close(same["w"], tuned)


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


@pytest.mark.parametrize("norm", some_fast(["l1", "l2", "linf"], ["l2"]))
def test_trimming_gives_the_norm_back(norm):
  order = {"l1": 1, "l2": 2, "linf": np.inf}[norm]
  for method in (
    methods.ties(0.5, rescale=norm),
    methods.breadcrumbs(0.5, 0.2, 1.0, rescale=norm),
    methods.breadcrumbs_ties(0.5, 0.2, 1.0, rescale=norm),
  ):
    out = merged(method, TAU[:1])
    assert (out == 0).sum() >= 2
    close(np.linalg.norm(out, order), np.linalg.norm(TAU[0], order))
    close(merged(method, TAU[:1] * 0), np.zeros(6))


def test_at_least_one_entry_of_a_leaf_is_kept():
  """A fifth of four entries is none, rounded down."""
  tau = np.array([[1.0, -3.0, 2.0, 0.5]], np.float32)
  close(merged(methods.ties(0.2, scope="leaf", rule="exact"), tau), [0, -3, 0, 0])


@pytest.mark.parametrize("scope", ["tree", "leaf", "row"])
def test_breadcrumbs_passes_scalars_by(scope):
  base = {"w": jnp.zeros(2), "s": jnp.float32(0)}
  models = {"w": jnp.array([[3.0, 1.0]]), "s": jnp.array([7.0])}
  method = methods.breadcrumbs(keep=0.5, remove=0.0, scale=1.0, scope=scope)
  out = jaxmerge.merge(method, models, base)
  assert (out["w"].tolist(), out["s"].tolist()) == ([3.0, 0.0], 7.0)


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


@pytest.mark.parametrize("rule", ["kth", "exact"])
@pytest.mark.parametrize("scope", ["tree", "leaf"])
def test_the_entries_kept_are_counted_exactly(rule, scope):
  x = np.random.default_rng(0).permutation(100).astype(np.float32)[None] + 1
  models = {"a": jnp.asarray(x[:, :60]), "b": jnp.asarray(x[:, 60:])}
  method = methods.trim(0.5, scope=scope, rule=rule)
  for density in (0.001, 0.1, 0.29, 0.5, 0.7, 0.99, 1.0):
    out = jaxmerge.merge(method, models, hparams={"density": density})
    for names, size in [("ab", 100)] if scope == "tree" else [("a", 60), ("b", 40)]:
      kept = sum(int((out[n] != 0).sum()) for n in names)
      count = int(density * size)
      assert kept == (min(count + 1, size) if rule == "kth" else max(count, 1))


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


def test_weights_of_the_models_without_a_base():
  models = {"w": jnp.asarray(TAU), "n": jnp.array([4, 4, 4])}
  out = jaxmerge.merge(methods.average(weight=(0.0, 1.0, 1.0)), models)
  close(out["w"], TAU[1:].mean(axis=0))
  assert out["n"].tolist() == 4


@pytest.mark.parametrize("method", [methods.average((1.0, 2.0, 4.0)), methods.task_arithmetic(0.5)])
def test_folding_one_by_one_is_the_combiner(method):
  assert stage.foldable(method)
  step = next(s for s in method if s.combines)
  ready = interpreter.prepare(method, {"w": (6,)}, 3, {}, None)
  leaf = interpreter.leaf_of("w", ready)
  held = None
  for k in range(3):
    hparams = {n: v[k : k + 1] if np.ndim(v) else v for n, v in leaf.hparams.items()}
    held = step.fold.add(held, jnp.asarray(TAU[k : k + 1]), leaf._replace(hparams=hparams))
  close(step.fold.finish(held, leaf), step.update(jnp.asarray(TAU), leaf, {}))


def test_what_is_not_foldable():
  assert not stage.foldable(methods.ties())
  assert not stage.foldable(stage.join(methods.average(), lambda x, y, leaf: y))
  assert not stage.foldable(stage.masked(methods.average(), lambda name: True))
