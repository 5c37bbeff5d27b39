"""LoRA adapters in memory: added to a model, stacked, averaged, compressed.

An adapter is a dict from the names of matrices to their low-rank factors. To merge adapters by any
method, merge the models that they make (`applied`); the rules here stay with the factors.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple  # Any: arrays of jax, or of NumPy where loaded.

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import catalog, tree, views
from jaxmerge.io import adapter as peft
from jaxmerge.io import atomic, safetensors
from jaxmerge.io.tensor import Files
from jaxmerge.tree import Tree

Path = str | os.PathLike[str]


class Lora(NamedTuple):
  """The factors of a matrix of low rank, scale * b @ a.

  Attributes:
    a: [rank, in].
    b: [out, rank].
    scale: number.
  """

  a: Any
  b: Any
  scale: Any = 1.0

  @property
  def rank(self) -> int:
    """Number of rows of a."""
    return self.a.shape[0]

  def delta(self) -> jax.Array:
    """Returns the matrix, [out, in], in float32 or wider."""
    dtype = tree.compute_dtype(self.a.dtype, self.b.dtype)
    a, b = (jnp.asarray(x).astype(dtype) for x in (self.a, self.b))
    return jnp.asarray(self.scale, dtype) * jnp.matmul(b, a, precision="highest")


Adapter = Mapping[str, Lora]


def applied(params: Tree, adapter: Adapter, *, layout: Sequence[tuple[str, str]] = ()) -> Tree:
  """Adds an adapter to a model: its matrices become matrix + scale * b @ a.

  A matrix is the leaf of the adapter's name, or that name with `/kernel` or `.weight`. Leaves have
  the view that `layout` says; else the outputs are the last axis of a kernel, and the first of
  others.

  Raises:
    ValueError: naming the matrix that the model does not have, or that has another shape.

  Example:
    >>> params = {"dense": {"kernel": jnp.zeros((3, 2))}}
    >>> adapter = {"dense": Lora(jnp.array([[1.0, 0.0, 2.0]]), jnp.array([[1.0], [3.0]]))}
    >>> applied(params, adapter)["dense"]["kernel"].tolist()
    [[1.0, 3.0], [0.0, 0.0], [2.0, 6.0]]
  """
  leaves, table = tree.named(params), views.check(layout)
  changed = dict(leaves)
  for name, own in adapter.items():
    leaf = next((n for n in (name, f"{name}/kernel", f"{name}.weight") if n in leaves), None)
    if leaf is None:
      raise ValueError(f"the model has no matrix {name!r}{catalog.nearest(name, leaves)}.")
    x = jnp.asarray(leaves[leaf])
    inner = "i" * (x.ndim - 1)
    usual = f"{inner}o" if leaf.endswith("kernel") else f"o{inner}"
    view = views.view_of(leaf, table) or usual
    delta = own.delta()
    if views.rows(x[None], view).shape[1:] != delta.shape:
      raise ValueError(
        f"the adapter of {name!r} is for a matrix {list(delta.shape)} of outputs and inputs, but "
        f"{leaf!r} is {list(x.shape)}, {view!r}."
      )
    wide = tree.compute_dtype(x.dtype, delta.dtype)
    moved = views.from_rows(delta.astype(wide)[None], view, x.shape)[0]
    changed[leaf] = (x.astype(wide) + moved).astype(x.dtype)
  return tree.rebuild(params, changed)


def flora(adapters: Sequence[Adapter], weights: Sequence[float] | None = None) -> dict[str, Lora]:
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
  shares = _shares(adapters, weights)

  def stacked(name: str) -> Lora:
    own = [(s * x[name].scale, x[name]) for s, x in _with(name, shares, adapters)]
    a = jnp.concatenate([_times(factor, x.a) for factor, x in own])
    return Lora(a, jnp.concatenate([jnp.asarray(x.b) for _, x in own], axis=1))

  return {name: stacked(name) for name in _names(adapters)}


def averaged(
  adapters: Sequence[Adapter], weights: Sequence[float] | None = None, *, pad: bool = False
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
    return Lora(a, b)

  return {name: mean(name) for name in _names(adapters)}


def recompressed(adapter: Adapter, rank: int) -> dict[str, Lora]:
  """Brings an adapter to a lower rank: the nearest matrices of that rank.

  The matrices themselves are never made: the decomposition is that of the factors' triangles.

  Example:
    >>> adapter = {"w": Lora(jnp.diag(jnp.array([3.0, 1.0])), jnp.eye(2))}
    >>> print(np.abs(recompressed(adapter, 1)["w"].delta()).round(5))
    [[3. 0.]
     [0. 0.]]
  """
  if rank < 1:
    raise ValueError(f"rank must be at least 1, got {rank}.")

  product = functools.partial(jnp.matmul, precision="highest")

  def nearest(own: Lora) -> Lora:
    dtype = tree.compute_dtype(own.a.dtype, own.b.dtype)
    b, left = jnp.linalg.qr(jnp.asarray(own.b).astype(dtype))
    a, right = jnp.linalg.qr(jnp.asarray(own.a).astype(dtype).T)
    u, s, vt = jnp.linalg.svd(product(left, right.T) * jnp.asarray(own.scale, dtype))
    kept = min(rank, s.shape[0])
    root = jnp.sqrt(s[:kept])
    a, b = root[:, None] * product(vt[:kept], a.T), product(b, u[:, :kept]) * root[None]
    return Lora(a.astype(own.a.dtype), b.astype(own.b.dtype))

  return {name: nearest(own) for name, own in adapter.items()}


def load(folder: Path) -> dict[str, Lora]:
  """Reads an adapter of PEFT, its factors in the dtype of the files.

  Raises:
    FileNotFoundError: where a file is missing.
    ValueError: naming the tensor that is no plain LoRA factor of a matrix: merge by the models that
      such adapters make.
  """
  with contextlib.closing(Files()) as files:
    return {
      name: Lora(jnp.asarray(a), jnp.asarray(b), scale)
      for name, (a, b, scale) in peft.factors(folder, files).items()
    }


def save(folder: Path, adapter: Adapter, *, replace: bool = False) -> pathlib.Path:
  """Writes an adapter as PEFT reads it; scales are multiplied into a.

  Raises:
    FileExistsError: where the folder is there and `replace` is not set.
  """
  ranks = {name: own.rank for name, own in adapter.items()}
  tensors = {}
  for name, own in adapter.items():
    tensors[f"base_model.model.{name}.lora_A.weight"] = np.asarray(_times(own.scale, own.a))
    tensors[f"base_model.model.{name}.lora_B.weight"] = np.asarray(own.b)
  config: dict[str, Any] = {"peft_type": "LORA", "bias": "none"}
  config |= {"r": max(ranks.values(), default=1), "lora_alpha": max(ranks.values(), default=1)}
  other = {name: rank for name, rank in ranks.items() if rank != config["r"]}
  config |= {"rank_pattern": other, "alpha_pattern": other, "target_modules": sorted(ranks)}
  with atomic.folder(folder, replace=replace) as beside:
    safetensors.save(beside / peft.WEIGHTS, tensors)
    (beside / peft.CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
  return pathlib.Path(folder)


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


def _with(
  name: str, shares: Sequence[float], adapters: Sequence[Adapter]
) -> list[tuple[float, Adapter]]:
  return [(s, own) for s, own in zip(shares, adapters, strict=True) if name in own]
