"""Safetensors files, checked strictly before a byte of a tensor is read.

The format: eight bytes with the length of a JSON header, the header (per tensor a dtype, a shape
and two offsets; free text under `__metadata__`), then the tensors' bytes without gaps. bfloat16 and
the 8-bit floats are the dtypes of `ml_dtypes`. Reading and writing are implemented here: the errors
of the `safetensors` package do not name the tensor, its NumPy side refuses scalars, and a full disk
must leave nothing behind.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple  # Any: unchecked JSON.

import ml_dtypes
import numpy as np

from jaxmerge.io.disk import atomic, strict_json

Path = str | os.PathLike[str]

DTYPES: Mapping[str, np.dtype] = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
  "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32),
  "I16": np.dtype(np.int16),
  "I8": np.dtype(np.int8),
  "U64": np.dtype(np.uint64),
  "U32": np.dtype(np.uint32),
  "U16": np.dtype(np.uint16),
  "U8": np.dtype(np.uint8),
  "BOOL": np.dtype(np.bool_),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
LONGEST_HEADER = strict_json.LONGEST  # A longer one is a damaged or hostile file.
MOST_AXES = 64  # NumPy's limit.
LARGEST = 2**63  # Sizes and positions fit 64 bits.


class Entry(NamedTuple):
  """The place of a tensor in a file: `start` and `stop` count from the beginning of the file."""

  dtype: np.dtype
  shape: tuple[int, ...]
  start: int
  stop: int


class Header(NamedTuple):
  """The header of a file: its tensors, in the order of their bytes, and its metadata."""

  tensors: dict[str, Entry]
  metadata: dict[str, str]


def header(path: Path) -> Header:
  """Reads and checks the header of a file.

  Raises:
    FileNotFoundError: where there is no file.
    ValueError: naming the file, and the tensor where one is at fault: truncated, not JSON, a header
      that is too long, names that are not text, unknown dtypes, shapes that do not fit their bytes
      or have too many axes, gaps and overlaps.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"{path}: no such file.")
  size = path.stat().st_size
  with open(path, "rb") as file:
    first = file.read(8)
    length = int.from_bytes(first, "little")
    if len(first) < 8:
      raise ValueError(f"{path}: {size} bytes are too few for a safetensors file; it is truncated.")
    if first == b"version ":
      raise ValueError(
        f"{path}: this is a Git LFS pointer, not the weights; `git lfs pull` in its "
        "folder fetches them."
      )
    if length > LONGEST_HEADER:
      raise ValueError(
        f"{path}: the header claims a length of {length} bytes, over the limit of "
        f"{LONGEST_HEADER}; this is no safetensors file."
      )
    if 8 + length > size:
      raise ValueError(
        f"{path}: the header ends at byte {8 + length}, but the file has {size}; it is truncated."
      )
    content = strict_json.parse(f"{path}: the header", file.read(length))
  metadata = content.pop("__metadata__", {})
  if not _is_text(metadata):
    raise ValueError(f"{path}: __metadata__ must map text to text, got {metadata!r:.200}.")
  entries = {name: _entry(path, name, x, 8 + length) for name, x in content.items()}
  entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
  _check_layout(path, entries, 8 + length, size)
  return Header(entries, metadata)


def load(path: Path) -> dict[str, np.ndarray]:
  """Reads all tensors of a file by name, in the order of their bytes.

  >>> load("model.safetensors")["pooler.dense.bias"].shape  # doctest: +SKIP
  (384,)
  """
  entries = header(path).tensors
  with open(path, "rb") as file:
    return {name: _read(file, path, name, entry) for name, entry in entries.items()}


