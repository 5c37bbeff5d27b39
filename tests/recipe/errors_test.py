"""What is wrong with a recipe is told: every problem, with its place and what is right."""

import pytest
import yaml
from recipes import DARE, GOOD, head, parsed, problems, slices

from jaxmerge.recipe.errors import Place
from jaxmerge.recipe.syntax import yaml_reader

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
  (head("", "3"), 1, 15, "merge_method cannot be 3; Known: analogy, arcee_fusion, "),
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
    "a recipe cannot have both tokenizer_source and tokenizer",
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
    head("base_model: a+b+"),
    4,
    13,
    "base_model has an empty part: 'a+b+'.",
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
    head("", models="[{modle: a/b}]"),
    2,
    11,
    "unknown key 'modle' in a model; did you mean 'model'?",
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
    head("", parameters="{weight: 1, normalize: 2}"),
    3,
    36,
    "normalize must be true or false, got 2.",
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
    "linear needs weight for 'a/b'; set it in the parameters of the model",
  ),
  (
    head("", "slerp", "[{model: a/b}]", "{}\nbase_model: c/d"),
    2,
    18,
    "slerp needs t; set it in the param",
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
    head("", "trimmed_mean", "[{model: a/b}, {model: c/d}, {model: e/f}]", "{trim: 2}"),
    3,
    20,
    "trimmed_mean needs 5 or more models where trim is 2, got 3.",
  ),
  (
    head("", "karcher", parameters="{max_iter: 2.5}"),
    3,
    24,
    "max_iter must be a whole number in [0, 1000000], got 2.5.",
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
    head("base_model: x/y", "della", parameters="{weight: 1, density: 0}"),
    3,
    34,
    "density must be in (0, 1], got 0.",
  ),
  (
    head("base_model: x/y", "sce", parameters="{select_topk: 0}"),
    3,
    27,
    "select_topk must be in (0, 1], got 0.",
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
    head("overrides: [{merge_method: linear}]"),
    4,
    13,
    "an override needs pattern, filter or layers",
  ),
  (head("layout: {x: io}"), 4, 9, "layout must be a list of one item or more, got a mapping"),
  (head("layout: [{view: io}]"), 4, 10, "an item of layout needs pattern, filter or layers"),
  (head("layout: [{pattern: x}]"), 4, 10, "an item of layout needs the key view."),
  (head("layout: [{pattern: x, veiw: io}]"), 4, 23, "in an item of layout; did you mean 'view'?"),
  (head("layout: [{pattern: x, view: oj}]"), 4, 29, "such as io, or be none, got 'oj'."),
  (head("layout: [{pattern: '(', view: io}]"), 4, 20, "is no regular expression"),
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
    "base_model 'frist' is neither a recipe of this file nor a folder. Did you mean 'first'?",
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
    (
      slices(("c/d", "[0, 4]"), ("e/f", "[0, 4]"), method="nuslerp", parameters="{weight: 1}"),
      5,
      5,
      "as nuslerp needs it; add it with its layer_range, or give no base_model.",
    ),
    (
      slices(("a/b", "[0, 4]"), ("a/b", "[4, 8]"), ("c/d", "[0, 4]")),
      7,
      17,
      "the base 'a/b' is already in line 6, and slerp starts from one; remove it.",
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
  ((place, text, _),) = caught.value.problems
  assert (place, text.split(",")[0]) == (Place("r.yml", 1, 1), "the recipe must be a mapping")


def test_the_parser_in_python_reads_the_same(monkeypatch):
  """Where PyYAML comes without its C library, records and places are the same."""
  cases = [(text, words) for text, *_, words in ERRORS if "YAML" not in words]
  expected = [parsed(text) for text in GOOD], [len(problems(text)) for text, _ in cases]
  monkeypatch.setattr(yaml_reader, "_LOADER", yaml.SafeLoader)
  assert ([parsed(text) for text in GOOD], [len(problems(text)) for text, _ in cases]) == expected
