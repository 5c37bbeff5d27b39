"""Arrays gathered, replicated and reshaped on a mesh."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

Array = jax.Array


def gather(x: Array) -> Array:
  """Brings rows and columns together where explicit axes shard them: [K, *s] -> [K, *s].

  The task axis stays as it is. Under automatic axes the compiler does this by itself.
  """
  sharding = jax.typeof(x).sharding
  if all(axis is None for axis in sharding.spec[1:]):
    return x
  return jax.sharding.reshard(x, _by_task(sharding, x.ndim))


def over_first(x: Any) -> bool:
  """Tells whether the first axis of an array is known to be sharded."""
  if isinstance(x, np.ndarray):
    return False
  # The sharding of what is being traced is known where axes are explicit.
  sharding = jax.typeof(x).sharding if isinstance(x, jax.core.Tracer) else x.sharding
  return isinstance(sharding, NamedSharding) and any(s is not None for s in sharding.spec[:1])


def replicate(x: Array) -> Array:
  """Brings a small array to every device where explicit axes shard it."""
  sharding = jax.typeof(x).sharding
  if all(axis is None for axis in sharding.spec):
    return x
  return jax.sharding.reshard(x, NamedSharding(sharding.mesh, P(*(None,) * x.ndim)))


def gather_models(x: Array) -> Array:
  """Brings the models together where explicit axes shard the task axis; the others stay."""
  sharding = jax.typeof(x).sharding
  if sharding.spec[0] is None:
    return x
  return jax.sharding.reshard(x, NamedSharding(sharding.mesh, P(None, *sharding.spec[1:])))


def replicated_like(x: Array, ndim: int) -> NamedSharding | None:
  """Returns where an array of `ndim` axes is on every device; None if no explicit axis shards x."""
  sharding = jax.typeof(x).sharding
  if all(axis is None for axis in sharding.spec):
    return None
  return NamedSharding(sharding.mesh, P(*(None,) * ndim))


def reshape(x: Array, shape: tuple[int, ...]) -> Array:
  """Reshapes a whole stack behind its task axis: [K, ...] -> [K, ...]."""
  sharding = jax.typeof(x).sharding
  if sharding.spec[0] is None:
    return x.reshape(shape)
  return jax.lax.reshape(x, shape, out_sharding=_by_task(sharding, len(shape)))


def _by_task(sharding: NamedSharding, ndim: int) -> NamedSharding:
  return NamedSharding(sharding.mesh, P(sharding.spec[0], *(None,) * (ndim - 1)))
