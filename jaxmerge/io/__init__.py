"""Files in and out: safetensors, Hugging Face folders and hub, PEFT adapters, checkpoints."""

import importlib
from types import ModuleType

__all__ = ["adapter", "atomic", "folder", "hub", "orbax", "safetensors"]


def __getattr__(name: str) -> ModuleType:
  if name in __all__:
    return importlib.import_module(f"jaxmerge.io.{name}")
  raise AttributeError(f"module 'jaxmerge.io' has no attribute {name!r}.")


def __dir__() -> list[str]:
  return sorted(__all__)
