"""Reads sources, slices, modules and overrides of a recipe, and their parameters."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from jaxmerge.catalog.parameter import Parameter
from jaxmerge.recipe.errors import Problem, add, show
from jaxmerge.recipe.mergekit.methods import MERGEKITS, METHODS, value_error
from jaxmerge.recipe.records import (
  Case,
  Module,
  Override,
  Parameters,
  Scalar,
  Slice,
  Source,
  View,
  Where,
)
from jaxmerge.recipe.syntax import fields, references, run_models
from jaxmerge.recipe.syntax.references import Context
from jaxmerge.recipe.syntax.yaml_reader import Node

MOST_VIEWS = 200
# Messages for parameters outside `parameters`, which mergekit ignores.
PARAMETERS = {
  name: f"{name} is a parameter, and belongs under parameters; here"
  for method in METHODS.values()
  for name in method.parameters
}
_REVISION = {"revision": "a revision is part of the model, org/name@revision; beside it"}


class Known(NamedTuple):
  """The parameters of the methods of a recipe.

  Attributes:
    of: names of the methods, for errors; empty if a method is unknown.
    mergekits: whether mergekit has all of them; it ignores unknown keys.
    each: parameters with a value per model.
    shared: parameters with one value for all models.
  """

  of: str
  mergekits: bool
  each: Mapping[str, Parameter]
  shared: Mapping[str, Parameter]


def known_parameters(names: Sequence[str]) -> Known:
  """Returns the parameters of methods; of two with the same name, the first method's counts."""
  if not set(names) <= METHODS.keys():
    return Known("", True, {}, {})
  methods = [METHODS[name] for name in reversed(names)]
  each = {n: p for m in methods for n, p in m.each.items()}
  shared = {n: p for m in methods for n, p in m.shared.items()}
  words = ", ".join(dict.fromkeys(names))
  return Known(words, set(names) <= MERGEKITS.keys(), each, shared)


def level(
  node: Node | None, known: Known, problems: list[Problem], *, at_source: bool = False
) -> Parameters:
  """Returns the parameters of one level; a source may have only those with a value per model."""
  if node is None:
    return {}
  if not known.of:
    keys = tuple(node.value) if isinstance(node.value, dict) else ()
    nodes = fields.mapping(node, "the parameters", keys, problems)
    return {name: cases(names, name, None, problems) for name, names in nodes.items()}
  allowed = {**known.each} if at_source else {**known.shared, **known.each}
  names = ", ".join(allowed) or "none"
  stray = {n: _stray(n, known, allowed) for m in METHODS.values() for n in m.parameters}
  nodes = fields.mapping(
    node,
    f"the parameters of {known.of}",
    tuple(allowed),
    problems,
    ignored=stray if known.mergekits else None,
    refused={} if known.mergekits else {n: f"{t}, which has {names}." for n, t in stray.items()},
  )
  return {name: cases(names, name, allowed[name], problems) for name, names in nodes.items()}


def _stray(name: str, known: Known, allowed: Collection[str]) -> str:
  """Returns an error for a misplaced or unknown parameter, with a suggestion."""
  if name in known.shared and name not in allowed:
    where = "the parameters of the recipe, module or slice"
    return f"{name} is one for all models, and belongs to {where}; at a model"
  near = fields.closest(name, allowed)
  return f"{name} is no parameter of {known.of}" + (f" (there is {near[0]})" if near else "")


def cases(
  node: Node, name: str, parameter: Parameter | None, problems: list[Problem]
) -> tuple[Case, ...]:
  """Returns the cases of a parameter from a value, a gradient, or a list of conditions."""
  listed = node.value if isinstance(node.value, tuple) else (node,)
  if not any(isinstance(item.value, dict) for item in listed):
    value = _value(node, name, parameter, problems)
    return (Case(value, Where(place=node.place), place=node.place),)
  items: list[Case] = []
  keys = ("value", *fields.CONDITIONS)
  for item in listed:
    nodes = fields.mapping(item, f"an item of {name}", keys, problems, needed=("value",))
    where = fields.where(item, nodes, name, problems)
    if items and items[-1].where.everywhere:
      before = items[-1].place.short
      add(problems, item.place, f"{name}: the item in {before} takes all tensors; put it last.")
    value_node = nodes.get("value")
    value = _value(value_node, name, parameter, problems) if value_node else 0.0
    items.append(Case(value, where, place=value_node.place if value_node else item.place))
  return tuple(items)


