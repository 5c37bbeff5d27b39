"""The programs that run on the device, a slice at a time; each function is one program.

A program is compiled for the stages, the form and the length of a slice; similar leaves share it.
"""

from __future__ import annotations

import functools
import math
from typing import Any  # Any: `stats` are trees of arrays.

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmerge.core import interpreter, matrix_views, order_statistics, rewrites
from jaxmerge.core.interpreter import Part, Slice
from jaxmerge.core.stage import Array, Method, Rank, Stage, Sum
from jaxmerge.drivers import external_selection, slices
from jaxmerge.drivers.slices import Form


def _round_inputs(piece: Slice, form: Form) -> Slice:
  """Rounds the inputs of a slice if it is merged in a narrow dtype."""
  narrow = form.precision
  if narrow is None:
    return piece

  def to(x: Any) -> Any:
    return None if x is None else rewrites.round_to(jnp.asarray(x, jnp.float32), narrow.dtype)

  hparams = {n: to(v) if n in narrow.numbers else v for n, v in piece.leaf.hparams.items()}
  return piece._replace(
    base=to(piece.base),
    reference=to(piece.reference),
    models=to(piece.models),
    leaf=piece.leaf._replace(hparams=hparams),
  )


def _through(piece: Slice, stats: Any, method: Method, form: Form) -> Part:
  """Runs the task vectors of a slice through stages, and returns the next stage's input."""
  part = interpreter.begin(piece, np.float64 if form.wide else np.float32)
  if form.precision is not None:
    part = part._replace(x=rewrites.round_to(part.x, form.precision.dtype))
  if form.shape == ():
    part = _with_axes(part, form)
  for step, acts, results, offset in zip(method, form.acts, stats, piece.offsets, strict=False):
    if not acts:
      continue
    part = part._replace(leaf=part.leaf._replace(offset=offset))
    if step.unit != "entry" and form.shape and step.keep is None:
      y = interpreter.apply(step, _with_axes(part, form), results, form.view).x
      part = part._replace(x=y.reshape(y.shape[0], math.prod(y.shape[1:])))
    else:
      part = interpreter.apply(step, part, results, form.view)
  at = min(len(method), len(piece.offsets) - 1)
  return part._replace(leaf=part.leaf._replace(offset=piece.offsets[at]))


def _with_axes(part: Part, form: Form) -> Part:
  """Gives a flat part the axes of its leaf."""

  def stack(x: Any) -> Any:
    return x.reshape(x.shape[0], *(form.shape or ()))

  base = part.leaf.base
  return part._replace(
    x=stack(part.x),
    leaf=part.leaf._replace(base=None if base is None else base.reshape(form.shape)),
    statistics={n: stack(v) if n in form.by_entry else v for n, v in part.statistics.items()},
  )


@functools.partial(jax.jit, static_argnames=("before", "step", "reduction", "form"))
def partial_sum(
  piece: Slice,
  stats: Any,
  results: Any,
  *,
  before: Method,
  step: Stage,
  reduction: str,
  form: Form,
) -> Any:
  """Returns a slice's part of a sum."""

  def run(piece: Slice, stats: Any, results: Any) -> Any:
    part = _through(piece, stats, before, form)
    measured: Sum = step.reduction(reduction)
    return measured.measure(*interpreter.observe(step, part), results)

  return rewrites.unroll(run, each=form.each, halves=True)(
    _round_inputs(piece, form), stats, results
  )


_RANKED = ("before", "step", "rank", "form")


@functools.partial(jax.jit, static_argnames=_RANKED)
def patterns(
  piece: Slice, stats: Any, results: Any, *, before: Method, step: Stage, rank: str, form: Form
) -> Array:
  """Returns the bit patterns of a slice's values, [K, n]."""

  def run(piece: Slice, stats: Any, results: Any) -> Array:
    part = _through(piece, stats, before, form)
    ranked: Rank = step.reduction(rank)
    return order_statistics.pattern(ranked.of(*interpreter.observe(step, part), results))

  bits = rewrites.unroll(run, each=form.each, halves=True)(
    _round_inputs(piece, form), stats, results
  )
  return bits.reshape(bits.shape[0], piece.models.shape[1])


