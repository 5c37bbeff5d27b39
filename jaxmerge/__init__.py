"""Model merging in JAX for TPU and GPU."""

import importlib
from typing import Any  # A lazy attribute may be any public object.

_HOMES = {
  "merge": "jaxmerge.drivers.memory",
  "blend": "jaxmerge.drivers.memory",
  "merge_files": "jaxmerge.files.merge",
  "stack": "jaxmerge.core.tree",
  "unstack": "jaxmerge.core.tree",
  "tune_and_merge": "jaxmerge.training.loop",
  "Settings": "jaxmerge.training.settings",
  "Task": "jaxmerge.tasks.task",
  "Split": "jaxmerge.tasks.task",
}
_ROOMS = (
  "adapters",
  "analysis",
  "catalog",
  "core",
  "drivers",
  "evaluation",
  "files",
  "io",
  "methods",
  "mixtures",
  "models",
  "parallel",
  "recipe",
  "report",
  "search",
  "tasks",
  "training",
  "xla",
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
  lookup = importlib.import_module("jaxmerge.catalog.lookup")
  if name in lookup.METHODS:
    return f"; it is a method, jaxmerge.methods.{name}()"
  errors = importlib.import_module("jaxmerge.errors")
  return "" if name.startswith("_") else str(errors.nearest(name, __all__))


def __dir__() -> list[str]:
  return sorted(__all__)