def save(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
  """Writes tensors to a file, in their order and atomically.

  Args:
    path: of the file; a file that is there is replaced.
    tensors: arrays by name (whatever NumPy reads as an array).
    metadata: text by key, for the header. Other tools require {"format": "pt"}.

  Raises:
    ValueError: naming the file and the tensor whose dtype or name the format does not know.
  """
  arrays = {name: _array(path, name, x) for name, x in tensors.items()}
  kinds = {name: (x.dtype, x.shape) for name, x in arrays.items()}
  write(path, kinds, arrays.items(), metadata)


def write(
  path: Path,
  kinds: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
  tensors: Iterable[tuple[str, Any]],
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes tensors one after the other, as they arrive; the file appears atomically.

  Args:
    path: of the file; a file that is there is replaced.
    kinds: dtype and shape of every tensor, in their order.
    tensors: names and arrays, in this order.
    metadata: text by text, for the header.

  Raises:
    ValueError: naming the file and the tensor whose dtype or name the format does not know, or that
      is not the one that was announced.
  """
  metadata = dict(metadata or {})
  if not _is_text(metadata):
    raise ValueError(f"{path}: metadata must map text to text, got {metadata!r:.200}.")
  left = dict(kinds)
  with atomic.write(path) as file:
    file.write(layout(kinds, metadata)[0])
    for name, value in tensors:
      x = _array(path, name, value)
      if (name, (x.dtype, x.shape)) != next(iter(left.items()), None):
        raise ValueError(
          f"{path}: tensor {name!r}, {x.dtype} {list(x.shape)}, is not the next one."
        )
      del left[name]
      file.write(x.reshape(-1).view(np.uint8).data)
    if left:
      raise ValueError(f"{path}: tensor {next(iter(left))!r} is missing.")


def one(path: Path, name: str, entry: Entry) -> np.ndarray:
  """Reads one tensor of a file whose header is known."""
  with open(path, "rb") as file:
    return _read(file, pathlib.Path(path), name, entry)


def layout(
  tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
  metadata: Mapping[str, str],
  *,
  align: int = 8,
) -> tuple[bytes, dict[str, Entry]]:
  """Lays a file out before its tensors are known: its header, and the place of each tensor.

  Spaces bring the first tensor to a multiple of `align` bytes: of 8, as in the reference
  implementation, or of a page, from where disks and devices take it without a copy.

  >>> first, entries = layout({"w": (np.dtype(np.float32), (2, 3))}, {"format": "pt"}, align=64)
  >>> len(first), entries["w"].start, entries["w"].stop
  (128, 128, 152)
  """
  content: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
  ends = [0]
  for name, (dtype, shape) in tensors.items():
    ends.append(ends[-1] + math.prod(shape) * dtype.itemsize)
    content[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": ends[-2:]}
  text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
  text += b" " * (-(8 + len(text)) % align)
  data = 8 + len(text)
  entries = {
    name: Entry(dtype, tuple(shape), data + start, data + stop)
    for (name, (dtype, shape)), start, stop in zip(tensors.items(), ends, ends[1:], strict=False)
  }
  return len(text).to_bytes(8, "little") + text, entries


def _array(path: Path, name: str, value: Any) -> np.ndarray:
  if not isinstance(name, str) or name == "__metadata__":
    raise ValueError(f"{path}: {name!r} cannot be the name of a tensor.")
  x = np.asarray(value)
  if x.dtype.byteorder == ">":
    x = x.astype(x.dtype.newbyteorder("<"))
  if x.dtype not in _CODES:
    raise ValueError(
      f"{path}: tensor {name!r} is {x.dtype}, which the format does not hold; it holds "
      f"{', '.join(sorted(str(dtype) for dtype in _CODES))}."
    )
  # A transposed view has the right shape and the wrong order of bytes.
  return np.ascontiguousarray(x).reshape(x.shape)


def _read(file: Any, path: Path, name: str, entry: Entry) -> np.ndarray:
  x = np.empty(entry.shape, entry.dtype)
  file.seek(entry.start)
  if file.readinto(x.reshape(-1).view(np.uint8).data) != x.nbytes:
    raise ValueError(f"{path}: the file ended within tensor {name!r} while it was being read.")
  return x


def _entry(path: Path, name: str, value: Any, data: int) -> Entry:
  at = f"{path}: tensor {name!r}"
  if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
    raise ValueError(f"{at}: expected dtype, shape and data_offsets, got {value!r:.200}.")
  code, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
  if not isinstance(code, str) or code not in DTYPES:
    raise ValueError(f"{at}: dtype {code!r:.100} is unknown; known are {', '.join(DTYPES)}.")
  if not _are_counts(shape):
    raise ValueError(f"{at}: shape {shape!r:.200} must be a list of sizes below 2**63.")
  if len(shape) > MOST_AXES:
    raise ValueError(f"{at}: its shape has {len(shape)} axes, over the limit of {MOST_AXES}.")
  if not _are_counts(offsets) or len(offsets) != 2:
    raise ValueError(f"{at}: data_offsets {offsets!r:.200} must be two positions below 2**63.")
  # Axes of no entries do not let the others be of any size: arrays of such shapes cannot be made.
  if math.prod(max(n, 1) for n in shape) * DTYPES[code].itemsize >= LARGEST:
    raise ValueError(f"{at}: {code} {shape!r:.200} is larger than any file.")
  needed = math.prod(shape) * DTYPES[code].itemsize
  if offsets[1] - offsets[0] != needed:
    raise ValueError(
      f"{at}: {code} {shape!r:.200} takes {needed} bytes, but data_offsets {offsets} hold "
      f"{offsets[1] - offsets[0]}."
    )
  return Entry(DTYPES[code], tuple(shape), data + offsets[0], data + offsets[1])


def _check_layout(path: Path, entries: Mapping[str, Entry], data: int, size: int) -> None:
  at, before = data, "the header"
  for name, entry in entries.items():
    if entry.start != at:
      kind = "overlaps" if entry.start < at else "leaves a gap after"
      raise ValueError(
        f"{path}: tensor {name!r} {kind} {before}: it starts at byte {entry.start}, not {at}."
      )
    if entry.stop > size:
      raise ValueError(
        f"{path}: tensor {name!r} ends at byte {entry.stop}, but the file has {size}; "
        "it is truncated."
      )
    at, before = entry.stop, repr(name)
  if at != size:
    raise ValueError(f"{path}: {size - at} bytes after the last tensor belong to none.")


def _are_counts(values: Any) -> bool:
  return isinstance(values, list) and all(type(n) is int and 0 <= n < LARGEST for n in values)


def _is_text(metadata: Any) -> bool:
  return isinstance(metadata, dict) and all(
    isinstance(text, str) for pair in metadata.items() for text in pair
  )


def narrow(x: np.ndarray, dtype: np.dtype, where: str) -> np.ndarray:
  """Returns an array in the dtype in which it is stored.

  Raises:
    ValueError: beginning with `where`, for values that are finite, and are not so any more.
  """
  if x.dtype == dtype:
    return x
  with np.errstate(over="ignore", invalid="ignore"):  # It is refused, and named.
    out = x.astype(dtype)
  if is_floating(dtype) and bool((np.isfinite(x) & ~np.isfinite(out)).any()):
    raise ValueError(f"{where}: {dtype} cannot hold its values; choose a wider dtype.")
  return out


def is_floating(dtype: np.dtype) -> bool:
  """Returns whether a dtype of the format holds floating-point numbers.

  >>> is_floating(DTYPES["BF16"]), is_floating(DTYPES["I64"])
  (True, False)
  """
  return dtype.kind == "f" or dtype.name.startswith(("bfloat", "float"))
