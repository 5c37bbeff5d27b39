"""The identity of a merge of files, and its state on disk, partial or complete."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any  # Any: digests are plain JSON.

from jaxmerge.core import fingerprint
from jaxmerge.files import input_changes, inspection
from jaxmerge.files.plan import Plan
from jaxmerge.io.disk import stamps
from jaxmerge.io.huggingface import folder, shard_writer


def identity(plan: Plan, shards: Mapping[str, Sequence[str]], out_format: str) -> str:
  """Returns a digest of everything that determines the bytes of the result."""
  content = {
    "jaxmerge": importlib.metadata.version("jaxmerge"),
    "outputs": [[o.name, o.dtype.name, o.shape, o.job, o.precision] for o in plan.outputs],
    "sources": [[t.where for t in (o.base, *o.models) if t is not None] for o in plan.outputs],
    "jobs": [
      [j.spec, j.models, fingerprint.fingerprint(j.hparams), j.seed, j.layout.plain()]
      for j in plan.jobs
    ],
    "shards": shards,
    "format": out_format,
    "inputs": {str(path): _stamp(plan, path) for path in sorted(plan.inputs)},
    "facts": plan.facts,
    "texts": plan.texts,
  }
  text = json.dumps(content, default=str, sort_keys=True)
  return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def check_unfinished(
  plan: Plan, out: pathlib.Path, *, shard_size: int, out_format: str, anew: bool = False
) -> None:
  """Raises ValueError where an interrupted merge beside `out` has other inputs or settings.

  Where intermediate results are written `anew`, no earlier merge is continued.
  """
  directory = shard_writer.unfinished_folder(out)
  if not shard_writer.journals(directory):
    return
  if anew:
    raise shard_writer.other_merge(directory)
  shards = plan.shards(shard_size)
  shard_writer.read_journals(directory, identity(plan, shards, out_format))


def check_place(plan: Plan, out: pathlib.Path) -> None:
  """Raises ValueError where a result would replace, and so remove, one of its inputs.

  It also refuses a place whose links lead into the folder of a model.
  """
  folder.files_to_copy(plan.donor)
  place = os.path.realpath(out)
  for path in sorted({plan.donor, *(file.parent for file in plan.inputs)}):
    if os.path.commonpath([place, os.path.realpath(path)]) == place:
      raise ValueError(
        f"{out}: {path}, which is merged, lies there and would be removed; give another place for "
        "the result."
      )


def is_result(
  out: pathlib.Path, plan: Plan, shard_size: int, out_format: str, nonfinite: bool
) -> bool:
  """Returns whether a folder is the result of a plan, with NaN only if that is allowed."""
  if not (out / folder.PROVENANCE).is_file():
    return False
  facts = folder.provenance(out)
  shards = plan.shards(shard_size)
  if facts.get("plan") != identity(plan, shards, out_format):
    return False
  tensors = _tensors(out, facts)
  fine = all(shard_writer.counts_as_done(record, nonfinite) for record in tensors.values())
  return fine and input_changes.are_unchanged(plan, tensors, out)


def vouch(out: pathlib.Path, plan: Plan, shard_size: int, out_format: str) -> None:
  """Records the input files of an intermediate result in it."""
  merge = identity(plan, plan.shards(shard_size), out_format)
  shard_writer.vouch(out, merge, input_changes.journal_stamps(plan))


def _tensors(home: pathlib.Path, facts: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the tensor records of a provenance, checked, as others may have changed it."""
  tensors = facts.get("tensors")
  if not isinstance(tensors, dict) or not all(
    isinstance(record, dict) and isinstance(record.get("inputs"), dict)
    for record in tensors.values()
  ):
    where = f"{home / folder.PROVENANCE}: tensors"
    raise ValueError(f"{where} must map names to checksums; it was damaged, remove {home}.")
  return tensors


def _stamp(plan: Plan, path: pathlib.Path) -> list[int]:
  stamp = plan.stamps[path] if path in plan.stamps else stamps.of(path)
  return [stamp.size, stamp.modified]


def finished_digests(
  directory: pathlib.Path,
  plan: Plan,
  identity: str,
  shards: Mapping[str, Sequence[str]],
  out_format: str,
  nonfinite: bool,
) -> dict[str, Any] | None:
  """Returns the digests of a complete folder that was killed just before its rename.

  The provenance is written when the weights are whole, and before anything is removed: a folder
  that has it is that of a merge which is done, if its tensors still have their checksums.

  Returns:
    Tensor to its record in the journal; None where there is work to do on the weights, also where
    NaN is not let pass, and was so there, or the inputs are others.

  Raises:
    ValueError: where the folder holds another merge.
  """
  if not (directory / folder.PROVENANCE).is_file():
    return None
  facts = folder.provenance(directory)
  if facts.get("plan") != identity:
    raise shard_writer.other_merge(directory)
  if out_format != "safetensors":
    shard_writer.strip(
      directory, shards, out_format
    )  # Else the shards might be taken for the result.
  try:
    check = inspection.compare_checksums(inspection.inspect(directory))["check"]
  except (FileNotFoundError, ValueError):  # It was damaged meanwhile, and is made again.
    return None
  if check["changed"] or check["missing"] or check["added"]:
    return None
  tensors = _tensors(directory, facts)
  if not all(shard_writer.counts_as_done(record, nonfinite) for record in tensors.values()):
    return None
  if not input_changes.are_unchanged(plan, tensors, directory):
    return None
  return {name: {k: v for k, v in record.items() if k != "job"} for name, record in tensors.items()}
