"""From a recipe and the headers of its models to a plan: what becomes of every tensor."""

from __future__ import annotations

import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple  # Any: numbers of many kinds, what a config.json holds.

import numpy as np

from jaxmerge import planning
from jaxmerge.io import folder
from jaxmerge.io.tensor import Files, Tensor
from jaxmerge.opening import foreseen
from jaxmerge.planning import Job, Part, Plan, Want
from jaxmerge.recipe import (
  embeddings,
  narrowing,
  opening,
  parameters,
  partly,
  schema,
  stacking,
  telling,
  tokenizer,
  translating,
)
from jaxmerge.recipe.methods import METHODS
from jaxmerge.recipe.places import Problem, RecipeError
from jaxmerge.recipe.records import Missing, Model, Recipe, Source, View, groups, referenced
from jaxmerge.recipe.stacking import Opened, Row
from jaxmerge.recipe.vocabulary import Papers

RECIPE = "jaxmerge_recipe.yml"


def of_file(
  path: str | os.PathLike[str],
  files: Files,
  made: Callable[[str, Plan], planning.Model] = foreseen,
  *,
  download: bool = False,
) -> Plan:
  """Plans the last recipe of a file; its models are folders or ids, perhaps with adapters.

  Args:
    path: of the file.
    files: open files of the models.
    made: (name, plan) -> the model that a recipe makes on which another one builds; by default it
      is only known what that will be, which is enough to plan. Of one that is there, the facts of
      the plan keep the provenance, under `earlier`.
    download: whether models that the hub's cache lacks are fetched; else no network is used.

  Raises:
    RecipeError: for what is wrong with the recipes, or cannot be run yet.
    planning.Problems: naming the tensors and models that do not fit.
  """
  opener = opening.opener(files, download=download)
  recipes = schema.read(path) if download else _read(path, opener)
  text = pathlib.Path(path).read_text(encoding="utf-8")
  results: dict[str, planning.Model] = {}
  earlier: dict[str, Plan] = {}
  found: list[Exception] = []

  def model(own: Model) -> planning.Model:
    here = own.revision is None and own.path in results
    return opener.adapted(own, results[own.path]) if here else opener.model(own)

  def papers(own: Model) -> Papers:
    here = own.revision is None and own.path in results
    return tokenizer.papers(results[own.path]) if here else opener.papers(own)

  for recipe in (r for r in recipes[:-1] if r.name is not None):
    for plan in _tried(recipe, model, papers, results, found):
      earlier[str(recipe.name)] = plan
      results[str(recipe.name)] = (foreseen if found else made)(str(recipe.name), plan)
  last = _tried(recipes[-1], model, papers, results, found)
  telling.check(found)
  (plan,) = last
  facts = {"recipe": text, **opener.find.facts, **plan.facts}
  there = {name: own.folder for name, own in results.items() if own.files}
  if there:
    facts["earlier"] = {name: folder.provenance(path) for name, path in there.items()}
  return plan._replace(facts=facts, texts={**plan.texts, RECIPE: text}, earlier=earlier)


def _read(path: str | os.PathLike[str], opener: opening.Opener) -> tuple[Recipe, ...]:
  """Reads recipes; of those that are wrong it is told as well which models cannot be opened."""
  found: list[Exception] = []
  with telling.noted(found):
    return schema.read(path)
  for own in found[0].models if isinstance(found[0], RecipeError) else ():
    with telling.noted(found):
      opener.model(own)
  telling.check(found)
  return ()


def _tried(
  recipe: Recipe,
  open_model: Callable[[Model], planning.Model],
  papers_of: Callable[[Model], Papers],
  results: Mapping[str, planning.Model],
  found: list[Exception],
) -> list[Plan]:
  """The plan of a recipe; none where it has problems, or one that it builds on has."""
  plans: list[Plan] = []
  with telling.noted(found):
    if all(name in results for name in recipe.uses):
      plans.append(planned(recipe, open_model, papers_of))
    else:
      known = (m for m in referenced(recipe) if m.path in results or m.path not in recipe.uses)
      _opened(recipe, known, open_model)
  return plans


def _opened(
  recipe: Recipe, models: Iterable[Model], open_model: Callable[[Model], planning.Model]
) -> dict[Model, planning.Model]:
  """Opens models, or tells of all that cannot be opened, and what else is known to be wrong."""
  made: dict[Model, planning.Model] = {}
  found: list[Exception] = []
  for model in models:
    with telling.noted(found):
      made[model] = open_model(model)
  if len(made) < len(referenced(recipe)):
    found += partly.problems(recipe, made)
  telling.check(found)
  return made


