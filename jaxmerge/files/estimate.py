"""What a plan costs: bytes read, room on disk, memory. Free of jax."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any  # A record is JSON, its values have no one type.

from jaxmerge.catalog import lookup
from jaxmerge.core import layouts
from jaxmerge.files import plan
from jaxmerge.files.plan import Job, Plan


def read(plan: Plan, job: int | None) -> int:
  """Bytes that a job reads, as often as it does; None: those that are copied."""
  parts = [t for o in plan.outputs if o.job == job for t in (o.base, *o.models) if t is not None]
  often = 1 if job is None else readings(plan.jobs[job])
  return often * sum(math.prod(t.shape) * t.dtype.itemsize for t in parts)


def readings(job: Job) -> int:
  """Returns how often a job reads its models; once, as far as is known, by a method of a user's."""
  name = str(words(job).get("method"))
  return lookup.METHODS[name].reads if name in lookup.METHODS else 1


def work(plan: Plan, out_format: str = "safetensors") -> int:
  """Returns the bytes that progress is told of: those of the result, once for each reading."""
  often = [readings(job) for job in plan.jobs]
  merged = sum(o.size * (1 if o.job is None else often[o.job]) for o in plan.outputs)
  return merged + (plan.written if out_format == "orbax" else 0)


def room(plan: Plan, out_format: str = "safetensors") -> int:
  """Returns the bytes that a result takes on the disk while it is made."""
  return plan.written * (2 if out_format == "orbax" else 1)


_RUNTIME = 240_000_000  # Bytes of Python and jax; what follows is measured as well.
_WORKING = 30  # Bytes for each entry of a slice and each model: as read, in float32, as bits.
_RANKED = 120_000_000  # Bytes of samples, and of the values near a threshold.


def memory(plan: Plan) -> int:
  """Estimates the resident memory of a merge, in bytes; it takes about so much or less.

  It grows with the number of models and not with their size, except where a method needs whole
  matrices, or rows that do not lie one after the other.
  """
  most = 0
  for i, job in enumerate(plan.jobs):
    entry = lookup.METHODS.get(str(words(job).get("method")))
    ranked = entry is not None and bool({"density", "remove"} & entry.parameters.keys())
    entries = max((_held(job, o) for o in plan.outputs if o.job == i), default=0)
    if entries:
      most = max(most, _WORKING * entries * (len(job.models) + 1) + ranked * _RANKED)
  return _RUNTIME + most


def _held(job: Job, output: plan.Output) -> int:
  """Entries of a tensor that are in memory at a time, of each model."""
  whole, unit = math.prod(output.shape), layouts.unit_of(job.words).unit
  cut = min(plan.entries(len(job.models)), whole)
  if unit != "row" or cut == whole:
    return whole if unit == "matrix" else cut
  leads = re.fullmatch("b*[ol]+i*", job.layout.view(output.name) or "") is not None
  return max(cut, math.prod(output.shape[1:])) if leads else whole


def words(job: Job) -> Mapping[str, Any]:
  """Returns what a job says of its method, empty where it says nothing."""
  return job.words if isinstance(job.words, Mapping) else {}


def size(count: float) -> str:
  """Writes a number of bytes.

  >>> size(1_495_000_000)
  '1.50 GB'
  """
  for unit in ("B", "kB", "MB"):
    if count < 1000:
      return f"{count:.3g} {unit}"
    count /= 1000
  return f"{count:,.2f} GB"
