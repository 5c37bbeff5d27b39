"""Opens a model by how it is called: a folder, an id of the hub, either with an adapter on top."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from jaxmerge import planning
from jaxmerge.io import adapter, codes, folder, hub, weights
from jaxmerge.io.tensor import Files, NotMade, Tensor


class Reference(NamedTuple):
  """A model, and the adapter that is added to it.

  Attributes:
    path: a folder, or an id of the hub.
    revision: of the hub's repository.
    adapter: folder or id of the adapter, if there is one.
    adapter_revision: its revision.
  """

  path: str
  revision: str | None = None
  adapter: str | None = None
  adapter_revision: str | None = None


def split(reference: str | os.PathLike[str]) -> Reference:
  """Takes `model@revision+adapter@revision` apart; a folder, or a `Path`, is not taken apart.

  >>> split("org/model@main+org/adapter")
  Reference(path='org/model', revision='main', adapter='org/adapter', adapter_revision=None)

  Raises:
    ValueError: for more than one `+`, and for nothing beside it.
  """
  if not isinstance(reference, str) or "+" not in reference or os.path.isdir(reference):
    return Reference(*hub.split(reference))
  parts = reference.split("+")
  if len(parts) > 2 or not all(parts):
    raise ValueError(
      f"{reference}: no such folder, and not `model+adapter`; a Path is not taken apart."
    )
  return Reference(*hub.split(parts[0]), *hub.split(parts[1]))


def opened(own: Reference, files: Files, find: hub.Finder, name: str) -> planning.Model:
  """Opens a model: only headers are read. An adapted matrix is computed when it is read.

  Args:
    own: which one.
    files: open files of the models.
    find: finds folders and what is in the hub's cache.
    name: what the model is called.

  Raises:
    FileNotFoundError: where it, or its adapter, is not there.
    ValueError: naming what is damaged or does not fit.
  """
  found = find(own.path, own.revision)
  model = planning.model(found.folder, files, name=name, home=found.home)
  return adapted(model, own, files, find)


def adapted(
  model: planning.Model, own: Reference, files: Files, find: hub.Finder
) -> planning.Model:
  """Adds the adapter of a reference, where it has one, to a model; arguments as for `opened`."""
  if own.adapter is None:
    return model
  added = find(own.adapter, own.adapter_revision)
  files.note(adapter.paths(added.folder))
  tensors = adapter.adapted(model.tensors, added.folder, files, home=added.home)
  changed = {n for n, t in tensors.items() if t is not model.tensors.get(n)}
  if line := codes.problem(model.name, model.tensors, changed, model.config, model.folder):
    raise ValueError(f"{added.folder} is added to {line}")
  names = {id(tensor): name for name, tensor in model.tensors.items()}
  tied = {head: tensors[names[id(tensor)]] for head, tensor in model.tied.items()}
  paths = adapter.paths(added.folder)
  dropped = {**model.dropped, **adapter.fates(added.folder)}
  return model._replace(tensors=tensors, tied=tied, dropped=dropped, files=(*model.files, *paths))


def every(
  references: Iterable[tuple[str, str | os.PathLike[str]]], files: Files, find: hub.Finder
) -> list[planning.Model]:
  """Opens models by their names and references, or tells of all that cannot be opened."""
  made: list[planning.Model] = []
  wrong: list[OSError | ValueError] = []
  for name, reference in references:
    try:
      made.append(opened(split(reference), files, find, name))
    except (OSError, ValueError) as error:
      wrong.append(error)
  if len(wrong) == 1:
    raise wrong[0]
  if wrong:
    raise planning.Problems([str(error) for error in wrong])
  return made


def foreseen(name: str, plan: planning.Plan) -> planning.Model:
  """Returns the model that a plan will make: it can be planned with, and not be read."""

  def read(start: int, out: np.ndarray) -> None:
    raise NotMade(f"{name} has not been made yet.")

  tensors = {
    o.name: Tensor(f"{name}: tensor {o.name!r}", o.dtype, o.shape, read) for o in plan.outputs
  }
  text = plan.texts.get(folder.CONFIG)
  config = weights.config(plan.donor) if text is None else json.loads(text)
  return planning.with_ties(planning.Model(name, plan.donor, tensors, (), config, texts=plan.texts))
