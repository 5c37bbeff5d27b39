"""Matches regular expressions from configs in linear time, so that no expression can hang.

A pattern becomes an automaton, whose states are followed in parallel. Features that it cannot
express (back references, lookahead) are refused. Patterns of PEFT configs consist of module names,
alternatives, classes and repetitions.
"""

from __future__ import annotations

import functools
import string
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple  # Any: syntax trees, nested tuples.

LONGEST = 1000  # Characters of a pattern.
_DEEPEST = 20  # Nested parentheses.
_MOST = 5000  # Parts of an automaton, each of one state or none.

_WORD = frozenset(string.ascii_letters + string.digits + "_")
_CLASSES = {"d": frozenset(string.digits), "w": _WORD, "s": frozenset(string.whitespace)}
_CONTROLS = {"n": "\n", "t": "\t"}

Matcher = Callable[[str], bool]


def first(patterns: Sequence[str], name: str) -> str | None:
  """Returns the first pattern that matches a name, or its end after a dot, as in PEFT.

  >>> first(["k_proj", "layers.[01].+"], "model.layers.1.q_proj")
  'layers.[01].+'

  Raises:
    ValueError: for an invalid or unsupported pattern.
  """
  return next((pattern for pattern in patterns if ends(pattern, name)), None)


def ends(pattern: str, name: str) -> bool:
  """Returns whether a pattern matches a name, or its end after a dot.

  Raises:
    ValueError: for an invalid or unsupported pattern.
  """
  literal = _literal(pattern)
  if literal is not None:
    return name == literal or name.endswith(f".{literal}")
  return _automaton(pattern).matches(name)


@functools.lru_cache(10_000)
def _literal(pattern: str) -> str | None:
  """Returns a pattern as plain text if it has no operators: dots are escaped or absent."""
  text = pattern.replace("\\.", "")
  return pattern.replace("\\.", ".") if text and _WORD | {"-"} >= set(text) else None


class _State(NamedTuple):
  """A state: it consumes a character for which `holds` is true, or none, and goes to `after`."""

  holds: Matcher | None
  anchor: str
  after: tuple[int, ...]


class _Automaton:
  def __init__(self, pattern: str):
    # PEFT matches (.*\.)?(pattern)$
    before = ("repeat", ("join", [("repeat", _any(), 0, None), ("one", ".".__eq__)]), 0, 1)
    self.states: list[_State] = [_State(None, "", ())]
    self.parts = 0
    self.start = self._add(("join", [before, _parse(pattern)]), 0)

  def _add(self, node: Any, after: int) -> int:
    """Adds the states of a part of the tree, which lead to `after`; returns the first state."""
    kind = node[0]
    self.parts += 1  # Parts without a state count too.
    if self.parts > _MOST:
      raise ValueError("it is too long once its repetitions are written out")
    if kind == "one":
      return self._state(_State(node[1], "", (after,)))
    if kind == "anchor":
      return self._state(_State(None, node[1], (after,)))
    if kind == "join":
      for part in reversed(node[1]):
        after = self._add(part, after)
      return after
    if kind == "either":
      return self._state(_State(None, "", tuple(self._add(part, after) for part in node[1])))
    _, part, least, most = node
    if most is None:
      loop = self._state(_State(None, "", ()))
      self.states[loop] = _State(None, "", (self._add(part, loop), after))
      after = loop
    else:
      end = after
      for _ in range(most - least):
        after = self._state(_State(None, "", (self._add(part, after), end)))
    for _ in range(least):
      after = self._add(part, after)
    return after

  def _state(self, state: _State) -> int:
    self.states.append(state)
    return len(self.states) - 1

  def matches(self, text: str) -> bool:
    """Returns whether the automaton accepts a text."""
    here = self._closure([self.start], 0, len(text))
    for at, character in enumerate(text, 1):
      states = (self.states[i] for i in here)
      after = [s.after[0] for s in states if s.holds is not None and s.holds(character)]
      here = self._closure(after, at, len(text))
      if not here:
        return False
    return 0 in here

  def _closure(self, states: Sequence[int], at: int, length: int) -> set[int]:
    """Returns these states, and all that are reachable without consuming a character."""
    reached, waiting = set(states), list(states)
    while waiting:
      state = self.states[waiting.pop()]
      stopped = (state.anchor == "^" and at > 0) or (state.anchor == "$" and at < length)
      if state.holds is None and not stopped:
        more = set(state.after) - reached
        reached |= more
        waiting += more
    return reached


@functools.lru_cache(10_000)
def _automaton(pattern: str) -> _Automaton:
  try:
    if len(pattern) > LONGEST:
      raise ValueError(f"it has more than {LONGEST} characters")
    return _Automaton(pattern)
  except ValueError as error:
    raise ValueError(
      f"{pattern!r:.200} is no regular expression that is supported: {error}; write module names "
      "instead."
    ) from None


