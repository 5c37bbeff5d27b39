"""Counts past 2**31: integers in two limbs, high * 2**16 + low, where a device has 32 bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any  # A fraction is a number or an array of either kind.

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array
Limbs = jax.Array | np.ndarray
LIMB = 16
ROOM = 2**32  # As many entries of a model as one uint32 can count.


def count(mask: Array, most: int = 1) -> Array:
  """Counts per model: boolean, or numbers up to `most`, [K, *s] -> limbs uint32 [2, K], normal.

  Example:
    >>> count(jnp.array([[True, False, True], [False, False, True]])).tolist()
    [[0, 0], [2, 1]]
  """
  axes = sorted(range(1, mask.ndim), key=lambda axis: -mask.shape[axis])
  if math.prod(mask.shape[1:]) * most < ROOM:
    one = jnp.sum(mask, axis=tuple(axes), dtype=jnp.uint32)
    return normal(jnp.stack([jnp.zeros_like(one), one]))
  low = jnp.sum(mask, axis=axes[0], dtype=jnp.uint32, keepdims=True)
  limbs = normal(jnp.stack([jnp.zeros_like(low), low]))
  half = LIMB // 2
  for axis in axes[1:]:
    # The low limb in two halves: 2**16 of them would overflow a sum of whole ones.
    parts = (limbs[0], limbs[1] >> half, limbs[1] & jnp.uint32(2**half - 1))
    high, middle, low = (jnp.sum(p, axis=axis, dtype=jnp.uint32, keepdims=True) for p in parts)
    carried = (middle & jnp.uint32(2**half - 1)) << half
    limbs = normal(jnp.stack([high + (middle >> half), low + carried]))
  return limbs.reshape(limbs.shape[:2])


def counts(masks: Sequence[Array]) -> list[Array]:
  """Counts several masks in one reading, as `count` does each.

  Example:
    >>> mask = jnp.array([[True, False, True]])
    >>> [each.tolist() for each in counts([mask, ~mask])]
    [[[0], [2]], [[0], [1]]]
  """

  def apart(*masks: Array) -> list[Array]:
    return [count(mask) for mask in masks]

  def together(*masks: Array) -> list[Array]:
    zeros, axes = [np.uint32(0)] * len(masks), range(1, masks[0].ndim)
    every = lax.reduce([mask.astype(jnp.uint32) for mask in masks], zeros, _add, axes)
    return [normal(jnp.stack([jnp.zeros_like(one), one])) for one in every]

  # Where devices share a mask, one sum of several makes them gather what sums of one add up.
  if math.prod(masks[0].shape[1:]) >= ROOM or jax.device_count() > 1:
    return apart(*masks)
  # On CPUs one sum of several runs at several times the speed of a sum of one.
  return lax.platform_dependent(*masks, cpu=together, default=apart)


def _add(a: Sequence[Array], b: Sequence[Array]) -> list[Array]:
  return [x + y for x, y in zip(a, b, strict=True)]


def normal(limbs: Array) -> Array:
  """Carries the low limb over: afterwards it is below 2**16."""
  high, low = limbs[0], limbs[1]
  return jnp.stack([high + (low >> LIMB), low & jnp.uint32(2**LIMB - 1)])


def at_least(a: Limbs, b: Limbs) -> Array:
  """Compares counts in normal limbs: a >= b, elementwise [K]."""
  a, b = jnp.asarray(a), jnp.asarray(b)
  return (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] >= b[1]))


def plus(a: Limbs, b: Limbs) -> Array:
  """Adds counts in normal limbs, or a state that holds them; the sum is normal again."""
  # Carried over each time: the low limbs of 2**16 slices would overflow.
  return normal(jnp.asarray(a) + jnp.asarray(b))


def minus(a: Limbs, b: Limbs) -> Array:
  """Subtracts counts in normal limbs; a >= b is assumed."""
  borrow = (a[1] < b[1]).astype(jnp.uint32)
  low = a[1] + borrow * jnp.uint32(2**LIMB) - b[1]
  return jnp.stack([a[0] - borrow - b[0], low])


def limbs(number: int) -> np.ndarray:
  """Writes a count as normal limbs: int -> uint32 [2].

  Example:
    >>> limbs(2**31 + 5).tolist()
    [32768, 5]
  """
  return np.array([number >> LIMB, number & (2**LIMB - 1)], np.uint32)


def share(fraction: Any, size: int, num_models: int, *, more: int = 0, least: int = 0) -> Limbs:
  """Returns floor(fraction * size) + more, between `least` and size, as limbs [2, num_models].

  A Python number or NumPy array is counted on the host: the product in double precision,
  truncated, as `int(fraction * size)`. A jax array, traced or not, has float32 precision, and the
  product is exact: the fraction counts as half a unit in its last place larger, so that 0.7 of 10
  is 7, and the result is at most one part in 2**23 too large.

  Example:
    >>> share(0.7, 10, num_models=2).tolist()
    [[0, 0], [7, 7]]
    >>> share(jnp.float32(0.7), 10, num_models=2).tolist()
    [[0, 0], [7, 7]]
  """
  if isinstance(fraction, jax.Array):
    if size >= 2**47:
      raise ValueError(f"a group of {size} entries is too large to rank; at most 2**47 - 1.")
    counted = part(jnp.broadcast_to(fraction, (num_models,)), jnp.asarray(limbs(size))[:, None])
    counted = plus(counted, jnp.asarray(limbs(more))[:, None])
    low = jnp.broadcast_to(jnp.asarray(limbs(least))[:, None], counted.shape)
    return at_most(jnp.where(at_least(counted, low), counted, low), size)
  each = np.broadcast_to(np.asarray(fraction), (num_models,))
  # As text: float32(0.7) means 0.7, not 0.699999988.
  counts = [min(max(int(float(str(f)) * size) + more, least), size) for f in each]
  return np.stack([limbs(n) for n in counts], axis=1)


def at_most(a: Limbs, size: int) -> Array:
  """Returns the smaller of counts, in normal limbs [2, K], and a size."""
  whole = jnp.broadcast_to(jnp.asarray(limbs(size))[:, None], a.shape)
  return jnp.where(at_least(a, whole), whole, a)


def part(fraction: Array, whole: Array) -> Array:
  """Returns floor(fraction * whole): fractions [M] of counts below 2**47, normal limbs [2, M].

  By long multiplication in digits of 16 bits; see `share` for how a fraction counts.
  """
  fraction = jnp.clip(fraction.astype(jnp.float32), 0, 1)
  exponent = lax.bitcast_convert_type(fraction, jnp.uint32) & jnp.uint32(0x7F800000)
  power = lax.bitcast_convert_type(exponent, jnp.float32)
  half = power * jnp.float32(2**-24)  # Half a unit in the last of 24 places.
  a = [x + y for x, y in zip(_digits(fraction), _digits(half), strict=True)]
  for i in range(2):
    a[i], a[i + 1] = a[i] & 0xFFFF, a[i + 1] + (a[i] >> 16)
  b = [whole[1], whole[0] & jnp.uint32(0xFFFF), whole[0] >> 16]
  out = [jnp.zeros_like(a[0]) for _ in range(6)]
  for i in range(3):
    carry = jnp.zeros_like(a[0])
    for j in range(3):
      t = a[i] * b[j] + out[i + j] + carry
      out[i + j], carry = t & 0xFFFF, t >> 16
    out[i + 3] = carry
  product = jnp.stack([out[4] | (out[5] << 16), out[3]])
  return jnp.where(fraction < 1, product, whole)


def _digits(fraction: Array) -> list[Array]:
  """The first 48 bits of a fraction below 1, as three digits of 16 bits, the last digit first."""
  digits = []
  for _ in range(3):
    fraction = fraction * 2**16
    digits.append(fraction.astype(jnp.uint32))
    fraction = fraction - jnp.floor(fraction)
  return digits[::-1]
