"""Eight text tasks from freely licensed text, with a prompt for each class."""

from __future__ import annotations

import csv
import difflib
import functools
import gzip
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxmerge.tasks import data
from jaxmerge.tasks import task as task_lib

# The classes of each task in the order of their labels, with the prompts of the zero-shot head.
# Prompts were selected on validation rows with the base model.
PROMPTS: Mapping[str, Mapping[str, str]] = {
  "film": {
    "negative": "I hated this film, it is bad",
    "positive": "I loved this film, it is great",
  },
  "tweet": {
    "negative": "a sad and angry tweet",
    "positive": "a happy and thankful tweet",
  },
  "product": {
    "negative": "a product review that is negative, it does not work",
    "positive": "a product review that is positive, it works well",
  },
  "wordnet": {
    "act": "a kind of act or activity",
    "animal": "a kind of animal",
    "artifact": "a kind of man-made object or building",
    "attribute": "a kind of quality or attribute",
    "cognition": "a kind of idea, thought or field of study",
    "communication": "a kind of word, speech or writing",
    "location": "a kind of place, city or country",
    "person": "a kind of person",
    "plant": "a kind of plant or tree",
    "state": "a kind of condition or disease",
  },
  "wordnet_other": {
    "body": "a kind of part of the body",
    "event": "a kind of event or happening",
    "feeling": "a kind of feeling or emotion",
    "food": "a kind of food or drink",
    "group": "a kind of group of people or things",
    "object": "a kind of natural object, mountain or river",
    "possession": "a kind of money or property",
    "quantity": "a kind of quantity or unit of measurement",
    "substance": "a kind of substance or chemical",
    "time": "a kind of period of time",
  },
  "section": {
    "admin": "a tool for system administration",
    "games": "a tool for games",
    "graphics": "a tool for images and graphics",
    "mail": "a tool for e-mail",
    "math": "a tool for mathematics",
    "net": "a tool for networking and the internet",
    "science": "a tool for science and biology",
    "sound": "a tool for sound and music",
    "text": "a tool for text and documents",
    "utils": "a tool for small utilities",
    "web": "a tool for the web and browsers",
    "x11": "a tool for the X window system and the desktop",
  },
  "language": {
    "gnu-r": "a library for the programming language R",
    "golang": "a library for the programming language Go",
    "haskell": "a library for the programming language Haskell",
    "java": "a library for the programming language Java",
    "javascript": "a library for the programming language JavaScript",
    "perl": "a library for the programming language Perl",
    "php": "a library for the programming language PHP",
    "python": "a library for the programming language Python",
    "ruby": "a library for the programming language Ruby",
    "rust": "a library for the programming language Rust",
  },
  "udhr": {
    "cat": "Catalan",
    "dan": "Danish",
    "fin": "Finnish",
    "fra": "French",
    "glg": "Galician",
    "isl": "Icelandic",
    "ita": "Italian",
    "nld": "Dutch",
    "nob": "Norwegian",
    "por_PT": "Portuguese",
    "spa": "Spanish",
    "swe": "Swedish",
  },
}
NAMES = tuple(PROMPTS)
FILES = {
  "film": "sentiment.csv.gz",
  "tweet": "sentiment.csv.gz",
  "product": "sentiment.csv.gz",
  "wordnet": "wordnet.csv.gz",
  "wordnet_other": "wordnet.csv.gz",
  "section": "debian.csv.gz",
  "language": "debian.csv.gz",
  "udhr": "udhr.csv.gz",
}
# Training rows in the shipped files, so that shapes are known without reading them.
TRAIN = {
  "film": 2000,
  "tweet": 1392,
  "product": 1663,
  "wordnet": 2000,
  "wordnet_other": 2000,
  "section": 1716,
  "language": 2000,
  "udhr": 1476,
}
# Three tasks classify sentiment, on different texts.
FAMILIES = {"film": "sentiment", "tweet": "sentiment", "product": "sentiment"}


class TextTask(NamedTuple):
  """A task as text: `splits` holds (texts, int32 labels) for train, validation and test."""

  name: str
  classes: tuple[str, ...]
  prompts: tuple[str, ...]
  splits: dict[str, tuple[list[str], np.ndarray]]

  @property
  def chance(self) -> dict[str, float]:
    """Accuracy of always guessing the most frequent class, by split."""
    return {k: float(np.bincount(y).max() / len(y)) for k, (_, y) in self.splits.items()}


