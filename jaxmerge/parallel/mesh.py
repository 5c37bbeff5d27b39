"""The mesh of devices, with axes for tasks, batch rows and model weights."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any  # A stack is any tree of arrays.

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxmerge.core import tree

Array = jax.Array
AXES = ("task", "data", "model")
Rules = Sequence[tuple[str, P]]  # Regular expression of a leaf's name, and how it is sharded.


def make(
  task: int = -1,
  data: int = 1,
  model: int = 1,
  *,
  tasks: int | None = None,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """Returns a mesh of devices with the axes task, data and model.

  Args:
    task: devices along the task axis; -1 takes the remaining ones, at most one per task.
    data: devices over which the rows of a batch are sharded.
    model: devices over which the weights of one model are sharded.
    tasks: number of tasks of the run.
    devices: the devices to use; all by default. Devices beyond the mesh's size stay idle.

  Raises:
    ValueError: if a size is neither positive nor -1, two are -1, or there are too few devices.
  """
  available = list(jax.devices() if devices is None else devices)
  sizes = dict(zip(AXES, (task, data, model), strict=True))
  open_axes = [axis for axis, n in sizes.items() if n == -1]
  if any(n < 1 and n != -1 for n in sizes.values()) or len(open_axes) > 1:
    raise ValueError(f"mesh sizes must be positive, at most one -1, got {sizes}.")
  if open_axes:
    fixed = math.prod(n for n in sizes.values() if n != -1)
    left = max(1, len(available) // fixed)
    sizes[open_axes[0]] = min(left, tasks) if open_axes == ["task"] and tasks else left
  wanted = math.prod(sizes.values())
  if wanted > len(available):
    raise ValueError(f"a mesh {sizes} needs {wanted} devices, but there are {len(available)}.")
  grid = np.array(_evenly(available, wanted, sizes)).reshape(tuple(sizes.values()))
  return Mesh(grid, AXES)


def _evenly(
  every: Sequence[jax.Device], wanted: int, sizes: dict[str, int]
) -> Sequence[jax.Device]:
  """Returns the same number of devices from each process, so that all take part."""
  owners = sorted({d.process_index for d in every})
  each, left = divmod(wanted, len(owners))
  if left:
    raise ValueError(
      f"a mesh {sizes} has {wanted} devices, which {len(owners)} processes cannot share evenly; "
      "give other sizes, or another number of processes."
    )
  of_owner = [[d for d in every if d.process_index == owner][:each] for owner in owners]
  if any(len(devices) < each for devices in of_owner):
    raise ValueError(f"a mesh {sizes} needs {each} devices of each process; some have fewer.")
  return [device for devices in of_owner for device in devices]


def task_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of a stack: the leading axis over the task axis of the mesh."""
  return NamedSharding(mesh, P("task"))


