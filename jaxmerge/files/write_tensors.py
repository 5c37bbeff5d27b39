"""Writes the tensors of a merge of files, merged slice by slice or copied."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Set

import jax
import numpy as np
import xxhash

from jaxmerge.drivers import slices, streaming
from jaxmerge.files import estimate
from jaxmerge.files import plan as plans
from jaxmerge.files import reader as readers
from jaxmerge.files.plan import Output, Plan
from jaxmerge.io.huggingface import shard_writer
from jaxmerge.io.tensors import safetensors
from jaxmerge.io.tensors.tensor import Tensor

Progress = Callable[[int], None]


class _MeasuringProgress:
  """Reports the bytes of a job's measuring passes, up to the estimate."""

  def __init__(self, progress: Progress, left: int):
    self._progress, self._left = progress, left

  def add(self, count: int) -> None:
    """Reports bytes; a pass beyond the estimate is not counted."""
    count = min(self._left, count)
    self._left -= count
    if count:
      self._progress(count)

  def finish(self) -> None:
    """Reports the remaining bytes: a method may need fewer passes than estimated."""
    self.add(self._left)


def merge_job(
  plan: Plan,
  number: int,
  share: Collection[str],
  weights: shard_writer.ShardWriter,
  entries: int | None,
  nonfinite: bool,
  progress: Progress,
) -> None:
  """Merges this process's share of a job, and measures statistics over all its tensors.

  Args:
    plan: the whole merge.
    number: index of the job.
    share: names of the tensors that this process writes.
    weights: of the result.
    entries: approximate entries of each model in memory at a time; None: automatic.
    nonfinite: whether NaN and infinity in the inputs are allowed.
    progress: called with numbers of bytes measured or written.
  """
  job, outputs = plan.jobs[number], [o for o in plan.outputs if o.job == number]
  size = sum(o.size for o in outputs)
  measuring = _MeasuringProgress(progress, size * (estimate.passes(job) - 1))
  leaves = {o.name: jax.ShapeDtypeStruct(o.shape, o.dtype) for o in outputs}
  done = weights.digests.keys() | (leaves.keys() - set(share))
  if leaves.keys() <= done:
    measuring.finish()
    return
  reader = readers.Reader(outputs)
  narrow = {o.name: o.precision for o in outputs if o.precision is not None}
  wide = {o.name for o in outputs if any(t and t.dtype.itemsize == 8 for t in (o.base, *o.models))}
  # Some tensors of the job are copied: a model lacks them, or they hold integers.
  hparams = {
    n: {t: v[t] for t in leaves} if isinstance(v, dict) else v for n, v in job.hparams.items()
  }
  streaming.stream(
    job.method(),
    streaming.Source(leaves, len(job.models), reader.read, narrow, wide),
    _writer(number, leaves.keys(), reader, weights, progress),
    hparams=hparams,
    seed=job.seed,
    names=job.models,
    layout=job.layout,
    entries=entries or plans.slice_entries(len(job.models)),
    done=done,
    nonfinite=nonfinite,
    on_measured=lambda name, count: measuring.add(count * leaves[name].dtype.itemsize),
  )
  measuring.finish()


def _writer(
  job: int,
  names: Set[str],
  reader: readers.Reader,
  weights: shard_writer.ShardWriter,
  progress: Progress,
) -> Callable[[str, int, np.ndarray], None]:
  """Returns a writer of a job's slices, which first records the digest of the inputs."""
  is_recorded = False

  def write(name: str, start: int, part: np.ndarray) -> None:
    nonlocal is_recorded
    if start == 0 and not is_recorded and (digest := reader.whole()) is not None:
      weights.record_measurement(job, digest, names & weights.digests.keys())
      is_recorded = True
    weights.add(name, start, part, reader.digests.get(name, {}))
    progress(part.nbytes)

  return write


def copy_share(
  plan: Plan,
  share: Collection[str],
  weights: shard_writer.ShardWriter,
  entries: int | None,
  nonfinite: bool,
  progress: Progress,
) -> None:
  """Copies the tensors that no job merges, from the base or from an equal tensor.

  Arguments as for `merge_job`.
  """
  entries = entries or plans.slice_entries(1)
  for output in plan.outputs:
    if output.job is not None or output.name not in share or output.name in weights.digests:
      continue
    source = output.base if output.copy_of is None else weights.tensor(output.copy_of)
    if source is not None:
      _copy(output, source, weights, entries, nonfinite, progress)


def _copy(
  output: Output,
  source: Tensor,
  weights: shard_writer.ShardWriter,
  entries: int,
  nonfinite: bool,
  progress: Progress,
) -> None:
  """Copies a tensor, cast to the dtype of the result."""
  size, digest = math.prod(output.shape), xxhash.xxh3_128()
  for start in range(0, max(size, 1), entries):
    values = np.empty(min(entries, size - start), source.dtype)
    source.read(start, values)
    digest.update(values.view(np.uint8).data)
    part = values
    with np.errstate(over="ignore", invalid="ignore"):  # Refused below, with its name.
      if output.copy_of is None and output.precision is not None:
        part = values.astype(np.dtype(output.precision.dtype))
      part = part.astype(output.dtype, copy=False)
    if not nonfinite and safetensors.is_floating(output.dtype):
      _refuse_nonfinite(output, source, values, part)
    inputs = {source.where: digest.hexdigest()} if output.copy_of is None else {}
    weights.add(output.name, start, part, inputs)
    progress(part.nbytes)


def _refuse_nonfinite(output: Output, source: Tensor, values: np.ndarray, part: np.ndarray) -> None:
  """Raises ValueError where a copied slice has NaN or infinity, as read or as stored."""
  lax = "nonfinite=True (--allow-nonfinite) allows it"
  if not slices.is_finite(values):
    raise ValueError(f"{source.where}, which is copied, has NaN or infinity; {lax}.")
  if not slices.is_finite(part):
    raise ValueError(
      f"{source.where}: {output.dtype} cannot hold its values; choose a wider dtype for the "
      f"result, or {lax}."
    )
