"""Singular values of task vectors of some matrices, read a few rows at a time. Free of jax.

Small matrices are decomposed exactly. For larger ones, a randomised decomposition with one power
iteration (Halko, Martinsson and Tropp 2011, arXiv:0909.4061) gives the largest values. These are
never overestimated, and exact if the task vector has a lower rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any  # Any: values of a JSON record.

import numpy as np

from jaxmerge.analysis import sums as sum_lib
from jaxmerge.analysis.sums import Count
from jaxmerge.files.plan import Model
from jaxmerge.io.tensors import safetensors
from jaxmerge.io.tensors.tensor import Tensor

Record = dict[str, Any]

MATRICES = 12  # Default number of matrices.
TOP = 64  # Values per matrix of a randomised decomposition.
EXACT = 512  # Largest smaller side of a matrix that is decomposed exactly.
LONGEST = 2**16  # Matrices with a longer side, such as embeddings, are not chosen.
_MORE = 16  # Random directions beyond TOP.
_PASSES = 4  # Passes over a matrix for a randomised decomposition.


def choose(base: Model, most: int = MATRICES) -> list[str]:
  """Returns the names of some matrices of a model, evenly spaced in the order of names."""
  every = sorted((n for n, t in base.tensors.items() if _fits(t)), key=_natural)
  places = np.linspace(0, len(every) - 1, min(most, len(every))).round().astype(int)
  return [every[i] for i in places]


def _fits(tensor: Tensor) -> bool:
  matrix = len(tensor.shape) == 2 and 0 < min(tensor.shape) <= max(tensor.shape) <= LONGEST
  return matrix and safetensors.is_floating(tensor.dtype)


def _natural(name: str) -> list[tuple[bool, int, str]]:
  return [(p.isdecimal(), int(p) if p.isdecimal() else 0, p) for p in name.split(".")]


def size(base: Model, models: Sequence[Model], names: Sequence[str]) -> int:
  """Returns the bytes that `measure` reads."""
  total = 0
  for name in names:
    ours = base.tensors[name]
    sizes = [ours.dtype.itemsize + m.tensors[name].dtype.itemsize for m in models]
    total += math.prod(ours.shape) * sum(sizes) * (1 if _is_exact(ours) else _PASSES)
  return total


def measure(
  base: Model, models: Sequence[Model], names: Sequence[str], progress: Count = lambda count: None
) -> Record:
  """Measures the largest singular values of task vectors, models minus base.

  Returns:
    By matrix: `exact`, whether all values were computed; and `models`, by model with `values`, the
    largest first, and `energy`, the sum of squares of all values, including those left out.
  """
  result: Record = {}
  for name in names:
    ours = base.tensors[name]
    exact = _is_exact(ours)
    by_model = {}
    for model in models:
      theirs = model.tensors[name]
      if exact:
        squares = sum_lib.spectrum(ours, theirs, progress)
        energy = float(squares.sum())
      else:
        squares, energy = largest(ours, theirs, TOP, progress)
      by_model[model.name] = {"values": np.sqrt(squares).tolist(), "energy": energy}
    result[name] = {"exact": exact, "models": by_model}
  return result


def largest(
  base: Tensor, model: Tensor, top: int, progress: Count = lambda count: None
) -> tuple[np.ndarray, float]:
  """Returns the squares of the largest singular values, and the sum of the squares of all.

  Args:
    base: a matrix of the base [m, n].
    model: the same of a model.
    top: largest number of values to return.
    progress: called with the number of bytes read.
  """
  rows, columns = base.shape
  rank = min(top + _MORE, rows, columns)
  right = np.random.default_rng(0).standard_normal((columns, rank))
  for _ in range(2):
    left = np.empty((rows, rank))
    first, energy = 0, 0.0
    for x in sum_lib.row_slices(base, model):
      left[first : first + len(x)] = x @ right
      first, energy = first + len(x), energy + float(np.einsum("ij,ij->", x, x))
      progress(x.size * (base.dtype.itemsize + model.dtype.itemsize))
    left = np.linalg.qr(left)[0]
    first, right = 0, np.zeros((columns, rank))
    for x in sum_lib.row_slices(base, model):
      right += x.T @ left[first : first + len(x)]
      first += len(x)
      progress(x.size * (base.dtype.itemsize + model.dtype.itemsize))
    basis, triangle = np.linalg.qr(right)
    right = basis
  return np.linalg.svd(triangle, compute_uv=False)[:top] ** 2, energy


def _is_exact(tensor: Tensor) -> bool:
  return min(tensor.shape) <= EXACT
