"""Reductions over weights that are read slice by slice: sums of fixed blocks, and exact ranks.

Every reduction is one pass over its leaves, in order; consecutive ranks of the same values share a
pass. A threshold also reads a sample of the slices, see `external_selection`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple  # Any: results of reductions are trees of arrays.

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.core import leaf_groups, order_statistics
from jaxmerge.core.interpreter import Slice
from jaxmerge.core.stage import Method, Rank, Reduction, Stage, Sum
from jaxmerge.drivers import external_selection, row_ranks, slice_programs, slices
from jaxmerge.drivers.slices import Form, Run

BLOCK = 2**20  # Entries of a slice in sums of floats, whatever the size of other slices.
PICKED = 2**12, 2**15  # Entries picked from a slice at a time: few, or many.

Stats = tuple[Any, ...]  # For each stage, by group, the results of its reductions.


def deferred_stage(method: Method) -> int | None:
  """Returns the stage whose reductions may be deferred until a result needs them, or None."""
  last = max((i for i, step in enumerate(method) if step.reductions), default=None)
  return last if last is not None and method[last].deferred else None


def measure(run: Run, leaves: Sequence[str], before: Stats | None = None) -> Stats:
  """Returns the results of the reductions of all stages over some leaves.

  Args:
    run: the merge.
    leaves: names of the leaves.
    before: results without those of the deferred stage; None: no results yet.
  """
  stats: Stats = ()
  waits = deferred_stage(run.method) if before is None else None
  for i, step in enumerate(run.method):
    by_group = {}
    for group, members in leaf_groups.members(step, dict.fromkeys(leaves)).items():
      results = dict(run.ready.stats[i][group] if before is None else before[i][group])
      for batch in () if i == waits else batches(step):
        if batch[0].name not in results:
          results.update(_reduce(Pass(run, members, i, stats, dict(results)), batch))
      by_group[group] = results
    stats = (*stats, by_group)
  return stats


def batches(step: Stage) -> Iterator[list[Reduction]]:
  """Groups reductions that share a pass: consecutive ranks of the same values."""

  def kind(indexed: tuple[int, Reduction]) -> Any:
    j, reduction = indexed
    return (reduction.of, reduction.exact) if isinstance(reduction, Rank) else j

  for _, batch in itertools.groupby(enumerate(step.reductions), kind):
    yield [reduction for _, reduction in batch]


class Pass(NamedTuple):
  """One pass over some leaves, for reductions of one stage.

  Attributes:
    run: the merge.
    leaves: names of the leaves of a group.
    place: index of the stage.
    stats: results of the reductions of earlier stages, by group.
    results: results of this stage for this group so far.
  """

  run: Run
  leaves: Sequence[str]
  place: int
  stats: Stats
  results: dict[str, Any]

  @property
  def before(self) -> Method:
    """The stages before this one."""
    return self.run.method[: self.place]

  @property
  def static(self) -> dict[str, Any]:
    """The static arguments of the programs of this pass."""
    return {"before": self.before, "step": self.run.method[self.place]}


def _reduce(reading: Pass, batch: Sequence[Reduction]) -> dict[str, Any]:
  ranks = [r for r in batch if isinstance(r, Rank)]
  if not ranks:
    return {r.name: _sum(reading, r) for r in batch if isinstance(r, Sum)}
  counts = [np.asarray(reading.results[r.rank]).T for r in ranks]
  wanted = [(int(high) << 16) + int(low) for each in counts for high, low in each]
  values, lasts = external_selection.cut(_numbers(reading, ranks), wanted, exact=ranks[0].exact)
  cuts = {}
  for r, value, last in zip(
    ranks, *(x.reshape(len(ranks), -1) for x in (values, lasts)), strict=True
  ):
    tied = (last != order_statistics.EVERY).any()
    cuts[r.name] = order_statistics.Cut(jnp.asarray(value), jnp.asarray(last) if tied else None)
  return cuts


def _sum(reading: Pass, reduction: Sum) -> Any:
  """Adds up the results of fixed blocks in order, floats in double precision."""
  run, total, dtypes = reading.run, None, None
  combine = np.add if reduction.combine is jnp.add else jax.jit(reduction.combine)
  for name, _, piece, form in slices.slices(run, reading.leaves, BLOCK):
    stats = with_ranks(
      run, piece, slices.stats_of(run, name, reading.stats, piece), reading.before, form
    )
    each = run.call(
      slice_programs.partial_sum,
      piece,
      stats,
      reading.results,
      form=form,
      reduction=reduction.name,
      **reading.static,
    )
    dtypes = jax.tree.map(lambda x: x.dtype, each)
    each = jax.device_get(each)  # Before the next read overwrites this slice's buffer.
    each = jax.tree.map(_as_double, each) if combine is np.add else each
    total = each if total is None else jax.tree.map(combine, total, each)
    run.on_measured(name, piece.models.shape[1])
  return reduction.finish(jax.tree.map(jnp.asarray, total, dtypes), reading.results)


def _as_double(x: np.ndarray) -> np.ndarray:
  return x.astype(np.float64) if np.issubdtype(x.dtype, np.floating) else x


class _Selection(NamedTuple):
  """The reader of the values that some ranks are searched in.

  Attributes:
    reading: the pass.
    run: the merge with only the stages before this pass: ranking is elementwise, and only the
      stage's update needs its unit.
    ranks: the ranks that are searched together.
    size: number of values of each model.
    ranges: the slices: name, start, stop.
  """

  reading: Pass
  run: Run
  ranks: Sequence[Rank]
  size: int
  ranges: Sequence[tuple[str, int, int]]

  def read(
    self, name: str, start: int, stop: int, *, ahead: bool = False
  ) -> tuple[Slice, dict[str, Any]]:
    """Reads a slice; returns it with the arguments of its programs."""
    piece = slices.read(self.run, name, start, stop, ahead=ahead)
    form = slices.form_of(self.run, name)
    stats = slices.stats_of(self.run, name, self.reading.stats, piece)
    stats = with_ranks(self.run, piece, stats, self.run.method, form)
    arguments = {"stats": stats, "results": self.reading.results, "form": form}
    return piece, {**arguments, "rank": self.ranks[0].name, **self.reading.static}


def _numbers(reading: Pass, ranks: Sequence[Rank]) -> external_selection.Numbers:
  """Returns the values that some reductions rank, one row per reduction and model."""
  run = reading.run._replace(method=reading.before)
  size = sum(math.prod(run.shapes[n]) for n in reading.leaves)
  ranges = [(n, *ends) for n in reading.leaves for ends in slices.ranges(run, n, run.entries)]
  selection = _Selection(reading, run, ranks, size, ranges)
  kind = np.dtype(np.uint64 if reading.leaves[0] in run.wide else np.uint32)
  return external_selection.Numbers(
    size,
    functools.partial(_sample, selection),
    functools.partial(_scan, selection),
    functools.lru_cache(2)(functools.partial(_patterns, selection)),  # Often the same slices.
    kind,
  )


def _sample(selection: _Selection) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Samples some slices from all over the leaves, see `external_selection.Numbers`."""
  run, patterns, weights, lengths = selection.run, [], [], list[int]()
  for name in (n for n in selection.reading.leaves if math.prod(run.shapes[n])):
    of_leaf = []
    for start, stop in slices.pieces(run, name, selection.size):
      piece, arguments = selection.read(name, start, stop, ahead=True)
      count = stop - start
      if arguments["form"].shape is None:
        of_leaf.append(_pick(selection, piece, arguments, np.arange(count)))
        lengths.append(count)
      else:
        of_leaf.append(np.asarray(run.call(slice_programs.patterns, piece, **arguments)))
        lengths += [slices.unit(run, name)] * (count // slices.unit(run, name))
    patterns += of_leaf
    seen = sum(x.shape[1] for x in of_leaf)
    weights += [np.full(x.shape[1], math.prod(run.shapes[name]) / seen) for x in of_leaf]
  starts = np.cumsum([0, *lengths[:-1]])
  return np.concatenate(patterns, axis=1), np.concatenate(weights), starts


def _scan(
  selection: _Selection, low: np.ndarray, high: np.ndarray
) -> Iterator[external_selection.NumberSlice]:
  """Reads all slices, and yields on which sides of brackets their values are."""
  run = selection.run
  bracket = tuple(side.reshape(len(selection.ranks), -1, 1) for side in (low, high))
  for name, start, stop in selection.ranges:
    piece, arguments = selection.read(name, start, stop)
    position = int(piece.offsets[selection.reading.place]) + start
    if arguments["form"].shape is None:
      sides = run.call(slice_programs.sides, piece, bracket=bracket, **arguments)
      pick = functools.partial(_pick, selection, piece, arguments)
    else:  # Stages need whole rows, so a few entries cannot be computed alone.
      bits = run.call(slice_programs.patterns, piece, **arguments)
      sides = run.call(slice_programs.beside, bits, bracket)
      pick = functools.partial(np.take, np.asarray(bits), axis=1)
    yield external_selection.NumberSlice(position, np.asarray(sides), pick)
    run.on_measured(name, stop - start)


def _patterns(selection: _Selection, which: int) -> tuple[int, np.ndarray]:
  """Reads one slice whole: the position of its first entry, and its patterns."""
  name, start, stop = selection.ranges[which]
  piece, arguments = selection.read(name, start, stop)
  bits = np.asarray(selection.run.call(slice_programs.patterns, piece, **arguments))
  return int(piece.offsets[selection.reading.place]) + start, bits


def _pick(
  selection: _Selection, piece: Slice, arguments: Mapping[str, Any], columns: np.ndarray
) -> np.ndarray:
  """Returns the patterns of some entries of a flat slice, [K, columns]."""
  run, patterns = selection.run, []
  room = PICKED[len(columns) > PICKED[0]]
  for first in range(0, len(columns), room):
    some = np.zeros(room, np.int64)
    count = min(room, len(columns) - first)
    some[:count] = columns[first : first + count]
    few = slices.pick(run, piece, some)
    patterns.append(np.asarray(run.call(slice_programs.patterns, few, **arguments))[:, :count])
  return np.concatenate(patterns, axis=1)


def with_ranks(run: Run, piece: Slice, stats: Stats, method: Method, form: Form) -> Stats:
  """Adds ranks within rows to `stats`, if the host sorts faster than the device."""
  for i, (step, acts) in enumerate(zip(method, form.acts, strict=False)):
    if step.ranked and acts and jax.default_backend() == "cpu":
      bits = np.asarray(
        run.call(slice_programs.magnitudes, piece, stats, before=method[:i], form=form)
      )
      ranked = {**stats[i], "ranks": row_ranks.ranks(bits)}
      stats = (*stats[:i], ranked, *stats[i + 1 :])
  return stats
