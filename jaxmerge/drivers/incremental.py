"""Merges of models that arrive one at a time: init, update, finalize; constant memory.

The checkpoints of a run, or experts that arrive over weeks: the state between two of them is an
accumulator as large as one model. `of` takes any method with a fold; `continual.opcm` is the method
that has none. States are trees of arrays: they go through `jit` and `lax.scan`, and to disk.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple  # Any: states and parameters are trees.

import jax
import jax.numpy as jnp

from jaxmerge.core import (
  double_precision,
  interpreter,
  layouts,
  stage,
  tree,
)
from jaxmerge.core import statistics as statistics_
from jaxmerge.core.stage import Method, State
from jaxmerge.core.tree import Tree
from jaxmerge.drivers import accumulator, arguments, finiteness
from jaxmerge.methods import averages


class Running(NamedTuple):
  """A merge of models that arrive one at a time.

  Attributes:
    init: (params, statistics) -> state, before the first; only shapes and dtypes are looked at.
    update: (state, params, name, statistics) -> state, with one more model. Methods with random
      masks need the name, as the masks depend on it; methods that read statistics need those of
      this model, by name: trees like it, without an axis for models. Under a `jit` or `scan` of
      yours JAX has made arguments of 64 bits narrow before they are seen here: trace within
      `jax.enable_x64(True)`, or leave such leaves out. It is an error where the base has them.
    finalize: (state) -> params, the merge of the models so far; ValueError if there are none. The
      state may go on.
  """

  init: Callable[[Tree], State]
  update: Callable[..., State]
  finalize: Callable[[State], Tree]


def of(
  method: Method | Any,
  base: Tree | None = None,
  *,
  hparams: Mapping[str, Any] | None = None,
  seed: int | None = None,
  layout: layouts.Layout | None = (),
) -> Running:
  """Runs a method over models that arrive one at a time, as `merge` does over all at once.

  Supports methods with a fold and no reductions: means, sums, random drops before a sum, the
  largest entry. Leaves that are not floating point are the base's, or the first model's.

  Args:
    method: a method with a fold: `average`, `checkpoint_average`, `task_arithmetic`, `dare`, ...
    base: base of the task vectors, to which the merged one is added; None: weights are merged.
    hparams: hyperparameters in place of the method's defaults; one value for all models.
    seed: for methods with random masks.
    layout: matrix views.

  Raises:
    ValueError: if the method has no fold; in `update`, for a tree that does not match, NaN or
      infinity (where values can be looked at), and weights that are one per model.

  Example:
    >>> run = of(jaxmerge.methods.checkpoint_average("ema", alpha=0.5))
    >>> state = run.init({"w": jnp.zeros(1)})
    >>> for value in (4.0, 8.0, 0.0):
    ...   state = run.update(state, {"w": jnp.array([value])})
    >>> run.finalize(state)["w"].tolist()
    [3.0]
  """
  method = arguments.method(method)
  if not stage.foldable(method):
    raise ValueError(
      "the method needs all models at once: it measures them, or its combiner has no fold; "
      "merge a stack, or the newest few, jaxmerge.online(method, window=8); or use `average`, "
      "`checkpoint_average`, `task_arithmetic`, `dare`, `magmax` or `continual.opcm`."
    )
  if base is None:
    instead = "incremental.of(method, base)"
    arguments.refuse_weights(method, instead, "a base of zeros subtracts nothing")
  seeded = "seed" in stage.hparams(method)
  method = averages.with_moments(method, None if base is None else floating(base))
  setup = _Setup(method, base, arguments.hparams(hparams, seed), layouts.check(layout), seeded)
  steps = (functools.partial(f, setup) for f in (_init, _update, _finalize))
  return Running(*(double_precision.aware(step, base) for step in steps))


class _Setup(NamedTuple):
  """The constants of an incremental merge, shared by all models."""

  method: Method
  base: Tree | None
  hparams: Mapping[str, Any]
  layout: layouts.Layout
  seeded: bool

  @property
  def bases(self) -> dict[str, Any] | None:
    """The leaves of the base that are merged."""
    return None if self.base is None else floating(self.base)


def _prepare(setup: _Setup, params: Tree, name: str | None) -> interpreter.Ready:
  leaves = tree.named(params)
  shapes = {n: x.shape for n, x in leaves.items() if tree.is_floating(x)}
  names, copied = None if name is None else [name], leaves.keys() - shapes.keys()
  return interpreter.prepare(setup.method, shapes, 1, setup.hparams, names, copied)


def _statistics(setup: _Setup, params: Tree, statistics: Mapping[str, Any] | None) -> Any:
  """Returns one model's statistics by name and leaf, as for a stack of one: [1, ...]."""
  leaves = tree.named(params)
  shapes = {n: x.shape for n, x in leaves.items() if tree.is_floating(x)}
  table = layouts.resolve(setup.method, shapes, setup.layout, names=leaves)
  each = {
    name: {n: jnp.asarray(x)[None] for n, x in of.items()}
    for name, of in statistics_.by_leaf(statistics).items()
  }
  copied = leaves.keys() - shapes.keys()
  return statistics_.resolve(setup.method, each, shapes, 1, table, copied)