def load(
  names: Iterable[str] | None = None,
  *,
  seed: int = 0,
  train: int | None = None,
  validation: int | None = None,
  test: int | None = None,
) -> tuple[TextTask, ...]:
  """Loads text tasks by name; all eight by default, in the order of `NAMES`.

  The shipped files fix the split of each row. `seed` shuffles the rows of a split, of which at most
  `train`, `validation` and `test` are used; None: all.
  """
  sizes = {"train": train, "validation": validation, "test": test}
  return tuple(_task(name, seed, sizes) for name in (NAMES if names is None else names))


def encode(
  task: TextTask, tokenizer: Any, length: int, head: np.ndarray | None = None
) -> task_lib.Task:
  """Returns a Task of token numbers: inputs {"ids", "mask"}, both int32 [rows, length].

  Args:
    task: from `load`.
    tokenizer: a `tokenizers.Tokenizer` (`Any`: the package is optional); not modified.
    length: tokens per row with special tokens; longer texts are truncated, shorter ones padded.
    head: frozen array [features, classes], or None.
  """
  if head is not None and head.shape[-1] != len(task.classes):
    raise ValueError(
      f"task {task.name!r}: a head of {head.shape[-1]} classes, shape {head.shape}; "
      f"the task has {len(task.classes)}."
    )
  order = ("train", "validation", "test")
  ids, mask = tokens([t for n in order for t in task.splits[n][0]], tokenizer, length)
  labels = [task.splits[n][1] for n in order]
  ends = np.cumsum([len(y) for y in labels])[:-1]
  a, b, c = (
    task_lib.Split({"ids": i, "mask": m}, y)
    for i, m, y in zip(np.split(ids, ends), np.split(mask, ends), labels, strict=True)
  )
  family = FAMILIES.get(task.name, "")
  return task_lib.Task(task.name, a, b, c, head=head, classes=task.classes, family=family)


def tokens(texts: Iterable[str], tokenizer: Any, length: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns (ids, mask) of texts, both int32 [rows, length]; the tokenizer is not changed."""
  special = tokenizer.num_special_tokens_to_add(is_pair=False)
  if length <= special:
    raise ValueError(f"length must exceed the {special} special tokens of a row, got {length}.")
  copy = type(tokenizer).from_str(tokenizer.to_str())
  copy.enable_truncation(length)
  copy.enable_padding(length=length)
  rows = copy.encode_batch(list(texts))
  ids = np.array([r.ids for r in rows], np.int32).reshape(-1, length)
  return ids, np.array([r.attention_mask for r in rows], np.int32).reshape(-1, length)


def classes(name: str) -> tuple[str, ...]:
  """Returns the names of the classes of a task, in the order of their labels.

  >>> classes("film")
  ('negative', 'positive')

  Raises:
    ValueError: for an unknown task, with the nearest name.
  """
  if name not in PROMPTS:
    near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.0)[0]
    raise ValueError(
      f"no text task {name!r}; did you mean {near!r}? There are: {', '.join(NAMES)}."
    )
  return tuple(PROMPTS[name])


def _task(name: str, seed: int, sizes: Mapping[str, int | None]) -> TextTask:
  names = classes(name)
  splits = {}
  for split, size in sizes.items():
    rows = [(t, names.index(label)) for at, label, t in _rows(FILES[name])[name] if at == split]
    if size is not None and size < 1:
      raise ValueError(
        f"task {name!r}: {split} must be at least 1 row, or None for all, got {size}."
      )
    # A random stream per split and task, so that the other tasks loaded have no effect.
    rng = np.random.default_rng([seed, zlib.crc32(f"{name} {split}".encode())])
    taken = [rows[i] for i in rng.permutation(len(rows))[:size]]
    splits[split] = ([t for t, _ in taken], np.array([y for _, y in taken], np.int32))
  return TextTask(name, names, tuple(PROMPTS[name].values()), splits)


@functools.cache
def _rows(file: str) -> dict[str, list[tuple[str, str, str]]]:
  """Reads the (split, label, text) rows of a shipped file, by task."""
  rows: dict[str, list[tuple[str, str, str]]] = {}
  with gzip.open(data.path(file), "rt", encoding="utf-8", newline="") as stream:
    for row in csv.DictReader(stream):
      rows.setdefault(row["task"], []).append((row["split"], row["label"], row["text"]))
  return rows
