"""Recipes of the kinds that people write, merged: the numbers are those of NumPy."""

import json
import pathlib

import folders
import numpy as np
import pytest
import recipes
from reference import spheres

from jaxmerge import errors
from jaxmerge.files import execute
from jaxmerge.io.tensors import safetensors
from jaxmerge.io.tensors.tensor import Files
from jaxmerge.recipe import RecipeError

family = folders.family_here

LAYER = "model.layers.{}."
QUERY, UP, NORM = (
  LAYER + n for n in ("self_attn.q_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight")
)
EMBEDDING, FINAL, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def written(text):
  pathlib.Path("recipe.yml").write_text(text)
  return "recipe.yml"


def run(text):
  """Runs a recipe, and returns the tensors of the result."""
  return folders.read(execute.run(recipes.plan_of_file(written(text), Files()), "out"))


def check(found, expected):
  """Asserts that these tensors, and no others with floats, are there, to rounding in float32."""
  assert {n for n, x in found.items() if x.dtype == np.float32} == expected.keys()
  for name, x in expected.items():
    np.testing.assert_allclose(found[name], x, rtol=2e-6, atol=2e-6, err_msg=name)


def named(of, layers=3):
  """Calls a function with the name of every tensor and its layer, None outside of them."""
  names = {n.format(i): i for i in range(layers) for n in (QUERY, UP, NORM)}
  return {n: of(n, i) for n, i in (names | dict.fromkeys((EMBEDDING, FINAL, HEAD))).items()}


def arc(first, second, name, t):
  return spheres.slerp([{name: x[name].astype(np.float64)} for x in (first, second)], t)[name]


GRADIENTS = """
slices:
  - sources:
      - {model: base, layer_range: [0, 3]}
      - {model: m0, layer_range: [0, 3]}
merge_method: slerp
base_model: base
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - {value: 0.5}
dtype: float32
"""


def test_the_recipe_of_model_cards(family):
  """SLERP, two gradients over depth in opposite directions, and a value for the rest."""
  base, first, *_ = family
  attention, mlp = (0.0, 0.3, 1.0), (1.0, 0.7, 0.0)

  def t(name, layer):
    if "self_attn" in name:
      return attention[layer]
    return mlp[layer] if "mlp" in name else 0.5

  found = run(GRADIENTS)
  check(found, named(lambda n, i: arc(base, first, n, t(n, i))))
  np.testing.assert_array_equal(found["position_ids"], base["position_ids"])


@pytest.mark.parametrize("listed", ["m0", "base"])
def test_the_base_is_the_end_at_0_in_whatever_order_models_are_listed(family, listed):
  base, first, *_ = family
  other = {"m0": "base", "base": "m0"}[listed]
  text = f"""
merge_method: slerp
base_model: base
models: [{{model: {listed}}}, {{model: {other}}}]
parameters: {{t: 0.25}}
"""
  check(run(text), named(lambda n, i: arc(base, first, n, 0.25)))


def test_every_slice_may_have_its_own_base(family):
  """What lies before the layers is merged as in the first slice, what follows as in the last."""
  base, first, second, third = family
  text = """
merge_method: task_arithmetic
slices:
  - base_model: base
    parameters: {weight: 0.5}
    sources: [{model: base, layer_range: [0, 2]}, {model: m0, layer_range: [0, 2]}]
  - base_model: m1
    sources:
      - {model: m1, layer_range: [2, 3]}
      - {model: m2, layer_range: [1, 2], parameters: {weight: 0.25}}
parameters: {weight: 9}
"""

  def expected(name, layer):
    if name == EMBEDDING or layer in (0, 1):
      return base[name] + 0.5 * (first[name] - base[name])
    other = third[name.replace("layers.2", "layers.1")]
    return second[name] + 0.25 * (other - second[name])

  check(run(text), named(expected))


def test_scaled_layers_are_stacked(family):
  """A model on top of itself, in which the second copy of a layer is switched off in part."""
  _, first, *_ = family
  text = """
merge_method: passthrough
slices:
  - sources: [{model: m0, layer_range: [0, 2]}]
  - sources:
      - model: m0
        layer_range: [1, 3]
        parameters:
          scale:
            - {filter: q_proj, value: 0.0}
            - {filter: mlp, value: [0.5, 2.0]}
            - {value: 1.0}
"""
  found = run(text)
  source, up = (0, 1, 1, 2), (1.0, 1.0, 0.5, 2.0)

  def expected(name, layer):
    if layer is None:
      return first[name]
    own = first[name.replace(f"layers.{layer}.", f"layers.{source[layer]}.")]
    if "q_proj" in name and layer > 1:
      return own * 0.0
    return own * up[layer] if "mlp" in name else own

  check(found, named(expected, 4))
  np.testing.assert_array_equal(found[NORM.format(2)], first[NORM.format(1)])
  told = json.loads(pathlib.Path("out", execute.PROVENANCE).read_text())["inputs"]["m0"]
  assert told[QUERY.format(2)] == f"merged by passthrough, job 1 -> {QUERY.format(3)}"


