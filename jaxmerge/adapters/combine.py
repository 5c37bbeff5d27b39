"""LoRA adapters in memory: added to a model, stacked, averaged, compressed.

An adapter is a dict from the names of matrices to their low-rank factors. `merged` merges what
adapters add, by any method, to a model; `flora`, `averaged` and `recompressed` are rules for the
factors, from adapters to an adapter, which `applied` adds to a model; `extracted` goes back.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any  # Any: arrays of jax, or of NumPy where loaded.

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import arguments, finiteness, layouts, lora, memory, tree, views, wide
from jaxmerge.io import adapter as peft
from jaxmerge.io import atomic, names, safetensors
from jaxmerge.io.tensor import Files
from jaxmerge.lora import Adapter, Lora, Swapped
from jaxmerge.stage import Method
from jaxmerge.tree import Tree

Path = str | os.PathLike[str]


@wide.aware
def applied(params: Tree, adapter: Adapter | Any, *, layout: layouts.Said | None = ()) -> Tree:
  """Adds an adapter to a model: its matrices become matrix + scale * b @ a.

  A matrix is the leaf of the adapter's name, or that name with `/kernel` or `.weight`. Leaves have
  the view that `layout` says, else that of their library (see `jaxmerge.layouts`); of two axes of
  which that says nothing the outputs are the first.

  Raises:
    ValueError: naming the matrix that the model does not have, or that has another shape.

  Example:
    >>> params = {"dense": {"kernel": jnp.zeros((3, 2))}}
    >>> adapter = {"dense": Lora(jnp.array([[1.0, 0.0, 2.0]]), jnp.array([[1.0], [3.0]]))}
    >>> applied(params, adapter)["dense"]["kernel"].tolist()
    [[1.0, 3.0], [0.0, 0.0], [2.0, 6.0]]
  """
  adapter, leaves, changed = arguments.adapter(adapter), tree.named(params), {}
  for leaf, own in lora.placed(leaves, adapter, layout).items():
    x, delta = jnp.asarray(leaves[leaf]), own.delta()
    wide = tree.compute_dtype(x.dtype, delta.dtype)
    changed[leaf] = (x.astype(wide) + delta.astype(wide)).astype(x.dtype)
  return tree.rebuild(params, leaves | finiteness.checked(changed))


@wide.aware
def merged(
  method: Method | Any,
  base: Tree,
  adapters: Sequence[Adapter] | Any,
  *,
  aux: Mapping[str, Any] | None = None,
  seed: int | jax.Array | None = None,
  names: Sequence[str] | None = None,
  layout: layouts.Said | None = (),
) -> Tree:
  """Merges what K adapters add to a model: base + M(scale * b @ a of each). Like `jaxmerge.merge`.

  The task vectors are the products themselves, of the factors' ranks, which may differ; those of
  the models that `applied` makes are rounded where the base is added. Only leaves that some adapter
  has are merged: they alone are counted by methods that count over the tree, as `ties` does. The
  others are the base's. An adapter adds zero to a leaf that only others have.

  Args:
    method: what `jaxmerge.methods` makes.
    base: tree of arrays [*s].
    adapters: a list, one a task, or a dict of them by name.
    aux: numbers by name, in place of the method's own; trees of them have the merged leaves.
    seed: for methods with random masks.
    names: names of the adapters; masks depend on them.
    layout: matrix views. Leaves lie as for `applied`, and the method has the same view of them.

  Raises:
    ValueError: naming the matrix that the model does not have, or that has another shape, and what
      `jaxmerge.merge` refuses.

  Example:
    >>> from jaxmerge import methods
    >>> base = {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    >>> one = {"dense": Lora(jnp.array([[1.0, 0.0]]), jnp.array([[4.0], [2.0]]))}
    >>> two = {"dense": Lora(jnp.array([[1.0, 1.0]]), jnp.array([[0.0], [3.0]]))}
    >>> merged(methods.magmax(1.0), base, [one, two])["dense"]["kernel"].tolist()
    [[5.0, 4.0], [1.0, 4.0]]
  """
  method, leaves = arguments.method(method), tree.named(base)
  adapters, names = arguments.adapters(adapters, names)
  placed = [lora.placed(leaves, own, layout) for own in adapters]
  rules = {leaf: own.rule for each in placed for leaf, own in each.items()}
  if not rules:
    raise ValueError(f"{len(placed)} adapters without a matrix are given: there is none to merge.")

  def stack(leaf: str) -> jax.Array:
    added = [each[leaf].delta() if leaf in each else None for each in placed]
    dtype = tree.compute_dtype(leaves[leaf].dtype, *(x.dtype for x in added if x is not None))
    # What is added to these zeros lies on the devices on which the base lies.
    zero = jnp.zeros_like(leaves[leaf], dtype=dtype)
    return jnp.stack([zero if x is None else zero + x.astype(dtype) for x in added])

  out = memory.merge(
    method,
    {leaf: leaves[leaf] for leaf in rules},
    {leaf: stack(leaf) for leaf in rules},
    aux=aux,
    seed=seed,
    names=names,
    layout=layouts.fitted(method, {n: np.shape(leaves[n]) for n in rules}, rules),
    deltas=True,
  )
  return tree.rebuild(base, leaves | out)


@wide.aware
def extracted(
  base: Tree,
  model: Tree,
  matrices: Iterable[str],
  rank: int,
  *,
  layout: layouts.Said | None = (),
) -> dict[str, Lora]:
  """Makes an adapter of what a model adds to its base: the nearest matrices of a rank.

  Args:
    base: tree of arrays [*s].
    model: tree of arrays [*s].
    matrices: their names, as for `applied`; of an adapter, those that it has.
    rank: of the adapter, or less where a matrix has fewer rows or columns.
    layout: matrix views, as for `applied`.

  Raises:
    ValueError: naming the matrix that is not there, or the leaf that differs in shape.

  Example:
    >>> base, model = {"w": jnp.ones((2, 2))}, {"w": jnp.array([[4.0, 1.0], [1.0, 2.0]])}
    >>> print(np.abs(extracted(base, model, ["w"], 1)["w"].delta()).round(5))
    [[3. 0.]
     [0. 0.]]
  """
  tree.check_same(base, model, left="the base", right="the model", dtype=False)
  leaves, tuned = tree.named(base), tree.named(model)
  rules = layouts.of_leaves(leaves, layout)

  def nearest(name: str) -> Lora:
    leaf, view, _ = lora.place(leaves, name, rules)
    tau = memory.task_vectors(jnp.asarray(tuned[leaf])[None], jnp.asarray(leaves[leaf]))
    return _nearest(views.rows(tau, view)[0], rank)

  return _sound({name: nearest(name) for name in matrices})


@wide.aware
def flora(
  adapters: Sequence[Adapter] | Any, weights: Sequence[float] | None = None
) -> dict[str, Lora]:
  """Stacks adapters: one adapter that adds the weighted sum of what they add, without any error.

  Its rank is the sum of theirs, which may differ. A matrix that an adapter does not have counts as
  one to which it adds nothing.

  Args:
    adapters: one a client or task.
    weights: of the adapters; else equal ones that add up to 1.

  Reference: Wang et al. 2024, FLoRA (arXiv:2409.05976).

  Example:
    >>> one = {"w": Lora(jnp.array([[1.0, 2.0]]), jnp.array([[1.0], [0.0]]))}
    >>> two = {"w": Lora(jnp.array([[0.0, 2.0]]), jnp.array([[0.0], [1.0]]), 2.0)}
    >>> flora([one, two])["w"].delta().tolist()
    [[0.5, 1.0], [0.0, 2.0]]
  """
  adapters, _ = arguments.adapters(adapters, None)
  shares = _shares(adapters, weights)

  def stacked(name: str) -> Lora:
    own = [(s * x[name].scale, x[name]) for s, x in _with(name, shares, adapters)]
    a = jnp.concatenate([_times(factor, x.a) for factor, x in own])
    b = jnp.concatenate([jnp.asarray(x.b) for _, x in own], axis=1)
    return _kind(name, [x for _, x in own])(a, b)

  return _sound({name: stacked(name) for name in _names(adapters)})


@wide.aware
def averaged(
  adapters: Sequence[Adapter] | Any, weights: Sequence[float] | None = None, *, pad: bool = False
) -> dict[str, Lora]:
  """Averages the factors one by one, as federated averaging does: products get cross terms.

  For comparison with `flora`. Ranks must be equal, or `pad` fills lower ones up with zeros.

  Raises:
    ValueError: naming a matrix that some adapter does not have, or has with another rank.

  Example:
    >>> one = {"w": Lora(jnp.array([[2.0]]), jnp.array([[1.0]]))}
    >>> two = {"w": Lora(jnp.array([[0.0]]), jnp.array([[3.0]]))}
    >>> averaged([one, two])["w"].delta().tolist()
    [[2.0]]
  """
  adapters, _ = arguments.adapters(adapters, None)
  shares = _shares(adapters, weights)

  def mean(name: str) -> Lora:
    own = _with(name, shares, adapters)
    ranks = [x[name].rank for _, x in own]
    if len(own) < len(adapters) or (len(set(ranks)) > 1 and not pad):
      found = [x[name].rank if name in x else 0 for x in adapters]
      raise ValueError(
        f"factors of {name!r} cannot be averaged: their ranks are {found}; stack them (flora)"
        + (", or fill them up with zeros (pad=True)." if all(found) else ".")
      )
    short = [(s, x[name], (0, max(ranks) - x[name].rank)) for s, x in own]
    a = sum(_times(s, jnp.pad(x.a, (more, (0, 0)))) for s, x, more in short)
    # The scale goes to b: it may differ from adapter to adapter.
    b = sum(_times(s * x.scale, jnp.pad(x.b, ((0, 0), more))) for s, x, more in short)
    return _kind(name, [x[name] for _, x in own])(a, b)

  return _sound({name: mean(name) for name in _names(adapters)})


@wide.aware
def recompressed(adapter: Adapter | Any, rank: int) -> dict[str, Lora]:
  """Brings an adapter to a lower rank: the nearest matrices of that rank.

  The matrices themselves are never made: the decomposition is that of the factors' triangles.

  Example:
    >>> adapter = {"w": Lora(jnp.diag(jnp.array([3.0, 1.0])), jnp.eye(2))}
    >>> print(np.abs(recompressed(adapter, 1)["w"].delta()).round(5))
    [[3. 0.]
     [0. 0.]]
  """
  adapter = arguments.adapter(adapter)
  product = functools.partial(jnp.matmul, precision="highest")

  def nearest(own: Lora) -> Lora:
    dtype = tree.compute_dtype(own.a.dtype, own.b.dtype)
    b, left = jnp.linalg.qr(jnp.asarray(own.b).astype(dtype))
    a, right = jnp.linalg.qr(jnp.asarray(own.a).astype(dtype).T)
    core = _nearest(product(left, right.T) * jnp.asarray(own.scale, dtype), rank)
    return type(own)(
      product(core.a, a.T).astype(own.a.dtype), product(b, core.b).astype(own.b.dtype)
    )

  return _sound({name: nearest(own) for name, own in adapter.items()})


def load(folder: Path, *, rename: Mapping[str, str] | None = None) -> dict[str, Lora]:
  """Reads an adapter of PEFT, its factors in the dtype of the files.

  Args:
    folder: of the adapter.
    rename: beginnings of names of its matrices to others, where those of a model are not the same.

  Raises:
    FileNotFoundError: where a file is missing.
    ValueError: naming the tensor that is no plain LoRA factor of a matrix: merge by the models that
      such adapters make.
  """
  with contextlib.closing(Files()) as files:
    own = peft.factors(folder, files)
    return {
      names.renamed(name, rename or {}): (Swapped if x.transposed else Lora)(
        wide.copied(x.a), wide.copied(x.b), x.scale
      )
      for name, x in own.items()
    }


def save(folder: Path, adapter: Adapter | Any, *, replace: bool = False) -> pathlib.Path:
  """Writes an adapter as PEFT reads it; scales are multiplied into a.

  Raises:
    FileExistsError: where the folder is there and `replace` is not set.
    ValueError: where models store some of its matrices as [in, out], and others as [out, in], and
      for NaN or infinity.
  """
  adapter = arguments.adapter(adapter)
  swapped = {isinstance(own, Swapped) for own in adapter.values()}
  if len(swapped) > 1:
    raise ValueError("some matrices lie [in, out] and others [out, in]: save two adapters.")
  ranks = {name: own.rank for name, own in adapter.items()}
  tensors = {}
  for name, own in adapter.items():
    for part, x in {"A": _times(own.scale, own.a), "B": own.b}.items():
      if not bool(jnp.isfinite(x).all()):
        text = f"lora_{part} of {name!r} has NaN or infinity in {x.dtype}, with its scale in A"
        raise ValueError(f"{text}; save an adapter of finite numbers, or of a wider dtype.")
      tensors[f"base_model.model.{name}.lora_{part}.weight"] = np.asarray(x)
  config: dict[str, Any] = {"peft_type": "LORA", "bias": "none"}
  config |= {"r": max(ranks.values(), default=1), "lora_alpha": max(ranks.values(), default=1)}
  # PEFT takes a pattern for the end of a name as well, and a dot for any character.
  other = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != config["r"]}
  config["fan_in_fan_out"] = swapped == {True}
  config |= {"rank_pattern": other, "alpha_pattern": other, "target_modules": sorted(ranks)}
  with atomic.folder(folder, replace=replace) as beside:
    safetensors.save(beside / peft.WEIGHTS, tensors)
    (beside / peft.CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
  return pathlib.Path(folder)


def _nearest(x: jax.Array, rank: int) -> Lora:
  if rank < 1:
    raise ValueError(f"rank must be at least 1, got {rank}.")
  u, s, vt = jnp.linalg.svd(x, full_matrices=False)
  kept = min(rank, s.shape[0])
  root = jnp.sqrt(s[:kept])
  return Lora(root[:, None] * vt[:kept], u[:, :kept] * root[None])


def _sound(adapter: dict[str, Lora]) -> dict[str, Lora]:
  """An adapter whose factors are finite; ValueError for others, where they can be looked at."""
  parts = {"a": "lora_A", "b": "lora_B"}
  finiteness.checked(
    {f"{n}.{said}": getattr(own, x) for n, own in adapter.items() for x, said in parts.items()}
  )
  return adapter


def _kind(name: str, own: Sequence[Lora]) -> type[Lora]:
  """Whether models store a matrix the other way round: all its adapters must say the same."""
  kinds = {type(x) for x in own}
  if len(kinds) > 1:
    raise ValueError(f"{name!r} lies [in, out] by some of its adapters, and [out, in] by others.")
  return kinds.pop()


def _times(factor: Any, x: Any) -> jax.Array:
  wide = tree.compute_dtype(x.dtype)
  return (jnp.asarray(factor, wide) * jnp.asarray(x).astype(wide)).astype(x.dtype)


def _names(adapters: Sequence[Adapter]) -> list[str]:
  return sorted({name for own in adapters for name in own})


def _shares(adapters: Sequence[Adapter], weights: Sequence[float] | None) -> list[float]:
  if not adapters:
    raise ValueError("no adapters are given.")
  if weights is None:
    return [1 / len(adapters)] * len(adapters)
  if len(weights) != len(adapters):
    raise ValueError(f"{len(adapters)} adapters need as many weights, got {list(weights)}.")
  return [float(w) for w in weights]


def _with(name: str, shares: Sequence[float], adapters: Sequence[Adapter]) -> list[Any]:
  return [(s, own) for s, own in zip(shares, adapters, strict=True) if name in own]
