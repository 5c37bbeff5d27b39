"""Pages of the API: one for each module of the public packages, and an index for each package."""

from __future__ import annotations

import ast
import functools
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple  # A navigation is a list of strings and of such lists.

import jaxmerge

PACKAGE = pathlib.Path(jaxmerge.__file__).parent
ROOMS = (*jaxmerge._ROOMS, "experiments")


class Module(NamedTuple):
  """A module as its source shows it; `names` are its public functions and classes."""

  name: str
  about: str
  names: Mapping[str, str]

  @property
  def uri(self) -> str:
    """Returns the place of its page."""
    return f"api/{self.name.removeprefix('jaxmerge.').replace('.', '/')}.md"


@functools.cache
def modules(package: str) -> tuple[Module, ...]:
  """Returns the modules of a public package; raises ValueError for a name without a docstring."""
  return tuple(_modules(package))


def _modules(package: str) -> Iterator[Module]:
  for path in sorted((PACKAGE / package).rglob("*.py")):
    name = ".".join(("jaxmerge", *path.relative_to(PACKAGE).with_suffix("").parts))
    body = ast.parse(path.read_text(encoding="utf-8"))
    if path.name == "__init__.py" or path.name.startswith("_"):
      continue
    names = {}
    for node in body.body:
      if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
        names.setdefault(node.name, _first_line(node, f"{name}.{node.name}"))
    yield Module(name, _first_line(body, name), names)


def _first_line(node: ast.Module | ast.FunctionDef | ast.ClassDef, name: str) -> str:
  text = ast.get_docstring(node)
  if not text:
    raise ValueError(f"{name} has no docstring: write one.")
  return text.split("\n\n")[0].replace("\n", " ")


@functools.cache
def _short() -> dict[str, str]:
  """Returns the short names of functions and classes: those of `__all__`, by where they are."""
  short = {}
  rooms = {room: f"jaxmerge.{room}" for room in ROOMS}
  for module in [*rooms.values(), "jaxmerge"]:
    package = __import__(module, fromlist=["__all__"])
    for name in getattr(package, "__all__", ()):
      value: Any = getattr(package, name)
      home = getattr(value, "__module__", None)
      if home and getattr(value, "__name__", None) == name and home.startswith("jaxmerge."):
        short[f"{home}.{name}"] = f"{module}.{name}"
  return short


def navigation() -> list[Any]:
  """Returns the API's part of the navigation."""
  return ["api/index.md", *({room: _section(room)} for room in ROOMS)]


def _section(room: str) -> list[Any]:
  named = [{m.name.removeprefix(f"jaxmerge.{room}."): m.uri} for m in modules(room)]
  return [f"api/{room}/index.md", *named]


def pages() -> dict[str, str]:
  """Returns the pages of the API, by their place."""
  texts = {"api/index.md": _index()}
  for room in ROOMS:
    texts[f"api/{room}/index.md"] = _room(room)
    texts |= {module.uri: _page(module) for module in modules(room)}
  return texts


def _index() -> str:
  lines = ["# API", "", "What `import jaxmerge` offers; each name loads when it is used.", ""]
  lines += ["| name | what it does |", "| --- | --- |"]
  about = {_short().get(full, full): line for full, line in _first_lines()}
  lines += [f"| [`{n}`][jaxmerge.{n}] | {_cell(about[f'jaxmerge.{n}'])} |" for n in jaxmerge._HOMES]
  lines += ["", "## Packages", "", "| package | what is in it |", "| --- | --- |"]
  for room in ROOMS:
    text = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text("utf-8"))) or ""
    lines.append(f"| [`jaxmerge.{room}`]({room}/index.md) | {_cell(text.splitlines()[0])} |")
  return "\n".join(lines)


def _first_lines() -> Iterator[tuple[str, str]]:
  """Yields the full name of each public function and class, and what its docstring says first."""
  for room in ROOMS:
    for module in modules(room):
      yield from ((f"{module.name}.{name}", line) for name, line in module.names.items())


def _cell(text: str) -> str:
  return re.sub(r"([|\[*])", r"\\\1", text)


def _room(room: str) -> str:
  """Returns the index of a package: its short names, then its modules with theirs."""
  init = ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8"))
  lines = [f"# jaxmerge.{room}", "", ast.get_docstring(init) or "", ""]
  short = {
    s.rpartition(".")[2]: (s, line)
    for m in modules(room)
    for n, line in m.names.items()
    if (s := _short().get(f"{m.name}.{n}", "")).count(".") == 2
  }
  if short:
    lines += ["| name | what it does |", "| --- | --- |"]
    lines += [f"| [`{n}`][{s}] | {_cell(line)} |" for n, (s, line) in sorted(short.items())]
    lines.append("")
  lines += ["## Modules", ""]
  for m in modules(room):
    place = m.uri.removeprefix(f"api/{room}/")
    names = ", ".join(f"[`{n}`][{m.name}.{n}]" for n in m.names)
    lines += [f"- [`{m.name.removeprefix(f'jaxmerge.{room}.')}`]({place}): {_cell(m.about)}"]
    lines += [f"  {names}"] if names else []
  return "\n".join(lines)


def _page(module: Module) -> str:
  """Returns the page of a module: each public name under the shortest name that it has."""
  text = ast.get_docstring(ast.parse(_path(module).read_text(encoding="utf-8"))) or ""
  parts = [f"# {module.name}\n\n{text}\n"]
  for name in module.names:
    full = f"{module.name}.{name}"
    short = _short().get(full, full)
    anchor = "" if short == full else f"[](){{ #{short} }}\n\n"
    parts.append(
      f"{anchor}::: {full}\n    options:\n      heading: {short}\n      toc_label: {name}\n"
    )
  return "\n".join(parts)


def _path(module: Module) -> pathlib.Path:
  return PACKAGE.parent / (module.name.replace(".", "/") + ".py")
