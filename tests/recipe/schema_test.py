"""Recipes are read as they are written, or refused with every problem and its place."""

import pathlib
import re
import subprocess
import sys

import pytest
import yaml
from recipes import (
  DARE,
  GOOD,
  LINEAR,
  MODULES,
  SLERP,
  STACK,
  STAGES,
  STOCK,
  TIES,
  head,
  one,
  parsed,
  plain,
  problems,
)

from jaxmerge import recipe
from jaxmerge.recipe.mergekit import methods
from jaxmerge.recipe.records import Model, Token

DOCS = (pathlib.Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")


def test_linear():
  own = one(LINEAR)
  assert (own.merge_method, own.dtype, own.base_model, own.seed) == (
    "linear",
    "float16",
    None,
    0,
  )
  assert [plain(s.parameters) for s in own.models] == [{"weight": w} for w in (1.0, 0.3, 0.5)]
  place = own.models[0].place
  models = [
    Model("psm/orca_v3_13b", place=place),
    Model("wiz/WizardLM-13B", "v1.2", place=place),
    Model("gar/Platypus2-13B", None, (("some/adapter", "main"),), place=place),
  ]
  assert [s.model for s in own.models] == models
  assert str(models[2]) == "gar/Platypus2-13B+some/adapter@main"
  assert (str(own.models[2].place), str(own.places["dtype"])) == ("r.yml:8:12", "r.yml:12:1")


def test_slerp_with_gradients_and_filters():
  own = one(SLERP)
  ((slice_,), (group,)) = own.slices, recipe.groups(own)
  assert [(str(s.model), s.layers) for s in slice_.sources] == [
    ("psm/orca_v3_13b", (0, 40)),
    ("gar/Platypus2-13B", (0, 40)),
  ]
  assert plain(own.parameters)["t"] == [
    ("filter 'self_attn'", (0, 0.5, 0.3, 0.7, 1)),
    ("filter 'mlp'", (1, 0.5, 0.7, 0.3, 0)),
    ("", 0.5),
  ]
  assert (own.out_dtype, str(group.base), group.sliced) == ("bfloat16", "psm/orca_v3_13b", True)


def test_ties():
  own = one(TIES)
  assert [plain(s.parameters) for s in own.models] == [
    {"density": (1, 0.7, 0.1), "weight": 1.0},
    {"density": 0.5, "weight": (0, 0.3, 0.7, 1)},
    {"density": 0.33, "weight": [("filter 'mlp'", 0.5), ("", 0)]},
  ]
  assert plain(own.parameters) == {"normalize": True, "int8_mask": True}
  assert [str(m) for m in recipe.models_of(own)][:2] == ["llama/Llama-2-13B", "psm/orca_v3_13b"]


def test_dare_ties_with_anchors_and_own_keys():
  own = one(DARE)
  assert [plain(s.parameters) for s in own.models[1:]] == [{"density": 0.53, "weight": 0.4}] * 2
  assert (own.seed, own.compat, own.missing, own.chat_template) == (7, "mergekit", "mean", "chatml")
  assert (own.tokenizer.source, own.tokenizer.tokens) == ("union", {})
  assert methods.METHODS[own.merge_method].random


def test_stack_of_layers():
  own = one(STACK)
  assert [s.sources[0].layers for s in own.slices] == [(0, 24), (20, 40)]
  assert plain(own.slices[1].sources[0].parameters)["scale"][0] == ("filter 'o_proj'", 0.0)


def test_model_stock_and_tokens():
  tokenizer = one(STOCK).tokenizer
  a, c = one(STOCK).models[0].model, one(STOCK).models[1].model
  place = tokenizer.place
  assert (tokenizer.source, tokenizer.pad_to_multiple_of) == ("base", 64)
  assert tokenizer.tokens == {
    "<|im_start|>": Token(a, place=place),
    "<|special|>": Token(c, force=True, place=place),
    "<|renamed|>": Token(a, "<|old|>", place=place),
    "<|number|>": Token(a, None, 1234, place=place),
    "<|unused|>": Token(None, place=place),
  }


def test_older_recipes_call_the_source_of_a_tokenizer_a_model():
  old = one(LINEAR + "tokenizer_source: model:psm/orca_v3_13b@v1\n").tokenizer.source
  assert old == one(LINEAR + "tokenizer_source: psm/orca_v3_13b@v1\n").tokenizer.source
  assert (old.path, old.revision) == ("psm/orca_v3_13b", "v1")


def test_modules_have_groups():
  first, second = recipe.groups(one(MODULES))
  assert (first.module, second.module, str(second.base)) == ("text_decoder", "vision_tower", "e/f")
  assert [plain(level) for level in first.levels] == [{"weight": 1}, {}]
  assert [plain(level) for level in second.levels] == [{"weight": 3}, {}, {}]


def test_stages_come_after_those_that_they_use():
  text = STAGES.split("---\n")
  for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
    found = parsed("---\n".join(text[i] for i in order))
    assert [(r.name, r.uses) for r in found] == [
      ("first", ()),
      ("second", ("first",)),
      (None, ("second",)),
    ]


def test_the_recipe_without_a_name_makes_the_result():
  """Wherever it stands, and whether the others are for it or not."""
  text = STAGES.split("---\n")
  aside = text[0].replace("name: first", "name: aside")
  found = parsed("---\n".join([text[2], aside, *text[:2]]))
  assert [own.name for own in found] == ["aside", "first", "second", None]


def test_a_copy_in_a_slice_needs_no_second_model():
  text = SLERP.replace(
    "merge_method", "  - sources: [{model: x/y, layer_range: [3, 4]}]\nmerge_method"
  )
  first, second = recipe.groups(one(text))
  slerp = methods.METHODS["slerp"]
  assert (first.copied(slerp), second.copied(slerp)) == (False, True)


REFERENCES = [
  ("org/name", (), ("org/name", None, None, None)),
  ("org/name@v1", (), ("org/name", "v1", None, None)),
  ("a/b@v1+c/d@v2", (), ("a/b", "v1", "c/d", "v2")),
  ("./runs/lr@1e-5+x+y", ("./runs/lr@1e-5+x+y",), ("./runs/lr@1e-5+x+y", None, None, None)),
  ("a@b+c/d", ("a@b",), ("a@b", None, "c/d", None)),
  ("{model: {path: a@b+c, revision: v1}}", (), ("a@b+c", "v1", None, None)),
  ("{model: a/b@v1, lora: {path: c+d}}", (), ("a/b", "v1", "c+d", None)),
  ("{model: a/b, adapter: c/d@v2}", (), ("a/b", None, "c/d", "v2")),
  ("{model: a/b, lora: null, override_architecture: null}", (), ("a/b", None, None, None)),
]


def test_several_adapters_in_one_reference():
  own = one("{merge_method: passthrough, models: [{model: a@v+b/x+c+d@w}]}", "b/x+c")
  assert own.models[0].model.adapters == (("b/x+c", None), ("d", "w"))
  assert str(own.models[0].model) == "a@v+b/x+c+d@w"


@pytest.mark.parametrize(("text", "folders", "parts"), REFERENCES)
def test_references(text, folders, parts):
  own = one(f"{{merge_method: passthrough, models: [{{model: {text}}}]}}", *folders)
  m = own.models[0].model
  assert (m.path, m.revision, *(m.adapters or ((None, None),))[0]) == parts


def test_a_real_folder_is_one_reference(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "lr@1+2").mkdir()
  (own,) = recipe.parse("{merge_method: passthrough, models: [{model: lr@1+2}]}")
  assert own.models[0].model.path == "lr@1+2"


def test_files(tmp_path):
  path = tmp_path / "recipe.yml"
  path.write_bytes(b"\xef\xbb\xbf" + LINEAR.encode())
  assert recipe.read(path)[0].merge_method == "linear"
  path.write_bytes("name: ü\nmodels: ä".encode() + b"\xff")
  with pytest.raises(recipe.RecipeError, match=rf"{re.escape(str(path))}:2:10: not UTF-8"):
    recipe.read(path)
  path.write_bytes(b"#" * 2**23)
  with pytest.raises(recipe.RecipeError, match="too long"):
    recipe.read(path)
  with pytest.raises(FileNotFoundError):
    recipe.read(tmp_path / "none.yml")


@pytest.mark.parametrize("text", GOOD)
def test_good_recipes_are_read_whatever_their_style(text):
  """Flow or block style, and the order of the keys, say nothing."""
  documents = list(yaml.safe_load_all(text))
  for flow in (True, False):
    assert parsed(yaml.safe_dump_all(documents, default_flow_style=flow)) == parsed(text)


def test_table_has_all_methods_and_sound_defaults():
  for name, method in methods.METHODS.items():
    assert not method.each.keys() & method.shared.keys(), name
    for n, parameter in method.parameters.items():
      if parameter.default is not None:
        assert methods.value_error(n, parameter, parameter.default) is None, (name, n)


def test_defaults_are_those_of_mergekit():
  found = {
    name: {n: p.default for n, p in m.parameters.items()} for name, m in methods.METHODS.items()
  }
  task = {"weight": None, "lambda": 1.0, "normalize": False, "int8_mask": False}
  sparse = {**task, "density": 1.0, "rescale": False}
  dare = {**sparse, "rescale": True}
  assert found["task_arithmetic"] == task
  assert found["ties"] == {**sparse, "normalize": True}
  assert found["dare_ties"] == found["dare_linear"] == dare
  assert found["della"] == {**dare, "normalize": True, "epsilon": 0.15}
  assert found["della_linear"] == {**dare, "epsilon": 0.15}
  assert found["breadcrumbs"] == found["breadcrumbs_ties"] == {**sparse, "gamma": 0.01}
  assert found["ramplus_tl"] == {"epsilon": 1e-5, "r": 0.1, "alpha": 0.2}
  assert (found["linear"], found["slerp"]) == ({"weight": None, "normalize": True}, {"t": None})


def test_reading_is_free_of_jax_and_numpy():
  code = "import sys; from jaxmerge import recipe; recipe.read, recipe.values; "
  code += "print(sorted({'jax', 'numpy', 'ml_collections'} & set(sys.modules)))"
  assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


@pytest.mark.parametrize("name", recipe.__all__)
def test_public_name_resolves(name):
  assert getattr(recipe, name) is not None


def test_tables_in_the_docs_are_those_of_the_code():
  assert methods.markdown() in DOCS
  assert methods.parameter_markdown() in DOCS


@pytest.mark.parametrize("text", re.findall(r"```yaml\n(.*?)```", DOCS, flags=re.S))
def test_recipes_in_the_docs_are_read(text, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for step in range(1000, 9000, 1000):  # The steps of a run are looked up on disk.
    (tmp_path / "runs" / "pretrain" / str(step)).mkdir(parents=True)
  assert parsed(text)


REFUSED = [
  (head("out_dtype: int64"), "`dtype` or `out_dtype` other than three"),
  (head("experts: []"), "recipes of `mergekit-moe`"),
  (head("genome: {}"), "recipes of `mergekit-evolve`"),
  (head("", parameters="{weight: high}"), "text as the value of a parameter"),
  (
    head("base_model: a/b", "iso_c"),
    "parameters that the method does not use, of a method that mergekit lacks",
  ),
  (head("", parameters="{weight: [{value: 1}, {filter: x, value: 1}]}"), "items after a fallback"),
  (
    head("", models="[{model: a/b}, {model: a/b, parameters: {weight: 2}}]"),
    "the same model twice, with other parameters",
  ),
  (
    head("name: x\n---\n") + head("base_model: gpt2"),
    "among several recipes, a hub id without owner",
  ),
  (head("<<: {}"), "merge keys"),
]


@pytest.mark.parametrize(("text", "what"), REFUSED, ids=[r[1] for r in REFUSED])
def test_docs_say_how_mergekit_recipes_are_refused(text, what):
  (line,) = problems(text)
  words = line.split(": ", 1)[1].removesuffix(".")
  assert f"| {what} | `{words}` |" in DOCS
