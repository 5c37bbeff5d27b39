"""Opens an Orbax checkpoint of any program as a model, from its metadata.

A path is an item with arrays, a step with one or several items, or the folder of a
`CheckpointManager`, whose newest step is opened, or another one by `PATH@STEP`. `PATH:SUBTREE`
selects an item, and the model in its tree.
"""

from __future__ import annotations

import functools
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxmerge.io.checkpoints import arrays, places, trees
from jaxmerge.io.checkpoints.places import Place
from jaxmerge.io.tensors.tensor import Tensor

_STEP = re.compile(r"(?:.*[._-])?([0-9]+)")
_SUFFIX = re.compile(r"(?P<path>.+?)(?:@(?P<step>[0-9]+))?(?::(?P<subtree>[^:@]+))?")


class Reference(NamedTuple):
  """A parsed path: `PATH`, `PATH@STEP`, `PATH:SUBTREE` or `PATH@STEP:SUBTREE`.

  Attributes:
    place: the folder.
    step: the step; None: the newest.
    subtree: the item, if there are several, and the path of the model in its tree.
  """

  place: Place
  step: int | None = None
  subtree: tuple[str, ...] | None = None


class Checkpoint(NamedTuple):
  """An Orbax checkpoint of another program, open as a model.

  Attributes:
    root: the folder that the user named.
    inner: path from the root to the item with the arrays.
    step: the step; None if the root has no steps.
    newest_of: number of steps of which it is the newest; 0 if the user chose a step.
    model: the part of the tree that is the model.
    tree: all leaves of the tree.
    use_ocdbt: whether the arrays are in one database, instead of a folder each.
    use_zarr3: whether they are in zarr version 3.
    tensors: the model's tensors by name.
  """

  root: Place
  inner: str
  step: int | None
  newest_of: int
  model: trees.Model
  tree: tuple[trees.Leaf, ...]
  use_ocdbt: bool
  use_zarr3: bool
  tensors: Mapping[str, Tensor]

  @property
  def item(self) -> Place:
    """Returns the folder with the arrays."""
    return self.root / self.inner

  @property
  def reference(self) -> str:
    """Returns the reference `PATH@STEP:SUBTREE` of this checkpoint and model."""
    names = self.inner.split("/") if self.inner else []
    items = [] if self.step is None else names[_depth(self) :]
    subtree = "/".join([*(items if self.step is not None else names), *self.model.subtree])
    step = "" if self.step is None else f"@{self.step}"
    return f"{self.root.text}{step}{f':{subtree}' if subtree else ''}"

  @property
  def note(self) -> str:
    """Returns a note on what was opened, and what was left out."""
    step = "" if self.step is None else f", step {self.step}"
    step += f", the newest of {self.newest_of}" if self.newest_of > 1 else ""
    inside = "/".join(self.model.subtree) or "the whole tree"
    text = f"an Orbax checkpoint, {self.item.text}{step}; the model is {inside}"
    left = ", ".join(f"{name} ({count})" for name, count in self.model.left_out.items())
    return f"{text}; left out: {left}." if left else f"{text}."

  @property
  def files(self) -> tuple[pathlib.Path, ...]:
    """Returns the files of the item; none if it is at a URL."""
    if self.root.is_remote:
      return ()
    return tuple(sorted(path for path in self.item.path.rglob("*") if path.is_file()))

  def spec(self, leaf: trees.Leaf) -> dict[str, Any]:
    """Returns TensorStore's spec of the array of a leaf."""
    return array_spec(self.item, leaf.parameter, self.use_ocdbt, self.use_zarr3)


def _depth(checkpoint: Checkpoint) -> int:
  """Returns the number of path components up to the folder of the step."""
  names = checkpoint.inner.split("/")
  return next(i for i, n in enumerate(names) if step_number(n) == checkpoint.step) + 1


def array_spec(item: Place, key: str, use_ocdbt: bool, use_zarr3: bool) -> dict[str, Any]:
  """Returns TensorStore's spec of an array of an item.

  >>> array_spec(Place("gs://b/run/5/default"), "params.w", True, False)
  {'driver': 'zarr', 'kvstore': {'driver': 'ocdbt', 'base': 'gs://b/run/5/default/', \
'path': 'params.w/'}}
  """
  if not item.is_remote:
    arrays.check_path(item.path)
  store = {"driver": "ocdbt", "base": item.kvstore(), "path": f"{key}/"}
  kvstore = store if use_ocdbt else item.kvstore(key)
  return {"driver": "zarr3" if use_zarr3 else "zarr", "kvstore": kvstore}


def parse(path: str | os.PathLike[str]) -> Reference | None:
  """Parses a path that may name a checkpoint; returns None if it does not exist.

  >>> parse("gs://bucket/run@500:params")
  Reference(place=Place(text='gs://bucket/run'), step=500, subtree=('params',))
  """
  text = os.fspath(path)
  if os.path.isdir(text):
    return Reference(places.place(text))
  where = places.place(text)
  scheme, separator, rest = where.text.partition("://")
  match = _SUFFIX.fullmatch(rest if separator else where.text)
  if match is None:
    return None
  folder = Place(f"{scheme}://{match['path']}" if separator else match["path"])
  if not folder.is_remote and not os.path.isdir(folder.text):
    return None
  subtree = tuple(match["subtree"].strip("/").split("/")) if match["subtree"] else None
  return Reference(folder, int(match["step"]) if match["step"] else None, subtree)


