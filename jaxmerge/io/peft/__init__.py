"""Adapters of PEFT: what their files say, and the tensors of a base as they leave them."""

from jaxmerge import lazy

__getattr__, __dir__, __all__ = lazy.attach(
  __name__,
  (
    "adapter",
    "base",
    "dense",
    "formulas",
    "layers",
    "lora",
    "low_rank",
    "parameters",
    "parts",
    "patterns",
    "replication",
    "settings",
  ),
)
