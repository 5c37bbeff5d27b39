r"""Text from outside, such as names of tensors and models, as terminals and pages may show it.

A name can hold what moves the cursor, hides text, or turns the direction of reading, and bytes that
are no UTF-8. All of these are written as escapes, `\x1b` or `\u202e`, wherever a name is shown.
"""

from __future__ import annotations

import re

# Control characters but tab and newline; marks of direction, invisible ones and tags; line ends
# that are no newline; half surrogate pairs, which stand for bytes that are no UTF-8.
_HIDDEN = re.compile(
  "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
  "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
_HALF = re.compile("[\ud800-\udfff]")


def shown(text: str) -> str:
  r"""Returns a text of lines in which nothing but what can be seen is left.

  >>> print(shown("merged: \x1b[2Ja\u202eb"))
  merged: \x1b[2Ja\u202eb
  """
  return _HIDDEN.sub(_escape, text)


def name(text: str) -> str:
  r"""Returns a name as `shown` does, in one line.

  >>> print(name("w\nerror: none"))
  w\nerror: none
  """
  return shown(text).replace("\n", "\\n").replace("\t", "\\t")


def readable(text: str) -> str:
  r"""Returns a path as text that every file can hold: bytes of it that are no UTF-8 are escaped.

  >>> readable("caf\udce9")
  'caf\\xe9'
  """
  return _HALF.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
  code = ord(match[0])
  if 0xDC80 <= code <= 0xDCFF:  # How Python keeps a byte of a path that is no UTF-8.
    return f"\\x{code - 0xDC00:02x}"
  return f"\\u{code:04x}" if 0xD800 <= code < 0xE000 else match[0].encode("unicode_escape").decode()
