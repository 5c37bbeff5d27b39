"""Describes a plan: as text for a dry run, and as the record behind the model card."""

from __future__ import annotations

import collections
import importlib.metadata
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmerge.catalog import decays
from jaxmerge.core import layouts
from jaxmerge.files import estimate, inputs, outcomes
from jaxmerge.files.plan import Job, Plan
from jaxmerge.io import formats
from jaxmerge.io.checkpoints import metadata, other_programs
from jaxmerge.io.huggingface import folder, pipeline

Record = dict[str, Any]


def dry_run(plan: Plan, *, shard_size: int, out_format: str = "safetensors") -> list[str]:
  """Describes, in lines of text, what a plan and the plans before it will do and cost."""
  if plan.earlier:
    return _dry_run_of_several(plan, shard_size, out_format)
  shards = len(plan.shards(shard_size))
  disk = estimate.size(estimate.disk_space(plan, out_format))
  checkpoint = f", a checkpoint; while it is made, {disk} on the disk"
  files = f", {shards} file{'s' * (shards != 1)}"
  lines = [
    f"result: {len(plan.outputs)} tensors, {estimate.size(plan.bytes_written)}"
    + (checkpoint if out_format != "safetensors" else files),
    f"tensors: {outcomes.line(outcomes.counts(plan))}",
    f"inputs: {len(plan.inputs)} files, {estimate.size(plan.bytes_read)} in one reading",
    f"memory: {estimate.size(estimate.memory(plan))} or less",
  ]
  merged = [o for o in plan.outputs if o.job is not None]
  narrow = collections.Counter(o.precision.dtype for o in merged if o.precision is not None)
  lines += [f"computed in {dtype}: {count} tensors" for dtype, count in sorted(narrow.items())]
  folders = plan.facts.get("folders", {}).items()
  lines += [f"  {name}: checkpoint {path}" for name, path in folders if _is_checkpoint(path)]
  texts = collections.Counter(
    outcomes.summarize(each, plan.jobs)
    for by_name in plan.outcomes.values()
    for each in by_name.values()
  )
  lines += [f"  {count} tensors of the inputs: {text}" for text, count in sorted(texts.items())]
  for number in range(len(plan.jobs)):
    lines += _dry_run_of_job(plan, number)
  return [*lines, *(f"note: {note}" for note in plan.notes)]


def _is_checkpoint(path: str) -> bool:
  # A plain folder is parsed as well: a reference has a step or a subtree behind it.
  is_reference = not os.path.isdir(path) and other_programs.parse(path) is not None
  return metadata.is_checkpoint(path) or is_reference


def _dry_run_of_job(plan: Plan, number: int) -> list[str]:
  """Describes a job; returns no lines if it merges nothing."""
  job, count = plan.jobs[number], sum(o.job == number for o in plan.outputs)
  if not count:
    return []
  settings = json.dumps(job.spec, default=str)
  if job.seed is not None:
    settings += f", seed {job.seed}"
  passes = estimate.passes(job)
  times = "" if passes == 1 else f", read {passes} times"
  lines = [f"job {number + 1}: {count} tensors of {len(job.models)} models{times}, {settings}"]
  lines += [f"  outputs and inputs: {text}"] if (text := _layout(job)) else []
  lines += [f"  in the recipe: {recipe_text(job)}"] if job.recipe else []
  hparams = [f"{name} {_number(value, job.models)}" for name, value in job.hparams.items()]
  lines += [f"  here: {'; '.join(hparams)}"] if hparams else []
  if weights := checkpoint_weights(job):
    lines += [f"  weights, the oldest first: {_number(weights, job.models)}"]
  return lines


def checkpoint_weights(job: Job) -> tuple[float, ...] | None:
  """Returns the weights of a job that averages the checkpoints of a run; None for others."""
  spec = dict(job.spec) if isinstance(job.spec, Mapping) else {}
  if spec.pop("method", None) != "checkpoint_average" or "where" in spec:
    return None
  alpha = np.asarray(job.hparams.get("alpha", 0.2), object)
  if alpha.ndim or isinstance(alpha.item(), Mapping):
    return None if spec.get("kind") == "ema" else _weights(job, spec, 0.2)
  return _weights(job, spec, float(alpha.item()))


def _weights(job: Job, spec: Mapping[str, Any], alpha: float) -> tuple[float, ...]:
  known = {n: spec[n] for n in ("kind", "start", "decay", "zero_at") if n in spec}
  return decays.checkpoint_weights(len(job.models), **known, alpha=alpha)


def recipe_text(job: Job, names: Mapping[str, str] | None = None) -> str:
  """Describes the method and the parameters of a recipe, with those of each model."""
  models = [(names or {}).get(m, m) for m in job.models]
  values = ((n, v) for n, v in job.recipe.items() if n != "method")
  return "; ".join([str(job.recipe["method"]), *(f"{n} {_number(v, models)}" for n, v in values)])


