"""Splits references to models, `model@revision+adapter+adapter`; free of NumPy."""

from __future__ import annotations

from collections.abc import Callable


def split(reference: str, is_folder: Callable[[str], bool]) -> list[str]:
  """Splits a model and its adapters at each `+` that is not part of a folder's name.

  >>> split("base+runs/a+b+c", lambda path: path == "runs/a+b")
  ['base', 'runs/a+b', 'c']
  """
  words = reference.split("+")
  parts = []
  while words:
    ends = (n for n in range(len(words), 1, -1) if is_folder("+".join(words[:n])))
    end = next(ends, 1)
    parts.append("+".join(words[:end]))
    words = words[end:]
  return parts
