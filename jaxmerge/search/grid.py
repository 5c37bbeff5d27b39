"""Grids of settings and hyperparameters of a method."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from jaxmerge import methods
from jaxmerge.catalog import lookup
from jaxmerge.core import stage
from jaxmerge.core.stage import Method
from jaxmerge.search import scales


def candidates(name: str, settings: Mapping[str, Any]) -> Iterator[scales.Scaled]:
  """Yields all combinations of the values listed for each setting, as merges to try.

  Args:
    name: of the method, unless the settings have another one.
    settings: a value or a list of values for static settings, hyperparameters and the scale.

  Example:
    >>> [(c.hparams, c.scale) for c in candidates("ties", {"density": [0.1, 0.2], "scale": 0.5})]
    [({'density': 0.1}, 0.5), ({'density': 0.2}, 0.5)]
  """
  settings = {"name": name, **settings}
  factory = settings.pop("name")
  parameters = lookup.entry(factory).parameters
  values = {n: tuple(v) if isinstance(v, list | tuple) else (v,) for n, v in settings.items()}
  default = parameters["scale"].default if has_scale(factory) else 1.0
  tried = values.pop("scale", (default,))
  for combination in itertools.product(*values.values()):
    chosen = dict(zip(values, combination, strict=True))
    hparams = {n: float(v) for n, v in chosen.items() if parameters[n].number}
    static = {n: v for n, v in chosen.items() if n not in hparams}
    method = with_scale(factory, static)
    for scale in tried:
      yield scales.Scaled(method, hparams, float(scale), static)


def has_scale(name: str) -> bool:
  """Returns whether a method has the hyperparameter `scale`."""
  return "scale" in lookup.entry(name).parameters


def with_scale(name: str, settings: Mapping[str, Any]) -> Method:
  """Returns a method with these settings that has a scale: one behind it, if it has none."""
  method = getattr(methods, name)(**settings)
  return method if has_scale(name) else stage.chain(method, methods.scaled(1.0))
