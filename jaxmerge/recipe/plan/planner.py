"""Plans a recipe from the headers of its models: the outcome of every tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any  # Any: what a config.json holds.

from jaxmerge import errors
from jaxmerge.files import (
  assemble,
  compatibility,
  misfits,
  name_variants,
  remote_code,
  tied_weights,
)
from jaxmerge.files import plan as plans
from jaxmerge.files.plan import Plan
from jaxmerge.io.huggingface import pipeline
from jaxmerge.io.huggingface.vocabulary import TokenizerFiles
from jaxmerge.recipe import errors as recipe_errors
from jaxmerge.recipe import parameters
from jaxmerge.recipe.errors import Problem, RecipeError
from jaxmerge.recipe.mergekit import precision
from jaxmerge.recipe.plan import jobs, partial, uneven_layers
from jaxmerge.recipe.plan import rows as result_rows
from jaxmerge.recipe.plan.rows import Opened, Row
from jaxmerge.recipe.records import Model, Recipe, groups, models_of
from jaxmerge.recipe.tokenizer import build, embeddings


def plan_recipe(
  recipe: Recipe,
  open_model: Callable[[Model], plans.Model],
  read_files: Callable[[Model], TokenizerFiles],
) -> Plan:
  """Returns the plan of a recipe.

  Args:
    recipe: the recipe.
    open_model: opens a model that the recipe names.
    read_files: returns the small files of a model that only provides a tokenizer.

  Raises:
    RecipeError: for errors in the recipe that show once the models are known.
    errors.Problems: naming the tensors and models that do not fit each other.
  """
  problems: list[Exception] = []
  opened = _spelt_alike(recipe, open_models(recipe, models_of(recipe), open_model))
  built = build.TokenizerResult(opened, {})
  with recipe_errors.collect(problems):
    built = build.build(recipe, opened, read_files)
  models, donor = built.models, built.models[donor_of(recipe)]
  comparable = not problems  # Embeddings that were not aligned have mismatched shapes.
  rows = _rows(recipe, models, donor, problems)
  config = _config(recipe, models, donor, rows, problems)
  idle = _idle_conditions(recipe, models, rows, problems)
  work = _work(recipe, models, donor, rows, problems)
  inputs = [donor, *(m for m in models.values() if m is not donor)]
  requests = [w for w in work.requests if comparable or not embeddings.has_token_matrix(w)]
  lines = misfits.lines(requests, inputs, recipe.missing)
  tokens = recipe.tokenizer is None
  fit = compatibility.compare(requests, inputs, allow=recipe.allow, tokens=tokens)
  lines += fit.unless(lines)
  if problems:
    problems += [errors.Problems(lines)] if lines else []
    recipe_errors.raise_all(problems)
  plan = assemble.make_plan(
    work.requests,
    work.jobs,
    inputs,
    dtype=precision.result_dtype(recipe),
    missing=recipe.missing,
    dropped=result_rows.left_out(recipe, models, rows),
    misfits=lines,
  )
  plan = _with_precision(recipe, plan._replace(notes=(*plan.notes, *fit.notes)))
  plan = _with_texts(plan, donor, built, config)
  notes = (*_ignored(recipe, idle), *work.notes, *plan.notes)
  plan = plan._replace(outcomes=built.outcomes(plan.outcomes), notes=notes)
  return remote_code.refer_to_code(plan, inputs)


def open_models(
  recipe: Recipe, models: Iterable[Model], open_model: Callable[[Model], plans.Model]
) -> dict[Model, plans.Model]:
  """Opens models, or raises one error for all that cannot be opened and other known problems."""
  opened: dict[Model, plans.Model] = {}
  problems: list[Exception] = []
  for model in models:
    with recipe_errors.collect(problems):
      opened[model] = open_model(model)
  if len(opened) < len(models_of(recipe)):
    problems += partial.problems(recipe, opened)
  recipe_errors.raise_all(problems)
  return opened


def donor_of(recipe: Recipe) -> Model:
  """Returns the model that provides config and small files: the base, or else the first."""
  return recipe.base_model or groups(recipe)[0].sources[0].model


def _spelt_alike(recipe: Recipe, opened: Opened) -> dict[Model, plans.Model]:
  """Returns the models with tensors renamed to the donor's names where they differ."""
  first = donor_of(recipe)
  order = [first, *(m for m in opened if m != first)]
  return dict(zip(order, name_variants.align([opened[m] for m in order]), strict=True))


