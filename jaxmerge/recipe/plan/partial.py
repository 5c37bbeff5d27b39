"""Finds problems of a recipe even if some of its models cannot be opened."""

from __future__ import annotations

from collections.abc import Iterator

from jaxmerge import errors
from jaxmerge.files import misfits
from jaxmerge.files.plan import TensorRequest
from jaxmerge.recipe import parameters
from jaxmerge.recipe.errors import Problem, RecipeError
from jaxmerge.recipe.plan import rows as result_rows
from jaxmerge.recipe.plan.rows import Opened, Row
from jaxmerge.recipe.records import Group, Recipe, groups
from jaxmerge.recipe.tokenizer import embeddings


def problems(recipe: Recipe, models: Opened) -> list[Exception]:
  """Returns problems of conditions, parameters and shapes, as far as models are open.

  Slices and modules are not checked, as each has tensors of other models.

  Args:
    recipe: the recipe.
    models: the models that could be opened.
  """
  if not models or not recipe.models:
    return []
  base = recipe.base_model if recipe.base_model in models else None
  sources = tuple(s for s in recipe.models if s.model in models)
  rows = list(result_rows.whole_models(Group(sources, base, (), None, False, recipe.place), models))
  merged_rows = [row for row in rows if not parameters.is_excluded(recipe, row.tensor)]
  wrong: list[Exception] = []
  # If all models must have the same tensors, those of one model stand for all.
  if recipe.missing == "error" and (
    of_parameters := list(_parameter_problems(recipe, models, rows, merged_rows))
  ):
    wrong.append(RecipeError(of_parameters))
  requests = [_request(row, models) for row in merged_rows]
  known = [w for w in requests if recipe.tokenizer is None or not embeddings.has_token_matrix(w)]
  if lines := misfits.lines(known, [*models.values()], recipe.missing):
    wrong.append(errors.Problems(lines))
  return wrong


def _parameter_problems(
  recipe: Recipe, models: Opened, rows: list[Row], merged_rows: list[Row]
) -> Iterator[Problem]:
  # A head that is tied in these may be a tensor of others.
  heads: dict[str, int | None] = dict.fromkeys(n for m in models.values() for n in m.tied)
  yield from parameters.unmatched_conditions(recipe, heads | result_rows.all_names(rows))
  (whole,) = groups(recipe)
  for row in merged_rows:
    try:
      parameters.values(recipe, whole, row.tensor)
    except RecipeError as error:
      yield from error.problems


def _request(row: Row, models: Opened) -> TensorRequest:
  name, group = row.tensor.name, row.group
  parts = tuple(models[s.model].input(name) for s in group.sources)
  return TensorRequest(
    name, models[group.base].input(name) if group.base else None, parts, of_weights=True
  )
