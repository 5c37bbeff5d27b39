"""The driver for weights that are not all in memory at once: leaf by leaf, slice by slice.

A source hands out rows of one leaf of the base and of all models; a sink takes rows of the result.
One slice is on the device at a time. Elementwise methods and integer statistics give the bits of
`merge`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple  # Any: states are trees that a stage defines.

import jax
import numpy as np

from jaxmerge import memory, stage, tree, views
from jaxmerge.stage import Array, Leaf, Method
from jaxmerge.tree import Tree


class Source(NamedTuple):
  """Where the weights come from.

  Attributes:
    leaves: name to ShapeDtypeStruct of the base's leaves, without the task axis.
    height: number of models K.
    read: (name, start, stop) -> (base [rows, ...], reference [rows, ...], models [K, rows, ...]);
      rows count along the leaf's first axis. A scalar leaf is read whole, with start 0 and stop 1.
  """

  leaves: Mapping[str, jax.ShapeDtypeStruct]
  height: int
  read: Callable[[str, int, int], tuple[Any, Any, Any]]


def stream(
  method: Method,
  source: Source,
  write: Callable[[str, int, Array | np.ndarray], None],
  *,
  aux: Mapping[str, Any] | None = None,
  seed: int | None = None,
  names: Sequence[str] | None = None,
  ready: memory.Ready | None = None,
  layout: Sequence[tuple[str, str]] = (),
  entries: int = 2**20,
) -> None:
  """Merges slice by slice: for each, write(name, start, merged rows) is called.

  Every dependent pass of a statistic reads the source once more. Arguments and errors as for
  `jaxmerge.merge`; NaN or infinity is found, and named, when its slice is read, before anything of
  that slice is written.

  Args:
    method: the method; stages that need whole rows get whole leaves.
    source: where base, reference and models come from.
    write: takes the rows of the result, in the base's dtype.
    aux: numbers by name, scalar or one per model.
    seed: for methods with random masks.
    names: names of the models.
    ready: numbers and tags that were prepared before, in place of `aux` and `seed`.
    layout: matrix views.
    entries: upper bound on the entries per model in a slice; at least one row is taken.
  """
  shapes = {n: s.shape for n, s in sorted(source.leaves.items()) if tree.is_floating(s)}
  if ready is None:
    aux = dict(aux or {}, **({} if seed is None else {"seed": seed}))
    copied = source.leaves.keys() - shapes.keys()
    ready = memory.prepare(method, shapes, source.height, aux, names, copied)
  before = tuple(memory.offsets(step, shapes) for step in method)
  cut = _Cut(method, source, shapes, ready, names, views.check(layout), entries, before)
  known: tuple[Any, ...] = ()
  for i, step in enumerate(method):
    own = {}
    for group, members in memory.members(step, shapes).items():
      own[group] = dict(ready.known[i][group])
      for j, statistic in enumerate(step.statistics):
        state = _begun(own[group], method=method, at=(i, j))
        for _ in range(statistic.passes):
          if statistic.passes > 1 and _done(state, own[group], method=method, at=(i, j)):
            break
          found = _total(cut, members, (i, j), known, own[group], state)
          state = _refined(state, found, own[group], method=method, at=(i, j))
        own[group][statistic.name] = state
    known = (*known, own)
  for name, start, parts in _slices(cut, shapes):
    out = _merged(parts, _alone(cut, name, known), method=method, **cut.static(name))
    memory.refuse_height(name, out.shape[0])
    write(name, start, out[0])
  for name, leaf in source.leaves.items():
    if name not in shapes:
      write(name, 0, source.read(name, 0, leaf.shape[0] if leaf.shape else 1)[0])


def merge_slices(
  method: Method, base: Tree, models: Tree, *, reference: Tree | None = None, **options: Any
) -> Tree:
  """Merges models that lie in host memory, with one slice on the device at a time.

  Takes and returns what `jaxmerge.merge` does, as NumPy arrays; `options` are those of `stream`.
  """
  reference = base if reference is None else reference
  memory.check_models(base, models, reference)
  bases, references, stacks = (
    {n: np.asarray(v) for n, v in tree.named(t).items()} for t in (base, reference, models)
  )
  out = {n: np.empty(v.shape, v.dtype) for n, v in bases.items()}

  def read(name: str, start: int, stop: int) -> tuple[Any, Any, Any]:
    if not bases[name].ndim:
      return bases[name], references[name], stacks[name]
    rows = slice(start, stop)
    return bases[name][rows], references[name][rows], stacks[name][:, rows]

  def write(name: str, start: int, part: Array | np.ndarray) -> None:
    if out[name].ndim:
      out[name][start : start + part.shape[0]] = part
    else:
      out[name][...] = part

  leaves = {n: jax.ShapeDtypeStruct(v.shape, v.dtype) for n, v in bases.items()}
  stream(method, Source(leaves, tree.height(models), read), write, **options)
  return tree.rebuild(base, out)


class _Cut(NamedTuple):
  """What stays the same over all slices of a merge."""

  method: Method
  source: Source
  shapes: dict[str, tuple[int, ...]]
  ready: memory.Ready
  names: Sequence[str] | None
  layout: views.Views
  entries: int
  offsets: tuple[dict[str, np.uint32], ...]

  def static(self, name: str) -> dict[str, Any]:
    """The part of a leaf's description that a compiled program depends on."""
    acts = tuple(s.where is None or s.where(name) for s in self.method)
    return {"acts": acts, "shape": self.shapes[name], "view": views.view_of(name, self.layout)}


