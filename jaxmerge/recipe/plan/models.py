"""Opens the models that recipes name: folders and hub ids, with adapters applied."""

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

Rename = Mapping[str, str]  # Old to new prefixes of names.


@contextlib.contextmanager
def _at_place(model: Model) -> Iterator[None]:
  """Adds to a model's errors the place where the recipe names it."""
  try:
    yield
  except (OSError, ValueError) as error:
    raise RecipeError([Problem(model.place, f"{error}{model.hint}")]) from error


class Opener(NamedTuple):
  """Functions that open models.

  Attributes:
    model: opens a model; raises RecipeError if it is missing or damaged.
    with_adapters: adds the adapters of a reference, if any, to an open model; raises likewise.
    tokenizer_files: finds the files of a tokenizer; raises OSError or ValueError.
    find: finds both, and records which came from the hub.
  """

  model: Callable[[Model, Rename], plan.Model]
  with_adapters: Callable[[Model, plan.Model, Rename], plan.Model]
  tokenizer_files: Callable[[Model], TokenizerFiles]
  find: hub.Finder


def opener(files: Files, *, download: bool = False) -> Opener:
  """Returns the opener for models of recipes; it downloads nothing without `download`."""
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
