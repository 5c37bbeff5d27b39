"""The driver for models in memory: what it takes, what it refuses, what it promises."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

import jaxmerge
from jaxmerge import methods
from jaxmerge.core import interpreter, layouts, stage, wide_counts
from jaxmerge.drivers import distributed_matrices, memory

AVERAGE, TA, TIES, DARE = (
  methods.average(),
  methods.task_arithmetic(0.5),
  methods.ties(0.5),
  methods.dare(0.5),
)


def changed(tree, name, value):
  return {**tree, name: value}


def test_the_one_liner():
  base = {"w": jnp.zeros(3)}
  experts = jaxmerge.stack([{"w": jnp.array([1.0, -2.0, 0.1])}, {"w": jnp.array([3.0, 1.0, 0.2])}])
  merged = jaxmerge.merge(jaxmerge.methods.ties(density=0.4, scale=1.0), experts, base)
  assert merged["w"].tolist() == [2.0, -2.0, 0.0]


def test_integers_are_the_bases_and_dtypes_too():
  base, models = small.trees()
  base["vector"] = base["vector"].astype(np.float16)
  out = jaxmerge.merge(AVERAGE, models, base)
  assert out["steps"].tolist() == [0, 1, 2, 3]
  assert {n: x.dtype for n, x in out.items()} == {n: x.dtype for n, x in base.items()}


def test_what_is_subtracted_need_not_be_what_is_added_to():
  """base + mean(models - reference)."""
  base, models = small.trees()
  reference = {n: x * 2 for n, x in base.items()}
  out = jaxmerge.merge(AVERAGE, models, base, reference=reference)
  expected = {n: base[n] + (models[n] - reference[n]).mean(axis=0) for n in base if n != "steps"}
  small.close({n: out[n] for n in expected}, expected)


def test_task_vectors_may_be_given():
  """base + M(deltas) is base + M((reference + deltas) - reference)."""
  base, deltas = small.trees(small.FEW)
  reference = {n: np.ones_like(x) for n, x in base.items()}
  deltas["matrix"] = np.round(deltas["matrix"] * 64) / 64  # That 1 + delta is exact.
  models = {n: deltas[n] + reference[n][None] for n in base}
  expected = jaxmerge.merge(TA, models, base, reference=reference)
  small.same(jaxmerge.merge(TA, deltas, base, deltas=True), expected)


def test_small_task_vectors_survive_bfloat16():
  """1/256 is lost when subtracted from 1 in bfloat16, not in float32: eight of them add up."""
  base = {"w": jnp.ones(4, jnp.bfloat16)}
  models = {"w": jnp.full((8, 4), 1 + 2**-7, jnp.bfloat16)}
  out = jaxmerge.merge(methods.task_arithmetic(1.0), models, base)
  assert out["w"].tolist() == [1 + 2**-4] * 4


def test_double_precision_stays_double():
  with jax.enable_x64():
    base = {"w": jnp.full(3, 1 / 3, jnp.float64)}
    models = {"w": base["w"][None] + jnp.array([[0.1], [0.2]], jnp.float64)}
    out = jaxmerge.merge(methods.task_arithmetic(0.3), models, base)["w"]
    np.testing.assert_allclose(out, np.full(3, 1 / 3 + 0.3 * 0.3), rtol=0, atol=1e-15)


def test_trees_of_any_shape():
  base = [jnp.zeros(2), (jnp.ones(()), {"x": jnp.ones((1, 1))})]
  models = jax.tree.map(lambda x: jnp.stack([x, x + 2]), base)
  out = jaxmerge.merge(AVERAGE, models, base)
  assert jax.tree.structure(out) == jax.tree.structure(base)
  assert jax.tree.map(lambda x: float(x.sum()), out) == [2.0, (2.0, {"x": 2.0})]


def test_keys_and_booleans_are_copied():
  base = {"w": jnp.zeros(2), "key": jax.random.key(1), "on": jnp.array([True])}
  models = jaxmerge.stack([base, base])
  out = jaxmerge.merge(AVERAGE, models, base)
  assert out["key"] == base["key"]
  assert jaxmerge.merge(AVERAGE, models)["on"].tolist() == [True]
  assert jaxmerge.merge(AVERAGE, models)["key"] == base["key"]


def test_numbers_per_leaf_and_per_entry():
  base, models = small.trees()
  tau = {n: models[n] - base[n][None] for n in base if n != "steps"}
  scale = {n: float(k) for k, n in enumerate(base)}
  out = jaxmerge.merge(TA, models, base, hparams={"scale": scale})
  small.close(out, {n: base[n] + scale[n] * tau[n].sum(0) if n in tau else base[n] for n in base})
  weight = {n: np.random.default_rng(0).random(4, np.float32) for n in models}
  out = jaxmerge.merge(TA, models, base, hparams={"weight": weight})
  each = {n: np.einsum("k,k...->...", weight[n], tau[n]) for n in tau}
  small.close(out, {n: base[n] + 0.5 * each[n] if n in tau else base[n] for n in base})


def test_a_density_per_leaf_needs_the_scope_of_a_leaf():
  base, models = small.trees()
  density = dict.fromkeys(base, 0.5)
  own = jaxmerge.merge(methods.ties(scope="leaf"), models, base, hparams={"density": density})
  small.same(own, jaxmerge.merge(methods.ties(0.5, scope="leaf"), models, base))
  message = "density is counted over 4 leaves together and cannot differ .*; give one number, or sc"
  with pytest.raises(ValueError, match=message):
    jaxmerge.merge(methods.ties(), models, base, hparams={"density": density})


def test_a_density_per_model():
  base, models = small.trees(small.FEW)
  out = jaxmerge.merge(TIES, models, base, hparams={"density": (0.1, 0.2, 0.3, 1.0)})
  trimmed = methods.trim(0.5)
  parts = []
  for k, density in enumerate((0.1, 0.2, 0.3, 1.0)):
    tau = {"matrix": (models["matrix"] - base["matrix"][None])[k : k + 1]}
    parts.append(
      np.asarray(jaxmerge.merge(trimmed, tau, hparams={"density": density}, deltas=True)["matrix"])
    )
  again = jaxmerge.merge(TIES, {"matrix": np.stack(parts)}, hparams={"density": 1.0}, deltas=True)[
    "matrix"
  ]
  np.testing.assert_allclose(out["matrix"] - base["matrix"], again, atol=1e-6)


def test_gradients_through_a_drop_rate_and_the_models():
  """d/dp tau / (1 - p) = tau / (1 - p)^2 where kept; d/dtheta of an average is w / sum(w)."""
  tau = {"w": jnp.arange(1.0, 21).reshape(1, 20)}
  zero = {"w": jnp.zeros(20)}

  def total(p):
    return jaxmerge.merge(DARE, tau, zero, hparams={"drop_rate": p, "scale": 1.0}, seed=3)[
      "w"
    ].sum()

  value, slope = jax.value_and_grad(total)(0.5)
  assert value > 0
  np.testing.assert_allclose(slope, value / 0.5, rtol=1e-6)
  weighted = methods.average((1.0, 3.0))
  base, models = {"w": jnp.zeros(2)}, {"w": jnp.ones((2, 2))}
  slopes = jax.grad(lambda m: jaxmerge.merge(weighted, m, base)["w"].sum())(models)
  assert slopes["w"].tolist() == [[0.25, 0.25], [0.75, 0.75]]


def test_numbers_are_no_constants_of_the_program():
  """What may vary is an argument: the numbers do not appear in the program's text."""
  base, models = small.trees(small.FEW)
  shapes = {"matrix": (8, 16)}
  ready = interpreter.prepare(methods.task_arithmetic(0.123456), shapes, 4, {}, None)
  given = {
    "method": TA,
    "layout": layouts.NONE,
    "distribution": distributed_matrices.of([], chains=True),
  }
  run = functools.partial(memory._compiled.lower, **given)
  base, models = ({"matrix": own["matrix"]} for own in (base, models))
  assert "0.123456" not in run(memory._Leaves(base, None, models, {}), ready).as_text()


