"""Recipes of a file that build on each other: planned together, merged one after the other."""

import json
import pathlib

import folders
import numpy as np
import pytest
import recipes
import small

import jaxmerge
from jaxmerge import methods
from jaxmerge.cli import main
from jaxmerge.files import execute
from jaxmerge.io.tensors.tensor import Files, NotYetMade
from jaxmerge.recipe import RecipeError
from jaxmerge.recipe.plan import intermediate

family, plan_of, run = folders.family_here, folders.plan_of, folders.run


TIES = """
merge_method: ties
base_model: m0
models: [{model: m1, parameters: {weight: 1.0, density: 0.5}}]
"""
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


def test_adapters_are_added_to_what_recipes_make(family):
  _, first, second, _ = family
  name = "model.layers.0.self_attn.q_proj"
  a, b = folders.write_adapter("lora", name)
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


def test_ties_of_what_a_recipe_makes_are_known_before_it_is_made(family, capsys):
  _, first, second, third = family
  folders.write_tied("m0", first)
  folders.write_tied("m1", second)
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


def test_results_are_read_once_they_are_merged(family, tmp_path):
  """Before that, what they copy has the bytes of its source already."""
  _, first, *_ = family
  files = Files()
  plan = plan_of(TIES)
  result = intermediate.of_plan("mean", plan, 10**9)
  positions, norm = (result.model.tensors[n] for n in ("position_ids", "model.norm.weight"))
  assert positions.where == "mean/model.safetensors: tensor 'position_ids'"
  out = np.zeros(4, np.int32)
  positions.read(0, out)
  np.testing.assert_array_equal(out, first["position_ids"])
  with pytest.raises(NotYetMade, match="mean has not been merged yet"):
    norm.read(0, np.empty(6, np.float32))
  result.open(execute.run(plan, tmp_path / "out"), files)
  out = np.empty(6, np.float32)
  norm.read(0, out)
  np.testing.assert_array_equal(out, folders.read(tmp_path / "out")["model.norm.weight"])


def test_a_head_stays_tied_where_a_tokenizer_reorders_what_recipes_make(family):
  """The dry run and the merge agree that the head is the embedding, whatever bytes it will have."""
  for name, tensors in zip(("m0", "m1", "m2"), family[1:], strict=True):
    folders.write_tied(name, tensors)
    ids = {t: i for i, t in enumerate("abcdefghij")}
    text = json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": ids, "merges": []}})
    pathlib.Path(name, "tokenizer.json").write_text(text)
  pathlib.Path("recipe.yml").write_text(
    recipes.MEAN
    + """\
merge_method: linear
models: [{model: mean}, {model: m2}]
parameters: {weight: 1}
tokenizer: {source: union, pad_to_multiple_of: 8}
"""
  )
  planned = {o.name for o in recipes.plan_of_file("recipe.yml").outputs}
  assert main.main(["merge", "recipe.yml", "out"]) == 0
  found = folders.read(pathlib.Path("out"))
  assert found.keys() == planned
  assert "lm_head.weight" not in planned
  assert found["model.embed_tokens.weight"].shape == (16, 6)
  assert json.loads(pathlib.Path("out/config.json").read_text())["tie_word_embeddings"]
