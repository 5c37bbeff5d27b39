"""The weight files of a merge: preallocated with their headers, then filled in any order.

At most `MOST` files are open at a time: the most recently used.
"""

from __future__ import annotations

import collections
import contextlib
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import xxhash

from jaxmerge.io.disk import atomic, direct
from jaxmerge.io.disk.direct import PagedFile
from jaxmerge.io.huggingface import folder
from jaxmerge.io.tensors import safetensors

MOST = 24  # Open files; one with direct I/O takes two handles.
Kinds = Mapping[str, tuple[np.dtype, tuple[int, ...]]]


class Shards:
  """Weight files that are open for writing and for reading back.

  Attributes:
    places: file and position of each tensor.
  """

  def __init__(self, directory: pathlib.Path):
    self.directory, self.places = directory, dict[str, tuple[str, safetensors.Entry]]()
    self._open: collections.OrderedDict[str, PagedFile] = collections.OrderedDict()
    self._unsynced: set[str] = set()
    self._written: dict[str, int] = {}

  def lay_out(self, kinds: Kinds, shards: Mapping[str, Sequence[str]]) -> None:
    """Creates the files with their headers; existing contents stay."""
    for file, names in shards.items():
      tensors = {folder.inner(file, n): kinds[n] for n in names}
      first, entries = safetensors.layout(tensors, {"format": "pt"}, align=direct.PAGE)
      self._make(file, first, max((e.stop for e in entries.values()), default=len(first)))
      self.places.update({n: (file, entries[folder.inner(file, n)]) for n in names})

  def _make(self, file: str, first: bytes, length: int) -> None:
    """Creates a file at its full length, so that a full disk is an error now and not later."""
    path = self.directory / file
    with atomic.room(path, f" for its {length:,} bytes"):
      path.parent.mkdir(exist_ok=True)
      handle = self._file(file).handle
      os.posix_fallocate(handle, 0, length)
      os.truncate(handle, length)
    self._unsynced.add(file)
    self._file(file).write(memoryview(first), 0)

  def write(self, name: str, start: int, part: np.ndarray) -> None:
    """Writes entries start, start + 1, ... of a tensor; parts come in order, each once.

    Raises:
      ValueError: for entries of another dtype, out of order or beyond the tensor.
    """
    file, entry = self.places[name]
    _check(
      f"{self.directory / file}: tensor {name!r}", entry, start, part, self._written.get(name, 0)
    )
    self._unsynced.add(file)
    data = np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
    self._file(file).write(data, entry.start + start * entry.dtype.itemsize)
    self._written[name] = start + part.size

  def read(self, name: str, start: int, out: np.ndarray) -> None:
    """Reads entries of a tensor back from disk."""
    file, entry = self.places[name]
    position = entry.start + start * entry.dtype.itemsize
    if self._file(file).read(out.view(np.uint8).data, position) != out.nbytes:
      raise ValueError(
        f"{self.directory / file}: tensor {name!r} is truncated; did another program change it?"
      )

  def digest(self, name: str) -> str:
    """Returns the checksum of a tensor, which is read back from disk."""
    file, entry = self.places[name]
    hasher, at = xxhash.xxh3_128(), entry.start
    while at < entry.stop:
      part = os.pread(self._file(file).handle, min(2**22, entry.stop - at), at)
      if not part:
        break
      hasher.update(part)
      at += len(part)
    return hasher.hexdigest()

  def sync(self) -> None:
    """Syncs all writes to disk."""
    while self._unsynced:
      file = self._unsynced.pop()
      self._file(file).sync()

  def close(self) -> None:
    """Closes all files."""
    while self._open:
      self._open.popitem()[1].close()

  def _file(self, name: str) -> PagedFile:
    """Returns an open file; closes the least recently used one if too many are open."""
    file = self._open.pop(name, None) or PagedFile(self.directory / name)
    self._open[name] = file
    if len(self._open) > MOST:
      oldest, closed = self._open.popitem(last=False)
      if oldest in self._unsynced:
        closed.sync()
        self._unsynced.discard(oldest)
      closed.close()
    return file


@contextlib.contextmanager
def open_shards(
  directory: pathlib.Path, kinds: Kinds, shards: Mapping[str, Sequence[str]]
) -> Iterator[Shards]:
  """Opens the weight files of a folder; creates missing ones."""
  with contextlib.closing(Shards(directory)) as files:
    files.lay_out(kinds, shards)
    yield files


def _check(
  where: str, entry: safetensors.Entry, start: int, part: np.ndarray, written: int
) -> None:
  """Raises ValueError for entries that do not match the file's header."""
  if part.dtype != entry.dtype:
    raise ValueError(f"{where} is {entry.dtype}, got entries of {part.dtype}: nothing is written.")
  if start not in (0, written) or start + part.size > math.prod(entry.shape):
    raise ValueError(
      f"{where} has {math.prod(entry.shape)} entries, of which {written} are written, got "
      f"{part.size} from {start} on: nothing is written."
    )
