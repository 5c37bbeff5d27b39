"""Positions in a recipe, and the error that lists all its problems."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple  # Any: values of a recipe.

from jaxmerge import errors

_WIDEST = 2000
MOST = 100  # A file with more problems, or twice as many notes, is no recipe.


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
    """Returns the position without the file: `line 3`, or the path."""
    return self.path or f"line {self.line}"


class Problem(NamedTuple):
  """A problem of a recipe and its position.

  Attributes:
    place: where.
    text: the message.
    ignored: whether it is a key without effect, as mergekit has many: an error only where the
      recipe is to be strict.
  """

  place: Place
  text: str
  ignored: bool = False


class RecipeError(ValueError):
  """All problems of a recipe, a line each, `file:line:column: what`, by position.

  Of a recipe that is a Python dict, `models[1].model: what`.

  Attributes:
    models: those that the recipe names without a mistake.
  """

  def __init__(self, problems: Iterable[Problem], models: Iterable[Any] = ()) -> None:
    # An alias is read twice, but reported once.
    super().__init__(tuple(sorted(set(problems))))
    self.models = tuple(models)

  @property
  def problems(self) -> tuple[Problem, ...]:
    """Returns the problems, by position."""
    return self.args[0]

  def __str__(self) -> str:
    """Returns one line for each problem."""
    return "\n".join(_line(f"{p.place}: {p.text}") for p in self.problems)


def _line(text: str) -> str:
  """Returns a text shortened and escaped for one line of a terminal."""
  cut = text if len(text) <= _WIDEST else text[:_WIDEST] + "..."
  return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in cut)


def add(problems: list[Problem], place: Place, text: str, ignored: bool = False) -> None:
  """Adds a problem to a list; raises all when there are too many."""
  problems.append(Problem(place, text, ignored))
  if sum(not problem.ignored for problem in problems) >= MOST or len(problems) >= 2 * MOST:
    raise RecipeError(problems)


def join_some(words: Iterable[str], most: int = 8) -> str:
  """Joins words in one line, only the first if there are many.

  >>> join_some(["a", "b", "c"], most=2)
  'a, b and 1 more'
  """
  words = list(words)
  rest = f" and {len(words) - most} more" if len(words) > most else ""
  return ", ".join(words[:most]) + rest


def show(value: Any) -> str:
  """Formats a value of a recipe for errors, short and on one line.

  >>> show("bfloat"), show(True), show(None), show((1, 2))
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
def collect(problems: list[Exception]) -> Iterator[None]:
  """Collects an error of the block in a list, and continues."""
  try:
    yield
  except (OSError, ValueError) as error:
    problems.append(error)


def raise_all(problems: Sequence[Exception]) -> None:
  """Raises collected errors: a single one unchanged, several as one error.

  Example:
    >>> problems = []
    >>> for name in ("a", "b"):
    ...   with collect(problems):
    ...     raise FileNotFoundError(f"{name}: no such folder.")
    >>> raise_all(problems)
    Traceback (most recent call last):
    jaxmerge.errors.Problems: a: no such folder.
    b: no such folder.

  Raises:
    RecipeError: where all belong to places in recipes.
    errors.Problems: for several of other kinds too.
  """
  if len(problems) == 1:
    raise problems[0]
  of_recipe = [error for error in problems if isinstance(error, RecipeError)]
  if problems and len(of_recipe) == len(problems):
    raise RecipeError(problem for error in of_recipe for problem in error.problems)
  if problems:
    lines = [line for error in problems for line in str(error).splitlines()]
    raise errors.Problems(list(dict.fromkeys(lines)))
