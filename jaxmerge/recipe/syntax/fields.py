"""Reads a value of a recipe as the expected kind, and collects its problems.

Every reader returns a value of its kind. For another kind it collects a problem and returns a
placeholder, so that all problems are raised together. The caller of the library never receives a
recipe with a problem.
"""

from __future__ import annotations

import difflib
import re
import types
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar  # Any: further arguments of a reader.

from jaxmerge import errors
from jaxmerge.recipe.errors import Problem, add, show
from jaxmerge.recipe.records import Where
from jaxmerge.recipe.syntax.yaml_reader import Node, plain

T = TypeVar("T")
Word = TypeVar("Word", bound=str)
_LONGEST_PATTERN = 1000
_MOST_LAYERS = 10**6
_MOST_KNOWN = 200  # Close matches among more words than that take too long.


def mapping(
  node: Node,
  what: str,
  keys: Collection[str],
  problems: list[Problem],
  *,
  needed: Collection[str] = (),
  refused: Mapping[str, str] = types.MappingProxyType({}),
  ignored: Mapping[str, str] | None = None,
) -> dict[str, Node]:
  """Returns the values of a mapping by key, without those that are empty.

  Args:
    node: the mapping.
    what: its name in errors.
    keys: the allowed keys.
    problems: list to which problems are added.
    needed: the required keys.
    refused: the message for each key that is known but not supported.
    ignored: where mergekit ignores unknown keys: the message for each such key that is known.
      Other unknown keys are ignored too, unless they look misspelt.
  """
  if not isinstance(node.value, dict):
    add(problems, node.place, f"{what} must be a mapping, got {show(node.value)}; {_list(keys)}.")
    return {}
  values = {}
  for key, value in node.value.items():
    if key in keys:
      values[key] = value
    elif key in refused:
      if value.value is not None:
        add(problems, node.keys[key], refused[key])
    elif ignored is not None and (key in ignored or not closest(key, keys)):
      text = ignored.get(key) or f"{show(key)} is no key of {what}"
      add(problems, node.keys[key], f"{text}: it is ignored, as by mergekit.", ignored=True)
    else:
      add(problems, node.keys[key], f"unknown key {show(key)} in {what}{nearest(key, keys)}.")
      # Takes the place of the intended key, so that this is not reported as missing too.
      values.update({k: value for k in closest(key, keys) if k not in node.value})
  values = {key: value for key, value in values.items() if value.value is not None}
  for key in needed:
    if key not in values:
      add(problems, node.place, f"{what} needs the key {key}.")
  return values


def maybe(reader: Callable[..., T], node: Node | None, *rest: Any) -> T | None:
  """Applies a reader to a value; returns None if there is no value."""
  return None if node is None else reader(node, *rest)


def items(node: Node, what: str, problems: list[Problem]) -> tuple[Node, ...]:
  """Returns the items of a list that must not be empty."""
  if not isinstance(node.value, tuple) or not node.value:
    got = "an empty one" if node.value == () else show(node.value)
    add(problems, node.place, f"{what} must be a list of one item or more, got {got}.")
    return ()
  return node.value


def text(node: Node, what: str, problems: list[Problem]) -> str:
  """Returns a non-empty text."""
  if isinstance(node.value, str) and node.value:
    return node.value
  scalar = isinstance(node.value, bool | int | float)
  hint = "; put it in quotes" if scalar else ""
  got = "an empty one" if node.value == "" else show(node.value)
  add(problems, node.place, f"{what} must be text, got {got}{hint}.")
  return "?"


def choice(node: Node, what: str, choices: Sequence[Word], problems: list[Problem]) -> Word:
  """Returns one of several words."""
  if node.value in choices:
    return node.value
  word = node.value if isinstance(node.value, str) else ""
  add(problems, node.place, f"{what} cannot be {show(node.value)}{nearest(word, choices)}.")
  return next((c for c in choices if c in closest(word, choices)), choices[0])


def whole(node: Node, what: str, low: int, high: int, problems: list[Problem]) -> int:
  """Returns a whole number from `low` to `high`."""
  value = node.value
  if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
    return value
  wrong = f"{what} must be a whole number from {low} to {high}, got {show(value)}"
  add(problems, node.place, f"{wrong}{quotes_hint(value)}.")
  return low


