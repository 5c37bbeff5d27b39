"""Tensors built from others: ranges, concatenations, replaced rows, and computed tensors."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from jaxmerge.io.tensors.tensor import Tensor, compute_dtype, widen


def stretch(tensor: Tensor, start: int, shape: tuple[int, ...]) -> Tensor:
  """Returns a contiguous range of a tensor, from entry `start`, as a tensor.

  >>> x = np.arange(6.0)
  >>> whole = Tensor("x", x.dtype, (3, 2), lambda start, out: np.copyto(out, x[start:][:out.size]))
  >>> load(stretch(whole, 2, (1, 2)))
  array([[2., 3.]])
  """

  def read(first: int, out: np.ndarray) -> None:
    tensor.read(start + first, out)

  return tensor._replace(shape=shape, read=read)


def concatenate(tensors: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
  """Concatenates tensors of one dtype, flattened, into one tensor."""
  ends = list(itertools.accumulate(math.prod(t.shape) for t in tensors))

  def read(start: int, out: np.ndarray) -> None:
    done = 0
    while done < out.size:
      at = start + done
      number = int(np.searchsorted(ends, at, side="right"))
      part = out[done : done + ends[number] - at]
      tensors[number].read(at - (ends[number - 1] if number else 0), part)
      done += part.size

  return tensors[0]._replace(shape=shape, read=read)


def with_rows(tensor: Tensor, rows: Sequence[int], values: Tensor) -> Tensor:
  """Returns a matrix with some rows replaced by those of another, [len(rows), width]."""
  width, places = tensor.shape[1], {row: place for place, row in enumerate(rows)}
  widest = widen(values, tensor.dtype)

  def read(start: int, out: np.ndarray) -> None:
    tensor.read(start, out)
    for row in range(start // width, -(-(start + out.size) // width)):
      if row in places:
        first = max(row * width, start)
        part = out[first - start : (row + 1) * width - start]
        widest.read(places[row] * width + first - row * width, part)

  return tensor._replace(where=f"{tensor.where} with {values.where}", read=read)


def load(tensor: Tensor, dtype: np.dtype | None = None) -> np.ndarray:
  """Reads a whole tensor, in its dtype or another one."""
  out = np.empty(tensor.shape, dtype or tensor.dtype)
  widen(tensor, out.dtype).read(0, out.reshape(-1))
  return out


class Wholes:
  """Tensors that are computed whole on first read; the last one stays in memory."""

  def __init__(self) -> None:
    self._makers: list[Callable[[], np.ndarray]] = []
    self._array = functools.lru_cache(1)(lambda number: self._makers[number]().reshape(-1))

  def tensor(self, base: Tensor, compute: Callable[[np.ndarray], np.ndarray], added: str) -> Tensor:
    """Returns a tensor that is computed from another of the same shape, in float32 or wider.

    Args:
      base: the tensor.
      compute: an array of the base's shape to one of the same.
      added: the other input of the computation, for errors.
    """
    number = len(self._makers)
    dtype = compute_dtype(base)
    self._makers.append(lambda: compute(load(base, dtype)))

    def read(start: int, out: np.ndarray) -> None:
      out[...] = self._array(number)[start : start + out.size]

    return Tensor(f"{base.where} with {added}", dtype, base.shape, read, base.stored_dtype)
