"""Which axes of a recipe's tensors are outputs and inputs: by its layout, else by convention."""

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
  """Returns how each tensor lies, as the recipe says, else as its library has it."""
  found = conventions.rules({tensor.name: shape for tensor, shape in shapes.items()})
  for tensor in shapes:
    said = _declared(recipe, tensor)
    if said is not None:
      found[tensor.name] = layouts.Rule(said.axes, _DECLARED)
  return found


def table(
  words: Mapping[str, Any],
  rules: Callable[[], Mapping[str, layouts.Rule]],
  shapes: Shapes,
  *,
  compat: bool,
) -> layouts.Table:
  """Returns how the tensors of a job lie, if its method asks; as mergekit has rows, if so asked."""
  unit = layouts.unit_of(words)
  if unit.unit == "entry":
    return layouts.NONE
  found = rules()
  if compat and (unit.unit == "row" or unit.lookups == "row"):
    found = literal(found, shapes)
  return layouts.table({tensor.name: found[tensor.name] for tensor in shapes})


def literal(found: Mapping[str, layouts.Rule], shapes: Shapes) -> dict[str, layouts.Rule]:
  """Returns the rules by which mergekit takes rows: along the last axis, whatever a tensor is.

  What the recipe's layout says stays.
  """
  plain = {t.name: "l" * (len(s) - 1) + "i" if len(s) > 1 else None for t, s in shapes.items()}
  own = {n: layouts.Rule(view, "as mergekit has rows") for n, view in plain.items()}
  return {n: rule if rule.reason == _DECLARED else own[n] for n, rule in found.items()}


def misfits(recipe: Recipe, shapes: Shapes) -> Iterator[Problem]:
  """Finds views of other axes than a tensor; of each view that is of the first tensor."""
  told: set[View] = set()
  for tensor, shape in shapes.items():
    view = _declared(recipe, tensor)
    if view is None or view.axes is None or view in told or len(view.axes) == len(shape):
      continue
    told.add(view)
    text = f"view {view.axes!r} names {len(view.axes)} axes, but {tensor.name!r} is"
    yield Problem(view.place, f"{text} {list(shape)}; narrow the condition, or name every axis.")


def unfit(recipe: Recipe, jobs: Sequence[Job], shapes: Shapes) -> Iterator[Problem]:
  """Finds methods of matrices that find none, or of which it is open how their tensors lie.

  What a recipe merges by one method counts together, though it be several jobs.
  """
  sizes = {tensor.name: shape for tensor, shape in shapes.items()}
  by_method: dict[Any, dict[str, layouts.Rule]] = {}
  for job in jobs:
    held = {name: rule for rule, names in job.layout.groups for name in names}
    by_method.setdefault((job.spec["method"], layouts.unit_of(job.spec)), {}).update(held)
  for (_, unit), found in by_method.items():
    if problem := layouts.unfit(unit, found, sizes):
      text = problem + layouts.advice(unit, found, sizes, _item, " ")
      yield Problem(recipe.places.get("merge_method", recipe.place), text)


def _item(pattern: str, views: Sequence[str]) -> str:
  return f"{{pattern: '{pattern}', view: {'|'.join([*views, 'none'])}}}"


def _declared(recipe: Recipe, tensor: Tensor) -> View | None:
  holds = (v for v in recipe.layout if v.where.holds(tensor.name, tensor.layer))
  return next(holds, None)
