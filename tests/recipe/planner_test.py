"""Recipes run: what becomes of every tensor, and that it is what the methods say."""

import json
import pathlib

import folders
import ml_dtypes
import numpy as np
import pytest
import recipes
import small
from marking import some_fast

import jaxmerge
from jaxmerge import errors, methods
from jaxmerge.cli import main
from jaxmerge.files import describe, execute, merge
from jaxmerge.io.tensors import safetensors
from jaxmerge.recipe import RecipeError, layers

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


@pytest.mark.slow
def test_compat_has_mergekits_thresholds(family):
  base, first, second, _ = family
  expected = jaxmerge.merge(
    methods.ties(weight=(1.0, 0.5), scope="leaf", rule="exact", zero_sum="plus"),
    jaxmerge.stack([first, second]),
    base,
    names=["m0", "m1"],
    hparams={"density": (0.5, 0.3)},
  )
  small.same(run(TIES + "compat: mergekit\n"), expected)


SUM = """
merge_method: task_arithmetic
base_model: base
models:
  - {model: m0, parameters: {weight: 0.3}}
  - {model: m1, parameters: {weight: 0.7}}
exclude: [lm_head]
"""


def summed(base, first, second, dtype):
  """What `SUM` is where every operation rounds to a dtype; a sum over the models is one."""
  low = [x.astype(dtype) for x in (base, first, second)]
  terms = [dtype(w) * (x - low[0]) for w, x in zip((0.3, 0.7), low[1:], strict=True)]
  return low[0] + sum(x.astype(np.float32) for x in terms).astype(dtype)


def assert_summed(found, family, dtype):
  for name, x in found.items():
    parts = [tree[name] for tree in family[:3]]
    if name != "position_ids":
      expected = parts[0].astype(dtype) if name == "lm_head.weight" else summed(*parts, dtype)
      np.testing.assert_array_equal(x.astype(np.float32), expected.astype(np.float32), name)


@pytest.mark.parametrize("dtype", some_fast([ml_dtypes.bfloat16, np.float16], [ml_dtypes.bfloat16]))
def test_compat_computes_in_the_dtype_of_the_recipe(family, dtype):
  name = np.dtype(dtype).name
  found = run(SUM + f"compat: mergekit\ndtype: {name}\n")
  assert found["model.norm.weight"].dtype == dtype
  assert_summed(found, family, dtype)
  wide = run(SUM + f"compat: mergekit\ndtype: {name}\nout_dtype: float32\n", "wide")
  assert wide["model.norm.weight"].dtype == np.float32
  assert_summed(wide, family, dtype)
  once = run(SUM + f"dtype: {name}\n", "once")
  embedding = "model.embed_tokens.weight"
  assert (once[embedding] != found[embedding]).any()


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_compat_computes_in_the_dtype_of_the_files(tmp_path, monkeypatch, dtype):
  monkeypatch.chdir(tmp_path)
  own = folders.family(tmp_path, dtype=dtype)
  text = SUM + "compat: mergekit\n"
  name = np.dtype(dtype).name
  assert f"computed in {name}: 11 tensors" in describe.dry_run(plan_of(text), shard_size=10**9)
  found = run(text)
  assert found["model.norm.weight"].dtype == dtype
  assert_summed(found, own, dtype)


def test_compat_computes_in_float32_what_has_several_dtypes(family):
  """As mergekit does, which also stores it in float32."""
  low = {
    n: x.astype(ml_dtypes.bfloat16) if x.dtype == np.float32 else x for n, x in family[0].items()
  }
  folders.write(pathlib.Path("base"), low)
  found = run(SUM + "compat: mergekit\n")
  assert found["model.norm.weight"].dtype == np.float32
  assert found["lm_head.weight"].dtype == ml_dtypes.bfloat16
  name = "model.embed_tokens.weight"
  base, first, second = (tree[name].astype(np.float32) for tree in (low, *family[1:3]))
  expected = base + 0.3 * (first - base) + 0.7 * (second - base)
  np.testing.assert_allclose(found[name], expected, rtol=1e-6, atol=1e-6)


def test_compat_that_cannot_be_had_is_refused(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  folders.family(tmp_path, 1, dtype=ml_dtypes.bfloat16)
  text = "merge_method: arcee_fusion\nbase_model: base\nmodels: [{model: m0}]\ncompat: mergekit\n"
  with pytest.raises(RecipeError, match=r"recipe.yml:4:1: .* write dtype: float32 and out_dtype"):
    plan_of(text)
  with pytest.raises(RecipeError, match=r"(?s)write dtype: float32.*5:11: .*'lm_head'"):
    plan_of(text + "exclude: [lm_haed]\n")
  assert plan_of(text + "dtype: float32\nout_dtype: bfloat16\n").outputs[0].precision is None


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


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("transformer.h.11.attn.c_attn.weight", ("transformer.h.", 11, "attn.c_attn.weight")),
    ("encoder.block.0.layer.1.wi.weight", ("encoder.block.", 0, "layer.1.wi.weight")),
    ("0.auto_model.x", ("", 0, "auto_model.x")),
    ("lm_head.weight", None),
  ],
)
def test_places_of_names(name, expected):
  found = layers.place(name)
  assert found == expected


