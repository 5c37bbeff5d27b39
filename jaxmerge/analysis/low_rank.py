"""Best low-rank approximation of a matrix's task vector, as two factors. Free of jax.

The singular vectors of the smaller side come from its Gram matrix, summed in double precision. The
other factor is the matrix times these vectors, which avoids a division by small singular values.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

BLOCK = 2**20  # Entries in double precision at a time.


class Rank(NamedTuple):
  """A rule that chooses a rank.

  Attributes:
    most: the largest rank.
    energy: fraction of the sum of squared singular values to retain; None: use rank `most`.
  """

  most: int
  energy: float | None = None

  def of(self, squares: np.ndarray) -> int:
    """Returns the rank for squared singular values, the largest first; at least 1.

    >>> Rank(8).of(np.array([9.0, 1.0])), Rank(8, 0.9).of(np.array([9.0, 1.0]))
    (2, 1)
    """
    noise = squares[0] * len(squares) * np.finfo(np.float64).eps
    rank = min(self.most, int((squares > noise).sum()))
    if self.energy is not None:
      enough = np.cumsum(squares) >= self.energy * squares.sum() * (1 - 1e-12)
      rank = min(rank, int(np.argmax(enough)) + 1 if enough.any() else rank)
    return max(rank, 1)


class Factors(NamedTuple):
  """Two factors, b @ a, with b [m, r] and a [r, n]."""

  a: np.ndarray
  b: np.ndarray


def truncate(delta: np.ndarray, rule: Rank, dtype: np.dtype) -> Factors:
  """Returns the best factors of a matrix [m, n], each scaled by roots of the singular values.

  >>> a, b = truncate(np.diag([3.0, 1.0]), Rank(1), np.dtype(np.float32))
  >>> np.abs(b @ a).round(5).tolist(), a.shape, b.shape
  ([[3.0, 0.0], [0.0, 0.0]], (1, 2), (2, 1))
  """
  tall = delta.shape[0] >= delta.shape[1]
  x = delta if tall else delta.T
  squares, vectors = np.linalg.eigh(_gram(x))
  squares, vectors = squares[::-1].clip(0), vectors[:, ::-1]
  rank = rule.of(squares)
  roots = squares[:rank] ** 0.25
  thin = (vectors[:, :rank] * roots).astype(dtype)  # [n, r]
  other = np.empty((x.shape[0], rank), dtype)
  scaled = vectors[:, :rank] / np.where(roots > 0, roots, 1)
  for rows in _blocks(x):
    other[rows] = x[rows].astype(np.float64) @ scaled
  return Factors(thin.T, other) if tall else Factors(other.T, thin)


def residual(delta: np.ndarray, factors: Factors) -> tuple[float, float]:
  """Returns the sums of squares of a matrix, and of its residual after its stored factors."""
  whole = missed = 0.0
  a = factors.a.astype(np.float64)
  for rows in _blocks(delta):
    x = delta[rows].astype(np.float64)
    whole += float(np.sum(x * x))
    missed += float(np.sum((x - factors.b[rows].astype(np.float64) @ a) ** 2))
  return whole, missed


def _gram(x: np.ndarray) -> np.ndarray:
  gram = np.zeros((x.shape[1],) * 2)
  for rows in _blocks(x):
    part = x[rows].astype(np.float64)
    gram += part.T @ part
  return gram


def _blocks(x: np.ndarray) -> list[slice]:
  step = max(1, BLOCK // max(x.shape[1], 1))
  return [slice(first, first + step) for first in range(0, math.ceil(x.shape[0]), step)]
