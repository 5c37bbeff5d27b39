"""Configs shipped with the package: `configs/` in a checkout, `jaxmerge/configs/` in a wheel."""

from __future__ import annotations

import ast
import pathlib
import re
from typing import NamedTuple

from jaxmerge import errors

_PACKAGE = pathlib.Path(__file__).resolve().parents[1]


class Header(NamedTuple):
  """The parts of a config's docstring.

  Attributes:
    about: what the config does.
    command: command that runs it.
    time: how long it takes; empty if not stated.
    needs: optional packages to install; empty if none.
  """

  about: str
  command: str
  time: str
  needs: str


def paths() -> dict[str, pathlib.Path]:
  """Returns the files of the configs by name."""
  inside = _PACKAGE / "configs"
  folder = inside if inside.is_dir() else _PACKAGE.parent / "configs"
  return {path.stem: path for path in sorted(folder.glob("*.py"))}


def locate(path: str) -> str:
  """Returns the path of a config from a path or the name of a shipped config.

  A name may end with `.py`. An existing file takes precedence over a shipped config.

  Example:
    >>> locate("images4").endswith("images4.py"), locate("my/images4.py")
    (True, 'my/images4.py')
  """
  name = path.removesuffix(".py")
  if pathlib.Path(path).is_file() or name not in paths():
    return path
  return str(paths()[name])


def header(name: str) -> Header:
  """Reads the docstring of a config; raises ValueError if there is no config of this name."""
  text = ast.get_docstring(ast.parse(_path(name).read_text(encoding="utf-8"))) or ""
  parts = [" ".join(part.split()) for part in re.split(r"\n\s*\n|\n(?=[A-Z]\w+: )", text)]
  command = re.search(r"^ *(jaxmerge .*)$", text, re.M)
  say = command[1] if command else ""
  return Header(
    about=parts[0].rstrip("."),
    command=re.sub(r"--config=configs/(\w+)\.py", r"--config=\1", say),
    time="".join(p.removeprefix("Time: ").rstrip(".") for p in parts if p.startswith("Time: ")),
    needs="".join(p[p.index("pip install") :] for p in parts if "pip install" in p),
  )


def copy(name: str, target: str | pathlib.Path | None = None) -> pathlib.Path:
  """Copies a shipped config into a folder or to a path, and returns the new path.

  Args:
    name: name of the config.
    target: a folder, or the path of the new file; None: the working directory.

  Raises:
    ValueError: if there is no config of this name.
    FileExistsError: if the file exists.
  """
  source = _path(name)
  path = pathlib.Path(source.name if target is None else target)
  path = path / source.name if path.is_dir() else path
  if path.suffix != ".py":
    raise ValueError(f"{path} must end with .py, or be an existing folder.")
  text = source.read_text(encoding="utf-8").replace(f"configs/{source.name}", path.as_posix())
  try:
    with path.open("x", encoding="utf-8") as file:
      file.write(text)
  except FileExistsError:
    raise FileExistsError(f"{path} exists: delete it, or give another path.") from None
  return path


def _path(name: str) -> pathlib.Path:
  known = paths()
  if name.removesuffix(".py") not in known:
    raise ValueError(f"no config is called {name!r}{errors.nearest(name, known)}.")
  return known[name.removesuffix(".py")]
