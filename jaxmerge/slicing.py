"""Cutting leaves into slices, and reading them: what a driver puts on the device at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple  # Any: arrays of NumPy, and what stages know.

import jax
import numpy as np

from jaxmerge import memory, views
from jaxmerge.precision import Precision
from jaxmerge.stage import Leaf, Method

SAMPLE = 2**18  # Entries of a model that are looked at before a threshold is searched, at most,
FEW = 2**15  # and at least, if one in `SPARSE` is fewer,
SPARSE = 2**6
PIECE = 2**9  # at least so many next to each other,
PIECES = 16  # in at most so many places of a leaf.


class Source(NamedTuple):
  """Where the weights come from.

  Attributes:
    leaves: name to ShapeDtypeStruct of the result's leaves.
    height: number of models K.
    read: (name, start, stop, order) -> (base [n], reference [n], models [K, n]), NumPy arrays;
      entries are counted row by row, and models[i] is the one at index i of `order`, a slice or an
      array. They are used up before the next call. Base and reference are None where raw weights
      are merged.
    precision: of leaves that are not merged in float32 or wider, by name.
  """

  leaves: Mapping[str, jax.ShapeDtypeStruct]
  height: int
  read: Callable[[str, int, int, Any], tuple[Any, Any, Any]]
  precision: Mapping[str, Precision] = {}


class Run(NamedTuple):
  """What stays the same over all slices of a merge."""

  method: Method
  source: Source
  shapes: dict[str, tuple[int, ...]]
  ready: memory.Ready
  names: Sequence[str] | None
  layout: views.Views
  entries: int
  offsets: tuple[dict[str, np.uint32], ...]
  checked: dict[str, int]
  nonfinite: bool
  measured: Callable[[str, int], None]


class Form(NamedTuple):
  """What the program of a slice depends on, besides its length: for leaves alike it is the same.

  Attributes:
    acts: whether each stage acts on the leaf.
    shape: of the slice, (-1, ...) or that of a scalar, (); None where it can stay flat.
    view: the leaf's matrix view.
    precision: what it is merged in; None: float32 or wider.
  """

  acts: tuple[bool, ...]
  shape: tuple[int, ...] | None
  view: str | None
  precision: Precision | None = None

  @property
  def each(self) -> str | None:
    """The dtype to which every operation rounds."""
    return self.precision.dtype if self.precision is not None and self.precision.each else None


class Parts(NamedTuple):
  """A slice, and what its program takes with it."""

  base: Any
  reference: Any
  models: Any
  leaf: Leaf
  offsets: tuple[Any, ...]


def form_of(run: Run, name: str) -> Form:
  """Returns the form of a leaf's slices."""
  acts = tuple(step.where is None or step.where(name) for step in run.method)
  shape, precision = run.shapes[name], run.source.precision.get(name)
  if shape and _needs(run, name) == {"entry"}:
    return Form(acts, None, None, precision)
  view = views.view_of(name, run.layout)
  return Form(acts, (-1, *shape[1:]) if shape else (), view, precision)


def _needs(run: Run, name: str) -> set[str]:
  """The units of the stages that act on a leaf."""
  return {"entry", *(s.unit for s in run.method if s.where is None or s.where(name))}


def _unit(run: Run, name: str) -> int:
  """As many entries must stay together."""
  shape, needs = run.shapes[name], _needs(run, name)
  if needs == {"entry"}:
    return 1
  cut = "matrix" not in needs and views.rows_lead(views.view_of(name, run.layout))
  return max(1, math.prod(shape[1:] if cut else shape))


