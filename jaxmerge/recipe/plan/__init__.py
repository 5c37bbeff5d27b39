"""Plans a recipe from its text and the headers of its models."""

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
