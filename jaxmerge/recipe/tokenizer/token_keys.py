"""Keys by which tokens of two tokenizers are matched: text, role, byte."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from jaxmerge.io.huggingface import vocabulary
from jaxmerge.io.huggingface.vocabulary import TokenizerFiles, Vocabulary

STARTS = ("Ġ", "▁")  # Word-start markers of byte-level tokenizers and of SentencePiece.
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_SPECIAL = "special_tokens_map.json"

Key = tuple[str, str]  # Kind ("word", "special" or "") and text.


def keys(vocabulary: Vocabulary) -> dict[str, Key]:
  """Returns the key of each token of a vocabulary, independent of its word-start marker."""
  start = max(STARTS, key=lambda mark: sum(token.startswith(mark) for token in vocabulary.ids))
  roles = _roles(vocabulary.files)
  return {token: _key(token, start, roles) for token in vocabulary.ids}


def _key(token: str, start: str, roles: Mapping[str, str]) -> Key:
  if token.startswith(start):
    return "word", token[len(start) :]
  return ("special", roles[token]) if token in roles else ("", token)


def _roles(files: TokenizerFiles) -> dict[str, str]:
  """Returns the role of each special token by its text; a token's first role counts."""
  roles: dict[str, str] = {}
  for name in (vocabulary.SETTINGS, _SPECIAL):
    content = json.loads(files.text(name) or "{}")
    for role in ROLES:
      value = content.get(f"{role}_token")
      text = value.get("content") if isinstance(value, Mapping) else value
      if isinstance(text, str) and role not in roles.values():
        roles.setdefault(text, role)
  return roles


def byte_key(key: Key) -> Key | None:
  """Returns the other key of a one-byte token, `A` or `<0x41>`; None for other tokens.

  >>> byte_key(("", "A")), byte_key(("", "<0x41>")), byte_key(("word", "A"))
  (('', '<0x41>'), ('', 'A'), None)
  """
  kind, text = key
  if kind:
    return None
  if len(text) == 1 and ord(text) < 256:
    return "", f"<0x{ord(text):02X}>"
  if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
    try:
      return "", chr(int(text[3:-1], 16))
    except ValueError:
      return None
  return None


def prefix_keys(key: Key) -> Iterator[Key]:
  """Yields the keys of a token's proper prefixes, longest first; none for a special token.

  >>> list(prefix_keys(("word", "abc")))
  [('word', 'ab'), ('word', 'a')]
  """
  kind, text = key
  for end in range(len(text) - 1, 0, -1) if kind != "special" else ():
    if not text[:end].strip():
      return
    yield kind, text[:end]
