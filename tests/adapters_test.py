"""LoRA adapters in memory: worked examples, identities, files, and what is refused."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from example import close
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import adapters as transcribed
from reference import bundles as apart

import jaxmerge
from jaxmerge import adapters, bundles, methods, reversible
from jaxmerge.adapters import Lora
from jaxmerge.io import safetensors

ONE = {"w": Lora(jnp.array([[1.0, 2, 0]]), jnp.array([[1.0], [0]]))}
TWO = {"w": Lora(jnp.array([[0.0, 0, 1], [1, 0, 0]]), jnp.array([[0.0, 1], [1, 1]]))}
SHARES = (0.25, 0.75)


def drawn(ranks=(3, 3, 3, 3), seed=0):
  """Adapters of two matrices, [5, 7] and [4, 5]."""
  rng = np.random.default_rng(seed)

  def lora(rank, rows, columns):
    a, b = rng.normal(size=(rank, columns)), rng.normal(size=(rows, rank))
    return Lora(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), float(rng.uniform(1, 2)))

  return [{"up": lora(r, 5, 7), "down": lora(r, 4, 5)} for r in ranks]


def test_worked_example_of_stacking():
  close(adapters.flora([ONE, TWO], SHARES)["w"].delta(), [[1, 0.5, 0], [0.75, 0, 0.75]])
  padded = adapters.averaged([ONE, TWO], SHARES, pad=True)["w"]
  close(padded.delta(), [[0.625, 0.125, 0.1875], [0.75, 0.375, 0.5625]])


def test_stacking_is_task_arithmetic_of_what_the_adapters_add():
  every = drawn((1, 4, 2))
  weights = (0.2, 1.5, -0.3)
  found = adapters.flora(every, weights)
  for name in found:
    assert found[name].rank == 7
    expected = sum(w * x[name].delta() for w, x in zip(weights, every, strict=True))
    close(found[name].delta(), expected, atol=1e-5)


SEEDS, WEIGHTS = st.integers(0, 2**32 - 1), st.tuples(*[st.floats(-2, 2)] * 3)


@settings(max_examples=10)
@given(SEEDS, WEIGHTS)
def test_stacks_and_means_agree_with_a_transcription(seed, weights):
  every = drawn((1, 4, 2), seed)
  stacked = adapters.flora(every, weights)
  padded = adapters.averaged(every, weights, pad=True)
  for n in stacked:
    own = [x[n] for x in every]
    for found, make in ((stacked[n], transcribed.flora), (padded[n], transcribed.averaged)):
      a, b = make(own, weights)
      close(found.a, a, atol=1e-5)
      close(found.b, b, atol=1e-5)
      close(found.delta(), b @ a, atol=1e-4)


@settings(max_examples=8)
@given(SEEDS, st.sampled_from([1, 2]))
def test_planes_agree_with_a_transcription(seed, components):
  every = [{"down": x["down"]} for x in drawn((3, 3, 3, 3), seed)]
  bundle = bundles.rmm(every, TASKS, components=components)
  a = apart.rmm([x["down"].a.T for x in every], components)
  b = apart.rmm([x["down"].b for x in every], components)
  for k, name in enumerate(TASKS):
    close(bundle.for_task(name)["down"].delta(), every[k]["down"].scale * b[k] @ a[k].T, atol=1e-4)


def test_what_some_adapters_lack_counts_as_nothing_added():
  close(adapters.flora([ONE, {}], SHARES)["w"].delta(), 0.25 * ONE["w"].delta())


def test_applying_and_merging_is_stacking_and_applying():
  """The two ways around: delta space, and factors."""
  every = drawn((2, 3))
  rng = np.random.default_rng(1)
  shapes = {"up": (7, 5), "down": (5, 4)}  # Flax's kernels are [in, out].
  base = {n: {"kernel": jnp.asarray(rng.normal(size=s), jnp.float32)} for n, s in shapes.items()}
  models = jaxmerge.stack([adapters.applied(base, x) for x in every])
  merged = jaxmerge.merge(methods.task_arithmetic(1.0, (0.3, 0.7)), base, models)
  other = adapters.applied(base, adapters.flora(every, (0.3, 0.7)))
  for n in shapes:
    close(merged[n]["kernel"], other[n]["kernel"], atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_stacking_rounds_once(dtype):
  """As PEFT's `cat`: weights and scalings are multiplied into a, and b stays as it is."""
  every = [{"w": x["up"]._replace(a=x["up"].a.astype(dtype))} for x in drawn((1, 3))]
  found = adapters.flora(every, (0.3, 0.7))["w"]
  own = [x["w"] for x in every]
  wide = [w * x.scale * np.asarray(x.a, np.float64) for w, x in zip((0.3, 0.7), own, strict=True)]
  close(found.a, np.concatenate(wide), atol=float(jnp.finfo(dtype).eps) * np.abs(wide[1]).max() / 2)
  close(found.b, np.concatenate([x.b for x in own], axis=1), atol=0)
  assert found.a.dtype == dtype
  assert found.scale == 1


