"""Assembles the plan of a merge from tensor requests, or lists every misfit. Without jax."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmerge import display, errors
from jaxmerge.core import running_statistics
from jaxmerge.files import plan as plans
from jaxmerge.files.outcomes import ASIDE, LACKED
from jaxmerge.files.plan import Job, Outcome
from jaxmerge.io.checkpoints import like
from jaxmerge.io.checkpoints.other_programs import Checkpoint
from jaxmerge.io.tensors import quantized, safetensors

_UNUSED = ("dropped", "tied")


def make_plan(
  requests: Sequence[plans.TensorRequest],
  jobs: Sequence[Job],
  models: Sequence[plans.Model],
  *,
  dtype: np.dtype | None = None,
  missing: str = "error",
  dropped: Mapping[str, Mapping[str, Outcome]] | None = None,
  misfits: Sequence[str] = (),
) -> plans.Plan:
  """Returns the plan of a merge, or raises one error with every misfit.

  Args:
    requests: the tensors of the result.
    jobs: the jobs that merge them.
    models: all inputs; config and tokenizer are those of the first.
    dtype: dtype of the result's floating-point tensors; None: the base's, or the first model's.
    missing: outcome of a tensor that some models lack: "error"; "base", copied from the base;
      "mean", of the models that have it; "skip", left out of the result.
    dropped: outcomes of dropped tensors by model; tensors that the result has are not dropped.
    misfits: mismatches between the models, from `misfits.lines`.

  Raises:
    Problems: naming every tensor and model that do not fit.
  """
  outcomes: dict[str, dict[str, tuple[Outcome, ...]]] = {
    m.name: {n: (o,) for n, o in {**m.outcomes, **(dropped or {}).get(m.name, {})}.items()}
    for m in models
  }
  problems = [*_check_codes(requests, models, dtype), *misfits]
  all_jobs, outputs = list(jobs), list[plans.Output]()
  statistics = running_statistics.of(request.name for request in requests)
  for request in filter(inputs_present, requests):
    output, outcome = _resolve(request, missing, all_jobs, statistics)
    _record(outcomes, request, output, outcome)
    if output is not None:
      stored = (output.base or output.models[0]).stored_dtype
      if dtype is not None and safetensors.is_floating(stored):
        stored = dtype
      outputs.append(output._replace(dtype=stored))
  problems += _without_outcome(models, outcomes)
  if problems:
    raise errors.Problems(problems)
  inputs = frozenset(file for m in models for file in m.files)
  facts = {
    "folders": {
      m.name: m.home or display.readable(str(m.folder)) for m in models if m.files or m.orbax
    }
  }
  return plans.Plan(
    tuple(outputs),
    tuple(all_jobs),
    outcomes,
    models[0].folder,
    inputs,
    facts,
    texts=models[0].texts,
    notes=_notes(requests, models),
    orbax=_layout(requests, models),
  )


def _layout(
  requests: Sequence[plans.TensorRequest], models: Sequence[plans.Model]
) -> Checkpoint | None:
  """Returns the checkpoint whose layout a result can have: the base's, or the newest of a run."""
  if any(request.base is not None for request in requests):
    return models[0].orbax
  return like.newest_of_run([m.orbax for m in models])


def _notes(
  requests: Sequence[plans.TensorRequest], models: Sequence[plans.Model]
) -> tuple[str, ...]:
  """Returns the notes of the models, and one on integer tensors that differ but are copied."""
  merged = [inputs_present(request) for request in requests if request.models]
  copies = quantized.note_copies([[(p.name, p.model, p.tensor) for p in each] for each in merged])
  return tuple(dict.fromkeys([*(note for m in models for note in m.notes), *copies]))


def _record(
  outcomes: Mapping[str, dict[str, tuple[Outcome, ...]]],
  request: plans.TensorRequest,
  output: plans.Output | None,
  outcome: Outcome,
) -> None:
  """Adds the outcomes of the input tensors of a request; a tensor in use is not dropped."""
  # The base may be one of the models as well.
  for part in dict.fromkeys((*request.models, request.base)):
    if part is None or part.tensor is None:
      continue
    each = _outcome_of(part, request, output, outcome)
    if part.name != request.name and output is not None:
      each = each._replace(target=request.name)
    before = tuple(o for o in outcomes[part.model].get(part.name, ()) if o.kind not in _UNUSED)
    unused = before and each.kind in _UNUSED
    outcomes[part.model][part.name] = before if unused else (*before, each)


