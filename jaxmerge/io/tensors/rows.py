"""Matrices whose rows are gathered lazily, from one matrix and a few others."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from jaxmerge.io.tensors.tensor import Tensor, widen

BLOCK = 2**18  # Entries that a mean reads at a time.
Row = tuple[Tensor, int]  # A tensor and a row of it.


def gather(
  tensor: Tensor, rows: np.ndarray, fills: Mapping[int, Sequence[Row]], empty: np.ndarray
) -> Tensor:
  """Returns a tensor with gathered rows; contiguous rows are read at once.

  Args:
    tensor: the rows' source, [N, ...].
    rows: [M], the source row of each row of the result; -1 for a row from elsewhere.
    fills: for those, the rows of other tensors whose mean they are; zero without any.
    empty: [M], rows that are the mean of all others; this overrides `rows` and `fills`.

  >>> x = np.array([5, 6, 7], np.float32)
  >>> read = lambda start, out: np.copyto(out, x[start : start + len(out)])
  >>> tensor = Tensor("x", x.dtype, x.shape, read)
  >>> gathered = gather(tensor, np.array([2, 0, -1]), {}, np.array([False, False, True]))
  >>> out = np.empty(3, np.float32)
  >>> gathered.read(0, out), out
  (None, array([7., 5., 6.], dtype=float32))
  """
  width = math.prod(tensor.shape[1:])
  breaks = (np.diff(rows) != 1) | (rows[:-1] < 0)
  ends = np.append(np.flatnonzero(breaks) + 1, len(rows))

  def read(start: int, out: np.ndarray) -> None:
    done = 0
    while done < out.size:
      row, offset = divmod(start + done, width)
      end = int(ends[np.searchsorted(ends, row, side="right")])
      part = out[done : done + end * width - (start + done)]
      if rows[row] >= 0:
        tensor.read(int(rows[row]) * width + offset, part)
      else:
        part[...] = _mean(fills.get(row, ()), width)[offset : offset + part.size]
      done += part.size

  gathered = tensor._replace(
    where=f"{tensor.where}, {len(rows)} rows by the tokenizer",
    shape=(len(rows), *tensor.shape[1:]),
    read=read,
  )
  return _fill(gathered, empty) if empty.any() else gathered


def _mean(sources: Sequence[Row], width: int) -> np.ndarray:
  """Reads the mean of rows, in float32; zero without any."""
  total, values = np.zeros(width, np.float32), np.empty(width, np.float32)
  for tensor, row in sources:
    widen(tensor, values.dtype).read(row * width, values)
    total += values
  return total / np.float32(max(len(sources), 1))


def _fill(tensor: Tensor, empty: np.ndarray) -> Tensor:
  """Fills the empty rows of a tensor with the mean of all others.

  The others are read once, in fixed blocks, when the first empty row is read.
  """
  width = math.prod(tensor.shape[1:])

  @functools.cache
  def mean() -> np.ndarray:
    total = np.zeros(width)
    step = max(1, BLOCK // width)
    for first in range(0, len(empty), step):
      full = ~empty[first : first + step]
      x = np.empty((len(full), width), np.float32)
      widen(tensor, x.dtype).read(first * width, x.reshape(-1))
      total += x[full].sum(axis=0, dtype=np.float64)
    return total / np.count_nonzero(~empty)

  def read(start: int, out: np.ndarray) -> None:
    tensor.read(start, out)
    rows = range(start // width, -(-(start + out.size) // width))
    for row in (r for r in rows if empty[r]):
      first = max(row * width, start)
      part = out[first - start : (row + 1) * width - start]
      part[...] = mean()[first - row * width :][: part.size]

  return tensor._replace(read=read)
