"""Checks that the inputs of a resumed merge have not changed since it was interrupted.

Equal stamps are enough. If stamps differ, files may have been copied or restored in between: then
the checksums that were computed while reading them decide.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping
from typing import Any  # Any: what a journal says of a tensor is plain JSON.

import numpy as np
import xxhash

from jaxmerge import display
from jaxmerge.files import plan, tied_weights
from jaxmerge.files.plan import Plan
from jaxmerge.io.disk import stamps
from jaxmerge.io.huggingface import shard_writer
from jaxmerge.io.tensors.tensor import Tensor


def journal_stamps(plan: Plan) -> dict[str, list[int]]:
  """Returns the stamps of a plan's inputs in the journal's form.

  They omit the device, whose number may differ after a reboot or on another node of a cluster.
  """
  taken = plan.stamps or stamps.take(sorted(plan.inputs))
  return {display.readable(str(path)): list(stamp[1:]) for path, stamp in sorted(taken.items())}


def check(plan: Plan, done: Mapping[str, Any], directory: pathlib.Path) -> None:
  """Reads the inputs of finished tensors, and compares their checksums.

  Args:
    plan: the plan.
    done: finished tensors to their records in the journal.
    directory: the folder of the result, for the error.

  Raises:
    ValueError: naming the first input that has changed.
  """
  known: dict[str, str] = {}
  for output in plan.outputs:
    if output.name not in done or output.copy_of is not None:
      continue
    before = done[output.name].get("inputs", {})
    for tensor in (output.base, *output.models):
      if tensor is None or (output.job is None and tensor is not output.base):
        continue
      if tensor.where not in known:
        known[tensor.where] = digest(tensor)
      if before.get(tensor.where) != known[tensor.where]:
        raise shard_writer.Replaced(directory, tensor.where)


def are_unchanged(plan: Plan, done: Mapping[str, Any], directory: pathlib.Path) -> bool:
  """Returns whether a complete folder was merged from the inputs as they are now."""
  before = shard_writer.stamps(directory)
  if before and all(each == journal_stamps(plan) for each in before):
    return True
  try:
    check(tied_weights.share_twins(plan), done, directory)
  except shard_writer.Replaced:
    return False
  return True


def digest(tensor: Tensor) -> str:
  """Returns the checksum of a tensor, read in the same parts as in a merge."""
  hasher, size = xxhash.xxh3_128(), math.prod(tensor.shape)
  step = plan.slice_entries(1)
  for start in range(0, max(size, 1), step):
    part = np.empty(min(step, size - start), tensor.dtype)
    tensor.read(start, part)
    hasher.update(part.view(np.uint8).data)
  return hasher.hexdigest()
