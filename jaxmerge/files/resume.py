"""What is around the weights of a merge of files: its identity, config, card and provenance."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any  # Any: digests are plain JSON.

import numpy as np

from jaxmerge import fingerprint, inspecting, outcomes, summarizing, unchanged
from jaxmerge.io import atomic, checkpoint, folder, growing, stamps
from jaxmerge.planning import Job, Plan
from jaxmerge.report import card


def identity(plan: Plan, shards: Mapping[str, Sequence[str]], out_format: str) -> str:
  """A digest of all that decides about the bytes of the result."""
  content = {
    "jaxmerge": importlib.metadata.version("jaxmerge"),
    "outputs": [[o.name, o.dtype.name, o.shape, o.job, o.precision] for o in plan.outputs],
    "sources": [[t.where for t in (o.base, *o.models) if t is not None] for o in plan.outputs],
    "jobs": [
      [j.words, j.models, fingerprint.fingerprint(j.numbers), j.seed, j.layout.plain()]
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


def check_begun(
  plan: Plan, out: pathlib.Path, *, shard_size: int, out_format: str, anew: bool = False
) -> None:
  """Raises ValueError where an interrupted merge of other inputs or settings lies beside `out`.

  What is made of results that are themselves made `anew` goes on with no merge that was begun.
  """
  part = growing.part_of(out)
  if not growing.journals(part):
    return
  if anew:
    raise growing.other(part)
  shards = plan.shards(shard_size)
  growing.noted(part, identity(plan, shards, out_format))


def check_place(plan: Plan, out: pathlib.Path) -> None:
  """Raises ValueError where a result would replace, and so remove, what it is made of.

  And where it would take over what a link leads to, out of the folder of a model.
  """
  folder.copied(plan.donor)
  place = os.path.realpath(out)
  for path in sorted({plan.donor, *(file.parent for file in plan.inputs)}):
    if os.path.commonpath([place, os.path.realpath(path)]) == place:
      raise ValueError(
        f"{out}: {path}, which is merged, lies there and would be removed; give another place for "
        "the result."
      )


def holds(out: pathlib.Path, plan: Plan, shard_size: int, out_format: str, nonfinite: bool) -> bool:
  """Tells whether a folder is what a plan makes, by a merge that lets NaN pass, or does not."""
  if not (out / folder.PROVENANCE).is_file():
    return False
  facts = folder.provenance(out)
  shards = plan.shards(shard_size)
  if facts.get("plan") != identity(plan, shards, out_format):
    return False
  tensors = _tensors(out, facts)
  fine = all(growing.counts(own, nonfinite) for own in tensors.values())
  return fine and unchanged.same(plan, tensors, out)


def vouch(out: pathlib.Path, plan: Plan, shard_size: int, out_format: str) -> None:
  """Writes down in a result, which is an input of another merge, which files it was made of."""
  own = identity(plan, plan.shards(shard_size), out_format)
  growing.vouch(out, own, unchanged.stamped(plan))


def _tensors(home: pathlib.Path, facts: Mapping[str, Any]) -> dict[str, Any]:
  """What a provenance says of the tensors, which is read like any file that others may change."""
  tensors = facts.get("tensors")
  if not isinstance(tensors, dict) or not all(
    isinstance(own, dict) and isinstance(own.get("inputs"), dict) for own in tensors.values()
  ):
    where = f"{home / folder.PROVENANCE}: tensors"
    raise ValueError(f"{where} must map names to checksums; it was damaged, remove {home}.")
  return tensors


def _stamp(plan: Plan, path: pathlib.Path) -> list[int]:
  stamp = plan.stamps[path] if path in plan.stamps else stamps.of(path)
  return [stamp.size, stamp.modified]


def transcribe(
  part: pathlib.Path, weights: growing.Growing, progress: Callable[[int], None]
) -> None:
  """Makes a checkpoint of the shards."""
  tensors = {name: weights.tensor(name) for name in weights.places}
  with atomic.room(part / checkpoint.STATE):
    checkpoint.write(part, tensors, progress)


def whole(
  part: pathlib.Path,
  plan: Plan,
  identity: str,
  shards: Mapping[str, Sequence[str]],
  out_format: str,
  nonfinite: bool,
) -> dict[str, Any] | None:
  """Returns the digests of a folder that only lacks its name, since a kill came before the rename.

  The provenance is written when the weights are whole, and before anything is removed: a folder
  that has it is that of a merge which is done, if its tensors still have their checksums.

  Returns:
    Tensor to what the journal said of it; None where there is work to do on the weights, also where
    NaN is not let pass, and was so there, or the inputs are others.

  Raises:
    ValueError: where the folder holds another merge.
  """
  if not (part / folder.PROVENANCE).is_file():
    return None
  facts = folder.provenance(part)
  if facts.get("plan") != identity:
    raise growing.other(part)
  if out_format != "safetensors":
    _strip(part, shards, out_format)  # Else the shards might be taken for the result.
  try:
    found = inspecting.checked(inspecting.described(part))["check"]
  except (FileNotFoundError, ValueError):  # It was damaged meanwhile, and is made again.
    return None
  if found["changed"] or found["missing"] or found["added"]:
    return None
  tensors = _tensors(part, facts)
  if not all(growing.counts(own, nonfinite) for own in tensors.values()):
    return None
  if not unchanged.same(plan, tensors, part):
    return None
  return {n: {k: v for k, v in own.items() if k != "job"} for n, own in tensors.items()}


def complete(
  part: pathlib.Path,
  plan: Plan,
  shards: Mapping[str, list[str]],
  identity: str,
  digests: Mapping[str, Any],
  out_format: str,
) -> None:
  """Adds to the weights what makes a folder of them that other tools open; removes the rest."""
  if folder.WEIGHTS not in shards and out_format == "safetensors":
    _write(part / folder.INDEX, folder.index(shards, {o.name: o.size for o in plan.outputs}))
  for path in _copied(plan):
    target = part / path.relative_to(plan.donor)
    with atomic.room(target):
      target.parent.mkdir(exist_ok=True)
      shutil.copyfile(path, target)
  _write(part / folder.README, card.merge_card(summarizing.summary(plan)))
  for name, own in plan.texts.items():
    (part / name).unlink(missing_ok=True)
    if own is not None:
      _write(part / name, own)
  stamps.check(plan.stamps)  # All was read, and nothing is complete before this.
  facts = {
    "plan": identity,
    "jaxmerge": importlib.metadata.version("jaxmerge"),
    "jax": importlib.metadata.version("jax"),
    **plan.facts,
    **({"notes": plan.notes} if plan.notes else {}),
    "counts": outcomes.counts(plan),
    "jobs": [_job(plan, number) for number in range(len(plan.jobs))],
    "tensors": {
      o.name: digests[o.name] | ({} if o.job is None else {"job": o.job + 1}) for o in plan.outputs
    },
    "inputs": plan.fates,
  }
  with atomic.write(part / folder.PROVENANCE) as file:
    file.write(json.dumps(facts, indent=1, default=str).encode() + b"\n")
  _strip(part, shards, out_format)


def _copied(plan: Plan) -> list[pathlib.Path]:
  """Files of the donor to copy: those that were there when it was opened, and not what came later.

  Of a donor whose small files were not stamped, such as a checkpoint, all that are there.
  """
  found = folder.copied(plan.donor)
  stamped = plan.donor / folder.CONFIG in plan.stamps
  return [path for path in found if path in plan.stamps] if stamped else found


def _write(path: pathlib.Path, text: str | bytes) -> None:
  with atomic.room(path):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)


def _strip(part: pathlib.Path, shards: Mapping[str, Sequence[str]], out_format: str) -> None:
  """Removes what a folder has of the merge, and not of its result."""
  for path in growing.journals(part):
    path.unlink()
  for name in [] if out_format == "safetensors" else shards:
    (part / name).unlink(missing_ok=True)


def _job(plan: Plan, number: int) -> dict[str, Any]:
  """What the provenance says of a job: its number counts from 1, as in what became of tensors."""
  job = plan.jobs[number]
  return {
    "job": number + 1,
    "method": job.words,
    **({"recipe": job.asked} if job.asked else {}),
    "numbers": _numbers(job),
    "models": job.models,
    "seed": job.seed,
    "layout": job.layout.plain(),
    "tensors": sum(o.job == number for o in plan.outputs),
  }


def _numbers(job: Job) -> dict[str, Any]:
  """The method's numbers: its own, or those that it was given for all tensors or for each."""
  from jaxmerge import stage  # With jax, which a dry run does without.

  every = {**stage.numbers(job.method()), **job.numbers}
  return {name: _plain(x, len(job.models)) for name, x in every.items() if name != "seed"}


def _plain(value: Any, most: int) -> Any:
  """A number as plain JSON; of more than one for each model, such as a Fisher matrix, a digest."""
  if value is None or isinstance(value, bool | int | float | str):
    return value
  if isinstance(value, Mapping):
    return {name: _plain(own, most) for name, own in value.items()}
  own = np.asarray(value)
  if own.size <= most:
    return own.tolist()
  return {"shape": list(own.shape), "fingerprint": fingerprint.fingerprint(own)}
