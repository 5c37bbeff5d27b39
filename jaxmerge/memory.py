"""The driver for models in memory: `merge` and `blend`, under jit, vmap, grad and meshes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple  # Any: trees and numbers of many kinds.

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmerge import catalog, stage, tree, views
from jaxmerge.stage import Array, Group, Leaf, Method, Stage
from jaxmerge.tree import Tree


def merge(
  method: Method,
  base: Tree,
  models: Tree,
  *,
  aux: Mapping[str, Any] | None = None,
  seed: int | Array | None = None,
  names: Sequence[str] | None = None,
  reference: Tree | None = None,
  layout: Sequence[tuple[str, str]] = (),
) -> Tree:
  """Merges task vectors and adds the result to the base: base + M(models - base).

  Computes in float32 or wider and returns the base's dtypes. Leaves that are not floating point are
  copied from the base. Works under jit, vmap and grad, on sharded arrays too.

  Args:
    method: what `jaxmerge.methods` makes.
    base: tree of arrays [*s].
    models: stack of K models, [K, *s], as `jaxmerge.stack` makes it.
    aux: numbers by name, in place of the method's own: a scalar, one per model [K], or a tree with one
      of these, or an array [K, *s], per leaf. Other numbers do not compile again.
    seed: for methods with random masks.
    names: names of the models. Masks depend on them and not on the order; without them the models
      are called "0", "1", and so on.
    reference: what is subtracted from the models, if not the base.
    layout: matrix views, (regular expression, view), see `jaxmerge.views`.

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
  reference = base if reference is None else reference
  check_models(base, models, reference)
  aux = dict(aux or {}, **({} if seed is None else {"seed": seed}))
  return _driven(method, base, reference, models, aux, names, layout)


def blend(
  method: Method,
  models: Tree,
  *,
  aux: Mapping[str, Any] | None = None,
  seed: int | Array | None = None,
  names: Sequence[str] | None = None,
  layout: Sequence[tuple[str, str]] = (),
) -> Tree:
  """Merges the weights themselves, without a base: M(models). Arguments as for `merge`.

  Leaves that are not floating point are copied from the first model and must be equal in all.
  """
  for name, leaf in tree.named(models).items():
    if not tree.is_floating(leaf) and not isinstance(leaf, jax.core.Tracer):
      differs = np.any(np.asarray(leaf) != np.asarray(leaf)[:1])
      if differs:
        raise ValueError(
          f"leaf {name!r} is {leaf.dtype} and differs between models; drop it first."
        )
  tree.height(models)
  aux = dict(aux or {}, **({} if seed is None else {"seed": seed}))
  return _driven(method, None, None, models, aux, names, layout)


def check_models(base: Tree, models: Tree, reference: Tree) -> None:
  """Raises ValueError, naming the leaf, where base, reference and stack do not belong together."""
  tree.height(models)
  one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), models)
  tree.check_same(base, one, left="the base", right="the models", dtype=False)
  tree.check_same(base, reference, left="the base", right="the reference", dtype=False)
  for name, leaf in tree.named(base).items():
    if tree.is_floating(leaf) != tree.is_floating(tree.named(models)[name]):
      raise ValueError(
        f"leaf {name!r} is {leaf.dtype} in the base but {tree.named(models)[name].dtype} in the models."
      )


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
) -> Ready:
  """Resolves numbers, orders the models by tag, and computes counts on the host.

  Args:
    method: the method that will run.
    shapes: shapes of the leaves that are merged, without the task axis.
    height: number of models K.
    aux: numbers given by the caller.
    names: names of the models, or None.

  Raises:
    ValueError: for unknown, missing or ill-shaped numbers and for names that are not K different ones.
  """
  order, tags = _ordered(names, height)
  values = _numbers(method, aux, shapes, height)
  if order is not None:
    values = {n: _permuted(v, order, height) for n, v in values.items()}
  known = []
  for step in method:
    groups = members(step, shapes)
    known.append(
      {g: step.init(_group(g, names_in, shapes, height, values)) for g, names_in in groups.items()}
    )
    height = 1 if step.combines else height
  arrays = {n: jax.tree.map(_array, v, is_leaf=catalog.plain) for n, v in values.items()}
  return Ready(arrays, tags, order, tuple(known))


