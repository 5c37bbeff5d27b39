"""Plans the jobs of a recipe: which method merges each tensor, with which parameters."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple  # Any: numbers of many kinds.

import numpy as np

from jaxmerge.core import layouts
from jaxmerge.files import plan
from jaxmerge.files.plan import InputTensor, Job, TensorRequest
from jaxmerge.io.tensors.tensor import Tensor
from jaxmerge.recipe import parameters
from jaxmerge.recipe.errors import Problem, RecipeError, join_some
from jaxmerge.recipe.mergekit import deviations, precision, translate
from jaxmerge.recipe.mergekit.methods import METHODS
from jaxmerge.recipe.plan import matrix_axes
from jaxmerge.recipe.plan.rows import Opened, Row
from jaxmerge.recipe.records import Missing, Model, Recipe, Source


class Work(NamedTuple):
  """The work of a recipe.

  Attributes:
    requests: the tensors of the result.
    jobs: the jobs that merge them.
    notes: differences from mergekit, a line for each method.
  """

  requests: list[TensorRequest]
  jobs: list[Job]
  notes: tuple[str, ...]


class Assignment(NamedTuple):
  """A row with its method and parameters, and which of the group's sources are merged."""

  row: Row
  values: parameters.Values
  merged: tuple[int, ...]

  @property
  def sources(self) -> tuple[Source, ...]:
    """Returns the sources that are merged."""
    return tuple(self.row.group.sources[i] for i in self.merged)

  @property
  def job_key(self) -> Any:
    """Returns a key that is equal for rows that one job merges."""
    known = METHODS[self.values.method].shared
    switches = [
      (n, v) for n, v in self.values.shared.items() if known[n].integer or not known[n].number
    ]
    return self.values.method, *sorted(switches), self.row.group.base, self.models_of_sources

  @property
  def models_of_sources(self) -> tuple[Model, ...]:
    """Returns their models."""
    return tuple(s.model for s in self.sources)

  def tensors(self, models: Opened) -> list[Tensor]:
    """Returns the input tensors that the models have; the base of slices is a source."""
    group = self.row.group
    pairs = [(s.model, n) for s, n in zip(group.sources, self.row.names, strict=True)]
    pairs += [(group.base, self.row.tensor.name)] if group.base and not group.sliced else []
    candidates = (models[m].input(n).tensor for m, n in pairs)
    return [t for t in candidates if t is not None]

  def shape(self, models: Opened) -> tuple[int, ...]:
    """Returns the shape of the first tensor; () without one."""
    return next((t.shape for t in self.tensors(models)), ())

  def hparams(self) -> dict[str, Any]:
    """Returns the parameters of the recipe: one value, or a tuple with one per model."""
    each = [self.values.each[i] for i in self.merged]
    per_model = {n: tuple(e[n] for e in each) for n in (each[0] if each else {})}
    return {**self.values.shared, **per_model}


def assign(recipe: Recipe, rows: Sequence[Row]) -> tuple[list[Assignment], tuple[Problem, ...]]:
  """Returns the rows to merge, with their parameters, and the problems of the others."""
  assignments: list[Assignment] = []
  problems: list[Problem] = []
  for row in rows:
    if parameters.is_excluded(recipe, row.tensor):
      continue
    try:
      values = parameters.values(recipe, row.group, row.tensor, row.names)
    except RecipeError as error:
      problems += error.problems
      continue
    method, sources = METHODS[values.method], row.group.sources
    merged = tuple(i for i, s in enumerate(sources) if row.group.merged(s, method))
    assignments.append(Assignment(row, values, merged))
  return assignments, tuple(problems)


def plan_jobs(
  recipe: Recipe,
  models: Opened,
  donor: plan.Model,
  rows: Sequence[Row],
  assignments: Sequence[Assignment],
) -> Work:
  """Returns the request for each tensor of the result, and the jobs that merge them."""
  # Most methods do not need it, and it is slow for many thousands of tensors.
  rules = functools.cache(lambda: matrix_axes.rules(recipe, _shapes(models, assignments)))
  kinds: dict[Any, list[Assignment]] = {}
  for assignment in assignments:
    kinds.setdefault(assignment.job_key, []).append(assignment)
  jobs: list[Job] = []
  notes: dict[int, str | None] = {}
  requests: dict[str, TensorRequest] = {}
  for members in kinds.values():
    translation, notes[len(jobs)] = _translate(recipe, members, models)
    jobs.append(_job(recipe, translation, members, models, rules))
    for assignment in members:
      name = assignment.row.tensor.name
      requests[name] = _request(translation, assignment, models, len(jobs) - 1, recipe.missing)
  for row in rows:
    name = row.tensor.name
    if parameters.is_excluded(recipe, row.tensor):
      base_of_row = models[row.group.base] if row.group.base else donor
      requests[name] = TensorRequest(name, base_of_row.input(row.in_base))
    elif name not in requests:
      # Its parameters are wrong; the shapes of its inputs are checked nevertheless.
      pairs = zip(row.group.sources, row.names, strict=True)
      parts = tuple(models[s.model].input(n) for s, n in pairs)
      # The base of slices is one of their sources.
      base = row.group.base if not row.group.sliced else None
      requests[name] = TensorRequest(
        name, models[base].input(name) if base else None, parts, of_weights=True
      )
  notes_of_jobs = (
    *notes.values(),
    *(_spacing_note(jobs[i].spec, k[0]) for i, k in enumerate(kinds.values())),
  )
  lines = dict.fromkeys(line for line in notes_of_jobs if line is not None)
  return Work([requests[row.tensor.name] for row in rows], jobs, tuple(lines))


