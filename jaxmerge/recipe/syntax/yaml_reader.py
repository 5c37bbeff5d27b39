"""Reads YAML with the position of every key and value, within limits of size and depth.

The nodes are built from the parser's events one by one. A file that is too deep, too long or full
of aliases is refused before anything of that size is in memory. Plain text becomes a number, a
boolean or null as in PyYAML, except for forms whose meaning depends on the YAML version: `010`,
`1_000`, `12:30` and dates are text, and `1e-8` is a number.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple  # Any: a YAML value; a mark, whose class depends on the parser.

import yaml

from jaxmerge.recipe.errors import Place, Problem, RecipeError, add, show

LONGEST = 2**20  # Characters of a file.
DEEPEST = 24  # A recipe nests 14 deep.
LARGEST = 30_000  # Values of a file; those repeated by aliases count each time.

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_UNPRINTABLE = re.compile(
  "[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]"
)
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")
_NUMBER = re.compile(
  r"[-+]?((0|[1-9][0-9]{0,39})(\.[0-9]{0,40})?|\.[0-9]{1,40})([eE][-+]?[0-9]{1,3})?"
)
_WORDS: Mapping[str, Any] = {
  **dict.fromkeys(("", "~", "null")),
  **dict.fromkeys(("true", "yes", "on"), True),
  **dict.fromkeys(("false", "no", "off"), False),
  **{".inf": math.inf, "+.inf": math.inf, "-.inf": -math.inf, ".nan": math.nan},
}


class Node(NamedTuple):
  """A value and its position.

  Attributes:
    value: text, a number, a boolean, None, a tuple of Node, or a dict of them by key.
    place: where it begins.
    keys: positions of the keys, if it is a dict.
  """

  value: Any
  place: Place
  keys: Mapping[str, Place]


def documents(text: str, file: str, problems: list[Problem]) -> tuple[Node, ...]:
  """Returns the documents of a YAML text.

  Problems that do not stop the reader, such as a duplicate key, are added to `problems`.

  Raises:
    RecipeError: with all problems so far and the reason that the text cannot be read.

  Example:
    >>> (document,) = documents("t: [0, 0.5]", "recipe.yml", [])
    >>> document.value["t"].value[1]
    Node(value=0.5, place=Place(file='recipe.yml', line=1, column=8, path=''), keys={})
  """
  text = text.removeprefix("\ufeff")
  if len(text) > LONGEST:
    raise RecipeError([Problem(Place(file, 1, 1), f"longer than {LONGEST} characters.")])
  if bad := _UNPRINTABLE.search(text):
    place = position(text, bad.start(), file)
    raise RecipeError([Problem(place, f"the character {bad.group()!r} is not allowed in YAML.")])
  reader = _Reader(_events(text, file, problems), file, problems)
  nodes = []
  for event in reader.events:
    if isinstance(event, yaml.DocumentStartEvent):
      reader.anchors.clear()
      nodes.append(reader.node(next(reader.events), 0))
  return tuple(nodes)


def position(text: str, index: int, file: str) -> Place:
  """Returns the place of the character at an index."""
  return Place(file, text.count("\n", 0, index) + 1, index - text.rfind("\n", 0, index))


def plain(text: str) -> Any:
  """Returns the value of an unquoted text.

  >>> plain("0.5"), plain("1e-8"), plain("yes"), plain("010")
  (0.5, 1e-08, True, '010')
  """
  if _INTEGER.fullmatch(text):
    return int(text)
  return float(text) if _NUMBER.fullmatch(text) else _WORDS.get(text.lower(), text)


@dataclasses.dataclass
class _Reader:
  """Builds nodes from a file's events; tracks anchors and the number of values so far."""

  events: Iterator[yaml.Event]
  file: str
  problems: list[Problem]
  anchors: dict[str, tuple[Node, int]] = dataclasses.field(default_factory=dict)
  size: int = 0

  def node(self, event: yaml.Event, depth: int) -> Node:
    place, before = _place(event.start_mark, self.file), self.size
    if isinstance(event, yaml.AliasEvent):
      return self.alias(event.anchor, place)
    self.grow(1, place)
    if event.tag is not None:
      add(self.problems, place, f"the tag {show(event.tag)} is not allowed; remove it.")
    if isinstance(event, yaml.ScalarEvent):
      node = Node(plain(event.value) if event.implicit[0] else event.value, place, {})
    elif depth == DEEPEST:
      self.stop(place, f"nested deeper than {DEEPEST} levels.")
    elif isinstance(event, yaml.SequenceStartEvent):
      node = Node(tuple(self.inside(depth)), place, {})
    else:
      node = self.mapping(place, depth)
    if event.anchor is not None:
      self.anchors[event.anchor] = node, self.size - before
    return node

  def inside(self, depth: int) -> Iterator[Node]:
    for event in self.events:
      if isinstance(event, yaml.CollectionEndEvent):
        return
      yield self.node(event, depth + 1)

  def mapping(self, place: Place, depth: int) -> Node:
    values: dict[str, Node] = {}
    keys: dict[str, Place] = {}
    nodes = self.inside(depth)
    for key, value in zip(nodes, nodes, strict=True):
      name = key.value
      if name == "<<":
        add(self.problems, key.place, "merge keys (<<) are not supported; repeat the keys.")
      elif not isinstance(name, str):
        add(self.problems, key.place, f"a key must be text, got {show(name)}; put it in quotes.")
      elif name in values:
        first = keys[name].short
        add(self.problems, key.place, f"the key {show(name)} is already in {first}.")
      else:
        values[name], keys[name] = value, key.place
    return Node(values, place, keys)

  def alias(self, anchor: str, place: Place) -> Node:
    if anchor not in self.anchors:
      self.stop(place, f"the alias *{anchor[:60]} names no anchor that is complete before it.")
    node, size = self.anchors[anchor]
    self.grow(size, place)
    return node

  def grow(self, size: int, place: Place) -> None:
    self.size += size
    if self.size > LARGEST:
      self.stop(place, f"more than {LARGEST} values, those that aliases repeat included.")

  def stop(self, place: Place, text: str) -> None:
    raise RecipeError([*self.problems, Problem(place, text)])


def _events(text: str, file: str, problems: list[Problem]) -> Iterator[yaml.Event]:
  place = Place(file, 1, 1)
  try:
    for event in yaml.parse(text, Loader=_LOADER):
      place = _place(event.start_mark, file)
      yield event
  except yaml.MarkedYAMLError as error:
    mark = error.problem_mark or error.context_mark
    place = _place(mark, file) if mark else place
    if "nesting depth" in str(error.problem):  # The parser's limit, which is higher.
      raise RecipeError(
        [*problems, Problem(place, f"nested deeper than {DEEPEST} levels.")]
      ) from error
    tab = "\t" in "".join(text.split("\n")[place.line - 1 : place.line])[: place.column]
    hint = "; indent with spaces, not with tabs" if tab else ""
    context = f" {error.context}" if error.context else ""
    raise RecipeError(
      [*problems, Problem(place, f"not YAML: {error.problem}{context}{hint}.")]
    ) from error
  except (yaml.YAMLError, ValueError, OverflowError) as error:
    raise RecipeError([*problems, Problem(place, f"not YAML from here on: {error}.")]) from error


def _place(mark: Any, file: str) -> Place:
  return Place(file, mark.line + 1, mark.column + 1)
