"""What a method is, as text that is the same in every process: to know it again after a restart."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any  # A method holds functions, and they hold anything.

import numpy as np


def fingerprint(value: Any) -> str:
  """Returns a digest of a method: of its functions' code and of what they hold.

  Functions that these call by a global name count by that name. What is not known in text form
  counts as different in every process.

  Example:
    >>> from jaxmerge import methods
    >>> fingerprint(methods.ties(0.2)) == fingerprint(methods.ties(0.2))
    True
    >>> fingerprint(methods.ties(0.2)) == fingerprint(methods.ties(0.3))
    False
  """
  found = hashlib.blake2b(digest_size=16)
  for part in _parts(value, ()):
    found.update(f"{len(part)}:{part}".encode())
  return found.hexdigest()


def stages(method: Iterable[Any]) -> list[str]:
  """Returns the names of the functions of a method's stages, as records keep them.

  Functions of this package are named without their module, which may change.

  Example:
    >>> from jaxmerge import methods
    >>> stages(methods.average())
    ['jaxmerge.average.<locals>.<lambda>']
  """
  return [_placeless(f"{s.update.__module__}.{s.update.__qualname__}") for s in method]


def placeless(record: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the record of a method with the names of its stages as `stages` gives them.

  Records of jaxmerge 0.1.0 name the modules as well, in which the functions were then.
  """
  return {**record, "stages": [_placeless(name) for name in record["stages"]]}


def _placeless(name: str) -> str:
  return re.sub(r"^jaxmerge\.(?:(?:core|methods)\.\w+|stage)\.", "jaxmerge.", name)


def _parts(value: Any, inside: tuple[int, ...]) -> Iterator[str]:
  if id(value) in inside:  # A function that holds itself.
    yield "again"
    return
  inside = (*inside, id(value))
  if isinstance(value, types.FunctionType):
    value = inspect.unwrap(value)
  if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
    yield f"{type(value).__name__} {value!r}"
  elif isinstance(value, types.FunctionType):
    cells = [cell.cell_contents for cell in value.__closure__ or ()]
    for part in (value.__code__, value.__defaults__, value.__kwdefaults__, cells):
      yield from _parts(part, inside)
  elif isinstance(value, types.CodeType):
    yield value.co_code.hex()
    for part in (value.co_names, value.co_varnames, value.co_freevars, value.co_consts):
      yield from _parts(part, inside)
  elif isinstance(value, functools.partial):
    yield from _parts((value.func, value.args, value.keywords), inside)
  elif dataclasses.is_dataclass(value) and not isinstance(value, type):
    yield type(value).__qualname__
    yield from _parts({f.name: getattr(value, f.name) for f in dataclasses.fields(value)}, inside)
  elif isinstance(value, Mapping):
    yield f"mapping {len(value)}"
    for item in value.items():
      yield from _parts(item, inside)
  elif isinstance(value, (tuple, list, frozenset)):
    yield f"{type(value).__name__} {len(value)}"
    for part in sorted(value, key=repr) if isinstance(value, frozenset) else value:
      yield from _parts(part, inside)
  elif hasattr(value, "dtype") and hasattr(value, "shape") and not isinstance(value, type):
    array = np.asarray(value)
    yield f"{array.dtype} {array.shape} {hashlib.blake2b(array.tobytes()).hexdigest()}"
  else:
    name = getattr(value, "__qualname__", None)
    yield repr(value) if name is None else f"{getattr(value, '__module__', None)}.{name}"
