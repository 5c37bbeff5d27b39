"""Reductions over leaves: sums, maxima and inner products, accumulated by drivers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxmerge.core import magnitudes, order_statistics, sharding
from jaxmerge.core.stage import Leaf, Rank, Reduction, Sum

Array = jax.Array


def total(name: str, f: Callable[[Any, Leaf], Any]) -> Sum:
  """Returns a reduction that sums f(x, leaf) over the leaves of a group."""
  return Sum(name, lambda x, leaf, known: f(x, leaf))


def greatest(name: str, f: Callable[[Any, Leaf], Any]) -> Sum:
  """Returns a reduction that takes the maximum of f(x, leaf) over the leaves of a group."""
  return Sum(name, lambda x, leaf, known: f(x, leaf), combine=jnp.maximum)


class Gram(NamedTuple):
  """Inner products of the models [K, K], divided by the square of a unit to stay in range."""

  products: Array
  unit: Array


def gram(name: str) -> Sum:
  """Returns a reduction to the inner products of the models over a group: [K, *s] -> `Gram`."""
  return squares(name, inner_products, lambda total, unit, known: Gram(total, unit))


def squares(
  name: str,
  f: Callable[..., Any],
  finish: Callable[[Any, Array, Any], Any] = lambda total, unit, known: total,
  *,
  degree: int = 2,
) -> Sum:
  """Returns a sum of powers of x, such as squares, without overflow; see `magnitudes`.

  Args:
    name: the key of the result in `stats`.
    f: (x, or each of a pair) -> a tree of sums.
    finish: (sums over a power of the unit, unit, stats) -> result.
    degree: degree of f in x; 2 for squares.
  """

  def measure(x: Any, leaf: Leaf, known: Any) -> Any:
    return magnitudes.bin_sums(f, *(x if isinstance(x, tuple) else (x,)))

  def joined(found: Any, known: Any) -> Any:  # Names of a stage's arguments are part of digests.
    return finish(*magnitudes.join_bins(found, degree), known)

  return Sum(name, measure, finish=joined)


def inner_products(x: Array) -> Array:
  """Returns the inner products of the models: [K, *s] -> [K, K]."""
  axes = list(range(1, x.ndim))
  place = sharding.replicated_like(x, 2)
  return lax.dot_general(x, x, ((axes, axes), ((), ())), precision="highest", out_sharding=place)


def reduce_group(
  reduction: Reduction, parts: Sequence[tuple[Any, Leaf]], stats: dict[str, Any]
) -> Any:
  """Returns the result of a reduction over a group whose leaves are all in memory."""
  if isinstance(reduction, Sum):
    measured = _over(parts, lambda x, leaf: _measure(reduction, x, leaf, stats), reduction.combine)
    return reduction.finish(measured, stats)
  return _cut(reduction, parts, stats)


# Separate programs: leaves of one shape are traced, rewritten and batched once.
@functools.partial(jax.jit, static_argnums=0)
def _measure(reduction: Sum, x: Any, leaf: Leaf, stats: Any) -> Any:
  return reduction.measure(x, leaf, stats)


@functools.partial(jax.jit, static_argnums=0)
def _cut(rank: Rank, parts: Sequence[tuple[Any, Leaf]], stats: Any) -> order_statistics.Cut:
  return order_statistics.cut(rank, functools.partial(_over, parts), parts, stats)


def _over(
  parts: Sequence[tuple[Any, Leaf]],
  measure: Callable[[Any, Leaf], Any],
  combine: Callable[[Array, Array], Array],
) -> Any:
  each = [measure(x, leaf) for x, leaf in parts]
  total = functools.reduce(lambda a, b: jax.tree.map(combine, a, b), each)
  # Under explicit axes, a total per model would stay sharded like the models.
  return jax.tree.map(sharding.replicate, total)
