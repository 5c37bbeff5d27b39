"""The methods of a config: in the loop, and as one-shot merges of the experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any  # Any: configs are plain trees, parameters trees of arrays.

from jaxmerge import methods
from jaxmerge.catalog import lookup
from jaxmerge.core import layouts, tree
from jaxmerge.core.stage import Method
from jaxmerge.experiments import user_functions


def make_method(settings: Mapping[str, Any]) -> Method:
  """Returns the method of a config: {"name": "ties", "density": 0.2}, or a user's function."""
  settings = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
  if user_functions.is_function("method.name", settings["name"]):
    return user_functions.make_method(settings)
  name = settings.pop("name")
  lookup.check(name, settings)
  return getattr(methods, name)(**settings)


def one_shot_settings(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """Returns the settings of a config's one-shot merges by name, always with the average."""
  listed = {k: dict(v) for k, v in config["baselines"].items() if k in lookup.METHODS}
  return {"average": {}, **listed}


def layout_notes(
  layout: layouts.Layout | None, params: Any, config: Mapping[str, Any]
) -> list[str]:
  """Returns a note per row or matrix method on the matrix view of each leaf, and why."""
  named = {n: {"name": n, **settings} for n, settings in one_shot_settings(config).items()}
  named["atm"] = dict(config["method"])
  leaves, notes = tree.named(params), []
  shapes = {n: tuple(x.shape) for n, x in leaves.items() if tree.is_floating(x)}
  for name, settings in named.items():
    settings.pop("scales", None)
    method = make_method(settings)
    table = layouts.resolve(method, shapes, layout, names=leaves)
    notes += [f"{name}: {line}" for line in layouts.lines(method, table)]
  return notes
