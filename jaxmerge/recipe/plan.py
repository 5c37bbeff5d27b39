"""From a recipe and the headers of its models to a plan: what becomes of every tensor."""

from __future__ import annotations

import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple  # Any: numbers of many kinds, what a config.json holds.

import numpy as np

from jaxmerge import planning
from jaxmerge.io import folder, weights
from jaxmerge.io.tensor import Files
from jaxmerge.planning import Job, Part, Plan, Want
from jaxmerge.recipe import layers, narrowing, opening, parameters, schema, tokenizer, translating
from jaxmerge.recipe.methods import METHODS
from jaxmerge.recipe.places import Problem, RecipeError
from jaxmerge.recipe.records import Group, Model, Recipe, Source, groups, referenced

Opened = Mapping[Model, planning.Model]
RECIPE = "jaxmerge_recipe.yml"


class _Row(NamedTuple):
  """A tensor of the result: which group makes it, and what it is called in each source."""

  tensor: parameters.Tensor
  group: Group
  names: tuple[str, ...]


def of_file(
  path: str | os.PathLike[str],
  files: Files,
  made: Callable[[str, Plan], planning.Model] = planning.foreseen,
  *,
  download: bool = False,
) -> Plan:
  """Plans the last recipe of a file; its models are folders or ids, perhaps with adapters.

  Args:
    path: of the file.
    files: open files of the models.
    made: (name, plan) -> the model that a recipe makes on which another one builds; by default it
      is only known what that will be, which is enough to plan.
    download: whether models that the hub's cache lacks are fetched; else no network is used.

  Raises:
    RecipeError: for what is wrong with the recipes, or cannot be run yet.
    planning.Problems: naming the tensors and models that do not fit.
  """
  recipes = schema.read(path)
  text = pathlib.Path(path).read_text(encoding="utf-8")
  results: dict[str, planning.Model] = {}
  opener = opening.opener(files, download=download)

  def model(own: Model) -> planning.Model:
    return results[own.path] if own.path in results else opener.model(own)

  for recipe in recipes[:-1]:
    if recipe.name is not None:
      results[recipe.name] = made(recipe.name, planned(recipe, model, opener.folder))
  plan = planned(recipes[-1], model, opener.folder)
  facts = {"recipe": text, **opener.find.facts, **plan.facts}
  return plan._replace(facts=facts, texts={**plan.texts, RECIPE: text})


def planned(
  recipe: Recipe,
  open_model: Callable[[Model], planning.Model],
  folder_of: Callable[[Model], pathlib.Path],
) -> Plan:
  """Plans what a recipe says.

  Args:
    recipe: the recipe.
    open_model: opens a model that it names.
    folder_of: returns the folder of a model of which only the tokenizer is wanted.

  Raises:
    RecipeError: for what is wrong with the recipe once the models are known.
    planning.Problems: naming the tensors and models that do not fit each other.
  """
  opened = {m: open_model(m) for m in referenced(recipe)}
  built = tokenizer.built(recipe, opened, folder_of)
  models = built.models
  donor = models[recipe.base_model or groups(recipe)[0].sources[0].model]
  config = donor.config or weights.config(donor.folder)
  rows = list(_rows(recipe, models, config))
  unmatched = parameters.unmatched(recipe, _all_names(rows))
  if unmatched:
    raise RecipeError(unmatched)
  wants, jobs = _wants(recipe, models, donor, rows)
  plan = planning.assembled(
    wants,
    jobs,
    [donor, *(m for m in models.values() if m is not donor)],
    dtype=narrowing.stored(recipe),
    missing=recipe.missing,
    fates=_left_out(recipe, models, rows),
  )
  if recipe.compat == "mergekit":
    plan = narrowing.computed(recipe, plan)
  changed = built.config(_config(recipe, config, rows))
  texts = {} if changed == config else {folder.CONFIG: json.dumps(changed, indent=2) + "\n"}
  return plan._replace(texts={**texts, **built.texts}, fates=built.fates(plan.fates))


