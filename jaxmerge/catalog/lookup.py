"""Look-ups in the catalog of published methods. Free of jax.

Factories check their arguments here; configs, error messages, `jaxmerge methods` and the docs read
defaults and ranges. A test compares the defaults with the factories' signatures.
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
  """Returns the entry of a method; raises ValueError with the nearest name for an unknown one.

  Example:
    >>> entry("ties").parameters["density"].range
    '(0, 1]'
  """
  if method not in METHODS:
    raise ValueError(f"no method is called {method!r}{errors.nearest(method, METHODS)}.")
  return METHODS[method]


def check(method: str, settings: Mapping[str, Any]) -> None:
  """Raises ValueError for unknown settings, and for values out of range.

  Arrays are skipped, because they may be traced; the driver checks concrete ones.
  """
  parameters = entry(method).parameters
  for name, value in settings.items():
    if name not in parameters:
      raise ValueError(f"{method} has no parameter {name!r}{errors.nearest(name, parameters)}.")
    if not parameters[name].number or not hasattr(value, "dtype"):
      parameters[name].check(f"{method}: {name}", value)
  for name in (n for n in settings if parameters[n].only is not None):
    text = without_effect(method, name, settings)
    if text and settings[name] != parameters[name].default:
      raise ValueError(f"{method}: {name} {text}.")


def without_effect(method: str, name: str, settings: Mapping[str, Any]) -> str:
  """Returns why a parameter has no effect with these settings; "" if it has one or is unknown.

  Example:
    >>> without_effect("checkpoint_average", "decay", {"kind": "ema"})
    "has no effect with kind 'ema'; it is for kind 'decay'"
  """
  parameters = METHODS[method].parameters if method in METHODS else {}
  only = parameters[name].only if name in parameters else None
  if only is None:
    return ""
  value = settings.get(only[0], parameters[only[0]].default)
  if value == only[1]:
    return ""
  return f"has no effect with {only[0]} {value!r}; it is for {only[0]} {only[1]!r}"


def knows(name: str) -> bool:
  """Returns whether any method has a parameter of this name."""
  return any(name in e.parameters for e in METHODS.values())


def check_number(name: str, value: Any, *, label: str = "") -> None:
  """Raises ValueError for a number that no method with a parameter of this name allows."""
  same = [e.parameters[name] for e in METHODS.values() if name in e.parameters]
  parameters = same or [Parameter(None, "")]
  low, open_low = min((p.low, p.open_low) for p in parameters)
  widest = parameters[0]._replace(low=low, open_low=open_low, high=max(p.high for p in parameters))
  (SEED if name == "seed" else widest).check(label or name, value)
