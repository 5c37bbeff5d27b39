"""Any text is read or refused, soon, with the one class of error."""

import re
import time

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from recipes import GOOD, head, parsed, problems

from jaxmerge import recipe

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
  ("".join(f"key{i}: {i}\n" for i in range(2000)), "'key0' is no key of the recipe"),
  (
    head(
      "",
      models=f"[{', '.join(f'{{model: a/b, parameters: {{weight: {i}}}}}' for i in range(300))}]",
    ),
    "already in line 2",
  ),
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
    for (place, *_), line in zip(error.problems, str(error).splitlines(), strict=True):
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