def _any() -> Any:
  return ("one", "\n".__ne__)


def _parse(pattern: str) -> Any:
  node, at = _either(pattern, 0, 0)
  if at < len(pattern):
    raise ValueError(f"the parenthesis at {at + 1} closes none")
  return node


def _either(text: str, at: int, depth: int) -> tuple[Any, int]:
  """Parses alternatives, up to the end or a closing parenthesis."""
  if depth > _DEEPEST:
    raise ValueError(f"its parentheses are more than {_DEEPEST} deep")
  parts: list[list[Any]] = [[]]
  while at < len(text) and text[at] != ")":
    if text[at] == "|":
      parts.append([])
      at += 1
      continue
    begun, (node, at) = at, _atom(text, at, depth)
    node, at = _repetition(node, text, at)
    if node[0] == "repeat" and node[1][0] == "anchor":
      raise ValueError(f"{text[begun]!r} at {begun + 1} cannot be repeated")
    parts[-1].append(node)
  joined = [("join", part) for part in parts]
  return (joined[0] if len(joined) == 1 else ("either", joined)), at


def _atom(text: str, at: int, depth: int) -> tuple[Any, int]:
  character = text[at]
  if character == "(":
    inside = at + 3 if text.startswith("(?:", at) else at + 1
    if inside == at + 1 and text.startswith("?", inside):
      raise ValueError(f"the group at {at + 1} is of a special kind")
    node, end = _either(text, inside, depth + 1)
    if end >= len(text):
      raise ValueError(f"the parenthesis at {at + 1} is not closed")
    return node, end + 1
  if character in "*+?{":
    raise ValueError(f"{character!r} at {at + 1} repeats nothing")
  if character == "[":
    return _class(text, at + 1)
  if character in "^$":
    return ("anchor", character), at + 1
  if character == ".":
    return _any(), at + 1
  if character == "\\":
    characters, at = _escape(text, at)
    return ("one", characters.__contains__), at
  return ("one", character.__eq__), at + 1


def _escape(text: str, at: int) -> tuple[frozenset[str], int]:
  """Parses an escape into a set of characters."""
  letter = text[at + 1 : at + 2]
  if letter in _CLASSES:
    return _CLASSES[letter], at + 2
  if not letter or letter in _WORD - _CONTROLS.keys():
    raise ValueError(f"the escape at {at + 1} is not known")
  return frozenset(_CONTROLS.get(letter, letter)), at + 2


def _class(text: str, at: int) -> tuple[Any, int]:
  """Parses a character class in brackets."""
  opened, characters = at, set[str]()
  negated = text.startswith("^", at)
  at += negated
  begun = at
  while at < len(text) and (text[at] != "]" or at == begun):
    if text[at] == "\\":
      escaped, at = _escape(text, at)
      characters |= escaped
    elif text[at + 1 : at + 2] == "-" and text[at + 2 : at + 3] not in ("]", "", "\\"):
      characters |= {chr(i) for i in range(ord(text[at]), min(ord(text[at + 2]), 0x2000) + 1)}
      at += 3
    else:
      characters.add(text[at])
      at += 1
  if at >= len(text):
    raise ValueError(f"the bracket at {opened} is not closed")
  whole = frozenset(characters)
  return ("one", (lambda c: c not in whole) if negated else whole.__contains__), at + 1


def _repetition(node: Any, text: str, at: int) -> tuple[Any, int]:
  """Parses the repetition of the preceding part, if there is one."""
  counts = {"*": (0, None), "+": (1, None), "?": (0, 1)}
  if text[at : at + 1] in counts:
    least, most = counts[text[at]]
    at += 1
  elif text.startswith("{", at):
    end = text.find("}", at)
    low, comma, high = text[at + 1 : max(end, at + 1)].partition(",")
    if end < 0 or not all(x.isdecimal() and len(x) < 5 for x in (low, high or "0")):
      raise ValueError(f"the repetition at {at + 1} is not of the form {{2}}, {{2,}} or {{2,5}}")
    least = int(low)
    most = int(high) if high else (None if comma else least)
    if most is not None and most < least:
      raise ValueError(f"the repetition at {at + 1} goes from more to fewer")
    at = end + 1
  else:
    return node, at
  if text.startswith("?", at):  # Non-greedy: makes no difference to whether a whole name matches.
    at += 1
  if text[at : at + 1] in ("*", "+", "?", "{") and at < len(text):
    raise ValueError(f"{text[at]!r} at {at + 1} repeats a repetition")
  return ("repeat", node, least, most), at