@functools.partial(jax.jit, static_argnames=_RANKED)
def sides(
  piece: Slice,
  stats: Any,
  results: Any,
  bracket: tuple[Array, Array],
  *,
  before: Method,
  step: Stage,
  rank: str,
  form: Form,
) -> Array:
  """Returns the sides of brackets [R, K, 1] of a slice's values, see `external_selection.sides`."""
  return beside(
    patterns(piece, stats, results, before=before, step=step, rank=rank, form=form), bracket
  )


@jax.jit
def beside(bits: Array, bracket: tuple[Array, Array]) -> Array:
  """Returns the sides of brackets of a slice's patterns."""
  return external_selection.sides(bits, *bracket, jnp.where)


@functools.partial(jax.jit, static_argnames=("before", "form"))
def magnitudes(piece: Slice, stats: Any, *, before: Method, form: Form) -> Array:
  """Returns the bit patterns of a slice's magnitudes, in rows: [K, rows, columns]."""

  def run(piece: Slice, stats: Any) -> Array:
    x = _through(piece, stats, before, form).x
    y = x.reshape(x.shape[0], *form.shape) if form.shape else x
    return order_statistics.pattern(
      jnp.abs(matrix_views.rows(y, matrix_views.or_row(y, form.view)))
    )

  return rewrites.unroll(run, each=form.each, halves=True)(_round_inputs(piece, form), stats)


@functools.partial(jax.jit, static_argnames=("method", "form", "dtype"))
def merged(piece: Slice, stats: Any, *, method: Method, form: Form, dtype: Any) -> Array:
  """Returns a slice of the result, [1, n]; NaN where an input has NaN or infinity."""
  narrow = form.precision

  def run(piece: Slice, stats: Any) -> Array:
    x = _through(piece, stats, method, form).x
    width = dtype if narrow is None else jnp.float32
    return interpreter.store(x.reshape(x.shape[0], piece.models.shape[1]), piece.base, width)

  out = rewrites.unroll(run, each=form.each, halves=True)(_round_inputs(piece, form), stats)
  if narrow is not None:
    out = (out if narrow.wide else rewrites.round_to(out, narrow.dtype)).astype(dtype)
  if out.dtype.name not in slices.INFINITY:
    return jnp.where(_finite_entries(piece), out, jnp.nan)
  # As integers: to select among narrow floats, XLA for CPUs would widen them first.
  kind = slices.INTEGERS[out.dtype.itemsize][0]
  bits = lax.bitcast_convert_type(out, kind)
  nan = np.asarray(np.nan, out.dtype).view(kind)
  return lax.bitcast_convert_type(jnp.where(_finite_entries(piece), bits, nan), out.dtype)


def _finite_entries(piece: Slice) -> Array:
  """Returns where an entry is finite in all inputs, [1, n]; cheaper here than in another pass."""
  each = [x for x in (piece.base, piece.reference, piece.models) if x is not None]
  fine, exponents = list[Array](), dict[int, list[Array]]()
  for x in (jnp.asarray(x) for x in each):
    limit = slices.INFINITY.get(x.dtype.name)
    if limit is None:
      fine += list(jnp.atleast_2d(jnp.isfinite(x)))
      continue
    bits = lax.bitcast_convert_type(x, slices.INTEGERS[x.dtype.itemsize][0])
    bits = jnp.atleast_2d(bits & bits.dtype.type(limit))
    exponents.setdefault(limit, []).extend(bits)
  fine += [functools.reduce(jnp.maximum, bits) < limit for limit, bits in exponents.items()]
  return functools.reduce(jnp.logical_and, fine)[None]
