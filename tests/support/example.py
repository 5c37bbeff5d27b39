"""The worked example of the methods: three task vectors of six entries, and one leaf."""

import jax.numpy as jnp
import numpy as np

import jaxmerge

TAU = np.array(
  [
    [0.9, -0.1, 0.4, 0.0, -0.6, 0.2],
    [-0.3, -0.5, 0.1, 0.7, -0.2, 0.0],
    [0.5, 0.3, -0.8, 0.1, 0.2, -0.4],
  ],
  np.float32,
)


def merged(method, tau=TAU, **options):
  """The merged task vector of models with one leaf, whose base is zero."""
  tau = jnp.asarray(tau, jnp.float32)
  return np.asarray(jaxmerge.merge(method, {"w": tau}, {"w": tau[0] * 0}, **options)["w"])


def blended(method, x, **options):
  """The blend of models with one leaf."""
  stack = {"w": jnp.asarray(x, jnp.float32)}
  return np.asarray(jaxmerge.merge(method, stack, deltas=True, **options)["w"])


def close(x, y, atol=1e-6):
  np.testing.assert_allclose(x, np.asarray(y, np.float64), atol=atol, rtol=0)
