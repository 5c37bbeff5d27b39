"""Matches tensor names across libraries, by known prefixes and parts and by a user's table."""

from __future__ import annotations

from collections.abc import Container, Mapping

# Prefixes that one wrapper of a model adds and another does not.
PREFIXES = (
  "",
  "model.",
  "transformer.",
  "language_model.",
  "model.language_model.",
  "language_model.model.",
  "bert.",
  "roberta.",
)


# Parts of names with two spellings.
_PARTS = ((".block_sparse_moe.", ".mlp."),)


def find(name: str, among: Container[str]) -> str | None:
  """Returns the spelling of a name among others: unchanged, or with another known prefix or part.

  None where there is no such name, or more than one.

  >>> find("model.layers.0.w", {"model.language_model.layers.0.w", "lm_head.weight"})
  'model.language_model.layers.0.w'
  """
  if name in among:
    return name
  pairs = (*_PARTS, *(pair[::-1] for pair in _PARTS))
  spellings = {name, *(name.replace(*pair) for pair in pairs)}
  stems = {n[len(prefix) :] for n in spellings for prefix in PREFIXES if n.startswith(prefix)}
  matches = {prefix + stem for prefix in PREFIXES for stem in stems if prefix + stem in among}
  return matches.pop() if len(matches) == 1 else None


def rename(name: str, table: Mapping[str, str]) -> str:
  """Returns a name with its prefix replaced, by the longest entry that matches.

  An entry is a whole name, or a prefix up to a dot.

  >>> rename("encoder.layer.0.w", {"encoder": "bert.encoder", "enc": "x"})
  'bert.encoder.layer.0.w'
  """
  fits = [old for old in table if name == old or name.startswith(f"{old.removesuffix('.')}.")]
  if not fits:
    return name
  old = max(fits, key=len)
  rest = name[len(old.removesuffix(".")) :]
  new = table[old].removesuffix(".")
  return new + rest if new else rest.removeprefix(".")
