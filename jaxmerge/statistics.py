"""Statistics that drivers add up: sums, inner products, exact thresholds.

Thresholds are exact and need no sort, no gather and no flat copy: a non-negative float orders like
its bit pattern, so the k-th largest is found by counting how many patterns reach a candidate, one bit
after the other. Counts are integers in two limbs (high * 2**16 + low), exact past 2**31.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any  # States of statistics are dicts of arrays.

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmerge.stage import Leaf, Statistic

Array = jax.Array
LIMB = 16


def total(name: str, f: Callable[[Array, Leaf], Any]) -> Statistic:
  """Adds up f(x, leaf) over the leaves of a group."""
  return Statistic(name, lambda x, leaf, state, known: f(x, leaf))


def greatest(name: str, f: Callable[[Array, Leaf], Any]) -> Statistic:
  """Takes the maximum of f(x, leaf) over the leaves of a group."""
  return Statistic(name, lambda x, leaf, state, known: f(x, leaf), combine=jnp.maximum)


def gram(name: str) -> Statistic:
  """Measures the inner products of the models: [K, *s] -> [K, K], over a group."""

  def products(x: Array, leaf: Leaf) -> Array:
    axes = list(range(1, x.ndim))
    return lax.dot_general(x, x, ((axes, axes), ((), ())), precision="highest")

  return total(name, products)


def kth(name: str, of: Callable[[Array], Array], *, rank: str) -> Statistic:
  """Finds the exact value of rank `known[rank]` among of(x) >= 0, per model.

  Args:
    name: the result is known under this name: the value's bit pattern, uint32 [K].
    of: elementwise function of the stack x [K, *s]; its values must not be negative.
    rank: name of the known count n, limbs [2, K]: the n-th largest is searched. For n = 0 the result
      is a pattern above every finite value.
  """
  top = 30  # The sign bit of a non-negative float is zero.

  def measure(x: Array, leaf: Leaf, state: Any, known: Any) -> Array:
    candidate = state["found"] | (jnp.uint32(1) << state["bit"])
    return count(pattern(of(x)) >= _against(candidate, x))

  def refine(state: Any, reached: Array, known: Any) -> Any:
    bit = jnp.uint32(1) << state["bit"]
    enough = at_least(reached, known[rank])
    return {
      "found": jnp.where(enough, state["found"] | bit, state["found"]),
      "bit": state["bit"] - jnp.uint32(1),
    }

  def begin(known: Any) -> Any:
    return {"found": jnp.zeros(known[rank].shape[-1], jnp.uint32), "bit": jnp.uint32(top)}

  return Statistic(name, measure, begin, refine, passes=top + 1)


def top(name: str, of: Callable[[Array], Array]) -> tuple[Statistic, ...]:
  """Finds which entries are the `known[name]` largest of(x) >= 0, ties broken by position.

  `inside(name, of(x), leaf, known)` tells for each entry whether it is among them.

  Args:
    name: name of the known count n, limbs [2, K]. Exactly n entries are inside.
    of: as for `kth`.
  """
  value, above, last = f"{name} value", f"{name} above", f"{name} last"

  def over(x: Array, leaf: Leaf, state: Any, known: Any) -> Array:
    return count(pattern(of(x)) > _against(known[value]["found"], x))

  def measure(x: Array, leaf: Leaf, state: Any, known: Any) -> Array:
    candidate = state["found"] | (jnp.uint32(1) << state["bit"])
    tied = pattern(of(x)) == _against(known[value]["found"], x)
    return count(tied & (position(x, leaf) < _against(candidate, x)))

  def refine(state: Any, before: Array, known: Any) -> Any:
    bit = jnp.uint32(1) << state["bit"]
    wanted = minus(known[name], normal(known[above]))
    return {
      "found": jnp.where(at_least(before, wanted), state["found"], state["found"] | bit),
      "bit": state["bit"] - jnp.uint32(1),
    }

  def begin(known: Any) -> Any:
    return {"found": jnp.zeros(known[name].shape[-1], jnp.uint32), "bit": jnp.uint32(31)}

  return (
    kth(value, of, rank=name),
    Statistic(above, over),
    Statistic(last, measure, begin, refine, passes=32),
  )


def inside(name: str, values: Array, leaf: Leaf, known: Any) -> Array:
  """Tells which entries of `values` [K, *s] the statistics `top(name, ...)` found: boolean [K, *s]."""
  bits = pattern(values)
  cut = _against(known[f"{name} value"]["found"], values)
  last = _against(known[f"{name} last"]["found"], values)
  return (bits > cut) | ((bits == cut) & (position(values, leaf) <= last))


def pattern(values: Array) -> Array:
  """Returns bit patterns that order as the non-negative values do: float32 [...] -> uint32 [...]."""
  return lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32)


def position(x: Array, leaf: Leaf) -> Array:
  """Returns each entry's position in its group: [K, *s] -> uint32 [1, *s]."""
  flat = jnp.zeros((1,) * x.ndim, jnp.uint32)
  stride = 1
  for axis in range(x.ndim - 1, 0, -1):
    index = lax.broadcasted_iota(jnp.uint32, (1,) * axis + (x.shape[axis],), axis)
    index = index.reshape((1,) * axis + (x.shape[axis],) + (1,) * (x.ndim - axis - 1))
    if axis == 1:
      index = index + leaf.start.astype(jnp.uint32)
    flat = flat + index * jnp.uint32(stride)
    stride *= leaf.shape[axis - 1]
  return flat + leaf.offset


