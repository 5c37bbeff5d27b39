"""The formulas of adapters other than LoRA, for whole matrices.

Each function takes the parts of a module by name. It returns an update to add to the matrix, or the
changed matrix. Matrices are [outputs, inputs]; the axes of a kernel count as inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

Parts = Mapping[str, np.ndarray]


def loha(parts: Parts) -> np.ndarray:
  """Returns the elementwise product of two products of factors.

  Hyeon-Woo et al. 2022, FedPara (arXiv:2108.06098).
  """

  def factor(i: int) -> np.ndarray:
    a, b, core = (parts.get(f"hada_{n}{i}{e}") for n, e in (("w", "_a"), ("w", "_b"), ("t", "")))
    assert a is not None
    assert b is not None
    return a @ b if core is None else _tucker(core, a, b)

  return factor(1) * factor(2)


def lokr(parts: Parts) -> np.ndarray:
  """Returns the Kronecker product of two matrices, each of which may be a product of factors.

  Yeh et al. 2024, LyCORIS (arXiv:2309.14859).
  """

  def factor(i: int) -> np.ndarray:
    if f"lokr_w{i}" in parts:
      return parts[f"lokr_w{i}"]
    a, b = parts[f"lokr_w{i}_a"], parts[f"lokr_w{i}_b"]
    return a @ b if "lokr_t2" not in parts or i == 1 else _tucker(parts["lokr_t2"], a, b)

  first, second = factor(1), factor(2)
  # PEFT combines the axes of one-dimensional kernels differently; this follows it.
  return np.kron(first[:, :, None, None] if second.ndim == 4 else first, second)


def _tucker(core: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Returns a kernel [out, in, ...] from its core [r, r, ...], [r, out] and [r, in]."""
  return np.einsum("ij...,ip,jq->pq...", core, a, b)


def vera(parts: Parts, inputs: int) -> np.ndarray:
  """Returns the product of two shared matrices with scaled rows.

  Kopiczko et al. 2024, VeRA (arXiv:2310.11454).
  """
  outer, inner = parts["vera_lambda_b"], parts["vera_lambda_d"]
  b = outer[:, None] * parts["vera_B"][: len(outer)]
  return b @ (inner[:, None] * parts["vera_A"][:, :inputs])


def oft(
  x: np.ndarray,
  parts: Parts,
  *,
  eps: float | None = None,
  terms: int | None = None,
) -> np.ndarray:
  """Returns a matrix whose inputs are rotated in blocks.

  Qiu et al. 2023, OFT (arXiv:2306.07280).

  Args:
    x: [outputs, inputs].
    parts: `oft_R.weight`, the entries above the diagonals of skew-symmetric blocks; a single block
      is shared by all inputs.
    eps: the norm bound of a block in constrained OFT; None: no bound.
    terms: number of terms of the series that approximates the inverse; None: the exact inverse.
  """
  upper = parts["oft_R.weight"].astype(np.float64)
  size = (1 + math.isqrt(1 + 8 * upper.shape[1])) // 2
  skew = np.zeros((len(upper), size, size))
  skew[:, *np.triu_indices(size, 1)] = upper
  skew -= skew.swapaxes(1, 2)
  if eps is not None:
    # PEFT divides the bound of a block by the square root of the number of blocks.
    norms, most = np.sqrt(np.square(skew).sum((1, 2), keepdims=True)), eps / math.sqrt(len(skew))
    skew *= np.where(norms > most, most / np.maximum(norms, 1e-300), 1)
  turns = _cayley(skew) if terms is None else _series(skew, terms)
  blocks = x.astype(np.float64).reshape(len(x), -1, size)
  turns = np.broadcast_to(turns, (blocks.shape[1], size, size))
  return np.einsum("rkc,orc->ork", turns, blocks).reshape(x.shape)


def _cayley(skew: np.ndarray) -> np.ndarray:
  """Returns the rotations (1 - S) / (1 + S) of skew-symmetric matrices, [n, size, size]."""
  one = np.eye(skew.shape[1])
  # x (1 + S) = 1 - S has its unknown on the left: solve the transposed equation.
  return np.linalg.solve((one + skew).swapaxes(1, 2), (one - skew).swapaxes(1, 2)).swapaxes(1, 2)


def _series(skew: np.ndarray, terms: int) -> np.ndarray:
  """Returns (1 + S) times the truncated series of 1 / (1 - S): 1 + 2 S + 2 S^2 + ... + S^(n-1).

  As in PEFT, three terms count as four, and of two terms the last one is doubled too.
  """
  total, power = np.broadcast_to(np.eye(skew.shape[1]), skew.shape), np.eye(skew.shape[1])
  last = max(terms, 4) - 1 if terms > 2 else None
  for number in range(1, terms if last is None else last + 1):
    power = power @ skew
    total = total + (1 if number == last else 2) * power
  return total


def boft(x: np.ndarray, parts: Parts) -> np.ndarray:
  """Returns a matrix whose inputs are rotated in blocks, and whose outputs are scaled.

  Liu et al. 2024, BOFT (arXiv:2311.06243), with one factor.
  """
  angles = parts["boft_R"][0].astype(np.float64)
  blocks = x.astype(np.float64).reshape(len(x), *angles.shape[:2])
  turns = _cayley(0.5 * (angles - angles.swapaxes(1, 2)))
  turned = np.einsum("rkc,orc->ork", turns, blocks).reshape(x.shape)
  return turned * parts["boft_s"].astype(np.float64).reshape(-1, 1)


def residual(x: np.ndarray, rank: int, scale: float, start: str) -> np.ndarray:
  """Returns a matrix [outputs, inputs] minus the initial product of its adapter's factors.

  Meng et al. 2024, PiSSA (arXiv:2404.02948): minus its largest singular directions.
  Büyükakyüz 2024, OLoRA (arXiv:2406.01775): minus the first columns of its QR, scaled.
  """
  if start == "pissa":
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    return x - (u[:, :rank] * s[:rank]) @ vt[:rank]
  q, r = np.linalg.qr(x)
  return x - np.float32(scale) * (q[:, :rank] @ r[:rank])
