"""Lists the tensors of a recipe's result, with their names in the sources."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple  # Any: what a config.json holds.

from jaxmerge.files import outcomes, plan
from jaxmerge.io.huggingface import folder
from jaxmerge.recipe import layers, parameters
from jaxmerge.recipe.errors import Problem, RecipeError
from jaxmerge.recipe.plan import modules
from jaxmerge.recipe.records import Group, Model, Recipe, groups

Opened = Mapping[Model, plan.Model]


class Row(NamedTuple):
  """A tensor of the result.

  Attributes:
    tensor: its name and layer.
    group: the sources that are merged into it.
    names: its name in each source.
  """

  tensor: parameters.Tensor
  group: Group
  names: tuple[str, ...]

  @property
  def in_base(self) -> str:
    """Returns its name in the base; in a slice, its layer is that of the first source."""
    pairs = zip(self.group.sources, self.names, strict=True)
    return next((name for s, name in pairs if s.model == self.group.base), self.names[0])


def rows(recipe: Recipe, models: Opened, config: Mapping[str, Any]) -> Iterator[Row]:
  """Yields the tensors of the result.

  Args:
    recipe: the recipe.
    models: all models that it names.
    config: config of the donor, which states the number of layers.

  Raises:
    RecipeError: for layers that the models do not have.
  """
  all_groups = groups(recipe)
  for module in dict.fromkeys(g.module for g in all_groups):
    of_module = [g for g in all_groups if g.module == module]
    if of_module[0].sliced:
      yield from _stacked_slices(of_module, models, config)
    else:
      yield from whole_models(of_module[0], models)
  if None not in recipe.parts:
    yield from _outside(recipe, models, all_groups)


def _outside(recipe: Recipe, models: Opened, all_groups: Sequence[Group]) -> Iterator[Row]:
  """Yields excluded tensors outside all modules, which are copied; raises for others."""
  sources = tuple({s.model: s for g in all_groups for s in g.sources}.values())
  every = Group(sources, recipe.base_model, (), None, False, recipe.place)
  modules = {str(g.module): g for g in all_groups}
  problems = []
  for name, owner in sorted({n: m.name for m in models.values() for n in m.tensors}.items()):
    homes = [module for module, group in modules.items() if _inside(group, name)]
    tensor = parameters.Tensor(name)
    if not homes and parameters.is_excluded(recipe, tensor):
      yield Row(tensor, every, (name,) * len(sources))
    elif len(homes) != 1:
      which = f"the modules {' and '.join(homes)}" if homes else "no module"
      hint = f"exclude it, or write a module {_parts(name)[0]!r}"
      text = f"tensor {name!r} of {owner} is in {which}: {'name one of them' if homes else hint}."
      problems.append(Problem(recipe.places["modules"], text))
  parts = {part for m in models.values() for name in m.tensors for part in _parts(name)}
  for module in sorted(modules.keys() - parts):
    close = difflib.get_close_matches(module, sorted(parts), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    text = f"the module {module!r} is a part of no tensor's name{hint}"
    problems.append(Problem(recipe.modules[module].place, text))
  if problems:
    raise RecipeError(problems)


def _inside(group: Group, name: str) -> bool:
  """Returns whether a tensor belongs to the group's module: the module is a part of its name."""
  return group.module is None or group.module in _parts(name)


def _parts(name: str) -> list[str]:
  return re.split("[./]", name)


def whole_models(group: Group, models: Opened) -> Iterator[Row]:
  """Yields the tensors of whole models, by their names."""
  members = [models[s.model] for s in group.sources] + ([models[group.base]] if group.base else [])
  names = [n for n in sorted({n for m in members for n in m.tensors}) if _inside(group, n)]
  layer_counts = layers.stacks(names)
  for name in names:
    tensor = parameters.Tensor(name)
    if at := layers.place(name):
      depth = parameters.depth(at.layer, layer_counts[at.stack])
      tensor = parameters.Tensor(name, at.layer, depth)
    yield Row(tensor, group, (name,) * len(group.sources))


def _stacked_slices(
  slices: Sequence[Group], models: Opened, config: Mapping[str, Any]
) -> Iterator[Row]:
  """Yields the layers of slices in order; tensors before the layers come from the first slice."""
  names = {m: [n for n in models[m].tensors if _inside(slices[0], n)] for m in models}
  try:
    stack = layers.main(names[slices[0].sources[0].model], config)
  except layers.Unclear as error:
    text = f"{error}{modules.hint(slices, names[slices[0].sources[0].model], error.stacks)}"
    raise RecipeError([Problem(slices[0].place, text)]) from error
  begun = 0
  separator = "/" if any("/" in n for n in names[slices[0].sources[0].model]) else "."
  for group in slices:
    starts = [s.layers[0] if s.layers else 0 for s in group.sources]
    first = group.sources[0].layers or (0, layers.stacks(names[group.sources[0].model])[stack])
    count = first[1] - first[0]
    _check_ranges(group, names, stack)
    for i in range(count):
      heads = [f"{stack}{start + i}{separator}" for start in starts]
      rests = {
        name.removeprefix(head)
        for source, head in zip(group.sources, heads, strict=True)
        for name in names[source.model]
        if name.startswith(head)
      }
      for rest in sorted(rests):
        name = f"{stack}{begun + i}{separator}{rest}"
        tensor = parameters.Tensor(name, begun + i, parameters.depth(i, count))
        yield Row(tensor, group, tuple(head + rest for head in heads))
    begun += count
  outside = sorted(
    {n for g in slices for s in g.sources for n in names[s.model] if not n.startswith(stack)}
  )
  for name in outside:
    # A vision or audio tower comes from one model as a whole.
    apart = layers.is_tower(name) != layers.is_tower(stack)
    group = slices[0] if layers.is_input(name) and not apart else slices[-1]
    yield Row(parameters.Tensor(name), group, (name,) * len(group.sources))