def count(mask: Array) -> Array:
  """Counts per model: boolean [K, *s] -> limbs uint32 [2, K], normal."""
  axes = tuple(range(1, mask.ndim))
  if math.prod(mask.shape[1:]) < 2**31:
    one = jnp.sum(mask, axis=axes, dtype=jnp.int32).astype(jnp.uint32)
    return normal(jnp.stack([jnp.zeros_like(one), one]))
  longest = max(axes, key=lambda axis: mask.shape[axis])
  low = jnp.sum(mask, axis=longest, dtype=jnp.int32, keepdims=True).astype(jnp.uint32)
  limbs = normal(jnp.stack([jnp.zeros_like(low), low]))
  for axis in axes:
    if axis != longest:
      limbs = normal(jnp.sum(limbs, axis=axis + 1, keepdims=True, dtype=jnp.uint32))
  return limbs.reshape(limbs.shape[:2])


def normal(limbs: Array) -> Array:
  """Carries the low limb over: afterwards it is below 2**16."""
  high, low = limbs[0], limbs[1]
  return jnp.stack([high + (low >> LIMB), low & jnp.uint32(2**LIMB - 1)])


def at_least(a: Array, b: Array) -> Array:
  """Compares counts given as limbs: a >= b, elementwise [K]. `a` need not be normal."""
  a = normal(a)
  return (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] >= b[1]))


def minus(a: Array, b: Array) -> Array:
  """Subtracts counts given as normal limbs; a >= b is assumed."""
  borrow = (a[1] < b[1]).astype(jnp.uint32)
  low = a[1] + borrow * jnp.uint32(2**LIMB) - b[1]
  return jnp.stack([a[0] - borrow - b[0], low])


def limbs(number: int) -> np.ndarray:
  """Writes a count as normal limbs: int -> uint32 [2]."""
  return np.array([number >> LIMB, number & (2**LIMB - 1)], np.uint32)


def share(fraction: Any, size: int, height: int, *, plus: int = 0) -> Array:
  """Returns min(floor(fraction * size) + plus, size) per model, as limbs [2, height].

  Exact for a Python number or NumPy array. For a jax array, traced or not, the fraction has float32
  precision: fractions within half a unit in the last place of a decimal fraction count as that one.
  """
  if isinstance(fraction, jax.Array):
    counted = _traced_share(jnp.broadcast_to(fraction, (height,)), size)
    counted = normal(counted.at[1].add(jnp.uint32(plus)))
    whole = jnp.asarray(limbs(size))[:, None]
    return jnp.where(at_least(counted, jnp.broadcast_to(whole, counted.shape)), whole, counted)
  each = np.broadcast_to(np.asarray(fraction), (height,))
  # repr: float32(0.7) means 0.7, not 0.699999988.
  counts = [min(int(float(str(f)) * size) + plus, size) for f in each]
  return np.stack([limbs(n) for n in counts], axis=1)


def _traced_share(fraction: Array, size: int) -> Array:
  """floor(fraction * size) by long multiplication in 16-bit digits: [K] -> limbs [2, K]."""
  if size >= 2**47:
    raise ValueError(f"a group of {size} entries is too large to rank; at most 2**47 - 1.")
  digit = jnp.uint32(0xFFFF)
  scaled = jnp.clip(fraction.astype(jnp.float32), 0, 1) * jnp.float32(2**31)
  whole = fraction >= 1
  fixed = jnp.where(whole, 0, scaled).astype(jnp.uint32) + jnp.uint32(2**6)
  a = [fixed & digit, fixed >> 16]
  b = [jnp.uint32((size >> (16 * i)) & 0xFFFF) for i in range(3)]
  out = [jnp.zeros_like(fixed) for _ in range(6)]
  for i in range(2):
    carry = jnp.zeros_like(fixed)
    for j in range(3):
      t = a[i] * b[j] + out[i + j] + carry
      out[i + j], carry = t & digit, t >> 16
    out[i + 3] = carry
  d = [((out[i + 1] >> 15) | (out[i + 2] << 1)) & digit for i in range(3)]  # Shifted right by 31.
  product = jnp.stack([d[1] | (d[2] << 16), d[0]])
  return jnp.where(whole, jnp.asarray(limbs(size))[:, None], product)


def _against(per_model: Array, x: Array) -> Array:
  """Shapes a value per model [K] to compare with a stack x [K, *s]."""
  return per_model.reshape(per_model.shape + (1,) * (x.ndim - 1))
