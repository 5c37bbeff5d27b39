"""LoRA adapters: apply, merge, combine and compress them in memory, load and save them."""

from jaxmerge import lazy

__getattr__, __dir__, __all__ = lazy.attach(
  __name__,
  (
    "combine",
    "deltas",
    "lora",
    "peft",
    "truncation",
  ),
  {
    "Lora": "lora",
    "Swapped": "lora",
    "apply": "lora",
    "merge": "deltas",
    "extract": "truncation",
    "flora": "combine",
    "average": "combine",
    "compress": "truncation",
    "load": "peft",
    "save": "peft",
  },
)
