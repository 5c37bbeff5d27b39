"""Recipes: mergekit's YAML, read strictly, every problem told with its line; free of jax."""

import importlib
from typing import Any  # A lazy attribute may be any public object.

_HOMES = {
  "read": "syntax.schema",
  "parse": "syntax.schema",
  "RecipeError": "errors",
  "Recipe": "records",
  "groups": "records",
  "referenced": "records",
  "Tensor": "parameters",
  "values": "parameters",
  "unmatched": "parameters",
  "METHODS": "mergekit.methods",
}
_ROOMS = (
  "errors",
  "layer_config",
  "layer_rules",
  "layers",
  "mergekit",
  "parameters",
  "plan",
  "records",
  "run",
  "syntax",
  "tokenizer",
)
__all__ = [*_HOMES, *_ROOMS]


def __getattr__(name: str) -> Any:
  if name in _HOMES:
    return getattr(importlib.import_module(f"jaxmerge.recipe.{_HOMES[name]}"), name)
  if name in _ROOMS:
    return importlib.import_module(f"jaxmerge.recipe.{name}")
  raise AttributeError(f"module 'jaxmerge.recipe' has no attribute {name!r}.")


def __dir__() -> list[str]:
  return sorted(__all__)
