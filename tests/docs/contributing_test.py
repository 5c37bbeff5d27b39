"""CONTRIBUTING.md tells where things are, and they are there."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
QUESTIONS = TEXT.partition("Where does my change go?")[2].partition("\n#")[0]
PATHS = sorted(set(re.findall(r"`([\w./]+/(?:\w+\.py)?)`", QUESTIONS)) - {"jaxmerge/"})


@pytest.mark.parametrize("path", PATHS)
def test_a_path_is_there(path):
  assert (ROOT / "jaxmerge" / path).exists() or (ROOT / path).exists()


def test_every_package_has_its_row():
  packages = {p.parent.name for p in (ROOT / "jaxmerge").glob("*/__init__.py")}
  assert packages == set(re.findall(r"^\| \d \| `(\w+)/` \|", TEXT, re.M))


@pytest.mark.parametrize(("package", "rest"), re.findall(r"^\| \d \| `(\w+)/` \|(.*)", TEXT, re.M))
def test_a_part_of_a_package_is_in_it(package, rest):
  for path in re.findall(r"`([\w/]+)/`", rest):
    assert (ROOT / "jaxmerge" / package / path).exists() or (ROOT / path).exists(), path
