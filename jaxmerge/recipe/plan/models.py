"""Opens what recipes name: folders and ids of the hub, with adapters on top."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from jaxmerge.files import adapter_inputs, inputs, plan
from jaxmerge.io.huggingface import folder, hub
from jaxmerge.io.huggingface.vocabulary import TokenizerFiles
from jaxmerge.io.tensors.tensor import Files
from jaxmerge.recipe.errors import Problem, RecipeError
from jaxmerge.recipe.records import Model

Rename = Mapping[str, str]  # Beginnings of names to others.


@contextlib.contextmanager
def _at_place(model: Model) -> Iterator[None]:
  """Raises errors of a model with the place where the recipe names it."""
  try:
    yield
  except (OSError, ValueError) as error:
    raise RecipeError([Problem(model.place, str(error))]) from error


class Opener(NamedTuple):
  """How models are opened.

  Attributes:
    model: opens a model; RecipeError for one that is not there, or is damaged.
    with_adapters: adds the adapters of a reference, if it has some, to an open model; likewise.
    tokenizer_files: finds the files of a tokenizer; OSError, ValueError.
    find: finds both, and knows what came from the hub.
  """

  model: Callable[[Model, Rename], plan.Model]
  with_adapters: Callable[[Model, plan.Model, Rename], plan.Model]
  tokenizer_files: Callable[[Model], TokenizerFiles]
  find: hub.Finder


def opener(files: Files, *, download: bool = False) -> Opener:
  """Returns how the models of recipes are opened; nothing is fetched without `download`."""
  find = hub.Finder(download=download)

  def reference(model: Model) -> inputs.Reference:
    return inputs.Reference(model.path, model.revision, model.adapters)

  def open_model(model: Model, rename: Rename) -> plan.Model:
    with _at_place(model):
      return inputs.open_reference(reference(model), files, find, str(model), rename)

  def with_adapters(model: Model, opened_model: plan.Model, rename: Rename) -> plan.Model:
    with _at_place(model):
      changed = inputs.add_adapters(opened_model, reference(model), files, find, rename)
      return changed._replace(name=str(model))

  def tokenizer_files(model: Model) -> TokenizerFiles:
    home = find(model.path, model.revision, weights=False).folder
    files.note(folder.small_files(home))
    texts: dict[str, adapter_inputs.Text] = {}
    for path, revision in model.adapters:
      added = find(path, revision, weights=False).folder
      files.note(folder.small_files(added))
      texts |= adapter_inputs.tokenizer_files(added, home)
    return TokenizerFiles(home, texts)

  return Opener(open_model, with_adapters, tokenizer_files, find)
