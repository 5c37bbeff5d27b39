"""What lies around the weights of a result: config, card, provenance."""

from __future__ import annotations

import importlib.metadata
import json
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxmerge.core import fingerprint
from jaxmerge.files import describe, outcomes
from jaxmerge.files.plan import Job, Plan
from jaxmerge.io.checkpoints import metadata
from jaxmerge.io.disk import atomic, stamps
from jaxmerge.io.huggingface import folder, shard_writer
from jaxmerge.report import card


def write_checkpoint(
  part: pathlib.Path, weights: shard_writer.ShardWriter, progress: Callable[[int], None]
) -> None:
  """Makes a checkpoint of the shards."""
  tensors = {name: weights.tensor(name) for name in weights.places}
  with atomic.room(part / metadata.STATE):
    metadata.write(part, tensors, progress)


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
  _write(part / folder.README, card.merge_card(describe.summary(plan)))
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
    "inputs": outcomes.texts(plan),
  }
  with atomic.write(part / folder.PROVENANCE) as file:
    file.write(json.dumps(facts, indent=1, default=str).encode() + b"\n")
  shard_writer.strip(part, shards, out_format)


def _copied(plan: Plan) -> list[pathlib.Path]:
  """Files of the donor to copy: those that were there when it was opened, and not what came later.

  Of a donor whose small files were not stamped, such as a checkpoint, all that are there.
  """
  found = folder.files_to_copy(plan.donor)
  stamped = plan.donor / folder.CONFIG in plan.stamps
  return [path for path in found if path in plan.stamps] if stamped else found


def _write(path: pathlib.Path, text: str | bytes) -> None:
  with atomic.room(path):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)


def _job(plan: Plan, number: int) -> dict[str, Any]:
  """What the provenance says of a job: its number counts from 1, as in what became of tensors."""
  job = plan.jobs[number]
  return {
    "job": number + 1,
    "method": job.spec,
    **({"recipe": job.recipe} if job.recipe else {}),
    "numbers": _numbers(job),
    "models": job.models,
    "seed": job.seed,
    "layout": job.layout.plain(),
    "tensors": sum(o.job == number for o in plan.outputs),
  }


def _numbers(job: Job) -> dict[str, Any]:
  """The method's numbers: its own, or those that it was given for all tensors or for each."""
  from jaxmerge.core import stage  # With jax, which a dry run does without.

  every = {**stage.hparams(job.method()), **job.hparams}
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
