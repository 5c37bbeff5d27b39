"""From requests for tensors to the plan of a merge, or every misfit. Free of jax."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmerge import display, errors
from jaxmerge.core import running_statistics
from jaxmerge.files import plan as plans
from jaxmerge.io.tensors import quantized, safetensors

ASIDE = "dropped: only the models are merged"  # What becomes of a base that is not.
LACKED = "copied from the base, as not all models have it"


def assembled(
  wants: Sequence[plans.Want],
  jobs: Sequence[plans.Job],
  models: Sequence[plans.Model],
  *,
  dtype: np.dtype | None = None,
  missing: str = "error",
  fates: Mapping[str, Mapping[str, str]] | None = None,
  misfits: Sequence[str] = (),
) -> plans.Plan:
  """Makes a plan of what is wanted, or tells all that does not fit.

  Args:
    wants: the tensors of the result.
    jobs: what merges them.
    models: all inputs; config and tokenizer are those of the first.
    dtype: of the result's floating tensors; None: that of the base, or of the first model.
    missing: what becomes of a tensor that some models lack: "error"; "base", copied from there;
      "mean", of the models that have it; "skip", left out of the result.
    fates: what is known already of tensors that are not wanted.
    misfits: what does not fit between the models, as `misfits.lines` says it.

  Raises:
    Problems: naming every tensor and model that do not fit.
  """
  told = {m.name: {**m.dropped, **(fates or {}).get(m.name, {})} for m in models}
  problems = [*_coded(wants, models, dtype), *misfits]
  every, outputs = list(jobs), []
  statistics = running_statistics.of(want.name for want in wants)
  for want in wants:
    if not there(want):
      continue
    found, fate = _settled(want, missing, every, statistics)
    # The base may be one of the models as well.
    for which in dict.fromkeys((*want.models, want.base)):
      if which is not None and which.tensor is not None:
        words = _fate_of(which, want, found, fate)
        words += f" -> {want.name}" if which.name != want.name and found is not None else ""
        known = told[which.model].get(which.name, "dropped")
        if not known.startswith("dropped"):
          words = known if words.startswith("dropped") else f"{known}; {words}"
        told[which.model][which.name] = words
    if found is not None:
      first = found.base or found.models[0]
      own = first.kept or first.dtype
      stored_as = dtype if dtype is not None and safetensors.is_floating(own) else own
      outputs.append(found._replace(dtype=stored_as))
  for m in models:
    problems += [
      f"tensor {name!r} of {m.name} has no place in the result: exclude it."
      for name in sorted(m.tensors.keys() - told[m.name].keys())
    ]
  if problems:
    raise errors.Problems(problems)
  inputs = frozenset(file for m in models for file in m.files)
  facts = {
    "folders": {m.name: m.home or display.readable(str(m.folder)) for m in models if m.files}
  }
  plan = plans.Plan(tuple(outputs), tuple(every), told, models[0].folder, inputs, facts)
  notes = [note for m in models for note in m.notes]
  notes += quantized.copied(
    [[(p.name, p.model, p.tensor) for p in there(w)] for w in wants if w.models]
  )
  return plan._replace(texts=models[0].texts, notes=tuple(dict.fromkeys(notes)))


def _coded(
  wants: Sequence[plans.Want], models: Sequence[plans.Model], dtype: np.dtype | None
) -> list[str]:
  """Says which models have codes of quantized weights where weights are merged, or are cast."""
  merged: dict[str, set[str]] = {m.name: set() for m in models}
  copied: dict[str, set[str]] = {m.name: set() for m in models}
  for want in wants:
    for p in there(want):
      (merged if want.models else copied)[p.model].add(p.name)
  every = {m.name: m for m in models}.values()
  lines = (quantized.problem(m.name, m.tensors, merged[m.name], m.config, m.folder) for m in every)
  casts = (quantized.cast(m.name, m.tensors, copied[m.name], dtype) for m in every if dtype)
  return [line for line in (*lines, *casts) if line is not None]


def there(want: plans.Want) -> list[plans.Part]:
  """Returns the parts of a tensor that the models have; that of the base is the first."""
  return [p for p in (want.base, *want.models) if p is not None and p.tensor is not None]


def _settled(
  want: plans.Want, missing: str, jobs: list[plans.Job], statistics: Collection[str]
) -> tuple[plans.Output | None, str]:
  """Decides what becomes of a tensor that is wanted; with words for it."""
  base = None if want.base is None else want.base.tensor
  parts = [p for p in want.models if p.tensor is not None]
  tensors = tuple(p.tensor for p in parts if p.tensor is not None)
  first = base or tensors[0]
  made = plans.Output(want.name, first.dtype, first, (), None)
  whole = len(parts) == len(want.models) and (want.raw or base is not None)
  if not want.models or not safetensors.is_floating(first.dtype):
    whose = want.base.model if base is not None and want.base else parts[0].model
    return made, f"copied from {whose}"
  if whole:
    merged = made._replace(base=None if want.raw else base, models=tensors, job=want.job)
    fate = (
      running_statistics.FATE
      if want.name in statistics
      else f"merged by {plans.called(jobs, want.job)}"
    )
    return merged, fate
  if missing == "mean" and tensors:
    names = tuple(p.model for p in parts)
    job = next(
      (i for i, j in enumerate(jobs) if j.words == "mean" and j.models == names), len(jobs)
    )
    if job == len(jobs):
      jobs.append(plans.Job(_mean, "mean", names))
    fate = f"mean of the models that have it, {plans.called(jobs, job)}"
    return made._replace(base=None, models=tensors, job=job), fate
  if missing == "base" and base is not None:
    return made, LACKED
  return None, "dropped: not all models have it"


def _fate_of(which: plans.Part, want: plans.Want, made: plans.Output | None, fate: str) -> str:
  """Says of one of a tensor's parts what it is to the result."""
  if which != want.base or made is None or made.job is None:
    return fate
  if made.base is not None:
    return fate.replace("merged by", "base of", 1)
  return fate if which in want.models else ASIDE


def rounded(plan: plans.Plan) -> tuple[str, ...]:
  """Says which merged tensors are stored in 8-bit floats, or in fewer bits than a model has them.

  It is said of a result whose dtype nobody chose.
  """
  found = []
  for o in plan.outputs:
    widest = max((t.kept or t.dtype for t in o.models), key=lambda own: own.itemsize, default=None)
    if widest is not None and o.dtype.itemsize < max(widest.itemsize, 2):
      found.append((o, widest))
  if not found:
    return ()
  o, widest = found[0]
  count = f", one of {len(found)} such," if len(found) > 1 else ""
  wider = "bfloat16" if widest.itemsize == 1 else widest.name
  remedy = "a base in float64 keeps them" if widest.itemsize > 4 else f"dtype: {wider} keeps more"
  rounding = f"rounded to {o.dtype}, in which the base, or the first model, is stored"
  return (f"tensor {o.name!r}{count} is merged, then {rounding}; {remedy}.",)


def _mean() -> Any:
  from jaxmerge import methods  # jax comes with it.

  return methods.average()
