"""The accumulator of a method with a fold: adding models to it, and finishing the merge."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any  # Any: accumulators and parameters are trees.

import jax

from jaxmerge.core import interpreter, layouts, stage, tree
from jaxmerge.core import statistics as statistics_
from jaxmerge.core.interpreter import Part, Ready, Slice
from jaxmerge.core.stage import Fold, Method, State
from jaxmerge.core.tree import Tree


def accumulator(
  method: Method, layout: layouts.Layout | layouts.Table
) -> tuple[Callable[..., State], Callable[..., Tree]]:
  """Returns two functions: `take` adds models to an accumulator, `finish` merges it.

  `take(state, models, base, ready, statistics)`: an accumulator by leaf or None, a stack [k, *s],
  the base or None, the hyperparameters of these models, and their statistics by name and leaf -> an
  accumulator. `finish(state, base, like, ready)` -> a model; leaves that are not floating point are
  those of `like`.

  Example:
    >>> import jax.numpy as jnp, jaxmerge
    >>> take, finish = accumulator(jaxmerge.methods.average(), ())
    >>> models = {"w": jnp.array([[1.0], [3.0]])}
    >>> ready = interpreter.prepare(jaxmerge.methods.average(), {"w": (1,)}, 2, {}, None)
    >>> like = {"w": jnp.zeros(1)}
    >>> finish(take(None, models, None, ready), None, like, ready)["w"].tolist()
    [2.0]
  """
  static = {"method": stage.without_hparams(method), "layout": layout}
  return functools.partial(_take, **static), functools.partial(_finish, **static)


@functools.partial(jax.jit, static_argnames=("method", "layout"))
def _take(
  state: State | None,
  models: Tree,
  base: Tree | None,
  ready: Ready,
  statistics: Mapping[str, Mapping[str, Any]] | None = None,
  *,
  method: Method,
  layout: layouts.Layout | layouts.Table,
) -> State:
  bases, stacks = None if base is None else tree.named(base), tree.named(models)
  table, out = _table(method, layout, stacks, stacks), {}
  for name, x in stacks.items():
    if not tree.is_floating(x):
      continue
    each = statistics_.of_leaf(statistics or {}, name)
    leaf = interpreter.leaf_of(name, ready)
    part = interpreter.begin(Slice(None if bases is None else bases[name], None, x, each, leaf))
    at, fold = _fold_of(method, name)
    part = _through(method, slice(at), name, part, ready, table)
    x, leaf = interpreter.observe(method[at], part)
    out[name] = fold.add(None if state is None else state[name], x, leaf)
  return out


@functools.partial(jax.jit, static_argnames=("method", "layout"))
def _finish(
  state: State,
  base: Tree | None,
  like: Tree,
  ready: Ready,
  *,
  method: Method,
  layout: layouts.Layout | layouts.Table,
) -> Tree:
  bases, out = None if base is None else tree.named(base), tree.named(like)
  parts = {}
  for name, accumulated in state.items():
    leaf = interpreter.leaf_of(name, ready)
    leaf = leaf._replace(base=None if bases is None else bases[name])
    parts[name] = Part(_fold_of(method, name)[1].finish(accumulated, leaf), leaf)
  table = _table(method, layout, {n: part.x for n, part in parts.items()}, out)
  for name, part in parts.items():
    rest = slice(_fold_of(method, name)[0] + 1, None)
    x = _through(method, rest, name, part, ready, table).x
    out[name] = interpreter.add_to_base(name, x, part.leaf.base, out[name].dtype)
  return tree.rebuild(like, out)


def _fold_of(method: Method, name: str) -> tuple[int, Fold]:
  """Returns the index of the combiner that acts on a leaf, and its fold."""
  for i, step in enumerate(method):
    if step.fold and (step.where is None or step.where(name)):
      return i, step.fold
  raise ValueError(f"no combiner of the method acts on leaf {name!r}.")


def _table(
  method: Method,
  layout: layouts.Layout | layouts.Table,
  stacks: Mapping[str, Any],
  names: Mapping[str, Any],
) -> layouts.Table:
  shapes = {n: x.shape[1:] for n, x in stacks.items() if tree.is_floating(x)}
  return layouts.resolve(method, shapes, layout, names=names)


def _through(
  method: Method, at: slice, name: str, part: Part, ready: Ready, table: layouts.Table
) -> Part:
  """Runs a part through some of the stages."""
  for step, stats in zip(method[at], ready.stats[at], strict=True):
    if step.where is None or step.where(name):
      part = interpreter.apply(step, part, stats[step.group(name)], table.view(name))
  return part
