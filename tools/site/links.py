"""Links between the files of the project, as the site has them."""

from __future__ import annotations

import functools
import os
import pathlib
import re
from typing import Any  # A navigation is a list of strings and of such lists.

import gallery

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
HOME = ROOT / "README.md"
_LINK = re.compile(r"(\]\()([^()\s]+)(\))")
_FENCE = re.compile(r"(^ *```.*?^ *```)", re.M | re.S)
_LANGUAGES = {".py": "python", ".sh": "sh", ".yml": "yaml", ".toml": "toml", ".json": "json"}


def navigation() -> list[dict[str, Any]]:
  """Returns the sections of docs/README.md, with the pages that each links to, in this order."""
  sections: list[tuple[str, list[Any]]] = [("Start", [])]
  seen: set[str] = set()
  for line in (DOCS / "README.md").read_text(encoding="utf-8").splitlines():
    if line.startswith("## "):
      sections.append((line.removeprefix("## "), []))
    for title, link in re.findall(r"\[([^\]]+)\]\(([^)]+)\)", line):
      path = link.partition("#")[0]
      uri = _uri(_target(DOCS / "README.md", path))
      if uri not in seen:
        seen.add(uri)
        sections[-1][1].append({_title(title): uri})
  for _, pages in sections:
    for place, page in enumerate(pages):
      if page == {"Methods": "methods/README.md"}:
        pages[place] = {"Methods": ["methods/README.md", *_families()]}
  return [{title: pages} for title, pages in sections if pages]


def _title(text: str) -> str:
  """Returns the text of a link as a title: `Contributing` of `CONTRIBUTING.md`."""
  text = text.removesuffix(".md")
  return text.capitalize() if text.isupper() else text[0].upper() + text[1:]


def _families() -> list[str]:
  """Returns the pages of the families of methods, in the order of their index."""
  text = (DOCS / "methods" / "README.md").read_text(encoding="utf-8")
  return list(dict.fromkeys(f"methods/{n}.md" for n in re.findall(r"\]\((\w+)\.md\)", text)))


def outside() -> dict[str, pathlib.Path]:
  """Returns the files outside docs/ that pages link to, or that these link to, by their place."""
  todo = [HOME, *DOCS.rglob("*.md"), *gallery.notebooks()]
  known = {"index.md": HOME}
  while todo:
    source = todo.pop()
    for link in _links(source):
      target = _target(source, link.partition("#")[0])
      uri = _uri(target)
      if (
        not _is_page(target)
        and target.parent != gallery.COLABS
        and uri not in known
        and target.is_file()
      ):
        known[uri] = target
        if target.suffix == ".md":
          todo.append(target)
  return known


def _links(source: pathlib.Path) -> list[str]:
  if source.suffix == ".ipynb":
    text = "\n\n".join(text for kind, text in gallery.cells(source) if kind == "markdown")
  else:
    text = source.read_text(encoding="utf-8")
  text = _FENCE.sub("", text)
  return [link for _, link, _ in _LINK.findall(text) if _is_relative(link)]


def _is_relative(link: str) -> bool:
  return not re.match(r"#|[a-z]+:", link)


def _target(source: pathlib.Path, path: str) -> pathlib.Path:
  return pathlib.Path(os.path.normpath(source.parent / path))


def _is_page(path: pathlib.Path) -> bool:
  return DOCS in path.parents and path != DOCS / "README.md"


@functools.cache
def _uri(path: pathlib.Path) -> str:
  """Returns the place of a file of the project on the site."""
  if path in (HOME, DOCS / "README.md"):
    return "index.md"
  if DOCS in path.parents:
    return path.relative_to(DOCS).as_posix()
  name = path.relative_to(ROOT).as_posix()
  if path.parent == gallery.COLABS:
    return f"notebooks/{path.stem}.md"
  is_shown = path.suffix in (".md", ".png", ".svg")
  return f"project/{name}" if is_shown else f"project/{name}.md"


def _source(uri: str) -> pathlib.Path | None:
  """Returns the file that a page is made of; None: it was made for the site."""
  if uri == "index.md":
    return HOME
  if uri.startswith("project/"):
    return ROOT / uri.removeprefix("project/")
  if uri.startswith("notebooks/") and uri != "notebooks/index.md":
    return (gallery.COLABS / uri.removeprefix("notebooks/")).with_suffix(".ipynb")
  path = DOCS / uri
  return path if path.exists() else None


def rewrite(markdown: str, uri: str) -> str:
  """Returns the text of a page with its links as the site has their targets."""
  source = _source(uri)
  if source is None:
    return markdown

  def lead(match: re.Match[str]) -> str:
    before, link, after = match.groups()
    path, sharp, anchor = link.partition("#")
    if not path or not _is_relative(link):
      return match[0]
    target = os.path.relpath(_uri(_target(source, path)), pathlib.PurePosixPath(uri).parent)
    return f"{before}{target}{sharp}{anchor}{after}"

  parts = _FENCE.split(markdown)
  return "".join(p if _FENCE.match(p) else _LINK.sub(lead, p) for p in parts)


def as_code(source: pathlib.Path) -> str:
  """Returns a page that shows a file."""
  name, text = source.relative_to(ROOT).as_posix(), source.read_text(encoding="utf-8")
  return f"# {name}\n\n````{_LANGUAGES.get(source.suffix, 'text')}\n{text}\n````\n"
