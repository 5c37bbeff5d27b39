"""What a plan does in words, and the record that the model card is made of."""

from __future__ import annotations

import collections
import importlib.metadata
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmerge.core import layouts
from jaxmerge.files import estimate, inputs, outcomes
from jaxmerge.files.plan import Job, Plan
from jaxmerge.io import formats
from jaxmerge.io.checkpoints import metadata
from jaxmerge.io.huggingface import folder

Record = dict[str, Any]


def described(plan: Plan, *, shard_size: int, out_format: str = "safetensors") -> list[str]:
  """Says what a plan, and each that is done before it, will do and cost, for `--dry-run`."""
  if plan.earlier:
    return _each_described(plan, shard_size, out_format)
  inputs_of: collections.Counter[str] = collections.Counter()
  for by_name in plan.outcomes.values():
    inputs_of.update(outcomes.summarize(each, plan.jobs) for each in by_name.values())
  made = [o for o in plan.outputs if o.job is not None]
  shards = len(plan.shards(shard_size))
  taken = (
    f", a checkpoint; while it is made, {estimate.size(estimate.room(plan, out_format))} on the "
    "disk"
  )
  out = [
    f"result: {len(plan.outputs)} tensors, {estimate.size(plan.written)}"
    + (taken if out_format == "orbax" else f", {shards} file{'s' * (shards != 1)}"),
    f"tensors: {outcomes.line(outcomes.counts(plan))}",
    f"inputs: {len(plan.inputs)} files, {estimate.size(plan.read)} in one reading",
    f"memory: {estimate.size(estimate.memory(plan))} or less",
  ]
  narrow = collections.Counter(o.precision.dtype for o in made if o.precision is not None)
  out += [f"computed in {dtype}: {count} tensors" for dtype, count in sorted(narrow.items())]
  folders = plan.facts.get("folders", {}).items()
  out += [f"  {name}: checkpoint {own}" for name, own in folders if metadata.is_one(own)]
  out += [f"  {count} tensors of the inputs: {text}" for text, count in sorted(inputs_of.items())]
  for i, job in enumerate(plan.jobs):
    count = sum(o.job == i for o in plan.outputs)
    if count:
      settings = json.dumps(job.words, default=str)
      if job.seed is not None:
        settings += f", seed {job.seed}"
      reads = estimate.readings(job)
      often = "" if reads == 1 else f", read {reads} times"
      out.append(f"job {i + 1}: {count} tensors of {len(job.models)} models{often}, {settings}")
      out += [f"  outputs and inputs: {words}"] if (words := _laid_out(job)) else []
      out += [f"  in the recipe: {asked(job)}"] if job.asked else []
      out += [f"  here: {'; '.join(_numbers(job))}"] if job.numbers else []
  return [*out, *(f"note: {line}" for line in plan.notes)]


def asked(job: Job, names: Mapping[str, str] | None = None) -> str:
  """Says in words what a recipe asks for: its method and parameters, those of each model."""
  called = [(names or {}).get(m, m) for m in job.models]
  values = ((n, v) for n, v in job.asked.items() if n != "method")
  return "; ".join([str(job.asked["method"]), *(f"{n} {_number(v, called)}" for n, v in values)])


def _numbers(job: Job) -> list[str]:
  return [f"{name} {_number(value, job.models)}" for name, value in job.numbers.items()]


def _each_described(plan: Plan, shard_size: int, out_format: str) -> list[str]:
  """Says it of several plans: those before write safetensors, which stay until all is done."""
  every, out = [*plan.earlier.values(), plan], list[str]()
  for name, own in plan.earlier.items():
    lines = described(own, shard_size=shard_size)
    out += [f"recipe {name!r}, done before and removed at the end:", *(f"  {x}" for x in lines)]
  out += ["the last recipe:"]
  lines = described(plan._replace(earlier={}), shard_size=shard_size, out_format=out_format)
  out += [f"  {x}" for x in lines]
  once = sum(sum(estimate.read(own, i) for i in (None, *range(len(own.jobs)))) for own in every)
  written, most = sum(own.written for own in every), max(map(estimate.memory, every))
  return [
    *out,
    f"in all: {estimate.size(once)} read, {estimate.size(written)} written, memory "
    f"{estimate.size(most)} or less",
  ]


