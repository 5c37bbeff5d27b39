"""Whole matrices, dealt over the devices of a mesh and back.

A method of matrices needs each of them whole, and decompositions are what it costs. Left alone, a
compiler brings every matrix to every device, and all of them decompose all. Here matrices of one
shape, of many leaves and of the layers that a leaf stacks, are laid side by side, shared out over
all devices, worked on one after the other there, and brought back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
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


class Deal(NamedTuple):
  """How matrices are dealt.

  Attributes:
    mesh: all its devices take part; None: matrices stay where the compiler has them. An abstract
      one in a program that a caller compiles.
    chains: whether sums over models are chains, as elsewhere in the program; see
      `core/rewrites.py`.
  """

  mesh: Mesh | AbstractMesh | None = None
  chains: bool | None = False


class Hand(NamedTuple):
  """A leaf whose matrices are dealt.

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


def leaves(
  step: Stage,
  parts: Mapping[str, Part],
  stats: Any,
  layout: layouts.Table,
  deal: Deal | None,
) -> dict[str, Array]:
  """Updates those of some leaves [K, *s] that a stage takes matrix by matrix: [M, *s].

  Args:
    step: the stage.
    parts: the leaves of a group by name.
    stats: results of the group's reductions.
    layout: matrix views; a leaf without one is left out, and so is one without entries.
    deal: where matrices are dealt to.
  """
  if step.unit != "matrix" or step.keep or deal is None or deal.mesh is None:
    return {}
  hands, unit = {}, layouts.Unit(step.unit, step.lookups)
  for name, part in parts.items():
    x, leaf = interpreter.observe(step, part)
    view = layouts.seen(layout.view(name), unit)
    if x.size and (view is not None or step.rest == "row"):
      view = matrix_views.or_row(x, view)
      each = statistics.by_matrix(step, leaf.statistics, view, x.shape[1:])
      more = (leaf._replace(base=None, statistics={}), stats)
      hands[name] = Hand(x, leaf.base, view, more, each)

  def update(x: Array, base: Array | None, more: Any, each: Any) -> Array:
    leaf, stats = more
    return step.update(x, leaf._replace(base=base, statistics=each), stats)

  return dealt(update, hands, deal)


def dealt(f: Rule, hands: Mapping[str, Hand], deal: Deal) -> dict[str, Array]:
  """Applies f to every matrix of some leaves, [K, rows, columns] -> [M, rows, columns] each.

  Args:
    f: (stack of a matrix, its base or None, what belongs to the leaf, to the matrix) -> merged.
    hands: the leaves by name.
    deal: where to.

  Returns:
    The merged leaves [M, *s].

  Example:
    >>> mesh = jax.make_mesh((4,), ("device",), devices=jax.devices()[:4])
    >>> hands = {"w": Hand(jnp.ones((3, 5, 4, 2)), None, "bio", ())}
    >>> dealt(lambda x, base, more, each: x[:1] * 2, hands, Deal(mesh))["w"].shape
    (1, 5, 4, 2)
  """
  alike: dict[Any, list[str]] = {}
  shown = {name: matrix_views.matrices(sharding.whole(h.x), h.view) for name, h in hands.items()}
  for name, h in hands.items():
    own = jax.tree.map(lambda v: (jnp.shape(v), jnp.result_type(v)), h.more)
    own = own, jax.tree.map(lambda v: (jnp.shape(v)[1:], jnp.result_type(v)), h.each)
    key = shown[name].shape[:1] + shown[name].shape[2:], shown[name].dtype, h.base is None, str(own)
    alike.setdefault(key, []).append(name)
  out = {}
  for names in alike.values():
    counts = [shown[n].shape[1] for n in names]
    xs = jnp.concatenate([shown[n].swapaxes(0, 1) for n in names])
    bases = [own for n in names if (own := _base(hands[n])) is not None]
    base = jnp.concatenate(bases) if bases else None
    more = jax.tree.map(lambda *v: jnp.stack(v), *[hands[n].more for n in names])
    whose = np.repeat(np.arange(len(names)), counts)
    each = jax.tree.map(lambda *v: jnp.concatenate(v), *[hands[n].each for n in names])
    own = rewrites.chosen(lambda _: f, deal.chains)
    ys = _worked(own, (xs, base, jax.tree.map(lambda v: v[whose], more), each), deal.mesh)
    starts = [sum(counts[:i]) for i in range(len(names))]
    for name, start, count in zip(names, starts, counts, strict=True):
      out[name] = _back(ys[start : start + count], hands[name])
  return out


def _worked(f: Rule, given: Any, mesh: Mesh | AbstractMesh | None) -> Array:
  """Deals, works, and collects: each of given [n, ...] -> [n, M, rows, columns]."""
  each = lambda given: lax.map(lambda one: f(*one), given)  # noqa: E731
  if mesh is None:
    return each(given)
  count, axes = given[0].shape[0], P(mesh.axis_names)
  length = -(-count // mesh.size) * mesh.size

  def padded(x: Array) -> Array:
    # The first once more, not zeros: what f makes of those is nobody's business.
    spare = jnp.broadcast_to(x[:1], (length - count, *x.shape[1:]))
    return _laid(jnp.concatenate([x, spare]), NamedSharding(mesh, axes))

  shared = jax.shard_map(each, mesh=mesh, in_specs=axes, out_specs=axes, check_vma=False)
  return _laid(shared(jax.tree.map(padded, given)), NamedSharding(mesh, P()))[:count]


def _laid(x: Array, where: NamedSharding) -> Array:
  explicit = AxisType.Explicit in where.mesh.axis_types
  return jax.sharding.reshard(x, where) if explicit else lax.with_sharding_constraint(x, where)


def _base(hand: Hand) -> Array | None:
  if hand.base is None:
    return None
  return matrix_views.matrices(sharding.whole(hand.base[None]), hand.view)[0]


def _back(ys: Array, hand: Hand) -> Array:
  """[matrices, M, rows, columns] -> [M, *s]."""
  y = ys.swapaxes(0, 1)
  joined = y.reshape(y.shape[0], y.shape[1] * y.shape[2], y.shape[3])
  return matrix_views.from_rows(joined, hand.view, hand.x.shape[1:])


def of(arrays: Iterable[Any], chains: bool | None) -> Deal:
  """Returns how matrices of these arrays are dealt: over the mesh that shards them, if one does.

  Of traced arrays it is the mesh of their type or, with automatic axes, of the context. Matrices
  are not dealt over axes of two kinds, nor where some are taken: inside of a `shard_map`, or where
  a `vmap` is over models that are sharded.

  >>> of([jnp.ones(3)], chains=True)
  Deal(mesh=None, chains=True)
  """
  mesh = next((m for x in arrays for m in _meshes(x) if m.size > 1), None)
  return Deal(mesh if mesh is not None and _are_free(mesh) else None, chains)


def _meshes(x: Any) -> Iterator[Mesh | AbstractMesh]:
  """The meshes that an array may lie on."""
  traced = isinstance(x, jax.core.Tracer)
  sharding = jax.typeof(x).sharding if traced else getattr(x, "sharding", None)
  if isinstance(sharding, NamedSharding):
    yield sharding.mesh
  context = jax.sharding.get_abstract_mesh()
  if traced and set(context.axis_types) == {AxisType.Auto}:
    yield context


def _are_free(mesh: Mesh | AbstractMesh) -> bool:
  """Tells whether a `shard_map` can have all axes of a mesh here."""
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
