"""Scores of models on tasks, their comparison, and evaluations from outside."""

from jaxmerge import lazy

__getattr__, __dir__, __all__ = lazy.attach(
  __name__,
  (
    "compare",
    "external",
    "metrics",
    "scoring",
  ),
)
