"""The value of a parameter for a tensor: levels, conditions and gradients over depth.

Levels from narrow to wide: override, source or model, slice, module, recipe. Parameters shared by
all models are not looked up at a source. The first level whose condition matches the tensor wins.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from jaxmerge.catalog import lookup as catalog_lookup
from jaxmerge.catalog.parameter import Parameter
from jaxmerge.recipe.errors import Place, Problem, RecipeError, join_some
from jaxmerge.recipe.mergekit.methods import METHODS, Method, value_error
from jaxmerge.recipe.records import Case, Group, Override, Parameters, Recipe, Scalar, Where, groups

_SHOWN = 8  # Name parts that an error lists at most for a condition that matches no tensor.


class Tensor(NamedTuple):
  """A tensor of the merged model.

  Attributes:
    name: its name.
    layer: number of its layer in the merged model; None outside of the layers.
    depth: depth of its layer in its slice, see `depth`; None outside of the layers.
  """

  name: str
  layer: int | None = None
  depth: float | None = None


class Value(NamedTuple):
  """A value and its place; the place is None for a default."""

  value: Scalar
  place: Place | None


class Values(NamedTuple):
  """The method of a tensor, and its parameters.

  Attributes:
    method: name of the method.
    shared: parameters shared by all models.
    each: parameters of each source of the group, in order; none for the base.
  """

  method: str
  shared: dict[str, Scalar]
  each: tuple[dict[str, Scalar], ...]


def depth(index: int, layers: int) -> float:
  """Returns the depth in [0, 1] of a layer of a slice; the only layer of a slice has depth 1.

  >>> depth(0, 5), depth(1, 5), depth(0, 1)
  (0.0, 0.25, 1.0)
  """
  return index / (layers - 1) if layers > 1 else 1.0


def evaluate(cases: Sequence[Case], tensor: Tensor) -> Value | None:
  """Returns the value of the first case that matches a tensor; None without a match."""
  for case in cases:
    if case.where.holds(tensor.name, tensor.layer):
      return Value(interpolate(case.value, tensor.depth), case.place)
  return None


def interpolate(value: Scalar | tuple[Scalar, ...], depth: float | None) -> Scalar:
  """Returns a gradient's value at a depth: numbers are interpolated, other values step.

  Tensors outside of the layers, whether before or after them, take the first value.

  >>> interpolate((0, 0.5, 1), 0.75), interpolate((True, False), 0.75), interpolate(3, None)
  (0.75, True, 3)
  """
  if not isinstance(value, tuple):
    return value
  at = (depth or 0.0) * (len(value) - 1)
  numbers = [v for v in value if not isinstance(v, bool | str)]
  if len(numbers) < len(value):
    return value[int(at + 1e-9)]  # In floating point, 6/49 times 49 is a little less than 6.
  left, right = int(at), min(int(at) + 1, len(value) - 1)
  return (1 - (at - left)) * numbers[left] + (at - left) * numbers[right]


def lookup(levels: Iterable[Parameters], name: str, tensor: Tensor) -> Value | None:
  """Returns the value of a parameter at the first level that has one for the tensor."""
  for level in levels:
    if value := evaluate(level.get(name, ()), tensor):
      return value
  return None


def constant(levels: Iterable[Parameters], name: str) -> Value | None:
  """Returns the value of a parameter that is the same for all tensors."""
  cases = next((level[name] for level in levels if name in level), ())
  if len(cases) != 1 or not cases[0].where.everywhere or isinstance(cases[0].value, tuple):
    return None
  return Value(cases[0].value, cases[0].place)


def override(recipe: Recipe, tensor: Tensor) -> Override | None:
  """Returns the first override that matches a tensor, or None."""
  fits = (o for o in recipe.overrides if o.where.holds(tensor.name, tensor.layer))
  return next(fits, None)


def is_excluded(recipe: Recipe, tensor: Tensor) -> bool:
  """Returns whether a tensor is copied from the base."""
  return any(where.holds(tensor.name, tensor.layer) for where in recipe.exclude)


def values(
  recipe: Recipe, group: Group, tensor: Tensor, names: Sequence[str] | None = None
) -> Values:
  """Returns the method and its parameters for a tensor, checked together.

  Args:
    recipe: the recipe.
    group: the group that the tensor belongs to. A slice with one source may be a copy, and is a
      passthrough then, see `Group.copied`.
    tensor: the tensor of the merged model.
    names: its name in each source, if they differ, as the layers of slices do.

  Raises:
    RecipeError: for a required parameter without a value for this tensor, values out of range
      together, and weights that add up to zero but are divided by their sum.
  """
  exception = override(recipe, tensor)
  above = (exception.parameters,) if exception else ()
  name = exception.merge_method if exception else recipe.merge_method
  method = METHODS[name]
  if group.copied(method):
    return Values("passthrough", {}, ({"scale": 1.0},))
  problems: list[Problem] = []
  shared = _pick((*above, *group.levels), method.shared, tensor, name, group.place, problems)
  each = []
  for i, source in enumerate(group.sources):
    at = tensor if names is None else tensor._replace(name=names[i])
    levels = (*above, source.parameters, *group.levels)
    known = method.each if group.merged(source, method) else {}
    each.append(_pick(levels, known, at, name, group.place, problems))
  problems += conflicts(name, shared, each, group.place, f" for tensor {tensor.name!r}")
  if problems:
    raise RecipeError(problems)
  plain = [{n: v.value for n, v in by_name.items()} for by_name in (shared, *each)]
  return Values(name, plain[0], tuple(plain[1:]))


def _pick(
  levels: Sequence[Parameters],
  known: Mapping[str, Parameter],
  tensor: Tensor,
  method: str,
  place: Place,
  problems: list[Problem],
) -> dict[str, Value]:
  """Returns the values of parameters, including defaults, and collects problems."""
  picked = {}
  for name, parameter in known.items():
    value = lookup(levels, name, tensor) or Value(parameter.default, None)
    if value.value is None:
      at = next((level[name][-1].place for level in levels if name in level), place)
      text = f"{method} needs {name}, but nothing gives it for tensor {tensor.name!r}"
      problems.append(Problem(at, f"{text}; add an item without a condition."))
    elif wrong := value_error(name, parameter, value.value):
      problems.append(Problem(value.place or place, f"{method}: {wrong}"))
    else:
      picked[name] = value
  return picked


def conflicts(
  name: str,
  shared: Mapping[str, Value],
  each: Sequence[Mapping[str, Value]],
  place: Place,
  which: str = "",
) -> list[Problem]:
  """Returns problems of values that are valid individually but not together.

  Args:
    name: name of the method.
    shared: values that all models share, as far as they are known.
    each: values of each model, likewise.
    place: where the models are listed.
    which: text about the tensor, for errors.
  """
  problems = [
    Problem(shared[n].place or place, f"{n} {text}.")
    for n, parameter in METHODS[name].shared.items()
    if n in shared and shared[n].value != parameter.default
    if (text := catalog_lookup.without_effect(name, n, {m: v.value for m, v in shared.items()}))
  ]
  for values_of_model in each:
    if "epsilon" in values_of_model and "density" in values_of_model:
      density, epsilon = (float(values_of_model[n].value) for n in ("density", "epsilon"))
      at, other = values_of_model["density"].place, values_of_model["epsilon"].place
      if 0 < density < 1 and not (epsilon < density and density + epsilon < 1):
        text = f"density - epsilon and density + epsilon must be in (0, 1), got {density:g} and"
        problems.append(Problem(at or other or place, f"{name}: {text} {epsilon:g}{which}."))
  weights = [values_of_model["weight"] for values_of_model in each if "weight" in values_of_model]
  if weights and _divides(METHODS[name], shared):
    values = [float(w.value) for w in weights]
    if abs(sum(values)) <= 1e-6 * sum(abs(v) for v in values):
      numbers = join_some(f"{v:g}" for v in values)
      hint = "" if METHODS[name].divides == "always" else f", or set {METHODS[name].divides}: false"
      text = f"{name} divides by the sum of the weights, which is zero ({numbers}){which}"
      problems.append(Problem(weights[0].place or place, f"{text}; change them{hint}."))
  return problems


def _divides(method: Method, shared: Mapping[str, Value]) -> bool:
  switch = shared.get(method.divides or "")
  return method.divides == "always" or bool(switch and switch.value)


def unmatched_conditions(
  recipe: Recipe,
  tensors: Mapping[str, int | None],
  modules: Mapping[str | None, Mapping[str, int | None]] = types.MappingProxyType({}),
) -> tuple[Problem, ...]:
  """Returns a problem for each condition that is never a tensor's first match.

  Also for every gradient over depth that only matches tensors outside of the layers.

  Args:
    recipe: the recipe.
    tensors: the layer of every tensor by name, None outside of the layers: of the merged model,
      and of the sources where their names differ.
    modules: tensors of each module, for conditions inside it.
  """
  problems = set()
  for module, conditions in _conditions(recipe):
    every = modules.get(module, tensors)
    left = dict(every)
    for where in conditions:
      taken = [name for name, layer in left.items() if where.holds(name, layer)]
      if not taken and not where.everywhere:
        problems.add(Problem(where.place, _without(where, every)))
      for name in taken:
        del left[name]
  for module, name, cases in _cases(recipe):
    problems |= set(_flat(name, cases, modules.get(module, tensors)))
  return tuple(sorted(problems))


def _flat(name: str, cases: Sequence[Case], tensors: Mapping[str, int | None]) -> Iterator[Problem]:
  """Yields a problem for each gradient that only uses its first value."""
  if any(isinstance(case.value, tuple) for case in cases):
    left = dict(tensors)
    for case in cases:
      taken = {n: layer for n, layer in left.items() if case.where.holds(n, layer)}
      left = {n: layer for n, layer in left.items() if n not in taken}
      gradient = isinstance(case.value, tuple) and len(set(case.value)) > 1
      if gradient and taken and all(layer is None for layer in taken.values()):
        text = f"{name} is a gradient over the depth of layers, but none of the tensors that it is"
        yield Problem(case.place, f"{text} for is in a layer; give one value.")


def _conditions(recipe: Recipe) -> Iterator[tuple[str | None, tuple[Where, ...]]]:
  """Yields the lists of conditions (first match wins), each with its module."""
  yield from ((None, (where,)) for where in recipe.exclude)
  yield None, tuple(o.where for o in recipe.overrides)
  yield None, tuple(v.where for v in recipe.layout)
  yield from ((m, tuple(c.where for c in cases)) for m, _, cases in _cases(recipe))


def _cases(recipe: Recipe) -> Iterator[tuple[str | None, str, tuple[Case, ...]]]:
  """Yields the parameters of all levels: the module, the name, the cases."""
  levels: list[tuple[str | None, Parameters]] = [(None, recipe.parameters)]
  levels += [(name, m.parameters) for name, m in recipe.parts.items()]
  levels += [(None, o.parameters) for o in recipe.overrides]
  for group in groups(recipe):
    levels += [
      (group.module, level) for level in (group.levels[0], *(s.parameters for s in group.sources))
    ]
  yield from ((m, name, cases) for m, level in levels for name, cases in level.items())


def _without(where: Where, tensors: Mapping[str, int | None]) -> str:
  """Returns the reason why a condition matches no tensor, as text."""
  if any(where.holds(name, layer) for name, layer in tensors.items()):
    return f"items before it take all tensors of {where}; put the narrower one first."
  text = f"{where} holds for none of the {len(tensors)} tensors"
  wanted = where.filter or where.pattern
  if wanted is None:
    layers = [layer for layer in tensors.values() if layer is not None]
    return (
      f"{text}; their layers are 0 to {max(layers)}." if layers else f"{text}; none is a layer."
    )
  if where.layers is not None and any(
    dataclasses.replace(where, layers=None).holds(name, None) for name in tensors
  ):
    return f"{text}: those whose names fit are in no such layer."
  parts = [[p for p in name.split(".") if not p.isdigit()] for name in tensors]
  long = wanted.count(".") + 1
  words = {".".join(p[i : i + long]) for p in parts for i in range(len(p))}
  close = difflib.get_close_matches(wanted, sorted(words), n=1)
  if close:
    return f"{text}; did you mean {close[0]!r}?"
  each = sorted({part for name_parts in parts for part in name_parts})
  more = f" and {len(each) - _SHOWN} more" if len(each) > _SHOWN else ""
  return f"{text}, whose names have {', '.join(each[:_SHOWN])}{more} in them; else remove it."
