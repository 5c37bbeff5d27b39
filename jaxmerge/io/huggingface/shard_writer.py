"""Writes a folder of weights: shards that are laid out first, and a journal of what is done.

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
from typing import Any  # Digests are plain JSON.

import numpy as np
import xxhash

from jaxmerge.io.disk import atomic, locks, strict_json
from jaxmerge.io.huggingface import shards as shard_files
from jaxmerge.io.tensors.tensor import Tensor

NAME = "journal.jsonl"
SYNCED = 2**28  # Bytes that are written before they are synced, and recorded as done.
UNCHECKED = {"nonfinite": "allowed"}  # In the line of a tensor whose inputs may have NaN.
Stamps = Mapping[str, Sequence[int]]  # Of files, by path: plain JSON.


def unfinished_folder(out: pathlib.Path) -> pathlib.Path:
  """Returns the folder in which the result for `out` is written.

  >>> unfinished_folder(pathlib.Path("models/merged")).name
  '.merged.merging'
  """
  return out.with_name(f".{out.name}.merging")


def intermediate_folder(out: pathlib.Path, name: str) -> pathlib.Path:
  """Returns the folder of an intermediate result, which `out` is made of.

  >>> intermediate_folder(pathlib.Path("models/merged"), "halves").name
  '.merged.halves.stage'
  """
  return out.with_name(f".{out.name}.{name}.stage")


def free(out: pathlib.Path) -> int | None:
  """Returns how many bytes are free on the disk of a folder that is to be made, if known."""
  there = next(p for p in out.absolute().parents if p.is_dir())
  usage = shutil.disk_usage(there)
  return usage.free if usage.total else None


def check_room(out: pathlib.Path, needed: int, *, begun: Iterable[pathlib.Path] = ()) -> None:
  """Raises OSError where a disk has no room for the result at `out`.

  Args:
    out: a folder that is to be made.
    needed: bytes that it takes while it is written.
    begun: folders in which a part of these is already.
  """
  files = [p for folder in begun for p in folder.rglob("*") if p.is_file()]
  left = needed - sum(p.stat().st_size for p in files)
  available = free(out)
  if available is not None and left > available:
    text = (
      f"{left:,} bytes are to be written, but {available:,} are free on the disk; free some, or "
    )
    raise OSError(errno.ENOSPC, f"{text}give another place", str(out))


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
    directory: the folder that is written.
    kinds: dtype and shape of every tensor.
    shards: file to its tensors.
    identity: of the merge.
    inputs: stamps of the files that are read.
    journal: name of the journal that is continued; all of the folder's are read.
    checked: tensors whose checksums are compared, before they count as done; all by default.
    nonfinite: whether NaN and infinity are let pass.

  Raises:
    ValueError: where the folder holds another merge.
    atomic.Full: where there is no room for the files.
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
  """Returns whether a tensor of the journal is done for a merge that lets NaN pass, or does not.

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
  """Returns the journals of a folder: one of each process that has merged there."""
  return sorted(directory.glob("journal*.jsonl"))


def read_journals(directory: pathlib.Path, identity: str) -> dict[str, Any]:
  """Returns the records of tensors that are done, by name, from the journals of a folder."""
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
  """Returns, for each journal of a folder, the stamps of what its tensors are made of."""
  stamped = ([r for r in _records(path) if "stamps" in r] for path in journals(directory))
  return [records[-1]["stamps"] if records else None for records in stamped]


def vouch(directory: pathlib.Path, identity: str, inputs: Stamps) -> None:
  """Records, in a folder that is complete, which files it was made of."""
  _begin(directory / NAME, identity, inputs)


def _begin(path: pathlib.Path, identity: str, inputs: Stamps) -> None:
  """Begins a journal, unless it is that of an interrupted merge: its last line may be torn."""
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
  """Reads the lines of a journal that are whole.

  Raises:
    ValueError: naming the file, and the line that is not as this module writes it.
  """
  *lines, _ = path.read_bytes().split(b"\n")
  records = []
  for number, line in enumerate(lines, start=1):
    where = f"{path}: line {number}"
    try:
      record = strict_json.parse(where, line)
      kind = _KINDS[next((k for k in _KINDS if k in record), "plan")]
      if any(type(record.get(key)) is not value_type for key, value_type in kind.items()):
        raise ValueError(f"{where}: {line[:80].decode()!r} is no line of a journal.")
    except ValueError as error:
      anew = "resume=False (--resume=never) drops what was done, and starts anew"
      raise ValueError(f"{error} The journal was damaged: {anew}.") from error
    records.append(record)
  return records


def other_merge(directory: pathlib.Path) -> ValueError:
  """Returns the error for a folder in which another merge was interrupted."""
  return ValueError(
    f"{directory} holds an interrupted merge of other inputs or settings; give its settings to go "
    "on with it, resume=False (--resume=never) to drop it, or another place for the result."
  )


class Replaced(ValueError):
  """An input has changed since a part of the result was merged from it."""

  def __init__(self, directory: pathlib.Path, where: str):
    super().__init__(
      f"{where}: is not what it was when the merge in {directory} was interrupted, and a part of "
      "that is made of it; bring it back to go on, or resume=False (--resume=never) starts anew."
    )


class ShardWriter:
  """Writes tensors into shards, and records in the journal which are done.

  Attributes:
    places: tensor to its file and where it lies there.
    digests: tensors that are done to {"xxh3_128": checksum, "inputs": {where: checksum}} and the
      mark: a line each of the journal, and on the disk as they were written.
    unverified: whether the inputs' stamps are others than those of what is done: then `vouch`,
      once their checksums are compared.
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
    """Records that the tensors that are done are merged from the inputs as they are now."""
    if self._inputs is not None:
      self._append([{"stamps": self._inputs}])
    self._inputs = None

  def record_measurement(self, job: int, digest: str, done: Collection[str]) -> None:
    """Records the checksum of all inputs that a job measured, before its first tensor is written.

    Args:
      job: its number.
      digest: of all its inputs.
      done: its tensors that are done.

    Raises:
      Replaced: where these were measured with other inputs.
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
    """Syncs what was written, then records it in the journal."""
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
  """Locks the place of a result: a second process that merges to it fails, and changes nothing."""
  return locks.hold(out, busy_message(out))


def busy_message(out: pathlib.Path) -> str:
  """Returns the error message for a second process."""
  return f"{out}: another process is merging to this place; wait for it, or give another place."


def strip(directory: pathlib.Path, shards: Mapping[str, Sequence[str]], out_format: str) -> None:
  """Removes the files of a folder that are of the merge, and not of its result."""
  for path in journals(directory):
    path.unlink()
  for name in [] if out_format == "safetensors" else shards:
    (directory / name).unlink(missing_ok=True)
