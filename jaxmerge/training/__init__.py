"""Alternating tuning and merging: tune copies on every task, merge them, repeat."""

from jaxmerge import lazy

__getattr__, __dir__, __all__ = lazy.attach(
  __name__,
  (
    "budget",
    "build",
    "checks",
    "finetune",
    "identity",
    "joint",
    "local_steps",
    "loop",
    "optimizers",
    "outer_optimizers",
    "placement",
    "round",
    "saving",
    "schedule",
    "settings",
    "waves",
  ),
)
