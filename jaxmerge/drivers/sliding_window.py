"""Merges checkpoints during training: all so far, or a sliding window of the newest.

Subtracting the oldest checkpoint from a running sum would drift, because float32 rounds each step.
So a window stores its members in their dtypes, and merges them from scratch. However long the run,
the result is that of merging these checkpoints at once. An update copies one checkpoint.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any  # Any: states and parameters are trees.

import jax
import jax.numpy as jnp

from jaxmerge.core import double_precision, layouts, stage, tree
from jaxmerge.core.stage import Method, State
from jaxmerge.core.tree import Tree
from jaxmerge.drivers import arguments, incremental, memory


def online(
  method: Method | Any,
  base: Tree | None = None,
  *,
  window: int | None = None,
  hparams: Mapping[str, Any] | None = None,
  seed: int | None = None,
  layout: layouts.Layout | None = (),
) -> incremental.Running:
  """Returns init, update and finalize, which merge checkpoints as a training run produces them.

  With a window, any method merges the newest `window` checkpoints; the state stores them. Without
  one, a method with a fold merges all checkpoints; the state is as large as one model. States are
  trees of arrays, which Orbax or `io.checkpoints.store` save and restore; `init` returns one of the
  same shapes. Leaves that are not floating point are those of the newest checkpoint in the window.

  Args:
    method: the method, for checkpoints in order: `checkpoint_average`, `average`, `ties`, ...
    base: base of the task vectors; None: weights are merged.
    window: number of newest checkpoints to merge; None: all.
    hparams: hyperparameters in place of the method's defaults.
    seed: seed of random masks, for methods without a window.
    layout: matrix views.

  Raises:
    ValueError: for a window below 1, or random masks in a window; otherwise as `incremental.of`.

  Example:
    >>> from jaxmerge import methods
    >>> run = online(methods.average(), window=2)
    >>> state = run.init({"w": jnp.zeros(1)})
    >>> for value in (100.0, 4.0, 8.0):
    ...   state = run.update(state, {"w": jnp.array([value])})
    >>> run.finalize(state)["w"].tolist()
    [6.0]
  """
  if window is None:
    return incremental.of(method, base, hparams=hparams, seed=seed, layout=layout)
  method = arguments.method(method)
  if isinstance(window, bool) or not isinstance(window, int) or window < 1:
    raise ValueError(f"window must be a number of checkpoints, 1 or more, got {window!r}.")
  if seed is not None or "seed" in stage.hparams(method):
    raise ValueError(
      "a window does not support methods with random masks: a checkpoint's mask would depend on "
      "its position in it; leave the window out, or use jaxmerge.merge(..., names=...)."
    )
  if base is None:
    instead = "online(method, base, window=...)"
    arguments.refuse_weights(method, instead, "a base of zeros subtracts nothing")
  finalize = functools.partial(_finalize, method, base, dict(hparams or {}), layout)
  return incremental.Running(
    functools.partial(_init, base, window), functools.partial(_update, base), finalize
  )


def _init(base: Tree | None, window: int, params: Tree) -> State:
  incremental.check_model(base, params)
  empty = jax.tree.map(lambda x: double_precision.zeros(jnp.shape(x), x.dtype), params)
  # All members share one tree of zeros: they are replaced, never changed in place.
  return {"count": jnp.zeros((), jnp.int32), "members": [empty] * window}


def _update(base: Tree | None, state: State, params: Tree, name: str | None = None) -> State:
  """Replaces the oldest checkpoint by a copy of a new one, whose arrays the caller may donate."""
  incremental.check_model(base, params)
  tree.check_same(state["members"][-1], params, left="the tree passed to init", right="the model")
  incremental.refuse_nonfinite(params, name or "passed to update")
  return {
    "count": state["count"] + 1,
    "members": [*state["members"][1:], jax.tree.map(_copy, params)],
  }


def _copy(x: Any) -> Any:
  return jnp.copy(x) if isinstance(x, jax.Array) else double_precision.copy_leaf(x)


def _finalize(
  method: Method,
  base: Tree | None,
  hparams: Mapping[str, Any],
  layout: layouts.Layout | None,
  state: State,
) -> Tree:
  incremental.refuse_empty(state)
  if isinstance(state["count"], jax.core.Tracer):
    raise ValueError("the number of checkpoints is traced: call finalize outside of jit.")
  members = state["members"][-int(state["count"]) :]
  newest = members[-1]
  floating = [incremental.floating(params) for params in members]
  like = None if base is None else incremental.floating(base)
  stacks = {n: _stack([params[n] for params in floating]) for n in floating[0]}
  merged = memory.merge(method, stacks, like, hparams=hparams, layout=layout)
  others = tree.named(newest if base is None else base)
  return tree.rebuild(newest, {n: _copy(x) for n, x in others.items() if n not in merged} | merged)


def _stack(leaves: list[Any]) -> Any:
  with double_precision.context(leaves):
    return jnp.stack([jnp.asarray(x) for x in leaves])
