"""Whole matrices, distributed over the devices of a mesh.

A matrix method needs whole matrices, and most of its cost is decompositions. By default the
compiler gathers every matrix on every device, and every device decomposes all of them. Here
matrices of one shape, from many leaves and from the layers that a leaf stacks, are concatenated,
distributed over all devices, processed there one at a time, and gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple  # Any: what goes with a matrix is a tree of arrays.

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmerge.core import interpreter, layouts, matrix_views, rewrites, sharding, statistics
from jaxmerge.core.interpreter import Part
from jaxmerge.core.stage import Stage

Array = jax.Array
Rule = Callable[[Array, Array | None, Any, Any], Array]


class Distribution(NamedTuple):
  """How matrices are distributed.

  Attributes:
    mesh: mesh whose devices all take part, abstract in a program that a caller compiles; None: the
      compiler places the matrices.
    chains: whether sums over models are chains, as elsewhere in the program; see
      `core/rewrites.py`.
  """

  mesh: Mesh | AbstractMesh | None = None
  chains: bool | None = False


class LeafMatrices(NamedTuple):
  """A leaf whose matrices are distributed.

  Attributes:
    x: its stack [K, *s].
    base: its base [*s], or None.
    view: its matrix view.
    more: tree of arrays that belong to the leaf.
    each: tree of arrays that belong to its matrices, with a first axis for them.
  """

  x: Array
  base: Array | None
  view: str
  more: Any
  each: Any = ()


def apply(
  step: Stage,
  parts: Mapping[str, Part],
  stats: Any,
  layout: layouts.Table,
  distribution: Distribution | None,
) -> dict[str, Array]:
  """Applies a matrix stage to the leaves that have a matrix view: [K, *s] -> [M, *s].

  Args:
    step: the stage.
    parts: the leaves of a group by name.
    stats: results of the group's reductions.
    layout: matrix views; a leaf without one is left out, and so is one without entries.
    distribution: where matrices go.
  """
  if step.unit != "matrix" or step.keep or distribution is None or distribution.mesh is None:
    return {}
  leaves, unit = {}, layouts.Unit(step.unit, step.lookups)
  for name, part in parts.items():
    x, leaf = interpreter.observe(step, part)
    view = layouts.view_for(layout.view(name), unit)
    if x.size and (view is not None or step.rest == "row"):
      view = matrix_views.or_row(x, view)
      each = statistics.by_matrix(step, leaf.statistics, view, x.shape[1:])
      more = (leaf._replace(base=None, statistics={}), stats)
      leaves[name] = LeafMatrices(x, leaf.base, view, more, each)

  def update(x: Array, base: Array | None, more: Any, each: Any) -> Array:
    leaf, stats = more
    return step.update(x, leaf._replace(base=base, statistics=each), stats)

  return map_matrices(update, leaves, distribution)


def map_matrices(
  f: Rule, leaves: Mapping[str, LeafMatrices], distribution: Distribution
) -> dict[str, Array]:
  """Applies f to every matrix of some leaves, [K, rows, columns] -> [M, rows, columns] each.

  Args:
    f: (stack of a matrix, its base or None, what belongs to the leaf, to the matrix) -> merged.
    leaves: the leaves by name.
    distribution: where the matrices go.

  Returns:
    The merged leaves [M, *s].

  Example:
    >>> mesh = jax.make_mesh((4,), ("device",), devices=jax.devices()[:4])
    >>> leaves = {"w": LeafMatrices(jnp.ones((3, 5, 4, 2)), None, "bio", ())}
    >>> double = lambda x, base, more, each: x[:1] * 2
    >>> map_matrices(double, leaves, Distribution(mesh))["w"].shape
    (1, 5, 4, 2)
  """
  stacks = {n: matrix_views.matrices(sharding.gather(m.x), m.view) for n, m in leaves.items()}
  f = rewrites.with_chains(lambda _: f, distribution.chains)
  out = {}
  for names in _alike(leaves, stacks):
    counts = [stacks[n].shape[1] for n in names]
    arguments = _side_by_side([leaves[n] for n in names], [stacks[n] for n in names])
    ys = _distribute(f, arguments, distribution.mesh)
    starts = [sum(counts[:i]) for i in range(len(names))]
    for name, start, count in zip(names, starts, counts, strict=True):
      out[name] = _to_leaf(ys[start : start + count], leaves[name])
  return out


def _alike(leaves: Mapping[str, LeafMatrices], stacks: Mapping[str, Array]) -> list[list[str]]:
  """Groups the leaves whose matrices, and the arrays that belong to them, have equal shapes."""
  groups: dict[Any, list[str]] = {}
  for name, m in leaves.items():
    x = stacks[name]
    more = jax.tree.map(lambda v: (jnp.shape(v), jnp.result_type(v)), m.more)
    each = jax.tree.map(lambda v: (jnp.shape(v)[1:], jnp.result_type(v)), m.each)
    key = x.shape[:1] + x.shape[2:], x.dtype, m.base is None, str((more, each))
    groups.setdefault(key, []).append(name)
  return list(groups.values())


def _side_by_side(leaves: Sequence[LeafMatrices], stacks: Sequence[Array]) -> tuple[Any, ...]:
  """Concatenates the matrices of some leaves along a first axis, with the arrays of each."""
  counts = [x.shape[1] for x in stacks]
  x = jnp.concatenate([stack.swapaxes(0, 1) for stack in stacks])
  bases = [base for m in leaves if (base := _base(m)) is not None]
  more = jax.tree.map(lambda *v: jnp.stack(v), *[m.more for m in leaves])
  leaf_of_matrix = np.repeat(np.arange(len(leaves)), counts)
  each = jax.tree.map(lambda *v: jnp.concatenate(v), *[m.each for m in leaves])
  of_matrix = jax.tree.map(lambda v: v[leaf_of_matrix], more)
  return x, jnp.concatenate(bases) if bases else None, of_matrix, each


def _distribute(f: Rule, arguments: Any, mesh: Mesh | AbstractMesh | None) -> Array:
  """Distributes work over devices, and gathers the results: [n, ...] -> [n, M, rows, columns]."""

  def work(arguments: Any) -> Array:
    return lax.map(lambda one: f(*one), arguments)

  if mesh is None:
    return work(arguments)
  count, axes = arguments[0].shape[0], P(mesh.axis_names)
  length = -(-count // mesh.size) * mesh.size

  def pad(x: Array) -> Array:
    # Copies of the first, not zeros. Results for the padding are discarded.
    spare = jnp.broadcast_to(x[:1], (length - count, *x.shape[1:]))
    return _put(jnp.concatenate([x, spare]), NamedSharding(mesh, axes))

  shared = jax.shard_map(work, mesh=mesh, in_specs=axes, out_specs=axes, check_vma=False)
  return _put(shared(jax.tree.map(pad, arguments)), NamedSharding(mesh, P()))[:count]


def _put(x: Array, where: NamedSharding) -> Array:
  explicit = AxisType.Explicit in where.mesh.axis_types
  return jax.sharding.reshard(x, where) if explicit else lax.with_sharding_constraint(x, where)


def _base(m: LeafMatrices) -> Array | None:
  if m.base is None:
    return None
  return matrix_views.matrices(sharding.gather(m.base[None]), m.view)[0]


def _to_leaf(ys: Array, m: LeafMatrices) -> Array:
  """Reshapes matrices to their leaf: [matrices, M, rows, columns] -> [M, *s]."""
  y = ys.swapaxes(0, 1)
  joined = y.reshape(y.shape[0], y.shape[1] * y.shape[2], y.shape[3])
  return matrix_views.from_rows(joined, m.view, m.x.shape[1:])


def of(arrays: Iterable[Any], chains: bool | None) -> Distribution:
  """Returns how matrices of these arrays are distributed: over the mesh that shards them.

  For traced arrays it is the mesh of their type or, with automatic axes, of the context. Matrices
  are not distributed if the mesh mixes explicit and automatic axes, or if some axes are in use:
  inside a `shard_map`, or under a `vmap` over sharded models.

  >>> of([jnp.ones(3)], chains=True)
  Distribution(mesh=None, chains=True)
  """
  mesh = next((m for x in arrays for m in _meshes(x) if m.size > 1), None)
  return Distribution(mesh if mesh is not None and _are_free(mesh) else None, chains)


def _meshes(x: Any) -> Iterator[Mesh | AbstractMesh]:
  """Yields the meshes that an array may be sharded over."""
  traced = isinstance(x, jax.core.Tracer)
  sharding = jax.typeof(x).sharding if traced else getattr(x, "sharding", None)
  if isinstance(sharding, NamedSharding):
    yield sharding.mesh
  context = jax.sharding.get_abstract_mesh()
  if traced and set(context.axis_types) == {AxisType.Auto}:
    yield context


def _are_free(mesh: Mesh | AbstractMesh) -> bool:
  """Returns whether a `shard_map` can use all axes of a mesh here."""
  seen = []

  def look(x: Array) -> Array:
    seen.append(set(jax.sharding.get_abstract_mesh().axis_types))
    return x

  if set(mesh.axis_types) not in ({AxisType.Auto}, {AxisType.Explicit}):
    return False
  if AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types:
    return False
  whole = jax.ShapeDtypeStruct((), jnp.float32)
  jax.eval_shape(jax.shard_map(look, mesh=mesh, in_specs=P(), out_specs=P()), whole)
  return seen == [{AxisType.Manual}]
