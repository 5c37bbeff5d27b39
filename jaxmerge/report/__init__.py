"""Tables, plots, the HTML page and the model card, from plain records; free of jax."""

import importlib
from typing import Any  # A lazy attribute may be any public object.

_HOMES = {
  "check": "record",
  "gap_closed": "comparisons",
  "plain": "record",
  "paired_difference": "comparisons",
  "merge_seeds": "record",
  "markdown": "tables",
  "text": "tables",
  "seeds": "tables",
  "html": "page",
  "model_card": "card",
  "merge_card": "card",
  "write": "output",
}
_ROOMS = (
  *dict.fromkeys(_HOMES.values()),
  "diff_text",
  "figure_elements",
  "geometry",
  "leaderboard",
  "inspection_text",
  "plots",
  "labels",
)
__all__ = [*_HOMES, *_ROOMS]


def __getattr__(name: str) -> Any:
  if name in _HOMES:
    return getattr(importlib.import_module(f"jaxmerge.report.{_HOMES[name]}"), name)
  if name in _ROOMS:
    return importlib.import_module(f"jaxmerge.report.{name}")
  raise AttributeError(f"module 'jaxmerge.report' has no attribute {name!r}.")


def __dir__() -> list[str]:
  return sorted(__all__)
