"""The methods of mergekit's recipes, and how its arithmetic differs."""

from jaxmerge import lazy

__getattr__, __dir__, __all__ = lazy.attach(
  __name__,
  (
    "deviations",
    "methods",
    "precision",
    "translate",
  ),
)
