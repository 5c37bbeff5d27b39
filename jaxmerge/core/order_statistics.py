"""Order statistics: exact thresholds and ranks, without a sort.

Thresholds are exact and need no sort, no gather and no flat copy: a non-negative float orders like
its bit pattern, so the k-th largest is found by counting how many patterns reach three candidates,
which leave a quarter of those that are possible. Counts are those of `wide_counts`, exact past
2**31.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple  # Any: results of reductions are trees of arrays.

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmerge.core import wide_counts
from jaxmerge.core.stage import Group, Leaf, Rank

Array = jax.Array


class Cut(NamedTuple):
  """Where a ranking is cut off, per model.

  Keeps entries above the value, and the first of those equal to it.

  Attributes:
    value: bit pattern of the value at the cut, [K]; see `pattern`.
    last: position of the last kept entry among those equal to the value, uint32 [K]; None: all
      equal entries are kept.
  """

  value: Array
  last: Array | None = None


_KINDS = {4: (jnp.float32, jnp.uint32), 8: (jnp.float64, jnp.uint64)}
EVERY = np.uint32(2**32 - 1)  # As a position in `Cut.last`: all equal entries are kept.


def ranks(x: Array) -> Array:
  """Returns the place of each entry in its row by ascending magnitude: [K, rows, columns].

  Example:
    >>> ranks(jnp.array([[[0.9, -0.1, 0.4, 0.1]]])).tolist()
    [[[3, 0, 2, 1]]]
  """
  x = jnp.abs(x)
  if x.shape[2] > 2**16 or x.dtype.itemsize > 4:
    return _ranks_by_order(x)
  return lax.platform_dependent(x, cpu=_ranks_by_digits, default=_ranks_by_order)


def _ranks_by_order(x: Array) -> Array:
  return jnp.argsort(jnp.argsort(x, axis=2, stable=True), axis=2).astype(jnp.int32)


def _ranks_by_digits(x: Array) -> Array:
  """Sorts by the lower 16 bits, then by the higher, each packed with the entry's position.

  CPUs sort plain integers several times as fast as pairs.
  """
  bits, places = pattern(x), jnp.arange(x.shape[2], dtype=jnp.uint32)[None, None]

  def sorted_by(digit: Array) -> Array:
    return jnp.sort((digit << 16) | places, axis=2, stable=False) & 0xFFFF

  first = sorted_by(bits & 0xFFFF)
  second = sorted_by(jnp.take_along_axis(bits >> 16, first, axis=2))
  order = jnp.take_along_axis(first, second, axis=2)
  return jax.vmap(jax.vmap(_inverse))(order)


def _inverse(order: Array) -> Array:
  places = jnp.arange(order.size, dtype=jnp.int32)
  return jnp.zeros(order.shape, jnp.int32).at[order].set(places, unique_indices=True)


def inside(cut: Cut, values: Array, leaf: Leaf) -> Array:
  """Returns which entries of `values` >= 0 a cut keeps: [K, *s] -> boolean [K, *s].

  Example:
    >>> cut = Cut(pattern(jnp.array([2.0])))
    >>> leaf = Leaf(None, {}, jnp.zeros(1, jnp.uint32), jnp.uint32(0), np.uint32(0), np.uint32(0))
    >>> inside(cut, jnp.array([[1.0, 2.0, 3.0]]), leaf).tolist()
    [[False, True, True]]
  """
  bits, value = pattern(values), _against(cut.value, values)
  if cut.last is None:
    return bits >= value
  early = position(values, leaf) <= _against(cut.last, values)
  return (bits > value) | ((bits == value) & early)


def cut_for(cut: Cut, first: int, size: int) -> Cut:
  """Returns the cut for `size` entries from position `first`; by value alone if `last` is outside.

  Example:
    >>> cut = Cut(jnp.array([7], jnp.uint32), jnp.array([100], jnp.uint32))
    >>> cut_for(cut, 0, 50).value.tolist(), cut_for(cut, 101, 50).value.tolist()
    ([7], [8])
  """
  last, places = np.asarray(cut.last).astype(np.int64), first % 2**32
  if ((places <= last) & (last < places + size - 1)).any():
    return cut
  # After `last` no equal entry is kept: the same as a cut at the next larger value.
  return Cut(cut.value + (last < places).astype(cut.value.dtype))


def cut(rank: Rank, over: Any, parts: Sequence[tuple[Any, Leaf]], stats: Any) -> Cut:
  """Finds the value at the cut, then the last position among entries equal to it."""

  def counted(masks: Callable[..., Sequence[Array]], *numbers: Any) -> Sequence[Array]:
    return over(lambda x, leaf: _counts(rank, masks, x, leaf, stats, numbers), wide_counts.plus)

  def reached(tried: Sequence[Array]) -> list[Array]:
    return [wide_counts.at_least(some, n) for some in counted(_from, tried)]

  n = stats[rank.rank]
  zeros = jnp.zeros(n.shape[-1], jnp.uint32)
  kind = jax.eval_shape(lambda: pattern(rank.of(*parts[0], stats))).dtype.type
  bits = 8 * np.dtype(kind).itemsize  # The sign bit of non-negative values is zero.
  patterns = functools.partial(_narrow, top=kind(2 ** (bits - 1) - 1), holds=reached)
  start = jnp.asarray(kind(2 ** (bits - 2))), zeros.astype(kind)
  _, value = lax.fori_loop(0, bits // 2, lambda i, carry: patterns(carry), start)
  if not rank.exact:
    return Cut(value)

  def wanting(tried: Sequence[Array]) -> list[Array]:
    before = counted(_tied_before, value, tried)
    return [~wide_counts.at_least(some, wanted) for some in before]

  above, tied = counted(_above_and_tied, value)
  wanted = wide_counts.minus(n, above)
  # If all equal entries are kept, their positions need no search.
  last = jnp.where(wide_counts.at_least(wanted, tied), EVERY, zeros)
  positions = functools.partial(_narrow, top=EVERY, holds=wanting)
  start = jnp.uint32(2**30), last
  return Cut(value, lax.while_loop(_is_open, positions, start)[1])


# A separate program: leaves of one shape are traced, rewritten and batched once.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _counts(
  rank: Rank,
  masks: Callable[..., Sequence[Array]],
  x: Any,
  leaf: Leaf,
  stats: Any,
  numbers: Sequence[Any],
) -> list[Array]:
  values = rank.of(x, leaf, stats)
  return wide_counts.counts(masks(pattern(values), position(values, leaf), *numbers))


def _from(bits: Array, at: Array, tried: Sequence[Array]) -> list[Array]:
  return [bits >= _against(value, bits) for value in tried]


def _above_and_tied(bits: Array, at: Array, value: Array) -> list[Array]:
  return [bits > _against(value, bits), bits == _against(value, bits)]


def _tied_before(bits: Array, at: Array, value: Array, tried: Sequence[Array]) -> list[Array]:
  same = bits == _against(value, bits)
  return [same & (at < _against(place, bits)) for place in tried]


def _narrow(
  carry: tuple[Array, Array], top: Any, holds: Callable[[Sequence[Array]], Sequence[Array]]
) -> tuple[Array, Array]:
  """Runs one step of the search for the largest number, up to `top`, for which `holds` is true.

  It holds of `low`, and the number is less than four widths above; then less than four quarters of
  a width.
  """
  width, low = carry
  tried = [low]
  for _ in range(3):
    tried.append(tried[-1] + jnp.minimum(width, top - tried[-1]))
  for number, reaches in zip(tried[1:], holds(tried[1:]), strict=True):
    low = jnp.where(reaches, number, low)
  return width // 4, low


def _is_open(carry: tuple[Array, Array]) -> Array:
  return (carry[0] > 0) & (carry[1] != EVERY).any()


def comparable(x: Array) -> Array:
  """Returns values in the dtype in which they are ranked: float32, or float64 for 64-bit values."""
  return x.astype(_KINDS[max(x.dtype.itemsize, 4)][0])


def pattern(values: Array) -> Array:
  """Returns bit patterns, unsigned integers, that order as the non-negative values do.

  Example:
    >>> pattern(jnp.array([0.0, 1.0, 1.5])).tolist()
    [0, 1065353216, 1069547520]
  """
  x = comparable(values)
  return lax.bitcast_convert_type(x, _KINDS[x.dtype.itemsize][1])


def at(cut: Cut) -> Array:
  """Returns the values at a cut, [K], decoded from their bit patterns.

  Example:
    >>> at(Cut(pattern(jnp.array([1.5])))).tolist()
    [1.5]
  """
  return lax.bitcast_convert_type(cut.value, _KINDS[cut.value.dtype.itemsize][0])


def position(x: Array, leaf: Leaf) -> Array:
  """Returns each entry's position in its group: [K, *s] -> uint32 [1, *s]."""
  return index(x, leaf) + jnp.asarray(leaf.offset)


