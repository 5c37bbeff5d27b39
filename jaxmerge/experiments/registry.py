"""Finds the function that makes an experiment: a built-in one by its short name, a user's by place.

Free of jax until a function is called.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any  # Any: configs are plain trees, checkpoints trees of arrays.

from jaxmerge import errors

if TYPE_CHECKING:
  from jaxmerge.experiments.problem import Problem

# (like, make) -> arrays like `like`: from the run's checkpoint, or those that `make()` returns.
Cache = Callable[[Any, Callable[[], Any]], Any]

# Short names of what is built in.
ALIASES: Mapping[str, str] = {
  "images4": "jaxmerge.experiments.images4:problem",
  "minilm8": "jaxmerge.experiments.minilm8:problem",
  "domains6": "jaxmerge.experiments.domains6:problem",
  "decoder": "jaxmerge.experiments.decoder:problem",
}


def check(name: str) -> None:
  """Raises ValueError for a name that is neither built in nor of the form `module:function`."""
  if name not in ALIASES and not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", name):
    raise ValueError(
      f"experiment must be one of {', '.join(ALIASES)}, or a function of yours as "
      f"'module:function', got {name!r}."
    )


def find(name: str) -> Callable[..., Problem]:
  """Returns the function of an experiment; its module may lie in the working directory.

  Raises:
    ValueError: for a module or a function that there is not, or a module that fails.
  """
  check(name)
  module_name, _, function = ALIASES.get(name, name).partition(":")
  module = _import(module_name, f"experiment {name!r}")
  maker = getattr(module, function, None)
  if not inspect.isfunction(maker):
    public = [n for n, _ in inspect.getmembers(module, inspect.isfunction) if n[0] != "_"]
    raise ValueError(
      f"experiment {name!r}: {module.__file__} has no function {function!r}"
      f"{errors.nearest(function, public) if public else ', nor any other'}."
    )
  return maker


def make(config: Mapping[str, Any], cache: Cache = lambda like, make: make()) -> Problem:
  """Returns the problem of the experiment that a config names, with weights and rows.

  Args:
    config: the plain config.
    cache: passed to the function, which may keep in it what it trains for the base.

  Raises:
    ValueError: for an experiment that there is not, that returns something else, or that has shapes
      alone.
  """
  from jaxmerge.experiments import problem as problems

  name = config["experiment"]
  problem = _call(find(name), config, cache)
  if problems.is_abstract(problem):
    raise ValueError(
      f"the experiment {name!r} has shapes alone, no weights and no rows: `jaxmerge compile` "
      "compiles it, and `jaxmerge.tune_and_merge` runs it from Python on yours, see docs/tpu.md."
    )
  return problem


def make_shapes(config: Mapping[str, Any]) -> Problem:
  """Returns the problem of the experiment that a config names, as shapes.

  They are those that its function makes, with zeros in place of what it would train; or those of
  the function with `_shapes` behind its name, where the module has one, without any data.
  """
  from jaxmerge.experiments import problem as problems

  function = find(config["experiment"])
  module = sys.modules[function.__module__]
  abstract = getattr(module, f"{function.__name__}_shapes", function)
  return problems.shapes(_call(abstract, config, lambda like, make: problems.zeros(like)))


def _call(function: Callable[..., Any], config: Mapping[str, Any], cache: Cache) -> Problem:
  """Calls a function of an experiment with the config, and the cache if it takes one."""
  from jaxmerge.experiments.problem import Problem

  where = f"{function.__module__}:{function.__name__}"
  takes = len(inspect.signature(function).parameters)
  if takes not in (1, 2):
    raise ValueError(f"{where} must take (config) or (config, cache), it takes {takes} arguments.")
  result = function(*(config, cache)[:takes])
  if not isinstance(result, Problem):
    raise ValueError(
      f"{where} must return a jaxmerge.experiments.problem.Problem, it returned "
      f"{type(result).__name__}."
    )
  return result


def _import(name: str, what: str) -> Any:
  """Imports a module; the working directory is looked at last."""
  if name in sys.modules:
    return sys.modules[name]
  if (here := os.getcwd()) not in sys.path:
    sys.path.append(here)
  importlib.invalidate_caches()
  try:
    return importlib.import_module(name)
  except ModuleNotFoundError as error:
    if error.name and (name == error.name or name.startswith(f"{error.name}.")):
      raise ValueError(
        f"{what}: there is no module {error.name!r} in {here}, nor on Python's path; start in its "
        "folder, or name that in PYTHONPATH."
      ) from error
    raise ValueError(f"{what}: its module {name} needs {error.name!r}: {error}.") from error
  except Exception as error:  # A module is code, and may raise anything.
    kind = type(error).__name__
    raise ValueError(f"{what}: importing {name} failed: {kind}: {error}") from error
