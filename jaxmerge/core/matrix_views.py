"""Matrix views: which axes of a leaf are outputs and which are inputs.

A view is a word with one letter per axis of the leaf: `o` output, `i` input, `b` batch (layers that
are stacked for a scan). A Flax kernel [in, out] is "io", a file's weight [out, in] is "oi", an
attention kernel [in, heads, size] is "ioo", a convolution [height, width, in, out] is "iiio". What
is no matrix but has rows, as an embedding has, is "li": `l` counts the entries that are looked up.
`jaxmerge.layouts` says which leaf has which view.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any  # Any: arrays of NumPy as well.

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

Array = jax.Array


def or_row(x: Array, view: str | None) -> str:
  """Returns the view of a stack's leaf; one row, where it has none."""
  return "i" * (x.ndim - 1) if view is None else view


def rows_lead(view: str | None) -> bool:
  """Tells whether whole rows follow one another in a leaf of this view.

  Example:
    >>> rows_lead("oi"), rows_lead("io"), rows_lead("boi"), rows_lead(None)
    (True, False, True, False)
  """
  return view is not None and view[0] != "i" and _order(view, len(view)) == list(range(len(view)))


def whole(x: Array) -> Array:
  """Brings rows and columns together where explicit axes shard them: [K, *s] -> [K, *s].

  The task axis stays as it is. Under automatic axes the compiler does this by itself.
  """
  sharding = jax.typeof(x).sharding
  if all(axis is None for axis in sharding.spec[1:]):
    return x
  return jax.sharding.reshard(x, _by_task(sharding, x.ndim))


def over_first(x: Any) -> bool:
  """Tells whether the first axis of an array is known to be sharded."""
  if isinstance(x, np.ndarray):
    return False
  # The sharding of what is being traced is known where axes are explicit.
  sharding = jax.typeof(x).sharding if isinstance(x, jax.core.Tracer) else x.sharding
  return isinstance(sharding, NamedSharding) and any(s is not None for s in sharding.spec[:1])


def everywhere(x: Array) -> Array:
  """Brings a small array to every device where explicit axes shard it."""
  sharding = jax.typeof(x).sharding
  if all(axis is None for axis in sharding.spec):
    return x
  return jax.sharding.reshard(x, NamedSharding(sharding.mesh, P(*(None,) * x.ndim)))


def together(x: Array) -> Array:
  """Brings the models together where explicit axes shard the task axis; the others stay."""
  sharding = jax.typeof(x).sharding
  if sharding.spec[0] is None:
    return x
  return jax.sharding.reshard(x, NamedSharding(sharding.mesh, P(None, *sharding.spec[1:])))


def unsharded(x: Array, ndim: int) -> NamedSharding | None:
  """Returns where an array of `ndim` axes is on every device; None if no explicit axis shards x."""
  sharding = jax.typeof(x).sharding
  if all(axis is None for axis in sharding.spec):
    return None
  return NamedSharding(sharding.mesh, P(*(None,) * ndim))


def reshaped(x: Array, shape: tuple[int, ...]) -> Array:
  """Reshapes a whole stack behind its task axis: [K, ...] -> [K, ...]."""
  sharding = jax.typeof(x).sharding
  if sharding.spec[0] is None:
    return x.reshape(shape)
  return jax.lax.reshape(x, shape, out_sharding=_by_task(sharding, len(shape)))


def _by_task(sharding: NamedSharding, ndim: int) -> NamedSharding:
  return NamedSharding(sharding.mesh, P(sharding.spec[0], *(None,) * (ndim - 1)))


def rows(x: Array, view: str) -> Array:
  """Shows a stack as rows, one per output: [K, *s] -> [K, rows, columns].

  Example:
    >>> import jax.numpy as jnp
    >>> rows(jnp.arange(6).reshape(1, 2, 3), "io").tolist()
    [[[0, 3], [1, 4], [2, 5]]]
  """
  moved = x.transpose((0, *(a + 1 for a in _order(view, x.ndim - 1))))
  sizes = list(zip(x.shape[1:], view, strict=True))
  columns = math.prod(n for n, letter in sizes if letter == "i")
  return reshaped(moved, (x.shape[0], math.prod(n for n, v in sizes if v != "i"), columns))


def from_rows(y: Array, view: str, shape: tuple[int, ...]) -> Array:
  """Undoes `rows`: [M, rows, columns] -> [M, *shape]."""
  order = _order(view, len(shape))
  moved = reshaped(y, (y.shape[0], *(shape[a] for a in order)))
  back = sorted(range(len(order)), key=lambda i: order[i])
  return moved.transpose((0, *(b + 1 for b in back)))


def matrices(x: Array, view: str) -> Array:
  """Shows a stack as matrices, of stacked layers one each: [K, *s] -> [K, matrices, rows, columns].

  Example:
    >>> import jax.numpy as jnp
    >>> matrices(jnp.zeros((3, 5, 4, 2)), "bio").shape
    (3, 5, 2, 4)
  """
  sizes = zip(x.shape[1:], view, strict=True)
  count = math.prod(n for n, letter in sizes if letter == "b")
  y = rows(x, view)
  return reshaped(y, (x.shape[0], count, y.shape[1] // count, y.shape[2]))


def by_matrix(
  f: Callable[[Array, Array | None], Array], x: Array, base: Array | None, view: str
) -> Array:
  """Applies f to each matrix of a leaf, [K, rows, columns] and base: [K, *s] -> [M, *s].

  Example:
    >>> import jax.numpy as jnp
    >>> by_matrix(lambda x, base: x[:1] * 2, jnp.ones((3, 4, 2)), None, "io").shape
    (1, 4, 2)
  """
  own = matrices(whole(x), view)
  zero = None if base is None else matrices(whole(base[None]), view)[0]
  # One after the other: a matrix keeps the devices busy, and decompositions are not to be batched.
  each = (own.swapaxes(0, 1), zero)
  y = jax.lax.map(lambda pair: f(*pair), each).swapaxes(0, 1)
  joined = reshaped(y, (y.shape[0], y.shape[1] * y.shape[2], y.shape[3]))
  return from_rows(joined, view, x.shape[1:])


def _order(view: str, ndim: int) -> list[int]:
  if len(view) != ndim:
    raise ValueError(f"view {view!r} names {len(view)} axes, but the leaf has {ndim}.")
  return [axis for letter in "bloi" for axis, own in enumerate(view) if own == letter]
