"""Recipes from Python: `jaxmerge.merge_recipe` does what `jaxmerge merge` does."""

import json
import os
import pathlib

import folders
import pytest
import yaml

import jaxmerge
from jaxmerge.cli import main
from jaxmerge.files import execute
from jaxmerge.io.tensors import tensor
from jaxmerge.recipe import RecipeError, run
from jaxmerge.recipe.plan import planner

MODELS = [{"model": m, "parameters": {"weight": 1.0, "density": 0.5}} for m in ("m0", "m1")]
TIES = {"merge_method": "ties", "base_model": "base", "models": MODELS, "dtype": "float32"}
FIRST = {"name": "mean", "merge_method": "linear", "models": MODELS}
LAST = {
  "merge_method": "slerp",
  "base_model": "mean",
  "models": [{"model": "mean"}, {"model": "m2"}],
  "parameters": {"t": 0.5},
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  folders.family(tmp_path)


def files(folder):
  return {p.name: p.read_bytes() for p in pathlib.Path(folder).iterdir() if p.is_file()}


def test_a_file_a_dict_and_the_command_give_the_same_bytes():
  pathlib.Path("recipe.yml").write_text(yaml.safe_dump(TIES, sort_keys=False))
  assert main.main(["merge", "recipe.yml", "command"]) == 0
  expected = files("command")
  assert jaxmerge.merge_recipe("recipe.yml", "file") == pathlib.Path("file")
  assert files(jaxmerge.merge_recipe(pathlib.Path("recipe.yml"), "path")) == expected
  assert files("file") == files(jaxmerge.merge_recipe(TIES, "dict")) == expected


def test_the_last_of_several_may_build_on_the_others():
  told = []

  def progress(name, size):
    told.append([name, size, 0])
    own = told[-1]
    return lambda done: own.__setitem__(2, own[2] + done)

  out = jaxmerge.merge_recipe([FIRST, LAST], "out", progress=progress)
  record = json.loads((out / execute.PROVENANCE).read_text())
  assert record["earlier"].keys() == {"mean"}
  assert [name for name, _, _ in told] == ["mean", "merging"]
  assert all(done == size > 0 for _, size, done in told)
  assert [p for p in os.listdir() if p.startswith(".out")] in ([], [".out.lock"])


def test_every_recipe_is_planned_once(monkeypatch):
  """Also where a merge goes on: what is merged is what the dry run says, with where it now lies."""
  planned, real = [], planner.plan_recipe

  def plan_recipe(recipe, *rest):
    planned.append(recipe.name)
    return real(recipe, *rest)

  monkeypatch.setattr(planner, "plan_recipe", plan_recipe)
  files = tensor.Files()
  plans = run.plan([FIRST, LAST], "out", run.Settings(), files)
  merged = run.execute(plans, files)
  assert planned == ["mean", None]
  assert merged.outputs == plans.plan.outputs
  assert (merged.jobs, merged.outcomes) == (plans.plan.jobs, plans.plan.outcomes)
  assert (
    merged.facts["earlier"]["mean"]["plan"]
    == json.loads(pathlib.Path("out", execute.PROVENANCE).read_text())["earlier"]["mean"]["plan"]
  )


def test_every_problem_is_told_before_anything_is_written():
  wrong = {**TIES, "merge_method": "tiez", "modelz": []}
  with pytest.raises(RecipeError, match=r"merge_method: .*did you mean 'ties'"):
    jaxmerge.merge_recipe(wrong, "out")
  lacking = {**TIES, "models": [*MODELS, {"model": "m9"}]}
  before = sorted(os.listdir())
  with pytest.raises((ValueError, OSError), match="m9"):
    jaxmerge.merge_recipe(lacking, "out")
  assert sorted(os.listdir()) == before


def model(name, **parameters):
  return {"model": name, "parameters": parameters}


@pytest.mark.parametrize(
  ("changes", "expected"),
  [
    ({"merge_method": "tiez"}, "merge_method: merge_method cannot be 'tiez'; did you mean 'ties'?"),
    ({"merge_method": None}, "recipe: the recipe needs the key merge_method."),
    ({"models": "m0"}, "models: models must be a list of one item or more, got 'm0'."),
    (
      {"models": [MODELS[0], model("m1", weight="much", density=0.5)]},
      "models[1].parameters.weight: weight must be a number in (-infinity, infinity), got 'much'.",
    ),
    (
      {"models": [MODELS[0], model("m0", weight=2, density=0.5)]},
      "models[1].model: 'm0' is already in models[0].model; give it one weight.",
    ),
    ({"models": [{"modle": "m0"}]}, "models[0].modle: unknown key 'modle' in a model; did you"),
    ({"rename": {"model.": 3}}, "rename['model.']: rename of 'model.' must be text, got 3;"),
    ({"exclude": ["("]}, "exclude[0]: an item of exclude is no regular expression, got '(':"),
    ({"models": [*MODELS, model("m9")]}, "models[2].model: ties needs weight for 'm9';"),
    (
      {"parameters": {"lambda": [{"filter": "mpl", "value": 1}, {"value": 2}]}},
      "parameters.lambda[0].filter: filter 'mpl' holds for none of the 13 tensors; did you mean",
    ),
    ({"density": 1, "strict": True}, "density: density is a parameter, and belongs under"),
  ],
)
def test_errors_of_a_dict_name_paths_in_it(changes, expected):
  with pytest.raises(RecipeError) as error:
    jaxmerge.merge_recipe({**TIES, **changes}, "out")
  assert any(line.startswith(expected) for line in str(error.value).splitlines()), error.value


def test_errors_of_several_dicts_name_which():
  with pytest.raises(RecipeError, match=r"(?m)^recipe\[1\]\.dtype: dtype cannot be 'bf16'"):
    jaxmerge.merge_recipe([FIRST, {**LAST, "dtype": "bf16"}], "out")
  with pytest.raises(
    ValueError, match=r"^recipe\[1\]\.t\[0\]: a recipe cannot contain a value of type bytes"
  ):
    jaxmerge.merge_recipe([FIRST, {**LAST, "t": [b"1"]}], "out")


@pytest.mark.parametrize("method", [jaxmerge.methods.ties(), jaxmerge.methods.ties])
def test_a_method_in_a_dict_is_for_merge_files(method):
  with pytest.raises(ValueError, match=r"^merge_method: .* by name, such as 'ties'; .*merge_files"):
    jaxmerge.merge_recipe({**TIES, "merge_method": method}, "out")


def test_a_text_of_yaml_is_no_path():
  text = "merge_method: linear\nmodels:\n" + "  - model: m0\n" * 99
  with pytest.raises(ValueError, match=r"got YAML text, 'merge_m.*safe_load\(text\)") as error:
    jaxmerge.merge_recipe(text, "out")
  assert len(str(error.value)) < 200


def test_notes_on_a_dict_name_paths_in_it():
  out = jaxmerge.merge_recipe({**TIES, "density": 0.5}, "out")
  first, *_ = json.loads((out / execute.PROVENANCE).read_text())["notes"]
  assert first.startswith("density: density is a parameter, and belongs under parameters; here")


@pytest.mark.parametrize("recipe", [[], [1], 3, {"models": object()}])
def test_what_is_no_recipe_is_refused(recipe):
  with pytest.raises(ValueError, match=r"a recipe (must|can)"):
    jaxmerge.merge_recipe(recipe, "out")
  assert not pathlib.Path("out").exists()


def test_a_result_is_kept_unless_it_may_be_replaced():
  out = jaxmerge.merge_recipe(TIES, "out")
  before = files(out)
  with pytest.raises(FileExistsError, match="out"):
    jaxmerge.merge_recipe(FIRST, "out")
  assert files(out) == before
  assert files(jaxmerge.merge_recipe(FIRST, "out", replace=True)) != before


def test_it_is_evaluated_at_the_end():
  out = jaxmerge.merge_recipe(TIES, "out", evaluate=lambda folder: {"size": len(files(folder))})
  assert json.loads((out / "jaxmerge_evaluation.json").read_text())["size"] > 3