def planned(
  recipe: Recipe,
  open_model: Callable[[Model], planning.Model],
  papers_of: Callable[[Model], Papers],
) -> Plan:
  """Plans what a recipe says.

  Args:
    recipe: the recipe.
    open_model: opens a model that it names.
    papers_of: returns the small files of a model of which only the tokenizer is wanted.

  Raises:
    RecipeError: for what is wrong with the recipe once the models are known.
    planning.Problems: naming the tensors and models that do not fit each other.
  """
  found: list[Exception] = []
  opened = _opened(recipe, referenced(recipe), open_model)
  built = tokenizer.Built(opened, {})
  with telling.noted(found):
    built = tokenizer.built(recipe, opened, papers_of)
  models, uneven = built.models, bool(found)
  donor = models[recipe.base_model or groups(recipe)[0].sources[0].model]
  config = donor.config
  rows: list[Row] = []
  with telling.noted(found):
    rows = list(stacking.rows(recipe, models, config))
  if not rows:
    telling.check(found)
  changed = dict(config)
  with telling.noted(found):
    changed = stacking.config(recipe, config, rows, donor)
  names, modules = stacking.all_names(rows), stacking.by_module(rows)
  if problems := parameters.unmatched(recipe, names, modules):
    found.append(RecipeError(problems))
  settled, problems = _settled(recipe, rows)
  if problems := (*problems, *_misfits(recipe, models, settled)):
    found.append(RecipeError(problems))
  wants, jobs = _wants(recipe, models, donor, rows, settled)
  if found:  # Of embeddings that were not brought together nothing can be told.
    known = [w for w in wants if not (uneven and embeddings.wanted(w))]
    lines = planning.unfit(known, donor, recipe.missing)
    found += [planning.Problems(lines)] if lines else []
    telling.check(found)
  plan = planning.assembled(
    wants,
    jobs,
    [donor, *(m for m in models.values() if m is not donor)],
    dtype=narrowing.stored(recipe),
    missing=recipe.missing,
    fates=stacking.left_out(recipe, models, rows),
  )
  if recipe.compat == "mergekit":
    plan = narrowing.computed(recipe, plan)
  changed = built.config(changed)
  own = {} if changed == config else {folder.CONFIG: json.dumps(changed, indent=2) + "\n"}
  # A donor that is still to be made has other files than its folder.
  texts = {**donor.texts, **own, **built.texts}
  return plan._replace(texts=texts, fates=built.fates(plan.fates))


# --- What becomes of them ---


class _Settled(NamedTuple):
  """A row with its method and parameters, and which of the group's sources are merged."""

  row: Row
  values: parameters.Values
  merged: tuple[int, ...]

  @property
  def sources(self) -> tuple[Source, ...]:
    return tuple(self.row.group.sources[i] for i in self.merged)

  @property
  def kind(self) -> Any:
    """Equal for rows that one job merges."""
    known = METHODS[self.values.method].shared
    switches = [
      (n, v) for n, v in self.values.shared.items() if known[n].integer or not known[n].number
    ]
    return self.values.method, *sorted(switches), self.row.group.base, self.sources_of

  @property
  def sources_of(self) -> tuple[Model, ...]:
    return tuple(s.model for s in self.sources)

  def tensors(self, models: Opened) -> list[Tensor]:
    """Those that it is made of, as far as the models have them; the base of slices is a source."""
    group = self.row.group
    pairs = [(s.model, n) for s, n in zip(group.sources, self.row.names, strict=True)]
    pairs += [(group.base, self.row.tensor.name)] if group.base and not group.sliced else []
    found = (models[m].part(n).tensor for m, n in pairs)
    return [t for t in found if t is not None]

  def shape(self, models: Opened) -> tuple[int, ...]:
    """That of the first tensor; empty without one."""
    return next((t.shape for t in self.tensors(models)), ())

  def given(self) -> dict[str, Any]:
    """The recipe's parameters: one value, or a tuple with one per model."""
    each = [self.values.each[i] for i in self.merged]
    own = {n: tuple(e[n] for e in each) for n in (each[0] if each else {})}
    return {**self.values.shared, **own}


def _settled(recipe: Recipe, rows: Sequence[Row]) -> tuple[list[_Settled], tuple[Problem, ...]]:
  """The rows that are not excluded, and what is wrong with the parameters of the others."""
  found: list[_Settled] = []
  problems: list[Problem] = []
  for row in rows:
    if parameters.excluded(recipe, row.tensor):
      continue
    try:
      values = parameters.values(recipe, row.group, row.tensor, row.names)
    except RecipeError as error:
      problems += error.problems
      continue
    method, sources = METHODS[values.method], row.group.sources
    merged = tuple(i for i, s in enumerate(sources) if row.group.merged(s, method))
    found.append(_Settled(row, values, merged))
  return found, tuple(problems)


