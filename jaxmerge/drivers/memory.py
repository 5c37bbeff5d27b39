"""The driver for models in memory: `merge`, under jit, vmap, grad and meshes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any  # Any: trees and numbers of many kinds.

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.core import (
  double_precision,
  interpreter,
  layouts,
  reductions,
  rewrites,
  running_statistics,
  sharding,
  stage,
  tree,
)
from jaxmerge.core.stage import Array, Method
from jaxmerge.core.tree import Tree
from jaxmerge.drivers import arguments, distributed_matrices, finiteness
from jaxmerge.methods import averages
from jaxmerge.parallel import mesh as meshes


@double_precision.aware
def merge(
  method: Method | Any,
  models: Any,  # A stack; what else is taken for several models, `arguments` says.
  base: Tree | None = None,
  *,
  hparams: Mapping[str, Any] | None = None,
  seed: int | Array | None = None,
  names: Sequence[str] | None = None,
  reference: Tree | None = None,
  layout: layouts.Said | layouts.Table | None = (),
  deltas: bool = False,
) -> Tree:
  """Merges task vectors and adds the result to the base, or merges weights where there is no base.

  With a base it returns base + M(models - base), in the base's dtypes, else M(models), in those of
  the models; it computes in float32 or wider. Leaves that are not floating point are copied from
  the base, or from the first model if they are equal in all. Works under jit, vmap and grad, on
  sharded arrays too: methods of matrices share these out over the mesh, in a program of yours over
  that of its arrays' types or of `jax.set_mesh`; where it knows of none, every device works on
  every matrix.

  Args:
    method: what `jaxmerge.methods` makes.
    models: stack of K models, [K, *s]; with a base also a list of trees like it, or a dict of them
      by name.
    base: tree of arrays [*s]; None: the weights themselves are merged. Methods of task vectors need
      one.
    hparams: hyperparameters by name, in place of the method's own: a scalar, one per model [K], or
      a tree with one of these, or an array [K, *s], per leaf. Other values do not compile again.
    seed: for methods with random masks.
    names: names of the models. Masks depend on them and not on the order; without them the models
      are called "0", "1", and so on. Methods to which the order matters keep that of the stack.
    reference: what is subtracted from the models, if not the base.
    layout: (regular expression, view or None): matrix views before those of
      `jaxmerge.core.layouts`.
    deltas: the models are task vectors: nothing is subtracted from them, and without a base the
      result is one.

  Raises:
    ValueError: naming the leaf, for trees that do not match, NaN or infinity (where values can be
      looked at), unknown numbers, numbers out of range, a leaf that no combiner touched, or a
      method of task vectors without a base.

  Example:
    >>> import jax.numpy as jnp, jaxmerge
    >>> base = {"w": jnp.zeros(2)}
    >>> experts = jaxmerge.stack([{"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([3.0, 4.0])}])
    >>> jaxmerge.merge(jaxmerge.methods.task_arithmetic(scale=0.5), experts, base)["w"].tolist()
    [2.0, 2.0]
    >>> jaxmerge.merge(jaxmerge.methods.average(weight=(3.0, 1.0)), experts)["w"].tolist()
    [1.5, 1.0]
  """
  method, hparams = arguments.method(method), arguments.hparams(hparams, seed)
  if deltas and reference is not None:
    raise ValueError("deltas=True and a reference: nothing is subtracted from task vectors.")
  if base is None:
    if reference is not None:
      raise ValueError("a reference is given without a base; the result is added to the base.")
    if not deltas:
      arguments.refuse_weights(method, "merge(method, models, base)", "merge(..., deltas=True)")
    models = arguments.without_base(models)
    interpreter.check_weights(models)
  else:
    models, names = arguments.stacked(base, models, names)
    interpreter.check_models(base, models, base if reference is None else reference)
  return _driven(method, base, reference, models, hparams, names, layout, deltas)


def transform(
  method: Method,
  models: dict[str, Array],
  base: Mapping[str, Array] | None,
  ready: interpreter.Ready,
  layout: layouts.Table = layouts.NONE,
  deal: distributed_matrices.Deal | None = None,
) -> dict[str, Array]:
  """Runs a method over leaves by name, while tracing: stacks [K, *s] -> stacks [M, *s]."""
  x: dict[str, Any] = dict(models)
  kept: dict[str, list[Array]] = {name: [] for name in x}
  for step, first in zip(method, ready.known, strict=True):
    shapes = {n: v.shape[1:] for n, v in x.items()}
    before = stage.offsets(step, shapes)
    for group, names in stage.members(step, x).items():
      leaves = {n: interpreter.leaf_of(n, base, ready)._replace(offset=before[n]) for n in names}
      known = dict(first[group])
      for statistic in step.reductions:
        parts = [(interpreter.seen(step, x[n], kept[n]), leaf) for n, leaf in leaves.items()]
        known[statistic.name] = reductions.settled(statistic, parts, known)
      done = distributed_matrices.leaves(step, x, leaves, known, layout, deal)
      for n in [n for n in names if n not in done]:
        done[n] = interpreter.update(step, x[n], leaves[n], known, kept[n], layout.view(n))
      x.update(done)
  return x


def _driven(
  method: Method,
  base: Tree | None,
  reference: Tree | None,
  models: Tree,
  hparams: Mapping[str, Any],
  names: Sequence[str] | None,
  layout: layouts.Said | layouts.Table | None,
  deltas: bool = False,
) -> Tree:
  stacks = tree.named(models)
  shapes = {n: np.shape(leaf)[1:] for n, leaf in stacks.items() if tree.is_floating(leaf)}
  method = averages.with_moments(method, shapes)
  copied = stacks.keys() - shapes.keys()
  ready = interpreter.prepare(method, shapes, tree.num_models(models), hparams, names, copied)
  # Sums over a task axis that devices share must stay sums, which the compiler makes reductions.
  shared = any(sharding.over_first(x) for x in stacks.values())
  chains = False if shared else rewrites.pays(stacks.values())
  table = layouts.settled(method, shapes, layout, names=stacks)
  given = dict(method=stage.bare(method), layout=table, subtracted=deltas)
  given["deal"] = distributed_matrices.of(stacks.values(), chains)
  parts = [None if t is None else tree.named(t) for t in (base, reference, models)]
  parts = [None if t is None else {n: t[n] for n in shapes} for t in parts]
  likes = stacks if base is None else tree.named(base)
  out = _checked(parts, ready, names, given)
  double_precision.refuse_narrowed((stacks, likes), parts, hparams, out)
  for n in copied:
    out[n] = double_precision.copied(stacks[n][0] if base is None else likes[n])
  return tree.rebuild(models if base is None else base, out)


def _checked(
  parts: Sequence[Any],
  ready: interpreter.Ready,
  names: Sequence[str] | None,
  given: Mapping[str, Any],
) -> dict[str, Any]:
  """Merges, and refuses what is not finite, where values can be looked at."""
  out, found = _compiled(*parts, ready, **given)
  if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((found, out))):
    return out
  seen = meshes.fetch(found)
  if not (bad := [n for n, own in seen.items() if not all(np.all(flag) for flag in own)]):
    return out
  held = {n: finiteness.shared(*(None if t is None else t[n] for t in parts)) for n in bad}
  if any(own.any() for own in held.values()):
    kept = {n: parts[2][n][0] if parts[0] is None else parts[0][n] for n in held}
    parts = [
      None if t is None else t | {n: finiteness.without(own, t[n]) for n, own in held.items()}
      for t in parts
    ]
    out = _checked(parts, ready, names, given)
    return out | {n: jnp.where(own, kept[n], out[n]) for n, own in held.items()}
  finiteness.refuse(seen, names, ready.order)
  raise finiteness.unsound(bad[0], out[bad[0]])


@functools.partial(jax.jit, static_argnames=("method", "layout", "deal", "subtracted"))
def _compiled(
  bases: dict[str, Any] | None,
  references: dict[str, Any] | None,
  stacks: dict[str, Any],
  ready: interpreter.Ready,
  *,
  method: Method,
  layout: layouts.Table,
  deal: distributed_matrices.Deal,
  subtracted: bool = False,
) -> tuple[dict[str, Array], dict[str, finiteness.Flags]]:
  zeros = bases if references is None else references
  if bases is not None and zeros is not None:  # Of running statistics the models' mean is merged.
    zeros = {**zeros, **{n: bases[n] for n in running_statistics.of(stacks)}}
  variances = running_statistics.variances(stacks)
  widths = {
    n: tree.compute_dtype(x.dtype, *(t[n].dtype for t in (bases, references) if t is not None))
    for n, x in stacks.items()
  }
  if stage.coupled(method):  # What is added up over leaves has one width.
    widths = dict.fromkeys(widths, tree.compute_dtype(*widths.values()))
  deltas, found = {}, {}
  for name, leaf in stacks.items():
    x = leaf if ready.order is None else _reordered(leaf, ready.order)
    zero = None if zeros is None else zeros[name]
    one = None if bases is None else bases[name]
    found[name] = finiteness.flags(one, None if references is None else zero, x)
    deltas[name] = interpreter.task_vectors(x, None if subtracted else zero, widths[name])

  def run(chains: bool) -> Callable[..., dict[str, Array]]:
    own = deal._replace(chains=chains)
    return functools.partial(transform, method, layout=layout, deal=own)

  merged = rewrites.chosen(run, deal.chains)(deltas, zeros, ready)
  out = {}
  for name, leaf in stacks.items():
    own = None if bases is None else bases[name]
    out[name] = interpreter.added(name, merged[name], own, leaf.dtype if own is None else own.dtype)
    found[name] = found[name]._replace(merged=finiteness.sound(out[name], name in variances))
  return out, found


def _reordered(x: Array, order: Array) -> Array:
  # The gather along a task axis that explicit axes shard must say where its result lies.
  return x.at[order].get(out_sharding=jax.typeof(x).sharding)