SHIFTED = """
merge_method: linear
base_model: base
slices:
  - sources: [{{model: m0, layer_range: [1, 3]}}, {{model: m1, layer_range: [1, 3]}}{}]
parameters: {{weight: 1}}
{}
"""


@pytest.mark.parametrize("listed", ["", ", {model: base, layer_range: [0, 2]}"])
def test_what_is_excluded_from_a_slice_is_a_layer_of_the_base(family, listed):
  """The one that is merged there; without one, that at the place of the first source."""
  base = family[0]
  found = run(SHIFTED.format(listed, "exclude: [mlp]"))
  shift = 0 if listed else 1
  for layer in range(2):
    np.testing.assert_array_equal(found[UP.format(layer)], base[UP.format(layer + shift)])
  told = json.loads(pathlib.Path("out", execute.PROVENANCE).read_text())["inputs"]
  source = UP.format(shift)
  words = "copied from base" + (f" -> {UP.format(0)}" if shift else "")
  assert told["base"][source] == words
  assert told["m0"][UP.format(2)] == "dropped: excluded"


def test_a_base_helps_out_with_layers_of_slices(family):
  base, first, *_ = family
  folders.write(pathlib.Path("m0"), {n: x for n, x in first.items() if n != UP.format(2)})
  found = run(SHIFTED.format("", "missing: base"))
  np.testing.assert_array_equal(found[UP.format(1)], base[UP.format(2)])
  assert len([n for n in found if "mlp" in n]) == 2


def test_layers_of_one_model_are_merged_with_each_other(family):
  _, first, *_ = family
  text = """
merge_method: linear
slices:
  - sources: [{model: m0, layer_range: [0, 1]}, {model: m0, layer_range: [2, 3]}]
parameters: {weight: 1}
"""
  pairs = {
    n: (first[n], first[n.replace("layers.0.", "layers.2.")]) for n in named(lambda n, i: n, 1)
  }
  check(run(text), {n: np.mean(pair, axis=0) for n, pair in pairs.items()})


MISSING = """
merge_method: task_arithmetic
base_model: base
models:
  - {{model: m0, parameters: {{weight: 0.5}}}}
  - {{model: m1, parameters: {{weight: 0.25}}}}
missing: {}
"""


@pytest.mark.parametrize("missing", ["base", "mean", "skip", "error"])
def test_what_a_recipe_does_where_a_model_lacks_a_tensor(family, missing):
  base, first, second, _ = family
  folders.write(pathlib.Path("m0"), {n: x for n, x in first.items() if n != UP.format(1)})
  text = MISSING.format(missing)
  if missing == "error":
    with pytest.raises(errors.Problems, match=rf"'{UP.format(1)}' is in base but not in m0"):
      run(text)
    assert not pathlib.Path("out").exists()
    return
  found = run(text)
  expected = named(lambda n, i: base[n] + 0.5 * (first[n] - base[n]) + 0.25 * (second[n] - base[n]))
  del expected[UP.format(1)]
  if missing != "skip":
    expected[UP.format(1)] = {"base": base, "mean": second}[missing][UP.format(1)]
  check(found, expected)


def test_a_base_that_is_not_merged_is_not_said_to_be(family):
  """By a method of weights, and where the models that have a tensor are averaged."""
  run("merge_method: linear\nbase_model: base\nmodels: [{model: m0}]\nparameters: {weight: 1}\n")
  told = json.loads(pathlib.Path("out", execute.PROVENANCE).read_text())["inputs"]
  assert told["base"].pop("position_ids") == "copied from base"
  assert set(told["base"].values()) == {"dropped: only the models are merged"}
  assert set(told["m0"].values()) == {"copied from base", "merged by average, job 1"}
  own = {n: x for n, x in family[1].items() if n != FINAL}
  folders.write(pathlib.Path("m0"), own)
  pathlib.Path("out").rename("before")
  run(MISSING.format("mean"))
  told = json.loads(pathlib.Path("out", execute.PROVENANCE).read_text())["inputs"]
  assert told["base"][FINAL] == "dropped: only the models are merged"
  assert told["m1"][FINAL] == "mean of the models that have it, job 2"