def _rows(
  recipe: Recipe, models: Opened, donor: plans.Model, problems: list[Exception]
) -> list[Row]:
  """Returns the rows of the result; without rows, raises all problems collected so far."""
  with recipe_errors.collect(problems):
    if rows := list(result_rows.rows(recipe, models, donor.config)):
      return rows
  recipe_errors.raise_all(problems)
  return []


def _config(
  recipe: Recipe,
  models: Opened,
  donor: plans.Model,
  rows: Sequence[Row],
  problems: list[Exception],
) -> dict[str, Any]:
  """Returns the donor's config with the layers and the dtype of the result."""
  changed = dict(donor.config)
  with recipe_errors.collect(problems):
    changed = result_rows.config(recipe, donor.config, rows, donor)
    uneven_layers.check(rows, models, donor.config, changed)
  return changed


def _idle_conditions(
  recipe: Recipe, models: Opened, rows: Sequence[Row], problems: list[Exception]
) -> list[Problem]:
  """Returns the conditions that match only tied heads; other unmatched ones are problems."""
  names, modules = result_rows.all_names(rows), result_rows.by_module(rows)
  heads = dict.fromkeys(head for m in models.values() for head in m.tied)
  wrong = {p.place for p in parameters.unmatched_conditions(recipe, names | heads, modules)}
  idle = parameters.unmatched_conditions(recipe, names, modules)
  if misplaced := [p for p in idle if p.place in wrong]:
    problems.append(RecipeError(misplaced))
  return [p for p in idle if p.place not in wrong]


def _work(
  recipe: Recipe,
  models: Opened,
  donor: plans.Model,
  rows: Sequence[Row],
  problems: list[Exception],
) -> jobs.Work:
  """Returns the requests for tensors and the jobs that merge them."""
  assignments, wrong = jobs.assign(recipe, rows)
  if wrong := (*wrong, *jobs.precision_problems(recipe, models, assignments)):
    problems.append(RecipeError(wrong))
  work = jobs.plan_jobs(recipe, models, donor, rows, assignments)
  if wrong := jobs.matrix_problems(recipe, models, assignments, work.jobs):
    problems.append(RecipeError(wrong))
  return work


def _with_precision(recipe: Recipe, plan: Plan) -> Plan:
  """Returns a plan with the recipe's compute dtypes, and notes on rounding."""
  if recipe.compat == "mergekit":
    plan = precision.compute_as_mergekit(recipe, plan)
  if precision.result_dtype(recipe) is None:
    plan = plan._replace(notes=(*plan.notes, *assemble.note_rounding(plan)))
  return plan


def _with_texts(
  plan: Plan, donor: plans.Model, built: build.TokenizerResult, config: Mapping[str, Any]
) -> Plan:
  """Returns a plan with those files of the result that differ from the donor's folder."""
  plan, config = tied_weights.resolve_ties(plan, donor, built.config(config))
  texts = pipeline.config_texts(donor.folder, donor.config, config)
  # A donor that is not merged yet has files that its folder lacks.
  return plan._replace(texts={**donor.texts, **texts, **built.texts})


def _ignored(recipe: Recipe, idle: Sequence[Problem]) -> list[str]:
  """Returns notes on keys of the recipe that have no effect."""
  tied = [p._replace(text=f"{p.text} The output head is the embedding.") for p in idle]
  return [f"{p.place.short}: {p.text}" for p in (*recipe.ignored, *tied)]