def test_the_stack_of_a_model_with_two_towers():
  names = [f"vision.layers.{i}.w" for i in range(2)] + [f"text.layers.{i}.w" for i in range(3)]
  assert layers.main(names, {"text_config": {"num_hidden_layers": 3}}) == "text.layers."
  with pytest.raises(ValueError, match=r"text.layers.\* \(3\), vision.layers.\* \(2\)"):
    layers.main(names, {})


def test_configs_count_the_layers_in_the_right_place():
  both = {"text_config": {"num_hidden_layers": 3}, "vision_config": {"num_hidden_layers": 3}}
  order = {0: 0, 1: 2}
  found = layers.resize(both, 3, order, "vision_model", {"text_model"})
  assert found == {**both, "vision_config": {"num_hidden_layers": 2}}
  found = layers.resize(both, 3, order)  # Those of the text, where no module is named.
  assert found == {**both, "text_config": {"num_hidden_layers": 2}}
  pair = {"encoder": {"num_hidden_layers": 3}, "decoder": {"num_hidden_layers": 3}}
  with pytest.raises(ValueError, match=r"says encoder.num_hidden_layers: 3 and decoder.num"):
    layers.resize(pair, 3, order)
  t5 = {"num_layers": 3, "num_decoder_layers": 3}
  assert layers.resize(t5, 3, order, "encoder", {"decoder"}) == {**t5, "num_layers": 2}
  assert layers.resize(t5, 3, order, "decoder", {"encoder"}) == {**t5, "num_decoder_layers": 2}
  kinds = {"n_layer": 3, "layer_types": ["full", "sliding", "full"], "eos_token_id": [1, 2, 3]}
  found = layers.resize(kinds, 3, {0: 1, 1: 0})
  assert found == {**kinds, "n_layer": 2, "layer_types": ["sliding", "full"]}
  assert layers.resize({"num_hidden_layers": 9}, None, order) == {"num_hidden_layers": 2}
  with pytest.raises(ValueError, match="no count of the 3 layers, such as num_hidden_layers"):
    layers.resize({"model_type": "mine"}, 3, order)


STAGES = (
  recipes.MEAN
  + """\
merge_method: slerp
base_model: mean
models: [{model: m2}]
parameters: {t: 0.25}
"""
)


def test_recipes_build_on_each_other(family, capsys):
  _, first, second, third = family
  pathlib.Path("recipe.yml").write_text(STAGES)
  pathlib.Path(".out.1.mean.stage").mkdir()  # Of a merge to `out.1`, which is none of this one's.
  assert main.main(["merge", "recipe.yml", "out", "--dry-run"]) == 0
  before, after = capsys.readouterr().out.split("the last recipe:\n")
  assert before.startswith(
    "recipe 'mean', done before and removed at the end:\n  result: 13 tensors"
  )
  assert "  job 1: 12 tensors of 2 models, " in before
  assert "  memory: " in before
  assert "  tensors: 12 merged, 1 copied, 0 dropped\n" in after
  assert "in all: 11.3 kB read, 3.78 kB written, memory " in after
  assert main.main(["merge", "recipe.yml", "out"]) == 0
  mean = jaxmerge.merge(methods.average(), jaxmerge.stack([first, second]))
  pair = jaxmerge.stack([{n: np.asarray(x) for n, x in mean.items()}, third])
  small.close(folders.read(pathlib.Path("out")), jaxmerge.merge(methods.slerp(0.25), pair))
  assert [p.name for p in pathlib.Path().glob(".*")] == [".out.1.mean.stage"]
  told = json.loads(pathlib.Path("out/jaxmerge_provenance.json").read_text())
  earlier = told["earlier"]["mean"]
  name = "model.norm.weight"
  assert told["inputs"]["m2"][name] == "merged by slerp, job 1"
  assert earlier["inputs"].keys() == {"m0", "m1"}
  assert earlier["inputs"]["m1"][name] == "merged by average, job 1"
  assert earlier["inputs"]["m0"]["position_ids"] == "copied from m0"
  assert earlier["jobs"][0]["numbers"] == {"weight": [1.0, 1.0]}
  card = pathlib.Path("out/README.md").read_text()
  assert "# Merge of 3 models: Average, slerp\n" in card
  assert "## Merged before: mean\n\nTensors: 12 merged, 1 copied, 0 dropped.\n\n- m0\n" in card
  # Checksums lead from the result to the files that all began with.
  (between,) = (x for n, x in told["tensors"][name]["inputs"].items() if n.startswith("mean/"))
  assert earlier["tensors"][name]["xxh3_128"] == between
  assert {n.split("/")[0] for n in earlier["tensors"][name]["inputs"]} == {"m0", "m1"}


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


