"""Runs a recipe: all of it is planned, then the recipes that it builds on are merged, then itself.

Planning is free of jax, which `execute` imports.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple  # Any: what a recipe holds.

import yaml

from jaxmerge.evaluation import external
from jaxmerge.files import estimate, inputs, resume
from jaxmerge.files import plan as plans
from jaxmerge.io.checkpoints import arrays
from jaxmerge.io.disk import atomic, locks
from jaxmerge.io.huggingface import shard_writer
from jaxmerge.io.tensors.tensor import Files
from jaxmerge.recipe import errors
from jaxmerge.recipe.plan import planner
from jaxmerge.recipe.syntax import schema

Source = str | os.PathLike[str] | Mapping[str, Any] | Sequence[Mapping[str, Any]]
Progress = Callable[[str, int], Callable[[int], None]]


class Settings(NamedTuple):
  """How a recipe is merged; see `merge_recipe`."""

  replace: bool = False
  resume: bool = True
  download: bool = False
  strict: bool = False
  compat: Literal["mergekit"] | None = None
  shard_size: int = 5_000_000_000
  nonfinite: bool = False
  out_format: str = "safetensors"


class Planned(NamedTuple):
  """A recipe that is ready to be merged.

  Attributes:
    text: of the recipe.
    name: what errors call it.
    out: folder of the result.
    settings: how it is merged.
    plan: what becomes of every tensor.
    stages: where the recipes that it builds on are merged, in this order.
    full: an error if the disk has no room; else nothing.
  """

  text: str
  name: str
  out: pathlib.Path
  settings: Settings
  plan: plans.Plan
  stages: tuple[pathlib.Path, ...]
  full: tuple[Exception, ...]


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
    out: folder of the result; it appears when all of it is done.
    replace: whether a folder that is there is replaced.
    resume: whether to go on with an interrupted merge of the same recipe.
    download: whether models that the hub's cache lacks are fetched; else no network is used.
    strict: whether keys without effect, which mergekit ignores, are errors.
    compat: "mergekit": its rules and arithmetic where they differ from ours.
    shard_size: bytes of a file of weights, at most.
    nonfinite: whether NaN and infinity in the inputs are let pass.
    out_format: "safetensors" or "orbax", as for `merge_files`.
    evaluate: folder -> numbers by name, called when the result is complete.
    progress: (name, bytes in all) -> what is then called with numbers of bytes that are done.

  Returns:
    The folder of the result. Notes on it are in its model card and provenance.

  Raises:
    RecipeError: a ValueError with all problems of the recipe, `file:line:column: what` each.
    ValueError: naming file, tensor and value, for models that do not fit or are damaged.
    FileExistsError: where there is something at `out` and `replace` is not set.
  """
  _check(compat, shard_size, out_format, evaluate)
  settings = Settings(replace, resume, download, strict, compat, shard_size, nonfinite, out_format)
  files = Files()
  try:
    planned = plan(recipe, out, settings, files)
    errors.check(planned.full)
    execute(planned, files, progress)
  finally:
    files.close()
  if evaluate is not None:
    external.evaluated(planned.out, evaluate)
  return planned.out


def _check(compat: Any, shard_size: Any, out_format: Any, evaluate: Any) -> None:
  """Raises ValueError for options that mean nothing."""
  for name, value, known in (
    ("compat", compat, (None, "mergekit")),
    ("out_format", out_format, ("safetensors", "orbax")),
  ):
    if value not in known:
      raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}.")
  if isinstance(shard_size, bool) or not isinstance(shard_size, int) or shard_size < 1:
    raise ValueError(f"shard_size must be a number of bytes, 1 or more, got {shard_size!r}.")
  if evaluate is not None and not callable(evaluate):
    kind = type(evaluate).__name__
    raise ValueError(f"evaluate must be a function: folder -> numbers by name, got {kind}.")


def plan(
  recipe: Source | Any,
  out: str | os.PathLike[str],
  settings: Settings,
  files: Files,
  *,
  noted: Sequence[Exception] = (),
) -> Planned:
  """Plans a recipe and those that it builds on, and looks at the place of the result.

  Args:
    recipe: as for `merge_recipe`.
    out: folder of the result.
    settings: how it is merged.
    files: open files of the models.
    noted: errors that are already known, to be raised with those found here.

  Raises:
    ValueError: for all that is wrong with recipe, models and place together.
  """
  out, found = pathlib.Path(out), list(noted)
  if settings.out_format == "orbax":
    arrays.check_path(out)
  atomic.check_name(out)  # All places beside it are made of its name.
  locks.check(out, shard_writer.running(out))  # What lies there and beside is that merge's.
  stages: dict[str, tuple[pathlib.Path, plans.Plan]] = {}
  whole: list[plans.Plan] = []
  done: set[str] = set()

  def foreseen(name: str, plan: plans.Plan) -> plans.Model:
    place = shard_writer.stage_of(out, name)
    stages[name] = place, plan
    if not resume.is_result(place, plan, *_kind(settings)):
      return inputs.planned_model(name, plan)
    done.add(name)  # By a merge that was interrupted later.
    return inputs.open_model(place, files, name=name, home=name)

  with errors.noted(found):
    atomic.check_free(out, settings.replace)
  with errors.noted(found):
    text, name = _text(recipe)
    whole.append(_planned(text, name, files, foreseen, settings, download=settings.download))
  every = [*stages.values(), *((out, plan) for plan in whole)]
  found += _problems(every, out, settings, stages.keys(), done)
  full: list[Exception] = []  # If nothing else is wrong, there is a plan to show.
  with errors.noted(full):
    begun = [place for place, _ in stages.values()]
    begun += [shard_writer.part_of(place) for place, _ in every]
    needed = sum(estimate.disk_space(plan, _format(place, out, settings)) for place, plan in every)
    shard_writer.check_room(out, needed, begun=begun)
  errors.check([*found, *full] if found else [])
  places = tuple(place for place, _ in stages.values())
  return Planned(text, name, out, settings, whole[0], places, tuple(full))


