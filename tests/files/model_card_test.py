"""The model card of a merge: what it says is so, and it says nothing of the machine."""

import json
import pathlib
import re

import folders
import pytest
import recipes
import yaml
from huggingface_hub import constants

from jaxmerge import methods, report
from jaxmerge.catalog import lookup
from jaxmerge.core import stage
from jaxmerge.files import estimate, execute, merge
from jaxmerge.io.tensors.tensor import Files

RECIPE = """\
# ```by hand```
merge_method: dare_ties
base_model: base
models:
  - {model: m0, parameters: {weight: 1.0, density: [0.5, 1.0]}}
  - {model: m1, parameters: {weight: 0.5, density: 0.3}}
exclude: [lm_head]
seed: 3
"""
SUMMARY = {
  "models": ["base", "chat"],
  "hub": {},
  "methods": [],
  "counts": "0 merged, 2 copied, 0 dropped",
  "library": None,
  "recipe": None,
  "versions": {"jaxmerge": "0"},
  "notes": [],
  "earlier": {},
}


@pytest.fixture(autouse=True)
def family(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  return folders.family(tmp_path)


def merged(text, out="out"):
  """Runs a recipe; returns the head and the body of the card."""
  pathlib.Path("recipe.yml").write_text(text)
  return parts(execute.run(recipes.plan_of_file("recipe.yml", Files()), out))


def parts(out):
  opening, head, body = (out / "README.md").read_text(encoding="utf-8").split("---\n", 2)
  assert opening == ""
  return yaml.safe_load(head), body


def test_the_card_says_what_was_done():
  head, body = merged(RECIPE)
  assert head == {"tags": ["merge", "jaxmerge"]}
  made = json.loads(pathlib.Path("out/jaxmerge_provenance.json").read_text())["inputs"]["m0"]
  count = list(made.values()).count("merged by dare_ties, job 1")
  assert f"Tensors: {count} merged, {13 - count} copied, " in body
  assert f"**dare ties**, {count} tensors of 2 models: " in body
  assert lookup.METHODS["dare_ties"].paper in body
  assert "\n- weight: 1 (m0), 0.5 (m1)\n" in body
  assert "; density from 0.5 to 1 (m0), 0.3 (m1), by tensor; " in body
  assert "\n- seed: 3\n" in body
  assert "experimental" not in body


def test_the_recipe_is_in_it_as_it_is():
  _, body = merged(RECIPE)
  (fence, inside) = re.search(r"^(`{4,})yaml\n(.*?)\n\1$", body, re.S | re.M).groups()
  assert inside + "\n" == RECIPE
  assert fence not in RECIPE


def test_every_method_is_there_and_experimental_ones_say_so():
  _, body = merged(RECIPE + "overrides: [{pattern: norm, merge_method: lwptv}]\n")
  assert "# Merge of 3 models: dare ties, lwptv\n" in body
  (own,) = (line for line in body.splitlines() if line.startswith("**lwptv**"))
  assert own.endswith("This method is experimental.")
  assert body.count("experimental") == 1


def test_the_bytes_depend_on_the_plan_alone(tmp_path, monkeypatch):
  merged(RECIPE, "first")
  elsewhere = tmp_path / "elsewhere"
  elsewhere.mkdir()
  folders.family(elsewhere)
  monkeypatch.chdir(elsewhere)
  merged(RECIPE, "second")
  first, second = (tmp_path / "first/README.md"), (elsewhere / "second/README.md")
  assert first.read_bytes() == second.read_bytes()
  assert str(tmp_path) not in first.read_text()


def test_a_merge_from_python_tells_no_place_on_the_machine(tmp_path):
  models = [tmp_path / "m0", tmp_path / "m1"]
  (tmp_path / "m0/README.md").write_text("the donor's own")
  out = merge.merge_files(
    methods.average(normalize=False),
    models,
    tmp_path / "out",
    hparams={"weight": 0.5},
    words="TIES, *dense*",
  )
  _, body = parts(out)
  assert str(tmp_path) not in body
  assert "# Merge of 2 models: TIES, \\*dense\\*\n" in body
  assert "\n- m0\n- m1\n" in body
  assert "\n- weight: 0.5\n" in body
  assert "the donor's own" not in body


def test_a_published_method_is_told_by_its_name_and_settings():
  out = merge.merge_files(methods.average((1.0, 3.0), normalize=False), ["m0", "m1"], "out")
  _, body = parts(out)
  assert "# Merge of 2 models: Average\n" in body
  assert "\n- weight: 1 (m0), 3 (m1)\n" in body
  assert re.search(r"\n- normalize: \w+\n", body)


def test_a_method_of_ones_own_is_told_by_its_fingerprint():
  def first(factor):
    return stage.pointwise(lambda x: factor * x[:1], combines=True)

  out = merge.merge_files(first(1.0), ["m0", "m1"], "out")
  _, body = parts(out)
  other = merge.merge_files(first(2.0), ["m0", "m1"], "other")
  assert "# Merge of 2 models: a method given in Python\n" in body
  digest = re.search(r"fingerprint of its code: (\w+)", body)[1]
  assert digest not in parts(other)[1]


def test_the_head_names_models_of_the_hub_and_no_paths(tmp_path, monkeypatch):
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
  commit = folders.cached(tmp_path / "cache", "org/chat", tmp_path / "m0", revision="v2")
  text = RECIPE.replace("model: m0", "model: org/chat@v2")
  head, body = merged(text)
  assert head["base_model"] == ["org/chat"]
  assert head["base_model_relation"] == "merge"
  assert f"\n- org/chat@v2: commit {commit}\n" in body


@pytest.mark.parametrize(
  ("config", "file", "library"),
  [
    ({"architectures": ["Llama"], "model_type": "llama"}, None, "transformers"),
    ({"architectures": ["Bert"], "model_type": "bert"}, "modules.json", "sentence-transformers"),
    ({"model_type": "mine"}, None, None),
  ],
)
def test_the_library_is_named_where_it_is_known(family, config, file, library):
  for name, own in zip(("base", "m0", "m1"), family[:3], strict=True):
    folders.write(pathlib.Path(name), own, config=config)
  if file:
    pathlib.Path("base", file).write_text("[]")
  head, _ = merged(RECIPE)
  assert head.get("library_name") == library


def test_names_break_neither_head_nor_body():
  name = 'x"\n---\n# [a](b)'
  text = report.merge_card({**SUMMARY, "hub": {name: "c"}, "models": [name], "library": name})
  (head,) = yaml.safe_load_all(text.split("\n---\n", 1)[0])
  assert head["library_name"] == head["base_model"][0] == name
  assert '\n- x" --- # \\[a\\](b)\n' in text


def test_a_copy_has_a_card_too():
  _, body = merged("merge_method: passthrough\nmodels: [{model: m0}]")
  assert "# Merge of 1 model: copies of tensors\n" in body
  assert "Tensors: 0 merged, 13 copied, 0 dropped." in body


def memory_of(method, count, rows):
  """The estimate for a recipe over models whose matrices have so many rows."""
  each = "".join(f"  - {{model: m{k}, parameters: {{weight: 1}}}}\n" for k in range(count))
  pathlib.Path("recipe.yml").write_text(f"{method}\nbase_model: base\nmodels:\n{each}")
  plan = recipes.plan_of_file("recipe.yml", Files())

  def taller(tensor):
    return tensor and tensor._replace(shape=(rows, *tensor.shape))

  large = [
    o._replace(base=taller(o.base), models=tuple(map(taller, o.models))) for o in plan.outputs
  ]
  return estimate.memory(plan._replace(outputs=tuple(large)))


def test_memory_grows_with_the_models_alone_unless_columns_are_whole():
  """About what `benchmarks/merge_files.py` measures: under half a gigabyte for three models."""
  ties = "merge_method: ties"
  small, large = (memory_of(ties, 3, rows) for rows in (10**6, 10**8))
  assert memory_of(ties, 2, 10**6) < small == large < 500_000_000
  columns = "merge_method: nuslerp\nparameters: {nuslerp_flatten: false, nuslerp_row_wise: true}"
  small, large = (memory_of(columns, 2, rows) for rows in (10**6, 10**8))
  assert large > 50 * small
