"""Packages whose modules and names load when they are first used."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any  # A lazy attribute may be any public object.

from jaxmerge import errors


def attach(
  package: str, modules: Sequence[str], homes: Mapping[str, str] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
  """Returns `__getattr__`, `__dir__` and `__all__` of a package.

  Args:
    package: its name.
    modules: its modules and packages.
    homes: for each name that the package has besides, the module that defines it.
  """
  named = dict(homes or {})
  public = sorted({*modules, *named})

  def get(name: str) -> Any:
    if name in named:
      return getattr(importlib.import_module(f"{package}.{named[name]}"), name)
    if name in modules:
      return importlib.import_module(f"{package}.{name}")
    hint = "" if name.startswith("_") else errors.nearest(name, public)
    raise AttributeError(f"module {package!r} has no attribute {name!r}{hint}.")

  return get, lambda: public, public