@pytest.mark.parametrize("scope", ["leaf", "tree"])
def test_leaves_of_one_shape_are_traced_once(scope):
  """A model has a hundred of them: traced one by one, a search of thresholds took minutes."""
  traced = collections.Counter()

  def magnitude(x, leaf, known):
    traced["rank"] += 1
    return jnp.abs(x)

  def double(x, leaf, known):
    traced["update"] += 1
    return 2 * x.mean(axis=0, keepdims=True)

  rank = stage.Rank("cut", magnitude, rank="n", exact=True)
  step = stage.Stage(
    double,
    init=lambda group: {"n": wide_counts.share(0.5, group.size, group.num_models)},
    scope=scope,
    reductions=(rank,),
    combines=True,
  )
  base = {f"layer_{i}": np.zeros((2, 3), np.float32) for i in range(12)}
  models = {n: np.ones((2, 2, 3), np.float32) for n in base}
  out = jax.jit(lambda models: jaxmerge.merge((step,), models, base))(models)
  assert out["layer_7"].tolist() == [[2.0] * 3] * 2
  assert traced["update"] == 1
  assert traced["rank"] <= 6


def test_donated_stacks():
  """The caller decides on jit, and may give the stack away."""
  base, models = small.trees(small.FEW)
  run = jax.jit(lambda b, m: jaxmerge.merge(TA, m, b), donate_argnums=0)
  given = jax.tree.map(jnp.copy, base)
  small.same(jax.device_get(run(given, models)), jax.device_get(jaxmerge.merge(TA, models, base)))


