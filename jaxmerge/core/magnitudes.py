"""Sums of squares of numbers of any size.

Squares of float32 are in range only for numbers from 1e-19 to 1e19: above, they overflow; below,
they are zero. Norms therefore divide by a power of two first, which changes no bit. If the largest
number is in memory, it sets the power (`peak`). If a sum is over parts of a leaf, or over many
leaves, the magnitudes of the other parts are unknown: there are five windows of magnitude, each
part adds to the window of its largest number, and windows are summed apart (`bin_sums`,
`join_bins`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any  # Any: dtypes.

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array
WINDOWS = 5
# By the bytes of a dtype: powers of two that a window is wide, and its bits of the exponent.
_STEPS = {4: 60, 8: 480}
_EXPONENTS: dict[int, Any] = {4: (np.uint32, 0x7F800000), 8: (np.uint64, 0x7FF0000000000000)}


def peak(x: Array, axes: Sequence[int]) -> Array:
  """Returns the largest power of two up to the largest magnitude along axes; 1 if that is zero.

  Example:
    >>> peak(jnp.array([[3.0, -5.0], [0.0, 0.0]]), (1,)).tolist()
    [[4.0], [1.0]]
  """
  if x.dtype.itemsize < 4:  # float32 has every power of two of a narrower dtype.
    return peak(x.astype(jnp.float32), axes).astype(x.dtype)
  most = jnp.max(jnp.abs(lax.stop_gradient(x)), axis=tuple(axes), keepdims=True, initial=0)
  kind, mask = _EXPONENTS[x.dtype.itemsize]
  power = lax.bitcast_convert_type(lax.bitcast_convert_type(most, kind) & kind(mask), x.dtype)
  ends = (2.0 ** (k * _STEPS[x.dtype.itemsize]) for k in (-2, 2))  # Those that have an inverse.
  return jnp.where(most > 0, jnp.clip(power, *(np.asarray(e, x.dtype) for e in ends)), 1)


def norm(x: Array, axes: Sequence[int]) -> Array:
  """Returns the norm along axes, which are kept with length 1.

  Example:
    >>> [[f"{x:.5g}"] for (x,) in norm(jnp.array([[3e30, -4e30], [0.0, 0.0]]), (1,)).tolist()]
    [['5e+30'], ['0']]
  """
  unit = peak(x, axes)
  scaled = x / unit
  square = jnp.sum(scaled * scaled, axis=tuple(axes), keepdims=True)
  # A root of zero has no gradient.
  return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0) * unit


def bin_sums(f: Callable[..., Any], *xs: Array) -> Any:
  """Returns f(*xs), a tree of sums of powers, by window: [5, ...] each.

  Example:
    >>> sums = bin_sums(lambda x: jnp.sum(x * x), jnp.array([3e30, 4e30]))
    >>> total, unit = join_bins(sums, 2)
    >>> f"{float(jnp.sqrt(total) * unit):.5g}"
    '5e+30'
  """
  dtype = xs[0].dtype
  most = functools.reduce(
    jnp.maximum, [jnp.max(jnp.abs(lax.stop_gradient(x)), initial=0) for x in xs]
  )
  step = _STEPS[dtype.itemsize]
  bounds = [np.asarray(2.0 ** (step * (k - 1.5)), dtype) for k in range(WINDOWS - 1)]
  place = sum((most >= bound).astype(jnp.int32) for bound in bounds)
  factor = _at(place, [np.asarray(2.0 ** (step * (2 - k)), dtype) for k in range(WINDOWS)])
  sums = f(*(x * factor for x in xs))
  return jax.tree.map(
    lambda y: jnp.stack([jnp.where(place == k, y, jnp.zeros_like(y)) for k in range(WINDOWS)]),
    sums,
  )


def over(x: Array, unit: Array) -> Array:
  """Divides a non-negative number by the square of a unit, which may itself be out of range.

  Example:
    >>> over(jnp.array([0.0, 4.0]), jnp.float32(2.0**-100)).tolist()
    [0.0, inf]
  """
  # Via the root: a compiler would merge two divisions by the unit into one by its square.
  share = jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0) / unit
  return share * share


def plain(x: Array) -> Array:
  """Puts sums that are in range into the middle window: [...] -> [5, ...]."""
  return jnp.stack([x if k == WINDOWS // 2 else jnp.zeros_like(x) for k in range(WINDOWS)])


def join_bins(sums: Any, degree: int) -> tuple[Any, Array]:
  """Joins the windows of sums: (the sums over a power of a unit, that unit, a power of two).

  The unit is 1 but for numbers of which the largest is below 1e-9 or above 1e9.
  """
  leaves = jax.tree.leaves(sums)
  some = functools.reduce(
    jnp.logical_or, [jnp.any(x != 0, axis=tuple(range(1, x.ndim))) for x in leaves]
  )
  dtype = leaves[0].dtype
  step = _STEPS[dtype.itemsize]
  top = jnp.max(jnp.where(some, jnp.arange(WINDOWS, dtype=jnp.int32), -1))
  unit = _at(top, [np.asarray(2.0 ** (step * (k - 2)), dtype) for k in range(WINDOWS)])

  def one(x: Array) -> Array:
    # Sums two windows lower are too small to change a bit.
    lower = jnp.concatenate([jnp.zeros_like(x[:1]), x[:-1]]) * np.asarray(
      2.0 ** (-step * degree), dtype
    )
    return _at(top, list(x + lower))

  return jax.tree.map(one, sums), jnp.where(top < 0, 1, unit)


def _at(place: Any, values: Sequence[Any]) -> Array:
  """Picks one of a few values: the last whose place is not above, or the first."""
  return functools.reduce(
    lambda chosen, kv: jnp.where(place >= kv[0], kv[1], chosen), enumerate(values), values[0]
  )
