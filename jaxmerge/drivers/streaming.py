"""The driver for weights that do not fit in memory: leaf by leaf, slice by slice.

A source reads entries of one leaf of the base and of all models; a sink writes those of the result.
One slice is on the device at a time. Elementwise methods and integer reductions give the bits of
`merge`; sums of floats are over fixed blocks, in order, so no result depends on the slicing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any  # Any: results of reductions are trees of arrays.

import jax
import numpy as np

from jaxmerge.core import (
  double_precision,
  hyperparameters,
  interpreter,
  layouts,
  leaf_groups,
  running_statistics,
  stage,
  tree,
)
from jaxmerge.core import statistics as statistics_
from jaxmerge.core.interpreter import Slice
from jaxmerge.core.stage import Method
from jaxmerge.core.tree import Tree
from jaxmerge.drivers import arguments, finiteness, measurement, slice_programs, slices
from jaxmerge.drivers.measurement import Stats
from jaxmerge.drivers.slices import Form, Run, Source
from jaxmerge.methods import averages

LEAST = 64  # A compiler unrolls a loop over fewer entries, and may round differently in it.

Write = Callable[[str, int, np.ndarray], None]


def stream(
  method: Method,
  source: Source,
  write: Write,
  *,
  hparams: Mapping[str, Any] | None = None,
  seed: int | None = None,
  names: Sequence[str] | None = None,
  ready: interpreter.Ready | None = None,
  layout: layouts.Layout | layouts.Table | None = (),
  entries: int = 2**20,
  done: Collection[str] = (),
  nonfinite: bool = False,
  on_measured: Callable[[str, int], None] = lambda name, count: None,
  call: Callable[..., Any] = lambda program, *args, **static: program(*args, **static),
) -> None:
  """Merges slice by slice: for each, write(name, start, merged entries [n]) is called.

  Every reduction is one more pass over the source. Arguments and errors are those of
  `jaxmerge.merge`; NaN or infinity raises when its slice is first read, before it is written.

  Args:
    method: the method; stages that need whole rows get whole rows.
    source: where base, reference, models and statistics come from.
    write: takes entries of the result, in the leaf's dtype.
    hparams: hyperparameters by name, scalar or one per model, or trees of them.
    seed: for methods with random masks.
    names: names of the models.
    ready: hyperparameters and tags if already resolved, in place of `hparams` and `seed`.
    layout: matrix views.
    entries: approximate number of entries of each model in a slice.
    done: names of leaves whose result exists: they count in reductions, and are not written.
    nonfinite: whether NaN and infinity are allowed.
    on_measured: called with a leaf's name and a number of its entries that a reduction has seen.
    call: hook around each compiled call, (program, *arguments, **static); used by `compile`.
  """
  leaves = sorted(source.leaves.items())
  shapes = {n: s.shape for n, s in leaves if tree.is_floating(s) and math.prod(s.shape)}
  method = averages.with_moments(method, shapes)
  wide = _wide(method, source, shapes)
  with double_precision.context([np.zeros(0)] if wide else []):
    if ready is None:
      hparams = dict(hparams or {}, **({} if seed is None else {"seed": seed}))
      copied = source.leaves.keys() - shapes.keys()
      ready = interpreter.prepare(method, shapes, source.num_models, hparams, names, copied)
    run = _start(method, source, shapes, ready, layout, wide)
    run = run._replace(names=names, entries=entries, nonfinite=nonfinite)
    run = run._replace(on_measured=on_measured, call=call)
    for group in _measured_together(run):
      _merge(run, group, [name for name in group if name not in done], write)
  _copy(source, source.leaves.keys() - shapes.keys() - set(done), entries, write)


def _wide(method: Method, source: Source, shapes: Mapping[str, Any]) -> set[str]:
  """Returns the leaves to merge in 64 bits; leaves that share a reduction have one width."""
  wide = {n for n in shapes if n in source.wide or double_precision.is_wide(source.leaves[n])}
  return set(shapes) if wide and leaf_groups.is_coupled(method) else wide


def _start(
  method: Method,
  source: Source,
  shapes: dict[str, tuple[int, ...]],
  ready: interpreter.Ready,
  layout: layouts.Layout | layouts.Table | None,
  wide: Collection[str],
) -> Run:
  """Checks views and statistics, and returns the `Run`, which is the same for all slices."""
  table = layouts.resolve(method, shapes, layout, names=source.leaves)
  copied = source.leaves.keys() - shapes.keys()
  statistics_.resolve(method, source.statistics, shapes, source.num_models, table, copied)
  return Run(
    method=stage.without_hparams(method),
    source=source,
    shapes=shapes,
    ready=ready,
    layout=table,
    offsets=tuple(leaf_groups.offsets(step, shapes) for step in method),
    # Most slices have the same length: their places are put on the device once.
    places=functools.lru_cache(2)(lambda n: jax.device_put(np.arange(n, dtype=np.uint32)[None])),
    wide=wide,
    moments=running_statistics.of(shapes),
    variances=running_statistics.variances(shapes),
    by_entry=tuple(n for n, kind in statistics_.kinds(method).items() if kind == "entry"),
    checked={},
    infinities={},
  )


def _measured_together(run: Run) -> list[list[str]]:
  """Groups the leaves that must be measured before any of them is merged; others go one by one."""
  apart = all(step.scope == "leaf" or not step.reductions for step in run.method)
  return [[name] for name in run.shapes] if apart else [list(run.shapes)]


def _merge(run: Run, leaves: Sequence[str], left: Sequence[str], write: Write) -> None:
  """Computes the reductions of some leaves together, and merges those that are left."""
  stats = measurement.measure(run, leaves) if left else ()
  waits = measurement.deferred_stage(run.method) is not None
  for name, start, piece, form in slices.slices(run, left, run.entries, check=False):
    out = _result(run, name, piece, stats, form)
    sound = slices.is_sound(run, name, out)
    if not sound and name not in run.infinities:
      piece = slices.clear_infinities(run, name, piece, refuse=not run.nonfinite)
      if name in run.infinities:
        out = _result(run, name, piece, stats, form)
        sound = slices.is_sound(run, name, out)
    if not sound and waits:
      stats, waits = measurement.measure(run, leaves, stats), False
      # Later reads have overwritten this slice's buffer.
      piece = slices.read(run, name, start, start + out.size, check=False)
      out = _result(run, name, piece, stats, form)
      sound = slices.is_sound(run, name, out)
    if not sound and not run.nonfinite:
      slices.refuse_nonfinite(run, name, piece)
      finiteness.refuse_statistics(name, piece.statistics)
      raise finiteness.unsound_error(name, out, remedy=", or let such values pass")
    write(name, start, _with_infinities(run, name, out))


def _with_infinities(run: Run, name: str, out: np.ndarray) -> np.ndarray:
  """Puts infinities that all inputs have at one place back into a slice of the result."""
  if name not in run.infinities:
    return out
  places, values = run.infinities[name]
  out = np.array(out)  # Buffers of the device are read-only.
  out[places] = values.astype(out.dtype)
  return out


def _result(run: Run, name: str, piece: Slice, stats: Stats, form: Form) -> np.ndarray:
  """Returns a slice of the result, [n]."""
  count = piece.models.shape[1]
  if form.shape is None and count < LEAST:
    piece = slices.pad(run, piece, LEAST)
  of_leaf = slices.stats_of(run, name, stats, piece)
  of_leaf = measurement.with_ranks(run, piece, of_leaf, run.method, form)
  dtype = run.source.leaves[name].dtype
  out = run.call(slice_programs.merged, piece, of_leaf, method=run.method, form=form, dtype=dtype)
  hyperparameters.refuse_unmerged(name, out.shape[0])
  return np.asarray(out)[0, :count]


def _copy(source: Source, leaves: Collection[str], entries: int, write: Write) -> None:
  """Copies leaves that are not merged: from the base, or from the first model."""
  for name in sorted(leaves):
    size = math.prod(source.leaves[name].shape)
    for start in range(0, max(size, 1), entries):
      stop = min(start + entries, size)
      piece = source.read(name, start, stop, slice(None), lambda *_: None)
      first = piece.models[0].astype(source.leaves[name].dtype)
      write(name, start, first if piece.base is None else piece.base)


def merge_slices(
  method: Method,
  models: Tree,
  base: Tree,
  *,
  reference: Tree | None = None,
  statistics: Mapping[str, Any] | None = None,
  **options: Any,
) -> Tree:
  """Merges models in host memory, with one slice on the device at a time.

  Takes and returns what `jaxmerge.merge` does, as NumPy arrays; `options` are those of `stream`.
  Statistics by entry are cut as the models are, others are on the device while a slice of their
  leaf is.
  """
  arguments.refuse(base, "the base")
  arguments.refuse(models, "the models")
  interpreter.check_models(base, models, base if reference is None else reference)
  source = _host_memory(method, models, base, reference, statistics)
  out = {n: np.empty(s.shape, s.dtype) for n, s in source.leaves.items()}

  def write(name: str, start: int, part: np.ndarray) -> None:
    out[name].reshape(-1)[start : start + part.shape[0]] = part

  stream(method, source, write, **options)
  return tree.rebuild(base, out)


def _host_memory(
  method: Method,
  models: Tree,
  base: Tree,
  reference: Tree | None,
  statistics: Mapping[str, Any] | None,
) -> Source:
  """Returns a source that reads NumPy arrays."""
  trees = (tree.named(t) for t in (base, {} if reference is None else reference, models))
  bases, references, stacks = ({n: np.asarray(v) for n, v in t.items()} for t in trees)
  num_models, kinds = tree.num_models(models), statistics_.kinds(method)
  beside = {
    n: {m: np.asarray(v) for m, v in leaves.items() if m not in bases or tree.is_floating(bases[m])}
    for n, leaves in statistics_.by_leaf(statistics).items()
  }

  def read(name: str, start: int, stop: int, order: Any, on_chunk: slices.OnChunk | None) -> Slice:
    def rows(x: np.ndarray) -> np.ndarray:
      return x.reshape(num_models, -1)[order, start:stop]

    base, *zero = (t[name].reshape(-1)[start:stop] for t in (bases, references) if t)
    each = statistics_.of_leaf(beside, name)
    each = {n: rows(v) if kinds[n] == "entry" else v[order] for n, v in each.items()}
    piece = Slice(base, zero[0] if zero else None, rows(stacks[name]), each)
    if on_chunk is not None:
      slices.show(on_chunk, piece)
    return piece

  leaves = {n: jax.ShapeDtypeStruct(v.shape, v.dtype) for n, v in bases.items()}
  every = (bases, references, stacks)
  wide = {n for t in every for n, x in t.items() if double_precision.is_wide(x)}
  return Source(leaves, num_models, read, wide=wide, statistics=beside)
