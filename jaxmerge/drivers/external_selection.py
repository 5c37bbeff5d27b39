"""Finds exact order statistics of more numbers than memory holds, usually in one pass.

A sample brackets the value of the rank with high probability. One scan counts the numbers above the
bracket, and stores those inside, which are few. If the sample was wrong, the scan's counts show on
which side to search, and the scan is repeated. Numbers are bit patterns, unsigned integers of 32 or
64 bits, that order as the values do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple  # Any: arrays of NumPy, or of jax.

import numpy as np

from jaxmerge.core import order_statistics

_EVERY = int(order_statistics.EVERY)
CAPACITY = 2**22  # Numbers stored, over all models, before equal ones are counted together;
FINE = 16  # if too many are still distinct, they are counted in 2**16 classes.


class NumberSlice(NamedTuple):
  """A part of the numbers of some models.

  Attributes:
    position: position of its first entry.
    sides: [K, n], what `sides` returns for these entries and the brackets.
    bits: columns [m] -> patterns of these entries, [K, m].
  """

  position: int
  sides: np.ndarray
  bits: Callable[[np.ndarray], np.ndarray]


class Numbers(NamedTuple):
  """Numbers that are read slice by slice; a slice is valid until the next one is read.

  Of M ranks that are searched together, the i-th belongs to model i modulo K.

  Attributes:
    size: number of values of each model.
    sample: () -> a sample [K, S], how many numbers each stands for, [S], and where each run of
      neighbours begins, [C].
    scan: (low [M], high [M]) -> all slices, in the order of positions.
    slice: index of a slice -> position of its first entry, and its patterns [K, n].
    kind: the dtype of the patterns.
  """

  size: int
  sample: Callable[[], tuple[np.ndarray, np.ndarray, np.ndarray]]
  scan: Callable[[np.ndarray, np.ndarray], Iterator[NumberSlice]]
  slice: Callable[[int], tuple[int, np.ndarray]]
  kind: np.dtype = np.dtype(np.uint32)

  @property
  def top(self) -> int:
    """The pattern above those of all finite values."""
    return 2 ** (8 * self.kind.itemsize - 1) - 1


_ABOVE, _INSIDE = 1, 2  # Side of the first bracket; two bits for each further bracket.


def sides(bits: Any, low: Any, high: Any, where: Callable[..., Any] = np.where) -> Any:
  """Returns on which sides of brackets numbers are: [K, n], [R, K, 1] twice -> unsigned [K, n].

  All R brackets of a number are in one small integer, so that a program makes and writes it once.

  >>> bits, low, high = np.array([[1, 5, 9]]), np.array([[[5]], [[0]]]), np.array([[[6]], [[2]]])
  >>> sides(bits, low, high).tolist()
  [[8, 6, 5]]
  """
  kind = np.min_scalar_type(4 ** len(low) - 1).type
  code = kind(0)
  for r in range(len(low)):
    inside = where(bits >= low[r], kind(_INSIDE << 2 * r), kind(0))
    code = code | where(bits > high[r], kind(_ABOVE << 2 * r), inside)
  return code


def cut(numbers: Numbers, ranks: Sequence[int], *, exact: bool) -> tuple[np.ndarray, np.ndarray]:
  """Finds the value of a rank for each model, and the last position of those inside.

  Args:
    numbers: the numbers.
    ranks: n for each model, to find the n-th largest, at most the number of values; 0 for none.
    exact: keep exactly n entries, the first of equal ones; otherwise keep all equal ones.

  Returns:
    Patterns [K], and positions [K], uint32.
  """
  kind, top = numbers.kind, numbers.top
  if not numbers.size or not any(ranks):
    return np.full(len(ranks), top, kind), np.full(len(ranks), _EVERY, np.uint32)
  sample, weights, starts = numbers.sample()
  rows = itertools.cycle([_Sample(row, weights, starts) for row in sample])
  searches = [_Search(n, numbers.size, row, top) for n, row in zip(ranks, rows, strict=False)]
  while not all(s.is_done for s in searches):
    low, high = np.array([s.bracket for s in searches], kind).T
    for which, part in enumerate(numbers.scan(low, high)):
      _take(searches, which, part, exact)
    for s in searches:
      s.settle()
  lasts = [_last(numbers, k, s) if exact else _EVERY for k, s in enumerate(searches)]
  return np.array([s.value for s in searches], kind), np.array(lasts, np.uint32)


class _Sample:
  """A model's sample in descending order, with the cumulative share of all numbers at each."""

  def __init__(self, row: np.ndarray, weights: np.ndarray, starts: np.ndarray):
    self.row_values, self.weights, self.starts = row, weights, starts
    if (weights == weights[0]).all():
      self.values, self.share = np.sort(row)[::-1], np.arange(1, len(row) + 1) / len(row)
      return
    order = _order(row)[::-1]
    self.values, self.share = row[order], np.cumsum(weights[order]) / weights.sum()

  def error(self, wanted: float) -> float:
    """Returns three standard deviations of the share of numbers above the value at a share.

    Neighbours may be alike: runs of them are compared with the runs beside them.
    """
    size = len(self.values)
    value = self.values[min(int(np.searchsorted(self.share, wanted)), size - 1)]
    above = self.weights * ((self.row_values >= value) - wanted)
    runs = np.add.reduceat(above, self.starts)
    apart = np.diff(runs)
    many = len(runs) / max(len(apart), 1)
    alike = math.sqrt(many * float(apart @ apart) / 2) / self.weights.sum()
    return 3 * max(math.sqrt(wanted * (1 - wanted) / size), alike) + 2 / size


