"""Locates a checkpoint of jaxmerge, checks that it is complete, and opens its model.

A checkpoint is a folder with arrays under `state/` and a manifest: a step of a store (`store.py`),
or a merged model. Its model is the subtree `params` of the state. Free of jax.
"""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes  # noqa: F401  NumPy learns the names of bfloat16 and the 8-bit floats from it.
import numpy as np

from jaxmerge.io.checkpoints import arrays, manifest, places
from jaxmerge.io.tensors.tensor import Tensor

RECORD = "record.json"
PROVENANCE = "jaxmerge_provenance.json"  # Written next to a merged model.
STATE = "state"
MODEL = "params"
LOOP = "atm"  # Name of the loop's store, which takes precedence.


def steps(directory: Path) -> list[int]:
  """Returns the numbers of a store's steps in order, complete or not."""
  names = (p.name for p in directory.iterdir()) if directory.is_dir() else ()
  return sorted(int(n) for n in names if re.fullmatch(r"0|[1-9][0-9]*", n))


def problem(folder: Path) -> str | None:
  """Returns what is wrong with a step of a store, or None; reads all of its files."""
  if (damage := manifest.damage(folder)) is not None:
    return damage
  step = manifest.facts(folder).get("step")
  return None if str(step) == folder.name else f"{manifest.NAME} is that of step {step}"


def is_checkpoint(folder: str | Path) -> bool:
  """Returns whether a folder is a checkpoint of jaxmerge.

  A step of another program may also have an item `state`; it has different metadata.
  """
  folder = Path(folder)
  if not (folder / STATE / arrays.METADATA).is_file():
    return (folder / STATE).is_dir()
  if (folder / "_CHECKPOINT_METADATA").is_file():
    return False
  return any((folder / name).is_file() for name in (manifest.NAME, RECORD, PROVENANCE))


def find_checkpoint(path: Path) -> Path | None:
  """Returns the folder of the checkpoint that a path refers to; None if there is none.

  A path is that folder; or a store, for its newest step; or a workdir or its `checkpoints`, where
  the loop's store, `atm`, takes precedence over others.

  Raises:
    ValueError: naming the stores, if there are several but none of the loop.
  """
  if is_checkpoint(path):
    return path
  path = path / places.STORES if (path / places.STORES).is_dir() else path
  if _is_store(path):
    return path / str(steps(path)[-1])
  stores = [p for p in sorted(path.iterdir()) if _is_store(p)] if path.is_dir() else []
  candidates = [p for p in stores if p.name == LOOP] or stores
  if len(candidates) > 1:
    names = ", ".join(p.name for p in candidates)
    raise ValueError(f"{path} has several runs, {names}: use the folder of one of them.")
  return candidates[0] / str(steps(candidates[0])[-1]) if candidates else None


def _is_store(path: Path) -> bool:
  inner = [path / str(step) for step in steps(path)]
  return any(is_checkpoint(p) or (p / manifest.NAME).is_file() for p in inner)


def tensors(folder: Path) -> dict[str, Tensor]:
  """Returns the tensors of a checkpoint's model by leaf name, without reading arrays.

  Missing or truncated files are an error at once. Checksums are compared before the first read.

  >>> tensors(Path("runs/images4/checkpoints/atm/12"))["dense_0/kernel"].shape  # doctest: +SKIP

  Raises:
    ValueError: for a checkpoint that is damaged, or has no model.
  """
  _refuse(folder, manifest.damage(folder, within=STATE, contents=False))
  saved, keys = _leaves(folder), arrays.keys(folder / STATE)
  leaf_by_name = {n.removeprefix(f"{MODEL}/"): n for n in saved if n.startswith(f"{MODEL}/")}
  if not leaf_by_name:
    there = ", ".join(sorted({name.split("/")[0] for name in saved}))
    raise ValueError(
      f"{folder}: there is no model under {MODEL!r} in the state, which has {there:.200}; save a "
      f"model as {{{MODEL!r}: tree}}."
    )

  def check() -> None:
    _refuse(folder, manifest.damage(folder, within=STATE))

  open_array = functools.partial(arrays.open_existing, folder / STATE)
  opened = arrays.Arrays(str(folder / STATE), open_array, check)
  return {
    name: opened.tensor(keys.get(leaf, leaf), name, *saved[leaf])
    for name, leaf in sorted(leaf_by_name.items())
  }


def _leaves(folder: Path) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
  """Returns dtype and shape of every leaf, from the manifest."""
  leaves = manifest.facts(folder).get("leaves", {})
  try:
    specs = {name: (np.dtype(dtype), tuple(shape)) for name, (dtype, shape) in leaves.items()}
    fine = all(type(n) is int and n >= 0 for _, shape in specs.values() for n in shape)
  except (AttributeError, TypeError, ValueError):
    fine = False
  if not fine:
    raise ValueError(f"{folder / manifest.NAME}: leaves must map names to a dtype and a shape.")
  return specs


def _refuse(folder: Path, damage: str | None) -> None:
  """Raises ValueError for a damaged checkpoint, naming the other steps."""
  if damage is None:
    return
  others = [n for n in steps(folder.parent) if folder.name.isdecimal() and str(n) != folder.name]
  hint = f"; its store also has steps {', '.join(map(str, others))}: use one of them" * bool(others)
  raise ValueError(f"{folder}: the checkpoint is damaged: {damage}{hint}.")


def files(folder: Path) -> tuple[Path, ...]:
  """Returns the files of a checkpoint's arrays."""
  return tuple(sorted(p for p in (folder / STATE).rglob("*") if p.is_file()))


def write(
  folder: Path, model: Mapping[str, Tensor], progress: arrays.Progress = lambda count: None
) -> None:
  """Writes a model as a checkpoint into a folder, and seals it; other files stay.

  `orbax.checkpoint` restores `folder / "state"` as {"params": {name: array}}. The files of an
  interrupted call are replaced.

  Args:
    folder: the folder.
    model: tensors by name.
    progress: called with the number of bytes written.
  """
  state = folder / STATE
  if state.exists():
    shutil.rmtree(state)
  state.mkdir()
  arrays.write(state, {(MODEL, name): tensor for name, tensor in model.items()}, progress)
  leaves = {f"{MODEL}/{name}": [t.dtype.name, list(t.shape)] for name, t in model.items()}
  manifest.seal(folder, {"leaves": leaves}, within=STATE)
