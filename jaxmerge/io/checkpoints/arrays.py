"""Reads and writes the arrays of an Orbax checkpoint in parts: zarr arrays in an OCDBT database.

Free of jax: TensorStore reads and writes the arrays, and Orbax's metadata is JSON in `_METADATA`. A
*band* is a range of entries in row-major order that consists of whole chunks. One band of each
checkpoint is cached, in memory or in a temporary file.
"""

from __future__ import annotations

import errno
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple  # Any: stores of TensorStore, which is imported late.

import numpy as np

from jaxmerge import display
from jaxmerge.io.checkpoints.band_storage import BandStorage
from jaxmerge.io.disk import strict_json
from jaxmerge.io.tensors.tensor import Tensor

Progress = Callable[[int], None]

METADATA = "_METADATA"
CHUNK = 2**22  # Largest chunk that is written, in bytes.
BAND = 2**20  # Smallest band, in entries, so that many small chunks are read at once.
WRITTEN = 2**24  # Bytes per transaction, which becomes one file.
# Small nodes and inline values, because every transaction rewrites part of the tree.
DATABASE = {"max_inline_value_bytes": 2**10, "max_decoded_node_bytes": 2**18}


class Band(NamedTuple):
  """A range of entries [start, stop), and the index of the array that selects them."""

  start: int
  stop: int
  box: tuple[int | slice, ...]


