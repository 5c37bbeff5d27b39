"""Recipes as Python dicts: parsed like files; each value's position is its path in the dict."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping, Sequence
from typing import Any  # Any: values of a recipe.

import yaml

from jaxmerge.recipe.errors import Place, Problem, RecipeError
from jaxmerge.recipe.syntax.yaml_reader import DEEPEST, LARGEST, LONGEST, Node

_ROOT = "recipe"
_METHODS = (
  "recipes take published methods by name, such as 'ties'; for a method of your own use "
  "jaxmerge.merge_files(method, ...)"
)


def plain_documents(recipe: Any) -> list[dict[str, Any]]:
  """Converts one recipe or several to YAML's types: arrays, tuples and paths become plain values.

  >>> plain_documents({"models": ("a", "b")})
  [{'models': ['a', 'b']}]

  Raises:
    ValueError: if it is neither a dict nor a list of dicts, contains itself, or has values of types
      that YAML lacks.
  """
  documents = list(recipe) if isinstance(recipe, Sequence) else [recipe]
  if not documents or not all(isinstance(d, Mapping) for d in documents):
    raise ValueError("a recipe must be the path of a YAML file, a dict, or a list of dicts.")
  try:
    return [_plain(d, prefix) for d, prefix in zip(documents, _prefixes(documents), strict=True)]
  except RecursionError as error:
    raise ValueError("a recipe must not contain itself; write its values out.") from error


def _plain(value: Any, path: str) -> Any:
  """Converts mappings to dicts, sequences and arrays to lists, and paths and dates to texts."""
  if isinstance(value, Mapping):
    return {str(k): _plain(v, _join(path, str(k))) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(v, f"{path}[{i}]") for i, v in enumerate(value)]
  if hasattr(value, "tolist"):  # Scalars and arrays of NumPy and JAX.
    return _plain(value.tolist(), path)
  if isinstance(value, os.PathLike | str | datetime.date):  # Dates are text, as in a file.
    return str(value)
  if value is not None and not isinstance(value, int | float):
    kind = type(value).__name__
    is_method = kind in ("Method", "Stage") or (callable(value) and path.endswith("merge_method"))
    hint = _METHODS if is_method else "write text or a number"
    raise ValueError(f"{path or _ROOT}: a recipe cannot contain a value of type {kind}; {hint}.")
  return value


def _prefixes(documents: Sequence[Any]) -> list[str]:
  return [""] if len(documents) == 1 else [f"{_ROOT}[{i}]" for i in range(len(documents))]


def text(documents: Sequence[Mapping[str, Any]]) -> str:
  """Returns the YAML text of plain documents, which is stored with the result of a merge."""
  return str(yaml.safe_dump_all(documents, sort_keys=False, allow_unicode=True))


def nodes(documents: Sequence[Mapping[str, Any]]) -> tuple[Node, ...]:
  """Returns the nodes of plain documents, as `yaml_reader.documents` returns those of a file.

  >>> (document,) = nodes([{"models": [{"model": "a"}]}])
  >>> str(document.value["models"].value[0].value["model"].place)
  'models[0].model'

  Raises:
    RecipeError: for a recipe that is too deep or too large.
  """
  if len(text(documents)) > LONGEST:
    raise RecipeError([Problem(Place("", 1, 1, _ROOT), f"longer than {LONGEST} characters.")])
  builder = _Builder()
  prefixes = _prefixes(documents)
  return tuple(builder.node(d, prefix, 0) for d, prefix in zip(documents, prefixes, strict=True))


class _Builder:
  """Builds nodes in the order of the values, which is the order of their problems."""

  def __init__(self) -> None:
    self.count = 0

  def node(self, value: Any, path: str, depth: int) -> Node:
    place = self._place(path)
    if self.count > LARGEST:
      raise RecipeError([Problem(place, f"more than {LARGEST} values.")])
    if isinstance(value, dict | list) and depth == DEEPEST:
      raise RecipeError([Problem(place, f"nested deeper than {DEEPEST} levels.")])
    if isinstance(value, dict):
      keys, values = {}, {}
      for key, inside in value.items():
        keys[key] = self._place(inner := _join(path, key))
        values[key] = self.node(inside, inner, depth + 1)
      return Node(values, place, keys)
    if isinstance(value, list):
      items = enumerate(value)
      return Node(tuple(self.node(v, f"{path}[{i}]", depth + 1) for i, v in items), place, {})
    return Node(value, place, {})

  def _place(self, path: str) -> Place:
    self.count += 1
    return Place("", self.count, 1, path or _ROOT)


def _join(path: str, key: str) -> str:
  """Returns the path of a key in a mapping.

  >>> _join("models[0]", "model"), _join("", "merge_method"), _join("rename", "a.b")
  ('models[0].model', 'merge_method', "rename['a.b']")
  """
  if not key.isidentifier():
    return f"{path}[{key!r:.60}]"
  return f"{path}.{key}" if path else key
