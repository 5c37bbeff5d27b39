"""Digests of methods that are the same in every process, to recognise a method after a restart."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import re
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any  # A method holds functions, and they hold anything.

import numpy as np

# Names of a stage's fields in digests, where they differ from the attribute.
_FIELDS = {"reductions": "statistics", "hparams": "numbers"}
# Functions of these packages count without the globals they use.
_LIBRARIES = {"jax", "jaxlib", "jaxmerge", "numpy", "optax", "flax", "builtins", "functools"}


def fingerprint(value: Any) -> str:
  """Returns a digest of a method, from its functions' code and the values they close over.

  A user's functions and numbers that these use by a global name count too; what is of a library
  counts by its name. What is not known in text form counts as different in every process.

  Example:
    >>> from jaxmerge import methods
    >>> fingerprint(methods.ties(0.2)) == fingerprint(methods.ties(0.2))
    True
    >>> fingerprint(methods.ties(0.2)) == fingerprint(methods.ties(0.3))
    False
  """
  return _digest(_parts(value, ()))


def stable_fingerprint(value: Any) -> str | None:
  """Returns the digest of a value; None if it would be another one in another process."""
  parts = list(_parts(value, ()))
  return None if any(part.startswith(_unknown()) for part in parts) else _digest(parts)


def _digest(parts: Iterable[str]) -> str:
  digest = hashlib.blake2b(digest_size=16)
  for part in parts:
    digest.update(f"{len(part)}:{part}".encode())
  return digest.hexdigest()


def _unknown() -> str:
  """How a part begins that is known in this process alone."""
  return f"unknown in process {os.getpid()}: "


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
  while isinstance(value, types.FunctionType) and "jaxtyping" in value.__code__.co_filename:
    value = value.__wrapped__  # type: ignore[attr-defined]  # Checks of types change nothing.
  if value is None or value is ... or isinstance(value, (bool, int, float, complex, str, bytes)):
    yield f"{type(value).__name__} {value!r}"
  elif isinstance(value, types.FunctionType):
    cells = [cell.cell_contents for cell in value.__closure__ or ()]
    used = _globals_of(value)
    for part in (value.__code__, value.__defaults__, value.__kwdefaults__, cells, used):
      yield from _parts(part, inside)
  elif isinstance(value, types.MethodType):
    yield from _parts((value.__func__, value.__self__), inside)
  elif isinstance(value, re.Pattern):
    yield f"pattern {value.flags} {value.pattern!r}"
  elif isinstance(value, types.BuiltinMethodType) and not isinstance(
    value.__self__, types.ModuleType | type | None
  ):
    yield value.__name__
    yield from _parts(value.__self__, inside)
  elif isinstance(value, types.MethodDescriptorType):
    yield f"{value.__objclass__.__qualname__}.{value.__name__}"
  elif hasattr(value, "__wrapped__") and not isinstance(value, type):  # By jax.jit, for one.
    yield type(value).__qualname__
    yield from _parts(value.__wrapped__, inside)
  elif isinstance(value, types.CodeType):
    yield value.co_code.hex()
    for part in (value.co_names, value.co_varnames, value.co_freevars, value.co_consts):
      yield from _parts(part, inside)
  elif isinstance(value, slice):
    yield "slice"
    yield from _parts((value.start, value.stop, value.step), inside)
  elif isinstance(value, functools.partial):
    yield from _parts((value.func, value.args, value.keywords), inside)
  elif dataclasses.is_dataclass(value) and not isinstance(value, type):
    yield type(value).__qualname__
    yield from _parts(_fields(value), inside)
  elif isinstance(value, Mapping):
    yield f"mapping {len(value)}"
    for item in value.items():
      yield from _parts(item, inside)
  elif isinstance(value, (tuple, list, frozenset)):
    yield f"{type(value).__name__} {len(value)}"
    for part in sorted(value, key=repr) if isinstance(value, frozenset) else value:
      yield from _parts(part, inside)
  elif isinstance(getattr(value, "dtype", None), np.dtype) and hasattr(value, "shape"):
    array = np.asarray(value)
    yield f"{array.dtype} {array.shape} {hashlib.blake2b(array.tobytes()).hexdigest()}"
  elif str(getattr(value, "dtype", "")).startswith("key<"):
    import jax  # Where there is a key, it is imported already.

    yield str(value.dtype)
    yield from _parts(np.asarray(jax.random.key_data(value)), inside)
  else:
    yield from _others(value, inside)


def _fields(value: Any) -> dict[str, Any]:
  """Returns the fields of a dataclass; a stage's under the names that digests on disk use."""
  fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.name != "key"}
  if (type(value).__module__, type(value).__qualname__) == ("jaxmerge.core.stage", "Stage"):
    read = fields.pop("statistics")
    fields = {_FIELDS.get(n, n): v for n, v in fields.items()}
    fields |= {"reads": dict(sorted(read.items()))} if read else {}
  return fields


def _others(value: Any, inside: tuple[int, ...]) -> Iterator[str]:
  """Yields the text of values known by name, by attributes, or not at all."""
  module = getattr(value, "__module__", None)
  name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
  if isinstance(value, types.ModuleType):
    yield f"module {value.__name__}"
  elif isinstance(value, np.dtype):
    yield f"dtype {value}"
  elif isinstance(name, str) and _lookup(module, name) is value:
    yield f"{module}.{name}"
  elif hasattr(value, "__dict__") and not hasattr(value, "dtype"):
    yield f"{type(value).__module__}.{type(value).__qualname__}"
    yield from _parts(dict(vars(value)), inside)
  else:
    yield f"{_unknown()}{id(value)} {value!r}"


def _lookup(module: Any, name: str) -> Any:
  """Returns a module's attribute by name, or None."""
  value = sys.modules.get(module) if isinstance(module, str) else None
  for part in name.split("."):
    value = getattr(value, part, None)
  return value


def _globals_of(function: types.FunctionType) -> dict[str, Any]:
  """Returns the functions, numbers and strings of a user's module that a function refers to."""
  if (function.__module__ or "").partition(".")[0] in _LIBRARIES:
    return {}
  used = {
    n: function.__globals__[n] for n in function.__code__.co_names if n in function.__globals__
  }
  plain = (bool, int, float, complex, str, bytes, tuple, re.Pattern, types.FunctionType)
  return {n: v for n, v in used.items() if isinstance(v, plain)}
