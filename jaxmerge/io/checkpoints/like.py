"""Writes a model in the layout of an Orbax checkpoint of another program, so that it restores it.

Metadata, chunks and codecs are copied from that checkpoint byte for byte. So is everything else in
it: optimizer state, step, random keys, other items of the step.
"""

from __future__ import annotations

import math
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any  # Any: specs of TensorStore.

from jaxmerge.io.checkpoints import arrays, other_programs
from jaxmerge.io.checkpoints.other_programs import Checkpoint
from jaxmerge.io.checkpoints.places import Place
from jaxmerge.io.tensors.tensor import Tensor

_DATABASE = ("d", "manifest.ocdbt")  # Files of an item's database, beside those of each process.
_OURS = ("README.md", "jaxmerge_")  # Prefixes of files that a merge adds to a result.


def with_step(checkpoint: Checkpoint) -> Checkpoint:
  """Returns a checkpoint with its step, where the path led to a step's folder in a run."""
  name = checkpoint.root.name
  number = other_programs.step_number(name)
  head, slash, _ = checkpoint.root.text.rpartition("/")
  parent = Place(head or slash or ".")
  if checkpoint.step is not None or number is None or not _is_run(parent, checkpoint):
    return checkpoint
  inner = f"{name}/{checkpoint.inner}" if checkpoint.inner else name
  return checkpoint._replace(root=parent, inner=inner, step=number)


def _is_run(parent: Place, checkpoint: Checkpoint) -> bool:
  """Returns whether the folder around a checkpoint is one of a `CheckpointManager`."""
  name = checkpoint.root.name
  if name.isdecimal():
    return True
  if not checkpoint.inner or parent.is_remote:
    return False  # A checkpoint by itself whose name ends in a number.
  prefix = name.rstrip("0123456789")
  folders = [n for n in parent.names() if (parent.path / n).is_dir()]
  return all(n.rstrip("0123456789") == prefix for n in folders)


def newest_of_run(checkpoints: Sequence[Checkpoint | None]) -> Checkpoint | None:
  """Returns the newest of checkpoints that are steps of one run; otherwise the first."""
  known = [with_step(c) for c in checkpoints if c is not None]
  if len(known) < len(checkpoints) or any(c.step is None for c in known):
    return checkpoints[0]
  if len({(c.root.path.resolve(), c.model.subtree) for c in known}) > 1:
    return checkpoints[0]
  return max(known, key=lambda c: c.step or 0)


