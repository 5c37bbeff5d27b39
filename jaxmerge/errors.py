"""Errors that list all that is wrong, and what is near a mistyped word."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


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
  hint = f"; did you mean {close[0]!r}?" if close else ";"
  return f"{hint} Known: {', '.join(known)}"


class Problems(ValueError):
  """All that is wrong with a merge, a line each."""

  def __init__(self, lines: Sequence[str]):
    super().__init__("\n".join(lines))
    self.lines = tuple(lines)
