"""Merges with task-specific parts."""

from jaxmerge import lazy

__getattr__, __dir__, __all__ = lazy.attach(
  __name__,
  (
    "bundle",
    "low_rank",
    "masks",
    "storage",
  ),
  {
    "emr": "masks",
    "tall_masks": "masks",
    "rmm": "low_rank",
    "load": "storage",
    "save": "storage",
  },
)
