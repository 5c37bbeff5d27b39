"""Problems of several kinds that are told together: of the recipe, the models and the result."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from jaxmerge import planning
from jaxmerge.recipe.places import RecipeError


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
    jaxmerge.planning.Problems: a: no such folder.
    b: no such folder.

  Raises:
    RecipeError: where all belong to places in recipes.
    planning.Problems: for several of other kinds too.
  """
  if len(found) == 1:
    raise found[0]
  own = [error for error in found if isinstance(error, RecipeError)]
  if found and len(own) == len(found):
    raise RecipeError(problem for error in own for problem in error.problems)
  if found:
    lines = [line for error in found for line in str(error).splitlines()]
    raise planning.Problems(list(dict.fromkeys(lines)))
