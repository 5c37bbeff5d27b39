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

from jaxmerge import memory, ranking, slicing, statistics, tree, unrolling, views
from jaxmerge.slicing import Form, Parts, Run, Source
from jaxmerge.stage import Array, Leaf, Method, Rank, Stage, Statistic, Sum
from jaxmerge.tree import Tree

BLOCK = 2**19  # Sums of floats are made of slices of so many entries, however others are cut.
PICKED = 2**14  # So many entries are picked from a slice at a time.


def stream(
  method: Method,
  source: Source,
  write: Callable[[str, int, np.ndarray], None],
  *,
  aux: Mapping[str, Any] | None = None,
  seed: int | None = None,
  names: Sequence[str] | None = None,
  ready: memory.Ready | None = None,
  layout: Sequence[tuple[str, str]] = (),
  entries: int = 2**20,
  done: Collection[str] = (),
  nonfinite: bool = False,
  measured: Callable[[str, int], None] = lambda name, count: None,
) -> None:
  """Merges slice by slice: for each, write(name, start, merged entries [n]) is called.

  Every statistic reads the source once more. Arguments and errors as for `jaxmerge.merge`; NaN or
  infinity is found, and named, when its slice is first read, before anything of it is written.

  Args:
    method: the method; stages that need whole rows get whole rows.
    source: where base, reference and models come from.
    write: takes entries of the result, in the leaf's dtype.
    aux: numbers by name, scalar or one per model.
    seed: for methods with random masks.
    names: names of the models.
    ready: numbers and tags that were prepared before, in place of `aux` and `seed`.
    layout: matrix views.
    entries: about so many entries of each model are in a slice.
    done: names of leaves whose result is there already: they are measured, not written.
    nonfinite: whether NaN and infinity are let pass.
    measured: called with a leaf's name and a number of its entries that a statistic has seen.
  """
  shapes = {n: s.shape for n, s in sorted(source.leaves.items()) if tree.is_floating(s)}
  if ready is None:
    aux = dict(aux or {}, **({} if seed is None else {"seed": seed}))
    copied = source.leaves.keys() - shapes.keys()
    ready = memory.prepare(method, shapes, source.height, aux, names, copied)
  offsets = tuple(memory.offsets(step, shapes) for step in method)
  layout = views.check(layout)
  run = Run(method, source, shapes, ready, names, layout, entries, offsets, {}, nonfinite, measured)
  for leaves in _together(run):
    left = [name for name in leaves if name not in done]
    known = _knowledge(run, leaves) if left else ()
    for name, start, parts, form in slicing.slices(run, left, entries):
      dtype = source.leaves[name].dtype
      seen = slicing.known_of(run, name, known)
      seen = _ranked(parts, seen, method, form)
      out = np.asarray(_merged(parts, seen, method=method, form=form, dtype=dtype))
      memory.refuse_height(name, out.shape[0])
      write(name, start, out[0])
  for name in sorted(source.leaves.keys() - shapes.keys() - set(done)):
    size = math.prod(source.leaves[name].shape)
    for start in range(0, max(size, 1), entries):
      stop = min(start + entries, size)
      write(name, start, source.read(name, start, stop, slice(None))[0])


def merge_slices(
  method: Method, base: Tree, models: Tree, *, reference: Tree | None = None, **options: Any
) -> Tree:
  """Merges models that lie in host memory, with one slice on the device at a time.

  Takes and returns what `jaxmerge.merge` does, as NumPy arrays; `options` are those of `stream`.
  """
  reference = base if reference is None else reference
  memory.check_models(base, models, reference)
  trees = (tree.named(t) for t in (base, reference, models))
  bases, references, stacks = ({n: np.asarray(v) for n, v in t.items()} for t in trees)
  out = {n: np.empty(v.shape, v.dtype) for n, v in bases.items()}
  height = tree.height(models)

  def read(name: str, start: int, stop: int, order: Any) -> tuple[Any, Any, Any]:
    own, zero = (t[name].reshape(-1)[start:stop] for t in (bases, references))
    return own, zero, stacks[name].reshape(height, -1)[order, start:stop]

  def write(name: str, start: int, part: np.ndarray) -> None:
    out[name].reshape(-1)[start : start + part.shape[0]] = part

  leaves = {n: jax.ShapeDtypeStruct(v.shape, v.dtype) for n, v in bases.items()}
  stream(method, Source(leaves, height, read), write, **options)
  return tree.rebuild(base, out)


