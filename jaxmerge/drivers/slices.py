"""Cuts leaves into slices, the parts that a driver puts on the device, and reads them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple  # Any: NumPy arrays, and the states of stages.

import jax
import numpy as np

from jaxmerge.core import interpreter, layouts, matrix_views, order_statistics
from jaxmerge.core.interpreter import Slice
from jaxmerge.core.precision import Precision
from jaxmerge.core.stage import Method
from jaxmerge.drivers import finiteness

SAMPLE = 2**22  # Most entries, over all models, to sample before a threshold search,
FEW = 2**15  # and fewest of each model, if one in `SPARSE` is fewer,
SPARSE = 2**6
PIECE = 2**9  # at least this many contiguous,
PIECES = 16  # in at most this many places of a leaf.
NEAR = 2**18  # Entries that are read a second time while a core's cache still holds them.


Input = str | int  # "base", "reference", or the index of a model.
OnChunk = Callable[[Input, np.ndarray], None]


class Source(NamedTuple):
  """Where the weights come from.

  Attributes:
    leaves: name to ShapeDtypeStruct of the result's leaves.
    num_models: number of models K.
    read: (name, start, stop, order, on_chunk) -> `Slice` of base [n], reference [n], models [K, n]
      and statistics, NumPy arrays; entries are counted row by row, and models[i] is the model at
      index i of `order`, a slice or an array. The arrays are valid until the next call. The base is
      None if raw weights are merged, the reference is None if it is the base. Statistics by entry
      are [K, n], others whole. `on_chunk`, if not None, is called with "base", "reference" or i,
      and with its entries, each once and in order, ideally while they are in a cache: it is passed
      only when the slice is read for the first time, right after the slices before it.
    precision: precision by name, for leaves that are not merged in float32 or wider.
    wide: names of leaves with 64 bits in an input; leaves with 64 bits in the result are wide in
      any case.
    statistics: shapes and dtypes by name and leaf, [K, *s] or [K, ...].
  """

  leaves: Mapping[str, jax.ShapeDtypeStruct]
  num_models: int
  read: Callable[[str, int, int, Any, OnChunk | None], Slice]
  precision: Mapping[str, Precision] = {}
  wide: Collection[str] = ()
  statistics: Mapping[str, Mapping[str, Any]] = {}


def _ignore(name: str, count: int) -> None:
  pass


def _call(program: Callable[..., Any], *args: Any, **static: Any) -> Any:
  return program(*args, **static)


class Run(NamedTuple):
  """The state of a merge that all its slices share, with what was checked so far.

  Attributes:
    method: the method, without hyperparameters.
    source: where the weights come from.
    shapes: of the leaves that are merged, by name.
    ready: resolved hyperparameters, tags and initial `stats`.
    layout: matrix views.
    offsets: for each stage, entries of the leaves before each leaf in its group.
    places: count -> uint32 [1, count], the places 0, 1, ... on the device.
    wide: names of the leaves that are merged in 64 bits.
    moments: names of the running statistics.
    variances: names of the running variances, which are never negative.
    by_entry: names of the statistics that are cut as the models are.
    names: names of the models, or None.
    entries: approximate number of entries in a slice.
    nonfinite: whether NaN and infinity are allowed.
    on_measured: called with a leaf's name and a number of its entries that a reduction has seen.
    call: hook around each compiled call.
    checked: number of entries checked so far, by leaf.
    infinities: places and values of infinities that all inputs share, by leaf, in the last slice.
  """

  method: Method
  source: Source
  shapes: dict[str, tuple[int, ...]]
  ready: interpreter.Ready
  layout: layouts.Table
  offsets: tuple[dict[str, np.uint32], ...]
  places: Callable[[int], Any]
  wide: Collection[str]
  moments: Collection[str]
  variances: Collection[str]
  by_entry: tuple[str, ...]
  checked: dict[str, int]
  infinities: dict[str, tuple[np.ndarray, np.ndarray]]
  names: Sequence[str] | None = None
  entries: int = 2**20
  nonfinite: bool = False
  on_measured: Callable[[str, int], None] = _ignore
  call: Callable[..., Any] = _call


class Form(NamedTuple):
  """Static properties of a slice that its program depends on, besides length; leaves share them.

  Attributes:
    acts: whether each stage acts on the leaf.
    shape: shape of the slice, (-1, ...), or () for a scalar; None if it can stay flat.
    view: the leaf's matrix view.
    precision: precision of the merge; None: float32 or wider.
    wide: whether it is merged in 64 bits.
    by_entry: names of the statistics that are flat like the models.
  """

  acts: tuple[bool, ...]
  shape: tuple[int, ...] | None
  view: str | None
  precision: Precision | None = None
  wide: bool = False
  by_entry: tuple[str, ...] = ()

  @property
  def each(self) -> str | None:
    """The dtype to which every operation rounds."""
    return self.precision.dtype if self.precision is not None and self.precision.each else None


def form_of(run: Run, name: str) -> Form:
  """Returns the form of a leaf's slices."""
  acts = tuple(step.where is None or step.where(name) for step in run.method)
  shape, precision = run.shapes[name], run.source.precision.get(name)
  wide = name in run.wide
  if shape and _needs(run, name) == {"entry"}:
    return Form(acts, None, None, precision, wide, run.by_entry)
  view = run.layout.view(name)
  return Form(acts, (-1, *shape[1:]) if shape else (), view, precision, wide, run.by_entry)


