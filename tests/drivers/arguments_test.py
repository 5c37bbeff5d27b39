"""First mistakes of callers: each is named, or does what is meant."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state

import jaxmerge
from jaxmerge import methods
from jaxmerge.adapters import combine, deltas, lora, peft, truncation
from jaxmerge.core import stage
from jaxmerge.drivers import arguments, incremental, streaming
from jaxmerge.mixtures import masks

BASE = {"dense": {"kernel": np.zeros((4, 3), np.float32), "bias": np.zeros(3, np.float32)}}
TREES = [jax.tree.map(lambda x, k=k: x + k, BASE) for k in (1, 2, 6)]
STACK = jaxmerge.stack(TREES)
MEAN = methods.average()


@pytest.mark.parametrize(
  "models",
  [TREES, tuple(TREES), iter(TREES), dict(zip("abc", TREES, strict=True)), STACK],
  ids=["list", "tuple", "iterator", "dict", "stack"],
)
def test_several_trees_like_the_base_are_stacked(models):
  found = jaxmerge.merge(MEAN, models, BASE)
  assert {float(x) for leaf in jax.tree.leaves(found) for x in np.ravel(leaf)} == {3.0}


def test_a_dict_names_its_models():
  """Masks depend on names."""
  method, names = methods.dare(0.5), ["red", "green", "blue"]
  found = jaxmerge.merge(method, dict(zip(names, TREES, strict=True)), BASE, seed=0)
  expected = jaxmerge.merge(method, STACK, BASE, seed=0, names=names)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_tree_that_is_a_list_stays_a_stack():
  base = [np.zeros(2, np.float32), np.zeros(2, np.float32)]
  found = jaxmerge.merge(MEAN, [np.ones((3, 2), np.float32), np.zeros((3, 2), np.float32)], base)
  assert [x.tolist() for x in found] == [[1, 1], [0, 0]]


def narrowed(models):
  return [{"dense": {"kernel": m["dense"]["kernel"]}} for m in models]


def other(dtype):
  return jax.tree.map(lambda x: np.asarray(x).astype(dtype), BASE)


def update_another(**shapes):
  run = incremental.of(MEAN)
  leaves = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
  run.update(run.init(BASE), {"dense": leaves})


ADAPTER = {"dense": lora.Lora(np.ones((1, 4), np.float32), np.ones((3, 1), np.float32))}
MISTAKES = {
  "adapters for one": (
    lambda: lora.apply(BASE, [ADAPTER]),
    r"a list: give one of its items; adapters\.merge merges several",
  ),
  "adapters by name": (lambda: lora.apply(BASE, {"a": ADAPTER}), "such as its 'a'"),
  "path of an adapter": (lambda: truncation.compress("x", 1), r"adapters\.load\('x'\) reads one"),
  "paths of adapters": (lambda: combine.flora(["x"]), r"adapter 0 .* adapters\.load\('x'\)"),
  "path of adapters": (lambda: deltas.merge(MEAN, BASE, "x"), "must be a list of adapters"),
  "factors": (lambda: peft.save("x", {"w": (1, 2)}), r"tuple for 'w': give adapters\.Lora\(a"),
  "byte order": (lambda: jaxmerge.merge(MEAN, STACK, other(">f4")), "byte order of another"),
  "dates": (lambda: jaxmerge.merge(MEAN, [other("M8[D]")], BASE), "which is no number"),
  "long": (lambda: jaxmerge.merge(MEAN, [other("longdouble")], BASE), "wider than JAX"),
  "another tree": (
    lambda: update_another(kernel=(4, 3)),
    "'dense/bias' is only in the tree passed to init",
  ),
  "another shape": (
    lambda: update_another(kernel=(4, 3), bias=(1,)),
    r"'dense/bias' is \(1,\), but not in the tree passed to init",
  ),
  "name": (
    lambda: jaxmerge.merge("ties", STACK, BASE),
    r"pass the method, jaxmerge\.methods\.ties\(\)",
  ),
  "misspelt": (lambda: jaxmerge.merge("tise", STACK, BASE), "did you mean 'ties'"),
  "factory": (lambda: jaxmerge.merge(methods.ties, STACK, BASE), r"call it, ties\(\)"),
  "stage": (lambda: jaxmerge.merge(MEAN[0], STACK, BASE), r"write \(stage,\)"),
  "unchained": (lambda: jaxmerge.merge((methods.trim(0.2), MEAN), STACK, BASE), r"chain\(\.\.\.\)"),
  "order": (lambda: jaxmerge.merge(BASE, MEAN, STACK), "the method comes first"),
  "one model": (lambda: jaxmerge.merge(MEAN, TREES[0], BASE), r"one model .* such as \[model\]"),
  "swapped": (lambda: jaxmerge.merge(MEAN, BASE, STACK), "base and models seem to be swapped"),
  "swapped list": (lambda: jaxmerge.merge(MEAN, BASE, TREES), "base and models seem to be swapped"),
  "collection": (lambda: jaxmerge.merge(MEAN, STACK, {"params": BASE}), "lie under 'params'"),
  "missing leaf": (
    lambda: jaxmerge.merge(MEAN, [*TREES[:2], *narrowed(TREES[2:])], BASE),
    "'dense/bias' is in the base but not in model 2",
  ),
  "no base": (lambda: jaxmerge.merge(MEAN, STACK, {}), r"merge\(method, models\) merges without"),
  "no models": (lambda: jaxmerge.merge(MEAN, [], BASE), "the models must be a tree of arrays"),
  "paths": (lambda: jaxmerge.merge(MEAN, ["a"], "base"), "the base must be a tree .* not str"),
  "numbers": (lambda: jaxmerge.merge(MEAN, [{"w": 2.0}], {"w": 1.0}), "leaf 'w' .* is float"),
  "hparams": (lambda: arguments.hparams(0.3, None), "hparams must be hyperparameters by name"),
  "names": (lambda: jaxmerge.merge(MEAN, STACK, BASE, names="abc"), "names must be a list"),
  "blend": (
    lambda: jaxmerge.merge("average", STACK),
    r"pass the method, jaxmerge\.methods\.average\(\)",
  ),
  "blend of a list": (lambda: jaxmerge.merge(MEAN, TREES), r"jaxmerge\.stack\(models\)"),
  "blend of a list of one": (lambda: jaxmerge.merge(MEAN, TREES[:1]), r"a list of 1 tree is given"),
  "blend by name": (
    lambda: jaxmerge.merge(MEAN, {"a": TREES[0], "b": TREES[1]}),
    r"jaxmerge\.stack\(list\(models\.values\(\)\)\)",
  ),
  "stack of a dict": (lambda: jaxmerge.stack(BASE), r"models\.values\(\)"),
  "files, name": (lambda: jaxmerge.merge_files("ties", ["a"], "out"), r"methods\.ties\(\)"),
  "files, factory": (lambda: jaxmerge.merge_files(methods.ties, ["a"], "out"), "call it"),
  "files, one": (lambda: jaxmerge.merge_files(MEAN, "abc", "out"), r"give \['abc'\]"),
  "files, trees": (
    lambda: jaxmerge.merge_files(MEAN, TREES, "out"),
    "jaxmerge.merge merges arrays",
  ),
  "adapters": (lambda: deltas.merge(methods.ties, BASE, []), "call it"),
  "running": (lambda: incremental.of("average"), r"methods\.average\(\)"),
  "loop, method": (lambda: jaxmerge.tune_and_merge(len, BASE, [], methods.ties), "call it"),
  "loop, order": (lambda: jaxmerge.tune_and_merge(BASE, len, []), "apply must be a function"),
  "loop, settings": (
    lambda: jaxmerge.tune_and_merge(len, BASE, [], MEAN, {"rounds": 3}),
    "got dict",
  ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_named(case):
  call, message = MISTAKES[case]
  with pytest.raises(ValueError, match=message):
    call()


def test_words_that_there_are_not_name_what_is_meant():
  with pytest.raises(TypeError, match="no option 'outdtype'; did you mean 'dtype'"):
    jaxmerge.merge_files(MEAN, ["a"], "out", outdtype="float16")
  with pytest.raises(AttributeError, match="what mergekit calls so is average"):
    jaxmerge.methods.linear  # noqa: B018
  with pytest.raises(AttributeError, match=r"without a base it is merge\(method, models\)"):
    jaxmerge.blend  # noqa: B018


def trained(rate=0.1):
  return train_state.TrainState.create(apply_fn=len, params=TREES[0], tx=optax.adam(rate))


def tuned():
  return nnx.ModelAndOptimizer(
    nnx.Linear(2, 1, rngs=nnx.Rngs(0)), optax.sgd(0.1, 0.9), wrt=nnx.Param
  )


STATES = {
  "Flax": (trained, r"is an optimizer's state \(flax.training.*TrainState\).* give state\.params"),
  "optax": (
    lambda: (TREES[0], optax.chain(optax.clip(1.0), optax.adam(0.1)).init(TREES[0])),
    r"'1/1/0' of .* \(optax.*ScaleByAdamState\).* such as state\.params",
  ),
  "dict": (lambda: {"params": TREES[0], "opt_state": TREES[0]}, r"'opt_state/dense/bias' of"),
  "object of NNX": (tuned, r"ModelAndOptimizer\).* give flax\.nnx\.state\(model\)"),
  "state of NNX": (lambda: nnx.state(tuned()), r"'opt_state/.*give flax\.nnx\.state\(model\)"),
}


@pytest.mark.parametrize("case", STATES)
def test_states_of_optimizers_are_refused(case):
  """Moments are no weights; they were merged like these."""
  make, message = STATES[case]
  state = make()
  stack = jax.tree.map(lambda x: np.stack([x]), state)
  calls = [
    lambda: jaxmerge.merge(MEAN, [state], state),
    lambda: jaxmerge.merge(MEAN, [state], BASE),
    lambda: jaxmerge.merge(MEAN, stack),
    lambda: jaxmerge.stack([make(), make()]),
    lambda: incremental.of(MEAN).init(state),
    lambda: masks.emr(state, stack),
    lambda: streaming.merge_slices(MEAN, stack, state),
    lambda: jaxmerge.tune_and_merge(len, state, []),
  ]
  for call in calls:
    with pytest.raises(ValueError, match=message):
      call()


def test_what_is_told_to_give_in_place_of_a_state_merges():
  mean = jaxmerge.merge(MEAN, [trained().params], trained().params)
  jax.tree.map(np.testing.assert_array_equal, mean, TREES[0])
  own = nnx.state(tuned().model)
  jax.tree.map(np.testing.assert_array_equal, jaxmerge.merge(MEAN, [own], own), own)


def test_names_that_are_not_there():
  with pytest.raises(AttributeError, match="no method is called 'tise'; did you mean 'ties'"):
    methods.tise  # noqa: B018
  with pytest.raises(AttributeError, match=r"it is a method, jaxmerge\.methods\.ties\(\)"):
    jaxmerge.ties  # noqa: B018
  with pytest.raises(AttributeError, match="did you mean 'merge'"):
    jaxmerge.mrge  # noqa: B018


def test_an_adapter_of_one_task_or_of_several_by_name():
  for given in (ADAPTER, [ADAPTER], {"chat": ADAPTER}):
    found = deltas.merge(stage.chain(MEAN), BASE, given)
    np.testing.assert_array_equal(found["dense"]["kernel"], np.ones((4, 3)))
    np.testing.assert_array_equal(combine.average(given)["dense"].delta(), np.ones((3, 4)))


def test_modules_without_a_base_are_stacked_first():
  one, two = (nnx.Linear(4, 4, rngs=nnx.Rngs(k)) for k in (0, 1))
  for models in ([one, two], {"one": one, "two": two}, [nnx.split(one), nnx.split(two)]):
    with pytest.raises(ValueError, match=r"stack them: merge\(method, jaxmerge.stack\("):
      jaxmerge.merge(MEAN, models)
  merged = jaxmerge.merge(MEAN, jaxmerge.stack([one, two]))
  np.testing.assert_allclose(merged.kernel, (one.kernel + two.kernel) / 2, rtol=1e-6)
  # The parts of one stack may be alike: arrays, and the boxes that Flax puts them in.
  boxes = nnx.State({n: nnx.Param(np.float32([[1, 2], [3, 4]])) for n in "ab"})
  merged = jaxmerge.merge(MEAN, boxes)
  assert merged["b"][...].tolist() == [2, 3]
