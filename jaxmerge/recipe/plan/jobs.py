"""What a recipe does with every tensor: which job merges it, by which numbers, or a copy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple  # Any: numbers of many kinds.

import numpy as np

from jaxmerge.core import layouts
from jaxmerge.files import plan
from jaxmerge.files.plan import InputTensor, Job, TensorRequest
from jaxmerge.io.tensors.tensor import Tensor
from jaxmerge.recipe import parameters
from jaxmerge.recipe.errors import Problem, RecipeError
from jaxmerge.recipe.mergekit import deviations, precision, translate
from jaxmerge.recipe.mergekit.methods import METHODS
from jaxmerge.recipe.plan import matrix_axes
from jaxmerge.recipe.plan.rows import Opened, Row
from jaxmerge.recipe.records import Missing, Model, Recipe, Source


class Work(NamedTuple):
  """What is done.

  Attributes:
    wants: the tensors of the result.
    jobs: what merges them.
    notes: what is not as in mergekit, a line for each method.
  """

  wants: list[TensorRequest]
  jobs: list[Job]
  notes: tuple[str, ...]


class Settled(NamedTuple):
  """A row with its method and parameters, and which of the group's sources are merged."""

  row: Row
  values: parameters.Values
  merged: tuple[int, ...]

  @property
  def sources(self) -> tuple[Source, ...]:
    """Returns the sources that are merged."""
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
    """Returns their models."""
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


def settled(recipe: Recipe, rows: Sequence[Row]) -> tuple[list[Settled], tuple[Problem, ...]]:
  """The rows that are not excluded, and what is wrong with the parameters of the others."""
  found: list[Settled] = []
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
    found.append(Settled(row, values, merged))
  return found, tuple(problems)


def wanted(
  recipe: Recipe,
  models: Opened,
  donor: plan.Model,
  rows: Sequence[Row],
  settled: Sequence[Settled],
) -> Work:
  """Returns what is wanted for each tensor of the result, and the jobs that merge."""
  # Of no use to most methods, and slow where there are many thousands of tensors.
  rules = functools.cache(lambda: matrix_axes.rules(recipe, _shapes(models, settled)))
  kinds: dict[Any, list[Settled]] = {}
  for own in settled:
    kinds.setdefault(own.kind, []).append(own)
  jobs: list[Job] = []
  notes: dict[int, str | None] = {}
  wants: dict[str, TensorRequest] = {}
  for members in kinds.values():
    translation, notes[len(jobs)] = _translated(recipe, members, models)
    jobs.append(_job(recipe, translation, members, models, rules))
    for own in members:
      name = own.row.tensor.name
      wants[name] = _want(translation, own, models, len(jobs) - 1, recipe.missing)
  for row in rows:
    name = row.tensor.name
    if parameters.excluded(recipe, row.tensor):
      own_base = models[row.group.base] if row.group.base else donor
      wants[name] = TensorRequest(name, own_base.part(row.in_base))
    elif name not in wants:  # Its parameters are wrong; whether its parts fit is told all the same.
      pairs = zip(row.group.sources, row.names, strict=True)
      parts = tuple(models[s.model].part(n) for s, n in pairs)
      # The base of slices is one of their sources.
      base = row.group.base if not row.group.sliced else None
      wants[name] = TensorRequest(
        name, models[base].part(name) if base else None, parts, of_weights=True
      )
  told = dict.fromkeys(line for line in notes.values() if line is not None)
  return Work([wants[row.tensor.name] for row in rows], jobs, tuple(told))


def _translated(
  recipe: Recipe, members: Sequence[Settled], models: Opened
) -> tuple[translate.Translation, str | None]:
  """What the method of a recipe is here, and what differs from mergekit."""
  first = members[0]
  here, there = (
    translate.translated(
      first.values.method,
      first.values.shared,
      base=first.row.group.base is not None,
      varied=_varied(members),
      compat=compat,
    )
    for compat in (recipe.compat == "mergekit", True)
  )
  ways = (here.method, here.settings, there.settings)
  return here, deviations.line(recipe, first.values.method, *ways, first.tensors(models))


