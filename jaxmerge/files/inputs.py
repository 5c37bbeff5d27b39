"""Opens a model by how it is called: a folder, an id of the hub, either with adapters on top."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from jaxmerge import adding, planning, spelling
from jaxmerge.io import folder, hub, weights
from jaxmerge.io import reference as reference_text
from jaxmerge.io.tensor import Files, NotMade, Tensor


class Reference(NamedTuple):
  """A model, and the adapters that are added to it.

  Attributes:
    path: a folder, or an id of the hub.
    revision: of the hub's repository.
    adapters: folders or ids of adapters, each with its revision; they are added in this order.
  """

  path: str
  revision: str | None = None
  adapters: tuple[tuple[str, str | None], ...] = ()


def split(reference: str | os.PathLike[str]) -> Reference:
  """Takes `model@revision+adapter@revision` apart; a folder, or a `Path`, is not taken apart.

  >>> split("org/model@main+org/adapter")
  Reference(path='org/model', revision='main', adapters=(('org/adapter', None),))

  Raises:
    ValueError: where there is nothing beside a `+`.
  """
  if not isinstance(reference, str) or "+" not in reference or os.path.isdir(reference):
    return Reference(*hub.split(reference))
  parts = reference_text.parted(reference, os.path.isdir)
  if not all(parts):
    raise ValueError(
      f"{reference}: no such folder, and not `model+adapter`; a Path is not taken apart."
    )
  return Reference(*hub.split(parts[0]), tuple(hub.split(part) for part in parts[1:]))


def opened(
  own: Reference,
  files: Files,
  find: hub.Finder,
  name: str,
  rename: Mapping[str, str] | None = None,
) -> planning.Model:
  """Opens a model: only headers are read. An adapted matrix is computed when it is read.

  Args:
    own: which one.
    files: open files of the models.
    find: finds folders and what is in the hub's cache.
    name: what the model is called.
    rename: beginnings of its names, and of its adapters', to others.

  Raises:
    FileNotFoundError: where it, or its adapter, is not there.
    ValueError: naming what is damaged or does not fit.
  """
  found = find(own.path, own.revision)
  model = planning.model(found.folder, files, name=name, home=found.home)
  return adapted(model, own, files, find, rename)


def adapted(
  model: planning.Model,
  own: Reference,
  files: Files,
  find: hub.Finder,
  rename: Mapping[str, str] | None = None,
) -> planning.Model:
  """Adds the adapters of a reference to a model; arguments as for `opened`.

  The model has the tokenizer and the chat template of an adapter whose folder holds them.
  """
  brought: dict[str, adding.Text] = {}
  for path, revision in own.adapters:
    added = find(path, revision)
    model = adding.added(model, added.folder, files, home=added.home, rename=rename)
    texts = adding.tokenizer(added.folder, model.folder)
    if other := [n for n in texts if n in brought and brought[n] != texts[n]]:
      raise ValueError(f"{added.folder}: its {other[0]} is not that of the adapter before it.")
    brought |= texts
    if texts:
      note = f"{model.name} has the tokenizer files of {added.home or added.folder}."
      model = model._replace(texts={**model.texts, **texts}, notes=(*model.notes, note))
  return spelling.renamed(model, rename or {})


def every(
  references: Iterable[tuple[str, str | os.PathLike[str]]],
  files: Files,
  find: hub.Finder,
  rename: Mapping[str, str] | None = None,
) -> list[planning.Model]:
  """Opens models by their names and references, or tells of all that cannot be opened."""
  made: list[planning.Model] = []
  wrong: list[OSError | ValueError] = []
  for name, reference in references:
    try:
      made.append(opened(split(reference), files, find, name, rename))
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