def ranges(run: Run, name: str, entries: int) -> Iterator[tuple[int, int]]:
  """Cuts a leaf into slices of about so many entries, in whole units."""
  size, unit = math.prod(run.shapes[name]), _unit(run, name)
  step = unit * max(1, entries // unit)
  for start in range(0, max(size, 1), step):
    yield start, min(start + step, size)


def pieces(run: Run, name: str, size: int) -> Iterator[tuple[int, int]]:
  """Picks some slices all over a leaf, its share of a sample of `size` entries."""
  own, unit = math.prod(run.shapes[name]), _unit(run, name)
  wanted = min(SAMPLE, max(FEW, size // SPARSE)) * own // max(size, 1)
  count = min(max(wanted // PIECE, 1), PIECES)
  length = unit * -(-max(PIECE, wanted // count) // unit)
  if count * length >= own:
    count, length = 1, own
  for i in range(count):
    start = own * i // count // unit * unit
    yield start, min(start + length, own)


def slices(
  run: Run, members: Collection[str], entries: int
) -> Iterator[tuple[str, int, Parts, Form]]:
  """Reads leaves slice by slice: yields name, start, slice and form."""
  for name in members:
    form = form_of(run, name)
    for start, stop in ranges(run, name, entries):
      yield name, start, read(run, name, start, stop), form


def read(run: Run, name: str, start: int, stop: int) -> Parts:
  """Reads a slice, and refuses NaN and infinity the first time."""
  order, shape = run.ready.order, run.shapes[name]
  index = slice(None) if order is None else order
  base, reference, models = run.source.read(name, start, stop, index)
  if not run.nonfinite and start >= run.checked.get(name, 0):
    fine = finite(base)
    flags = (fine, fine if reference is base else finite(reference), [finite(m) for m in models])
    memory.refuse_nonfinite({name: flags}, run.names, order)
    if start == run.checked.get(name, 0):  # A sample looks ahead.
      run.checked[name] = stop
  leaf = memory.leaf_of(name, None, run.ready)
  aux = {n: _entries(v, shape, start, stop) for n, v in leaf.aux.items()}
  before = tuple(own.get(name, np.uint32(0)) for own in run.offsets)
  leaf = leaf._replace(start=np.uint32(start % 2**32), aux=aux)
  return Parts(base, reference, models, leaf, before)


def picked(run: Run, name: str, start: int, parts: Parts, columns: np.ndarray) -> Parts:
  """Takes some entries of a flat slice; stages see each of them where it lies in the leaf."""

  def of(x: Any) -> Any:
    # As integers: NumPy picks those of dtypes that are not its own one by one.
    return None if x is None else np.take(x.view(f"u{x.itemsize}"), columns, -1).view(x.dtype)

  base = of(parts.base)
  aux = memory.leaf_of(name, None, run.ready).aux
  shape = run.shapes[name]
  own = {n: v[:, columns] if _is_aligned(aux[n], shape) else v for n, v in parts.leaf.aux.items()}
  places = (start + columns - np.arange(len(columns))).astype(np.uint32)[None]
  return parts._replace(
    base=base,
    reference=base if parts.reference is parts.base else of(parts.reference),
    models=of(parts.models),
    leaf=parts.leaf._replace(start=places, aux=own),
  )


def _entries(value: Any, shape: tuple[int, ...], start: int, stop: int) -> Any:
  """The entries of an array that is aligned to the leaf; other numbers as they are."""
  if not _is_aligned(value, shape):
    return value
  return np.asarray(value).reshape(len(value), -1)[:, start:stop]


def _is_aligned(value: Any, shape: tuple[int, ...]) -> bool:
  return bool(shape) and np.ndim(value) == len(shape) + 1 and np.shape(value)[1:] == shape


_INTEGERS = {2: (np.uint16, np.int16), 4: (np.uint32, np.int32)}
_INFINITY = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}


def finite(x: np.ndarray | None) -> bool:
  """Tells whether an array has neither NaN nor infinity, without a temporary array.

  Example:
    >>> finite(np.array([1.0, np.inf], np.float32)), finite(np.ones(3, np.float16))
    (False, True)
  """
  if x is None or not x.size:
    return True
  if x.dtype.name not in _INFINITY:
    return bool(np.isfinite(x).all())
  # As integers: positive infinity and NaN are the largest signed, negative the largest unsigned.
  limit = _INFINITY[x.dtype.name]
  unsigned, signed = (x.view(integer) for integer in _INTEGERS[x.dtype.itemsize])
  sign = 1 << (8 * x.dtype.itemsize - 1)
  return bool(signed.max() < limit and unsigned.max() < limit + sign)


def known_of(run: Run, name: str, known: tuple[Any, ...]) -> tuple[Any, ...]:
  """What each stage knows about one leaf: that of the leaf's group."""
  return tuple(own.get(step.group(name), {}) for step, own in zip(run.method, known, strict=False))
