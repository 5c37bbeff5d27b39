"""Recipes run: what becomes of every tensor, and that it is what the methods say."""

import json
import pathlib

import folders
import ml_dtypes
import numpy as np
import pytest
import small

import jaxmerge
from jaxmerge import errors, methods
from jaxmerge.cli import main
from jaxmerge.files import execute, merge
from jaxmerge.io.tensors import safetensors
from jaxmerge.recipe import RecipeError

family, plan_of, run = folders.family_here, folders.plan_of, folders.run


TIES = """
merge_method: ties
base_model: base
models:
  - model: m0
    parameters: {weight: 1.0, density: 0.5}
  - model: m1
    parameters: {weight: 0.5, density: 0.3}
"""


def test_a_recipe_is_the_method(family):
  base, first, second, _ = family
  expected = jaxmerge.merge(
    methods.ties(weight=(1.0, 0.5)),
    jaxmerge.stack([first, second]),
    base,
    names=["m0", "m1"],
    hparams={"density": (0.5, 0.3)},
  )
  small.same(run(TIES), expected)


@pytest.mark.slow
def test_a_density_over_depth_is_counted_per_tensor(family):
  base, first, *_ = family
  text = """
merge_method: ties
base_model: base
models: [{model: m0, parameters: {weight: 1, density: [0.2, 0.4, 1.0]}}]
"""
  found = run(text)
  for i, density in enumerate((0.2, 0.4, 1.0)):
    name = f"model.layers.{i}.mlp.up_proj.weight"
    own_base, own = ({name: t[name]} for t in (base, first))
    out = jaxmerge.merge(
      methods.ties(density, scope="leaf"), {name: own[name][None]}, own_base, names=["m0"]
    )
    small.close({name: found[name]}, out)


def test_filters_choose_tensor_by_tensor(family):
  base, first, *_ = family
  text = """
merge_method: slerp
base_model: base
models: [{model: m0}]
parameters:
  t:
    - {filter: self_attn, value: 0}
    - {filter: mlp, value: [0, 1]}
    - {value: 1}
"""
  found = run(text)
  attention, head = "model.layers.1.self_attn.q_proj.weight", "lm_head.weight"
  np.testing.assert_allclose(found[attention], base[attention], atol=1e-6)
  np.testing.assert_allclose(found[head], first[head], atol=1e-6)
  up = "model.layers.{}.mlp.up_proj.weight"
  np.testing.assert_allclose(found[up.format(0)], base[up.format(0)], atol=1e-6)
  np.testing.assert_allclose(found[up.format(2)], first[up.format(2)], atol=1e-6)
  pair = {"w": np.stack([t[up.format(1)] for t in (base, first)])}
  small.close({"w": found[up.format(1)]}, jaxmerge.merge(methods.slerp(0.5), pair))


def test_layers_are_stacked(family):
  """The frankenmerge: layers of two models on top of each other, and a changed config."""
  _, first, second, _ = family
  text = """
merge_method: passthrough
slices:
  - sources: [{model: m0, layer_range: [0, 2]}]
  - sources: [{model: m1, layer_range: [1, 3]}]
"""
  found = run(text)
  q = "model.layers.{}.self_attn.q_proj.weight"
  order = [(first, 0), (first, 1), (second, 1), (second, 2)]
  for i, (model, layer) in enumerate(order):
    np.testing.assert_array_equal(found[q.format(i)], model[q.format(layer)])
  assert q.format(4) not in found
  np.testing.assert_array_equal(
    found["model.embed_tokens.weight"], first["model.embed_tokens.weight"]
  )
  np.testing.assert_array_equal(found["lm_head.weight"], second["lm_head.weight"])
  config = json.loads(pathlib.Path("out/config.json").read_text())
  assert config["num_hidden_layers"] == 4
  told = json.loads(pathlib.Path("out/jaxmerge_provenance.json").read_text())["inputs"]
  assert told["m0"][q.format(2)] == "dropped: in no slice"
  assert told["m1"][q.format(1)] == f"copied from m1 -> {q.format(2)}"


def test_slices_are_merged_layer_by_layer(family):
  _, first, second, _ = family
  text = """
merge_method: linear
slices:
  - sources:
      - {model: m0, layer_range: [0, 2], parameters: {weight: 1}}
      - {model: m1, layer_range: [1, 3], parameters: {weight: 3}}
"""
  found = run(text)
  up = "model.layers.{}.mlp.up_proj.weight"
  for i in range(2):
    expected = (first[up.format(i)] + 3 * second[up.format(i + 1)]) / 4
    np.testing.assert_allclose(found[up.format(i)], expected, atol=1e-6)