def _needs(run: Run, name: str) -> set[str]:
  """The units of the stages that act on a leaf."""
  return {"entry", *(s.unit for s in run.method if s.where is None or s.where(name))}


def unit(run: Run, name: str) -> int:
  """Returns how many entries of a leaf must stay together: a row, the whole leaf, or one."""
  shape, needs = run.shapes[name], _needs(run, name)
  if needs == {"entry"}:
    return 1
  by_row = "matrix" not in needs and matrix_views.rows_lead(run.layout.view(name))
  return max(1, math.prod(shape[1:] if by_row else shape))


def ranges(run: Run, name: str, entries: int) -> Iterator[tuple[int, int]]:
  """Cuts a leaf into slices of about `entries` entries, in whole units."""
  size, together = math.prod(run.shapes[name]), unit(run, name)
  step = together * max(1, entries // together)
  for start in range(0, max(size, 1), step):
    yield start, min(start + step, size)


def pieces(run: Run, name: str, size: int) -> Iterator[tuple[int, int]]:
  """Picks slices spread over a leaf: its share of a sample of `size` entries."""
  leaf_size, together = math.prod(run.shapes[name]), unit(run, name)
  most = max(FEW, SAMPLE // (run.source.num_models + 1))
  wanted = min(most, max(FEW, size // SPARSE)) * leaf_size // max(size, 1)
  count = min(max(wanted // PIECE, 1), PIECES)
  length = together * -(-max(PIECE, wanted // count) // together)
  if count * length >= leaf_size:
    count, length = 1, leaf_size
  for i in range(count):
    start = leaf_size * i // count // together * together
    yield start, min(start + length, leaf_size)


def slices(
  run: Run, members: Collection[str], entries: int, *, check: bool = True
) -> Iterator[tuple[str, int, Slice, Form]]:
  """Reads leaves slice by slice: yields name, start, slice and form; `check` as for `read`."""
  for name in members:
    form = form_of(run, name)
    for start, stop in ranges(run, name, entries):
      yield name, start, read(run, name, start, stop, check=check), form


def read(
  run: Run, name: str, start: int, stop: int, *, check: bool = True, ahead: bool = False
) -> Slice:
  """Reads a slice.

  Slices of a leaf are read in order, once a pass; the first pass raises for NaN and infinity. A
  slice read `ahead` is out of order; without `check` the caller checks it.
  """
  order = slice(None) if run.ready.order is None else run.ready.order
  is_first = not ahead and start == run.checked.get(name, 0)
  check = check and not run.nonfinite
  are_finite: dict[Input, bool] = {}

  def on_chunk(source: Input, chunk: np.ndarray) -> None:
    if check:
      are_finite[source] = are_finite.get(source, True) and is_finite(chunk)

  piece = run.source.read(name, start, stop, order, on_chunk if is_first else None)
  if is_first:
    run.checked[name] = stop
  piece = _describe(run, name, piece, start, stop)
  if name in run.infinities or (check and (ahead or not all(are_finite.values()))):
    piece = clear_infinities(run, name, piece, refuse=check)
  return piece


def _describe(run: Run, name: str, piece: Slice, start: int, stop: int) -> Slice:
  """Returns a slice with its `Leaf`."""
  leaf = interpreter.leaf_of(name, run.ready)._replace(start=np.uint32(start % 2**32))
  if run.shapes[name]:
    leaf = leaf._replace(places=run.places(stop - start))
  if piece.base is not None and name in run.moments:
    piece = piece._replace(reference=None)  # Running statistics are averaged, without a base.
  before = tuple(by_leaf.get(name, np.uint32(0)) for by_leaf in run.offsets)
  return piece._replace(leaf=leaf, offsets=before)


def clear_infinities(run: Run, name: str, piece: Slice, *, refuse: bool) -> Slice:
  """Replaces infinities that all inputs of a slice share by zeros, and raises for others.

  Raises:
    ValueError: naming leaf and model, for other NaN or infinity, if `refuse`.
  """
  places = finiteness.shared_infinities(piece.base, piece.reference, piece.models)
  if places.any() or name in run.infinities:
    first = piece.models[0] if piece.base is None else piece.base
    run.infinities[name] = (places, first[places])
    arrays = (piece.base, piece.reference, piece.models)
    base, reference, models = (
      None if x is None else np.where(places, x.dtype.type(0), x) for x in arrays
    )
    piece = piece._replace(base=base, reference=reference, models=models)
  if refuse:
    refuse_nonfinite(run, name, piece)
  return piece


def is_sound(run: Run, name: str, out: np.ndarray) -> bool:
  """Returns whether entries of a result are finite and, for running variances, not negative."""
  return is_finite(out) and not (name in run.variances and bool((out < 0).any()))


def refuse_nonfinite(run: Run, name: str, piece: Slice) -> None:
  """Raises ValueError, naming leaf and model, where a slice has NaN or infinity."""
  base = is_finite(piece.base)
  reference = base if piece.reference is None else is_finite(piece.reference)
  flags = finiteness.Flags(base, reference, [is_finite(m) for m in piece.models])
  finiteness.refuse({name: flags}, run.names, run.ready.order)


def show(on_chunk: OnChunk, piece: Slice) -> None:
  """Calls `on_chunk` with every input of a slice."""
  if piece.base is not None:
    on_chunk("base", piece.base)
  if piece.reference is not None:
    on_chunk("reference", piece.reference)
  for k, model in enumerate(piece.models):
    on_chunk(k, model)


def pick(run: Run, piece: Slice, columns: np.ndarray) -> Slice:
  """Takes some entries of a flat slice; each keeps its position in the leaf."""

  def take(x: Any) -> Any:
    # As integers: NumPy takes entries of extension dtypes one by one.
    return None if x is None else np.take(x.view(f"u{x.itemsize}"), columns, -1).view(x.dtype)

  return _map_entries(run, piece, take, columns.astype(np.uint32)[None])


def pad(run: Run, piece: Slice, length: int) -> Slice:
  """Pads a flat slice with zeros up to a length."""
  more = length - piece.models.shape[1]

  def extend(x: Any) -> Any:
    return None if x is None else np.pad(x, [(0, 0)] * (np.ndim(x) - 1) + [(0, more)])

  return _map_entries(run, piece, extend, run.places(length))


def _map_entries(run: Run, piece: Slice, f: Callable[[Any], Any], places: Any) -> Slice:
  """Applies a function to all arrays of a flat slice that have its entries."""
  return piece._replace(
    base=f(piece.base),
    reference=f(piece.reference),
    models=f(piece.models),
    statistics={n: f(x) if n in run.by_entry else x for n, x in piece.statistics.items()},
    leaf=piece.leaf._replace(places=places),
  )


INTEGERS = {2: (np.uint16, np.int16), 4: (np.uint32, np.int32)}
INFINITY = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}


def is_finite(x: np.ndarray | None) -> bool:
  """Returns whether an array is free of NaN and infinity, without a temporary array.

  Example:
    >>> is_finite(np.array([1.0, np.inf], np.float32)), is_finite(np.ones(3, np.float16))
    (False, True)
  """
  if x is None or not x.size:
    return True
  if x.dtype.name not in INFINITY:
    return bool(np.isfinite(x).all())
  # As integers: positive infinity and NaN are the largest signed, negative the largest unsigned.
  limit = INFINITY[x.dtype.name]
  unsigned, signed = (x.view(integer).reshape(-1) for integer in INTEGERS[x.dtype.itemsize])
  sign = 1 << (8 * x.dtype.itemsize - 1)
  parts = (slice(first, first + NEAR) for first in range(0, x.size, NEAR))
  return all(signed[p].max() < limit and unsigned[p].max() < limit + sign for p in parts)


def stats_of(
  run: Run, name: str, stats: tuple[Any, ...], piece: Slice
) -> tuple[dict[str, Any], ...]:
  """Returns the `stats` of each stage for a slice: its group's results, with cuts for the slice."""
  size, out = piece.models.shape[1], []
  for step, by_group, offset in zip(run.method, stats, piece.offsets, strict=False):
    results = by_group.get(step.group(name), {})
    first = int(piece.leaf.start) + int(offset)
    out.append(
      results
      | {
        n: order_statistics.cut_for(cut, first, size)
        for n, cut in results.items()
        if isinstance(cut, order_statistics.Cut) and cut.last is not None
      }
    )
  return tuple(out)
