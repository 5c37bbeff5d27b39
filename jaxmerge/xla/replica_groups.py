"""Parses the replica groups of collectives, and attributes them to mesh axes."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping

import numpy as np

Groups = tuple[tuple[int, ...], ...]


def replica_groups(attributes: str, devices: int) -> Groups:
  """Returns the groups of devices of a collective, from the attributes of its line.

  Raises:
    ValueError: for an unknown syntax, or if a device is not in exactly one group. A collective that
      cannot be parsed must not look like no communication.

  Example:
    >>> replica_groups("replica_groups={{0,1},{2,3}}, channel_id=1", 4)
    ((0, 1), (2, 3))
    >>> replica_groups("replica_groups=[2,2]<=[2,2]T(1,0)", 4)
    ((0, 2), (1, 3))
    >>> replica_groups("replica_groups=mesh['x'=2,'y'=2] {'y'}", 4)
    ((0, 1), (2, 3))
  """
  value = _value(attributes, "replica_groups")
  if value is None:
    raise ValueError(f"a collective has no replica groups: {attributes[:200]!r}.")
  groups = _explicit_groups(value, devices) or _iota_groups(value) or _mesh_groups(value)
  if groups is None:
    raise ValueError(f"replica groups in an unknown syntax: {value[:200]!r}.")
  if sorted(i for group in groups for i in group) != list(range(devices)):
    raise ValueError(f"replica groups {value[:200]!r} do not hold each of {devices} devices once.")
  return groups


def pairs(attributes: str, devices: int) -> Groups:
  """Returns the pairs (source, target) of a permutation, from the attributes of its line.

  Raises:
    ValueError: for an unknown syntax, or a device that does not exist.

  Example:
    >>> pairs("channel_id=2, source_target_pairs={{0,1},{1,0}}", 2)
    ((0, 1), (1, 0))
  """
  match = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}(?=, |$)", attributes)
  if match is None:
    raise ValueError(f"a permutation has no pairs that can be read: {attributes[:200]!r}.")
  out = _lists(match[1])
  if any(i >= devices for pair in out for i in pair):
    raise ValueError(f"pairs {match[0][:200]!r} name devices beyond {devices}.")
  return out


def axes(groups: Iterable[Iterable[int]], shape: Mapping[str, int]) -> tuple[str, ...]:
  """Returns the axes of a mesh along which the devices of some group differ, in their order.

  Example:
    >>> axes([(0, 1), (2, 3)], {"task": 2, "model": 2})
    ('model',)
  """
  spanned: set[int] = set()
  for group in groups:
    places = np.array(np.unravel_index(list(group), tuple(shape.values())))
    spanned |= set(np.flatnonzero((places != places[:, :1]).any(axis=1)).tolist())
  return tuple(name for i, name in enumerate(shape) if i in spanned)


def _value(attributes: str, key: str) -> str | None:
  match = re.search(rf"(?:^|, ){key}=", attributes)
  return attributes[match.end() :] if match else None


def _lists(text: str) -> Groups:
  return tuple(
    tuple(int(i) for i in group.split(",")) for group in re.findall(r"\{(\d[\d,]*)\}", text)
  )


def _explicit_groups(value: str, devices: int) -> Groups | None:
  """Reads lists of devices: {{0,1},{2,3}}, or {} for one group of all."""
  match = re.match(r"\{((?:\{\d+(?:,\d+)*\},?)*)\}(?=, |$)", value)
  if match is None:
    return None
  return _lists(match[1]) or (tuple(range(devices)),)


_SIZES = r"(\d+(?:,\d+)*)"


def _iota_groups(value: str) -> Groups | None:
  """Parses the iota form, optionally transposed: [4,2]<=[8], [2,4]<=[4,2]T(1,0)."""
  match = re.match(rf"\[(\d+),(\d+)\]<=\[{_SIZES}\](?:T\({_SIZES}\))?(?=, |$)", value)
  if match is None:
    return None
  ids = _ids(match[3], match[4])
  rows, columns = int(match[1]), int(match[2])
  if rows * columns != ids.size:
    raise ValueError(f"replica groups {value[:80]!r} do not fit together.")
  return _rows(ids.reshape(rows, columns))


def _mesh_groups(value: str) -> Groups | None:
  """Parses mesh axes, optionally with sub-axes and device ids: mesh['x'=2,'y'=4] {'y'}.

  'y':(2)4 is the sub-axis of y of size 4 after a sub-axis of size 2.
  """
  axis = r"'[^']+'=\d+"
  part = r"'[^']+'(?::\(\d+\)\d+)?"
  ids = rf"(?:, device_ids=\((?:\[{_SIZES}\](?:T\({_SIZES}\))?|{_SIZES})\))?"
  pattern = rf"mesh\[({axis}(?:,{axis})*)\]{ids} \{{({part}(?:,\s*{part})*)\}}(?=, |$)"
  match = re.match(pattern, value)
  if match is None:
    return None
  sizes = {n: int(size) for n, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
  if match[2]:
    order = _ids(match[2], match[3])
  else:
    order = np.array(_numbers(match[4])) if match[4] else np.arange(math.prod(sizes.values()))
  parts = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", match[5])
  if order.size != math.prod(sizes.values()) or any(n not in sizes for n, _, _ in parts):
    raise ValueError(f"replica groups {value[:200]!r} do not fit together.")
  spots, at = [], 0  # Each axis as (above, part, below) where a part of it is named.
  split: list[int] = []
  for name, size in sizes.items():
    parts_of_axis = [(int(pre or 1), int(some or size)) for n, pre, some in parts if n == name]
    ends = sorted(
      {1, size} | {pre for pre, _ in parts_of_axis} | {pre * count for pre, count in parts_of_axis}
    )
    pieces = [b // a for a, b in itertools.pairwise(ends)]
    if math.prod(pieces) != size:
      raise ValueError(f"replica groups {value[:200]!r} do not fit together.")
    for pre, count in parts_of_axis:
      spots += [at + i for i, a in enumerate(ends[:-1]) if pre <= a < pre * count]
    split += pieces
    at += len(pieces)
  others = [i for i in range(len(split)) if i not in spots]
  grid = order.reshape(split).transpose([*others, *spots])
  return _rows(grid.reshape(-1, math.prod(split[i] for i in spots)))


def _ids(sizes: str, order: str | None) -> np.ndarray:
  grid = np.arange(math.prod(_numbers(sizes))).reshape(_numbers(sizes))
  return (grid.transpose(_numbers(order)) if order else grid).reshape(-1)


def _numbers(text: str) -> list[int]:
  return [int(n) for n in text.split(",")]


def _rows(grid: np.ndarray) -> Groups:
  return tuple(tuple(row) for row in grid.tolist())