def test_exclude_overrides_and_dtype(family):
  base, first, second, _ = family
  text = (
    TIES
    + """
exclude: ["lm_head"]
overrides:
  - {pattern: "norm", merge_method: linear}
out_dtype: bfloat16
"""
  )
  found = run(text)
  assert {x.dtype.name for n, x in found.items() if n != "position_ids"} == {"bfloat16"}
  assert json.loads(pathlib.Path("out/config.json").read_text())["torch_dtype"] == "bfloat16"
  head, norm = "lm_head.weight", "model.norm.weight"
  np.testing.assert_array_equal(found[head], base[head].astype(found[head].dtype))
  mean = (first[norm] + 0.5 * second[norm]) / 1.5
  np.testing.assert_allclose(found[norm].astype(np.float32), mean, rtol=1e-2)


def test_the_recipe_travels_with_the_result(family):
  run(TIES)
  assert pathlib.Path("out/jaxmerge_recipe.yml").read_text() == TIES
  assert json.loads(pathlib.Path("out/jaxmerge_provenance.json").read_text())["recipe"] == TIES


@pytest.mark.parametrize(
  ("text", "place", "words"),
  [
    (TIES.replace("m1", "m9"), "7:12", "m9: no such folder"),
    (TIES + "exclude: [lm_haed]\n", "9:11", "did you mean 'lm_head'"),
    (TIES.replace("weight: 0.5", "weight: [{filter: mlp, value: 1}]"), "8:", "needs weight"),
  ],
)
def test_what_only_the_models_tell_has_its_place_too(family, text, place, words):
  with pytest.raises(RecipeError) as error:
    plan_of(text)
  assert f"recipe.yml:{place}" in str(error.value)
  assert words in str(error.value)


def test_a_range_of_layers_that_is_not_there(family):
  text = "merge_method: passthrough\nslices: [{sources: [{model: m0, layer_range: [2, 5]}]}]\n"
  with pytest.raises(RecipeError, match="layer_range ends at 5, but m0 has 3 layers"):
    plan_of(text)


def test_vocabularies_that_differ_are_named(family):
  _, first, *_ = family
  wide = np.zeros((12, 6), np.float32)
  folders.write(pathlib.Path("m0"), first | {"lm_head.weight": wide})
  with pytest.raises(errors.Problems, match=r"\[12, 6\] in m0 but .* \[10, 6\] in base; if these"):
    plan_of(TIES)


def test_the_provenance_tells_which_method_merged_a_tensor(family):
  run("""
merge_method: ties
base_model: base
models:
  - {model: m0, parameters: {weight: 1.0, density: 0.5}}
  - {model: m1, parameters: {weight: 0.5, density: 0.25}}
overrides: [{pattern: self_attn, merge_method: task_arithmetic}]
""")
  told = json.loads(pathlib.Path("out/jaxmerge_provenance.json").read_text())
  jobs = {job["job"]: job for job in told["jobs"]}
  for name, method in [("mlp.up_proj", "ties"), ("self_attn.q_proj", "task_arithmetic")]:
    tensor = f"model.layers.1.{name}.weight"
    job = jobs[told["tensors"][tensor]["job"]]
    assert job["method"]["method"] == method
    assert told["inputs"]["m0"][tensor] == f"merged by {method}, job {job['job']}"
    assert told["inputs"]["base"][tensor] == f"base of {method}, job {job['job']}"
    assert job["numbers"]["weight"] == [1.0, 0.5]
    assert job["tensors"] == sum(own.get("job") == job["job"] for own in told["tensors"].values())
  (ties,) = (job for job in jobs.values() if job["method"]["method"] == "ties")
  assert ties["numbers"]["density"] == [0.5, 0.25]


def test_the_command_tells_what_is_wrong_and_leaves_nothing(family, capsys):
  pathlib.Path("recipe.yml").write_text(TIES.replace("density", "densty"))
  assert main.main(["merge", "recipe.yml", "out"]) == 1
  err = capsys.readouterr().err
  assert "recipe.yml:6:" in err
  assert "did you mean 'density'" in err
  assert not pathlib.Path("out").exists()


