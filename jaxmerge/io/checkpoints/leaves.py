"""The leaves of a state as a checkpoint holds them: by name, as arrays, described, compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree


def by_name(tree: PyTree) -> dict[str, Any]:  # Any: arrays, or whatever the caller took for one
  """Leaves by path. Flat, because Orbax would turn tuples and dataclasses into dicts."""
  named = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = jax.tree_util.keystr(path, simple=True, separator="/") or "array"
    if name in named:
      raise ValueError(f"two leaves of the state have the name {name!r}; rename one.")
    named[name] = leaf
  return named


def arrays(state: PyTree) -> dict[str, jax.Array]:
  """Leaves by path as JAX arrays; refuses what would not come back bit for bit."""
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
      arrays[name] = jax.device_put(np.array(x), home())  # a copy: the caller may overwrite his
  if not with_entries(arrays):
    raise ValueError("the state has no array with an entry; there is nothing to save.")
  return arrays


def signature(x: Any) -> list:  # Any: an array or a description of one
  """Returns [dtype, shape], as JSON holds them."""
  return [str(jnp.dtype(x.dtype)), list(x.shape)]


def with_entries(arrays: dict) -> dict:
  """Arrays of size zero have nothing to store, and Orbax refuses them."""
  return {name: x for name, x in arrays.items() if x.size}


def empty(x: jax.ShapeDtypeStruct) -> jax.Array:
  """Returns the array of a description without entries."""
  return jax.device_put(np.zeros(x.shape, x.dtype), x.sharding)


def abstract(x: Any) -> jax.ShapeDtypeStruct:  # Any: an array or a description of one
  """Returns the description of an array; without a sharding it goes to `home`."""
  sharding = getattr(x, "sharding", None) or home()
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def home() -> jax.sharding.Sharding:
  """Returns where an array goes that has no place: the first device, or all, of many processes."""
  if jax.process_count() == 1:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  mesh = jax.sharding.Mesh(np.array(jax.devices()), ("device",))
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def check(folder: Path, saved: dict, wanted: dict[str, jax.ShapeDtypeStruct]) -> None:
  """Raises for the first leaf that differs; Orbax would cast to another dtype without a word."""
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
