"""Cutting leaves into slices, and reading them: what a driver puts on the device at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple  # Any: arrays of NumPy, and what stages know.

import jax
import numpy as np

from jaxmerge.core import interpreter, layouts, matrix_views, order_statistics
from jaxmerge.core.interpreter import Slice
from jaxmerge.core.precision import Precision
from jaxmerge.core.stage import Method
from jaxmerge.drivers import finiteness

SAMPLE = 2**22  # Entries of all models that are looked at before a threshold is searched, at most,
FEW = 2**15  # and of each at least, if one in `SPARSE` is fewer,
SPARSE = 2**6
PIECE = 2**9  # at least so many next to each other,
PIECES = 16  # in at most so many places of a leaf.
NEAR = 2**18  # Entries that are looked at a second time while a core's cache still holds them.


Whose = str | int
Look = Callable[[Whose, np.ndarray], None]


class Source(NamedTuple):
  """Where the weights come from.

  Attributes:
    leaves: name to ShapeDtypeStruct of the result's leaves.
    num_models: number of models K.
    read: (name, start, stop, order, look) -> `Slice` of base [n], reference [n], models [K, n] and
      statistics, NumPy arrays; entries are counted row by row, and models[i] is the one at index i
      of `order`, a slice or an array. They are used up before the next call. The base is None where
      raw weights are merged, the reference is None where it is the base. Statistics by entry are
      [K, n], others whole. `look`, if there is one, is called with "base", "reference" or i, and
      with entries of it, each once and in order, best while they are in a cache: the slice is read
      the first time, and right after the ones before it.
    precision: of leaves that are not merged in float32 or wider, by name.
    wide: names of leaves that have 64 bits in an input; those that have them in the result count
      anyhow.
    statistics: by name and leaf, their shapes and dtypes, [K, *s] or [K, ...].
  """

  leaves: Mapping[str, jax.ShapeDtypeStruct]
  num_models: int
  read: Callable[[str, int, int, Any, Look | None], Slice]
  precision: Mapping[str, Precision] = {}
  wide: Collection[str] = ()
  statistics: Mapping[str, Mapping[str, Any]] = {}


class Run(NamedTuple):
  """What stays the same over all slices of a merge, and what was seen of them.

  Attributes:
    checked: entries of a leaf that have been looked at.
    wide: names of the leaves that are merged in 64 bits.
    moments: names of the running statistics.
    variances: names of those that are never negative.
    held: by leaf that has such, the places of infinities that are in all inputs, and their values,
      in the slice that was read last.
    by_entry: names of the statistics that are cut as the models are.
  """

  method: Method
  source: Source
  shapes: dict[str, tuple[int, ...]]
  ready: interpreter.Ready
  names: Sequence[str] | None
  layout: layouts.Table
  entries: int
  offsets: tuple[dict[str, np.uint32], ...]
  checked: dict[str, int]
  nonfinite: bool
  measured: Callable[[str, int], None]
  counted: Callable[[int], Any]
  call: Callable[..., Any]
  wide: Collection[str]
  moments: Collection[str]
  variances: Collection[str]
  held: dict[str, tuple[np.ndarray, np.ndarray]]
  by_entry: tuple[str, ...] = ()


class Form(NamedTuple):
  """What the program of a slice depends on, besides its length: for leaves alike it is the same.

  Attributes:
    acts: whether each stage acts on the leaf.
    shape: of the slice, (-1, ...) or that of a scalar, (); None where it can stay flat.
    view: the leaf's matrix view.
    precision: what it is merged in; None: float32 or wider.
    wide: it is merged in 64 bits.
    by_entry: names of the statistics that are flat as the models are.
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
  """Returns how many entries of a leaf must stay together: a row, the leaf, or one."""
  shape, needs = run.shapes[name], _needs(run, name)
  if needs == {"entry"}:
    return 1
  cut = "matrix" not in needs and matrix_views.rows_lead(run.layout.view(name))
  return max(1, math.prod(shape[1:] if cut else shape))


