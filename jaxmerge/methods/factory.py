"""Factories whose methods know their name, and are equal where they compile to one program."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec

from jaxmerge import errors
from jaxmerge.core import stage
from jaxmerge.core.stage import Method

Arguments = ParamSpec("Arguments")


def named(factory: Callable[Arguments, Method]) -> Callable[Arguments, Method]:
  """Makes methods of a factory equal where its static settings are, and tells them its name.

  An argument is a hyperparameter if one of the stages has it among its `numbers`; the factory's
  functions must not depend on its value, only on whether there is one. All other arguments are
  settings. With a setting that cannot be hashed a method is equal to itself alone.

  Raises:
    TypeError: for arguments that the factory does not have.

  Example:
    >>> @named
    ... def damped(damping=0.9, sign=1):
    ...   numbers = {"damping": damping}
    ...   factor = lambda leaf, x: sign * leaf.number("damping", x)
    ...   return stage.leafwise(lambda x, leaf: x * factor(leaf, x), numbers=numbers)
    >>> damped(0.5) == damped(0.9), damped(sign=-1) == damped(), damped().name
    (True, False, 'damped')
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
    varying = stage.numbers(method)
    settings = tuple((n, v) for n, v in bound.arguments.items() if n not in varying)
    absent = tuple(n for n, v in bound.arguments.items() if n in varying and v is None)
    key = factory, settings, tuple(type(v) for _, v in settings), absent
    return dataclasses.replace(stage.keyed(method, key), name=name, settings=settings)

  return make
