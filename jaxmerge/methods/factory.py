"""The decorator of factories: methods know their name, and share programs if they may."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec  # Any: settings are of many kinds.

from jaxmerge import errors
from jaxmerge.catalog import lookup
from jaxmerge.core import stage
from jaxmerge.core.stage import Method, Stage

Arguments = ParamSpec("Arguments")


class _Key(NamedTuple):
  """What determines the stages of a method: factory, settings, hyperparameters that are None."""

  name: str
  factory: Any
  settings: Any
  absent: tuple[str, ...]


def named(factory: Callable[Arguments, Method]) -> Callable[Arguments, Method]:
  """Decorates a factory: its methods share programs if their static settings are equal.

  An argument is a hyperparameter if a stage has the same object among its `hparams`. The factory's
  functions may depend on whether there is one, not on its value: a test checks them for every
  published method. All other arguments are settings. With a setting that cannot be hashed, a method
  is equal to itself alone.

  Raises:
    TypeError: for unknown arguments.

  Example:
    >>> @named
    ... def damped(damping=0.9, sign=1):
    ...   hparams = {"damping": damping}
    ...   factor = lambda leaf, x: sign * leaf.hparam("damping", x)
    ...   return stage.leafwise(lambda x, leaf: x * factor(leaf, x), hparams=hparams)
    >>> damped(0.5) == damped(0.5), damped(0.5) == damped(0.9), damped().name
    (True, False, 'damped')
    >>> one, two, other = map(stage.without_hparams, (damped(0.5), damped(0.9), damped(sign=-1)))
    >>> one == two != other
    True
  """
  signature, name = inspect.signature(factory), factory.__name__

  @functools.wraps(factory)
  def make(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Method:
    try:
      bound = signature.bind(*args, **kwargs)
    except TypeError as error:
      unknown = [n for n in kwargs if n not in signature.parameters]
      if not unknown:
        raise TypeError(f"{name}: {error}.") from None
      near = errors.nearest(unknown[0], signature.parameters)
      raise TypeError(f"{name} has no parameter {unknown[0]!r}{near}.") from None
    bound.apply_defaults()
    method = factory(*bound.args, **bound.kwargs)
    varying = stage.hparams(method)
    arguments = bound.arguments
    hparams = {n for n, v in arguments.items() if n in varying and varying[n] is v}
    # Settings without effect are left out, so that a new setting changes no older digest.
    settings = tuple(
      (n, v)
      for n, v in arguments.items()
      if n not in hparams and not lookup.without_effect(name, n, arguments)
    )
    absent = tuple(n for n in arguments if n in hparams and varying[n] is None)
    key = _Key(name, factory, tuple((n, _typed(v)) for n, v in settings), absent)
    return dataclasses.replace(stage.with_key(method, key), name=name, settings=settings)

  return make


def _typed(value: Any) -> Any:
  """Returns a setting with its type: 1, 1.0 and True are equal, but may mean different code."""
  if isinstance(value, tuple):
    return type(value), tuple(map(_typed, value))
  return type(value), repr(value) if isinstance(value, float) else value


def name_of(step: Stage) -> str:
  """Returns the name of the factory that made a stage; "" for a user's own stage.

  Example:
    >>> from jaxmerge import methods
    >>> [name_of(step) for step in methods.average()]
    ['average']
  """
  key = step.key[0] if isinstance(step.key, tuple) and step.key else None
  return key.name if isinstance(key, _Key) else ""


def is_published(method: Method) -> bool:
  """Returns whether a method is the catalog's method of its name, perhaps on some leaves only."""
  if method.name not in lookup.METHODS or any(name_of(s) != method.name for s in method):
    return False
  if not all(v is None or isinstance(v, bool | int | float | str) for _, v in method.settings):
    return False
  methods = importlib.import_module("jaxmerge.methods")
  whole = dataclasses.replace(
    method, stages=tuple(dataclasses.replace(s, where=None) for s in method)
  )
  return stage.without_hparams(whole) == stage.without_hparams(
    getattr(methods, method.name)(**dict(method.settings))
  )
