"""Two names of one tensor: what libraries put before it, and what a table of a user's says."""

from __future__ import annotations

from collections.abc import Container, Mapping

# What a name may begin with, beside that of the same tensor in another wrapper of the model.
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


# Parts of a name that are called in two ways.
_PARTS = ((".block_sparse_moe.", ".mlp."),)


def find(name: str, among: Container[str]) -> str | None:
  """Returns a name as it is among others: itself, or one that differs as is known.

  In what it begins with, or in what a part of it is called.

  None where there is none of them, or more than one.

  >>> find("model.layers.0.w", {"model.language_model.layers.0.w", "lm_head.weight"})
  'model.language_model.layers.0.w'
  """
  if name in among:
    return name
  pairs = (*_PARTS, *(pair[::-1] for pair in _PARTS))
  spellings = {name, *(name.replace(*pair) for pair in pairs)}
  stems = {n[len(prefix) :] for n in spellings for prefix in PREFIXES if n.startswith(prefix)}
  found = {prefix + stem for prefix in PREFIXES for stem in stems if prefix + stem in among}
  return found.pop() if len(found) == 1 else None


def rename(name: str, table: Mapping[str, str]) -> str:
  """Returns a name with another beginning: that of the longest entry with which it begins.

  An entry is a whole name, or its beginning up to a dot.

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