def members(step: Stage, names: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
  """Returns the leaves that a stage acts on, by group."""
  groups: dict[str, list[str]] = {}
  for name in names:
    if step.where is None or step.where(name):
      groups.setdefault(step.group(name), []).append(name)
  return {group: tuple(found) for group, found in groups.items()}


def offsets(step: Stage, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.uint32]:
  """Counts, for each leaf that a stage acts on, the entries before it in its group."""
  out = {}
  for names in members(step, shapes).values():
    sizes = [math.prod(shapes[n]) for n in names]
    # Wraps past 2**32, where ranking by position is refused.
    out.update({n: np.uint32(sum(sizes[:i]) % 2**32) for i, n in enumerate(names)})
  return out


def transform(
  method: Method,
  models: dict[str, Array],
  base: Mapping[str, Array] | None,
  ready: Ready,
  layout: views.Views = (),
) -> dict[str, Array]:
  """Runs a method over leaves by name: stacks [K, *s] -> stacks [M, *s]. To be called while tracing."""
  x: dict[str, Any] = dict(models)
  kept: dict[str, list[Array]] = {name: [] for name in x}
  for step, first in zip(method, ready.known, strict=True):
    shapes = {n: v.shape[1:] for n, v in x.items()}
    before = offsets(step, shapes)
    for group, names in members(step, x).items():
      leaves = {n: leaf_of(n, shapes[n], base, ready)._replace(offset=before[n]) for n in names}
      known = dict(first[group])
      for statistic in step.statistics:
        measured = functools.partial(_measure_all, statistic, x, leaves, known)
        known[statistic.name] = passes(statistic, known, measured)
      for n in names:
        x[n] = update(step, x[n], leaves[n], known, kept[n], views.view_of(n, layout))
  return x


def passes(statistic: stage.Statistic, known: Any, measured: Callable[[Any], Any]) -> Any:
  """Runs the passes of a statistic; `measured(state)` is the total over all leaves."""

  def one(_: Any, state: Any) -> Any:
    return statistic.refine(state, measured(state), known)

  state = statistic.begin(known)
  return one(0, state) if statistic.passes == 1 else lax.fori_loop(0, statistic.passes, one, state)


def update(
  step: Stage, x: Array, leaf: Leaf, known: Any, kept: list[Array], view: str | None
) -> Array:
  """Applies one stage to one part of a leaf; `kept` is what `join` holds for it."""
  if step.keep == "push":
    kept.append(x)
    return x
  if step.keep == "pop":
    return step.update(kept.pop(), x, leaf)
  if step.unit == "entry":
    return step.update(x, leaf, known)
  if view is None:
    if step.rest is None:
      raise ValueError("a leaf has no matrix view; declare it in `layout` or mask the method.")
    return step.rest(x, leaf, known)
  seen = views.rows(views.whole(x), view)
  part = leaf._replace(base=None, shape=seen.shape[1:], start=jnp.int32(0))
  return views.from_rows(step.update(seen, part, known), view, x.shape[1:])


def leaf_of(
  name: str, shape: tuple[int, ...], base: Mapping[str, Array] | None, ready: Ready
) -> Leaf:
  """Describes a whole leaf to a stage."""
  aux = {n: v[name] if isinstance(v, dict) else v for n, v in ready.aux.items()}
  return Leaf(
    base=None if base is None else base[name],
    aux=aux,
    models=ready.tags,
    tag=jnp.uint32(tree.tag(name)),
    start=jnp.int32(0),
    shape=tuple(shape),
    offset=np.uint32(0),
  )


def _measure_all(
  statistic: stage.Statistic, x: dict[str, Array], leaves: dict[str, Leaf], known: Any, state: Any
) -> Any:
  parts = [statistic.measure(x[n], leaf, state, known) for n, leaf in leaves.items()]
  return functools.reduce(lambda a, b: jax.tree.map(statistic.combine, a, b), parts)


def _driven(
  method: Method,
  base: Tree | None,
  reference: Tree | None,
  models: Tree,
  aux: Mapping[str, Any],
  names: Sequence[str] | None,
  layout: Sequence[tuple[str, str]],
) -> Tree:
  stacks = tree.named(models)
  shapes = {n: leaf.shape[1:] for n, leaf in stacks.items() if tree.is_floating(leaf)}
  ready = prepare(method, shapes, tree.height(models), aux, names)
  out, finite = _compiled(base, reference, models, ready, method=method, layout=views.check(layout))
  if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((finite, out))):
    refuse_nonfinite(jax.device_get(finite), names, ready.order)
  return out


def refuse_nonfinite(
  finite: Mapping[str, tuple[Any, Any]], names: Sequence[str] | None, order: Any = None
) -> None:
  """Raises ValueError that names the first leaf and model whose flag is False.

  Args:
    finite: flags by leaf: of the base or reference, and [K] of the models in the order of their tags.
    names: names of the models, or None.
    order: where each of the models was in the caller's stack.
  """
  for name, (base, models) in finite.items():
    if not base:
      raise ValueError(f"leaf {name!r} of the base has NaN or infinity.")
    if np.all(models):
      continue
    first = int(np.argmin(models))
    k = first if order is None else int(order[first])
    raise ValueError(f"leaf {name!r} of model {names[k] if names else k} has NaN or infinity.")


@functools.partial(jax.jit, static_argnames=("method", "layout"))
def _compiled(
  base: Tree | None,
  reference: Tree | None,
  models: Tree,
  ready: Ready,
  *,
  method: Method,
  layout: views.Views,
) -> tuple[Tree, dict[str, tuple[Array, Array]]]:
  stacks = tree.named(models)
  bases = None if base is None else tree.named(base)
  references = None if reference is None else tree.named(reference)
  deltas, finite = {}, {}
  for name, leaf in stacks.items():
    if not tree.is_floating(leaf):
      continue
    x = leaf if ready.order is None else jnp.take(leaf, ready.order, axis=0)
    zero = None if references is None else references[name]
    deltas[name], finite[name] = task_vectors(x, zero)
  merged = transform(method, deltas, references, ready, layout)
  out = {}
  for name, leaf in stacks.items():
    if name in merged:
      out[name] = added(name, merged[name], None if bases is None else bases[name], leaf.dtype)
    else:
      out[name] = leaf[0] if bases is None else bases[name]
  return tree.rebuild(models if base is None else base, out), finite


