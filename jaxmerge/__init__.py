"""Model merging in JAX for TPU and GPU."""

import importlib
from typing import Any  # A lazy attribute may be any public object.

_HOMES = {
  "merge": "jaxmerge.memory",
  "blend": "jaxmerge.memory",
  "merge_files": "jaxmerge.files",
  "stack": "jaxmerge.tree",
  "unstack": "jaxmerge.tree",
  "tune_and_merge": "jaxmerge.atm.loop",
  "Settings": "jaxmerge.atm.settings",
  "Task": "jaxmerge.tasks.task",
  "Split": "jaxmerge.tasks.task",
}
_ROOMS = (
  "adapters",
  "atm",
  "bundles",
  "catalog",
  "differing",
  "files",
  "hi_merging",
  "inspecting",
  "io",
  "layouts",
  "memory",
  "methods",
  "models",
  "planning",
  "recipe",
  "report",
  "running",
  "searching",
  "stage",
  "statistics",
  "tasks",
  "tree",
)
__all__ = [*_HOMES, *_ROOMS]


def __getattr__(name: str) -> Any:
  if name in _HOMES:
    return getattr(importlib.import_module(_HOMES[name]), name)
  if name in _ROOMS:
    return importlib.import_module(f"jaxmerge.{name}")
  raise AttributeError(f"module 'jaxmerge' has no attribute {name!r}{_hint(name)}.")


def _hint(name: str) -> str:
  """Says where a name is that is not here, or what is near it."""
  catalog = importlib.import_module("jaxmerge.catalog")
  if name in catalog.METHODS:
    return f"; it is a method, jaxmerge.methods.{name}()"
  return "" if name.startswith("_") else str(catalog.nearest(name, __all__))


def __dir__() -> list[str]:
  return sorted(__all__)
