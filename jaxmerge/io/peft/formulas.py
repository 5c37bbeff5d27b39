"""What adapters other than LoRA make of a matrix: in float32, of whole matrices.

Each function takes the parts of a module by name, and returns what is added to the matrix, or what
it is multiplied by. Matrices are [outputs, inputs]; a kernel of a convolution is its inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

Parts = Mapping[str, np.ndarray]


def loha(parts: Parts) -> np.ndarray:
  """Returns the product, entry by entry, of two products of factors.

  Hyeon-Woo et al. 2022, FedPara (arXiv:2108.06098).
  """

  def factor(i: int) -> np.ndarray:
    a, b, core = (parts.get(f"hada_{n}{i}{e}") for n, e in (("w", "_a"), ("w", "_b"), ("t", "")))
    assert a is not None
    assert b is not None
    return a @ b if core is None else _tucker(core, a, b)

  return factor(1) * factor(2)


def lokr(parts: Parts) -> np.ndarray:
  """Returns the Kronecker product of two matrices, of which each may be a product of factors.

  Yeh et al. 2024, LyCORIS (arXiv:2309.14859).
  """

  def factor(i: int) -> np.ndarray:
    if f"lokr_w{i}" in parts:
      return parts[f"lokr_w{i}"]
    a, b = parts[f"lokr_w{i}_a"], parts[f"lokr_w{i}_b"]
    return a @ b if "lokr_t2" not in parts or i == 1 else _tucker(parts["lokr_t2"], a, b)

  first, second = factor(1), factor(2)
  # Of kernels with one axis PEFT puts the axes together in another way: so it is trained.
  return np.kron(first[:, :, None, None] if second.ndim == 4 else first, second)


def _tucker(core: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Returns a kernel [out, in, ...] from its core [r, r, ...], [r, out] and [r, in]."""
  return np.einsum("ij...,ip,jq->pq...", core, a, b)


def vera(parts: Parts, inputs: int) -> np.ndarray:
  """Returns the product of two shared matrices, of which the rows are scaled.

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
  """Returns a matrix of which the inputs are rotated, in blocks.

  Qiu et al. 2023, OFT (arXiv:2306.07280).

  Args:
    x: [outputs, inputs].
    parts: `oft_R.weight`, the entries above the diagonals of skew-symmetric blocks; one of them is
      that of all inputs.
    eps: the largest norm of a block, as constrained OFT has it; None: any.
    terms: of the series that stands for the inverse in the rotation; None: the inverse itself.
  """
  upper = parts["oft_R.weight"].astype(np.float64)
  size = (1 + math.isqrt(1 + 8 * upper.shape[1])) // 2
  skew = np.zeros((len(upper), size, size))
  skew[:, *np.triu_indices(size, 1)] = upper
  skew -= skew.swapaxes(1, 2)
  if eps is not None:
    # The limit is that of a block, by PEFT divided by the root of how many there are.
    norms, most = np.sqrt(np.square(skew).sum((1, 2), keepdims=True)), eps / math.sqrt(len(skew))
    skew *= np.where(norms > most, most / np.maximum(norms, 1e-300), 1)
  turns = _cayley(skew) if terms is None else _series(skew, terms)
  blocks = x.astype(np.float64).reshape(len(x), -1, size)
  turns = np.broadcast_to(turns, (blocks.shape[1], size, size))
  return np.einsum("rkc,orc->ork", turns, blocks).reshape(x.shape)


def _cayley(skew: np.ndarray) -> np.ndarray:
  """Returns the rotations (1 - S) / (1 + S) of skew-symmetric matrices, [n, size, size]."""
  one = np.eye(skew.shape[1])
  # x (1 + S) = 1 - S is solved on the right: its transpose on the left.
  return np.linalg.solve((one + skew).swapaxes(1, 2), (one - skew).swapaxes(1, 2)).swapaxes(1, 2)


def _series(skew: np.ndarray, terms: int) -> np.ndarray:
  """The first terms of (1 + S) times the series of 1 / (1 - S): 1 + 2 S + 2 S^2 + ... + S^(n-1).

  Of three terms PEFT takes four; of two, the last one is doubled too.
  """
  total, power = np.broadcast_to(np.eye(skew.shape[1]), skew.shape), np.eye(skew.shape[1])
  last = max(terms, 4) - 1 if terms > 2 else None
  for number in range(1, terms if last is None else last + 1):
    power = power @ skew
    total = total + (1 if number == last else 2) * power
  return total


def boft(x: np.ndarray, parts: Parts) -> np.ndarray:
  """Returns a matrix of which the inputs are rotated in blocks, and the outputs scaled.

  Liu et al. 2024, BOFT (arXiv:2311.06243), with one factor.
  """
  angles = parts["boft_R"][0].astype(np.float64)
  blocks = x.astype(np.float64).reshape(len(x), *angles.shape[:2])
  turns = _cayley(0.5 * (angles - angles.swapaxes(1, 2)))
  turned = np.einsum("rkc,orc->ork", turns, blocks).reshape(x.shape)
  return turned * parts["boft_s"].astype(np.float64).reshape(-1, 1)


def residual(x: np.ndarray, rank: int, scale: float, start: str) -> np.ndarray:
  """Returns a matrix without what its adapter began with, [outputs, inputs].

  Meng et al. 2024, PiSSA (arXiv:2404.02948): without its largest singular directions.
  Büyükakyüz 2024, OLoRA (arXiv:2406.01775): without the first of its QR decomposition, by scale.
  """
  if start == "pissa":
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    return x - (u[:, :rank] * s[:rank]) @ vt[:rank]
  q, r = np.linalg.qr(x)
  return x - np.float32(scale) * (q[:, :rank] @ r[:rank])