@pytest.mark.parametrize("rank", [1, 2, 6, 9])
def test_recompression_is_the_nearest_of_its_rank(rank):
  (one,) = drawn((6,))
  found = adapters.recompressed(one, rank)
  for name, own in one.items():
    u, s, vt = np.linalg.svd(np.asarray(own.delta(), np.float64), full_matrices=False)
    close(found[name].delta(), (u[:, :rank] * s[:rank]) @ vt[:rank], atol=1e-4)
    assert found[name].rank <= rank


def test_adapters_of_low_precision_stay_so_at_a_lower_rank():
  own = Lora(jnp.eye(2, dtype=jnp.bfloat16) * 3, jnp.diag(jnp.array([1, 0.25], jnp.bfloat16)))
  found = adapters.recompressed({"w": own}, 1)["w"]
  assert found.a.dtype == found.b.dtype == jnp.bfloat16
  close(found.delta(), [[3, 0], [0, 0]], atol=0.02)


def test_a_saved_adapter_comes_back(tmp_path):
  one = adapters.flora(drawn((2, 3)))
  one["up"] = drawn((4,))[0]["up"]
  adapters.save(tmp_path / "adapter", one)
  found = adapters.load(tmp_path / "adapter")
  for name in one:
    close(found[name].delta(), one[name].delta(), atol=1e-5)
    assert found[name].rank == one[name].rank
  config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
  assert config["r"] == 5
  assert config["rank_pattern"] == {"up": 4}


def test_what_is_no_factor_is_refused(tmp_path):
  adapters.save(tmp_path / "adapter", ONE)
  path = tmp_path / "adapter" / "adapter_model.safetensors"
  safetensors.save(path, {"base_model.model.w.weight": np.zeros((2, 2), np.float32)})
  with pytest.raises(ValueError, match=r"is no factor of a plain LoRA layer; apply the adapter"):
    adapters.load(tmp_path / "adapter")


