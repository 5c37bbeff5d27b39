"""From a recipe and the headers of its models to a plan."""

from jaxmerge import lazy

__getattr__, __dir__, __all__ = lazy.attach(
  __name__,
  (
    "intermediate",
    "jobs",
    "matrix_axes",
    "models",
    "modules",
    "partial",
    "planner",
    "rows",
    "steps",
    "uneven_layers",
  ),
)
