"""Saves and loads bundles."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmerge.core import double_precision, tree
from jaxmerge.core.tree import Tree
from jaxmerge.io.disk import atomic
from jaxmerge.io.huggingface import folder
from jaxmerge.io.tensors import safetensors
from jaxmerge.mixtures import bundle, low_rank

Path = str | os.PathLike[str]
ABOUT = low_rank.ABOUT
FILES = ("base", "shared", "masks", "statistics")  # Each is a file NAME.safetensors.


def save(
  path: Path, bundle: bundle.Bundle | low_rank.Reversible, *, replace: bool = False
) -> pathlib.Path:
  """Writes a bundle to a folder atomically; masks take one bit per entry.

  Raises:
    FileExistsError: if the folder exists and `replace` is not set.
  """
  if isinstance(bundle, low_rank.Reversible):
    return low_rank.save(path, bundle, replace=replace)
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
    for file, leaves in trees.items():
      safetensors.save(
        beside / f"{file}.safetensors", {n: np.asarray(x) for n, x in leaves.items()}
      )
    (beside / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
  return pathlib.Path(path)


def load(path: Path) -> bundle.Bundle | low_rank.Reversible:
  """Reads a bundle from a folder; the base is a dict nested at the slashes of leaf names.

  Raises:
    FileNotFoundError: if the folder or a file of it is missing.
    ValueError: naming the file that is damaged, or does not fit the others.
  """
  path = pathlib.Path(path)
  about = folder.read_json(path / ABOUT)
  if about.get("method") == low_rank.METHOD:
    return low_rank.load(path)
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
    method = str(about["method"])
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise ValueError(f"{path / ABOUT}: no description of a bundle ({error}).") from error
  shared, statistics = (
    {n: double_precision.copy_leaf(x) for n, x in part.items()} for part in (shared, statistics)
  )
  arrays = {n: jnp.asarray(x) for n, x in unpacked.items()}
  return bundle.Bundle(method, names, _nest(base), shared, arrays, scales, statistics)


def _nest(leaves: dict[str, np.ndarray]) -> Tree:
  out: dict[str, Any] = {}
  for name, x in leaves.items():
    *parents, last = name.split("/")
    node = out
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = double_precision.copy_leaf(x)
  return out
