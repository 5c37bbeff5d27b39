"""Opens what recipes name: folders and ids of the hub, with adapters on top."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jaxmerge import opening, planning
from jaxmerge.io import hub
from jaxmerge.io.tensor import Files
from jaxmerge.recipe.places import Problem, RecipeError
from jaxmerge.recipe.records import Model
from jaxmerge.recipe.vocabulary import Papers


class Opener(NamedTuple):
  """How models are opened.

  Attributes:
    model: opens a model; RecipeError for one that is not there, or is damaged.
    papers: finds the small files of one whose tokenizer alone is wanted; OSError, ValueError.
    find: finds both, and knows what came from the hub.
  """

  model: Callable[[Model], planning.Model]
  papers: Callable[[Model], Papers]
  find: hub.Finder


def opener(files: Files, *, download: bool = False) -> Opener:
  """Returns how the models of recipes are opened; nothing is fetched without `download`."""
  find = hub.Finder(download=download)

  def opened(model: Model) -> planning.Model:
    own = (model.path, model.revision, model.adapter, model.adapter_revision)
    try:
      return opening.opened(opening.Reference(*own), files, find, str(model))
    except (OSError, ValueError) as error:
      raise RecipeError([Problem(model.place, str(error))]) from error

  def papers(model: Model) -> Papers:
    return Papers(find(model.path, model.revision, weights=False).folder)

  return Opener(opened, papers, find)