@pytest.mark.parametrize("missing", ["base", "skip"])
def test_a_copy_of_a_model_that_lacks_a_tensor(family, missing):
  base, first, *_ = family
  own = {n: x for n, x in first.items() if n != FINAL}
  folders.write(pathlib.Path("m0"), own)
  text = "merge_method: passthrough\nbase_model: base\nmodels: [{model: m0}]\n"
  with pytest.raises(errors.Problems, match=f"tensor '{FINAL}' is wanted of m0, which has none"):
    recipes.plan_of_file(written(text), Files())
  found = run(f"{text}missing: {missing}\n")
  expected = own | ({FINAL: base[FINAL]} if missing == "base" else {})
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    np.testing.assert_array_equal(found[name], x)
  told = json.loads(pathlib.Path("out", execute.PROVENANCE).read_text())["inputs"]["base"]
  aside = "dropped: only the models are merged"
  assert told.pop(FINAL) == ("copied from base" if missing == "base" else aside)
  assert set(told.values()) == {aside}


def test_what_is_excluded_and_not_in_the_base_may_be_left_out(family):
  text = MISSING.format("error") + "exclude: [score]\n"
  score = {"score.weight": np.ones((2, 6), np.float32)}
  folders.write(pathlib.Path("m0"), family[1] | score)
  with pytest.raises(errors.Problems, match="wanted of base, which has none; with `missing: sk"):
    run(text)
  assert set(run(text.replace("error", "skip"))) == set(family[0])
  told = json.loads(pathlib.Path("out", execute.PROVENANCE).read_text())["inputs"]
  assert told["m0"]["score.weight"] == "dropped: excluded"


def test_layers_are_chosen_by_their_numbers(family):
  base, first, second, _ = family
  text = """
merge_method: task_arithmetic
base_model: base
models:
  - model: m0
    parameters:
      weight:
        - {layers: 0, value: 0.5}
        - {layers: "1-2", filter: mlp, value: 2}
        - {value: 1}
  - {model: m1, parameters: {weight: 0}}
overrides:
  - {layers: [2, 3], pattern: "norm", merge_method: linear, parameters: {weight: 1}}
"""

  def expected(name, layer):
    if name == NORM.format(2):
      return (first[name] + second[name]) / 2
    weight = 0.5 if layer == 0 else 2.0 if "mlp" in name else 1.0
    return base[name] + weight * (first[name] - base[name])

  check(run(text), named(expected))


@pytest.mark.parametrize("key", ["adapter", "lora"])
def test_an_adapter_has_a_key_of_its_own(family, key):
  """Where its path has characters that a reference in one word takes for marks."""
  base, first, *_ = family
  name = QUERY.format(1)
  rng = np.random.default_rng(0)
  a, b = (rng.normal(size=s).astype(np.float32) for s in ((2, 6), (6, 2)))
  folder = pathlib.Path("lr@1e-5+cosine")
  folder.mkdir()
  config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
  (folder / "adapter_config.json").write_text(json.dumps(config))
  parts = {f"base_model.model.{name[:-7]}.lora_{k}.weight": x for k, x in (("A", a), ("B", b))}
  safetensors.save(folder / "adapter_model.safetensors", parts)
  text = f"""
merge_method: task_arithmetic
base_model: base
models:
  - model: {{model: {{path: m0}}, {key}: {{path: "{folder}"}}}}
    parameters: {{weight: 0.5}}
"""
  tuned = first | {name: first[name] + 2 * b.astype(np.float64) @ a}
  check(run(text), named(lambda n, i: (base[n] + tuned[n]) / 2))
  told = json.loads(pathlib.Path("out", execute.PROVENANCE).read_text())["inputs"]
  for part in parts:
    assert told[f"m0+{folder}"][part] == f"adapter, added -> {name}"


# A model of two towers, in which nothing but the modules tells one stack of layers from the other.
TOWERS = {
  "text_model.embeddings.weight": (4, 3),
  **{f"text_model.encoder.layers.{i}.fc.weight": (3, 3) for i in range(3)},
  "vision_model.patch_embed.weight": (3, 2, 2),
  **{f"vision_model.encoder.layers.{i}.fc.weight": (3, 3) for i in range(3)},
  "vision_model.norm.weight": (3,),
  "logit_scale": (),
}


