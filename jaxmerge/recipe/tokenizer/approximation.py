"""Approximates embedding rows by sums of other rows: orthogonal matching pursuit, nearest rows.

Coefficients are computed from a donor's rows, and then applied to the model's rows of the same
tokens.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

_SMALL = 1e-6  # An atom counts as dependent on earlier ones below this share of its norm.


class Combination(NamedTuple):
  """A sum of atoms for each target: indices of the atoms [n, k], and their coefficients [n, k]."""

  indices: np.ndarray
  coefficients: np.ndarray


@functools.partial(jax.jit, static_argnames="k")
def matching_pursuit(
  targets: Float[Array, "n d"], atoms: Float[Array, "m d"], k: int
) -> tuple[Int[Array, "n k"], Float[Array, "n k"]]:
  """Returns k atoms for each target, and coefficients, by orthogonal matching pursuit.

  Each step selects the atom with the largest inner product with the residual. Atoms are not
  normalised. The coefficients are the least-squares solution.

  >>> atoms = jnp.array([[2.0, 0.0], [0.0, 1.0]])
  >>> indices, coefficients = matching_pursuit(jnp.array([[1.0, 3.0]]), atoms, 2)
  >>> print(indices, np.asarray(coefficients).round(3))
  [[1 0]] [[3.  0.5]]

  Reference: Pati et al. 1993, Orthogonal Matching Pursuit.
  """
  n, d = targets.shape
  dot = functools.partial(jnp.einsum, precision="highest")

  def step(t: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
    residual, basis, triangle, product, indices, is_free = state
    inner = jnp.where(is_free, jnp.abs(dot("nd,md->nm", residual, atoms)), -1.0)
    chosen = jnp.argmax(inner, axis=1)
    atom = atoms[chosen]
    first = dot("nkd,nd->nk", basis, atom)
    rest = atom - dot("nk,nkd->nd", first, basis)
    second = dot("nkd,nd->nk", basis, rest)  # Again: rounding leaves a component in the basis.
    rest = rest - dot("nk,nkd->nd", second, basis)
    size = jnp.linalg.norm(rest, axis=1)
    is_new = size > _SMALL * jnp.linalg.norm(atom, axis=1)
    unit = jnp.where(is_new[:, None], rest / jnp.where(is_new, size, 1.0)[:, None], 0.0)
    along = dot("nd,nd->n", unit, residual)
    column = (first + second).at[:, t].set(jnp.where(is_new, size, 1.0))
    return (
      residual - along[:, None] * unit,
      basis.at[:, t].set(unit),
      triangle.at[:, :, t].set(column),
      product.at[:, t].set(along),
      indices.at[:, t].set(chosen),
      is_free.at[jnp.arange(n), chosen].set(False),
    )

  kind = targets.dtype
  start = (
    targets,
    jnp.zeros((n, k, d), kind),
    jnp.zeros((n, k, k), kind),
    jnp.zeros((n, k), kind),
    jnp.zeros((n, k), jnp.int32),
    jnp.ones((n, len(atoms)), bool),
  )
  _, _, triangle, product, indices, _ = jax.lax.fori_loop(0, k, step, start)
  solved = jax.scipy.linalg.solve_triangular(triangle, product[..., None])
  return indices, solved[..., 0]


@functools.partial(jax.jit, static_argnames=("k", "cosine"))
def nearest(
  targets: Float[Array, "n d"], atoms: Float[Array, "m d"], k: int, *, cosine: bool = False
) -> tuple[Int[Array, "n k"], Float[Array, "n k"]]:
  """Returns the k nearest atoms of each target, weighted by inverse distance; weights sum to 1.

  With `cosine`, they are the atoms of the largest cosines, weighted by these.

  >>> atoms = jnp.array([[1.0], [-3.0], [9.0]])
  >>> indices, weights = nearest(jnp.array([[0.0]]), atoms, 2)
  >>> print(indices, np.asarray(weights).round(3))
  [[0 1]] [[0.75 0.25]]
  """
  inner = jnp.matmul(targets, atoms.T, precision="highest")
  x, y = (jnp.sum(z * z, axis=1) for z in (targets, atoms))
  if cosine:
    closeness, indices = jax.lax.top_k(inner / jnp.sqrt(jnp.outer(x, y)).clip(1e-6), k)
    weights = closeness
  else:
    _, indices = jax.lax.top_k(2 * inner - x[:, None] - y[None], k)
    apart = targets[:, None] - atoms[indices]  # A difference of squares would lose digits.
    weights = 1 / jnp.linalg.norm(apart, axis=-1).clip(1e-6)
  return indices, weights / weights.sum(axis=1, keepdims=True).clip(1e-6)


def combine(
  targets: np.ndarray, atoms: np.ndarray, *, method: str, k: int, cosine: bool, batch: int
) -> Combination:
  """Returns atoms and coefficients for all targets, `batch` of them at a time.

  Args:
    targets: [n, d].
    atoms: [m, d].
    method: "omp" or "interpolate".
    k: largest number of atoms in a sum.
    cosine: as for `nearest`.
    batch: targets at a time.
  """
  k = min(k, len(atoms))
  parts: list[tuple[np.ndarray, np.ndarray]] = []
  known = jnp.asarray(atoms, jnp.float32)
  for first in range(0, len(targets), batch):
    part = targets[first : first + batch].astype(np.float32)
    full = np.zeros((min(batch, len(targets)), part.shape[1]), np.float32)
    full[: len(part)] = part  # Padded, so that all batches share one program.
    if method == "omp":
      indices, coefficients = matching_pursuit(jnp.asarray(full), known, k)
    else:
      indices, coefficients = nearest(jnp.asarray(full), known, k, cosine=cosine)
    parts.append((np.asarray(indices)[: len(part)], np.asarray(coefficients)[: len(part)]))
  if not parts:
    return Combination(np.zeros((0, k), np.int32), np.zeros((0, k), np.float32))
  return Combination(*(np.concatenate(each) for each in zip(*parts, strict=True)))
