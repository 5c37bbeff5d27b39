"""Random numbers for masks: a hash of each entry's identity, not a stream."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxmerge.core import order_statistics
from jaxmerge.core.stage import Array, Leaf


def uniform(x: Array, leaf: Leaf) -> Array:
  """Returns numbers in [0, 1) for the entries of a stack [K, *s], each a hash of its identity.

  The hash takes (seed, leaf, model, index in the leaf), hence neither visiting order, cutting nor
  sharding, nor which other leaves and models there are, changes a number. In a leaf of more than
  2**32 entries they repeat after so many.

  Example:
    >>> import numpy as np
    >>> from jaxmerge.core import tree
    >>> tags = jnp.array([tree.tag("a"), tree.tag("b")], jnp.uint32)
    >>> leaf = Leaf(None, {"seed": 0}, tags, jnp.uint32(tree.tag("w")), np.uint32(0), np.uint32(0))
    >>> uniform(jnp.zeros((2, 1000)), leaf).mean(axis=1).round(1).tolist()
    [0.5, 0.5]
  """
  return uniform_of_bits(_bits(x, leaf))


def chosen(x: Array, leaf: Leaf, probability: Array) -> Array:
  """Returns where `uniform` is at least 1 - probability, with less work: boolean [K, *s].

  Example:
    >>> import numpy as np
    >>> leaf = Leaf(None, {"seed": 0}, jnp.ones(1, jnp.uint32), *map(np.uint32, (7, 0, 0)))
    >>> bool(0.2 < chosen(jnp.zeros((1, 1000)), leaf, jnp.float32(0.25)).mean() < 0.3)
    True
  """
  least = jnp.ceil((1 - probability) * 2**24)
  return _bits(x, leaf) >> 8 >= least.astype(jnp.uint32)


def _bits(x: Array, leaf: Leaf) -> Array:
  """Hashes each entry's identity: [K, *s] -> uint32 [K, *s]."""
  key = _mixed(jnp.asarray(leaf.hparams["seed"]).astype(jnp.uint32) ^ jnp.asarray(leaf.tag))
  entries = order_statistics.index(x, leaf)
  # Mixed before the model comes in, or the numbers of one model would be those of another, shifted.
  entries = _mixed(entries * jnp.uint32(0x85EBCA77) ^ key)
  models = _mixed(leaf.models * jnp.uint32(0x9E3779B1) + jnp.uint32(1))
  return _mixed(entries ^ models.reshape((-1,) + (1,) * (x.ndim - 1)))


@jax.jit  # A driver that rounds every operation recognises it by name, and does not round it.
def uniform_of_bits(h: Array) -> Array:
  """Converts uint32 to numbers in [0, 1).

  Example:
    >>> uniform_of_bits(jnp.uint32(2**31)).tolist()
    0.5
  """
  return (h >> 8).astype(jnp.float32) * jnp.float32(2**-24)


def _mixed(h: Array) -> Array:
  """Mixes the bits of uint32 so that every input bit moves every output bit."""
  h = (h ^ (h >> 16)) * jnp.uint32(0x7FEB352D)
  h = (h ^ (h >> 15)) * jnp.uint32(0x846CA68B)
  return h ^ (h >> 16)
