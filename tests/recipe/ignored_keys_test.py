"""Keys that mergekit ignores: said in notes, errors only where a recipe is to be strict."""

import pathlib
import re

import folders
import pytest
import recipes
from recipes import head, one, problems, slices

from jaxmerge import recipe
from jaxmerge.cli import main
from jaxmerge.io.tensors.tensor import Files
from jaxmerge.recipe.errors import Place

DOCS = (pathlib.Path(__file__).parents[2] / "docs" / "recipes.md").read_text()

BASE = "base_model: x/y"
# The text, line and column of the key, and what the note says of it.
IGNORED = [
  (
    head("select_topk: 0.1"),
    4,
    1,
    "select_topk is a parameter, and belongs under parameters; here",
  ),
  (head("out_path: ./x"), 4, 1, "'out_path' is no key of the recipe"),
  (head("pad_to_multiple_of: 8"), 4, 1, "pad_to_multiple_of belongs under tokenizer; here"),
  (
    head(BASE, "model_stock", parameters="{weight: 1}"),
    3,
    14,
    "weight is no parameter of model_stock",
  ),
  (
    head(BASE, "multislerp", parameters="{weight: 1, normalize: true}"),
    3,
    25,
    "normalize is no parameter of multislerp (there is normalize_weights)",
  ),
  (
    head(BASE, "sce", parameters="{select_topk: 0.5, smooth: false}"),
    3,
    32,
    "'smooth' is no key of the parameters of sce",
  ),
  (
    head("", models="[{model: a/b, weight: 1}, {model: c/d}]"),
    2,
    23,
    "weight is a parameter, and belongs under parameters; here",
  ),
  (
    head("", models="[{model: a/b, revision: v1}, {model: c/d}]"),
    2,
    23,
    "a revision is part of the model, org/name@revision; beside it",
  ),
  (
    head("", models="[{model: a/b, parameters: {normalize: true}}, {model: c/d}]"),
    2,
    36,
    "normalize is one for all models, and belongs to the parameters of the recipe, module or "
    "slice; at a model",
  ),
  (
    slices(("a/b", "[0, 4]"), ("c/d", "[0, 4]")) + "    residual_weight: 0.5\n",
    8,
    5,
    "'residual_weight' is no key of a slice",
  ),
  (
    slices(("a/b", "[0, 4]"), ("c/d", "[0, 4]")) + "    merge_method: linear\n",
    8,
    5,
    "'merge_method' is no key of a slice",
  ),
]
ALSO = [
  (
    head("base_model: {model: a/b, override_architecture: B}"),
    4,
    26,
    "override_architecture has no effect: no architecture is needed here.",
  ),
  (
    head("", models="[{model: a/b}, {model: a/b}]"),
    2,
    32,
    "'a/b' is already in line 2: it counts once, as in mergekit.",
  ),
]
EVERY = [(*case[:3], case[3] + ": it is ignored, as by mergekit.") for case in IGNORED] + ALSO


@pytest.mark.parametrize(("text", "line", "column", "words"), EVERY, ids=[e[3] for e in EVERY])
def test_what_mergekit_ignores_is_a_note_with_its_place(text, line, column, words):
  (note,) = one(text).ignored
  assert note == (Place("r.yml", line, column), words, True)


@pytest.mark.parametrize(("text", "line", "column", "words"), EVERY, ids=[e[3] for e in EVERY])
def test_a_strict_recipe_refuses_it(text, line, column, words):
  (error,) = problems(text + "\nstrict: true")
  assert error == f"r.yml:{line}:{column}: {words} strict refuses what is ignored: remove it."
  with pytest.raises(recipe.RecipeError, match=re.escape(words)):
    recipe.parse(text, "r.yml", strict=True)


def test_the_docs_say_what_is_ignored():
  table = DOCS.split("### Ignored, as by mergekit")[1].split("###")[0]
  texts = {words.removesuffix(".") for *_, words in EVERY}
  shown = re.findall(r"\| `([^`]*)` \|$", table, flags=re.M)
  assert len(shown) == 7
  assert [words for words in shown if words.replace("density", "weight") not in texts] == []


def test_what_looks_misspelt_is_an_error_all_the_same():
  (error,) = problems(head(BASE, "ties", parameters="{weight: 1, densty: 0.5}"))
  assert "unknown key 'densty' in the parameters of ties; did you mean 'density'?" in error


