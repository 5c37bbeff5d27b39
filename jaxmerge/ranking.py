"""Exact ranks among more numbers than memory holds, in one reading of them as a rule.

A sample says between which two values the wanted one lies, nearly surely. One scan counts what is
above, and keeps what is between, which is little. Where the sample was wrong the scan has counted
enough to know on which side to look, and is made again. Numbers are bit patterns, uint32, that
order as the values do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

EVERY = 2**32 - 1  # As the last position: all entries that tie are inside.
NONE = 2**31 - 1  # As the value: above all finite ones.
HELD = 2**22  # As many numbers are kept before equal ones are counted together.


class Slice(NamedTuple):
  """A part of the numbers of some models.

  Attributes:
    position: position of its first entry.
    bits: patterns [n] of each model.
    codes: [K, n] uint8: 2 above the bracket, 1 inside it, 0 below; empty where none was
      asked for.
  """

  position: int
  bits: list[np.ndarray]
  codes: np.ndarray


class Numbers(NamedTuple):
  """Numbers that can be read slice by slice.

  Attributes:
    size: how many there are of each model.
    sample: () -> some of them, [K, S], and how many each stands for, [S].
    scan: (low [K], high [K]) -> all slices, in the order of positions, with codes.
    slice: which -> that one of the slices, without codes.
  """

  size: int
  sample: Callable[[], tuple[np.ndarray, np.ndarray]]
  scan: Callable[[np.ndarray, np.ndarray], Iterator[Slice]]
  slice: Callable[[int], Slice]


def ranks(bits: np.ndarray) -> np.ndarray:
  """Returns the place of each number in its row, as `statistics.ranks` does: [K, rows, columns].

  For devices that sort more slowly than the host: CPUs.

  >>> ranks(np.array([[[9, 1, 4, 1]]], np.uint32)).tolist()
  [[[3, 0, 2, 1]]]
  """
  out, columns = np.empty(bits.shape, np.int32), bits.shape[-1]
  places = np.arange(columns, dtype=np.int32)
  columns_of = places.astype(np.uint64)
  for own, row in zip(out.reshape(-1, columns), bits.reshape(-1, columns), strict=True):
    # The column beside the number: numbers that tie stay in order, and none is sorted twice.
    keys = (row.astype(np.uint64) << np.uint64(32)) | columns_of
    keys.sort()
    own[keys.astype(np.uint32)] = places
  return out


def cut(numbers: Numbers, ranks: Sequence[int], *, exact: bool) -> tuple[np.ndarray, np.ndarray]:
  """Finds the value of a rank for each model, and the last position of those inside.

  Args:
    numbers: where they are.
    ranks: per model n, the n-th largest is wanted, at most as many as there are; 0 for none.
    exact: n entries are inside, the first of those that tie; otherwise all that tie are.

  Returns:
    Patterns [K] and positions [K], uint32.
  """
  if not numbers.size:
    return np.full(len(ranks), NONE, np.uint32), np.full(len(ranks), EVERY, np.uint32)
  sample, weights = numbers.sample()
  rows = itertools.cycle([_sorted(row, weights) for row in sample])
  searches = [_Search(n, numbers.size, *row) for n, row in zip(ranks, rows, strict=False)]
  while not all(s.found for s in searches):
    low, high = np.array([s.bracket for s in searches], np.uint32).T
    for at, part in enumerate(numbers.scan(low, high)):
      for s, bits, codes in zip(searches, part.bits, part.codes, strict=True):
        s.take(at, bits, codes)
    for s in searches:
      s.settle()
  lasts = [_last(numbers, k, s) if exact else EVERY for k, s in enumerate(searches)]
  return np.array([s.value for s in searches], np.uint32), np.array(lasts, np.uint32)


def _sorted(sample: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Sorts a sample from the largest on, with the share of all that each and those before are."""
  order = np.argsort(sample)[::-1]
  return sample[order], np.cumsum(weights[order]) / weights.sum()