def _check_ranges(group: Group, names: Mapping[Model, Sequence[str]], stack: str) -> None:
  problems = []
  for source in group.sources:
    num_layers = layers.stacks(names[source.model]).get(stack, 0)
    if source.layers and source.layers[1] > num_layers:
      text = f"layer_range ends at {source.layers[1]}, but {source.model} has {num_layers} layers."
      problems.append(Problem(source.place, text))
  if problems:
    raise RecipeError(problems)


class Stack(NamedTuple):
  """A stack of layers in a new order.

  Attributes:
    stack: prefix of the layers' names.
    order: layer of the result to layer of its first source.
    group: the first group of the stack.
    others: the same mapping for further sources, by their positions in the lists.
  """

  stack: str
  order: dict[int, int]
  group: Group
  others: dict[int, dict[int, int]]


def stacks_of(rows: Sequence[Row]) -> dict[str | None, Stack]:
  """Returns the stacks built from slices, by module."""
  stacks: dict[str | None, Stack] = {}
  for row in rows:
    new, old = layers.place(row.tensor.name), layers.place(row.names[0])
    if row.group.sliced and row.tensor.layer is not None and new and old:
      stack = stacks.setdefault(row.group.module, Stack(new.stack, {}, row.group, {}))
      stack.order[new.layer] = old.layer
      for k, at in enumerate(map(layers.place, row.names[1:])):
        stack.others.setdefault(k, {})[new.layer] = at.layer if at else old.layer
  return stacks


def all_names(rows: Sequence[Row]) -> dict[str, int | None]:
  """Returns the layer of every name of a tensor, in the result and in the sources."""
  of_sources = {n: row.tensor.layer for row in rows for n in row.names}
  return of_sources | {row.tensor.name: row.tensor.layer for row in rows}


def by_module(rows: Sequence[Row]) -> dict[str | None, dict[str, int | None]]:
  """Returns the layer of every name of a tensor, by module."""
  modules = dict.fromkeys(row.group.module for row in rows if row.group.module is not None)
  return {m: all_names([row for row in rows if row.group.module == m]) for m in modules}


def left_out(
  recipe: Recipe, models: Opened, rows: Sequence[Row]
) -> dict[str, dict[str, plan.Outcome]]:
  """Returns the outcomes of tensors that may be dropped: excluded, in no slice, or of the base."""
  dropped: dict[str, dict[str, plan.Outcome]] = {m.name: {} for m in models.values()}
  modular = None not in recipe.parts
  if modular or any(row.group.sliced for row in rows):
    outside = plan.Outcome("dropped", reason="in no module of it" if modular else "in no slice")
    dropped = {m.name: dict.fromkeys(m.tensors, outside) for m in models.values()}
  for base in (models[g.base] for g in groups(recipe) if g.base and not g.sliced):
    dropped[base.name] |= dict.fromkeys(base.tensors, outcomes.ASIDE)
  for row in rows:
    if parameters.is_excluded(recipe, row.tensor):
      for source, name in zip(row.group.sources, row.names, strict=True):
        if name in models[source.model].tensors:
          dropped[models[source.model].name][name] = plan.Outcome("dropped", reason="excluded")
  return dropped


def config(
  recipe: Recipe, before: Mapping[str, Any], rows: Sequence[Row], donor: plan.Model
) -> dict[str, Any]:
  """Returns the donor's config for the result: with its dtype, and its number of layers.

  Raises:
    RecipeError: if it is unclear which setting is the number of layers.
  """
  dtype = recipe.out_dtype or recipe.dtype
  changed = folder.state_dtype(before, dtype) if before and dtype else dict(before)
  layer_counts = layers.stacks(donor.tensors)
  for module, stack in stacks_of(rows).items():
    others = {str(g.module) for g in groups(recipe)} - {str(module)}
    resized = functools.partial(
      layers.resize, changed, layer_counts.get(stack.stack), module=module or "", others=others
    )
    try:
      restacked = resized(order=stack.order)
      for order in stack.others.values():
        _check_alike(restacked, resized(order={**stack.order, **order}))
    except ValueError as error:
      raise RecipeError([Problem(stack.group.place, str(error))]) from error
    changed = restacked
  return changed


def _check_alike(config: Mapping[str, Any], other: Mapping[str, Any]) -> None:
  """Raises ValueError if layers of different kinds are merged with each other."""
  keys = [
    f"{key}: {value} and {other[key]}" for key, value in config.items() if value != other[key]
  ]
  if keys:
    raise ValueError(
      "the sources of a slice are layers that the config tells apart, and cannot be merged with "
      f"each other; by their numbers the result would have {'; '.join(keys):.300}."
    )
