"""One small tree for the tests of the core, with a leaf of every kind."""

import jax.numpy as jnp
import numpy as np

NAMES = ("red", "green", "blue", "grey")
VIEWS = (("matrix", "io"), ("cube", "boi"))


def base(dtype=np.float32):
  """A matrix, a vector, a cube, a scalar, and a leaf of integers; axes divide by two."""
  rng = np.random.default_rng(7)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
  return {
    "matrix": draw(8, 6),
    "inner": {"vector": draw(10), "cube": draw(2, 4, 6)},
    "scalar": draw(),
    "steps": jnp.arange(4, dtype=jnp.int32),
  }


def models(dtype=np.float32, height=4):
  """A stack of models near the base; every fifth entry of a task vector is zero."""
  rng = np.random.default_rng(8)
  out = {}
  for name, x in flat(base()).items():
    if x.dtype == jnp.int32:
      out[name] = jnp.stack([x + 1] * height)
      continue
    tau = np.asarray(rng.normal(size=(4, *x.shape)) / 8, np.float32)[:height]
    tau = np.where(rng.random((4, *x.shape))[:height] < 0.2, 0, tau)
    out[name] = jnp.asarray(np.asarray(x)[None] + tau, dtype)
  return unflat(out)


def flat(tree):
  """Leaves by short names."""
  return {**{n: x for n, x in tree.items() if n != "inner"}, **tree["inner"]}


def unflat(leaves):
  inner = {n: leaves[n] for n in ("vector", "cube")}
  return {**{n: x for n, x in leaves.items() if n not in inner}, "inner": inner}