def _without_outcome(
  models: Sequence[plans.Model], outcomes: Mapping[str, Mapping[str, object]]
) -> list[str]:
  """Returns lines on tensors without an outcome."""
  return [
    f"tensor {name!r} of {m.name} has no place in the result: exclude it."
    for m in models
    for name in sorted(m.tensors.keys() - outcomes[m.name].keys())
  ]


def _check_codes(
  requests: Sequence[plans.TensorRequest], models: Sequence[plans.Model], dtype: np.dtype | None
) -> list[str]:
  """Lists models with quantized codes among tensors that are merged or cast."""
  merged: dict[str, set[str]] = {m.name: set() for m in models}
  copied: dict[str, set[str]] = {m.name: set() for m in models}
  for request in requests:
    for p in inputs_present(request):
      (merged if request.models else copied)[p.model].add(p.name)
  distinct = {m.name: m for m in models}.values()
  lines = (
    quantized.problem(m.name, m.tensors, merged[m.name], m.config, m.folder) for m in distinct
  )
  casts = (quantized.cast(m.name, m.tensors, copied[m.name], dtype) for m in distinct if dtype)
  return [line for line in (*lines, *casts) if line is not None]


def inputs_present(request: plans.TensorRequest) -> list[plans.InputTensor]:
  """Returns the input tensors that exist, the base's first."""
  return [p for p in (request.base, *request.models) if p is not None and p.tensor is not None]


def _resolve(
  request: plans.TensorRequest, missing: str, jobs: list[Job], statistics: Collection[str]
) -> tuple[plans.Output | None, Outcome]:
  """Returns the output for a request (None: left out) and the outcome of its input tensors."""
  base = None if request.base is None else request.base.tensor
  parts = [p for p in request.models if p.tensor is not None]
  tensors = tuple(p.tensor for p in parts if p.tensor is not None)
  first = base or tensors[0]
  copied = plans.Output(request.name, first.dtype, first, (), None)
  complete = len(parts) == len(request.models) and (request.of_weights or base is not None)
  if not request.models or not safetensors.is_floating(first.dtype):
    source = request.base.model if base is not None and request.base else parts[0].model
    return copied, Outcome("copied", reason=f"from {source}")
  if complete:
    merged = copied._replace(
      base=None if request.of_weights else base, models=tensors, job=request.job
    )
    if request.name in statistics:
      return merged, Outcome("merged", reason=running_statistics.FATE)
    return merged, Outcome("merged", request.job)
  if missing == "mean" and tensors:
    job = _job_of_mean(tuple(p.model for p in parts), jobs)
    outcome = Outcome("merged", job, reason="mean of the models that have it")
    return copied._replace(base=None, models=tensors, job=job), outcome
  if missing == "base" and base is not None:
    return copied, LACKED
  return None, Outcome("dropped", reason="not all models have it")


def _job_of_mean(names: tuple[str, ...], jobs: list[Job]) -> int:
  """Returns the index of the job that averages these models; adds the job if there is none."""
  for i, job in enumerate(jobs):
    if job.spec == "mean" and job.models == names:
      return i
  jobs.append(Job(_mean, "mean", names))
  return len(jobs) - 1


def _outcome_of(
  part: plans.InputTensor,
  request: plans.TensorRequest,
  output: plans.Output | None,
  outcome: Outcome,
) -> Outcome:
  """Returns the outcome of one input tensor of a request; a base's may differ."""
  if part != request.base or output is None or output.job is None:
    return outcome
  if output.base is not None:
    return outcome if outcome.job is None else outcome._replace(kind="base")
  return outcome if part in request.models else ASIDE


def note_rounding(plan: plans.Plan) -> tuple[str, ...]:
  """Returns a note if merged tensors are stored in 8-bit floats, or in fewer bits than a model's.

  Call it if the user did not choose the result's dtype.
  """
  narrowed = []
  for o in plan.outputs:
    widest = max((t.stored_dtype for t in o.models), key=lambda d: d.itemsize, default=None)
    if widest is not None and o.dtype.itemsize < max(widest.itemsize, 2):
      narrowed.append((o, widest))
  if not narrowed:
    return ()
  o, widest = narrowed[0]
  count = f", one of {len(narrowed)} such," if len(narrowed) > 1 else ""
  wider = "bfloat16" if widest.itemsize == 1 else widest.name
  remedy = "a base in float64 keeps them" if widest.itemsize > 4 else f"dtype: {wider} keeps more"
  rounding = f"rounded to {o.dtype}, in which the base, or the first model, is stored"
  return (f"tensor {o.name!r}{count} is merged, then {rounding}; {remedy}.",)


def _mean() -> Any:
  from jaxmerge import methods  # Imports jax.

  return methods.average()
