"""Random numbers for masks: a hash of what an entry is, not a stream."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from jaxmerge.stage import Array, Leaf


def uniform(x: Array, leaf: Leaf) -> Array:
  """Returns numbers in [0, 1) for the entries of a stack [K, *s], each a hash of its identity.

  The hash takes (seed, leaf, model, index in the leaf), hence neither visiting order, cutting nor
  sharding, nor which other leaves and models there are, changes a number.

  Example:
    >>> import numpy as np
    >>> from jaxmerge import tree
    >>> tags = jnp.array([tree.tag("a"), tree.tag("b")], jnp.uint32)
    >>> tag, start = jnp.uint32(tree.tag("w")), np.int32(0)
    >>> leaf = Leaf(None, {"seed": 0}, tags, tag, start, (1000,), np.uint32(0))
    >>> uniform(jnp.zeros((2, 1000)), leaf).mean(axis=1).round(1).tolist()
    [0.5, 0.5]
  """
  models = leaf.models.reshape((-1,) + (1,) * (x.ndim - 1))
  h = _mixed(jnp.asarray(leaf.aux["seed"]).astype(jnp.uint32) ^ leaf.tag)
  h = _mixed(h ^ (models * jnp.uint32(0x9E3779B1)))
  for axis in range(1, x.ndim):
    index = lax.broadcasted_iota(jnp.uint32, (x.shape[axis],), 0)
    if axis == 1:
      index = index + leaf.start.astype(jnp.uint32)
    index = index.reshape((1,) * axis + (-1,) + (1,) * (x.ndim - axis - 1))
    h = _mixed(h + index * jnp.uint32(0x85EBCA77) + jnp.uint32(0xC2B2AE3D + axis))
  return (h >> 8).astype(jnp.float32) * jnp.float32(2**-24)


def _mixed(h: Array) -> Array:
  """Mixes the bits of uint32 so that every input bit moves every output bit."""
  h = (h ^ (h >> 16)) * jnp.uint32(0x7FEB352D)
  h = (h ^ (h >> 15)) * jnp.uint32(0x846CA68B)
  return h ^ (h >> 16)
