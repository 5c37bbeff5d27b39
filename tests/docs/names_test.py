"""The glossary, and the pages, name what the code has."""

import dataclasses
import importlib
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
GLOSSARY = ROOT / "docs" / "glossary.md"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
ROWS = re.findall(r"^\| ([^|]+) \| [^|]+ \| ([^|]*)\|$", GLOSSARY.read_text("utf-8"), re.M)
NAMES = [n for word, code in ROWS if word != "word" for n in re.findall(r"`([\w.]+)`", code)]


def find(name):
  """The object of a dotted name: of a module, or what one has."""
  parts = ["jaxmerge", *name.split(".")]
  for length in range(len(parts), 0, -1):
    try:
      found = importlib.import_module(".".join(parts[:length]))
    except ModuleNotFoundError:
      continue
    for part in parts[length:]:
      fields = (
        [f.name for f in dataclasses.fields(found)] if dataclasses.is_dataclass(found) else []
      )
      found = part if part in fields else getattr(found, part)
    return found
  raise AssertionError(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_the_glossary_is_in_the_code(name):
  assert find(name) is not None


def test_a_word_has_one_meaning():
  words = [word for word, _ in ROWS if word not in ("word", "---")]
  assert len(words) > 40
  assert len(set(words)) == len(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_names_in_a_page_are_in_the_code(page):
  for name in set(re.findall(r"\bjaxmerge\.([a-z_A-Z.]*[a-zA-Z])", page.read_text("utf-8"))):
    assert find(name) is not None, name