def _wants(
  recipe: Recipe,
  models: Opened,
  donor: planning.Model,
  rows: Sequence[Row],
  settled: Sequence[_Settled],
) -> tuple[list[Want], list[Job]]:
  kinds: dict[Any, list[_Settled]] = {}
  for own in settled:
    kinds.setdefault(own.kind, []).append(own)
  jobs: list[Job] = []
  wants: dict[str, Want] = {}
  for members in kinds.values():
    translation = translating.translated(
      members[0].values.method,
      members[0].values.shared,
      base=members[0].row.group.base is not None,
      varied=_varied(members),
      compat=recipe.compat == "mergekit",
    )
    jobs.append(_job(recipe, translation, members, models))
    for own in members:
      name = own.row.tensor.name
      wants[name] = _want(translation, own, models, len(jobs) - 1, recipe.missing)
  for row in rows:
    name = row.tensor.name
    if parameters.excluded(recipe, row.tensor):
      own_base = models[row.group.base] if row.group.base else donor
      wants[name] = Want(name, own_base.part(row.in_base))
    elif name not in wants:  # Its parameters are wrong; whether its parts fit is told all the same.
      pairs = zip(row.group.sources, row.names, strict=True)
      parts = tuple(models[s.model].part(n) for s, n in pairs)
      # The base of slices is one of their sources.
      base = row.group.base if not row.group.sliced else None
      wants[name] = Want(name, models[base].part(name) if base else None, parts, raw=True)
  return [wants[row.tensor.name] for row in rows], jobs


def _varied(members: Sequence[_Settled]) -> set[str]:
  first = members[0].given()
  return {n for own in members for n, v in own.given().items() if v != first[n]}


def _job(
  recipe: Recipe, translation: translating.Translation, members: Sequence[_Settled], models: Opened
) -> Job:
  numbers: dict[str, Any] = {}
  for name, of in translation.numbers.items():
    each = {own.row.tensor.name: np.asarray(of(own.given()), np.float64) for own in members}
    first = next(iter(each.values()))
    same = all(np.array_equal(first, v) for v in each.values())
    numbers[name] = first if same else each
  called = _different([models[m].name for m in members[0].sources_of])
  base = members[0].row.group.base
  if translation.pair and base is not None:
    called.insert(0, models[base].name)

  def method() -> Any:
    from jaxmerge import methods  # jax comes with it.

    return getattr(methods, translation.method)(**translation.settings)

  words = {"method": translation.method, **translation.settings}
  random = METHODS[members[0].values.method].random
  seed = recipe.seed if random else None
  return Job(method, words, tuple(called), numbers, seed, _views(recipe, members, models))


def _different(names: Sequence[str]) -> list[str]:
  """Names of sources; layers of one model may be several of them."""
  counts = [names[: i + 1].count(name) for i, name in enumerate(names)]
  return [f"{n} ({c})" if c > 1 else n for n, c in zip(names, counts, strict=True)]


def _views(
  recipe: Recipe, members: Sequence[_Settled], models: Opened
) -> tuple[tuple[str, str], ...]:
  """The recipe's layout; else files hold [out, in], and Flax's kernels [in, out]."""
  by_view: dict[str, list[str]] = {}
  for own in members:
    axes = len(own.shape(models))
    said = _declared(recipe, own)
    inner = "i" * (axes - 1)
    view = f"{inner}o" if own.row.names[0].split("/")[-1] == "kernel" else f"o{inner}"
    if said is not None or axes >= 2:
      view = said.axes if said is not None else view
      by_view.setdefault(view, []).append(re.escape(own.row.tensor.name))
  return tuple((f"^({'|'.join(names)})$", view) for view, names in by_view.items())


def _declared(recipe: Recipe, own: _Settled) -> View | None:
  name, layer = own.row.tensor.name, own.row.tensor.layer
  return next((v for v in recipe.layout if v.where.holds(name, layer)), None)


def _misfits(recipe: Recipe, models: Opened, settled: Sequence[_Settled]) -> Iterator[Problem]:
  """Finds methods that cannot be computed as mergekit does, and views of other axes than a tensor.

  Of each view, that is of the first tensor.
  """
  told: set[View] = set()
  for own in settled:
    if recipe.compat == "mergekit":
      yield from narrowing.refused(recipe, own.values.method, own.tensors(models))
    view, shape = _declared(recipe, own), own.shape(models)
    if view is not None and shape and len(view.axes) != len(shape) and view not in told:
      told.add(view)
      text = f"view {view.axes!r} names {len(view.axes)} axes, but {own.row.tensor.name!r} is"
      yield Problem(view.place, f"{text} {list(shape)}; narrow the condition, or name every axis.")


def _want(
  translation: translating.Translation, own: _Settled, models: Opened, job: int, missing: Missing
) -> Want:
  group, name = own.row.group, own.row.tensor.name

  def part(i: int) -> Part:
    model = models[group.sources[i].model]
    return model.part(own.row.names[i])

  parts = [part(i) for i in own.merged]
  if translation.method == "passthrough" and own.given()["scale"] == (1.0,):
    if parts[0].tensor is None and missing == "base" and group.base is not None:
      return Want(name, models[group.base].part(own.row.in_base))
    return Want(name, parts[0])
  base = None
  if group.base is not None:
    listed = [i for i, s in enumerate(group.sources) if s.model == group.base]
    # A base that is not among the sources of a slice is looked at only where it helps out.
    aside = not group.sliced or missing == "base"
    apart = models[group.base].part(own.row.in_base) if aside else None
    base = part(listed[0]) if listed else apart
  if translation.pair and base is not None:
    parts.insert(0, base)
  return Want(name, base, tuple(parts), job, translation.raw)
