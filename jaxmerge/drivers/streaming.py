"""The driver for weights that are not all in memory at once: leaf by leaf, slice by slice.

A source hands out entries of one leaf of the base and of all models; a sink takes those of the
result. One slice is on the device at a time. Elementwise methods and integer statistics give the
bits of `merge`, sums of floats are those of fixed blocks, in order: nothing depends on the cut.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any  # Any: what is known is a tree of arrays.

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.core import (
  double_precision,
  hyperparameters,
  interpreter,
  layouts,
  order_statistics,
  running_statistics,
  stage,
  tree,
)
from jaxmerge.core import statistics as statistics_
from jaxmerge.core.interpreter import Slice
from jaxmerge.core.stage import Method, Rank, Reduction, Stage, Sum
from jaxmerge.core.tree import Tree
from jaxmerge.drivers import arguments, external_selection, finiteness, slice_programs, slices
from jaxmerge.drivers.slices import Form, Run, Source
from jaxmerge.methods import averages

BLOCK = 2**20  # Sums of floats are made of slices of so many entries, however others are cut.
LEAST = 64  # A compiler unrolls a loop over fewer entries, and may round in it in another way.
PICKED = 2**12, 2**15  # So many entries are picked from a slice at a time: few, or many.


def stream(
  method: Method,
  source: Source,
  write: Callable[[str, int, np.ndarray], None],
  *,
  hparams: Mapping[str, Any] | None = None,
  seed: int | None = None,
  names: Sequence[str] | None = None,
  ready: interpreter.Ready | None = None,
  layout: layouts.Said | layouts.Table | None = (),
  entries: int = 2**20,
  done: Collection[str] = (),
  nonfinite: bool = False,
  measured: Callable[[str, int], None] = lambda name, count: None,
  call: Callable[..., Any] = lambda program, *given, **static: program(*given, **static),
) -> None:
  """Merges slice by slice: for each, write(name, start, merged entries [n]) is called.

  Every statistic reads the source once more. Arguments and errors as for `jaxmerge.merge`; NaN or
  infinity is found, and named, when its slice is first read, before anything of it is written.

  Args:
    method: the method; stages that need whole rows get whole rows.
    source: where base, reference and models come from.
    write: takes entries of the result, in the leaf's dtype.
    hparams: numbers by name, scalar or one per model.
    seed: for methods with random masks.
    names: names of the models.
    ready: numbers and tags that were prepared before, in place of `hparams` and `seed`.
    layout: matrix views.
    entries: about so many entries of each model are in a slice.
    done: names of leaves whose result is there already: they are measured, not written.
    nonfinite: whether NaN and infinity are let pass.
    measured: called with a leaf's name and a number of its entries that a statistic has seen.
    call: calls the compiled programs, (program, *arguments, **static), for who wants to see them.
  """
  every = sorted(source.leaves.items())
  shapes = {n: s.shape for n, s in every if tree.is_floating(s) and math.prod(s.shape)}
  method = averages.with_moments(method, shapes)
  wides = {n for n in shapes if n in source.wide or double_precision.is_wide(source.leaves[n])}
  wides = set(shapes) if wides and stage.coupled(method) else wides
  with double_precision.context([np.zeros(0)] if wides else []):
    if ready is None:
      hparams = dict(hparams or {}, **({} if seed is None else {"seed": seed}))
      copied = source.leaves.keys() - shapes.keys()
      ready = interpreter.prepare(method, shapes, source.num_models, hparams, names, copied)
    table = layouts.settled(method, shapes, layout, names=source.leaves)
    copied, given = source.leaves.keys() - shapes.keys(), source.statistics
    statistics_.resolve(method, given, shapes, source.num_models, table, copied)
    by_entry = tuple(n for n, kind in statistics_.kinds(method).items() if kind == "entry")
    run = Run(
      stage.bare(method),
      source,
      shapes,
      ready,
      names,
      table,
      entries,
      offsets=tuple(stage.offsets(step, shapes) for step in method),
      checked={},
      nonfinite=nonfinite,
      measured=measured,
      # Most slices are as long as others: their places are put on the device once.
      counted=functools.lru_cache(2)(lambda n: jax.device_put(np.arange(n, dtype=np.uint32)[None])),
      call=call,
      wide=wides,
      moments=running_statistics.of(shapes),
      variances=running_statistics.variances(shapes),
      held={},
      by_entry=by_entry,
    )
    for leaves in _together(run):
      _merged(run, leaves, [name for name in leaves if name not in done], write)
  for name in sorted(source.leaves.keys() - shapes.keys() - set(done)):
    size = math.prod(source.leaves[name].shape)
    for start in range(0, max(size, 1), entries):
      stop = min(start + entries, size)
      piece = source.read(name, start, stop, slice(None), lambda *_: None)
      raw = piece.models[0].astype(source.leaves[name].dtype)
      write(name, start, raw if piece.base is None else piece.base)


def _merged(
  run: Run,
  leaves: Sequence[str],
  left: Sequence[str],
  write: Callable[[str, int, np.ndarray], None],
) -> None:
  """Measures some leaves together, and merges those of them that are left to do."""
  known = _knowledge(run, leaves) if left else ()
  late, strict = _late(run.method), not run.nonfinite
  for name, start, parts, form in slices.slices(run, left, run.entries, check=False):
    out = _result(run, name, parts, known, form)
    fine = slices.sound(run, name, out)
    if not fine and name not in run.held:
      parts = slices.vetted(run, name, parts, refuse=strict)
      if name in run.held:
        out = _result(run, name, parts, known, form)
        fine = slices.sound(run, name, out)
    if not fine and late is not None:
      known, late = _knowledge(run, leaves, known), None
      # Others have been read to where this one lay.
      parts = slices.read(run, name, start, start + out.size, check=False)
      out = _result(run, name, parts, known, form)
      fine = slices.sound(run, name, out)
    if not fine and strict:
      slices.refuse_nonfinite(run, name, parts)
      finiteness.refuse_statistics(name, parts.statistics)
      raise finiteness.unsound(name, out, remedy=", or let such values pass")
    if name in run.held:
      places, values = run.held[name]
      out = np.array(out)  # What is on the device may not be written to.
      out[places] = values.astype(out.dtype)
    write(name, start, out)


def merge_slices(
  method: Method,
  models: Tree,
  base: Tree,
  *,
  reference: Tree | None = None,
  statistics: Mapping[str, Any] | None = None,
  **options: Any,
) -> Tree:
  """Merges models that lie in host memory, with one slice on the device at a time.

  Takes and returns what `jaxmerge.merge` does, as NumPy arrays; `options` are those of `stream`.
  Statistics by entry are cut as the models are, others are on the device while a slice of their
  leaf is.
  """
  arguments.refuse(base, "the base")
  arguments.refuse(models, "the models")
  interpreter.check_models(base, models, base if reference is None else reference)
  trees = (tree.named(t) for t in (base, {} if reference is None else reference, models))
  bases, references, stacks = ({n: np.asarray(v) for n, v in t.items()} for t in trees)
  out = {n: np.empty(v.shape, v.dtype) for n, v in bases.items()}
  num_models = tree.num_models(models)

  kinds = statistics_.kinds(method)
  beside = {
    n: {leaf: np.asarray(v) for leaf, v in leaves.items()}
    for n, leaves in statistics_.by_leaf(statistics).items()
  }

  def read(name: str, start: int, stop: int, order: Any, look: Any) -> Slice:
    base, *zero = (t[name].reshape(-1)[start:stop] for t in (bases, references) if t)

    def rows(x: Any) -> Any:
      return x.reshape(num_models, -1)[order, start:stop]

    each = statistics_.of_leaf(beside, name)
    each = {n: rows(v) if kinds[n] == "entry" else v[order] for n, v in each.items()}
    piece = Slice(base, zero[0] if zero else None, rows(stacks[name]), each)
    if look is not None:
      slices.look_at(look, piece)
    return piece

  def write(name: str, start: int, part: np.ndarray) -> None:
    out[name].reshape(-1)[start : start + part.shape[0]] = part

  leaves = {n: jax.ShapeDtypeStruct(v.shape, v.dtype) for n, v in bases.items()}
  each = (bases, references, stacks)
  wides = {n for t in each for n, x in t.items() if double_precision.is_wide(x)}
  source = Source(leaves, num_models, read, wide=wides, statistics=beside)
  stream(method, source, write, **options)
  return tree.rebuild(base, out)


def _together(run: Run) -> list[list[str]]:
  """Groups the leaves that must be measured before any of them is merged; others go one by one."""
  apart = all(step.scope == "leaf" or not step.reductions for step in run.method)
  return [[name] for name in run.shapes] if apart else [list(run.shapes)]


def _late(method: Method) -> int | None:
  """The stage whose statistics may be measured when something depends on them, if there is one."""
  last = max((i for i, step in enumerate(method) if step.reductions), default=None)
  return last if last is not None and method[last].deferred else None


def _knowledge(run: Run, leaves: Sequence[str], before: Any = None) -> tuple[Any, ...]:
  """Measures what the stages know, by group; what may come late only after what is known before."""
  known: tuple[Any, ...] = ()
  late = _late(run.method) if before is None else None
  for i, step in enumerate(run.method):
    own = {}
    for group, members in stage.members(step, dict.fromkeys(leaves)).items():
      own[group] = dict(run.ready.stats[i][group] if before is None else before[i][group])
      batches = () if i == late else _batches(step)
      for batch in (b for b in batches if b[0].name not in own[group]):
        own[group].update(_measured(run, members, i, batch, known, own[group]))
    known = (*known, own)
  return known


def _result(run: Run, name: str, parts: Slice, known: tuple[Any, ...], form: Form) -> np.ndarray:
  """A slice of the result, [n]."""
  count = parts.models.shape[1]
  if form.shape is None and count < LEAST:
    parts = slices.padded(run, parts, LEAST)
  seen = _ranked(run, parts, slices.known_of(run, name, known, parts), run.method, form)
  dtype = run.source.leaves[name].dtype
  out = np.asarray(
    run.call(slice_programs.merged, parts, seen, method=run.method, form=form, dtype=dtype)
  )
  hyperparameters.refuse_unmerged(name, out.shape[0])
  return out[0, :count]


def _batches(step: Stage) -> Iterator[list[Reduction]]:
  """Groups statistics that one reading serves: neighbouring ranks among the same values."""

  def kind(indexed: tuple[int, Reduction]) -> Any:
    j, statistic = indexed
    return (statistic.of, statistic.exact) if isinstance(statistic, Rank) else j

  for _, batch in itertools.groupby(enumerate(step.reductions), kind):
    yield [statistic for _, statistic in batch]


def _measured(
  run: Run, members: Sequence[str], i: int, batch: list[Reduction], known: Any, own: Any
) -> dict[str, Any]:
  ranks = [s for s in batch if isinstance(s, Rank)]
  if not ranks:
    return {s.name: _sum(run, members, i, s, known, own) for s in batch if isinstance(s, Sum)}
  wanted = [(int(high) << 16) + int(low) for s in ranks for high, low in np.asarray(own[s.rank]).T]
  numbers = _numbers(run, members, i, ranks, known, own)
  values, lasts = external_selection.cut(numbers, wanted, exact=ranks[0].exact)
  cuts = {}
  for s, value, last in zip(
    ranks, *(x.reshape(len(ranks), -1) for x in (values, lasts)), strict=True
  ):
    tied = (last != external_selection.EVERY).any()
    cuts[s.name] = order_statistics.Cut(jnp.asarray(value), jnp.asarray(last) if tied else None)
  return cuts


def _sum(run: Run, members: Sequence[str], i: int, statistic: Sum, known: Any, own: Any) -> Any:
  """Adds up the results of fixed slices, one after the other, floats in double precision."""
  total = dtypes = None
  static = {"before": run.method[:i], "step": run.method[i], "statistic": statistic.name}
  combine = np.add if statistic.combine is jnp.add else jax.jit(statistic.combine)
  for name, _, parts, form in slices.slices(run, members, BLOCK):
    seen = _ranked(run, parts, slices.known_of(run, name, known, parts), run.method[:i], form)
    each = run.call(slice_programs.partial_sum, parts, seen, own, form=form, **static)
    dtypes = jax.tree.map(lambda x: x.dtype, each)
    each = jax.device_get(each)  # Before the next slice is read to where this one lies.
    each = jax.tree.map(_wide, each) if combine is np.add else each
    total = each if total is None else jax.tree.map(combine, total, each)
    run.measured(name, parts.models.shape[1])
  return statistic.finish(jax.tree.map(jnp.asarray, total, dtypes), own)


def _wide(x: np.ndarray) -> np.ndarray:
  return x.astype(np.float64) if np.issubdtype(x.dtype, np.floating) else x


def _numbers(
  run: Run, members: Sequence[str], i: int, ranks: Sequence[Rank], known: Any, own: Any
) -> external_selection.Numbers:
  """The values that some statistics rank, one row per statistic and model."""
  static = {"before": run.method[:i], "step": run.method[i], "rank": ranks[0].name, "own": own}
  # Entries are ranked: what the stage itself needs whole, its update does.
  run = run._replace(method=run.method[:i])
  size = sum(math.prod(run.shapes[n]) for n in members)
  ranges = [(n, *ends) for n in members for ends in slices.ranges(run, n, run.entries)]

  def read(
    name: str, start: int, stop: int, *, ahead: bool = False
  ) -> tuple[Slice, dict[str, Any]]:
    parts = slices.read(run, name, start, stop, ahead=ahead)
    form = slices.form_of(run, name)
    seen = _ranked(run, parts, slices.known_of(run, name, known, parts), run.method, form)
    return parts, {"known": seen, "form": form, **static}

  def picked(name: str, start: int, parts: Slice, told: Any, columns: np.ndarray) -> np.ndarray:
    found = []
    room = PICKED[len(columns) > PICKED[0]]
    for at in range(0, len(columns), room):
      own = np.zeros(room, np.int64)
      count = min(room, len(columns) - at)
      own[:count] = columns[at : at + count]
      few = slices.picked(run, parts, own)
      found.append(np.asarray(run.call(slice_programs.patterns, few, **told))[:, :count])
    return np.concatenate(found, axis=1)

  def sample() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    found, weights, lengths = [], [], list[int]()
    for name in (n for n in members if math.prod(run.shapes[n])):
      own = []
      for start, stop in slices.pieces(run, name, size):
        parts, told = read(name, start, stop, ahead=True)
        count = stop - start
        if told["form"].shape is None:
          own.append(picked(name, start, parts, told, np.arange(count)))
          lengths.append(count)
        else:
          own.append(np.asarray(run.call(slice_programs.patterns, parts, **told)))
          lengths += [slices.unit(run, name)] * (count // slices.unit(run, name))
      found += own
      seen = sum(x.shape[1] for x in own)
      weights += [np.full(x.shape[1], math.prod(run.shapes[name]) / seen) for x in own]
    starts = np.cumsum([0, *lengths[:-1]])
    return np.concatenate(found, axis=1), np.concatenate(weights), starts

  def scan(low: np.ndarray, high: np.ndarray) -> Iterator[external_selection.Slice]:
    bracket = tuple(side.reshape(len(ranks), -1, 1) for side in (low, high))
    for name, start, stop in ranges:
      parts, told = read(name, start, stop)
      position = int(parts.offsets[i]) + start
      if told["form"].shape is None:
        sides = run.call(slice_programs.sides, parts, bracket=bracket, **told)
        pick = functools.partial(picked, name, start, parts, told)
      else:  # Stages need whole rows: none is gone through for a few of its entries.
        bits = run.call(slice_programs.patterns, parts, **told)
        sides = run.call(slice_programs.beside, bits, bracket)
        pick = functools.partial(np.take, np.asarray(bits), axis=1)
      yield external_selection.Slice(position, np.asarray(sides), pick)
      run.measured(name, stop - start)

  @functools.lru_cache(2)  # Models often want the same slices.
  def whole(which: int) -> tuple[int, np.ndarray]:
    parts, told = read(*ranges[which])
    return int(parts.offsets[i]) + ranges[which][1], np.asarray(
      run.call(slice_programs.patterns, parts, **told)
    )

  kind = np.dtype(np.uint64 if members[0] in run.wide else np.uint32)
  return external_selection.Numbers(size, sample, scan, whole, kind)


def _ranked(
  run: Run, parts: Slice, known: tuple[Any, ...], method: Method, form: Form
) -> tuple[Any, ...]:
  """Adds ranks in rows to what stages know, where the host sorts faster than the device."""
  for i, (step, acting) in enumerate(zip(method, form.acts, strict=False)):
    if step.ranked and acting and jax.default_backend() == "cpu":
      bits = np.asarray(
        run.call(slice_programs.magnitudes, parts, known, before=method[:i], form=form)
      )
      known = (*known[:i], {**known[i], "ranks": external_selection.ranks(bits)}, *known[i + 1 :])
  return known
