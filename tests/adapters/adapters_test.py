"""LoRA adapters in memory: worked examples, identities, files, and what is refused."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from example import close
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from marking import some_fast
from reference import adapters as transcribed
from reference import bundles as apart

import jaxmerge
from jaxmerge import methods
from jaxmerge.adapters import combine, deltas, peft, truncation
from jaxmerge.adapters import lora as adapters_lora
from jaxmerge.adapters.lora import Lora
from jaxmerge.io.peft import adapter as peft_adapter
from jaxmerge.io.tensors import pieces, safetensors
from jaxmerge.io.tensors.tensor import Files, stored_tensor
from jaxmerge.mixtures import bundle as bundles
from jaxmerge.mixtures import low_rank, storage

pytestmark = pytest.mark.kernels
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
  close(combine.flora([ONE, TWO], SHARES)["w"].delta(), [[1, 0.5, 0], [0.75, 0, 0.75]])
  padded = combine.average([ONE, TWO], SHARES, pad=True)["w"]
  close(padded.delta(), [[0.625, 0.125, 0.1875], [0.75, 0.375, 0.5625]])


@pytest.mark.parametrize("name", ["layers/0", "layers/0/kernel", "layers/0/kernel/value"])
def test_a_matrix_of_nnx_is_named_with_or_without_its_box(name):
  """Its kernels lie [in, out] as all of Flax do, beside a square one as well."""
  base = {"layers": [{"kernel": {"value": jnp.zeros((3, 2))}}, {"kernel": {"value": jnp.eye(3)}}]}
  adapter = {name: ONE["w"], "layers/1": Lora(jnp.ones((1, 3)), jnp.ones((3, 1)))}
  model = adapters_lora.apply(base, adapter)
  close(model["layers"][0]["kernel"]["value"], ONE["w"].delta().T)
  again = truncation.extract(base, model, [name], 1)
  close(again[name].delta(), ONE["w"].delta(), atol=1e-6)


def test_stacking_is_task_arithmetic_of_what_the_adapters_add():
  every = drawn((1, 4, 2))
  weights = (0.2, 1.5, -0.3)
  found = combine.flora(every, weights)
  for name in found:
    assert found[name].rank == 7
    expected = sum(w * x[name].delta() for w, x in zip(weights, every, strict=True))
    close(found[name].delta(), expected, atol=1e-5)


SEEDS, WEIGHTS = st.integers(0, 2**32 - 1), st.tuples(*[st.floats(-2, 2)] * 3)


@settings(max_examples=10)
@given(SEEDS, WEIGHTS)
def test_stacks_and_means_agree_with_a_transcription(seed, weights):
  every = drawn((1, 4, 2), seed)
  stacked = combine.flora(every, weights)
  padded = combine.average(every, weights, pad=True)
  for n in stacked:
    own = [x[n] for x in every]
    for found, make in ((stacked[n], transcribed.flora), (padded[n], transcribed.averaged)):
      a, b = make(own, weights)
      close(found.a, a, atol=1e-5)
      close(found.b, b, atol=1e-5)
      close(found.delta(), b @ a, atol=1e-4)


@pytest.mark.slow
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
  close(combine.flora([ONE, {}], SHARES)["w"].delta(), 0.25 * ONE["w"].delta())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_stacking_rounds_once(dtype):
  """As PEFT's `cat`: weights and scalings are multiplied into a, and b stays as it is."""
  every = [{"w": x["up"]._replace(a=x["up"].a.astype(dtype))} for x in drawn((1, 3))]
  found = combine.flora(every, (0.3, 0.7))["w"]
  own = [x["w"] for x in every]
  wide = [w * x.scale * np.asarray(x.a, np.float64) for w, x in zip((0.3, 0.7), own, strict=True)]
  close(found.a, np.concatenate(wide), atol=float(jnp.finfo(dtype).eps) * np.abs(wide[1]).max() / 2)
  close(found.b, np.concatenate([x.b for x in own], axis=1), atol=0)
  assert found.a.dtype == dtype
  assert found.scale == 1


LAID = {"up": (7, 5), "down": (4, 5)}


def model(seed=1, **changes):
  """A kernel of Flax, [in, out], a weight of a file, [out, in], and leaves without an adapter."""
  draw = np.random.default_rng(seed).normal
  up, down = (jnp.asarray(draw(size=s), jnp.float32) for s in LAID.values())
  return {"up": {"kernel": up}, "down.weight": down, "bias": draw(size=9), "steps": 3} | changes


