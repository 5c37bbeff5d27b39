"""Runs a recipe: plans all documents, then merges intermediate recipes and the last one.

Planning is free of jax, which `execute` imports.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple  # Any: a recipe as plain data.

from jaxmerge.errors import suggest_keywords
from jaxmerge.evaluation import external
from jaxmerge.files import estimate, out_formats, resume
from jaxmerge.files import plan as plans
from jaxmerge.io.checkpoints import arrays
from jaxmerge.io.disk import atomic, locks
from jaxmerge.io.huggingface import shard_writer, single_file
from jaxmerge.io.tensors.tensor import Files
from jaxmerge.recipe import errors
from jaxmerge.recipe.plan import steps
from jaxmerge.recipe.plan.steps import Step
from jaxmerge.recipe.syntax import python_values, schema

Source = str | os.PathLike[str] | Mapping[str, Any] | Sequence[Mapping[str, Any]]
Progress = Callable[[str, int], Callable[[int], None]]


class Settings(NamedTuple):
  """Options of a merge of a recipe; see `merge_recipe`."""

  replace: bool = False
  resume: bool = True
  download: bool = False
  strict: bool = False
  compat: Literal["mergekit"] | None = None
  shard_size: int = 5_000_000_000
  nonfinite: bool = False
  out_format: str = "safetensors"


class RecipePlan(NamedTuple):
  """A planned recipe.

  Attributes:
    out: folder of the result.
    settings: how it is merged.
    steps: the recipes of the file in dependency order; the last makes the result.
    full: an error if the disk is too full; else empty.
  """

  out: pathlib.Path
  settings: Settings
  steps: tuple[Step, ...]
  full: tuple[Exception, ...]

  @property
  def plan(self) -> plans.Plan:
    """Returns the plan of the result, with those of intermediate recipes."""
    return self.steps[-1].plan

  @property
  def places(self) -> dict[str, pathlib.Path]:
    """Returns the temporary folders of intermediate results, by name."""
    return {n: shard_writer.intermediate_folder(self.out, n) for n in self.plan.earlier}


@suggest_keywords
def merge_recipe(
  recipe: Source | Any,
  out: str | os.PathLike[str],
  *,
  replace: bool = False,
  resume: bool = True,
  download: bool = False,
  strict: bool = False,
  compat: Literal["mergekit"] | None = None,
  shard_size: int = 5_000_000_000,
  nonfinite: bool = False,
  out_format: str = "safetensors",
  evaluate: external.Evaluate | None = None,
  progress: Progress | None = None,
) -> pathlib.Path:
  """Merges the models of a recipe into a folder, as `jaxmerge merge` does.

  Args:
    recipe: path of a YAML file in mergekit's form; or what such a file holds, a dict, or several,
      of which the last is merged and may build on the others.
    out: folder of the result; it appears when all of it is done. A name that ends in .safetensors
      makes a file of the weights alone.
    replace: whether a folder that is there is replaced.
    resume: whether to go on with an interrupted merge of the same recipe.
    download: whether models that the hub's cache lacks are fetched; else no network is used.
    strict: whether keys without effect, which mergekit ignores, are errors.
    compat: "mergekit": its rules and arithmetic where they differ from ours.
    shard_size: bytes of a file of weights, at most.
    nonfinite: whether NaN and infinity in the inputs are let pass.
    out_format: "safetensors", "orbax" or "like:base", as for `merge_files`.
    evaluate: folder -> numbers by name, called when the result is complete.
    progress: (name, bytes in all) -> what is then called with numbers of bytes that are done.

  Returns:
    The folder of the result. Notes on it are in its model card and provenance.

  Raises:
    RecipeError: a ValueError with all problems of the recipe, `file:line:column: what` each; of a
      dict `models[1].parameters.weight: what`.
    ValueError: naming file, tensor and value, for models that do not fit or are damaged.
    FileExistsError: where there is something at `out` and `replace` is not set.
  """
  _check(out, compat, shard_size, out_format, evaluate)
  settings = Settings(replace, resume, download, strict, compat, shard_size, nonfinite, out_format)
  files = Files()
  try:
    planned = plan(recipe, out, settings, files)
    errors.raise_all(planned.full)
    execute(planned, files, progress)
  finally:
    files.close()
  if evaluate is not None:
    external.run(planned.out, evaluate)
  return planned.out


def _check(out: Any, compat: Any, shard_size: Any, out_format: Any, evaluate: Any) -> None:
  """Raises ValueError for options that mean nothing."""
  for name, value, known in (
    ("compat", compat, (None, "mergekit")),
    ("out_format", out_format, out_formats.FORMATS),
  ):
    if value not in known:
      raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}.")
  if isinstance(shard_size, bool) or not isinstance(shard_size, int) or shard_size < 1:
    raise ValueError(f"shard_size must be a number of bytes, 1 or more, got {shard_size!r}.")
  if evaluate is not None and single_file.is_output(pathlib.Path(out)):
    raise ValueError(f"{out}: numbers of an evaluation are written into a folder; give one.")
  if evaluate is not None and not callable(evaluate):
    kind = type(evaluate).__name__
    raise ValueError(f"evaluate must be a function: folder -> numbers by name, got {kind}.")


def plan(
  recipe: Source | Any,
  out: str | os.PathLike[str],
  settings: Settings,
  files: Files,
  *,
  problems: Sequence[Exception] = (),
) -> RecipePlan:
  """Plans a recipe and those that it builds on, and checks the place of the result.

  Args:
    recipe: as for `merge_recipe`.
    out: folder of the result.
    settings: how it is merged.
    files: open files of the models.
    problems: errors that are already known, to be raised with what is wrong beside.

  Raises:
    ValueError: for all that is wrong with recipe, models and place together.
  """
  out, problems = pathlib.Path(out), list(problems)
  if out_formats.is_checkpoint(settings.out_format):
    arrays.check_path(out)
  atomic.check_name(out)  # All places beside it are named after it.
  locks.check(out, shard_writer.busy_message(out))  # What lies there and beside is that merge's.
  if single_file.is_output(out):
    settings = settings._replace(shard_size=single_file.LIMIT)
  planned = RecipePlan(out, settings, (), ())
  with errors.collect(problems):
    single_file.check_free(out, settings.replace)
  with errors.collect(problems):
    planned = planned._replace(steps=_plan_steps(_read(recipe), settings, files))
  full: list[Exception] = []  # If nothing else is wrong, there is a plan to show.
  if planned.steps:
    with errors.collect(problems):
      last = out_formats.prepare(planned.plan, settings.out_format)
      planned = planned._replace(steps=(*planned.steps[:-1], planned.steps[-1]._replace(plan=last)))
    problems += _check_places(planned, files)
    with errors.collect(full):
      _check_room(planned)
  errors.raise_all([*problems, *full] if problems else [])
  return planned._replace(full=tuple(full))


def _plan_steps(text: steps.Text, settings: Settings, files: Files) -> tuple[Step, ...]:
  return steps.plan_steps(
    text,
    files,
    shard_size=settings.shard_size,
    download=settings.download,
    strict=settings.strict,
    compat=settings.compat,
  )


def _read(recipe: Source | Any) -> steps.Text:
  """Returns the text of a recipe with its parser, whose errors name lines, or paths in a dict."""
  if isinstance(recipe, str | os.PathLike):
    text = schema.text_of(recipe)
    return steps.Text(text, functools.partial(schema.parse, text, str(recipe)))
  documents = python_values.plain_documents(recipe)
  text = python_values.text(documents)
  return steps.Text(text, functools.partial(schema.parse_values, documents))


def _check_places(planned: RecipePlan, files: Files) -> list[Exception]:
  """Returns problems at the places of the results."""
  problems: list[Exception] = []
  with errors.collect(problems):
    shards = planned.plan.shards(planned.settings.shard_size)
    single_file.check_shards(planned.out, shards, planned.settings.out_format)
  complete: set[str] = set()  # By a merge that was interrupted later.
  for step in planned.steps:
    with errors.collect(problems):
      resume.check_place(step.plan, planned.out)
    is_bound = complete >= step.uses.keys()
    plan = step.bind(planned.places, files) if is_bound else step.plan
    if step.result is None:
      place, out_format = planned.out, planned.settings.out_format
    else:
      name, out_format = step.result.model.name, "safetensors"
      place = planned.places[name]
      with errors.collect(problems):
        if is_bound and _is_complete(place, plan, planned.settings):
          step.result.open(place, files)
          complete.add(name)
    if planned.settings.resume:
      with errors.collect(problems):
        resume.check_unfinished(
          plan,
          place,
          shard_size=planned.settings.shard_size,
          out_format=out_format,
          anew=not is_bound,
        )
  return problems


def _check_room(planned: RecipePlan) -> None:
  """Raises OSError where the disk has no room for the remaining output."""
  stages = list(planned.places.values())
  begun = [*stages, *(shard_writer.unfinished_folder(place) for place in (*stages, planned.out))]
  needed = sum(estimate.disk_space(step.plan, "safetensors") for step in planned.steps[:-1])
  needed += estimate.disk_space(planned.plan, planned.settings.out_format)
  shard_writer.check_room(planned.out, needed, begun=begun)


def _is_complete(place: pathlib.Path, plan: plans.Plan, settings: Settings) -> bool:
  """Returns whether a folder is the complete result of this intermediate plan."""
  return resume.is_result(place, plan, settings.shard_size, "safetensors", settings.nonfinite)


def execute(planned: RecipePlan, files: Files, progress: Progress | None = None) -> plans.Plan:
  """Merges the recipes that a recipe builds on, then itself; returns its plan, as it was merged.

  They lie beside the result, under its lock, and are removed at the end. Of many processes each
  writes its share.
  """
  from jaxmerge.files import execute as executor
  from jaxmerge.parallel import processes

  settings, places = planned.settings, planned.places
  run = functools.partial(
    executor.run,
    shard_size=settings.shard_size,
    resume=settings.resume,
    nonfinite=settings.nonfinite,
  )
  count = progress or (lambda name, size: lambda done: None)
  earlier: dict[str, plans.Plan] = {}
  with shard_writer.lock(planned.out) if processes.is_first() else contextlib.nullcontext():
    for step, result in [(s, s.result) for s in planned.steps if s.result is not None]:
      name, plan = result.model.name, step.bind(places, files)
      if not _is_complete(places[name], plan, settings):
        on_done = count(name, estimate.work(plan))
        run(plan, places[name], replace=True, progress=on_done)
        resume.vouch(places[name], plan, settings.shard_size, "safetensors")
      result.open(places[name], files)
      earlier[name] = plan
    plan = planned.steps[-1].bind(places, files)._replace(earlier=earlier)
    plan = out_formats.prepare(plan, settings.out_format)
    on_done = count("merging", estimate.work(plan, settings.out_format))
    kind, replace = settings.out_format, settings.replace
    run(plan, planned.out, progress=on_done, out_format=kind, replace=replace, locked=True)
    for place in places.values() if processes.is_first() else ():
      if place.exists():  # Else they were removed by a merge that was killed at this line.
        shutil.rmtree(place)
  return plan
