"""Matrices with scale * (B @ A) added, computed when they are read, in float32 or wider.

What is computed are blocks of rows at fixed places, so that a slice has the bits of the whole, and
no more than a block of the product is in memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from jaxmerge.io.tensors.tensor import Tensor, compute_dtype, widen

BLOCK = 2**18  # Entries of a block.


class Layer(NamedTuple):
  """An adapted matrix.

  Attributes:
    base: the matrix, [out, in], or [in, out] where it is transposed.
    a: [r, in].
    b: [out, r].
    magnitude: DoRA's norm of each output, [out]; None for plain LoRA.
    scale: factor on B @ A.
    transposed: whether the base stores [in, out], as embeddings and GPT-2's Conv1D do.
  """

  base: Tensor
  a: Tensor
  b: Tensor
  magnitude: Tensor | None
  scale: float
  transposed: bool

  @property
  def dtype(self) -> np.dtype:
    """Dtype of the computation."""
    return compute_dtype(self.base, self.a, self.b)

  @property
  def step(self) -> int:
    """Rows of a block."""
    return max(1, BLOCK // self.base.shape[1])


class Factors(NamedTuple):
  """The factors of a block: left [rows, r], scaled; right [r, columns]."""

  left: np.ndarray
  right: np.ndarray


def add(layers: Mapping[str, Layer]) -> dict[str, Tensor]:
  """Returns the adapted matrices, by the names of their layers.

  Plain LoRA is base + scale * (B @ A). DoRA (Liu et al. 2024, arXiv:2402.09353) then gives each
  output the norm `magnitude`; for the norms the matrix is read once more, before its first block.

  Matrices are read one after the other: only the factors of the last one, its last block, and for
  DoRA one number for each output stay in memory.

  Raises:
    ValueError: when read, for an output that is all zero where DoRA divides by its norm.
  """
  factors = functools.lru_cache(1)(lambda name: _factors(layers[name]))
  gains = functools.cache(lambda name: _gains(layers[name], factors(name)))

  @functools.lru_cache(1)
  def block(name: str, number: int) -> np.ndarray:
    layer = layers[name]
    x, gain = _add_block(layer, factors(name), number), gains(name)
    if gain is not None:
      first = number * layer.step
      x *= gain if layer.transposed else gain[first : first + len(x), None]
    return x.reshape(-1)

  return {name: _tensor(layer, functools.partial(block, name)) for name, layer in layers.items()}


def _tensor(layer: Layer, block: Callable[[int], np.ndarray]) -> Tensor:
  size = layer.step * layer.base.shape[1]

  def read(start: int, out: np.ndarray) -> None:
    done = 0
    while done < out.size:
      number, offset = divmod(start + done, size)
      part = block(number)[offset : offset + out.size - done]
      out[done : done + part.size] = part
      done += part.size

  where = f"{layer.base.where} with {layer.a.where}"
  return Tensor(where, layer.dtype, layer.base.shape, read, layer.base.stored_dtype)


def _factors(layer: Layer) -> Factors:
  a, b = _whole(layer.a, layer.dtype), _whole(layer.b, layer.dtype)
  left, right = (a.T, b.T) if layer.transposed else (b, a)
  left = left * layer.dtype.type(layer.scale)
  return Factors(np.ascontiguousarray(left), np.ascontiguousarray(right))


def _whole(tensor: Tensor, dtype: np.dtype) -> np.ndarray:
  x = np.empty(tensor.shape, dtype)
  widen(tensor, x.dtype).read(0, x.reshape(-1))
  return x


def _add_block(layer: Layer, factors: Factors, number: int) -> np.ndarray:
  """Computes a block of base + scale * (B @ A): [rows, columns]."""
  first = number * layer.step
  left = factors.left[first : first + layer.step]
  x = np.empty((len(left), layer.base.shape[1]), layer.dtype)
  widen(layer.base, x.dtype).read(first * x.shape[1], x.reshape(-1))
  x += left @ factors.right
  return x


def _gains(layer: Layer, factors: Factors) -> np.ndarray | None:
  """Reads the matrix once for DoRA's factors: magnitudes over norms of the outputs, [out]."""
  if layer.magnitude is None:
    return None
  squares = np.zeros(layer.magnitude.shape)
  for number, first in enumerate(range(0, layer.base.shape[0], layer.step)):
    x = _add_block(layer, factors, number)
    outputs = slice(None) if layer.transposed else slice(first, first + len(x))
    squares[outputs] += np.square(x, dtype=np.float64).sum(axis=0 if layer.transposed else 1)
  if not squares.all():
    raise ValueError(f"{layer.base.where}: an output is all zero, and DoRA divides by its norm.")
  return (_whole(layer.magnitude, layer.dtype) / np.sqrt(squares)).astype(layer.dtype)
