"""Rows and columns of a recipe's tensors: by names, by its layout, and what is refused."""

import json
import pathlib
import re

import folders
import numpy as np
import pytest

import jaxmerge
from jaxmerge import methods
from jaxmerge.files import describe, execute, merge
from jaxmerge.recipe import RecipeError

family, plan_of, run = folders.family_here, folders.plan_of, folders.run


STOCK = """
merge_method: model_stock
base_model: {0}base
models: [{{model: {0}m0}}, {{model: {0}m1}}]
parameters: {{filter_wise: true}}
"""


def test_a_layout_says_which_axis_is_which(tmp_path, monkeypatch):
  """By rows, a matrix [in, out] of GPT-2 is merged as its transpose: in a recipe, by a call."""
  monkeypatch.chdir(tmp_path)
  name = "h.0.attn.c_attn.weight"
  for seed, model in enumerate(("base", "m0", "m1")):
    x = np.random.default_rng(seed).normal(size=(6, 4)).astype(np.float32)
    folders.write(pathlib.Path(model), {name: x})
    folders.write(pathlib.Path(f"t-{model}"), {name: x.T})
  expected = run(STOCK.format(""))[name].T
  found = run(STOCK.format("t-") + "layout: [{pattern: 'c_attn.weight$', view: io}]", "declared")
  np.testing.assert_allclose(found[name], expected, atol=1e-6)
  method, models = methods.model_stock("row", floor=0.0), ["t-m0", "t-m1"]
  called = merge.merge_files(method, models, "called", base="t-base", layout=[("c_attn", "io")])
  np.testing.assert_allclose(folders.read(called)[name], expected, atol=1e-6)
  # Name and shape say it as well; a layout comes first.
  np.testing.assert_array_equal(run(STOCK.format("t-"), "undeclared")[name], found[name])
  other = run(STOCK.format("t-") + "layout: [{pattern: 'c_attn.weight$', view: oi}]", "other")[name]
  assert np.abs(other - expected).max() > 1e-2


@pytest.mark.parametrize(
  ("layout", "words"),
  [
    ("{filter: up_prj, view: io}", "6:19: filter 'up_prj' holds for none of the 13 tensors; did"),
    (
      "{filter: norm, view: io}",
      "6:31: view 'io' names 2 axes, but 'model.layers.0.input_layernorm.weight' is [6]",
    ),
    ("{filter: mlp, view: io}, {pattern: up_proj, view: io}", "6:45: items before it take all"),
  ],
)
def test_a_layout_that_fits_no_tensor_is_refused(family, layout, words):
  with pytest.raises(RecipeError) as error:
    plan_of(f"{STOCK.format('')}layout: [{layout}]\n")
  assert f"recipe.yml:{words}" in str(error.value)
  assert len(error.value.problems) == 1


SHAPES = {
  "embed_tokens.weight": (8, 4),
  "layers.0.experts.gate_up_proj": (2, 6, 4),
  "layers.0.experts.down_proj": (2, 4, 3),
  "layers.0.up_proj.weight": (6, 4),
  "norm.weight": (4,),
}
TSV = """
merge_method: tsv
base_model: base
models: [{model: m0}, {model: m1}]
"""


def models_of(shapes):
  """A base and two models on disk; their tensors."""
  every = []
  for seed, name in enumerate(("base", "m0", "m1")):
    rng = np.random.default_rng(seed)
    every.append({n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()})
    folders.write(pathlib.Path(name), every[-1])
  return every


def test_files_lie_as_models_in_memory_do(tmp_path, monkeypatch):
  """Experts are a matrix each, an embedding is none; dry run and provenance say so."""
  monkeypatch.chdir(tmp_path)
  base, *models = models_of(SHAPES)
  expected = jaxmerge.merge(methods.tsv(), models, base)
  plan = plan_of(TSV)
  line = "2 boi (experts), 1 no matrix (lookup), 1 no matrix (vector), 1 oi (weight)"
  assert f"  outputs and inputs: {line}" in describe.dry_run(plan, shard_size=10**9)
  found = folders.read(execute.run(plan, "out"))
  called = folders.read(merge.merge_files(methods.tsv(), ["m0", "m1"], "called", base="base"))
  for name, x in expected.items():
    np.testing.assert_allclose(found[name], x, atol=2e-5, err_msg=name)
    np.testing.assert_array_equal(called[name], found[name])
  (job,) = json.loads(pathlib.Path("out/jaxmerge_provenance.json").read_text())["jobs"]
  views = {name: own["view"] for own in job["layout"] for name in own["leaves"]}
  assert views == dict(zip(SHAPES, ("li", "boi", "boi", "oi", None), strict=True))
  assert line in pathlib.Path("out/README.md").read_text()


def test_what_is_open_is_refused_with_the_lines_to_add(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  base, *models = models_of({f"layers.{n}.experts.w1": (2, 6, 4) for n in range(3)})
  with pytest.raises(RecipeError, match="neither name nor shape say how these") as error:
    plan_of(TSV)
  assert "and 2 more" in str(error.value)
  (item,) = re.findall(r"\{pattern: .*\}", str(error.value))
  with pytest.raises(RecipeError, match="view must have a letter for each axis"):
    plan_of(f"{TSV}layout: [{item}]")  # Which view is right, who knows the model says.
  found = run(f"{TSV}layout: [{item.replace('bio|boi|none', 'boi')}]")
  expected = jaxmerge.merge(methods.tsv(), models, base, layout=[("w1", "boi")])
  for name, x in expected.items():
    np.testing.assert_allclose(found[name], x, atol=2e-5)
  with pytest.raises(ValueError, match="neither name nor shape"):
    merge.merge_files(methods.tsv(), ["m0", "m1"], "called", base="base")
  with pytest.raises(ValueError, match="'w2' is found in no leaf's name"):
    merge.merge_files(methods.tsv(), ["m0", "m1"], "called", base="base", layout=[("w2", "boi")])


def test_a_recipe_of_matrices_needs_some(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  models_of({"embed_tokens.weight": (8, 4), "norm.weight": (4,)})
  with pytest.raises(RecipeError, match=r"recipe.yml:2:\d+: .*none of the leaves is one"):
    plan_of(TSV)
  with pytest.raises(RecipeError, match="none of the leaves is one"):
    plan_of(f"{TSV}layout: [{{pattern: embed, view: none}}]")
  assert run(f"{TSV}layout: [{{pattern: embed, view: oi}}]").keys() == {
    "embed_tokens.weight",
    "norm.weight",
  }
