"""Writes a folder of weights: preallocated shards, and a journal of finished tensors.

A merge can resume after a crash at any moment. A tensor counts as done if its bytes are synced, its
line is in the journal, and it still has the checksum of that line. A line also says whether NaN and
infinity were allowed; if so, it does not count for a merge that refuses them.
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
from typing import Any  # Any: digests are plain JSON.

import numpy as np
import xxhash

from jaxmerge.io.disk import atomic, locks, strict_json
from jaxmerge.io.huggingface import shards as shard_files
from jaxmerge.io.tensors.tensor import Tensor

NAME = "journal.jsonl"
SYNCED = 2**28  # Bytes between two syncs, after which tensors are recorded as done.
UNCHECKED = {"nonfinite": "allowed"}  # Part of the line of a tensor whose inputs may have NaN.
Stamps = Mapping[str, Sequence[int]]  # Stamps of files by path, as plain JSON.


def unfinished_folder(out: pathlib.Path) -> pathlib.Path:
  """Returns the folder in which the result for `out` is written.

  >>> unfinished_folder(pathlib.Path("models/merged")).name
  '.merged.merging'
  """
  return out.with_name(f".{out.name}.merging")


def intermediate_folder(out: pathlib.Path, name: str) -> pathlib.Path:
  """Returns the folder of an intermediate result that `out` is merged from.

  >>> intermediate_folder(pathlib.Path("models/merged"), "halves").name
  '.merged.halves.stage'
  """
  return out.with_name(f".{out.name}.{name}.stage")


def free(out: pathlib.Path) -> int | None:
  """Returns the free bytes on the disk of a folder that need not exist yet; None if unknown."""
  there = next(p for p in out.absolute().parents if p.is_dir())
  usage = shutil.disk_usage(there)
  return usage.free if usage.total else None


def check_room(out: pathlib.Path, needed: int, *, begun: Iterable[pathlib.Path] = ()) -> None:
  """Raises OSError if the disk has no room for the result at `out`.

  Args:
    out: the folder to be written.
    needed: bytes that it takes while it is written.
    begun: folders with files that are already written, which count.
  """
  files = [p for folder in begun for p in folder.rglob("*") if p.is_file()]
  left = needed - sum(p.stat().st_size for p in files)
  available = free(out)
  if available is not None and left > available:
    text = (
      f"{left:,} bytes are to be written, but {available:,} are free on the disk; free some, or "
    )
    raise OSError(errno.ENOSPC, f"{text}choose another place", str(out))


@contextlib.contextmanager
def open_writer(
  directory: pathlib.Path,
  kinds: shard_files.Kinds,
  shards: Mapping[str, Sequence[str]],
  identity: str,
  *,
  inputs: Stamps | None = None,
  journal: str = NAME,
  checked: Collection[str] | None = None,
  nonfinite: bool = False,
) -> Iterator[ShardWriter]:
  """Opens the weights of a folder for writing: those of an interrupted merge, or new ones.

  Args:
    directory: the folder to write.
    kinds: dtype and shape of every tensor.
    shards: tensors of each file.
    identity: identity of the merge.
    inputs: stamps of the files that are read.
    journal: name of the journal to append to; all journals of the folder are read.
    checked: tensors whose checksums are compared before they count as done; None: all.
    nonfinite: whether NaN and infinity are allowed.

  Raises:
    ValueError: if the folder is that of another merge.
    atomic.Full: if there is no room for the files.
  """
  inputs = inputs or {}
  _begin(directory / journal, identity, inputs)
  digests = read_journals(directory, identity)
  changed = any(before != inputs for before in stamps(directory))
  with shard_files.open_shards(directory, kinds, shards) as files:
    names = {n for n, digest in digests.items() if counts_as_done(digest, nonfinite)}
    names &= kinds.keys() if checked is None else kinds.keys() & set(checked)
    whole = {n: digests[n] for n in names if files.digest(n) == digests[n]["xxh3_128"]}
    mark = UNCHECKED if nonfinite else {}
    yield ShardWriter(directory / journal, files, whole, mark, inputs if changed else None)


def counts_as_done(digest: Mapping[str, Any], nonfinite: bool) -> bool:
  """Returns whether a tensor of the journal is done, for a merge that allows NaN or refuses it.

  >>> digest = {"xxh3_128": "0a"}
  >>> counts_as_done(digest, False), counts_as_done({**digest, **UNCHECKED}, False)
  (True, False)
  """
  return nonfinite or not UNCHECKED.items() <= digest.items()


def journal(index: int) -> str:
  """Returns the name of the journal of one of many processes.

  >>> journal(0), journal(3)
  ('journal.jsonl', 'journal-3.jsonl')
  """
  return NAME if index == 0 else f"journal-{index}.jsonl"


def journals(directory: pathlib.Path) -> list[pathlib.Path]:
  """Returns the journals of a folder: one per process that has merged there."""
  return sorted(directory.glob("journal*.jsonl"))


def read_journals(directory: pathlib.Path, identity: str) -> dict[str, Any]:
  """Returns the records of finished tensors by name, from the journals of a folder."""
  done: dict[str, Any] = {}
  for path in journals(directory):
    records = _records(path)
    if records and records[0] != {"plan": identity}:
      raise other_merge(directory)
    for record in records:
      if "tensor" in record:
        name = record.pop("tensor")
        if name not in done or counts_as_done(record, False):
          done[name] = record
  return done


def stamps(directory: pathlib.Path) -> list[Stamps | None]:
  """Returns the stamps of the inputs for each journal of a folder."""
  stamped = ([r for r in _records(path) if "stamps" in r] for path in journals(directory))
  return [records[-1]["stamps"] if records else None for records in stamped]


def vouch(directory: pathlib.Path, identity: str, inputs: Stamps) -> None:
  """Records the stamps of the inputs in the journal of a complete folder."""
  _begin(directory / NAME, identity, inputs)


def _begin(path: pathlib.Path, identity: str, inputs: Stamps) -> None:
  """Starts a journal, or continues that of an interrupted merge without its torn last line."""
  records = _records(path) if path.exists() else []
  if not records:
    lines = [json.dumps({"plan": identity}), json.dumps({"stamps": inputs})]
    with atomic.write(path) as file:
      file.write(("\n".join(lines) + "\n").encode())
  elif records[0] != {"plan": identity}:
    raise other_merge(path.parent)
  elif (torn := path.read_bytes()).rfind(b"\n") + 1 < len(torn):
    os.truncate(path, torn.rfind(b"\n") + 1)


_KINDS: Mapping[str, Mapping[str, type]] = {
  "plan": {"plan": str},
  "stamps": {"stamps": dict},
  "job": {"job": int, "xxh3_128": str},
  "tensor": {"tensor": str, "xxh3_128": str, "inputs": dict},
}


def _records(path: pathlib.Path) -> list[dict[str, Any]]:
  """Reads the complete lines of a journal.

  Raises:
    ValueError: naming the file and the line that is damaged.
  """
  *lines, _ = path.read_bytes().split(b"\n")
  records = []
  for number, line in enumerate(lines, start=1):
    where = f"{path}: line {number}"
    try:
      record = strict_json.parse(where, line)
      kind = _KINDS[next((k for k in _KINDS if k in record), "plan")]
      if any(type(record.get(key)) is not value_type for key, value_type in kind.items()):
        raise ValueError(f"{where}: {line[:80].decode()!r} is not a line of a journal.")
    except ValueError as error:
      anew = "resume=False (--resume=never) discards the unfinished merge and starts anew"
      raise ValueError(f"{error} The journal was damaged: {anew}.") from error
    records.append(record)
  return records


def other_merge(directory: pathlib.Path) -> ValueError:
  """Returns the error for a folder in which another merge was interrupted."""
  return ValueError(
    f"{directory} has an interrupted merge of other inputs or settings; use its settings to resume "
    "it, resume=False (--resume=never) to discard it, or another place for the result."
  )


class Replaced(ValueError):
  """An input has changed since a part of the result was merged from it."""

  def __init__(self, directory: pathlib.Path, where: str):
    super().__init__(
      f"{where}: has changed since the merge in {directory}, which has used it, was interrupted; "
      "restore it to resume, or start anew with resume=False (--resume=never)."
    )


class ShardWriter:
  """Writes tensors into shards, and records finished tensors in the journal.

  Attributes:
    places: file and position of each tensor.
    digests: by finished tensor, its record in the journal: {"xxh3_128": checksum, "inputs":
      {where: checksum}} and the mark for NaN.
    unverified: whether the inputs' stamps differ from those in the journal; then call `vouch` once
      their checksums are compared.
  """

  def __init__(
    self,
    path: pathlib.Path,
    shards: shard_files.Shards,
    digests: dict[str, Any],
    mark: Mapping[str, str],
    inputs: Stamps | None,
  ):
    self.path, self.digests, self.places, self.mark = path, digests, shards.places, mark
    self.unverified = inputs is not None
    self._inputs = inputs
    self._shards = shards
    self._jobs = {r["job"]: r["xxh3_128"] for r in _records(path) if "job" in r}
    self._lines: list[dict[str, Any]] = []
    self._waiting: dict[str, Any] = {}
    self._unsynced = 0
    self._hash: Any = None

  def vouch(self) -> None:
    """Records that the finished tensors were merged from the present inputs."""
    if self._inputs is not None:
      self._append([{"stamps": self._inputs}])
    self._inputs = None

  def record_measurement(self, job: int, digest: str, done: Collection[str]) -> None:
    """Records the checksum of the inputs of a job's reductions, before its first tensor is written.

    Args:
      job: number of the job.
      digest: checksum of all its inputs.
      done: its finished tensors.

    Raises:
      Replaced: if these were merged with reductions of other inputs.
    """
    if done and self._jobs.get(job, digest) != digest:
      raise Replaced(self.path.parent, f"an input of job {job + 1}")
    if self._jobs.get(job) != digest:
      self._jobs[job] = digest
      self._lines.append({"job": job, "xxh3_128": digest})

  def add(self, name: str, start: int, part: np.ndarray, inputs: Mapping[str, str]) -> None:
    """Writes a part of a tensor; parts come in order.

    Args:
      name: the tensor.
      start: number of entries before this part.
      part: the entries.
      inputs: checksums of the inputs of the whole tensor, by their position on disk; those of the
        last part count.
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
    """Returns a finished tensor, which is read from disk."""
    file, entry = self.places[name]
    read = functools.partial(self._shards.read, name)
    return Tensor(f"{self.path.parent / file}: tensor {name!r}", entry.dtype, entry.shape, read)

  def flush(self) -> None:
    """Syncs the shards, then records their tensors in the journal."""
    self._shards.sync()
    tensors = ({"tensor": name, **record} for name, record in self._waiting.items())
    self._append([*self._lines, *tensors])
    self.digests |= self._waiting
    self._lines, self._waiting, self._unsynced = [], {}, 0

  def _append(self, records: Iterable[Mapping[str, Any]]) -> None:
    with atomic.room(self.path), open(self.path, "a", encoding="utf-8") as file:
      for record in records:
        file.write(json.dumps(record) + "\n")
      file.flush()
      os.fsync(file.fileno())


def lock(out: pathlib.Path) -> contextlib.AbstractContextManager[None]:
  """Locks the path of a result: a second process that merges to it fails, and changes nothing."""
  return locks.hold(out, busy_message(out))


def busy_message(out: pathlib.Path) -> str:
  """Returns the error message for a second process."""
  return f"{out}: another process is merging to this place; wait for it, or choose another place."


def strip(directory: pathlib.Path, shards: Mapping[str, Sequence[str]], out_format: str) -> None:
  """Removes the temporary files of a merge from the folder of its result."""
  for path in journals(directory):
    path.unlink()
  for name in [] if out_format == "safetensors" else shards:
    (directory / name).unlink(missing_ok=True)
