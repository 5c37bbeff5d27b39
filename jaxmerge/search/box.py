"""Searches a method's hyperparameters in a box: first a Halton sequence, then near the best point.

The box comes from the catalog or from the caller. The search suits scores that take minutes, where
a handful of trials is affordable. The points are deterministic.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple  # Any: settings are of many kinds.

from jaxmerge import errors
from jaxmerge.catalog import lookup
from jaxmerge.catalog.parameter import Parameter

if TYPE_CHECKING:
  from jaxmerge.search.objective import Strategy

# Tolerances, guards and properties of the models: they keep their defaults.
FIXED = ("weight", "slack", "rank_tol", "floor", "clamp", "least", "limit", "pairs", "epsilon")
_PRIMES = (2, 3, 5, 7, 11, 13)


class Axis(NamedTuple):
  """The range of one hyperparameter or setting.

  Attributes:
    low: the least value.
    high: the largest value.
    is_log: whether the range is logarithmic.
    values: the values to try, in place of a range.
  """

  low: float = 0.0
  high: float = 1.0
  is_log: bool = False
  values: tuple[Any, ...] = ()

  def at(self, share: float) -> Any:
    """Returns the value at a fraction of the range, to three significant digits.

    >>> Axis(0.25, 4.0, is_log=True).at(0.5), Axis(values=("kth", "exact")).at(0.9)
    (1.0, 'exact')
    """
    if self.values:
      return self.values[min(int(share * len(self.values)), len(self.values) - 1)]
    if self.is_log:
      return _short(self.low * (self.high / self.low) ** share)
    return _short(self.low + share * (self.high - self.low))

  def share(self, value: Any) -> float:
    """Returns the position of a value in the range, from 0 to 1: the inverse of `at`."""
    if self.values:
      return (self.values.index(value) + 0.5) / len(self.values)
    if self.high == self.low:
      return 0.5
    if self.is_log:
      return math.log(value / self.low) / math.log(self.high / self.low)
    return (value - self.low) / (self.high - self.low)


def _short(x: float) -> float:
  return float(f"{x:.3g}")


def axes(method: str, changes: Mapping[str, Axis] | None = None) -> dict[str, Axis]:
  """Returns the search space of a method: usual ranges of its hyperparameters, with the changes.

  A fraction ranges from 0.05 to 1, or to 0.95 where 1 would drop all entries; a scale from a
  quarter to four times its default; other positive numbers from a tenth to ten times theirs. Static
  settings and tolerances keep their defaults unless they are among the changes.

  Raises:
    ValueError: naming method, parameter and value, for changes that the method does not accept.

  Example:
    >>> axes("task_arithmetic", {"scale": Axis(0.2, 0.4)})
    {'scale': Axis(low=0.2, high=0.4, is_log=False, values=())}
  """
  parameters, changes = lookup.entry(method).parameters, dict(changes or {})
  for name, axis in changes.items():
    if name not in parameters:
      near = errors.nearest(name, parameters)
      raise ValueError(f"{method} has no parameter {name!r}{near}.")
    for value in axis.values or (axis.low, axis.high):
      parameters[name].check(f"{method}: {name}", value)
  usual = {name: _usual(name, parameter) for name, parameter in parameters.items()}
  chosen = {name: changes.get(name, usual[name]) for name in parameters}
  return {name: axis for name, axis in chosen.items() if axis is not None}


def _usual(name: str, parameter: Parameter) -> Axis | None:
  """Returns the usual range of a hyperparameter; None if it keeps its default."""
  default = parameter.default
  if name in FIXED or not parameter.number or not default:
    return None
  if math.isinf(parameter.low):
    return Axis(default / 4, default * 4, is_log=True)
  if math.isinf(parameter.high):
    return Axis(default / 10, default * 10, is_log=True)
  high = parameter.high if parameter.open_low else 0.95 * parameter.high
  return Axis(0.05 * parameter.high, high)


def search(box: Mapping[str, Axis], trials: int, default: Mapping[str, Any]) -> Strategy:
  """Proposes up to `trials` candidates one at a time: settings of the box's axes by name.

  The first candidate has the defaults. Half of all are from a Halton sequence over the whole box.
  Later ones lie near the best so far, within half and then a quarter of the box's width. Where all
  axes are lists of values with at most `trials` combinations, all combinations are proposed.

  Args:
    box: the search space.
    trials: largest number of candidates.
    default: default of each axis; skipped if one lies outside its axis.

  Example:
    >>> candidates = search({"scale": Axis(0.25, 4.0, is_log=True)}, 3, {"scale": 1.0})
    >>> next(candidates), candidates.send([0.5]), candidates.send([0.7])
    ([{'scale': 1.0}], [{'scale': 0.5}], [{'scale': 0.707}])
  """
  lists = [axis.values for axis in box.values()]
  if all(lists) and math.prod(map(len, lists)) <= trials:
    for values in itertools.product(*lists):
      yield [dict(zip(box, values, strict=True))]
    return None
  points, half = _halton(len(box)), -(-trials // 2)
  best: dict[str, Any] = {}
  proposed: list[dict[str, Any]] = []
  highest = -math.inf
  for draw in range(4 * trials):  # Lists of values, and rounding to three digits, repeat points.
    if len(proposed) == trials:
      return None
    candidate = {name: default.get(name) for name in box}
    if draw or not all(_inside(axis, candidate[name]) for name, axis in box.items()):
      point, late = next(points), len(proposed) - half
      width = 1.0 if late < 0 else 0.5 ** (1 + 2 * late // max(trials - half, 1))
      candidate = _near(box, best, point, width)
    if candidate in proposed:
      continue
    proposed.append(candidate)
    (score,) = yield [candidate]
    # After a first score of NaN nothing would be larger, and the rest would lie near a failure.
    if not best or score > highest or math.isnan(highest):
      best, highest = candidate, score
  return None


def _near(
  box: Mapping[str, Axis], best: Mapping[str, Any], point: Sequence[float], width: float
) -> dict[str, Any]:
  """Returns a point in a box of some width around the best one, inside the whole box."""
  result = {}
  for (name, axis), x in zip(box.items(), point, strict=True):
    center = axis.share(best[name]) if width < 1 else 0.5
    low = min(max(center - width / 2, 0.0), 1.0 - width)
    result[name] = axis.at(x if axis.values else low + width * x)
  return result


def _inside(axis: Axis, value: Any) -> bool:
  return (
    value in axis.values if axis.values else value is not None and axis.low <= value <= axis.high
  )


def _halton(dimensions: int) -> Iterator[tuple[float, ...]]:
  """Yields the points of a Halton sequence."""
  primes = [_PRIMES[i % len(_PRIMES)] for i in range(dimensions)]
  for index in itertools.count(1):
    yield tuple(_inverse(index, prime) for prime in primes)


def _inverse(index: int, base: int) -> float:
  """Returns the radical inverse of a whole number: its digits in reverse, after the point.

  >>> [_inverse(i, 2) for i in (1, 2, 3)]
  [0.5, 0.25, 0.75]
  """
  result, share = 0.0, 1.0
  while index:
    index, digit = divmod(index, base)
    share /= base
    result += digit * share
  return result
