"""Models in Flax with plain nested dicts of parameters, and their names in Hugging Face files."""

import importlib
from types import ModuleType

__all__ = ["bert", "cnn", "decoder", "decoder_config", "encoder", "llama", "names"]


def __getattr__(name: str) -> ModuleType:
  if name in __all__:
    return importlib.import_module(f"jaxmerge.models.{name}")
  raise AttributeError(f"module 'jaxmerge.models' has no attribute {name!r}.")


def __dir__() -> list[str]:
  return sorted(__all__)