def _together(run: Run) -> list[list[str]]:
  """Groups the leaves that must be measured before any of them is merged; others go one by one."""
  apart = all(step.scope == "leaf" or not step.statistics for step in run.method)
  return [[name] for name in run.shapes] if apart else [list(run.shapes)]


def _knowledge(run: Run, leaves: Sequence[str]) -> tuple[Any, ...]:
  """Measures what the stages know, by group."""
  known: tuple[Any, ...] = ()
  for i, step in enumerate(run.method):
    own = {}
    for group, members in memory.members(step, dict.fromkeys(leaves)).items():
      own[group] = dict(run.ready.known[i][group])
      for batch in _batches(step):
        own[group].update(_measured(run, members, i, batch, known, own[group]))
    known = (*known, own)
  return known


def _batches(step: Stage) -> Iterator[list[Statistic]]:
  """Groups statistics that one reading serves: neighbouring ranks among the same values."""

  def kind(indexed: tuple[int, Statistic]) -> Any:
    j, statistic = indexed
    return (statistic.of, statistic.exact) if isinstance(statistic, Rank) else j

  for _, batch in itertools.groupby(enumerate(step.statistics), kind):
    yield [statistic for _, statistic in batch]


def _measured(
  run: Run, members: Sequence[str], i: int, batch: list[Statistic], known: Any, own: Any
) -> dict[str, Any]:
  ranks = [s for s in batch if isinstance(s, Rank)]
  if not ranks:
    return {s.name: _sum(run, members, i, s, known, own) for s in batch if isinstance(s, Sum)}
  wanted = [(int(high) << 16) + int(low) for s in ranks for high, low in np.asarray(own[s.rank]).T]
  numbers = _numbers(run, members, i, ranks, known, own)
  values, lasts = ranking.cut(numbers, wanted, exact=ranks[0].exact)
  cuts = {}
  for s, value, last in zip(
    ranks, *(x.reshape(len(ranks), -1) for x in (values, lasts)), strict=True
  ):
    tied = (last != ranking.EVERY).any()
    cuts[s.name] = statistics.Cut(jnp.asarray(value), jnp.asarray(last) if tied else None)
  return cuts


