"""Vocabularies of tokenizers, read from their files as plain JSON, and what is added to them."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple  # Any: what JSON holds.

from jaxmerge.io import folder as folders

TOKENIZER = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
ADDED = "added_tokens.json"
WORDS, LINES = "vocab.json", "vocab.txt"
JINJA, JSON = "chat_template.jinja", "chat_template.json"
FILES = (
  TOKENIZER,
  SETTINGS,
  ADDED,
  WORDS,
  LINES,
  "merges.txt",
  "special_tokens_map.json",
  JINJA,
  JSON,
)

Flags = Mapping[str, bool]
# What an added token is like if nothing is said about it.
PLAIN: Flags = {
  "single_word": False,
  "lstrip": False,
  "rstrip": False,
  "normalized": True,
  "special": False,
}


class Vocabulary(NamedTuple):
  """The tokens of a model.

  Attributes:
    folder: where its files lie.
    ids: number of each token.
    added: those that were added to the ordinary vocabulary, with their flags.
  """

  folder: pathlib.Path
  ids: Mapping[str, int]
  added: Mapping[str, Flags]

  @property
  def size(self) -> int:
    """How many rows an embedding needs: one more than the largest number."""
    return 1 + max(self.ids.values(), default=-1)


def read(folder: pathlib.Path) -> Vocabulary:
  """Reads tokenizer.json, else vocab.json or vocab.txt; and the tokens added in other files.

  Raises:
    FileNotFoundError: where there is none of them.
    ValueError: naming the file that is not as it should be.
  """
  ids = _ordinary(folder)
  added: dict[str, Flags] = {}
  for token, number, flags in _added(folder):
    ids.setdefault(token, number)
    added.setdefault(token, flags)
  if not ids:
    raise ValueError(f"{folder}: the vocabulary of the tokenizer is empty.")
  return Vocabulary(folder, ids, added)


def _ordinary(folder: pathlib.Path) -> dict[str, int]:
  if (folder / TOKENIZER).is_file():
    model = folders.read_json(folder / TOKENIZER).get("model")
    found = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(found, list) and all(isinstance(v, list) and len(v) == 2 for v in found):
      return {str(token): i for i, (token, _score) in enumerate(found)}  # Unigram.
    return _numbers(found, f"{folder / TOKENIZER}: vocab of model")
  if (folder / WORDS).is_file():
    return _numbers(folders.read_json(folder / WORDS), str(folder / WORDS))
  if (folder / LINES).is_file():
    lines = (folder / LINES).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    return {token: i for i, token in enumerate(lines)}
  pieces = sorted(path.name for path in folder.glob("*.model"))
  hint = (
    f"; {pieces[0]} is not read: convert it, AutoTokenizer.from_pretrained(...).save_pretrained "
    "writes tokenizer.json"
  )
  raise FileNotFoundError(
    f"{folder}: neither {TOKENIZER}, {WORDS} nor {LINES} is there{hint if pieces else ''}."
  )


def _numbers(found: Any, where: str) -> dict[str, int]:
  if not isinstance(found, dict) or not all(type(v) is int and v >= 0 for v in found.values()):
    raise ValueError(f"{where} must map tokens to whole numbers, got {found!r:.100}.")
  return dict(found)


def _added(folder: pathlib.Path) -> Iterator[tuple[str, int, Flags]]:
  """Tokens added in any of the files, with number and flags; what comes first counts."""
  where = folder / TOKENIZER
  for entry in _part(where, "added_tokens", list):
    yield _entry(entry, where)
  where = folder / SETTINGS
  for number, entry in _part(where, "added_tokens_decoder", dict).items():
    own = entry if isinstance(entry, dict) else {}
    yield _entry(own | {"id": int(number) if number.isdecimal() else number}, where)
  where = folder / ADDED
  if where.is_file():
    for token, number in _numbers(folders.read_json(where), str(where)).items():
      yield token, number, PLAIN


def _part(path: pathlib.Path, key: str, kind: type) -> Any:
  """What a file says under a key; empty without the file or the key."""
  found = (folders.read_json(path) if path.is_file() else {}).get(key) or kind()
  if not isinstance(found, kind):
    raise ValueError(f"{path}: {key} must be a JSON {kind.__name__}, got {found!r:.100}.")
  return found


def _entry(entry: Any, where: pathlib.Path) -> tuple[str, int, Flags]:
  own = entry if isinstance(entry, dict) else {}
  token, number = own.get("content"), own.get("id")
  if not isinstance(token, str) or type(number) is not int or number < 0:
    raise ValueError(f"{where}: an added token needs content and id, got {entry!r:.100}.")
  return token, number, {key: own.get(key, value) for key, value in PLAIN.items()}


def extended(own: Vocabulary, tokens: Mapping[str, Flags]) -> Vocabulary:
  """Returns a vocabulary with more added tokens; those that it lacks are numbered at its end.

  >>> extended(Vocabulary(pathlib.Path(), {"a": 0, "b": 1}, {}), {"c": PLAIN, "a": PLAIN}).ids
  {'a': 0, 'b': 1, 'c': 2}
  """
  ids = dict(own.ids)
  size = own.size
  for token in tokens:
    if token not in ids:
      ids[token] = size
      size += 1
  return own._replace(ids=ids, added={**tokens, **own.added})


def texts(own: Vocabulary) -> dict[str, str]:
  """Returns the files of a vocabulary: those of its folder, with the tokens added since."""
  before = read(own.folder)
  found = {
    name: (own.folder / name).read_text(encoding="utf-8")
    for name in FILES
    if (own.folder / name).is_file()
  }
  more = {t: {"content": t, **f} for t, f in own.added.items() if t not in before.added}
  if not more:
    return found
  numbers = sorted((own.ids[t], t) for t in more)
  alone = TOKENIZER not in found
  if not alone:
    content = json.loads(found[TOKENIZER])
    listed = [*(content.get("added_tokens") or []), *({"id": i, **more[t]} for i, t in numbers)]
    content["added_tokens"] = sorted(listed, key=lambda entry: entry["id"])
    found[TOKENIZER] = text(content)
  settings = json.loads(found.get(SETTINGS, "{}"))
  if alone or "added_tokens_decoder" in settings:
    decoder = settings.get("added_tokens_decoder") or {}
    settings["added_tokens_decoder"] = {**decoder, **{str(i): more[t] for i, t in numbers}}
    found[SETTINGS] = text(settings)
  if alone or ADDED in found:
    found[ADDED] = text(json.loads(found.get(ADDED, "{}")) | {t: i for i, t in numbers})
  return found


def text(content: Any) -> str:
  """Returns JSON as the files of a tokenizer are written."""
  return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