def chunk(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
  """Returns the shape of row-major contiguous chunks of at most `CHUNK` bytes.

  >>> chunk((3, 4), 4), chunk((10, 2**19), 4), chunk((2, 2**21), 4), chunk((), 4)
  ((3, 4), (2, 524288), (1, 1048576), ())
  """
  limit = CHUNK // itemsize
  axis = next((i for i in range(len(shape)) if math.prod(shape[i + 1 :]) <= limit), 0)
  rows = [min(n, limit // math.prod(shape[axis + 1 :])) for n in shape[axis : axis + 1]]
  return (1,) * axis + (*rows, *shape[axis + 1 :])


def band(shape: Sequence[int], chunks: Sequence[int], at: int) -> Band:
  """Returns the band of the entry at a position, in an array that is not empty.

  >>> band((5, 4, 2**19), (1, 2, 2**18), at=2 * 2**19)
  Band(start=1048576, stop=2097152, box=(0, slice(2, 4, None)))
  """
  if not shape:
    return Band(0, 1, ())
  # A band spans the first axis along which chunks have more than one entry.
  axis = next((i for i, n in enumerate(chunks) if n > 1), len(shape) - 1)
  inner = math.prod(shape[axis + 1 :])
  height = chunks[axis] * max(1, BAND // (chunks[axis] * inner))
  row = at // inner
  *outer, index = map(int, np.unravel_index(row, tuple(shape[: axis + 1])))
  first = index // height * height
  last = min(first + height, shape[axis])
  begin = row - index
  return Band((begin + first) * inner, (begin + last) * inner, (*outer, slice(first, last)))


def keys(state: pathlib.Path) -> dict[str, str]:
  """Returns the database name of each leaf of a checkpoint, by its path in the tree.

  Raises:
    ValueError: if `_METADATA` is not in Orbax's format.
  """
  path = state / METADATA
  try:
    content = strict_json.parse(str(path), path.read_bytes())
    leaves = [[k["key"] for k in v["key_metadata"]] for v in content["tree_metadata"].values()]
    usual = content["use_ocdbt"] and not content["use_zarr3"]
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f"{path}: not the metadata of an Orbax checkpoint ({error!r}).") from error
  if not usual:
    raise ValueError(f"{path}: use_ocdbt must be true and use_zarr3 false; save it with these.")
  return {"/".join(map(str, keys)): ".".join(map(str, keys)) for keys in leaves}


class Arrays:
  """The open arrays of a checkpoint, with a cache of the last band.

  Args:
    where: the folder of the arrays, for errors.
    open_array: opens an array for reading, by its name in the database.
    check: called before the first read; raises if the files are damaged.
  """

  def __init__(
    self, where: str, open_array: Callable[[str], Any], check: Callable[[], None] = lambda: None
  ) -> None:
    self.where, self.open_array = where, open_array
    self.check, self.checked = check, False
    self.key: str | None = None
    self.store: Any = None
    self.band, self.entries = Band(0, 0, ()), BandStorage()

  def tensor(self, key: str, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> Tensor:
    """Returns a lazy tensor for an array of the database, with its known dtype and shape."""
    where = f"{self.where}: tensor {name!r}"

    def read(start: int, out: np.ndarray) -> None:
      if not self.checked:
        self.check()
        self.checked = True
      try:
        if out.size:
          self._read(key, dtype, shape, start, out)
      except (ValueError, OSError, RuntimeError) as error:
        raise ValueError(f"{where}: {reason(error)}") from error

    return Tensor(where, dtype, shape, read)

  def _read(
    self, key: str, dtype: np.dtype, shape: tuple[int, ...], start: int, out: np.ndarray
  ) -> None:
    if self.key != key:
      self._forget()
      self.key, self.store = None, self.open_array(key)
      self.key = key
    on_disk = self.store.dtype.numpy_dtype, self.store.shape
    if on_disk != (dtype, shape):
      known = f"{dtype} {list(shape)} by the manifest"
      raise ValueError(f"it is {on_disk[0]} {list(on_disk[1])} on disk, but {known}.")
    done = 0
    while done < out.size:
      self._load_band(start + done)
      first = start + done - self.band.start
      count = min(out.size - done, self.band.stop - self.band.start - first)
      self.entries.copy(first, out[done : done + count])
      done += count

  def _load_band(self, at: int) -> None:
    """Reads the band of the entry at a position, unless it is cached."""
    if not self.band.start <= at < self.band.stop:
      chunks = self.store.chunk_layout.read_chunk.shape or ()
      next_band = band(self.store.shape, chunks, at)
      self._forget()  # Frees the old band first.
      self.entries.put(np.asarray(self.store[next_band.box].read().result()).reshape(-1))
      self.band = next_band

  def _forget(self) -> None:
    self.band = Band(0, 0, ())
    self.entries.clear()


class Target(NamedTuple):
  """An array to write.

  Attributes:
    key: its name in the database.
    tensor: its entries.
    chunks: shape of its chunks.
    spec: TensorStore's spec of the new array.
  """

  key: str
  tensor: Tensor
  chunks: tuple[int, ...]
  spec: dict[str, Any]


def write(
  state: pathlib.Path,
  tensors: Mapping[tuple[str, ...], Tensor],
  progress: Progress = lambda count: None,
) -> None:
  """Writes a checkpoint that `orbax.checkpoint` restores, as NumPy arrays or sharded.

  Tensors without entries are left out, as in Orbax.

  Args:
    state: an empty folder for the database.
    tensors: tensors by path in the tree of nested dicts.
    progress: called with the number of bytes written.

  Raises:
    OSError: if the disk is full or fails.
  """
  stored = {path: t for path, t in tensors.items() if math.prod(t.shape)}
  write_all((_target(state, ".".join(path), t) for path, t in stored.items()), progress)
  leaves = {
    str(path): _leaf_record(path, chunk(t.shape, t.dtype.itemsize)) for path, t in stored.items()
  }
  content = {"tree_metadata": leaves, "use_ocdbt": True, "use_zarr3": False}
  content |= {"store_array_data_equal_to_fill_value": True, "custom_metadata": None}
  (state / METADATA).write_text(json.dumps(content), encoding="utf-8")
  (state / "_CHECKPOINT_METADATA").write_text("{}", encoding="utf-8")


def write_all(targets: Iterable[Target], progress: Progress = lambda count: None) -> None:
  """Writes arrays in transactions of about `WRITTEN` bytes.

  Raises:
    OSError: if the disk is full or fails.
  """
  waiting = list[_Part]()
  for target in targets:
    for part in _parts(target):
      waiting.append(part)
      if sum(p.entries.nbytes for p in waiting) >= WRITTEN:
        waiting = _written(waiting, progress)
  _written(waiting, progress)


class _Part(NamedTuple):
  """A band of a tensor to be written."""

  target: Target
  box: tuple[int | slice, ...]
  entries: np.ndarray


def _parts(target: Target) -> Iterator[_Part]:
  """Reads a tensor band by band."""
  at, tensor = 0, target.tensor
  while at < math.prod(tensor.shape):
    next_band = band(tensor.shape, target.chunks, at)
    entries = np.empty(next_band.stop - next_band.start, tensor.dtype)
    tensor.read(next_band.start, entries)
    shape = [i.stop - i.start for i in next_band.box if isinstance(i, slice)]
    shape += tensor.shape[len(next_band.box) :]
    yield _Part(target, next_band.box, entries.reshape(shape))
    at = next_band.stop


def _written(parts: list[_Part], progress: Progress) -> list[_Part]:
  """Commits parts in one transaction, which is one file and one change of the tree."""
  if not parts:
    return []
  import tensorstore

  transaction, targets = tensorstore.Transaction(), {p.target.key: p.target for p in parts}
  # One context for all: stores of different contexts would change the tree separately.
  shared = {"transaction": transaction, "context": _context()}
  try:
    stores = {key: _open_new(target, **shared) for key, target in targets.items()}
    for part in parts:
      stores[part.target.key][part.box].write(part.entries).copy.result()
    transaction.commit_sync()
  except (ValueError, OSError, RuntimeError) as error:
    about = f"not copied into the checkpoint: {error}"
    code = error_code(error) or errno.EIO
    raise OSError(code, about, parts[0].target.tensor.where) from error
  for part in parts:
    progress(part.entries.nbytes)
  return []


def error_code(error: Exception) -> int | None:
  """Returns the operating system's code in an error of TensorStore; None if it has none."""
  match = re.search(r"os_error_code='(\d+)'", str(error))
  return int(match.group(1)) if match else getattr(error, "errno", None)


def _leaf_record(path: Sequence[str], chunks: Sequence[int]) -> dict[str, Any]:
  """Returns Orbax's record of a leaf; key type 2 is the key of a dict."""
  value = {"value_type": "np.ndarray", "skip_deserialize": False, "write_shape": list(chunks)}
  return {"key_metadata": [{"key": k, "key_type": 2} for k in path], "value_metadata": value}


def open_existing(state: pathlib.Path, key: str) -> Any:
  """Opens an array of a jaxmerge checkpoint for reading."""
  return open_spec(_spec(state, key)).result()


def open_spec(spec: dict[str, Any]) -> Any:
  """Starts to open an array for reading, and returns the future."""
  import tensorstore  # Late: plans, help and errors do without.

  return tensorstore.open(spec, open=True, read=True, context=_context())


def _target(state: pathlib.Path, key: str, tensor: Tensor) -> Target:
  """Returns the target for a new array of a jaxmerge checkpoint."""
  spec, chunks = _spec(state, key), chunk(tensor.shape, tensor.dtype.itemsize)
  spec["kvstore"]["config"] = DATABASE
  spec["metadata"] = {"chunks": chunks, "compressor": {"id": "zstd", "level": 1}}
  return Target(key, tensor, chunks, spec)


def _open_new(target: Target, **shared: Any) -> Any:
  """Opens an array for writing; creates it if it is missing."""
  import tensorstore

  # Zeros are stored too, because Orbax takes a missing chunk for data loss.
  spec = target.spec | {"store_data_equal_to_fill_value": True, "dtype": target.tensor.dtype.name}
  options = {"create": True, "open": True, "shape": target.tensor.shape, **shared}
  return tensorstore.open(spec, **options).result()


def reason(error: Exception) -> str:
  """Returns the text of an error without the spec that TensorStore adds.

  >>> reason(ValueError("NOT_FOUND: no array [tensorstore_spec='{...}']"))
  'NOT_FOUND: no array.'
  """
  text, spec, _ = str(error).partition(" [tensorstore_spec=")
  return f"{text}." if spec else text


def check_path(path: pathlib.Path) -> None:
  """Raises ValueError for a path that is not UTF-8, which TensorStore requires."""
  whole = str(path.absolute())
  if display.readable(whole) != whole:
    raise ValueError(f"{path}: the path is not UTF-8, which checkpoints require; rename it.")


def _spec(state: pathlib.Path, key: str) -> dict[str, Any]:
  check_path(state)
  base = {"driver": "file", "path": f"{state.resolve()}/"}
  return {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{key}/"}}


def _context() -> Any:
  """Returns a context that decodes few chunks at a time, without a cache: bands are cached."""
  import tensorstore  # Late: plans, help and errors do without.

  limits = {"data_copy_concurrency": {"limit": 2}, "file_io_concurrency": {"limit": 4}}
  return tensorstore.Context({"cache_pool": {"total_bytes_limit": 0}, **limits})
