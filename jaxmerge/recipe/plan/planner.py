"""From a recipe and the headers of its models to a plan: what becomes of every tensor."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal  # Any: facts are plain JSON.

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
from jaxmerge.files.inputs import planned_model
from jaxmerge.files.plan import Plan
from jaxmerge.io.huggingface import folder
from jaxmerge.io.huggingface.vocabulary import Papers
from jaxmerge.io.tensors.tensor import Files
from jaxmerge.recipe import errors as recipe_errors
from jaxmerge.recipe import parameters
from jaxmerge.recipe.errors import RecipeError
from jaxmerge.recipe.mergekit import precision
from jaxmerge.recipe.plan import jobs, models, partial, uneven_layers
from jaxmerge.recipe.plan import rows as result_rows
from jaxmerge.recipe.plan.rows import Opened, Row
from jaxmerge.recipe.records import Model, Recipe, groups, referenced
from jaxmerge.recipe.syntax import schema
from jaxmerge.recipe.tokenizer import build, embeddings

RECIPE = "jaxmerge_recipe.yml"


def of_file(
  path: str | os.PathLike[str],
  files: Files,
  made: Callable[[str, Plan], plans.Model] = planned_model,
  *,
  download: bool = False,
  strict: bool = False,
  compat: Literal["mergekit"] | None = None,
) -> Plan:
  """Plans the last recipe of a file; its models are folders or ids, perhaps with adapters.

  Args:
    path: of the file.
    files: open files of the models.
    made: (name, plan) -> the model that a recipe makes on which another one builds; by default it
      is only known what that will be, which is enough to plan. Of one that is there, the facts of
      the plan keep the provenance, under `earlier`.
    download: whether models that the hub's cache lacks are fetched; else no network is used.
    strict: whether keys without effect are errors; a recipe may say so as well.
    compat: what recipes have that say nothing of `compat` themselves.

  Raises:
    RecipeError: for what is wrong with the recipes, or cannot be run yet.
    errors.Problems: naming the tensors and models that do not fit.
  """
  text = schema.text_of(path)
  return of_text(text, str(path), files, made, download=download, strict=strict, compat=compat)


def of_text(
  text: str,
  name: str,
  files: Files,
  made: Callable[[str, Plan], plans.Model] = planned_model,
  *,
  download: bool = False,
  strict: bool = False,
  compat: Literal["mergekit"] | None = None,
) -> Plan:
  """Plans the last recipe of a text; errors call it by this name. The rest is as for `of_file`."""
  opener = models.opener(files, download=download)
  read = functools.partial(schema.parse, text, name, strict=strict)
  recipes = read() if download else _read(read, opener)
  recipes = tuple(dataclasses.replace(r, compat=r.compat or compat) for r in recipes)
  text = io.StringIO(text, newline=None).read()  # Whatever its lines end with.
  results: dict[str, plans.Model] = {}
  earlier: dict[str, Plan] = {}
  found: list[Exception] = []

  def of(recipe: Recipe) -> Callable[[Model], plans.Model]:
    def model(own: Model) -> plans.Model:
      here = own.revision is None and own.path in results
      if here:
        return opener.adapted(own, results[own.path], recipe.rename)
      return opener.model(own, recipe.rename)

    return model

  def papers(own: Model) -> Papers:
    here = own.revision is None and own.path in results
    return build.papers(results[own.path]) if here else opener.papers(own)

  for recipe in (r for r in recipes[:-1] if r.name is not None):
    for plan in _tried(recipe, of(recipe), papers, results, found):
      there = {n: folder.provenance(own.folder) for n, own in _there(results).items()}
      known = {n: {"plan": own.get("plan")} for n, own in there.items() if n in recipe.uses}
      plan = _dated(plan, results, files, {"earlier": known} if known else {})
      earlier[str(recipe.name)] = plan
      results[str(recipe.name)] = (planned_model if found else made)(str(recipe.name), plan)
  last = _tried(recipes[-1], of(recipes[-1]), papers, results, found)
  recipe_errors.check(found)
  (plan,) = last
  asked = {"compat": compat} if compat else {}
  facts = {"recipe": text, **asked, **opener.find.facts, **plan.facts}
  if own := _there(results):
    facts["earlier"] = {name: folder.provenance(made.folder) for name, made in own.items()}
  plan = plan._replace(texts={**plan.texts, RECIPE: text}, earlier=earlier)
  return _dated(plan, results, files, facts)


def _there(results: Mapping[str, plans.Model]) -> dict[str, plans.Model]:
  """Those among the results of recipes that are made already."""
  return {name: own for name, own in results.items() if own.files}


def _dated(
  plan: Plan, results: Mapping[str, plans.Model], files: Files, facts: Mapping[str, Any]
) -> Plan:
  """The plan with the stamps of its inputs; results of recipes are known by their provenance."""
  made = {file for own in _there(results).values() for file in own.files}
  return plan._replace(
    inputs=plan.inputs - made, facts={**plan.facts, **facts}, stamps=dict(files.stamps)
  )


def _read(read: Callable[[], tuple[Recipe, ...]], opener: models.Opener) -> tuple[Recipe, ...]:
  """Reads recipes; of those that are wrong it is told as well which models cannot be opened."""
  found: list[Exception] = []
  with recipe_errors.noted(found):
    return read()
  for own in found[0].models if isinstance(found[0], RecipeError) else ():
    with recipe_errors.noted(found):
      opener.model(own, {})
  recipe_errors.check(found)
  return ()


def _tried(
  recipe: Recipe,
  open_model: Callable[[Model], plans.Model],
  papers_of: Callable[[Model], Papers],
  results: Mapping[str, plans.Model],
  found: list[Exception],
) -> list[Plan]:
  """The plan of a recipe; none where it has problems, or one that it builds on has."""
  plans: list[Plan] = []
  with recipe_errors.noted(found):
    if all(name in results for name in recipe.uses):
      plans.append(planned(recipe, open_model, papers_of))
    else:
      known = (m for m in referenced(recipe) if m.path in results or m.path not in recipe.uses)
      _opened(recipe, known, open_model)
  return plans


def _opened(
  recipe: Recipe, models: Iterable[Model], open_model: Callable[[Model], plans.Model]
) -> dict[Model, plans.Model]:
  """Opens models, or tells of all that cannot be opened, and what else is known to be wrong."""
  made: dict[Model, plans.Model] = {}
  found: list[Exception] = []
  for model in models:
    with recipe_errors.noted(found):
      made[model] = open_model(model)
  if len(made) < len(referenced(recipe)):
    found += partial.problems(recipe, made)
  recipe_errors.check(found)
  return made


def _donor(recipe: Recipe) -> Model:
  """The model that gives config and small files: the base, else the first."""
  return recipe.base_model or groups(recipe)[0].sources[0].model


def _spelt(recipe: Recipe, opened: Opened) -> dict[Model, plans.Model]:
  """The models, with the donor's names for what they call otherwise."""
  first = _donor(recipe)
  order = [first, *(m for m in opened if m != first)]
  return dict(zip(order, name_variants.align([opened[m] for m in order]), strict=True))


