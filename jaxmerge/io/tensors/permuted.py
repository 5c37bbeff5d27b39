"""Tensors with their axes in another order, parts of stacked ones, and stacks: read band by band.

A *band* is some rows of the result. Of each set of views one band is in memory.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxmerge.io.tensors.tensor import Tensor

BAND = 2**22  # Entries of a band, unless one row has more.
Change = Callable[[np.ndarray], np.ndarray]


class Axes(NamedTuple):
  """The axes of an array, and where those of another array lie in it.

  Attributes:
    stacked: those along which several arrays are stacked, in order.
    order: the others, in the order of the single array.
  """

  stacked: tuple[int, ...]
  order: tuple[int, ...]


class Views:
  """Views of a model's tensors; a class because it holds the band that was read last."""

  def __init__(self) -> None:
    self._rows: list[Callable[[int, int], np.ndarray]] = []
    self._band = functools.lru_cache(1)(
      lambda number, first, last: self._rows[number](first, last).reshape(-1)
    )

  def part(
    self,
    tensor: Tensor,
    axes: Axes,
    index: Sequence[int],
    shape: tuple[int, ...],
    change: Change | None = None,
  ) -> Tensor:
    """Returns one array of a stack, with its axes in another order.

    Args:
      tensor: the stack.
      axes: its axes.
      index: of the array, for each stacked axis.
      shape: of the result, row by row.
      change: what is computed from a part of the stack, all of whose last axis is there.
    """
    ranges = [(0, n) for n in tensor.shape]
    for axis, i in zip(axes.stacked, index, strict=True):
      ranges[axis] = (i, i + 1)
    if not axes.order:
      return self._view(tensor, (1,), shape, lambda first, last: box(tensor, ranges))

    def rows(first: int, last: int) -> np.ndarray:
      values = box(tensor, [*_with(ranges, axes.order[0], (first, last))])
      values = values if change is None else change(values)
      return values.transpose((*axes.stacked, *axes.order))

    ordered = tuple(tensor.shape[i] for i in axes.order)
    return self._view(tensor, ordered, shape, rows, change)

  def stack(
    self,
    tensors: Mapping[tuple[int, ...], Tensor],
    axes: Axes,
    shape: tuple[int, ...],
    change: Change | None = None,
  ) -> Tensor:
    """Returns the stack of arrays by their index: what `part` takes apart.

    Args:
      tensors: of one dtype; row by row, each has the entries of one array.
      axes: those of the stack.
      shape: of the stack.
      change: what is computed from a part of the stack, all of whose last axis is there.
    """
    ordered = tuple(shape[i] for i in axes.order)
    single = {index: t._replace(shape=ordered) for index, t in tensors.items()}
    back = np.argsort(axes.order)

    def rows(first: int, last: int) -> np.ndarray:
      out = np.empty((last - first, *shape[1:]), _any(tensors).dtype)
      for index, tensor in single.items():
        at: list[int | slice] = [slice(None)] * len(shape)
        for axis, i in zip(axes.stacked, index, strict=True):
          at[axis] = i
        ranges = [(0, n) for n in ordered]
        if 0 in axes.order:
          ranges[axes.order.index(0)] = (first, last)
        elif first <= index[axes.stacked.index(0)] < last:
          at[0] = index[axes.stacked.index(0)] - first
        else:
          continue
        out[tuple(at)] = box(tensor, ranges).transpose(back)
      return out if change is None else change(out)

    return self._view(_any(tensors), shape, shape, rows, change)

  def _view(
    self,
    source: Tensor,
    ordered: tuple[int, ...],
    shape: tuple[int, ...],
    rows: Callable[[int, int], np.ndarray],
    change: Change | None = None,
  ) -> Tensor:
    number, width = len(self._rows), max(1, math.prod(ordered[1:]))
    self._rows.append(rows)
    step = max(1, BAND // width)

    def read(start: int, out: np.ndarray) -> None:
      done = 0
      while done < out.size:
        first = (start + done) // width // step * step
        values = self._band(number, first, min(first + step, ordered[0]))
        begin = start + done - first * width
        part = values[begin : begin + out.size - done]
        out[done : done + part.size] = part
        done += part.size

    view = source._replace(shape=shape, read=read)
    if change is None:
      return view
    dtype = change(np.empty((1,) * len(source.shape), source.dtype)).dtype
    changed = None if dtype == source.dtype else source.stored_dtype
    return view._replace(dtype=dtype, store_as=changed or view.store_as)


def box(tensor: Tensor, ranges: Sequence[tuple[int, int]]) -> np.ndarray:
  """Reads the entries of a tensor in a range along each axis.

  >>> x = np.arange(12).reshape(3, 4)
  >>> read = lambda start, out: np.copyto(out, x.reshape(-1)[start:][:out.size])
  >>> box(Tensor("x", x.dtype, x.shape, read), [(1, 3), (0, 2)])
  array([[4, 5],
         [8, 9]])
  """
  out = np.empty([stop - start for start, stop in ranges], tensor.dtype)
  if not out.size:
    return out
  if not ranges:
    tensor.read(0, out.reshape(-1))
    return out
  cut = max((i for i, r in enumerate(ranges) if r != (0, tensor.shape[i])), default=0)
  steps = [math.prod(tensor.shape[i + 1 :]) for i in range(cut + 1)]
  runs = out.reshape(math.prod(out.shape[:cut]), -1)
  starts = (range(a * s, b * s, s) for (a, b), s in zip(ranges[:cut], steps, strict=False))
  begin = ranges[cut][0] * steps[cut]
  for number, outer in enumerate(itertools.product(*starts)):
    tensor.read(sum(outer) + begin, runs[number])
  return out


def pad(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
  """Returns a tensor with rows of zeros after its last one; itself if it has as many or more."""
  if tensor.shape[1:] != shape[1:] or tensor.shape[0] >= shape[0]:
    return tensor
  size = math.prod(tensor.shape)

  def read(start: int, out: np.ndarray) -> None:
    stored = min(max(size - start, 0), out.size)
    if stored:
      tensor.read(start, out[:stored])
    out[stored:] = 0

  return tensor._replace(shape=shape, read=read)


def _with(
  ranges: Sequence[tuple[int, int]], axis: int, limits: tuple[int, int]
) -> list[tuple[int, int]]:
  return [limits if i == axis else r for i, r in enumerate(ranges)]


def _any(tensors: Mapping[tuple[int, ...], Tensor]) -> Tensor:
  return next(iter(tensors.values()))