def _dry_run_of_several(plan: Plan, shard_size: int, out_format: str) -> list[str]:
  """Describes several plans; earlier ones write safetensors, which stay until the last is done."""
  plans, lines = [*plan.earlier.values(), plan], list[str]()
  for name, before in plan.earlier.items():
    lines += [f"recipe {name!r}, done before and removed at the end:"]
    lines += [f"  {line}" for line in dry_run(before, shard_size=shard_size)]
  lines += ["the last recipe:"]
  last = dry_run(plan._replace(earlier={}), shard_size=shard_size, out_format=out_format)
  lines += [f"  {line}" for line in last]
  read = sum(estimate.bytes_read(p, job) for p in plans for job in (None, *range(len(p.jobs))))
  written, memory = sum(p.bytes_written for p in plans), max(map(estimate.memory, plans))
  return [
    *lines,
    f"in all: {estimate.size(read)} read, {estimate.size(written)} written, memory "
    f"{estimate.size(memory)} or less",
  ]


def summary(plan: Plan) -> Record:
  """Returns the record of the model card: inputs, methods, numbers of tensors, versions.

  It depends only on the plan and the donor's small files: no date, no path on this machine.

  Returns:
    `models`, names of all inputs, the donor first; `hub`, references to models of the hub and their
    commits; `methods`, one record for each job (see `_method`); `counts`, of tensors, in a line;
    `library`, of Python, that opens the result, None if that is not known; `recipe`, its text, None
    without one; `compat`, where that was a flag; `notes`, a line each; `versions` of packages;
    `earlier`, the same of recipes that it builds on, by name.
  """
  names = _names(list(plan.outcomes), plan)
  earlier = {name: p._replace(facts=plan.facts) for name, p in plan.earlier.items()}
  counts = [sum(o.job == i for o in plan.outputs) for i in range(len(plan.jobs))]
  return {
    "models": list(names.values()),
    "hub": dict(plan.facts.get("hub", {})),
    "methods": [_method(job, names, n) for job, n in zip(plan.jobs, counts, strict=True) if n],
    "counts": outcomes.line(outcomes.counts(plan)),
    "library": _library(plan),
    "recipe": plan.facts.get("recipe"),
    "compat": plan.facts.get("compat"),
    "notes": list(plan.notes),
    "versions": {p: importlib.metadata.version(p) for p in ("jaxmerge", "jax")},
    "earlier": {name: summary(p) for name, p in earlier.items()},
  }


def _names(models: Sequence[str], plan: Plan) -> dict[str, str]:
  """Returns the names of models: those of the recipe, else without their parent folders."""
  paths = [m for m in models if os.path.isabs(m) and "recipe" not in plan.facts]
  short = dict(zip(paths, inputs.short_names(paths), strict=True)) if paths else {}
  return {m: short.get(m, m) for m in models}


def _method(job: Job, names: Mapping[str, str], count: int) -> Record:
  """Describes a job.

  Returns:
    `method`, its name in the catalog, or what it is called; `settings`, `hparams`, in words;
    `models`, their names; `tensors`, how many; `seed`, None without one; `layout`, how many
    tensors have which view, empty for methods that need none; `recipe`, method and parameters of a
    recipe in words, None without one.
  """
  settings = dict(job.spec) if isinstance(job.spec, Mapping) else {"method": str(job.spec)}
  models = [names.get(m, m) for m in job.models]
  return {
    "method": settings.pop("method"),
    "settings": settings,
    "hparams": {name: _number(value, models) for name, value in job.hparams.items()},
    "models": models,
    "tensors": count,
    "seed": job.seed,
    "layout": _layout(job),
    "recipe": recipe_text(job, names) if job.recipe else None,
  }


def _layout(job: Job) -> str:
  return layouts.summary(job.layout, layouts.unit_of(job.spec))


def _number(value: Any, models: Sequence[str]) -> str:
  """Formats a hyperparameter: for all, for each model, or the range over the tensors.

  >>> _number((1.0, 0.5), ["chat", "code"]), _number({"w": 0.2, "v": 0.8}, []), _number(True, [])
  ('1 (chat), 0.5 (code)', 'from 0.2 to 0.8, by tensor', 'true')
  """
  if isinstance(value, Mapping):
    by_tensor = np.stack([np.asarray(v) for v in value.values()]).T
    return f"{_numbers(by_tensor, models)}, by tensor"
  return _numbers(np.asarray(value)[..., None], models)


def _numbers(values: np.ndarray, models: Sequence[str]) -> str:
  """Formats values [..., tensors]: of all models, or [model, tensors] of each."""
  if values.ndim == 2 and len(values) == len(models):
    return ", ".join(f"{_span(row)} ({m})" for row, m in zip(values, models, strict=True))
  return _span(values) if values.ndim == 1 else f"{values[..., 0].size} values"


def _span(values: np.ndarray) -> str:
  """Formats the range of some values."""
  if values.dtype.kind not in "fiu":
    words = dict.fromkeys(
      str(v).lower() if isinstance(v, bool) else str(v) for v in values.tolist()
    )
    return " or ".join(words)
  low, high = (f"{x:.6g}" for x in (values.min(), values.max()))
  return low if low == high else f"from {low} to {high}"


def _library(plan: Plan) -> str | None:
  """Returns the library that opens the result, if its config names it."""
  if (plan.donor / folder.MODULES).is_file():
    return "sentence-transformers"
  if pipeline.is_pipeline(plan.donor):
    return "diffusers"
  config = formats.config(plan.donor)
  known = isinstance(config.get("architectures"), list) and "model_type" in config
  return "transformers" if known or "transformers_version" in config else None
