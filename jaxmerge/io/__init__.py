"""Files in and out: safetensors, Hugging Face folders and hub, PEFT adapters, checkpoints."""

from jaxmerge import lazy

__getattr__, __dir__, __all__ = lazy.attach(
  __name__,
  ("checkpoints", "disk", "formats", "huggingface", "other_formats", "peft", "tensors"),
)