def task_vectors(x: Array, reference: Array | None) -> tuple[Array, tuple[Array, Array]]:
  """Returns models - reference [K, *s] in the dtype to compute in, and whether both are finite."""
  dtype = tree.compute_dtype(x.dtype)
  flags = jnp.isfinite(x).all(axis=tuple(range(1, x.ndim)))
  if reference is None:
    return x.astype(dtype), (jnp.bool_(True), flags)
  # Upcast before subtracting: bfloat16 loses the low bits of a small task vector.
  dtype = jnp.promote_types(dtype, tree.compute_dtype(reference.dtype))
  delta = x.astype(dtype) - reference.astype(dtype)[None]
  return delta, (jnp.isfinite(reference).all(), flags)


def added(name: str, merged: Array, base: Array | None, dtype: Any) -> Array:
  """Adds a merged task vector [1, *s] to the base, and casts: the one place that does.

  Raises:
    ValueError: if the height is not 1, that is if no combiner touched the leaf.
  """
  if merged.shape[0] != 1:
    raise ValueError(
      f"no combiner touched leaf {name!r}: {merged.shape[0]} models are left of it after the last stage."
    )
  if base is None:
    return merged[0].astype(dtype)
  wide = jnp.promote_types(merged.dtype, tree.compute_dtype(base.dtype))
  return (base.astype(wide) + merged[0].astype(wide)).astype(base.dtype)


def _ordered(names: Sequence[str] | None, height: int) -> tuple[Any, np.ndarray]:
  given = [str(k) for k in range(height)] if names is None else list(names)
  if len(given) != height or len(set(given)) != height:
    raise ValueError(f"names must be {height} different names, one per model, got {given}.")
  tags = np.array([tree.tag(n) for n in given], np.uint32)
  if names is None:
    return None, tags
  order = np.argsort(tags, kind="stable")
  return (None if (order == np.arange(height)).all() else order), tags[order]


def _numbers(
  method: Method, aux: Mapping[str, Any], shapes: Mapping[str, Any], height: int
) -> dict[str, Any]:
  """The method's numbers, with the caller's values in place of the defaults."""
  values = stage.numbers(method)
  for name, value in aux.items():
    if name not in values:
      raise ValueError(f"the method takes no number {name!r}{catalog.nearest(name, values)}.")
    values[name] = value
  for name, value in values.items():
    if value is None:
      raise ValueError(f"the method needs {name!r}: give {name}= or aux={{{name!r}: ...}}.")
    if _per_leaf(value):
      value = values[name] = tree.named(value)
      missing = sorted(shapes.keys() - value.keys())
      if missing:
        raise ValueError(f"aux {name!r} has no value for leaf {missing[0]!r}.")
      value = {n: v for n, v in value.items() if n in shapes}
    for v in value.values() if isinstance(value, dict) else [value]:
      if catalog.plain(v):
        catalog.check_number(name, v)
      if np.ndim(v) == 1 and np.shape(v)[0] != height:
        raise ValueError(f"{name} has {np.shape(v)[0]} values, but there are {height} models.")
  return values


def _per_leaf(value: Any) -> bool:
  return not catalog.plain(value) and not isinstance(value, (jax.Array, np.ndarray, np.generic))


def _permuted(value: Any, order: np.ndarray, height: int) -> Any:
  if isinstance(value, dict):
    return {n: _permuted(v, order, height) for n, v in value.items()}
  if isinstance(value, (list, tuple)):
    return type(value)(value[k] for k in order)
  return value[order] if np.ndim(value) and value.shape[0] == height else value


def _group(
  group: str,
  names: tuple[str, ...],
  shapes: Mapping[str, tuple[int, ...]],
  height: int,
  values: Mapping[str, Any],
) -> Group:
  size = sum(int(np.prod(shapes[n], dtype=np.int64)) for n in names)
  # A number per leaf is a number of the group where the group is that leaf.
  own = {n: v[names[0]] if isinstance(v, dict) else v for n, v in values.items()}
  for n, v in values.items():
    if isinstance(v, dict) and len(names) > 1 and np.ndim(v[names[0]]) <= 1:
      own[n] = None
  return Group(size, height, own)


def _array(value: Any) -> Any:
  """Plain numbers as arrays, so that another value is not another program."""
  if not catalog.plain(value):
    return value
  whole = all(isinstance(v, int) for v in np.ravel(np.asarray(value, object)))
  if whole and np.min(value) >= 0 and np.max(value) < 2**32 and np.max(value) >= 2**24:
    return np.asarray(value, np.uint32)
  return np.asarray(value, np.float32)
