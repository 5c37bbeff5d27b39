"""Estimates the cost of a plan: bytes read, disk space, memory. Does not import jax."""

from __future__ import annotations

import math
import re

from jaxmerge.core import layouts
from jaxmerge.files import plan
from jaxmerge.files.plan import Job, Plan


def bytes_read(plan: Plan, job: int | None) -> int:
  """Returns the bytes that a job reads in all its passes; job None: the copied tensors."""
  tensors = [t for o in plan.outputs if o.job == job for t in (o.base, *o.models) if t is not None]
  count = 1 if job is None else passes(plan.jobs[job])
  return count * sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors)


def passes(job: Job) -> int:
  """Returns how often a job reads its models; 1 is assumed for a user's own method."""
  return 1 if job.entry is None else job.entry.passes


def work(plan: Plan, out_format: str = "safetensors") -> int:
  """Returns the total that progress counts: the bytes of the result, once for each pass."""
  count = [passes(job) for job in plan.jobs]
  merged = sum(o.size * (1 if o.job is None else count[o.job]) for o in plan.outputs)
  return merged + (plan.bytes_written if out_format != "safetensors" else 0)


def disk_space(plan: Plan, out_format: str = "safetensors") -> int:
  """Returns the bytes of disk that a result takes while it is written."""
  return plan.bytes_written * (2 if out_format != "safetensors" else 1)


_RUNTIME = 240_000_000  # Bytes of Python and jax; what follows is measured as well.
_WORKING = 30  # Bytes per entry of a slice and model: as read, in float32, as bit patterns.
_RANKED = 120_000_000  # Bytes of samples, and of values near a threshold.


def memory(plan: Plan) -> int:
  """Estimates the resident memory of a merge in bytes, as an approximate upper bound.

  It grows with the number of models and not with their size, unless a method needs whole matrices,
  or rows that are not contiguous.
  """
  most = 0
  for i, job in enumerate(plan.jobs):
    ranks = job.entry is not None and job.entry.ranks
    entries = max((_entries_in_memory(job, o) for o in plan.outputs if o.job == i), default=0)
    if entries:
      most = max(most, _WORKING * entries * (len(job.models) + 1) + ranks * _RANKED)
  return _RUNTIME + most


def _entries_in_memory(job: Job, output: plan.Output) -> int:
  """Returns how many entries of a tensor are in memory at a time, of each model."""
  whole, unit = math.prod(output.shape), layouts.unit_of(job.spec).unit
  cut = min(plan.slice_entries(len(job.models)), whole)
  if unit != "row" or cut == whole:
    return whole if unit == "matrix" else cut
  rows_lead = re.fullmatch("b*[ol]+i*", job.layout.view(output.name) or "") is not None
  return max(cut, math.prod(output.shape[1:])) if rows_lead else whole


def size(count: float) -> str:
  """Formats a number of bytes.

  >>> size(1_495_000_000)
  '1.50 GB'
  """
  for unit in ("B", "kB", "MB"):
    if count < 1000:
      return f"{count:.3g} {unit}"
    count /= 1000
  return f"{count:,.2f} GB"
