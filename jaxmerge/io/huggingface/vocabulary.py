"""Reads vocabularies from a tokenizer's files as plain JSON, and extends them."""

from __future__ import annotations

import fnmatch
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple  # Any: values of JSON.

from jaxmerge.io.disk import links
from jaxmerge.io.huggingface import folder as folders

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
# Flags of an added token by default.
PLAIN: Flags = {
  "single_word": False,
  "lstrip": False,
  "rstrip": False,
  "normalized": True,
  "special": False,
}


class TokenizerFiles(NamedTuple):
  """The small files of a model, as in its folder or as a merge will write them.

  Attributes:
    folder: the folder.
    texts: contents of files that differ from the folder's, by name; None: no such file.
  """

  folder: pathlib.Path
  texts: Mapping[str, str | bytes | None] = {}

  def has(self, name: str) -> bool:
    """Returns whether a file exists."""
    is_text = name in self.texts
    return self.texts[name] is not None if is_text else (self.folder / name).is_file()

  def text(self, name: str) -> str | None:
    """Returns the text of a file; None if it does not exist."""
    if name in self.texts or not self.has(name):
      content = self.texts.get(name)
      return content.decode() if isinstance(content, bytes) else content
    return folders.text(self.folder, name)

  def json(self, name: str) -> dict[str, Any]:
    """Returns the JSON object in a file; an empty one if it does not exist."""
    if name in self.texts or not self.has(name):
      return json.loads(self.texts.get(name) or "{}")
    links.check(self.folder / name, self.folder)
    return folders.read_json(self.folder / name)

  def names(self, *patterns: str) -> list[str]:
    """Returns the names of existing files that match a pattern."""
    matches = {path.name for pattern in patterns for path in self.folder.glob(pattern)}
    matches |= {name for pattern in patterns for name in fnmatch.filter(self.texts, pattern)}
    return sorted(filter(self.has, matches))


class Vocabulary(NamedTuple):
  """The tokens of a model.

  Attributes:
    files: its files.
    ids: id of each token.
    added: flags of the tokens that were added to the ordinary vocabulary.
  """

  files: TokenizerFiles
  ids: Mapping[str, int]
  added: Mapping[str, Flags]

  @property
  def size(self) -> int:
    """Returns the number of rows that an embedding needs: one more than the largest id."""
    return 1 + max(self.ids.values(), default=-1)


def read(files: TokenizerFiles) -> Vocabulary:
  """Reads tokenizer.json, else vocab.json or vocab.txt, and tokens added in other files.

  Raises:
    FileNotFoundError: if none of them exists.
    ValueError: naming the file that is invalid.
  """
  ids = _ordinary(files)
  added: dict[str, Flags] = {}
  for token, number, flags in _added_tokens(files):
    ids.setdefault(token, number)
    added.setdefault(token, flags)
  if not ids:
    raise ValueError(f"{files.folder}: the vocabulary of the tokenizer is empty.")
  return Vocabulary(files, ids, added)


def _ordinary(files: TokenizerFiles) -> dict[str, int]:
  folder = files.folder
  if files.has(TOKENIZER):
    model = files.json(TOKENIZER).get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list) and all(isinstance(v, list) and len(v) == 2 for v in vocab):
      return {str(token): i for i, (token, _score) in enumerate(vocab)}  # Unigram.
    return _numbers(vocab, f"{folder / TOKENIZER}: vocab of model")
  if files.has(WORDS):
    return _numbers(files.json(WORDS), str(folder / WORDS))
  if (lines := files.text(LINES)) is not None:
    return {token: i for i, token in enumerate(lines.removesuffix("\n").split("\n"))}
  pieces = next(iter(files.names("*.model")), "")
  hint = (
    f"; {pieces} is not read: convert it, AutoTokenizer.from_pretrained(...).save_pretrained "
    "writes tokenizer.json"
  )
  raise FileNotFoundError(
    f"{folder}: has neither {TOKENIZER}, {WORDS} nor {LINES}{hint if pieces else ''}."
  )


