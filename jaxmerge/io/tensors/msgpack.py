"""Reads files of `flax.serialization` (msgpack) without loading their arrays.

A file is a map of maps. An array is an extension of type 1 with its shape, dtype name and bytes;
arrays over a gigabyte are stored in chunks. Only headers are read; parts of arrays are read later.
"""

from __future__ import annotations

import math
import os
import pathlib
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple  # Any: numbers, text and nested values.

import numpy as np

from jaxmerge.io.tensors import pieces, safetensors
from jaxmerge.io.tensors.safetensors import Entry
from jaxmerge.io.tensors.tensor import Files, Tensor, stored_tensor

ENDING = ".msgpack"
_ARRAY = 1  # Type of the extension; 2 is a complex number, 3 a NumPy scalar in the same layout.
_SCALAR = 3
_CHUNKED = "__msgpack_chunked_array__"
_DEPTH = 64  # Deepest nesting of maps.
_TEXT = 2**16  # Longest name, in bytes.
_DTYPES = {d.name: d for d in safetensors.DTYPES.values()}
# By first byte of texts, bytes, lists and maps: the number of bytes of their length.
_SIZES = {0xD9: 1, 0xDA: 2, 0xDB: 4, 0xC4: 1, 0xC5: 2, 0xC6: 4, 0xDC: 2, 0xDD: 4, 0xDE: 2, 0xDF: 4}
_NUMBERS = {
  0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q",
  0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q",
}  # fmt: skip
_EXTENSIONS = {0xC7: 1, 0xC8: 2, 0xC9: 4}


class Contents(NamedTuple):
  """The contents of a file: arrays by name, `a/b/kernel`, and names of all other values."""

  arrays: dict[str, Tensor]
  others: tuple[str, ...]


class _Array(NamedTuple):
  dtype: np.dtype
  shape: tuple[int, ...]
  start: int  # In the file.


def read(path: str | os.PathLike[str], files: Files) -> Contents:
  """Reads the headers of a file's arrays.

  Args:
    path: path of the file.
    files: open files, from which parts of the arrays are read.

  Raises:
    ValueError: naming the file, and the byte or the array that is damaged.
  """
  path = pathlib.Path(path)
  files.note([path])
  with open(path, "rb") as file:
    walk = _Walk(path, file, path.stat().st_size)
    value = walk.value(0)
    if file.tell() != walk.size:
      raise ValueError(f"{path}: {walk.size - file.tell()} bytes after the last value.")
  if not isinstance(value, dict):
    raise ValueError(f"{path}: must be a map of arrays, got {type(value).__name__}.")
  arrays: dict[str, Tensor] = {}
  others = []
  for name, leaf in _leaves(value, ""):
    if isinstance(leaf, _Array):
      arrays[name] = _tensor(path, name, leaf, files)
    elif isinstance(leaf, dict) and leaf:
      arrays[name] = _chunked(path, name, leaf, files)
    else:
      others.append(name)
  return Contents(arrays, tuple(others))


