"""The hyperparameters that are tried for a method."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from jaxmerge import methods
from jaxmerge.catalog import lookup
from jaxmerge.core import stage
from jaxmerge.core.stage import Method


def candidates(
  name: str, settings: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any], dict[str, float], tuple[float, ...]]]:
  """Yields method, static settings, numbers, and the scales to try with them."""
  own = {"name": name, **settings}
  word = own.pop("name")
  parameters = lookup.entry(word).parameters
  grid = {n: tuple(v) if isinstance(v, list | tuple) else (v,) for n, v in own.items()}
  scales = tuple(float(v) for v in grid.pop("scale", (1.0,)))
  if "scale" in parameters and "scale" not in own:
    scales = (parameters["scale"].default,)
  for values in itertools.product(*grid.values()):
    made = dict(zip(grid, values, strict=True))
    numbers = {n: float(v) for n, v in made.items() if parameters[n].number}
    yield word, {n: v for n, v in made.items() if n not in numbers}, numbers, scales


def has_scale(name: str) -> bool:
  """Tells whether a method has a scale of its own."""
  return "scale" in lookup.entry(name).parameters


def method(name: str, settings: Mapping[str, Any]) -> Method:
  """Returns a method with these settings that has a scale: one behind it, if it has none."""
  method = getattr(methods, name)(**settings)
  return method if has_scale(name) else stage.chain(method, methods.scaled(1.0))
