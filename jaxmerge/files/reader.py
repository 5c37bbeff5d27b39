"""Reads the slices of a merge of files, and hashes the inputs on the way."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any  # Any: keys of buffers, slices of models.

import numpy as np
import xxhash

from jaxmerge.core import interpreter, precision
from jaxmerge.drivers import slices
from jaxmerge.files.plan import Output
from jaxmerge.io.tensors.tensor import Tensor

HOT = 2**20  # Bytes that fit into a core's cache beside everything else.


class Reader:
  """Reads slices into reused buffers, aligned so that the device takes them without a copy.

  On the first read, data are shown and hashed piece by piece while in a core's cache.

  Attributes:
    digests: checksums of inputs, by tensor of the result (once all its inputs are read) and source.
  """

  def __init__(self, outputs: Sequence[Output]):
    self.outputs = {o.name: o for o in outputs}
    self.buffers: dict[Any, np.ndarray] = {}
    self.digests: dict[str, dict[str, str]] = {o.name: {} for o in outputs}
    self._hashes: dict[slices.Input, Any] = {}

  def read(
    self, name: str, start: int, stop: int, order: Any, on_chunk: slices.OnChunk | None
  ) -> interpreter.Slice:
    """Reads entries of the base and of all models, see `streaming.Source`."""
    output, count = self.outputs[name], stop - start
    base = None
    if output.base is not None:
      base = self._buffer("base", (count,), output.base.dtype)
      self._fill(name, "base", output.base, start, base, on_chunk)
    dtype = precision.common([t.dtype for t in output.models])
    models = self._buffer("models", (len(output.models), count), dtype)
    places = np.arange(len(output.models))[order]
    for k, (i, row) in enumerate(zip(places, models, strict=True)):
      tensor = output.models[i]
      target = row if tensor.dtype == row.dtype else self._buffer(k, (count,), tensor.dtype)
      self._fill(name, k, tensor, start, target, on_chunk)
      if target is not row:
        row[...] = target
    return interpreter.Slice(base, None, models)

  def whole(self) -> str | None:
    """Returns the checksum of all inputs; None until all are read completely."""
    for name, output in self.outputs.items():
      parts = {t.where for t in (output.base, *output.models) if t is not None}
      if self.digests[name].keys() != parts:
        return None
    return xxhash.xxh3_128_hexdigest(json.dumps(self.digests, sort_keys=True).encode())

  def _fill(
    self,
    name: str,
    source: slices.Input,
    tensor: Tensor,
    start: int,
    out: np.ndarray,
    on_chunk: slices.OnChunk | None,
  ) -> None:
    if on_chunk is None:
      tensor.read(start, out)
      return
    if start == 0:
      self._hashes[source] = xxhash.xxh3_128()
    step = HOT // out.dtype.itemsize
    for first in range(0, max(out.size, 1), step):
      part = out[first : first + step]
      tensor.read(start + first, part)
      on_chunk(source, part)
      self._hashes[source].update(part.view(np.uint8).data)
    if start + out.size == math.prod(tensor.shape):
      self.digests[name][tensor.where] = self._hashes.pop(source).hexdigest()

  def _buffer(self, use: Any, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    if use not in self.buffers or self.buffers[use].nbytes < size:
      self.buffers[use] = _aligned_bytes(size)
    return self.buffers[use][:size].view(dtype).reshape(shape)


def _aligned_bytes(size: int) -> np.ndarray:
  """Returns 64-byte aligned memory, which a CPU device takes without a copy."""
  padded = np.empty(size + 64, np.uint8)
  offset = -padded.ctypes.data % 64
  return padded[offset : offset + size]
