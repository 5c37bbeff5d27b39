"""Checks a recipe as a whole: models against methods, bases, required parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from jaxmerge.catalog.parameter import Parameter
from jaxmerge.recipe.errors import Place, Problem, join_some
from jaxmerge.recipe.mergekit.methods import METHODS
from jaxmerge.recipe.parameters import Value, conflicts, constant
from jaxmerge.recipe.records import Group, Model, Parameters, Recipe, groups


def problems(recipe: Recipe) -> Iterator[Problem]:
  """Yields the problems of a recipe whose single values are valid."""
  ways: list[tuple[str, Place, tuple[Parameters, ...]]]
  ways = [(recipe.merge_method, recipe.places.get("merge_method", recipe.place), ())]
  ways += [(o.merge_method, o.place, (o.parameters,)) for o in recipe.overrides]
  yield from _base(recipe)
  for group in groups(recipe):
    yield from _shape(group)
    for name, place, above in ways:
      # Unknown methods are reported already; a copy accepts any inputs.
      if name in METHODS and not group.copied(METHODS[name]):
        yield from _inputs(group, name, place)
        yield from _parameters(group, name, above)


def _base(recipe: Recipe) -> Iterator[Problem]:
  """Checks that there is a base where the recipe copies from it."""
  wants = {
    "exclude": bool(recipe.exclude),
    "missing": recipe.missing == "base",
    "tokenizer": recipe.tokenizer is not None and recipe.tokenizer.source == "base",
  }
  places = {"tokenizer": recipe.places.get("tokenizer_source", recipe.place), **recipe.places}
  for key, wanted in wants.items():
    if wanted and not all(group.base for group in groups(recipe)):
      text = f"{key} takes from the base, but there is no base_model."
      yield Problem(places.get(key, recipe.place), text)


def _shape(group: Group) -> Iterator[Problem]:
  """Checks that no model occurs twice, and that layer ranges have equal length."""
  seen: dict[tuple[Model, tuple[int, int] | None], Place] = {}
  for source in group.sources:
    key = source.model, source.layers
    if key in seen:
      text = f"{str(source.model)!r} is already in {seen[key].short}; give it one weight."
      yield Problem(source.place, text)
    seen.setdefault(key, source.place)
  lengths = {s.layers[1] - s.layers[0]: str(s.model) for s in group.sources if s.layers}
  if len(lengths) > 1:
    words = join_some(f"{n} of {model!r}" for n, model in lengths.items())
    text = f"the sources of a slice must have equally many layers, got {words}."
    yield Problem(group.place, text)


def _inputs(group: Group, name: str, place: Place) -> Iterator[Problem]:
  """Checks the base and the number of models."""
  method = METHODS[name]
  as_base = [s for s in group.sources if s.model == group.base]
  others = [str(s.model) for s in group.sources if group.merged(s, method)]
  low, high = method.others
  if method.base == "required" and not group.base:
    text = f"{name} needs base_model: it merges task vectors, or starts from the base"
    yield Problem(place, f"{text}. Models: {join_some(others)}.")
  elif method.base != "ignored" and group.base and group.sliced and not as_base:
    text = f"the base {str(group.base)!r} is not among the sources of this slice"
    hint = "add it with its layer_range" + ", or give no base_model" * (method.base == "optional")
    yield Problem(group.place, f"{text}, as {name} needs it; {hint}.")
  elif method.base != "ignored" and len({s.layers for s in as_base}) > 1:
    text = f"the base {str(group.base)!r} is already in {as_base[0].place.short}"
    yield Problem(as_base[1].place, f"{text}, and {name} starts from one; remove it.")
  elif len(others) < low or (high is not None and len(others) > high):
    beside = "" if method.base == "ignored" else " beside the base"
    words = f": {join_some(others)}" if others else ""
    text = f"{name} merges {method.models}, got {len(others)}{beside}{words}."
    yield Problem(group.place, text)


# By method: the parameter with the number of models left out, and how many models more than twice
# that number are needed.
_LEFT_OUT = {"trimmed_mean": ("trim", 1), "krum": ("outliers", 3)}


def _enough(group: Group, name: str, shared: Mapping[str, Value]) -> Iterator[Problem]:
  """Checks that there are more models than a method leaves out."""
  parameter, more = _LEFT_OUT.get(name, ("", 0))
  if value := shared.get(parameter):
    least = 2 * int(value.value) + more
    count = sum(group.merged(s, METHODS[name]) for s in group.sources)
    if count < least:
      text = f"{name} needs {least} or more models where {parameter} is {value.value}, got {count}."
      yield Problem(value.place or group.place, text)


def _parameters(group: Group, name: str, above: tuple[Parameters, ...]) -> Iterator[Problem]:
  """Checks that required parameters have a value, and that values are compatible."""
  method = METHODS[name]
  shared = (*above, *group.levels)
  for parameter in _without(shared, method.shared):
    text = f"{name} needs {parameter}; set it in the parameters of the slice or the recipe."
    yield Problem(group.place, text)
  each = []
  for source in (s for s in group.sources if group.merged(s, method)):
    levels = (*above, source.parameters, *group.levels)
    each.append(_constants(levels, method.each))
    for parameter in _without(levels, method.each):
      text = f"{name} needs {parameter} for {str(source.model)!r}; set it in the parameters of"
      yield Problem(source.place, f"{text} the model, the slice or the recipe.")
  if any("weight" not in parameters for parameters in each):
    each = [{n: v for n, v in parameters.items() if n != "weight"} for parameters in each]
  known = _constants(shared, method.shared)
  yield from _enough(group, name, known)
  yield from conflicts(name, known, each, group.place)


def _without(levels: Sequence[Parameters], known: Mapping[str, Parameter]) -> list[str]:
  """Returns the required parameters that no level sets."""
  required = (name for name, parameter in known.items() if parameter.default is None)
  return [name for name in required if not any(name in level for level in levels)]


def _constants(levels: Sequence[Parameters], known: Mapping[str, Parameter]) -> dict[str, Value]:
  """Returns the values that are the same for all tensors."""
  constants: dict[str, Value] = {}
  for name, parameter in known.items():
    value = constant(levels, name)
    if not any(name in level for level in levels) and parameter.default is not None:
      value = Value(parameter.default, None)
    constants |= {name: value} if value else {}
  return constants
