"""A folder of weights that grows: shards that are laid out before, and a journal of what is done.

A crash at any moment leaves a folder from which the work goes on: a tensor counts as done when its
bytes are synced and its line is in the journal, and when it still has the checksum of that line.
Where NaN and infinity were let pass, the line says so: it does not count where they are refused.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import math
import os
import pathlib
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple  # Any: digests are plain JSON.

import numpy as np
import xxhash

from jaxmerge.io import atomic, folder, lock, pages, safetensors
from jaxmerge.io.pages import PagedFile
from jaxmerge.io.tensor import Tensor

NAME = "journal.jsonl"
SYNCED = 2**28  # Bytes that are written before they are synced, and written down as done.
UNCHECKED = {"nonfinite": "allowed"}  # In the line of a tensor whose inputs may have NaN.
Kinds = Mapping[str, tuple[np.dtype, tuple[int, ...]]]


class _Shards(NamedTuple):
  """The files of weights that are being written, and those among them that are not synced."""

  files: Mapping[str, PagedFile]
  places: Mapping[str, tuple[str, safetensors.Entry]]
  unsynced: set[str]

  @classmethod
  @contextlib.contextmanager
  def opened(
    cls, part: pathlib.Path, kinds: Kinds, shards: Mapping[str, Sequence[str]]
  ) -> Iterator[_Shards]:
    """Makes the files in their full length, so that a full disk is known now and not later."""
    files, places = dict[str, PagedFile](), {}
    try:
      for file, names in shards.items():
        own = {folder.inner(file, n): kinds[n] for n in names}
        first, entries = safetensors.layout(own, {"format": "pt"}, align=pages.PAGE)
        length = max((e.stop for e in entries.values()), default=len(first))
        with atomic.room(part / file, f" for its {length:,} bytes"):
          (part / file).parent.mkdir(exist_ok=True)
          files[file] = PagedFile(part / file)
          os.posix_fallocate(files[file].handle, 0, length)
          os.truncate(files[file].handle, length)
        files[file].write(memoryview(first), 0)
        places.update({n: (file, entries[folder.inner(file, n)]) for n in names})
      yield cls(files, places, set(files))
    finally:
      for opened in files.values():
        opened.close()

  def write(self, name: str, start: int, part: np.ndarray) -> None:
    """Writes entries start, start + 1, ... of a tensor."""
    file, entry = self.places[name]
    self.unsynced.add(file)
    data = np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
    self.files[file].write(data, entry.start + start * entry.dtype.itemsize)

  def read(self, name: str, start: int, out: np.ndarray) -> None:
    """Reads entries of a tensor back."""
    file, entry = self.places[name]
    self.files[file].read(out.view(np.uint8).data, entry.start + start * entry.dtype.itemsize)

  def digest(self, name: str) -> str:
    """Reads a tensor back, and returns its checksum."""
    file, entry = self.places[name]
    found, at = xxhash.xxh3_128(), entry.start
    while at < entry.stop:
      part = os.pread(self.files[file].handle, min(2**22, entry.stop - at), at)
      if not part:
        break
      found.update(part)
      at += len(part)
    return found.hexdigest()

  def sync(self) -> None:
    """Brings what was written to the disk."""
    while self.unsynced:
      self.files[self.unsynced.pop()].sync()


def part_of(out: pathlib.Path) -> pathlib.Path:
  """Returns the folder in which what shall be at `out` grows.

  >>> part_of(pathlib.Path("models/merged")).name
  '.merged.merging'
  """
  return out.with_name(f".{out.name}.merging")


def stage_of(out: pathlib.Path, name: str) -> pathlib.Path:
  """Returns the folder of what is made first, and that `out` is made of.

  >>> stage_of(pathlib.Path("models/merged"), "halves").name
  '.merged.halves.stage'
  """
  return out.with_name(f".{out.name}.{name}.stage")


def free(out: pathlib.Path) -> int | None:
  """Returns how many bytes are free on the disk of a folder that is still to be made, if known."""
  there = next(p for p in out.absolute().parents if p.is_dir())
  usage = shutil.disk_usage(there)
  return usage.free if usage.total else None


def check_room(out: pathlib.Path, needed: int, *, begun: Iterable[pathlib.Path] = ()) -> None:
  """Raises OSError where a disk has no room for what shall be at `out`.

  Args:
    out: a folder that is still to be made.
    needed: bytes that it takes while it is made.
    begun: folders in which a part of these is already.
  """
  files = [p for own in begun for p in own.rglob("*") if p.is_file()]
  left = needed - sum(p.stat().st_size for p in files)
  room = free(out)
  if room is not None and left > room:
    text = f"{left:,} bytes are to be written, but {room:,} are free on the disk; free some, or "
    raise OSError(errno.ENOSPC, f"{text}give another place", str(out))


@contextlib.contextmanager
def opened(
  part: pathlib.Path,
  kinds: Kinds,
  shards: Mapping[str, Sequence[str]],
  identity: str,
  *,
  journal: str = NAME,
  checked: Collection[str] | None = None,
  nonfinite: bool = False,
) -> Iterator[Growing]:
  """Opens the weights of a folder for writing: those of an interrupted merge, or new ones.

  Args:
    part: the folder.
    kinds: dtype and shape of every tensor.
    shards: file to its tensors.
    identity: of the merge.
    journal: name of the journal that is continued; all that are there are read.
    checked: tensors whose checksums are compared, before they count as done; all by default.
    nonfinite: whether NaN and infinity are let pass.

  Raises:
    ValueError: where the folder holds another merge.
    atomic.Full: where there is no room for the files.
  """
  _begin(part / journal, identity)
  digests = noted(part, identity)
  with _Shards.opened(part, kinds, shards) as files:
    own = {n for n, digest in digests.items() if counts(digest, nonfinite)}
    own &= own if checked is None else set(checked)
    whole = {n: digests[n] for n in own if files.digest(n) == digests[n]["xxh3_128"]}
    yield Growing(part / journal, files, whole, UNCHECKED if nonfinite else {})


def counts(digest: Mapping[str, Any], nonfinite: bool) -> bool:
  """Tells whether a tensor that is done is so for a merge that lets NaN pass, or does not.

  >>> counts({"xxh3_128": "0a"}, False), counts({"xxh3_128": "0a", **UNCHECKED}, False)
  (True, False)
  """
  return nonfinite or not UNCHECKED.items() <= digest.items()


def journal(index: int) -> str:
  """Returns the name of the journal of one of many processes.

  >>> journal(0), journal(3)
  ('journal.jsonl', 'journal-3.jsonl')
  """
  return NAME if index == 0 else f"journal-{index}.jsonl"


def journals(part: pathlib.Path) -> list[pathlib.Path]:
  """Returns the journals of a folder: one of each process that has merged there."""
  return sorted(part.glob("journal*.jsonl"))


def noted(part: pathlib.Path, identity: str) -> dict[str, Any]:
  """Returns what the journals of a folder say is done, by tensor."""
  found: dict[str, Any] = {}
  for path in journals(part):
    records = _records(path)
    if records and records[0] != {"plan": identity}:
      raise other(part)
    for record in records[1:]:
      name = record.pop("tensor")
      if name not in found or counts(record, False):
        found[name] = record
  return found


def _begin(path: pathlib.Path, identity: str) -> None:
  """Begins a journal, unless it is that of an interrupted merge: its last line may be torn."""
  records = _records(path) if path.exists() else []
  if not records:
    with atomic.write(path) as file:
      file.write(json.dumps({"plan": identity}).encode() + b"\n")
  elif records[0] != {"plan": identity}:
    raise other(path.parent)
  elif (torn := path.read_bytes()).rfind(b"\n") + 1 < len(torn):
    os.truncate(path, torn.rfind(b"\n") + 1)


def _records(path: pathlib.Path) -> list[dict[str, Any]]:
  """The lines of a journal that are whole."""
  lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
  return [json.loads(line) for line in lines if line.endswith("\n")]


def other(part: pathlib.Path) -> ValueError:
  """Returns the error for a folder in which another merge was interrupted."""
  return ValueError(
    f"{part} holds an interrupted merge of other inputs or settings; give its settings to go "
    "on with it, resume=False (--resume=never) to drop it, or another place for the result."
  )


class Growing:
  """Weights that are being written, and the journal of those that are done.

  Attributes:
    places: tensor to its file and where it lies there.
    digests: tensors that are done to {"xxh3_128": checksum, "inputs": {where: checksum}} and the
      mark: a line each of the journal, and on the disk as they were written.
  """

  def __init__(
    self,
    path: pathlib.Path,
    shards: _Shards,
    digests: dict[str, Any],
    mark: Mapping[str, str],
  ):
    self.path, self.digests, self.places, self.mark = path, digests, shards.places, mark
    self._shards = shards
    self._waiting: dict[str, Any] = {}
    self._unsynced = 0
    self._hash: Any = None

  def add(self, name: str, start: int, part: np.ndarray, inputs: Mapping[str, str]) -> None:
    """Writes a part of a tensor; parts come in order.

    Args:
      name: the tensor.
      start: entries of it before this part.
      part: entries.
      inputs: checksums of what the whole tensor is made of, by where it is from; the last part's
        are taken.
    """
    if start == 0:
      self._hash = xxhash.xxh3_128()
    flat = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
    self._hash.update(flat.data)
    self._shards.write(name, start, part)
    self._unsynced += part.nbytes
    if start + part.size == math.prod(self.places[name][1].shape):
      digest = self._hash.hexdigest()
      self._waiting[name] = {"xxh3_128": digest, "inputs": dict(inputs), **self.mark}
      if self._unsynced >= SYNCED:
        self.flush()

  def tensor(self, name: str) -> Tensor:
    """Returns a tensor that is done, to be read back."""
    file, entry = self.places[name]
    read = functools.partial(self._shards.read, name)
    return Tensor(f"{self.path.parent / file}: tensor {name!r}", entry.dtype, entry.shape, read)

  def flush(self) -> None:
    """Brings what was written to the disk, then the lines that say so."""
    self._shards.sync()
    with atomic.room(self.path), open(self.path, "a", encoding="utf-8") as file:
      for name, digest in self._waiting.items():
        file.write(json.dumps({"tensor": name, **digest}) + "\n")
      file.flush()
      os.fsync(file.fileno())
    self.digests |= self._waiting
    self._waiting, self._unsynced = {}, 0


def locked(out: pathlib.Path) -> contextlib.AbstractContextManager[None]:
  """Keeps a second process from merging to the same place: it is told so, and changes nothing."""
  return lock.held(out, running(out))


def running(out: pathlib.Path) -> str:
  """Returns what a second process is told."""
  return f"{out}: another process is merging to this place; wait for it, or give another place."
