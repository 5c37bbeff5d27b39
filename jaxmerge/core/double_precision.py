"""Merging in 64 bits: 64-bit leaves are merged in 64 bits, whether or not JAX enables x64."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar  # Any: trees of arrays.

import jax
import jax.numpy as jnp
import numpy as np

P = ParamSpec("P")
R = TypeVar("R")


def is_wide(x: Any) -> bool:
  """Returns whether a leaf has floating-point numbers of 64 bits.

  Example:
    >>> is_wide(np.ones(2)), is_wide(jnp.ones(2)), is_wide(np.arange(2))
    (True, False, False)
  """
  dtype = getattr(x, "dtype", None)
  return dtype is not None and jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize == 8


def is_narrowed(dtype: Any) -> bool:
  """Returns whether JAX's current configuration narrows a dtype.

  Example:
    >>> is_narrowed(np.float64), is_narrowed(np.int32)
    (True, False)
  """
  return jax.dtypes.canonicalize_dtype(dtype) != dtype


def context(*trees: Any) -> contextlib.AbstractContextManager[Any]:
  """Returns a context that enables 64-bit computation if any leaf has 64 bits.

  Traced leaves do not count: the width of the program being traced cannot change inside it.

  Example:
    >>> with context({"w": np.ones(2)}):
    ...   print(jnp.asarray(np.ones(2)).dtype)
    float64
  """
  leaves = [x for params in trees for x in jax.tree.leaves(params)]
  traced = any(isinstance(x, jax.core.Tracer) for x in leaves)
  return (
    jax.enable_x64(True) if any(map(is_wide, leaves)) and not traced else contextlib.nullcontext()
  )


def aware(f: Callable[P, R], *more: Any) -> Callable[P, R]:
  """Returns a function that computes in 64 bits if its arguments, or `more`, have 64 bits.

  Results that JAX's configuration would narrow at the next operation are returned as NumPy arrays.

  Example:
    >>> aware(lambda x: 2 * jnp.asarray(x))(np.array([1 / 3]))
    array([0.66666667])
  """

  @functools.wraps(f)
  def run(*args: P.args, **kwargs: P.kwargs) -> R:
    # An iterator over models is read once: here, where its leaves are looked at.
    args = tuple(list(x) if isinstance(x, Iterator) else x for x in args)  # type: ignore[assignment]
    width = context(args, kwargs, more)
    if isinstance(width, contextlib.nullcontext):
      return f(*args, **kwargs)
    with width:
      out = f(*args, **kwargs)
    return jax.tree_util.tree_map_with_path(_as_numpy, out)

  return run


def _as_numpy(path: Any, x: Any) -> Any:
  narrowed = isinstance(x, jax.Array) and is_wide(x) and is_narrowed(x.dtype)
  if narrowed and isinstance(x, jax.core.Tracer):
    raise _narrowing_error(jax.tree_util.keystr(path, simple=True, separator="/"), x.dtype)
  return np.asarray(x) if narrowed and len(x.sharding.device_set) == 1 else x


def refuse_narrowed(trees: Sequence[Mapping[str, Any]], *seen: Any) -> None:
  """Raises ValueError, naming the leaf, where a program that is being traced would narrow it.

  Args:
    trees: leaves of models, by name.
    seen: what is traced, if anything is.
  """
  named = [(name, x) for leaves_by_name in trees for name, x in leaves_by_name.items()]
  if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((named, seen))):
    return
  for name, x in named:
    dtype = getattr(x, "dtype", None)
    # Tracers already have the width of their program.
    if dtype is not None and not isinstance(x, jax.core.Tracer) and is_narrowed(dtype):
      raise _narrowing_error(name, dtype)


def _narrowing_error(name: str, dtype: Any) -> ValueError:
  return ValueError(
    f"leaf {name!r} is {dtype}, which your jit, vmap or grad would make a narrower one; drop the "
    "leaf first, or trace within jax.enable_x64(True)."
  )


def zeros(shape: tuple[int, ...], dtype: Any) -> Any:
  """Returns zeros of a dtype, of NumPy where JAX would narrow it.

  Example:
    >>> zeros((1,), np.int64)
    array([0])
  """
  return np.zeros(shape, dtype) if is_narrowed(dtype) else jnp.zeros(shape, dtype)


def copy_leaf(x: Any) -> Any:
  """Returns a leaf that is not merged: the same values in the same dtype, never through a program.

  Example:
    >>> copy_leaf(np.array([2**40 + 7])).tolist()
    [1099511627783]
  """
  if isinstance(x, jax.Array):
    return x
  array = np.array(x)
  return array if is_narrowed(array.dtype) else jnp.asarray(array)