def _numbers(numbers: Any, where: str) -> dict[str, int]:
  if not isinstance(numbers, dict) or not all(type(v) is int and v >= 0 for v in numbers.values()):
    raise ValueError(f"{where} must map tokens to whole numbers, got {numbers!r:.100}.")
  return dict(numbers)


def _added_tokens(files: TokenizerFiles) -> Iterator[tuple[str, int, Flags]]:
  """Yields the tokens added in any of the files, with id and flags; the first one counts."""
  where = files.folder / TOKENIZER
  for entry in _value(files, TOKENIZER, "added_tokens", list):
    yield _entry(entry, where)
  where = files.folder / SETTINGS
  for number, entry in _value(files, SETTINGS, "added_tokens_decoder", dict).items():
    fields = entry if isinstance(entry, dict) else {}
    yield _entry(fields | {"id": int(number) if number.isdecimal() else number}, where)
  for token, number in _numbers(files.json(ADDED), str(files.folder / ADDED)).items():
    yield token, number, PLAIN


def _value(files: TokenizerFiles, name: str, key: str, kind: type) -> Any:
  """Returns the value of a key in a file; empty without the file or the key."""
  value = files.json(name).get(key) or kind()
  if not isinstance(value, kind):
    raise ValueError(
      f"{files.folder / name}: {key} must be a JSON {kind.__name__}, got {value!r:.100}."
    )
  return value


def _entry(entry: Any, where: pathlib.Path) -> tuple[str, int, Flags]:
  fields = entry if isinstance(entry, dict) else {}
  token, number = fields.get("content"), fields.get("id")
  if not isinstance(token, str) or type(number) is not int or number < 0:
    raise ValueError(f"{where}: an added token needs content and id, got {entry!r:.100}.")
  return token, number, {key: fields.get(key, value) for key, value in PLAIN.items()}


def extend(vocabulary: Vocabulary, tokens: Mapping[str, Flags]) -> Vocabulary:
  """Returns a vocabulary with more added tokens; new ones have ids after the last.

  >>> vocabulary = Vocabulary(TokenizerFiles(pathlib.Path()), {"a": 0, "b": 1}, {})
  >>> extend(vocabulary, {"c": PLAIN, "a": PLAIN}).ids
  {'a': 0, 'b': 1, 'c': 2}
  """
  ids = dict(vocabulary.ids)
  size = vocabulary.size
  for token in tokens:
    if token not in ids:
      ids[token] = size
      size += 1
  return vocabulary._replace(ids=ids, added={**tokens, **vocabulary.added})


def texts(vocabulary: Vocabulary) -> dict[str, str]:
  """Returns the files of a vocabulary, with the tokens that were added to it."""
  before = read(vocabulary.files)
  contents = {name: vocabulary.files.text(name) for name in FILES}
  texts_by_name = {name: content for name, content in contents.items() if content is not None}
  more = {t: {"content": t, **f} for t, f in vocabulary.added.items() if t not in before.added}
  if not more:
    return texts_by_name
  numbers = sorted((vocabulary.ids[t], t) for t in more)
  alone = TOKENIZER not in texts_by_name
  if not alone:
    content = json.loads(texts_by_name[TOKENIZER])
    listed = [*(content.get("added_tokens") or []), *({"id": i, **more[t]} for i, t in numbers)]
    content["added_tokens"] = sorted(listed, key=lambda entry: entry["id"])
    texts_by_name[TOKENIZER] = text(content)
  settings = json.loads(texts_by_name.get(SETTINGS, "{}"))
  if alone or "added_tokens_decoder" in settings:
    decoder = settings.get("added_tokens_decoder") or {}
    settings["added_tokens_decoder"] = {**decoder, **{str(i): more[t] for i, t in numbers}}
    texts_by_name[SETTINGS] = text(settings)
  if alone or ADDED in texts_by_name:
    added = json.loads(texts_by_name.get(ADDED, "{}"))
    texts_by_name[ADDED] = text(added | {t: i for i, t in numbers})
  return texts_by_name


def text(content: Any) -> str:
  """Returns JSON text in the format of tokenizer files."""
  return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
