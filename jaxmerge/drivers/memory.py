"""The driver for models in memory: `merge`, under jit, vmap, grad and meshes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple  # Any: trees and numbers of many kinds.

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.core import (
  double_precision,
  interpreter,
  layouts,
  leaf_groups,
  reductions,
  rewrites,
  running_statistics,
  sharding,
  stage,
  tree,
)
from jaxmerge.core import statistics as statistics_
from jaxmerge.core.interpreter import Slice
from jaxmerge.core.stage import Array, Method
from jaxmerge.core.tree import Tree
from jaxmerge.drivers import arguments, distributed_matrices, finiteness
from jaxmerge.errors import suggest_keywords
from jaxmerge.methods import averages
from jaxmerge.parallel import mesh as meshes


@suggest_keywords
@double_precision.aware
def merge(
  method: Method | Any,
  models: Any,  # A stack, or what `arguments.stack_models` accepts.
  base: Tree | None = None,
  *,
  hparams: Mapping[str, Any] | None = None,
  statistics: Mapping[str, Any] | None = None,
  seed: int | Array | None = None,
  names: Sequence[str] | None = None,
  reference: Tree | None = None,
  layout: layouts.Layout | layouts.Table | None = (),
  deltas: bool = False,
) -> Tree:
  """Merges task vectors and adds the result to the base, or merges weights where there is no base.

  With a base it returns base + M(models - base), in the base's dtypes, else M(models), in those of
  the models; it computes in float32 or wider. Leaves that are not floating point are copied from
  the base, or from the first model if they are equal in all. Works under jit, vmap and grad, and on
  sharded arrays, where methods of matrices share these out over the mesh (`docs/design.md`).

  Args:
    method: a method, such as `jaxmerge.methods` returns.
    models: stack of K models, [K, *s]; with a base also a list or a dict of trees like it.
    base: tree of arrays [*s]; None: the weights themselves are merged.
    hparams: hyperparameters by name, in place of the method's: a scalar, one per model [K], or a
      tree with one of these per leaf. Other values do not compile again.
    statistics: by name, what stages read beside the models: trees like the model, of arrays with a
      first axis for the K models. The stage says whether one has a value for each entry, [K, *s],
      or any other shape, [K, ...], as a Gram matrix [K, d, d]; see `jaxmerge.core.statistics`.
    seed: for methods with random masks.
    names: names of the models, "0", "1", ... by default. Masks depend on them and not on the
      order; methods for which the order matters keep that of the stack.
    reference: what is subtracted from the models, if not the base.
    layout: (regular expression, view or None): matrix views before those of `core.layouts`.
    deltas: the models are task vectors, and without a base so is the result.

  Raises:
    ValueError: naming the leaf, for trees that do not match, NaN or infinity (if values are
      concrete), and a leaf that no combiner touched.

  Example:
    >>> import jax.numpy as jnp, jaxmerge
    >>> base, models = {"w": jnp.zeros(2)}, {"w": jnp.array([[1.0, 0.0], [3.0, 4.0]])}
    >>> jaxmerge.merge(jaxmerge.methods.task_arithmetic(scale=0.5), models, base)["w"].tolist()
    [2.0, 2.0]
    >>> jaxmerge.merge(jaxmerge.methods.average(weight=(3.0, 1.0)), models)["w"].tolist()
    [1.5, 1.0]
  """
  method, hparams = arguments.method(method), arguments.hparams(hparams, seed)
  models, names = _check_trees(method, models, base, reference, names, deltas)
  options = _Options(hparams, statistics, names, layout, deltas)
  return _run(method, base, reference, models, options)


def _check_trees(
  method: Method,
  models: Any,
  base: Tree | None,
  reference: Tree | None,
  names: Sequence[str] | None,
  deltas: bool,
) -> tuple[Tree, Sequence[str] | None]:
  """Returns the stack and the models' names; raises ValueError for trees that do not match."""
  if deltas and reference is not None:
    raise ValueError("deltas=True and a reference: nothing is subtracted from task vectors.")
  if base is not None:
    models, names = arguments.stack_models(base, models, names)
    interpreter.check_models(base, models, base if reference is None else reference)
    return models, names
  if reference is not None:
    raise ValueError("a reference is given without a base; the result is added to the base.")
  if not deltas:
    arguments.refuse_weights(method, "merge(method, models, base)", "merge(..., deltas=True)")
  models = arguments.check_stack(models)
  interpreter.check_weights(models)
  return models, names