def write_adapter(folder, module):
  """Writes an adapter of rank 2 and scale 2 for one matrix; returns A and B."""
  rng = np.random.default_rng(0)
  a, b = (rng.normal(size=s).astype(np.float32) for s in ((2, 6), (6, 2)))
  pathlib.Path(folder).mkdir()
  config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
  pathlib.Path(folder, "adapter_config.json").write_text(json.dumps(config))
  weights = {f"base_model.model.{module}.lora_{k}.weight": x for k, x in (("A", a), ("B", b))}
  safetensors.save(f"{folder}/adapter_model.safetensors", weights)
  return a, b


def test_adapters_are_merged_as_they_are_read(family):
  """A recipe's `model+adapter` is the base plus scale B A."""
  base, first, *_ = family
  name = "model.layers.0.self_attn.q_proj"
  a, b = write_adapter("lora", name)
  found = run("""
merge_method: task_arithmetic
base_model: base
models: [{model: m0+lora, parameters: {weight: 0.5}}]
""")
  tuned = first[f"{name}.weight"] + 2.0 * b @ a
  mean = (base[f"{name}.weight"] + tuned) / 2
  np.testing.assert_allclose(found[f"{name}.weight"], mean, atol=1e-5)


def test_adapters_are_added_to_what_recipes_make(family):
  _, first, second, _ = family
  name = "model.layers.0.self_attn.q_proj"
  a, b = write_adapter("lora", name)
  text = (
    recipes.MEAN
    + """\
merge_method: passthrough
models: [{model: mean+%s}]
"""
  )
  pathlib.Path("recipe.yml").write_text(text % "lora")
  assert main.main(["merge", "recipe.yml", "out"]) == 0
  found = folders.read(pathlib.Path("out"))
  for own, more in ((f"{name}.weight", 2.0 * b @ a), ("lm_head.weight", 0)):
    np.testing.assert_allclose(found[own], (first[own] + second[own]) / 2 + more, atol=1e-5)
  with pytest.raises(RecipeError, match=r"recipe.yml:8:18: lorra: no such folder"):
    plan_of(text % "lorra")


def test_merge_files_takes_models_with_adapters(family):
  """As a recipe does; a folder whose name has a + is that folder."""
  _, first, second, _ = family
  name = "model.layers.0.self_attn.q_proj"
  a, b = write_adapter("lora", name)
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


def tied(folder, tensors):
  """Writes a model without a head, whose config says that the head is the embedding."""
  config = folders.CONFIG | {"tie_word_embeddings": True}
  own = {n: x for n, x in tensors.items() if n != "lm_head.weight"}
  folders.write(pathlib.Path(folder), own, config=config)


def test_an_adapter_of_an_embedding_is_one_of_the_head_that_is_tied_to_it(family):
  _, first, second, _ = family
  name = "model.embed_tokens"
  tied("m0", first)
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


def test_ties_of_what_a_recipe_makes_are_known_before_it_is_made(family, capsys):
  _, first, second, third = family
  tied("m0", first)
  tied("m1", second)
  text = STAGES.replace(
    "base_model: mean\nmodels: [{model: m2}]", "base_model: m2\nmodels: [{model: mean}]"
  )
  pathlib.Path("recipe.yml").write_text(text.replace("m2", "./m2"))
  assert main.main(["merge", "recipe.yml", "out"]) == 0, capsys.readouterr().err
  name = "lm_head.weight"
  mean = (first["model.embed_tokens.weight"] + second["model.embed_tokens.weight"]) / 2
  pair = {name: np.stack([third[name], mean])}
  small.close(
    {name: folders.read(pathlib.Path("out"))[name]}, jaxmerge.merge(methods.slerp(0.25), pair)
  )


def test_a_model_with_an_adapter_is_stored_as_its_base_is(tmp_path, monkeypatch):
  """Its matrices are computed in float32; a result without `dtype` keeps that of the files."""
  monkeypatch.chdir(tmp_path)
  folders.family(tmp_path, dtype=ml_dtypes.bfloat16)
  write_adapter("lora", "model.layers.0.self_attn.q_proj")
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