def zeros():
  return {"up": {"kernel": jnp.zeros(LAID["up"])}, "down.weight": jnp.zeros(LAID["down"])}


VIEWS = (("kernel$", "io"), ("weight$", "oi"))
METHODS = {
  "ties": (methods.ties(0.4), {}),
  "dare": (methods.dare(0.5), {"seed": 5, "names": ("c", "b", "a")}),
  "iso_c": (methods.iso_c(), {}),
}


@pytest.mark.parametrize("name", some_fast(METHODS, ["dare"]))
def test_merging_adapters_is_merging_the_models_they_make(name):
  """Bit for bit where the base is zero; one adapter lacks a matrix, and ranks differ."""
  every = drawn((1, 4, 2))
  del every[1]["down"]
  method, given = METHODS[name]
  models = jaxmerge.stack([adapters_lora.apply(zeros(), x) for x in every])
  expected = jaxmerge.merge(method, models, zeros(), layout=VIEWS, **given)
  found = deltas.merge(method, zeros(), every, **given)  # The views are those of the adapters.
  np.testing.assert_array_equal(found["up"]["kernel"], expected["up"]["kernel"])
  np.testing.assert_array_equal(found["down.weight"], expected["down.weight"])
  assert np.any(found["down.weight"])


def test_a_method_that_looks_at_the_base_is_given_it():
  base, every = {"up": model()["up"]}, [{"up": x["up"]} for x in drawn((2, 3))]
  models = jaxmerge.stack([adapters_lora.apply(base, x) for x in every])
  expected = jaxmerge.merge(methods.widen(), models, base)["up"]["kernel"]
  close(deltas.merge(methods.widen(), base, every)["up"]["kernel"], expected, atol=1e-5)


def test_leaves_without_an_adapter_are_the_bases_and_count_for_nothing():
  """At most two fifths of the entries of the two leaves are kept, and not of all four."""
  base, every, (method, _) = model(bias=np.ones(1000)), drawn((1, 4, 2)), METHODS["ties"]
  found = deltas.merge(method, base | zeros(), every)
  for name in ("bias", "steps"):
    assert found[name] is base[name]
  alone = deltas.merge(method, zeros(), every)
  np.testing.assert_array_equal(found["up"]["kernel"], alone["up"]["kernel"])
  np.testing.assert_array_equal(found["down.weight"], alone["down.weight"])


def test_a_base_of_low_precision_does_not_round_the_task_vectors():
  """A quarter of bfloat16's spacing at 1 each: the models are the base, four adapters are not."""
  base, own = {"w": jnp.ones((2, 2), jnp.bfloat16)}, Lora(jnp.ones((1, 2)), jnp.ones((2, 1)), 2**-9)
  assert adapters_lora.apply(base, {"w": own})["w"].tolist() == [[1.0, 1.0]] * 2
  found = deltas.merge(methods.task_arithmetic(1.0), base, [{"w": own}] * 4)["w"]
  assert found.dtype == jnp.bfloat16
  assert found.tolist() == [[1 + 2**-7] * 2] * 2


