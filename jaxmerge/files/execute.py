"""Executes the plan of a merge of files: in bounded memory, resumable, all or nothing.

The result is written to a hidden folder next to its path, `.NAME.merging`: shards whose layout is
known before the first byte, and a journal of finished tensors. Then it is synced, completed with
config, tokenizer and provenance, and renamed. An Orbax checkpoint is written from the complete
shards, also in parts; if that is interrupted, the shards remain, and it is written again.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple  # Any: digests are plain JSON.

import jax

from jaxmerge.files import (
  estimate,
  finish,
  input_changes,
  out_formats,
  tied_weights,
  write_tensors,
)
from jaxmerge.files import resume as resume_lib
from jaxmerge.files.plan import Output, Plan
from jaxmerge.files.write_tensors import Progress
from jaxmerge.io.checkpoints import arrays
from jaxmerge.io.disk import atomic, shared, stamps
from jaxmerge.io.huggingface import folder, shard_writer, single_file
from jaxmerge.parallel import processes

Path = str | os.PathLike[str]

PROVENANCE = folder.PROVENANCE
_DROPPED = (
  "Nothing of the result is kept, as it would be a mixture: run the same command again when no "
  "other program writes there."
)
SHARD = 5_000_000_000  # Bytes, as in other tools.


class Options(NamedTuple):
  """Options of an execution; see `run`."""

  shard_size: int = SHARD
  entries: int | None = None
  nonfinite: bool = False
  out_format: str = "safetensors"


class Unfinished(NamedTuple):
  """A result in progress, in a folder next to its path.

  Attributes:
    plan: its plan; tensors that are stored twice are merged once.
    folder: folder to which it is written.
    shards: file to its tensors.
    identity: identity of the merge.
    digests: digests of all tensors, in the first process, if only the rename is left; else None.
    is_complete: whether all its tensors are written.
  """

  plan: Plan
  folder: pathlib.Path
  shards: Mapping[str, list[str]]
  identity: str
  digests: Mapping[str, Any] | None
  is_complete: bool


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
  progress: Progress = lambda count: None,
) -> pathlib.Path:
  """Executes a plan; the folder appears when all of it is done.

  Several processes, which must share the folders, each write a part of the tensors; reductions over
  several tensors are computed by every process. The first process completes the result.

  Args:
    plan: the plan.
    out: folder of the result; or, where its name ends in .safetensors, a file of the weights alone.
    shard_size: largest size of a weight file, in bytes.
    entries: approximate number of entries of each model in memory; None: from the number of models.
    replace: whether to replace an existing folder.
    resume: whether to resume an interrupted merge of the same plan; otherwise it starts again.
    nonfinite: whether NaN and infinity in the inputs are allowed: where an input has either, the
      result is NaN; other effects, such as on a sum over a tensor, depend on the method.
    out_format: "safetensors", or "orbax": a checkpoint in `out / "state"`, which `orbax.checkpoint`
      restores as {"params": {name: array}}; or "like:base": the layout of the base, an Orbax
      checkpoint of another program, which restores it. A checkpoint takes twice the disk space.
    locked: whether the caller has locked `out` already.
    progress: called with the number of bytes of the result that were read for a reduction, once for
      each pass, or written; a checkpoint's are written twice. `estimate.work` is the total.
  """
  plan = out_formats.prepare(plan, out_format)
  out = pathlib.Path(out)
  atomic.check_name(out)
  shard_size = single_file.LIMIT if single_file.is_output(out) else shard_size
  if out_formats.is_checkpoint(out_format):
    arrays.check_path(out)
  options = Options(shard_size, entries, nonfinite, out_format)
  lock = processes.is_first() and not locked
  with shard_writer.lock(out) if lock else contextlib.nullcontext():
    output = open_output(plan, out, options, replace=replace, resume=resume)
    if output is None:
      progress(estimate.work(plan, out_format))
      return out
    try:
      merge_jobs(output, options, progress)
      publish(output, out, options, replace=replace)
    except stamps.Changed as error:
      shutil.rmtree(output.folder)  # Inputs changed in between: the parts do not belong together.
      raise stamps.Changed(f"{error} {_DROPPED}") from error
  return out


def open_output(
  plan: Plan, out: pathlib.Path, options: Options, *, replace: bool, resume: bool
) -> Unfinished | None:
  """Opens the unfinished result of a plan; returns None if the result is already complete.

  Arguments as for `run`.

  Raises:
    ValueError: if `out` is an input, or another merge was interrupted there.
    FileExistsError: if `out` exists and `replace` is not set.
    OSError: if the disk is too small.
  """
  first = processes.is_first()
  single_file.check_free(out, replace)
  single_file.check_shards(out, plan.shards(options.shard_size), options.out_format)
  resume_lib.check_place(plan, out)
  shard_size, out_format, nonfinite = options.shard_size, options.out_format, options.nonfinite
  replaced = first and replace and resume and bool(atomic.old_folders(out))
  if processes.agree(
    replaced and resume_lib.is_result(out, plan, shard_size, out_format, nonfinite)
  ):
    if first:
      atomic.discard(out)  # An earlier run was killed after the renames and before this.
    return None
  folder = _make_folder(plan, out, resume=resume, out_format=out_format)
  shards = plan.shards(shard_size)
  identity = resume_lib.identity(plan, shards, out_format)
  plan = tied_weights.share_twins(plan)
  digests = None
  if first:
    digests = resume_lib.finished_digests(folder, plan, identity, shards, out_format, nonfinite)
  return Unfinished(plan, folder, shards, identity, digests, processes.agree(digests is not None))


def _make_folder(plan: Plan, out: pathlib.Path, *, resume: bool, out_format: str) -> pathlib.Path:
  """Creates the folder to which a result is written, unless it exists."""
  folder = shard_writer.unfinished_folder(out)
  if processes.is_first():
    if folder.exists() and not resume:
      shutil.rmtree(folder)
    shard_writer.check_room(out, estimate.disk_space(plan, out_format), begun=[folder])
    with atomic.room(folder):
      folder.mkdir(parents=True, exist_ok=True)
    atomic.tidy(folder)
  shared.check(folder)  # All processes wait until it exists.
  return folder


def merge_jobs(output: Unfinished, options: Options, progress: Progress) -> None:
  """Merges and copies this process's share of the unfinished tensors."""
  plan = output.plan
  if output.is_complete:
    progress(estimate.work(plan, options.out_format))
    return
  index, entries, nonfinite = jax.process_index(), options.entries, options.nonfinite
  share = _share(plan.outputs, index, jax.process_count())
  with shard_writer.open_writer(
    output.folder,
    {o.name: (o.dtype, o.shape) for o in plan.outputs},
    output.shards,
    output.identity,
    inputs=input_changes.journal_stamps(plan),
    journal=shard_writer.journal(index),
    checked=share,
    nonfinite=nonfinite,
  ) as weights:
    if weights.unverified:
      input_changes.check(plan, weights.digests, output.folder)
      weights.vouch()
    progress(sum(o.size for o in plan.outputs if o.name in weights.digests))
    for number in range(len(plan.jobs)):
      write_tensors.merge_job(plan, number, share, weights, entries, nonfinite, progress)
    write_tensors.copy_share(plan, share, weights, entries, nonfinite, progress)
    weights.flush()
    processes.agree(True)  # All have written and synced their share.
    if processes.is_first() and out_formats.is_checkpoint(options.out_format):
      finish.write_checkpoint(output.folder, plan, weights, options.out_format, progress)


def publish(output: Unfinished, out: pathlib.Path, options: Options, *, replace: bool) -> None:
  """Completes a result with config, tokenizer and provenance, and renames it to `out`."""
  if processes.is_first():
    digests = output.digests or shard_writer.read_journals(output.folder, output.identity)
    finish.complete(
      output.folder, output.plan, output.shards, output.identity, digests, options.out_format
    )
    if single_file.is_output(out):
      single_file.move(output.folder, out, replace=replace)
    else:
      atomic.move(output.folder, out, replace=replace)
  processes.agree(True)  # All processes wait until the result exists.


def _share(outputs: Sequence[Output], index: int, count: int) -> set[str]:
  """Returns the tensors that one process writes: consecutive ones, about equally many bytes each.

  Copies of another tensor go with it.
  """
  total, before, owner = sum(o.size for o in outputs), 0, {}
  for o in outputs:
    owner[o.name] = min(count - 1, before * count // max(total, 1))
    before += o.size
  return {o.name for o in outputs if owner[o.copy_of or o.name] == index}