class _Options(NamedTuple):
  """The arguments of `merge` that are passed on unchanged."""

  hparams: Mapping[str, Any]
  statistics: Mapping[str, Any] | None
  names: Sequence[str] | None
  layout: layouts.Layout | layouts.Table | None
  deltas: bool


def transform(
  method: Method,
  pieces: Mapping[str, Slice],
  ready: interpreter.Ready,
  layout: layouts.Table = layouts.NONE,
  distribution: distributed_matrices.Distribution | None = None,
  widths: Mapping[str, Any] | None = None,
  subtracted: bool = False,
) -> dict[str, Array]:
  """Runs a method over whole leaves by name, while tracing, and returns task vectors [M, *s].

  Args:
    method: the method.
    pieces: the leaves.
    ready: resolved hyperparameters and initial `stats`.
    layout: matrix views.
    distribution: how matrices are distributed over devices.
    widths: the narrowest dtype to compute in, by leaf; float32 by default.
    subtracted: the models are task vectors already.
  """
  parts = {}
  for name, piece in pieces.items():
    piece = piece._replace(leaf=interpreter.leaf_of(name, ready))
    least = np.float32 if widths is None else widths[name]
    parts[name] = interpreter.begin(piece, least, subtracted=subtracted)
  for step, first in zip(method, ready.stats, strict=True):
    before = leaf_groups.offsets(step, {n: part.x.shape[1:] for n, part in parts.items()})
    for n in before:
      parts[n] = parts[n]._replace(leaf=parts[n].leaf._replace(offset=before[n]))
    for group, names in leaf_groups.members(step, parts).items():
      stats = dict(first[group])
      for reduction in step.reductions:
        seen = [interpreter.observe(step, parts[n]) for n in names]
        stats[reduction.name] = reductions.reduce_group(reduction, seen, stats)
      some = {n: parts[n] for n in names}
      done = distributed_matrices.apply(step, some, stats, layout, distribution)
      for n in names:
        if n in done:
          parts[n] = parts[n]._replace(x=done[n])
        else:
          parts[n] = interpreter.apply(step, parts[n], stats, layout.view(n))
  return {n: part.x for n, part in parts.items()}


class _Leaves(NamedTuple):
  """The leaves that are merged, by name; arguments of the compiled program."""

  base: dict[str, Any] | None
  reference: dict[str, Any] | None
  models: dict[str, Any]
  statistics: dict[str, dict[str, Any]]


def _run(
  method: Method,
  base: Tree | None,
  reference: Tree | None,
  models: Tree,
  options: _Options,
) -> Tree:
  """Merges the leaves that hold floating-point numbers, and copies the others."""
  stacks = tree.named(models)
  shapes = {n: np.shape(leaf)[1:] for n, leaf in stacks.items() if tree.is_floating(leaf)}
  method = averages.with_moments(method, shapes)
  copied, num_models = stacks.keys() - shapes.keys(), tree.num_models(models)
  hparams, names = options.hparams, options.names
  ready = interpreter.prepare(method, shapes, num_models, hparams, names, copied)
  table = layouts.resolve(method, shapes, options.layout, names=stacks)
  named = statistics_.by_leaf(options.statistics)
  named = statistics_.resolve(method, named, shapes, num_models, table, copied)
  # Sums over a sharded task axis must stay sums: the compiler turns them into all-reduces.
  shared = any(sharding.over_first(x) for x in stacks.values())
  chains = False if shared else rewrites.pays(stacks.values())
  static = dict(method=stage.without_hparams(method), layout=table, subtracted=options.deltas)
  static["distribution"] = distributed_matrices.of(stacks.values(), chains)

  def merged(t: Tree | None) -> Any:
    leaves = {} if t is None else tree.named(t)
    return None if t is None else {n: leaves[n] for n in shapes}

  leaves = _Leaves(merged(base), merged(reference), merged(models), named)
  likes = stacks if base is None else tree.named(base)
  out = _merge_finite(leaves, ready, names, static)
  double_precision.refuse_narrowed((stacks, likes), leaves, hparams, out)
  for n in copied:
    out[n] = double_precision.copy_leaf(stacks[n][0] if base is None else likes[n])
  return tree.rebuild(models if base is None else base, out)