def test_models_are_as_many_as_leaves_and_numbers_too():
  """A tuple like the tree is one number a leaf, an array one a model; which is not guessed."""
  Pair = collections.namedtuple("Pair", "a b")
  base, models = Pair(jnp.zeros(1), jnp.zeros(1)), Pair(*jnp.ones((2, 2, 1)))
  merge = functools.partial(jaxmerge.merge, methods.task_arithmetic(1.0))
  each = lambda out: [x.tolist() for x in out]  # noqa: E731
  assert each(merge(models, base, hparams={"scale": Pair(1.0, 3.0)})) == [[2.0], [6.0]]
  assert each(merge(models, base, hparams={"weight": Pair(1.0, 3.0)})) == [[2.0], [6.0]]
  assert each(merge(models, base, hparams={"weight": (1.0, 3.0)})) == [[4.0], [4.0]]
  plain = tuple(models), tuple(base)
  assert each(merge(*plain, hparams={"weight": np.array([1.0, 3.0])})) == [[4.0], [4.0]]
  assert each(merge(*plain, hparams={"weight": {"0": 1.0, "1": 3.0}})) == [[2.0], [6.0]]
  assert each(merge(tuple(x[:1] for x in models), tuple(base), hparams={"weight": (1.0, 3.0)})) == [
    [1.0],
    [3.0],
  ]
  assert each(jaxmerge.merge(methods.task_arithmetic(1.0, (1.0, 3.0)), *plain)) == [[4.0], [4.0]]
  lists = {"a": [1.0, 3.0], "b": (2.0, 4.0)}
  for own in (lists, Pair(**lists)):
    assert each(merge(models, base, hparams={"weight": own})) == [[4.0], [6.0]]
  with pytest.raises(ValueError, match="weight is a Pair: pass a tree of numbers to the merge"):
    methods.average(weight=Pair(1.0, 3.0))
  with pytest.raises(
    ValueError, match="weight has 2 values, which may be one for each of 2 models"
  ):
    merge(*plain, hparams={"weight": (1.0, 3.0)})
  Other = collections.namedtuple("Other", "cat dog")
  with pytest.raises(ValueError, match="hparams 'weight' has no value for leaf 'a'"):
    merge(models, base, hparams={"weight": Other(1.0, 3.0)})


# --- What is refused ---


def _nan(tree, name, at):
  out = jax.tree.map(np.copy, tree)
  out[name][at] = np.nan
  return out


