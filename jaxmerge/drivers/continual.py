"""OPCM over models that arrive one at a time: the continual method that has no fold."""

from __future__ import annotations

import functools
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
  tree,
)
from jaxmerge.core.stage import State
from jaxmerge.core.tree import Tree
from jaxmerge.drivers import finiteness, incremental
from jaxmerge.methods import subspaces


def opcm(
  base: Tree,
  scale: float = 1.0,
  alpha: float = 0.5,
  rank_tol: float = 1e-6,
  *,
  layout: layouts.Layout | None = (),
) -> incremental.Running:
  """Returns an incremental merge by `methods.opcm`, for models that arrive one at a time.

  The state holds the merged task vectors before scaling, and the sum and number of the norms: K
  models that arrive one at a time merge as if all K were merged at once.

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
  views = layouts.resolve(method, shapes, layout, names=bases)
  setup = _Setup(base, scale, alpha, rank_tol, views, frozenset(running_statistics.of(shapes)))
  steps = (functools.partial(f, setup) for f in (_init, _update, _finalize))
  return incremental.Running(*(double_precision.aware(step, base) for step in steps))


class _Setup(NamedTuple):
  """The constants of an OPCM merge, shared by all models."""

  base: Tree
  scale: float
  alpha: float
  rank_tol: float
  views: layouts.Table
  moments: frozenset[str]

  @property
  def static(self) -> dict[str, Any]:
    """The static arguments of the programs."""
    return {"views": self.views, "moments": self.moments}


def _init(setup: _Setup, params: Tree) -> State:
  incremental.check_model(setup.base, params)
  zeros = {
    n: jnp.zeros(x.shape, tree.compute_dtype(x.dtype))
    for n, x in incremental.floating(params).items()
  }
  return {"count": jnp.zeros((), jnp.int32), "norms": jnp.zeros(()), "merged": zeros}


def _update(setup: _Setup, state: State, params: Tree, name: str | None = None) -> State:
  incremental.check_model(setup.base, params)
  double_precision.refuse_narrowed([tree.named(setup.base), tree.named(params)], state)
  incremental.refuse_nonfinite(params, name or "passed to update")
  bases, settings = incremental.floating(setup.base), (setup.alpha, setup.rank_tol)
  return _add_model(state, incremental.floating(params), bases, settings, **setup.static)


@functools.partial(jax.jit, static_argnames=("views", "moments"))
def _add_model(
  state: State,
  params: dict[str, Any],
  bases: dict[str, Any],
  settings: tuple[Any, Any],
  *,
  views: layouts.Table,
  moments: frozenset[str],
) -> State:
  taus = {n: interpreter.task_vectors(x[None], bases[n]) for n, x in params.items()}
  merged = {}
  for n, tau in taus.items():
    before, view = state["merged"][n], layouts.view_for(views.view(n), layouts.Unit("matrix"))
    if view is None or n in moments:
      merged[n] = before + tau[0]
    else:
      pair = jnp.concatenate([before[None], tau])
      merged[n] = matrix_views.by_matrix(_in_turn(*settings), pair, None, view)[0]
  norms = state["norms"] + _norm(taus).astype(state["norms"].dtype)
  return {"count": state["count"] + 1, "norms": norms, "merged": merged}


def _in_turn(alpha: Any, rank_tol: Any) -> Callable[..., Any]:
  """Adds to a matrix the part of another outside its directions: [2, m, n] -> [1, m, n]."""

  def add(pair: Any, base: Any, more: Any) -> Any:
    before, tau = pair
    return (before + subspaces.project_out(tau, before, alpha, rank_tol))[None]

  return add


@functools.partial(jax.jit, static_argnames=("views", "moments"))
def _scale(
  state: State,
  bases: dict[str, Any],
  scale: Any,
  *,
  views: layouts.Table,
  moments: frozenset[str],
) -> dict[str, Any]:
  norm = _norm(state["merged"])
  factor = scale * state["norms"] / state["count"].astype(norm.dtype) / jnp.where(norm > 0, norm, 1)
  out = {}
  for n, x in state["merged"].items():
    share = 1 / state["count"].astype(x.dtype) if n in moments else factor.astype(x.dtype)
    out[n] = interpreter.add_to_base(n, (x * share)[None], bases[n], bases[n].dtype)
  return out


def _finalize(setup: _Setup, state: State) -> Tree:
  incremental.refuse_empty(state)
  bases = tree.named(setup.base)
  double_precision.refuse_narrowed([bases], state)
  out = _scale(state, incremental.floating(setup.base), setup.scale, **setup.static)
  copied = {n: double_precision.copy_leaf(x) for n, x in bases.items()}
  return tree.rebuild(setup.base, copied | finiteness.check_result(out))


def _norm(leaves: Mapping[str, Any]) -> Any:
  """Returns the norm over all leaves but running statistics, which are not weights."""
  moments = running_statistics.of(leaves)
  dtype = tree.compute_dtype(*(x.dtype for x in leaves.values()))
  weights = [x.astype(dtype) for n, x in leaves.items() if n not in moments]
  squares = sum(magnitudes.bin_sums(lambda x: jnp.sum(x * x), x) for x in weights)
  square, unit = magnitudes.join_bins(squares, 2)
  return jnp.sqrt(square) * unit