def _merge_finite(
  leaves: _Leaves,
  ready: interpreter.Ready,
  names: Sequence[str] | None,
  static: Mapping[str, Any],
) -> dict[str, Any]:
  """Merges; raises ValueError for NaN or infinity if values are concrete."""
  out, flags = _compiled(leaves, ready, **static)
  if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((flags, out))):
    return out
  seen = meshes.fetch(flags)
  if not (bad := [n for n, of_leaf in seen.items() if not all(np.all(flag) for flag in of_leaf)]):
    return out
  trees = leaves.base, leaves.reference, leaves.models
  shared = {
    n: finiteness.shared_infinities(*(None if t is None else t[n] for t in trees)) for n in bad
  }
  if any(places.any() for places in shared.values()):
    first = {n: trees[2][n][0] if trees[0] is None else trees[0][n] for n in shared}

    def cleared(t: Any) -> Any:
      zeros = {} if t is None else {n: finiteness.zero_at(at, t[n]) for n, at in shared.items()}
      return None if t is None else t | zeros

    base, reference, models = map(cleared, trees)
    finite = _Leaves(base, reference, models, leaves.statistics)
    out = _merge_finite(finite, ready, names, static)
    return out | {n: jnp.where(at, first[n], out[n]) for n, at in shared.items()}
  finiteness.refuse(seen, names, ready.order)
  finiteness.refuse_statistics(bad[0], statistics_.of_leaf(leaves.statistics, bad[0]))
  raise finiteness.unsound_error(bad[0], out[bad[0]])


@functools.partial(jax.jit, static_argnames=("method", "layout", "distribution", "subtracted"))
def _compiled(
  leaves: _Leaves,
  ready: interpreter.Ready,
  *,
  method: Method,
  layout: layouts.Table,
  distribution: distributed_matrices.Distribution,
  subtracted: bool = False,
) -> tuple[dict[str, Array], dict[str, finiteness.Flags]]:
  pieces, widths = _pieces(leaves, ready), _widths(method, leaves)

  def run(chains: bool) -> Callable[..., dict[str, Array]]:
    each = distribution._replace(chains=chains)
    return functools.partial(
      transform, method, layout=layout, distribution=each, widths=widths, subtracted=subtracted
    )

  merged = rewrites.with_chains(run, distribution.chains)(pieces, ready)
  variances, out, flags = running_statistics.variances(leaves.models), {}, {}
  for name, piece in pieces.items():
    like = piece.models if piece.base is None else piece.base
    out[name] = interpreter.add_to_base(name, merged[name], piece.base, like.dtype)
    of_inputs = finiteness.flags(piece.base, piece.reference, piece.models)
    flags[name] = of_inputs._replace(merged=finiteness.is_sound(out[name], name in variances))
  return out, flags


def _pieces(leaves: _Leaves, ready: interpreter.Ready) -> dict[str, Slice]:
  """Returns a slice for each leaf, with the models in order of their tags."""
  moments = running_statistics.of(leaves.models)

  def ordered(x: Any) -> Any:
    return x if ready.order is None else _reorder(x, ready.order)

  pieces = {}
  for name, x in leaves.models.items():
    # Running statistics are averaged as they are, not as task vectors.
    subtracted = None if name in moments and leaves.base is not None else leaves.reference
    pieces[name] = Slice(
      None if leaves.base is None else leaves.base[name],
      None if subtracted is None else subtracted[name],
      ordered(x),
      {n: ordered(v) for n, v in statistics_.of_leaf(leaves.statistics, name).items()},
    )
  return pieces


def _widths(method: Method, leaves: _Leaves) -> dict[str, Any]:
  """Returns the narrowest dtype in which each leaf may be merged."""
  trees = [t for t in (leaves.base, leaves.reference) if t is not None]
  widths = {
    n: tree.compute_dtype(x.dtype, *(t[n].dtype for t in trees)) for n, x in leaves.models.items()
  }
  if leaf_groups.is_coupled(method):  # A reduction over several leaves has one width.
    return dict.fromkeys(widths, tree.compute_dtype(*widths.values()))
  return widths


def _reorder(x: Array, order: Array) -> Array:
  # A gather along an explicitly sharded task axis must state the sharding of its result.
  return x.at[order].get(out_sharding=jax.typeof(x).sharding)
