"""Caches the last band of each checkpoint, in memory or in a temporary file.

A merge reads parts of all checkpoints in turn, so it needs a band of each. In memory, bands would
grow with the number of checkpoints. So bands beyond `IN_MEMORY` bytes in total go to unnamed files
in $TMPDIR. Each band is still decoded only once.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from typing import BinaryIO

import numpy as np

IN_MEMORY = 2**25


class BandStorage:
  """Stores the entries of one band, in memory or in a file.

  Example:
    >>> storage, out = BandStorage(), np.empty(2, np.float32)
    >>> storage.put(np.arange(5, dtype=np.float32))
    >>> storage.copy(3, out)
    >>> out.tolist()
    [3.0, 4.0]
  """

  def __init__(self) -> None:
    self.entries, self.dtype = np.empty(0), np.dtype(np.float32)
    self.file: BinaryIO | None = None
    self.is_on_disk = False
    _STORAGES.add(self)

  def put(self, entries: np.ndarray) -> None:
    """Replaces the stored band."""
    self.clear()
    others = sum(storage.entries.nbytes for storage in _STORAGES if storage is not self)
    if not others or others + entries.nbytes <= IN_MEMORY:
      self.entries = entries
      return
    if self.file is None:
      self.file = tempfile.TemporaryFile(prefix="jaxmerge-", buffering=0)  # noqa: SIM115
      weakref.finalize(self, self.file.close)  # Closed with this object.
    self.dtype = entries.dtype
    _write_all(self.file.fileno(), np.ascontiguousarray(entries).view(np.uint8).data)
    self.is_on_disk = True

  def copy(self, first: int, out: np.ndarray) -> None:
    """Copies entries from index `first` on."""
    if not self.is_on_disk or self.file is None:
      out[:] = self.entries[first : first + out.size]
      return
    part = np.empty(out.size, self.dtype)
    _read_all(self.file.fileno(), part.view(np.uint8).data, first * part.itemsize)
    out[:] = part

  def clear(self) -> None:
    """Frees the memory; the file is reused for the next band."""
    self.entries, self.is_on_disk = np.empty(0), False


_STORAGES: weakref.WeakSet[BandStorage] = weakref.WeakSet()


def _write_all(file: int, data: memoryview) -> None:
  done = 0
  while done < len(data):
    done += os.pwrite(file, data[done:], done)


def _read_all(file: int, data: memoryview, start: int) -> None:
  done = 0
  while done < len(data):
    if not (count := os.preadv(file, [data[done:]], start + done)):
      raise OSError("the temporary file of a band was cut; is $TMPDIR cleaned while merges run?")
    done += count
