"""A parameter of a method: its default, range and meaning. Free of jax."""

from __future__ import annotations

import math
from typing import Any, NamedTuple  # Any: settings are of many kinds.


class Parameter(NamedTuple):
  """A parameter of a method.

  A *number*, or hyperparameter, may be an array (scalar or one per model) and may be traced. Others
  are static settings, which select a branch or a length: they have `choices`, or `static` is set.

  Attributes:
    default: its default.
    doc: its meaning.
    low: lower bound of a number.
    high: upper bound of a number.
    open_low: whether the lower bound is excluded.
    choices: the allowed values.
    integer: whether it is a whole number.
    static: whether a number is a static setting.
    each: whether it may differ from model to model.
    only: another parameter and its value; with other values, this parameter has no effect.
  """

  default: Any
  doc: str
  low: float = -math.inf
  high: float = math.inf
  open_low: bool = False
  choices: tuple[Any, ...] = ()
  integer: bool = False
  static: bool = False
  each: bool = False
  only: tuple[str, Any] | None = None

  @property
  def number(self) -> bool:
    """Returns whether values may be arrays."""
    return not (self.choices or self.static)

  @property
  def range(self) -> str:
    """Returns the allowed values in words: `(0, 1]` or `'tree', 'leaf'`."""
    if self.choices:
      return ", ".join(repr(c) for c in self.choices)
    left = "(" if self.open_low or math.isinf(self.low) else "["
    right = ")" if math.isinf(self.high) else "]"
    return f"{left}{self.low:.10g}, {self.high:.10g}{right}".replace("inf", "infinity")

  def check(self, name: str, value: Any) -> None:
    """Raises ValueError, with value and range, for a value outside the range."""
    if self.choices:
      if value not in self.choices:
        raise ValueError(f"{name} must be one of {self.range}, got {value!r}.")
      return
    if hasattr(value, "_fields"):
      kind = type(value).__name__
      raise ValueError(
        f"{name} is a {kind}: pass a tree of numbers to the merge, as "
        f"hparams={{...: {kind}(...)}}; pass one number per model as a tuple."
      )
    for v in _flat(value):
      if not plain(v):
        raise ValueError(f"{name} must be a number in {self.range}, got {v!r}.")
      inside = self.low <= v <= self.high and not (self.open_low and v == self.low)
      if not math.isfinite(v) or not inside or (self.integer and v != int(v)):
        kind = "a whole number " if self.integer else ""
        raise ValueError(f"{name} must be {kind}in {self.range}, got {v!r}.")


def plain(value: Any) -> bool:
  """Returns whether a value is a Python number, or a sequence of them.

  Example:
    >>> plain(0.5), plain((0.5, 1)), plain("0.5")
    (True, True, False)
  """
  if isinstance(value, (list, tuple)):
    return all(plain(v) for v in value)
  return isinstance(value, (int, float))


def _flat(value: Any) -> list[Any]:
  if isinstance(value, (list, tuple)):
    return [v for part in value for v in _flat(part)]
  return [value]
