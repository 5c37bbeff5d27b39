"""Parses YAML into the records of a recipe, or reports every problem with its position."""

from jaxmerge import lazy

__getattr__, __dir__, __all__ = lazy.attach(
  __name__,
  (
    "fields",
    "inputs",
    "python_values",
    "references",
    "run_models",
    "schema",
    "validate",
    "yaml_reader",
  ),
)