def planned(
  recipe: Recipe,
  open_model: Callable[[Model], plans.Model],
  papers_of: Callable[[Model], Papers],
) -> Plan:
  """Plans what a recipe says.

  Args:
    recipe: the recipe.
    open_model: opens a model that it names.
    papers_of: returns the small files of a model of which only the tokenizer is wanted.

  Raises:
    RecipeError: for what is wrong with the recipe once the models are known.
    errors.Problems: naming the tensors and models that do not fit each other.
  """
  found: list[Exception] = []
  opened = _spelt(recipe, _opened(recipe, referenced(recipe), open_model))
  built = build.Built(opened, {})
  with recipe_errors.noted(found):
    built = build.built(recipe, opened, papers_of)
  models, uneven = built.models, bool(found)
  donor = models[_donor(recipe)]
  config = donor.config
  rows: list[Row] = []
  with recipe_errors.noted(found):
    rows = list(result_rows.rows(recipe, models, config))
  if not rows:
    recipe_errors.check(found)
  changed = dict(config)
  with recipe_errors.noted(found):
    changed = result_rows.config(recipe, config, rows, donor)
    uneven_layers.check(rows, models, config, changed)
  names, modules = result_rows.all_names(rows), result_rows.by_module(rows)
  heads = dict.fromkeys(head for m in models.values() for head in m.tied)
  idle = parameters.unmatched(recipe, names, modules)
  wrong = {p.place for p in parameters.unmatched(recipe, names | heads, modules)}
  if misplaced := [p for p in idle if p.place in wrong]:
    found.append(RecipeError(misplaced))
  settled, problems = jobs.settled(recipe, rows)
  if problems := (*problems, *jobs.refused(recipe, models, settled)):
    found.append(RecipeError(problems))
  work = jobs.wanted(recipe, models, donor, rows, settled)
  if problems := jobs.unfit(recipe, models, settled, work.jobs):
    found.append(RecipeError(problems))
  # Of embeddings that were not brought together nothing can be told.
  known = [w for w in work.wants if not (uneven and embeddings.wanted(w))]
  inputs = [donor, *(m for m in models.values() if m is not donor)]
  lines = misfits.lines(known, inputs, recipe.missing)
  fit = compatibility.compare(known, inputs, allow=recipe.allow, tokens=recipe.tokenizer is None)
  lines += fit.unless(lines)
  if found:
    found += [errors.Problems(lines)] if lines else []
    recipe_errors.check(found)
  plan = assemble.make_plan(
    work.wants,
    work.jobs,
    inputs,
    dtype=precision.stored(recipe),
    missing=recipe.missing,
    dropped=result_rows.left_out(recipe, models, rows),
    misfits=lines,
  )
  plan = plan._replace(notes=(*plan.notes, *fit.notes))
  if recipe.compat == "mergekit":
    plan = precision.computed(recipe, plan)
  if precision.stored(recipe) is None:
    plan = plan._replace(notes=(*plan.notes, *assemble.note_rounding(plan)))
  plan, changed = tied_weights.resolve_ties(plan, donor, built.config(changed))
  own = {} if changed == config else {folder.CONFIG: json.dumps(changed, indent=2) + "\n"}
  # A donor that is still to be made has other files than its folder.
  texts = {**donor.texts, **own, **built.texts}
  vain = [p._replace(text=f"{p.text} The output head is the embedding.") for p in idle]
  told = (f"line {p.place.line}: {p.text}" for p in (*recipe.ignored, *vain))
  notes = (*told, *work.notes, *plan.notes)
  plan = plan._replace(texts=texts, outcomes=built.outcomes(plan.outcomes), notes=notes)
  return remote_code.refer_to_code(plan, inputs)