class _Search:
  """The search for one model's value: a bracket, and what a scan saw around it."""

  def __init__(self, rank: int, size: int, sample: np.ndarray, share: np.ndarray):
    self.sample, self.share = sample, share
    self.held: list[tuple[int, np.ndarray]] = []
    self.kept: list[tuple[int, np.ndarray, np.ndarray]] = []
    self.rank, self.wanted = rank, rank / size
    spread = math.sqrt(self.wanted * (1 - self.wanted) / len(sample))
    self.error = 5 * spread + 2 / len(sample)  # Five standard deviations of a random sample.
    self.found, self.value, self.left, self.tied = rank == 0, NONE, 0, 0
    self._look(0, NONE)

  def take(self, at: int, bits: np.ndarray, codes: np.ndarray) -> None:
    """Counts what is above the bracket, and keeps what is inside."""
    if self.found:
      return
    self.above += int(np.count_nonzero(codes == 2))
    low, high = self.bracket
    if low == high:
      self.kept.append((at, np.array([low], np.uint32), np.array([np.count_nonzero(codes == 1)])))
      return
    self.held.append((at, _inside(bits, codes)))
    if sum(len(own) for _, own in self.held) > HELD:
      every = np.concatenate([own for _, own in self.held])
      self.kept.append((at, *np.unique(every, return_counts=True)))
      self.held = []

  def settle(self) -> None:
    """Finds the value among what a scan kept, or takes another bracket."""
    if self.found:
      return
    for at, own in self.held:
      self.kept.append((at, *np.unique(own, return_counts=True)))
    values = np.unique(np.concatenate([own for _, own, _ in self.kept]))
    counts = np.zeros(len(values), np.int64)
    for _, own, n in self.kept:
      counts[np.searchsorted(values, own)] += n
    left, (low, high) = self.rank - self.above, self.bracket
    if 0 < left <= counts.sum():
      higher = np.cumsum(counts[::-1])
      place = int(np.searchsorted(higher, left))
      self.found, self.value = True, int(values[-1 - place])
      self.tied = int(counts[-1 - place])
      self.left = left - int(higher[place]) + self.tied
      return
    self.error *= 16
    self._look(*((high + 1, NONE) if left <= 0 else (0, low - 1)))

  def _look(self, low: int, high: int) -> None:
    """Takes the part of a bracket that by the sample holds the wanted rank."""
    first, last = np.searchsorted(self.share, (self.wanted - self.error, self.wanted + self.error))
    top = int(self.sample[first]) if self.wanted > self.error else high
    bottom = int(self.sample[last]) if last < len(self.sample) else low
    near = (max(low, bottom), min(high, top))
    self.bracket = near if near[0] <= near[1] else (low, high)
    self.above, self.held, self.kept = 0, [], []


def _inside(bits: np.ndarray, codes: np.ndarray) -> np.ndarray:
  """Picks the numbers whose code is 1, which are few: eight others at a time are passed over."""
  whole = len(codes) // 8 * 8
  eights = codes[:whole].view(np.uint64) & np.uint64(0x0101010101010101)
  near = np.flatnonzero(eights)
  picked = bits[:whole].reshape(-1, 8)[near][codes[:whole].reshape(-1, 8)[near] == 1]
  return np.concatenate([picked, bits[whole:][codes[whole:] == 1]])


def _last(numbers: Numbers, k: int, search: _Search) -> int:
  """The position of the last entry that is inside, of those that tie with the value."""
  if search.left == search.tied:
    return EVERY
  left, which = search.left, 0
  for at, values, counts in search.kept:
    own = int(counts[values == search.value].sum())
    if own >= left:
      break
    left, which = left - own, at + 1
  while True:
    part = numbers.slice(which)
    places = np.flatnonzero(part.bits[k] == search.value)
    if len(places) >= left:
      return (part.position + int(places[left - 1])) % 2**32
    left, which = left - len(places), which + 1