def local_slots(mesh: Mesh, num_slots: int) -> range:
  """Returns the slots of a stack of `num_slots` that are on devices of this process.

  >>> local_slots(make(4, 2), 8)
  range(0, 8)
  """
  here, side = jax.process_index(), mesh.shape["task"]
  local = [t for t in range(side) if any(d.process_index == here for d in mesh.devices[t].flat)]
  each = num_slots // side
  return range(local[0] * each, (local[-1] + 1) * each)


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays that are replicated on every device."""
  return NamedSharding(mesh, P())


def spec(name: str, shape: Sequence[int], rules: Rules) -> P:
  """Returns the spec of a leaf: that of the first rule whose pattern matches in its name.

  >>> tuple(spec("layers/mlp/up/kernel", (2, 8, 32), [("/kernel$", P(None, None, "model"))]))
  (None, None, 'model')

  Raises:
    ValueError: if no rule matches, or the matching one has more axes than the leaf.
  """
  for pattern, axes in rules:
    if re.search(pattern, name):
      if len(axes) > len(shape):
        raise ValueError(f"leaf {name!r} of shape {list(shape)} cannot be sharded as {axes}.")
      return axes
  patterns = ", ".join(repr(pattern) for pattern, _ in rules)
  raise ValueError(f"no sharding rule matches leaf {name!r}; there are rules for {patterns}.")


def sharding_of(name: str, shape: Sequence[int], mesh: Mesh | None, rules: Rules) -> Sharding:
  """Returns the sharding of a leaf by its rule, or the default device without a mesh.

  Raises:
    ValueError: as `spec`, or if the size of a mesh axis does not divide the leaf's axis.
  """
  if mesh is None:
    return SingleDeviceSharding(jax.devices()[0])
  partition = spec(name, shape, rules)
  for size, axes in zip(shape, partition, strict=False):
    each = (axes,) if isinstance(axes, str) else tuple(axes or ())
    count = math.prod(mesh.shape[axis] for axis in each)
    if size % count:
      raise ValueError(
        f"leaf {name!r} of shape {list(shape)} cannot be sharded as {partition}: {size} entries "
        f"over {count} devices."
      )
  return NamedSharding(mesh, partition)


def shardings(params: Any, mesh: Mesh, rules: Rules = (), *, stacked: bool = False) -> Any:
  """Returns the shardings of a tree: each leaf's by its rule, replicated without rules.

  Args:
    params: tree of arrays or shapes of one model [*s], also if the result is for a stack.
    mesh: the mesh.
    rules: sharding rules by name, without the task axis.
    stacked: return the shardings of a stack [T, *s], whose first axis is the mesh's task axis.

  Raises:
    ValueError: as `sharding_of`, or if the mesh has a model axis and there are no rules.

  >>> mesh, model = make(2, 1, 2, devices=jax.devices()[:4]), {"w": np.zeros((6, 4))}
  >>> tuple(shardings(model, mesh, [("w", P(None, "model"))], stacked=True)["w"].spec)
  ('task', None, 'model')
  """
  if mesh.shape["model"] > 1 and not rules:
    raise ValueError(
      f"the mesh's model axis is {mesh.shape['model']}, but there are no sharding rules that say "
      "how weights are split over it; give some, or make it 1 and give the devices to task or data."
    )
  lead = ("task",) if stacked else ()

  def one(path: tuple[Any, ...], x: Any) -> NamedSharding:
    if not rules:
      return NamedSharding(mesh, P(*lead))
    name = tree.name_of(path)
    sharding_of(name, np.shape(x), mesh, rules)
    axes = list(lead + tuple(spec(name, np.shape(x), rules)))
    while axes and axes[-1] is None:  # XLA's canonical form: another one would compile again.
      axes.pop()
    return NamedSharding(mesh, P(*axes))

  return jax.tree_util.tree_map_with_path(one, params)


def put(params: Any, where: Any) -> Any:
  """Puts the leaves of a tree on devices: with one sharding, or a tree of them.

  With several processes, each passes the parts for its devices; an array in host memory must be
  the same in all processes.
  """
  if isinstance(where, Sharding):
    return jax.tree.map(lambda x: _put(x, where), params)
  return jax.tree.map(_put, params, where)


def _put(x: Any, where: Sharding) -> Array:
  if where.is_fully_addressable:
    return jax.device_put(x, where)
  if isinstance(x, jax.Array) and x.sharding.device_set == where.device_set:
    return _mover(where)(x)
  array = np.asarray(x)
  return jax.make_array_from_callback(array.shape, where, lambda index: array[index])


@functools.lru_cache(maxsize=64)
def _mover(where: Sharding) -> Callable[[Array], Array]:
  return jax.jit(lambda x: x, out_shardings=where)


def fetch(params: Any) -> Any:
  """Copies the whole leaves of a tree to the memory of every process, as NumPy arrays.

  If devices of other processes hold parts, leaves are replicated on all devices one at a time.
  """

  def whole(x: Any) -> Any:
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
      return x
    assert isinstance(x.sharding, NamedSharding)
    return np.asarray(_put(x, NamedSharding(x.sharding.mesh, P())))

  return jax.tree.map(np.asarray, jax.device_get(jax.tree.map(whole, params)))