def summary(plan: Plan) -> Record:
  """Describes a merge: what went in, what was done to how many tensors, with which versions.

  It is a function of the plan and the donor's small files: no date, no place on this machine.

  Returns:
    `models`, names of all inputs, the donor first; `hub`, references to models of the hub and their
    commits; `methods`, one record for each job (see `_method`); `counts`, of tensors, in a line;
    `library`, of Python, that opens the result, None if that is not known; `recipe`, its text, None
    without one; `compat`, where that was a flag; `notes`, a line each; `versions` of packages;
    `earlier`, the same of recipes that it builds on, by name.
  """
  names = _names(list(plan.outcomes), plan)
  earlier = {name: own._replace(facts=plan.facts) for name, own in plan.earlier.items()}
  made = [o for o in plan.outputs if o.job is not None]
  counts = [sum(o.job == i for o in made) for i in range(len(plan.jobs))]
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
    "earlier": {name: summary(own) for name, own in earlier.items()},
  }


def _names(models: Sequence[str], plan: Plan) -> dict[str, str]:
  """What models are called: as the recipe says, else without the folders that they lie in."""
  own = [m for m in models if os.path.isabs(m) and "recipe" not in plan.facts]
  short = dict(zip(own, inputs.names(own), strict=True)) if own else {}
  return {m: short.get(m, m) for m in models}


def _method(job: Job, names: Mapping[str, str], count: int) -> Record:
  """Describes a job.

  Returns:
    `method`, its name in the catalog, or what it is called; `settings`, `numbers`, in words;
    `models`, their names; `tensors`, how many; `seed`, None without one; `layout`, how many
    lie how, empty for methods that do not ask;
    `asked`, the method and parameters of a recipe in words, None without one.
  """
  words = dict(estimate.words(job)) or {"method": str(job.words)}
  return {
    "method": words.pop("method"),
    "settings": words,
    "numbers": {
      n: _number(x, [names.get(m, m) for m in job.models]) for n, x in job.numbers.items()
    },
    "models": [names.get(m, m) for m in job.models],
    "tensors": count,
    "seed": job.seed,
    "layout": _laid_out(job),
    "asked": asked(job, names) if job.asked else None,
  }


def _laid_out(job: Job) -> str:
  return layouts.counted(job.layout, layouts.unit_of(job.words))


def _number(value: Any, models: Sequence[str]) -> str:
  """Writes one of a method's numbers: for all, for each model, or the range over the tensors.

  >>> _number((1.0, 0.5), ["chat", "code"]), _number({"w": 0.2, "v": 0.8}, []), _number(True, [])
  ('1 (chat), 0.5 (code)', 'from 0.2 to 0.8, by tensor', 'true')
  """
  if isinstance(value, Mapping):
    every = [_written(np.stack([np.asarray(v) for v in value.values()]).T, models)]
    return f"{every[0]}, by tensor"
  return _written(np.asarray(value)[..., None], models)


def _written(values: np.ndarray, models: Sequence[str]) -> str:
  """Writes values [..., tensors]: of all models, or [model, tensors] of each."""
  if values.ndim == 2 and len(values) == len(models):
    return ", ".join(f"{_span(own)} ({m})" for own, m in zip(values, models, strict=True))
  return _span(values) if values.ndim == 1 else f"{values[..., 0].size} values"


def _span(values: np.ndarray) -> str:
  """Writes the range of some values."""
  if values.dtype.kind not in "fiu":
    words = dict.fromkeys(
      str(v).lower() if isinstance(v, bool) else str(v) for v in values.tolist()
    )
    return " or ".join(words)
  low, high = (f"{x:.6g}" for x in (values.min(), values.max()))
  return low if low == high else f"from {low} to {high}"


def _library(plan: Plan) -> str | None:
  """The library that opens the result, as far as its config tells."""
  if (plan.donor / folder.MODULES).is_file():
    return "sentence-transformers"
  config = formats.config(plan.donor)
  known = isinstance(config.get("architectures"), list) and "model_type" in config
  return "transformers" if known or "transformers_version" in config else None