def _planned(
  text: str,
  name: str,
  files: Files,
  made: Callable[[str, plans.Plan], plans.Model],
  settings: Settings,
  *,
  download: bool = False,
) -> plans.Plan:
  strict, compat = settings.strict, settings.compat
  return planner.of_text(text, name, files, made, download=download, strict=strict, compat=compat)


def _text(recipe: Source | Any) -> tuple[str, str]:
  """The text of a recipe, and what errors call it."""
  if isinstance(recipe, str | os.PathLike):
    return schema.text_of(recipe), str(recipe)
  several = isinstance(recipe, Sequence)
  documents: list[Any] = list(recipe) if several else [recipe]
  if not documents or not all(isinstance(d, Mapping) for d in documents):
    raise ValueError("a recipe must be the path of a YAML file, a dict, or a list of dicts.")
  try:
    plain = [_plain(d) for d in documents]
    return yaml.safe_dump_all(plain, sort_keys=False, allow_unicode=True), "recipe"
  except yaml.YAMLError as error:
    raise ValueError(f"a recipe must hold what YAML can: {error}") from error


def _plain(value: Any) -> Any:
  """Dicts, lists and texts in place of their relatives, such as a config's tuples and paths."""
  if isinstance(value, Mapping):
    return {str(k): _plain(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(v) for v in value]
  if hasattr(value, "tolist"):  # Numbers and arrays of NumPy and JAX.
    return _plain(value.tolist())
  return str(value) if isinstance(value, os.PathLike | str) else value


def _problems(
  every: Sequence[tuple[pathlib.Path, plans.Plan]],
  out: pathlib.Path,
  settings: Settings,
  stages: Any,
  done: set[str],
) -> list[Exception]:
  """What stands in the way at the places of the results."""
  found: list[Exception] = []
  for place, plan in every:
    with errors.noted(found):
      resume.check_place(plan, out)
    if settings.resume:
      # Their names stand before those of adapters.
      used = {name.split("+")[0] for name in plan.outcomes} & stages
      used |= set(stages) if place == out else set()
      kind = _format(place, out, settings)
      with errors.noted(found):
        size, anew = settings.shard_size, not used <= done
        resume.check_unfinished(plan, place, shard_size=size, out_format=kind, anew=anew)
  return found


def _format(place: pathlib.Path, out: pathlib.Path, settings: Settings) -> str:
  """Results that another recipe builds on are always safetensors."""
  return settings.out_format if place == out else "safetensors"


def _kind(settings: Settings) -> tuple[int, str, bool]:
  return settings.shard_size, "safetensors", settings.nonfinite


def execute(planned: Planned, files: Files, progress: Progress | None = None) -> plans.Plan:
  """Merges the recipes that a recipe builds on, then itself; returns its plan, now with all.

  They lie beside the result, under its lock, and are removed at the end. Of many processes each
  writes its share.
  """
  from jaxmerge.files import execute as executor
  from jaxmerge.parallel import processes

  settings, plan = planned.settings, planned.plan
  run = functools.partial(
    executor.run,
    shard_size=settings.shard_size,
    resume=settings.resume,
    nonfinite=settings.nonfinite,
  )
  count = progress or (lambda name, size: lambda done: None)
  left = iter(planned.stages)

  def made(name: str, plan: plans.Plan) -> plans.Model:
    stage = next(left)
    if not resume.is_result(stage, plan, *_kind(settings)):
      told = count(name, estimate.work(plan))
      run(plan, stage, replace=True, progress=told)
      resume.vouch(stage, plan, *_kind(settings)[:2])
    files.forget(stage)
    return inputs.open_model(stage, files, name=name, home=name)

  # Recipes that it builds on are merged beside the result: they are under its lock as well.
  with shard_writer.locked(planned.out) if processes.first() else contextlib.nullcontext():
    if planned.stages:
      plan = _planned(planned.text, planned.name, files, made, settings)
    told = count("merging", estimate.work(plan, settings.out_format))
    kind, replace = settings.out_format, settings.replace
    run(plan, planned.out, progress=told, out_format=kind, replace=replace, locked=True)
    for stage in planned.stages if processes.first() else ():
      if stage.exists():  # Else they were removed by a merge that was killed at this line.
        shutil.rmtree(stage)
  return plan
