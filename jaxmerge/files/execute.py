"""Executes the plan of a merge of files: in bounded memory, resumable, all or nothing.

The result grows in a hidden folder beside its place, `.NAME.merging`: shards whose layout is known
before the first byte, and a journal of the tensors that are done. It is synced, completed by the
config, the tokenizer and the provenance, and renamed at the end. A checkpoint of Orbax is made from
the shards when these are complete, in parts as well; an interruption in the midst of it leaves the
shards, from which it is made again.
"""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Collection, Sequence

import jax
import numpy as np
import xxhash

from jaxmerge.drivers import slices, streaming
from jaxmerge.files import estimate, finish, input_changes, tied_weights
from jaxmerge.files import plan as plans
from jaxmerge.files import reader as readers
from jaxmerge.files import resume as resume_lib
from jaxmerge.files.plan import Job, Output, Plan
from jaxmerge.io.checkpoints import arrays
from jaxmerge.io.disk import atomic, shared, stamps
from jaxmerge.io.huggingface import folder, shard_writer
from jaxmerge.io.tensors import safetensors
from jaxmerge.io.tensors.tensor import Tensor
from jaxmerge.parallel import processes

Path = str | os.PathLike[str]

PROVENANCE = folder.PROVENANCE
FORMATS = ("safetensors", "orbax")
_DROPPED = (
  "Nothing of the result is kept, as it would be a mixture: run the same command again when no "
  "other program writes there."
)
SHARD = 5_000_000_000  # Bytes; what other tools write.


def run(
  plan: Plan,
  out: Path,
  *,
  shard_size: int = SHARD,
  entries: int | None = None,
  replace: bool = False,
  resume: bool = True,
  nonfinite: bool = False,
  out_format: str = "safetensors",
  locked: bool = False,
  progress: Callable[[int], None] = lambda count: None,
) -> pathlib.Path:
  """Does what a plan says; the folder appears when all of it is done.

  Of many processes, which see the same folders, each writes its share of the tensors; what counts
  over several tensors each measures by itself. The first one completes the result.

  Args:
    plan: what to do.
    out: folder of the result.
    shard_size: bytes of a file of weights, at most.
    entries: about so many entries of each model are in memory at a time; None: by their number.
    replace: whether a folder that is there is replaced.
    resume: whether to go on with an interrupted merge of the same plan; otherwise it starts anew.
    nonfinite: whether NaN and infinity in the inputs are let pass: where an input has either, the
      result has NaN; what they spoil beside, such as a sum over a tensor, is the method's.
    out_format: "safetensors", or "orbax": a checkpoint in `out / "state"`, which `orbax.checkpoint`
      restores as {"params": {name: array}}; on the way it takes twice the room.
    locked: whether the caller holds the lock of `out` already.
    progress: called with the number of bytes of the result that were measured, once for each
      reading, or added; those of a checkpoint are added twice. `estimate.work` says how many
      there will be.
  """
  if out_format not in FORMATS:
    raise ValueError(f"out_format must be one of {', '.join(FORMATS)}, got {out_format!r}.")
  out = pathlib.Path(out)
  atomic.check_name(out)
  if out_format == "orbax":
    arrays.check_path(out)
  first = processes.first()
  with shard_writer.lock(out) if first and not locked else contextlib.nullcontext():
    atomic.check_free(out, replace)
    resume_lib.check_place(plan, out)
    left = first and replace and resume and bool(atomic.old_folders(out))
    if processes.agree(left and resume_lib.is_result(out, plan, shard_size, out_format, nonfinite)):
      if first:
        atomic.discard(out)  # A kill came between the renames and this.
      progress(estimate.work(plan, out_format))
    else:
      part = _place(plan, out, resume=resume, out_format=out_format)
      try:
        _grown(plan, part, shard_size, entries, nonfinite, out_format, progress)
      except stamps.Changed as error:
        shutil.rmtree(part)  # What was read before and after does not belong together.
        raise stamps.Changed(f"{error} {_DROPPED}") from error
      if first:
        atomic.move(part, out, replace=replace)
      processes.agree(True)  # None goes on before the result is there.
  return out


def _place(plan: Plan, out: pathlib.Path, *, resume: bool, out_format: str) -> pathlib.Path:
  """Makes the folder in which a result grows, unless it is there."""
  part = shard_writer.unfinished_folder(out)
  if processes.first():
    if part.exists() and not resume:
      shutil.rmtree(part)
    shard_writer.check_room(out, estimate.disk_space(plan, out_format), begun=[part])
    with atomic.room(part):
      part.mkdir(parents=True, exist_ok=True)
    atomic.tidy(part)
  shared.check(part)  # None goes on before it is there.
  return part