def _init(setup: _Setup, params: Tree, statistics: Mapping[str, Any] | None = None) -> State:
  check_model(setup.base, params)
  ready = _prepare(setup, params, None)
  take, _ = accumulator.accumulator(setup.method, setup.layout)

  def first(params: Tree, statistics: Any) -> State:
    each = _statistics(setup, params, statistics)
    return take(None, _one(params), setup.bases, ready, each)

  shapes = jax.eval_shape(first, floating(params), statistics)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  return {"count": jnp.zeros((), jnp.int32), "held": zeros, "like": _like(params)}


def _update(
  setup: _Setup,
  state: State,
  params: Tree,
  name: str | None = None,
  statistics: Mapping[str, Any] | None = None,
) -> State:
  check_model(setup.base, params)
  if others := tree.named(params).keys() ^ tree.named(state["like"]).keys():
    where = "init" if min(others) in tree.named(state["like"]) else "update"
    raise ValueError(f"leaf {min(others)!r} is only in the tree passed to {where}.")
  if setup.seeded and name is None:
    raise ValueError("the method's random masks depend on the model's name: give update a name.")
  leaves = [tree.named(t) for t in (params, setup.base) if t is not None]
  double_precision.refuse_narrowed(leaves, state, params)
  ready, each = _prepare(setup, params, name), _statistics(setup, params, statistics)
  static = {"method": stage.without_hparams(setup.method), "layout": setup.layout}
  more = (floating(params), setup.bases, ready, each)
  try:
    accumulated = _add_model(state["count"], state["held"], *more, **static)
  except TypeError:
    _refuse_unlike(state["held"], params)
    raise
  like = jax.tree.map(functools.partial(_first, state["count"]), state["like"], params)
  refuse_nonfinite(params, name or "passed to update")
  _refuse_nonfinite_statistics(each)
  return {"count": state["count"] + 1, "held": accumulated, "like": like}


@functools.partial(jax.jit, static_argnames=("method", "layout"))
def _add_model(
  count: Any,
  accumulated: Any,
  params: Tree,
  base: Any,
  ready: interpreter.Ready,
  statistics: Any,
  *,
  method: Method,
  layout: layouts.Layout,
) -> State:
  take, _ = accumulator.accumulator(method, layout)

  def first(accumulated: State) -> State:
    return take(None, _one(params), base, ready, statistics)

  def more(accumulated: State) -> State:
    return take(accumulated, _one(params), base, ready, statistics)

  return jax.lax.cond(count == 0, first, more, accumulated)


def _finalize(setup: _Setup, state: State) -> Tree:
  refuse_empty(state)
  like = state["like"] if setup.base is None else setup.base
  ready = _prepare(setup, like, "finished" if setup.seeded else None)
  double_precision.refuse_narrowed([tree.named(like)], state)
  _, finish = accumulator.accumulator(setup.method, setup.layout)
  out = finiteness.check_result(finish(state["held"], setup.bases, floating(like), ready))
  copied = {n: double_precision.copy_leaf(x) for n, x in tree.named(like).items()}
  return tree.rebuild(like, copied | out)


def floating(params: Tree) -> dict[str, Any]:
  """Returns the floating-point leaves, which are merged; programs do not see the others."""
  return {n: x for n, x in tree.named(params).items() if tree.is_floating(x)}


def _one(params: Tree) -> Tree:
  return jax.tree.map(lambda x: jnp.asarray(x)[None], params)


def _like(params: Tree) -> Tree:
  """Returns the leaves that a merge without a base copies, and the dtypes of the others."""

  def one(x: Any) -> Any:
    return double_precision.zeros((0,) if tree.is_floating(x) else x.shape, x.dtype)

  return jax.tree.map(one, params)


def _first(count: Any, first: Any, x: Any) -> Any:
  if tree.is_floating(x) or not isinstance(count, jax.core.Tracer):
    return first if tree.is_floating(x) or count else double_precision.copy_leaf(x)
  return jnp.where(count == 0, x, first)


def check_model(base: Tree | None, params: Tree) -> None:
  """Raises ValueError, naming the leaf, for a model that does not match the base."""
  if base is not None:
    tree.check_same(base, params, left="the base", right="the model", dtype=False)
  arguments.refuse(params, "the model")


def _refuse_unlike(accumulated: Mapping[str, Any], params: Tree) -> None:
  for name, x in floating(params).items():
    shape = max((array.shape for array in jax.tree.leaves(accumulated[name])), key=math.prod)
    if shape[len(shape) - x.ndim :] != x.shape:
      raise ValueError(f"leaf {name!r} is {x.shape}, but not in the tree passed to init.")


def refuse_empty(state: State) -> None:
  """Raises ValueError for the state of no model."""
  if not isinstance(state["count"], jax.core.Tracer) and int(state["count"]) == 0:
    raise ValueError("update has seen no model: there is nothing to finalize.")


def _refuse_nonfinite_statistics(statistics: Mapping[str, Mapping[str, Any]]) -> None:
  if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(statistics)):
    return
  for leaf in sorted({n for leaves in statistics.values() for n in leaves}):
    finiteness.refuse_statistics(leaf, statistics_.of_leaf(statistics, leaf))


def refuse_nonfinite(params: Tree, name: str) -> None:
  """Raises ValueError, naming the leaf, for NaN or infinity in concrete arrays."""
  flags = {}
  for n, x in tree.named(params).items():
    if isinstance(x, jax.core.Tracer):
      return
    if tree.is_floating(x):
      flags[n] = finiteness.Flags(True, True, finiteness.is_finite(jnp.asarray(x))[None])
  finiteness.refuse(jax.device_get(flags), [name])
