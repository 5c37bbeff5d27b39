"""Domains of text as tasks of next-byte prediction.

A domain is a list of documents. The checksum of a document's name decides its split. Paragraphs
that nearly repeat those of an earlier split are removed. The documents of a split are joined into
one stream of bytes and cut into rows; the label of a byte is the next byte.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import importlib.util
import io
import pathlib
import re
import sysconfig
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxmerge.tasks import data
from jaxmerge.tasks import task as task_lib

SHIPPED = ("english", "germanic", "romance", "slavic")
INSTALLED = ("c", "python")
HEADER = ("document", "text")
SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}  # of the documents
MOST = 1_200_000  # bytes to read of a domain, at most
LONGEST = 100_000  # bytes of a document, at most: a longer one would dominate its domain
WINDOW = 8  # words of a run that counts as shared between two texts
_OTHERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data"}


class Document(NamedTuple):
  """A document: its name, which does not depend on the machine, and its text."""

  name: str
  text: str


class Domain(NamedTuple):
  """A task, and further rows of its domain for pretraining a base; they are not in the task."""

  task: task_lib.Task
  pretrain: task_lib.Split


def load(
  names: Sequence[str] = (*SHIPPED, *INSTALLED),
  *,
  folder: str = "",
  length: int = 128,
  seed: int = 0,
  pretrain: int | None = None,
  train: int | None = None,
  validation: int | None = None,
  test: int | None = None,
) -> tuple[Domain, ...]:
  """Loads domains as tasks of inputs and labels, int32 [rows, length].

  >>> (english,) = load(["english"], train=100)
  >>> inputs, labels = english.task.train
  >>> inputs.shape, bool((inputs[:, 1:] == labels[:, :-1]).all())
  ((100, 128), True)

  Args:
    names: "english" (the Jargon File), "germanic", "romance" and "slavic" (the Universal
      Declaration of Human Rights) ship with the package. "c" reads the installed headers of numpy
      and jaxlib, "python" the standard library. Any other NAME is NAME.csv.gz in `folder`, with
      the columns document and text.
    folder: folder of further domains.
    length: bytes per row.
    seed: selects and orders the rows; the split of a document does not depend on it.
    pretrain: the most training rows to set aside for pretraining; None: none.
    train: the most rows of the split; None: all.
    validation: likewise.
    test: likewise.

  Raises:
    ValueError: for an unknown domain, a malformed file, or a split without rows.
  """
  sizes = {"pretrain": pretrain, "train": train, "validation": validation, "test": test}
  for name, size in {"length": length, **sizes}.items():
    if size is not None and size < 1:
      raise ValueError(f"{name} must be at least 1, got {size}.")
  return tuple(_domain(name, documents(name, folder), length, seed, sizes) for name in names)


def documents(name: str, folder: str = "") -> list[Document]:
  """Reads the documents of a domain, up to `MOST` bytes of them."""
  if folder and (path := pathlib.Path(folder) / f"{name}.csv.gz").is_file():
    return draw(table(path))
  if name in SHIPPED:
    return draw(table(data.path(f"{name}.csv.gz")))
  if name in INSTALLED:
    return _installed(name)
  known = [*SHIPPED, *INSTALLED]
  if folder:
    known += sorted(p.name.removesuffix(".csv.gz") for p in pathlib.Path(folder).glob("*.csv.gz"))
  near = difflib.get_close_matches(name, known, n=1)
  hint = f" did you mean {near[0]!r}?" if near else ""
  where = f"no file {name}.csv.gz in {folder}" if folder else "for others pass `folder`"
  raise ValueError(f"no domain {name!r};{hint} There are {', '.join(known)}; {where}.")


def table(path: pathlib.Path) -> list[Document]:
  """Reads the documents of a file NAME.csv.gz."""
  try:
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
      rows = list(csv.reader(file))
  except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
    raise ValueError(f"{path}: not a gzipped CSV file of UTF-8 text: {error}.") from error
  if not rows or tuple(rows[0]) != HEADER:
    raise ValueError(f"{path}: the first line must be {','.join(HEADER)}, got {rows[:1]!r:.80}.")
  for number, row in enumerate(rows[1:], start=2):
    if len(row) != len(HEADER):
      raise ValueError(f"{path}: record {number} has {len(row)} columns, not {len(HEADER)}.")
  return [Document(*row) for row in rows[1:]]


def write(path: pathlib.Path, documents: Iterable[Document]) -> None:
  """Writes a file that `table` reads; the same documents give the same bytes."""
  buffer = io.StringIO()
  writer = csv.writer(buffer, lineterminator="\n")
  writer.writerows([HEADER, *documents])
  path.write_bytes(gzip.compress(buffer.getvalue().encode(), 9, mtime=0))


def draw(documents: Iterable[Document], most: int = MOST) -> list[Document]:
  """Returns documents in a random order, up to `most` bytes, without those over `LONGEST`."""
  out, total = [], 0
  for document in sorted(documents, key=lambda d: _place(d.name)):
    size = len(document.text.encode())
    if size <= LONGEST and total + size <= most:
      out.append(document)
      total += size
  return out


def split_of(name: str) -> str:
  """Returns the split of a document: about 70 % train, 10 % validation, 20 % test."""
  share = zlib.crc32(f"split of {name}".encode()) / 2**32
  if share < SHARES["train"]:
    return "train"
  return "validation" if share < SHARES["train"] + SHARES["validation"] else "test"


def split_documents(documents: Iterable[Document], share: float = 0.5) -> dict[str, list[Document]]:
  """Returns the documents by split, without near copies of paragraphs of an earlier split.

  A near copy shares at least `share` of its runs of eight words with an earlier split.
  """
  seen: set[int] = set()
  out: dict[str, list[Document]] = {split: [] for split in SHARES}
  ordered = sorted(documents, key=lambda d: d.name)
  for split, chosen in out.items():
    runs: set[int] = set()
    for document in (d for d in ordered if split_of(d.name) == split):
      paragraphs = re.split(r"\n\s*\n", document.text)
      hashes = [_runs(p) for p in paragraphs]
      left = [
        p
        for p, r in zip(paragraphs, hashes, strict=True)
        if not r or len(r & seen) < share * len(r)
      ]
      chosen += [Document(document.name, "\n\n".join(left))] * any(map(str.strip, left))
      runs |= set().union(*hashes)
    seen |= runs
  return out


def rows(documents: Iterable[Document], length: int) -> task_lib.Split:
  """Joins documents and cuts them into rows of bytes; labels are the next bytes.

  >>> [x.tolist() for x in rows([Document("a", "abcde")], 2)]
  [[[97, 98], [99, 100]], [[98, 99], [100, 101]]]
  """
  text = "\n\n".join(d.text.strip("\n") for d in documents)
  stream = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
  count = max(len(stream) - 1, 0) // length
  inputs, labels = (stream[i : i + count * length].reshape(count, length) for i in (0, 1))
  return task_lib.Split(inputs, labels)


def _domain(
  name: str, documents: list[Document], length: int, seed: int, sizes: Mapping[str, int | None]
) -> Domain:
  taken = {}
  for split, chosen in split_documents(documents).items():
    whole = rows(chosen, length)
    # A random stream per split and domain, so that the other domains loaded have no effect.
    order = np.random.default_rng([seed, zlib.crc32(f"{name} {split}".encode())])
    at = order.permutation(len(whole.labels))
    if split == "train":
      first = min(sizes["pretrain"] or 0, max(len(at) - 1, 0))
      taken["pretrain"] = task_lib.Split(*(x[at[:first]] for x in whole))
      at = at[first:]
    taken[split] = task_lib.Split(*(x[at[: sizes[split]]] for x in whole))
    if not len(taken[split].labels):
      raise ValueError(
        f"domain {name!r}: its {split} documents, {len(chosen)} of {len(documents)}, have no row "
        f"of {length} bytes; it needs more documents, or shorter rows."
      )
  pretrain = taken.pop("pretrain")
  task = task_lib.Task(name, taken["train"], taken["validation"], taken["test"])
  return Domain(task, pretrain)


def _runs(paragraph: str) -> set[int]:
  """Returns hashes of all runs of words; empty for short texts, which often recur by chance."""
  words = re.findall(r"\w+", paragraph)
  if len(words) < 2 * WINDOW:
    return set()
  return {
    zlib.crc32(" ".join(words[i : i + WINDOW]).encode()) for i in range(len(words) - WINDOW + 1)
  }


def _place(name: str) -> int:
  return zlib.crc32(f"order of {name}".encode())


def _installed(name: str) -> list[Document]:
  """Reads the installed sources of Python, or the headers of packages."""
  if name == "python":
    homes, ending = [pathlib.Path(sysconfig.get_path("stdlib"))], "*.py"
  else:
    homes, ending = [pathlib.Path(np.get_include()), _home("jaxlib") / "include"], "*.h"
  paths = {
    p.relative_to(home).as_posix(): p
    for home in homes
    for p in home.rglob(ending)
    if not _OTHERS & set(p.relative_to(home).parts)
  }
  documents, total = [], 0
  for name in sorted(paths, key=_place):
    size = paths[name].stat().st_size
    if size <= LONGEST and total + size <= MOST:
      documents.append(Document(name, paths[name].read_text(encoding="utf-8", errors="replace")))
      total += size
  return documents


def _home(package: str) -> pathlib.Path:
  spec = importlib.util.find_spec(package)
  if spec is None or spec.origin is None:
    raise ValueError(f"the domain 'c' needs the headers of {package}, which is not installed.")
  return pathlib.Path(spec.origin).parent
