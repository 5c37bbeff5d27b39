"""Errors that list all that is wrong, and what is near a mistyped word."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast  # Any: a function is wrapped whatever it takes.

T = TypeVar("T", bound=Callable[..., Any])


def nearest(word: str, known: Iterable[str]) -> str:
  """Says what is near a mistyped word, and what there is: to be appended to an error.

  Example:
    >>> nearest("densty", ["scale", "density"])
    "; did you mean 'density'? Known: density, scale"
  """
  known = sorted(known)
  if not known:
    return "; there are none"
  close = difflib.get_close_matches(word, known, n=1)
  close = [name for name in known if name.lower() == word.lower()] or close
  hint = f"; did you mean {close[0]!r}?" if close else ";"
  return f"{hint} Known: {', '.join(known)}"


class Problems(ValueError):
  """All that is wrong with a merge, a line each."""

  def __init__(self, lines: Sequence[str]):
    super().__init__("\n".join(lines))
    self.lines = tuple(lines)


def suggest_keywords(target: T) -> T:
  """Decorates a function or a class: the TypeError for an unknown keyword names the nearest.

  Example:
    >>> @suggest_keywords
    ... def scaled(x, factor=1):
    ...   return factor * x
    >>> scaled(2, factr=3)
    Traceback (most recent call last):
      ...
    TypeError: scaled has no argument 'factr'; did you mean 'factor'? Known: factor, x.
  """
  call: Any = getattr(target, "__init__") if isinstance(target, type) else target  # noqa: B009
  signature = inspect.signature(target)
  kinds = {p.kind for p in signature.parameters.values()}
  known = [name for name in signature.parameters if name != "self"]

  @functools.wraps(call)
  def checked(*args: Any, **kwargs: Any) -> Any:
    # What a function passes on by **, it checks itself, if there is what it needs.
    passes_on = inspect.Parameter.VAR_KEYWORD in kinds and _binds(signature, args, kwargs)
    for name in () if passes_on else kwargs:
      if name not in known:
        raise TypeError(f"{target.__name__} has no argument {name!r}{nearest(name, known)}.")
    return call(*args, **kwargs)

  if not isinstance(target, type):
    return cast(T, checked)
  target.__init__ = checked  # type: ignore[misc]
  return target


def _binds(signature: inspect.Signature, args: Any, kwargs: Any) -> bool:
  """Returns whether a call has all arguments that must be there."""
  try:
    signature.bind(*args, **kwargs)
  except TypeError:
    return False
  return True