def test_adapters_are_merged_as_they_are_read(family):
  """A recipe's `model+adapter` is the base plus scale B A."""
  base, first, *_ = family
  name = "model.layers.0.self_attn.q_proj"
  a, b = folders.write_adapter("lora", name)
  found = run("""
merge_method: task_arithmetic
base_model: base
models: [{model: m0+lora, parameters: {weight: 0.5}}]
""")
  tuned = first[f"{name}.weight"] + 2.0 * b @ a
  mean = (base[f"{name}.weight"] + tuned) / 2
  np.testing.assert_allclose(found[f"{name}.weight"], mean, atol=1e-5)


def test_merge_files_takes_models_with_adapters(family):
  """As a recipe does; a folder whose name has a + is that folder."""
  _, first, second, _ = family
  name = "model.layers.0.self_attn.q_proj"
  a, b = folders.write_adapter("lora", name)
  pathlib.Path("m1").rename("m+1")
  found = folders.read(merge.merge_files(methods.average(), ["m0+lora", "m+1"], "out"))
  mean = (first[f"{name}.weight"] + 2.0 * b @ a + second[f"{name}.weight"]) / 2
  np.testing.assert_allclose(found[f"{name}.weight"], mean, atol=1e-5)
  told = json.loads(pathlib.Path("out/jaxmerge_provenance.json").read_text())
  assert told["inputs"].keys() == {"m0+lora", "m+1"}
  for models, words in [
    (["m0+lorra"], "lorra: no such folder"),
    (["m0+m+1"], r"^m\+1: .*adapter"),
    (["m0++lora"], r"m0\+\+lora: no such folder, and not `model\+adapter`"),
    ([pathlib.Path("m0+lora")], r"m0\+lora: no such folder"),
  ]:
    with pytest.raises((FileNotFoundError, ValueError), match=words):
      merge.merge_files(methods.average(), models, "other")


def test_an_adapter_of_an_embedding_is_one_of_the_head_that_is_tied_to_it(family):
  _, first, second, _ = family
  name = "model.embed_tokens"
  folders.write_tied("m0", first)
  pathlib.Path("lora").mkdir()
  config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["embed_tokens"]}
  pathlib.Path("lora/adapter_config.json").write_text(json.dumps(config))
  a, b = np.ones((1, 10), np.float32), np.ones((6, 1), np.float32)
  parts = {f"base_model.model.{name}.lora_embedding_{k}": x for k, x in (("A", a), ("B", b))}
  safetensors.save("lora/adapter_model.safetensors", parts)
  found = run("""
merge_method: linear
models: [{model: m1}, {model: m0+lora}]
parameters: {weight: 1}
""")
  for head in (f"{name}.weight", "lm_head.weight"):
    mean = (second[head] + first[f"{name}.weight"] + 2) / 2
    np.testing.assert_allclose(found[head], mean, atol=1e-6)


def test_a_model_with_an_adapter_is_stored_as_its_base_is(tmp_path, monkeypatch):
  """Its matrices are computed in float32; a result without `dtype` keeps that of the files."""
  monkeypatch.chdir(tmp_path)
  folders.family(tmp_path, dtype=ml_dtypes.bfloat16)
  folders.write_adapter("lora", "model.layers.0.self_attn.q_proj")
  plan = plan_of("""
merge_method: linear
models: [{model: m0+lora}, {model: m1}]
parameters: {weight: 0.5}
""")
  assert {pathlib.Path("lora", n) for n in ("adapter_config.json", "adapter_model.safetensors")} < (
    plan.inputs
  )
  found = folders.read(execute.run(plan, "out"))
  assert {x.dtype.name for x in found.values()} == {"bfloat16", "int32"}


@pytest.mark.slow
def test_masks_are_those_of_seed_0_where_a_recipe_gives_none(family, capsys):
  base, first, second, _ = family
  found = run("""
merge_method: dare_linear
base_model: base
models:
  - {model: m0, parameters: {weight: 0.5, density: 0.4}}
  - {model: m1, parameters: {weight: 0.5, density: 0.4}}
""")
  expected = jaxmerge.merge(
    methods.dare(0.6, weight=0.5, scale=1.0),
    jaxmerge.stack([first, second]),
    base,
    names=["m0", "m1"],
    hparams={"seed": 0},
  )
  small.close(found, expected)
  told = json.loads(pathlib.Path("out/jaxmerge_provenance.json").read_text())["jobs"]
  assert [(j["method"]["method"], j["models"], j["seed"]) for j in told] == [
    ("dare", ["m0", "m1"], 0)
  ]
  assert main.main(["merge", "recipe.yml", "again", "--dry-run"]) == 0
  assert "seed 0" in capsys.readouterr().out
