"""Flax weights: `flax_model.msgpack` of a Hugging Face folder, its shards, or a single file."""

from __future__ import annotations

import pathlib
from typing import NamedTuple

from jaxmerge.io.huggingface import folder
from jaxmerge.io.tensors import msgpack
from jaxmerge.io.tensors.tensor import Files, Tensor

WEIGHTS = "flax_model.msgpack"
INDEX = f"{WEIGHTS}.index.json"
MODEL = "params"  # The parameters in a training state.
_STATE = ("opt_state", "step")  # Keys that identify a training state.


class FlaxWeights(NamedTuple):
  """Flax arrays by name, `a/b/kernel`, the file of each, and notes on values left out."""

  tensors: dict[str, Tensor]
  homes: dict[str, pathlib.Path]
  notes: tuple[str, ...]


def files(path: pathlib.Path) -> list[pathlib.Path]:
  """Returns the msgpack files of a path: the file itself, or those of a folder; else none."""
  if path.is_file():
    return [path] if path.suffix == msgpack.ENDING else []
  if (path / WEIGHTS).is_file():
    return [path / WEIGHTS]
  if (path / INDEX).is_file():
    return sorted({path / shard for shard in folder.weight_map(path / INDEX).values()})
  others = sorted(path.glob(f"*{msgpack.ENDING}"))
  return others if len(others) == 1 else []


def read(paths: list[pathlib.Path], opened: Files) -> FlaxWeights:
  """Reads the headers of the arrays in files.

  The optimizer's state and the counters of a training state are left out.

  Raises:
    FileNotFoundError: for a missing shard.
    ValueError: naming the file that is damaged, has no arrays, or repeats an array of another file.
  """
  tensors: dict[str, Tensor] = {}
  homes: dict[str, pathlib.Path] = {}
  others: list[str] = []
  for path in paths:
    if not path.is_file():
      raise FileNotFoundError(f"{path}: no such file, but the index names it.")
    contents = msgpack.read(path, opened)
    if twice := contents.arrays.keys() & tensors.keys():
      name = min(twice)
      raise ValueError(f"{path}: tensor {name!r} is also in {homes[name].name}.")
    tensors |= contents.arrays
    homes |= dict.fromkeys(contents.arrays, path)
    others += contents.others
  heads = {name.split("/")[0] for name in (*tensors, *others)}
  dropped: list[str] = []
  if MODEL in heads and heads & set(_STATE):
    dropped = [n for n in tensors if n.split("/")[0] in _STATE]
    rest = {n: t for n, t in tensors.items() if n not in dropped}
    alone = {n.split("/")[0] for n in rest} == {MODEL}
    start = len(MODEL) + 1 if alone else 0
    tensors = {n[start:]: t for n, t in rest.items()}
    homes = {n[start:]: homes[n] for n in rest}
  if not tensors:
    raise ValueError(f"{paths[0]}: has no arrays.")
  return FlaxWeights(tensors, homes, _notes(paths[0], dropped, others))


def _notes(path: pathlib.Path, dropped: list[str], others: list[str]) -> tuple[str, ...]:
  lines = [
    "has Flax weights: tensors have names such as a/b/kernel, in the result too; "
    "flax.traverse_util.unflatten_dict(tensors, sep='/') makes them a tree."
  ]
  if dropped:
    lines += [f"is a training state: {len(dropped)} arrays of the optimizer are left out."]
  if values := [name for name in others if name.split("/")[0] not in _STATE]:
    lines += [f"has {len(values)} values that are not arrays, such as {values[0]!r}: left out."]
  return tuple(f"{path.name} {line}" for line in lines)
