"""Matrix views: which axes of a leaf are outputs and which are inputs.

A view is a word with one letter per axis of the leaf: `o` output, `i` input, `b` batch (layers that
are stacked for a scan). A Flax kernel [in, out] is "io", a file's weight [out, in] is "oi", an
attention kernel [in, heads, size] is "ioo", a convolution [height, width, in, out] is "iiio". What
is no matrix but has rows, as an embedding has, is "li": `l` counts the entries that are looked up.
`jaxmerge.core.layouts` says which leaf has which view.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any  # Any: a tree of arrays.

import jax

from jaxmerge.core import sharding

Array = jax.Array


def or_row(x: Array, view: str | None) -> str:
  """Returns the view of a leaf's stack; without one, the view of a single row."""
  return "i" * (x.ndim - 1) if view is None else view


def rows_lead(view: str | None) -> bool:
  """Returns whether rows are contiguous in a leaf of this view.

  Example:
    >>> rows_lead("oi"), rows_lead("io"), rows_lead("boi"), rows_lead(None)
    (True, False, True, False)
  """
  return view is not None and view[0] != "i" and _order(view, len(view)) == list(range(len(view)))


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
  return sharding.reshape(moved, (x.shape[0], math.prod(n for n, v in sizes if v != "i"), columns))


def from_rows(y: Array, view: str, shape: tuple[int, ...]) -> Array:
  """Undoes `rows`: [M, rows, columns] -> [M, *shape]."""
  order = _order(view, len(shape))
  moved = sharding.reshape(y, (y.shape[0], *(shape[a] for a in order)))
  back = sorted(range(len(order)), key=lambda i: order[i])
  return moved.transpose((0, *(b + 1 for b in back)))


def matrices(x: Array, view: str) -> Array:
  """Shows a stack as matrices, one per stacked layer: [K, *s] -> [K, matrices, rows, columns].

  Example:
    >>> import jax.numpy as jnp
    >>> matrices(jnp.zeros((3, 5, 4, 2)), "bio").shape
    (3, 5, 2, 4)
  """
  count = math.prod(stack_sizes(x.shape[1:], view))
  y = rows(x, view)
  return sharding.reshape(y, (x.shape[0], count, y.shape[1] // count, y.shape[2]))


def stack_sizes(shape: tuple[int, ...], view: str) -> tuple[int, ...]:
  """Returns the sizes of the axes along which a leaf stacks matrices.

  Example:
    >>> stack_sizes((5, 4, 2), "bio"), stack_sizes((4, 2), "io")
    ((5,), ())
  """
  return tuple(n for n, letter in zip(shape, view, strict=True) if letter == "b")


def by_matrix(
  f: Callable[[Array, Array | None, Any], Array],
  x: Array,
  base: Array | None,
  view: str,
  more: Any = (),
) -> Array:
  """Applies f to each matrix of a leaf: [K, *s] -> [M, *s].

  Args:
    f: (stack of a matrix [K, rows, columns], its base or None, its part of `more`) -> merged.
    x: the leaf's stack.
    base: the leaf's base [*s], or None.
    view: the leaf's matrix view.
    more: tree of arrays with a first axis for the matrices.

  Example:
    >>> import jax.numpy as jnp
    >>> by_matrix(lambda x, base, more: x[:1] * 2, jnp.ones((3, 4, 2)), None, "io").shape
    (1, 4, 2)
  """
  stacks = matrices(sharding.gather(x), view)
  bases = None if base is None else matrices(sharding.gather(base[None]), view)[0]
  # One at a time: one matrix keeps the devices busy, and decompositions should not be batched.
  each = (stacks.swapaxes(0, 1), bases, more)
  y = jax.lax.map(lambda one: f(*one), each).swapaxes(0, 1)
  joined = sharding.reshape(y, (y.shape[0], y.shape[1] * y.shape[2], y.shape[3]))
  return from_rows(joined, view, x.shape[1:])


def _order(view: str, ndim: int) -> list[int]:
  if len(view) != ndim:
    raise ValueError(f"view {view!r} names {len(view)} axes, but the leaf has {ndim}.")
  return [axis for letter in "bloi" for axis, v in enumerate(view) if v == letter]