class _Parts(NamedTuple):
  base: Any
  reference: Any
  models: Any
  leaf: Leaf
  offsets: tuple[Any, ...]


def _slices(cut: _Cut, members: Any) -> Iterator[tuple[str, int, _Parts]]:
  """Reads the members slice by slice, and refuses NaN and infinity."""
  whole = any(step.unit != "entry" for step in cut.method)
  for name in members:
    shape = cut.shapes[name]
    rows = shape[0] if shape else 1
    across = max(1, int(np.prod(shape[1:], dtype=np.int64)))
    step = rows if whole else max(1, cut.entries // across)
    leaf = memory.leaf_of(name, shape, None, cut.ready)._replace(shape=())
    for start in range(0, max(rows, 1), max(step, 1)):
      stop = min(start + step, rows)
      base, reference, models = cut.source.read(name, start, stop)
      if cut.ready.order is not None:
        models = models[cut.ready.order]
      aux = {n: _rows(v, shape, start, stop) for n, v in leaf.aux.items()}
      part = leaf._replace(start=np.int32(start), aux=aux)
      flags = jax.device_get(_finite(base, reference, models))
      memory.refuse_nonfinite({name: flags}, cut.names, cut.ready.order)
      before = tuple(own.get(name, np.uint32(0)) for own in cut.offsets)
      yield name, start, _Parts(base, reference, models, part, before)


def _rows(value: Any, shape: tuple[int, ...], start: int, stop: int) -> Any:
  """The rows of an array that is aligned to the leaf; other numbers as they are."""
  aligned = np.ndim(value) == len(shape) + 1 and shape and np.shape(value)[1:] == shape
  return value[:, start:stop] if aligned else value


def _alone(cut: _Cut, name: str, known: tuple[Any, ...]) -> tuple[Any, ...]:
  """What each stage knows about one leaf: that of the leaf's group."""
  return tuple(own.get(step.group(name), {}) for step, own in zip(cut.method, known, strict=False))


def _total(
  cut: _Cut, members: Any, at: tuple[int, int], known: tuple[Any, ...], own: Any, state: Any
) -> Any:
  found = None
  for name, _, parts in _slices(cut, members):
    before = _alone(cut, name, known)
    part = _measured(parts, before, own, state, method=cut.method, at=at, **cut.static(name))
    found = part if found is None else _combined(found, part, method=cut.method, at=at)
  return found


_finite = jax.jit(memory.are_finite)


def _statistic(method: Method, at: tuple[int, int]) -> stage.Statistic:
  return method[at[0]].statistics[at[1]]


@functools.partial(jax.jit, static_argnames=("method", "at"))
def _begun(own: Any, *, method: Method, at: tuple[int, int]) -> Any:
  return _statistic(method, at).begin(own)


@functools.partial(jax.jit, static_argnames=("method", "at"))
def _done(state: Any, own: Any, *, method: Method, at: tuple[int, int]) -> Any:
  return _statistic(method, at).done(state, own)


@functools.partial(jax.jit, static_argnames=("method", "at"))
def _refined(state: Any, found: Any, own: Any, *, method: Method, at: tuple[int, int]) -> Any:
  return _statistic(method, at).refine(state, found, own)


@functools.partial(jax.jit, static_argnames=("method", "at"))
def _combined(found: Any, part: Any, *, method: Method, at: tuple[int, int]) -> Any:
  return jax.tree.map(_statistic(method, at).combine, found, part)


def _through(
  parts: _Parts, known: Any, method: Method, acts: Any, shape: tuple[int, ...], view: str | None
) -> tuple[Array, Leaf, list[Array]]:
  """Takes the task vectors of a slice through the first stages; also returns what is held."""
  x = memory.task_vectors(parts.models, parts.reference)
  leaf = parts.leaf._replace(shape=shape, base=parts.reference)
  kept: list[Array] = []
  for step, acting, own, offset in zip(method, acts, known, parts.offsets, strict=False):
    leaf = leaf._replace(offset=offset)
    if acting:
      x = memory.update(step, x, leaf, own, kept, view)
  return x, leaf, kept


@functools.partial(jax.jit, static_argnames=("method", "at", "acts", "shape", "view"))
def _measured(
  parts: _Parts,
  known: Any,
  own: Any,
  state: Any,
  *,
  method: Method,
  at: tuple[int, int],
  acts: tuple[bool, ...],
  shape: tuple[int, ...],
  view: str | None,
) -> Any:
  x, leaf, kept = _through(parts, known, method[: at[0]], acts, shape, view)
  leaf = leaf._replace(offset=parts.offsets[at[0]])
  return _statistic(method, at).measure(memory.seen(method[at[0]], x, kept), leaf, state, own)


@functools.partial(jax.jit, static_argnames=("method", "acts", "shape", "view"))
def _merged(
  parts: _Parts,
  known: Any,
  *,
  method: Method,
  acts: tuple[bool, ...],
  shape: tuple[int, ...],
  view: str | None,
) -> Array:
  x, _, _ = _through(parts, known, method, acts, shape, view)
  return memory.stored(x, parts.base, parts.base.dtype)