def misfit(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
  """Returns why tensors cannot be written in the layout of a checkpoint; None if they can."""
  expected = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
  where = checkpoint.reference
  if missing := sorted(expected.keys() - shapes.keys()):
    return f"the result lacks tensor {missing[0]!r}, which {where} has"
  if added := sorted(shapes.keys() - expected.keys()):
    return f"{where} has no tensor {added[0]!r}, which the result has"
  wrong = next((n for n in sorted(expected) if shapes[n] != expected[n]), None)
  if wrong is None:
    return None
  return f"tensor {wrong!r} is {list(shapes[wrong])}, in {where} {list(expected[wrong])}"


def note(checkpoint: Checkpoint) -> str:
  """Returns a note on the parts of a result that are copied from the checkpoint, not merged."""
  beside = "" if _step(checkpoint) is None else _other_items(checkpoint)
  others = [*checkpoint.model.left_out, *beside.split()]
  text = f"written in the layout of {checkpoint.reference}"
  if others:
    text += f"; not merged, but as they are there: {', '.join(others)}"
  if checkpoint.root.is_remote and _step(checkpoint) is not None:
    text += "; other items of the step are behind a URL, and not copied"
  return f"{text}."


def write(
  folder: pathlib.Path,
  checkpoint: Checkpoint,
  model: Mapping[str, Tensor],
  progress: Callable[[int], None] = lambda count: None,
) -> None:
  """Writes a model into a folder, at the checkpoint's path relative to its root.

  The files of an interrupted call are replaced.

  Args:
    folder: the folder, which may have other files.
    checkpoint: the checkpoint whose layout is used.
    model: all tensors of the checkpoint's model, by name.
    progress: called with the number of bytes of the model written.
  """
  _copy_step(folder, checkpoint)
  item = folder / checkpoint.inner
  item.mkdir(parents=True, exist_ok=True)
  _copy_files(checkpoint.item, item, _array_names(checkpoint))
  left = sum(math.prod(t.shape) * t.dtype.itemsize for t in model.values())

  def count(written: int) -> None:
    nonlocal left
    progress(min(left, written))  # Other arrays are not counted.
    left -= min(left, written)

  arrays.write_all(_targets(Place(str(item)), checkpoint, model), count)


def _step(checkpoint: Checkpoint) -> Place | None:
  """Returns the folder of the item's step; None if the item is the step itself."""
  parent, _, name = checkpoint.inner.rpartition("/")
  if not name or other_programs.step_number(name) == checkpoint.step is not None:
    return None
  return checkpoint.root / parent


def _other_items(checkpoint: Checkpoint) -> str:
  """Returns the names of the other items of the step that are copied."""
  step = _step(checkpoint)
  if step is None or step.is_remote:
    return ""
  item = checkpoint.item.name
  folders = [n for n in step.names() if (step.path / n).is_dir() and n != item]
  return " ".join(n for n in folders if not n.startswith(_OURS))


def _copy_step(folder: pathlib.Path, checkpoint: Checkpoint) -> None:
  """Copies the other files and items of the item's step."""
  step = _step(checkpoint)
  if step is None:
    return
  target = folder / checkpoint.inner.rpartition("/")[0]
  target.mkdir(parents=True, exist_ok=True)
  _copy_files(step, target, {checkpoint.item.name})


def _copy_files(source: Place, target: pathlib.Path, but: set[str]) -> None:
  """Copies files and folders; from a URL, only files."""
  for name in source.names():
    old, new = source.path / name, target / name
    if name in but:
      _remove(new)
    elif name.startswith(_OURS):
      continue
    elif source.is_remote:
      _copy_remote(source, name, new)
    elif old.is_dir():
      _remove(new)
      shutil.copytree(old, new)
    else:
      shutil.copyfile(old, new)


def _copy_remote(source: Place, name: str, target: pathlib.Path) -> None:
  """Copies a file from a URL, or the folder `array_metadatas`."""
  content = source.read(name)
  if content is not None:
    target.write_bytes(content)
    return
  if name == "array_metadatas":
    target.mkdir(exist_ok=True)
    for inner in (source / name).names():
      target.joinpath(inner).write_bytes((source / name).read(inner) or b"")


def _remove(path: pathlib.Path) -> None:
  if path.is_dir():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)


def _array_names(checkpoint: Checkpoint) -> set[str]:
  """Returns the names of the files and folders with the item's arrays."""
  if not checkpoint.use_ocdbt:
    return {leaf.parameter.partition("/")[0] for leaf in checkpoint.tree if leaf.is_array}
  names = (n for n in checkpoint.item.names() if n.startswith("ocdbt.process_"))
  return {*_DATABASE, *names}


def _targets(
  item: Place, checkpoint: Checkpoint, model: Mapping[str, Tensor]
) -> Iterator[arrays.Target]:
  """Yields the arrays of the item: those of the model, and the others from the checkpoint."""
  merged = {leaf: model[name] for name, leaf in checkpoint.model.leaves.items()}
  opened = arrays.Arrays(checkpoint.item.text, lambda key: stores[key])
  stores: dict[str, Any] = {}
  for leaf in checkpoint.tree:
    if not leaf.is_array:
      continue
    key = leaf.parameter
    store = stores[key] = arrays.open_spec(checkpoint.spec(leaf)).result()
    tensor = merged.get(leaf) or opened.tensor(
      key, key, store.dtype.numpy_dtype, tuple(store.shape)
    )
    if math.prod(tensor.shape):
      chunks = store.chunk_layout.write_chunk.shape or tensor.shape
      yield arrays.Target(
        key, tensor, tuple(chunks), _new_spec(item, checkpoint, key, store, tensor)
      )
    del stores[key]


def _new_spec(
  item: Place, checkpoint: Checkpoint, key: str, store: Any, tensor: Tensor
) -> dict[str, Any]:
  """Returns the spec of a new array with the chunks and codecs of another."""
  spec = other_programs.array_spec(item, key, checkpoint.use_ocdbt, checkpoint.use_zarr3)
  if checkpoint.use_ocdbt:
    spec["kvstore"]["config"] = arrays.DATABASE
  metadata = dict(store.spec().to_json()["metadata"])
  if tensor.dtype != store.dtype.numpy_dtype:  # The user chose another dtype.
    for name in ("dtype", "data_type", "fill_value"):
      metadata.pop(name, None)
  return {**spec, "metadata": metadata}
