"""Tensors that are read in parts: of files, of parts of others, of experts."""

from jaxmerge import lazy

__getattr__, __dir__, __all__ = lazy.attach(
  __name__,
  (
    "experts",
    "names",
    "pieces",
    "quantized",
    "rows",
    "safetensors",
    "tensor",
  ),
)
