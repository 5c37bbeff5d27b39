"""LoRA adapters in memory: applied, merged, combined, compressed, on disk."""

from jaxmerge import lazy

__getattr__, __dir__, __all__ = lazy.attach(
  __name__,
  (
    "combine",
    "compress",
    "deltas",
    "lora",
    "peft",
  ),
  {
    "Lora": "lora",
    "Swapped": "lora",
    "applied": "lora",
    "merged": "deltas",
    "extracted": "compress",
    "flora": "combine",
    "averaged": "combine",
    "recompressed": "compress",
    "load": "peft",
    "save": "peft",
  },
)
