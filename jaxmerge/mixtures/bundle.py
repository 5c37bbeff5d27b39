"""Merges that keep the tasks apart: one shared task vector, and a mask and a scale for each task.

A bundle is not one model: `for_task` makes that of a task, from the base. It holds as much as one
model, and a bit an entry for each task.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple  # Any: arrays of jax, or of NumPy where loaded.

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import (
  arguments,
  catalog,
  finiteness,
  magnitudes,
  memory,
  methods,
  moments,
  reversible,
  tree,
  wide,
)
from jaxmerge.io import atomic, folder, safetensors
from jaxmerge.stage import Method
from jaxmerge.tree import Tree

Path = str | os.PathLike[str]

rmm = reversible.rmm
ABOUT = reversible.ABOUT
FILES = ("base", "shared", "masks", "statistics")  # Each is a file NAME.safetensors.


class Bundle(NamedTuple):
  """A base, a task vector that all tasks share, and what each task takes of it.

  Attributes:
    method: what made it.
    names: of the tasks.
    base: tree of arrays [*s].
    shared: leaves of the task vector [*s] by name, float32 or wider; integer leaves are missing.
    masks: by name, boolean [K, *s].
    scales: factor of each task, [K].
    statistics: running statistics of each task by name, [K, *s], kept as they are.
  """

  method: str
  names: tuple[str, ...]
  base: Tree
  shared: dict[str, Any]
  masks: dict[str, Any]
  scales: Any
  statistics: dict[str, Any]

  @wide.aware
  def for_task(self, name: str) -> Tree:
    """Returns the model of a task: the base plus its scale times its entries of what is shared.

    Raises:
      ValueError: for a task that the bundle does not have.
    """
    if name not in self.names:
      raise ValueError(f"the bundle has no task {name!r}{catalog.nearest(name, self.names)}.")
    k = self.names.index(name)

    def one(key: str, base: Any) -> Any:
      if key in self.statistics:
        return jnp.asarray(self.statistics[key])[k].astype(base.dtype)
      if key not in self.shared:
        return base
      wide = jnp.asarray(base).astype(self.shared[key].dtype)
      own = jnp.where(self.masks[key][k], self.shared[key], 0)
      return (wide + self.scales[k].astype(wide.dtype) * own).astype(base.dtype)

    out = {n: one(n, x) for n, x in tree.named(self.base).items()}
    changed = {n: out[n] for n in self.shared.keys() | self.statistics.keys()}
    return tree.rebuild(self.base, out | finiteness.checked(changed))


@wide.aware
def emr(
  base: Tree,
  models: Tree,
  *,
  names: Sequence[str] | None = None,
  ratio: Literal["leaf", "tree"] = "leaf",
) -> Bundle:
  """Elects, masks and rescales: EMR-Merging.

  Shared is, entry by entry, the largest of the task vectors that have the sign of their sum (minus,
  where that is zero). A task takes the entries at which it has that sign, times what gives it its
  own mean magnitude back.

  Args:
    base: tree of arrays [*s].
    models: stack of K models, [K, *s].
    names: of the tasks; else "0", "1", and so on.
    ratio: magnitudes are averaged in each leaf and then added up, as the authors' code does, or
      added up over the tree.

  Reference: Huang et al. 2024, EMR-Merging (arXiv:2405.17461).

  Example:
    >>> base, models = {"w": jnp.zeros(3)}, {"w": jnp.array([[3.0, 1.0, -1.0], [1.0, -3.0, 0.0]])}
    >>> bundle = emr(base, models, names=("cat", "dog"))
    >>> bundle.for_task("cat")["w"].tolist()
    [3.75, 0.0, -1.25]
  """
  taus, statistics = _task_vectors(base, models)

  def elect(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    sign = jnp.where(jnp.sum(x, axis=0, keepdims=True) > 0, 1, -1).astype(x.dtype)
    masks = x * sign > 0
    return sign[0] * jnp.max(jnp.where(masks, jnp.abs(x), 0), axis=0), masks

  elected = {n: elect(x) for n, x in taus.items()}

  # The ratio of two sums of magnitudes, which might not be in range themselves.
  dtype = tree.compute_dtype(*(v.dtype for v in taus.values()))
  peaks = [magnitudes.peak(v.astype(dtype), range(v.ndim)).reshape(()) for v in taus.values()]
  unit = jnp.max(jnp.stack(peaks)) if peaks else jnp.ones(())

  def magnitude(x: dict[str, jax.Array]) -> jax.Array:
    each = [
      jnp.sum(jnp.abs(v.astype(dtype) / unit), axis=tuple(range(1, v.ndim)))
      / (v[0].size if ratio == "leaf" else 1)
      for v in x.values()
      if v.size
    ]
    return sum(each, start=jnp.zeros(tree.height(models)))

  own = magnitude(taus)
  taken = magnitude(
    {n: jnp.where(masks, shared[None], 0) for n, (shared, masks) in elected.items()}
  )
  scales = jnp.where(taken > 0, own / jnp.where(taken > 0, taken, 1), 1)
  shared, masks = ({n: pair[i] for n, pair in elected.items()} for i in (0, 1))
  return Bundle("emr", _named(names, models), base, shared, masks, scales, statistics)


@wide.aware
def tall_masks(
  base: Tree,
  models: Tree,
  *,
  names: Sequence[str] | None = None,
  threshold: float | Sequence[float] = 0.4,
  method: Method | None = None,
) -> Bundle:
  """Finds the entries of a merged task vector that each task needs: TALL masks.

  A task needs an entry where its task vector is larger in magnitude than `threshold` times its
  distance from the merged one.

  Args:
    base: tree of arrays [*s].
    models: stack of K models, [K, *s].
    names: of the tasks; else "0", "1", and so on.
    threshold: scalar or one per task; the authors choose each task's on validation.
    method: what merges the task vectors; else they are added up.

  Reference: Wang et al. 2024, Localizing task information (arXiv:2405.07813).

  Example:
    >>> base, models = {"w": jnp.zeros(3)}, {"w": jnp.array([[2.0, 1.0, -1.0], [1.0, -3.0, 0.0]])}
    >>> bundle = tall_masks(base, models, names=("cat", "dog"), threshold=1.0)
    >>> bundle.for_task("cat")["w"].tolist()
    [3.0, 0.0, -1.0]
  """
  taus, statistics = _task_vectors(base, models)
  names = _named(names, models)
  method = methods.task_arithmetic(1.0) if method is None else method
  shared = memory.blend(method, taus, names=names, deltas=True)
  limits = jnp.broadcast_to(jnp.asarray(threshold, jnp.float32), (len(names),))

  def needed(x: jax.Array, total: jax.Array) -> jax.Array:
    limit = limits.astype(x.dtype).reshape((-1,) + (1,) * (x.ndim - 1))
    return jnp.abs(x) > limit * jnp.abs(total[None] - x)

  masks = {n: needed(x, shared[n]) for n, x in taus.items()}
  return Bundle("tall_masks", names, base, shared, masks, jnp.ones(len(names)), statistics)


def _task_vectors(base: Tree, models: Tree) -> tuple[dict[str, jax.Array], dict[str, Any]]:
  """The task vectors of the floating leaves, by name: [K, *s]; and the running statistics."""
  arguments.refuse(base, "the base")
  arguments.refuse(models, "the models")
  memory.check_models(base, models, base)
  bases, stacks = tree.named(base), tree.named(models)
  own = [n for n, x in bases.items() if tree.is_floating(x)]
  finiteness.refuse_inputs({n: bases[n] for n in own}, {n: stacks[n] for n in own})
  known = moments.of(own)
  taus = {
    n: memory.task_vectors(jnp.asarray(stacks[n]), jnp.asarray(bases[n]))
    for n in own
    if n not in known
  }
  return taus, {n: wide.copied(stacks[n]) for n in own if n in known}


def _named(names: Sequence[str] | None, models: Tree) -> tuple[str, ...]:
  height = tree.height(models)
  names = tuple(str(k) for k in range(height)) if names is None else tuple(names)
  if len(names) != height or len(set(names)) != height:
    raise ValueError(f"{height} models need as many different names, got {list(names)}.")
  return names


def save(
  path: Path, bundle: Bundle | reversible.Reversible, *, replace: bool = False
) -> pathlib.Path:
  """Writes a bundle to a folder, which appears whole or not at all; a mask takes a bit an entry.

  Raises:
    FileExistsError: where the folder is there and `replace` is not set.
  """
  if isinstance(bundle, reversible.Reversible):
    return reversible.save(path, bundle, replace=replace)
  shapes = {n: list(np.shape(x)) for n, x in bundle.shared.items()}
  about = {"method": bundle.method, "names": bundle.names, "shapes": shapes}
  about["statistics"] = sorted(bundle.statistics)
  about["scales"] = np.asarray(bundle.scales).tolist()
  packed = {
    n: np.packbits(np.asarray(x).reshape(len(x), -1), axis=1) for n, x in bundle.masks.items()
  }
  parts = (tree.named(bundle.base), bundle.shared, packed, bundle.statistics)
  trees = dict(zip(FILES, parts, strict=True))
  with atomic.folder(path, replace=replace) as beside:
    for file, own in trees.items():
      safetensors.save(beside / f"{file}.safetensors", {n: np.asarray(x) for n, x in own.items()})
    (beside / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
  return pathlib.Path(path)


def load(path: Path) -> Bundle | reversible.Reversible:
  """Reads a bundle from a folder; its base is a nested dict, taken apart at the names' slashes.

  Raises:
    FileNotFoundError: where the folder or a file of it is missing.
    ValueError: naming the file that is damaged, or does not fit the others.
  """
  path = pathlib.Path(path)
  about = folder.read_json(path / ABOUT)
  if about.get("method") == reversible.METHOD:
    return reversible.load(path)
  base, shared, masks = (safetensors.load(path / f"{file}.safetensors") for file in FILES[:3])
  last = path / f"{FILES[3]}.safetensors"
  statistics = safetensors.load(last) if about.get("statistics") or last.is_file() else {}
  try:
    names, shapes = tuple(about["names"]), {n: tuple(s) for n, s in about["shapes"].items()}
    scales = jnp.asarray(np.array(about["scales"], np.float32))
    unpacked = {
      n: np.unpackbits(masks[n], axis=1, count=int(np.prod(s))).reshape(-1, *s).astype(bool)
      for n, s in shapes.items()
    }
    fits = all(len(x) == len(names) == len(scales) for x in unpacked.values())
    if not fits or {n: x.shape for n, x in shared.items()} != shapes or shapes.keys() - base.keys():
      raise ValueError("its tasks and shapes are not those of the tensors beside it")
    if statistics.keys() != set(about.get("statistics", ())) or statistics.keys() & shared.keys():
      raise ValueError("its running statistics are not those of the tensors beside it")
    if any(x.shape != (len(names), *base[n].shape) for n, x in statistics.items()):
      raise ValueError("running statistics of each task are needed")
    found = str(about["method"])
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise ValueError(f"{path / ABOUT}: no description of a bundle ({error}).") from error
  own, kept = ({n: wide.copied(x) for n, x in each.items()} for each in (shared, statistics))
  taken = {n: jnp.asarray(x) for n, x in unpacked.items()}
  return Bundle(found, names, _nested(base), own, taken, scales, kept)


def _nested(leaves: dict[str, np.ndarray]) -> Tree:
  out: dict[str, Any] = {}
  for name, x in leaves.items():
    *rooms, last = name.split("/")
    home = out
    for room in rooms:
      home = home.setdefault(room, {})
    home[last] = wide.copied(x)
  return out