# --- Which tensors there are ---


def _rows(recipe: Recipe, models: Opened, config: Mapping[str, Any]) -> Iterator[_Row]:
  made = groups(recipe)
  for module in dict.fromkeys(g.module for g in made):
    own = [g for g in made if g.module == module]
    if own[0].sliced:
      yield from _stacked(own, models, config)
    else:
      yield from _whole(own[0], models)


def _inside(group: Group, name: str) -> bool:
  """Tells whether a tensor belongs to the group's module: the module is a part of its name."""
  return group.module is None or group.module in name.split(".")


def _whole(group: Group, models: Opened) -> Iterator[_Row]:
  """Whole models: the tensors of all of them, by their names."""
  members = [models[s.model] for s in group.sources] + ([models[group.base]] if group.base else [])
  names = [n for n in sorted({n for m in members for n in m.tensors}) if _inside(group, n)]
  heights = layers.stacks(names)
  for name in names:
    tensor = parameters.Tensor(name)
    if at := layers.place(name):
      depth = parameters.depth(at.layer, heights[at.stack])
      tensor = parameters.Tensor(name, at.layer, depth)
    yield _Row(tensor, group, (name,) * len(group.sources))


def _stacked(own: Sequence[Group], models: Opened, config: Mapping[str, Any]) -> Iterator[_Row]:
  """Slices: their layers on top of each other; what lies before comes from the first of them."""
  names = {m: [n for n in models[m].tensors if _inside(own[0], n)] for m in models}
  try:
    stack = layers.main(names[own[0].sources[0].model], config)
  except ValueError as error:
    raise RecipeError([Problem(own[0].place, str(error))]) from error
  begun = 0
  for group in own:
    starts = [s.layers[0] if s.layers else 0 for s in group.sources]
    first = group.sources[0].layers or (0, layers.stacks(names[group.sources[0].model])[stack])
    count = first[1] - first[0]
    _check_ranges(group, names, stack)
    for i in range(count):
      heads = [f"{stack}{start + i}." for start in starts]
      rests = {
        name.removeprefix(head)
        for source, head in zip(group.sources, heads, strict=True)
        for name in names[source.model]
        if name.startswith(head)
      }
      for rest in sorted(rests):
        name = f"{stack}{begun + i}.{rest}"
        tensor = parameters.Tensor(name, begun + i, parameters.depth(i, count))
        yield _Row(tensor, group, tuple(head + rest for head in heads))
    begun += count
  outside = sorted(
    {n for g in own for s in g.sources for n in names[s.model] if not n.startswith(stack)}
  )
  for name in outside:
    group = own[0] if layers.is_input(name) else own[-1]
    yield _Row(parameters.Tensor(name), group, (name,) * len(group.sources))


def _check_ranges(group: Group, names: Mapping[Model, Sequence[str]], stack: str) -> None:
  problems = []
  for source in group.sources:
    height = layers.stacks(names[source.model]).get(stack, 0)
    if source.layers and source.layers[1] > height:
      text = f"layer_range ends at {source.layers[1]}, but {source.model} has {height} layers."
      problems.append(Problem(source.place, text))
  if problems:
    raise RecipeError(problems)


def _all_names(rows: Sequence[_Row]) -> dict[str, int | None]:
  """The layer of every name of a tensor, in the result and in the sources."""
  found = {n: row.tensor.layer for row in rows for n in row.names}
  return found | {row.tensor.name: row.tensor.layer for row in rows}


def _left_out(recipe: Recipe, models: Opened, rows: Sequence[_Row]) -> dict[str, dict[str, str]]:
  """What becomes of tensors that nothing is made of: excluded ones, and layers in no slice."""
  told: dict[str, dict[str, str]] = {m.name: {} for m in models.values()}
  if any(row.group.sliced for row in rows):
    told = {m.name: dict.fromkeys(m.tensors, "dropped: in no slice") for m in models.values()}
  for row in rows:
    if parameters.excluded(recipe, row.tensor):
      for source, name in zip(row.group.sources, row.names, strict=True):
        if name in models[source.model].tensors:
          told[models[source.model].name][name] = "dropped: excluded"
  return told


