"""What trees of other programs change in the values of Hugging Face's weights, and back.

Arrays are parts of a tensor of the tree that have its whole last axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np

Array = np.ndarray


def compose(changes: Sequence[str], *, to_tree: bool) -> Callable[[Array], Array] | None:
  """Returns the function that changes values, None without changes.

  It computes in float32 or wider, unless it only moves values.

  >>> compose(("norm",), to_tree=True)(np.float32([0.5]))
  array([1.5], dtype=float32)
  """
  if not changes:
    return None

  def change(x: Array) -> Array:
    for name in changes:
      x = _CHANGES[name](x, to_tree)
    return x

  return change


def _wide(x: Array) -> Array:
  return x if x.dtype == np.float64 else x.astype(np.float32)


def _norm(x: Array, to_tree: bool) -> Array:
  """Adds the one that Gemma adds to the scales of its norms."""
  return _wide(x) + np.float32(1 if to_tree else -1)


def _query(x: Array, to_tree: bool) -> Array:
  """Divides queries by the square root of the size of a head, which attention does not then do."""
  root = np.sqrt(x.shape[-1])
  return _wide(x) * np.float32(1 / root if to_tree else root)


def _width(x: Array, to_tree: bool) -> Array:
  """Multiplies embeddings by the square root of their width."""
  root = np.float32(x.shape[-1] ** 0.5)
  return _wide(x) * root if to_tree else _wide(x) / root


def _width_in_bfloat16(x: Array, to_tree: bool) -> Array:
  root = np.float32(ml_dtypes.bfloat16(x.shape[-1] ** 0.5))
  return _wide(x) * root if to_tree else _wide(x) / root


def _rotary(x: Array, to_tree: bool) -> Array:
  """Interleaves the halves of a head, which rotary embeddings pair."""
  size = x.shape[-1]
  order = np.concatenate([np.arange(0, size, 2), np.arange(1, size, 2)])
  return x[..., np.argsort(order) if to_tree else order]


_CHANGES = {
  "norm": _norm,
  "query": _query,
  "rotary": _rotary,
  "width": _width,
  "width in bfloat16": _width_in_bfloat16,
}