def _grown(
  plan: Plan,
  part: pathlib.Path,
  shard_size: int,
  entries: int | None,
  nonfinite: bool,
  out_format: str,
  progress: Callable[[int], None],
) -> None:
  """Brings all of a result into its folder, which then only lacks its name."""
  first, index = processes.first(), jax.process_index()
  shards = plan.shards(shard_size)
  kinds = {o.name: (o.dtype, o.shape) for o in plan.outputs}
  identity = resume_lib.identity(plan, shards, out_format)
  plan = tied_weights.share_twins(plan)
  digests = None
  if first:
    digests = resume_lib.finished_digests(part, plan, identity, shards, out_format, nonfinite)
  if processes.agree(digests is not None):
    progress(estimate.work(plan, out_format))
  else:
    own = _share(plan.outputs, index, jax.process_count())
    begun = shard_writer.open_writer(
      part,
      kinds,
      shards,
      identity,
      inputs=input_changes.journal_stamps(plan),
      journal=shard_writer.journal(index),
      checked=own,
      nonfinite=nonfinite,
    )
    with begun as weights:
      if weights.unverified:
        input_changes.check(plan, weights.digests, part)
        weights.vouch()
      progress(sum(o.size for o in plan.outputs if o.name in weights.digests))
      for number, job in enumerate(plan.jobs):
        outputs = [o for o in plan.outputs if o.job == number]
        more = sum(o.size for o in outputs) * (estimate.passes(job) - 1)
        each = entries or plans.slice_entries(len(job.models))
        _merge(job, outputs, weights, own, each, nonfinite, progress, more)
      copied = [o for o in plan.outputs if o.job is None and o.name in own]
      _copy(copied, weights, entries or plans.slice_entries(1), nonfinite, progress)
      weights.flush()
      processes.agree(True)  # All have written and synced their share.
      if first and out_format == "orbax":
        finish.write_checkpoint(part, weights, progress)
  if first:
    digests = digests or shard_writer.read_journals(part, identity)
    finish.complete(part, plan, shards, identity, digests, out_format)


def _share(outputs: Sequence[Output], index: int, count: int) -> set[str]:
  """The tensors that one of many processes writes: neighbours, about as many bytes as others have.

  Those that are tied to another one go with it, since they are copied from it.
  """
  total, before, owner = sum(o.size for o in outputs), 0, {}
  for o in outputs:
    owner[o.name] = min(count - 1, before * count // max(total, 1))
    before += o.size
  return {o.name for o in outputs if owner[o.copy_of or o.name] == index}


def _merge(
  job: Job,
  outputs: Sequence[Output],
  weights: shard_writer.ShardWriter,
  own: Collection[str],
  entries: int,
  nonfinite: bool,
  progress: Callable[[int], None],
  more: int,
) -> None:
  """Merges this process's own tensors of one job; what is counted over all, it measures itself.

  Progress is told of so many bytes more than there are.
  """
  done = weights.digests.keys() | ({o.name for o in outputs} - set(own))
  if {o.name for o in outputs} <= done:
    _tell(progress, more)
    return
  leaves = {o.name: jax.ShapeDtypeStruct(o.shape, o.dtype) for o in outputs}
  reader = readers.Reader(outputs)
  narrow = {o.name: o.precision for o in outputs if o.precision is not None}
  wide = {o.name for o in outputs if any(t and t.dtype.itemsize == 8 for t in (o.base, *o.models))}
  source = streaming.Source(leaves, len(job.models), reader.read, narrow, wide)

  noted = False

  def write(name: str, start: int, part: np.ndarray) -> None:
    nonlocal noted
    if start == 0 and not noted and (digest := reader.whole()) is not None:
      weights.record_measurement(
        outputs[0].job or 0, digest, leaves.keys() & weights.digests.keys()
      )
      noted = True
    weights.add(name, start, part, reader.digests.get(name, {}))
    progress(part.nbytes)

  def measured(name: str, count: int) -> None:
    nonlocal more
    told = min(more, count * leaves[name].dtype.itemsize)  # Sometimes it takes a reading more.
    more -= told
    _tell(progress, told)

  # Some tensors of the job may be copied after all: a model lacks them, or they hold integers.
  numbers = {
    n: {t: v[t] for t in leaves} if isinstance(v, dict) else v for n, v in job.hparams.items()
  }
  streaming.stream(
    job.method(),
    source,
    write,
    hparams=numbers,
    seed=job.seed,
    names=job.models,
    layout=job.layout,
    entries=entries,
    done=done,
    nonfinite=nonfinite,
    on_measured=measured,
  )
  _tell(progress, more)  # By its options a method may need fewer readings.


def _tell(progress: Callable[[int], None], count: int) -> None:
  if count:
    progress(count)


def _copy(
  outputs: Sequence[Output],
  weights: shard_writer.ShardWriter,
  entries: int,
  nonfinite: bool,
  progress: Callable[[int], None],
) -> None:
  """Copies the tensors that no job merges: from the base, or from what they are tied to."""
  for output in outputs:
    source = output.base if output.copy_of is None else weights.tensor(output.copy_of)
    if output.name in weights.digests or source is None:
      continue
    size = math.prod(output.shape)
    digest = xxhash.xxh3_128()
    for start in range(0, max(size, 1), entries):
      own = np.empty(min(entries, size - start), source.dtype)
      source.read(start, own)
      digest.update(own.view(np.uint8).data)
      part = own
      with np.errstate(over="ignore", invalid="ignore"):  # It is refused below, and named.
        if output.copy_of is None and output.precision is not None:
          part = own.astype(np.dtype(output.precision.dtype))
        part = part.astype(output.dtype, copy=False)
      if not nonfinite and safetensors.is_floating(output.dtype):
        _refuse_nonfinite(output, source, own, part)
      inputs = {source.where: digest.hexdigest()} if output.copy_of is None else {}
      weights.add(output.name, start, part, inputs)
      progress(part.nbytes)


def _refuse_nonfinite(output: Output, source: Tensor, own: np.ndarray, part: np.ndarray) -> None:
  """Raises ValueError where a slice that is copied has NaN or infinity, as read or as stored."""
  lax = "nonfinite=True (--allow-nonfinite) lets it pass"
  if not slices.is_finite(own):
    raise ValueError(f"{source.where}, which is copied, has NaN or infinity; {lax}.")
  if not slices.is_finite(part):
    raise ValueError(
      f"{source.where}: {output.dtype} cannot hold its values; choose a wider dtype for the "
      f"result, or {lax}."
    )
