"""Matrix views of a recipe's tensors: by the recipe's layout, or else by convention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any  # A job's words are plain JSON.

from jaxmerge.core import conventions, layouts
from jaxmerge.files.plan import Job
from jaxmerge.recipe.errors import Problem
from jaxmerge.recipe.parameters import Tensor
from jaxmerge.recipe.records import Recipe, View

Shapes = Mapping[Tensor, tuple[int, ...]]
_DECLARED = "layout of the recipe"


def rules(recipe: Recipe, shapes: Shapes) -> dict[str, layouts.Rule]:
  """Returns the layout rule of each tensor: the recipe's, or else its library's convention."""
  by_name = conventions.rules({tensor.name: shape for tensor, shape in shapes.items()})
  for tensor in shapes:
    view = _declared_view(recipe, tensor)
    if view is not None:
      by_name[tensor.name] = layouts.Rule(view.axes, _DECLARED)
  return by_name


def table(
  words: Mapping[str, Any],
  rules: Callable[[], Mapping[str, layouts.Rule]],
  shapes: Shapes,
  *,
  compat: bool,
) -> layouts.Table:
  """Returns the layout table of a job, if its method needs one; with `compat` as in mergekit."""
  unit = layouts.unit_of(words)
  if unit.unit == "entry":
    return layouts.NONE
  by_name = rules()
  if compat and (unit.unit == "row" or unit.lookups == "row"):
    by_name = rows_as_mergekit(by_name, shapes)
  return layouts.table({tensor.name: by_name[tensor.name] for tensor in shapes})


def rows_as_mergekit(
  by_name: Mapping[str, layouts.Rule], shapes: Shapes
) -> dict[str, layouts.Rule]:
  """Returns rules with rows along the last axis of every tensor, as in mergekit.

  Tensors that the recipe's layout names keep its views.
  """
  plain = {t.name: "l" * (len(s) - 1) + "i" if len(s) > 1 else None for t, s in shapes.items()}
  along_last = {n: layouts.Rule(view, "as mergekit has rows") for n, view in plain.items()}
  return {n: rule if rule.reason == _DECLARED else along_last[n] for n, rule in by_name.items()}


def view_problems(recipe: Recipe, shapes: Shapes) -> Iterator[Problem]:
  """Yields views whose number of axes differs from their tensor's, each once."""
  reported: set[View] = set()
  for tensor, shape in shapes.items():
    view = _declared_view(recipe, tensor)
    if view is None or view.axes is None or view in reported or len(view.axes) == len(shape):
      continue
    reported.add(view)
    text = f"view {view.axes!r} names {len(view.axes)} axes, but {tensor.name!r} is"
    yield Problem(view.place, f"{text} {list(shape)}; narrow the condition, or name every axis.")


def fit_problems(recipe: Recipe, jobs: Sequence[Job], shapes: Shapes) -> Iterator[Problem]:
  """Yields problems of matrix methods without a matrix, or with tensors of unclear layout.

  Jobs of one method are checked together.
  """
  sizes = {tensor.name: shape for tensor, shape in shapes.items()}
  by_method: dict[Any, dict[str, layouts.Rule]] = {}
  for job in jobs:
    of_job = {name: rule for rule, names in job.layout.groups for name in names}
    by_method.setdefault((job.spec["method"], layouts.unit_of(job.spec)), {}).update(of_job)
  for (_, unit), rules_of_method in by_method.items():
    if problem := layouts.find_problem(unit, rules_of_method, sizes):
      text = problem + layouts.advice(unit, rules_of_method, sizes, _item, " ")
      yield Problem(recipe.places.get("merge_method", recipe.place), text)


def _item(pattern: str, views: Sequence[str]) -> str:
  return f"{{pattern: '{pattern}', view: {'|'.join([*views, 'none'])}}}"


def _declared_view(recipe: Recipe, tensor: Tensor) -> View | None:
  holds = (v for v in recipe.layout if v.where.holds(tensor.name, tensor.layer))
  return next(holds, None)
