"""PEFT adapters: their files, and a base's tensors with an adapter applied."""

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