BASE, MODELS = small.trees()
REFUSED = {
  "unknown number": (
    lambda: jaxmerge.merge(TIES, MODELS, BASE, hparams={"densty": 0.1}),
    r"has no hyperparameter 'densty'; did you mean 'density'\? Known: density, scale, weight",
  ),
  "setting among the numbers": (
    lambda: jaxmerge.merge(TIES, MODELS, BASE, hparams={"scope": "leaf"}),
    r"'scope' is a setting of the method.*: write ties\(scope='leaf'\)",
  ),
  "word for a number": (
    lambda: jaxmerge.merge(TIES, MODELS, BASE, hparams={"scale": "a"}),
    "scale must be a number, got 'a'",
  ),
  "missing seed": (
    lambda: jaxmerge.merge(DARE, MODELS, BASE),
    r"the method needs 'seed': give seed= or hparams=\{'seed': \.\.\.\}",
  ),
  "seed for a method without": (
    lambda: jaxmerge.merge(TA, MODELS, BASE, seed=1),
    "has no hyperparameter 'seed'; Known: scale, weight",
  ),
  "key for a seed": (
    lambda: jaxmerge.merge(DARE, MODELS, BASE, seed=jax.random.PRNGKey(0)),
    r"seed must be one whole number, such as 0, got values of shape \(2,\)",
  ),
  "negative seed": (
    lambda: jaxmerge.merge(DARE, MODELS, BASE, seed=-1),
    r"seed must be a whole number in \[0, 4294967295\], got -1",
  ),
  "seed of floats": (
    lambda: jaxmerge.merge(DARE, MODELS, BASE, hparams={"seed": jnp.float32(1)}),
    "seed must be a whole number, got float32",
  ),
  "seed that is a key": (
    lambda: jaxmerge.merge(DARE, MODELS, BASE, seed=jax.random.key(0)),
    "seed must be a whole number, got key<fry>",
  ),
  "density out of range": (
    lambda: jaxmerge.merge(TIES, MODELS, BASE, hparams={"density": 1.5}),
    r"density must be in \(0, 1\], got 1.5",
  ),
  "array out of range": (
    lambda: jaxmerge.merge(TIES, MODELS, BASE, hparams={"density": np.float32(0)}),
    r"density must be in \(0, 1\], got 0.0",
  ),
  "device array out of range": (
    lambda: jaxmerge.merge(DARE, MODELS, BASE, seed=0, hparams={"drop_rate": jnp.float32(-0.5)}),
    r"drop_rate must be in \[0, 1\], got -0.5",
  ),
  "NaN per leaf": (
    lambda: jaxmerge.merge(
      TA, MODELS, BASE, hparams={"scale": {n: float("nan") if n == "cube" else 1.0 for n in BASE}}
    ),
    "scale of leaf 'cube' must be in .*, got nan",
  ),
  "no value for a leaf": (
    lambda: jaxmerge.merge(TA, MODELS, BASE, hparams={"scale": {"matrix": 1.0}}),
    "hparams 'scale' has no value for leaf 'cube'",
  ),
  "value for no leaf": (
    lambda: jaxmerge.merge(
      TA, MODELS, BASE, hparams={"scale": dict.fromkeys([*BASE, "bias"], 1.0)}
    ),
    "hparams 'scale' has a value for 'bias', which is no leaf of the models",
  ),
  "three weights for four models": (
    lambda: jaxmerge.merge(AVERAGE, MODELS, BASE, hparams={"weight": (1.0, 2.0, 3.0)}),
    "weight has 3 values, but there are 4 models",
  ),
  "array of weights of another length": (
    lambda: jaxmerge.merge(AVERAGE, MODELS, BASE, hparams={"weight": jnp.ones(5)}),
    "weight has 5 values, but there are 4 models",
  ),
  "matrix of weights": (
    lambda: jaxmerge.merge(AVERAGE, MODELS, BASE, hparams={"weight": np.ones((4, 2))}),
    r"weight has shape \(4, 2\); a hyperparameter is one number, or one per model \(4,\)",
  ),
  "weights of entries": (
    lambda: jaxmerge.merge(TA, MODELS, BASE, hparams={"weight": MODELS}),
    r"weight of leaf 'cube' has shape \(4, 2, 3, 4\); a hyperparameter is .* are statistics",
  ),
  "a scale per model behind the combiner": (
    lambda: jaxmerge.merge(TA, MODELS, BASE, hparams={"scale": (1.0, 2.0, 3.0, 4.0)}),
    "scale has 4 values, but acts on a stack of 1; after a combiner it must be one number",
  ),
  "two models in an analogy": (
    lambda: jaxmerge.merge(methods.analogy(), {n: x[:2] for n, x in MODELS.items()}, BASE),
    "weight has 3 values, but there are 2 models",
  ),
  "weights that cancel": (
    lambda: jaxmerge.merge(methods.average((1.0, -1.0, 0.5, -0.5)), MODELS, BASE),
    r"weights must not add up to zero, got \[1.0, -1.0, 0.5, -0.5\] for leaf 'cube'",
  ),
  "array of weights that cancel": (
    lambda: jaxmerge.merge(AVERAGE, MODELS, BASE, hparams={"weight": jnp.zeros(4)}),
    r"weights must not add up to zero, got \[0.0, 0.0, 0.0, 0.0\] for leaf 'cube'; give other",
  ),
  "weights that cancel in one leaf": (
    lambda: jaxmerge.merge(
      AVERAGE, MODELS, BASE, hparams={"weight": {n: 0.0 if n == "vector" else 1.0 for n in BASE}}
    ),
    "weights must not add up to zero, got 0.0 for leaf 'vector'",
  ),
  "names of another number": (
    lambda: jaxmerge.merge(AVERAGE, MODELS, BASE, names=["a", "b"]),
    r"names must be 4 different names, one per model, got \['a', 'b'\]",
  ),
  "two models of one name": (
    lambda: jaxmerge.merge(AVERAGE, MODELS, BASE, names=["a", "b", "c", "a"]),
    r"names must be 4 different names, one per model, got \['a', 'b', 'c', 'a'\]",
  ),
  "stacks of several heights": (
    lambda: jaxmerge.merge(AVERAGE, changed(MODELS, "vector", MODELS["vector"][:3]), BASE),
    "leaf 'vector' holds 3 models, but 'cube' holds 4",
  ),
  "no task axis": (
    lambda: jaxmerge.merge(AVERAGE, changed(MODELS, "scalar", np.float32(1)), BASE),
    "leaf 'scalar' is a scalar; in a stack every leaf has a leading task axis",
  ),
  "leaf that the base lacks": (
    lambda: jaxmerge.merge(AVERAGE, changed(MODELS, "bias", MODELS["vector"]), BASE),
    "leaf 'bias' is in the models but not in the base",
  ),
  "leaf that the models lack": (
    lambda: jaxmerge.merge(AVERAGE, MODELS, changed(BASE, "bias", BASE["vector"])),
    "leaf 'bias' is in the base but not in the models",
  ),
  "another shape": (
    lambda: jaxmerge.merge(AVERAGE, MODELS, changed(BASE, "vector", np.zeros(5, np.float32))),
    r"leaf 'vector' is \(5,\) in the base but \(16,\) in the models",
  ),
  "reference of another shape": (
    lambda: jaxmerge.merge(
      AVERAGE, MODELS, BASE, reference=changed(BASE, "vector", np.zeros(5, np.float32))
    ),
    r"leaf 'vector' is \(16,\) in the base but \(5,\) in the reference",
  ),
  "integers against floats": (
    lambda: jaxmerge.merge(AVERAGE, MODELS, changed(BASE, "vector", np.zeros(16, np.int32))),
    "leaf 'vector' is int32 in the base but float32 in the models",
  ),
  "NaN in the base": (
    lambda: jaxmerge.merge(AVERAGE, MODELS, _nan(BASE, "matrix", (0, 0))),
    "leaf 'matrix' of the base has NaN or infinity",
  ),
  "NaN in the base beside a reference": (
    lambda: jaxmerge.merge(AVERAGE, MODELS, _nan(BASE, "matrix", (0, 0)), reference=BASE),
    "leaf 'matrix' of the base has NaN or infinity",
  ),
  "NaN in the reference": (
    lambda: jaxmerge.merge(AVERAGE, MODELS, BASE, reference=_nan(BASE, "cube", 0)),
    "leaf 'cube' of the reference has NaN or infinity",
  ),
  "NaN in a model": (
    lambda: jaxmerge.merge(AVERAGE, _nan(MODELS, "vector", (2, 5)), BASE),
    "leaf 'vector' of model 2 has NaN or infinity",
  ),
  "NaN in a named model": (
    lambda: jaxmerge.merge(AVERAGE, _nan(MODELS, "vector", (2, 5)), BASE, names=small.NAMES),
    "leaf 'vector' of model blue has NaN or infinity",
  ),
  "NaN in a blended model": (
    lambda: jaxmerge.merge(AVERAGE, {"w": np.array([[1.0], [np.inf]], np.float32)}),
    "leaf 'w' of model 1 has NaN or infinity",
  ),
  "integers that differ": (
    lambda: jaxmerge.merge(AVERAGE, {"n": np.arange(4), "w": np.ones((4, 1), np.float32)}),
    "leaf 'n' is int64 and differs between models; drop it first",
  ),
  "no models": (lambda: jaxmerge.merge(AVERAGE, {}), "there is no leaf in it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_by_name(name):
  run, message = REFUSED[name]
  with pytest.raises(ValueError, match=message):
    run()


@pytest.mark.parametrize("k", range(4))
def test_nan_is_found_in_every_model_whatever_its_place(k):
  with pytest.raises(ValueError, match=f"of model {small.NAMES[k]} has NaN"):
    jaxmerge.merge(AVERAGE, _nan(MODELS, "matrix", (k, 1, 1)), BASE, names=small.NAMES)