# --- What becomes of them ---


class _Settled(NamedTuple):
  """A row with its method and parameters, and which of the group's sources are merged."""

  row: _Row
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

  def given(self) -> dict[str, Any]:
    """The recipe's parameters: one value, or a tuple with one per model."""
    each = [self.values.each[i] for i in self.merged]
    own = {n: tuple(e[n] for e in each) for n in (each[0] if each else {})}
    return {**self.values.shared, **own}


def _settled(recipe: Recipe, rows: Sequence[_Row]) -> list[_Settled]:
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
  if problems:
    raise RecipeError(sorted(set(problems)))
  return found


def _wants(
  recipe: Recipe, models: Opened, donor: planning.Model, rows: Sequence[_Row]
) -> tuple[list[Want], list[Job]]:
  kinds: dict[Any, list[_Settled]] = {}
  for own in _settled(recipe, rows):
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
      wants[name] = _want(translation, own, models, len(jobs) - 1)
  for row in rows:
    name = row.tensor.name
    if name not in wants:  # It is excluded.
      own_base = models[row.group.base] if row.group.base else donor
      wants[name] = Want(name, own_base.part(name))
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
  called = [models[m].name for m in members[0].sources_of]
  base = members[0].row.group.base
  if translation.pair and base is not None:
    called.insert(0, models[base].name)

  def method() -> Any:
    from jaxmerge import methods  # jax comes with it.

    return getattr(methods, translation.method)(**translation.settings)

  words = {"method": translation.method, **translation.settings}
  random = METHODS[members[0].values.method].random
  seed = recipe.seed if random else None
  return Job(method, words, tuple(called), numbers, seed, _views(members, models))


def _views(members: Sequence[_Settled], models: Opened) -> tuple[tuple[str, str], ...]:
  """Files hold [out, in], Flax's kernels [in, out]: a table of views by the number of axes."""
  by_view: dict[str, list[str]] = {}
  for own in members:
    name = own.row.names[0]
    tensor = models[own.row.group.sources[0].model].tensors.get(name)
    if tensor is not None and len(tensor.shape) >= 2:
      inner = "i" * (len(tensor.shape) - 1)
      view = f"{inner}o" if name.split("/")[-1] == "kernel" else f"o{inner}"
      by_view.setdefault(view, []).append(re.escape(own.row.tensor.name))
  return tuple((f"^({'|'.join(names)})$", view) for view, names in by_view.items())


def _want(translation: translating.Translation, own: _Settled, models: Opened, job: int) -> Want:
  group, name = own.row.group, own.row.tensor.name

  def part(i: int) -> Part:
    model = models[group.sources[i].model]
    return model.part(own.row.names[i])

  parts = [part(i) for i in own.merged]
  if translation.method == "passthrough" and own.given()["scale"] == (1.0,):
    return Want(name, parts[0])
  base = None
  if group.base is not None:
    listed = [i for i, s in enumerate(group.sources) if s.model == group.base]
    model = models[group.base]
    base = part(listed[0]) if listed else model.part(name)
  if translation.pair and base is not None:
    parts.insert(0, base)
  return Want(name, base, tuple(parts), job, translation.raw)


# --- What else is written ---


def _config(recipe: Recipe, config: Mapping[str, Any], rows: Sequence[_Row]) -> dict[str, Any]:
  """The donor's config, as it holds for the result."""
  changed = dict(config)
  if config and (recipe.out_dtype or recipe.dtype):
    key = "dtype" if "dtype" in config else "torch_dtype"
    changed[key] = recipe.out_dtype or recipe.dtype
  count = layers.count_key(config)
  if count and any(row.group.sliced for row in rows):
    changed[count] = 1 + max(row.tensor.layer for row in rows if row.tensor.layer is not None)
  return changed
