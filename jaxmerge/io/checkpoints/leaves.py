"""The leaves of a state in a checkpoint: by name, as arrays, as shapes, compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree


def by_name(tree: PyTree) -> dict[str, Any]:  # Any: leaves, not yet checked to be arrays
  """Returns leaves by path, as Orbax would turn nested tuples and dataclasses into dicts."""
  named = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = jax.tree_util.keystr(path, simple=True, separator="/") or "array"
    if name in named:
      raise ValueError(f"two leaves of the state have the name {name!r}; rename one.")
    named[name] = leaf
  return named


def arrays(state: PyTree) -> dict[str, jax.Array]:
  """Returns leaves by path as JAX arrays; refuses leaves that cannot be restored bit for bit."""
  arrays = by_name(state)
  for name, x in arrays.items():
    if not isinstance(x, (jax.Array, np.ndarray, np.generic)):
      raise ValueError(
        f"state leaf {name}: {type(x).__name__} is not an array; put plain values in the record."
      )
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      raise ValueError(f"state leaf {name}: a key; save jax.random.key_data(key).")
    if jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype:
      raise ValueError(f"state leaf {name}: {x.dtype} would be narrowed; convert it first.")
    if not isinstance(x, jax.Array):
      arrays[name] = jax.device_put(np.array(x), home())  # a copy: the caller may overwrite x
  if not with_entries(arrays):
    raise ValueError("the state has no array with an entry; there is nothing to save.")
  return arrays


def signature(x: Any) -> list:  # Any: an array or a description of one
  """Returns [dtype, shape] as JSON values."""
  return [str(jnp.dtype(x.dtype)), list(x.shape)]


def with_entries(arrays: dict) -> dict:
  """Returns the arrays with entries; Orbax refuses arrays of size zero."""
  return {name: x for name, x in arrays.items() if x.size}


def empty(x: jax.ShapeDtypeStruct) -> jax.Array:
  """Returns an array of size zero from its description."""
  return jax.device_put(np.zeros(x.shape, x.dtype), x.sharding)


def abstract(x: Any) -> jax.ShapeDtypeStruct:  # Any: an array or a description of one
  """Returns the description of an array; without a sharding, it is placed by `home`."""
  sharding = getattr(x, "sharding", None) or home()
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def home() -> jax.sharding.Sharding:
  """Returns the default sharding: the first device, or replicated over all processes' devices."""
  if jax.process_count() == 1:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  mesh = jax.sharding.Mesh(np.array(jax.devices()), ("device",))
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def check(folder: Path, saved: dict, wanted: dict[str, jax.ShapeDtypeStruct]) -> None:
  """Raises ValueError for the first leaf that differs; Orbax would cast its dtype silently."""
  for name in sorted(saved.keys() | wanted.keys()):
    if name not in saved:
      raise ValueError(f"checkpoint {folder}: it has no leaf {name}; the state to restore has.")
    if name not in wanted:
      raise ValueError(f"checkpoint {folder}: leaf {name} is not in the state to restore.")
    if saved[name] != (expected := signature(wanted[name])):
      raise ValueError(
        f"checkpoint {folder}: leaf {name} is {saved[name][0]} {saved[name][1]}; "
        f"the state to restore has {expected[0]} {expected[1]}."
      )
