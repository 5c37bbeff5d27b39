"""Look-ups in the table of published methods. Free of jax.

Factories check their arguments here; configs, error messages, `jaxmerge methods` and the docs read
defaults and ranges. A test holds the defaults in the signatures of factories against it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any  # Settings are of many kinds.

from jaxmerge import errors
from jaxmerge.catalog import elementwise, geometric, other_merges, parameter
from jaxmerge.catalog.entry import SEED, Entry
from jaxmerge.catalog.parameter import Parameter

METHODS: Mapping[str, Entry] = {**elementwise.METHODS, **geometric.METHODS}
OTHERS = other_merges.OTHERS
plain = parameter.plain


def entry(method: str) -> Entry:
  """Returns the entry of a method; ValueError with the nearest right name for another word.

  Example:
    >>> entry("ties").parameters["density"].range
    '(0, 1]'
  """
  if method not in METHODS:
    raise ValueError(f"no method is called {method!r}{errors.nearest(method, METHODS)}.")
  return METHODS[method]


def check(method: str, settings: Mapping[str, Any]) -> None:
  """Raises ValueError for settings that the method does not have or that are out of range.

  Arrays are passed over: they may be traced. The driver looks at those that it can.
  """
  parameters = entry(method).parameters
  for name, value in settings.items():
    if name not in parameters:
      raise ValueError(f"{method} has no parameter {name!r}{errors.nearest(name, parameters)}.")
    if not parameters[name].number or not hasattr(value, "dtype"):
      parameters[name].check(f"{method}: {name}", value)


def knows(name: str) -> bool:
  """Tells whether some method has a number of this name."""
  return any(name in e.parameters for e in METHODS.values())


def check_number(name: str, value: Any, *, label: str = "") -> None:
  """Raises ValueError for a plain number outside the ranges that methods give to this name."""
  own = [e.parameters[name] for e in METHODS.values() if name in e.parameters] or [
    Parameter(None, "")
  ]
  low, open_low = min((p.low, p.open_low) for p in own)
  widest = own[0]._replace(low=low, open_low=open_low, high=max(p.high for p in own))
  (SEED if name == "seed" else widest).check(label or name, value)