def _leaves(value: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
  for key, inner in value.items():
    name = f"{prefix}{key}"
    if isinstance(inner, dict) and inner and _CHUNKED not in inner:
      yield from _leaves(inner, f"{name}/")
    else:
      yield name, inner


def _tensor(path: pathlib.Path, name: str, array: _Array, files: Files) -> Tensor:
  size = math.prod(array.shape) * array.dtype.itemsize
  entry = Entry(array.dtype, array.shape, array.start, array.start + size)
  return stored_tensor(files, path, name, entry)


def _chunked(path: pathlib.Path, name: str, value: dict[str, Any], files: Files) -> Tensor:
  """Returns an array that is stored in consecutive chunks."""
  where = f"{path}: tensor {name!r}"
  shape, chunks = (_in_order(value.get(key)) for key in ("shape", "chunks"))
  arrays = [c for c in chunks if isinstance(c, _Array)]
  if not arrays or len(arrays) < len(chunks) or not all(type(n) is int and n >= 0 for n in shape):
    raise ValueError(f"{where}: its chunks or its shape are not in Flax's format.")
  if len({c.dtype for c in arrays}) > 1 or sum(math.prod(c.shape) for c in arrays) != math.prod(
    shape
  ):
    raise ValueError(f"{where}: its {len(arrays)} chunks do not fit its shape {shape}.")
  parts = [_tensor(path, name, c, files) for c in arrays]
  return pieces.concatenate(parts, tuple(shape))


def _in_order(value: Any) -> list[Any]:
  """Returns the values of a map with keys 0, 1, ..., which is how Flax stores lists."""
  if isinstance(value, dict) and all(str(i) in value for i in range(len(value))):
    return [value[str(i)] for i in range(len(value))]
  return value if isinstance(value, list) else []


class _Walk:
  """Parses the values of a file, and skips the bytes of its arrays."""

  def __init__(self, path: pathlib.Path, file: BinaryIO, size: int):
    self.path, self.file, self.size = path, file, size

  def value(self, depth: int) -> Any:
    """Returns a value: a dict, a list, text, a number, None for bytes, or an array's position."""
    if depth > _DEPTH:
      raise ValueError(f"{self.path}: byte {self.file.tell()}: over {_DEPTH} nested maps.")
    head = self._bytes(1)[0]
    if head < 0x80 or head >= 0xE0:
      return head if head < 0x80 else head - 256
    if head in (0xC0, 0xC2, 0xC3):
      return {0xC0: None, 0xC2: False, 0xC3: True}[head]
    if head in _NUMBERS:
      form = _NUMBERS[head]
      return struct.unpack(form, self._bytes(struct.calcsize(form)))[0]
    if head in _EXTENSIONS:
      return self._extension(self._length(_EXTENSIONS[head]), depth)
    if 0xD4 <= head <= 0xD8:
      return self._extension(1 << (head - 0xD4), depth)
    if head not in _SIZES and head >= 0xC0:
      raise self._damaged(f"0x{head:02x} begins no value")
    return self._sized(head, depth)

  def _sized(self, head: int, depth: int) -> Any:
    """Returns a value with a length, which is in its first byte or in the bytes after it."""
    if head < 0xC0:  # The first bits are the kind, and the others the length.
      count = head & (0x1F if head >= 0xA0 else 0x0F)
    else:
      count = self._length(_SIZES[head])
    if 0xA0 <= head < 0xC0 or head in (0xD9, 0xDA, 0xDB):
      return self._text(count)
    if head in (0xC4, 0xC5, 0xC6):
      self._skip(count)
      return None
    if count > self.size - self.file.tell():
      raise self._damaged(f"{count} values are more than the file has bytes")
    if 0x90 <= head < 0xA0 or head in (0xDC, 0xDD):
      return [self.value(depth + 1) for _ in range(count)]
    return self._map(count, depth)

  def _map(self, count: int, depth: int) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for _ in range(count):
      key = self.value(depth + 1)
      if not isinstance(key, str | int) or str(key) in values:
        raise self._damaged(f"{key!r:.100} is not a name, or occurs twice")
      values[str(key)] = self.value(depth + 1)
    return values

  def _extension(self, length: int, depth: int) -> Any:
    """Returns an array's position from its header, and moves past the array."""
    kind = self._bytes(1)[0]
    stop = self.file.tell() + length
    if kind not in (_ARRAY, _SCALAR):
      self._skip(length)
      return None
    if self._bytes(1)[0] != 0x93:
      raise self._damaged("an array must have shape, dtype and bytes")
    shape, name = self.value(depth + 1), self.value(depth + 1)
    if not isinstance(name, str) or name not in _DTYPES or not isinstance(shape, list):
      raise self._damaged(f"an array of {shape!r:.100} {name!r:.100} cannot be read")
    head = self._bytes(1)[0]
    start_count = self._length(_SIZES[head]) if head in (0xC4, 0xC5, 0xC6) else -1
    array = _Array(_DTYPES[name], tuple(shape), self.file.tell())
    if not all(type(n) is int and 0 <= n < safetensors.LARGEST for n in shape) or (
      start_count != math.prod(shape) * array.dtype.itemsize or array.start + start_count != stop
    ):
      raise self._damaged(f"an array of {shape!r:.100} {name} has {start_count} bytes")
    self._skip(start_count)
    return array

  def _text(self, count: int) -> str:
    if count > _TEXT:
      raise self._damaged(f"a name of {count} bytes")
    try:
      return self._bytes(count).decode()
    except UnicodeDecodeError as error:
      raise self._damaged("a name is not UTF-8 text") from error

  def _length(self, size: int) -> int:
    return int.from_bytes(self._bytes(size), "big")

  def _bytes(self, count: int) -> bytes:
    data = self.file.read(count)
    if len(data) < count:
      raise ValueError(f"{self.path}: the file ends within a value; it is truncated.")
    return data

  def _skip(self, count: int) -> None:
    if self.file.tell() + count > self.size:
      raise ValueError(f"{self.path}: the file ends within a value; it is truncated.")
    self.file.seek(count, os.SEEK_CUR)

  def _damaged(self, what: str) -> ValueError:
    return ValueError(
      f"{self.path}: byte {self.file.tell()}: {what}; the file is damaged, or not written by "
      "flax.serialization."
    )
