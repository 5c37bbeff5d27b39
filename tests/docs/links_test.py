"""Every link in the documentation leads somewhere: to a file, and to a heading in it."""

import functools
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PAGES = sorted(
  [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "tpu/README.md")),
    *ROOT.glob("docs/**/*.md"),
  ]
)
FENCE = re.compile(r"^```.*?^```", re.M | re.S)
NAMED = re.compile(
  r"(?<![\w/])((?:jaxmerge|configs|benchmarks|colabs|docs|tests|tools|tpu)/[\w./]*\w)"
)
LINK = re.compile(r"\]\(([^()\s]+)\)")


def name(path):
  return str(path.relative_to(ROOT))


@functools.cache
def anchors(path):
  """The anchors of a page's headings, as GitHub makes them."""
  headings = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.M)
  plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
  return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain}


def test_anchors_are_those_of_headings():
  found = anchors(ROOT / "docs" / "methods" / "README.md")
  assert {"the-methods", "rows-and-columns"} <= found


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_resolve(page):
  for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
    if link.startswith(("https://", "http://")):
      continue
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    assert target.exists(), f"{name(page)} links to {link}, which is not there."
    if anchor:
      assert anchor in anchors(target), f"{name(page)} links to {link}: no such heading."


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_a_page_names_are_there(page):
  # What a command writes, `--out=...`, need not be there.
  text = re.sub(r"--out=\S+", "", page.read_text(encoding="utf-8"))
  for path in NAMED.findall(text):
    assert (ROOT / path).exists(), f"{name(page)} names {path}, which is not there."


def test_every_page_of_docs_is_reached_from_its_index():
  index = ROOT / "docs" / "README.md"
  seen, todo = set(), [index]
  while todo:
    page = todo.pop()
    if page in seen or page.suffix != ".md" or ROOT / "docs" not in page.parents:
      continue
    seen.add(page)
    links = LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
    todo += [(page.parent / link.partition("#")[0]).resolve() for link in links]
  assert {name(page) for page in ROOT.glob("docs/**/*.md")} == {name(page) for page in seen}