def _value(
  node: Node, name: str, parameter: Parameter | None, problems: list[Problem]
) -> Scalar | tuple[Scalar, ...]:
  if node.value == ():
    add(problems, node.place, f"{name} must not be an empty list.")
  parts = node.value if isinstance(node.value, tuple) else (node,)
  if parameter and parameter.integer and isinstance(node.value, tuple):
    add(problems, node.place, f"{name} must be one whole number, not a gradient.")
  values = []
  for part in parts:
    wrong = value_error(name, parameter, part.value) if parameter else None
    if wrong:
      add(problems, part.place, wrong.removesuffix(".") + f"{fields.quotes_hint(part.value)}.")
    value = 1.0 if wrong or not isinstance(part.value, Scalar) else part.value
    values.append(bool(value) if parameter and parameter.choices == (True, False) else value)
  return tuple(values) if isinstance(node.value, tuple) else values[0]


def source(node: Node, what: str, known: Known, sliced: bool, context: Context) -> Source | None:
  """Returns a model, or a layer range of one, with its parameters."""
  keys = ("model", "layer_range", "parameters") if sliced else ("model", "parameters")
  hint = {"layer_range": "layer_range belongs to the sources of slices, not to models."}
  nodes = fields.mapping(
    node,
    what,
    keys,
    context.problems,
    needed=("model", "layer_range") if sliced else ("model",),
    refused={} if sliced else hint,
    ignored=PARAMETERS | _REVISION,
  )
  if "model" not in nodes:
    return None
  layers = nodes.get("layer_range")
  return Source(
    references.model(nodes["model"], "model", context),
    level(nodes.get("parameters"), known, context.problems, at_source=True),
    fields.maybe(fields.span, layers, f"layer_range of {what}", context.problems),
    place=nodes["model"].place,
  )


def sources_of_item(
  node: Node, what: str, known: Known, sliced: bool, context: Context
) -> tuple[Source, ...]:
  """Returns the models of a list item: one model, or several checkpoints of a run."""
  if isinstance(node.value, dict) and run_models.RUN in node.value and not sliced:
    keys = (*run_models.KEYS, "parameters")
    nodes = fields.mapping(
      node, "a run", keys, context.problems, needed=(run_models.RUN,), ignored=PARAMETERS
    )
    parameters = level(nodes.get("parameters"), known, context.problems, at_source=True)
    models = run_models.models(node, nodes, context.problems)
    return tuple(Source(model, parameters, place=model.place) for model in models)
  one = source(node, what, known, sliced, context)
  return () if one is None else (one,)


def sources(
  node: Node, what: str, known: Known, sliced: bool, context: Context
) -> tuple[Source, ...]:
  """Returns the models of a list."""
  listed = fields.items(node, what, context.problems)
  item = "a source" if sliced else "a model"
  models: list[Source] = []
  for each_source in (
    s for each in listed for s in sources_of_item(each, item, known, sliced, context)
  ):
    # The same model with other parameters is an error; see `validate`.
    if each_source in models and known.mergekits:
      before = models[models.index(each_source)].place.short
      text = f"{str(each_source.model)!r} is already in {before}: it counts once, as in mergekit."
      add(context.problems, each_source.place, text, ignored=True)
    elif each_source:
      models.append(each_source)
  return tuple(models)


def slices(node: Node, known: Known, context: Context) -> tuple[Slice, ...]:
  """Returns the slices of a list."""
  every = []
  keys = ("sources", "base_model", "parameters")
  for each in fields.items(node, "slices", context.problems):
    nodes = fields.mapping(
      each, "a slice", keys, context.problems, needed=("sources",), ignored=PARAMETERS
    )
    listed, base = nodes.get("sources"), nodes.get("base_model")
    every.append(
      Slice(
        fields.maybe(sources, listed, "sources of a slice", known, True, context) or (),
        fields.maybe(references.model, base, "base_model of a slice", context),
        level(nodes.get("parameters"), known, context.problems),
        place=each.place,
      )
    )
  return tuple(every)


