"""What a recipe asks for, what is done, and where that is not what mergekit does: all is said."""

import json
import pathlib

import folders
import pytest
import recipes
from recipes import head, one

from jaxmerge.cli import main
from jaxmerge.files import describe, execute
from jaxmerge.io.tensors.tensor import Files
from jaxmerge.recipe.mergekit import deviations, translate
from jaxmerge.recipe.mergekit.methods import MERGEKITS

DARE = """
merge_method: dare_ties
base_model: base
models:
  - {model: m0, parameters: {density: 0.53, weight: 0.4}}
  - {model: m1, parameters: {density: [0.25, 0.75], weight: 0.3}}
"""
TIES = "merge_method: ties\nbase_model: base\nmodels: [{model: m0}, {model: m1}]\n"
TIES += "parameters: {weight: 1, density: 0.5}\n"


@pytest.fixture(autouse=True)
def family(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  return folders.family(tmp_path)


def plan(text, **options):
  pathlib.Path("recipe.yml").write_text(text)
  return recipes.plan_of_file("recipe.yml", Files(), **options)


def test_the_dry_run_shows_what_is_asked_for_and_what_is_done():
  made = plan(DARE)
  lines = describe.dry_run(made, shard_size=10**9)
  asked = "density 0.53 (m0), from 0.25 to 0.75 (m1), by tensor; rescale true; normalize false"
  assert f"  in the recipe: dare_ties; weight 0.4 (m0), 0.3 (m1); {asked}; lambda 1" in lines
  done = "drop_rate 0.47 (m0), from 0.25 to 0.75 (m1), by tensor"
  assert f"  here: weight 0.4 (m0), 0.3 (m1); scale 1; {done}" in lines
  assert describe.summary(made)["methods"][0]["recipe"].startswith("dare_ties; weight 0.4 (m0)")
  assert made.jobs[0].recipe["method"] == "dare_ties"


DIFFERENT = {
  "ties": "entries are ranked over the whole model, not tensor by tensor; all entries as large as",
  "dare_linear": "kept entries are divided by the share that is kept, not brought to the L1 norm",
  "dare_ties": "where votes cancel out, the sign of the majority counts, not plus; random masks",
  "della": "kept entries are divided by the share that is kept",
  "breadcrumbs": "the largest entries that are removed are not made up for. `compat: ",
  "sce": "norms and energies below 1e-6 are taken as they are",
}


def note(method, keys=""):
  needed = {n: "1" for n, p in MERGEKITS[method].parameters.items() if p.default is None}
  given = ", ".join(f"{n}: {v}" for n, v in needed.items())
  text = head(keys + "\nbase_model: base", method, "[{model: m0}, {model: m1}]", f"{{{given}}}")
  return [line for line in plan(text).notes if "mergekit" in line]


@pytest.mark.parametrize("method", [*DIFFERENT, "linear", "task_arithmetic"])
def test_where_a_method_is_not_as_in_mergekit_a_note_says_it(method):
  found = note(method)
  assert len(found) == (method in DIFFERENT)
  assert all(DIFFERENT[method] in line for line in found)
  assert note(method, "compat: mergekit") == []


def test_a_narrow_dtype_is_said_where_mergekit_computes_in_it():
  (line,) = note("task_arithmetic", "dtype: bfloat16")
  assert "all is computed in float32 and rounded once, not in bfloat16." in line
  assert note("linear", "dtype: bfloat16") == []


@pytest.mark.parametrize("method", MERGEKITS)
@pytest.mark.parametrize("rescale", [True, False])
def test_all_that_differs_has_words(method, rescale):
  """For every setting that a recipe can have, which mergekit's rules would have otherwise."""
  shared = {n: 0.5 if p.default is None else p.default for n, p in MERGEKITS[method].shared.items()}
  shared |= {"rescale": rescale} if "rescale" in shared else {}
  recipe = one(head("", "linear"))
  for varied in ((), ("density",)):
    here, there = (
      translate.translate(method, shared, base=True, varied=varied, compat=compat)
      for compat in (False, True)
    )
    line = deviations.line(recipe, method, here.method, here.settings, there.settings, [])
    assert (line is None) == (here.settings == there.settings and not MERGEKITS[method].random)


@pytest.mark.slow
def test_the_flag_is_what_the_key_is(tmp_path):
  """`--compat mergekit`: the same tensors as with the key, recorded, and no note of differences."""
  keyed, flagged = plan(TIES + "compat: mergekit"), plan(TIES, compat="mergekit")
  assert flagged.jobs[0].spec == keyed.jobs[0].spec != plan(TIES).jobs[0].spec
  assert flagged.facts["compat"] == "mergekit"
  assert "compat" not in keyed.facts
  assert main.main(["merge", "recipe.yml", "flag", "--compat", "mergekit"]) == 0
  pathlib.Path("recipe.yml").write_text(TIES + "compat: mergekit")
  assert main.main(["merge", "recipe.yml", "key"]) == 0
  found, expected = (folders.read(pathlib.Path(name)) for name in ("flag", "key"))
  assert all((found[n] == x).all() for n, x in expected.items())
  told = json.loads(pathlib.Path("flag", execute.PROVENANCE).read_text())
  assert told["compat"] == "mergekit"
  assert told["jobs"][0]["recipe"]["density"] == [0.5, 0.5]
  card = pathlib.Path("flag/README.md").read_text()
  assert "jaxmerge merge jaxmerge_recipe.yml OUT --compat mergekit\n" in card
  assert "- in the recipe: ties; weight 1 (m0), 1 (m1); density 0.5 (m0), 0.5 (m1)" in card
