"""Reads what is merged: parameters; sources, slices, modules and overrides, which have them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from jaxmerge.catalog.parameter import Parameter
from jaxmerge.recipe.errors import Problem, note, shown
from jaxmerge.recipe.mergekit.methods import MERGEKITS, METHODS, complaint
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
from jaxmerge.recipe.syntax import fields, references
from jaxmerge.recipe.syntax.references import Context
from jaxmerge.recipe.syntax.yaml_reader import Node

MOST_VIEWS = 200
# What mergekit ignores beside what it knows.
PARAMETERS = {
  name: f"{name} is a parameter, and belongs under parameters; here"
  for method in METHODS.values()
  for name in method.parameters
}
_REVISION = {"revision": "a revision is part of the model, org/name@revision; beside it"}


class Known(NamedTuple):
  """The parameters of the methods of a recipe.

  Attributes:
    of: the methods in words; empty if one is unknown, so that nothing can be said.
    mergekits: whether mergekit has them, so that it is known what it ignores.
    each: parameters with a value for every model.
    shared: parameters that are one for all models.
  """

  of: str
  mergekits: bool
  each: Mapping[str, Parameter]
  shared: Mapping[str, Parameter]


def known(names: Sequence[str]) -> Known:
  """Returns the parameters of methods; where two have the same name, those of the first count."""
  if not set(names) <= METHODS.keys():
    return Known("", True, {}, {})
  methods = [METHODS[name] for name in reversed(names)]
  each = {n: p for m in methods for n, p in m.each.items()}
  shared = {n: p for m in methods for n, p in m.shared.items()}
  words = ", ".join(dict.fromkeys(names))
  return Known(words, set(names) <= MERGEKITS.keys(), each, shared)


def level(
  node: Node | None, known: Known, found: list[Problem], *, at_source: bool = False
) -> Parameters:
  """Returns the parameters of one level; at a source, only those with a value for every model."""
  if node is None:
    return {}
  if not known.of:
    keys = tuple(node.value) if isinstance(node.value, dict) else ()
    given = fields.mapping(node, "the parameters", keys, found)
    return {name: cases(own, name, None, found) for name, own in given.items()}
  allowed = {**known.each} if at_source else {**known.shared, **known.each}
  own = ", ".join(allowed) or "none"
  stray = {n: _stray(n, known, allowed) for m in METHODS.values() for n in m.parameters}
  given = fields.mapping(
    node,
    f"the parameters of {known.of}",
    tuple(allowed),
    found,
    ignored=stray if known.mergekits else None,
    refused={} if known.mergekits else {n: f"{t}, which has {own}." for n, t in stray.items()},
  )
  return {name: cases(own, name, allowed[name], found) for name, own in given.items()}


def _stray(name: str, known: Known, allowed: Collection[str]) -> str:
  """Says of a parameter that it is none here, and which may be meant."""
  if name in known.shared and name not in allowed:
    where = "the parameters of the recipe, module or slice"
    return f"{name} is one for all models, and belongs to {where}; at a model"
  near = fields.closest(name, allowed)
  return f"{name} is no parameter of {known.of}" + (f" (there is {near[0]})" if near else "")


def cases(
  node: Node, name: str, parameter: Parameter | None, found: list[Problem]
) -> tuple[Case, ...]:
  """Returns the cases of a parameter: of a value, of a gradient, or of a list of conditions."""
  listed = node.value if isinstance(node.value, tuple) else (node,)
  if not any(isinstance(item.value, dict) for item in listed):
    value = _value(node, name, parameter, found)
    return (Case(value, Where(place=node.place), place=node.place),)
  made: list[Case] = []
  keys = ("value", *fields.CONDITIONS)
  for item in listed:
    given = fields.mapping(item, f"an item of {name}", keys, found, needed=("value",))
    where = fields.where(item, given, name, found)
    if made and made[-1].where.everywhere:
      before = made[-1].place.short
      note(found, item.place, f"{name}: the item in {before} takes all tensors; put it last.")
    own = given.get("value")
    value = _value(own, name, parameter, found) if own else 0.0
    made.append(Case(value, where, place=own.place if own else item.place))
  return tuple(made)


def _value(
  node: Node, name: str, parameter: Parameter | None, found: list[Problem]
) -> Scalar | tuple[Scalar, ...]:
  if node.value == ():
    note(found, node.place, f"{name} must not be an empty list.")
  parts = node.value if isinstance(node.value, tuple) else (node,)
  if parameter and parameter.integer and isinstance(node.value, tuple):
    note(found, node.place, f"{name} must be one whole number, not a gradient.")
  values = []
  for part in parts:
    wrong = complaint(name, parameter, part.value) if parameter else None
    if wrong:
      note(found, part.place, wrong.removesuffix(".") + f"{fields.quoted(part.value)}.")
    value = 1.0 if wrong or not isinstance(part.value, Scalar) else part.value
    values.append(bool(value) if parameter and parameter.choices == (True, False) else value)
  return tuple(values) if isinstance(node.value, tuple) else values[0]


def source(node: Node, what: str, known: Known, sliced: bool, context: Context) -> Source | None:
  """Returns a model, or layers of one, with its parameters."""
  keys = ("model", "layer_range", "parameters") if sliced else ("model", "parameters")
  hint = {"layer_range": "layer_range belongs to the sources of slices, not to models."}
  given = fields.mapping(
    node,
    what,
    keys,
    context.found,
    needed=("model", "layer_range") if sliced else ("model",),
    refused={} if sliced else hint,
    ignored=PARAMETERS | _REVISION,
  )
  if "model" not in given:
    return None
  layers = given.get("layer_range")
  return Source(
    references.model(given["model"], "model", context),
    level(given.get("parameters"), known, context.found, at_source=True),
    fields.maybe(fields.span, layers, f"layer_range of {what}", context.found),
    place=given["model"].place,
  )


def sources(
  node: Node, what: str, known: Known, sliced: bool, context: Context
) -> tuple[Source, ...]:
  """Returns the models of a list."""
  listed = fields.items(node, what, context.found)
  item = "a source" if sliced else "a model"
  made: list[Source] = []
  for own in (source(each, item, known, sliced, context) for each in listed):
    if own in made and known.mergekits:  # Of models that differ in parameters, it is an error.
      before = made[made.index(own)].place.short
      text = f"{str(own.model)!r} is already in {before}: it counts once, as in mergekit."
      note(context.found, own.place, text, ignored=True)
    elif own:
      made.append(own)
  return tuple(made)


def slices(node: Node, known: Known, context: Context) -> tuple[Slice, ...]:
  """Returns the slices of a list."""
  made = []
  keys = ("sources", "base_model", "parameters")
  for each in fields.items(node, "slices", context.found):
    given = fields.mapping(
      each, "a slice", keys, context.found, needed=("sources",), ignored=PARAMETERS
    )
    listed, base = given.get("sources"), given.get("base_model")
    made.append(
      Slice(
        fields.maybe(sources, listed, "sources of a slice", known, True, context) or (),
        fields.maybe(references.model, base, "base_model of a slice", context),
        level(given.get("parameters"), known, context.found),
        place=each.place,
      )
    )
  return tuple(made)


def modules(node: Node, known: Known, context: Context) -> dict[str, Module]:
  """Returns the modules by name."""
  made = {}
  names = tuple(node.value) if isinstance(node.value, dict) else ()
  for name, each in fields.mapping(node, "modules", names, context.found).items():
    keys = ("models", "slices", "parameters")
    given = fields.mapping(each, f"module {name!r:.60}", keys, context.found, ignored=PARAMETERS)
    one_of(given, ("models", "slices"), f"module {name!r:.60}", each, context.found)
    made[name] = Module(
      fields.maybe(sources, given.get("models"), "models", known, False, context) or (),
      fields.maybe(slices, given.get("slices"), known, context) or (),
      level(given.get("parameters"), known, context.found),
      place=each.place,
    )
  return made


def one_of(
  given: Mapping[str, Node], keys: Sequence[str], what: str, node: Node, found: list[Problem]
) -> None:
  """Notes a problem if not exactly one of the keys is given."""
  there = [key for key in keys if key in given]
  for key in there[1:]:
    note(found, given[key].place, f"{what} has {there[0]} already and cannot have {key} as well.")
  if not there:
    note(found, node.place, f"{what} needs one of {', '.join(keys)}.")


def overrides(
  nodes: Sequence[Node], methods: Sequence[str], found: list[Problem]
) -> tuple[Override, ...]:
  """Returns the overrides; `methods` holds their methods, in the same order."""
  made = []
  keys = (*fields.CONDITIONS, "merge_method", "parameters")
  for node, method in zip(nodes, methods, strict=True):
    given = fields.mapping(node, "an override", keys, found)
    where = fields.where(node, given, "an override", found)
    if where.everywhere:
      text = "an override needs pattern, filter or layers: it is for some tensors"
      note(found, node.place, f"{text}; what is for all belongs to the recipe.")
    if not {"merge_method", "parameters"} & given.keys():
      note(found, node.place, "an override needs merge_method or parameters.")
    ours = known((method,))._replace(mergekits=False)  # mergekit has no overrides.
    own = level(given.get("parameters"), ours, found)
    made.append(Override(where, method, own, place=node.place))
  return tuple(made)


def layout(node: Node, found: list[Problem]) -> tuple[View, ...]:
  """Returns the matrix views."""
  listed = fields.items(node, "layout", found)
  if len(listed) > MOST_VIEWS:
    note(found, node.place, f"there are more than {MOST_VIEWS} items of layout.")
    return ()
  made = []
  what = "an item of layout"
  for each in listed:
    given = fields.mapping(each, what, (*fields.CONDITIONS, "view"), found, needed=("view",))
    where = fields.where(each, given, what, found)
    if where.everywhere:
      note(found, each.place, f"{what} needs pattern, filter or layers: tensors differ in axes.")
    if "view" in given:
      made.append(View(where, _axes(given["view"], found), place=given["view"].place))
  return tuple(made)


def rename(node: Node, found: list[Problem]) -> dict[str, str]:
  """Returns the beginnings of names, and what stands in their place; that may be nothing."""
  keys = tuple(node.value) if isinstance(node.value, dict) else ()
  inside = fields.mapping(node, "rename", keys, found)
  return {
    old: "" if new.value == "" else fields.text(new, f"rename of {shown(old)}", found)
    for old, new in inside.items()
  }


def _axes(node: Node, found: list[Problem]) -> str | None:
  word = fields.text(node, "view", found)
  if word == "none":
    return None
  if word != "?" and not re.fullmatch("[boi]{1,64}", word):
    text = "view must have a letter for each axis, o (output), i (input) or b (batch: one of many"
    note(found, node.place, f"{text} matrices), such as io, or be none, got {shown(word)}.")
  return word
