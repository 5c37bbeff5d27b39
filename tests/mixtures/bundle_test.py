"""Bundles: what each task gets back, on worked examples and from disk."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from example import TAU, close, merged
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from marking import some_fast
from reference import basics
from reference import bundles as transcribed

import jaxmerge
from jaxmerge import methods
from jaxmerge.adapters import lora
from jaxmerge.io.tensors import safetensors
from jaxmerge.mixtures import bundle as bundles
from jaxmerge.mixtures import masks as mixtures_masks
from jaxmerge.mixtures import storage

NAMES = ("red", "green", "blue")
LIMITS = (0.0, 0.5, 1.0)
BASE = {"w": jnp.array([1.0, -1.0, 0.5, 0.0, 2.0, -0.5])}


def example(make, tau=TAU, **options):
  tau = jnp.asarray(tau, jnp.float32)
  names = NAMES[: len(tau)]
  return make({"w": tau[0] * 0}, {"w": tau}, names=names, **options)


def test_worked_example_of_emr():
  bundle = example(mixtures_masks.emr)
  close(bundle.shared["w"], [0.9, -0.5, -0.8, 0.7, -0.6, -0.4])
  masks = [[1, 1, 0, 0, 1, 0], [0, 1, 0, 1, 1, 0], [1, 0, 1, 1, 0, 1]]
  close(bundle.masks["w"], masks)
  close(bundle.scales, [1.1, 1.0, 0.821429])
  close(bundle.for_task("red")["w"], [0.99, -0.55, 0, 0, -0.66, 0])


@pytest.mark.slow
def test_emr_shares_untrimmed_ties_by_the_largest_and_is_homogeneous():
  """Bit for bit, where no sum is zero: twice the task vectors give every task twice its own."""
  tau = np.hstack([TAU, np.random.default_rng(0).normal(size=(3, 200))]).astype(np.float32)
  one, two = (example(mixtures_masks.emr, factor * tau) for factor in (1, 2))
  np.testing.assert_array_equal(one.shared["w"], merged(methods.ties(1.0, reduce="max"), tau))
  for name in NAMES:
    np.testing.assert_array_equal(two.for_task(name)["w"], 2 * one.for_task(name)["w"])


def test_worked_example_of_tall_masks():
  bundle = example(mixtures_masks.tall_masks, threshold=1.0)
  close(bundle.shared["w"], TAU.sum(axis=0))
  close(bundle.masks["w"], [[1, 0, 0, 0, 1, 0], [0, 1, 0, 1, 0, 0], [0, 0, 1, 0, 0, 1]])
  counts = np.asarray(example(mixtures_masks.tall_masks).masks["w"]).sum(axis=0)
  assert counts.tolist() == [2, 3, 2, 1, 2, 2]


def test_consensus_counts_tall_masks():
  masks = np.asarray(example(mixtures_masks.tall_masks, threshold=0.3).masks["w"])
  x = {"w": jnp.asarray(TAU)}
  found = methods.consensus(1.0, 0.3)
  kept = np.asarray(jaxmerge.merge(found, x, deltas=True)["w"]) != 0
  assert (kept == (masks.sum(axis=0) >= 2)).all()


@pytest.mark.slow
@pytest.mark.parametrize("make", [mixtures_masks.emr, mixtures_masks.tall_masks])
def test_one_task_gets_its_model_back(make):
  base, models = small.trees(height=1)
  bundle = make(base, models, names=("red",))
  own = {n: x[0] if n != "steps" else base[n] for n, x in models.items()}
  small.close(jax.tree.map(np.asarray, bundle.for_task("red")), own)


@pytest.mark.slow
@given(arrays.arrays(np.float32, (3, 7), elements=st.floats(-8, 8, width=16)))
def test_emr_gives_each_task_its_magnitude_back(tau):
  bundle = example(mixtures_masks.emr, tau)
  for k, name in enumerate(bundle.names):
    served = np.abs(bundle.for_task(name)["w"]).sum()
    if np.asarray(bundle.masks["w"])[k].any():
      np.testing.assert_allclose(served, np.abs(tau[k]).sum(), rtol=1e-4, atol=1e-5)
    else:
      assert served == 0


@jax.jit
def _served(base, models):
  """What all tasks get, of EMR with both ratios, and of TALL masks: one program."""
  emr = functools.partial(mixtures_masks.emr, base, models)
  made = (
    emr(ratio="leaf"),
    emr(ratio="tree"),
    mixtures_masks.tall_masks(base, models, threshold=LIMITS),
  )
  return [[bundle.for_task(name) for name in bundle.names] for bundle in made]


@given(arrays.arrays(np.int8, (4, 9), elements=st.integers(-8, 8)))
def test_agrees_with_a_transcription(x):
  """Entries are multiples of 1/4: sums are exact, and may well be zero or equal."""
  trees = {"matrix": x[:, :6].reshape(4, 2, 3) / 4, "vector": x[:, 6:] / 4}
  base, models = ({n: np.float32(t[s]) for n, t in trees.items()} for s in (0, slice(1, 4)))
  taus = basics.deltas(base, models)
  expected = transcribed.emr(taus, "leaf"), transcribed.emr(taus, "tree")
  for found, own in zip(
    _served(base, models), (*expected, transcribed.tall_masks(taus, LIMITS)), strict=True
  ):
    for served, tau in zip(found, own, strict=True):
      small.close(served, {n: base[n] + t for n, t in tau.items()}, atol=1e-5)


@pytest.mark.slow
def test_magnitudes_of_leaves_or_of_the_tree():
  """Two leaves of different size: their means add up, or their entries."""
  base = {"a": jnp.zeros(1), "b": jnp.zeros(3)}
  models = {"a": jnp.array([[1.0], [4.0]]), "b": jnp.array([[1.0, 1, 1], [-2, 0, 0]])}
  leaf, whole = (mixtures_masks.emr(base, models, ratio=r).scales for r in ("leaf", "tree"))
  # The first takes 4 and (0, 1, 1) of what is shared, the second 4 and (-2, 0, 0).
  close(leaf, [(1 + 1) / (4 + 2 / 3), 1.0])
  close(whole, [(1 + 3) / (4 + 2), 1.0])


def test_larger_thresholds_mask_more():
  kept = [
    np.asarray(example(mixtures_masks.tall_masks, threshold=t).masks["w"]) for t in (0, 0.4, 1, 5)
  ]
  assert all((more >= fewer).all() for more, fewer in itertools.pairwise(kept))
  assert (kept[0] == (TAU != 0)).all()
  alone = example(mixtures_masks.tall_masks, TAU[:1], threshold=5)
  assert (np.asarray(alone.masks["w"]) == (TAU[:1] != 0)).all()
  each = np.asarray(example(mixtures_masks.tall_masks, threshold=(0.0, 0.4, 5.0)).masks["w"])
  for k, one in enumerate((0, 1, 3)):
    assert (each[k] == kept[one][k]).all()


def test_what_is_shared_may_be_merged_by_any_method():
  bundle = example(mixtures_masks.tall_masks, method=methods.ties(0.5, reduce="sum"))
  close(bundle.shared["w"], [1.4, -0.5, -0.8, 0.7, -0.8, -0.4])


def models_of(base, models, names, *, make):
  """What each task gets back: {name: model}."""
  bundle = make(base, models, names=names)
  return {n: jax.tree.map(np.asarray, bundle.for_task(n)) for n in names}


def factors_of(base, models, names):
  """The same of `rmm`: its models are factors, and have no base."""
  pairs = zip(models["matrix"], models["cube"].reshape(-1, 3, 8), strict=True)
  each = [{"w": lora.Lora(jnp.asarray(a), jnp.asarray(b))} for a, b in pairs]
  bundle = bundles.rmm(each, names)
  own = {n: bundle.for_task(n)["w"] for n in names}
  return {n: {"matrix": np.asarray(x.a), "cube": np.asarray(x.b)} for n, x in own.items()}


SERVED = {
  "emr": functools.partial(models_of, make=mixtures_masks.emr),
  "emr by tree": functools.partial(
    models_of, make=functools.partial(mixtures_masks.emr, ratio="tree")
  ),
  "tall_masks": functools.partial(models_of, make=mixtures_masks.tall_masks),
  "rmm": factors_of,
}
served = pytest.mark.parametrize(
  "serve",
  [
    pytest.param(s, marks=[pytest.mark.slow] * (n == "emr by tree"), id=n)
    for n, s in SERVED.items()
  ],
)


@pytest.mark.slow
@served
def test_models_that_are_the_base_give_it_to_each_task(serve):
  base, models = small.trees(height=3)
  same = {n: np.stack([base[n]] * 3) for n in models}
  for own in serve(base, same, NAMES).values():
    agree = small.close if serve is factors_of else small.same  # A mean of three is rounded.
    agree({n: x.reshape(base[n].shape) for n, x in own.items()}, {n: base[n] for n in own})


@pytest.mark.slow
@served
def test_inputs_are_left_alone_and_tasks_get_the_same_bits_again(serve):
  base, models = small.trees(height=3)
  before = jax.tree.map(np.copy, (base, models))
  first, second = serve(base, models, NAMES), serve(base, models, NAMES)
  small.same(base, before[0])
  small.same(models, before[1])
  for name, own in first.items():
    small.same(own, second[name])
    assert all(x.dtype == base[n].dtype and x.size == base[n].size for n, x in own.items())


@served
def test_the_order_of_tasks_does_not_matter(serve):
  base, models = small.trees(height=3)
  order = [2, 0, 1]
  turned = {n: x[order] for n, x in models.items()}
  first = serve(base, models, NAMES)
  second = serve(base, turned, [NAMES[k] for k in order])
  for name in NAMES:
    small.close(second[name], first[name], 4e-6)


@served
def test_twice_the_task_vectors_give_each_task_twice_as_much(serve):
  """Masks and scales are the same."""
  base, models = small.trees(height=3)
  tau = {n: x - base[n][None] if x.dtype == np.float32 else x for n, x in models.items()}
  zero = jax.tree.map(np.zeros_like, base)
  once = serve(zero, tau, NAMES)
  twice = serve(zero, {n: 2 * x if x.dtype == np.float32 else x for n, x in tau.items()}, NAMES)
  for name, own in once.items():
    small.close(twice[name], {n: 2 * x for n, x in own.items()}, 4e-6)
    assert np.abs(own["matrix"]).max() > 0.1


@pytest.mark.parametrize("make", [mixtures_masks.emr, mixtures_masks.tall_masks])
@pytest.mark.parametrize("dtype", some_fast([jnp.float32, jnp.bfloat16], [jnp.float32]))
def test_saved_bundles_come_back(tmp_path, make, dtype):
  base, models = small.trees(height=3)
  low = lambda x: jnp.asarray(x, dtype) if x.dtype == np.float32 else jnp.asarray(x)  # noqa: E731
  base, models = ({"deep": jax.tree.map(low, t)} for t in (base, models))
  bundle = make(base, models, names=NAMES)
  storage.save(tmp_path / "bundle", bundle)
  found = storage.load(tmp_path / "bundle")
  assert found.names == NAMES
  assert found.method == bundle.method
  for name in NAMES:
    small.same(*(jax.tree.map(np.asarray, b.for_task(name)["deep"]) for b in (found, bundle)))
  size = sum(x.size for x in bundle.shared.values())
  assert (tmp_path / "bundle/masks.safetensors").stat().st_size < 3 * size / 8 + 1000
  with pytest.raises(FileExistsError):
    storage.save(tmp_path / "bundle", bundle)


def test_works_under_jit():
  base, models = small.trees(height=3)
  floats = lambda t: {n: x for n, x in t.items() if x.dtype == np.float32}  # noqa: E731
  base, models = floats(base), floats(models)

  @jax.jit
  def served(base, models):
    return mixtures_masks.emr(base, models, names=NAMES).for_task("green")

  small.close(served(base, models), mixtures_masks.emr(base, models, names=NAMES).for_task("green"))


def test_unknown_tasks_and_names_are_refused():
  bundle = example(mixtures_masks.emr)
  with pytest.raises(ValueError, match=r"no task 'gren'; did you mean 'green'\?"):
    bundle.for_task("gren")
  for names in (("a", "b"), ("a", "b", "a")):
    with pytest.raises(ValueError, match="3 models need as many different names, got"):
      mixtures_masks.emr({"w": jnp.zeros(6)}, {"w": jnp.asarray(TAU)}, names=names)


@pytest.mark.parametrize(
  "change",
  [
    {"names": ["red"]},
    {"scales": [1.0]},
    {"shapes": {"w": [7]}},
    {"shapes": {"v": [6]}},
    {"shapes": 3},
    {"names": None},
  ],
)
def test_damaged_descriptions_are_named(tmp_path, change):
  path = storage.save(tmp_path / "b", example(mixtures_masks.emr)) / storage.ABOUT
  path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
  with pytest.raises(ValueError, match=r"bundle.json: no description of a bundle"):
    storage.load(tmp_path / "b")


def test_missing_files_are_named(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"bundle.json: no such file"):
    storage.load(tmp_path)
  path = storage.save(tmp_path / "b", example(mixtures_masks.emr))
  safetensors.save(path / "masks.safetensors", {})
  with pytest.raises(ValueError, match=r"bundle.json: no description of a bundle"):
    storage.load(path)
  (path / "masks.safetensors").unlink()
  with pytest.raises(FileNotFoundError, match=r"masks.safetensors"):
    storage.load(path)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_rmm_keeps_how_matrices_lie_and_takes_narrow_factors(tmp_path, dtype):
  """A square matrix that lies [in, out] would be added transposed, did the bundle not know."""
  tasks = [
    {"w": lora.Swapped(jnp.array([[k, 2.0 * k]], dtype), jnp.array([[3.0], [4.0]], dtype))}
    for k in (1, 2)
  ]
  bundle = bundles.rmm(tasks, ("a", "b"))
  base = {"w": np.zeros((2, 2), np.float32)}
  for held in (bundle, storage.load(storage.save(tmp_path / "b", bundle))):
    out = lora.apply(base, held.for_task("b"))["w"]
    np.testing.assert_allclose(out, lora.apply(base, tasks[1])["w"], rtol=1e-5)
  other = {"w": lora.Lora(*tasks[1]["w"])}
  with pytest.raises(ValueError, match=r"'w' lies \[in, out\] in 'b' or 'a'"):
    bundles.rmm([tasks[0], other], ("a", "b"))


BN = {"batch_stats": {"bn": {"var": np.ones(2, np.float32)}}, "w": np.zeros(1, np.float32)}
VARS = {
  "batch_stats": {"bn": {"var": np.array([[0.1, 0.9], [0.9, 0.1]], np.float32)}},
  "w": np.array([[5.0], [-4.9]], np.float32),
}


@pytest.mark.parametrize("make", [mixtures_masks.emr, mixtures_masks.tall_masks])
def test_running_statistics_are_those_of_each_task(make, tmp_path):
  bundle = make(BN, VARS)
  for held in (bundle, storage.load(storage.save(tmp_path / "b", bundle))):
    for k in range(2):
      own = held.for_task(str(k))["batch_stats"]["bn"]["var"]
      np.testing.assert_array_equal(own, VARS["batch_stats"]["bn"]["var"][k])


@pytest.mark.parametrize("make", [mixtures_masks.emr, mixtures_masks.tall_masks])
def test_what_is_not_finite_is_refused(make):
  base = {"w": np.array([6e4], np.float16)}
  with pytest.raises(ValueError, match="leaf 'w' of model 1 has NaN or infinity"):
    make(base, {"w": np.array([[1.0], [np.nan]], np.float16)})
  base = {"w": np.zeros(1, np.float16)}
  bundle = make(base, {"w": np.array([[6e4], [6e4]], np.float16)})._replace(scales=np.full(2, 2.0))
  with pytest.raises(ValueError, match="leaf 'w': the result has NaN or infinity"):
    bundle.for_task("0")