def test_works_under_jit_and_grad():
  """d/ds of (a scale) of a sum of entries is the sum of b a."""
  base, every = {"up": model()["up"]}, [{"up": x["up"]} for x in drawn((2, 3))]

  def total(own):
    out = deltas.merge(methods.task_arithmetic(0.5), base, own)["up"]["kernel"]
    return out.sum()

  slopes = jax.jit(jax.grad(total))(every)
  for slope, own in zip(slopes, every, strict=True):
    close(slope["up"].scale, 0.5 * own["up"]._replace(scale=1.0).delta().sum(), atol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_the_result_lies_where_the_base_lies(kind):
  """Entries are dropped by their place in the leaf, whichever device has it."""
  mesh = jax.make_mesh((8,), ("device",), axis_types=(kind,))
  sharding = NamedSharding(mesh, P(None, "device"))
  base, every = (
    {"kernel": jnp.ones((5, 16))},
    [{"kernel": Lora(jnp.ones((r, 5)), jnp.arange(16.0 * r).reshape(16, r))} for r in (1, 2)],
  )
  method, given = methods.dare(0.5), {"seed": 3}
  expected = deltas.merge(method, base, every, **given)["kernel"]
  found = deltas.merge(method, jax.device_put(base, sharding), every, **given)["kernel"]
  assert found.sharding == sharding
  close(found, expected, atol=1e-5)
  assert not np.array_equal(expected, base["kernel"])


def test_layouts_say_the_same():
  """A kernel, a file's weight, an attention kernel, and two layers that are stacked for a scan."""
  every = [{"up": x["up"]} for x in drawn((2, 3))]
  names = ("dense", "file.weight", "heads/kernel", "layers")
  same = [dict.fromkeys(names[:3], x["up"]) for x in every]
  for x in same:
    own = x["dense"]
    x["layers"] = own._replace(b=jnp.concatenate([own.b, -own.b]))
  base = {
    "dense": {"kernel": jnp.zeros((7, 5))},
    "file.weight": jnp.zeros((5, 7)),
    "heads": {"kernel": jnp.zeros((7, 5, 1))},
    "layers": jnp.zeros((2, 7, 5)),
  }
  layout = (("heads/kernel", "ioo"), ("layers", "bio"))
  found = deltas.merge(METHODS["iso_c"][0], base, same, layout=layout)
  kernel = np.asarray(found["dense"]["kernel"])
  close(found["file.weight"].T, kernel, atol=1e-5)
  close(found["heads"]["kernel"][..., 0], kernel, atol=1e-5)
  close(found["layers"][0], kernel, atol=1e-5)
  close(found["layers"][1], -kernel, atol=1e-5)


def test_stacking_and_applying_is_task_arithmetic_with_shares_times_scales():
  """The two ways around: factors, and delta space."""
  shares, scales = (0.2, 0.5, 0.3), (2.0, 0.5, 1.0)
  plain = [{n: x._replace(scale=1.0) for n, x in own.items()} for own in drawn((1, 4, 2))]
  scaled = [
    {n: x._replace(scale=s) for n, x in own.items()} for s, own in zip(scales, plain, strict=True)
  ]
  weights = tuple(p * s for p, s in zip(shares, scales, strict=True))
  found = deltas.merge(methods.task_arithmetic(1.0, weights), model(), plain)
  expected = adapters_lora.apply(model(), combine.flora(scaled, shares))
  close(found["up"]["kernel"], expected["up"]["kernel"], atol=1e-5)
  close(found["down.weight"], expected["down.weight"], atol=1e-5)


def test_patches_are_carried_over_to_a_newer_base():
  """PortLLM: by the models it is what `applied` does; patches compose, and commute with merging."""
  old, new = ({"up": model(seed)["up"]} for seed in (1, 2))
  every = [{"up": x["up"]} for x in drawn((2, 5))]
  carry = lambda tuned: jaxmerge.merge(methods.portllm(), jaxmerge.stack([old, tuned]), new)  # noqa: E731
  add = methods.task_arithmetic(1.0, (0.3, 0.9))
  tuned = [adapters_lora.apply(old, x) for x in every]
  carried = [carry(x) for x in tuned]
  for x, own in zip(carried, every, strict=True):
    close(x["up"]["kernel"], adapters_lora.apply(new, own)["up"]["kernel"], atol=1e-5)
  first = carry(jaxmerge.merge(add, jaxmerge.stack(tuned), old))["up"]["kernel"]
  last = jaxmerge.merge(add, jaxmerge.stack(carried), new)["up"]["kernel"]
  close(first, last, atol=1e-5)
  close(first, deltas.merge(add, new, every)["up"]["kernel"], atol=1e-5)
  one_by_one = adapters_lora.apply(adapters_lora.apply(new, every[0]), every[1])
  both = adapters_lora.apply(new, combine.flora(every, (1.0, 1.0)))
  close(one_by_one["up"]["kernel"], both["up"]["kernel"], atol=1e-5)


@pytest.mark.parametrize("rank", [2, 5])
def test_a_merge_of_adapters_is_an_adapter_again(rank):
  """What PEFT calls `svd`: the nearest of a rank to the weighted sum, or that sum itself."""
  every, shares = drawn((2, 3)), (0.3, 0.9)
  out = deltas.merge(methods.task_arithmetic(1.0, shares), model(), every)
  found = truncation.extract(model(), out, every[0], rank)
  for name, total in combine.flora(every, shares).items():
    u, s, vt = np.linalg.svd(np.asarray(total.delta(), np.float64), full_matrices=False)
    close(found[name].delta(), (u[:, :rank] * s[:rank]) @ vt[:rank], atol=1e-4)


@pytest.mark.parametrize("rank", [1, 2, 6, 9])
def test_recompression_is_the_nearest_of_its_rank(rank):
  (one,) = drawn((6,))
  found = truncation.compress(one, rank)
  for name, own in one.items():
    u, s, vt = np.linalg.svd(np.asarray(own.delta(), np.float64), full_matrices=False)
    close(found[name].delta(), (u[:, :rank] * s[:rank]) @ vt[:rank], atol=1e-4)
    assert found[name].rank <= rank


def test_adapters_of_low_precision_stay_so_at_a_lower_rank():
  (one,) = drawn((6,))
  low = {n: Lora(*(x.astype(jnp.bfloat16) for x in own[:2])) for n, own in one.items()}
  wide = {n: Lora(*(x.astype(jnp.float32) for x in own[:2])) for n, own in low.items()}
  expected = truncation.compress(wide, 2)
  for name, own in truncation.compress(low, 2).items():
    assert own.a.dtype == own.b.dtype == jnp.bfloat16
    close(own.a, expected[name].a, atol=0.02)
    close(own.b, expected[name].b, atol=0.02)


def test_a_saved_adapter_comes_back(tmp_path):
  one = combine.flora(drawn((2, 3)))
  one["up"] = drawn((4,))[0]["up"]
  peft.save(tmp_path / "adapter", one)
  found = peft.load(tmp_path / "adapter")
  for name in one:
    close(found[name].delta(), one[name].delta(), atol=1e-5)
    assert found[name].rank == one[name].rank
  config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
  assert config["r"] == 5
  # As PEFT looks for the rank of a module: it is no end of another one's name.
  (pattern,) = config["rank_pattern"]
  assert re.match(rf"(.*\.)?({pattern})$", "up")
  assert not re.match(rf"(.*\.)?({pattern})$", "model.up")


def test_an_adapter_that_overflows_with_its_scale_is_not_saved(tmp_path):
  own = adapters_lora.Lora(jnp.full((1, 2), 6e4, jnp.float16), jnp.ones((2, 1), jnp.float16), 4.0)
  with pytest.raises(ValueError, match="lora_A of 'up' has NaN or infinity in float16"):
    peft.save(tmp_path / "adapter", {"up": own})
  assert not (tmp_path / "adapter").exists()


def test_what_is_no_factor_is_refused(tmp_path):
  peft.save(tmp_path / "adapter", ONE)
  path = tmp_path / "adapter" / "adapter_model.safetensors"
  safetensors.save(path, {"base_model.model.w.weight": np.zeros((2, 2), np.float32)})
  with pytest.raises(ValueError, match=r"not a factor of a plain LoRA layer; apply the adapter"):
    peft.load(tmp_path / "adapter")


REFUSED = {
  "no adapters": (lambda: combine.flora([]), "no adapters are given"),
  "weights": (lambda: combine.flora([ONE], (1.0, 2.0)), r"1 adapters need as many weights"),
  "ranks": (
    lambda: combine.average([ONE, TWO]),
    r"factors of 'w' cannot be averaged: their ranks are \[1, 2\]; stack them .*pad=True",
  ),
  "missing": (
    lambda: combine.average([ONE, {}]),
    r"'w' cannot be averaged: their ranks are \[1, 0\]",
  ),
  "no matrix": (
    lambda: adapters_lora.apply({"v": jnp.zeros((2, 3))}, ONE),
    r"the model has no matrix 'w'.* Known: v",
  ),
  "near matrix": (
    lambda: adapters_lora.apply({"layers": [{"kernel": jnp.zeros((3, 2))}]}, {"layer/0": ONE["w"]}),
    r"no matrix 'layer/0'; did you mean 'layers/0'\? Known: layers/0",
  ),
  "dotted name": (
    lambda: adapters_lora.apply({"layers": [jnp.zeros((3, 2))]}, {"layers.0": ONE["w"]}),
    r"no matrix 'layers.0': the parts of its names have / between, write 'layers/0'",
  ),
  "a text for a list": (
    lambda: truncation.extract({"w": jnp.zeros((2, 2))}, {"w": jnp.ones((2, 2))}, "w", 2),
    r"matrices must be a list of names, got a text: write \['w'\]",
  ),
  "a text for a rank": (
    lambda: truncation.compress(ONE, "2"),
    "rank must be a whole number, such as 8, got '2'",
  ),
  "shape": (
    lambda: adapters_lora.apply({"w": jnp.zeros((3, 3))}, ONE),
    r"the adapter of 'w' is for a matrix \[2, 3\] of outputs and inputs, but 'w' is \[3, 3\]",
  ),
  "view": (
    lambda: adapters_lora.apply({"w": jnp.zeros((2, 3))}, ONE, layout=[("w", "oii")]),
    r"view 'oii' of 'w' names 3 axes, but 'w' is \[2, 3\]",
  ),
  "integers": (
    lambda: adapters_lora.apply({"w": jnp.zeros((2, 3), jnp.int8)}, ONE),
    r"'w' is int8\[2, 3\], which is no floating-point matrix",
  ),
  "factors": (
    lambda: adapters_lora.apply(
      {"w": jnp.zeros((2, 3))}, {"w": Lora(jnp.ones((2, 3)), ONE["w"].b)}
    ),
    r"the factors of 'w' have other ranks: a is \[2, 3\], \[rank, in\], and b is \[2, 1\]",
  ),
  "twice": (
    lambda: adapters_lora.apply({"w.weight": jnp.zeros((2, 3))}, ONE | {"w.weight": ONE["w"]}),
    "'w.weight' is not the only matrix of an adapter that is added to 'w.weight'",
  ),
  "merge of none": (
    lambda: deltas.merge(methods.average(), {"w": jnp.zeros((2, 3))}, []),
    "none of 0 adapters has a matrix: there is nothing to merge",
  ),
  "merge elsewhere": (
    lambda: deltas.merge(methods.average(), {"v": jnp.zeros((2, 3))}, [ONE]),
    "the model has no matrix 'w'.* Known: v",
  ),
  "merge of other shapes": (
    lambda: deltas.merge(methods.average(), {"w": jnp.zeros((3, 3))}, [ONE]),
    r"the adapter of 'w' is for a matrix \[2, 3\] of outputs and inputs, but 'w' is \[3, 3\]",
  ),
  "merge of NaN": (
    lambda: deltas.merge(
      methods.average(),
      {"w": jnp.zeros((2, 3))},
      [ONE, {"w": ONE["w"]._replace(scale=float("nan"))}],
      names=("good", "bad"),
    ),
    "leaf 'w' of model bad has NaN or infinity",
  ),
  "names of a merge": (
    lambda: deltas.merge(methods.average(), {"w": jnp.zeros((2, 3))}, [ONE], names=("a", "b")),
    "names must be 1 different names",
  ),
  "nothing to extract": (
    lambda: truncation.extract({"w": jnp.zeros(3)}, {"w": jnp.ones(3)}, ["v"], 1),
    "the model has no matrix 'v'.* Known: w",
  ),
  "other models": (
    lambda: truncation.extract({"w": jnp.zeros(3)}, {"w": jnp.ones(2)}, ["w"], 1),
    r"leaf 'w' is \(3,\) in the base but \(2,\) in the model",
  ),
  "rank": (lambda: truncation.compress(ONE, 0), "rank must be at least 1, got 0"),
  "extracted rank": (
    lambda: truncation.extract({"w": jnp.zeros((2, 3))}, {"w": jnp.ones((2, 3))}, ["w"], -1),
    "rank must be at least 1, got -1",
  ),
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


@pytest.mark.parametrize("n", some_fast([2, 3, 6], [3]))
def test_nothing_is_lost_with_as_many_directions_as_there_can_be(n):
  every = drawn((4,) * n)
  names = [str(k) for k in range(n)]
  bundle = bundles.rmm(every, names, components=min(4, n - 1))
  for k, own in enumerate(every):
    for name, lora in bundle.for_task(str(k)).items():
      close(lora.delta(), own[name].delta(), atol=1e-4)


@pytest.mark.slow
def test_more_directions_lose_less():
  every = drawn((4,) * 6)
  names = [str(k) for k in range(6)]
  left = []
  for p in (0, 2, 4):
    bundle = bundles.rmm(every, names, components=p)
    made = [bundle.for_task(n)["up"].b for n in names]
    left.append(sum(float(jnp.sum((m - x["up"].b) ** 2)) for m, x in zip(made, every, strict=True)))
  assert left == sorted(left, reverse=True)
  assert left[-1] < 1e-6 * left[0]


def test_a_saved_bundle_comes_back(tmp_path):
  bundle = bundles.rmm(drawn(), TASKS, components=2)
  found = storage.load(storage.save(tmp_path / "bundle", bundle))
  assert isinstance(found, low_rank.Reversible)
  for name in TASKS:
    for matrix, lora in bundle.for_task(name).items():
      close(found.for_task(name)[matrix].delta(), lora.delta(), atol=0)
  with pytest.raises(ValueError, match=r"the bundle has no task 'e'.* Known: a, b, c, d"):
    found.for_task("e")


def test_a_damaged_bundle_is_refused(tmp_path):
  path = storage.save(tmp_path / "bundle", bundles.rmm(drawn(), TASKS))
  about = json.loads((path / "bundle.json").read_text())
  (path / "bundle.json").write_text(json.dumps({**about, "names": ["a", "b"]}))
  with pytest.raises(
    ValueError, match=r"bundle.json: no description of a bundle \(the coefficients"
  ):
    storage.load(path)


@pytest.mark.parametrize("shape", [(6, 6), (6, 4)])
def test_an_adapter_of_layers_that_lie_in_out_is_read_as_over_files(tmp_path, shape):
  rng = np.random.default_rng(0)
  inner, out = shape
  a, b, w = (rng.normal(size=s).astype(np.float32) for s in ((2, inner), (out, 2), shape))
  name = "h.0.attn.c_attn"
  peft.save(tmp_path / "a", {name: adapters_lora.Swapped(a, b)})
  assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["fan_in_fan_out"]
  found = peft.load(tmp_path / "a")
  applied = adapters_lora.apply({f"{name}.weight": jnp.asarray(w)}, found)[f"{name}.weight"]
  close(applied, w + (b @ a).T, atol=1e-5)
  safetensors.save(tmp_path / "w", {f"{name}.weight": w})
  files = Files()
  entries = safetensors.header(tmp_path / "w").tensors.items()
  base = {n: stored_tensor(files, tmp_path / "w", n, entry) for n, entry in entries}
  whole = peft_adapter.apply(base, tmp_path / "a", files).tensors[f"{name}.weight"]
  close(pieces.load(whole), applied, atol=1e-6)
  # A kernel of Flax lies so whatever the adapter says; a layout is what counts.
  kernel = adapters_lora.apply({name: {"kernel": jnp.asarray(w)}}, found)[name]["kernel"]
  close(kernel, applied)
  assert isinstance(truncation.compress(combine.flora([found]), 1)[name], adapters_lora.Swapped)


def test_how_a_square_matrix_lies_is_not_guessed():
  up, down = (Lora(jnp.ones((1, 4)), jnp.ones((n, 1))) for n in (4, 6))
  x = {"up": up, "down": down}
  params = {"up": jnp.zeros((4, 4)), "down": jnp.zeros((4, 6))}
  with pytest.raises(ValueError, match=r"'up' is square, and its adapter is wrong .* 'down'"):
    adapters_lora.apply(params, x)
  adapters_lora.apply(params, x, layout=[("^up$", "io"), ("^down$", "io")])


def test_names_of_adapters_may_begin_otherwise(tmp_path):
  peft.save(tmp_path / "a", {"trunk.up": ONE["w"]})
  params = {"model.up.weight": jnp.zeros((2, 3))}
  found = peft.load(tmp_path / "a", rename={"trunk": "model"})
  assert (adapters_lora.apply(params, found)["model.up.weight"] != 0).any()
  close(adapters_lora.apply(params, {"up": ONE["w"]})["model.up.weight"], ONE["w"].delta())


@pytest.mark.parametrize("config", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"r": 3}])
def test_what_makes_an_adapter_more_than_its_factors_is_refused_in_memory(tmp_path, config):
  peft.save(tmp_path / "a", ONE)
  path = tmp_path / "a" / "adapter_config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | config))
  with pytest.raises(ValueError, match=r"more than the factors; apply|its rank is 1, but 3"):
    peft.load(tmp_path / "a")


def test_adapters_and_models_that_overflow_are_refused():
  big = {
    "w": adapters_lora.Lora(np.full((1, 1), 1e3, np.float16), np.full((1, 1), 1e3, np.float16))
  }
  with pytest.raises(ValueError, match="leaf 'w': the result has NaN or infinity"):
    adapters_lora.apply({"w": np.zeros((1, 1), np.float16)}, big)
  scaled = {"w": big["w"]._replace(scale=100.0)}
  for make in (combine.flora, combine.average):
    with pytest.raises(ValueError, match=r"leaf 'w.lora_[AB]': the result has NaN or infinity"):
      make([scaled], [1e3])
