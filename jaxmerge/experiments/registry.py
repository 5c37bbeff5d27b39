"""Looks up an experiment's function: built in by short name, a user's as `module:function`.

Free of jax until a function is called.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any  # Any: configs are plain trees, checkpoints trees of arrays.

from jaxmerge import errors

if TYPE_CHECKING:
  from jaxmerge.experiments.problem import Problem

# (like, make) -> arrays like `like`: from the run's checkpoint, or from `make()`.
Cache = Callable[[Any, Callable[[], Any]], Any]

# Short names of built-in experiments.
ALIASES: Mapping[str, str] = {
  "images4": "jaxmerge.experiments.images4:problem",
  "minilm8": "jaxmerge.experiments.minilm8:problem",
  "domains6": "jaxmerge.experiments.domains6:problem",
  "decoder": "jaxmerge.experiments.decoder:problem",
}


# How a config names a function of the user's.
PLACE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def check(name: str) -> None:
  """Raises ValueError for a name that is neither built in nor of the form `module:function`."""
  if name not in ALIASES and not PLACE.fullmatch(name):
    raise ValueError(
      f"experiment must be one of {', '.join(ALIASES)}, or a function of yours as "
      f"'module:function', got {name!r}."
    )


def find(name: str) -> Callable[..., Problem]:
  """Returns the function of an experiment; its module may lie in the working directory.

  Raises:
    ValueError: for a missing module or function, or a module that fails.
  """
  check(name)
  return find_function(ALIASES.get(name, name), f"experiment {name!r}")


def find_function(place: str, what: str) -> Callable[..., Any]:
  """Returns the function at `module:function`; raises as `find` does, naming what it is for."""
  module_name, _, name = place.partition(":")
  module = _import(module_name, what)
  function = getattr(module, name, None)
  if not callable(function) or inspect.isclass(function):
    public = [n for n, _ in inspect.getmembers(module, inspect.isfunction) if n[0] != "_"]
    raise ValueError(
      f"{what}: {_describe(module)} has no function {name!r}"
      f"{errors.nearest(name, public) if public else ', nor any other'}."
    )
  return function


def make(config: Mapping[str, Any], cache: Cache = lambda like, make: make()) -> Problem:
  """Returns the problem of the experiment that a config names, with weights and rows.

  Args:
    config: the plain config.
    cache: passed to the function, which may save a trained base in it.

  Raises:
    ValueError: for an experiment that is missing, that returns something else, or that has shapes
      alone.
  """
  from jaxmerge.experiments import problem as problems

  name = config["experiment"]
  problem = _call(find(name), ALIASES.get(name, name), config, cache)
  if problems.is_abstract(problem):
    raise ValueError(
      f"the experiment {name!r} has shapes only, no weights and no rows. `jaxmerge compile` "
      "compiles it; to train on your data, call `jaxmerge.tune_and_merge`, see docs/tpu.md."
    )
  return problem


def make_shapes(config: Mapping[str, Any]) -> Problem:
  """Returns the problem of the experiment that a config names, as shapes.

  A function of the same name with the suffix `_shapes` makes them without any data, if there is
  one. Otherwise the experiment's function does, with zeros for what it would train.
  """
  from jaxmerge.experiments import problem as problems

  function = find(config["experiment"])
  where = ALIASES.get(config["experiment"], config["experiment"])
  module, _, name = where.partition(":")
  if callable(abstract := getattr(sys.modules[module], f"{name}_shapes", None)):
    function, where = abstract, f"{where}_shapes"
  return problems.shapes(_call(function, where, config, lambda like, make: problems.zeros(like)))


def _call(
  function: Callable[..., Any], where: str, config: Mapping[str, Any], cache: Cache
) -> Problem:
  """Calls an experiment's function with the config, and with the cache if it takes one."""
  from jaxmerge.experiments.problem import Problem

  parameters = list(inspect.signature(function).parameters.values())
  _check_parameters(where, parameters)
  kinds = [p.kind for p in parameters[1:] if p.name == "cache"]
  if inspect.Parameter.POSITIONAL_ONLY in kinds:
    result = function(config, cache)
  else:
    result = function(config, **({"cache": cache} if kinds else {}))
  if not isinstance(result, Problem):
    raise ValueError(
      f"{where} must return a jaxmerge.experiments.problem.Problem, it returned "
      f"{type(result).__name__}."
    )
  return result


def _check_parameters(where: str, parameters: Sequence[inspect.Parameter]) -> None:
  """Raises ValueError for a function that takes no config, or requires other arguments."""
  kinds = inspect.Parameter
  by_name = (kinds.KEYWORD_ONLY, kinds.VAR_KEYWORD)
  variadic = (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)
  if not parameters or parameters[0].kind in by_name:
    raise ValueError(f"{where} must take (config) or (config, cache), the config by position.")
  others = [
    p.name
    for p in parameters[1:]
    if p.name != "cache" and p.default is p.empty and p.kind not in variadic
  ]
  if others:
    raise ValueError(
      f"{where} must take (config) or (config, cache), but it also requires {', '.join(others)}; "
      "give these parameters defaults, or read them from the config's `data`."
    )


def _describe(module: Any) -> str:
  """Returns which module was imported: its file, or why it is not the user's."""
  name, file = module.__name__, getattr(module, "__file__", None)
  if file is None and hasattr(module, "__path__"):
    return f"{name} is a folder without __init__.py, {next(iter(module.__path__), '')}: it"
  top = name.partition(".")[0]
  if top in sys.stdlib_module_names and not (file or "").startswith(os.getcwd() + os.sep):
    return f"{name} is a module of Python itself, which hides a {top}.py of yours (rename it): it"
  return file or name


def _import(name: str, what: str) -> Any:
  """Imports a module; the working directory comes last on the path."""
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
        f"{what}: there is no module {error.name!r} in {here} or on Python's path; run in its "
        "folder, or add that to PYTHONPATH."
      ) from error
    raise ValueError(f"{what}: its module {name} needs {error.name!r}: {error}.") from error
  except SystemExit as error:
    raise ValueError(
      f"{what}: importing {name} exits the program, SystemExit: {error}; put code not to run on "
      'import under `if __name__ == "__main__":`.'
    ) from error
  except Exception as error:  # A module is code, and may raise anything.
    kind = type(error).__name__
    raise ValueError(f"{what}: importing {name} failed: {kind}: {error}") from error