def test_what_is_ignored_is_told_where_it_is_missed():
  """A parameter at the wrong level, which is then missing at the right one: two lines."""
  text = head(BASE, "slerp", models="[{model: a/b, parameters: {t: 0.5}}]", parameters="{}")
  ignored, missing = sorted(problems(text), key=lambda line: "needs" in line)
  assert "t is one for all models" in ignored
  assert "slerp needs t; set it in the parameters of the slice or the recipe." in missing


def test_a_model_that_is_there_twice_counts_once():
  own = one(head("", models="[{model: a/b}, {model: c/d}, {model: a/b}]"))
  assert [str(source.model) for source in own.models] == ["a/b", "c/d"]


@pytest.mark.parametrize(("text", "said"), [("1.0", True), ("0.0", False), ("1", True)])
def test_truth_values_may_be_numbers(text, said):
  """mergekit writes them so in the recipes that it puts into model cards."""
  own = one(head("", parameters=f"{{weight: 1, normalize: {text}}}"))
  assert own.parameters["normalize"][0].value is said
  own = one(head("", parameters=f"{{weight: 1, normalize: [{text}, true]}}"))
  assert own.parameters["normalize"][0].value == (said, True)


DEFAULT = """
merge_method: linear
modules:
  default:
    slices:
    - sources:
      - {layer_range: [0, 2], model: m0, parameters: {weight: 1}}
      - {layer_range: [1, 3], model: m1, parameters: {weight: 3}}
    parameters: {normalize: 0.0}
"""


def test_the_module_that_mergekit_calls_default_is_the_whole_model(tmp_path, monkeypatch, capsys):
  """The form in which mergekit writes out what it has merged; and notes reach the terminal."""
  monkeypatch.chdir(tmp_path)
  _, first, second, _ = folders.family(tmp_path)
  pathlib.Path("recipe.yml").write_text(DEFAULT + "smooth: 1\n")
  assert main.main(["merge", "recipe.yml", "out"]) == 0
  note = "note: line 10: 'smooth' is no key of the recipe: it is ignored, as by mergekit.\n"
  assert note in capsys.readouterr().out
  found = folders.read(pathlib.Path("out"))
  name = "model.layers.{}.mlp.up_proj.weight"
  assert name.format(2) not in found
  expected = first[name.format(0)] + 3 * second[name.format(1)]
  assert abs(found[name.format(0)] - expected).max() < 1e-5
  for words in (["--dry-run"], ["--dry-run", "--strict"]):
    status = main.main(["merge", "recipe.yml", "out2", *words])
    assert status == len(words) - 1
  captured = capsys.readouterr()
  assert note in captured.out
  assert "strict refuses what is ignored: remove it." in captured.err


def test_what_is_said_of_a_head_that_is_the_embedding_is_a_note(tmp_path, monkeypatch):
  """Public recipes have a filter for `lm_head` whether the models store one or not."""
  monkeypatch.chdir(tmp_path)
  tree, *_ = folders.family(tmp_path)
  tied = folders.CONFIG | {"tie_word_embeddings": True}
  for k, name in enumerate(("base", "m0")):
    own = {n: x + k for n, x in tree.items() if n != "lm_head.weight"}
    folders.write(tmp_path / name, own, config=tied)
  t = "{t: [{filter: lm_head, value: 0.7}, {value: 0.5}]}"
  text = head("base_model: base", "slerp", "[{model: m0}]", t)
  pathlib.Path("recipe.yml").write_text(text)
  (note,) = recipes.plan_of_file("recipe.yml", Files()).notes
  assert note.startswith("line 3: filter 'lm_head' holds for none of the 12 tensors")
  assert note.endswith("The output head is the embedding.")
  pathlib.Path("recipe.yml").write_text(text.replace("lm_head", "lm_haed"))
  with pytest.raises(recipe.RecipeError, match="'lm_haed' holds for none"):
    recipes.plan_of_file("recipe.yml", Files())


def test_a_recipe_of_another_program_is_one_line():
  text = "base_model: b\ngate_mode: hidden\nexperts: [{source_model: m0}]\n"
  assert [line.split(": ")[1] for line in problems(text)] == ["gate_mode", "experts"]