def _spacing_note(spec: Mapping[str, Any], first: Assignment) -> str | None:
  """Returns a note on checkpoints that a decay takes as equally spaced though they are not."""
  steps = [m.step for m in first.models_of_sources if m.step is not None]
  gaps = {b - a for a, b in itertools.pairwise(steps)}
  if len(gaps) < 2 or spec.get("kind") != "decay" or spec["method"] != "checkpoint_average":
    return None
  listed = join_some(map(str, steps))
  return f"steps {listed} are not equally spaced; a decay takes them so: list others, or use sma."


def _translate(
  recipe: Recipe, members: Sequence[Assignment], models: Opened
) -> tuple[translate.Translation, str | None]:
  """Translates a recipe's method to this library's, with a note on differences from mergekit."""
  first = members[0]
  here, there = (
    translate.translate(
      first.values.method,
      first.values.shared,
      base=first.row.group.base is not None,
      varied=_varied_parameters(members),
      compat=compat,
    )
    for compat in (recipe.compat == "mergekit", True)
  )
  ways = (here.method, here.settings, there.settings)
  return here, deviations.line(recipe, first.values.method, *ways, first.tensors(models))


def _varied_parameters(members: Sequence[Assignment]) -> set[str]:
  first = members[0].hparams()
  return {n for assignment in members for n, v in assignment.hparams().items() if v != first[n]}


def _job(
  recipe: Recipe,
  translation: translate.Translation,
  members: Sequence[Assignment],
  models: Opened,
  rules: Callable[[], Mapping[str, layouts.Rule]],
) -> Job:
  hparams: dict[str, Any] = {}
  for name, of in translation.hparams.items():
    hparams[name] = _common_value(
      {
        assignment.row.tensor.name: np.asarray(of(assignment.hparams()), np.float64)
        for assignment in members
      }
    )
  names = _number_repeated([models[m].name for m in members[0].models_of_sources])
  base = members[0].row.group.base
  if translation.pair and base is not None:
    names.insert(0, models[base].name)

  def method() -> Any:
    from jaxmerge import methods  # Imports jax.

    return getattr(methods, translation.method)(**translation.settings)

  name = members[0].values.method
  of_recipe = {"method": name} | {
    n: _common_value(
      {assignment.row.tensor.name: assignment.hparams()[n] for assignment in members}
    )
    for n in METHODS[name].parameters
    if n != "int8_mask" and n in members[0].hparams()
  }
  spec = {"method": translation.method, **translation.settings}
  seed = recipe.seed if METHODS[name].random else None
  compat = recipe.compat == "mergekit"
  table = matrix_axes.table(spec, rules, _shapes(models, members), compat=compat)
  return Job(method, spec, tuple(names), hparams, seed, table, of_recipe)


def _common_value(each: Mapping[str, Any]) -> Any:
  """Returns the value that all tensors share, or the values by tensor if they differ."""
  first = next(iter(each.values()))
  return first if all(np.array_equal(first, v) for v in each.values()) else dict(each)


def _number_repeated(names: Sequence[str]) -> list[str]:
  """Returns names of sources, numbered if a model occurs several times."""
  counts = [names[: i + 1].count(name) for i, name in enumerate(names)]
  return [f"{n} ({c})" if c > 1 else n for n, c in zip(names, counts, strict=True)]


def precision_problems(
  recipe: Recipe, models: Opened, assignments: Sequence[Assignment]
) -> Iterator[Problem]:
  """Yields methods that cannot be computed as mergekit does, and views that do not fit."""
  if recipe.compat == "mergekit":
    for assignment in assignments:
      yield from precision.problems(recipe, assignment.values.method, assignment.tensors(models))
  yield from matrix_axes.view_problems(recipe, _shapes(models, assignments))


def matrix_problems(
  recipe: Recipe, models: Opened, assignments: Sequence[Assignment], jobs: Sequence[Job]
) -> tuple[Problem, ...]:
  """Returns a problem for each matrix method that cannot be applied to its tensors."""
  return tuple(matrix_axes.fit_problems(recipe, jobs, _shapes(models, assignments)))


def _shapes(models: Opened, assignments: Sequence[Assignment]) -> matrix_axes.Shapes:
  return {
    assignment.row.tensor: assignment.shape(models)
    for assignment in assignments
    if assignment.tensors(models)
  }


def _request(
  translation: translate.Translation,
  assignment: Assignment,
  models: Opened,
  job: int,
  missing: Missing,
) -> TensorRequest:
  group, name = assignment.row.group, assignment.row.tensor.name

  def part(i: int) -> InputTensor:
    model = models[group.sources[i].model]
    return model.input(assignment.row.names[i])

  parts = [part(i) for i in assignment.merged]
  if translation.method == "passthrough" and assignment.hparams()["scale"] == (1.0,):
    if parts[0].tensor is None and missing == "base" and group.base is not None:
      return TensorRequest(name, models[group.base].input(assignment.row.in_base))
    return TensorRequest(name, parts[0])
  base = None
  if group.base is not None:
    listed = [i for i, s in enumerate(group.sources) if s.model == group.base]
    # A base that is not a source of the slice matters only for tensors missing from a model.
    aside = not group.sliced or missing == "base"
    apart = models[group.base].input(assignment.row.in_base) if aside else None
    base = part(listed[0]) if listed else apart
  if translation.pair and base is not None:
    parts.insert(0, base)
  return TensorRequest(name, base, tuple(parts), job, translation.of_weights)
