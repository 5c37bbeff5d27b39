"""Parses JSON strictly and within limits: headers of weights, indexes, configs."""

from __future__ import annotations

import collections
import json
import re
from typing import Any  # Any: a value of JSON before it is checked.

# Bytes: the header limit of the reference implementation of safetensors. A tokenizer of 260,000
# tokens has 34 million.
LONGEST = 100_000_000
_ESCAPED = re.compile(rb"\\u[dD]")


def parse(where: str, content: bytes) -> dict[str, Any]:
  """Returns the object of a JSON text.

  >>> parse("config.json", b'{"layers": 12, "layers": 6}')
  Traceback (most recent call last):
  ValueError: config.json: names 'layers' twice.

  Args:
    where: the file, and the part of it, for errors.
    content: the text, in UTF-8.

  Raises:
    ValueError: starting with `where`: for text that is not JSON, too deeply nested, or not an
      object; for numbers of thousands of digits, duplicate keys, and unpaired surrogates, which
      cannot be written as text.
  """
  twice: list[str] = []

  def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs) and not twice:
      twice.append(collections.Counter(name for name, _ in pairs).most_common(1)[0][0])
    return fields

  try:
    decoded = content.decode()
    value = json.loads(decoded, object_pairs_hook=unique)
    half = _half(value) if _ESCAPED.search(content) else None
  except RecursionError as error:
    raise ValueError(f"{where}: not JSON (nested too deep).") from error
  except ValueError as error:  # Too many digits raise it too, not JSONDecodeError.
    raise ValueError(f"{where}: not JSON ({error}).") from error
  if not isinstance(value, dict):
    raise ValueError(f"{where}: must be a JSON object, got {decoded[:100]!r}.")
  if twice:
    raise ValueError(f"{where}: names {twice[0]!r:.200} twice.")
  if half is not None:
    raise ValueError(f"{where}: an unpaired surrogate is not text, in {half!r}.")
  return value


def _half(value: Any) -> str | None:
  """Returns the text around an unpaired surrogate, which JSON can write as an escape."""
  try:
    json.dumps(value, ensure_ascii=False).encode()
  except UnicodeEncodeError as error:
    return error.object[max(0, error.start - 40) : error.end + 10]
  return None
