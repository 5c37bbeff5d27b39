"""Each family of methods has a page of its own, and each method a section on it."""

import inspect
import pathlib

import pytest

import jaxmerge
from jaxmerge.catalog import lookup, tables

ROOT = pathlib.Path(__file__).parents[2]
PAGES = ROOT / "docs" / "methods"
INDEX = (PAGES / "README.md").read_text(encoding="utf-8")


def family(name):
  module = inspect.getmodule(inspect.unwrap(getattr(jaxmerge.methods, name)))
  return module.__name__.rpartition(".")[2]


def test_a_family_has_one_name_in_code_docs_and_tests():
  modules = {p.stem for p in (ROOT / "jaxmerge" / "methods").glob("*.py")}
  families = modules - {"__init__", "factory"}
  assert {p.stem for p in PAGES.glob("*.md")} - {"README"} == families
  tests = {p.stem.removesuffix("_test") for p in (ROOT / "tests" / "methods").glob("*_test.py")}
  assert families <= tests


@pytest.mark.parametrize("name", lookup.METHODS)
def test_a_method_has_its_section_on_the_page_of_its_family(name):
  """With all its parameters, its paper, and what it merges."""
  page, entry = family(name), lookup.METHODS[name]
  assert f"[`{name}`]({page}.md#{name})" in INDEX
  text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
  (section,) = (s for s in text.split("\n## ") if s.startswith(f"`{name}`\n"))
  for parameter in entry.parameters:
    assert f"`{parameter}`" in section, parameter
  assert entry.paper.split(" (")[0] in section
  assert f"Merges {entry.on.replace('either', 'weights or task vectors')}" in section
  assert ("xperimental" in section) == entry.experimental


@pytest.mark.parametrize("name", lookup.OTHERS)
def test_what_is_no_method_stands_in_the_docs(name):
  places = {"search": "search.md", "mixtures": "mixtures.md", "adapters": "how_to/adapters.md"}
  package, function = name.split(".")
  text = (ROOT / "docs" / places[package]).read_text(encoding="utf-8")
  assert f"`{name}`" in text or f"`{function}(" in text


def test_the_tables_are_the_catalog():
  assert f"<!-- methods -->\n{tables.markdown()}\n<!-- end of methods -->" in INDEX
  assert f"<!-- others -->\n{tables.others_markdown()}\n<!-- end of others -->" in INDEX
