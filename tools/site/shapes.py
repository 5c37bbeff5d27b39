"""Shapes in docstrings, `[K, *s]`, keep their star: in Markdown two of them are emphasis."""

from __future__ import annotations

import re
from typing import Any  # What an event brings beside the object is only passed on.

import griffe


def escape(text: str) -> str:
  r"""Escapes the stars of shapes outside code: `[*s]` becomes `[\*s]`."""
  return re.sub(r"(?<=[\[ ,(])\*(?=\w+[\],)])", r"\\*", text)


class Shapes(griffe.Extension):
  """Escapes the stars of shapes in every docstring."""

  def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
    """Escapes those of one docstring, but for its examples."""
    if obj.docstring:
      lines = obj.docstring.value.split("\n")
      obj.docstring.value = "\n".join(
        x if x.lstrip().startswith(">>>") else escape(x) for x in lines
      )
