"""Opens a folder of weights, and decides what kind it is.

A model is a Hugging Face folder with safetensors or msgpack, raw files of either, or a checkpoint
of Orbax, jaxmerge's or that of another program; an adapter is a PEFT folder.
Only headers and manifests are read. Free of jax.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple  # Any: JSON of a config.

from jaxmerge import display
from jaxmerge.io.checkpoints import manifest, metadata, other_programs
from jaxmerge.io.huggingface import flax_weights, folder, pipeline
from jaxmerge.io.peft import adapter
from jaxmerge.io.tensors import safetensors
from jaxmerge.io.tensors.tensor import Files, Tensor, stored_tensor

Path = folder.Path


class Weights(NamedTuple):
  """The contents of a folder of weights.

  Attributes:
    kind: "model", "checkpoint", "adapter", "pipeline" of diffusers, or "flax" where the files
      are msgpack.
    folder: its path; for a run, the folder of its newest step; for a raw file, the file.
    tensors: by name.
    homes: the file of each tensor; for a checkpoint, the folder of its state.
    files: those with the tensors.
    notes: lines on what of the files is no part of the model.
    orbax: the checkpoint, where another program wrote it.
  """

  kind: str
  folder: pathlib.Path
  tensors: Mapping[str, Tensor]
  homes: Mapping[str, pathlib.Path]
  files: tuple[pathlib.Path, ...]
  notes: tuple[str, ...] = ()
  orbax: other_programs.Checkpoint | None = None


def open_weights(path: Path, files: Files) -> Weights:
  """Opens a model or an adapter.

  Raises:
    FileNotFoundError: where the folder or its weights are missing.
    ValueError: naming the damaged file and tensor.
  """
  path = pathlib.Path(path)
  if not adapter.is_adapter(path):
    return open_model(path, files)
  _, weights = adapter.paths(path)
  return _weights("adapter", path, _entries(weights), files)


def open_model(path: Path, files: Files, *, home: str | None = None) -> Weights:
  """Opens a model; raises as `open_weights` does. Errors name `home` in place of its folder."""
  path = pathlib.Path(path)
  if home is None and display.readable(str(path)) != str(path):
    home = display.readable(str(path))  # Names that are not UTF-8 cannot be written to JSON.
  usual = folder.is_usual(path)
  step = None if usual else metadata.find_checkpoint(path)
  if step is None and pipeline.is_pipeline(path):
    files.note(pipeline.small_files(path))
    opened = _weights("pipeline", path, pipeline.entries(path), files, home)
    return opened._replace(notes=tuple(pipeline.notes(path)))
  if step is None and not usual and (named := flax_weights.files(path)):
    files.note(folder.small_files(path))
    contents = flax_weights.read(named, files)
    return Weights("flax", path, contents.tensors, contents.homes, tuple(named), contents.notes)
  other = (
    other_programs.open_checkpoint(path) if step is None and not folder.is_usual(path) else None
  )
  if other is not None:
    return _open_other(other, files)
  if step is None:
    files.note(folder.small_files(path))
    files.note(folder.weights(path))  # Their index is a small file.
    return _weights("model", path, folder.entries(path), files, home)
  files.note([*step.glob(manifest.NAME), *metadata.files(step)])
  tensors = metadata.tensors(step)
  homes = dict.fromkeys(tensors, step / metadata.STATE)
  return Weights("checkpoint", step, tensors, homes, metadata.files(step))


def _open_other(checkpoint: other_programs.Checkpoint, files: Files) -> Weights:
  files.note(checkpoint.files)
  homes = dict.fromkeys(checkpoint.tensors, checkpoint.item.path)
  root, tensors = checkpoint.root.path, checkpoint.tensors
  notes = (checkpoint.note,)
  return Weights("checkpoint", root, tensors, homes, checkpoint.files, notes, checkpoint)


def config(path: Path) -> dict[str, Any]:
  """Returns config.json, or those of the parts of a pipeline; empty without one."""
  path = pathlib.Path(path)
  if pipeline.is_pipeline(path):
    return pipeline.config(path)
  return folder.config(path) if (path / folder.CONFIG).exists() else {}


def _entries(path: pathlib.Path) -> dict[str, tuple[pathlib.Path, safetensors.Entry]]:
  return {name: (path, entry) for name, entry in safetensors.header(path).tensors.items()}


def _weights(
  kind: str,
  path: pathlib.Path,
  entries: Mapping[str, tuple[pathlib.Path, safetensors.Entry]],
  files: Files,
  home: str | None = None,
) -> Weights:
  places = sorted(entries.items())
  tensors = {n: stored_tensor(files, file, n, entry, home=home) for n, (file, entry) in places}
  homes = {name: file for name, (file, _) in entries.items()}
  return Weights(kind, path, tensors, homes, tuple(sorted(set(homes.values()))))
