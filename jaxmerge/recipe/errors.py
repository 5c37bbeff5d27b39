"""Where something stands in a recipe, and the one error that lists all that is wrong there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple  # Any: whatever a recipe holds can be shown.

from jaxmerge import errors

_WIDEST = 2000
MOST = 100  # A file with more problems than this is no recipe, nor one with twice as many notes.


class Place(NamedTuple):
  """A position in a recipe: in a file, or in a Python dict.

  Attributes:
    file: name of the file.
    line: from one; of a dict a number that grows with the position.
    column: from one.
    path: in a dict, such as `models[1].parameters.weight`; empty in a file.
  """

  file: str
  line: int
  column: int
  path: str = ""

  def __str__(self) -> str:
    """Returns `file:line:column`, which editors and terminals open; of a dict the path."""
    return self.path or f"{self.file}:{self.line}:{self.column}"

  @property
  def short(self) -> str:
    """Returns the position within its recipe, for texts that refer to it: `line 3`, or the path."""
    return self.path or f"line {self.line}"


class Problem(NamedTuple):
  """What is wrong, and where.

  Attributes:
    place: where.
    text: what.
    ignored: whether it is a key without effect, as mergekit has many: an error only where the
      recipe is to be strict.
  """

  place: Place
  text: str
  ignored: bool = False


class RecipeError(ValueError):
  """All that is wrong with a recipe: a line each, `file:line:column: what`, by position.

  Of a recipe that is a Python dict, `models[1].model: what`.

  Attributes:
    models: those that it names all the same, as far as nothing is wrong with what names them.
  """

  def __init__(self, problems: Iterable[Problem], models: Iterable[Any] = ()) -> None:
    # What an alias repeats is read twice, and told once.
    super().__init__(tuple(sorted(set(problems))))
    self.models = tuple(models)

  @property
  def problems(self) -> tuple[Problem, ...]:
    """The problems, by position."""
    return self.args[0]

  def __str__(self) -> str:
    """Returns one line for each problem."""
    return "\n".join(_line(f"{p.place}: {p.text}") for p in self.problems)


def _line(text: str) -> str:
  """Returns a text cut and escaped, so that what it quotes stays in one line of a terminal."""
  cut = text if len(text) <= _WIDEST else text[:_WIDEST] + "..."
  return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in cut)


def note(found: list[Problem], place: Place, text: str, ignored: bool = False) -> None:
  """Adds a problem to those found; raises them all when there are too many to go on."""
  found.append(Problem(place, text, ignored))
  if sum(not problem.ignored for problem in found) >= MOST or len(found) >= 2 * MOST:
    raise RecipeError(found)


def listed(words: Iterable[str], most: int = 8) -> str:
  """Returns words in one line, the first of them if there are many.

  >>> listed(["a", "b", "c"], most=2)
  'a, b and 1 more'
  """
  words = list(words)
  rest = f" and {len(words) - most} more" if len(words) > most else ""
  return ", ".join(words[:most]) + rest


def shown(value: Any) -> str:
  """Returns a value of a recipe as an error shows it: short, and on one line.

  >>> shown("bfloat"), shown(True), shown(None), shown((1, 2))
  ("'bfloat'", 'true', 'nothing', 'a list')
  """
  if isinstance(value, bool):
    return "true" if value else "false"
  if value is None:
    return "nothing"
  if isinstance(value, tuple | dict):
    return "a list" if isinstance(value, tuple) else "a mapping"
  return repr(value[:60] + "..." if isinstance(value, str) and len(value) > 60 else value)


@contextlib.contextmanager
def noted(found: list[Exception]) -> Iterator[None]:
  """Adds an error of its block to those found, so that the others are found as well."""
  try:
    yield
  except (OSError, ValueError) as error:
    found.append(error)


def check(found: Sequence[Exception]) -> None:
  """Raises what was found, if anything: one error as it is, several as one of them all.

  Example:
    >>> found = []
    >>> for name in ("a", "b"):
    ...   with noted(found):
    ...     raise FileNotFoundError(f"{name}: no such folder.")
    >>> check(found)
    Traceback (most recent call last):
    jaxmerge.errors.Problems: a: no such folder.
    b: no such folder.

  Raises:
    RecipeError: where all belong to places in recipes.
    errors.Problems: for several of other kinds too.
  """
  if len(found) == 1:
    raise found[0]
  own = [error for error in found if isinstance(error, RecipeError)]
  if found and len(own) == len(found):
    raise RecipeError(problem for error in own for problem in error.problems)
  if found:
    lines = [line for error in found for line in str(error).splitlines()]
    raise errors.Problems(list(dict.fromkeys(lines)))