def index(x: Array, leaf: Leaf) -> Array:
  """Numbers the entries of one model row by row, over the leaf: [K, *s] -> uint32 [1, *s].

  Example:
    >>> leaf = Leaf(None, {}, jnp.zeros(1, jnp.uint32), jnp.uint32(0), np.uint32(7), np.uint32(0))
    >>> index(jnp.zeros((5, 2, 3)), leaf).tolist()
    [[[7, 8, 9], [10, 11, 12]]]
  """
  # Listed places are loaded like the weights; counted ones take 64 bits each on a CPU.
  places = _count_places(x) if leaf.places is None else jnp.asarray(leaf.places)
  return places + jnp.asarray(leaf.start)


def _count_places(x: Array) -> Array:
  flat = jnp.zeros((1,) * x.ndim, jnp.uint32)
  stride = 1
  for axis in range(x.ndim - 1, 0, -1):
    along = lax.broadcasted_iota(jnp.uint32, (x.shape[axis],), 0) * jnp.uint32(stride)
    flat = flat + along.reshape((1,) * axis + (-1,) + (1,) * (x.ndim - axis - 1))
    stride = stride * x.shape[axis] % 2**32
  return flat


def refuse_unrankable(group: Group) -> None:
  """Raises ValueError for a group with too many entries to number them in 32 bits."""
  if group.size >= 2**32:
    raise ValueError(
      f"ranking by position needs groups of fewer than 2**32 entries, got {group.size}; "
      "use scope='leaf', or for ties rule='kth'."
    )


def _against(per_model: Array, x: Array) -> Array:
  """Shapes a value per model [K] to compare with a stack x [K, *s]."""
  return per_model.reshape(per_model.shape + (1,) * (x.ndim - 1))
