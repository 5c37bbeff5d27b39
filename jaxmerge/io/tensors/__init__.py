"""Lazy tensors: views of files, of other tensors, and of mixture-of-experts layers."""

from jaxmerge import lazy

__getattr__, __dir__, __all__ = lazy.attach(
  __name__,
  (
    "experts",
    "msgpack",
    "names",
    "pieces",
    "quantized",
    "rows",
    "safetensors",
    "scaled",
    "tensor",
  ),
)
