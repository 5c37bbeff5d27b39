"""Model merging in JAX for TPU and GPU."""

import importlib
from typing import TYPE_CHECKING, Any  # A lazy attribute may be any public object.

if TYPE_CHECKING:  # For type checkers and editors; at run time each name loads when it is used.
  from jaxmerge.core.tree import stack as stack
  from jaxmerge.core.tree import unstack as unstack
  from jaxmerge.drivers.memory import merge as merge
  from jaxmerge.drivers.sliding_window import online as online
  from jaxmerge.experiments.comparison import compare as compare
  from jaxmerge.files.merge import merge_files as merge_files
  from jaxmerge.io.huggingface.upload import push as push
  from jaxmerge.recipe.run import merge_recipe as merge_recipe
  from jaxmerge.tasks.task import Split as Split
  from jaxmerge.tasks.task import Task as Task
  from jaxmerge.training.loop import tune_and_merge as tune_and_merge
  from jaxmerge.training.settings import Settings as Settings

_HOMES = {
  "compare": "jaxmerge.experiments.comparison",
  "merge": "jaxmerge.drivers.memory",
  "merge_files": "jaxmerge.files.merge",
  "merge_recipe": "jaxmerge.recipe.run",
  "online": "jaxmerge.drivers.sliding_window",
  "push": "jaxmerge.io.huggingface.upload",
  "stack": "jaxmerge.core.tree",
  "unstack": "jaxmerge.core.tree",
  "tune_and_merge": "jaxmerge.training.loop",
  "Settings": "jaxmerge.training.settings",
  "Task": "jaxmerge.tasks.task",
  "Split": "jaxmerge.tasks.task",
}
_ROOMS = (
  "adapters",
  "analysis",
  "catalog",
  "core",
  "drivers",
  "evaluation",
  "files",
  "io",
  "methods",
  "mixtures",
  "models",
  "parallel",
  "recipe",
  "report",
  "search",
  "tasks",
  "training",
  "xla",
)
__all__ = [*_HOMES, *_ROOMS]


def __getattr__(name: str) -> Any:
  if name == "__version__":
    return importlib.import_module("importlib.metadata").version("jaxmerge")
  if name in _HOMES:
    return getattr(importlib.import_module(_HOMES[name]), name)
  if name in _ROOMS:
    return importlib.import_module(f"jaxmerge.{name}")
  raise AttributeError(f"module 'jaxmerge' has no attribute {name!r}{_hint(name)}.")


def _hint(name: str) -> str:
  """Says where a name is that is not here, or what is near it."""
  lookup = importlib.import_module("jaxmerge.catalog.lookup")
  if name in lookup.METHODS:
    return f"; it is a method, jaxmerge.methods.{name}()"
  if name == "blend":
    return "; without a base it is merge(method, models)"
  errors = importlib.import_module("jaxmerge.errors")
  return "" if name.startswith("_") else str(errors.nearest(name, __all__))


def __dir__() -> list[str]:
  return sorted(__all__)