def ranges(run: Run, name: str, entries: int) -> Iterator[tuple[int, int]]:
  """Cuts a leaf into slices of about so many entries, in whole units."""
  size, together = math.prod(run.shapes[name]), unit(run, name)
  step = together * max(1, entries // together)
  for start in range(0, max(size, 1), step):
    yield start, min(start + step, size)


def pieces(run: Run, name: str, size: int) -> Iterator[tuple[int, int]]:
  """Picks some slices all over a leaf, its share of a sample of `size` entries."""
  own, together = math.prod(run.shapes[name]), unit(run, name)
  most = max(FEW, SAMPLE // (run.source.num_models + 1))
  wanted = min(most, max(FEW, size // SPARSE)) * own // max(size, 1)
  count = min(max(wanted // PIECE, 1), PIECES)
  length = together * -(-max(PIECE, wanted // count) // together)
  if count * length >= own:
    count, length = 1, own
  for i in range(count):
    start = own * i // count // together * together
    yield start, min(start + length, own)


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

  Slices of a leaf come in order, over and over; when they come the first time, NaN and infinity are
  refused. One that is read `ahead` is out of order; without `check` the caller will refuse them.
  """
  index = slice(None) if run.ready.order is None else run.ready.order
  first = not ahead and start == run.checked.get(name, 0)
  check = check and not run.nonfinite
  seen: dict[Whose, bool] = {}

  def look(whose: Whose, part: np.ndarray) -> None:
    if check:
      seen[whose] = seen.get(whose, True) and finite(part)

  piece = run.source.read(name, start, stop, index, look if first else None)
  if first:
    run.checked[name] = stop
  leaf = interpreter.leaf_of(name, run.ready)._replace(start=np.uint32(start % 2**32))
  if run.shapes[name]:
    leaf = leaf._replace(places=run.counted(stop - start))
  before = tuple(each.get(name, np.uint32(0)) for each in run.offsets)
  parts = piece._replace(leaf=leaf, offsets=before)
  if piece.base is not None and name in run.moments:
    parts = parts._replace(reference=None)  # The mean of the models themselves is merged.
  if name in run.held or (check and (ahead or not all(seen.values()))):
    parts = vetted(run, name, parts, refuse=check)
  return parts


def vetted(run: Run, name: str, parts: Slice, *, refuse: bool) -> Slice:
  """Puts zeros in place of infinities that all inputs of a slice have, and refuses others.

  Raises:
    ValueError: naming leaf and model, where there is NaN or infinity besides, if that is refused.
  """
  held = finiteness.shared(parts.base, parts.reference, parts.models)
  if held.any() or name in run.held:
    first = parts.models[0] if parts.base is None else parts.base
    run.held[name] = (held, first[held])
    each = (parts.base, parts.reference, parts.models)
    base, reference, models = (
      None if x is None else np.where(held, x.dtype.type(0), x) for x in each
    )
    parts = parts._replace(base=base, reference=reference, models=models)
  if refuse:
    refuse_nonfinite(run, name, parts)
  return parts


def sound(run: Run, name: str, out: np.ndarray) -> bool:
  """Tells whether entries of a result are finite, and those of running variances not negative."""
  return finite(out) and not (name in run.variances and bool((out < 0).any()))


def refuse_nonfinite(run: Run, name: str, parts: Slice) -> None:
  """Raises ValueError, naming leaf and model, where a slice has NaN or infinity."""
  base = finite(parts.base)
  reference = base if parts.reference is None else finite(parts.reference)
  flags = finiteness.Flags(base, reference, [finite(m) for m in parts.models])
  finiteness.refuse({name: flags}, run.names, run.ready.order)


def look_at(look: Look, piece: Slice) -> None:
  """Shows all of a slice at once."""
  if piece.base is not None:
    look("base", piece.base)
  if piece.reference is not None:
    look("reference", piece.reference)
  for k, model in enumerate(piece.models):
    look(k, model)


def picked(run: Run, parts: Slice, columns: np.ndarray) -> Slice:
  """Takes some entries of a flat slice; stages see each of them where it lies in the leaf."""

  def of(x: Any) -> Any:
    # As integers: NumPy picks those of dtypes that are not its own one by one.
    return None if x is None else np.take(x.view(f"u{x.itemsize}"), columns, -1).view(x.dtype)

  return _entries(run, parts, of, columns.astype(np.uint32)[None])


def padded(run: Run, parts: Slice, length: int) -> Slice:
  """Adds zeros to a flat slice, up to a length."""
  more = length - parts.models.shape[1]

  def of(x: Any) -> Any:
    return None if x is None else np.pad(x, [(0, 0)] * (np.ndim(x) - 1) + [(0, more)])

  return _entries(run, parts, of, run.counted(length))


def _entries(run: Run, parts: Slice, of: Callable[[Any], Any], places: Any) -> Slice:
  """Applies a function to whatever of a flat slice has its entries."""
  return parts._replace(
    base=of(parts.base),
    reference=of(parts.reference),
    models=of(parts.models),
    statistics={n: of(v) if n in run.by_entry else v for n, v in parts.statistics.items()},
    leaf=parts.leaf._replace(places=places),
  )


INTEGERS = {2: (np.uint16, np.int16), 4: (np.uint32, np.int32)}
INFINITY = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}


def finite(x: np.ndarray | None) -> bool:
  """Tells whether an array has neither NaN nor infinity, without a temporary array.

  Example:
    >>> finite(np.array([1.0, np.inf], np.float32)), finite(np.ones(3, np.float16))
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
  parts = (slice(at, at + NEAR) for at in range(0, x.size, NEAR))
  return all(signed[own].max() < limit and unsigned[own].max() < limit + sign for own in parts)


def known_of(
  run: Run, name: str, known: tuple[Any, ...], parts: Slice
) -> tuple[dict[str, Any], ...]:
  """What each stage knows about a slice: what the leaf's group has, cuts by position."""
  found = [own.get(step.group(name), {}) for step, own in zip(run.method, known, strict=False)]
  size = parts.models.shape[1]
  for i, (own, offset) in enumerate(zip(found, parts.offsets, strict=False)):
    cuts = {
      n: v for n, v in own.items() if isinstance(v, order_statistics.Cut) and v.last is not None
    }
    first = int(parts.leaf.start) + int(offset)
    found[i] = own | {n: order_statistics.passed(cut, first, size) for n, cut in cuts.items()}
  return tuple(found)
