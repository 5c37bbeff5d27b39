"""Opens what recipes name: folders and ids of the hub, with adapters on top."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from jaxmerge import adding, opening, planning
from jaxmerge.io import folder, hub
from jaxmerge.io.tensor import Files
from jaxmerge.io.vocabulary import Papers
from jaxmerge.recipe.places import Problem, RecipeError
from jaxmerge.recipe.records import Model

Rename = Mapping[str, str]  # Beginnings of names to others.


@contextlib.contextmanager
def _placed(model: Model) -> Iterator[None]:
  """Says of what is wrong with a model where it is named."""
  try:
    yield
  except (OSError, ValueError) as error:
    raise RecipeError([Problem(model.place, str(error))]) from error


class Opener(NamedTuple):
  """How models are opened.

  Attributes:
    model: opens a model; RecipeError for one that is not there, or is damaged.
    adapted: adds the adapters of a reference, if it has some, to a model that is open; likewise.
    papers: finds the small files of one whose tokenizer alone is wanted; OSError, ValueError.
    find: finds both, and knows what came from the hub.
  """

  model: Callable[[Model, Rename], planning.Model]
  adapted: Callable[[Model, planning.Model, Rename], planning.Model]
  papers: Callable[[Model], Papers]
  find: hub.Finder


def opener(files: Files, *, download: bool = False) -> Opener:
  """Returns how the models of recipes are opened; nothing is fetched without `download`."""
  find = hub.Finder(download=download)

  def reference(model: Model) -> opening.Reference:
    return opening.Reference(model.path, model.revision, model.adapters)

  def opened(model: Model, rename: Rename) -> planning.Model:
    with _placed(model):
      return opening.opened(reference(model), files, find, str(model), rename)

  def adapted(model: Model, made: planning.Model, rename: Rename) -> planning.Model:
    with _placed(model):
      own = opening.adapted(made, reference(model), files, find, rename)
      return own._replace(name=str(model))

  def papers(model: Model) -> Papers:
    home = find(model.path, model.revision, weights=False).folder
    files.note(folder.small(home))
    texts: dict[str, adding.Text] = {}
    for path, revision in model.adapters:
      added = find(path, revision, weights=False).folder
      files.note(folder.small(added))
      texts |= adding.tokenizer(added, home)
    return Papers(home, texts)

  return Opener(opened, adapted, papers, find)
