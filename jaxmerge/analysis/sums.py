"""Sums over task vectors, models minus base, slice by slice. Free of jax."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxmerge.io.tensors.tensor import Tensor

Count = Callable[[int], None]

ENTRIES = 2**16  # Per model at a time, to stay in a processor's cache.
CHUNK = 2**20  # Entries of a matrix at a time, for a spectrum.


class Sums(NamedTuple):
  """Sums over entries, for K models.

  Attributes:
    entries: number of entries.
    gram: inner products of the task vectors, [K, K].
    base: sum of squares of the base.
    conflicts: number of entries at which task vectors have opposite signs.
  """

  entries: int
  gram: np.ndarray
  base: float
  conflicts: int

  def __add__(self, other: Any) -> Sums:  # Any: as in tuple.
    return Sums(*(a + b for a, b in zip(self, other, strict=True)))


def add_up(tensors: Sequence[Tensor], progress: Count) -> Sums:
  """Returns the sums over one tensor of the base and all models, in double precision.

  Args:
    tensors: the tensor of the base, then those of the models.
    progress: called with the number of bytes read.

  Raises:
    ValueError: naming the tensor that has NaN or infinity.
  """
  height, entries = len(tensors) - 1, math.prod(tensors[0].shape)
  total = Sums(entries, np.zeros((height, height)), 0.0, 0)
  for start in range(0, entries, ENTRIES):
    base, x = deltas(tensors, start, min(ENTRIES, entries - start))
    # No matrix multiplication: for so few rows, BLAS threads cost more than they save.
    gram, square = np.einsum("in,jn->ij", x, x), float(np.einsum("n,n->", base, base))
    if not np.isfinite(np.trace(gram) + square):
      fine = [np.isfinite(base).all(), *np.isfinite(x).all(axis=1)]
      raise ValueError(f"{tensors[int(np.argmin(fine))].where} has NaN or infinity.")
    meeting = (x > 0).any(axis=0) & (x < 0).any(axis=0)
    total += Sums(0, gram, square, int(np.count_nonzero(meeting)))
    progress(base.size * sum(t.dtype.itemsize for t in tensors))
  return total


def deltas(tensors: Sequence[Tensor], start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Reads entries start, start + 1, ... of the base [n], and the task vectors there [K, n]."""
  wide = np.empty((len(tensors), count))
  for tensor, row in zip(tensors, wide, strict=True):
    values = np.empty(count, tensor.dtype)
    tensor.read(start, values)
    row[...] = values
  with np.errstate(invalid="ignore"):  # Infinity minus infinity; `add_up` raises.
    wide[1:] -= wide[0]
  return wide[0], wide[1:]


def spectrum(base: Tensor, model: Tensor, progress: Count) -> np.ndarray:
  """Returns the squares of all singular values of a task vector [m, n], the largest first.

  They are the eigenvalues of the Gram matrix of its smaller side, which is summed slice by slice.
  """
  rows, columns = base.shape
  gram = np.zeros((min(base.shape),) * 2)
  for x in row_slices(base, model) if columns <= rows else _columns(base, model):
    gram += x.T @ x
    progress(x.size * (base.dtype.itemsize + model.dtype.itemsize))
  return np.linalg.eigvalsh(gram)[::-1].clip(0)


def row_slices(base: Tensor, model: Tensor) -> Iterator[np.ndarray]:
  """Yields rows of a task vector, some at a time, [r, n]."""
  rows, columns = base.shape
  step = max(1, CHUNK // columns)
  for first in range(0, rows, step):
    count = min(step, rows - first)
    yield deltas([base, model], first * columns, count * columns)[1].reshape(count, columns)


def _columns(base: Tensor, model: Tensor) -> Iterator[np.ndarray]:
  """Yields columns of a task vector, some at a time, as rows, [c, m]."""
  rows, columns = base.shape
  step = max(1, CHUNK // rows)
  for first in range(0, columns, step):
    count = min(step, columns - first)
    parts = [deltas([base, model], i * columns + first, count)[1][0] for i in range(rows)]
    yield np.stack(parts, axis=1)
