"""The algebra: chains, masks, joins, scopes, and what a stage must keep to."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge
from jaxmerge import methods
from jaxmerge.core import reductions, stage

MODELS = {"a": jnp.array([[1.0, -2.0], [3.0, 4.0]]), "b": jnp.array([[10.0], [20.0]])}
added = stage.pointwise(lambda x: x.sum(axis=0, keepdims=True), combines=True)


def blended(method, models=MODELS, **options):
  out = jaxmerge.merge(method, models, **options)
  return {n: np.asarray(x).tolist() for n, x in out.items()}


def test_a_chain_runs_from_left_to_right():
  doubled, squared = stage.pointwise(lambda x: 2 * x), stage.pointwise(lambda x: x * x)
  assert blended(stage.chain(doubled, squared, added))["b"] == [400.0 + 1600.0]
  assert blended(stage.chain(squared, doubled, added))["b"] == [200.0 + 800.0]
  assert len(stage.chain()) == 0


def test_chains_associate():
  a, b = stage.pointwise(jnp.abs), stage.pointwise(jnp.square)
  assert stage.chain(a, stage.chain(b, added)) == stage.chain(stage.chain(a, b), added)


def test_a_mask_lets_other_leaves_pass():
  negated = stage.masked(stage.pointwise(jnp.negative), lambda name: name == "b")
  assert blended(stage.chain(negated, added)) == {"a": [4.0, 2.0], "b": [-30.0]}


def test_masks_of_masks_are_their_intersection():
  inner = stage.masked(stage.pointwise(jnp.negative), lambda name: name != "a")
  outer = stage.masked(inner, lambda name: name != "b")
  assert blended(stage.chain(outer, added)) == blended(added)


def test_a_mask_has_its_own_thresholds():
  """Entries of leaves that are passed by are not counted."""
  trimmed = stage.masked(methods.trim(0.5, rule="exact"), lambda name: name == "a")
  assert blended(stage.chain(trimmed, added)) == {"a": [0.0, 2.0], "b": [30.0]}


def test_a_join_sees_the_stack_before_and_after():
  """Each model where it agrees in sign with the sum: masks by the merged vector."""
  agreeing = stage.join(added, lambda x, y, leaf: jnp.where(x * y > 0, x, 0))
  assert blended(stage.chain(agreeing, added)) == {"a": [4.0, 4.0], "b": [30.0]}


def test_joins_nest():
  inner = stage.join(stage.pointwise(jnp.square), lambda x, y, leaf: y - x)
  outer = stage.join(inner, lambda x, y, leaf: x + 2 * y)
  # x + 2 (x^2 - x)
  assert blended(stage.chain(outer, added))["b"] == [10 + 2 * 90 + 20 + 2 * 380.0]


def test_leafwise_gets_numbers_and_the_base():
  """Towards the base by half: x is the task vector, leaf.base the reference."""
  method = stage.leafwise(
    lambda x, leaf: x * leaf.hparam("damping", x) + leaf.base[None], hparams={"damping": 0.5}
  )
  base = {"w": jnp.array([1.0, 2.0])}
  models = {"w": jnp.array([[3.0, 4.0]])}
  combined = stage.chain(method, added)
  assert jaxmerge.merge(combined, models, base)["w"].tolist() == [3.0, 5.0]
  assert jaxmerge.merge(combined, models, base, hparams={"damping": 1.0})["w"].tolist() == [
    4.0,
    6.0,
  ]


@pytest.mark.parametrize(
  ("scope", "expected"),
  [
    ("tree", {"a": 2 * 5, "b": 1 * 5}),
    ("leaf", {"a": 2 * 2, "b": 1 * 1 + 0}),
    (lambda name: "ab" if name in "ab" else "rest", {"a": 2 * 3, "b": 1 * 3}),
  ],
)
def test_scope_says_where_statistics_are_added_up(scope, expected):
  """Every entry becomes the number of entries of its group."""
  counted = reductions.total("n", lambda x, leaf: jnp.float32(x[0].size))
  step = stage.Stage(lambda x, leaf, known: x * 0 + known["n"], (counted,), scope=scope)
  models = {"a": jnp.zeros((1, 2)), "b": jnp.zeros((1, 1)), "c": jnp.zeros((1, 2))}
  out = jaxmerge.merge((step,), models)
  assert {n: float(out[n].sum()) for n in expected} == expected


def test_statistics_know_those_before_them():
  mean = reductions.total("mean", lambda x, leaf: x.mean(axis=1))
  spread = stage.Sum(
    "spread", lambda x, leaf, known: jnp.square(x - known["mean"][:, None]).mean(axis=1)
  )
  step = stage.Stage(
    lambda x, leaf, known: (x - known["mean"][:, None]) / jnp.sqrt(known["spread"])[:, None],
    (mean, spread),
    scope="leaf",
  )
  out = blended(stage.chain((step,), added), {"a": jnp.array([[1.0, 3.0], [10.0, 30.0]])})
  assert out == {"a": [-2.0, 2.0]}


def test_numbers_of_a_method_with_their_defaults():
  found = stage.hparams(methods.dare_ties(0.5, 0.2, 1.0, (1.0, 2.0)))
  assert found == {
    "drop_rate": 0.5,
    "seed": None,
    "density": 0.2,
    "weight": (1.0, 2.0),
    "scale": 1.0,
  }


def test_stages_that_share_a_number_must_agree():
  """A number has one value: another default would be passed over in silence."""
  assert stage.hparams(stage.chain(methods.trim(0.5), methods.trim(0.5))) == {"density": 0.5}
  twice = stage.chain(methods.trim(0.5), methods.trim(0.2), added)
  with pytest.raises(
    ValueError, match=r"share the hyperparameter 'density', but one has 0.5 .* 0.2"
  ):
    jaxmerge.merge(twice, MODELS)


def test_a_stage_that_combines_must_say_so():
  silent = stage.pointwise(lambda x: x.sum(axis=0, keepdims=True))
  with pytest.raises(ValueError, match=r"1 models for one of 2; a combiner must .* combines="):
    jaxmerge.merge(stage.chain(silent, added), MODELS)
  idle = stage.pointwise(lambda x: x, combines=True)
  with pytest.raises(ValueError, match="2 models for one of 2; a combiner must leave one"):
    jaxmerge.merge(idle, MODELS)


def test_a_mistyped_hyperparameter_is_named():
  method = stage.leafwise(lambda x, leaf: x ** leaf.hparam("powr", x), hparams={"power": 2.0})
  with pytest.raises(ValueError, match=r"hyperparameter 'powr'; did you mean 'power'\?"):
    jaxmerge.merge(stage.chain(method, added), MODELS)


@pytest.mark.parametrize(
  "method",
  [stage.pointwise(jnp.abs), stage.masked(added, lambda name: name == "a"), ()],
)
def test_a_leaf_that_no_combiner_touched_is_named(method):
  left = "b" if method and method[0].combines else "a"
  message = f"no combiner touched leaf '{left}': 2 models are left of it .* combines=True"
  with pytest.raises(ValueError, match=message):
    jaxmerge.merge(method, MODELS)
  base = {n: x[0] for n, x in MODELS.items()}
  with pytest.raises(ValueError, match=message):
    jaxmerge.merge(method, MODELS, base)


def test_a_join_that_undoes_its_combiner_is_found_too():
  apart = stage.join(added, lambda x, y, leaf: x)
  with pytest.raises(ValueError, match="no combiner touched leaf 'a': 2 models are left"):
    jaxmerge.merge(apart, MODELS)


def test_a_stage_that_joins_measures_the_pair():
  """Entries times the largest before over the largest after."""

  def ratio(pair, leaf, known):
    before, after = known["largest"]
    return pair[1] * (before / after)[:, None]

  def largest(pair, leaf):
    return tuple(jnp.abs(x).max(axis=1) for x in pair)

  last = stage.Stage(ratio, (reductions.greatest("largest", largest),), scope="leaf")
  halved = stage.join(stage.pointwise(lambda x: jnp.where(x > 2, x / 4, x)), last)
  models = {"a": jnp.array([[1.0, 8.0], [2.0, 1.0]])}
  assert blended(stage.chain(halved, added), models) == {"a": [6.0, 9.0]}


def test_the_order_of_models_is_kept_where_it_matters():
  pointwise = stage.pointwise(lambda x: x[:1], combines=True, ordered=True)
  leafwise = stage.leafwise(lambda x, leaf: x[:1], combines=True, ordered=True)
  assert stage.ordered(pointwise)
  assert stage.ordered(leafwise)
  assert not stage.ordered(added)
  for first in (pointwise, leafwise):
    for names in (("a", "b"), ("b", "a")):
      out = jaxmerge.merge(first, MODELS, names=names)
      np.testing.assert_array_equal(out["a"], MODELS["a"][0])


def test_rows_without_a_view_are_one_row_if_the_stage_says_so():
  """x over the sum of its row, where the base's row is shown too."""
  step = stage.Stage(
    lambda x, leaf, known: x / (leaf.base[None] + x).sum(axis=2, keepdims=True),
    unit="row",
    rest="row",
  )
  base = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2)), "c": jnp.float32(1)}
  tau = {"a": jnp.array([[[1.0, 5.0], [1.0, 1.0]]]), "c": jnp.array([3.0])}
  models = {"a": 1 + tau["a"], "b": 1 + tau["a"], "c": 1 + tau["c"]}
  out = jaxmerge.merge((step,), models, base, layout=(("a", "io"), ("b", None)))
  assert (out["a"] - 1).tolist() == [[0.25, 0.625], [0.25, 0.125]]
  np.testing.assert_allclose(out["b"] - 1, tau["a"][0] / 12, atol=1e-6)
  assert out["c"] - 1 == 0.75


def test_rows_need_a_view_or_a_rest():
  step = stage.Stage(lambda x, leaf, known: x / x.sum(axis=2, keepdims=True), unit="row")
  method = stage.chain((step,), added)
  models = {"a": jnp.array([[[1.0, 3.0], [1.0, 1.0]]])}
  assert jaxmerge.merge(method, models, layout=(("a", "oi"),))["a"].tolist() == [
    [0.25, 0.75],
    [0.5, 0.5],
  ]
  assert jaxmerge.merge(method, models, layout=(("a", "io"),))["a"].tolist() == [
    [0.5, 0.75],
    [0.5, 0.25],
  ]
  with pytest.raises(ValueError, match="no matrix view; declare it in `layout` or mask the method"):
    jaxmerge.merge(method, models, layout=(("a", None),))


def test_a_method_is_shown_by_its_call():
  assert repr(methods.slerp(t=0.25)) == "slerp(t=0.25)"
  assert repr(methods.ties()).startswith("ties(density=0.2, weight=1.0, scale=1.0, ")
  assert repr(stage.chain(methods.average(), methods.scaled(0.5))).startswith("average + scaled(")
  assert repr(stage.pointwise(abs)) == "method()"