def _varied(members: Sequence[Settled]) -> set[str]:
  first = members[0].given()
  return {n for own in members for n, v in own.given().items() if v != first[n]}


def _job(
  recipe: Recipe,
  translation: translate.Translation,
  members: Sequence[Settled],
  models: Opened,
  rules: Callable[[], Mapping[str, layouts.Rule]],
) -> Job:
  numbers: dict[str, Any] = {}
  for name, of in translation.numbers.items():
    numbers[name] = _same(
      {own.row.tensor.name: np.asarray(of(own.given()), np.float64) for own in members}
    )
  called = _different([models[m].name for m in members[0].sources_of])
  base = members[0].row.group.base
  if translation.pair and base is not None:
    called.insert(0, models[base].name)

  def method() -> Any:
    from jaxmerge import methods  # jax comes with it.

    return getattr(methods, translation.method)(**translation.settings)

  name = members[0].values.method
  asked = {"method": name} | {
    n: _same({own.row.tensor.name: own.given()[n] for own in members})
    for n in METHODS[name].parameters
    if n != "int8_mask" and n in members[0].given()
  }
  words = {"method": translation.method, **translation.settings}
  seed = recipe.seed if METHODS[name].random else None
  compat = recipe.compat == "mergekit"
  table = matrix_axes.table(words, rules, _shapes(models, members), compat=compat)
  return Job(method, words, tuple(called), numbers, seed, table, asked)


def _same(each: Mapping[str, Any]) -> Any:
  """The value of all tensors; where they differ, the values by tensor."""
  first = next(iter(each.values()))
  return first if all(np.array_equal(first, v) for v in each.values()) else dict(each)


def _different(names: Sequence[str]) -> list[str]:
  """Names of sources; layers of one model may be several of them."""
  counts = [names[: i + 1].count(name) for i, name in enumerate(names)]
  return [f"{n} ({c})" if c > 1 else n for n, c in zip(names, counts, strict=True)]


def refused(recipe: Recipe, models: Opened, settled: Sequence[Settled]) -> Iterator[Problem]:
  """Finds methods that cannot be computed as mergekit does, and views that do not fit."""
  if recipe.compat == "mergekit":
    for own in settled:
      yield from precision.refused(recipe, own.values.method, own.tensors(models))
  yield from matrix_axes.misfits(recipe, _shapes(models, settled))


def unfit(
  recipe: Recipe, models: Opened, settled: Sequence[Settled], jobs: Sequence[Job]
) -> tuple[Problem, ...]:
  """Finds methods of matrices that cannot work on their tensors."""
  return tuple(matrix_axes.unfit(recipe, jobs, _shapes(models, settled)))


def _shapes(models: Opened, settled: Sequence[Settled]) -> matrix_axes.Shapes:
  return {own.row.tensor: own.shape(models) for own in settled if own.tensors(models)}


def _want(
  translation: translate.Translation, own: Settled, models: Opened, job: int, missing: Missing
) -> TensorRequest:
  group, name = own.row.group, own.row.tensor.name

  def part(i: int) -> InputTensor:
    model = models[group.sources[i].model]
    return model.part(own.row.names[i])

  parts = [part(i) for i in own.merged]
  if translation.method == "passthrough" and own.given()["scale"] == (1.0,):
    if parts[0].tensor is None and missing == "base" and group.base is not None:
      return TensorRequest(name, models[group.base].part(own.row.in_base))
    return TensorRequest(name, parts[0])
  base = None
  if group.base is not None:
    listed = [i for i, s in enumerate(group.sources) if s.model == group.base]
    # A base that is not among the sources of a slice is looked at only where it helps out.
    aside = not group.sliced or missing == "base"
    apart = models[group.base].part(own.row.in_base) if aside else None
    base = part(listed[0]) if listed else apart
  if translation.pair and base is not None:
    parts.insert(0, base)
  return TensorRequest(name, base, tuple(parts), job, translation.raw)
