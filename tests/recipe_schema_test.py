"""Recipes are read as they are written, or refused with every problem and its place."""

import pathlib
import re
import subprocess
import sys
import time

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmerge import recipe
from jaxmerge.recipe import marked, methods
from jaxmerge.recipe.records import Model, Token

DOCS = (pathlib.Path(__file__).parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")


def parsed(text, *folders):
  return recipe.parse(text, "r.yml", lambda path: path in folders)


def one(text, *folders):
  (own,) = parsed(text, *folders)
  return own


def problems(text, *folders):
  """The lines of the error that a text gives."""
  with pytest.raises(recipe.RecipeError) as caught:
    parsed(text, *folders)
  return str(caught.value).splitlines()


def plain(parameters):
  """Parameters of one level as bare values; conditions as (words, value)."""
  return {
    name: cases[0].value
    if len(cases) == 1 and cases[0].where.everywhere
    else [(str(c.where), c.value) for c in cases]
    for name, cases in parameters.items()
  }


LINEAR = """\
models:
  - model: psm/orca_v3_13b
    parameters:
      weight: 1.0
  - model: wiz/WizardLM-13B@v1.2
    parameters:
      weight: 0.3
  - model: gar/Platypus2-13B+some/adapter@main
    parameters:
      weight: 5e-1
merge_method: linear
dtype: torch.float16
"""
SLERP = """\
slices:
  - sources:
      - model: psm/orca_v3_13b
        layer_range: [0, 40]
      - model: gar/Platypus2-13B
        layer_range: [0, 40]
merge_method: slerp
base_model: psm/orca_v3_13b
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # the rest
dtype: float16
out_dtype: bfloat16
"""
TIES = """\
models:
  - model: psm/orca_v3_13b
    parameters:
      density: [1, 0.7, 0.1]
      weight: 1.0
  - model: gar/Platypus2-13B
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1]
  - model: wiz/WizardMath-13B
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: llama/Llama-2-13B
parameters:
  normalize: true
  int8_mask: yes
"""
DARE = """\
merge_method: dare_ties
base_model: mis/Mistral-7B
models:
  - model: mis/Mistral-7B
  - model: a/b
    parameters: &half {density: 0.53, weight: 0.4}
  - model: c/d
    parameters: *half
parameters: {rescale: false, lambda: 0.9}
seed: 7
compat: mergekit
missing: mean
tokenizer_source: union
chat_template: chatml
"""
STACK = """\
slices:
  - sources:
    - model: psm/orca_v3_13b
      layer_range: [0, 24]
  - sources:
    - model: gar/Platypus2-13B
      layer_range: [20, 40]
      parameters:
        scale:
          - filter: o_proj
            value: 0.0
          - filter: down_proj
            value: 0.0
          - value: 1.0
merge_method: passthrough
"""
STOCK = """\
merge_method: model_stock
base_model: llama/base
models: [{model: a/b}, {model: c/d}, {model: llama/base}]
parameters: {filter_wise: true}
tokenizer:
  source: base
  tokens:
    <|im_start|>: {source: a/b}
    <|special|>: {source: c/d, force: true}
    <|renamed|>: {source: {kind: model_token, model: a/b, token: "<|old|>"}}
    <|number|>: {source: {kind: model_token, model: a/b, token_id: 1234}}
    <|unused|>: {source: {kind: zero}}
  pad_to_multiple_of: 64
"""
MODULES = """\
merge_method: linear
modules:
  text_decoder:
    models:
      - model: a/b
      - model: c/d
        parameters: {weight: 2}
    parameters: {weight: 1}
  vision_tower:
    slices:
      - sources: [{model: a/b, layer_range: [0, 4]}]
        base_model: e/f
        parameters: {weight: 3}
        residual_weight: null
parameters:
"""
STAGES = """\
name: first
merge_method: linear
models: [{model: a/b}, {model: c/d}]
parameters: {weight: 0.5}
---
name: second
merge_method: slerp
base_model: first
models: [{model: e/f}]
parameters: {t: 0.5}
---
merge_method: dare_ties
base_model: a/b
models: [{model: second}, {model: g/h}]
parameters: {weight: 0.5, density: 0.6}
"""
OWN = """\
merge_method: della
base_model: b/b
models:
  - model: a/b
    parameters: {weight: 1}
parameters: {density: 0.6, epsilon: 0.1}
exclude: ["lm_head", 'embed_(in|out)']
overrides:
  - {pattern: "norm.*weight$", merge_method: linear}
  - {layers: "0-3, 8", filter: mlp, parameters: {density: 0.5}}
"""
GOOD = [LINEAR, SLERP, TIES, DARE, STACK, STOCK, MODULES, STAGES, OWN]


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
    Model("gar/Platypus2-13B", None, "some/adapter", "main", place=place),
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
  assert [str(m) for m in recipe.referenced(own)][:2] == ["llama/Llama-2-13B", "psm/orca_v3_13b"]


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


@pytest.mark.parametrize(("text", "folders", "parts"), REFERENCES)
def test_references(text, folders, parts):
  own = one(f"{{merge_method: passthrough, models: [{{model: {text}}}]}}", *folders)
  m = own.models[0].model
  assert (m.path, m.revision, m.adapter, m.adapter_revision) == parts


def test_a_real_folder_is_one_reference(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "lr@1+2").mkdir()
  (own,) = recipe.parse("{merge_method: passthrough, models: [{model: lr@1+2}]}")
  assert own.models[0].model.path == "lr@1+2"


def head(keys, method="linear", models="[{model: a/b}, {model: c/d}]", parameters="{weight: 1}"):
  return f"merge_method: {method}\nmodels: {models}\nparameters: {parameters}\n{keys}"


ERRORS = [
  # The text, line and column of the error, and what it says.
  (
    head("dtpye: float16"),
    4,
    1,
    "unknown key 'dtpye' in the recipe; did you mean 'dtype'? Known: ",
  ),
  (head("dtype: bfloat"), 4, 8, "dtype cannot be 'bfloat'; did you mean 'bfloat16'? Known: bfloat"),
  (head("out_dtype: int64"), 4, 12, "out_dtype cannot be 'int64'"),
  (head("", "dare-ties"), 1, 15, "merge_method cannot be 'dare-ties'; did you mean 'dare_ties'? "),
  (head("", "LINEAR"), 1, 15, "did you mean 'linear'?"),
  (head("", "3"), 1, 15, "merge_method cannot be 3; Known: arcee_fusion, "),
  ("models: [{model: a/b}]", 1, 1, "the recipe needs the key merge_method."),
  ("merge_method: linear", 1, 1, "the recipe needs one of models, slices, modules."),
  (head("slices: []"), 4, 9, "the recipe has models already and cannot have slices as well."),
  (
    head("tokenizer_source: unoin"),
    4,
    19,
    "tokenizer_source cannot be 'unoin'; did you mean 'union'",
  ),
  (
    head("tokenizer: {source: bse}"),
    4,
    21,
    "source of tokenizer cannot be 'bse'; did you mean 'base'",
  ),
  (
    head("tokenizer: {sauce: base}"),
    4,
    13,
    "unknown key 'sauce' in tokenizer; did you mean 'source'",
  ),
  (
    head("tokenizer_source: base"),
    4,
    1,
    "tokenizer takes from the base, but there is no base_model.",
  ),
  (
    head("tokenizer: {source: union}\ntokenizer_source: union"),
    5,
    19,
    "tokenizer_source and tokenizer cannot both be given",
  ),
  (head("tokenizer: {tokens: {x: {source: e/f}}}"), 4, 34, "must be a model of the recipe; Known"),
  (head("tokenizer: {tokens: {x: {source: zero}}}"), 4, 34, "write {kind: zero}"),
  (head("tokenizer: {tokens: {x: {}}}"), 4, 25, "token 'x' needs the key source."),
  (
    head("tokenizer: {tokens: {x: {source: {kind: model_token, model: a/b}}}}"),
    4,
    34,
    "source of token 'x' needs either token or token_id.",
  ),
  (head("tokenizer: {pad_to_multiple_of: 0}"), 4, 33, "must be a whole number from 1 to"),
  (head("chat_template: lama3"), 4, 16, "chat_template cannot be 'lama3'; did you mean 'llama3'?"),
  (head("missing: bas"), 4, 10, "missing cannot be 'bas'; did you mean 'base'? Known: base, error"),
  (head("missing: base"), 4, 1, "missing takes from the base, but there is no base_model."),
  (head("exclude: [norm]"), 4, 1, "exclude takes from the base, but there is no base_model."),
  (head("exclude: norm\nbase_model: x/y"), 4, 10, "exclude must be a list of one item or more"),
  (head("exclude: ['(']\nbase_model: x/y"), 4, 11, "is no regular expression, got '(': missing )"),
  (head("exclude: ['[[a]']\nbase_model: x/y"), 4, 11, "Possible nested set"),
  (head("seed: -1"), 4, 7, "seed must be a whole number from 0 to 4294967295, got -1."),
  (head("seed: '1'"), 4, 7, "got '1'; remove the quotes."),
  (head("compat: mergekti"), 4, 9, "compat cannot be 'mergekti'; did you mean 'mergekit'?"),
  (head("name: a/b"), 4, 7, "name may have letters, digits, '.', '-' and '_', got 'a/b'."),
  (head("name: 7"), 4, 7, "name must be text, got 7; put it in quotes."),
  (
    head("base_model: a@b@c"),
    4,
    13,
    "base_model has more than one @: 'a@b@c'; if @ belongs to a path",
  ),
  (
    head("base_model: a+b+c"),
    4,
    13,
    "write {model: {path: ..., revision: ...}, adapter: {path: ...}}",
  ),
  (head("base_model: a@"), 4, 13, "base_model has an empty part: 'a@'."),
  (
    head("base_model: {model: a, lorra: b}"),
    4,
    24,
    "unknown key 'lorra' in base_model; did you mean 'lora'",
  ),
  (head("base_model: {path: a}"), 4, 14, "unknown key 'path' in base_model"),
  (
    head("", models="[{model: a/b, weight: 1}]"),
    2,
    23,
    "unknown key 'weight' in a model; Known: model, ",
  ),
  (
    head("", models="[{modle: a/b}]"),
    2,
    11,
    "unknown key 'modle' in a model; did you mean 'model'?",
  ),
  (
    head("", models="[{model: a/b}, {model: a/b}]"),
    2,
    32,
    "'a/b' is already in line 2; give it one",
  ),
  (
    head("", models="[{model: a/b, layer_range: [0, 1]}]"),
    2,
    23,
    "belongs to the sources of slices",
  ),
  (head("", models="a/b"), 2, 9, "models must be a list of one item or more, got 'a/b'."),
  (head("", models="[]"), 2, 9, "models must be a list of one item or more, got an empty one."),
  (
    head("", models="[a/b]"),
    2,
    10,
    "a model must be a mapping, got 'a/b'; keys: model, parameters.",
  ),
  (
    head("", parameters="{wieght: 1}"),
    3,
    14,
    "unknown key 'wieght' in the parameters of linear; did",
  ),
  (
    head("", parameters="{weight: 1, density: 1}"),
    3,
    25,
    "density is no parameter of linear, and mergekit",
  ),
  (
    head("", parameters="{weight: high}"),
    3,
    22,
    "weight must be a number in (-infinity, infinity), got",
  ),
  (head("", parameters="{weight: '1'}"), 3, 22, "got '1'; remove the quotes."),
  (
    head("", parameters="{weight: .nan}"),
    3,
    22,
    "weight must be in (-infinity, infinity), got nan.",
  ),
  (
    head("", parameters="{weight: 010}"),
    3,
    22,
    "weight must be a number in (-infinity, infinity), got '010'",
  ),
  (
    head("", parameters="{weight: [{filter: 14, value: 1}]}"),
    3,
    32,
    "filter of weight must be text, got 14; put it in quotes.",
  ),
  (head("", parameters="{weight: []}"), 3, 22, "weight must not be an empty list."),
  (
    head("", parameters="{weight: [1, [2]]}"),
    3,
    26,
    "weight must be a number in (-infinity, infinity), got a",
  ),
  (
    head("", parameters="{weight: 1, normalize: 1}"),
    3,
    36,
    "normalize must be true or false, got 1.",
  ),
  (
    head("", parameters="{weight: [{value: 1}, {filter: x, value: 1}]}"),
    3,
    35,
    "line 3 takes all tensors",
  ),
  (
    head("", parameters="{weight: [{filter: x, value: 1}, 2]}"),
    3,
    46,
    "an item of weight must be a mapping, got 2",
  ),
  (
    head("", parameters="{weight: [{filtre: x, value: 1}]}"),
    3,
    24,
    "unknown key 'filtre' in an item of weight; did",
  ),
  (
    head("", parameters="{weight: [{pattern: '*', value: 1}]}"),
    3,
    33,
    "is no regular expression, got '*': nothing",
  ),
  (
    head("", parameters="{weight: [{layers: 3-1, value: 1}]}"),
    3,
    32,
    "must be such as '0-3, 8' or [0, 4], got '3-1'",
  ),
  (
    head("", parameters="{weight: [{layers: [2, 2], value: 1}]}"),
    3,
    32,
    "must not be empty, got [2, 2).",
  ),
  (
    head("", parameters="{}"),
    2,
    18,
    "linear needs weight for 'a/b'; give it in the parameters of the model",
  ),
  (
    head("", "slerp", "[{model: a/b}]", "{}\nbase_model: c/d"),
    2,
    18,
    "slerp needs t; give it in the param",
  ),
  (head("", "slerp", parameters="{t: 0.5}"), 1, 1, "slerp needs base_model"),
  (
    head("base_model: e/f", "slerp", parameters="{t: 0.5}"),
    2,
    18,
    "slerp merges 1 and the base, got 2 beside",
  ),
  (head("base_model: a/b", "slerp", parameters="{t: 5}"), 3, 17, "t must be in [0, 1], got 5."),
  (
    head("base_model: a/b", "slerp", parameters="{t: [0, 2]}"),
    3,
    21,
    "t must be in [0, 1], got 2.",
  ),
  (
    head("base_model: a/b", "model_stock", parameters="{}"),
    2,
    18,
    "2 or more and the base, got 1 beside the base: c/d",
  ),
  (
    head("base_model: a/b", "nuslerp"),
    2,
    18,
    "nuslerp merges 2, and a base if given, got 1 beside the base",
  ),
  (head("", "passthrough", parameters="{}"), 2, 18, "passthrough merges 1, got 2: a/b, c/d."),
  (
    head("", "karcher", parameters="{max_iter: 2.5}"),
    3,
    24,
    "max_iter must be in [0, 10000], got 2.5.",
  ),
  (
    head("", "karcher", parameters="{max_iter: [1, 2]}"),
    3,
    24,
    "one whole number, not a gradient.",
  ),
  (
    head("base_model: x/y", "ties", parameters="{weight: 1, density: 1.5}"),
    3,
    34,
    "density must be in (0, 1], got 1.5.",
  ),
  (
    head("base_model: x/y", "ties", parameters="{weight: 1, density: 0}"),
    3,
    34,
    "density must be in (0, 1], got 0.",
  ),
  (
    head("base_model: x/y", "dare_ties", parameters="{weight: 1, density: -0.1}"),
    3,
    34,
    "density must be in [0, 1], got -0.1",
  ),
  (
    head("base_model: x/y", "task_arithmetic", parameters="{weight: 1, density: 1}"),
    3,
    25,
    "density is no parameter of task",
  ),
  (
    head("base_model: x/y", "della", parameters="{weight: 1, density: 0.9}"),
    3,
    34,
    "must be in (0, 1), got 0.9 and 0.15.",
  ),
  (
    head("base_model: x/y", "ties", parameters="{weight: 0}"),
    3,
    22,
    "ties divides by the sum of the weights, which is zero (0, 0)",
  ),
  (
    head(
      "", models="[{model: a/b, parameters: {weight: 1}}, {model: c/d, parameters: {weight: -1}}]"
    ),
    2,
    44,
    "linear divides by the sum of the weights, which is zero (1, -1); change them, or set",
  ),
  (
    head("", models="[{model: a/b, parameters: {normalize: true}}, {model: c/d}]"),
    2,
    36,
    "normalize is one for all models: move it to the parameters of the recipe, module or slice.",
  ),
  (
    head("overrides: [{merge_method: linear}]"),
    4,
    13,
    "an override needs pattern, filter or layers",
  ),
  (head("overrides: [{pattern: x}]"), 4, 13, "an override needs merge_method or parameters."),
  (head("overrides: [{pattern: x, merge_method: lineer}]"), 4, 40, "did you mean 'linear'?"),
  (head("overrides: [{pattern: x, merge_method: ties}]"), 4, 13, "ties needs base_model"),
  (
    head("overrides: [{pattern: x, parameters: {density: 1}}]"),
    4,
    39,
    "density is no parameter of linear",
  ),
  (head("experts: []"), 4, 1, "experts: this is a recipe of mergekit-moe, which is not supported."),
  ("- a", 1, 1, "the recipe must be a mapping, got a list; keys: merge_method"),
  ("", 1, 1, "no recipe in this file."),
  ("# nothing", 1, 1, "no recipe in this file."),
  (head("dtype: float16\ndtype: float32"), 5, 1, "the key 'dtype' is already in line 4."),
  (head("3: float16"), 4, 1, "a key must be text, got 3; put it in quotes."),
  (head("<<: {}"), 4, 1, "merge keys (<<) are not supported; repeat the keys."),
  (
    head("dtype: !!python/name:os.system x"),
    4,
    8,
    "the tag 'tag:yaml.org,2002:python/name:os.system' is not",
  ),
  (head("dtype:\n\t- x"), 5, 1, "indent with spaces, not with tabs."),
  (head("dtype: 'x"), 4, 10, "not YAML: "),
  (head("dtype: a: b"), 4, 9, "not YAML: mapping values are not allowed"),
  (head("dtype: *x"), 4, 8, "the alias *x names no anchor that is complete before it."),
  (head("dtype: &x [*x]"), 4, 12, "the alias *x names no anchor"),
  (head("dtype: \x07"), 4, 8, "the character '\\x07' is not allowed in YAML."),
  (head("dtype: \udc80"), 4, 8, "is not allowed in YAML."),
  (head("---\n"), 5, 1, "this document is empty"),
  (
    head("---\n") + head(""),
    5,
    1,
    "only one recipe of a file may be without a name; so is that in line 1.",
  ),
  (head("name: x\n---\n") + head("name: x"), 9, 7, "the name 'x' is already in line 4."),
  (
    head("name: first\n---\n") + head("base_model: frist"),
    9,
    13,
    "base_model 'frist' is no recipe of this file and no folder; did you mean 'first'?",
  ),
  (
    head("name: first\n---\n") + head("base_model: first@v1"),
    9,
    13,
    "is a recipe, which has no revision",
  ),
  (
    head("name: x\nbase_model: x\n---\n") + head(""),
    4,
    1,
    "build on each other in a circle: 'x', 'x'.",
  ),
  (
    head("name: x\nbase_model: y\n---\n") + head("name: y\nbase_model: x"),
    4,
    1,
    "build on each other in a circle: 'x', 'y', 'x'.",
  ),
]


@pytest.mark.parametrize(
  ("text", "line", "column", "words"), ERRORS, ids=[e[3][:60] for e in ERRORS]
)
def test_errors_have_a_place_and_say_what_is_right(text, line, column, words):
  lines = [found for found in problems(text) if words in found]
  assert lines, problems(text)
  assert lines[0].startswith(f"r.yml:{line}:{column}: ")


def slices(*sources, method="slerp", base="base_model: a/b\n", parameters="{t: 0.5}"):
  rows = "\n".join(f"      - {{model: {m}, layer_range: {r}}}" for m, r in sources)
  return f"merge_method: {method}\n{base}parameters: {parameters}\nslices:\n  - sources:\n{rows}\n"


@pytest.mark.parametrize(
  ("text", "line", "column", "words"),
  [
    (slices(("a/b", "[0, 4]"), ("c/d", "[0, 5]")), 5, 5, "got 4 of 'a/b', 5 of 'c/d'."),
    (
      slices(("a/b", "[0, 4]"), ("c/d", "[4, 4]")),
      7,
      35,
      "layer_range of a source must not be empty",
    ),
    (slices(("a/b", "[0, 4]"), ("c/d", "4")), 7, 35, "must be a list [first, last), got 4."),
    (
      slices(("a/b", "[0, 4]"), ("c/d", "[-4, 0]")),
      7,
      36,
      "whole number from 0 to 1000000, got -4.",
    ),
    (
      slices(("c/d", "[0, 4]"), ("e/f", "[0, 4]")),
      5,
      5,
      "the base 'a/b' is not among the sources of",
    ),
    (slices(("a/b", "null"), ("c/d", "[0, 4]")), 6, 9, "a source needs the key layer_range."),
    (
      slices(("a/b", "[0, 4]"), method="ties", base="", parameters="{weight: 1}"),
      1,
      1,
      "ties needs base_model",
    ),
  ],
)
def test_slices_are_checked(text, line, column, words):
  lines = [found for found in problems(text) if words in found]
  assert lines, problems(text)
  assert lines[0].startswith(f"r.yml:{line}:{column}: ")


def test_residual_weight_is_refused_unless_it_is_nothing():
  text = slices(("a/b", "[0, 4]"), ("c/d", "[0, 4]"))
  assert one(text + "    residual_weight: null\n").slices
  assert problems(text + "    residual_weight: 0.5\n") == [
    "r.yml:8:5: residual_weight is not supported; mergekit does not use it either: remove it."
  ]


def test_all_problems_are_told_at_once_in_order():
  text = """\
merge_method: ties
base_model: x/y
models:
  - model: a/b
    parameters:
      weight: 1
      density: 1.5
  - model: c/d
    parameters:
      wieght: 1
parameters:
  normalise: true
dtype: bfloat
"""
  assert [line.split(": ")[0] for line in problems(text)] == [
    "r.yml:7:16",
    "r.yml:10:7",
    "r.yml:12:3",
    "r.yml:13:8",
  ]


def test_a_misspelt_key_is_told_once():
  assert len(problems(head("", "linaer"))) == 1
  assert len(problems("merge_metod: linear\nmodels: [{model: a/b, parameters: {weight: 1}}]")) == 1
  assert len(problems(head("", parameters="{weigth: 1}"))) == 1


def test_what_an_alias_repeats_is_told_once():
  text = DARE.replace("density: 0.53", "density: 2")
  assert problems(text) == ["r.yml:6:33: density must be in [0, 1], got 2."]


def test_what_an_error_quotes_stays_in_its_line():
  (line,) = problems(head("", "passthrough", r'[{model: "a\n\e[31m"}, {model: b/b}]', "{}"))
  assert r"got 2: a\n\x1b[31m, b/b." in line
  (line,) = problems(head("", "passthrough", f"[{{model: {'a' * 9999}}}, {{model: b/b}}]", "{}"))
  assert len(line) < 2010


def test_the_error_is_a_value_error_with_records():
  with pytest.raises(ValueError, match="recipe") as caught:
    parsed("- 1")
  ((place, text),) = caught.value.problems
  assert (place, text.split(",")[0]) == (("r.yml", 1, 1), "the recipe must be a mapping")


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


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
  f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
HUGE = [
  (BOMB, "more than 30000 values, those that aliases repeat included."),
  ("[" * 100_000, "nested deeper than 24 levels."),
  ("- " * 100_000, "nested deeper than 24 levels."),
  ("{a: " * 1000, "nested deeper than 24 levels."),
  ("x" * 2**20 + "x", "longer than 1048576 characters."),
  ("---\na: 1\n" * 200, "more than 100 recipes"),
  ("".join(f"key{i}: {i}\n" for i in range(2000)), "unknown key 'key0'"),
  (head("", models=f"[{', '.join(['{model: a/b}'] * 300)}]"), "already in line 2"),
  (
    head(
      "tokenizer: {tokens: {" + ", ".join(f"t{i}: {{source: z/z}}" for i in range(200)) + "}}",
      models=f"[{', '.join(f'{{model: a/b{i}}}' for i in range(500))}]",
    ),
    "must be a model of the recipe",
  ),
  (
    head(
      f"overrides: [{', '.join(['{filter: x, parameters: {weight: 0}}'] * 50)}]",
      models=f"[{', '.join(f'{{model: a/b{i}}}' for i in range(200))}]",
    ),
    "divides by the sum",
  ),
  (head("overrides: [" + ", ".join(["{filter: x}"] * 300) + "]"), "more than 200 overrides"),
  (head("seed: " + "9" * 5000), "seed must be a whole number"),
  (head("", parameters="{weight: 1e999}"), "got inf"),
  (head(f"exclude: ['{'(' * 900}']\nbase_model: a/b"), "is no regular expression"),
  (head(f"exclude: ['{'a' * 2000}']\nbase_model: a/b"), "longer than 1000 characters"),
  (head("exclude: ['a{99999999999}']\nbase_model: a/b"), "the repetition number is too large"),
]


@pytest.mark.parametrize(("text", "words"), HUGE, ids=[words[:40] for _, words in HUGE])
def test_what_is_too_large_is_refused_soon(text, words):
  start = time.perf_counter()
  lines = problems(text)
  assert time.perf_counter() - start < 20  # Under a second where nothing else runs.
  assert any(words in line for line in lines), lines
  assert len(lines) <= 200
  assert max(map(len, lines)) < 5000


def refused(text):
  """Whether a text is refused with the one class of error, and places that lie in it."""
  try:
    assert parsed(text)
  except recipe.RecipeError as error:
    lines = re.split("\r\n|[\n\r\x85\u2028\u2029]", text)
    for (place, _), line in zip(error.problems, str(error).splitlines(), strict=True):
      assert line.startswith(f"{place}: ")
      assert 1 <= place.line <= len(lines) + 1
      assert place.column >= 1
    return True
  return False


@settings(max_examples=50, deadline=5000)
@given(st.text(alphabet="ab01.-: \n\t[]{},*&!|>'\"#%@?<~\ud800\x00ü", max_size=120))
def test_any_text_is_read_or_refused(text):
  refused(text)


@settings(max_examples=50, deadline=5000)
@given(st.data())
def test_any_edit_of_a_recipe_is_read_or_refused(data):
  text = data.draw(st.sampled_from(GOOD))
  for _ in range(data.draw(st.integers(1, 4))):
    at = data.draw(st.integers(0, len(text)))
    end = at + data.draw(st.integers(0, 12))
    snippet = data.draw(
      st.sampled_from(["", "\n", "  ", "- ", ": ", "\t", "[", "}", "*half", "&x ", "null", "-1"])
      | st.sampled_from(["\n---\n", "'", "!!str ", "1e9", "weight: 2\n", "{model: a/b}", "+@"])
    )
    text = text[:at] + snippet + text[end:]
  refused(text)


ODD = [None, True, -1, 0, 5, 2.5, "", "a@b+c@d", "ties", "x", [], {}, [1, 2], [[]], {"model": 3}]
ODD += [
  {"filter": None, "value": []},
  float("nan"),
  10**30,
  "0-3",
  {"path": ["a"]},
  "1",
  {"kind": 0},
]


@settings(max_examples=50, deadline=5000)
@given(st.data())
def test_any_value_in_any_place_is_read_or_refused(data):
  documents = list(yaml.safe_load_all(data.draw(st.sampled_from(GOOD))))
  spots = []

  def walk(node):
    for key in list(node) if isinstance(node, dict) else range(len(node)):
      spots.append((node, key))
      if isinstance(node[key], dict | list):
        walk(node[key])

  walk(documents)
  for _ in range(data.draw(st.integers(1, 3))):
    node, key = data.draw(st.sampled_from(spots))
    if data.draw(st.booleans()) and isinstance(node, dict) and key in node:
      node[data.draw(st.sampled_from(["x", "model", "parameters", "weight"]))] = node.pop(key)
    elif isinstance(node, list) or key in node:
      node[key] = data.draw(st.sampled_from(ODD))
  refused(yaml.safe_dump_all(documents))


@pytest.mark.parametrize("text", GOOD)
def test_good_recipes_are_read_whatever_their_style(text):
  """Flow or block style, and the order of the keys, say nothing."""
  documents = list(yaml.safe_load_all(text))
  for flow in (True, False):
    assert parsed(yaml.safe_dump_all(documents, default_flow_style=flow)) == parsed(text)


def test_the_parser_in_python_reads_the_same(monkeypatch):
  """Where PyYAML comes without its C library, records and places are the same."""
  cases = [(text, words) for text, *_, words in ERRORS if "YAML" not in words]
  expected = [parsed(text) for text in GOOD], [len(problems(text)) for text, _ in cases]
  monkeypatch.setattr(marked, "_LOADER", yaml.SafeLoader)
  assert ([parsed(text) for text in GOOD], [len(problems(text)) for text, _ in cases]) == expected


def test_table_has_all_methods_and_sound_defaults():
  assert len(methods.METHODS) == 20
  for name, method in methods.METHODS.items():
    assert not method.each.keys() & method.shared.keys(), name
    for n, parameter in method.parameters.items():
      if parameter.default is not None:
        assert methods.complaint(n, parameter, parameter.default) is None, (name, n)


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
def test_recipes_in_the_docs_are_read(text):
  assert parsed(text)


REFUSED = [
  (
    slices(("a/b", "[0, 4]"), ("c/d", "[0, 4]")) + "    residual_weight: 1\n",
    "`residual_weight` of a slice",
  ),
  (head("base_model: {model: a, override_architecture: B}"), "`override_architecture` of a model"),
  (head("out_dtype: int64"), "`dtype` or `out_dtype` other than three"),
  (head("experts: []"), "recipes of `mergekit-moe`"),
  (head("genome: {}"), "recipes of `mergekit-evolve`"),
  (head("", parameters="{weight: high}"), "text as the value of a parameter"),
  (
    head("", models="[{model: a/b, parameters: {normalize: true}}, {model: c/d}]"),
    "one for all, at a model",
  ),
  (
    head("base_model: a/b", "task_arithmetic", parameters="{weight: 1, density: 0.5}"),
    "parameters that the method does not use",
  ),
  (head("", parameters="{weight: [{value: 1}, {filter: x, value: 1}]}"), "items after a fallback"),
  (head("", models="[{model: a/b}, {model: a/b}]"), "the same model twice"),
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
