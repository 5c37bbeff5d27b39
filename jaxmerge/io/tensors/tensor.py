"""Lazy tensors, which are read in parts, and the pool of open files that they read from."""

from __future__ import annotations

import collections
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from jaxmerge.io.disk import stamps
from jaxmerge.io.tensors.safetensors import Entry

MOST = 64  # Open files at a time.


class Tensor(NamedTuple):
  """A tensor of a model.

  Attributes:
    where: file and name, for errors.
    dtype: of its entries.
    shape: of the whole.
    read: (start, out) fills `out` [n], of the tensor's dtype, with entries start, start + 1, ...
    store_as: dtype in which a result stores it, where it differs from `dtype`: tensors computed
      from narrow weights are read in float32.
  """

  where: str
  dtype: np.dtype
  shape: tuple[int, ...]
  read: Callable[[int, np.ndarray], None]
  store_as: np.dtype | None = None

  @property
  def stored_dtype(self) -> np.dtype:
    """The dtype in which a result stores it, unless the user chooses another."""
    return self.store_as or self.dtype


class NotYetMade(ValueError):
  """Raised on reading a tensor of a model that does not exist yet."""


class Files:
  """A pool of files open for reading: only the last used ones, as a model may have thousands.

  Attributes:
    stamps: of files, taken before their first byte was read.
  """

  def __init__(self) -> None:
    self.stamps: dict[pathlib.Path, stamps.Stamp] = {}
    self._open: collections.OrderedDict[pathlib.Path, int] = collections.OrderedDict()

  def note(self, paths: Iterable[pathlib.Path]) -> None:
    """Records the stamps of files that are about to be read."""
    if new := [path for path in paths if path not in self.stamps]:
      self.stamps |= stamps.take(new)

  def forget(self, folder: pathlib.Path) -> None:
    """Closes the files of a folder that is about to be rewritten, and drops their stamps."""
    for path in [p for p in self._open if p.is_relative_to(folder)]:
      os.close(self._open.pop(path))
    self.stamps = {p: s for p, s in self.stamps.items() if not p.is_relative_to(folder)}

  def read(self, path: pathlib.Path, position: int, out: np.ndarray) -> int:
    """Reads bytes into a contiguous array; returns their number."""
    handle = self._open.pop(path, None)
    handle = os.open(path, os.O_RDONLY) if handle is None else handle
    self._open[path] = handle
    if len(self._open) > MOST:
      os.close(self._open.popitem(last=False)[1])
    left = out.reshape(-1).view(np.uint8).data
    while left and (count := os.preadv(handle, [left], position)):
      left, position = left[count:], position + count
    return out.nbytes - len(left)

  def close(self) -> None:
    """Closes all files."""
    while self._open:
      os.close(self._open.popitem()[1])


def stored_tensor(
  files: Files, path: pathlib.Path, name: str, entry: Entry, *, home: str | None = None
) -> Tensor:
  """Returns the tensor of a header entry; errors name `home` in place of the file's folder.

  The file's stamp is recorded, if it is not yet.
  """
  files.note((path,))
  where = f"{path if home is None else f'{home}/{path.name}'}: tensor {name!r}"

  def read(start: int, out: np.ndarray) -> None:
    position = entry.start + start * entry.dtype.itemsize
    if files.read(path, position, out) != out.nbytes:
      raise ValueError(f"{where}: the file ended while it was being read; did it change?")

  return Tensor(where, entry.dtype, entry.shape, read)


def compute_dtype(*tensors: Tensor) -> np.dtype:
  """Returns the dtype of computations with tensors: float64 where one of them is, else float32.

  >>> compute_dtype(Tensor("", np.dtype(np.float16), (2,), lambda start, out: None)).name
  'float32'
  """
  return np.result_type(np.float32, *(t.dtype for t in tensors if t.dtype == np.float64))


def widen(tensor: Tensor, dtype: np.dtype) -> Tensor:
  """Returns the same tensor in another dtype."""

  def read(start: int, out: np.ndarray) -> None:
    values = np.empty(out.shape, tensor.dtype)
    tensor.read(start, values)
    out[...] = values

  return tensor if tensor.dtype == dtype else tensor._replace(dtype=dtype, read=read)
