"""The reference site has every public name, every page and every link; `docs/build` makes it."""

import importlib
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools" / "site"))
import api
import gallery
import links

PAGES = api.pages()


def uris(navigation):
  """The places of all pages of a navigation."""
  for entry in navigation:
    if isinstance(entry, str):
      yield entry
    else:
      for pages in entry.values():
        yield from [pages] if isinstance(pages, str) else uris(pages)


@pytest.mark.parametrize("package", ["jaxmerge", *(f"jaxmerge.{room}" for room in api.ROOMS)])
def test_every_public_name_has_a_place(package):
  """A heading for a function or a class, a page for a module."""
  text = "\n".join(PAGES.values())
  module = importlib.import_module(package)
  for name in getattr(module, "__all__", ()):
    value = getattr(module, name)
    if isinstance(value, type(pathlib)):
      # A package inside a package has no page of its own; its modules have.
      heading = f"# {value.__name__}" + (r"\." if hasattr(value, "__path__") else r"\n")
      assert re.search(heading, text), name
    elif callable(value):
      assert f"heading: {package}.{name}\n" in text, name


def test_a_name_without_a_docstring_is_an_error(tmp_path, monkeypatch):
  (tmp_path / "room").mkdir()
  (tmp_path / "room" / "idea.py").write_text('"""An idea."""\n\ndef bare():\n  pass\n')
  monkeypatch.setattr(api, "PACKAGE", tmp_path)
  with pytest.raises(ValueError, match=r"jaxmerge\.room\.idea\.bare has no docstring"):
    api.modules("room")


def test_the_navigation_has_all_pages():
  written = {path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")}
  assert written - {"README.md"} <= set(uris(links.navigation()))
  assert set(uris(api.navigation())) == set(PAGES)
  assert set(uris(gallery.navigation())) == set(gallery.pages())


def test_links_lead_to_where_the_site_has_the_files():
  text = "[a](../../CONTRIBUTING.md#style) [b](own_task.md) [c](https://x.org) [d](#here)"
  assert links.rewrite(text, "how_to/files.md") == (
    "[a](../project/CONTRIBUTING.md#style) [b](own_task.md) [c](https://x.org) [d](#here)"
  )
  assert links.rewrite("[docs](docs/README.md)", "index.md") == "[docs](index.md)"
  code = "```md\n[a](../CONTRIBUTING.md)\n```"
  assert links.rewrite(code, "design.md") == code
  assert links.outside()["project/CONTRIBUTING.md"] == ROOT / "CONTRIBUTING.md"


def test_what_a_notebook_draws_stands_below_its_cell():
  for path in gallery.notebooks():
    page = gallery.pages()[f"notebooks/{path.stem}.md"]
    for name in re.findall(r"\(\.\./docs/figures/notebooks/([^)]*)\)", page):
      assert (gallery.RECORDS / name).exists(), name
    assert "badge" not in page