def _sum(run: Run, members: Sequence[str], i: int, statistic: Sum, known: Any, own: Any) -> Any:
  """Adds up the results of fixed slices, one after the other, floats in double precision."""
  total = dtypes = None
  static = {"before": run.method[:i], "step": run.method[i], "statistic": statistic}
  combine = np.add if statistic.combine is jnp.add else jax.jit(statistic.combine)
  for name, _, parts, form in slicing.slices(run, members, BLOCK):
    seen = _ranked(parts, slicing.known_of(run, name, known), run.method[:i], form)
    each = _partial(parts, seen, own, form=form, **static)
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
) -> ranking.Numbers:
  """The values that some statistics rank, one row per statistic and model."""
  static = {"before": run.method[:i], "step": run.method[i], "rank": ranks[0], "own": own}
  size = sum(math.prod(run.shapes[n]) for n in members)
  ranges = [(n, *ends) for n in members for ends in slicing.ranges(run, n, run.entries)]

  def read(name: str, start: int, stop: int) -> tuple[Parts, dict[str, Any]]:
    parts, form = slicing.read(run, name, start, stop), slicing.form_of(run, name)
    seen = _ranked(parts, slicing.known_of(run, name, known), run.method[:i], form)
    return parts, {"known": seen, "form": form, **static}

  def picked(name: str, start: int, parts: Parts, told: Any, columns: np.ndarray) -> np.ndarray:
    if told["form"].shape is not None:  # Stages need whole rows.
      return np.asarray(_bits(parts, **told))[:, columns]
    found = []
    for at in range(0, len(columns), PICKED):
      own = np.zeros(PICKED, np.int64)
      count = min(PICKED, len(columns) - at)
      own[:count] = columns[at : at + count]
      few = slicing.picked(run, name, start, parts, own)
      found.append(np.asarray(_bits(few, **told))[:, :count])
    return np.concatenate(found, axis=1)

  def sample() -> tuple[np.ndarray, np.ndarray]:
    found, weights = [], []
    for name in (n for n in members if math.prod(run.shapes[n])):
      own = []
      for start, stop in slicing.pieces(run, name, size):
        own.append(picked(name, start, *read(name, start, stop), np.arange(stop - start)))
      found += own
      seen = sum(x.shape[1] for x in own)
      weights += [np.full(x.shape[1], math.prod(run.shapes[name]) / seen) for x in own]
    return np.concatenate(found, axis=1), np.concatenate(weights)

  def scan(low: np.ndarray, high: np.ndarray) -> Iterator[ranking.Slice]:
    bracket = tuple(side.reshape(len(ranks), -1, 1) for side in (low, high))
    single = bool((low == high).any())
    for name, start, stop in ranges:
      parts, told = read(name, start, stop)
      above, within, near = jax.device_get(_sides(parts, bracket=bracket, single=single, **told))
      position = int(parts.offsets[i]) + start
      pick = functools.partial(picked, name, start, parts, told)
      yield ranking.Slice(position, above, within, near, pick)
      run.measured(name, stop - start)

  def whole(which: int) -> tuple[int, np.ndarray]:
    parts, told = read(*ranges[which])
    return int(parts.offsets[i]) + ranges[which][1], np.asarray(_bits(parts, **told))

  return ranking.Numbers(size, sample, scan, whole)


def _ranked(parts: Parts, known: tuple[Any, ...], method: Method, form: Form) -> tuple[Any, ...]:
  """Adds ranks in rows to what stages know, where the host sorts faster than the device."""
  for i, (step, acting) in enumerate(zip(method, form.acts, strict=False)):
    if step.ranked and acting and jax.default_backend() == "cpu":
      bits = np.asarray(_magnitudes(parts, known, before=method[:i], form=form))
      known = (*known[:i], {**known[i], "ranks": ranking.ranks(bits)}, *known[i + 1 :])
  return known


# --- Programs ---


def _narrowed(parts: Parts, form: Form) -> Parts:
  """Rounds what a slice is made of, where it is merged in a narrow dtype."""
  narrow = form.precision
  if narrow is None:
    return parts

  def to(x: Any) -> Any:
    return None if x is None else unrolling.rounded(jnp.asarray(x, jnp.float32), narrow.dtype)

  aux = {n: to(v) if n in narrow.numbers else v for n, v in parts.leaf.aux.items()}
  return parts._replace(
    base=to(parts.base),
    reference=to(parts.reference),
    models=to(parts.models),
    leaf=parts.leaf._replace(aux=aux),
  )


def _through(
  parts: Parts, known: Any, method: Method, form: Form
) -> tuple[Array, Leaf, list[Array]]:
  """Takes the task vectors of a slice through stages.

  Returns:
    The stack, the leaf as the next stage sees it, and what `join` holds.
  """
  x = memory.task_vectors(parts.models, parts.reference)
  if form.precision is not None:
    x = unrolling.rounded(x, form.precision.dtype)
  base = parts.reference
  if form.shape == ():
    x, base = x.reshape(x.shape[:1]), None if base is None else base.reshape(())
  leaf, kept = parts.leaf._replace(base=base), list[Array]()
  for step, acting, own, offset in zip(method, form.acts, known, parts.offsets, strict=False):
    if not acting:
      continue
    leaf = leaf._replace(offset=offset)
    if step.unit != "entry" and form.shape:
      own_base = None if base is None else base.reshape(form.shape)
      y = x.reshape(x.shape[0], *form.shape)
      y = memory.update(step, y, leaf._replace(base=own_base), own, kept, form.view)
      x = y.reshape(y.shape[0], math.prod(y.shape[1:]))
    else:
      x = memory.update(step, x, leaf, own, kept, form.view)
  at = min(len(method), len(parts.offsets) - 1)
  return x, leaf._replace(offset=parts.offsets[at]), kept


