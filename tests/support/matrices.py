"""Small matrices, merged, and what is asked of the result."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

import jaxmerge

A = np.array([[3.0, 0, 0], [0, 1, 0]])


B = np.array([[0.0, 0, 1], [0, 2, 0]])


def merged(method, matrices, view="oi"):
  tau = jnp.asarray(np.stack(matrices), jnp.float32)
  found = jaxmerge.merge(method, {"w": tau}, {"w": tau[0] * 0}, layout=(("w", view),))
  return np.asarray(found["w"])


def drawn(height, rows, columns, *, rank=None, seed=0):
  rng = np.random.default_rng(seed)
  if rank is None:
    return list(rng.normal(size=(height, rows, columns)))
  left, right = rng.normal(size=(height, rows, rank)), rng.normal(size=(height, rank, columns))
  return list(left @ right)


def equations(jaxpr):
  """All of a program, with those of what it calls."""
  called = [jax.extend.core.jaxprs_in_params(e.params) for e in jaxpr.eqns]
  return [*jaxpr.eqns, *(e for each in called for sub in each for e in equations(sub))]


def values(x):
  return np.linalg.svd(x, compute_uv=False)