def truth(node: Node, what: str, problems: list[Problem]) -> bool:
  """Returns a boolean, which may be written as 1 or 0."""
  if not is_truth(node.value):
    wrong = f"{what} must be true or false, got {show(node.value)}"
    add(problems, node.place, f"{wrong}{quotes_hint(node.value)}.")
  return node.value in (True, 1)


def is_truth(value: object) -> bool:
  """Returns whether a value is a boolean, or 0 or 1 in its place, as in mergekit.

  >>> is_truth(False), is_truth(1.0), is_truth(2), is_truth("true")
  (True, True, False, False)
  """
  return isinstance(value, int | float) and value in (0, 1)


def pattern(node: Node, what: str, problems: list[Problem]) -> str:
  """Returns a regular expression."""
  value = text(node, what, problems)
  try:
    if len(value) > _LONGEST_PATTERN:
      raise re.error(f"longer than {_LONGEST_PATTERN} characters")
    with warnings.catch_warnings():
      warnings.simplefilter("error")
      re.compile(value)
  except (re.error, RecursionError, OverflowError, Warning) as error:
    wrong = f"{what} is no regular expression, got {show(value)}: {error}"
    add(problems, node.place, f"{wrong}.")
    return "$^"
  return value


def span(node: Node, what: str, problems: list[Problem]) -> tuple[int, int]:
  """Returns a layer range [first, last) from a list of two numbers."""
  ends = node.value if isinstance(node.value, tuple) else ()
  if len(ends) != 2:
    add(problems, node.place, f"{what} must be a list [first, last), got {_got(node)}.")
    return 0, 1
  before = len(problems)
  first, last = (whole(end, what, 0, _MOST_LAYERS, problems) for end in ends)
  if first >= last and len(problems) == before:
    add(problems, node.place, f"{what} must not be empty, got [{first}, {last}).")
  return first, max(last, first + 1)


def layers(node: Node, what: str, problems: list[Problem]) -> tuple[tuple[int, int], ...]:
  """Returns layer ranges [first, last) from a list `[0, 4]` or from `0-3, 8`, which includes 3."""
  if isinstance(node.value, tuple):
    return (span(node, what, problems),)
  parts = [p.strip() for p in str(node.value).split(",")]
  if all(re.fullmatch(r"[0-9]{1,6}( *- *[0-9]{1,6})?", p) for p in parts):
    ends = [[int(n) for n in p.split("-")] for p in parts]
    ranges = tuple((e[0], e[-1] + 1) for e in ends)
    if all(a < b for a, b in ranges):
      return ranges
  add(problems, node.place, f"{what} must be such as '0-3, 8' or [0, 4], got {_got(node)}.")
  return ((0, 1),)


CONDITIONS = ("filter", "pattern", "layers")


def where(node: Node, nodes: Mapping[str, Node], what: str, problems: list[Problem]) -> Where:
  """Returns the conditions of a mapping; the filter `*` counts as no condition."""
  filter_text = maybe(text, nodes.get("filter"), f"filter of {what}", problems)
  return Where(
    filter=None if filter_text == "*" else filter_text,
    pattern=maybe(pattern, nodes.get("pattern"), f"pattern of {what}", problems),
    layers=maybe(layers, nodes.get("layers"), f"layers of {what}", problems),
    place=next((nodes[key].place for key in CONDITIONS if key in nodes), node.place),
  )


def closest(word: str, known: Iterable[str]) -> list[str]:
  """Returns a list with the closest known word, if any is close; case and dashes do not matter.

  >>> closest("DARE-ties", ["dare_ties", "ties"])
  ['dare_ties']
  """
  return difflib.get_close_matches(_fold(word), list(known)[:_MOST_KNOWN], n=1)


def nearest(word: str, known: Iterable[str]) -> str:
  """Returns the end of an error: the closest word, and the known words."""
  return errors.nearest(_fold(word), list(known)[:_MOST_KNOWN])


def quotes_hint(value: object) -> str:
  """Returns the end of an error for a number or boolean in quotes; else an empty text."""
  return "; remove the quotes" if isinstance(value, str) and plain(value) != value else ""


def _fold(word: str) -> str:
  return word[:60].lower().replace("-", "_")


def _list(keys: Collection[str]) -> str:
  return f"keys: {', '.join(keys)}" if keys else "names are its keys"


def _got(node: Node) -> str:
  if isinstance(node.value, tuple) and all(isinstance(v.value, str | int) for v in node.value):
    return f"[{', '.join(show(v.value) for v in node.value[:4])}]"
  return show(node.value)