@functools.partial(jax.jit, static_argnames=("before", "step", "statistic", "form"))
def _partial(
  parts: Parts,
  known: Any,
  own: Any,
  *,
  before: Method,
  step: Stage,
  statistic: Sum,
  form: Form,
) -> Any:
  """What a slice adds to a sum."""

  def run(parts: Parts, known: Any, own: Any) -> Any:
    x, leaf, kept = _through(parts, known, before, form)
    return statistic.measure(memory.seen(step, x, kept), leaf, own)

  return unrolling.unrolled(run, each=form.each)(_narrowed(parts, form), known, own)


_RANKED = ("before", "step", "rank", "form")


@functools.partial(jax.jit, static_argnames=_RANKED)
def _bits(
  parts: Parts, known: Any, own: Any, *, before: Method, step: Stage, rank: Rank, form: Form
) -> Array:
  """The patterns of a slice's values, [K, n]."""

  def run(parts: Parts, known: Any, own: Any) -> Array:
    x, leaf, kept = _through(parts, known, before, form)
    return statistics.pattern(rank.of(memory.seen(step, x, kept), leaf, own))

  bits = unrolling.unrolled(run, each=form.each)(_narrowed(parts, form), known, own)
  return bits.reshape(bits.shape[0], parts.models.shape[1])


@functools.partial(jax.jit, static_argnames=(*_RANKED, "single"))
def _sides(
  parts: Parts,
  known: Any,
  own: Any,
  bracket: Any,
  *,
  before: Method,
  step: Stage,
  rank: Rank,
  form: Form,
  single: bool,
) -> tuple[Array, Array | None, Array]:
  """On which side of brackets a slice's values are: what `ranking.Slice` holds."""
  bits = _bits(parts, known, own, before=before, step=step, rank=rank, form=form)
  low, high = bracket
  above, within = bits[None] > high, bits[None] >= low

  def rows(side: Array) -> Array:
    return side.reshape(low.shape[0] * bits.shape[0], bits.shape[1])

  near = unrolling.unrolled(functools.partial(jnp.any, axis=0))(
    rows(within & ~above & (low < high))
  )
  return rows(above), rows(within) if single else None, near


@functools.partial(jax.jit, static_argnames=("before", "form"))
def _magnitudes(parts: Parts, known: Any, *, before: Method, form: Form) -> Array:
  """The patterns of a slice's magnitudes, in rows: [K, rows, columns]."""

  def run(parts: Parts, known: Any) -> Array:
    x, _, _ = _through(parts, known, before, form)
    y = x.reshape(x.shape[0], *form.shape) if form.shape else x
    return statistics.pattern(jnp.abs(views.rows(y, views.or_row(y, form.view))))

  return unrolling.unrolled(run, each=form.each)(_narrowed(parts, form), known)


@functools.partial(jax.jit, static_argnames=("method", "form", "dtype"))
def _merged(parts: Parts, known: Any, *, method: Method, form: Form, dtype: Any) -> Array:
  """A slice of the result, [1, n]."""
  narrow = form.precision

  def run(parts: Parts, known: Any) -> Array:
    x, _, _ = _through(parts, known, method, form)
    kept = dtype if narrow is None else jnp.float32
    return memory.stored(x.reshape(x.shape[0], parts.models.shape[1]), parts.base, kept)

  out = unrolling.unrolled(run, each=form.each)(_narrowed(parts, form), known)
  if narrow is None:
    return out
  return (out if narrow.wide else unrolling.rounded(out, narrow.dtype)).astype(dtype)