REFUSED = {
  "no adapters": (lambda: adapters.flora([]), "no adapters are given"),
  "weights": (lambda: adapters.flora([ONE], (1.0, 2.0)), r"1 adapters need as many weights"),
  "ranks": (
    lambda: adapters.averaged([ONE, TWO]),
    r"factors of 'w' cannot be averaged: their ranks are \[1, 2\]; stack them .*pad=True",
  ),
  "missing": (
    lambda: adapters.averaged([ONE, {}]),
    r"'w' cannot be averaged: their ranks are \[1, 0\]",
  ),
  "no matrix": (
    lambda: adapters.applied({"v": jnp.zeros((2, 3))}, ONE),
    r"the model has no matrix 'w'.* Known: v",
  ),
  "shape": (
    lambda: adapters.applied({"w": jnp.zeros((3, 3))}, ONE),
    r"the adapter of 'w' is for a matrix \[2, 3\] of outputs and inputs, but 'w' is \[3, 3\]",
  ),
  "rank": (lambda: adapters.recompressed(ONE, 0), "rank must be at least 1, got 0"),
  "tasks": (
    lambda: bundles.rmm([ONE, TWO], ("a", "b")),
    r"matrix 'w': its factors are .* in 'b', but .* in 'a'",
  ),
  "names": (lambda: bundles.rmm([ONE, ONE], ("a", "a")), "2 adapters need as many different names"),
  "components": (
    lambda: bundles.rmm([ONE, ONE], ("a", "b"), components=2),
    "components must be from 0 to 1, for 2 adapters of rank 1, got 2",
  ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused(case):
  call, message = REFUSED[case]
  with pytest.raises(ValueError, match=message):
    call()


X = np.array([[1.0, 3, 2, 4], [0, 2, 1, 5]])
TASKS = ("a", "b", "c", "d")


def tasks():
  """Four adapters whose b has one row, of which the specification of the method is an example."""
  eye = jnp.eye(2)
  return [{"w": Lora(eye, jnp.asarray(X[:, i][None], jnp.float32))} for i in range(4)]


def test_worked_example_of_reverting():
  bundle = bundles.rmm(tasks(), TASKS)
  close(bundle.means["w/b"][0], [2.5, 2.0])
  close(np.abs(bundle.bases["w/b"][0, :, 0]), [0.504846, 0.863209], atol=2e-6)
  found = np.stack([bundle.for_task(n)["w"].b[0] for n in TASKS], axis=1)
  close(found[:, 0], [1.24612, -0.143943], atol=2e-5)
  assert np.sum((found - X) ** 2) == pytest.approx(0.566763**2, abs=1e-5)
  assert np.linalg.norm(bundle.coefficients["w/b"]) == pytest.approx(4.321895, abs=1e-5)


@pytest.mark.parametrize("n", [2, 3, 6])
def test_nothing_is_lost_with_as_many_directions_as_there_can_be(n):
  every = drawn((4,) * n)
  names = [str(k) for k in range(n)]
  bundle = bundles.rmm(every, names, components=min(4, n - 1))
  for k, own in enumerate(every):
    for name, lora in bundle.for_task(str(k)).items():
      close(lora.delta(), own[name].delta(), atol=1e-4)


def test_more_directions_lose_less():
  every = drawn((4,) * 6)
  names = [str(k) for k in range(6)]
  left = []
  for p in range(5):
    bundle = bundles.rmm(every, names, components=p)
    made = [bundle.for_task(n)["up"].b for n in names]
    left.append(sum(float(jnp.sum((m - x["up"].b) ** 2)) for m, x in zip(made, every, strict=True)))
  assert left == sorted(left, reverse=True)
  assert left[-1] < 1e-6 * left[0]


def test_a_saved_bundle_comes_back(tmp_path):
  bundle = bundles.rmm(drawn(), TASKS, components=2)
  found = bundles.load(bundles.save(tmp_path / "bundle", bundle))
  assert isinstance(found, reversible.Reversible)
  for name in TASKS:
    for matrix, lora in bundle.for_task(name).items():
      close(found.for_task(name)[matrix].delta(), lora.delta(), atol=0)
  with pytest.raises(ValueError, match=r"the bundle has no task 'e'.* Known: a, b, c, d"):
    found.for_task("e")


def test_a_damaged_bundle_is_refused(tmp_path):
  path = bundles.save(tmp_path / "bundle", bundles.rmm(drawn(), TASKS))
  about = json.loads((path / "bundle.json").read_text())
  (path / "bundle.json").write_text(json.dumps({**about, "names": ["a", "b"]}))
  with pytest.raises(
    ValueError, match=r"bundle.json: no description of a bundle \(the coefficients"
  ):
    bundles.load(path)
