"""The driver for models in memory: `merge` and `blend`, under jit, vmap, grad and meshes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple  # Any: trees and numbers of many kinds.

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import (
  arguments,
  dealing,
  finiteness,
  layouts,
  moments,
  resolving,
  stage,
  statistics,
  tree,
  unrolling,
  views,
  wide,
)
from jaxmerge import mesh as meshes
from jaxmerge.methods import averaging
from jaxmerge.stage import Array, Leaf, Method, Stage
from jaxmerge.tree import Tree


@wide.aware
def merge(
  method: Method | Any,
  base: Tree,
  models: Any,  # A stack; what else is taken for several models, `arguments` says.
  *,
  aux: Mapping[str, Any] | None = None,
  seed: int | Array | None = None,
  names: Sequence[str] | None = None,
  reference: Tree | None = None,
  layout: layouts.Said | layouts.Table | None = (),
  deltas: bool = False,
) -> Tree:
  """Merges task vectors and adds the result to the base: base + M(models - base).

  Computes in float32 or wider and returns the base's dtypes. Leaves that are not floating point are
  copied from the base. Works under jit, vmap and grad, on sharded arrays too: methods of matrices
  share these out over the mesh, in a program of yours over that of its arrays' types or of
  `jax.set_mesh`; where it knows of none, every device works on every matrix.

  Args:
    method: what `jaxmerge.methods` makes.
    base: tree of arrays [*s].
    models: stack of K models, [K, *s]; or a list of trees like the base, or a dict of them by name.
    aux: numbers by name, in place of the method's own: a scalar, one per model [K], or a tree with
      one of these, or an array [K, *s], per leaf. Other numbers do not compile again.
    seed: for methods with random masks.
    names: names of the models. Masks depend on them and not on the order; without them the models
      are called "0", "1", and so on. Methods to which the order matters keep that of the stack.
    reference: what is subtracted from the models, if not the base.
    layout: (regular expression, view or None): matrix views before those of `jaxmerge.layouts`.
    deltas: the models are task vectors: nothing is subtracted from them.

  Raises:
    ValueError: naming the leaf, for trees that do not match, NaN or infinity (where values can be
      looked at), unknown numbers, numbers out of range, or a leaf that no combiner touched.

  Example:
    >>> import jax.numpy as jnp, jaxmerge
    >>> base = {"w": jnp.zeros(2)}
    >>> experts = jaxmerge.stack([{"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([3.0, 4.0])}])
    >>> jaxmerge.merge(jaxmerge.methods.average(), base, experts)["w"].tolist()
    [2.0, 2.0]
  """
  method = arguments.method(method)
  models, names = arguments.stacked(base, models, names)
  check_models(base, models, base if reference is None else reference)
  aux = arguments.numbers(aux, seed)
  return _driven(method, base, reference, models, aux, names, layout, deltas)


@wide.aware
def blend(
  method: Method | Any,
  models: Tree,
  *,
  aux: Mapping[str, Any] | None = None,
  seed: int | Array | None = None,
  names: Sequence[str] | None = None,
  layout: layouts.Said | layouts.Table | None = (),
  deltas: bool = False,
) -> Tree:
  """Merges the weights themselves, without a base: M(models). Arguments as for `merge`.

  Leaves that are not floating point are copied from the first model and must be equal in all. With
  `deltas` the models are task vectors, and so is the result; methods of task vectors ask for that.

  Example:
    >>> import jax.numpy as jnp, jaxmerge
    >>> models = {"w": jnp.array([[1.0, 0.0], [3.0, 4.0]])}
    >>> jaxmerge.blend(jaxmerge.methods.average(weight=(3.0, 1.0)), models)["w"].tolist()
    [1.5, 1.0]
  """
  method, models = arguments.method(method), arguments.blended(models)
  if not deltas:
    arguments.refuse_weights(method, "merge(method, base, models)", "blend(..., deltas=True)")
  tree.height(models)
  tree.refuse_complex(None, models)
  for name, leaf in tree.named(models).items():
    if tree.is_floating(leaf) or isinstance(leaf, jax.core.Tracer):
      continue
    if not tree.is_equal(leaf, leaf[:1]):
      raise ValueError(f"leaf {name!r} is {leaf.dtype} and differs between models; drop it first.")
  aux = arguments.numbers(aux, seed)
  return _driven(method, None, None, models, aux, names, layout, deltas)


def check_models(base: Tree, models: Tree, reference: Tree) -> None:
  """Raises ValueError, naming the leaf, where base, reference and stack do not belong together."""
  tree.height(models)
  one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), models)
  tree.check_same(base, one, left="the base", right="the models", dtype=False)
  tree.check_same(base, reference, left="the base", right="the reference", dtype=False)
  tree.refuse_complex(base, models)
  stacks = tree.named(models)
  for name, leaf in tree.named(base).items():
    dtype = stacks[name].dtype
    if tree.is_floating(leaf) != tree.is_floating(stacks[name]):
      raise ValueError(f"leaf {name!r} is {leaf.dtype} in the base but {dtype} in the models.")


class Ready(NamedTuple):
  """Numbers, tags and first knowledge of a merge: arrays, hence arguments of compiled programs."""

  aux: dict[str, Any]
  tags: Any
  order: Any
  known: tuple[dict[str, Any], ...]


def prepare(
  method: Method,
  shapes: Mapping[str, tuple[int, ...]],
  height: int,
  aux: Mapping[str, Any],
  names: Sequence[str] | None,
  copied: Collection[str] = (),
) -> Ready:
  """Resolves numbers, orders the models by tag, and computes counts on the host.

  Args:
    method: the method that will run.
    shapes: shapes of the leaves that are merged, without the task axis.
    height: number of models K.
    aux: numbers given by the caller.
    names: names of the models, or None.
    copied: names of the leaves that are not merged.

  Raises:
    ValueError: for unknown, missing or ill-shaped numbers, for names that are not K different ones,
      and for a leaf that no combiner will touch.
  """
  order, tags = resolving.ordered(names, height, keep=stage.ordered(method))
  values = resolving.resolved(method, aux, shapes, height, copied)
  if order is not None:
    values = {n: resolving.permuted(v, order) for n, v in values.items()}
  heights, known = dict.fromkeys(shapes, height), []
  for step in method:
    first = {}
    for group, found in stage.members(step, shapes).items():
      at = max(heights[n] for n in found)
      first[group] = step.init(resolving.group(found, shapes, at, values))
      heights.update(dict.fromkeys(found, 1) if step.combines else {})
    known.append(first)
  for name, left in heights.items():
    resolving.refuse_height(name, left)
  return Ready(resolving.arrays(values), tags, order, tuple(known))


def transform(
  method: Method,
  models: dict[str, Array],
  base: Mapping[str, Array] | None,
  ready: Ready,
  layout: layouts.Table = layouts.NONE,
  deal: dealing.Deal | None = None,
) -> dict[str, Array]:
  """Runs a method over leaves by name, while tracing: stacks [K, *s] -> stacks [M, *s]."""
  x: dict[str, Any] = dict(models)
  kept: dict[str, list[Array]] = {name: [] for name in x}
  for step, first in zip(method, ready.known, strict=True):
    shapes = {n: v.shape[1:] for n, v in x.items()}
    before = stage.offsets(step, shapes)
    for group, names in stage.members(step, x).items():
      leaves = {n: leaf_of(n, base, ready)._replace(offset=before[n]) for n in names}
      known = dict(first[group])
      for statistic in step.statistics:
        parts = [(seen(step, x[n], kept[n]), leaf) for n, leaf in leaves.items()]
        known[statistic.name] = statistics.settled(statistic, parts, known)
      done = dealing.leaves(step, x, leaves, known, layout, deal)
      for n in [n for n in names if n not in done]:
        done[n] = update(step, x[n], leaves[n], known, kept[n], layout.view(n))
      x.update(done)
  return x


def update(
  step: Stage, x: Array, leaf: Leaf, known: Any, kept: list[Array], view: str | None
) -> Array:
  """Applies one stage to one part of a leaf; `kept` is what `join` holds for it."""
  if step.keep == "push":
    kept.append(x)
    return x
  if step.keep == "pop":
    return step.update((kept.pop(), x), leaf, known)
  y = _updated(step, x, leaf, known, view)
  height = 1 if step.combines else x.shape[0]
  if y.shape[0] != height:
    raise ValueError(
      f"a stage made a stack of height {y.shape[0]} of one of height {x.shape[0]}; a combiner must "
      "leave height 1 and say combines=True, other stages keep the height."
    )
  return y


def seen(step: Stage, x: Any, kept: list[Array]) -> Any:
  """Returns what a stage measures: x, or the pair of x and what `join` holds."""
  return (kept[-1], x) if step.keep == "pop" else x


def _updated(step: Stage, x: Array, leaf: Leaf, known: Any, view: str | None) -> Array:
  if not x.size:  # There are no rows, or no entries in them.
    return x[:1] if step.combines else x
  if step.unit == "entry":
    return step.update(x, leaf, known)
  view = layouts.seen(view, layouts.Unit(step.unit, step.lookups))
  if view is None:
    if step.rest is None:
      raise ValueError("a leaf has no matrix view; declare it in `layout` or mask the method.")
    if step.rest != "row":
      own = None if leaf.places is None else leaf.places.reshape(1, *x.shape[1:])
      return step.rest(x, leaf._replace(places=own), known)
  view = views.or_row(x, view)
  if step.unit == "matrix":
    return views.by_matrix(
      lambda own, base: step.update(own, leaf._replace(base=base, places=None), known),
      x,
      leaf.base,
      view,
    )
  rows = views.rows(views.whole(x), view)
  base = None if leaf.base is None else views.rows(views.whole(leaf.base[None]), view)[0]
  if step.ranked and "ranks" not in known:
    known = {**known, "ranks": statistics.ranks(rows)}
  places = None if leaf.places is None else leaf.places.reshape(1, *rows.shape[1:])
  y = step.update(rows, leaf._replace(base=base, places=places), known)
  return views.from_rows(y, view, x.shape[1:])


def leaf_of(name: str, base: Mapping[str, Array] | None, ready: Ready) -> Leaf:
  """Describes a whole leaf to a stage."""
  aux = {n: v[name] if isinstance(v, dict) else v for n, v in ready.aux.items()}
  return Leaf(
    base=None if base is None else base[name],
    aux=aux,
    models=ready.tags,
    tag=np.uint32(tree.tag(name)),
    start=np.uint32(0),
    offset=np.uint32(0),
  )


def _driven(
  method: Method,
  base: Tree | None,
  reference: Tree | None,
  models: Tree,
  aux: Mapping[str, Any],
  names: Sequence[str] | None,
  layout: layouts.Said | layouts.Table | None,
  deltas: bool = False,
) -> Tree:
  stacks = tree.named(models)
  shapes = {n: np.shape(leaf)[1:] for n, leaf in stacks.items() if tree.is_floating(leaf)}
  method = averaging.with_moments(method, shapes)
  copied = stacks.keys() - shapes.keys()
  ready = prepare(method, shapes, tree.height(models), aux, names, copied)
  # Sums over a task axis that devices share must stay sums, which the compiler makes reductions.
  shared = any(views.over_first(x) for x in stacks.values())
  chains = False if shared else unrolling.pays(stacks.values())
  table = layouts.settled(method, shapes, layout, names=stacks)
  given = dict(method=method, layout=table, subtracted=deltas)
  given["deal"] = dealing.of(stacks.values(), chains)
  parts = [None if t is None else tree.named(t) for t in (base, reference, models)]
  parts = [None if t is None else {n: t[n] for n in shapes} for t in parts]
  likes = stacks if base is None else tree.named(base)
  out = _checked(parts, ready, names, given)
  wide.refuse_narrowed((stacks, likes), parts, aux, out)
  for n in copied:
    out[n] = wide.copied(stacks[n][0] if base is None else likes[n])
  return tree.rebuild(models if base is None else base, out)


def _checked(
  parts: Sequence[Any], ready: Ready, names: Sequence[str] | None, given: Mapping[str, Any]
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
  ready: Ready,
  *,
  method: Method,
  layout: layouts.Table,
  deal: dealing.Deal,
  subtracted: bool = False,
) -> tuple[dict[str, Array], dict[str, finiteness.Flags]]:
  zeros = bases if references is None else references
  if bases is not None and zeros is not None:  # Of running statistics the models' mean is merged.
    zeros = {**zeros, **{n: bases[n] for n in moments.of(stacks)}}
  variances = moments.variances(stacks)
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
    deltas[name] = task_vectors(x, None if subtracted else zero, widths[name])

  def run(chains: bool) -> Callable[..., dict[str, Array]]:
    own = deal._replace(chains=chains)
    return functools.partial(transform, method, layout=layout, deal=own)

  merged = unrolling.chosen(run, deal.chains)(deltas, zeros, ready)
  out = {}
  for name, leaf in stacks.items():
    own = None if bases is None else bases[name]
    out[name] = added(name, merged[name], own, leaf.dtype if own is None else own.dtype)
    found[name] = found[name]._replace(merged=finiteness.sound(out[name], name in variances))
  return out, found


def _reordered(x: Array, order: Array) -> Array:
  # The gather along a task axis that explicit axes shard must say where its result lies.
  return x.at[order].get(out_sharding=jax.typeof(x).sharding)


def task_vectors(x: Array, reference: Array | None, least: Any = np.float32) -> Array:
  """Returns models - reference, [K, *s], in the dtype to compute in, of at least this width."""
  if reference is None:
    return x.astype(tree.compute_dtype(least, x.dtype))
  # Upcast before subtracting: bfloat16 loses the low bits of a small task vector.
  dtype = tree.compute_dtype(least, x.dtype, reference.dtype)
  return x.astype(dtype) - reference.astype(dtype)[None]


def added(name: str, merged: Array, base: Array | None, dtype: Any) -> Array:
  """Adds a merged task vector [1, *s] to the base, and casts: [1, *s] -> [*s].

  Raises:
    ValueError: if the height is not 1.
  """
  resolving.refuse_height(name, merged.shape[0])
  return stored(merged, base, dtype)[0]


def stored(merged: Array, base: Array | None, dtype: Any) -> Array:
  """Adds task vectors [M, *s] to the base, and casts: the one place that does."""
  if base is None:
    return merged.astype(dtype)
  wide = tree.compute_dtype(merged.dtype, base.dtype)
  return (base.astype(wide)[None] + merged.astype(wide)).astype(dtype)
