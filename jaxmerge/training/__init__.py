"""Alternating tuning and merging: tune copies on every task, merge them, repeat."""

from jaxmerge import lazy

__getattr__, __dir__, __all__ = lazy.attach(
  __name__,
  (
    "budget",
    "checks",
    "finetune",
    "joint",
    "local_steps",
    "loop",
    "outer",
    "placement",
    "round",
    "schedule",
    "settings",
    "waves",
  ),
)
