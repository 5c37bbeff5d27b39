"""Merges of models that come one after the other: init, update, finalize; constant memory.

The checkpoints of a run, or experts that arrive over weeks: what is kept between two of them is an
accumulator as large as one model. `of` takes any method with a fold, `opcm` is the continual method
that has none. States are trees of arrays: they go through `jit` and `lax.scan`, and to disk.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple  # Any: states and parameters are trees.

import jax
import jax.numpy as jnp

from jaxmerge.catalog import lookup
from jaxmerge.core import (
  double_precision,
  interpreter,
  layouts,
  magnitudes,
  matrix_views,
  running_statistics,
  stage,
  tree,
)
from jaxmerge.core.stage import Method, State
from jaxmerge.core.tree import Tree
from jaxmerge.drivers import arguments, finiteness
from jaxmerge.methods import averages, subspaces

_opcm = lookup.METHODS["opcm"].parameters


class Running(NamedTuple):
  """A merge of models that come one after the other.

  Attributes:
    init: (params) -> state, before the first; only shapes and dtypes are looked at.
    update: (state, params) -> state, with one more model; for methods with random masks
      (state, params, name), as the masks depend on it. Under a `jit` or `scan` of yours JAX has
      made arguments of 64 bits narrow before they are seen here: trace within
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
  layout: layouts.Said | None = (),
) -> Running:
  """Runs a method over models that come one after the other, as `merge` does over all at once.

  Means, sums, random drops before a sum, the largest entry: whatever has a fold and measures
  nothing. Leaves that are not floating point are the base's, or the first model's.

  Args:
    method: with a fold: `average`, `checkpoint_average`, `task_arithmetic`, `dare`, `magmax`, ...
    base: what task vectors are taken from and added to; None: the weights themselves are merged.
    hparams: numbers in place of the method's own; one number for all models.
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
      "merge a stack, or use `average`, `checkpoint_average`, `task_arithmetic`, `dare`, `magmax` "
      "or `incremental.opcm`."
    )
  if base is None:
    instead = "incremental.of(method, base)"
    arguments.refuse_weights(method, instead, "a base of zeros subtracts nothing")
  numbers = arguments.hparams(hparams, seed)
  seeded = "seed" in stage.hparams(method)
  method = averages.with_moments(method, None if base is None else _merged(base))
  take, finish = accumulator(method, layouts.check(layout))

  def prepared(params: Tree, name: str | None) -> interpreter.Ready:
    leaves = tree.named(params)
    shapes = {n: x.shape for n, x in leaves.items() if tree.is_floating(x)}
    names = None if name is None else [name]
    return interpreter.prepare(method, shapes, 1, numbers, names, leaves.keys() - shapes.keys())

  def init(params: Tree) -> State:
    _check(base, params)
    own = None if base is None else _merged(base)
    ready = prepared(params, None)
    alone = jax.eval_shape(lambda p: take(None, _one(p), own, ready), _merged(params))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), alone)
    return {"count": jnp.zeros((), jnp.int32), "held": zeros, "like": _kept(params)}

  def update(state: State, params: Tree, name: str | None = None) -> State:
    _check(base, params)
    if others := tree.named(params).keys() ^ tree.named(state["like"]).keys():
      where = "init" if min(others) in tree.named(state["like"]) else "update"
      raise ValueError(f"leaf {min(others)!r} is only in the tree that {where} was given.")
    if seeded and name is None:
      raise ValueError("the method's random masks depend on the model's name: give update a name.")
    leaves = [tree.named(t) for t in (params, base) if t is not None]
    double_precision.refuse_narrowed(leaves, state, params)
    ready = prepared(params, name)
    own = None if base is None else _merged(base)
    try:
      held = added(state["count"], state["held"], _merged(params), own, ready)
    except TypeError:
      _refuse_unlike(state["held"], params)
      raise
    like = jax.tree.map(functools.partial(_first, state["count"]), state["like"], params)
    _refuse_nonfinite(params, name or "given to update")
    return {"count": state["count"] + 1, "held": held, "like": like}

  @jax.jit
  def added(count: Any, held: Any, params: Tree, base: Any, ready: interpreter.Ready) -> State:
    def alone(held: State) -> State:
      return take(None, _one(params), base, ready)

    def more(held: State) -> State:
      return take(held, _one(params), base, ready)

    return jax.lax.cond(count == 0, alone, more, held)

  def finalize(state: State) -> Tree:
    _refuse_empty(state)
    like = state["like"] if base is None else base
    ready = prepared(like, "finished" if seeded else None)
    double_precision.refuse_narrowed([tree.named(like)], state)
    out = finish(state["held"], base if base is None else _merged(base), _merged(like), ready)
    out = finiteness.checked(out)
    return tree.rebuild(
      like, {n: double_precision.copied(x) for n, x in tree.named(like).items()} | out
    )

  return Running(*(double_precision.aware(f, base) for f in (init, update, finalize)))


def accumulator(
  method: Method, layout: layouts.Said | layouts.Table
) -> tuple[Callable[..., State], Callable[..., Tree]]:
  """Returns what takes some models more, and what makes the merge of an accumulator.

  `take(held, models, base, ready)`: an accumulator or None, a stack [k, *s], the base or None, the
  numbers of these models -> an accumulator by leaf. `finish(held, base, like, ready)` -> a model;
  leaves that are not floating point are those of `like`.

  Example:
    >>> take, finish = accumulator(jaxmerge.methods.average(), ())
    >>> models = {"w": jnp.array([[1.0], [3.0]])}
    >>> ready = interpreter.prepare(jaxmerge.methods.average(), {"w": (1,)}, 2, {}, None)
    >>> like = {"w": jnp.zeros(1)}
    >>> finish(take(None, models, None, ready), None, like, ready)["w"].tolist()
    [2.0]
  """

  def fold_of(name: str) -> tuple[int, stage.Fold]:
    for i, step in enumerate(method):
      if step.fold and (step.where is None or step.where(name)):
        return i, step.fold
    raise ValueError(f"no combiner of the method acts on leaf {name!r}.")

  def table(stacks: Mapping[str, Any], names: Mapping[str, Any]) -> layouts.Table:
    shapes = {n: x.shape[1:] for n, x in stacks.items() if tree.is_floating(x)}
    return layouts.settled(method, shapes, layout, names=names)

  def through(
    at: slice, name: str, x: Any, leaf: stage.Leaf, ready: interpreter.Ready, view: str | None
  ) -> Any:
    for step, known in zip(method[at], ready.known[at], strict=True):
      if step.where is None or step.where(name):
        x = interpreter.update(step, x, leaf, known[step.group(name)], [], view)
    return x

  @jax.jit
  def take(held: Any, models: Any, base: Any, ready: interpreter.Ready) -> Any:
    references, out = None if base is None else tree.named(base), {}
    leaves = tree.named(models)
    placed = table(leaves, leaves)
    for name, x in leaves.items():
      if not tree.is_floating(x):
        continue
      leaf = interpreter.leaf_of(name, references, ready)
      delta = interpreter.task_vectors(x, None if references is None else references[name])
      at, fold = fold_of(name)
      delta = through(slice(at), name, delta, leaf, ready, placed.view(name))
      out[name] = fold.add(None if held is None else held[name], delta, leaf)
    return out

  @jax.jit
  def finish(held: Any, base: Any, like: Any, ready: interpreter.Ready) -> Any:
    references, out = None if base is None else tree.named(base), tree.named(like)
    about = {n: interpreter.leaf_of(n, references, ready) for n in held}
    steps = {n: fold_of(n) for n in held}
    joined = {n: steps[n][1].finish(part, about[n]) for n, part in held.items()}
    placed = table(joined, out)
    for name, y in joined.items():
      rest = slice(steps[name][0] + 1, None)
      x = through(rest, name, y, about[name], ready, placed.view(name))
      own = None if references is None else references[name]
      out[name] = interpreter.added(name, x, own, out[name].dtype)
    return tree.rebuild(like, out)

  return take, finish


def opcm(
  base: Tree,
  scale: float = _opcm["scale"].default,
  alpha: float = _opcm["alpha"].default,
  rank_tol: float = _opcm["rank_tol"].default,
  *,
  layout: layouts.Said | None = (),
) -> Running:
  """Merges by `methods.opcm` models that come one after the other.

  The state holds the merged task vectors before they are scaled, and the sum and number of the
  norms: a model of K merges as if all K had been given at once.

  Args:
    base: what the models were tuned from.
    scale: factor on the merged task vector.
    alpha, rank_tol: see `methods.opcm`.
    layout: matrix views; leaves without one are added up.

  Raises:
    ValueError: in `update`, for a tree that does not match the base, NaN or infinity.

  Reference: Tang et al. 2025, Merging models on the fly (arXiv:2501.09522).

  Example:
    >>> run = opcm({"w": jnp.zeros((2, 2))}, layout=(("w", "oi"),))
    >>> state = run.init({"w": jnp.zeros((2, 2))})
    >>> for x in ([[3.0, 0.0], [0.0, 1.0]], [[1.0, 2.0], [2.0, 1.0]]):
    ...   state = run.update(state, {"w": jnp.array(x)})
    >>> print(np.asarray(run.finalize(state)["w"]).round(3))
    [[2.236 1.491]
     [1.491 0.745]]
  """
  lookup.check("opcm", {"scale": scale, "alpha": alpha, "rank_tol": rank_tol})
  bases = tree.named(base)
  shapes = {n: jnp.shape(x) for n, x in bases.items() if tree.is_floating(x)}
  method = subspaces.opcm(scale, alpha, rank_tol)
  table, unit = layouts.settled(method, shapes, layout, names=bases), layouts.Unit("matrix")
  statistics = running_statistics.of(shapes)

  def init(params: Tree) -> State:
    _check(base, params)
    zeros = {n: jnp.zeros(x.shape, tree.compute_dtype(x.dtype)) for n, x in floating(params)}
    return {"count": jnp.zeros((), jnp.int32), "norms": jnp.zeros(()), "merged": zeros}

  def floating(params: Tree) -> list[tuple[str, Any]]:
    return [(n, x) for n, x in tree.named(params).items() if tree.is_floating(x)]

  def update(state: State, params: Tree, name: str | None = None) -> State:
    _check(base, params)
    double_precision.refuse_narrowed([bases, tree.named(params)], state)
    _refuse_nonfinite(params, name or "given to update")
    return added(state, _merged(params), _merged(base))

  @jax.jit
  def added(state: State, params: Tree, bases: Any) -> State:
    taus = {n: interpreter.task_vectors(x[None], bases[n]) for n, x in floating(params)}
    merged = {}
    for n, tau in taus.items():
      held, view = state["merged"][n], layouts.seen(table.view(n), unit)
      if view is None or n in statistics:
        merged[n] = held + tau[0]
      else:
        merged[n] = matrix_views.by_matrix(
          _in_turn, jnp.concatenate([held[None], tau]), None, view
        )[0]
    norms = state["norms"] + _norm(taus).astype(state["norms"].dtype)
    return {"count": state["count"] + 1, "norms": norms, "merged": merged}

  def _in_turn(pair: Any, _: Any) -> Any:
    held, tau = pair
    return (held + subspaces.projected(tau, held, alpha, rank_tol))[None]

  @jax.jit
  def scaled(state: State, bases: Any) -> dict[str, Any]:
    norm = _norm(state["merged"])
    factor = (
      scale * state["norms"] / state["count"].astype(norm.dtype) / jnp.where(norm > 0, norm, 1)
    )
    out = {}
    for n, x in state["merged"].items():
      own = 1 / state["count"].astype(x.dtype) if n in statistics else factor.astype(x.dtype)
      out[n] = interpreter.added(n, (x * own)[None], bases[n], bases[n].dtype)
    return out

  def finalize(state: State) -> Tree:
    _refuse_empty(state)
    double_precision.refuse_narrowed([bases], state)
    out = finiteness.checked(scaled(state, _merged(base)))
    return tree.rebuild(base, {n: double_precision.copied(x) for n, x in bases.items()} | out)

  return Running(*(double_precision.aware(f, base) for f in (init, update, finalize)))


def _norm(leaves: Mapping[str, Any]) -> Any:
  """The norm of leaves together; running statistics are none of the weights."""
  dtype, statistics = (
    tree.compute_dtype(*(x.dtype for x in leaves.values())),
    running_statistics.of(leaves),
  )
  own = [x.astype(dtype) for n, x in leaves.items() if n not in statistics]
  square, unit = magnitudes.joined(
    sum(magnitudes.binned(lambda x: jnp.sum(x * x), x) for x in own), 2
  )
  return jnp.sqrt(square) * unit


def _merged(params: Tree) -> dict[str, Any]:
  """The leaves that are merged; the others go through no program."""
  return {n: x for n, x in tree.named(params).items() if tree.is_floating(x)}


def _one(params: Tree) -> Tree:
  return jax.tree.map(lambda x: jnp.asarray(x)[None], params)


def _kept(params: Tree) -> Tree:
  """What a merge without a base keeps of the models: leaves that are not merged, and dtypes."""

  def one(x: Any) -> Any:
    return double_precision.zeros((0,) if tree.is_floating(x) else x.shape, x.dtype)

  return jax.tree.map(one, params)


def _first(count: Any, kept: Any, x: Any) -> Any:
  if tree.is_floating(x) or not isinstance(count, jax.core.Tracer):
    return kept if tree.is_floating(x) or count else double_precision.copied(x)
  return jnp.where(count == 0, x, kept)


def _check(base: Tree | None, params: Tree) -> None:
  if base is not None:
    tree.check_same(base, params, left="the base", right="the model", dtype=False)
  arguments.refuse(params, "the model")


def _refuse_unlike(held: Mapping[str, Any], params: Tree) -> None:
  for name, x in _merged(params).items():
    shape = max((own.shape for own in jax.tree.leaves(held[name])), key=math.prod)
    if shape[len(shape) - x.ndim :] != x.shape:
      raise ValueError(f"leaf {name!r} is {x.shape}, but not in the tree that init was given.")


def _refuse_empty(state: State) -> None:
  if not isinstance(state["count"], jax.core.Tracer) and int(state["count"]) == 0:
    raise ValueError("no model was given to update: there is nothing to finalize.")


def _refuse_nonfinite(params: Tree, name: str) -> None:
  found = {}
  for n, x in tree.named(params).items():
    if isinstance(x, jax.core.Tracer):
      return
    if tree.is_floating(x):
      found[n] = finiteness.Flags(True, True, finiteness.finite(jnp.asarray(x))[None])
  finiteness.refuse(jax.device_get(found), [name])