@pytest.fixture
def towers(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  made = []
  for k, name in enumerate(("base", "m0", "m1")):
    rng = np.random.default_rng(k)
    made.append({n: np.asarray(rng.normal(size=s), np.float32) for n, s in TOWERS.items()})
    heights = {f"{tower}_config": {"num_hidden_layers": 3} for tower in ("text", "vision")}
    folders.write(tmp_path / name, made[-1], config={"model_type": "clip", **heights})
  return made


MODULES = """
merge_method: linear
base_model: base
modules:
  text_model:
    models: [{{model: m0}}, {{model: m1, parameters: {{weight: 3}}}}]
  vision_model:
    slices:
      - sources: [{{model: m0, layer_range: [0, 2]}}, {{model: base, layer_range: [1, 3]}}]
      - sources: [{{model: m1, layer_range: [2, 3]}}]
      - sources: [{{model: m1, layer_range: [0, 1]}}]
    parameters: {{weight: [{{filter: "layers.1.", value: 0.5}}, {{value: 2}}]}}
parameters: {{weight: 1}}
{}
"""


def test_modules_are_merged_each_in_its_own_way(towers):
  base, first, second = towers
  found = run(MODULES.format('exclude: ["^logit_scale$"]'))
  expected = {"logit_scale": base["logit_scale"]}
  for name in TOWERS:
    if name.startswith("text_model"):
      expected[name] = (first[name] + 3 * second[name]) / 4
  fc = "vision_model.encoder.layers.{}.fc.weight"
  first_0, first_1, base_1, base_2 = (
    t[fc.format(i)] for t, i in ((first, 0), (first, 1), (base, 1), (base, 2))
  )
  # A filter at a module's level is asked of the names in each source.
  expected[fc.format(0)] = (2 * first_0 + 0.5 * base_1) / 2.5
  expected[fc.format(1)] = (0.5 * first_1 + 2 * base_2) / 2.5
  expected[fc.format(2)] = second[fc.format(2)]
  expected[fc.format(3)] = second[fc.format(0)]
  patch, norm = "vision_model.patch_embed.weight", "vision_model.norm.weight"
  expected[patch] = (first[patch] + base[patch]) / 2
  expected[norm] = second[norm]
  check(found, expected)
  config = json.loads(pathlib.Path("out/config.json").read_text())
  heights = {t: config[f"{t}_config"]["num_hidden_layers"] for t in ("text", "vision")}
  assert heights == {"text": 3, "vision": 4}
  told = json.loads(pathlib.Path("out", execute.PROVENANCE).read_text())["inputs"]
  assert told["base"]["logit_scale"] == "copied from base"
  assert told["m1"]["logit_scale"] == "dropped: excluded"


def test_what_is_in_no_module_is_named(towers):
  """And may be copied, or be a module itself."""
  text = MODULES.format("")
  with pytest.raises(RecipeError) as error:
    run(text)
  (line,) = str(error.value).splitlines()
  assert line.startswith("recipe.yml:4:1: tensor 'logit_scale' of ")
  assert line.endswith("is in no module: exclude it, or write a module 'logit_scale'.")
  with pytest.raises(RecipeError, match=r"'vision_model.norm.weight' .* norm and vision_model"):
    run(text.replace("modules:", "modules:\n  norm: {models: [{model: m0}]}"))
  more = "modules:\n  logit_scale:\n    models: [{model: m0}, {model: m1}]"
  found = run(text.replace("modules:", more))
  mean = (towers[1]["logit_scale"] + towers[2]["logit_scale"]) / 2
  np.testing.assert_allclose(found["logit_scale"], mean, rtol=1e-6)


def test_a_module_that_is_in_no_name_is_told(towers):
  text = MODULES.format('exclude: ["^logit_scale$"]')
  more = "modules:\n  vision_modle: {models: [{model: m0}]}"
  with pytest.raises(RecipeError) as error:
    run(text.replace("modules:", more))
  (line,) = str(error.value).splitlines()
  assert line.startswith(
    "recipe.yml:5:17: the module 'vision_modle' is a part of no tensor's name;"
  )
  assert line.endswith("did you mean 'vision_model'?")


def test_a_filter_of_a_module_is_for_its_tensors(towers):
  text = MODULES.format('exclude: ["^logit_scale$"]').replace("layers.1.", "embeddings")
  with pytest.raises(RecipeError) as error:
    run(text)
  (line,) = str(error.value).splitlines()
  assert line.startswith("recipe.yml:12:36: filter 'embeddings' holds for none of the ")


def test_modules_of_checkpoints_are_parts_of_their_names_too(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  trees = [{f"{n}/kernel": np.full((2, 2), k, np.float32) for n in ("eye", "ear")} for k in (1, 3)]
  for k, own in enumerate(trees):
    folders.write(tmp_path / f"m{k}", own)
  found = run("""
merge_method: linear
modules:
  eye: {models: [{model: m0}, {model: m1}]}
  ear: {models: [{model: m1}]}
parameters: {weight: 1}
""")
  check(found, {"eye/kernel": trees[0]["eye/kernel"] * 2, "ear/kernel": trees[1]["ear/kernel"]})
  told = json.loads(pathlib.Path("out", execute.PROVENANCE).read_text())["inputs"]
  assert told["m0"]["ear/kernel"] == "dropped: in no module of it"
