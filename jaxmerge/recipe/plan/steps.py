"""Plans the recipes of a file together, in the order in which they use each other's results."""

from __future__ import annotations

import dataclasses
import io
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple  # Any: facts are plain JSON.

from jaxmerge.files.plan import Model as Opened
from jaxmerge.files.plan import Plan
from jaxmerge.io.huggingface import folder, vocabulary
from jaxmerge.io.huggingface.vocabulary import TokenizerFiles
from jaxmerge.io.tensors.tensor import Files
from jaxmerge.recipe import errors
from jaxmerge.recipe.errors import RecipeError
from jaxmerge.recipe.plan import intermediate, models, planner
from jaxmerge.recipe.plan.intermediate import Intermediate
from jaxmerge.recipe.records import Model, Recipe, models_of
from jaxmerge.recipe.tokenizer import build

RECIPE = "jaxmerge_recipe.yml"


class Text(NamedTuple):
  """The text of recipes.

  Attributes:
    text: YAML.
    parse: (*, strict) -> the recipes; its errors name the places that the user knows.
  """

  text: str
  parse: Callable[..., tuple[Recipe, ...]]


class Step(NamedTuple):
  """A recipe of a file, and its plan.

  Attributes:
    recipe: the recipe.
    plan: outcome of every tensor, planned before the results that it uses are merged.
    uses: results of earlier recipes that it builds on, by name; of the last recipe all.
    result: what it makes for later recipes; None of the last one, whose result is the file's.
  """

  recipe: Recipe
  plan: Plan
  uses: Mapping[str, Intermediate]
  result: Intermediate | None

  def bind(self, places: Mapping[str, pathlib.Path], files: Files) -> Plan:
    """Returns the plan once what it builds on is merged.

    It reads from there, takes over the small files that lie there, and has the provenance.

    Args:
      places: folders of the results that it builds on, by name; they have been opened.
      files: open files of the models.
    """
    if not self.uses:
      return self.plan
    every = {name: folder.provenance(places[name]) for name in self.uses}
    earlier = (
      {n: {"plan": provenance.get("plan")} for n, provenance in every.items()}
      if self.result
      else every
    )
    plan = self._move(places)
    return plan._replace(
      facts={**plan.facts, "folders": self._folders(), "earlier": earlier},
      stamps=dict(files.stamps),
    )

  def _move(self, places: Mapping[str, pathlib.Path]) -> Plan:
    """Returns the plan with the small files of results that it builds on at their places."""
    plan, donor = self.plan, planner.donor_of(self.recipe)
    if _is_result(donor, self.uses):
      known = self.uses[donor.path].model.texts
      texts = {n: t for n, t in plan.texts.items() if n not in known or known[n] != t}
      plan = plan._replace(donor=places[donor.path], texts=texts)
    if self.recipe.tokenizer is None:
      return plan
    homes = {places[m.path] for m in models_of(self.recipe) if _is_result(m, self.uses)}
    vocabularies = {home / name for home in homes for name in vocabulary.FILES}
    return plan._replace(inputs=plan.inputs | {path for path in vocabularies if path.is_file()})

  def _folders(self) -> dict[str, str]:
    """Returns where models lie, for the provenance; results of recipes are known by their names."""
    results = {str(m): m.path for m in models_of(self.recipe) if _is_result(m, self.uses)}
    folders = {**self.plan.facts["folders"], **results}
    return {name: folders[name] for name in self.plan.outcomes if name in folders}


def plan_steps(
  text: Text,
  files: Files,
  *,
  shard_size: int,
  download: bool = False,
  strict: bool = False,
  compat: Literal["mergekit"] | None = None,
) -> tuple[Step, ...]:
  """Plans the recipes of a text, each after those that it builds on; the last makes the result.

  Args:
    text: of the recipes; models in it are folders or ids, perhaps with adapters.
    files: open files of the models.
    shard_size: bytes of a file of weights, at most.
    download: whether models that the hub's cache lacks are fetched; else no network is used.
    strict: whether keys without effect are errors; a recipe may say so as well.
    compat: what recipes have that say nothing of `compat` themselves.

  Raises:
    RecipeError: for errors in the recipes, and features that are not supported yet.
    errors.Problems: naming the tensors and models that do not fit.
  """
  opener = models.opener(files, download=download)
  recipes = text.parse(strict=strict) if download else _parse(text, strict, opener)
  recipes = tuple(dataclasses.replace(r, compat=r.compat or compat) for r in recipes)
  results: dict[str, Intermediate] = {}
  steps: list[Step] = []
  problems: list[Exception] = []
  for recipe in recipes:
    plan = None
    with errors.collect(problems):
      plan = _plan(recipe, results, opener)
    if plan is None:
      continue
    plan = plan._replace(stamps=dict(files.stamps))
    if recipe is recipes[-1]:
      facts = {"compat": compat} if compat else {}
      steps.append(_last(text.text, recipe, plan, {**facts, **opener.find.facts}, steps))
    elif recipe.name is not None:
      uses = {n: result for n, result in results.items() if n in recipe.uses}
      results[recipe.name] = intermediate.of_plan(recipe.name, plan, shard_size)
      steps.append(Step(recipe, plan, uses, results[recipe.name]))
  errors.raise_all(problems)
  return tuple(steps)


def _last(
  text: str, recipe: Recipe, plan: Plan, facts: Mapping[str, Any], steps: Sequence[Step]
) -> Step:
  """Returns the step that makes the result of a file: its provenance is that of all."""
  text = io.StringIO(text, newline=None).read()  # Normalises line endings.
  plan = plan._replace(
    facts={**plan.facts, "recipe": text, **facts, **plan.facts},  # Those of the plan come first.
    texts={**plan.texts, RECIPE: text},
    earlier={str(step.recipe.name): step.plan for step in steps},
  )
  results = {str(step.recipe.name): step.result for step in steps if step.result is not None}
  return Step(recipe, plan, results, None)


def _parse(text: Text, strict: bool, opener: models.Opener) -> tuple[Recipe, ...]:
  """Parses recipes; where they are wrong, it also reports which models cannot be opened."""
  problems: list[Exception] = []
  with errors.collect(problems):
    return text.parse(strict=strict)
  for model in problems[0].models if isinstance(problems[0], RecipeError) else ():
    with errors.collect(problems):
      opener.model(model, {})
  errors.raise_all(problems)
  return ()


def _plan(
  recipe: Recipe, results: Mapping[str, Intermediate], opener: models.Opener
) -> Plan | None:
  """Plans a recipe; None where one that it builds on has no plan: its other models are opened."""

  def open_model(model: Model) -> Opened:
    if _is_result(model, results):
      return opener.with_adapters(model, results[model.path].model, recipe.rename)
    return opener.model(model, recipe.rename)

  def tokenizer_files(model: Model) -> TokenizerFiles:
    is_result = _is_result(model, results)
    return build.files_of(results[model.path].model) if is_result else opener.tokenizer_files(model)

  if all(name in results for name in recipe.uses):
    return planner.plan_recipe(recipe, open_model, tokenizer_files)
  known = (m for m in models_of(recipe) if m.path in results or m.path not in recipe.uses)
  planner.open_models(recipe, known, open_model)
  return None


def _is_result(model: Model, results: Mapping[str, Intermediate]) -> bool:
  """Returns whether a reference names a recipe's result; one with a revision is a hub id."""
  return model.revision is None and model.path in results
