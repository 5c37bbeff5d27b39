"""A user's optimisers and methods, which a config names as `module:function`.

Free of jax until a function is called.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple  # Any: configs are plain trees.

from jaxmerge.experiments import registry
from jaxmerge.training import settings
from jaxmerge.training.settings import Settings

if TYPE_CHECKING:
  from jaxmerge.core.stage import Method

KEYS = ("optimizer", "outer", "method.name")  # Those that take `module:function`.
_OTHERS = ("data.", "pretrain.", "model.")  # Groups that only the experiment interprets.


class _Transformation(NamedTuple):
  """Stands for an optax transformation while a config is checked."""

  init: Callable[..., Any] = dict
  update: Callable[..., Any] = dict


def is_function(key: str, value: object) -> bool:
  """Returns whether a value of a config names a function, for an optimiser or a method.

  >>> is_function("also.atm_mine.optimizer", "my_module:lion"), is_function("optimizer", "adamw")
  (True, False)
  """
  takes = any(f".{key}".endswith(f".{name}") for name in KEYS) and not key.startswith(_OTHERS)
  return takes and isinstance(value, str) and registry.PLACE.fullmatch(value) is not None


def check_settings(config: Mapping[str, Any]) -> None:
  """Raises ValueError for settings of the loop that do not fit; no function is called."""
  stand_in = {k: _Transformation() for k in settings.REPLACES if is_function(k, config[k])}
  settings.from_config({**config, **stand_in})


def make_settings(config: Mapping[str, Any]) -> Settings:
  """Returns the loop's settings, with the optax transformations of the functions it names.

  Raises:
    ValueError: for a function that is missing, needs arguments, or returns something else.
  """
  named = [k for k in settings.REPLACES if is_function(k, config[k])]
  return settings.from_config({**config, **{k: _optimizer(k, config) for k in named}})


def _optimizer(key: str, config: Mapping[str, Any]) -> Any:
  """Calls the function of an optimiser, with the config if it has a parameter of that name."""
  what = f"{key} {config[key]!r}"
  function = registry.find_function(config[key], what)
  takes_config = "config" in inspect.signature(function).parameters
  result = _call(function, what, {"config": config} if takes_config else {})
  if not settings.is_transformation(result):
    kind = type(result).__name__
    raise ValueError(f"{what} must return an optax transformation, it returned {kind}.")
  return result


def make_method(options: Mapping[str, Any]) -> Method:
  """Calls the function of a method, with the other settings as its arguments.

  Raises:
    ValueError: for a function that is missing, takes other arguments, or returns something else.
  """
  from jaxmerge.core import stage

  arguments = dict(options)
  name = arguments.pop("name")
  what = f"method {name!r}"
  result = _call(registry.find_function(name, what), what, arguments)
  if not isinstance(result, stage.Method):
    kind = type(result).__name__
    raise ValueError(f"{what} must return a method, such as jaxmerge.methods.ties(), not {kind}.")
  return result


def _call(function: Callable[..., Any], what: str, arguments: dict[str, Any]) -> Any:
  try:
    inspect.signature(function).bind(**arguments)
  except TypeError as error:
    passed = ", ".join(arguments) or "no arguments"
    raise ValueError(f"{what} cannot be called with {passed}: {error}.") from error
  return function(**arguments)


def digests(values: Mapping[str, Any]) -> dict[str, str]:
  """Returns digests of the functions that a config names; `values` by dotted key.

  A function without a reproducible digest is left out.
  """
  from jaxmerge.core import fingerprint

  functions = {f"{k} {v!r}": v for k, v in values.items() if is_function(k, v)}
  by_name = {
    what: fingerprint.stable_fingerprint(registry.find_function(place, what))
    for what, place in functions.items()
  }
  return {what: digest for what, digest in by_name.items() if digest is not None}
