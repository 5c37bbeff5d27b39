"""Gathers, replicates and reshapes arrays on a mesh."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

Array = jax.Array


def gather(x: Array) -> Array:
  """Gathers rows and columns that explicit axes shard: [K, *s] -> [K, *s].

  The task axis stays as it is. Under automatic axes the compiler does this by itself.
  """
  sharding = jax.typeof(x).sharding
  if all(axis is None for axis in sharding.spec[1:]):
    return x
  return jax.sharding.reshard(x, _by_task(sharding, x.ndim))


def over_first(x: Any) -> bool:
  """Returns whether the first axis of an array is known to be sharded."""
  if isinstance(x, np.ndarray):
    return False
  # A tracer's sharding is known under explicit axes.
  sharding = jax.typeof(x).sharding if isinstance(x, jax.core.Tracer) else x.sharding
  return isinstance(sharding, NamedSharding) and any(s is not None for s in sharding.spec[:1])


def replicate(x: Array) -> Array:
  """Replicates a small array that explicit axes shard."""
  sharding = jax.typeof(x).sharding
  if all(axis is None for axis in sharding.spec):
    return x
  return jax.sharding.reshard(x, NamedSharding(sharding.mesh, P(*(None,) * x.ndim)))


def gather_models(x: Array) -> Array:
  """Gathers the task axis if explicit axes shard it; the other axes stay sharded."""
  sharding = jax.typeof(x).sharding
  if sharding.spec[0] is None:
    return x
  return jax.sharding.reshard(x, NamedSharding(sharding.mesh, P(None, *sharding.spec[1:])))


def replicated_like(x: Array, ndim: int) -> NamedSharding | None:
  """Returns a replicated sharding for `ndim` axes; None if no explicit axis shards x."""
  sharding = jax.typeof(x).sharding
  if all(axis is None for axis in sharding.spec):
    return None
  return NamedSharding(sharding.mesh, P(*(None,) * ndim))


def reshape(x: Array, shape: tuple[int, ...]) -> Array:
  """Reshapes the axes after the task axis: [K, ...] -> [K, ...]."""
  sharding = jax.typeof(x).sharding
  if sharding.spec[0] is None:
    return x.reshape(shape)
  return jax.lax.reshape(x, shape, out_sharding=_by_task(sharding, len(shape)))


def _by_task(sharding: NamedSharding, ndim: int) -> NamedSharding:
  return NamedSharding(sharding.mesh, P(sharding.spec[0], *(None,) * (ndim - 1)))