def modules(node: Node, known: Known, context: Context) -> dict[str, Module]:
  """Returns the modules by name."""
  by_name = {}
  names = tuple(node.value) if isinstance(node.value, dict) else ()
  for name, each in fields.mapping(node, "modules", names, context.problems).items():
    keys = ("models", "slices", "parameters")
    nodes = fields.mapping(each, f"module {name!r:.60}", keys, context.problems, ignored=PARAMETERS)
    one_of(nodes, ("models", "slices"), f"module {name!r:.60}", each, context.problems)
    by_name[name] = Module(
      fields.maybe(sources, nodes.get("models"), "models", known, False, context) or (),
      fields.maybe(slices, nodes.get("slices"), known, context) or (),
      level(nodes.get("parameters"), known, context.problems),
      place=each.place,
    )
  return by_name


def one_of(
  nodes: Mapping[str, Node], keys: Sequence[str], what: str, node: Node, problems: list[Problem]
) -> None:
  """Checks that exactly one of the keys is there."""
  present = [key for key in keys if key in nodes]
  for key in present[1:]:
    add(
      problems, nodes[key].place, f"{what} has {present[0]} already and cannot have {key} as well."
    )
  if not present:
    add(problems, node.place, f"{what} needs one of {', '.join(keys)}.")


def overrides(
  items: Sequence[Node], methods: Sequence[str], problems: list[Problem]
) -> tuple[Override, ...]:
  """Returns the overrides; `methods` are their methods, in the same order."""
  changes = []
  keys = (*fields.CONDITIONS, "merge_method", "parameters")
  for node, method in zip(items, methods, strict=True):
    nodes = fields.mapping(node, "an override", keys, problems)
    where = fields.where(node, nodes, "an override", problems)
    if where.everywhere:
      text = "an override needs pattern, filter or layers, as it applies to some tensors"
      add(problems, node.place, f"{text}; move what applies to all tensors to the recipe.")
    if not {"merge_method", "parameters"} & nodes.keys():
      add(problems, node.place, "an override needs merge_method or parameters.")
    ours = known_parameters((method,))._replace(mergekits=False)  # mergekit has no overrides.
    parameters = level(nodes.get("parameters"), ours, problems)
    changes.append(Override(where, method, parameters, place=node.place))
  return tuple(changes)


def layout(node: Node, problems: list[Problem]) -> tuple[View, ...]:
  """Returns the matrix views."""
  listed = fields.items(node, "layout", problems)
  if len(listed) > MOST_VIEWS:
    add(problems, node.place, f"there are more than {MOST_VIEWS} items of layout.")
    return ()
  views = []
  what = "an item of layout"
  for each in listed:
    nodes = fields.mapping(each, what, (*fields.CONDITIONS, "view"), problems, needed=("view",))
    where = fields.where(each, nodes, what, problems)
    if where.everywhere:
      add(problems, each.place, f"{what} needs pattern, filter or layers: tensors differ in axes.")
    if "view" in nodes:
      views.append(View(where, _axes(nodes["view"], problems), place=nodes["view"].place))
  return tuple(views)


def rename(node: Node, problems: list[Problem]) -> dict[str, str]:
  """Returns the replacement, possibly empty, of each prefix of tensor names."""
  keys = tuple(node.value) if isinstance(node.value, dict) else ()
  inside = fields.mapping(node, "rename", keys, problems)
  return {
    old: "" if new.value == "" else fields.text(new, f"rename of {show(old)}", problems)
    for old, new in inside.items()
  }


def _axes(node: Node, problems: list[Problem]) -> str | None:
  word = fields.text(node, "view", problems)
  if word == "none":
    return None
  if word != "?" and not re.fullmatch("[boi]{1,64}", word):
    text = "view must have a letter for each axis, o (output), i (input) or b (batch: one of many"
    add(problems, node.place, f"{text} matrices), such as io, or be none, got {show(word)}.")
  return word