def _order(row: np.ndarray) -> np.ndarray:
  """Returns the positions of numbers in ascending order."""
  if row.dtype.itemsize > 4:
    return np.argsort(row, kind="stable")
  # Number and position packed in one key: sorting it is several times faster than `argsort`.
  keys = (row.astype(np.uint64) << np.uint64(32)) | np.arange(len(row), dtype=np.uint64)
  keys.sort()
  return keys.astype(np.uint32)


def _take(searches: Sequence[_Search], which: int, part: NumberSlice, exact: bool) -> None:
  """Counts numbers above the brackets, and stores those inside."""
  num_models, kind = len(part.sides), part.sides.dtype.type
  insides = np.zeros((num_models, 1), part.sides.dtype)
  for i, search in enumerate(searches):
    if not search.is_done and not search.single:
      insides[i % num_models] |= kind(_INSIDE << 2 * (i // num_models))
  columns: np.ndarray = _NOTHING
  patterns = None
  if insides.any():
    columns = np.flatnonzero(_union(part.sides, insides) != 0)
    patterns = part.bits(columns) if len(columns) else None
  few = np.take(part.sides, columns, axis=1)
  for i, search in enumerate(searches):
    k, shift = i % num_models, 2 * (i // num_models)
    if search.is_done:
      continue
    above, inside = kind(_ABOVE << shift), kind(_INSIDE << shift)
    search.above += int(np.count_nonzero(part.sides[k] & above))
    if search.single:  # There are often very many equal numbers.
      count = np.count_nonzero(part.sides[k] & inside)
      value = np.array([search.bracket[0]], search.sample.values.dtype)
      search.add(_Candidates(which, value, np.array([count])), len(searches))
    elif patterns is not None:
      inner = np.flatnonzero((few[k] & inside) != 0)
      at = (part.position + columns[inner]).astype(np.uint32) if exact else None
      search.add(_Candidates(which, patterns[k][inner], None, at), len(searches))


def _union(sides: np.ndarray, masks: np.ndarray) -> np.ndarray:
  """Returns the bits of its mask that any row has: [K, n], [K, 1] -> [n]."""
  if (masks == masks[0]).all():
    return np.bitwise_or.reduce(sides) & masks[0]
  return np.bitwise_or.reduce(sides & masks)


class _Candidates(NamedTuple):
  """The numbers that a scan saw inside a bracket.

  Attributes:
    which: index of the slice they are from, or of the last one.
    values: patterns.
    counts: how often each occurs; None: as often as it is listed.
    positions: position of each, if known.
  """

  which: int
  values: np.ndarray
  counts: np.ndarray | None
  positions: np.ndarray | None = None


def _count_equal(candidates: Sequence[_Candidates]) -> tuple[np.ndarray, np.ndarray]:
  """Counts equal values together: returns values in order, and how often each occurs."""
  listed = [k.values for k in candidates if k.counts is None]
  values, counts = np.unique(np.concatenate([_NOTHING, *listed]), return_counts=True)
  pairs = [(values, counts), *((k.values, k.counts) for k in candidates if k.counts is not None)]
  values = np.unique(np.concatenate([some for some, _ in pairs]))
  counts = np.zeros(len(values), np.int64)
  for some, n in pairs:
    np.add.at(counts, np.searchsorted(values, some), n)
  return values, counts


_NOTHING = np.zeros(0, np.uint32)


class _Search:
  """The search for one model's value: a bracket, and a scan's counts around it."""

  def __init__(self, rank: int, size: int, sample: _Sample, top: int):
    self.sample, self.rank, self.wanted, self.top = sample, rank, rank / size, top
    self.error = sample.error(self.wanted)
    self.is_done, self.value, self.left, self.tied = rank == 0, top, 0, 0
    self.candidates: list[_Candidates] = []
    self.above = self.stored = self.merged = self.shift = 0
    self._look(0, top)
    if self.is_done:
      self.bracket = (top, top)

  @property
  def single(self) -> bool:
    """Whether the bracket is one value."""
    return self.bracket[0] == self.bracket[1]

  def add(self, candidates: _Candidates, searches: int) -> None:
    """Adds numbers inside the bracket; if they are many, counts equal ones or coarse classes."""
    self.candidates.append(candidates)
    self.stored += len(candidates.values)
    room = CAPACITY // searches
    if self.stored <= room:
      return
    counted = _count_equal(self.candidates[self.merged :])
    self.candidates[self.merged :] = [_Candidates(candidates.which, *counted)]
    self.merged = len(self.candidates)
    self.stored = sum(len(k.values) for k in self.candidates)
    if self.stored > room // 2:
      low, high = self.bracket
      self.shift = max(0, (high - low).bit_length() - FINE)
      coarse = [k._replace(values=self._coarse(k.values)) for k in self.candidates]
      self.candidates = [_Candidates(candidates.which, *_count_equal(coarse))]
      self.merged, self.stored = 1, len(self.candidates[0].values)

  def settle(self) -> None:
    """Finds the value among the stored candidates, or chooses another bracket."""
    if self.is_done:
      return
    coarse = [k._replace(values=self._coarse(k.values)) for k in self.candidates]
    values, counts = _count_equal(coarse)
    left, (low, high) = self.rank - self.above, self.bracket
    if 0 < left <= counts.sum():
      higher = np.cumsum(counts[::-1])
      place = int(np.searchsorted(higher, left))
      value = int(values[-1 - place])
      if self.shift:
        self._scan(value, min(value + 2**self.shift - 1, high))
        return
      self.is_done, self.value = True, value
      self.tied = int(counts[-1 - place])
      self.left = left - int(higher[place]) + self.tied
      return
    self.error *= 4
    self._look(*((high + 1, self.top) if left <= 0 else (0, low - 1)))

  def _coarse(self, values: np.ndarray) -> np.ndarray:
    """Rounds values in the bracket down, so that few are distinct."""
    if not self.shift:
      return values
    low, shift = (values.dtype.type(n) for n in (self.bracket[0], self.shift))
    return ((values - low) >> shift << shift) + low

  def _look(self, low: int, high: int) -> None:
    """Narrows a bracket to the part that holds the rank according to the sample."""
    values, ends = self.sample.values, (self.wanted - self.error, self.wanted + self.error)
    first, last = np.searchsorted(self.sample.share, ends)
    top = int(values[first]) if self.wanted > self.error else high
    bottom = int(values[last]) if last < len(values) else low
    near = (max(low, bottom), min(high, top))
    self._scan(*(near if near[0] <= near[1] else (low, high)))

  def _scan(self, low: int, high: int) -> None:
    """Sets a new bracket and resets the counts."""
    self.bracket, self.candidates = (low, high), []
    self.above = self.stored = self.merged = self.shift = 0


def _last(numbers: Numbers, k: int, search: _Search) -> int:
  """Returns the position of the last kept entry among those equal to the value."""
  if search.left == search.tied:
    return _EVERY
  left, which = search.left, 0
  for candidates in search.candidates:
    ties = candidates.values == search.value
    count = int(ties.sum() if candidates.counts is None else candidates.counts[ties].sum())
    if count >= left:
      if candidates.positions is not None:
        return int(candidates.positions[ties][left - 1])
      break
    left, which = left - count, candidates.which + 1
  while True:
    position, bits = numbers.slice(which)
    places = np.flatnonzero(bits[k % len(bits)] == search.value)
    if len(places) >= left:
      return (position + int(places[left - 1])) % 2**32
    left, which = left - len(places), which + 1