def step_number(name: str) -> int | None:
  """Returns the step in a folder's name; None if there is none.

  >>> step_number("500"), step_number("checkpoint_00500"), step_number("default")
  (500, 500, None)
  """
  match = None if places.UNFINISHED in name else _STEP.fullmatch(name)
  return int(match[1]) if match else None


def steps(folder: Place) -> dict[int, str]:
  """Returns the names of the steps in a folder by number, in order."""
  numbered = {number: n for n in folder.names() if (number := step_number(n)) is not None}
  return dict(sorted(numbered.items()))


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint | None:
  """Opens a checkpoint without reading arrays; returns None if the path names no checkpoint.

  Raises:
    ValueError: if there are several models, with the candidates; for a missing or incomplete step;
      for damaged metadata.
  """
  reference = parse(path)
  if reference is None:
    return None
  root = reference.place
  location = _find_step(root, reference.step)
  if location is None:
    return None
  inner, step, newest_of = location
  items = _items(root / inner)
  if items is None:
    return None
  item, subtree = _choose_item(root / inner, items, reference.subtree)
  inner = "/".join(part for part in (inner, item) if part)
  return _open_item(root, inner, step, newest_of, subtree)


def _find_step(root: Place, step: int | None) -> tuple[str, int | None, int] | None:
  """Returns path and number of the chosen step, and the number of steps if it is the newest."""
  if _items(root) is not None and not _holds_steps(root):
    if step is not None:
      raise ValueError(f"{root.text}@{step}: {root.text} is one checkpoint and has no steps.")
    return "", None, 0
  inner = "" if steps(root) else places.STORES if places.STORES in root.names() else ""
  numbered = steps(root / inner)
  if not numbered:
    return None
  if step is None and not any(_items(root / inner / name) for name in numbered.values()):
    return None  # Numbered folders of other kinds.
  if step is not None and step not in numbered:
    there = ", ".join(map(str, numbered))
    raise ValueError(f"{root.text}@{step}: no such step; choose one of {there}.")
  chosen = max(numbered) if step is None else step
  name = numbered[chosen]
  if _items(root / inner / name) is None:
    whole = [n for n, other in numbered.items() if _items(root / inner / other)]
    hint = f"use {root.text}@{max(whole)}" if whole else "no other step is complete"
    raise ValueError(
      f"{(root / inner / name).text}: the step has no {trees.METADATA}: its save was interrupted, "
      f"or it is damaged; {hint}."
    )
  return (f"{inner}/{name}" if inner else name), chosen, len(numbered) if step is None else 0


def _items(folder: Place) -> list[str] | None:
  """Returns the items with arrays in a folder, "" for the folder itself; None if there are none."""
  names = folder.names()
  if trees.METADATA in names:
    return [""]
  if not folder.is_remote:
    names = [n for n in names if (folder.path / n / trees.METADATA).is_file()]
  else:
    names = [n for n in names if (folder / n).read(trees.METADATA) is not None]
  return [n for n in names if places.UNFINISHED not in n] or None


def _holds_steps(folder: Place) -> bool:
  """Returns whether the items in a folder are steps, as with managers of a single item."""
  items = _items(folder)
  return items is not None and items != [""] and all(step_number(n) is not None for n in items)


def _choose_item(
  step: Place, items: list[str], subtree: tuple[str, ...] | None
) -> tuple[str, tuple[str, ...] | None]:
  """Returns the item with the model, and the subtree in it; None: searched for by name."""
  if items == [""]:
    return "", subtree
  if subtree and subtree[0] in items:
    return subtree[0], subtree[1:] or None
  likely = [n for n in items if trees.holds_params(n)]
  likely = likely or [n for n in items if n not in trees.OTHERS] or items
  if len(likely) > 1:
    listed = " or ".join(f"{step.text}:{name}" for name in likely)
    raise ValueError(f"{step.text}: the checkpoint has several items: use {listed}.")
  return likely[0], subtree


def _open_item(
  root: Place, inner: str, step: int | None, newest_of: int, subtree: tuple[str, ...] | None
) -> Checkpoint:
  item = root / inner
  content = places.json_of(item, trees.METADATA) or {}
  tree = tuple(trees.leaves(f"{item.text}/{trees.METADATA}", content))
  model = trees.model(item.text, tree, subtree)
  use_ocdbt = bool(content.get("use_ocdbt", "manifest.ocdbt" in item.names()))
  opened = Checkpoint(
    root, inner, step, newest_of, model, tree, use_ocdbt, bool(content.get("use_zarr3")), {}
  )
  return opened._replace(tensors=_tensors(opened))


def _tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
  """Opens the arrays of the model concurrently, for their dtypes and shapes."""
  stores = {n: arrays.open_spec(checkpoint.spec(x)) for n, x in checkpoint.model.leaves.items()}
  specs: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
  for name, future in stores.items():
    try:
      store = future.result()
    except (ValueError, OSError, RuntimeError) as error:
      raise ValueError(
        f"{checkpoint.item.text}: tensor {name!r}: {arrays.reason(error)}"
      ) from error
    specs[name] = store.dtype.numpy_dtype, tuple(store.shape)
  opened = arrays.Arrays(checkpoint.item.text, functools.partial(_open_array, checkpoint))
  return {
    name: opened.tensor(leaf.parameter, name, *specs[name])
    for name, leaf in checkpoint.model.leaves.items()
  }


def _open_array(checkpoint: Checkpoint, key: str) -> Any:
  spec = array_spec(checkpoint.item, key, checkpoint.use_ocdbt, checkpoint.use_zarr3)
  return arrays.open_spec(spec).result()
